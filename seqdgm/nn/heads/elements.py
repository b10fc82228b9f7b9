"""Heads whose columns are independent given the features."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributions as td
from torch.distributions import Distribution
from torch.nn import functional as F

from seqdgm.nn.heads.base import Head, inverse_softplus, raw_scale

MAX_LOG_RATE = 20.0


class ElementHead(Head):
    """Base of the heads whose columns are independent given the features.

    Parameters
    ----------
    in_dim, obs_dim : int
        Length of the features, number of columns.
    parameter_shape : tuple of int
        Numbers the family needs for each column, as (kinds, ...).
    """

    def __init__(self, in_dim: int, obs_dim: int, parameter_shape: tuple[int, ...]) -> None:
        super().__init__(in_dim, obs_dim, int(np.prod(parameter_shape)) * obs_dim)
        self.parameter_shape = (parameter_shape[0], obs_dim, *parameter_shape[1:])

    def forward(self, features: Float[Tensor, "*batch in_dim"]) -> Distribution:
        """Distribution of x with batch shape (*batch, obs_dim)."""
        raw = self.linear(features).unflatten(-1, self.parameter_shape)
        return self.distribution(*raw.unbind(features.ndim - 1))

    def distribution(self, *raw: Tensor) -> Distribution:
        """Distribution from unconstrained numbers, one tensor (*batch, obs_dim, ...) a kind."""
        raise NotImplementedError

    def initialise_bias(self, values: Float[np.ndarray, "series time dim"]) -> None:
        """Start from the marginal distribution of each column."""
        columns = [column[np.isfinite(column)] for column in values.reshape(-1, self.obs_dim).T]
        with torch.no_grad():
            bias = self.linear.bias.view(self.parameter_shape)
            for place, column in enumerate(columns):
                if column.size:
                    bias[:, place] = torch.from_numpy(np.stack(self._start(column))).to(bias)

    def _start(self, column: np.ndarray) -> list[np.ndarray]:
        """Unconstrained numbers, kind by kind, that fit a column's marginal distribution."""
        raise NotImplementedError


class GaussianHead(ElementHead):
    r""":math:`x \sim N(\mu, \sigma^2)` with :math:`\sigma = \mathrm{softplus}(\cdot) + s_{\min}`.

    Parameters
    ----------
    in_dim, obs_dim : int
        Length of the features, number of columns.
    min_scale : float
        Floor of the scale, in the units that the head works in.
    """

    def __init__(self, in_dim: int, obs_dim: int, *, min_scale: float = 1e-3) -> None:
        super().__init__(in_dim, obs_dim, (2,))
        self.min_scale = min_scale

    def distribution(self, *raw: Tensor) -> Distribution:
        """Normal."""
        loc, scale = raw
        return td.Normal(loc, F.softplus(scale) + self.min_scale, validate_args=False)

    def _start(self, column: np.ndarray) -> list[np.ndarray]:
        return [column.mean(), raw_scale(column.std(), self.min_scale)]


class StudentTHead(ElementHead):
    r""":math:`x \sim t_\nu(\mu, \sigma)`; :math:`\nu` is one number a column.

    :math:`\nu = 2.1 + \mathrm{softplus}(\cdot)` at least, so that the variance
    :math:`\sigma^2 \nu / (\nu - 2)` exists. It does not follow the features, which tell little of
    how heavy the tails are at one step; it starts at 10.

    Parameters
    ----------
    in_dim, obs_dim : int
        Length of the features, number of columns.
    min_scale : float
        Floor of the scale, in the units that the head works in.
    min_df : float
        Floor of the degrees of freedom, above 2.
    """

    def __init__(
        self, in_dim: int, obs_dim: int, *, min_scale: float = 1e-3, min_df: float = 2.1
    ) -> None:
        super().__init__(in_dim, obs_dim, (2,))
        if min_df <= 2:
            raise ValueError(f"min_df={min_df}: the variance needs more than 2 degrees of freedom")
        self.min_scale = min_scale
        self.min_df = min_df
        start = float(inverse_softplus(np.asarray(max(10.0 - min_df, 1.0))))
        self.raw_df = nn.Parameter(torch.full((obs_dim,), start))

    @property
    def df(self) -> Float[Tensor, "dim"]:
        """Degrees of freedom of each column."""
        return self.min_df + F.softplus(self.raw_df)

    def distribution(self, *raw: Tensor) -> Distribution:
        """Student-t."""
        loc, scale = raw
        scale = F.softplus(scale) + self.min_scale
        return td.StudentT(self.df, loc, scale, validate_args=False)

    def _start(self, column: np.ndarray) -> list[np.ndarray]:
        df = self.df.detach().mean().item()
        scale = column.std() * np.sqrt((df - 2) / df)
        return [column.mean(), raw_scale(scale, self.min_scale)]


class MixtureHead(ElementHead):
    """Mixture of Gaussians in each column.

    Parameters
    ----------
    in_dim, obs_dim : int
        Length of the features, number of columns.
    n_components : int
        Gaussians in each column.
    min_scale : float
        Floor of each scale, in the units that the head works in.
    """

    def __init__(
        self, in_dim: int, obs_dim: int, *, n_components: int = 5, min_scale: float = 1e-3
    ) -> None:
        super().__init__(in_dim, obs_dim, (3, n_components))
        self.n_components = n_components
        self.min_scale = min_scale
        normal = torch.special.ndtri(torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1])
        self.initialise_bias(np.tile(normal.numpy()[None, :, None], (1, 1, obs_dim)))

    def distribution(self, *raw: Tensor) -> Distribution:
        """MixtureSameFamily of Normal."""
        logits, loc, scale = raw
        scale = F.softplus(scale) + self.min_scale
        return td.MixtureSameFamily(
            td.Categorical(logits=logits, validate_args=False),
            td.Normal(loc, scale, validate_args=False),
            validate_args=False,
        )

    def _start(self, column: np.ndarray) -> list[np.ndarray]:
        # Equal weights at the column's quantiles, with the scale that gives back its variance.
        k = self.n_components
        loc = np.quantile(column, (np.arange(k) + 0.5) / k)
        within = max(column.var() - loc.var(), 0.01 * column.var())
        scale = raw_scale(np.full(k, np.sqrt(within)), self.min_scale)
        return [np.zeros(k), loc, scale]


class BernoulliHead(ElementHead):
    """x in {0, 1} with a logit."""

    real_valued: ClassVar[bool] = False
    needs: ClassVar[str] = "0 or 1"
    remedy: ClassVar[str] = "threshold the data, or choose emission='gaussian' or 'poisson'"

    def __init__(self, in_dim: int, obs_dim: int) -> None:
        super().__init__(in_dim, obs_dim, (1,))

    def distribution(self, *raw: Tensor) -> Distribution:
        """Bernoulli."""
        return td.Bernoulli(logits=raw[0], validate_args=False)

    def _start(self, column: np.ndarray) -> list[np.ndarray]:
        # Half a count on either side keeps the logit finite.
        return [np.log((column.sum() + 0.5) / ((1 - column).sum() + 0.5))]

    def _possible(self, values: np.ndarray) -> np.ndarray:
        return (values == 0) | (values == 1)


class CategoricalHead(ElementHead):
    """x in {0, ..., K - 1} with K logits a column.

    Parameters
    ----------
    in_dim, obs_dim : int
        Length of the features, number of columns.
    n_categories : int
        K, the same for all columns; :func:`head_options_from_data` finds it.
    """

    real_valued: ClassVar[bool] = False
    needs: ClassVar[str] = "whole numbers from 0 to {self.n_categories} - 1"
    remedy: ClassVar[str] = "number the categories from 0, or raise n_categories"

    def __init__(self, in_dim: int, obs_dim: int, *, n_categories: int) -> None:
        super().__init__(in_dim, obs_dim, (1, n_categories))
        self.n_categories = n_categories
        self.encoded_dim = obs_dim * n_categories

    def distribution(self, *raw: Tensor) -> Distribution:
        """Categorical."""
        return td.Categorical(logits=raw[0], validate_args=False)

    def _start(self, column: np.ndarray) -> list[np.ndarray]:
        counts = np.bincount(column.astype(np.int64), minlength=self.n_categories) + 0.5
        return [np.log(counts / counts.sum())]

    def _code(self, x: Tensor) -> Tensor:
        return F.one_hot(x.long(), self.n_categories).to(x.dtype).flatten(-2)

    def _possible(self, values: np.ndarray) -> np.ndarray:
        return (values >= 0) & (values < self.n_categories) & (values == np.floor(values))


class _CountHead(ElementHead):
    real_valued: ClassVar[bool] = False
    needs: ClassVar[str] = "whole numbers from 0"
    remedy: ClassVar[str] = "give counts, or choose emission='gaussian'"

    def _code(self, x: Tensor) -> Tensor:
        return torch.log1p(x)

    def _possible(self, values: np.ndarray) -> np.ndarray:
        return (values >= 0) & (values == np.floor(values))


def _log_rate(raw: Tensor) -> Tensor:
    # A rate of e^20 is beyond all counts that float32 can tell apart; more would overflow.
    return raw.clamp(max=MAX_LOG_RATE)


class PoissonHead(_CountHead):
    r""":math:`x \sim \mathrm{Poisson}(e^{r})`, with r cut off at 20."""

    def __init__(self, in_dim: int, obs_dim: int) -> None:
        super().__init__(in_dim, obs_dim, (1,))

    def distribution(self, *raw: Tensor) -> Distribution:
        """Poisson."""
        return td.Poisson(_log_rate(raw[0]).exp(), validate_args=False)

    def _start(self, column: np.ndarray) -> list[np.ndarray]:
        return [np.log((column.sum() + 0.5) / (column.size + 0.5))]


class NegativeBinomialHead(_CountHead):
    r"""Counts of mean :math:`\mu = e^r` and variance :math:`\mu + \alpha \mu^2`.

    The parameterisation of Salinas et al. (2020), "DeepAR": the dispersion is
    :math:`\alpha = \mathrm{softplus}(\cdot) + \alpha_{\min}`, and r is cut off at 20.

    Parameters
    ----------
    in_dim, obs_dim : int
        Length of the features, number of columns.
    min_dispersion : float
        Floor of the dispersion.
    """

    def __init__(self, in_dim: int, obs_dim: int, *, min_dispersion: float = 1e-3) -> None:
        super().__init__(in_dim, obs_dim, (2,))
        self.min_dispersion = min_dispersion

    def distribution(self, *raw: Tensor) -> Distribution:
        """NegativeBinomial."""
        log_mean, raw_dispersion = raw
        dispersion = F.softplus(raw_dispersion) + self.min_dispersion
        return td.NegativeBinomial(
            1 / dispersion, logits=_log_rate(log_mean) + dispersion.log(), validate_args=False
        )

    def _start(self, column: np.ndarray) -> list[np.ndarray]:
        mean = (column.sum() + 0.5) / (column.size + 0.5)
        dispersion = max((column.var() - mean) / mean**2, 0.01)
        return [np.log(mean), raw_scale(dispersion, self.min_dispersion)]
