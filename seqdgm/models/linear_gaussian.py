"""The linear-Gaussian state-space model, with given or learned matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from seqdgm.inference.hessian import Natural
from seqdgm.kernels.types import System
from seqdgm.models import _entries
from seqdgm.models._diagnostics import LinearGaussianModel
from seqdgm.models._subspace import starting_values
from seqdgm.panel import Panel
from seqdgm.transform import Function
from seqdgm.types import Batch, Inputs


class Matrices(NamedTuple):
    """Parameters of the model; the first axis is 1 (shared) or the number of series."""

    F: Float[Tensor, "sys state state"]
    H: Float[Tensor, "sys dim state"]
    Q: Float[Tensor, "sys state state"]
    R: Float[Tensor, "sys dim dim"]
    m0: Float[Tensor, "sys state"]
    P0: Float[Tensor, "sys state state"]
    B: Float[Tensor, "sys state inputs"]
    D: Float[Tensor, "sys dim inputs"]
    b: Float[Tensor, "sys state"]
    d: Float[Tensor, "sys dim"]

    def take(self, rows: Int[Tensor, "series"]) -> Matrices:
        """The parameters of the chosen series."""
        return self if len(self.F) == 1 else Matrices(*(field[rows] for field in self))

    def system(
        self, u: Float[Tensor, "series steps inputs"], diffuse: Bool[Tensor, "state"]
    ) -> System:
        """System matrices with the inputs worked into the offsets."""
        b, d = self.b[:, None], self.d[:, None]
        if u.shape[2]:
            b = b + u @ self.B.mT
            d = d + u @ self.D.mT
        p0 = self.P0 * ~(diffuse[:, None] | diffuse[None, :])
        pinf = torch.diag(diffuse.to(p0.dtype)).expand_as(p0)
        return System(
            F=self.F[:, None],
            Q=self.Q[:, None],
            H=self.H[:, None],
            R=self.R[:, None],
            b=b,
            d=d,
            m0=self.m0,
            P0=p0,
            Pinf=pinf,
        )


NAMES = Matrices._fields
COVARIANCES = ("Q", "R", "P0")


class LinearGaussianSSM(LinearGaussianModel):
    r"""Linear-Gaussian state-space model (linear dynamical system).

    .. math::

        z_1 &\sim N(m_0, P_0) \\
        z_t &= F z_{t-1} + B u_t + b + w_t, \quad w_t \sim N(0, Q) \\
        x_t &= H z_t + D u_t + d + v_t, \quad v_t \sim N(0, R)

    Filter, smoother, likelihood and forecasts are exact. What is given in the constructor is held
    fixed by `fit`, unless `learn` names it; the rest is learned by EM (closed form) or by maximum
    likelihood (quasi-Newton).

    Parameters
    ----------
    latent_dim : int, optional
        Width of the state; needed if no matrix tells it.
    F, H, Q, R, m0, P0, B, D, b, d : array_like, optional
        Matrices of the model. `b` and `d` default to zero when `F` and `H` are given.
    diffuse : bool or sequence of bool
        Which elements of the initial state are exactly diffuse (all, none, or one by one).
    learn : sequence of str, optional
        Names of the matrices to learn; given values are then where learning starts. Default: what
        is not given.
    emission_cov : {"full", "diagonal"}
        Form of a learned R.
    transform : {None, "log", "boxcox"} or tuple ("boxcox", power)
        Function applied to the data first, as in `ARIMA`.
    scale : {None, "standard", "mean"}
        Scaling of the data inside the model; likelihoods stay in the data's own units.

    Examples
    --------
    The local-level model of the Nile (Durbin and Koopman 2012, section 2.2.5):

    >>> import seqdgm as sq
    >>> nile = sq.datasets.load("nile").y
    >>> model = sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], diffuse=True).fit(nile, method="mle")
    >>> round(model.Q_.item(), -1), round(model.R_.item(), -2)
    (1470.0, 15100.0)

    References
    ----------
    Durbin and Koopman (2012), *Time Series Analysis by State Space Methods*; Shumway and Stoffer
    (1982).
    """

    engines: ClassVar[tuple[str, ...]] = ("kalman", "particle")
    learners: ClassVar[Mapping[str, str]] = {"em": "em", "mle": "quasi-newton"}
    concentrated: ClassVar[bool] = False
    per_series: ClassVar[bool] = True

    def __init__(
        self,
        latent_dim: int | None = None,
        F: Any = None,
        H: Any = None,
        Q: Any = None,
        R: Any = None,
        m0: Any = None,
        P0: Any = None,
        B: Any = None,
        D: Any = None,
        b: Any = None,
        d: Any = None,
        *,
        diffuse: bool | Sequence[bool] = False,
        learn: Sequence[str] | None = None,
        emission_cov: str = "full",
        transform: Function = None,
        scale: str | None = None,
    ) -> None:
        super().__init__()
        self.F, self.H, self.Q, self.R, self.m0, self.P0 = F, H, Q, R, m0, P0
        self.B, self.D, self.b, self.d = B, D, b, d
        self.diffuse, self.learn, self.emission_cov = diffuse, learn, emission_cov
        self.transform, self.scale = transform, scale
        given = {name: _matrix(name, getattr(self, name)) for name in NAMES}
        self._given = {name: value for name, value in given.items() if value is not None}
        self.latent_dim = latent_dim = _latent_dim(latent_dim, self._given)
        _check_shapes(self._given, latent_dim)
        self._ids: tuple[Any, ...] | None = None
        for name in NAMES:
            self.register_buffer(f"{name}_", None)
        self.diffuse_mask = _diffuse_mask(diffuse, latent_dim)
        self.free = self._free_names()
        self.min_length = 2 if self.free else 1
        if not self.free:
            dim = len(self._given["H"])
            self.obs_dim_ = dim
            self.set_matrices(self._complete({}, dim, self._n_given_inputs()), None)

    # -- parameters -----------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether all matrices are known."""
        return self.F_ is not None

    @property
    def matrices(self) -> Matrices:
        """The parameters in use."""
        return Matrices(*(getattr(self, f"{name}_") for name in NAMES))

    def set_matrices(self, matrices: Matrices, ids: tuple[Any, ...] | None) -> None:
        """Take parameters over; `ids` names the series if each has its own."""
        if not self.free:
            matrices = Matrices(*(field[:1] for field in matrices))
        for name, value in zip(NAMES, matrices, strict=True):
            setattr(self, f"{name}_", value.contiguous())
        self._ids = ids if ids is not None and len(matrices.F) > 1 else None

    def estimates(self) -> dict[str, float]:
        """Entries of the learned matrices of a single series."""
        if not self.ready or len(self.matrices.F) > 1:
            return {}
        out = {}
        for name in self._ordered_free():
            value = getattr(self, f"{name}_")[0]
            for place in np.ndindex(*value.shape):
                out[f"{name}[{','.join(map(str, place))}]"] = float(value[place])
        return out

    def extra_state(self) -> dict[str, Any]:
        """Names of the series with parameters of their own."""
        return {"ids": self._ids}

    def restore_extra(self, state: dict[str, Any]) -> None:
        """Take the names over."""
        self._ids = state["ids"]

    def input_width(self) -> int | None:
        """Columns of inputs, known from the matrices where all are given."""
        return self._n_given_inputs() if not self.free else super().input_width()

    def fitted_ids(self) -> tuple[Any, ...] | None:
        """Names of the series that have matrices of their own."""
        return self._ids

    def starting_matrices(self, batch: Batch, *, pooled: bool = False) -> Matrices:
        """Where learning starts: what is given, and subspace estimates of the rest."""
        x = torch.where(batch.mask, batch.x, torch.nan).numpy()
        series = [x[k, :length] for k, length in enumerate(batch.lengths.tolist())]
        groups = [series] if pooled else [[one] for one in series]
        starts = [self._start(group, batch.u.shape[2]) for group in groups]
        return Matrices(*(torch.cat(fields) for fields in zip(*starts, strict=True)))

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        """Refuse inputs that no matrix would use."""
        if not {"B", "D"} & self.free and self._n_given_inputs() != input_dim:
            raise ValueError(
                f"B and D take {self._n_given_inputs()} input columns, but got {input_dim}; pass "
                "inputs= with one column for each"
            )
        used = {"B", "D"} & (self.free | self._given.keys())
        if input_dim and not used:
            raise ValueError(
                f"{input_dim} input columns were given, but the model has neither B nor D; give "
                "one of them, or learn=('B',)"
            )

    def check_data(self, panel: Panel) -> None:
        """Raise a ValueError if the matrices given do not fit the width of the data."""
        super().check_data(panel)
        if "H" in self._given and len(self._given["H"]) != panel.n_dims:
            raise ValueError(
                f"H has {len(self._given['H'])} rows, but y has {panel.n_dims} columns "
                f"{panel.columns}; give one row for each column"
            )

    def _n_given_inputs(self) -> int:
        for name in ("B", "D"):
            if name in self._given:
                return self._given[name].shape[1]
        return 0

    def _free_names(self) -> frozenset[str]:
        """What is learned: what `learn` names, and whatever has to be and is not given."""
        needed = set("FHQR") | (set() if bool(self.diffuse_mask.all()) else {"m0", "P0"})
        if self.learn is not None:
            unknown = sorted(set(self.learn) - set(NAMES))
            if unknown:
                raise ValueError(f"learn={unknown} are no matrices of the model; choose {NAMES}")
            return frozenset(self.learn) | (needed - self._given.keys())
        # A state offset b moves the origin of the state, which d does already.
        needed |= {"B"} if "F" not in self._given else set()
        needed |= {"D", "d"} if "H" not in self._given else set()
        return frozenset(needed - self._given.keys())

    def _start(self, series: list[np.ndarray], n_inputs: int) -> Matrices:
        dim = series[0].shape[1]
        if "F" in self._given and "H" in self._given:
            steps = np.concatenate([np.diff(one, axis=0) for one in series])
            spread = np.nanvar(steps, axis=0) / 2
            spread = np.where(np.isfinite(spread) & (spread > 0), spread, 1.0)
            load = max(float(np.square(self._given["H"]).sum(1).mean()), 1e-12)
            guess = {
                "R": np.diag(spread),
                "Q": np.eye(self.latent_dim) * spread.mean() / load,
                "P0": np.eye(self.latent_dim) * 10 * spread.mean() / load,
            }
        else:
            guess = starting_values(series, self.latent_dim)
        return self._complete(guess, dim, n_inputs)

    def _complete(self, guess: Mapping[str, np.ndarray], dim: int, n_inputs: int) -> Matrices:
        state = self.latent_dim
        default = {
            "m0": np.zeros(state),
            "P0": np.eye(state),
            "B": np.zeros((state, n_inputs)),
            "D": np.zeros((dim, n_inputs)),
            "b": np.zeros(state),
            "d": np.zeros(dim),
        }
        chosen = {**default, **guess, **self._given}
        return Matrices(*(torch.from_numpy(np.array(chosen[n], dtype=float))[None] for n in NAMES))

    # -- maximum likelihood ---------------------------------------------------------------------

    def free_start(self, batch: Batch, *, pooled: bool) -> Float[np.ndarray, "starts sys free"]:
        """Unconstrained starting vector: the free matrices after a few EM steps."""
        from seqdgm.inference.em import fit as em

        draft = self.clone()
        draft.obs_dim_, draft.input_dim_ = self.obs_dim_, self.input_dim_
        em(
            draft,
            batch,
            method="em",
            generator=torch.Generator(),
            progress=False,
            max_iter=20,
            pooled=pooled,
        )
        self._template = draft.matrices
        return _pack(draft.matrices, self._ordered_free()).numpy()[None]

    def free_sizes(self, batch: Batch) -> float:
        """One: Cholesky factors are in logs, and what multiplies states has no scale of its own."""
        return 1.0

    def free_system(
        self,
        theta: Float[Tensor, "batch free"],
        rows: Int[Tensor, "batch"],
        u: Float[Tensor, "batch steps inputs"],
    ) -> System:
        """System matrices of unconstrained vectors, one for each row."""
        return self._unpack(theta, rows).system(u, self.diffuse_mask)

    def set_free(
        self,
        theta: Float[Tensor, "sys free"],
        variance: Float[Tensor, "sys"],
        ids: tuple[Any, ...] | None,
    ) -> None:
        """Take over the optimum."""
        self.set_matrices(self._unpack(theta, torch.arange(len(theta))), ids)
        del self._template

    def _ordered_free(self) -> list[str]:
        return [name for name in NAMES if name in self.free]

    def _unpack(self, theta: Tensor, rows: Tensor) -> Matrices:
        return _unpack(theta, self._template.take(rows), self._ordered_free(), self.emission_cov)

    # -- standard errors ------------------------------------------------------------------------

    def natural(self) -> Natural:
        """Entries of the learned matrices, of covariances those of the lower triangle."""
        places, learned = self._places(), self._learned()
        names = tuple(f"{name}[{','.join(map(str, place))}]" for name, place in places)
        values = np.empty((len(self.matrices.F), 0))
        if places:
            values = _entries.read(learned, places)
        return Natural(names, values, (True,) * len(names))

    def natural_inside(
        self, values: Float[np.ndarray, "rows parameters"]
    ) -> Bool[np.ndarray, "rows"]:
        """Positive definite covariances."""
        base = {name: value[:1] for name, value in self._learned().items()}
        rows = _entries.write(base, self._places(), values, COVARIANCES)
        return np.broadcast_to(_entries.definite(rows, COVARIANCES), len(values))

    def natural_system(
        self,
        values: Float[np.ndarray, "rows parameters"],
        fits: Int[np.ndarray, "rows"],
        u: Float[Tensor, "rows steps inputs"],
    ) -> System:
        """System matrices of rows of entries."""
        base = self.matrices.take(torch.from_numpy(fits))
        learned = {name: getattr(base, name) for name in self._ordered_free()}
        rows = _entries.write(learned, self._places(), values, COVARIANCES)
        return base._replace(**rows).system(u, self.diffuse_mask)

    def _learned(self) -> dict[str, Tensor]:
        return {name: getattr(self.matrices, name) for name in self._ordered_free()}

    def _places(self) -> list[_entries.Place]:
        diagonal = ("R",) if self.emission_cov == "diagonal" else ()
        return _entries.places(self._learned(), COVARIANCES, diagonal)

    # -- the recursion --------------------------------------------------------------------------

    def linear_gaussian(
        self, u: Float[Tensor, "series steps inputs"], rows: Int[Tensor, "series"]
    ) -> System:
        """System matrices of each series."""
        return self.matrices.take(rows).system(u, self.diffuse_mask)

    def initial(self, u: Inputs) -> Distribution:
        """First state; a diffuse one has no distribution to draw particles from."""
        if bool(self.diffuse_mask.any()):
            raise ValueError(
                "a diffuse initial state has no distribution; use method='kalman' or give m0 and P0"
            )
        m = self._shared()
        return MultivariateNormal(m.m0[0], m.P0[0])

    def transition(self, z: Float[Tensor, "*batch state"], u: Inputs) -> Distribution:
        """Next state given this one."""
        m = self._shared()
        mean = z @ m.F[0].mT + m.b[0] + u.values @ m.B[0].mT
        return MultivariateNormal(mean, m.Q[0])

    def emission(self, s: Float[Tensor, "*batch state"], u: Inputs) -> Distribution:
        """Observation given the state."""
        m = self._shared()
        return MultivariateNormal(s @ m.H[0].mT + m.d[0] + u.values @ m.D[0].mT, m.R[0])

    def _shared(self) -> Matrices:
        m = self.matrices
        if len(m.F) > 1:
            raise ValueError(
                "particles need one set of matrices; fit with pooled=True or use method='kalman'"
            )
        return m


def _matrix(name: str, value: Any) -> np.ndarray | None:
    if value is None:
        return None
    array = np.asarray(value, dtype=np.float64)
    want = 1 if name in ("m0", "b", "d") else 2
    if array.ndim != want or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a finite array with {want} axes, got shape {array.shape}")
    if name in COVARIANCES:
        if array.shape[0] != array.shape[1] or not np.allclose(array, array.T):
            raise ValueError(f"{name} must be a symmetric square matrix")
        if np.linalg.eigvalsh(array)[0] < -1e-10 * max(1.0, float(np.abs(array).max())):
            raise ValueError(f"{name} has a negative eigenvalue, so it is no covariance")
    return array


def _latent_dim(latent_dim: int | None, given: Mapping[str, np.ndarray]) -> int:
    if latent_dim is not None:
        if int(latent_dim) != latent_dim or latent_dim < 1:
            raise ValueError(f"latent_dim={latent_dim!r} must be a whole number, at least 1")
        return int(latent_dim)
    for name, axis in (("F", 0), ("Q", 0), ("m0", 0), ("P0", 0), ("H", 1)):
        if name in given:
            return given[name].shape[axis]
    raise ValueError("give latent_dim, or a matrix that tells it (F, H, Q, m0 or P0)")


def _check_shapes(given: Mapping[str, np.ndarray], state: int) -> None:
    dims = {given[n].shape[0] for n in ("H", "R", "D", "d") if n in given}
    inputs = {given[n].shape[1] for n in ("B", "D") if n in given}
    if len(dims) > 1 or len(inputs) > 1:
        raise ValueError(
            "H, R, D and d disagree on the number of observed columns, or B and D on the inputs: "
            f"{ {n: v.shape for n, v in given.items()} }"
        )
    shape = {"F": (state, state), "Q": (state, state), "P0": (state, state), "m0": (state,)}
    shape["b"] = (state,)
    for name, want in shape.items():
        if name in given and given[name].shape != want:
            raise ValueError(f"{name} has shape {given[name].shape}, expected {want}")
    if "H" in given and given["H"].shape[1] != state:
        raise ValueError(f"H has {given['H'].shape[1]} columns, expected latent_dim={state}")
    if "B" in given and given["B"].shape[0] != state:
        raise ValueError(f"B has {given['B'].shape[0]} rows, expected latent_dim={state}")


def _diffuse_mask(diffuse: bool | Sequence[bool], state: int) -> Bool[Tensor, "state"]:
    mask = torch.as_tensor(np.broadcast_to(np.asarray(diffuse, dtype=bool), (state,)).copy())
    return mask


def _pack(matrices: Matrices, names: list[str]) -> Float[Tensor, "sys free"]:
    parts = []
    for name in names:
        value = getattr(matrices, name)
        if name in COVARIANCES:
            size = value.shape[-1]
            spread = torch.diagonal(value, dim1=-2, dim2=-1).mean(-1)[:, None, None]
            ridge = torch.eye(size, dtype=value.dtype) * (1e-10 * spread + 1e-300)
            root = torch.linalg.cholesky(value + ridge)
            low = torch.tril_indices(size, size, -1)
            log_diag = torch.diagonal(root, dim1=-2, dim2=-1).log()
            parts.append(torch.cat([log_diag, root[:, low[0], low[1]]], 1))
        else:
            parts.append(value.flatten(1))
    return torch.cat([matrices.F.new_zeros(len(matrices.F), 0), *parts], 1)


def _unpack(
    theta: Float[Tensor, "batch free"], template: Matrices, names: list[str], emission_cov: str
) -> Matrices:
    changed, at = {}, 0
    for name in names:
        like = getattr(template, name)
        if name in COVARIANCES:
            size = like.shape[-1]
            low = torch.tril_indices(size, size, -1)
            root = torch.diag_embed(theta[:, at : at + size].exp())
            at += size
            root[:, low[0], low[1]] = theta[:, at : at + low.shape[1]]
            at += low.shape[1]
            if name == "R" and emission_cov == "diagonal":
                root = torch.diag_embed(torch.diagonal(root, dim1=-2, dim2=-1))
            changed[name] = root @ root.mT
        else:
            size = like[0].numel()
            changed[name] = theta[:, at : at + size].reshape(len(theta), *like.shape[1:])
            at += size
    full = {
        name: changed.get(
            name, getattr(template, name).expand(len(theta), *getattr(template, name).shape[1:])
        )
        for name in NAMES
    }
    return Matrices(**full)
