"""Starting values of linear-Gaussian models from the singular vectors of a Hankel matrix.

The leading right singular vectors of the matrix of stacked future windows span the state sequence
(Van Overschee and De Moor 1996, chapter 3); two least-squares regressions then give the matrices.
These are starting values only: gaps are bridged by linear interpolation.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def starting_values(
    x: list[Float[np.ndarray, "time dim"]], latent_dim: int
) -> dict[str, Float[np.ndarray, "..."]]:
    """Estimate F, H, Q, R, d and the initial moments, shared by the series given.

    Parameters
    ----------
    x : list of ndarray of shape (time, dim)
        Series, NaN where not observed.
    latent_dim : int
        Width of the state.
    """
    dim = x[0].shape[1]
    offset = np.nanmean(np.concatenate(x), axis=0)
    offset = np.where(np.isfinite(offset), offset, 0.0)
    filled = [_interpolate(series) - offset for series in x]
    longest = max(len(series) for series in filled)
    lag = min(max(2, -(-2 * latent_dim // dim)), max(1, longest // 2))
    windows = [_hankel(series, lag) for series in filled if len(series) >= lag]
    stacked = np.concatenate(windows, axis=1)
    left, strength, _ = np.linalg.svd(stacked, full_matrices=False)
    rank = min(latent_dim, left.shape[1])
    weak = strength[:rank] <= 1e-8 * max(strength[0], 1e-8)
    scale = np.where(weak, 0.0, np.sqrt(stacked.shape[1]) / np.where(weak, 1.0, strength[:rank]))
    states = []
    for window in windows:
        z = np.full((window.shape[1], latent_dim), 0.0)
        z[:, :rank] = (left[:, :rank].T @ window).T * scale
        states.append(z)
    before = np.concatenate([z[:-1] for z in states])
    after = np.concatenate([z[1:] for z in states])
    now = np.concatenate(states)
    seen = np.concatenate([f[: len(z)] for f, z in zip(filled, states, strict=True)])
    transition = np.linalg.lstsq(before, after, rcond=None)[0].T if len(before) else np.eye(rank)
    emission = np.linalg.lstsq(now, seen, rcond=None)[0].T
    spread = np.maximum(np.var(seen, axis=0), 1e-8)
    return {
        "F": _stable(transition),
        "H": emission,
        "Q": _covariance(after - before @ transition.T, np.full(latent_dim, 1e-2)),
        "R": _covariance(seen - now @ emission.T, 1e-2 * spread),
        "d": offset,
        "m0": np.mean([z[0] for z in states], axis=0),
        "P0": np.eye(latent_dim),
    }


def _interpolate(series: Float[np.ndarray, "time dim"]) -> Float[np.ndarray, "time dim"]:
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
