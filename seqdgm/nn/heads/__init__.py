"""Emission heads: from a network's features to a distribution over the observations.

A head turns features (..., in_dim) into a `torch.distributions` object over x: with batch shape
(..., obs_dim) where, given the features, the columns are independent, else joint over the vector,
with batch shape (...) and event shape (obs_dim,).
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import numpy as np
from jaxtyping import Float

from seqdgm.nn.heads.base import Head
from seqdgm.nn.heads.elements import (
    BernoulliHead,
    CategoricalHead,
    GaussianHead,
    MixtureHead,
    NegativeBinomialHead,
    PoissonHead,
    StudentTHead,
)
from seqdgm.nn.heads.joint import FlowHead, FullGaussianHead, LowRankGaussianHead, NADEHead
from seqdgm.types import check_count

__all__ = ["HEADS", "Head", "check_head_options", "emission_head", "head_options_from_data"]

HEADS: dict[str, type[Head]] = {
    "gaussian": GaussianHead,
    "studentt": StudentTHead,
    "bernoulli": BernoulliHead,
    "categorical": CategoricalHead,
    "poisson": PoissonHead,
    "negbinomial": NegativeBinomialHead,
    "mixture": MixtureHead,
    "gaussian-full": FullGaussianHead,
    "gaussian-lowrank": LowRankGaussianHead,
    "nade": NADEHead,
    "flow": FlowHead,
}


def _head_class(name: str) -> type[Head]:
    if name not in HEADS:
        raise ValueError(f"unknown emission {name!r}; choose one of {', '.join(map(repr, HEADS))}")
    return HEADS[name]


def check_head_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise a ValueError for an option that a head does not have, or a value that none takes.

    The options of all heads are floors, ``min_...``, which are positive, and counts.

    Examples
    --------
    >>> check_head_options("gaussian-lowrank", {"rnk": 3})
    Traceback (most recent call last):
    ...
    ValueError: the emission 'gaussian-lowrank' has no option 'rnk'; it has ['min_scale', 'rank']
    """
    known = sorted(set(signature(_head_class(name)).parameters) - {"in_dim", "obs_dim"})
    for option in options:
        if option not in known:
            has = f"it has {known}" if known else "it has none"
            raise ValueError(f"the emission {name!r} has no option {option!r}; {has}")
    for option, value in options.items():
        if not option.startswith("min_"):
            check_count(option, value)
        elif not value > 0:
            raise ValueError(f"{option}={value!r} must be positive")


def emission_head(name: str, in_dim: int, obs_dim: int, **options: Any) -> Head:
    """Emission head by name.

    Parameters
    ----------
    name : str
        A key of `HEADS`: of independent columns "gaussian", "studentt", "bernoulli",
        "categorical", "poisson", "negbinomial" and "mixture"; joint over the columns
        "gaussian-full", "gaussian-lowrank", "nade" (binary) and "flow" (real).
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
    >>> import torch
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
