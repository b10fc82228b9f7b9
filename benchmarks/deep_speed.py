"""An epoch of training of the deep models at the size of the JSB chorales, beside other code.

All contenders do the same arithmetic but for the order of the sequences and padding: the loops
written by hand pad each minibatch to its longest sequence, as one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from _deep_peers import (
    BATCH,
    LEARNING_RATE,
    PlainDMM,
    PlainLSTM,
    PyroDMM,
    pyro_bound,
    train_by_hand,
    train_by_pyro,
)
from _harness import Agreement, Call, Contender, DisagreementError, Task, main
from deep import chords, padded
from torch import nn

import seqdgm as sq
from seqdgm.models.srnn import SRNN
from seqdgm.models.vrnn import VRNN
from seqdgm.nn.recurrent import Kind


@dataclass(frozen=True)
class Sizes:
    """As the JSB chorales: 229 sequences of about 60 steps over 88 keys."""

    sequences: int
    mean_length: int
    longest: int
    keys: int
    latent: int
    hidden: int
    encoder: int
    epochs: int
    checks: int


FULL = Sizes(229, 60, 129, 88, latent=100, hidden=200, encoder=600, epochs=1, checks=4)
TINY = Sizes(12, 8, 15, 10, latent=3, hidden=8, encoder=8, epochs=1, checks=10)


def options(sizes: Sizes) -> dict[str, object]:
    """What all models of seqdgm are given."""
    return {
        "emission": "bernoulli",
        "max_epochs": sizes.epochs,
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH,
    }


def fits(model: sq.SequenceModel, data: list[np.ndarray], **how: object) -> Callable[[], Call]:
    """Whole fits, from the data as a user has them."""
    return lambda: lambda: model.clone().fit(data, seed=0, valid_fraction=0.0, **how)


def objective(fitted: sq.SequenceModel) -> float:
    """What the last epoch reached."""
    return fitted.fit_report_.objective[-1]


def repeated(epoch: Callable[[], float], sizes: Sizes) -> Call:
    """As many epochs as a fit has; the objective of the last."""
    return lambda: [epoch() for _ in range(sizes.epochs)][-1]


def title(of: str, sizes: Sizes) -> str:
    return (
        f"one epoch of {of}, {sizes.sequences} binary sequences of about {sizes.mean_length} steps "
        f"over {sizes.keys} keys"
    )


def same_bound(
    fitted: sq.SequenceModel,
    data: list[np.ndarray],
    others: Mapping[str, Callable[[], float]],
    draws: int,
) -> Agreement:
    """With the weights of `fitted`, all give its bound in total, up to five sigma."""

    def agree(_: Mapping[str, np.ndarray]) -> str:
        exact = fitted.latent_dim == 0
        how = {} if exact else {"method": "variational", "n_particles": draws, "seed": 1}
        ours, said = fitted.log_prob(data, **how), []
        for name, bound in others.items():
            try:
                found = [bound() for _ in range(draws)]
            except ModuleNotFoundError:
                continue
            spread = 0.0 if exact else np.linalg.norm(ours.stderr)
            sigma = math.hypot(np.std(found, ddof=1) / draws**0.5, spread)
            gap = float(np.mean(found) - ours.value.sum())
            if not abs(gap) <= 5 * sigma + 1e-5 * abs(ours.value.sum()):
                raise DisagreementError(f"{name}: the bound is off by {gap:.4g}, sigma {sigma:.2g}")
            said.append(f"{name} {gap:+.2g} ± {sigma:.1g}")
        return f"bound {ours.value.sum():.6g} nats at the same weights; " + ", ".join(said)

    return agree


def plain_bound(net: nn.Module, data: list[np.ndarray]) -> Callable[[], float]:
    """One-sample estimate of the total bound by a network of `_deep_peers`."""
    x, lengths = padded(data)
    inside = torch.arange(x.shape[1]) < lengths[:, None]

    @torch.no_grad()
    def bound() -> float:
        return float(torch.where(inside, net(x, lengths, 1.0), 0.0).double().sum())

    return bound


def deep_markov(sizes: Sizes, encoder_cell: Kind = "relu") -> sq.DMM:
    """The sizes and (by default) the recurrent network of Pyro's example."""
    return sq.DMM(
        sizes.latent,
        sizes.hidden,
        sizes.encoder,
        encoder_cell=encoder_cell,
        kl_warmup=0,
        **options(sizes),
    )


def dmm(sizes: Sizes) -> Task:
    data, model = chords(sizes), deep_markov(sizes)
    fitted = model.clone().fit(data[:BATCH], seed=1, valid_fraction=0.0)
    shape = (sizes.keys, sizes.latent, sizes.hidden, sizes.encoder)
    by_hand, by_pyro = PlainDMM(*shape), PyroDMM(*shape)
    by_hand.load_state_dict(fitted.state_dict())
    by_pyro.take_over(fitted.state_dict())

    def pyro() -> Call:
        return repeated(train_by_pyro(PyroDMM(*shape), data), sizes)

    return Task(
        title(f"DMM ({sizes.latent} latent, {sizes.hidden} hidden, RNN {sizes.encoder})", sizes),
        [
            Contender("seqdgm, whole `fit`", fits(model, data), objective),
            Contender(
                "plain torch loop",
                lambda: repeated(train_by_hand(PlainDMM(*shape), data), sizes),
                package="torch",
            ),
            Contender("Pyro, Trace_ELBO", pyro, package="pyro"),
        ],
        same_bound(
            fitted,
            data[:BATCH],
            {
                "plain torch loop": plain_bound(by_hand, data[:BATCH]),
                "Pyro": lambda: pyro_bound(by_pyro, data[:BATCH]),
            },
            sizes.checks,
        ),
        units=sizes.epochs,
    )


def lstm(sizes: Sizes) -> Task:
    data = chords(sizes)
    model = sq.RNN("lstm", sizes.encoder, **options(sizes))
    fitted = model.clone().fit(data[:BATCH], seed=1, valid_fraction=0.0)
    net = PlainLSTM(sizes.keys, sizes.encoder)
    net.load_state_dict(fitted.state_dict())

    def by_hand() -> Call:
        return repeated(train_by_hand(PlainLSTM(sizes.keys, sizes.encoder), data), sizes)

    return Task(
        title(f"RNN (LSTM, {sizes.encoder} units)", sizes),
        [
            Contender("seqdgm, whole `fit`", fits(model, data), objective),
            Contender("torch.nn.LSTM", by_hand, package="torch"),
        ],
        same_bound(
            fitted, data[:BATCH], {"torch.nn.LSTM": plain_bound(net, data[:BATCH])}, sizes.checks
        ),
        units=sizes.epochs,
    )


def beside(of: str, contenders: Sequence[Contender], sizes: Sizes) -> Task:
    """Other arithmetic than the reference's, so that there is nothing to compare but time."""
    return Task(
        title(of, sizes),
        contenders,
        lambda _: "other models or objectives: nothing to compare but time",
        units=sizes.epochs,
    )


def ours(name: str, model: sq.SequenceModel, sizes: Sizes, **how: object) -> Contender:
    return Contender(name, fits(model, chords(sizes), **how), objective)


def beside_dmm(of: str, models: Mapping[str, sq.SequenceModel], sizes: Sizes) -> Task:
    """The DMM of the first row, and one with a GRU as inference network, which does not count."""
    strict, gated = deep_markov(sizes), deep_markov(sizes, "gru")
    return beside(
        of,
        [
            *(ours(name, model, sizes) for name, model in models.items()),
            replace(ours("DMM of the first row", strict, sizes), package="seqdgm"),
            replace(ours("DMM with a GRU", gated, sizes), package="seqdgm", counts=False),
        ],
        sizes,
    )


def recurrent_latent(
    kind: type[sq.SequenceModel], sizes: Sizes, **more: object
) -> sq.SequenceModel:
    given = options(sizes) | more
    return kind(sizes.latent, sizes.hidden, sizes.encoder, kl_warmup=0, **given)


def vrnn(sizes: Sizes) -> Task:
    return beside_dmm("VRNN", {"seqdgm, whole `fit`": recurrent_latent(VRNN, sizes)}, sizes)


def srnn(sizes: Sizes) -> Task:
    models = {
        "seqdgm, whole `fit`": recurrent_latent(SRNN, sizes),
        "the same, its inference network that of the DMM": recurrent_latent(
            SRNN, sizes, encoder_cell="relu"
        ),
    }
    return beside_dmm("SRNN", models, sizes)


def fivo(sizes: Sizes) -> Task:
    model = recurrent_latent(VRNN, sizes)
    steered = ours("seqdgm, whole `fit`", model, sizes, method="fivo", n_particles=4)
    bound = replace(ours("VRNN by ELBO", model, sizes), package="seqdgm")
    return beside("VRNN by FIVO(4)", [steered, bound], sizes)


TASKS: dict[str, Callable[[Sizes], Task]] = {
    "dmm": dmm,
    "lstm": lstm,
    "vrnn": vrnn,
    "srnn": srnn,
    "fivo": fivo,
}

if __name__ == "__main__":
    main("deep_speed", __doc__, TASKS, full=FULL, tiny=TINY)
