r"""Stochastic-approximation EM for models that are linear and Gaussian given a path of regimes.

At iteration k a conditional particle filter, with a Kalman filter in every particle, and backward
simulation move a reference path of regimes by a kernel that leaves :math:`p_\theta(k_{1:T} \mid x)`
invariant, with any number of particles. Given a path the rest is linear and Gaussian: the Kalman
smoother gives the expected sufficient statistics exactly. They are followed by

.. math::

    S_k = (1 - \gamma_k) S_{k-1} + \gamma_k \frac1n \sum_{m=1}^n
        \mathrm{E}_\theta\left[ s(x, z_{1:T}, k_{1:T}^{(m)}) \mid x, k_{1:T}^{(m)} \right]

and the M-step maximises the expected complete-data log-likelihood that they stand for, in closed
form. :math:`\gamma_k` is 1 while the chain forgets its start and falls as :math:`k^{-0.7}` then.

References
----------
Svensson, Schön and Lindsten (2014), Identification of jump Markov linear models using particle
filters, *53rd IEEE Conference on Decision and Control*, section IV; Delyon, Lavielle and Moulines
(1999), Convergence of a stochastic approximation version of the EM algorithm, *Annals of
Statistics* 27; Lindsten, Bunch, Särkkä, Schön and Godsill (2016), Rao-Blackwellized particle
smoothers for conditionally linear Gaussian models, *IEEE Journal of Selected Topics in Signal
Processing* 10.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqdgm.inference.em import Moments, completion, least_noise, lifted
from seqdgm.inference.particle_em import DECAY
from seqdgm.inference.particle_score import settled, shown, stopped
from seqdgm.inference.rao_blackwell import draw_paths
from seqdgm.inference.smc import Reference, SMCOptions
from seqdgm.kernels import kalman_smoother
from seqdgm.kernels.types import Smoothed, System
from seqdgm.results import FitReport
from seqdgm.types import Batch, check_count

Regimes = Any  # a NamedTuple of the model's tensors, among them m0, b, d, H and R by regime


class RegimeModel(Protocol):
    """What a model must say to be fitted here."""

    n_regimes: int

    def em_starts(self, batch: Batch, count: int, generator: torch.Generator) -> Sequence[Regimes]:
        """Parameters to start from."""

    def set_regimes(self, regimes: Regimes) -> None:
        """Take parameters over."""

    def em_step(self, regimes: Regimes, origin: Regimes, statistics: Statistics) -> Regimes:
        """Parameters that maximise the expected complete-data log-likelihood (or raise it)."""

    def conditional_system(self, z: Float[Tensor, "rows time 1"]) -> System:
        """System matrices given paths of the regimes."""


class Sums(NamedTuple):
    r"""Expected cross products of targets y and regressors g, summed over the steps of a regime.

    y is measured from an offset that does not change while a fit lasts, and the last regressor
    is 1.
    """

    yy: Float[Tensor, "regimes y y"]
    yg: Float[Tensor, "regimes y g"]
    gg: Float[Tensor, "regimes g g"]
    steps: Float[Tensor, "regimes"]

    def residual(
        self, coef: Float[Tensor, "regimes y c"], offset: Float[Tensor, "regimes y"]
    ) -> Moments:
        """Moments of y - coef g - offset, with the regressors."""
        c = torch.cat([coef, offset[..., None]], -1)
        cross = c @ self.yg.mT
        rr = self.yy - cross - cross.mT + c @ self.gg @ c.mT
        return Moments(0.5 * (rr + rr.mT), self.yg - c @ self.gg, self.gg, self.steps)


class Statistics(NamedTuple):
    """Expected sufficient statistics, of all series.

    Attributes
    ----------
    first : Tensor of shape (regimes,)
        How many series begin in a regime.
    moves : Tensor of shape (regimes, regimes)
        How often a regime (row) was followed by another one.
    start, transition, emission : Sums
        Of the first z on 1; of z on (z before, 1); of x on (z, 1). Measured from m0, b and d.
    least_noise : Tensor of shape (1, obs)
        Lower bound of the emission variances, as in `seqdgm.inference.em.Expected`.
    """

    first: Float[Tensor, "regimes"]
    moves: Float[Tensor, "regimes regimes"]
    start: Sums
    transition: Sums
    emission: Sums
    least_noise: Float[Tensor, "1 obs"]

    def above_noise(
        self, cov: Float[Tensor, "regimes obs obs"]
    ) -> Float[Tensor, "regimes obs obs"]:
        """Nearest emission covariances that nowhere fall below the least noise."""
        return lifted(cov, self.least_noise.expand(len(cov), -1))


@torch.no_grad()
def expect(
    model: RegimeModel,
    batch: Batch,
    regimes: Regimes,
    origin: Regimes,
    z: Float[Tensor, "series n time 1"],
) -> Statistics:
    """Statistics given the data and paths of regimes, averaged over the paths of each series.

    Parameters
    ----------
    model, batch
    regimes : Regimes
        The parameters in use.
    origin : Regimes
        Whose m0, b and d the sums are measured from.
    z : Tensor of shape (series, n, time, 1)
        Regimes.
    """
    n = z.shape[1]
    rows = torch.arange(len(z), device=z.device).repeat_interleave(n)
    wide, path = batch.take(rows), z.flatten(0, 1)
    out = kalman_smoother(
        model.conditional_system(path), wide.x, wide.mask, wide.lengths, lag_one=True
    )
    k = path[..., 0].long()
    on = torch.nn.functional.one_hot(k, model.n_regimes).to(out.mean.dtype)
    on = on * wide.valid[..., None] / n
    return Statistics(
        on[:, 0].sum(0),
        torch.einsum("rti,rtj->ij", on[:, :-1], n * on[:, 1:]),
        _start(out, origin, k, on),
        _transition(out, origin, k, on),
        _emission(out, wide, regimes, origin, k, on),
        least_noise(batch, pooled=True),
    )


def _start(
    out: Smoothed, origin: Regimes, k: Int[Tensor, "rows time"], on: Float[Tensor, "rows time k"]
) -> Sums:
    y = out.mean[:, :1] - origin.m0[k[:, :1]]
    return _sums(y, y[..., :0], out.cov[:, :1], None, None, on[:, :1])


def _transition(
    out: Smoothed, origin: Regimes, k: Int[Tensor, "rows time"], on: Float[Tensor, "rows time k"]
) -> Sums:
    assert out.lag_one is not None
    mean, cov, lag = map(torch.nan_to_num, (out.mean, out.cov, out.lag_one))
    y = mean[:, 1:] - origin.b[k[:, 1:]]
    return _sums(y, mean[:, :-1], cov[:, 1:], lag, cov[:, :-1], on[:, 1:])


def _emission(
    out: Smoothed,
    batch: Batch,
    regimes: Regimes,
    origin: Regimes,
    k: Int[Tensor, "rows time"],
    on: Float[Tensor, "rows time k"],
) -> Sums:
    """Steps without any observation are left out; what is missing of a vector is integrated out."""
    mean, cov = torch.nan_to_num(out.mean), torch.nan_to_num(out.cov)
    mask = batch.mask
    some = mask.any(-1)
    y = torch.where(mask, batch.x - origin.d[k], 0.0)
    spread = y.new_zeros(*y.shape, y.shape[-1])
    cross = y.new_zeros(*y.shape, mean.shape[-1])
    part = torch.nonzero(some & ~mask.all(-1), as_tuple=True)
    if len(part[0]):
        regime = k[part]
        fill, noise = completion(regimes.R[regime], mask[part])
        rest = torch.eye(y.shape[-1]).to(y) - fill
        load = rest @ regimes.H[regime]
        shift = rest @ (regimes.d - origin.d)[regime][..., None]
        v = cov[part]
        told = fill @ y[part][..., None] + shift + load @ mean[part][..., None]
        y[part] = told[..., 0]
        spread[part] = load @ v @ load.mT + noise
        cross[part] = load @ v
    return _sums(y, mean, spread, cross, cov, on * some[..., None])


def _sums(
    y: Float[Tensor, "rows time y"],
    regressor: Float[Tensor, "rows time c"],
    yy: Float[Tensor, "rows time y y"],
    yc: Float[Tensor, "rows time y c"] | None,
    cc: Float[Tensor, "rows time c c"] | None,
    on: Float[Tensor, "rows time regimes"],
) -> Sums:
    """Sums by regime, from means and (cross-)covariances of every step."""
    g = torch.cat([regressor, torch.ones_like(y[..., :1])], -1)
    size = regressor.shape[-1]

    def total(left: Tensor, right: Tensor) -> Tensor:
        return torch.einsum("rtk,rti,rtj->kij", on, left, right)

    def within(cov: Tensor) -> Tensor:
        return torch.einsum("rtk,rtij->kij", on, cov)

    yg, gg = total(y, g), total(g, g)
    if yc is not None:
        yg[..., :size] += within(yc)
    if cc is not None:
        gg[..., :size, :size] += within(cc)
    return Sums(total(y, y) + within(yy), yg, gg, on.sum((0, 1)))


# -- learning -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scheme:
    """How paths are drawn."""

    n_particles: int
    n_trajectories: int
    backward: bool


@dataclass
class _Climb:
    """Where the iterations from one start have come to."""

    origin: Regimes
    regimes: Regimes
    statistics: Statistics | None = None
    reference: Float[Tensor, "series time 1"] | None = None
    objective: list[float] = field(default_factory=list)
    past: list[dict[str, Tensor]] = field(default_factory=list)
    converged: bool = False
    message: str = ""


def fit(
    model: Any,
    batch: Batch,
    *,
    method: str,
    generator: torch.Generator,
    progress: bool,
    n_particles: int = 20,
    n_trajectories: int = 5,
    max_iter: int = 100,
    burn_in: int = 50,
    n_starts: int = 3,
    screening: int = 10,
    tol: float = 1e-3,
    smoother: str = "backward",
) -> FitReport:
    r"""Maximise the likelihood by stochastic-approximation EM with Kalman filters in the particles.

    All series share the parameters. The likelihood of a switching model has many local maxima:
    `screening` iterations are made from each of `n_starts` starts, and the most likely goes on. The
    time of an iteration grows with the steps, and hardly with the series or particles while these
    are few: many short series are learned from much faster than one long one.

    Parameters
    ----------
    model, batch, method, generator, progress
        As every learner.
    n_particles : int
        Particles of each conditional filter; they set how fast the chain mixes, not where to.
    n_trajectories : int
        Paths of regimes drawn from each filter.
    max_iter : int
        Iterations at most, the screening of the chosen start included.
    burn_in : int
        Iterations that are forgotten at once: :math:`\gamma_k = 1`.
    n_starts, screening : int
        The first start is spread over the data, the others are random.
    tol : float
        Stop when no parameter has moved by more than ``tol * (1 + |parameter|)`` in 20 iterations.
    smoother : {"backward", "genealogy"}
        ``"genealogy"`` is for a singular R, and mixes slowly in long series.

    Returns
    -------
    FitReport
        `objective` holds the log-evidence estimate of each filter, of all series; the reference
        path makes it too large, the less so the more particles.

    Raises
    ------
    ValueError
        If no start has a finite likelihood. A later failure stops the fit: the report says why, and
        names the series; the model keeps the last good parameters.
    """
    begin = time.perf_counter()
    counts = {"n_trajectories": n_trajectories, "max_iter": max_iter, "n_starts": n_starts}
    for name, value in {**counts, "screening": screening}.items():
        check_count(name, value)
    if n_particles < 2 or tol < 0:
        raise ValueError(f"n_particles={n_particles!r} must be at least 2 and tol={tol!r} not < 0")
    if smoother not in ("backward", "genealogy"):
        raise ValueError(f"smoother={smoother!r} is unknown; choose 'backward' or 'genealogy'")
    scheme = _Scheme(n_particles, n_trajectories, smoother == "backward")
    climbs = [_Climb(start, start) for start in model.em_starts(batch, n_starts, generator)]
    screened = min(screening, max_iter) if n_starts > 1 else 0

    def iterate() -> Iterator[int]:
        best = climbs[0]
        for climb in climbs if screened else ():
            for k in range(screened):
                if _iterate(model, batch, climb, scheme, generator, 1.0, k):
                    yield k
        best = max(climbs, key=_height)
        climbs[:] = [best]
        for k in range(len(best.objective), max_iter):
            gamma = 1.0 if k < burn_in else (k - burn_in + 1.0) ** -DECAY
            if not _iterate(model, batch, best, scheme, generator, gamma, k):
                return
            yield k
            if k > burn_in and settled(best.past, tol):
                best.converged = True
                return

    total = n_starts * screened + max_iter - screened
    for _ in shown(iterate(), total) if progress else iterate():
        pass
    (best,) = climbs
    if not best.objective:
        raise ValueError(best.message)
    model.set_regimes(best.regimes)
    return FitReport(
        method=method,
        objective=tuple(best.objective),
        valid_objective=(),
        converged=np.array([best.converged]),
        n_iter=len(best.objective),
        seconds=time.perf_counter() - begin,
        messages=(best.message,) if best.message else (),
    )


def _height(climb: _Climb) -> float:
    """Mean objective of the latter half of the screening; the lowest where it failed."""
    if climb.message or not climb.objective:
        return -np.inf
    return float(np.mean(climb.objective[len(climb.objective) // 2 :]))


def _iterate(
    model: Any,
    batch: Batch,
    climb: _Climb,
    scheme: _Scheme,
    generator: torch.Generator,
    gamma: float,
    k: int,
) -> bool:
    """One E- and one M-step; whether they went well."""
    if climb.message:
        return False
    held = climb.reference
    reference = None if held is None else Reference(held, ancestor_sampling=False)
    # Resampling at every step keeps the conditional filter's target free of adaptive decisions.
    options = SMCOptions(
        scheme.n_particles, resampler="multinomial", threshold=1.0, reference=reference
    )
    model.set_regimes(climb.regimes)
    try:
        drawn = draw_paths(
            model, batch, options, generator, scheme.n_trajectories, backward=scheme.backward
        )
        new = expect(model, batch, climb.regimes, climb.origin, drawn.z)
        old = climb.statistics
        climb.statistics = new if old is None else _mixed(old, new, gamma)
        found = model.em_step(climb.regimes, climb.origin, climb.statistics)
        wrong = [name for name, p in found._asdict().items() if not bool(p.isfinite().all())]
        if wrong:
            raise ValueError(f"the M-step left {wrong} not finite; scale the data")
    except ValueError as error:
        climb.message = stopped(k, error)
        return False
    climb.regimes, climb.reference = found, drawn.z[:, 0]
    climb.objective.append(float(drawn.log_likelihood.sum()))
    climb.past = [*climb.past[-20:], found._asdict()]
    return True


def _mixed(old: Any, new: Any, gamma: float) -> Any:
    """Weighted mean of two trees of tensors."""
    if isinstance(old, Tensor):
        return torch.lerp(old, new, gamma)
    return type(old)(*(_mixed(a, b, gamma) for a, b in zip(old, new, strict=True)))
