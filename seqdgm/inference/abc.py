r"""Likelihood-free filtering: approximate Bayesian computation (ABC) in state-space models.

Where observations can be simulated given the state but have no usable density, a particle is
weighed by how close an observation :math:`\hat x_t` simulated from it comes to :math:`x_t`:

.. math::

    g_\varepsilon(x_t \mid s_t) = \mathrm{E}_{\hat x_t \mid s_t} \prod_d
        \frac{1}{\varepsilon_d} K \left( \frac{x_{td} - \hat x_{td}}{\varepsilon_d} \right)

That is the model whose observations carry an additional error with the density K of scale
:math:`\varepsilon`, and with a fixed tolerance the filter is exact for it, in the sense that the
estimate of its likelihood is unbiased: with the Gaussian kernel, a linear-Gaussian model has the
Kalman likelihood with :math:`\varepsilon^2` added to the variances of the observations. As
:math:`\varepsilon \to 0` the model becomes the one given. A tolerance that adapts to the particles
makes the estimate consistent only (in N, for the model given). For integer data the uniform kernel
with tolerance 0.5 counts exact matches: then nothing is approximate.

References
----------
Jasra, Singh, Martin and McCoy (2012), Filtering via approximate Bayesian computation, *Statistics
and Computing* 22; Calvet and Czellar (2015), Accurate methods for approximate Bayesian computation
filtering, *J. Financial Econometrics* 13; Del Moral, Doucet and Jasra (2012), An adaptive
sequential Monte Carlo method for approximate Bayesian computation, *Statistics and Computing* 22.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.inference import particle, smc
from seqdgm.inference.particle import Moments, sample
from seqdgm.inference.proposals import Proposal
from seqdgm.inference.resampling import Resampler, effective_sample_size, normalise
from seqdgm.inference.smc import SMCOptions
from seqdgm.types import Batch, Evidence, Inputs, Prediction, Samples, States

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

__all__ = ["TargetESS", "filter", "forecast", "impute", "log_prob", "sample", "smooth"]

Kernel = Literal["gaussian", "uniform", "epanechnikov"]
KERNELS: tuple[Kernel, ...] = ("gaussian", "uniform", "epanechnikov")
HALVINGS = 30  # of the bracket of an adaptive tolerance


@dataclass(frozen=True)
class TargetESS:
    r"""Tolerance of each step at which a share of the effective sample size survives.

    It is :math:`\varepsilon_{td} = e_t\, \mathrm{sd}(\hat x_{td})`, with the spread of the
    simulated observations and the smallest :math:`e_t` that keeps the share.

    Attributes
    ----------
    share : float
        Between 0 and 1.
    smallest : float
        Bound of :math:`e_t` from below, for data that are matched exactly.
    """

    share: float = 0.3
    smallest: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share!r} must lie between 0 and 1")
        if not self.smallest > 0:
            raise ValueError(f"smallest={self.smallest!r} must be positive")


Tolerance = float | tuple[float, ...] | TargetESS


class ABCOptions(TypedDict, total=False):
    """Options of the verbs.

    kernel : {"gaussian", "uniform", "epanechnikov"}
    tolerance : float, tuple of float, or TargetESS
        One number for every element of an observation or one for each, in the units in which the
        model sees the data; or adaptive, the default.
    resampler, threshold, proposal, collapse
        As in `seqdgm.inference.smc.SMCOptions`.
    """

    kernel: Kernel
    tolerance: Tolerance
    resampler: str | Resampler
    threshold: float
    proposal: str | Proposal
    collapse: Literal["raise", "zero"]


@dataclass(frozen=True)
class KernelWeigh:
    """Weigh particles by simulated observations; a `seqdgm.inference.smc.Weigh`.

    Attributes
    ----------
    kernel : {"gaussian", "uniform", "epanechnikov"}
    tolerance : float, tuple of float, or TargetESS
    """

    kernel: Kernel = "gaussian"
    tolerance: Tolerance = TargetESS()

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"there is no kernel {self.kernel!r}; choose one of {list(KERNELS)}")
        if isinstance(self.tolerance, TargetESS):
            return
        several = self.tolerance if isinstance(self.tolerance, tuple) else (self.tolerance,)
        if not several or not all(math.isfinite(float(e)) and e > 0 for e in several):
            raise ValueError(f"tolerance={self.tolerance!r} must be positive")

    def __call__(
        self,
        model: StateSpaceModel,
        s: Any,
        u: Inputs,
        x: Float[Tensor, "series one dim"],
        mask: Bool[Tensor, "series one dim"],
        log_weights: Float[Tensor, "series particle"],
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, "series particle"], Float[Tensor, "series particle dim"]]:
        """Log of the kernel at the observed elements, and the simulated observations."""
        simulated = model.simulate(s, u, generator)
        shape = (*log_weights.shape, x.shape[-1])
        if simulated.shape != shape:
            raise ValueError(
                f"{type(model).__name__}.simulate gives the shape {tuple(simulated.shape)}, not "
                f"(series, particle, dim) = {shape}"
            )
        error = torch.where(mask, (x - simulated).double(), 0.0)
        width = self._width(error, simulated.double(), mask, log_weights)
        return self._log_kernel(error, width, mask), simulated

    def _log_kernel(
        self,
        error: Float[Tensor, "series particle dim"],
        width: Float[Tensor, "..."],
        mask: Bool[Tensor, "series one dim"],
    ) -> Float[Tensor, "series particle"]:
        ratio = error / width
        if self.kernel == "gaussian":
            each = -0.5 * ratio.square() - 0.5 * math.log(2 * math.pi)
        elif self.kernel == "uniform":
            each = torch.where(ratio.abs() <= 1, -math.log(2), -torch.inf)
        else:
            each = (0.75 * (1 - ratio.square()).clamp_min(0.0)).log()
        return torch.where(mask, each - width.log(), 0.0).sum(-1)

    def _width(
        self,
        error: Float[Tensor, "series particle dim"],
        simulated: Float[Tensor, "series particle dim"],
        mask: Bool[Tensor, "series one dim"],
        log_weights: Float[Tensor, "series particle"],
    ) -> Float[Tensor, "..."]:
        if not isinstance(self.tolerance, TargetESS):
            width = error.new_tensor(self.tolerance)
            if width.ndim and len(width) != error.shape[-1]:
                raise ValueError(
                    f"tolerance has {len(width)} numbers for observations of {error.shape[-1]}"
                )
            return width
        weights = log_weights.exp()[..., None]
        mean = (weights * simulated).sum(1, keepdim=True)
        variance = (weights * (simulated - mean).square()).sum(1, keepdim=True)
        tiny = torch.finfo(error.dtype).tiny ** 0.5
        # Simulations that are all alike show no scale: then the distance itself is one.
        spread = torch.where(variance > 0, variance.sqrt(), error.abs().amax(1, keepdim=True))
        spread = spread.clamp_min(tiny)
        wanted = self.tolerance.share * effective_sample_size(log_weights)
        far = (error / spread).abs().amax((1, 2))
        low = torch.full_like(wanted, math.log(self.tolerance.smallest))
        high = torch.maximum(far, torch.ones_like(far)).log() + 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            log_g = self._log_kernel(error, middle.exp()[:, None, None] * spread, mask)
            log_w, total = normalise(log_weights + log_g)
            enough = torch.isfinite(total) & (effective_sample_size(log_w) >= wanted)
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return high.exp()[:, None, None] * spread


def filter(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    **options: Unpack[ABCOptions],
) -> States:
    """Filtering moments of the model with kernel errors."""
    collector = Moments(model)
    with _explaining():
        out = smc.run(model, batch, _settings(n_particles, options), generator, (collector,))
    mean, cov = collector.result()
    return States(
        mean, cov, out.increments.sum(1), ess=out.ess.masked_fill(~batch.valid, torch.nan)
    )


def log_prob(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    start: Int[Tensor, "series"] | None = None,
    **options: Unpack[ABCOptions],
) -> Evidence:
    """Log of an estimate of the ABC likelihood: that of data with kernel errors.

    With a fixed tolerance it is unbiased for that; with an adaptive one it is consistent for the
    likelihood of the model itself, as the particles grow in number and the tolerances shrink.
    """
    first = torch.zeros_like(batch.lengths) if start is None else start
    t = torch.arange(batch.n_steps, device=batch.x.device)
    counted = batch.valid & (t[None] >= first[:, None])
    with _explaining():
        out = smc.run(model, batch, _settings(n_particles, options), generator)
    value = torch.where(counted, out.increments, 0.0).sum(1)
    stderr = out.stderr if start is None else torch.full_like(out.stderr, torch.nan)
    return Evidence(value, "estimate", stderr)


def smooth(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    **options: Unpack[ABCOptions],
) -> States:
    """Smoothing moments from the genealogy of the filter."""
    weigh, rest = _split(options)
    with _explaining():
        return particle.smooth(
            model,
            batch,
            n_particles=n_particles,
            generator=generator,
            smoother="genealogy",
            weigh=weigh,
            **rest,
        )


def forecast(
    model: StateSpaceModel,
    batch: Batch,
    *,
    horizon: int,
    n_particles: int,
    generator: torch.Generator,
    **options: Unpack[ABCOptions],
) -> Prediction:
    """Joint trajectories simulated from the model, without kernel errors."""
    weigh, rest = _split(options)
    with _explaining():
        return particle.forecast(
            model,
            batch,
            horizon=horizon,
            n_particles=n_particles,
            generator=generator,
            weigh=weigh,
            **rest,
        )


def impute(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    **options: Unpack[ABCOptions],
) -> Samples:
    """Observations with their missing elements simulated, from the genealogy of the filter."""
    weigh, rest = _split(options)
    with _explaining():
        return particle.impute(
            model,
            batch,
            n_particles=n_particles,
            generator=generator,
            smoother="genealogy",
            weigh=weigh,
            **rest,
        )


def _split(options: ABCOptions) -> tuple[KernelWeigh, Any]:
    """The kernel, and what is left for the particle filter."""
    rest: dict[str, Any] = dict(options)
    own = {name: rest.pop(name) for name in ("kernel", "tolerance") if name in rest}
    return KernelWeigh(**own), rest


def _settings(n_particles: int, options: ABCOptions) -> SMCOptions:
    weigh, rest = _split(options)
    return SMCOptions(n_particles, weigh=weigh, **rest)


@contextmanager
def _explaining() -> Iterator[None]:
    """Say what may help where no simulated observation comes near."""
    try:
        yield
    except ValueError as error:
        if "weight zero" in str(error):
            error.add_note("no simulated observation was near: use a larger tolerance")
        raise
