"""Quasi-maximum likelihood: a linear-Gaussian stand-in fitted exactly, for its parameters."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from seqdgm.inference import given, mle
from seqdgm.results import FitReport
from seqdgm.types import Batch

if TYPE_CHECKING:
    from seqdgm.inference.mle import QuasiNewtonModel
    from seqdgm.recursion import StateSpaceModel


class QuasiLikelihoodModel(Protocol):
    """What a model must say to be fitted here."""

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the parameters to be learned."""

    def surrogate(self, batch: Batch) -> tuple[QuasiNewtonModel, Batch]:
        """Linear-Gaussian model that hands its optimum on, and its data."""


def fit(
    model: StateSpaceModel,
    batch: Batch,
    *,
    method: str,
    generator: torch.Generator,
    progress: bool,
    max_iter: int = 200,
) -> FitReport:
    """Maximise the Gaussian likelihood of the stand-in over all series together.

    A model with nothing to learn takes the data over as it is. The objective is a
    quasi-likelihood, in the stand-in's own units: it compares parameters, not models.

    Parameters
    ----------
    model, batch, method, generator, progress
        As every learner.
    max_iter : int
        Quasi-Newton iterations at most.

    References
    ----------
    Harvey, Ruiz and Shephard (1994), Multivariate stochastic variance models, *Review of Economic
    Studies* 61, section 2.
    """
    begin = time.perf_counter()
    named: QuasiLikelihoodModel = model  # type: ignore[assignment]
    if not named.free:
        return given.fit(model, batch, method=method, generator=generator, progress=progress)
    stand_in, data = named.surrogate(batch)
    report = mle.fit(
        stand_in,
        data,
        method=method,
        generator=generator,
        progress=progress,
        pooled=True,
        max_iter=max_iter,
    )
    return replace(report, log_likelihood=None, seconds=time.perf_counter() - begin)
