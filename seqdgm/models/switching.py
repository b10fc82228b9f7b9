"""The switching linear state-space model, by a Rao-Blackwellised particle filter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Categorical, Distribution

from seqdgm.models._conditionally_linear import (
    ConditionallyLinearSSM,
    Kalman,
    Linear,
    predict,
    predictive,
)
from seqdgm.models._matrices import check_shapes, read_matrix
from seqdgm.nn import distributions as dist
from seqdgm.panel import Panel
from seqdgm.types import Batch, Inputs

MATRICES = ("F", "H", "Q", "R", "m0", "P0", "b", "d")
VECTORS = ("m0", "b", "d")


class SwitchingLinearSSM(ConditionallyLinearSSM):
    r"""Switching linear-Gaussian state-space model (jump Markov linear system).

    .. math::

        k_1 &\sim p_0, \quad k_t \sim \Pi[k_{t-1}, \cdot] \\
        z_1 &\sim N(m_0[k_1], P_0[k_1]), \quad
        z_t = F[k_t]\, z_{t-1} + b[k_t] + w_t, \quad w_t \sim N(0, Q[k_t]) \\
        x_t &= H[k_t]\, z_t + d[k_t] + v_t, \quad v_t \sim N(0, R[k_t])

    Particles draw the regimes :math:`k_t` only, each with a Kalman filter for z. They draw from
    :math:`p(k_t \mid k_{t-1}, x_t)` given the rest of their history, which few regimes make cheap:
    the filter is fully adapted, the weight of a particle does not depend on its draw.

    `filter` and `smooth` report z and the probabilities of the regimes. `smooth` draws paths of
    regimes backwards and smooths z exactly given each. The matrices are given; `fit` takes the data
    over.

    Parameters
    ----------
    Pi : array_like of shape (regimes, regimes)
        Transition matrix; row i holds the probabilities of the regimes after regime i.
    F, H, Q, R : array_like
        Matrices with the axis of the regimes first, or without it where all regimes share them.
    m0, P0, b, d : array_like, optional
        The same for the first state (default: zero and the identity) and the offsets (zero).
    p0 : array_like of shape (regimes,), optional
        Probabilities of the first regime; default the stationary ones of `Pi`.

    Raises
    ------
    ValueError
        For matrices that do not fit together, are no covariances, or no probabilities.

    Examples
    --------
    A level that is calm or wild:

    >>> from seqdgm.models.switching import SwitchingLinearSSM
    >>> model = SwitchingLinearSSM(
    ...     Pi=[[0.95, 0.05], [0.2, 0.8]], F=[[1.0]], H=[[1.0]], Q=[[[0.01]], [[4.0]]], R=[[1.0]]
    ... )
    >>> states = model.filter(model.sample(100, seed=0), n_particles=50, seed=1)
    >>> states.names
    ('z1', 'regime0', 'regime1')

    References
    ----------
    Hamilton (1989); Kim (1994), Dynamic linear models with Markov-switching, *Journal of
    Econometrics* 60; Doucet, Gordon and Krishnamurthy (2001), Particle filters for state estimation
    of jump Markov linear systems, *IEEE Transactions on Signal Processing* 49, section IV.
    """

    latent_dim = 1

    Pi_: Tensor
    p0_: Tensor
    F_: Tensor
    H_: Tensor
    Q_: Tensor
    R_: Tensor
    m0_: Tensor
    P0_: Tensor
    b_: Tensor
    d_: Tensor

    def __init__(
        self,
        Pi: Any,
        F: Any,
        H: Any,
        Q: Any,
        R: Any,
        m0: Any = None,
        P0: Any = None,
        b: Any = None,
        d: Any = None,
        p0: Any = None,
    ) -> None:
        super().__init__()
        self.Pi, self.F, self.H, self.Q, self.R = Pi, F, H, Q, R
        self.m0, self.P0, self.b, self.d, self.p0 = m0, P0, b, d, p0
        chain = _probabilities("Pi", Pi, 2)
        regimes = len(chain)
        if chain.shape != (regimes, regimes):
            raise ValueError(f"Pi has shape {chain.shape}; it must be square, a row a regime")
        first = _stationary(chain) if p0 is None else _probabilities("p0", p0, 1)
        if first.shape != (regimes,):
            raise ValueError(f"p0 has shape {first.shape}, expected ({regimes},)")
        fields = {name: _by_regime(name, getattr(self, name), regimes) for name in MATRICES}
        given = {name: value for name, value in fields.items() if value is not None}
        state, dim = given["F"].shape[-1], given["H"].shape[-2]
        for k in range(regimes):
            check_shapes({name: value[k] for name, value in given.items()}, state)
        default = {
            "m0": np.zeros((regimes, state)),
            "P0": np.broadcast_to(np.eye(state), (regimes, state, state)),
            "b": np.zeros((regimes, state)),
            "d": np.zeros((regimes, dim)),
        }
        for name, value in {**default, **given, "Pi": chain, "p0": first}.items():
            self.register_buffer(f"{name}_", torch.from_numpy(np.array(value, dtype=float)))
        self.n_regimes, self.state_dim, self.obs_dim_ = regimes, state, dim

    def input_width(self) -> int | None:
        """The model takes no inputs."""
        return 0

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        """Refuse inputs."""
        if input_dim:
            raise ValueError(
                f"{input_dim} input columns were given, but SwitchingLinearSSM takes none"
            )

    def check_data(self, panel: Panel) -> None:
        """Raise a ValueError if the matrices do not fit the width of the data."""
        super().check_data(panel)
        if panel.n_dims != self.obs_dim_:
            raise ValueError(
                f"H has {self.obs_dim_} rows, but y has {panel.n_dims} columns {panel.columns}; "
                "give one row for each column"
            )

    def state_names(self, dim: int) -> tuple[str, ...]:
        """The elements of z, then the probabilities of the regimes."""
        own = tuple(f"z{k + 1}" for k in range(self.state_dim))
        return own + tuple(f"regime{k}" for k in range(self.n_regimes))

    # -- the recursion --------------------------------------------------------------------------

    def initial(self, u: Inputs) -> Distribution:
        """First regime."""
        return Categorical(probs=self.p0_[..., None, :], validate_args=False)

    def transition(self, z: Float[Tensor, "*batch one"], u: Inputs) -> Distribution:
        """Next regime given this one."""
        probs = _pick(self.Pi_, z[..., 0].long(), 1)
        return Categorical(probs=probs[..., None, :], validate_args=False)

    def linear(self, z: Float[Tensor, "*batch one"]) -> Linear:
        """Matrices of the regimes."""
        k = z[..., 0].long()
        fields = zip(self._all(), AXES, strict=True)
        return Linear(*(_pick(field, k, axes) for field, axes in fields))

    def linear_start(
        self, z: Float[Tensor, "*batch one"]
    ) -> tuple[Float[Tensor, "*batch state"], Float[Tensor, "*batch state state"]]:
        """Law of the first z of each regime."""
        k = z[..., 0].long()
        return _pick(self.m0_, k, 1), _pick(self.P0_, k, 2)

    def indicators(self, z: Float[Tensor, "*batch one"]) -> Float[Tensor, "*batch regimes"]:
        """One for the regime, zero for the others."""
        return torch.nn.functional.one_hot(z[..., 0].long(), self.n_regimes).to(z.dtype)

    def encode(self, batch: Batch) -> Float[Tensor, "series time features"]:
        """The observations and what of them was observed."""
        return torch.cat([batch.x, batch.mask.to(batch.x.dtype)], -1)

    def proposal(self, h: Kalman | None, c: Tensor, u: Inputs) -> Distribution:
        r"""The regime given the last one and the observation.

        .. math:: p(k_t \mid \cdot) \propto \Pi[k_{t-1}, k_t]\, N(x_t; H m + d, H P H^\top + R)
        """
        lin = self._all()
        if h is None:
            chances, mean, cov = self.p0_, self.m0_, self.P0_
        else:
            chances = _pick(self.Pi_, h.z[..., 0].long(), 1)
            wide = Kalman(h.z, h.mean[..., None, :], h.cov[..., None, :, :])
            mean, cov = predict(wide, lin)
        x, mask = c[..., None, :].chunk(2, -1)
        evidence = dist.log_prob(predictive(mean, cov, lin), x, mask > 0)
        logits = chances.log() + evidence
        # An impossible observation says nothing of the regime; the weight that follows says so.
        informed = torch.isfinite(torch.logsumexp(logits, -1, keepdim=True))
        logits = torch.where(informed, logits, chances.log())
        return Categorical(logits=logits[..., None, :], validate_args=False)

    def _all(self) -> Linear:
        """Matrices of all regimes, on an axis in front of theirs."""
        return Linear(self.F_, self.b_, self.Q_, self.H_, self.d_, self.R_)


AXES = (2, 1, 2, 2, 1, 2)  # of the fields of Linear


def _pick(field: Tensor, k: Int[Tensor, "*batch"], axes: int) -> Tensor:
    """Entries of the regimes `k`; the field may have axes of its own in front of the regimes."""
    lead = field.ndim - 1 - axes
    if not lead:
        return field[k]
    tail = field.shape[lead + 1 :]
    wide = field.expand(*k.shape, *field.shape[lead:])
    place = k.reshape(*k.shape, 1, *[1] * axes).expand(*k.shape, 1, *tail)
    return wide.gather(k.ndim, place).squeeze(k.ndim)


def _by_regime(name: str, value: Any, regimes: int) -> np.ndarray | None:
    """Matrices with an axis of the regimes in front, each of them checked."""
    if value is None:
        return None
    array = np.asarray(value, dtype=np.float64)
    own = 1 if name in VECTORS else 2
    if array.ndim == own:
        array = np.broadcast_to(array, (regimes, *array.shape))
    if array.ndim != own + 1 or len(array) != regimes:
        raise ValueError(
            f"{name} has shape {np.shape(value)}; give {own} axes, or {own + 1} with the {regimes} "
            "regimes first"
        )
    for one in array:
        read_matrix(name, one)
    return array


def _probabilities(name: str, value: Any, axes: int) -> np.ndarray:
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != axes or not (array >= 0).all() or not np.allclose(array.sum(-1), 1):
        raise ValueError(
            f"{name}={value!r} must hold probabilities that add up to 1"
            + (" in every row" if axes == 2 else "")
        )
    return array


def _stationary(chain: Float[np.ndarray, "regimes regimes"]) -> Float[np.ndarray, "regimes"]:
    """Stationary law of a Markov chain, where it has just one."""
    count = len(chain)
    equations = np.concatenate([chain.T - np.eye(count), np.ones((1, count))])
    if np.linalg.matrix_rank(equations[:-1]) < count - 1:
        raise ValueError(
            "Pi has more than one stationary law, so it does not tell the first regime; give p0"
        )
    found = np.linalg.lstsq(equations, np.append(np.zeros(count), 1.0), rcond=None)[0]
    clipped = found.clip(min=0)
    return clipped / clipped.sum()
