"""Parameters of switching linear models: where learning starts, and the M-step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqdgm.models._subspace import spread_values, starting_values

if TYPE_CHECKING:
    from seqdgm.inference.em import Moments
    from seqdgm.inference.regime_em import Statistics, Sums

STAY = 0.9  # probability of staying in a regime, where learning starts
SPREAD = 4.0  # variances of the regimes differ by up to the square of this, where learning starts
SELDOM = 0.1  # least expected number of moves from a regime into another


class Regimes(NamedTuple):
    """Parameters of the model, the axis of the regimes first."""

    Pi: Float[Tensor, "regimes regimes"]
    p0: Float[Tensor, "regimes"]
    F: Float[Tensor, "regimes state state"]
    H: Float[Tensor, "regimes dim state"]
    Q: Float[Tensor, "regimes state state"]
    R: Float[Tensor, "regimes dim dim"]
    m0: Float[Tensor, "regimes state"]
    P0: Float[Tensor, "regimes state state"]
    b: Float[Tensor, "regimes state"]
    d: Float[Tensor, "regimes dim"]


NAMES = Regimes._fields


class Learned(NamedTuple):
    """Which parameters are learned, and which of those are the same in all regimes."""

    free: Collection[str]
    shared: Collection[str]


# -- starting values ----------------------------------------------------------------------------


def start(
    given: Mapping[str, Float[np.ndarray, "..."]],
    learned: Learned,
    x: list[Float[np.ndarray, "time dim"]],
    regimes: int,
    state: int,
    rng: np.random.Generator | None,
) -> Regimes:
    """What is given, and for the rest estimates from the data, spread over the regimes.

    Without random numbers the variances of the regimes differ, and the levels of what is offset by
    regime; with them the transitions do too, and who has the large variance is random.
    """
    found = _shared_start(given, x, regimes, state)
    order = np.linspace(-1.0, 1.0, regimes) if regimes > 1 else np.zeros(1)
    if rng is not None:
        order = rng.permutation(order)
    out = {}
    for name in NAMES:
        if name in given:
            out[name] = given[name]
            continue
        value = found[name]
        if name not in ("Pi", "p0"):
            value = np.repeat(value[None], regimes, 0)
        if name in learned.free and name not in learned.shared:
            value = _apart(name, value, order, x, rng)
        out[name] = value
    return Regimes(*(torch.from_numpy(np.array(out[name], dtype=float)) for name in NAMES))


def _shared_start(
    given: Mapping[str, Float[np.ndarray, "..."]],
    x: list[Float[np.ndarray, "time dim"]],
    regimes: int,
    state: int,
) -> dict[str, Float[np.ndarray, "..."]]:
    """Estimates that do not tell the regimes apart."""
    dim = x[0].shape[1]
    chain = np.full((regimes, regimes), (1 - STAY) / max(regimes - 1, 1))
    np.fill_diagonal(chain, STAY if regimes > 1 else 1.0)
    out = {
        "Pi": chain,
        "p0": np.full(regimes, 1 / regimes),
        "m0": np.zeros(state),
        "P0": np.eye(state),
        "b": np.zeros(state),
        "d": np.zeros(dim),
    }
    if "F" in given and "H" in given:
        loading = given["H"].mean(0)
        firsts = np.array([series[np.isfinite(series).any(1).argmax()] for series in x])
        level = np.where(np.isfinite(firsts), firsts, 0.0).sum(0)
        level /= np.maximum(np.isfinite(firsts).sum(0), 1)
        offset = given["d"].mean(0) if "d" in given else out["d"]
        return out | spread_values(x, loading) | {"m0": np.linalg.pinv(loading) @ (level - offset)}
    return out | starting_values(x, [None] * len(x), state)


def _apart(
    name: str,
    value: Float[np.ndarray, "regimes ..."],
    order: Float[np.ndarray, "regimes"],
    x: list[Float[np.ndarray, "time dim"]],
    rng: np.random.Generator | None,
) -> Float[np.ndarray, "regimes ..."]:
    """Different values for the regimes."""
    place = order.reshape(-1, *[1] * (value.ndim - 1))
    if name in ("Q", "R"):
        spread = value * SPREAD**place
        return spread if rng is None else spread * np.exp(rng.normal(size=place.shape))
    if name == "d":
        pooled = np.concatenate(x)
        return value + place * np.nanstd(pooled, axis=0)
    if name == "b":
        return value + place
    if name == "F" and rng is not None:
        moved = value * rng.uniform(0.3, 1.0, size=place.shape)
        moved += rng.normal(scale=0.2, size=value.shape)
        radius = np.abs(np.linalg.eigvals(moved)).max(-1)
        return moved / np.maximum(radius, 1.0)[:, None, None]
    return value


# -- M-step -------------------------------------------------------------------------------------


def maximise(
    now: Regimes,
    origin: Regimes,
    statistics: Statistics,
    learned: Learned,
) -> Regimes:
    """Closed-form maximum of the expected complete-data log-likelihood over what is learned.

    Where coefficients are shared by regimes whose covariances are not, it is a maximum over the
    coefficients first and over the covariances then, which raises the likelihood too (Meng and
    Rubin 1993). What was never seen to happen in a path keeps a small probability, or paths could
    not come back to it.

    References
    ----------
    Meng and Rubin (1993), Maximum likelihood estimation via the ECM algorithm, *Biometrika* 80.
    """
    changed: dict[str, Tensor] = {}
    least = SELDOM / float(statistics.emission.steps.sum().clamp_min(1.0))
    if "Pi" in learned.free:
        changed["Pi"] = _shares(statistics.moves, now.Pi, least)
    if "p0" in learned.free:
        changed["p0"] = _shares(statistics.first[None], now.p0[None], least)[0]
    parts = (("F", "b", "Q"), ("H", "d", "R"), (None, "m0", "P0"))
    sums = (statistics.transition, statistics.emission, statistics.start)
    for names, one in zip(parts, sums, strict=True):
        changed |= _regressed(one, names, now, origin, learned)
    if "R" in changed:
        changed["R"] = statistics.above_noise(changed["R"])
    for name in {"Q", "P0"} & changed.keys():
        changed[name] = _semidefinite(changed[name])
    return now._replace(**changed)


def _shares(
    counts: Float[Tensor, "rows regimes"], old: Float[Tensor, "rows regimes"], least: float
) -> Float[Tensor, "rows regimes"]:
    total = counts.sum(-1, keepdim=True)
    found = torch.where(total > 0, counts / total.clamp_min(1e-300), old).clamp_min(least)
    return found / found.sum(-1, keepdim=True)


def _regressed(
    sums: Sums,
    names: tuple[str | None, str, str],
    now: Regimes,
    origin: Regimes,
    learned: Learned,
) -> dict[str, Tensor]:
    """Coefficients, offset and covariance of one regression, as far as they are learned."""
    state, shift, noise = names
    offset, cov = getattr(now, shift), getattr(now, noise)
    coef = sums.yg[..., :-1] if state is None else getattr(now, state)
    moments = sums.residual(coef, offset - getattr(origin, shift))
    width = coef.shape[-1]
    columns = (state,) * width + (shift,)
    free = torch.tensor([name in learned.free for name in columns])
    tied = torch.tensor([name in learned.shared for name in columns])
    change = torch.zeros_like(moments.rg)
    if bool(free.any()):
        alike = noise in learned.shared or bool((cov == cov[:1]).all())
        change = _best_change(moments, None if alike else cov, free, tied)
        visited = (moments.steps > 0)[:, None, None]
        change = torch.where(visited | tied, change, 0.0)
    out: dict[str, Tensor] = {}
    if state is not None and state in learned.free:
        out[state] = coef + change[..., :width]
    if shift in learned.free:
        out[shift] = offset + change[..., width]
    if noise in learned.free:
        cross = change @ moments.rg.mT
        rest = moments.rr - cross - cross.mT + change @ moments.gg @ change.mT
        rest, steps = 0.5 * (rest + rest.mT), moments.steps[:, None, None]
        if noise in learned.shared:
            out[noise] = (rest.sum(0) / steps.sum(0).clamp_min(1e-300)).expand(cov.shape)
        else:
            out[noise] = torch.where(steps > 0, rest / steps.clamp_min(1e-300), cov)
    return out


def _best_change(
    moments: Moments,
    cov: Float[Tensor, "regimes y y"] | None,
    free: Bool[Tensor, "g"],
    tied: Bool[Tensor, "g"],
) -> Float[Tensor, "regimes y g"]:
    r"""Change of the free coefficients that is best for given residual covariances.

    With the unknown columns B, of which regime k takes :math:`B E_k`, the best solve
    :math:`\sum_k W_k B E_k G_k E_k^\top = \sum_k W_k C_k E_k^\top`, W being inverse covariances, G
    the moments of the regressors, C those with the residuals; W cancels where it does not differ.
    """
    count, y, g = moments.rg.shape
    picks = []
    for j in torch.nonzero(free)[:, 0].tolist():
        one = moments.rg.new_zeros(count, count, g)
        one[torch.arange(count), torch.arange(count), j] = 1.0
        picks.append(one.sum(1, keepdim=True) if bool(tied[j]) else one)
    pick = torch.cat(picks, 1)
    gram, target = pick @ moments.gg @ pick.mT, moments.rg @ pick.mT
    weight = torch.eye(y).to(gram).expand(count, y, y)
    if cov is not None and bool(tied[free].any()):
        values, vectors = torch.linalg.eigh(cov)
        low = 1e-10 * float(values.max()) + 1e-300
        weight = (vectors / values.clamp_min(low)[..., None, :]) @ vectors.mT
    left = torch.einsum("kuv,kij->uivj", gram, weight).reshape(pick.shape[1] * y, -1)
    right = (weight @ target).sum(0).mT.reshape(-1)
    # Regressors of very different size would otherwise look redundant.
    size = left.diagonal().clamp_min(0.0).sqrt()
    size = torch.where(size > 0, size, 1.0)
    scaled = left / size[:, None] / size
    found = torch.linalg.pinv(scaled, hermitian=True) @ (right / size) / size
    return found.reshape(-1, y).mT @ pick


def _semidefinite(cov: Float[Tensor, "regimes n n"]) -> Float[Tensor, "regimes n n"]:
    """The same, less eigenvalues that rounding has made negative."""
    values, vectors = torch.linalg.eigh(cov)
    fixed = (vectors * values.clamp_min(0.0)[..., None, :]) @ vectors.mT
    return torch.where((values[:, :1] < 0)[..., None], fixed, cov)
