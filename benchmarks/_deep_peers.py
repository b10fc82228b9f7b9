"""Deep Markov models as others would train them: a loop written by hand in torch, and Pyro."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEARNING_RATE, WEIGHT_DECAY, CLIP, BATCH = 8e-4, 1e-4, 10.0, 20
MIN_SCALE = 1e-3


def padded(sequences: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Sequences one below the other, and their lengths."""
    tensors = [torch.from_numpy(s).float() for s in sequences]
    lengths = torch.tensor([len(s) for s in sequences])
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True), lengths


def backwards(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence in reverse, within its own length."""
    t = torch.arange(x.shape[1])
    back = lengths[:, None] - 1 - t
    place = torch.where(back >= 0, back, t)[..., None]
    return x.gather(1, place.expand_as(x))


def log_bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """Log-probability of each vector of keys."""
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


class PlainDMM(nn.Module):
    """Deep Markov model of Krishnan, Shalit and Sontag (2017), step by step as its equations.

    Parameters are named as in seqdgm, whose weights it can take over.
    """

    def __init__(self, keys: int, latent: int, hidden: int, encoder: int) -> None:
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
        self.encoder.cell.rnn = nn.RNN(2 * keys, encoder, nonlinearity="relu", batch_first=True)
        self.encoder.cell.start = nn.Parameter(torch.zeros(1, 1, encoder))
        self.combiner = nn.Module()
        self.combiner.state = nn.Linear(latent, encoder)
        self.combiner.out = nn.Linear(encoder, 2 * latent)
        self.combiner.start = nn.Parameter(torch.zeros(latent))

    def forward(self, x: Tensor, lengths: Tensor, beta: float) -> Tensor:
        """One-sample estimate of each step's share of the evidence lower bound."""
        summaries = self._read_backwards(x, lengths)
        z = self.z0.expand(len(x), -1)
        terms = []
        for t in range(x.shape[1]):
            prior_loc, prior_scale = self._transition(z)
            hidden = 0.5 * (torch.tanh(self.combiner.state(z)) + summaries[:, t])
            loc, raw = self.combiner.out(hidden).chunk(2, -1)
            scale = F.softplus(raw) + MIN_SCALE
            z = loc + scale * torch.randn_like(scale)
            ratio, shift = scale / prior_scale, (loc - prior_loc) / prior_scale
            divergence = 0.5 * (ratio**2 + shift**2 - 1 - 2 * ratio.log()).sum(-1)
            logits = self.head["linear"](self.features(z))
            terms.append(log_bernoulli(logits, x[:, t]) - beta * divergence)
        return torch.stack(terms, 1)

    def _transition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        for_gate, for_proposed = F.relu(self.gated["hidden"](z)).chunk(2, -1)
        gate = torch.sigmoid(self.gated["gate"](for_gate))
        proposed = self.gated["proposed"](for_proposed)
        loc = (1 - gate) * self.gated["linear"](z) + gate * proposed
        return loc, F.softplus(self.gated["scale"](F.relu(proposed))) + MIN_SCALE

    def _read_backwards(self, x: Tensor, lengths: Tensor) -> Tensor:
        seen = (torch.arange(x.shape[1]) < lengths[:, None])[..., None].expand_as(x)
        read = backwards(torch.cat([x, seen.to(x.dtype)], -1), lengths)
        start = self.encoder.cell.start[0][:, None].expand(-1, len(x), -1).contiguous()
        out, _ = self.encoder.cell.rnn(read, start)
        return backwards(out, lengths)


def train_by_hand(model: nn.Module, sequences: Sequence[np.ndarray]) -> Callable[[], float]:
    """A call that trains one epoch and gives its objective in nats a step."""
    x, lengths = padded(sequences)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def epoch() -> float:
        total = 0.0
        for rows in torch.randperm(len(x)).split(BATCH):
            part = lengths[rows]
            steps = int(part.max())
            terms = model(x[rows, :steps], part, 1.0)
            inside = torch.arange(steps) < part[:, None]
            gain = torch.where(inside, terms, 0.0).sum()
            optimizer.zero_grad()
            (-gain / inside.sum()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            total += gain.item()
        return total / int(lengths.sum())

    return epoch


class _PyroTransition(nn.Module):
    def __init__(self, latent: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, latent), nn.Sigmoid()
        )
        self.proposed = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, latent)
        )
        self.linear, self.scale = nn.Linear(latent, latent), nn.Linear(latent, latent)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gate, proposed = self.gate(z), self.proposed(z)
        loc = (1 - gate) * self.linear(z) + gate * proposed
        return loc, F.softplus(self.scale(F.relu(proposed)))


class PyroDMM(nn.Module):
    """The same networks in the form of Pyro's tutorial on the model: one sample site a step."""

    def __init__(self, keys: int, latent: int, hidden: int, encoder: int) -> None:
        super().__init__()
        self.latent = latent
        self.emitter = nn.Sequential(
            nn.Linear(latent, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, keys),
            nn.Sigmoid(),
        )
        self.transition = _PyroTransition(latent, hidden)
        self.from_state = nn.Linear(latent, encoder)
        self.to_loc, self.to_scale = nn.Linear(encoder, latent), nn.Linear(encoder, latent)
        self.rnn = nn.RNN(keys, encoder, nonlinearity="relu", batch_first=True)
        self.z0, self.zq0 = nn.Parameter(torch.zeros(latent)), nn.Parameter(torch.zeros(latent))
        self.h0 = nn.Parameter(torch.zeros(1, 1, encoder))

    def model(self, x: Tensor, back: Tensor, mask: Tensor, lengths: Tensor) -> None:
        """The generative story."""
        import pyro
        from pyro import distributions as dist

        pyro.module("dmm", self)
        z = self.z0.expand(len(x), -1)
        with pyro.plate("series", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                loc, scale = self.transition(z)
                law = dist.Normal(loc, scale).mask(mask[:, t : t + 1]).to_event(1)
                z = pyro.sample(f"z{t}", law)
                emission = dist.Bernoulli(self.emitter(z)).mask(mask[:, t : t + 1]).to_event(1)
                pyro.sample(f"x{t}", emission, obs=x[:, t])

    def guide(self, x: Tensor, back: Tensor, mask: Tensor, lengths: Tensor) -> None:
        """The inference network."""
        import pyro
        from pyro import distributions as dist

        pyro.module("dmm", self)
        packed = nn.utils.rnn.pack_padded_sequence(
            back, lengths, batch_first=True, enforce_sorted=False
        )
        out, _ = self.rnn(packed, self.h0.expand(-1, len(x), -1).contiguous())
        out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        summaries = backwards(out, lengths)
        z = self.zq0.expand(len(x), -1)
        with pyro.plate("series", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                hidden = 0.5 * (torch.tanh(self.from_state(z)) + summaries[:, t])
                law = dist.Normal(self.to_loc(hidden), F.softplus(self.to_scale(hidden)))
                z = pyro.sample(f"z{t}", law.mask(mask[:, t : t + 1]).to_event(1))


def train_by_pyro(net: PyroDMM, sequences: Sequence[np.ndarray]) -> Callable[[], float]:
    """A call that trains one epoch with Trace_ELBO and gives its objective in nats a step."""
    import pyro
    from pyro.infer import SVI, Trace_ELBO
    from pyro.optim import ClippedAdam

    x, lengths = padded(sequences)
    pyro.clear_param_store()
    optimizer = ClippedAdam({"lr": LEARNING_RATE, "clip_norm": CLIP, "betas": (0.96, 0.999)})
    svi = SVI(net.model, net.guide, optimizer, Trace_ELBO())

    def epoch() -> float:
        loss = 0.0
        for rows in torch.randperm(len(x)).split(BATCH):
            part = lengths[rows]
            steps = int(part.max())
            batch = x[rows, :steps]
            mask = torch.arange(steps) < part[:, None]
            loss += svi.step(batch, backwards(batch, part), mask, part)
        return -loss / int(lengths.sum())

    return epoch
