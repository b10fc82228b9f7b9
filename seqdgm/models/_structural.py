"""Structural time series models as linear-Gaussian systems: pure functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from seqdgm.kernels.types import System
from seqdgm.models._polynomials import coefficients_from_partial, partial_from_coefficients


class Block(NamedTuple):
    """A component's place in the state; `load` is the row of H that observes it (regression: 1)."""

    name: str
    start: int
    load: tuple[float, ...]

    @property
    def part(self) -> slice:
        """Elements of the state that belong to the component."""
        return slice(self.start, self.start + len(self.load))


@dataclass(frozen=True)
class StructuralSpec:
    """Which components there are.

    Attributes
    ----------
    level : {None, "stochastic", "deterministic"}
    trend : {None, "stochastic", "deterministic", "damped"}
    periods : tuple of int
        Seasonal periods, the shortest first.
    harmonics : tuple of tuple of int, or None
        Numbers of the trigonometric terms of each period; None for dummy seasonals.
    seasonal_stochastic : tuple of bool
        Whether the seasons of each period change.
    cycle : {None, "stochastic", "deterministic"}
    ar : int
    irregular : bool
    time_varying : bool
        Whether regression coefficients are random walks.
    n_inputs : int
    fixed : tuple of (str, float)
        Names and values of parameters that are not estimated.
    """

    level: str | None = "stochastic"
    trend: str | None = None
    periods: tuple[int, ...] = ()
    harmonics: tuple[tuple[int, ...], ...] | None = None
    seasonal_stochastic: tuple[bool, ...] = ()
    cycle: str | None = None
    ar: int = 0
    irregular: bool = True
    time_varying: bool = False
    n_inputs: int = 0
    fixed: tuple[tuple[str, float], ...] = ()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Components in the order of the state."""
        loads: list[tuple[str, tuple[float, ...]]] = []
        if self.level:
            loads.append(("level", (1.0,)))
        if self.trend:
            loads.append(("trend", (0.0,)))
        for k, s in enumerate(self.periods):
            if self.harmonics is None:
                load = (1.0,) + (0.0,) * (s - 2)
            else:
                terms = [(1.0,) if 2 * j == s else (1.0, 0.0) for j in self.harmonics[k]]
                load = sum(terms, ())
            loads.append((f"seasonal_{s}", load))
        if self.cycle:
            loads.append(("cycle", (1.0, 0.0)))
        if self.ar:
            loads.append(("ar", (1.0,) + (0.0,) * (self.ar - 1)))
        if self.n_inputs:
            loads.append(("regression", (1.0,) * self.n_inputs))
        starts = np.cumsum([0] + [len(load) for _, load in loads])
        return tuple(Block(n, int(k), load) for (n, load), k in zip(loads, starts, strict=False))

    @property
    def n_state(self) -> int:
        """Width of the state."""
        return sum(len(block.load) for block in self.blocks)

    @property
    def frequencies(self) -> tuple[float, ...]:
        """Angular frequencies of the seasons."""
        numbers = self.harmonics or [range(1, s // 2 + 1) for s in self.periods]
        pairs = zip(self.periods, numbers, strict=True)
        return tuple(2 * math.pi * j / s for s, terms in pairs for j in terms)

    @property
    def sources(self) -> tuple[str, ...]:
        """Disturbances that have a variance."""
        out = ["irregular"] if self.irregular else []
        out += ["level"] if self.level == "stochastic" else []
        out += ["trend"] if self.trend in ("stochastic", "damped") else []
        moving = zip(self.periods, self.seasonal_stochastic, strict=True)
        out += [f"seasonal_{s}" for s, moves in moving if moves]
        out += ["cycle"] if self.cycle == "stochastic" else []
        out += ["ar"] if self.ar else []
        out += [f"u{k + 1}" for k in range(self.n_inputs) if self.time_varying]
        return tuple(out)

    @property
    def others(self) -> tuple[str, ...]:
        """Parameters besides the variances."""
        out = ["trend.damping"] if self.trend == "damped" else []
        out += ["cycle.period"] if self.cycle else []
        out += ["cycle.damping"] if self.cycle == "stochastic" else []
        return (*out, *(f"ar.L{k + 1}" for k in range(self.ar)))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters."""
        return (*(f"sigma2.{name}" for name in self.sources), *self.others)

    @property
    def concentrated(self) -> bool:
        """Whether all variances share a factor that is found in closed form."""
        return not any(name.startswith("sigma2.") for name, _ in self.fixed)

    @property
    def searched(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Disturbances and other parameters that are not fixed."""
        fixed = dict(self.fixed)
        return (
            tuple(name for name in self.sources if f"sigma2.{name}" not in fixed),
            tuple(name for name in self.others if name not in fixed),
        )

    @property
    def n_scales(self) -> int:
        """Unconstrained parameters of the variances: one fewer where a factor is left out."""
        return len(self.searched[0]) - self.concentrated

    @property
    def n_free(self) -> int:
        """Unconstrained parameters."""
        return self.n_scales + len(self.searched[1])

    @property
    def n_diffuse(self) -> int:
        """Diffuse elements of the initial state."""
        return int(np.linalg.matrix_rank(diffuse_covariance(self)[0]))

    def state_names(self) -> tuple[str, ...]:
        """Names of the elements of the state."""
        out: list[str] = []
        for name, _, load in self.blocks:
            if name == "regression":
                out += [f"u{k + 1}" for k in range(len(load))]
            elif name == "cycle":
                out += ["cycle", "cycle*"]
            elif name == "ar" or (name.startswith("seasonal") and self.harmonics is None):
                out += [name] + [f"{name}.L{k}" for k in range(1, len(load))]
            elif name.startswith("seasonal") and self.harmonics is not None:
                s = int(name.removeprefix("seasonal_"))
                for j in self.harmonics[self.periods.index(s)]:
                    out += [f"{name}.{j}"] + ([] if 2 * j == s else [f"{name}.{j}*"])
            else:
                out.append(name)
        return tuple(out)


def harmonic_numbers(
    periods: Sequence[int], counts: Sequence[int | None]
) -> tuple[tuple[int, ...], ...]:
    """Numbers of the trigonometric terms of each period, shortest period first.

    A frequency that a shorter period has already is left out of a longer one: two equal waves
    cannot be told apart.

    Raises
    ------
    ValueError
        If a count is not between 1 and half the period, or all terms of a period are left out.

    Examples
    --------
    >>> harmonic_numbers((4, 8), (None, None))
    ((1, 2), (1, 3))
    """
    taken: set[Fraction] = set()
    out = []
    for s, count in zip(periods, counts, strict=True):
        count = s // 2 if count is None else count
        if int(count) != count or not 1 <= count <= s // 2:
            raise ValueError(
                f"harmonics={count!r} of period {s} must be a whole number from 1 to {s // 2}"
            )
        own = tuple(j for j in range(1, int(count) + 1) if Fraction(j, s) not in taken)
        if not own:
            raise ValueError(
                f"every harmonic of period {s} belongs to a shorter period; ask for more harmonics "
                f"of {s}, or leave it out"
            )
        taken |= {Fraction(j, s) for j in own}
        out.append(own)
    return tuple(out)


def system(
    spec: StructuralSpec,
    parameters: Float[np.ndarray, "rows parameters"],
    u: Float[np.ndarray, "inputrows steps inputs"] | None,
    sizes: Float[np.ndarray, "rows inputs"] | None = None,
) -> System:
    r"""State-space form of the model, one system for each row of parameters.

    Parameters
    ----------
    spec : StructuralSpec
    parameters : ndarray of shape (rows, len(spec.names))
        Variances, damping factors, period of the cycle in steps, AR coefficients, in the order of
        ``spec.names``.
    u : ndarray of shape (rows or 1, steps, spec.n_inputs), or None
        Regressors.
    sizes : ndarray of shape (rows or 1, spec.n_inputs), optional
        Sizes of the regressors: their coefficients are diffuse in the unit 1 / size, so that a
        regressor of 1e6 beside others of 1 costs no digits. Default 1.

    Returns
    -------
    System
        Observed dimension 1. A field that does not depend on the row or the step has length 1
        there.

    References
    ----------
    Harvey (1989), *Forecasting, Structural Time Series Models and the Kalman Filter*, chapter 2;
    Durbin and Koopman (2012), *Time Series Analysis by State Space Methods*, section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> level = system(StructuralSpec(), np.array([[15099.0, 1469.1]]), None)
    >>> level.R.item(), level.Q.item(), level.Pinf.item()
    (15099.0, 1469.1, 1.0)
    """
    values = dict(zip(spec.names, np.asarray(parameters, dtype=np.float64).T, strict=True))
    rows, size = len(parameters), spec.n_state
    own = spec.cycle is not None or spec.ar > 0 or spec.trend == "damped"
    F = np.zeros((rows if own else 1, size, size))
    Q = np.zeros((rows, size, size))
    P0 = np.zeros((rows if own else 1, size, size))
    zero = np.zeros(rows)
    for block in spec.blocks:
        at, place = block.start, block.part
        if block.name == "regression":
            F[:, place, place] = np.eye(spec.n_inputs)
            for k in range(spec.n_inputs):
                Q[:, at + k, at + k] = values.get(f"sigma2.u{k + 1}", zero)
            continue
        F[:, place, place] = _transition(spec, block, values)
        shock = values.get(f"sigma2.{block.name}", zero)
        spread = block.name == "cycle" or (spec.harmonics and block.name.startswith("seasonal"))
        width = len(block.load) if spread else 1
        Q[:, range(at, at + width), range(at, at + width)] = shock[:, None]
        if block.name == "ar":
            P0[:, place, place] = _stationary(F[:, at, place], shock)
        if block.name == "cycle" and spec.cycle == "stochastic":
            damping = values["cycle.damping"]
            variance = shock / ((1.0 - damping) * (1.0 + damping))
            P0[:, place, place] = variance[:, None, None] * np.eye(2)
    if spec.level and spec.trend:
        F[:, 0, 1] = 1.0
    fields = {
        "F": F[:, None],
        "Q": Q[:, None],
        "H": loading(spec, u),
        "R": values.get("sigma2.irregular", np.zeros(1))[:, None, None, None],
        "b": np.zeros((1, 1, size)),
        "d": np.zeros((1, 1, 1)),
        "m0": np.zeros((1, size)),
        "P0": P0,
        "Pinf": diffuse_covariance(spec, sizes),
    }
    return System(**{n: torch.from_numpy(np.ascontiguousarray(f)) for n, f in fields.items()})


def loading(
    spec: StructuralSpec, u: Float[np.ndarray, "inputrows steps inputs"] | None
) -> Float[np.ndarray, "inputrows steps obs state"]:
    """H: which elements of the state are observed, regressors included."""
    row = np.concatenate([np.asarray(block.load) for block in spec.blocks])
    if spec.n_inputs == 0:
        return row[None, None, None, :]
    if u is None or u.shape[2] != spec.n_inputs:
        raise ValueError(
            f"inputs have shape {None if u is None else u.shape}; the model has {spec.n_inputs} "
            "regressors: give (series, steps, regressors)"
        )
    out = np.broadcast_to(row, (*u.shape[:2], 1, len(row))).copy()
    out[:, :, 0, spec.blocks[-1].part] = u
    return out


def diffuse_covariance(
    spec: StructuralSpec, sizes: Float[np.ndarray, "rows inputs"] | None = None
) -> Float[np.ndarray, "rows state state"]:
    """Diffuse directions of the initial state: identity blocks but for what is proper.

    Seasonal patterns of two dummy periods with a common divisor g share those of period g; the
    longer one starts without them, because no observation could tell the two apart. Regression
    coefficients are diffuse in units of 1 / size.
    """
    out = np.zeros((1 if sizes is None else len(sizes), spec.n_state, spec.n_state))
    seen: list[int] = []
    for block in spec.blocks:
        proper = block.name == "ar" or (block.name == "cycle" and spec.cycle == "stochastic")
        own = 0.0 if proper else np.eye(len(block.load))
        if block.name.startswith("seasonal") and spec.harmonics is None:
            s = int(block.name.removeprefix("seasonal_"))
            common = [math.gcd(s, other) for other in seen]
            if any(g > 1 for g in common):
                own = _without_shared(s, common)
            seen.append(s)
        if block.name == "regression" and sizes is not None:
            own = own / sizes[:, None, :] ** 2
        out[:, block.part, block.part] = own
    return out


def _without_shared(s: int, common: list[int]) -> Float[np.ndarray, "state state"]:
    """Projection of patterns of period s on those with no part of a period in `common`."""
    sums = [np.arange(s) % g == k for g in common for k in range(g)]
    _, size, right = np.linalg.svd(np.array(sums, dtype=np.float64))
    rank = int((size > 1e-9 * size[0]).sum())
    basis = right[rank:].T[: s - 1]
    return basis @ basis.T


def _transition(
    spec: StructuralSpec, block: Block, values: dict[str, np.ndarray]
) -> Float[np.ndarray, "rows size size"]:
    size = len(block.load)
    out = np.zeros((1, size, size))
    if block.name.startswith("seasonal") and spec.harmonics is not None:
        s = int(block.name.removeprefix("seasonal_"))
        at = 0
        for j in spec.harmonics[spec.periods.index(s)]:
            width = 1 if 2 * j == s else 2
            turn = _rotation(np.array([2 * np.pi * j / s]))
            out[:, at : at + width, at : at + width] = -1.0 if width == 1 else turn
            at += width
        return out
    if block.name == "cycle":
        damping = values.get("cycle.damping", np.ones(1))
        return damping[:, None, None] * _rotation(2 * np.pi / values["cycle.period"])
    if block.name == "ar":
        out = np.zeros((len(values["ar.L1"]), size, size))
        out[:, 0] = np.stack([values[f"ar.L{k + 1}"] for k in range(size)], 1)
    elif block.name.startswith("seasonal"):
        out[:, 0] = -1.0
    elif block.name == "trend" and spec.trend == "damped":
        return values["trend.damping"][:, None, None]
    else:
        return np.ones((1, 1, 1))
    out[:, np.arange(1, size), np.arange(size - 1)] = 1.0
    return out


def _rotation(frequency: Float[np.ndarray, "rows"]) -> Float[np.ndarray, "rows 2 2"]:
    c, s = np.cos(frequency), np.sin(frequency)
    return np.stack([np.stack([c, s], 1), np.stack([-s, c], 1)], 1)


def _stationary(
    phi: Float[np.ndarray, "rows order"], variance: Float[np.ndarray, "rows"]
) -> Float[np.ndarray, "rows order order"]:
    """Covariance of the last values of a stationary autoregression, by Levinson's recursion.

    Near a unit root it keeps the digits that a Lyapunov equation loses.
    """
    order = phi.shape[1]
    partial = partial_from_coefficients(phi)
    correlation = np.ones((len(phi), order))
    for k in range(1, order):
        short = coefficients_from_partial(partial[:, :k])
        correlation[:, k] = (short * correlation[:, k - 1 :: -1][:, :k]).sum(1)
    scale = variance / ((1.0 - partial) * (1.0 + partial)).prod(1)
    lag = np.abs(np.arange(order)[:, None] - np.arange(order))
    return scale[:, None, None] * correlation[:, lag]
