"""The switching linear state-space model, by a Rao-Blackwellised particle filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

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
from seqdgm.models._regimes import NAMES, Learned, Regimes, maximise, start
from seqdgm.nn import distributions as dist
from seqdgm.panel import Panel
from seqdgm.types import Batch, Inputs, check_count

if TYPE_CHECKING:
    from seqdgm.inference.regime_em import Statistics

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
    regimes backwards and smooths z exactly given each.

    What is given is held fixed by `fit`, unless `learn` names it; the rest is learned by
    stochastic-approximation EM (``method="particle-em"``, `seqdgm.inference.regime_em`), with
    parameters that all series share. The regimes have no order of their own, and a learned state
    space no basis.

    Parameters
    ----------
    Pi : array_like of shape (regimes, regimes), optional
        Transition matrix; row i holds the probabilities of the regimes after regime i.
    F, H, Q, R : array_like, optional
        Matrices with the axis of the regimes first, or without it where all regimes share them.
    m0, P0, b, d : array_like, optional
        The same for the first state and the offsets. Where nothing is learned the first state
        defaults to zero and the identity, else it is learned too. The offsets default to zero; `d`
        is learned with `H`.
    p0 : array_like of shape (regimes,), optional
        Probabilities of the first regime; learned with `Pi`, else the stationary ones by default.
    n_regimes, state_dim : int, optional
        Number of regimes and width of z; needed where no matrix tells it.
    learn : sequence of str, optional
        Names of what to learn; given values are then where learning starts. Default: what is not
        given.
    shared : sequence of str
        What of the learned is the same in all regimes. Given values that are learned decide it by
        their own axes.

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

    Both learned, with the level known to be a random walk:

    >>> draft = SwitchingLinearSSM(F=[[1.0]], H=[[1.0]], n_regimes=2)
    >>> quick = {"max_iter": 4, "n_starts": 1, "n_particles": 5, "n_trajectories": 2}
    >>> fitted = draft.fit(model.sample(60, seed=0), seed=0, **quick)
    >>> fitted.Q_.shape, bool((fitted.R_[0] == fitted.R_[1]).all())
    (torch.Size([2, 1, 1]), True)

    References
    ----------
    Hamilton (1989); Kim (1994), Dynamic linear models with Markov-switching, *Journal of
    Econometrics* 60; Doucet, Gordon and Krishnamurthy (2001), Particle filters for state estimation
    of jump Markov linear systems, *IEEE Transactions on Signal Processing* 49, section IV.
    """

    learners: ClassVar[Mapping[str, str]] = {"given": "given", "particle-em": "regime-em"}
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
        Pi: Any = None,
        F: Any = None,
        H: Any = None,
        Q: Any = None,
        R: Any = None,
        m0: Any = None,
        P0: Any = None,
        b: Any = None,
        d: Any = None,
        p0: Any = None,
        *,
        n_regimes: int | None = None,
        state_dim: int | None = None,
        learn: Sequence[str] | None = None,
        shared: Sequence[str] = ("H", "R", "d", "m0", "P0"),
    ) -> None:
        super().__init__()
        self.Pi, self.F, self.H, self.Q, self.R = Pi, F, H, Q, R
        self.m0, self.P0, self.b, self.d, self.p0 = m0, P0, b, d, p0
        self.learn, self.shared = learn, shared
        self.n_regimes, self.state_dim = self._sizes(n_regimes, state_dim)
        self._given = self._read()
        self.learned = self._what_is_learned()
        # What is written down needs no learner, and what is not cannot do without.
        kind = "particle-em" if self.learned.free else "given"
        self.learners = {kind: type(self).learners[kind]}  # type: ignore[misc]
        self.min_length = 2 if self.learned.free else 1
        for name in NAMES:
            self.register_buffer(f"{name}_", None)
        if not self.learned.free:
            self.set_regimes(self._complete())
            self.obs_dim_ = self.H_.shape[-2]

    # -- parameters -----------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether all matrices are known."""
        return self.F_ is not None

    def set_regimes(self, regimes: Regimes) -> None:
        """Take parameters over."""
        for name, value in zip(NAMES, regimes, strict=True):
            setattr(self, f"{name}_", value.contiguous())

    def estimates(self) -> dict[str, float]:
        """Entries of what was learned; of one regime where all share it."""
        out: dict[str, float] = {}
        for name in NAMES if self.ready else ():
            value = getattr(self, f"{name}_")
            if name not in self.learned.free:
                continue
            tied = name in self.learned.shared
            for place in np.ndindex(*(value[0] if tied else value).shape):
                entry = value[0][place] if tied else value[place]
                out[f"{name}[{','.join(map(str, place))}]"] = float(entry)
        return out

    def em_starts(self, batch: Batch, count: int, generator: torch.Generator) -> list[Regimes]:
        """What is given, and estimates from the data for the rest, random after the first start."""
        x = torch.where(batch.mask, batch.x, torch.nan).numpy()
        series = [x[k, :length] for k, length in enumerate(batch.lengths.tolist())]
        seed = int(torch.randint(2**31, (), generator=generator))
        sizes = (self.n_regimes, self.state_dim)
        return [
            start(
                self._given,
                self.learned,
                series,
                *sizes,
                np.random.default_rng((seed, k)) if k else None,
            )
            for k in range(count)
        ]

    def em_step(self, regimes: Regimes, origin: Regimes, statistics: Statistics) -> Regimes:
        """Closed-form maximum over what is learned."""
        return maximise(regimes, origin, statistics, self.learned)

    def _sizes(self, n_regimes: int | None, state_dim: int | None) -> tuple[int, int]:
        """Number of regimes and width of z, from what was said or from the matrices."""
        for name in ("Pi", "p0"):
            if n_regimes is None and getattr(self, name) is not None:
                n_regimes = len(getattr(self, name))
        for name in MATRICES:
            value = getattr(self, name)
            if value is None:
                continue
            shape = np.shape(value)
            if n_regimes is None and len(shape) == 2 + (name not in VECTORS):
                n_regimes = shape[0]
            if state_dim is None and name not in ("R", "d"):
                state_dim = shape[-1]
        for name, size in (("n_regimes", n_regimes), ("state_dim", state_dim)):
            if size is None:
                raise ValueError(f"give {name}, or a matrix that tells it")
            check_count(name, size)
        assert n_regimes is not None
        assert state_dim is not None
        return int(n_regimes), int(state_dim)

    def _read(self) -> dict[str, np.ndarray]:
        """What was given, checked, with the axis of the regimes first."""
        count = self.n_regimes
        fields = {name: _by_regime(name, getattr(self, name), count) for name in MATRICES}
        given = {name: value for name, value in fields.items() if value is not None}
        for k in range(count):
            check_shapes({name: value[k] for name, value in given.items()}, self.state_dim)
        if self.Pi is not None:
            given["Pi"] = chain = _probabilities("Pi", self.Pi, 2)
            if chain.shape != (count, count):
                raise ValueError(
                    f"Pi has shape {chain.shape}; it must be square, a row for each of the {count} "
                    "regimes"
                )
        if self.p0 is not None:
            given["p0"] = first = _probabilities("p0", self.p0, 1)
            if first.shape != (count,):
                raise ValueError(f"p0 has shape {first.shape}, expected ({count},)")
        return given

    def _what_is_learned(self) -> Learned:
        needed = {"Pi", "F", "H", "Q", "R"} - self._given.keys()
        for option in ("learn", "shared"):
            names = getattr(self, option) or ()
            unknown = sorted(set(names) - set(NAMES))
            if unknown:
                raise ValueError(
                    f"{option}={unknown} are no parameters of the model; choose among {NAMES}"
                )
        tied = {"Pi", "p0"} & set(self.shared)
        if tied:
            raise ValueError(f"shared={sorted(tied)} cannot be the same in all regimes")
        if self.learn is not None:
            free = needed | set(self.learn)
        else:
            extra = {"m0", "P0"} if needed else set()
            extra |= {"d"} if "H" in needed else set()
            free = needed | (extra - self._given.keys())
        if "Pi" in free and "p0" not in self._given:
            free.add("p0")
        shared = {
            name
            for name in NAMES
            if (
                _without_axis(name, getattr(self, name))
                if name in self._given
                else name in self.shared
            )
        }
        return Learned(frozenset(free), frozenset(shared))

    def _complete(self) -> Regimes:
        """What is given, with defaults for the rest, where nothing is learned."""
        count, state, dim = self.n_regimes, self.state_dim, self._given["H"].shape[-2]
        chosen = {
            "m0": np.zeros((count, state)),
            "P0": np.broadcast_to(np.eye(state), (count, state, state)),
            "b": np.zeros((count, state)),
            "d": np.zeros((count, dim)),
            **self._given,
        }
        if "p0" not in chosen:
            chosen["p0"] = _stationary(chosen["Pi"])
        return Regimes(*(torch.from_numpy(np.array(chosen[n], dtype=float)) for n in NAMES))

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
        for name, axis in (("H", -2), ("R", -1), ("d", -1)):
            if name in self._given and self._given[name].shape[axis] != panel.n_dims:
                raise ValueError(
                    f"{name} is for {self._given[name].shape[axis]} columns, but y has "
                    f"{panel.n_dims} columns {panel.columns}; give one row for each column"
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


def _without_axis(name: str, value: Any) -> bool:
    """Whether a parameter was given once for all regimes."""
    return name in MATRICES and np.ndim(value) == (1 if name in VECTORS else 2)


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
