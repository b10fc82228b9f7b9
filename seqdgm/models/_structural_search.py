"""Search space of structural models: unconstrained parameters, their scope and their start."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from seqdgm.models._polynomials import coefficients_from_partial
from seqdgm.models._structural import StructuralSpec

_EDGE = 1.0 - 1e-8  # largest damping of a cycle
# Largest partial autocorrelation of the AR part: beside a diffuse level a unit root may be the best
# there is, and the stationary variance should not take all digits then.
_EDGE_AR = 1.0 - 1e-6
# Standard deviations of the disturbances are searched in these units: a slope or a season moves
# much less in one step than the series does.
_UNITS = {"irregular": 1.0, "level": 1.0, "trend": 0.1, "cycle": 1.0, "ar": 1.0}
_SMALL_UNIT = 0.1
# Directions in which the search starts: much irregular, much level, much slope, and little but it.
_STARTS = (
    {"irregular": 1.0, "level": 0.3, "trend": 0.1, "cycle": 0.5, "ar": 0.5},
    {"irregular": 0.3, "level": 1.0, "trend": 0.3, "cycle": 1.0, "ar": 1.0},
    {"irregular": 1.0, "level": 0.1, "trend": 1.0, "cycle": 1.0, "ar": 1.0},
    {"irregular": 0.03, "level": 0.03, "trend": 1.0, "cycle": 0.03, "ar": 0.03},
)
_SMALL_START = 0.3


class Scope(NamedTuple):
    """What the search of each row is bounded by and measured in.

    Attributes
    ----------
    periods : ndarray of shape (rows, 2)
        Shortest and longest period of the cycle.
    units : ndarray of shape (rows, sources)
        Units of the standard deviations.
    sizes : ndarray of shape (rows, inputs)
        Root mean squares of the regressors.
    """

    periods: Float[np.ndarray, "rows 2"]
    units: Float[np.ndarray, "rows sources"]
    sizes: Float[np.ndarray, "rows inputs"]

    def take(self, rows: np.ndarray) -> Scope:
        """Scope of the chosen rows."""
        return Scope(*(field[rows] for field in self))


def constrain(
    spec: StructuralSpec,
    free: Float[np.ndarray, "rows free"],
    scope: Scope,
) -> Float[np.ndarray, "rows parameters"]:
    r"""Parameters from unconstrained ones; the variances are ratios with a common factor to find.

    The K standard deviations, in units of their own, are a point on the unit sphere given by K - 1
    angles. The likelihood is smooth and even where one of them is zero, so a variance that vanishes
    at the maximum, the irregular's too, is an ordinary maximum instead of one at infinity. A
    damping factor or the frequency of a cycle is :math:`(1 - \cos \theta) / 2` of its range for the
    same reason. The variance of a damped cycle is parameterised by that of the cycle itself,
    :math:`\sigma_\kappa^2 / (1 - \rho^2)`, which stays regular as the cycle becomes deterministic
    (Harvey 1989, section 4.2). AR coefficients are stationary by construction (Monahan 1984).
    Where a variance is fixed there is no common factor: the other standard deviations, up to their
    sign, are then searched themselves.

    Parameters
    ----------
    spec : StructuralSpec
    free : ndarray of shape (rows, spec.n_free)
    scope : Scope
        Of the same rows.
    """
    free = np.asarray(free, dtype=np.float64)
    fixed = {name: np.full(len(free), value) for name, value in spec.fixed}
    sources, others = spec.searched
    angles = free[:, : spec.n_scales]
    point = angles.copy()
    if spec.concentrated:
        point = np.ones((len(free), len(sources)))
        point[:, :-1] = np.cos(angles)
        point[:, 1:] *= np.cumprod(np.sin(angles), axis=1)
    units = dict(zip(spec.sources, scope.units.T, strict=True))
    named = {s: (point[:, k] * units[s]) ** 2 for k, s in enumerate(sources)}
    rest = dict(zip(others, free[:, spec.n_scales :].T, strict=True))
    out: dict[str, np.ndarray] = {}
    if "trend.damping" in rest:
        out["trend.damping"] = _within(rest["trend.damping"])
    if "cycle.period" in rest:
        low, high = 2 * np.pi / scope.periods[:, 1], 2 * np.pi / scope.periods[:, 0]
        out["cycle.period"] = 2 * np.pi / (low + (high - low) * _within(rest["cycle.period"]))
    if "cycle.damping" in rest:
        out["cycle.damping"] = _EDGE * _within(rest["cycle.damping"])
    if spec.cycle == "stochastic" and "cycle" in named:
        damping = {**fixed, **out}["cycle.damping"]
        named["cycle"] = named["cycle"] * (1.0 - damping) * (1.0 + damping)
    if "ar.L1" in rest:
        partial = _EDGE_AR * np.tanh(free[:, -spec.ar :])
        ar = coefficients_from_partial(partial)
        out.update({f"ar.L{k + 1}": ar[:, k] for k in range(spec.ar)})
    found = {**fixed, **{f"sigma2.{name}": value for name, value in named.items()}, **out}
    return np.stack([found[name] for name in spec.names], 1)


def starting_values(
    spec: StructuralSpec,
    x: Float[np.ndarray, "series time"],
    periods: Float[np.ndarray, "scopes 2"],
) -> Float[np.ndarray, "starts series free"]:
    """Unconstrained starting vectors: the angles of `_STARTS`, each with the cycle in the data.

    The cycle starts at the highest peak of the periodogram of what a line and the seasons leave.
    """
    n_starts = len(_STARTS) if "trend" in spec.sources else len(_STARTS) - 1
    out = np.zeros((n_starts if spec.n_free else 1, len(x), spec.n_free))
    sources, others = spec.searched
    for k in range(len(out)):
        weight = np.array([_STARTS[k].get(name, _SMALL_START) for name in sources])
        if spec.concentrated:
            behind = np.sqrt(np.cumsum((weight**2)[::-1])[::-1])
            weight = np.arctan2(behind[1:], weight[:-1])
        out[k, :, : spec.n_scales] = weight
    for k, name in enumerate(others, start=spec.n_scales):
        if name == "cycle.period":
            low, high = (2 * np.pi / np.broadcast_to(periods, (len(x), 2))[:, ::-1]).T
            peak = np.array([_peak(spec, *row) for row in zip(x, low, high, strict=True)])
            share = (peak - low) / np.where(high > low, high - low, 1.0)
            # At an end of the range the likelihood is even, so nothing would move the start.
            out[:, :, k] = np.arccos(1.0 - 2.0 * np.clip(share, 0.01, 0.99))
        elif name in ("cycle.damping", "trend.damping"):
            out[:, :, k] = np.arccos(1.0 - 2.0 * 0.9)
        elif name == "ar.L1":
            out[:, :, k] = 0.5
    return out


def find_scope(
    spec: StructuralSpec,
    lengths: Float[np.ndarray, "series"],
    u: Float[np.ndarray, "series time inputs"] | None,
    bounds: tuple[float, float],
    scale: Float[np.ndarray, "series"],
) -> Scope:
    """Scope of every series: no cycle longer than the series, coefficients in units of their own.

    `scale` is the size of one step of each series, which matters where a variance is fixed.

    A deterministic cycle within 2 pi / T of frequency 0, pi or that of a season is nearly a part of
    what is there already, and its diffuse likelihood would rise without bound towards it.
    """
    shortest = np.full(len(lengths), float(bounds[0]))
    longest = np.maximum(np.minimum(bounds[1], lengths), shortest)
    if spec.cycle == "deterministic":
        low, high, margin = 2 * np.pi / longest, 2 * np.pi / shortest, 2 * np.pi / lengths
        for frequency in (0.0, *spec.frequencies, np.pi):
            if frequency <= 2 * np.pi / bounds[1]:
                low = np.maximum(low, frequency + margin)
            if frequency >= 2 * np.pi / bounds[0]:
                high = np.minimum(high, frequency - margin)
        shortest, longest = 2 * np.pi / np.maximum(high, low), 2 * np.pi / low
    sizes = np.ones((len(lengths), spec.n_inputs))
    if u is not None:
        inside = np.arange(u.shape[1])[None, :, None] < lengths[:, None, None]
        square = (np.where(inside, u, 0.0) ** 2).sum(1) / lengths[:, None]
        sizes = np.where(square > 0, np.sqrt(square), 1.0)
    units = np.empty((len(lengths), len(spec.sources)))
    for k, name in enumerate(spec.sources):
        units[:, k] = _UNITS.get(name, _SMALL_UNIT)
        if name.startswith("u"):
            units[:, k] /= sizes[:, int(name[1:]) - 1]
    if not spec.concentrated:
        units *= scale[:, None]
    return Scope(np.stack([shortest, longest], 1), units, sizes)


def step_sizes(x: Float[np.ndarray, "series time"]) -> Float[np.ndarray, "series"]:
    """Root mean square of the steps between neighbours that are both observed; 1 without any."""
    steps = np.diff(x, axis=1)
    seen = np.isfinite(steps)
    square = np.where(seen, steps, 0.0) ** 2
    mean = square.sum(1) / np.maximum(seen.sum(1), 1)
    return np.where(mean > 0, np.sqrt(mean), 1.0)


def _within(free: np.ndarray) -> np.ndarray:
    """Smooth map onto [0, 1] that reaches both ends."""
    return 0.5 * (1.0 - np.cos(free))


def _peak(spec: StructuralSpec, x: np.ndarray, low: float, high: float) -> float:
    """Frequency of the highest peak of the periodogram of one series, between two bounds."""
    time = np.flatnonzero(np.isfinite(x)).astype(np.float64)
    seen = x[np.isfinite(x)]
    design = [np.ones_like(time), time]
    for s in spec.periods:
        design += [(time % s == k).astype(np.float64) for k in range(1, s)]
    columns = np.stack(design, 1)
    residual = seen - columns @ np.linalg.lstsq(columns, seen, rcond=1e-10)[0]
    grid = np.linspace(low, high, 2 * int(time[-1]) + 3)
    power = np.abs(np.exp(-1j * np.outer(grid, time)) @ residual)
    return float(grid[power.argmax()])
