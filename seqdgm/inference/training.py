"""Gradient learning of deep models: minibatches, early stopping on a tail, guarded updates."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seqdgm.inference.objectives import Objective, evaluate
from seqdgm.results import FitReport
from seqdgm.types import Batch, check_count, draw_seed, seeded

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes
    ----------
    max_epochs : int
        Passes over the series at most.
    learning_rate : float
        Step size of AdamW.
    weight_decay : float
    batch_size : int
        Series in one update.
    clip : float
        Largest norm of the gradient.
    patience : int
        Epochs without a better validation objective before training stops.
    valid_fraction : float
        Share of each series, at its end, that is held out to decide when to stop; 0 trains on
        everything for `max_epochs`.
    kl_warmup : int
        Epochs over which the weight of the divergence rises from 0 to 1.
    """

    max_epochs: int = 300
    learning_rate: float = 5e-3
    weight_decay: float = 1e-4
    batch_size: int = 32
    clip: float = 5.0
    patience: int = 60
    valid_fraction: float = 0.1
    kl_warmup: int = 40


class _Objective(nn.Module):
    """The negative bound per step as a module, so that Fabric can wrap it."""

    def __init__(self, model: StateSpaceModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: Batch, beta: float, generator: torch.Generator
    ) -> Float[Tensor, "series time"]:
        return evaluate(self.model, batch, Objective(), beta, generator).value


@dataclass
class _Progress:
    """What training has seen so far."""

    best: dict[str, Tensor]
    best_value: float = -math.inf
    best_epoch: int = 0
    train: tuple[float, ...] = ()
    valid: tuple[float, ...] = ()
    message: str = ""


def fit(
    model: StateSpaceModel,
    batch: Batch,
    *,
    method: str,
    generator: torch.Generator,
    progress: bool,
    **options: Any,
) -> FitReport:
    """Maximise the evidence lower bound (the likelihood itself for a model without latent states).

    The objectives of the report are in nats per step, in model units. The weights of the best
    validation epoch are kept. An update whose loss or gradient is not finite is never applied: the
    training stops there, keeps the best weights and names the series in the report.

    Raises
    ------
    ValueError
        For an unknown option, or if not even the first epoch gave a finite objective.
    """
    opts = _options(model, options)
    for name in ("max_epochs", "batch_size", "patience"):
        check_count(name, getattr(opts, name))
    if opts.learning_rate <= 0 or opts.clip <= 0:
        raise ValueError(
            f"learning_rate={opts.learning_rate!r} and clip={opts.clip!r} must be positive"
        )
    begin = time.perf_counter()
    head, cut = _split(batch, opts.valid_fraction)
    rng = torch.Generator(device=batch.x.device).manual_seed(draw_seed(generator))
    objective = _Objective(model).train()
    state = _Progress(best=_snapshot(model))
    with seeded(generator):
        epochs = _train(objective, batch, head, cut, opts, rng, state)
        for _ in _shown(epochs, opts.max_epochs) if progress else epochs:
            pass
    if not math.isfinite(state.best_value):
        raise ValueError(state.message or "training gave no finite objective")
    model.load_state_dict(state.best)
    model.eval()
    stopped = not state.message and len(state.train) < opts.max_epochs
    return FitReport(
        method=method,
        objective=state.train,
        valid_objective=state.valid,
        converged=np.array([stopped]),
        n_iter=len(state.train),
        seconds=time.perf_counter() - begin,
        messages=(state.message,) if state.message else (),
    )


def warm_up() -> None:
    """Import what training needs."""
    import_module("lightning_fabric")


def _train(
    objective: _Objective,
    batch: Batch,
    head: Batch,
    cut: Int[Tensor, "series"],
    opts: TrainingOptions,
    rng: torch.Generator,
    state: _Progress,
) -> Iterator[int]:
    """Run the epochs, one at each step of the iterator."""
    from lightning_fabric import Fabric

    device = batch.x.device
    fabric = Fabric(accelerator="cuda" if device.type == "cuda" else "cpu", devices=1)
    optimizer = torch.optim.AdamW(
        objective.parameters(), lr=opts.learning_rate, weight_decay=opts.weight_decay
    )
    wrapped, optimizer = fabric.setup(objective, optimizer, move_to_device=False)
    seed = draw_seed(rng)
    for epoch in range(opts.max_epochs):
        beta = min(1.0, (epoch + 1) / opts.kl_warmup) if opts.kl_warmup else 1.0
        total, count = 0.0, 0
        order = torch.randperm(head.n_series, generator=rng, device=device)
        for rows in order.split(opts.batch_size):
            part = _trim(head.take(rows))
            terms = wrapped(part, beta, rng)
            steps = part.valid.sum()
            loss = -terms.sum() / steps
            if not _apply(fabric, wrapped, optimizer, loss, opts.clip):
                state.message = _blame(part, terms, epoch)
                return
            total, count = total + float(terms.detach().sum()), count + int(steps)
        state.train += (total / count,)
        _validate(objective, batch, cut, seed, state, epoch)
        yield epoch
        waited = epoch - max(state.best_epoch, opts.kl_warmup)
        if opts.valid_fraction and waited >= opts.patience:
            return


def _apply(fabric: Any, module: Any, optimizer: Any, loss: Tensor, clip: float) -> bool:
    """One update; False, and nothing changed, if the loss or the gradient is not finite."""
    if not bool(torch.isfinite(loss)):
        return False
    optimizer.zero_grad()
    fabric.backward(loss)
    norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
    if not bool(torch.isfinite(norm)):
        return False
    optimizer.step()
    return True


@torch.no_grad()
def _validate(
    objective: _Objective,
    batch: Batch,
    cut: Int[Tensor, "series"],
    seed: int,
    state: _Progress,
    epoch: int,
) -> None:
    """Score the held-out tail and remember the best weights (the last ones without a tail)."""
    t = torch.arange(batch.n_steps, device=batch.x.device)
    tail = batch.mask.any(-1) & (t[None] >= cut[:, None])
    if bool(tail.any()):
        objective.eval()
        # The same noise at every epoch, so that epochs differ by their weights alone.
        rng = torch.Generator(device=batch.x.device).manual_seed(seed)
        terms = objective(batch, 1.0, rng)
        objective.train()
        value = float(terms[tail].double().mean())
        state.valid += (value,)
        better = value > state.best_value
    else:
        value, better = state.train[-1], True
    if math.isfinite(value) and better:
        state.best_value, state.best_epoch = value, epoch
        state.best = _snapshot(objective.model)


def _options(model: StateSpaceModel, options: dict[str, Any]) -> TrainingOptions:
    known = {f.name for f in fields(TrainingOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"unknown training options {unknown}; choose from {sorted(known)}")
    own = {name: value for name, value in model.get_params().items() if name in known}
    return replace(TrainingOptions(), **{**own, **options})


def _split(batch: Batch, fraction: float) -> tuple[Batch, Int[Tensor, "series"]]:
    """Cut the tail of every series off for validation (series of under ten steps stay whole)."""
    if not 0 <= fraction < 1:
        raise ValueError(f"valid_fraction={fraction!r} must lie in [0, 1)")
    t = torch.arange(batch.n_steps, device=batch.x.device)
    # Counted from the last observation: a tail without any would decide by nothing.
    last = (batch.mask.any(-1) * (t + 1)).amax(1)
    held = torch.where(
        batch.lengths >= 10,
        (batch.lengths * fraction).ceil().long(),
        torch.zeros_like(batch.lengths),
    )
    cut = (last - held).clamp_min(1)
    inside = torch.arange(batch.n_steps, device=cut.device)[None] < cut[:, None]
    head = replace(batch, mask=batch.mask & inside[..., None], lengths=cut)
    return _trim(head), cut


def _trim(batch: Batch) -> Batch:
    """Drop the padding beyond the longest series."""
    steps = int(batch.lengths.max())
    return replace(batch, x=batch.x[:, :steps], mask=batch.mask[:, :steps])


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def _blame(batch: Batch, terms: Tensor, epoch: int) -> str:
    bad = torch.nonzero(~torch.isfinite(terms.sum(1)))
    if len(bad):
        where = f"series {batch.ids[int(bad[0, 0])]!r} gave a loss that is not finite"
    else:
        where = "the gradient was not finite"
    return (
        f"epoch {epoch}: {where}; the update was not applied and training stopped there. "
        "Scale the data or lower learning_rate"
    )


def _shown(epochs: Iterator[int], total: int) -> Iterator[int]:
    from rich.console import Console
    from rich.progress import track

    yield from track(epochs, description="training", total=total, console=Console(stderr=True))
