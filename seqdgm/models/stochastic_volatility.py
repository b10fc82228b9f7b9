"""Stochastic volatility: returns whose log-variance is an autoregression of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, Normal, StudentT, constraints
from torch.distributions.constraints import Constraint

from seqdgm.kernels.particles_types import Volatility as Fused
from seqdgm.models._log_squares import LogSquares
from seqdgm.panel import Panel
from seqdgm.recursion import StateSpaceModel
from seqdgm.types import Batch, Inputs

SCALARS = ("mean", "mu", "rho", "sigma", "df", "correlation")
STARTS = {"mean": 0.0, "mu": 0.0, "rho": 0.95, "sigma": 0.2, "df": 10.0, "correlation": -0.3}


class Volatility(NamedTuple):
    """State with leverage: log-variance and location of the step, which the next one reads."""

    z: Float[Tensor, "*batch one"]
    location: Float[Tensor, "*batch one"]


class NextVolatility(NamedTuple):
    """Memory with leverage: mean and scale of the log-variance to come, location of the step."""

    mean: Float[Tensor, "*batch one"]
    scale: Float[Tensor, "*batch one"]
    location: Float[Tensor, "*batch one"]


class StochasticVolatility(StateSpaceModel):
    r"""Stochastic volatility, with Student-t errors, leverage and covariates as wanted.

    .. math::

        x_t &= m + \beta^\top u_t + e^{z_t / 2}\, v_t \\
        z_{t+1} &= \mu + \rho\, (z_t - \mu) + \sigma\, e_{t+1}, \quad
        z_1 \sim N\left(\mu, \sigma^2 / (1 - \rho^2)\right)

    with :math:`v_t \sim N(0, 1)`, or a Student-t with `df` degrees of freedom and scale 1 (its
    variance is df / (df - 2), as in Chib, Nardari and Shephard 2002), and
    :math:`e_t \sim N(0, 1)`.

    With leverage the error of the return moves the next log-variance (Omori et al. 2007):

    .. math::

        e_{t+1} = \phi\, s(v_t) + \sqrt{1 - \phi^2}\, \varepsilon_{t+1}, \quad
        \varepsilon_{t+1} \sim N(0, 1), \quad
        s(v) = v \sqrt{\frac{\mathrm{df} + 1}{\mathrm{df} + v^2}}

    where s(v) = v for Gaussian errors. s has mean 0 and variance 1, so :math:`\phi` is the
    correlation of :math:`s(v_t)` and :math:`e_{t+1}`, and the log-variance stays a stationary
    autoregression. For Student-t errors s(v) is, up to a constant near 1, the mean of the Gaussian
    factor of v given v, which is what Omori et al. correlate with :math:`e_{t+1}`: the same
    leverage without a second latent variable. The error of a missing return is integrated out, by a
    draw where errors are Student-t.

    What is given in the constructor is held fixed by `fit`; the rest is learned, by quasi-maximum
    likelihood (``method="qml"``, fast and rough), by the particle score (``"mle"``) or by
    stochastic-approximation EM (``"particle-em"``). The parameters are shared by the series of a
    panel. The likelihood is estimated by particles.

    Parameters
    ----------
    distribution : {"gaussian", "studentt"}
        Law of :math:`v_t`.
    leverage : bool
        Whether the error of a return moves the next log-variance.
    mean : float or None
        Location m of the returns, in the units of the data; None to learn it.
    mu : float, optional
        Mean of the log-variance.
    rho : float, optional
        Persistence, between -1 and 1.
    sigma : float, optional
        Standard deviation of the innovations of the log-variance, above 0.
    df : float, optional
        Degrees of freedom, above 2; for ``"studentt"`` only.
    correlation : float, optional
        The leverage :math:`\phi`, between -1 and 1; with ``leverage=True`` only.
    beta : sequence of float, optional
        Coefficients of the covariates passed as ``inputs``; learned if there are inputs and they
        are not given.

    Raises
    ------
    ValueError
        For a parameter outside its domain, or one that the model does not have.

    Examples
    --------
    >>> import seqdgm as sq
    >>> from seqdgm.models.stochastic_volatility import StochasticVolatility
    >>> model = StochasticVolatility(mu=-0.5, rho=0.97, sigma=0.2)
    >>> returns = model.sample(200, seed=0)
    >>> model.filter(returns, n_particles=200, seed=1).mean.shape
    (1, 200, 1)

    Learned quickly, by quasi-maximum likelihood:

    >>> fitted = StochasticVolatility(mean=None).fit(model.sample(3000, seed=1), method="qml")
    >>> 0.8 < fitted.rho.item() < 1.0
    True

    References
    ----------
    Taylor (1982); Harvey, Ruiz and Shephard (1994), Multivariate stochastic variance models,
    *Review of Economic Studies* 61; Kim, Shephard and Chib (1998), Stochastic volatility:
    likelihood inference and comparison with ARCH models, *Review of Economic Studies* 65; Chib,
    Nardari and Shephard (2002), Markov chain Monte Carlo methods for stochastic volatility models,
    *Journal of Econometrics* 108; Omori, Chib, Shephard and Nakajima (2007), Stochastic volatility
    with leverage, *Journal of Econometrics* 140.
    """

    engines: ClassVar[tuple[str, ...]] = ("particle",)
    learners: ClassVar[Mapping[str, str]] = {
        "qml": "quasi-likelihood",
        "mle": "particle-score",
        "particle-em": "particle-em",
    }
    domains: ClassVar[Mapping[str, Constraint]] = {
        "rho": constraints.interval(-1.0, 1.0),
        "sigma": constraints.positive,
        "df": constraints.greater_than(2.0),
        "correlation": constraints.interval(-1.0, 1.0),
    }
    latent_dim = 1

    mean: nn.Parameter
    mu: nn.Parameter
    rho: nn.Parameter
    sigma: nn.Parameter
    df: nn.Parameter | None
    correlation: nn.Parameter | None
    beta: nn.Parameter | None

    def __init__(
        self,
        distribution: str = "gaussian",
        leverage: bool = False,
        *,
        mean: float | None = 0.0,
        mu: float | None = None,
        rho: float | None = None,
        sigma: float | None = None,
        df: float | None = None,
        correlation: float | None = None,
        beta: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if distribution not in ("gaussian", "studentt"):
            raise ValueError(
                f"distribution={distribution!r} is unknown; choose 'gaussian' or 'studentt'"
            )
        self.distribution, self.leverage = distribution, bool(leverage)
        self.feedback = self.leverage
        # Gaussian errors need not be drawn: what a missing one does to the next step is Gaussian.
        self.fills_missing = distribution != "gaussian"
        given = (mean, mu, rho, sigma, df, correlation)
        self._given: dict[str, Any] = dict(zip(SCALARS, given, strict=True)) | {"beta": beta}
        _check_domain(self._given, distribution, self.leverage)
        for name in SCALARS:
            known = self._given[name]
            start = STARTS[name] if known is None else float(known)
            value = torch.tensor(start, dtype=torch.float64)
            absent = (name == "df" and distribution == "gaussian") or (
                name == "correlation" and not self.leverage
            )
            parameter = None if absent else nn.Parameter(value, requires_grad=known is None)
            self.register_parameter(name, parameter)
        self.register_parameter("beta", None)
        if beta is not None:
            value = torch.tensor(np.asarray(beta, dtype=float).reshape(-1))
            self.beta = nn.Parameter(value, requires_grad=False)
        self.obs_dim_ = 1
        self.min_length = 1 if self.ready else 10

    # -- parameters -----------------------------------------------------------------------------

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the hyperparameters as they were given."""
        shape = {"distribution": self.distribution, "leverage": self.leverage}
        return shape | self._given

    @property
    def ready(self) -> bool:
        """Whether every parameter was given or learned."""
        return self.fit_report_ is not None or not self.free

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the parameters to be learned."""
        return tuple(name for name, p in self.named_parameters() if p.requires_grad)

    def estimates(self) -> dict[str, float]:
        """The parameters in use."""
        if not self.ready:
            return {}
        found = {name: p.item() for name in SCALARS if (p := getattr(self, name)) is not None}
        if self.beta is not None:
            found |= {f"beta[{k}]": value for k, value in enumerate(self.beta.tolist())}
        return found

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        """Make room for the coefficients of the inputs."""
        width = 0 if self._given["beta"] is None else len(self._given["beta"])
        if width and width != input_dim:
            raise ValueError(
                f"beta has {width} coefficients, but got {input_dim} input columns; pass inputs= "
                "with one column for each"
            )
        if input_dim and not width:
            self.beta = nn.Parameter(torch.zeros(input_dim).double())

    def input_width(self) -> int | None:
        """Columns of inputs: one for each coefficient."""
        if not self.ready:
            return None
        return 0 if self.beta is None else self.beta.shape[-1]

    def check_data(self, panel: Panel) -> None:
        """Raise a ValueError for more than one column."""
        super().check_data(panel)
        if panel.n_dims != 1:
            raise ValueError(
                f"StochasticVolatility is for one column, but y has {panel.n_dims}: "
                f"{panel.columns}; pass them as separate series of a panel"
            )

    # -- the recursion --------------------------------------------------------------------------

    @property
    def markov(self) -> bool:
        """Without leverage the log-variance alone is the state."""
        return not self.leverage

    @property
    def memoryless(self) -> bool:
        """The location, which leverage keeps beside z, is the same whatever z was."""
        return True

    def location(self, u: Inputs) -> Tensor:
        """Mean of the return, broadcastable with the log-variance."""
        if self.beta is None:
            return self.mean
        return self.mean + (u.values * self.beta).sum(-1, keepdim=True)

    def initial(self, u: Inputs) -> Distribution:
        """Stationary law of the log-variance."""
        scale = self.sigma / (1 - self.rho**2).sqrt()
        return Normal(self.mu, scale, validate_args=False)

    def transition(self, z: Float[Tensor, "*batch one"], u: Inputs) -> Distribution:
        """Log-variance of the next step, without leverage."""
        return Normal(self.mu + self.rho * (z - self.mu), self.sigma, validate_args=False)

    def emission(self, s: Any, u: Inputs) -> Distribution:
        """Return given its log-variance."""
        z = s.z if isinstance(s, Volatility) else s
        location, scale = self.location(u), (0.5 * z).exp()
        if self.df is None:
            return Normal(location, scale, validate_args=False)
        return StudentT(self.df, location, scale, validate_args=False)

    def start(self, batch_shape: tuple[int, ...]) -> Tensor | None:
        """With leverage the memory of the first step has a shape to take."""
        return self.mu.new_zeros(*batch_shape, 1) if self.leverage else None

    def advance(self, s: Any, x: Tensor | None, u: Inputs) -> Any:
        """Work the error of the last return into the log-variance to come."""
        if not self.leverage:
            return s
        location = self.location(u)
        if not isinstance(s, Volatility):
            first = (self.mu, self.sigma / (1 - self.rho**2).sqrt(), location)
            return NextVolatility(*(value.expand(s.shape) for value in first))
        assert x is not None
        assert self.correlation is not None
        # Without the return, e is the standard normal variable that it is by itself.
        missing = x.isnan()
        v = torch.where(missing, 0.0, x - s.location) * (-0.5 * s.z).exp()
        if self.df is not None:
            v = v * ((self.df + 1) / (self.df + v**2)).sqrt()
        mean = self.mu + self.rho * (s.z - self.mu)
        mean = mean + self.sigma * self.correlation * v
        scale = self.sigma * (1 - self.correlation**2).sqrt()
        scale = torch.where(missing, self.sigma, scale)
        return NextVolatility(mean, scale, location.expand(mean.shape))

    def prior(self, h: Any, u: Inputs) -> Distribution:
        """Law of the log-variance given the memory."""
        if isinstance(h, NextVolatility):
            return Normal(h.mean, h.scale, validate_args=False)
        return self.initial(u) if h is None else self.transition(h, u)

    def absorb(self, h: Any, z: Tensor | None) -> Any:
        """Keep the log-variance; with leverage the location of the return too."""
        assert z is not None
        if not self.leverage:
            return z
        return Volatility(z, h.location)

    def fused(self, batch: Batch) -> Fused | None:
        """Parameters for the fused bootstrap filter; None where it does not know the model.

        Parameters with axes (rows, 1, ...) in front give every series its own.
        """
        if self.df is not None and self.leverage:
            return None
        location = self.mean.reshape(-1, 1)
        if self.beta is not None:
            location = location + (batch.u[:, : batch.n_steps] * self.beta).sum(-1)
        return Fused(
            mu=self.mu.reshape(-1),
            rho=self.rho.reshape(-1),
            sigma=self.sigma.reshape(-1),
            leverage=None if self.correlation is None else self.correlation.reshape(-1),
            df=None if self.df is None else self.df.reshape(-1),
            mean=location,
        )

    # -- learning -------------------------------------------------------------------------------

    @torch.no_grad()
    def set_starts(self, batch: Batch) -> None:
        """Location by least squares, and mu by the variance of the errors."""
        self._fit_location(batch)
        if "mu" in self.free:
            u = Inputs(batch.u[:, : batch.n_steps], torch.arange(batch.n_steps))
            error = (batch.x - self.location(u))[batch.mask]
            variance = error.square().mean()
            if not bool(variance > 0):
                raise ValueError("the returns do not vary, so they have no volatility to model")
            self.mu.copy_(variance.log())

    def surrogate(self, batch: Batch) -> tuple[LogSquares, Batch]:
        """Linear-Gaussian stand-in for quasi-maximum likelihood, and its data.

        The location is that of least squares, which is consistent whatever the volatility.
        """
        self._fit_location(batch)
        u = Inputs(batch.u[:, : batch.n_steps], torch.arange(batch.n_steps))
        residual = batch.x - self.location(u).detach()
        return LogSquares.of(self, batch, residual)

    def _fit_location(self, batch: Batch) -> None:
        seen = batch.mask[..., 0]
        y, u = batch.x[..., 0][seen], batch.u[:, : batch.n_steps][seen]
        free_mean, free_beta = "mean" in self.free, "beta" in self.free
        columns = [u.new_ones(len(u), 1)] if free_mean else []
        columns += [u] if free_beta else []
        if not columns:
            return
        if not free_mean:
            y = y - self.mean
        elif self.beta is not None and not free_beta:
            y = y - u @ self.beta
        found = torch.linalg.lstsq(torch.cat(columns, 1), y[:, None]).solution[:, 0].detach()
        with torch.no_grad():
            if free_mean:
                self.mean.copy_(found[0])
            if free_beta and self.beta is not None:
                self.beta.copy_(found[int(free_mean) :])


def _check_domain(given: Mapping[str, Any], distribution: str, leverage: bool) -> None:
    """Raise a ValueError for a parameter outside its domain, or of another model."""
    for name, value in given.items():
        if value is not None and not np.isfinite(np.asarray(value, dtype=float)).all():
            raise ValueError(f"{name}={value!r} must be finite")
    rho, sigma, df, correlation = (given[n] for n in ("rho", "sigma", "df", "correlation"))
    if rho is not None and not -1 < rho < 1:
        raise ValueError(f"rho={rho!r} must lie between -1 and 1: the log-variance is stationary")
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma={sigma!r} must be above 0")
    if df is not None and distribution != "studentt":
        raise ValueError(f"df={df!r} needs distribution='studentt'")
    if df is not None and not df > 2:
        raise ValueError(f"df={df!r} must be above 2, where the variance is finite")
    if correlation is not None and not leverage:
        raise ValueError(f"correlation={correlation!r} needs leverage=True")
    if correlation is not None and not -1 < correlation < 1:
        raise ValueError(f"correlation={correlation!r} must lie between -1 and 1")
