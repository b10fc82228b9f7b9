"""Guided particle filters: the proposals against the optimal one, and the evidence they give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Bernoulli, Gamma, Normal, Poisson, StudentT

import seqdgm as sq
from seqdgm.inference import differentiable, smc
from seqdgm.inference._linearise import Affine, condition, narrow
from seqdgm.inference.proposals import LocalEKF, LocalUKF, make_proposal, predictive
from seqdgm.inference.smc import SMCOptions
from seqdgm.nn import distributions as dist
from seqdgm.prepare import prepare
from seqdgm.types import Inputs

F = [[0.9, 0.2], [-0.1, 0.7]]
H = [[1.0, 0.0], [0.5, 1.0]]
Q = [[0.5, 0.1], [0.1, 0.3]]
R = [[0.04, 0.015], [0.015, 0.06]]
LOCAL = [
    LocalEKF(),
    LocalEKF(iterations=1, inflation=1.5),
    LocalEKF(iterations=1, df=4.0),
    LocalUKF(),
    LocalUKF(alpha=0.3, kappa=1.0, df=5.0),
]


def linear_model() -> sq.LinearGaussianSSM:
    return sq.LinearGaussianSSM(
        F=F, H=H, Q=Q, R=R, m0=[0.5, -0.5], P0=[[1.0, 0.0], [0.0, 2.0]], diffuse=False
    )


def gappy(length: int = 8) -> np.ndarray:
    values = linear_model().sample(length, seed=0).values[0].copy()
    values[2] = np.nan
    values[4, 0] = np.nan
    values[5, 1] = np.nan
    return values


def evidence(model, y, options: SMCOptions, repeats: int, seed: int = 0) -> np.ndarray:
    """Log-evidence of many independent runs, which are series of one batch."""
    _, batch, _ = prepare(model, y, None)
    many = batch.take(torch.zeros(repeats, dtype=torch.int64))
    out = smc.run(model, many, options, torch.Generator().manual_seed(seed))
    return out.increments.sum(1).numpy()


def check_unbiased(log_ratio: np.ndarray) -> None:
    ratio = np.exp(log_ratio)
    assert abs(ratio.mean() - 1) <= 5 * ratio.std(ddof=1) / np.sqrt(len(ratio))


def weights(model, proposal, h, x, mask, u) -> torch.Tensor:
    """log f + log g - log q at draws from the proposal."""
    found = proposal.propose(model, proposal.begin(model, None), 1, h, u, x, mask)
    found = dist.expand(found, h.shape[:-1], model.latent_dim)
    z = dist.sample(found, torch.Generator().manual_seed(0), (50,))
    log_w = dist.log_prob(model.prior(h, u), z) - dist.log_prob(found, z)
    return log_w + dist.log_prob(model.emission(z, u), x, mask)


@pytest.mark.parametrize("proposal", [LocalEKF(), LocalEKF(iterations=1), LocalUKF()])
@pytest.mark.parametrize("seen", [(True, True), (True, False), (False, True)])
def test_linear_gaussian_models_get_the_optimal_proposal(proposal, seen) -> None:
    """The weight is p(x_t | z_{t-1}), whatever was drawn."""
    model = linear_model()
    h = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1)).double()
    x = torch.tensor([[[1.0, -0.5]], [[0.3, 2.0]], [[-1.0, 0.0]]]).double()
    mask = torch.tensor(seen).expand(3, 1, 2)
    u = Inputs(torch.zeros(3, 1, 0).double(), torch.tensor(1))
    log_w = weights(model, proposal, h, x, mask, u)
    f, load, q, r = (np.array(m) for m in (F, H, Q, R))
    some = np.flatnonzero(seen)
    cov = (load @ q @ load.T + r)[np.ix_(some, some)]
    for n in range(3):
        for k in range(5):
            mean = (load @ f @ h[n, k].numpy())[some]
            expected = stats.multivariate_normal(mean, cov).logpdf(x[n, 0].numpy()[some])
            np.testing.assert_allclose(log_w[:, n, k], expected, atol=1e-9)


@pytest.mark.parametrize("proposal", LOCAL)
@pytest.mark.parametrize("n_particles", [4, 16, 64])
def test_evidence_is_unbiased(proposal, n_particles) -> None:
    model, y = linear_model(), gappy()
    exact = model.log_prob(y).value[0]
    options = SMCOptions(n_particles, proposal=proposal)
    check_unbiased(evidence(model, y, options, 4_000 // n_particles) - exact)


# ------------------------------------------------------------------------------ nonlinear models


class Cubic(sq.StateSpaceModel):
    """Seen through a curved scale, much more sharply than it can be predicted."""

    latent_dim = 1
    noise = 0.1

    def initial(self, u):
        return Normal(torch.zeros(1).double(), 1.0)

    def transition(self, z, u):
        return Normal(0.8 * z + 0.5 * torch.sin(z), 1.0)

    def emission(self, z, u):
        return Normal(z + 0.05 * z**3, self.noise)


class Accumulator(Cubic):
    """The same state as a memory, of which z is the shock; it starts at 0, beside a counter."""

    def start(self, batch_shape):
        return (torch.zeros(*batch_shape, 1).double(), torch.zeros(*batch_shape).double())

    def prior(self, h, u):
        return Normal(torch.zeros_like(h[0]), 1.0)

    def absorb(self, h, z):
        level, count = h
        moved = 0.8 * level + 0.5 * torch.sin(level) + z
        return moved, count + 1

    def emission(self, s, u):
        return super().emission(s[0], u)


class HeavyCounts(Cubic):
    """Counts with Student-t shocks of their log-rate."""

    def transition(self, z, u):
        return StudentT(5.0, 0.9 * z, 0.4)

    def emission(self, z, u):
        return Poisson(z.exp())


class Growth(Cubic):
    """Gordon, Salmond and Smith (1993): the sign of the state is not seen."""

    def transition(self, z, u):
        wave = 8 * torch.cos(1.2 * u.t.double())[..., None]
        return Normal(z / 2 + 25 * z / (1 + z**2) + wave, 10**0.5)

    def emission(self, z, u):
        return Normal(z**2 / 20, 1.0)


def grid_log_prob(model, y: np.ndarray, lowest=-30.0, highest=30.0, size=1201) -> float:
    """Log-likelihood of a model of one state element by the rectangle rule."""
    z = torch.linspace(lowest, highest, size, dtype=torch.float64)
    width = (highest - lowest) / (size - 1)
    density, total = None, 0.0
    for t, x in enumerate(torch.from_numpy(y)):
        u = Inputs(torch.zeros(0).double(), torch.tensor(t))
        if density is None:
            density = model.initial(u).log_prob(z[:, None])[:, 0].exp()
        else:
            step = model.transition(z[:, None, None], u).log_prob(z[None, :, None])[..., 0].exp()
            density = density @ step * width
        if not x.isnan():
            density = density * model.emission(z[:, None], u).log_prob(x)[:, 0].exp()
        scale = density.sum() * width
        density = density / scale
        total += float(scale.log())
    return total


CUBIC = np.array([0.3, 1.2, np.nan, -0.4, -2.5, 0.2])
SINGLE = [LocalEKF(), LocalEKF(df=4.0), LocalUKF(inflation=1.3)]


@pytest.mark.parametrize("proposal", SINGLE)
@pytest.mark.parametrize(
    ("model", "markov", "y"),
    [
        (Cubic(), Cubic(), CUBIC),
        (Accumulator(), Cubic(), CUBIC),
        (HeavyCounts(), HeavyCounts(), np.array([1.0, 0.0, np.nan, 3.0, 7.0, 2.0])),
        (Growth(), Growth(), np.array([0.5, np.nan, 4.0, 9.0, 0.1])),
    ],
    ids=["cubic", "memory", "counts", "growth"],
)
def test_evidence_of_nonlinear_models_is_unbiased(model, markov, y, proposal) -> None:
    exact = grid_log_prob(markov, y)
    found = evidence(model, y[:, None], SMCOptions(50, proposal=proposal), 100, seed=1)
    check_unbiased(found - exact)


@pytest.mark.parametrize("model", [Cubic(), Accumulator()], ids=["markov", "memory"])
@pytest.mark.parametrize("proposal", ["ekf", "ukf"])
def test_informative_observations_need_fewer_particles(model, proposal) -> None:
    y = Cubic().sample(10, seed=5).values[0]
    blind = evidence(model, y, SMCOptions(50, proposal="bootstrap"), 100)
    guided = evidence(model, y, SMCOptions(50, proposal=proposal), 100)
    assert guided.var() < 0.2 * blind.var()


def test_names() -> None:
    model = linear_model()
    assert make_proposal("ekf", model) == LocalEKF()
    assert make_proposal("ukf", model) == LocalUKF()
    assert make_proposal(LocalEKF(2), model) == LocalEKF(iterations=2)
    y = gappy()
    one = model.filter(y, method="particle", n_particles=20, seed=0, proposal="ekf")
    two = model.filter(y, method="particle", n_particles=20, seed=0, proposal=LocalEKF())
    assert np.array_equal(one.mean, two.mean)


def proposed(model, proposal, h, x: float):
    u = Inputs(torch.zeros(1, 1, 0).double(), torch.tensor(1))
    x_t = torch.tensor([[[x]]]).double()
    return proposal.propose(model, None, 1, h, u, x_t.nan_to_num(), ~x_t.isnan())


@pytest.mark.parametrize("proposal", [LocalEKF(), LocalUKF(), LocalEKF(df=3.0)])
def test_without_an_observation_the_proposal_is_the_prior(proposal) -> None:
    found = proposed(HeavyCounts(), proposal, torch.zeros(1, 4, 1).double(), np.nan)
    assert isinstance(found, StudentT)
    assert found.df[0, 0, 0] == 5


@pytest.mark.parametrize("proposal", [LocalEKF(), LocalUKF()])
def test_volatility_gives_back_the_gaussian_of_the_prior(proposal) -> None:
    """The mean of the observation does not move with the state."""

    class Volatility(Cubic):
        def emission(self, z, u):
            return Normal(torch.zeros_like(z), (z / 2).exp())

    h = torch.tensor([[[0.5], [-1.0]]]).double()
    found = proposed(Volatility(), proposal, h, 2.0)
    prior = Volatility().transition(h, None)
    assert torch.allclose(found.mean, prior.mean, atol=1e-12)
    assert torch.allclose(found.variance, prior.variance, atol=1e-12)


@pytest.mark.parametrize("proposal", [LocalEKF(), LocalUKF()])
def test_a_particle_out_of_range_draws_from_its_prior(proposal) -> None:
    class Explosive(Cubic):
        def emission(self, z, u):
            return Normal((100 * z).exp(), 1.0)

    h = torch.tensor([[[0.0], [50.0]]]).double()
    found = proposed(Explosive(), proposal, h, 2.0)
    prior = Explosive().transition(h, None)
    assert torch.isfinite(found.mean).all()
    assert found.mean[0, 1] == prior.mean[0, 1]
    assert found.stddev[0, 1] == 1
    assert found.stddev[0, 0] < 1


def test_tails() -> None:
    h = torch.zeros(1, 1, 1).double()
    plain = proposed(Cubic(), LocalEKF(), h, 0.7)
    wide = proposed(Cubic(), LocalEKF(inflation=4.0), h, 0.7)
    heavy = proposed(Cubic(), LocalEKF(df=3.0), h, 0.7)
    assert torch.allclose(wide.stddev, 2 * plain.stddev)
    assert torch.equal(wide.mean, plain.mean)
    assert isinstance(heavy, StudentT)
    assert torch.equal(heavy.scale, plain.stddev)
    with pytest.raises(ValueError, match="inflation"):
        LocalEKF(inflation=0.0)
    with pytest.raises(ValueError, match="df"):
        LocalUKF(df=-1.0)
    with pytest.raises(ValueError, match="iterations"):
        LocalEKF(iterations=0)


def test_heavy_tails_of_a_vector_are_student_t_along_the_root() -> None:
    model, h = linear_model(), torch.zeros(1, 1, 2).double()
    u = Inputs(torch.zeros(1, 1, 0).double(), torch.tensor(1))
    x, mask = torch.ones(1, 1, 2).double(), torch.ones(1, 1, 2, dtype=torch.bool)
    plain = LocalEKF().propose(model, None, 1, h, u, x, mask)
    heavy = LocalEKF(df=3.0).propose(model, None, 1, h, u, x, mask)
    z = torch.tensor([[[2.0, -1.0]]]).double()
    root = plain.scale_tril[0, 0].numpy()
    shock = np.linalg.solve(root, (z - plain.loc)[0, 0].numpy())
    expected = stats.t(3).logpdf(shock).sum() - np.log(np.linalg.det(root))
    assert dist.log_prob(heavy, z).item() == pytest.approx(expected, abs=1e-10)
    drawn = dist.sample(heavy, torch.Generator().manual_seed(0), (20_000,))[:, 0, 0].numpy()
    shocks = np.linalg.solve(root, (drawn - plain.loc[0, 0].numpy()).T)
    for row in shocks:
        assert stats.kstest(row, stats.t(3).cdf).pvalue > 1e-4


@pytest.mark.parametrize("proposal", ["ekf", "ukf"])
@pytest.mark.parametrize("law", [lambda z: Gamma(2.0, z.exp()), lambda z: Bernoulli(logits=z)])
def test_priors_that_a_gaussian_does_not_suit_are_refused(proposal, law) -> None:
    class Odd(Cubic):
        def transition(self, z, u):
            return law(z)

    with pytest.raises(ValueError, match="not a density over the whole space"):
        Odd().filter(CUBIC, method="particle", n_particles=10, proposal=proposal, seed=0)


@pytest.mark.parametrize("proposal", ["ekf", "ukf"])
def test_priors_without_a_variance_are_refused(proposal) -> None:
    class Wild(Cubic):
        def transition(self, z, u):
            return StudentT(2.0, z, 1.0)

    with pytest.raises(ValueError, match="no finite mean and covariance"):
        Wild().filter(CUBIC, method="particle", n_particles=10, proposal=proposal, seed=0)


@pytest.mark.parametrize("proposal", [LocalEKF(1), LocalUKF(df=5.0)])
def test_gradients_of_the_evidence_are_unbiased(proposal) -> None:
    """E[grad Z estimated] / Z is the gradient of log Z, though the proposal itself has none."""
    y, n, theta = np.array([[0.4], [1.9], [np.nan], [-0.6]]), 2000, np.array([0.8, -0.5])

    class Autoregression(sq.StateSpaceModel):
        latent_dim = 1

        def __init__(self) -> None:
            super().__init__()
            whole = torch.from_numpy(theta).expand(n, 1, 2).clone()
            self.rho, self.log_r = (torch.nn.Parameter(part) for part in whole.split(1, -1))

        def initial(self, u):
            return Normal(torch.zeros(1).double(), 1.0)

        def transition(self, z, u):
            return Normal(self.rho * z, 0.6)

        def emission(self, z, u):
            return Normal(z, self.log_r.exp())

    def exact(theta: np.ndarray) -> float:
        known = sq.LinearGaussianSSM(
            F=[[theta[0]]],
            H=[[1.0]],
            Q=[[0.36]],
            R=[[np.exp(2 * theta[1])]],
            m0=[0.0],
            P0=[[1.0]],
            diffuse=False,
        )
        return float(known.log_prob(y))

    model = Autoregression()
    _, batch, _ = prepare(model, y, None)
    options = SMCOptions(6, "stop-gradient", threshold=1.0, proposal=proposal)
    many = batch.take(torch.zeros(n, dtype=torch.int64))
    log_z = differentiable.evidence(model, many, options, torch.Generator().manual_seed(0))
    (log_z - exact(theta)).exp().sum().backward()
    found = torch.cat([model.rho.grad, model.log_r.grad], -1)[:, 0].numpy()
    steps = 1e-5 * np.eye(2)
    expected = [(exact(theta + e) - exact(theta - e)) / 2e-5 for e in steps]
    assert (np.abs(found.mean(0) - expected) <= 5 * found.std(0) / np.sqrt(n)).all()


# ---------------------------------------------------------------------------------- look-ahead


@pytest.mark.parametrize("seen", [(True, True), (True, False), (False, True)])
def test_linear_gaussian_models_get_the_exact_lookahead(seen) -> None:
    model = linear_model()
    h = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1)).double()
    x = torch.tensor([[[1.0, -0.5]], [[0.3, 2.0]], [[-1.0, 0.0]]]).double()
    mask = torch.tensor(seen).expand(3, 1, 2)
    u = Inputs(torch.zeros(3, 1, 0).double(), torch.tensor(1))
    found = predictive(model, h, u, x, mask)
    f, load, q, r = (np.array(m) for m in (F, H, Q, R))
    some = np.flatnonzero(seen)
    cov = (load @ q @ load.T + r)[np.ix_(some, some)]
    for n in range(3):
        for k in range(5):
            mean = (load @ f @ h[n, k].numpy())[some]
            expected = stats.multivariate_normal(mean, cov).logpdf(x[n, 0].numpy()[some])
            assert found[n, k].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("proposal", [LocalEKF(), LocalEKF(inflation=2.0, df=5.0)])
@pytest.mark.parametrize("n_particles", [4, 16, 64])
def test_evidence_with_a_linearised_lookahead_is_unbiased(proposal, n_particles) -> None:
    model, y = linear_model(), gappy()
    exact = model.log_prob(y).value[0]
    options = SMCOptions(n_particles, proposal=proposal, lookahead="ekf", threshold=1.0)
    check_unbiased(evidence(model, y, options, 4_000 // n_particles) - exact)


@pytest.mark.parametrize("model", [Cubic(), Accumulator()], ids=["markov", "memory"])
def test_evidence_of_nonlinear_models_with_a_lookahead_is_unbiased(model) -> None:
    exact = grid_log_prob(Cubic(), CUBIC)
    options = SMCOptions(50, proposal=LocalEKF(df=4.0), lookahead="ekf", threshold=1.0)
    check_unbiased(evidence(model, CUBIC[:, None], options, 200, seed=1) - exact)


def test_full_adaption_weighs_all_particles_alike() -> None:
    """Ancestors drawn by p(x_t | z_{t-1}) and the optimal proposal leave nothing to weigh."""
    model, y = linear_model(), linear_model().sample(12, seed=3)
    options = {"n_particles": 200, "method": "particle", "seed": 0, "threshold": 1.0}
    adapted = model.filter(y, proposal="ekf", lookahead="ekf", **options)
    np.testing.assert_allclose(adapted.ess[0, 1:], 200, rtol=1e-9)
    guided = model.filter(y, proposal="ekf", **options)
    assert guided.ess[0, 1:].min() < 180


def test_a_particle_out_of_range_is_not_looked_at() -> None:
    class Explosive(Cubic):
        def emission(self, z, u):
            return Normal((100 * z).exp(), 1.0)

    u = Inputs(torch.zeros(1, 1, 0).double(), torch.tensor(1))
    x, mask = torch.full((1, 1, 1), 2.0).double(), torch.ones(1, 1, 1, dtype=torch.bool)
    found = predictive(Explosive(), torch.tensor([[[0.0], [50.0]]]).double(), u, x, mask)
    assert found[0, 0].isfinite()
    assert found[0, 1] == -torch.inf


def test_without_a_possible_particle_the_weights_choose_alone() -> None:
    """A look-ahead that rules everything out is the filter without one."""

    def nothing(model, h, u, x, mask):
        return torch.full(h.shape[:2], -torch.inf).double()

    plain = evidence(Cubic(), CUBIC[:, None], SMCOptions(20), 3)
    ruled = evidence(Cubic(), CUBIC[:, None], SMCOptions(20, lookahead=nothing), 3)
    np.testing.assert_allclose(ruled, plain, rtol=1e-12)


def test_lookaheads_are_named_in_errors() -> None:
    model = linear_model()
    with pytest.raises(ValueError, match="'mean', 'ekf' or a function"):
        model.filter(gappy(), method="particle", n_particles=5, seed=0, lookahead="ukf")

    class Odd(Cubic):
        def transition(self, z, u):
            return Gamma(2.0, z.exp())

    with pytest.raises(ValueError, match="use lookahead='mean'"):
        Odd().filter(CUBIC, method="particle", n_particles=10, lookahead="ekf", seed=0)


# ------------------------------------------------------------------------- shared covariances


def test_shared_covariances_are_reduced_once_to_the_same_law() -> None:
    """Against every particle by itself, with axes shared in every combination."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    y, mask = normal(3, 1, 2), torch.rand(3, 1, 2, generator=g) < 0.6
    for load_lead in ((1, 1), (3, 1), (1, 4), (3, 4)):
        for noise_lead in ((1, 1), (3, 1), (3, 4)):
            load = normal(*load_lead, 2, 3).expand(3, 4, 2, 3)
            noise = normal(*noise_lead, 2, 2).expand(3, 4, 2, 2).clone()
            affine = Affine(normal(3, 4, 2), load, noise)
            for seen in (None, mask):
                found = condition(affine, y, seen)
                for n in range(3):
                    for k in range(4):
                        alone = Affine(*(part[n, k] for part in affine))
                        one = condition(alone, y[n, 0], None if seen is None else seen[n, 0])
                        for whole, part in zip(found, one, strict=True):
                            torch.testing.assert_close(whole[n, k], part)


def test_equal_values_with_a_gradient_are_not_cut() -> None:
    load = torch.ones(3, 2, 2, dtype=torch.float64)
    assert narrow(load).shape == (1, 2, 2)
    assert narrow(load.clone().requires_grad_()).shape == (3, 2, 2)
    assert narrow(load[:1].clone().requires_grad_().expand(3, 2, 2)).shape == (1, 2, 2)
