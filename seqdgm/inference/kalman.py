r"""Exact inference in linear-Gaussian models: the engine over the Kalman kernels.

.. math::

    z_1 &\sim N(m_0, P_0 + \kappa P_\infty), \quad \kappa \to \infty \\
    z_t &= F_t z_{t-1} + b_t + w_t, \quad w_t \sim N(0, Q_t) \\
    x_t &= H_t z_t + d_t + v_t, \quad v_t \sim N(0, R_t)

References
----------
Durbin and Koopman (2012), *Time Series Analysis by State Space Methods*, 2nd ed., chapters 4-6;
Durbin and Koopman (2002), A simple and efficient simulation smoother, *Biometrika* 89.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels import kalman_filter, kalman_smoother
from seqdgm.kernels.types import System
from seqdgm.prepare import log_jacobian
from seqdgm.types import Batch, Diffuse, Evidence, Gaussian, Prediction, States

if TYPE_CHECKING:
    from seqdgm.inference.online import Online
    from seqdgm.panel import Panel
    from seqdgm.recursion import StateSpaceModel
    from seqdgm.transform import Transform


@cache
def warm_up() -> None:
    """Compile (or load from disk) the kernels, on two steps of a random walk."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    walk = System(one, one, one, one, zero, zero, zero[0], one[0], 0 * one[0])
    x, lengths = torch.zeros(1, 2, 1, dtype=torch.float64), torch.tensor([2])
    kalman_smoother(walk, x, torch.ones_like(x, dtype=torch.bool), lengths, lag_one=True)


def filter(
    model: StateSpaceModel, batch: Batch, *, n_particles: int, generator: torch.Generator
) -> States:
    """Exact filtering moments (the Monte-Carlo options are not used)."""
    system = _system(model, batch)
    out = kalman_filter(system, batch.x, batch.mask, batch.lengths, store="all")
    assert out.mean is not None
    assert out.cov is not None
    cov = out.cov
    if out.cov_inf is not None:
        cov = torch.where(out.cov_inf.abs() > 0, torch.inf, cov)
    return States(out.mean, cov, out.loglik, diffuse=_diffuse(model, batch, system))


def smooth(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    lag: int | None = None,
) -> States:
    """Exact smoothing moments, and joint draws by the simulation smoother.

    With `lag`, moments given the observations up to so many steps later, which have no joint law.
    """
    system = _system(model, batch)
    if lag is not None:
        from seqdgm.inference.disturbances import fixed_lag

        loglik, mean, cov = fixed_lag(system, batch.x, batch.mask, batch.lengths, lag)
        return States(mean, cov, loglik, diffuse=_diffuse(model, batch, system))
    out = kalman_smoother(system, batch.x, batch.mask, batch.lengths, lag_one=False)
    _check_proper(out.rank_left, batch)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return simulation_smoother(system, batch, out.mean, n, generator)

    return States(out.mean, out.cov, out.loglik, draw=draw, diffuse=_diffuse(model, batch, system))


def log_prob(
    model: StateSpaceModel,
    batch: Batch,
    *,
    n_particles: int,
    generator: torch.Generator,
    start: Int[Tensor, "series"] | None = None,
) -> Evidence:
    """Exact log-likelihood; with `start`, of the steps from there on given those before."""
    system = _system(model, batch)
    out = kalman_filter(system, batch.x, batch.mask, batch.lengths, store="likelihood")
    value = out.loglik
    if start is not None:
        head = kalman_filter(system, batch.x, batch.mask, start, store="likelihood")
        _check_proper(head.rank_left, batch)
        value = value - head.loglik
    return Evidence(value, "exact", torch.zeros_like(value), _diffuse(model, batch, system))


def forecast(
    model: StateSpaceModel,
    batch: Batch,
    *,
    horizon: int,
    n_particles: int,
    generator: torch.Generator,
) -> Prediction:
    """Exact predictive moments: the filter run on over steps that are not observed."""
    whole = model.linear_gaussian(batch.u, batch.rows)
    system = _until(whole, batch.n_steps)
    last = kalman_filter(system, batch.x, batch.mask, batch.lengths, store="last")
    _check_proper(last.rank_left, batch)
    assert last.mean is not None
    assert last.cov is not None
    ahead = _continue(whole, last.mean[:, 0], last.cov[:, 0], batch, horizon)
    n, d = batch.n_series, batch.x.shape[2]
    nothing = batch.x.new_zeros(n, horizon, d)
    lengths = torch.full_like(batch.lengths, horizon)
    out = kalman_filter(ahead, nothing, nothing.bool(), lengths, store="all")
    assert out.mean is not None
    assert out.cov is not None
    mean, cov = observation_moments(ahead, out.mean, out.cov)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return simulate(ahead, batch.n_series, n, horizon, generator)[1]

    def draw_states(n: int, generator: torch.Generator) -> Tensor:
        return simulate(ahead, batch.n_series, n, horizon, generator)[0]

    known = _diffuse(model, batch, system)
    states = States(out.mean, out.cov, last.loglik, draw=draw_states, diffuse=known)
    variance = torch.diagonal(cov, dim1=-2, dim2=-1)
    return Prediction(Gaussian(mean, variance, draw), states)


def sample(
    model: StateSpaceModel,
    u: Float[Tensor, "series steps inputs"],
    rows: Int[Tensor, "series"],
    generator: torch.Generator,
) -> Float[Tensor, "series steps dim"]:
    """Draw series from the model; diffuse elements start at their initial mean."""
    system = model.linear_gaussian(u, rows)
    return simulate(system, len(u), 1, u.shape[1], generator)[1][:, 0]


def impute(
    model: StateSpaceModel, batch: Batch, *, n_particles: int, generator: torch.Generator
) -> Gaussian:
    r"""Moments of every observation given all that was observed.

    A missing element whose noise is correlated with an observed one uses it:
    :math:`E[x_m] = H_m z + d_m + R_{mo} R_{oo}^{-1} (x_o - H_o z - d_o)`.
    """
    system = _system(model, batch)
    out = kalman_smoother(system, batch.x, batch.mask, batch.lengths, lag_one=False)
    _check_proper(out.rank_left, batch)
    load, offset, noise = conditional_emission(system, batch)
    mean = (load @ out.mean[..., None])[..., 0] + offset
    variance = torch.diagonal(load @ out.cov @ load.mT + noise, dim1=-2, dim2=-1)

    def draw(n: int, generator: torch.Generator) -> Tensor:
        z = simulation_smoother(system, batch, out.mean, n, generator)
        x = (load[:, None] @ z[..., None])[..., 0] + offset[:, None]
        return x + _correlated(noise[:, None].expand(-1, n, -1, -1, -1), generator)

    return Gaussian(mean, variance.clamp_min(0.0), draw)


def online(
    model: StateSpaceModel,
    batch: Batch,
    *,
    panel: Panel | None,
    transform: Transform,
    n_particles: int,
    generator: torch.Generator,
) -> Online:
    """Filter the data, which may have no steps, and go on from there one observation at a time."""
    from seqdgm.inference.innovations import innovations
    from seqdgm.inference.online import Intake, Online, affine_form

    whole = model.linear_gaussian(batch.u, batch.rows)
    loglik = np.zeros(batch.n_series)
    start = whole
    if panel is not None:
        system = _until(whole, batch.n_steps)
        out = kalman_filter(system, batch.x, batch.mask, batch.lengths, store="last")
        assert out.mean is not None
        assert out.cov is not None
        diffuse = torch.zeros_like(out.cov) if out.cov_inf is None else out.cov_inf
        start = whole._replace(m0=out.mean[:, 0], P0=out.cov[:, 0], Pinf=diffuse[:, 0])
        loglik = out.loglik.numpy() + log_jacobian(
            panel, transform, diffuse=lambda: innovations(model, batch).diffuse
        )
    return Online(
        affine_form(model, batch.rows, batch.u.shape[2]),
        start,
        Intake(transform, batch.ids, batch.x.shape[2], batch.u.shape[2]),
        loglik,
        batch.lengths.numpy().copy(),
    )


def conditional_emission(
    system: System, batch: Batch
) -> tuple[
    Float[Tensor, "series time dim state"],
    Float[Tensor, "series time dim"],
    Float[Tensor, "series time dim dim"],
]:
    """Law of the whole observation given the state and the observed elements: A z + c, S.

    Rows of observed elements are (0, x, 0); rows of missing ones use the correlation of the noise.
    """
    m = batch.mask.to(batch.x.dtype)
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    observed = m[..., :, None] * m[..., None, :]
    # Unobserved rows become identity rows, so one solve serves every pattern of missing elements.
    block = system.R * observed + eye * (1 - m)[..., None]
    cross = system.R * (1 - m)[..., :, None] * m[..., None, :]
    gain = cross @ torch.linalg.pinv(block, hermitian=True)
    miss = (1 - m)[..., None]
    load = miss * system.H - gain @ system.H
    residual = m * (batch.x - system.d)
    offset = m * batch.x + (1 - m) * system.d + (gain @ residual[..., None])[..., 0]
    noise = system.R * miss * miss.mT - gain @ (cross.mT)
    return load, offset, 0.5 * (noise + noise.mT)


def observation_moments(
    system: System,
    mean: Float[Tensor, "series time state"],
    cov: Float[Tensor, "series time state state"],
) -> tuple[Float[Tensor, "series time dim"], Float[Tensor, "series time dim dim"]]:
    """Moments of x_t = H z_t + d + v given those of z_t."""
    spread = system.H @ cov @ system.H.mT
    # Of states that cancel in an observation, rounding may leave less than nothing.
    torch.diagonal(spread, dim1=-2, dim2=-1).clamp_min_(0.0)
    return (system.H @ mean[..., None])[..., 0] + system.d, spread + system.R


def simulation_smoother(
    system: System,
    batch: Batch,
    smoothed: Float[Tensor, "series time state"],
    n: int,
    generator: torch.Generator,
) -> Float[Tensor, "series n time state"]:
    r"""Joint draws from p(z | x) by mean correction.

    Simulate :math:`(z^+, x^+)` from the model and return
    :math:`\hat z + z^+ - E[z \mid x^+]` (Durbin and Koopman 2002, algorithm 2); exact for diffuse
    elements too, whatever value :math:`z^+` gives them.
    """
    series, steps = batch.n_series, batch.n_steps
    z, x = simulate(system, series, n, steps, generator)
    repeated = _repeat(system, n)
    mean = kalman_smoother(
        repeated,
        x.reshape(series * n, steps, -1),
        batch.mask.repeat_interleave(n, 0),
        batch.lengths.repeat_interleave(n, 0),
        lag_one=False,
    ).mean
    return smoothed[:, None] + z - mean.reshape(z.shape)


def simulate(
    system: System, series: int, n: int, steps: int, generator: torch.Generator
) -> tuple[Float[Tensor, "series n time state"], Float[Tensor, "series n time dim"]]:
    """Draw states and observations, `n` joint trajectories of each series."""
    f, q, b = _at_length(system.F, steps), _root(system.Q), _at_length(system.b, steps)
    dim = system.m0.shape[-1]
    noise = _normal((series, n, steps, dim), system.m0, generator).transpose(1, 2)
    z = noise[:, 0] @ _root(system.P0).mT + system.m0[:, None]
    states = [z.expand(series, n, dim)]
    shocks = noise @ _at_length(q, steps).mT
    for t in range(1, steps):
        states.append(states[-1] @ f[:, t].mT + b[:, t, None] + shocks[:, t])
    path = torch.stack(states, 1)
    x = path @ system.H.mT + system.d[:, :, None]
    error = _normal((series, n, steps, x.shape[-1]), system.m0, generator).transpose(1, 2)
    x = x + error @ _root(system.R).mT
    return path.transpose(1, 2), x.transpose(1, 2)


def _diffuse(model: StateSpaceModel, batch: Batch, system: System) -> Diffuse | None:
    """Which observations have no density; None where every one has."""
    if not bool(system.Pinf.any()):
        return None

    def find() -> Bool[Tensor, "series time dim"]:
        from seqdgm.inference.innovations import innovations

        return innovations(model, batch).diffuse

    return find


def _system(model: StateSpaceModel, batch: Batch) -> System:
    return _until(model.linear_gaussian(batch.u, batch.rows), batch.n_steps)


def _until(system: System, steps: int) -> System:
    """Cut the time-varying matrices to the observed steps."""
    moving = [name for name in ("F", "Q", "H", "R", "b", "d") if getattr(system, name).shape[1] > 1]
    return system._replace(**{name: getattr(system, name)[:, :steps] for name in moving})


def _continue(
    system: System,
    mean: Float[Tensor, "series state"],
    cov: Float[Tensor, "series state state"],
    batch: Batch,
    horizon: int,
) -> System:
    """System of the steps after each series' end, started from its filtered moments."""
    step = torch.arange(horizon, device=mean.device)
    when = batch.lengths[:, None] + step

    def ahead(field: Tensor) -> Tensor:
        if field.shape[1] == 1:
            return field
        wide = field.expand(batch.n_series, *field.shape[1:])
        return wide[torch.arange(batch.n_series, device=mean.device)[:, None], when]

    fields = {name: ahead(getattr(system, name)) for name in ("F", "Q", "H", "R", "b", "d")}
    f, q, b = fields["F"][:, 0], fields["Q"][:, 0], fields["b"][:, 0]
    m0 = (f @ mean[..., None])[..., 0] + b
    p0 = f @ cov @ f.mT + q
    return System(**fields, m0=m0, P0=0.5 * (p0 + p0.mT), Pinf=torch.zeros_like(p0))


def _check_proper(rank_left: Int[Tensor, "series"], batch: Batch) -> None:
    left = torch.nonzero(rank_left)
    if len(left):
        k = int(left[0, 0])
        raise ValueError(
            f"series {batch.ids[k]!r} has too few observations: {int(rank_left[k])} diffuse "
            "elements of its state stay undetermined; give more observations, or a model with a "
            "proper initial distribution"
        )


def _repeat(system: System, n: int) -> System:
    """Repeat the systems of each series `n` times; shared ones stay shared."""
    return System(*(f if f.shape[0] == 1 else f.repeat_interleave(n, 0) for f in system))


def _at_length(field: Tensor, steps: int) -> Tensor:
    return field.expand(field.shape[0], steps, *field.shape[2:]) if field.shape[1] == 1 else field


def _root(cov: Float[Tensor, "*batch dim dim"]) -> Float[Tensor, "*batch dim dim"]:
    """Symmetric square root, which exists for singular covariances as well."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp_min(0.0).sqrt()[..., None, :] @ vectors.mT


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _correlated(cov: Float[Tensor, "*batch dim dim"], generator: torch.Generator) -> Tensor:
    noise = _normal(cov.shape[:-1], cov, generator)
    return (_root(cov) @ noise[..., None])[..., 0]
