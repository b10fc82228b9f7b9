"""One update of the weights: objective, gradient, clipping, guard, optimizer, moving average."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from seqdgm.inference.checkpoints import optimizer_tensors, pack, set_optimizer, unpack
from seqdgm.inference.objectives import Objective, Terms, evaluate, evaluate_piece
from seqdgm.inference.scan import Piece
from seqdgm.inference.training_options import TrainingOptions
from seqdgm.nn.dropout import thinned
from seqdgm.types import Batch

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


class Work:
    """One minibatch to take the objective of.

    Not a tuple or a dataclass, so that neither mixed precision nor distributed training looks into
    it and casts or copies the data.
    """

    def __init__(
        self,
        batch: Batch,
        objective: Objective,
        beta: float,
        generator: torch.Generator,
        piece: Piece | None = None,
    ) -> None:
        self.batch, self.objective, self.beta, self.generator = batch, objective, beta, generator
        self.piece = piece


class Evaluation(nn.Module):
    """The objective as a module, so that Fabric can wrap it."""

    def __init__(self, model: StateSpaceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Work) -> tuple[Terms, Piece | None]:
        """Objective of a minibatch; of a window of it, also what the next takes over."""
        given = (self.model, work.batch, work.objective, work.beta, work.generator)
        if work.piece is None:
            return evaluate(*given), None
        return evaluate_piece(*given, work.piece)


class Outcome(NamedTuple):
    """What an update came to, summed over the processes.

    Attributes
    ----------
    totals : list of float
        Objective, reconstruction, divergence (nats) and steps.
    norm : float
        Norm of the gradient before clipping; not finite where loss scaling skipped the update.
    fault : str
        What was not finite, if anything; the update was then not applied.
    due : bool
        Whether the first process asked for a checkpoint.
    """

    totals: list[float]
    norm: float
    fault: str
    due: bool


@dataclass
class Updater:
    """Objective and optimizer as Fabric has set them up, and the moving average of the weights."""

    evaluation: Evaluation
    options: TrainingOptions
    fabric: Any
    module: Any
    optimizer: Any
    scaler: torch.amp.GradScaler | None
    shadow: list[Tensor] = field(default_factory=list)
    count: int = 0

    @classmethod
    def of(cls, model: StateSpaceModel, options: TrainingOptions) -> Updater:
        """Set up devices, precision and optimizer; moves the model to this process's device."""
        fabric, precision = _fabric(model.device, options)
        fabric.launch()
        if options.world > 1:
            model.to(fabric.device)
        evaluation = Evaluation(model).train()
        # Loss scaling and the fused step both want to unscale the gradient.
        fused = options.precision != "16-mixed"
        optimizer = torch.optim.AdamW(
            groups(model.parameters(), options.weight_decay),
            lr=options.learning_rate,
            betas=options.betas,
            fused=fused,
        )
        module, wrapped = fabric.setup(evaluation, optimizer, move_to_device=False)
        shadow = [p.detach().clone() for p in model.parameters()] if options.average else []
        scaler = None if precision is None else precision.scaler
        return cls(evaluation, options, fabric, module, wrapped, scaler, shadow)

    def __call__(
        self,
        batch: Batch,
        *,
        weight: float,
        beta: float,
        rate: float,
        generator: torch.Generator,
        due: bool,
    ) -> Outcome:
        """Take one step up the objective; `weight` is what its sum over the steps is worth."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        work = Work(batch, self.options.objective, beta, generator)
        size = self.options.truncate
        with thinned(generator, batch.n_series):
            if size is not None and batch.n_steps > size:
                return self._in_windows(work, size, weight, due)
            self.optimizer.zero_grad()
            terms, _ = self.module(work)
        self.fabric.backward(-terms.value.sum() * weight)
        return self._step(batch, terms, weight > 0, due)

    def _in_windows(self, work: Work, size: int, weight: float, due: bool) -> Outcome:
        """Updates from windows of `size` steps, with no gradient from one to the one before.

        The summaries of an inference network are computed once for the whole series. Their
        gradient is collected over the windows, and there is one update; without them there is one
        after each window.
        """
        batch, model = work.batch, self.evaluation.model
        with self.fabric.autocast():
            context = model.encode(batch)
            start = model.start((batch.n_series,))
        piece = Piece(start, torch.zeros_like(batch.x[:, 0]), None, batch.complete)
        if context is not None and self.options.world > 1:
            raise ValueError(
                "truncate= with an inference network trains on one device; leave out truncate= or "
                "devices="
            )
        summaries = None if context is None else context.detach().requires_grad_()
        ends = range(0, batch.n_steps, size)
        outcomes, parts = [], []
        for begin in ends:
            if summaries is None or not begin:
                self.optimizer.zero_grad()
            window = batch.window(begin, min(begin + size, batch.n_steps))
            if summaries is not None:
                piece = piece._replace(context=summaries[:, begin : begin + size])
            terms, piece = self.module(
                Work(window, work.objective, work.beta, work.generator, piece)
            )
            worth = weight * (len(ends) if summaries is None else 1)
            self.fabric.backward(-terms.value.sum() * worth)
            if summaries is None:
                outcomes.append(self._step(window, terms, weight > 0, due))
                if outcomes[-1].fault:
                    break
            else:
                parts.append(Terms(*(part.detach() for part in terms)))
        if context is None or summaries is None:
            return _together(outcomes)
        context.backward(summaries.grad)
        whole = Terms(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))
        return self._step(batch, whole, weight > 0, due)

    def _step(self, batch: Batch, terms: Terms, counts: bool, due: bool) -> Outcome:
        """Follow the gradient that has been collected, if it and the objective are finite."""
        norm = self.fabric.clip_gradients(
            self.module, self.optimizer, max_norm=self.options.clip, error_if_nonfinite=False
        )
        counted = float(counts)
        sums = torch.stack([part.detach().double().sum() for part in terms])
        whole = torch.isfinite(sums).all()
        # One look at the device (and at the other processes) an update.
        seen = torch.cat(
            [
                sums * counted,
                torch.stack([batch.lengths.sum() * counted, ~whole]).to(sums),
                sums.new_tensor([due]),
                norm.detach().double().reshape(1) / self.options.world,
            ]
        )
        *totals, faults, asked, size = self.sum(seen).tolist()
        finite = size < float("inf")  # false for NaN as well
        if not faults and (finite or self._rescaling()):
            self.optimizer.step()
            self._follow()
            return Outcome(totals, size, "", asked > 0)
        return Outcome(totals, size, self._blame(batch, terms.value), asked > 0)

    def sum(self, values: Tensor) -> Tensor:
        """Add up over the processes."""
        if self.options.world == 1:
            return values
        total: Tensor = self.fabric.all_reduce(values, reduce_op="sum")
        return total

    def _rescaling(self) -> bool:
        """Whether the step with a gradient out of range is left out, and the next scaled down."""
        return self.scaler is not None and self.scaler.get_scale() >= 1

    def _blame(self, batch: Batch, value: Tensor) -> str:
        bad = torch.nonzero(~torch.isfinite(value.sum(1)))
        own = ""
        if len(bad):
            own = f"series {batch.ids[int(bad[0, 0])]!r} gave a loss that is not finite"
        found = [self.fabric.broadcast(own, src=k) for k in range(self.options.world)]
        shown = ", ".join(repr(one) for one in batch.ids[:3])
        more = f" and {len(batch.ids) - 3} more" if len(batch.ids) > 3 else ""
        return next(filter(None, found), f"the gradient of series {shown}{more} was not finite")

    def _follow(self) -> None:
        """Draw the average of the weights towards the new ones."""
        if self.shadow:
            decay = min(self.options.average, (1 + self.count) / (10 + self.count))
            own = [p.detach() for p in self.evaluation.parameters()]
            torch._foreach_lerp_(self.shadow, own, 1 - decay)
        self.count += 1

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights in place of the last ones for a while."""
        own = [p.detach().clone() for p in self.evaluation.parameters()] if self.shadow else []
        self._put(self.shadow)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.evaluation.parameters(), values, strict=bool(values)):
            parameter.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """What goes into a checkpoint."""
        found = pack("weights", self.evaluation.model.state_dict())
        found |= pack("optimizer", optimizer_tensors(self.optimizer.optimizer))
        found |= pack("average", {str(k): value for k, value in enumerate(self.shadow)})
        if self.scaler is not None:
            scale = {name: torch.tensor(v) for name, v in self.scaler.state_dict().items()}
            found |= pack("scaler", scale)
        return found

    def restore(self, tensors: dict[str, Tensor], count: int) -> None:
        """Take up what `tensors` gave, after so many updates."""
        self.evaluation.model.load_state_dict(unpack("weights", tensors))
        set_optimizer(self.optimizer.optimizer, unpack("optimizer", tensors))
        for k, value in unpack("average", tensors).items():
            self.shadow[int(k)].copy_(value)
        if self.scaler is not None:
            state = {name: value.item() for name, value in unpack("scaler", tensors).items()}
            self.scaler.load_state_dict(state)
        self.count = count


def _together(outcomes: list[Outcome]) -> Outcome:
    """Outcome of several updates."""
    norms = [o.norm for o in outcomes if math.isfinite(o.norm)]
    return Outcome(
        [sum(totals) for totals in zip(*(o.totals for o in outcomes), strict=True)],
        sum(norms) / len(norms) if norms else math.nan,
        outcomes[-1].fault,
        any(o.due for o in outcomes),
    )


def groups(parameters: Iterable[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Parameters as an optimiser takes them: matrices decay; biases, scales and starts do not."""
    own = list(parameters)
    kinds = ([p for p in own if p.ndim == 2], decay), ([p for p in own if p.ndim != 2], 0.0)
    return [{"params": part, "weight_decay": rate} for part, rate in kinds if part]


def _fabric(device: torch.device, options: TrainingOptions) -> tuple[Any, Any]:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision
    from lightning_fabric.strategies import DDPStrategy

    cuda = device.type == "cuda"
    precision = None
    if options.precision != "32-true":
        precision = MixedPrecision(options.precision, device.type)
    many = options.world > 1
    single = [device.index or 0] if cuda else 1
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=options.devices if many else single,
        num_nodes=options.nodes,
        # A model may have weights that a minibatch does not touch.
        strategy=DDPStrategy(find_unused_parameters=True) if many else "auto",
        plugins=None if precision is None else [precision],
    )
    return fabric, precision
