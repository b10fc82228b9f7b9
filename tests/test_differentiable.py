"""Gradients of the particle evidence against the exact likelihood's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Normal

import seqdgm as sq
from seqdgm.inference import smc
from seqdgm.inference.differentiable import OptimalTransport, evidence, soft, stop_gradient
from seqdgm.inference.resampling import RESAMPLERS, gather
from seqdgm.inference.smc import SMCOptions
from seqdgm.prepare import prepare
from seqdgm.types import Batch

NAMES = ("rho", "log_q", "log_r")
THETA = np.array([0.8, np.log(0.6), np.log(0.5)])
Y = np.array([0.4, 1.9, np.nan, -0.6, 0.8])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def within(values: np.ndarray, target: np.ndarray | float, errors: float = 5.0) -> None:
    """Mean over the first axis lies within so many standard errors of the target."""
    stderr = values.std(0, ddof=1) / np.sqrt(len(values))
    gap = np.abs(values.mean(0) - target)
    assert np.all(gap <= errors * stderr), (values.mean(0), target, stderr)


class Linear(sq.StateSpaceModel):
    """An autoregression seen with noise; each replicate has its own copy of the parameters."""

    latent_dim = 1

    def __init__(self, n: int = 1, theta: np.ndarray = THETA) -> None:
        super().__init__()
        for name, value in zip(NAMES, theta, strict=True):
            full = torch.full((n, 1, 1), float(value), dtype=torch.float64)
            setattr(self, name, torch.nn.Parameter(full))

    def initial(self, u):
        return Normal(torch.zeros(1).double(), 1.0)

    def transition(self, z, u):
        return Normal(self.rho * z, self.log_q.exp())

    def emission(self, z, u):
        return Normal(z, self.log_r.exp())

    def gradient(self) -> np.ndarray:
        """(replicate, parameter)."""
        return np.stack([getattr(self, name).grad[:, 0, 0].numpy() for name in NAMES], 1)


class Guided(Linear):
    """With a proposal that depends on the parameters too."""

    def encode(self, batch):
        return torch.cat([batch.x, batch.mask.to(batch.x.dtype)], -1)

    def proposal(self, h, c, u):
        prior = self.prior(h, u)
        x, seen = c[..., :1], c[..., 1:]
        gain = 0.8 * seen * prior.variance / (prior.variance + (2 * self.log_r).exp())
        mean = prior.mean + gain * (x - prior.mean)
        return Normal(mean, 1.2 * prior.stddev * (1 - gain).sqrt())


def exact(theta: np.ndarray = THETA) -> float:
    rho, q, r = theta[0], np.exp(2 * theta[1]), np.exp(2 * theta[2])
    known = sq.LinearGaussianSSM(
        F=[[rho]], H=[[1.0]], Q=[[q]], R=[[r]], m0=[0.0], P0=[[1.0]], diffuse=False
    )
    return float(known.log_prob(Y))


def differences(f, theta: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central finite differences."""
    steps = step * np.eye(len(theta))
    return np.array([(f(theta + e) - f(theta - e)) / (2 * step) for e in steps])


def batch_of(model: sq.StateSpaceModel, n: int, y: np.ndarray = Y) -> Batch:
    _, batch, _ = prepare(model, y, None)
    return batch.take(torch.zeros(n, dtype=torch.int64))


def relative(
    model: Linear, options: SMCOptions, n: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Z estimated over Z, and the gradient of the former, of every replicate."""
    log_z = evidence(model, batch_of(model, n), options, generator(seed))
    ratio = (log_z - exact()).exp()
    ratio.sum().backward()
    return ratio.detach().numpy(), model.gradient()


def predictive(model, h, u, x, mask):
    """log p(x_t | h_t), whose tails are no lighter than those of the weights."""
    law = model.transition(h, u)
    spread = (law.variance + (2 * model.log_r).exp()).sqrt()
    return Normal(law.mean, spread).log_prob(x)[..., 0]


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("resampler", ["stop-gradient", "multinomial", "residual", "killing"])
@pytest.mark.parametrize("kind", ["prior", "proposal", "look-ahead"])
def test_stop_gradient_is_unbiased(kind: str, resampler: str, threshold: float) -> None:
    """E[grad Z estimated] / Z is the gradient of log Z."""
    n = 3000
    model = Guided(n) if kind == "proposal" else Linear(n)
    options = SMCOptions(
        6, resampler, threshold, lookahead=predictive if kind == "look-ahead" else None
    )
    ratio, gradient = relative(model, options, n)
    within(ratio, 1.0)
    within(gradient, differences(exact, THETA))


def test_plain_resampling_leaves_a_bias_in_the_gradient() -> None:
    """The test above can fail: without the weights' derivatives the gradient is off."""
    n = 3000
    _, gradient = relative(Linear(n), SMCOptions(6, RESAMPLERS["systematic"], 1.0), n)
    stderr = gradient.std(0) / np.sqrt(n)
    assert np.max(np.abs(gradient.mean(0) - differences(exact, THETA)) / stderr) > 10


def test_stop_gradient_does_not_change_values() -> None:
    model = Linear(50)
    batch = batch_of(model, 50)
    plain = smc.run(model, batch, SMCOptions(20), generator()).increments.sum(1)
    found = evidence(model, batch, SMCOptions(20), generator())
    assert torch.allclose(found.detach(), plain, rtol=0, atol=1e-12)
    assert not plain.requires_grad


class Switching(sq.StateSpaceModel):
    """Two hidden states, which have no reparameterised draw."""

    latent_dim = 1

    def __init__(self, n: int = 1, theta: float = 0.3) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.full((n, 1, 1), theta).double())

    def initial(self, u):
        return Categorical(logits=torch.cat([self.theta, -self.theta], -1)[..., None, :])

    def transition(self, z, u):
        sign = (1 - 2 * z)[..., None] * (0.5 + self.theta[..., None])
        return Categorical(logits=torch.cat([sign, -sign], -1))

    def emission(self, z, u):
        return Normal(1.5 * z + self.theta, 1.0)


def exhaustive(theta: np.ndarray) -> float:
    """Log-likelihood of `Switching` as a sum over all paths."""
    t = theta[0]
    first = np.exp([t, -t]) / np.exp([t, -t]).sum()
    total = 0.0
    for path in np.ndindex(*[2] * len(Y)):
        p = first[path[0]]
        for before, now in itertools.pairwise(path):
            logit = (1 - 2 * before) * (0.5 + t)
            row = np.exp([logit, -logit])
            p *= row[now] / row.sum()
        for state, x in zip(path, Y, strict=True):
            if np.isfinite(x):
                p *= np.exp(-0.5 * (x - 1.5 * state - t) ** 2) / np.sqrt(2 * np.pi)
        total += p
    return float(np.log(total))


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_discrete_states_enter_by_their_score(threshold: float) -> None:
    n, theta = 4000, np.array([0.3])
    model = Switching(n)
    log_z = evidence(model, batch_of(model, n), SMCOptions(8, threshold=threshold), generator(1))
    ratio = (log_z - exhaustive(theta)).exp()
    ratio.sum().backward()
    within(ratio.detach().numpy(), 1.0)
    within(model.theta.grad[:, 0, 0].numpy(), differences(exhaustive, theta)[0])


def test_soft_resampling_is_unbiased_in_value_only() -> None:
    n = 3000
    options = SMCOptions(6, soft(0.5), 1.0)
    ratio, gradient = relative(Linear(n), options, n)
    within(ratio, 1.0)
    # Beside the plain scheme, it leaves less of the bias.
    _, plain = relative(Linear(n), SMCOptions(6, RESAMPLERS["systematic"], 1.0), n)
    target = differences(exact, THETA)
    bias = np.abs(gradient.mean(0) - target).max()
    assert bias < 0.8 * np.abs(plain.mean(0) - target).max()


def test_soft_weights_make_up_for_the_mixture() -> None:
    log_weights = torch.tensor([[0.7, 0.2, 0.1, 0.0]]).double().log().expand(20_000, 4)
    out = soft(0.4)(log_weights, generator())
    carried = torch.zeros(20_000, 4).double()
    carried.scatter_add_(1, out.ancestors, out.log_weights.exp())
    within(carried.numpy()[:, :3], np.array([0.7, 0.2, 0.1]))
    assert torch.equal(gather(log_weights, out.ancestors).isinf(), out.ancestors == 3)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="alpha"):
        soft(1.0)
    with pytest.raises(ValueError, match="epsilon"):
        OptimalTransport(0.0)
    with pytest.raises(ValueError, match="neither a look-ahead"):
        evidence(
            Linear(),
            batch_of(Linear(), 1),
            SMCOptions(5, OptimalTransport(), lookahead="mean"),
            generator(),
        )
    reference = smc.Reference(torch.zeros(1, 5, 1))
    with pytest.raises(ValueError, match="no gradient"):
        evidence(Linear(), batch_of(Linear(), 1), SMCOptions(5, reference=reference), generator())


# -------------------------------------------------------------------------- optimal transport


def cloud(seed: int = 0, count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    random = generator(seed)
    x = torch.randn(3, count, 2, dtype=torch.float64, generator=random)
    log_weights = 2 * torch.randn(3, count, dtype=torch.float64, generator=random)
    return x, torch.log_softmax(log_weights, 1)


@pytest.mark.parametrize("epsilon", [0.02, 0.5])
def test_transport_has_both_marginals_and_keeps_the_mean(epsilon: float) -> None:
    x, log_weights = cloud(count=50)
    log_weights[0, 3] = -torch.inf
    log_weights = torch.log_softmax(log_weights, 1)
    out = OptimalTransport(epsilon).bind(x)(log_weights, generator())
    plan = out.transport / 50
    assert (plan >= 0).all()
    assert torch.allclose(plan.sum(2), torch.full((3, 50), 1 / 50).double(), atol=1e-12)
    assert torch.allclose(plan.sum(1), log_weights.exp(), rtol=0, atol=1e-10)
    mean = (log_weights.exp()[..., None] * x).sum(1)
    assert torch.allclose((out.transport @ x).mean(1), mean, atol=1e-8)
    assert not (out.ancestors[0] == 3).any()


def test_little_regularisation_sorts_the_line() -> None:
    """In one dimension the optimal plan is the monotone coupling."""
    x = torch.tensor([[[0.3], [-1.0], [2.0], [0.9]]]).double()
    weights = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).double()
    plan = OptimalTransport(0.005).plan(x, weights.log())
    wanted = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]).double() / 4
    assert torch.allclose(plan[0], wanted, atol=1e-4)


def test_gradient_of_the_plan_is_that_of_the_optimum() -> None:
    x, log_weights = (part[:2] for part in cloud(count=5))
    transport = OptimalTransport(0.2, tolerance=1e-13)
    arguments = (x.requires_grad_(), log_weights.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x, w: transport.plan(x, torch.log_softmax(w, 1)), arguments, rtol=1e-4
    )


@pytest.mark.parametrize("threshold", [0.6, 1.0])
def test_transport_makes_the_filter_a_smooth_function(threshold: float) -> None:
    """With the same random numbers, its gradient is that of its own value."""
    options = SMCOptions(12, OptimalTransport(0.3, tolerance=1e-13), threshold)

    def value(theta: np.ndarray) -> float:
        model = Linear(1, theta)
        return float(evidence(model, batch_of(model, 1), options, generator(3)).detach())

    model = Linear()
    evidence(model, batch_of(model, 1), options, generator(3)).sum().backward()
    np.testing.assert_allclose(model.gradient()[0], differences(value, THETA), rtol=1e-4, atol=1e-6)


def test_transport_is_consistent() -> None:
    """Value and gradient approach the exact ones as the particles grow in number."""
    gaps, target = [], differences(exact, THETA)
    for count, n in ((5, 150), (20, 60), (60, 20)):
        model = Linear(n)
        options = SMCOptions(count, OptimalTransport(0.05), 1.0)
        log_z = evidence(model, batch_of(model, n), options, generator(5))
        log_z.sum().backward()
        gaps.append(
            (abs(float(log_z.detach().mean()) - exact()), model.gradient().mean(0) - target)
        )
    assert gaps[2][0] < 0.3 * gaps[0][0]
    assert np.linalg.norm(gaps[2][1]) < 0.3 * np.linalg.norm(gaps[0][1])


def test_transport_needs_a_continuous_memory() -> None:
    with pytest.raises(ValueError, match="no real numbers"):
        OptimalTransport().bind(torch.zeros(1, 4, 1, dtype=torch.int64))


def test_transport_that_does_not_converge_is_an_error() -> None:
    x, log_weights = cloud()
    with pytest.raises(ValueError, match="did not converge"):
        OptimalTransport(1e-3, max_iterations=2).plan(x, log_weights)


def test_stop_gradient_wraps_any_scheme() -> None:
    log_weights = torch.log_softmax(torch.tensor([[0.1, 1.0, -0.4]]).double(), 1).requires_grad_()
    out = stop_gradient(RESAMPLERS["stratified"])(log_weights, generator())
    (slope,) = torch.autograd.grad(out.log_weights.sum(), log_weights)
    wanted = torch.bincount(out.ancestors[0], minlength=3).double()
    assert torch.equal(slope[0], wanted)
