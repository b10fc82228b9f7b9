"""Training of the deep models beside plain torch loops written for this one network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from _harness import Agreement, Contender, DisagreementError, Task, main
from torch import Tensor, nn
from torch.nn import functional as F

import seqdgm as sq

LEARNING_RATE, WEIGHT_DECAY, CLIP, BATCH, KL_WARMUP = 5e-3, 1e-4, 5.0, 20, 40
MIN_SCALE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """As the JSB chorales: 229 sequences of about 60 steps over 88 keys."""

    sequences: int
    mean_length: int
    longest: int
    keys: int
    hidden: int
    latent: int
    epochs: int
    checks: int


FULL = Sizes(229, 60, 129, 88, hidden=100, latent=32, epochs=3, checks=20)
TINY = Sizes(12, 8, 15, 10, hidden=8, latent=3, epochs=2, checks=20)


def chords(sizes: Sizes) -> list[np.ndarray]:
    """Random binary sequences with about four voices at a time."""
    rng = np.random.default_rng(0)
    lengths = rng.normal(sizes.mean_length, sizes.mean_length / 4, sizes.sequences)
    lengths = lengths.clip(2, sizes.longest).astype(int)
    return [(rng.random((n, sizes.keys)) < 4 / sizes.keys).astype(float) for n in lengths]


# -- plain torch --------------------------------------------------------------------------------


def padded(sequences: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    tensors = [torch.from_numpy(s).float() for s in sequences]
    lengths = torch.tensor([len(s) for s in sequences])
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True), lengths


def log_bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


class PlainRNN(nn.Module):
    """GRU over the previous step. Parameters are named as in seqdgm, to take its weights over."""

    def __init__(self, keys: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.Module()
        self.rnn.rnn = nn.GRU(keys, hidden, batch_first=True)
        self.rnn.start = nn.Parameter(torch.zeros(1, 1, hidden))
        self.head = nn.ModuleDict({"linear": nn.Linear(hidden, keys)})

    def forward(self, x: Tensor, lengths: Tensor, beta: float) -> Tensor:
        """Log-likelihood of each step."""
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        start = self.rnn.start[0][:, None].expand(-1, len(x), -1).contiguous()
        out, _ = self.rnn.rnn(before, start)
        return log_bernoulli(self.head["linear"](out), x)


class PlainDMM(nn.Module):
    """Deep Markov model of Krishnan, Shalit and Sontag (2017), parameters named as in seqdgm."""

    def __init__(self, keys: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.z0 = nn.Parameter(torch.zeros(latent))
        self.gated = nn.ModuleDict(
            {
                "hidden": nn.Linear(latent, 2 * hidden),
                "gate": nn.Linear(hidden, latent),
                "proposed": nn.Linear(hidden, latent),
                "linear": nn.Linear(latent, latent),
                "scale": nn.Linear(latent, latent),
            }
        )
        nn.init.constant_(self.gated["gate"].bias, -2.0)
        nn.init.eye_(self.gated["linear"].weight)
        nn.init.zeros_(self.gated["linear"].bias)
        self.features = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.head = nn.ModuleDict({"linear": nn.Linear(hidden, keys)})
        self.encoder = nn.Module()
        self.encoder.cell = nn.Module()
        self.encoder.cell.rnn = nn.GRU(2 * keys, hidden, batch_first=True)
        self.encoder.cell.start = nn.Parameter(torch.zeros(1, 1, hidden))
        self.combiner = nn.Module()
        self.combiner.state = nn.Linear(latent, hidden)
        self.combiner.out = nn.Linear(hidden, 2 * latent)
        self.combiner.start = nn.Parameter(torch.zeros(latent))

    def forward(self, x: Tensor, lengths: Tensor, beta: float) -> Tensor:
        """One-sample estimate of each step's share of the evidence lower bound."""
        n, steps, _ = x.shape
        summaries = self._read_backwards(x, lengths)
        z = self.z0.expand(n, -1)
        befores, locs, scales = [], [], []
        for t in range(steps):
            befores.append(z)
            hidden = 0.5 * (torch.tanh(self.combiner.state(z)) + summaries[:, t])
            loc, raw = self.combiner.out(hidden).chunk(2, -1)
            scale = F.softplus(raw) + MIN_SCALE
            z = loc + scale * torch.randn_like(scale)
            locs.append(loc)
            scales.append(scale)
        path = torch.stack([*befores[1:], z], 1)
        loc, scale = torch.stack(locs, 1), torch.stack(scales, 1)
        prior_loc, prior_scale = self._transition(torch.stack(befores, 1))
        ratio, shift = scale / prior_scale, (loc - prior_loc) / prior_scale
        divergence = 0.5 * (ratio**2 + shift**2 - 1 - 2 * ratio.log()).sum(-1)
        fit = log_bernoulli(self.head["linear"](self.features(path)), x)
        return fit - beta * divergence

    def _transition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        for_gate, for_proposed = F.relu(self.gated["hidden"](z)).chunk(2, -1)
        gate = torch.sigmoid(self.gated["gate"](for_gate))
        proposed = self.gated["proposed"](for_proposed)
        loc = (1 - gate) * self.gated["linear"](z) + gate * proposed
        return loc, F.softplus(self.gated["scale"](F.relu(proposed))) + MIN_SCALE

    def _read_backwards(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Summary of each step and those after it, from each sequence's own end."""
        t = torch.arange(x.shape[1])
        back = lengths[:, None] - 1 - t
        place = torch.where(back >= 0, back, t)[..., None]
        seen = (t < lengths[:, None])[..., None].expand_as(x).to(x.dtype)
        read = torch.cat([x, seen], -1)
        start = self.encoder.cell.start[0][:, None].expand(-1, len(x), -1).contiguous()
        out, _ = self.encoder.cell.rnn(read.gather(1, place.expand_as(read)), start)
        return out.gather(1, place.expand_as(out))


def train(model: nn.Module, sequences: list[np.ndarray], epochs: int) -> float:
    """The loop that one would write by hand; the last epoch's objective in nats a step."""
    x, lengths = padded(sequences)
    with torch.no_grad():
        share = (torch.cat([torch.from_numpy(s) for s in sequences]).sum(0) + 0.5).float()
        model.head["linear"].bias.copy_(torch.log(share / (lengths.sum() - share + 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    total = 0.0
    for epoch in range(epochs):
        total, beta = 0.0, min(1.0, (epoch + 1) / KL_WARMUP)
        for rows in torch.randperm(len(x)).split(BATCH):
            part = lengths[rows]
            steps = int(part.max())
            terms = model(x[rows, :steps], part, beta)
            inside = torch.arange(steps) < part[:, None]
            gain = torch.where(inside, terms, 0.0).sum()
            loss = -gain / inside.sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            total += gain.item()
    return total / int(lengths.sum())


# -- tasks --------------------------------------------------------------------------------------


def same_function(
    fitted: sq.SequenceModel, plain: nn.Module, data: list[np.ndarray], draws: int
) -> Agreement:
    """With the weights of `fitted` the plain network gives its bound, up to five sigma.

    Trained from different random weights, the two must come close in objective, too.
    """

    def agree(values: Mapping[str, np.ndarray]) -> str:
        plain.load_state_dict(fitted.state_dict())
        x, lengths = padded(data)
        inside = torch.arange(x.shape[1]) < lengths[:, None]
        with torch.no_grad():
            totals = [
                float(torch.where(inside, plain(x, lengths, 1.0), 0.0).double().sum())
                for _ in range(draws)
            ]
        exact = fitted.latent_dim == 0
        options = {} if exact else {"method": "variational", "n_particles": draws, "seed": 1}
        ours = fitted.log_prob(data, **options)
        sigma = math.hypot(np.std(totals, ddof=1) / draws**0.5, np.linalg.norm(ours.stderr))
        gap = np.mean(totals) - ours.value.sum()
        if not abs(gap) <= 5 * sigma + 1e-5 * abs(ours.value.sum()):
            raise DisagreementError(
                f"the plain loop's bound is off by {gap:.4g} nats, sigma {sigma:.2g}"
            )
        reached = {name: float(value[0]) for name, value in values.items()}
        if max(reached.values()) - min(reached.values()) > 0.1 * abs(min(reached.values())):
            raise DisagreementError(f"training reached {reached} nats a step")
        said = ", ".join(f"{name} {value:.3f}" for name, value in reached.items())
        return f"same bound at the same weights ({gap:+.2g} nats); training reached {said} a step"

    return agree


def training(
    title: str, model: sq.SequenceModel, plain: Callable[[], nn.Module], sizes: Sizes
) -> Task:
    data = chords(sizes)

    def ours() -> Callable[[], sq.SequenceModel]:
        return lambda: model.clone().fit(data, seed=0, valid_fraction=0.0)

    def by_hand() -> Callable[[], float]:
        return lambda: train(plain(), data, sizes.epochs)

    fitted = model.clone().fit(data, seed=1, valid_fraction=0.0)
    return Task(
        f"one epoch of {title}, {sizes.sequences} binary sequences of about {sizes.mean_length} "
        f"steps over {sizes.keys} keys (mean of a {sizes.epochs}-epoch fit)",
        [
            Contender("seqdgm, whole `fit`", ours, lambda m: m.fit_report_.objective[-1]),
            Contender("plain torch loop", by_hand, package="torch"),
        ],
        same_function(fitted, plain(), data, sizes.checks),
        units=sizes.epochs,
    )


def rnn(sizes: Sizes) -> Task:
    model = sq.RNN(
        "gru",
        sizes.hidden,
        emission="bernoulli",
        max_epochs=sizes.epochs,
        learning_rate=LEARNING_RATE,
        batch_size=BATCH,
    )
    return training(
        f"RNN (GRU, {sizes.hidden} units)", model, lambda: PlainRNN(sizes.keys, sizes.hidden), sizes
    )


def dmm(sizes: Sizes) -> Task:
    model = sq.DMM(
        sizes.latent,
        sizes.hidden,
        sizes.hidden,
        emission="bernoulli",
        max_epochs=sizes.epochs,
        learning_rate=LEARNING_RATE,
        batch_size=BATCH,
        kl_warmup=KL_WARMUP,
    )
    return training(
        f"DMM ({sizes.latent} latent, {sizes.hidden} hidden units)",
        model,
        lambda: PlainDMM(sizes.keys, sizes.hidden, sizes.latent),
        sizes,
    )


TASKS: dict[str, Callable[[Sizes], Task]] = {"rnn": rnn, "dmm": dmm}

if __name__ == "__main__":
    main("deep", __doc__, TASKS, full=FULL, tiny=TINY)
