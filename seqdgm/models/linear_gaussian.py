"""The linear-Gaussian state-space model, with given or learned matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from seqdgm.inference.hessian import Natural
from seqdgm.kernels.types import System
from seqdgm.models import _entries
from seqdgm.models._diagnostics import LinearGaussianModel
from seqdgm.models._matrices import (
    COVARIANCES,
    NAMES,
    Matrices,
    check_shapes,
    diffuse_mask,
    find_latent_dim,
    pack,
    read_matrix,
    unpack,
)
from seqdgm.models._subspace import random_values, spread_values, starting_values
from seqdgm.panel import Panel
from seqdgm.transform import Function
from seqdgm.types import Batch, Inputs, check_count

if TYPE_CHECKING:
    from seqdgm.inference.em import Expected, Moments


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
    n_starts : int
        Starts of the search: subspace estimates, then random ones from the seed of `fit`. EM
        follows all of them; quasi-Newton goes on from the best after 20 EM steps (Biernacki,
        Celeux and Govaert 2003). The best is kept for every series.
    transform : {None, "log", "boxcox"} or tuple ("boxcox", power)
        Function applied to the data first, as in `ARIMA`.
    scale : {None, "standard", "mean"}
        Scaling of the data inside the model; likelihoods stay in the data's own units.

    Attributes
    ----------
    F_, H_, Q_, R_, m0_, P0_, B_, D_, b_, d_ : Tensor of shape (series or 1, ...)
        The matrices in use. A learned state space has no basis of its own: F, H and Q are
        determined up to an invertible map of the state.
    start_ : tuple of int
        Number of the start that was kept, 0 for the subspace one, for every series.

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
    (1982); Biernacki, Celeux and Govaert (2003), Choosing starting values for the EM algorithm,
    *Computational Statistics and Data Analysis* 41.
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
        n_starts: int = 1,
        transform: Function = None,
        scale: str | None = None,
    ) -> None:
        super().__init__()
        self.F, self.H, self.Q, self.R, self.m0, self.P0 = F, H, Q, R, m0, P0
        self.B, self.D, self.b, self.d = B, D, b, d
        self.diffuse, self.learn, self.emission_cov = diffuse, learn, emission_cov
        check_count("n_starts", n_starts)
        if emission_cov not in ("full", "diagonal"):
            raise ValueError(f"emission_cov={emission_cov!r} is unknown; use 'full' or 'diagonal'")
        self.n_starts = int(n_starts)
        self.transform, self.scale = transform, scale
        given = {name: read_matrix(name, getattr(self, name)) for name in NAMES}
        self._given = {name: value for name, value in given.items() if value is not None}
        self.latent_dim = latent_dim = find_latent_dim(latent_dim, self._given)
        check_shapes(self._given, latent_dim)
        self._ids: tuple[Any, ...] | None = None
        self.start_: tuple[int, ...] | None = None
        self._seed = 0
        for name in NAMES:
            self.register_buffer(f"{name}_", None)
        self.diffuse_mask = diffuse_mask(diffuse, latent_dim)
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
        return {"ids": self._ids, "start": self.start_}

    def restore_extra(self, state: dict[str, Any]) -> None:
        """Take the names over."""
        self._ids, self.start_ = state["ids"], state["start"]

    def join_series(self, parts: Sequence[Self], ids: tuple[Any, ...]) -> None:
        """Take over the matrices and starts of parts of a panel."""
        fields = zip(*(part.matrices for part in parts), strict=True)
        starts = [part.start_ for part in parts if part.start_ is not None]
        self.set_matrices(Matrices(*map(torch.cat, fields)), ids)
        self.start_ = tuple(chain.from_iterable(starts)) if starts else None

    def input_width(self) -> int | None:
        """Columns of inputs, known from the matrices where all are given."""
        return self._n_given_inputs() if not self.free else super().input_width()

    def fitted_ids(self) -> tuple[Any, ...] | None:
        """Names of the series that have matrices of their own."""
        return self._ids

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        """Refuse inputs that no matrix would use, and draw the seed of the random starts."""
        self._seed = int(torch.randint(2**31, ()))
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

    def _start(
        self,
        series: list[tuple[np.ndarray, np.ndarray]],
        rng: np.random.Generator | None,
    ) -> Matrices:
        x = [values for values, _ in series]
        n_inputs = series[0][1].shape[1]
        if "F" in self._given and "H" in self._given:
            guess = spread_values(x, self._given["H"])
        else:
            u = [known if {"B", "D"} & self.free else None for _, known in series]
            guess = starting_values(x, u, self.latent_dim, free=self.free)
        if rng is not None:
            guess = random_values(guess, x, rng)
        return self._complete(guess, x[0].shape[1], n_inputs)

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

    # -- expectation-maximisation ---------------------------------------------------------------

    def em_starts(self, batch: Batch, *, pooled: bool) -> list[Matrices]:
        """What is given, and for the rest subspace estimates first, then random ones."""
        x = torch.where(batch.mask, batch.x, torch.nan).numpy()
        u = batch.u.numpy()
        lengths = batch.lengths.tolist()
        series = [(x[k, :length], u[k, :length]) for k, length in enumerate(lengths)]
        groups = [series] if pooled else [[one] for one in series]
        out = []
        for k in range(self.n_starts):
            # Every series draws the same numbers, whatever company it is in.
            starts = [self._start(group, self._random(k)) for group in groups]
            out.append(Matrices(*(torch.cat(fields) for fields in zip(*starts, strict=True))))
        return out

    def em_system(self, parameters: Matrices, u: Float[Tensor, "series steps inputs"]) -> System:
        """System matrices of the parameters."""
        return parameters.system(u, self.diffuse_mask)

    def em_step(self, parameters: Matrices, expected: Expected) -> Matrices:
        """Closed-form maximum over the free matrices; what is fixed stays in the residuals."""
        changed: dict[str, Tensor] = {}
        if self.free & {"F", "B", "b", "Q"}:
            changed |= self._regressed(expected.transition(), parameters, ("F", "B", "b", "Q"))
        if self.free & {"H", "D", "d", "R"}:
            changed |= self._regressed(expected.emission(), parameters, ("H", "D", "d", "R"))
            if "R" in changed and self.emission_cov == "diagonal":
                changed["R"] = torch.diag_embed(torch.diagonal(changed["R"], dim1=-2, dim2=-1))
            if "R" in changed:
                changed["R"] = expected.above_noise(changed["R"])
        mean, cov = expected.first
        m0 = parameters.m0
        if "m0" in self.free:
            m0 = changed["m0"] = mean.mean(0, keepdim=True) if expected.pooled else mean
        if "P0" in self.free:
            gap = mean - m0
            p0 = cov + gap[..., :, None] * gap[..., None, :]
            p0 = p0.mean(0, keepdim=True) if expected.pooled else p0
            changed["P0"] = 0.5 * (p0 + p0.mT)
        return parameters._replace(**changed)

    def em_set(
        self, parameters: Matrices, start: Int[Tensor, "sys"], ids: tuple[Any, ...] | None
    ) -> None:
        """Take over the best end."""
        self.set_matrices(parameters, ids)
        self.start_ = tuple(start.tolist())

    def _regressed(
        self, moments: Moments, parameters: Matrices, names: tuple[str, str, str, str]
    ) -> dict[str, Tensor]:
        """Free ones among the coefficients of (state, inputs, 1) and the residual covariance."""
        state, inputs, offset, noise = names
        old = [getattr(parameters, state), getattr(parameters, inputs)]
        sizes = [old[0].shape[-1], old[1].shape[-1], 1]
        free = [torch.full((size,), n in self.free) for n, size in zip(names, sizes, strict=False)]
        change, spread = moments.regress(torch.cat(free))
        parts = torch.split(change, sizes, -1)
        out = {
            state: old[0] + parts[0],
            inputs: old[1] + parts[1],
            offset: getattr(parameters, offset) + parts[2][..., 0],
            noise: spread,
        }
        return {name: value for name, value in out.items() if name in self.free}

    def _random(self, k: int) -> np.random.Generator | None:
        """Numbers of the k-th start; the first one is not random."""
        return np.random.default_rng((self._seed, k)) if k else None

    # -- maximum likelihood ---------------------------------------------------------------------

    def free_start(self, batch: Batch, *, pooled: bool) -> Float[np.ndarray, "starts sys free"]:
        """Unconstrained vector of the free matrices after a few EM steps, of the best start."""
        from seqdgm.inference.em import fit as em

        draft = self.clone()
        draft.obs_dim_, draft.input_dim_, draft._seed = self.obs_dim_, self.input_dim_, self._seed
        em(
            draft,
            batch,
            method="em",
            generator=torch.Generator(),
            progress=False,
            max_iter=20,
            pooled=pooled,
        )
        self._template, self.start_ = draft.matrices, draft.start_
        return pack(draft.matrices, self._ordered_free(), self.emission_cov).numpy()[None]

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
        return unpack(theta, self._template.take(rows), self._ordered_free(), self.emission_cov)

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
        return _gaussian(m.m0[0], m.P0[0], "P0")

    def transition(self, z: Float[Tensor, "*batch state"], u: Inputs) -> Distribution:
        """Next state given this one."""
        m = self._shared()
        mean = z @ m.F[0].mT + m.b[0] + u.values @ m.B[0].mT
        return _gaussian(mean, m.Q[0], "Q")

    def emission(self, s: Float[Tensor, "*batch state"], u: Inputs) -> Distribution:
        """Observation given the state."""
        m = self._shared()
        return _gaussian(s @ m.H[0].mT + m.d[0] + u.values @ m.D[0].mT, m.R[0], "R")

    def _shared(self) -> Matrices:
        m = self.matrices
        if len(m.F) > 1:
            raise ValueError(
                "particles need one set of matrices; fit with pooled=True or use method='kalman'"
            )
        return m


def _gaussian(
    mean: Float[Tensor, "*batch dim"], cov: Float[Tensor, "dim dim"], name: str
) -> MultivariateNormal:
    """N(mean, cov) with one factorisation for the whole batch."""
    root, info = torch.linalg.cholesky_ex(cov)
    if int(info):
        raise ValueError(
            f"{name} is not positive definite, so particles have no density to be weighed by; use "
            "method='kalman'"
        )
    return MultivariateNormal(mean, scale_tril=root, validate_args=False)
