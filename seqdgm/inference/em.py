r"""Expectation-maximisation for linear-Gaussian models.

The E-step is the exact smoother (with lag-one covariances). The M-step belongs to the model, which
asks for the expected moments of two regressions, :math:`z_t` on :math:`(z_{t-1}, u_t, 1)` and
:math:`x_t` on :math:`(z_t, u_t, 1)`. They are those of the *residuals* at the present coefficients:
nothing cancels, however large the data are beside their noise. Missing elements of a partly
observed vector are integrated out through their conditional law given the state and the observed
elements.

References
----------
Shumway and Stoffer (1982), An approach to time series smoothing and forecasting using the EM
algorithm; Shumway and Stoffer (2017), *Time Series Analysis and Its Applications*, section 6.3;
Holmes (2013), Derivation of the EM algorithm for constrained and unconstrained MARSS models.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels import kalman_smoother
from seqdgm.kernels.types import Smoothed, System
from seqdgm.results import FitReport
from seqdgm.types import Batch, check_count

Parameters = Any  # a NamedTuple of tensors whose first axis is the series, or 1 where shared
_LEAST_NOISE = 1e-9  # smallest emission variance, in units of the variance of its column
_ROUNDING = 1e-14  # smallest standard deviation, in units of the size of the values


class EMModel(Protocol):
    """What a model must say to be fitted here."""

    def em_starts(self, batch: Batch, *, pooled: bool) -> Sequence[Parameters]:
        """Parameters to start from; every one is followed and the best end is kept."""

    def em_system(self, parameters: Parameters, u: Float[Tensor, "series steps inputs"]) -> System:
        """System matrices of the parameters."""

    def em_step(self, parameters: Parameters, expected: Expected) -> Parameters:
        """Parameters that maximise the expected complete-data log-likelihood (or raise it)."""

    def em_set(
        self,
        parameters: Parameters,
        start: Int[Tensor, "sys"],
        ids: tuple[Any, ...] | None,
    ) -> None:
        """Take over the best end; `start` says from which start it came."""


class Moments(NamedTuple):
    r"""Expected cross products of a residual `r` with itself and its regressors `g`.

    Attributes
    ----------
    rr, rg, gg : Tensor of shape (sys, ., .)
        :math:`\sum E[r r']`, :math:`\sum E[r g']`, :math:`\sum E[g g']`, over time (and over the
        series where they are pooled).
    steps : Tensor of shape (sys,)
        Number of terms.
    """

    rr: Float[Tensor, "sys r r"]
    rg: Float[Tensor, "sys r g"]
    gg: Float[Tensor, "sys g g"]
    steps: Float[Tensor, "sys"]

    def regress(
        self, chosen: Bool[Tensor, "g"]
    ) -> tuple[Float[Tensor, "sys r g"], Float[Tensor, "sys r r"]]:
        """Change of the coefficients that is best over the chosen regressors, and what is left.

        Returns
        -------
        tuple of Tensor
            Change of the coefficients (zero where not chosen), and the residual covariance after
            it.
        """
        change = torch.zeros_like(self.rg)
        spread = self.rr
        if bool(chosen.all()):
            change = _solve(self.gg, self.rg)
            spread = spread - change @ self.rg.mT
        elif bool(chosen.any()):
            cross = self.rg[..., chosen]
            change[..., chosen] = found = _solve(self.gg[:, chosen][..., chosen], cross)
            spread = spread - found @ cross.mT
        return change, 0.5 * (spread + spread.mT) / self.steps[:, None, None]


@dataclass(frozen=True)
class Expected:
    """Moments of states and observations given the data, at the parameters of the E-step.

    Attributes
    ----------
    batch : Batch
    system : System
        The matrices of the E-step.
    smoothed : Smoothed
    pooled : bool
        Whether moments are summed over the series.
    least_noise : Tensor of shape (sys, obs)
        Lower bound of the emission variances: without one the likelihood of a series that the
        states explain exactly has no maximum.
    """

    batch: Batch
    system: System
    smoothed: Smoothed
    pooled: bool
    least_noise: Float[Tensor, "sys obs"]

    @cached_property
    def moments(
        self,
    ) -> tuple[
        Float[Tensor, "series time state"],
        Float[Tensor, "series time state state"],
        Float[Tensor, "series lags state state"],
    ]:
        """Means, covariances and lag-one covariances, zero beyond the end of a series."""
        out = self.smoothed
        assert out.lag_one is not None
        parts = (out.mean, out.cov, out.lag_one)
        if int(self.batch.lengths.min()) == self.batch.n_steps:
            return parts
        mean, cov, lag = map(torch.nan_to_num, parts)
        return mean, cov, lag

    @property
    def first(self) -> tuple[Float[Tensor, "series state"], Float[Tensor, "series state state"]]:
        """Mean and covariance of the first state of each series."""
        return self.smoothed.mean[:, 0], self.smoothed.cov[:, 0]

    def transition(self) -> Moments:
        """Residuals of z_t given (z_{t-1}, u_t, 1)."""
        mean, cov, lag = self.moments
        steps = self.batch.n_steps
        w = self.batch.valid[:, 1:].to(mean.dtype)[..., None]
        f, offset = self.system.F[:, 0], self.system.b
        now, before = mean[:, 1:], mean[:, :-1]
        residual = w * (now - before @ f.mT - (offset if offset.shape[1] == 1 else offset[:, 1:]))
        rest = self._rest(slice(1, steps))
        ends = w[..., None]
        v_now, v_before = (ends * cov[:, 1:]).sum(1), (ends * cov[:, :-1]).sum(1)
        cross = lag.sum(1)
        moved = cross @ f.mT
        rr = residual.mT @ residual + v_now - moved - moved.mT + f @ v_before @ f.mT
        g = torch.cat([before, rest], -1)
        rg, gg = residual.mT @ g, (w * g).mT @ g
        size = mean.shape[-1]
        rg[..., :size] += cross - f @ v_before
        gg[:, :size, :size] += v_before
        return self._total(rr, rg, gg, w.sum((1, 2)))

    def emission(self) -> Moments:
        """Residuals of x_t given (z_t, u_t, 1); steps without any observation are left out."""
        mean, cov, _ = self.moments
        mask = self.batch.mask
        whole, some = mask.all(-1), mask.any(-1)
        h, d = self.system.H[:, 0], self.system.d
        error = self.batch.x - mean @ h.mT - d
        g = torch.cat([mean, self._rest(slice(0, self.batch.n_steps))], -1)
        w = whole.to(mean.dtype)[..., None]
        spread = (w[..., None] * cov).sum(1)
        seen = w * error
        loaded = h @ spread
        rr, rg = seen.mT @ error + loaded @ h.mT, seen.mT @ g
        gg = (some.to(mean.dtype)[..., None] * g).mT @ g
        size = mean.shape[-1]
        rg[..., :size] -= loaded
        gg[:, :size, :size] += spread
        partial = some & ~whole
        if bool(partial.any()):
            n, t = torch.nonzero(partial, as_tuple=True)
            r = self.system.R[:, 0].expand(len(mean), -1, -1)[n]
            complete, noise = completion(r, mask[n, t])
            load = complete @ h.expand(len(mean), -1, -1)[n]
            v, at = cov[n, t], g[n, t]
            e = (complete @ torch.where(mask[n, t], error[n, t], 0.0)[..., None])[..., 0]
            through = load @ v
            rr.index_add_(0, n, e[:, :, None] * e[:, None] + through @ load.mT + noise)
            cross = e[:, :, None] * at[:, None]
            cross[..., :size] -= through
            rg.index_add_(0, n, cross)
            gg[:, :size, :size].index_add_(0, n, v)
        return self._total(rr, rg, gg, some.sum(1).to(mean.dtype))

    def above_noise(self, cov: Float[Tensor, "sys obs obs"]) -> Float[Tensor, "sys obs obs"]:
        """Nearest emission covariance, in units of `least_noise`, that nowhere falls below it.

        Among such covariances it maximises the expected log-likelihood too, which depends on
        each eigenvalue by itself and has one top in it.
        """
        return lifted(cov, self.least_noise)

    def _rest(self, steps: slice) -> Float[Tensor, "series time rest"]:
        """Inputs and a one."""
        u = self.batch.u[:, steps]
        return torch.cat([u, u.new_ones(*u.shape[:-1], 1)], -1)

    def _total(self, *parts: Tensor) -> Moments:
        return Moments(*(p.sum(0, keepdim=True) for p in parts) if self.pooled else parts)


def lifted(
    cov: Float[Tensor, "sys obs obs"], least: Float[Tensor, "sys obs"]
) -> Float[Tensor, "sys obs obs"]:
    """Nearest covariance, in units of the variances `least`, that nowhere falls below them."""
    root = least.sqrt()
    units = root[..., :, None] * root[..., None, :]
    scaled = torch.nan_to_num(cov / units)
    low = torch.linalg.cholesky_ex(scaled - torch.eye(cov.shape[-1]).to(cov)).info != 0
    if not bool(low.any()):
        return cov
    values, vectors = torch.linalg.eigh(scaled)
    raised = (vectors * values.clamp_min(1.0)[..., None, :]) @ vectors.mT * units
    return torch.where(low[:, None, None], raised, cov)


class _Climb(NamedTuple):
    """Where EM ended from one start."""

    parameters: Parameters
    value: Float[Tensor, "sys"]
    done: Bool[Tensor, "sys"]
    failed: Bool[Tensor, "sys"]
    trace: tuple[float, ...]


def fit(
    model: EMModel,
    batch: Batch,
    *,
    method: str,
    generator: torch.Generator,
    progress: bool,
    max_iter: int = 500,
    tol: float = 1e-7,
    pooled: bool = False,
) -> FitReport:
    """Run EM until the log-likelihood of every series changes by less than ``tol`` relatively.

    Parameters
    ----------
    model, batch, method, generator, progress
        As every learner.
    max_iter : int
        Iterations at most, from each start.
    tol : float
        Relative change of the log-likelihood at which a series has converged.
    pooled : bool
        Share the parameters over the series instead of fitting each on its own.

    Returns
    -------
    FitReport
        Of the best start of each series; ``objective`` follows the start with the best total.

    Raises
    ------
    ValueError
        If no series has a finite likelihood at its starting values.
    """
    begin = time.perf_counter()
    check_count("max_iter", max_iter)
    climbs = [
        _climb(model, batch, start, max_iter, tol, pooled)
        for start in model.em_starts(batch, pooled=pooled)
    ]
    names = ("the pooled series",) if pooled else batch.ids
    best, chosen = _best(climbs)
    failed = best.failed.tolist()
    messages = tuple(_blame(name) for name, bad in zip(names, failed, strict=True) if bad)
    if not bool(torch.isfinite(best.value).any()):
        raise ValueError(messages[0])
    if len(climbs) > 1:
        counts = [(k + 1, int((chosen == k).sum())) for k in range(len(climbs))]
        kept = ", ".join(f"start {k} for {count} series" for k, count in counts if count)
        messages = (*messages, f"best of {len(climbs)} starts: {kept}")
    model.em_set(best.parameters, chosen, None if pooled else batch.ids)
    return FitReport(
        method=method,
        objective=best.trace,
        valid_objective=(),
        converged=best.done.numpy(),
        n_iter=max(len(climb.trace) for climb in climbs),
        seconds=time.perf_counter() - begin,
        log_likelihood=best.value.numpy(),
        messages=messages,
    )


def _climb(
    model: EMModel, batch: Batch, start: Parameters, max_iter: int, tol: float, pooled: bool
) -> _Climb:
    """EM from one start."""
    count = 1 if pooled else batch.n_series
    value = torch.full((count,), -torch.inf, dtype=torch.float64)
    done, failed = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    parameters = best = start
    u, trace = batch.u[:, : batch.n_steps], []
    floor = least_noise(batch, pooled=pooled)
    for _ in range(max_iter):
        system = model.em_system(parameters, u)
        smoothed = kalman_smoother(system, batch.x, batch.mask, batch.lengths, lag_one=True)
        sound = _sound(smoothed, batch.lengths)
        if not bool(sound.all()):
            smoothed = _silenced(smoothed, sound)
        likelihood = torch.where(sound, smoothed.loglik, torch.nan)
        now = likelihood.sum(0, keepdim=True) if pooled else likelihood
        # EM cannot lower the likelihood: where it does, rounding has taken over.
        worse = now < value - 1e-6 * (1 + value.abs())
        failed = failed | ((~torch.isfinite(now) | worse) & ~done)
        moving = ~done & ~failed
        # A series that has converged or failed keeps what it has, whatever its company does.
        best = _where(moving, parameters, best)
        done = done | (moving & ((now - value).abs() <= tol * (1 + now.abs())))
        value = torch.where(moving, now, value)
        trace.append(float(value[torch.isfinite(value)].sum()))
        if bool((done | failed).all()):
            break
        found = model.em_step(parameters, Expected(batch, system, smoothed, pooled, floor))
        parameters = _where(~done & ~failed, found, best)
    return _Climb(best, value, done, failed, tuple(trace))


def least_noise(batch: Batch, *, pooled: bool) -> Float[Tensor, "sys obs"]:
    """Smallest emission variance of every column that its values can tell from rounding."""
    axes = (0, 1) if pooled else (1,)
    m = batch.mask.to(torch.float64)
    count = m.sum(axes, keepdim=True).clamp_min(1.0)
    x = torch.where(batch.mask, batch.x, 0.0)
    mean = x.sum(axes, keepdim=True) / count
    spread = (m * (x - mean) ** 2).sum(axes, keepdim=True) / count
    size = (x**2).sum(axes, keepdim=True) / count
    floor = (_LEAST_NOISE * spread + _ROUNDING**2 * size).reshape(-1, x.shape[-1])
    return floor.clamp_min(torch.finfo(torch.float64).tiny ** 0.5)


def _sound(smoothed: Smoothed, lengths: Int[Tensor, "series"]) -> Bool[Tensor, "series"]:
    """Whether the moments of a series are numbers; not where a variance has collapsed to zero."""
    n, steps = smoothed.mean.shape[:2]
    past = torch.arange(steps) >= lengths[:, None]
    fields = [(smoothed.mean, past), (smoothed.cov, past)]
    if smoothed.lag_one is not None:
        fields.append((smoothed.lag_one, past[:, 1:]))
    checks = [
        (torch.isfinite(field.reshape(n, gone.shape[1], -1)).all(-1) | gone).all(1)
        for field, gone in fields
    ]
    return torch.stack(checks).all(0)


def _silenced(smoothed: Smoothed, sound: Bool[Tensor, "series"]) -> Smoothed:
    """Zeros for the moments of series without any, so that the others can go on."""

    def keep(field: Tensor | None) -> Tensor | None:
        if field is None:
            return None
        return torch.where(sound.reshape(-1, *[1] * (field.ndim - 1)), field, 0.0)

    mean, cov = keep(smoothed.mean), keep(smoothed.cov)
    assert mean is not None
    assert cov is not None
    return smoothed._replace(mean=mean, cov=cov, lag_one=keep(smoothed.lag_one))


def _best(climbs: Sequence[_Climb]) -> tuple[_Climb, Int[Tensor, "sys"]]:
    """The highest end of every series, with the trace of the highest total, and whose it is."""
    value, chosen = torch.stack([climb.value for climb in climbs]).max(0)
    best = max(climbs, key=lambda climb: float(climb.value.sum()))
    for k, climb in enumerate(climbs):
        best = best._replace(
            parameters=_where(chosen == k, climb.parameters, best.parameters),
            done=torch.where(chosen == k, climb.done, best.done),
            failed=torch.where(chosen == k, climb.failed, best.failed),
        )
    return best._replace(value=value), chosen


def completion(
    r: Float[Tensor, "rows dim dim"], mask: Bool[Tensor, "rows dim"]
) -> tuple[Float[Tensor, "rows dim dim"], Float[Tensor, "rows dim dim"]]:
    """Law of a whole error given its observed elements: error = A observed + N(0, S).

    Parameters
    ----------
    r : Tensor of shape (rows, dim, dim)
        Covariance of the error.
    mask : Tensor of bool, shape (rows, dim)
        What is observed.

    Returns
    -------
    tuple of Tensor
        A, whose columns of missing elements are zero, and S.
    """
    m = mask.to(r.dtype)
    both = m[..., :, None] * m[..., None, :]
    # Unobserved rows become identity rows, so one inverse serves every pattern.
    block = r * both + torch.diag_embed(1 - m)
    cross = r * (1 - m)[..., :, None] * m[..., None, :]
    gain = cross @ torch.linalg.pinv(block, hermitian=True)
    noise = r * (1 - m)[..., :, None] * (1 - m)[..., None, :] - gain @ cross.mT
    return torch.diag_embed(m) + gain, 0.5 * (noise + noise.mT)


def _solve(gg: Float[Tensor, "sys g g"], rg: Float[Tensor, "sys r g"]) -> Float[Tensor, "sys r g"]:
    """Coefficients of a regression, of least norm where the regressors are redundant."""
    # Regressors of very different size would otherwise look redundant.
    size = torch.diagonal(gg, dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    size = torch.where(size > 0, size, 1.0)
    scaled = gg / size[:, :, None] / size[:, None, :]
    root, info = torch.linalg.cholesky_ex(scaled)
    sure = (info == 0) & (torch.diagonal(root, dim1=-2, dim2=-1).amin(-1) > 1e-6)
    target = rg / size[:, None, :]
    found = torch.cholesky_solve(target.mT, root).mT
    if not bool(sure.all()):
        least = target @ torch.linalg.pinv(scaled, hermitian=True)
        found = torch.where(sure[:, None, None], found, least)
    return found / size[:, None, :]


def _where(chosen: Bool[Tensor, "sys"], new: Parameters, old: Parameters) -> Parameters:
    """Take the new parameters of the chosen series, the old ones of the others."""
    if bool(chosen.all()):
        return new
    fields = (
        torch.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        for a, b in zip(new, old, strict=True)
    )
    return type(new)(*fields)


def _blame(name: object) -> str:
    return (
        f"series {name!r}: the log-likelihood was not finite, or fell; the update was not applied. "
        "Scale the data (scale='standard') or use a smaller latent_dim"
    )
