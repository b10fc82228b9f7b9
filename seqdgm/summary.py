"""Text summaries of fitted models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from seqdgm.model import SequenceModel


def summarise(model: SequenceModel) -> str:
    """Describe a model: hyperparameters, data, fit, and its estimates where it names them."""
    lines = [repr(model)]
    panel, report = model.data_, model.fit_report_
    if panel is not None:
        seen = int(panel.mask.sum())
        total = int(panel.lengths.sum()) * panel.n_dims
        lines.append(
            f"data      {panel.n_series} series, {int(panel.lengths.sum())} steps, "
            f"{panel.n_dims} columns, {total - seen} of {total} values missing"
        )
    if report is not None:
        done = "stopped at the iteration limit"
        if report.converged.all():
            done = "converged"
        elif report.converged.any():
            done = f"{int(report.converged.sum())} of {len(report.converged)} series converged"
        lines.append(
            f"fit       {report.method}, {report.n_iter} iterations, {done}, {report.seconds:.2f} s"
        )
        if report.log_likelihood is not None:
            lines.append(
                f"log-lik.  {float(np.sum(report.log_likelihood)):.4f} nats in model units "
                "(diffuse elements: -1/2 log F_inf, no 2 pi term)"
            )
        lines += [f"note      {message}" for message in report.messages]
    lines += model.describe()
    count = sum(p.numel() for p in model.parameters())
    if count:
        lines.append(f"weights   {count}")
    return "\n".join(lines)
