"""Fitting a model: to a panel as a whole, or part by part where each series has a fit of its own.

The parts are cut the same way whether they are fitted here or on a cluster, and each has a seed of
its own, so that the place does not change the result.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from seqdgm.cluster import Rows, check_cluster, partitions, run_tasks
from seqdgm.panel import Panel, align_inputs
from seqdgm.prepare import check_lengths, check_observed, input_names, make_batch, prepare
from seqdgm.progress import progress_bar
from seqdgm.results import FitReport
from seqdgm.transform import Transform, fit_transform
from seqdgm.types import Batch, check_count, draw_seed, make_generator, seeded

if TYPE_CHECKING:
    from seqdgm.model import SequenceModel

M = TypeVar("M", bound="SequenceModel")


@dataclass(frozen=True)
class FitCall:
    """What `SequenceModel.fit` was asked for."""

    method: str | None
    valid: Any
    valid_inputs: Any
    device: str | torch.device | None
    progress: bool
    options: Mapping[str, Any]


class Data(NamedTuple):
    """Series, their covariates, and the names of these where they have some."""

    panel: Panel
    u: Float[np.ndarray, "series steps inputs"]
    columns: tuple[str, ...] | None

    def take(self, rows: Rows) -> Data:
        """Return the data of some series."""
        panel = self.panel.select(range(*rows))
        return Data(panel, self.u[slice(*rows), : panel.n_steps], self.columns)


class PartTask(NamedTuple):
    """Some series and their seed."""

    data: Rows
    seed: int


def separate(model: SequenceModel, options: Mapping[str, Any]) -> bool:
    """Whether each series has a fit of its own, so that a panel may be taken apart."""
    return model.per_series and not options.get("pooled", False)


def fit_panel(
    draft: M,
    y: Any,
    inputs: Any,
    call: FitCall,
    *,
    seed: int | torch.Generator | None,
    cluster: str | None,
    partition_size: int,
) -> M:
    """Fit an unfitted model, and return it; see `SequenceModel.fit`."""
    from seqdgm.inference import check_options, find_learner

    begin = time.perf_counter()
    check_count("partition_size", partition_size)
    panel = Panel.of(y)
    data = Data(panel, align_inputs(panel, inputs), input_names(inputs))
    method, learner = find_learner(draft, call.method)
    held = {} if call.valid is None else {"valid": call.valid}
    check_options(learner, {**call.options, **held}, type(draft).__name__)
    call, generator = replace(call, method=method), make_generator(seed)
    check_cluster(cluster)
    apart = separate(draft, call.options)
    if cluster is not None and not apart:
        raise ValueError(
            f"{type(draft).__name__}.fit shares the parameters over the series, so that parts of "
            f"the panel cannot be fitted apart; leave cluster={cluster!r} out"
        )
    check_lengths(panel, draft.min_length, type(draft).__name__)
    rows = partitions(panel.n_series, int(partition_size) if apart else panel.n_series)
    if len(rows) == 1:
        return _fit_whole(draft, data, call, generator)
    tasks = [PartTask(one, draw_seed(generator)) for one in rows]
    common = draft, replace(call, progress=False)
    parts: dict[Rows, M] = {}
    with progress_bar(call.progress, len(tasks)) as advance:
        for task, part in run_tasks(
            _fit_part, tasks, common=common, load=data.take, cluster=cluster
        ):
            parts[task.data] = part
            advance(1, f"series {task.data.first + 1} to {task.data.stop}")
    joined = _joined([parts[one] for one in rows], rows, panel.ids, time.perf_counter() - begin)
    joined.data_, joined.inputs_ = panel, data.u
    return joined


def _fit_part(common: tuple[M, FitCall], data: Data, task: PartTask) -> M:
    draft, call = common
    part = _fit_whole(copy.deepcopy(draft), data, call, make_generator(task.seed))
    part.data_ = part.inputs_ = None  # the caller has them
    return part


def _fit_whole(draft: M, data: Data, call: FitCall, generator: torch.Generator) -> M:
    from seqdgm.inference import find_learner

    panel, u, columns = data
    method, learner = find_learner(draft, call.method)
    pooled = not separate(draft, call.options)
    function, scale = draft.transform, draft.effective_scale()
    draft.obs_dim_, draft.input_dim_ = panel.n_dims, u.shape[2]
    draft.input_columns_ = columns
    draft.build_options_ = draft.build_options(panel)
    with seeded(generator):
        draft.build(panel.n_dims, u.shape[2], **draft.build_options_)
    draft.check_data(panel)
    check_observed(panel, pooled=pooled)

    def attempt(candidate: M, power: Tensor | None) -> tuple[FitReport, Batch]:
        candidate.transform_ = fit_transform(panel, function, scale, pooled=pooled, power=power)
        candidate.initialise(candidate.transform_.of_panel(panel).numpy())
        candidate.to(call.device or "cpu")
        rows = list(range(panel.n_series))
        batch = make_batch(candidate, panel, u, rows, candidate.transform_)
        known: dict[str, Any] = {"generator": generator, "progress": call.progress}
        if call.valid is not None:
            known["valid"] = prepare(candidate, call.valid, call.valid_inputs)[1]
        return learner(candidate, batch, method=method, **known, **call.options), batch

    power = None
    if function == "boxcox":
        from seqdgm.inference.power import profile_power

        power = profile_power(draft, panel, attempt, pooled=pooled)
    draft.data_, draft.inputs_ = panel, u
    draft.fit_report_, _ = attempt(draft, power)
    return draft


def _joined(parts: Sequence[M], rows: Sequence[Rows], ids: tuple[Any, ...], seconds: float) -> M:
    """One model of all series."""
    whole = parts[0]
    transforms, reports = [], []
    for part in parts:
        assert part.transform_ is not None
        assert part.fit_report_ is not None
        transforms.append(part.transform_)
        reports.append(part.fit_report_)
    whole.join_series(parts, ids)
    whole.transform_ = Transform.join(transforms, [one.stop - one.first for one in rows])
    whole.fit_report_ = _joined_report(reports, seconds)
    return whole


def _joined_report(reports: Sequence[FitReport], seconds: float) -> FitReport:
    """The sum of the objectives, each of which stays where its part stopped."""
    longest = max(len(one.objective) for one in reports)
    curves = [(*one.objective, *one.objective[-1:] * longest)[:longest] for one in reports]
    likelihoods = [one.log_likelihood for one in reports if one.log_likelihood is not None]
    return FitReport(
        method=reports[0].method,
        objective=tuple(map(sum, zip(*curves, strict=True))),
        valid_objective=(),
        converged=np.concatenate([one.converged for one in reports]),
        n_iter=max(one.n_iter for one in reports),
        seconds=seconds,
        log_likelihood=np.concatenate(likelihoods) if likelihoods else None,
        messages=tuple(text for one in reports for text in one.messages),
    )
