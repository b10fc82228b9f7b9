"""The settings of gradient learning."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from seqdgm.inference.objectives import Objective
from seqdgm.inference.schedules import SCHEDULES, Schedule
from seqdgm.results import FitReport
from seqdgm.types import check_count

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
PRECISIONS: tuple[str, ...] = ("32-true", "bf16-mixed", "16-mixed")
# Of the objectives that need several.
DEFAULT_PARTICLES = 4
# What may differ between a run and the one that it resumes.
FREE = frozenset(
    {"max_epochs", "patience", "checkpoint", "checkpoint_minutes", "resume", "on_epoch"}
)


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes
    ----------
    max_epochs : int
        Passes over the series at most.
    learning_rate : float
        Step size of AdamW (Loshchilov and Hutter, 2019).
    weight_decay : float
        Decoupled decay of weight matrices; biases, scales and learned start states have none.
    betas : tuple of float
        Decay of AdamW's first and second moments.
    batch_size : int
        Series in one update, over all processes.
    padding : float
        Largest share of a minibatch's work that may be padding: series of like length are put
        together as far as that takes (`seqdgm.inference.batching.minibatches`). 1 divides the
        series wholly at random.
    clip : float
        Largest norm of the gradient.
    schedule : {"constant", "cosine", "plateau"}
        Course of the learning rate; ``"plateau"`` multiplies it by `plateau_factor` after
        `plateau_patience` evaluations without a better validation objective.
    lr_warmup : int
        Epochs over which the learning rate rises linearly to its full value.
    lr_floor : float
        Smallest share of the learning rate that a schedule comes down to.
    plateau_patience : int
    plateau_factor : float
    average : float
        Decay of an exponential moving average of the weights, which is then what is validated and
        kept; 0 keeps the weights themselves. Early on the decay is (1 + k) / (10 + k) at update k.
    patience : int
        Epochs without a better validation objective before training stops; those in which the
        divergence is still warmed up do not count.
    valid_fraction : float
        Share of each series, at its end, that is held out to decide when to stop; 0 trains on
        everything for `max_epochs`. Series given to ``fit(..., valid=)`` take its place.
    truncate : int, optional
        Steps through which the gradient goes back: series are cut into windows of as many steps,
        which take over the state, without its gradient, and the missing observations drawn so far
        from the window before (truncated back-propagation through time). Only one window's states
        are in memory. Summaries of an inference network are those of the whole series, and their
        gradient is exact, so that filtering, smoothing and bidirectional networks all do; there is
        then one update a minibatch, and without an inference network one a window. For the evidence
        lower bound of one path (``"elbo"``, ``"mle"``) only.
    evaluate_every : int
        Epochs from one validation to the next; the last epoch is always validated.
    kl_warmup : int
        Epochs over which the weight of the divergence rises from 0 to 1; in ``"iwae"``, ``"fivo"``
        and ``"rws"`` it is the power of f / q in the weights.
    precision : {"32-true", "bf16-mixed", "16-mixed"}
        Arithmetic of training: the model's own, or automatic mixed precision in bfloat16 or
        float16 (with loss scaling). Weights, moments and validation stay in the model's own.
    devices : int
        Processes on each machine, one a GPU; more than one are started by ``torchrun``.
    nodes : int
        Machines.
    checkpoint : path, optional
        File that holds the run from time to time and at its end, replaced as a whole.
    checkpoint_minutes : float
        Minutes from one checkpoint to the next; 0 writes one after every update.
    resume : path, optional
        Checkpoint to go on from. Data and options must be those of the run that wrote it, but for
        `max_epochs`, `patience` and the options about checkpoints themselves; what follows is then
        bit for bit what that run would have come to.
    objective : Objective
        What is maximised; ``fit`` takes its name from ``method`` and its other settings, such as
        ``n_particles`` (default 1 for ``"elbo"``, else 4) and ``free_bits``, beside those listed
        here.
    on_epoch : callable, optional
        Called with the `FitReport` so far after each epoch; training ends with whatever it raises.
    """

    max_epochs: int = 300
    learning_rate: float = 5e-3
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    batch_size: int = 32
    padding: float = 0.1
    clip: float = 5.0
    schedule: Schedule = "constant"
    lr_warmup: int = 0
    lr_floor: float = 0.01
    plateau_patience: int = 10
    plateau_factor: float = 0.5
    average: float = 0.0
    patience: int = 60
    valid_fraction: float = 0.1
    truncate: int | None = None
    evaluate_every: int = 1
    kl_warmup: int = 40
    precision: Precision = "32-true"
    devices: int = 1
    nodes: int = 1
    checkpoint: str | Path | None = None
    checkpoint_minutes: float = 10.0
    resume: str | Path | None = None
    objective: Objective = Objective()  # noqa: RUF009 - frozen
    on_epoch: Callable[[FitReport], None] | None = None

    def __post_init__(self) -> None:
        counts = ("max_epochs", "batch_size", "patience", "evaluate_every", "plateau_patience")
        for name in (*counts, "devices", "nodes"):
            check_count(name, getattr(self, name))
        if self.truncate is not None:
            check_count("truncate", self.truncate)
            if self.objective.name != "elbo" or self.objective.n_particles > 1:
                raise ValueError(
                    "truncate= goes with one path of the evidence lower bound: the weights of "
                    f"{self.objective.n_particles} particles of {self.objective.name!r} belong to "
                    "whole series; use method='elbo' or cut the series into shorter ones"
                )
        for name in ("learning_rate", "clip"):
            _within(name, getattr(self, name), above=0.0)
        for name in ("weight_decay", "lr_warmup", "kl_warmup", "checkpoint_minutes"):
            _within(name, getattr(self, name), least=0.0)
        for name in ("padding", "lr_floor", "plateau_factor"):
            _within(name, getattr(self, name), least=0.0, most=1.0)
        for name in ("average", "valid_fraction"):
            _within(name, getattr(self, name), least=0.0, below=1.0)
        for value in self.betas:
            _within("betas", value, least=0.0, below=1.0)
        for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {list(choices)}"
                )
        for name in ("checkpoint", "resume"):
            path = getattr(self, name)
            if path is not None and not Path(path).parent.is_dir():
                raise ValueError(f"{name}={str(path)!r}: there is no folder {Path(path).parent}")

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.devices * self.nodes

    def check_machine(self, device: str) -> None:
        """Raise a ValueError unless the processes and the arithmetic asked for are there."""
        if self.precision == "16-mixed" and device == "cpu":
            raise ValueError(
                "precision='16-mixed' needs a GPU: torch has no recurrent networks in float16 for "
                "a CPU; use 'bf16-mixed', or device='cuda'"
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world > 1 and started != self.world:
            raise ValueError(
                f"devices={self.devices}, nodes={self.nodes} need {self.world} processes, but "
                f"there are {started}; start the script with `torchrun "
                f"--nproc_per_node={self.devices} --nnodes={self.nodes} script.py`"
            )

    def bound(self) -> dict[str, Any]:
        """Settings that a resumed run must share, as JSON reads them back."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE}
        # The cosine ends at the last epoch: with another one it is another schedule.
        if self.schedule == "cosine":
            values["max_epochs"] = self.max_epochs
        values["objective"] = asdict(self.objective)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def read_options(model: StateSpaceModel, method: str, options: dict[str, Any]) -> TrainingOptions:
    """Settings from those of the model and those given to ``fit``.

    Parameters
    ----------
    model : StateSpaceModel
        Its hyperparameters of the same names are the defaults.
    method : str
        Name of the objective; ``"mle"`` for a model without latent states, whose bound is its
        likelihood.
    options : dict
        Fields of `TrainingOptions` and of `Objective`.

    Raises
    ------
    ValueError
        For an unknown name or an impossible value.
    """
    aims = {f.name for f in fields(Objective)} - {"name"}
    known = ({f.name for f in fields(TrainingOptions)} - {"objective"}) | aims
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"unknown training options {unknown}; choose from {sorted(known)}")
    own = {name: value for name, value in model.get_params().items() if name in known}
    given = {**own, **options}
    name: Any = "elbo" if method == "mle" else method
    if name != "elbo":
        given.setdefault("n_particles", DEFAULT_PARTICLES)
    objective = Objective(name, **{k: v for k, v in given.items() if k in aims})
    if not model.has_proposal and objective.free_bits:
        raise ValueError(f"{type(model).__name__} has no divergence; leave out free_bits=")
    if not model.latent_dim and objective.n_particles > 1:
        raise ValueError(f"{type(model).__name__} has no latent states; leave out n_particles=")
    rest = {k: v for k, v in given.items() if k not in aims}
    return replace(TrainingOptions(), objective=objective, **rest)


def _within(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    rules = (
        (least, f"at least {least}", lambda v, end: v >= end),
        (above, f"above {above}", lambda v, end: v > end),
        (most, f"at most {most}", lambda v, end: v <= end),
        (below, f"below {below}", lambda v, end: v < end),
    )
    wanted = [(text, holds(value, end)) for end, text, holds in rules if end is not None]
    if not all(ok for _, ok in wanted):
        raise ValueError(f"{name}={value!r} must be " + " and ".join(text for text, _ in wanted))
