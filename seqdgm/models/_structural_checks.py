"""What a structural model is asked for: kinds, seasons and fixed values, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from seqdgm.models._polynomials import partial_from_coefficients
from seqdgm.models._structural import StructuralSpec, harmonic_numbers

KINDS = (None, "stochastic", "deterministic")


def check_kind(name: str, value: str | None, known: tuple[str | None, ...]) -> None:
    """Refuse a kind of component that there is not."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {known}")


def flags(
    seasonal: int | Sequence[int] | None, stochastic: bool | Sequence[bool]
) -> tuple[bool, ...]:
    """Whether the seasons of each period change, shortest period first."""
    periods = [] if seasonal is None else np.atleast_1d(np.asarray(seasonal)).tolist()
    given = [stochastic] * len(periods) if isinstance(stochastic, bool) else list(stochastic)
    if len(given) != len(periods):
        raise ValueError(
            f"seasonal_stochastic={stochastic!r} must be one bool, or one for each of {periods}"
        )
    return tuple(bool(given[k]) for k in np.argsort(periods))


def check_fixed(spec: StructuralSpec) -> None:
    """Refuse names the model does not have, and values outside their range."""
    fixed = dict(spec.fixed)
    for name, value in fixed.items():
        if name not in spec.names:
            raise ValueError(f"fixed has {name!r}, but the model has {list(spec.names)}")
        top = {"trend.damping": 1.0, "cycle.damping": 1.0 - 1e-8}.get(name, math.inf)
        low = 2.0 if name == "cycle.period" else 0.0
        if not (math.isfinite(value) and (name.startswith("ar.") or low <= value <= top)):
            raise ValueError(f"fixed[{name!r}]={value!r} must lie between {low:g} and {top:g}")
    ar = [fixed[name] for name in spec.others if name.startswith("ar.") and name in fixed]
    if ar and len(ar) < spec.ar:
        raise ValueError(
            f"fixed has {len(ar)} of the {spec.ar} AR coefficients; fix all of them or none"
        )
    if ar and not (np.abs(partial_from_coefficients(np.array([ar]))) < 1.0).all():
        raise ValueError(f"the AR coefficients {ar} in fixed are not stationary; shrink them")


def check_cycle(spec: StructuralSpec, bounds: tuple[float, float]) -> None:
    """Refuse bounds that are no periods, or that hold a deterministic seasonal wave."""
    low, high = bounds
    if not 2 <= low < high:
        raise ValueError(f"cycle_bounds={bounds!r} must be two periods, 2 <= low < high")
    if spec.cycle != "deterministic":
        return
    for frequency in spec.frequencies:
        period = 2 * math.pi / frequency
        if low < period < high:
            raise ValueError(
                f"a deterministic cycle between {low:g} and {high:g} steps could repeat the "
                f"seasonal wave of {period:g}; narrow cycle_bounds to leave it out"
            )


def seasons(
    seasonal: int | Sequence[int] | None, kind: str, harmonics: int | Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...] | None]:
    """Periods, shortest first, and the harmonic numbers of each (None for dummy seasons)."""
    check_kind("seasonal_kind", kind, ("dummy", "trigonometric"))
    given = () if seasonal is None else np.atleast_1d(np.asarray(seasonal)).tolist()
    if any(int(s) != s or s < 2 for s in given) or len(set(given)) < len(given):
        raise ValueError(
            f"seasonal={seasonal!r} must be a period of at least 2 whole steps, or several "
            "different ones"
        )
    if harmonics is not None and (kind == "dummy" or not given):
        raise ValueError(
            f"harmonics={harmonics!r} needs seasonal_kind='trigonometric' and a seasonal period"
        )
    if harmonics is None or isinstance(harmonics, int | np.integer):
        counts = [harmonics] * len(given)
    else:
        counts = list(harmonics)
    if len(counts) != len(given):
        raise ValueError(f"harmonics={harmonics!r} must give one number for each of {given}")
    order = np.argsort(given)
    periods = tuple(int(given[k]) for k in order)
    if kind == "dummy":
        return periods, None
    return periods, harmonic_numbers(periods, [counts[k] for k in order])
