"""Gradient learning: minibatches, schedules, early stopping, checkpoints, guarded updates.

On several processes, each has a share of every minibatch and the gradients are averaged by
`torch.nn.parallel.DistributedDataParallel`. One script serves one process and many::

    # train.py
    model = sq.DMM(...).fit(y, seed=0, devices=4, device="cuda")
    if int(os.environ["RANK"]) == 0:
        model.save("dmm.safetensors")

    torchrun --nproc_per_node=4 train.py

Every process passes the same data and the same seed, and ends with the same model. The gradient is
that of one process with the same minibatches; the draws of latent states are independent between
the processes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from seqdgm.inference import checkpoints
from seqdgm.inference.batching import minibatches, move, split_tail, trim
from seqdgm.inference.schedules import Plateau, rate_share
from seqdgm.inference.training_options import TrainingOptions, read_options
from seqdgm.inference.updates import Outcome, Updater, Work
from seqdgm.results import FitReport
from seqdgm.types import Batch, draw_seed, seeded

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

__all__ = ["TrainingOptions", "fit", "warm_up"]


@dataclass
class Curves:
    """What the report says of each epoch."""

    objective: list[float] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    valid_objective: list[float] = field(default_factory=list)
    valid_epochs: list[int] = field(default_factory=list)


@dataclass
class Progress:
    """How far training has come; all of it goes into a checkpoint.

    Attributes
    ----------
    epoch : int
        Epochs that are done.
    position : int
        Updates of the present epoch that are done.
    sums : list of float
        Objective, reconstruction, divergence, steps, gradient norms and their number so far in the
        present epoch.
    """

    order_seed: int
    valid_seed: int
    epoch: int = 0
    position: int = 0
    updates: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 6)
    curves: Curves = field(default_factory=Curves)
    best_value: float = -math.inf
    best_epoch: int = 0
    plateau: Plateau = field(default_factory=Plateau)
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class Held:
    """The series that decide when to stop, and the first step of each that counts."""

    batch: Batch
    begin: Int[Tensor, "series"]


@dataclass
class Run:
    """One training run."""

    updater: Updater
    opts: TrainingOptions
    head: Batch
    held: Held | None
    generator: torch.Generator
    state: Progress
    best: dict[str, Tensor]
    identity: dict[str, Any]
    begin: float
    saved: float
    blamed: Any = None  # a series that the last validation found no finite objective for

    @property
    def model(self) -> StateSpaceModel:
        """What is trained."""
        return self.updater.evaluation.model

    @property
    def rank(self) -> int:
        """Number of this process."""
        return int(self.updater.fabric.global_rank)

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        state, opts = self.state, self.opts
        warming = opts.kl_warmup if self.model.has_proposal else 0
        waited = state.epoch - 1 - max(state.best_epoch, warming)
        tired = self.held is not None and waited >= opts.patience
        return bool(state.message) or state.epoch >= opts.max_epochs or tired


def fit(
    model: StateSpaceModel,
    batch: Batch,
    *,
    method: str,
    generator: torch.Generator,
    progress: bool,
    valid: Batch | None = None,
    **options: Any,
) -> FitReport:
    """Maximise a bound of the likelihood (itself, for a model without latent states).

    The objectives of the report are in nats per step, in model units. Every step of the data weighs
    the same, however the series are divided into minibatches. The weights of the best validation
    epoch are kept. An update whose loss or gradient is not finite is never applied: the training
    stops there, keeps the best weights and names the series in the report.

    Parameters
    ----------
    model : StateSpaceModel
        With its weights in place; trained there.
    batch : Batch
    method : {"elbo", "iwae", "fivo", "rws", "mle"}
        What is maximised (`seqdgm.inference.objectives`); ``"mle"`` where nothing is latent.
    generator : torch.Generator
    progress : bool
        Show a bar on standard error.
    valid : Batch, optional
        Series that decide when to stop, in place of the tail of each series of `batch`.
    **options
        See `TrainingOptions`.

    Raises
    ------
    ValueError
        For an unknown option, a checkpoint of another run, or if not even the first epoch gave a
        finite objective.
    """
    run = _begin(model, batch, valid, read_options(model, method, options), method, generator)
    opts = run.opts
    with seeded(run.generator):
        if opts.resume is not None:
            _resume(run)
        for _ in _shown(run) if progress and run.rank == 0 else _train(run):
            if opts.on_epoch is not None:
                opts.on_epoch(_report(run))
        if opts.checkpoint is not None:
            _save(run)
    if not math.isfinite(run.state.best_value):
        raise ValueError(
            run.state.message
            or f"no epoch gave a finite validation objective (series {run.blamed!r}, the first at "
            "fault in the last of them); scale the data, or look at what is held out"
        )
    model.load_state_dict(run.best)
    model.eval()
    return _report(run)


def warm_up() -> None:
    """Import what training needs."""
    import_module("lightning_fabric")


def _begin(
    model: StateSpaceModel,
    batch: Batch,
    valid: Batch | None,
    opts: TrainingOptions,
    method: str,
    generator: torch.Generator,
) -> Run:
    opts.check_machine(model.device.type)
    begin = time.monotonic()
    updater = Updater.of(model, opts)
    batch = move(batch, model.device)
    valid = None if valid is None else move(valid, model.device)
    state = Progress(draw_seed(generator), draw_seed(generator))
    noise = torch.Generator(device=model.device)
    noise.manual_seed(draw_seed(generator) + updater.fabric.global_rank)
    identity = {"model": _described(model), "method": method, "options": opts.bound()}
    if opts.checkpoint is not None or opts.resume is not None:
        identity["data"] = checkpoints.fingerprint(batch, valid)
    head, held = _hold_out(batch, valid, opts)
    return Run(updater, opts, head, held, noise, state, _snapshot(model), identity, begin, begin)


def _hold_out(
    batch: Batch, valid: Batch | None, opts: TrainingOptions
) -> tuple[Batch, Held | None]:
    if valid is not None:
        if valid.u.shape[2] != batch.u.shape[2]:
            raise ValueError(
                f"the validation series have {valid.u.shape[2]} input columns, the others "
                f"{batch.u.shape[2]}; pass valid_inputs= with the columns of inputs="
            )
        return batch, Held(valid, torch.zeros_like(valid.lengths))
    head, cut = split_tail(batch, opts.valid_fraction)
    t = torch.arange(batch.n_steps, device=cut.device)
    tail = batch.mask.any(-1) & (t[None] >= cut[:, None])
    return head, Held(batch, cut) if bool(tail.any()) else None


def _train(run: Run) -> Iterator[int]:
    """Run the epochs that are left, one at each step of the iterator."""
    while not run.done:
        if not _epoch(run):
            return
        _close_epoch(run)
        yield run.state.epoch


def _epoch(run: Run) -> bool:
    """Make the updates that are left of an epoch; False where one was not finite."""
    state, opts = run.state, run.opts
    lengths = run.head.lengths.cpu().numpy()
    # A generator of the epoch's own: a resumed run need not repeat the epochs before.
    order = torch.Generator().manual_seed(state.order_seed + state.epoch)
    parts = minibatches(lengths, opts.batch_size, opts.padding, order)
    weight = len(parts) / lengths.sum()
    beta = min(1.0, (state.epoch + 1) / opts.kl_warmup) if opts.kl_warmup else 1.0
    for k in range(state.position, len(parts)):
        rate = _rate(run, k, len(parts))
        outcome = _share(run, parts[k], weight, beta, rate)
        if outcome.fault:
            state.message = (
                f"epoch {state.epoch}: {outcome.fault}; the update was not applied and training "
                "stopped there. Scale the data or lower learning_rate"
            )
            return False
        norm = (outcome.norm, 1.0) if math.isfinite(outcome.norm) else (0.0, 0.0)
        added = (*outcome.totals, *norm)
        state.sums = [a + b for a, b in zip(state.sums, added, strict=True)]
        state.position, state.updates = k + 1, run.updater.count
        if outcome.due:
            _save(run)
    state.curves.learning_rate.append(_rate(run, len(parts) - 1, len(parts)))
    return True


def _share(
    run: Run, rows: Int[np.ndarray, "chosen"], weight: float, beta: float, rate: float
) -> Outcome:
    """One update by this process's share of a minibatch."""
    world, rank = run.opts.world, run.rank
    own = rows[rank::world]
    # A process that is left without a series goes along with one that counts for nothing.
    factor = weight * world if len(own) else 0.0
    chosen = torch.from_numpy(own if len(own) else rows[:1]).to(run.head.x.device)
    due = run.opts.checkpoint is not None and (
        time.monotonic() - run.saved >= 60 * run.opts.checkpoint_minutes
    )
    return run.updater(
        trim(run.head.take(chosen)),
        weight=factor,
        beta=beta,
        rate=rate,
        generator=run.generator,
        due=due and rank == 0,
    )


def _rate(run: Run, k: int, count: int) -> float:
    opts, state = run.opts, run.state
    share = rate_share(
        opts.schedule,
        state.epoch * count + k,
        opts.max_epochs * count,
        int(opts.lr_warmup * count),
        opts.lr_floor,
        state.plateau.share,
    )
    return opts.learning_rate * share


def _close_epoch(run: Run) -> None:
    """Write down the epoch, validate, and remember the best weights (the last without a tail)."""
    state, opts, curves = run.state, run.opts, run.state.curves
    *totals, steps, norms, updates = state.sums
    for name, total in zip(("objective", "reconstruction", "divergence"), totals, strict=True):
        getattr(curves, name).append(total / steps)
    curves.gradient_norm.append(norms / updates if updates else math.nan)
    state.epoch, state.position, state.sums = state.epoch + 1, 0, [0.0] * 6
    if state.epoch % opts.evaluate_every and state.epoch < opts.max_epochs:
        return
    with run.updater.averaged():
        value, better = curves.objective[-1], True
        if run.held is not None:
            value = _validate(run, run.held)
            curves.valid_objective.append(value)
            curves.valid_epochs.append(state.epoch)
            better = value > state.best_value
        state.plateau = state.plateau.after(value, opts.plateau_patience, opts.plateau_factor)
        if math.isfinite(value) and better:
            state.best_value, state.best_epoch = value, state.epoch - 1
            run.best = _snapshot(run.model)


@torch.no_grad()
def _validate(run: Run, held: Held) -> float:
    """Objective per observed step of what was held out, in the model's own precision."""
    module, device = run.updater.evaluation.eval(), held.batch.x.device
    world, rank = run.opts.world, run.rank
    # The bound itself, whatever is added to it or taken from it to learn better.
    target = replace(run.opts.objective, free_bits=0.0)
    # The same noise at every epoch, so that epochs differ by their weights alone.
    noise = torch.Generator(device=device).manual_seed(run.state.valid_seed + rank)
    order = torch.argsort(held.batch.lengths, stable=True)[rank::world]
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for rows in order.split(run.opts.batch_size):
        part = trim(held.batch.take(rows))
        t = torch.arange(part.n_steps, device=device)
        counted = part.mask.any(-1) & (t[None] >= held.begin[rows, None]) & part.valid
        terms, _ = module(Work(part, target, 1.0, noise))
        value = terms.reconstruction - terms.divergence
        faults = torch.nonzero(counted & ~value.isfinite())
        if len(faults):
            run.blamed = part.ids[int(faults[0, 0])]
        sums += torch.stack([value[counted].double().sum(), counted.sum()])
    module.train()
    total, steps = run.updater.sum(sums).tolist()
    return float(total / steps)


def _report(run: Run) -> FitReport:
    state = run.state
    stopped = run.done and not state.message and state.epoch < run.opts.max_epochs
    curves: dict[str, Any] = {name: tuple(values) for name, values in vars(state.curves).items()}
    return FitReport(
        method=run.identity["method"],
        converged=np.array([stopped]),
        n_iter=state.epoch,
        seconds=state.seconds + time.monotonic() - run.begin,
        messages=(state.message,) if state.message else (),
        best_epoch=state.best_epoch + 1,
        **curves,
    )


def _save(run: Run) -> None:
    """Write a checkpoint; every process takes part with its random generators."""
    assert run.opts.checkpoint is not None
    tensors = run.updater.tensors() | checkpoints.pack("best", run.best)
    for name, own in _generators(run).items():
        state = own.get_state().to(run.model.device, torch.int64)
        states = state.new_zeros(run.opts.world, len(state))
        states[run.rank] = state
        tensors[f"generators/{name}"] = run.updater.sum(states).to(torch.uint8)
    if run.rank == 0:
        now = time.monotonic()
        progress = asdict(run.state) | {"seconds": run.state.seconds + now - run.begin}
        checkpoints.write(run.opts.checkpoint, {"run": run.identity, "progress": progress}, tensors)
    run.saved = time.monotonic()


def _resume(run: Run) -> None:
    assert run.opts.resume is not None
    config, tensors = checkpoints.read(run.opts.resume)
    _check_same(config["run"], run.identity, str(run.opts.resume))
    stored = dict(config["progress"])
    stored["curves"] = Curves(**stored["curves"])
    stored["plateau"] = Plateau(*stored["plateau"])
    run.state = Progress(**stored)
    run.updater.restore(tensors, run.state.updates)
    device = run.model.device
    run.best = {k: v.to(device) for k, v in checkpoints.unpack("best", tensors).items()}
    for name, own in _generators(run).items():
        # set_state reads from the start of the storage, so it must not be given a view.
        own.set_state(tensors[f"generators/{name}"][run.rank].clone())


def _check_same(stored: dict[str, Any], own: dict[str, Any], path: str) -> None:
    pairs = [(name, stored[name], own[name]) for name in ("model", "method")]
    pairs += [(name, stored["options"].get(name), v) for name, v in own["options"].items()]
    for name, there, here in pairs:
        if there != here:
            raise ValueError(
                f"{path} was written by a run with {name}={there!r}, not {here!r}; pass what that "
                "run was given, or train anew"
            )
    if stored["data"] != own["data"]:
        raise ValueError(f"{path} was written by a run on other data; pass the same, or train anew")


def _generators(run: Run) -> dict[str, torch.Generator]:
    """Whatever is drawn from during training."""
    found = {"noise": run.generator, "cpu": torch.default_generator}
    device = run.generator.device
    if device.type == "cuda":
        found["cuda"] = torch.cuda.default_generators[device.index or 0]
    return found


def _described(model: StateSpaceModel) -> str:
    """Class and hyperparameters, without those that say how to train."""
    training = {f.name for f in fields(TrainingOptions)}
    own = {k: v for k, v in model.get_params().items() if k not in training}
    return f"{type(model).__name__}({', '.join(f'{k}={v!r}' for k, v in own.items())})"


def _snapshot(model: StateSpaceModel) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def _shown(run: Run) -> Iterator[int]:
    from rich.console import Console
    from rich.progress import track

    left = run.opts.max_epochs - run.state.epoch
    yield from track(_train(run), description="training", total=left, console=Console(stderr=True))
