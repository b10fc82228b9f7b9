"""`simulate`: series whose true states and true model are known, to score filters against.

Every system is a model of the package or a small `StateSpaceModel` of `seqdgm.datasets.systems`,
and is drawn by its own recursion. The switching system draws its regimes and states one after the
other, because its model integrates the states out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from seqdgm.datasets import systems
from seqdgm.nn import distributions
from seqdgm.panel import Panel
from seqdgm.types import Inputs, make_generator

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

Drawn = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Simulation:
    """Series with the states and the model that made them.

    Attributes
    ----------
    name : str
        Name of the system.
    y : Panel
        Observations, (series, time, dim) in `y.values`.
    states : ndarray of shape (series, time, state)
        True states, in the order of the states that filters of `model` report.
    model : StateSpaceModel
        The true model with its true parameters; ready for every verb.
    """

    name: str
    y: Panel = field(repr=False)
    states: np.ndarray = field(repr=False)
    model: StateSpaceModel = field(repr=False)


def simulate(
    name: str,
    n_series: int = 1,
    n_steps: int = 100,
    seed: int | torch.Generator | None = None,
    **parameters: Any,
) -> Simulation:
    r"""Draw series from a system whose states and model are known.

    ======================== ===============================================================
    name                     system and parameters (with defaults in the signatures)
    ======================== ===============================================================
    linear-gaussian          `LinearGaussianSSM`; F, H, Q, R, m0, P0; default a damped rotation
    stochastic-volatility    `StochasticVolatility`; mu, rho, sigma and its other parameters
    lorenz-63, lorenz-96     chaotic flows with noise; see `systems.Lorenz63`, `Lorenz96`
    growth                   Gordon, Salmond and Smith (1993); see `systems.Growth`
    pendulum                 Särkkä (2013); see `systems.Pendulum`
    bouncing-ball            a ball in a box; see `systems.BouncingBall`
    switching                `SwitchingLinearSSM`; Pi, F, H, Q, R, m0, P0, b, d, p0
    poisson-counts           counts with a wandering log-rate; see `systems.PoissonCounts`
    ======================== ===============================================================

    Parameters
    ----------
    name : str
        One of the names above.
    n_series, n_steps : int
        Number of independent series, and their length.
    seed : int or torch.Generator, optional
        The same seed gives the same series.
    **parameters
        Parameters of the system, by keyword.

    Returns
    -------
    Simulation

    Raises
    ------
    ValueError
        For an unknown name, a count below 1 or a parameter that the system does not have.

    Examples
    --------
    >>> import seqdgm as sq
    >>> made = sq.datasets.simulate("growth", n_series=2, n_steps=50, seed=0)
    >>> made.y.values.shape, made.states.shape
    ((2, 50, 1), (2, 50, 1))
    >>> error = made.model.filter(made.y, n_particles=500, seed=1).mean - made.states
    >>> bool((error**2).mean() < made.states.var())
    True
    """
    if name not in SYSTEMS:
        raise ValueError(f"there is no simulator {name!r}; there are {', '.join(SYSTEMS)}")
    for what, count in (("n_series", n_series), ("n_steps", n_steps)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{what}={count!r} must be a whole number, at least 1")
    try:
        model = SYSTEMS[name](**parameters)
    except TypeError as error:
        raise ValueError(f"parameters of {name!r}: {error}") from error
    generator = make_generator(seed, torch.device("cpu"))
    draw = _draw_switching if name == "switching" else _draw
    x, z = draw(model, n_series, n_steps, generator)
    return Simulation(name, Panel.of(x), z, model)


def _draw(model: Any, n_series: int, n_steps: int, generator: torch.Generator) -> Drawn:
    """Run the recursion forward and keep what a filter would report."""
    shape = (n_series,)
    blank = torch.zeros(n_series, 0, dtype=torch.float64)
    s, x = model.start(shape), None
    xs, zs = [], []
    with torch.no_grad():
        for t in range(n_steps):
            u = Inputs(blank, torch.tensor(t))
            h = model.advance(s, x if model.feedback else None, u)
            law = distributions.expand(model.prior(h, u), shape, model.latent_dim)
            z = distributions.sample(law, generator)
            s = model.absorb(h, z)
            x = model.simulate(s, u, generator)
            xs.append(x)
            zs.append(model.report(h, z))
    return torch.stack(xs, 1).double().numpy(), torch.stack(zs, 1).double().numpy()


def _draw_switching(model: Any, n_series: int, n_steps: int, generator: torch.Generator) -> Drawn:
    """Regimes, then states, then observations; the regimes come as indicators after the states."""
    seed = int(torch.randint(2**62, (), generator=generator))
    rng = np.random.default_rng(seed)
    Pi, p0, F, H, Q, R, m0, P0, b, d = (
        getattr(model, f"{name}_").numpy()
        for name in ("Pi", "p0", "F", "H", "Q", "R", "m0", "P0", "b", "d")
    )
    root_P0, root_Q, root_R = (_roots(cov) for cov in (P0, Q, R))
    state, dim = F.shape[-1], H.shape[-2]
    xs = np.empty((n_series, n_steps, dim))
    zs = np.empty((n_series, n_steps, state + len(Pi)))
    k = np.zeros(n_series, int)
    for t in range(n_steps):
        chances = Pi[k] if t else np.broadcast_to(p0, (n_series, len(p0)))
        k = (rng.random((n_series, 1)) > chances.cumsum(-1)[:, :-1]).sum(-1)
        noise = rng.standard_normal((n_series, state, 1))
        if t == 0:
            z = m0[k] + (root_P0[k] @ noise)[..., 0]
        else:
            z = (F[k] @ z[..., None])[..., 0] + b[k] + (root_Q[k] @ noise)[..., 0]
        error = root_R[k] @ rng.standard_normal((n_series, dim, 1))
        xs[:, t] = (H[k] @ z[..., None] + error)[..., 0] + d[k]
        zs[:, t] = np.concatenate([z, np.eye(len(Pi))[k]], -1)
    return xs, zs


def _roots(covs: np.ndarray) -> np.ndarray:
    """A square root of each covariance, which may be singular."""
    values, vectors = np.linalg.eigh(covs)
    return np.asarray(vectors * np.sqrt(values.clip(min=0))[..., None, :])


def _linear_gaussian(**parameters: Any) -> Any:
    from seqdgm.models.linear_gaussian import LinearGaussianSSM

    c, s = 0.95 * np.cos(np.pi / 12), 0.95 * np.sin(np.pi / 12)
    default: dict[str, Any] = {
        "F": [[c, -s], [s, c]],
        "H": [[1.0, 0.0]],
        "Q": 0.1 * np.eye(2),
        "R": [[0.5]],
        "m0": [0.0, 0.0],
        "P0": np.eye(2),
    }
    return LinearGaussianSSM(**(default | parameters))


def _stochastic_volatility(**parameters: Any) -> Any:
    from seqdgm.models.stochastic_volatility import StochasticVolatility

    default: dict[str, Any] = {"mu": -0.5, "rho": 0.97, "sigma": 0.2}
    return StochasticVolatility(**(default | parameters))


def _switching(**parameters: Any) -> Any:
    from seqdgm.models.switching import SwitchingLinearSSM

    default: dict[str, Any] = {
        "Pi": [[0.95, 0.05], [0.1, 0.9]],
        "F": [[[0.9]], [[0.5]]],
        "H": [[1.0]],
        "Q": [[[0.05]], [[4.0]]],
        "R": [[0.2]],
    }
    return SwitchingLinearSSM(**(default | parameters))


SYSTEMS: Mapping[str, Callable[..., Any]] = {
    "linear-gaussian": _linear_gaussian,
    "stochastic-volatility": _stochastic_volatility,
    "lorenz-63": systems.Lorenz63,
    "lorenz-96": systems.Lorenz96,
    "growth": systems.Growth,
    "pendulum": systems.Pendulum,
    "bouncing-ball": systems.BouncingBall,
    "switching": _switching,
    "poisson-counts": systems.PoissonCounts,
}
