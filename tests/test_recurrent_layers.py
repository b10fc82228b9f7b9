"""Recurrent layers of a size at which compiled loops take over, against torch's own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from seqdgm.nn import MeanFieldEncoder, RecurrentCell, SmoothingEncoder, fused_cells
from seqdgm.nn.fused_recurrence import Weights, recur, recur_step_by_step
from seqdgm.nn.ragged import Ragged
from seqdgm.nn.recurrent import KINDS, Kind

LENGTHS = torch.tensor([4, 9, 1, 6, 9, 2, 5])
PRECISION = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
GATED: list[Kind] = ["gru", "lstm"]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the compiled loops whatever the size."""
    monkeypatch.setattr(fused_cells, "WORTH", 0)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def by_torch(cell: RecurrentCell, x: Tensor, backwards: bool) -> Tensor:
    """torch's layer, one series after another; 0 beyond its end."""
    out = []
    for n, length in enumerate(LENGTHS.tolist()):
        read = x[n, :length].flip(0) if backwards else x[n, :length]
        h, _ = cell.rnn(read, tuple(cell.start) if cell.kind == "lstm" else cell.start[0])
        h = h.flip(0) if backwards else h
        out.append(torch.cat([h, h.new_zeros(len(x[n]) - length, h.shape[1])]))
    return torch.stack(out)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
def test_compiled_cells_equal_those_of_torch(
    kind: Kind, backwards: bool, dtype: torch.dtype, tolerance: float
) -> None:
    cell = RecurrentCell(kind, 3, 37, layers=2).to(dtype)
    for k, parameter in enumerate(cell.parameters()):
        parameter.data = 0.4 * random(*parameter.shape, dtype=dtype, seed=k)
    x = random(7, 9, 3, dtype=dtype, seed=50).requires_grad_()
    own = cell.run(x, lengths=LENGTHS, backwards=backwards)
    theirs = by_torch(cell, x, backwards)
    assert_close([own], [theirs], tolerance)
    weights = random(*own.shape, dtype=dtype, seed=51)
    wanted = [x, *cell.parameters()]
    gradients = [
        torch.autograd.grad(out, wanted, weights, retain_graph=True) for out in (own, theirs, own)
    ]
    assert_close(gradients[0], gradients[1], 10 * tolerance)
    # Nothing that a second turn needs was written over.
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[2], strict=True))


@pytest.mark.parametrize("kind", GATED)
def test_the_size_decides_what_is_compiled(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = RecurrentCell(kind, 3, 400)
    x = random(20, 30, 3, dtype=torch.float32)
    found = []
    for worth in (2**17, 2**30):
        monkeypatch.setattr(fused_cells, "WORTH", worth)
        out = cell.run(x)
        assert fused_cells.pays(out.flatten(0, 1)) == (worth == 2**17)
        found.append(torch.autograd.grad(out.square().sum(), tuple(cell.parameters())))
    assert_close(*found, 1e-5)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("wanted", ["both", "first", "last", "none"])
def test_inputs_side_by_side_have_the_gradients_that_are_asked_for(kind: str, wanted: str) -> None:
    cell = RecurrentCell(kind, 5, 4).double()  # type: ignore[arg-type]
    parts = [random(7, 9, 2, seed=1), random(7, 9, 3, seed=2)]
    chosen = [
        p for p, name in zip(parts, ("first", "last"), strict=True) if wanted in (name, "both")
    ]
    for part in chosen:
        part.requires_grad_()
    leaves = [*chosen, *cell.parameters()]
    apart = cell.run(parts, lengths=LENGTHS)
    whole = cell.run(torch.cat(parts, -1), lengths=LENGTHS)
    assert torch.equal(apart, whole)
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (apart, whole)]
    assert_close(*gradients, 1e-12)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_layer_equals_its_steps(kind: str) -> None:
    gates = {"gru": 12, "lstm": 16}.get(kind, 4)
    ragged = Ragged.of(LENGTHS, 9)
    rows = len(ragged.place)
    shapes = [(gates, 3), (gates, 4), (gates,), (gates,), (rows, 1), (rows, 2)]
    shapes += [(7, 4)] * (2 if kind == "lstm" else 1)
    tensors = [random(*shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]
    given = kind, tensors[4:6], tuple(tensors[6:]), Weights(*tensors[:4]), ragged
    found = [layer(*given) for layer in (recur, recur_step_by_step)]
    assert_close(found[:1], found[1:], 1e-12)
    weights = random(rows, 4, seed=99)
    assert_close(*(torch.autograd.grad(out, tensors, weights) for out in found), 1e-11)


def test_known_inputs_of_an_encoder_hand_their_gradient_on() -> None:
    encoder = SmoothingEncoder(2, 6, inputs_dim=3).double()
    x, u = random(7, 9, 2), random(7, 9, 3, seed=1).requires_grad_()
    mask = random(7, 9, 2, seed=2) > 0
    weights = random(7, 9, 6, seed=3)
    out = encoder(x, mask, u, LENGTHS)
    valid = (torch.arange(9) < LENGTHS[:, None])[..., None]
    seen = mask & valid
    read = torch.cat([torch.where(seen, x, 0.0), seen.double(), torch.where(valid, u, 0.0)], -1)
    plain = by_torch(encoder.cell, read, backwards=True)
    assert_close([out], [plain], 1e-12)
    wanted = [u, *encoder.cell.parameters()]
    assert_close(*(torch.autograd.grad(y, wanted, weights) for y in (out, plain)), 1e-11)


def test_the_mean_field_encoder_is_one_rectified_layer() -> None:
    encoder = MeanFieldEncoder(2, 6, inputs_dim=1).double()
    x, u, mask = random(3, 5, 2), random(3, 5, 1, seed=1), random(3, 5, 2, seed=2) > 0
    (layer,) = (m for m in encoder.modules() if isinstance(m, nn.Linear))
    read = torch.cat([torch.where(mask, x, 0.0), mask.double(), u], -1)
    expected = (read @ layer.weight.T + layer.bias).clamp_min(0.0)
    torch.testing.assert_close(encoder(x, mask, u, torch.tensor([5, 5, 5])), expected)
