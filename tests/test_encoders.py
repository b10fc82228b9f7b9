"""Inference networks by name: what each of them reads, and what none of them may read."""

from __future__ import annotations

import pytest
import torch

import seqdgm as sq
from seqdgm.nn.recurrent import KINDS

NAMES = ["mean-field", "filtering", "smoothing", "bidirectional"]
LENGTHS = torch.tensor([7, 4, 1])
AHEAD = {"mean-field": (3, 3), "filtering": (3, 6), "smoothing": (0, 3), "bidirectional": (0, 6)}


def encoder(name: str, kind: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sq.DMM(2, 4, 4)
        model.build(2, 0)
        return model.make_encoder(name, 5, 2, 3, kind)


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    x, u = (torch.randn((3, 7, n), generator=random) for n in (2, 3))
    return x, torch.rand((3, 7, 2), generator=random) > 0.3, u


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_missing_values_and_padding_are_never_read(name, kind):
    net, (x, mask, u) = encoder(name, kind), given()
    valid = (torch.arange(7) < LENGTHS[:, None])[..., None]
    plain = net(x, mask, u, LENGTHS)
    assert (plain.masked_select(~valid) == 0).all()
    x = torch.where(mask & valid, x, torch.nan).requires_grad_()
    spoilt = net(x, mask | ~valid, torch.where(valid, u, torch.nan), LENGTHS)
    assert torch.equal(spoilt, plain)
    spoilt.square().sum().backward()
    for tensor in (x, *net.parameters()):
        assert torch.isfinite(tensor.grad).all()
    assert (x.grad[~(mask & valid).expand_as(x)] == 0).all()
    # Another padding changes nothing either.
    short = net(x[1:2, :4], mask[1:2, :4], u[1:2, :4], LENGTHS[1:2])
    torch.testing.assert_close(short[0], plain[1, :4])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_each_network_reads_its_steps_and_the_mask(name, kind):
    net, (x, mask, u) = encoder(name, kind), given()
    mask[:] = True
    plain = net(x, mask, u, LENGTHS)
    changed = x.clone()
    changed[0, 3] += 1
    unseen = mask.clone()
    unseen[0, 3, 0] = False
    zero = x.clone()
    zero[0, 3, 0] = 0.0
    first, last = AHEAD[name]
    for pair in (
        (plain, net(changed, mask, u, LENGTHS)),
        # A missing value is not taken for a zero.
        (net(zero, mask, u, LENGTHS), net(zero, unseen, u, LENGTHS)),
    ):
        moved = (pair[0] - pair[1]).abs().amax(-1) > 0
        assert moved[0].nonzero()[:, 0].tolist() == list(range(first, last + 1))
        assert not moved[1:].any()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="inference_network='forward' is unknown; choose one of"):
        encoder("forward", "gru")
    with pytest.raises(ValueError, match="unknown recurrent cell 'rnn'"):
        encoder("smoothing", "rnn")
