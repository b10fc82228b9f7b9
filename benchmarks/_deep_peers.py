"""Deep Markov models as others would train them: a loop written by hand in torch, and Pyro."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from deep import log_bernoulli, padded
from torch import Tensor, nn
from torch.nn import functional as F

LEARNING_RATE, WEIGHT_DECAY, CLIP, BATCH = 8e-4, 1e-4, 10.0, 20
MIN_SCALE = 1e-3  # added to every scale, as seqdgm does


def backwards(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence in reverse, within its own length."""
    t = torch.arange(x.shape[1])
    back = lengths[:, None] - 1 - t
    place = torch.where(back >= 0, back, t)[..., None]
    return x.gather(1, place.expand_as(x))


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


class PlainLSTM(nn.Module):
    """`torch.nn.LSTM` over the previous step, parameters named as in seqdgm."""

    def __init__(self, keys: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.Module()
        self.rnn.rnn = nn.LSTM(keys, hidden, batch_first=True)
        self.rnn.start = nn.Parameter(torch.zeros(2, 1, hidden))
        self.head = nn.ModuleDict({"linear": nn.Linear(hidden, keys)})

    def forward(self, x: Tensor, lengths: Tensor, beta: float) -> Tensor:
        """Log-likelihood of each step."""
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        start = tuple(part[:, None].expand(-1, len(x), -1).contiguous() for part in self.rnn.start)
        out, _ = self.rnn.rnn(before, start)
        return log_bernoulli(self.head["linear"](out), x)


def train_by_hand(model: nn.Module, sequences: list[np.ndarray]) -> Callable[[], float]:
    """A call that trains one more epoch and gives its objective in nats a step."""
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
        return loc, F.softplus(self.scale(F.relu(proposed))) + MIN_SCALE


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
                scale = F.softplus(self.to_scale(hidden)) + MIN_SCALE
                law = dist.Normal(self.to_loc(hidden), scale)
                z = pyro.sample(f"z{t}", law.mask(mask[:, t : t + 1]).to_event(1))

    def take_over(self, weights: Mapping[str, Tensor]) -> None:
        """Set the networks to weights of `PlainDMM`."""
        keys = self.rnn.weight_ih_l0.shape[1]
        own = dict(self.named_parameters())
        hidden, reads = weights["gated.hidden.weight"], weights["encoder.cell.rnn.weight_ih_l0"]
        half = len(hidden) // 2
        given = {
            "transition.gate.0.weight": hidden[:half],
            "transition.gate.0.bias": weights["gated.hidden.bias"][:half],
            "transition.proposed.0.weight": hidden[half:],
            "transition.proposed.0.bias": weights["gated.hidden.bias"][half:],
            "rnn.weight_ih_l0": reads[:, :keys],
            # The columns of the mask, which is one everywhere.
            "rnn.bias_ih_l0": weights["encoder.cell.rnn.bias_ih_l0"] + reads[:, keys:].sum(1),
            "rnn.weight_hh_l0": weights["encoder.cell.rnn.weight_hh_l0"],
            "rnn.bias_hh_l0": weights["encoder.cell.rnn.bias_hh_l0"],
            "h0": weights["encoder.cell.start"],
            "z0": weights["z0"],
            "zq0": weights["z0"],
        }
        for name, source in (("transition.gate.2", "gate"), ("transition.proposed.2", "proposed")):
            given |= _linear(weights, name, f"gated.{source}")
        for name in ("linear", "scale"):
            given |= _linear(weights, f"transition.{name}", f"gated.{name}")
        for name, source in (("0", "features.0"), ("2", "features.2"), ("4", "head.linear")):
            given |= _linear(weights, f"emitter.{name}", source)
        given |= _linear(weights, "from_state", "combiner.state")
        for kind in ("weight", "bias"):
            out = weights[f"combiner.out.{kind}"]
            given[f"to_loc.{kind}"], given[f"to_scale.{kind}"] = out.chunk(2)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(given[name])


def _linear(weights: Mapping[str, Tensor], name: str, source: str) -> dict[str, Tensor]:
    return {f"{name}.{kind}": weights[f"{source}.{kind}"] for kind in ("weight", "bias")}


def train_by_pyro(net: PyroDMM, sequences: list[np.ndarray]) -> Callable[[], float]:
    """A call that trains one more epoch with Trace_ELBO and gives its objective in nats a step."""
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


def pyro_bound(net: PyroDMM, sequences: list[np.ndarray]) -> float:
    """One-sample estimate of the total bound."""
    from pyro.infer import Trace_ELBO

    x, lengths = padded(sequences)
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    given = (x, backwards(x, lengths), mask, lengths)
    return -Trace_ELBO().loss(net.model, net.guide, *given)
