"""Emission heads: from a network's features to a distribution over the observations.

A head turns features (..., in_dim) into a `torch.distributions` object over x with batch shape
(..., obs_dim): given the features, the columns are independent.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch import distributions as td
from torch.distributions import Distribution
from torch.nn import functional as F

MAX_LOG_RATE = 20.0


def _inverse_softplus(y: np.ndarray) -> np.ndarray:
    return y + np.log(-np.expm1(-y))


class Head(nn.Module):
    """Base of the emission heads: one linear layer, then a family of distributions.

    Parameters
    ----------
    in_dim : int
        Length of the features.
    obs_dim : int
        Number of columns of x.
    parameter_shape : tuple of int
        Numbers the family needs for each column, as (kinds, ...).

    Attributes
    ----------
    real_valued : bool
        Whether the data may be scaled and shifted.
    encoded_dim : int
        Length of :meth:`encode`'s result.
    """

    real_valued: ClassVar[bool] = True
    needs: ClassVar[str] = ""
    remedy: ClassVar[str] = ""

    def __init__(self, in_dim: int, obs_dim: int, parameter_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.obs_dim = obs_dim
        self.encoded_dim = obs_dim
        self.parameter_shape = (parameter_shape[0], obs_dim, *parameter_shape[1:])
        self.linear = nn.Linear(in_dim, int(np.prod(self.parameter_shape)))

    def forward(self, features: Float[Tensor, "*batch in_dim"]) -> Distribution:
        """Distribution of x with batch shape (*batch, obs_dim)."""
        raw = self.linear(features).unflatten(-1, self.parameter_shape)
        return self.distribution(*raw.unbind(features.ndim - 1))

    def distribution(self, *raw: Tensor) -> Distribution:
        """Distribution from unconstrained numbers, one tensor (*batch, obs_dim, ...) a kind."""
        raise NotImplementedError

    def initialise_bias(self, values: Float[np.ndarray, "series time dim"]) -> None:
        """Start from the marginal distribution of each column, whatever the features.

        Parameters
        ----------
        values : array of shape (series, time, dim)
            Training data in the units that the head works in; NaN where missing. A column without
            values keeps its start.
        """
        columns = [column[np.isfinite(column)] for column in values.reshape(-1, self.obs_dim).T]
        with torch.no_grad():
            bias = self.linear.bias.view(self.parameter_shape)
            for place, column in enumerate(columns):
                if column.size:
                    bias[:, place] = torch.from_numpy(np.stack(self._start(column))).to(bias)

    def _start(self, column: np.ndarray) -> list[np.ndarray]:
        """Unconstrained numbers, kind by kind, that fit a column's marginal distribution."""
        raise NotImplementedError

    def encode(
        self, x: Float[Tensor, "*batch dim"], mask: Bool[Tensor, "*batch dim"] | None = None
    ) -> Float[Tensor, "*batch encoded"]:
        """Observations as networks should read them, 0 where missing.

        Real and binary values as they are, counts as log(1 + x), categories one-hot, grouped by
        column.
        """
        if mask is None:
            return self._code(x)
        seen = mask.repeat_interleave(self.encoded_dim // self.obs_dim, -1)
        return torch.where(seen, self._code(torch.where(mask, x, 0.0)), 0.0)

    def _code(self, x: Tensor) -> Tensor:
        return x

    def validate(
        self,
        values: Float[np.ndarray, "series time dim"],
        ids: Sequence[Hashable],
        columns: Sequence[str],
        index: Sequence[pd.Index],
    ) -> None:
        """Check that the observed values can occur under this family.

        Parameters
        ----------
        values : array of shape (series, time, dim)
            NaN where missing.
        ids, columns, index
            Names of the series, of the columns, and the time stamps of each series.

        Raises
        ------
        ValueError
            Naming the first series, column and time stamp at fault, and a remedy.
        """
        with np.errstate(invalid="ignore"):
            faults = np.argwhere(np.isfinite(values) & ~self._possible(values))
        if faults.size:
            n, t, d = faults[0]
            raise ValueError(
                f"series {ids[n]!r}, column {columns[d]!r}, at {index[n][t]}: the value "
                f"{values[n, t, d]:g} cannot occur under this emission, which needs "
                f"{self.needs.format(self=self)}; {self.remedy.format(self=self)}"
            )

    def _possible(self, values: np.ndarray) -> np.ndarray:
        return np.ones(values.shape, dtype=bool)


class GaussianHead(Head):
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
        return [column.mean(), _raw_scale(column.std(), self.min_scale)]


def _raw_scale(scale: np.ndarray, floor: float) -> np.ndarray:
    """Number whose softplus plus the floor is the scale, which is kept clear of the floor."""
    return _inverse_softplus(np.maximum(scale - floor, floor))


class StudentTHead(Head):
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
        start = float(_inverse_softplus(np.asarray(max(10.0 - min_df, 1.0))))
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
        return [column.mean(), _raw_scale(scale, self.min_scale)]


class MixtureHead(Head):
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
        scale = _raw_scale(np.full(k, np.sqrt(within)), self.min_scale)
        return [np.zeros(k), loc, scale]


class BernoulliHead(Head):
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


class CategoricalHead(Head):
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


class _CountHead(Head):
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
        return [np.log(mean), _raw_scale(dispersion, self.min_dispersion)]


HEADS: dict[str, type[Head]] = {
    "gaussian": GaussianHead,
    "studentt": StudentTHead,
    "bernoulli": BernoulliHead,
    "categorical": CategoricalHead,
    "poisson": PoissonHead,
    "negbinomial": NegativeBinomialHead,
    "mixture": MixtureHead,
}


def _head_class(name: str) -> type[Head]:
    if name not in HEADS:
        raise ValueError(f"unknown emission {name!r}; choose one of {', '.join(map(repr, HEADS))}")
    return HEADS[name]


def emission_head(name: str, in_dim: int, obs_dim: int, **options: Any) -> Head:
    """Emission head by name.

    Parameters
    ----------
    name : str
        "gaussian", "studentt", "bernoulli", "categorical", "poisson", "negbinomial" or "mixture".
    in_dim : int
        Length of the features.
    obs_dim : int
        Number of columns of x.
    **options
        Keyword arguments of the head's class.

    Raises
    ------
    ValueError
        If the name is unknown.

    Examples
    --------
    >>> head = emission_head("studentt", in_dim=8, obs_dim=2)
    >>> head(torch.zeros(5, 7, 8)).batch_shape
    torch.Size([5, 7, 2])
    """
    return _head_class(name)(in_dim, obs_dim, **options)


def head_options_from_data(
    name: str, values: Float[np.ndarray, "series time dim"]
) -> dict[str, Any]:
    """Options of a head that only the data can tell: the number of categories.

    Examples
    --------
    >>> head_options_from_data("categorical", np.array([[[0.0], [2.0], [np.nan]]]))
    {'n_categories': 3}
    """
    if _head_class(name) is not CategoricalHead:
        return {}
    observed = values[np.isfinite(values)]
    # At least two: a panel of zeros is a valid, if dull, panel of categories.
    return {"n_categories": max(int(observed.max(initial=0.0)) + 1, 2)}
