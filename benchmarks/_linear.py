"""Linear-Gaussian models and data that several scripts share."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from seqdgm.kernels.types import System


class Model(NamedTuple):
    """One linear-Gaussian model, or one for each series where the first axis says so."""

    F: np.ndarray
    H: np.ndarray
    Q: np.ndarray
    R: np.ndarray
    m0: np.ndarray
    P0: np.ndarray


def level_model() -> Model:
    one = np.ones((1, 1))
    return Model(F=one, H=one, Q=0.5 * one, R=2.0 * one, m0=np.zeros(1), P0=10.0 * one)


def random_model(state: int, obs: int, seed: int) -> Model:
    """A stable model whose transition shrinks by at most 0.9."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(state, state))
    return Model(
        F=0.9 * raw / np.abs(np.linalg.eigvals(raw)).max(),
        H=rng.normal(size=(obs, state)),
        Q=np.diag(rng.uniform(0.2, 1.0, state)),
        R=np.diag(rng.uniform(0.2, 1.0, obs)),
        m0=np.zeros(state),
        P0=np.eye(state),
    )


def simulate(model: Model, steps: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z = rng.multivariate_normal(model.m0, model.P0)
    noise_q, noise_r = np.linalg.cholesky(model.Q), np.linalg.cholesky(model.R)
    x = np.empty((steps, len(model.H)))
    for t in range(steps):
        if t:
            z = model.F @ z + noise_q @ rng.normal(size=len(z))
        x[t] = model.H @ z + noise_r @ rng.normal(size=len(noise_r))
    return x


def as_system(model: Model) -> System:
    """The model for the kernels; one without an axis for series gets one of length 1."""
    fields = {}
    for name, value in model._asdict().items():
        field = torch.from_numpy(np.array(value, float))
        start = name in ("m0", "P0")
        bare = field.ndim == (1 if name == "m0" else 2)
        field = field[None] if bare else field
        fields[name] = field if start else field[:, None]
    sys, state = fields["m0"].shape
    obs = fields["H"].shape[-2]
    zeros = {"b": torch.zeros(sys, 1, state), "d": torch.zeros(sys, 1, obs)}
    return System(
        **fields,
        **{name: value.double() for name, value in zeros.items()},
        Pinf=torch.zeros_like(fields["P0"]),
    )


def bound_filter(model: Model, x: np.ndarray, kind: Callable[..., Any]) -> Any:
    """The model as a filter or smoother of statsmodels."""
    out = kind(k_endog=x.shape[1], k_states=len(model.F))
    out.bind(np.array(x))
    out["transition"], out["design"] = model.F, model.H
    out["state_cov"], out["obs_cov"] = model.Q, model.R
    out["selection"] = np.eye(len(model.F))
    out.initialize_known(model.m0, model.P0)
    return out
