"""The learner of models that have nothing to learn: it keeps the data and says so."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from seqdgm.results import FitReport
from seqdgm.types import Batch

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


def fit(
    model: StateSpaceModel,
    batch: Batch,
    *,
    method: str,
    generator: torch.Generator,
    progress: bool,
) -> FitReport:
    """Attach the data to a model whose parameters are all given.

    Raises
    ------
    ValueError
        If the model has learnable parameters, which this learner would leave untouched.
    """
    begin = time.perf_counter()
    learnable = [name for name, p in model.named_parameters() if p.requires_grad]
    if learnable:
        raise ValueError(
            f"{type(model).__name__} has learnable parameters {learnable}; learn them with "
            "fit(y, method='mle') or fit(y, method='particle-em'), give the model a proposal and "
            "learners = {'elbo': 'gradient'}, or set requires_grad=False"
        )
    return FitReport(
        method=method,
        objective=(),
        valid_objective=(),
        converged=np.ones(1, dtype=bool),
        n_iter=0,
        seconds=time.perf_counter() - begin,
    )
