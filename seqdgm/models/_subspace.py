"""Starting values of linear-Gaussian models from the singular vectors of a Hankel matrix.

The leading right singular vectors of the matrix of stacked future windows span the state sequence
(Van Overschee and De Moor 1996, chapter 3); two least-squares regressions then give the matrices.
These are starting values only: gaps are bridged by linear interpolation.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def starting_values(
    x: list[Float[np.ndarray, "time dim"]],
    u: list[Float[np.ndarray, "steps inputs"] | None],
    latent_dim: int,
    free: frozenset[str] = frozenset(),
) -> dict[str, Float[np.ndarray, "..."]]:
    """Estimate F, H, Q, R, d and the initial moments, shared by the series given.

    Parameters
    ----------
    x : list of ndarray of shape (time, dim)
        Series, NaN where not observed.
    u : list of ndarray of shape (steps, inputs), or of None
        Inputs; None where nothing is to be learned of them.
    latent_dim : int
        Width of the state. What the data cannot tell apart (a series is shorter than that) starts
        as a state of its own with small loadings.
    free : set of str
        Which of B and D are estimated as well: D first, by least squares; B from the states.
    """
    dim = x[0].shape[1]
    rest, offset, direct = _without_inputs(x, u if "D" in free else [None] * len(x))
    filled = [interpolate(series) for series in rest]
    longest = max(len(series) for series in filled)
    lag = min(max(2, -(-2 * latent_dim // dim)), max(1, longest // 2))
    used = [(series, v) for series, v in zip(filled, u, strict=True) if len(series) >= lag]
    windows = [_hankel(series, lag) for series, _ in used]
    states, alive = _states(windows, latent_dim)
    before = np.concatenate([z[:-1] for z in states])
    after = np.concatenate([z[1:] for z in states])
    now = np.concatenate(states)
    seen = np.concatenate([f[: len(z)] for (f, _), z in zip(used, states, strict=True)])
    driven = before
    if "B" in free:
        pairs = zip(used, states, strict=True)
        moves = [v[1 : len(z)] for (_, v), z in pairs if v is not None]
        driven = np.hstack([before, np.concatenate(moves)])
    effect = np.linalg.lstsq(driven, after, rcond=None)[0].T
    emission = np.linalg.lstsq(now, seen, rcond=None)[0].T
    spread = np.maximum(np.var(seen, axis=0), 1e-8)
    residual = after - driven @ effect.T
    transition = _stable(effect[:, :latent_dim])
    transition[~alive, ~alive] = 0.5
    emission[:, ~alive] = 0.1 * np.sqrt(spread)[:, None]
    out = {
        "F": transition,
        "H": emission,
        "Q": _covariance(residual, np.where(alive, 1e-2, 1.0)),
        "R": _covariance(seen - now @ emission.T, 1e-2 * spread),
        "d": offset,
        "m0": np.mean([z[0] for z in states], axis=0),
        "P0": np.eye(latent_dim),
    }
    if "B" in free:
        out["B"] = effect[:, latent_dim:]
    return out | ({"D": direct} if "D" in free else {})


def spread_values(
    x: list[Float[np.ndarray, "time dim"]], loading: Float[np.ndarray, "dim state"]
) -> dict[str, Float[np.ndarray, "..."]]:
    """Q, R and P0 of the size of the steps of the data, for a model whose F and H are known."""
    steps = np.concatenate([np.diff(one, axis=0) for one in x])
    count = np.maximum(np.isfinite(steps).sum(0), 1)
    centre = np.where(np.isfinite(steps), steps, 0.0).sum(0) / count
    spread = np.where(np.isfinite(steps), (steps - centre) ** 2, 0.0).sum(0) / count / 2
    spread = np.where(spread > 0, spread, 1.0)
    load = max(float(np.square(loading).sum(1).mean()), 1e-12)
    state = np.eye(loading.shape[1]) * spread.mean() / load
    return {"R": np.diag(spread), "Q": state, "P0": 10 * state}


def random_values(
    guess: dict[str, Float[np.ndarray, "..."]],
    x: list[Float[np.ndarray, "time dim"]],
    rng: np.random.Generator,
) -> dict[str, Float[np.ndarray, "..."]]:
    """Another start in place of `guess`: random dynamics and loadings of the scale of the data.

    The transition has random moduli in (0.3, 1) in a random basis, and the state variance 1; what
    else there is changes by random factors about 1.
    """
    out = dict(guess)
    spread = np.diag(guess["R"])
    if "F" in guess:
        state = len(guess["F"])
        values = np.concatenate(x)
        size = np.nanvar(np.where(np.isfinite(values), values, np.nanmean(values)), axis=0)
        basis, _ = np.linalg.qr(rng.normal(size=(state, state)))
        turn, _ = np.linalg.qr(rng.normal(size=(state, state)))
        moduli = rng.uniform(0.3, 1.0, size=state)
        out["F"] = basis @ np.diag(moduli) @ turn
        out["Q"] = np.eye(state) - out["F"] @ out["F"].T + 1e-2 * np.eye(state)
        out["H"] = (
            rng.normal(size=guess["H"].shape) * np.sqrt(np.maximum(size, 1e-8) / state)[:, None]
        )
        out["m0"], out["P0"] = np.zeros(state), np.eye(state)
        spread = np.maximum(size, 1e-8)
    else:
        out["Q"] = guess["Q"] * np.exp(rng.normal(scale=2.0))
    out["R"] = np.diag(spread * np.exp(rng.normal(size=len(spread))))
    return out


def _without_inputs(
    x: list[np.ndarray], u: list[np.ndarray | None]
) -> tuple[list[np.ndarray], Float[np.ndarray, "dim"], Float[np.ndarray, "dim inputs"]]:
    """Residuals of a regression on a constant and the inputs, and its coefficients."""
    values = np.concatenate(x)
    design = np.concatenate(
        [
            np.hstack([np.ones((len(s), 1)), *([] if v is None else [v[: len(s)]])])
            for s, v in zip(x, u, strict=True)
        ]
    )
    weights = np.zeros((values.shape[1], design.shape[1]))
    for k, column in enumerate(values.T):
        seen = np.isfinite(column)
        if seen.any():
            weights[k] = np.linalg.lstsq(design[seen], column[seen], rcond=None)[0]
    edges = np.cumsum([len(s) for s in x])[:-1]
    return np.split(values - design @ weights.T, edges), weights[:, 0], weights[:, 1:]


def _states(
    windows: list[np.ndarray], latent_dim: int
) -> tuple[list[Float[np.ndarray, "time state"]], Bool[np.ndarray, "state"]]:
    """State sequences of unit mean square, and which of them the data determine."""
    stacked = np.concatenate(windows, axis=1)
    left, strength, _ = np.linalg.svd(stacked, full_matrices=False)
    rank = min(latent_dim, left.shape[1])
    alive = np.zeros(latent_dim, dtype=bool)
    alive[:rank] = strength[:rank] > 1e-8 * max(strength[0], 1e-8)
    scale = np.sqrt(stacked.shape[1]) / np.where(alive[:rank], strength[:rank], np.inf)
    states = []
    for window in windows:
        z = np.zeros((window.shape[1], latent_dim))
        z[:, :rank] = (left[:, :rank].T @ window).T * scale
        states.append(z)
    return states, alive


def interpolate(series: Float[np.ndarray, "time dim"]) -> Float[np.ndarray, "time dim"]:
    """Bridge what was not observed by straight lines, level beyond the ends."""
    out = series.copy()
    t = np.arange(len(series))
    for k in range(series.shape[1]):
        seen: Bool[np.ndarray, "time"] = np.isfinite(series[:, k])
        out[:, k] = np.interp(t, t[seen], series[seen, k]) if seen.any() else 0.0
    return out


def _hankel(series: Float[np.ndarray, "time dim"], lag: int) -> Float[np.ndarray, "rows windows"]:
    count = len(series) - lag + 1
    return np.concatenate([series[k : k + count].T for k in range(lag)])


def _stable(transition: Float[np.ndarray, "state state"]) -> Float[np.ndarray, "state state"]:
    """Shrink onto the unit circle a transition that explodes."""
    radius = np.abs(np.linalg.eigvals(transition)).max(initial=0.0)
    return transition / radius if radius > 1 else transition


def _covariance(
    residual: Float[np.ndarray, "rows dim"], floor: Float[np.ndarray, "dim"]
) -> Float[np.ndarray, "dim dim"]:
    spread = residual.T @ residual / max(1, len(residual))
    return spread + np.diag(floor)
