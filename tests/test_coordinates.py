"""Unconstrained coordinates of parameters: the chain rule, the way there and back, and errors."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.distributions import Normal, constraints

import seqdgm as sq
from seqdgm.inference.coordinates import Coordinates


class Bounded(sq.StateSpaceModel):
    latent_dim = 1
    domains: ClassVar = {
        "rho": constraints.interval(-1.0, 1.0),
        "root": constraints.positive,
        "held": constraints.positive,
    }

    def __init__(self, rho: float = 0.4) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.tensor(rho).double())
        self.root = nn.Parameter(torch.tensor([[1.0, 0.2], [0.3, 2.0]]).double())
        self.held = nn.Parameter(torch.tensor(1.0).double(), requires_grad=False)
        self.shift = nn.Parameter(torch.tensor([0.5]).double())

    def initial(self, u):
        return Normal(torch.zeros(1).double(), 1.0)

    def transition(self, z, u):
        return Normal(self.rho * z, 1.0)

    def emission(self, z, u):
        return Normal(z + self.shift, 1.0)


def value(model: Bounded) -> torch.Tensor:
    return model.rho**3 + (model.root @ model.root.mT).sum().log() + model.shift.sum() ** 2


def test_gradients_follow_the_chain_rule() -> None:
    """Against central differences of a function of the coordinates."""
    model = Bounded()
    at = Coordinates.of(model)
    assert set(at.free) == {"rho", "root", "shift"}
    assert at.free["shift"] is model.shift
    given = torch.autograd.grad(value(model), list(at.parameters.values()))
    found = at.pull_back(dict(zip(at.parameters, given, strict=True)))
    start = at.snapshot()
    for name, free in start.items():
        for k in range(free.numel()):
            ends = []
            for sign in (1, -1):
                moved = free.clone()
                moved.view(-1)[k] += sign * 1e-6
                at.restore(start | {name: moved})
                ends.append(value(model).item())
            slope = (ends[0] - ends[1]) / 2e-6
            assert found[name].reshape(-1)[k].item() == pytest.approx(slope, abs=1e-8)


def test_coordinates_go_there_and_back() -> None:
    model = Bounded()
    at = Coordinates.of(model)
    start = at.snapshot()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    at.restore({name: free + 30.0 for name, free in start.items()})
    assert -1 < model.rho.item() <= 1
    assert (model.root > 0).all()
    at.restore(start)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name])
    with torch.no_grad():
        model.rho.fill_(-0.9)
    at.read()
    assert at.transforms["rho"](at.free["rho"]).item() == pytest.approx(-0.9)


def test_bad_domains_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'rho' of Bounded starts at 1\.5, which does not lie"):
        Coordinates.of(Bounded(1.5))
    model = Bounded()
    model.domains = {"sigma": constraints.positive}
    with pytest.raises(ValueError, match=r"domains names \['sigma'\], which are not among"):
        Coordinates.of(model)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to learn"):
        Coordinates.of(model)
