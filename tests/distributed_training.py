"""What each process does in `test_training_distributed`; started by torchrun."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import seqdgm as sq
from seqdgm.inference.training_options import TrainingOptions
from seqdgm.inference.updates import Outcome, Updater
from seqdgm.prepare import prepare

RNN_OPTIONS: dict[str, Any] = {"seed": 0, "batch_size": 3, "average": 0.5}


def series() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    lengths = (14, 20, 11, 17, 12, 15, 19)
    return [np.sin(np.arange(n) / 3) + 0.2 * rng.normal(size=n) for n in lengths]


def rnn() -> sq.RNN:
    return sq.RNN("gru", 4, max_epochs=4, learning_rate=0.02)


def dmm() -> sq.DMM:
    return sq.DMM(2, 4, 4, max_epochs=4, batch_size=3, kl_warmup=2)


def curves(model: sq.SequenceModel) -> dict[str, torch.Tensor]:
    kept = ("objective", "valid_objective", "gradient_norm", "learning_rate", "best_epoch")
    found = asdict(model.fit_report_)
    return {name: torch.tensor(found[name], dtype=torch.float64) for name in kept}


def one_update(model: sq.DMM, rank: int, world: int, devices: int) -> tuple[Updater, Outcome]:
    """One step on the share of a process, with that process's noise."""
    _, batch, _ = prepare(model, series(), None)
    updater = Updater.of(model, replace(TrainingOptions(), clip=1e9, devices=devices))
    outcome = updater(
        batch.take(torch.arange(batch.n_series)[rank::world]),
        weight=devices / int(batch.lengths.sum()),
        beta=1.0,
        rate=1e-3,
        generator=torch.Generator().manual_seed(rank),
        due=rank == 0,
    )
    return updater, outcome


def gradients(model: sq.SequenceModel) -> torch.Tensor:
    return torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None])


def main(folder: Path) -> None:
    found: dict[str, torch.Tensor] = {}
    model = rnn().fit(series(), devices=2, **RNN_OPTIONS)
    found |= {f"rnn/{name}": value for name, value in model.state_dict().items()}
    found |= {f"curves/{name}": value for name, value in curves(model).items()}

    start = dmm().fit(series(), seed=0, max_epochs=1)
    updater, outcome = one_update(start, rank := torch.distributed.get_rank(), 2, 2)
    found["gradient"] = gradients(updater.evaluation.model)
    found["outcome"] = torch.tensor([*outcome.totals, outcome.norm, outcome.due])

    whole = dmm().fit(series(), seed=0, devices=2)

    def stop(report: sq.FitReport) -> None:
        if report.n_iter == 2:
            raise KeyboardInterrupt

    path = folder / "run.safetensors"
    try:
        dmm().fit(series(), seed=0, devices=2, checkpoint=path, checkpoint_minutes=0, on_epoch=stop)
    except KeyboardInterrupt:
        torch.distributed.barrier()
    resumed = dmm().fit(series(), devices=2, resume=path)
    for name, model in (("whole", whole), ("resumed", resumed)):
        found |= {f"{name}/{key}": value for key, value in model.state_dict().items()}
        found |= {f"{name}/{key}": value for key, value in curves(model).items()}

    wild = series()
    wild[5][3] = 3e19
    message = ""
    try:
        sq.RNN("gru", 4, scale=None, max_epochs=2).fit(wild, seed=0, devices=2)
    except ValueError as error:
        message = str(error)
    metadata = {"message": message}
    save_file(
        {name: value.contiguous().clone() for name, value in found.items()},
        folder / f"{rank}.safetensors",
        metadata,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
