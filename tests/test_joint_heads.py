"""Joint heads against torch, exhaustive sums, grids and automatic differentiation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import distributions as td

import seqdgm as sq
from seqdgm.nn import distributions as sd
from seqdgm.nn import emission_head
from seqdgm.nn.flow import Coupling, CouplingFlow
from seqdgm.nn.nade import NADE, conditionals
from seqdgm.testing import CHECKS, check_model

F64 = torch.float64
NAMES = ["gaussian-full", "gaussian-lowrank", "nade", "flow"]
GAUSSIAN = NAMES[:2]


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(name: str, shape: tuple[int, ...] = (6, 200, 3)) -> np.ndarray:
    """Correlated columns with different marginals."""
    rng = np.random.default_rng(0)
    mix = np.array([[1.0, 0.0, 0.0], [1.5, 1.0, 0.0], [-0.5, 0.3, 0.7]])
    x = np.array([3.0, -1.0, 0.2]) + rng.normal(size=shape) @ mix.T
    return (x > 0.5).astype(float) if name == "nade" else x


def perturbed(name: str, in_dim: int, dim: int, **options):
    """A head in float64 whose weights are all far from their start."""
    head = emission_head(name, in_dim, dim, **options).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.4 * torch.randn(p.shape, dtype=F64))
    return head


def values_of(name: str, *shape: int) -> torch.Tensor:
    x = torch.randn(shape, dtype=F64)
    return (x > 0).double() if name == "nade" else x


def nade(dim: int, hidden: int, batch: tuple[int, ...] = ()) -> NADE:
    def normal(*shape):
        return torch.randn(shape, dtype=F64)

    return NADE(
        normal(*batch, dim), normal(*batch, hidden), 2 * normal(dim, hidden), normal(dim, hidden)
    )


def flow(dim: int, batch: tuple[int, ...] = (), bend: float = 0.5) -> CouplingFlow:
    layers = torch.nn.ModuleList(Coupling(dim, 6, bool(i % 2)) for i in range(4)).double()
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(bend * torch.randn(p.shape, dtype=F64))
    loc, context = torch.randn((*batch, dim), dtype=F64), torch.randn((*batch, 24), dtype=F64)
    return CouplingFlow(loc, 0.5 + torch.rand((*batch, dim), dtype=F64), context, layers)


def all_binary(dim: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=dim)), dtype=F64)


# --------------------------------------------------------------------------------- every head


@pytest.mark.parametrize("name", NAMES)
def test_shapes_masks_and_batches_agree(name):
    head = perturbed(name, 5, 3)
    features, x = torch.randn(4, 6, 5, dtype=F64), values_of(name, 4, 6, 3)
    dist = head(features)
    assert (dist.batch_shape, dist.event_shape) == ((4, 6), (3,))
    value = sd.log_prob(dist, x)
    assert value.shape == (4, 6)
    torch.testing.assert_close(sd.log_prob(dist, x, torch.ones_like(x, dtype=torch.bool)), value)
    mask = torch.rand(x.shape) > 0.4
    mask[0, 0], mask[0, 1] = False, True
    partly = sd.log_prob(dist, torch.where(mask, x, torch.nan), mask)
    assert partly[0, 0] == 0
    torch.testing.assert_close(partly[0, 1], value[0, 1])
    one = sd.log_prob(head(features[1, 2]), x[1, 2], mask[1, 2])
    torch.testing.assert_close(partly[1, 2], one)
    # Particles share the observation; laws of single steps can be stacked again.
    wide = sd.log_prob(head(features[:, None]), x[:, None], mask[:, None])
    torch.testing.assert_close(wide[:, 0], partly)
    again = sd.stack([head(features[:, t]) for t in range(6)], 1)
    torch.testing.assert_close(sd.log_prob(again, x, mask), partly)
    grown = sd.expand(head(features[:1]), (4, 6), 3)
    torch.testing.assert_close(sd.log_prob(grown, x[:1].expand(4, 6, 3))[3], value[0])
    drawn = sd.sample(dist, generator(), (7,))
    assert drawn.shape == (7, 4, 6, 3)
    assert torch.equal(drawn, sd.sample(dist, generator(), (7,)))
    assert sd.mean(dist).shape == sd.variance(dist).shape == (4, 6, 3)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_with_missing_values(name):
    head = perturbed(name, 5, 3).float()
    x = values_of(name, 30, 3).float()
    mask = torch.rand(x.shape) > 0.3
    features = (10 * torch.randn(30, 5)).requires_grad_()
    value = sd.log_prob(head(features), torch.where(mask, x, torch.nan), mask)
    assert value.dtype == torch.float32
    value.sum().backward()
    for tensor in (features, *head.parameters()):
        assert torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_draws_keep_what_was_observed(name):
    dist, x = perturbed(name, 5, 3)(torch.randn(40, 5, dtype=F64)), values_of(name, 40, 3)
    mask = torch.rand(x.shape) > 0.5
    filled = sd.fill_missing(dist, torch.where(mask, x, torch.nan), mask, generator())
    assert torch.equal(filled[mask], x[mask])
    assert torch.isfinite(filled).all()
    assert torch.isfinite(sd.log_prob(dist, filled)).all()


@pytest.mark.parametrize("name", NAMES)
def test_head_starts_at_the_moments_of_the_data(name):
    values = data(name)
    values[0, :7, 0] = np.nan
    head = emission_head(name, 4, 4).double()
    before = head.linear.bias[3].item()
    head.initialise_bias(np.concatenate([values, np.full((6, 200, 1), np.nan)], -1))
    assert head.linear.bias[3].item() == before
    dist = head(torch.zeros(4, dtype=F64))
    # The conditional structure of NADE starts small, but not at nothing; mean of 256 draws.
    near = {"nade": {"atol": 0.06}, "flow": {"atol": 0.4}}.get(name, {"rtol": 1e-9})
    np.testing.assert_allclose(sd.mean(dist)[:3].detach(), np.nanmean(values, (0, 1)), **near)
    if name in GAUSSIAN:
        rows = values.reshape(-1, 3)
        cov = np.cov(rows[np.isfinite(rows).all(1)].T)
        spread = np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
        found = dist.covariance_matrix[:3, :3].detach().numpy()
        np.testing.assert_allclose(found / spread, cov / spread, atol=0.1)
        np.testing.assert_allclose(np.diag(found), np.nanvar(values, (0, 1)), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_few_or_constant_data_give_a_finite_start(name):
    for values in (np.zeros((1, 3, 2)), np.full((1, 3, 2), np.nan), np.ones((1, 30, 2))):
        head = emission_head(name, 4, 2)
        head.initialise_bias(values)
        assert torch.isfinite(head.linear.bias).all()
        assert torch.isfinite(sd.log_prob(head(torch.zeros(4)), torch.ones(2))).all()


def test_options_are_checked():
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        emission_head("gaussian-lowrank", 4, 3, rank=0)
    with pytest.raises(ValueError, match="needs at least two; for one column choose 'mixture'"):
        emission_head("flow", 4, 1)
    with pytest.raises(ValueError, match="unknown emission 'nad'"):
        sq.RNN(emission="nad", transform="log")
    with pytest.raises(
        ValueError, match=r"series 0, column 'y0', at 0: the value 0\.5 cannot occur"
    ):
        sq.RNN(hidden_dim=4, emission="nade", max_epochs=1).fit(np.full((9, 2), 0.5), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["RNN", "DMM"])
def test_models_conform(model, name):
    few = {"max_epochs": 2, "patience": 5}
    y = data(name)[0, :30]
    net = sq.RNN("gru", 5, emission=name, **few) if model == "RNN" else sq.DMM(2, 5, 5, name, **few)
    assert check_model(net, y) == tuple(CHECKS)


# ------------------------------------------------------------------------------------ Gaussian


@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_marginals_equal_those_of_its_covariance(name):
    dist = perturbed(name, 4, 6)(torch.randn(4, dtype=F64))
    mean, cov = dist.mean.detach(), dist.covariance_matrix.detach()
    joint = td.MultivariateNormal(mean, cov)
    x = torch.randn(64, 6, dtype=F64)
    torch.testing.assert_close(sd.log_prob(dist, x).detach(), joint.log_prob(x))
    mask = all_binary(6).bool()
    value = sd.log_prob(dist, torch.where(mask, x, torch.nan), mask).detach()
    for k, seen in enumerate(mask):
        if seen.any():
            part = td.MultivariateNormal(mean[seen], cov[seen][:, seen])
            torch.testing.assert_close(value[k], part.log_prob(x[k, seen]))


@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_conditional_draws_have_its_moments(name):
    dist = perturbed(name, 4, 5, **({"rank": 2} if name == "gaussian-lowrank" else {}))(
        torch.randn(4, dtype=F64)
    )
    mean, cov = dist.mean.detach(), dist.covariance_matrix.detach()
    x, mask = torch.randn(5, dtype=F64), torch.tensor([True, False, True, False, False])
    n = 4_000
    drawn = sd.fill_missing(
        sd.expand(dist, (n,), 5), x.expand(n, 5), mask.expand(n, 5), generator()
    )
    drawn = drawn.detach()[:, ~mask]
    gain = cov[~mask][:, mask] @ torch.linalg.inv(cov[mask][:, mask])
    law = cov[~mask][:, ~mask] - gain @ cov[mask][:, ~mask]
    error = drawn.mean(0) - (mean[~mask] + gain @ (x - mean)[mask])
    assert (error.abs() < 5 * (law.diagonal() / n).sqrt()).all()
    spread = (torch.outer(law.diagonal(), law.diagonal()) + law.square()).div(n).sqrt()
    assert ((drawn.T.cov() - law).abs() < 5 * spread).all()


# ---------------------------------------------------------------------------------------- NADE


def plain_logits(x, b, c, w, v):
    """Larochelle and Murray (2011), equations 9 and 10, all conditionals in one cumulative sum."""
    added = x[..., None] * w
    before = added.cumsum(-2) - added
    return b + (torch.sigmoid(c[..., None, :] + before) * v).sum(-1)


def test_nade_sums_to_one():
    dist = nade(6, 5, (3, 1))
    total = sd.log_prob(dist, all_binary(6)).exp().sum(-1)
    np.testing.assert_allclose(total, 1.0, rtol=1e-12)


def test_nade_and_its_gradient_equal_the_plain_formula():
    leaves = [torch.randn(s, dtype=F64) for s in ((9, 7), (9, 4), (7, 4), (7, 4))]
    x = torch.bernoulli(torch.full((9, 7), 0.4, dtype=F64))
    found, wanted = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))
    value, plain = conditionals(x, *found), plain_logits(x, *wanted)
    torch.testing.assert_close(value, plain)
    weight = torch.randn(9, 7, dtype=F64)
    (value * weight).sum().backward()
    (plain * weight).sum().backward()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.autograd.gradcheck(lambda *p: conditionals(x, *p), found)


def test_nade_marginals_equal_exhaustive_sums():
    dist, ways = nade(6, 5), all_binary(6)
    joint = sd.log_prob(dist, ways).exp()
    mask = all_binary(6).bool()
    x = torch.bernoulli(torch.full((64, 6), 0.5, dtype=F64))
    value = sd.log_prob(dist, torch.where(mask, x, torch.nan), mask).exp()
    agrees = ((ways == x[:, None]) | ~mask[:, None]).all(-1)
    np.testing.assert_allclose(value, (agrees * joint).sum(-1), rtol=1e-12)


@pytest.mark.parametrize("seen", [(), (0, 3), (2,), (1, 4)])
def test_nade_draws_have_its_probabilities(seen):
    dist, ways, n = nade(5, 4), all_binary(5), 40_000
    x = torch.ones(5, dtype=F64)
    mask = torch.zeros(5, dtype=torch.bool)
    mask[list(seen)] = True
    drawn = sd.fill_missing(
        sd.expand(dist, (n,), 5), x.expand(n, 5), mask.expand(n, 5), generator()
    )
    p = sd.log_prob(dist, ways).exp() * (ways[:, mask] == 1).all(-1)
    p = p / p.sum()
    code = (drawn @ 2.0 ** torch.arange(4, -1, -1, dtype=F64)).long()
    counts = torch.bincount(code, minlength=32)
    assert (counts[p == 0] == 0).all()
    likely = p > 0
    chi2 = ((counts - n * p).square() / (n * p))[likely].sum()
    dof = int(likely.sum()) - 1
    assert chi2 < dof + 5 * math.sqrt(2 * dof)
    share = (drawn.mean(0) - (p[:, None] * ways).sum(0)).abs()
    assert (share <= 5 * 0.5 / math.sqrt(n)).all()


def test_nade_mean_is_within_its_error():
    dist, ways = nade(6, 5, (50, 1)), all_binary(6)
    exact = (sd.log_prob(dist, ways).exp()[..., None] * ways).sum(1)
    error = sd.mean(dist)[:, 0] - exact
    np.testing.assert_allclose(error[:, 0], 0.0, atol=1e-12)
    assert error.abs().max() < 5 * 0.032


def test_nade_refuses_too_many_missing_elements():
    dist = nade(12, 3, (2, 4))
    mask = torch.ones(2, 4, 12, dtype=torch.bool)
    mask[:, :, 5:] = False  # behind the last observed element: free
    x = torch.zeros(2, 4, 12, dtype=F64)
    assert torch.isfinite(sd.log_prob(dist, x, mask)).all()
    mask[1, 2] = torch.arange(12) > 8
    for act in (sd.log_prob, lambda *a: sd.fill_missing(*a, generator())):
        with pytest.raises(ValueError, match=r"place \(1, 2\): .* misses .*at most 8 before"):
            act(dist, x, mask)


# ---------------------------------------------------------------------------------------- flow


def test_flow_density_equals_the_jacobian_of_its_map():
    dist = flow(5)
    noise = torch.randn(5, dtype=F64)

    def build(v):
        for layer, context in dist._layers():
            v = layer(v, context)
        return dist.tensors[0] + dist.tensors[1] * v

    jacobian = torch.autograd.functional.jacobian(build, noise)
    base = td.Normal(0.0, 1.0).log_prob(noise).sum()
    wanted = base - torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(sd.log_prob(dist, build(noise)), wanted)


def grid(dist: CouplingFlow, n: int = 501, width: float = 12.0):
    """Density of two elements on a grid, and the cell's sides."""
    axes = [
        torch.linspace(-width, width, n, dtype=F64) * s + m
        for m, s in zip(*dist.tensors[:2], strict=True)
    ]
    x = torch.cartesian_prod(*axes)
    with torch.no_grad():
        density = sd.log_prob(dist, x).exp().view(n, n)
    return axes, density, [a[1] - a[0] for a in axes]


def test_flow_integrates_to_one_and_marginals_follow():
    dist = flow(2)
    axes, density, sides = grid(dist)
    assert float(density.sum() * sides[0] * sides[1]) == pytest.approx(1.0, abs=1e-4)
    marginal = density.sum(1) * sides[1]
    places = (marginal > 1e-3 * marginal.max()).nonzero()[::5, 0]
    x = torch.full((len(places), 2), torch.nan, dtype=F64)
    x[:, 0] = axes[0][places]
    value = sd.log_prob(dist, x, ~x.isnan()).detach()
    error = value - marginal[places].log()
    assert error.abs().max() < 1e-4


def test_flow_draws_have_the_moments_of_its_density():
    dist, n = flow(2), 40_000
    (a, b), density, _ = grid(dist)
    p = density / density.sum()
    mean = torch.stack([(p.sum(1) * a).sum(), (p.sum(0) * b).sum()])
    drawn = sd.sample(dist, generator(), (n,))
    second = torch.stack([(p.sum(1) * a**2).sum(), (p.sum(0) * b**2).sum()]) - mean**2
    assert ((drawn.mean(0) - mean).abs() < 5 * (second / n).sqrt()).all()
    assert ((sd.mean(dist) - mean).abs() < 5 * (second / 256).sqrt()).all()
    # Draws given the second element, against the slice of the density.
    k = int(p.sum(0).argmax())
    x = torch.tensor([torch.nan, float(b[k])], dtype=F64).expand(1000, 2)
    filled = sd.fill_missing(sd.expand(dist, (1000,), 2), x, ~x.isnan(), generator())[:, 0]
    line = p[:, k] / p[:, k].sum()
    centre = (line * a).sum()
    spread = (line * (a - centre) ** 2).sum().sqrt()
    assert abs(filled.mean() - centre) < 5 * spread / math.sqrt(1000)


def test_flow_refuses_too_many_missing_elements():
    dist, x = flow(7, (3,)), torch.zeros(3, 7, dtype=F64)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[2, :5] = False
    with pytest.raises(ValueError, match=r"place \(2,\): the vector of 7 misses .*at most 2"):
        sd.log_prob(dist, x, mask)
    mask[2] = False
    assert sd.log_prob(dist, x, mask)[2] == 0


def test_flow_gradients_flow_through_draws_of_whole_vectors_only():
    dist = flow(3, (2,))
    dist = dist.rebuilt([t.clone().requires_grad_() for t in dist.tensors])
    x, mask = torch.zeros(2, 3, dtype=F64), torch.zeros(2, 3, dtype=torch.bool)
    assert sd.fill_missing(dist, x, mask, generator(), True).requires_grad
    mask[0, 0] = True
    with pytest.raises(ValueError, match="no reparameterised draw given a part"):
        sd.fill_missing(dist, x, mask, generator(), True)
