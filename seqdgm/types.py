"""What flows between the verbs and the engines: batches in, posteriors and predictions out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.panel import Panel
from seqdgm.transform import Transform

if TYPE_CHECKING:
    from seqdgm.nn.ragged import Ragged


class Inputs(NamedTuple):
    """What is known about a step before it is observed.

    Attributes
    ----------
    values : Tensor of shape (..., inputs)
        Known covariates of the step; the last axis has length 0 where there are none.
    t : Tensor
        Zero-based number of the step, broadcastable with the batch shape of the state.
    """

    values: Float[Tensor, "*batch inputs"]
    t: Int[Tensor, "..."]


@dataclass(frozen=True)
class Batch:
    """A panel as tensors in model units.

    Attributes
    ----------
    x : Tensor of shape (series, time, dim)
        Observations; 0 where not observed, and never read there.
    mask : Tensor of bool, shape (series, time, dim)
        What was observed.
    lengths : Tensor of int, shape (series,)
        Number of steps of each series.
    u : Tensor of shape (series, time + horizon, inputs)
        Known covariates; row n continues past its own end where a forecast needs it.
    rows : Tensor of int, shape (series,)
        Which fitted series each row is, for models that keep parameters series by series.
    ids : tuple
        Names of the series, for error messages.
    begin : int, or Tensor of int, shape (series,)
        Number of the first step, where the batch is a window of longer series.
    """

    x: Float[Tensor, "series time dim"]
    mask: Bool[Tensor, "series time dim"]
    lengths: Int[Tensor, "series"]
    u: Float[Tensor, "series steps inputs"]
    rows: Int[Tensor, "series"]
    ids: tuple[Any, ...]
    begin: int | Int[Tensor, "series"] = 0

    @classmethod
    def of(
        cls,
        panel: Panel,
        u: np.ndarray,
        transform: Transform,
        rows: list[int],
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Move a panel to tensors, transformed to model units."""
        mask = torch.from_numpy(panel.mask.copy())
        x = transform.of_panel(panel).masked_fill_(~mask, 0.0)
        return cls(
            x.to(device, dtype),
            mask.to(device),
            torch.from_numpy(panel.lengths.copy()).to(device),
            torch.from_numpy(u.copy()).to(device, dtype),
            torch.tensor(rows, dtype=torch.int64, device=device),
            panel.ids,
        )

    @property
    def n_series(self) -> int:
        """Number of series."""
        return self.x.shape[0]

    @property
    def n_steps(self) -> int:
        """Number of steps of the longest series."""
        return self.x.shape[1]

    @property
    def valid(self) -> Bool[Tensor, "series time"]:
        """Steps that lie within each series."""
        t = torch.arange(self.n_steps, device=self.x.device)
        return t[None, :] < self.lengths[:, None]

    @property
    def complete(self) -> bool:
        """Whether every element within every series was observed."""
        return bool((self.mask.all(-1) | ~self.valid).all())

    def extend(self, steps: int) -> Batch:
        """The same series followed by `steps` unobserved steps (lengths unchanged)."""
        n, _, d = self.x.shape
        return replace(
            self,
            x=torch.cat([self.x, self.x.new_zeros(n, steps, d)], 1),
            mask=torch.cat([self.mask, self.mask.new_zeros(n, steps, d)], 1),
        )

    def take(self, rows: Int[Tensor, "chosen"]) -> Batch:
        """The chosen series."""
        chosen = rows.tolist()
        return Batch(
            self.x[rows],
            self.mask[rows],
            self.lengths[rows],
            self.u[rows],
            self.rows[rows],
            tuple(self.ids[k] for k in chosen),
            self.begin if isinstance(self.begin, int) else self.begin[rows],
        )

    def window(self, begin: int, end: int) -> Batch:
        """Steps `begin` to `end` (not included) of every series, some of them perhaps none."""
        return replace(
            self,
            x=self.x[:, begin:end],
            mask=self.mask[:, begin:end],
            lengths=(self.lengths - begin).clamp(0, end - begin),
            u=self.u[:, begin:end],
            begin=self.begin + begin,
        )

    def inputs_at(self, t: int, extra_axes: int = 0) -> Inputs:
        """Known inputs of one step, with `extra_axes` axes (particles) after the series."""
        values, when = self.u[:, t], torch.as_tensor(self.begin + t, device=self.x.device)
        for _ in range(extra_axes):
            values, when = values[:, None], when[..., None] if when.ndim else when
        return Inputs(values, when)

    def inputs_all(self) -> Inputs:
        """Known inputs of all observed steps at once."""
        begin = self.begin if isinstance(self.begin, int) else self.begin[:, None]
        t = begin + torch.arange(self.n_steps, device=self.x.device)
        return Inputs(self.u[:, : self.n_steps], t)


# Which observations determined a diffuse element, and so have no density: computed when asked for.
Diffuse = Callable[[], Bool[Tensor, "series time dim"]]


class States(NamedTuple):
    """Posterior of the latent states as an engine returns it."""

    mean: Float[Tensor, "series time state"]
    cov: Float[Tensor, "series time state state"]
    log_likelihood: Float[Tensor, "series"]
    ess: Float[Tensor, "series time"] | None = None
    draw: Callable[[int, torch.Generator], Tensor] | None = None
    diffuse: Diffuse | None = None


class Evidence(NamedTuple):
    """Log-likelihood as an engine returns it, in model units."""

    value: Float[Tensor, "series"]
    kind: Literal["exact", "estimate", "lower bound", "approximation"]
    stderr: Float[Tensor, "series"]
    diffuse: Diffuse | None = None


@dataclass(frozen=True)
class Gaussian:
    """Gaussian marginals of observations, with a sampler of joint trajectories."""

    mean: Float[Tensor, "series time dim"]
    variance: Float[Tensor, "series time dim"]
    draw: Callable[[int, torch.Generator], Tensor]

    def data_mean(self, transform: Transform) -> Tensor:
        """Mean in data units."""
        return transform.inverse_mean(self.mean, self.variance)

    def data_quantiles(self, transform: Transform, q: Float[Tensor, "q"]) -> Tensor:
        """Marginal quantiles in data units, one block for each probability."""
        normal = torch.special.ndtri(q.to(self.mean))
        std = self.variance.sqrt()
        return torch.stack([transform.inverse(self.mean + z * std) for z in normal])

    def data_draw(self, transform: Transform, n: int, generator: torch.Generator) -> Tensor:
        """Joint trajectories (series, n, time, dim) in data units."""
        return transform.inverse(self.draw(n, generator))


@dataclass(frozen=True)
class Samples:
    """Joint trajectories of observations (equally weighted)."""

    x: Float[Tensor, "series n time dim"]

    def data_mean(self, transform: Transform) -> Tensor:
        """Mean in data units."""
        return transform.inverse(self.x.double()).mean(1)

    def data_quantiles(self, transform: Transform, q: Float[Tensor, "q"]) -> Tensor:
        """Marginal quantiles in data units; values that occur, for integer data."""
        x = transform.inverse(self.x.double()).cpu().numpy()
        integer = bool((x == np.round(x)).all())
        rule: Any = "inverted_cdf" if integer else "linear"
        return torch.from_numpy(np.quantile(x, q.cpu().numpy(), axis=1, method=rule))

    def data_draw(self, transform: Transform, n: int, generator: torch.Generator) -> Tensor:
        """`n` of the trajectories held, in data units and in random order."""
        if n > self.x.shape[1]:
            raise ValueError(
                f"this forecast holds {self.x.shape[1]} trajectories, {n} were asked for; call "
                f"forecast(..., n_samples={n})"
            )
        order = torch.randperm(self.x.shape[1], generator=generator, device=generator.device)
        return transform.inverse(self.x[:, order[:n]].double())


class Unrolled(NamedTuple):
    """Memories, states and their proposals of all steps; leading axes (series, time).

    Beyond a series' end there is anything finite. Paths that were steered have, in place of these
    axes, that of the `rows` of all steps, and the log-densities `log_q` of their draws, with
    gradients as those of the draws.
    """

    h: Any
    z: Float[Tensor, "series time state"] | Float[Tensor, "rows state"]
    proposal: Distribution
    log_q: Float[Tensor, "rows"] | None = None
    rows: Ragged | None = None


# Chooses whom the paths go on from as they are drawn, of rows that are paths. It is given after
# each step but the last the step's number, the numbers of the rows that it has (the longest first),
# and their memory h before the draw, their state s after it, the draw z and its log-density. It
# returns, for each row of the next step, the place among these of the row that it goes on from;
# None where each goes on from its own.
Steer = Callable[[int, Int[Tensor, "rows"], Any, Any, Tensor, Tensor], Tensor | None]


class Prediction(NamedTuple):
    """Joint predictive distribution of future observations and states, in model units."""

    observations: Gaussian | Samples
    states: States


def check_count(name: str, value: int) -> None:
    """Raise a ValueError unless the value is a whole number, at least 1."""
    if int(value) != value or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, at least 1")


def make_generator(
    seed: int | torch.Generator | None, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Generator from a seed; None takes fresh entropy. The global generators are left alone."""
    if isinstance(seed, torch.Generator):
        return seed
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(int(seed))
    return generator


def draw_seed(generator: torch.Generator) -> int:
    """An integer seed drawn from a generator."""
    return int(torch.randint(2**62, (1,), generator=generator, device=generator.device).item())


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Run code that insists on torch's global generators, and put them back as they were."""
    seed = draw_seed(generator)
    shared = [torch.default_generator]
    if generator.device.type == "cuda":
        torch.cuda.init()
        shared.append(torch.cuda.default_generators[generator.device.index or 0])
    states = [used.get_state() for used in shared]
    try:
        for used in shared:
            used.manual_seed(seed)
        yield
    finally:
        for used, state in zip(shared, states, strict=True):
            used.set_state(state)


def tree_map(f: Callable[..., Tensor], tree: Any, *others: Any) -> Any:
    """Apply `f` to every tensor of a state: a tensor, None, or a (named) tuple of such.

    With other states, built equally, `f` takes their tensors beside it.
    """
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return f(tree, *others)
    mapped = [tree_map(f, *leaves) for leaves in zip(tree, *others, strict=True)]
    return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)


def tree_stack(trees: list[Any], dim: int) -> Any:
    """Stack the tensors of equally built states along a new axis."""
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.stack(trees, dim)
    stacked = [tree_stack([t[k] for t in trees], dim) for k in range(len(first))]
    return type(first)(*stacked) if hasattr(first, "_fields") else tuple(stacked)


def tree_unbind(tree: Any, dim: int) -> list[Any]:
    """Take a state apart along an axis; the inverse of `tree_stack`."""
    if isinstance(tree, Tensor):
        return list(tree.unbind(dim))
    parts = zip(*(tree_unbind(leaf, dim) for leaf in tree), strict=True)
    return [type(tree)(*p) if hasattr(tree, "_fields") else tuple(p) for p in parts]
