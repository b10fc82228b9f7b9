"""Particle smoothers against the exact smoother, grids, and each other."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, MultivariateNormal, Normal, StudentT, Uniform

import seqdgm as sq
from seqdgm.inference import backward
from seqdgm.inference.history import History
from seqdgm.inference.marginals import Weighted
from seqdgm.inference.pairwise import Transition
from seqdgm.inference.paris import additive_functional
from seqdgm.inference.smc import SMCOptions
from seqdgm.inference.smoothing import SMOOTHERS, run, trajectories
from seqdgm.inference.two_filter import ArtificialPrior, two_filter
from seqdgm.nn import distributions as dist
from seqdgm.prepare import prepare
from seqdgm.types import Batch

F = np.array([[0.9, 0.2], [-0.1, 0.7]])
H = np.array([[1.0, 0.0], [0.5, 1.0]])
Q = np.array([[0.5, 0.1], [0.1, 0.3]])
R = np.array([[0.4, 0.15], [0.15, 0.6]])
B = np.array([[1.0], [0.5]])
JOINT = ("genealogy", "ffbs", "ffbs-reject", "ffbs-mcmc")
SINGLE = ("marginal", "two-filter")


def linear_model() -> sq.LinearGaussianSSM:
    return sq.LinearGaussianSSM(
        F=F, H=H, Q=Q, R=R, B=B, m0=[0.5, -0.5], P0=[[1.0, 0.0], [0.0, 2.0]], diffuse=False
    )


def gappy() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A long and a short series with gaps, and their inputs."""
    u = np.random.default_rng(0).normal(size=(10, 1))
    values = linear_model().sample(10, 2, inputs=np.stack([u, u]), seed=0).values.copy()
    values[:, 3:5] = np.nan
    values[0, 6, 0] = np.nan
    return [values[0], values[1, :7]], [u, u[:7]]


def repeated(model: sq.StateSpaceModel, y: object, repeats: int, u: object = None) -> Batch:
    """Every series `repeats` times: so many seeds in one run."""
    _, batch, _ = prepare(model, y, u)
    return batch.take(torch.arange(batch.n_series).repeat_interleave(repeats))


def by_seed(values: torch.Tensor, repeats: int) -> np.ndarray:
    """Results of a batch of `repeated` as (seed, series, ...)."""
    return values.reshape(-1, repeats, *values.shape[1:]).transpose(0, 1).double().numpy()


def assert_mean(values: np.ndarray, exact: np.ndarray, slack: np.ndarray | float = 0.0) -> None:
    """The mean over seeds lies within 5 standard errors, and `slack` for a bias of O(1/N)."""
    stderr = values.std(0, ddof=1) / np.sqrt(len(values))
    gap = np.abs(values.mean(0) - exact)
    assert np.isnan(gap).any() == np.isnan(exact).any()
    assert np.nanmax(gap / (5 * stderr + slack)) <= 1


SLOW = pytest.mark.slow


@pytest.mark.parametrize("smoother", sorted(SMOOTHERS))
def test_moments_agree_with_the_exact_smoother(smoother: str) -> None:
    model, (y, u), repeats, count = linear_model(), gappy(), 25, 100
    exact = model.smooth(y, inputs=u)
    batch = repeated(model, y, repeats, u)
    rng = torch.Generator().manual_seed(1)
    out = trajectories(model, batch, SMCOptions(count), rng, 50, smoother)
    assert_mean(by_seed(out.mean, repeats), exact.mean, 2 * exact.std / count)
    # The variance of n draws is biased by 1/n, that of weighted particles by 1/(effective size).
    variance = by_seed(out.cov.diagonal(dim1=-2, dim2=-1), repeats)
    bias = 1 / 50 + 3 / by_seed(out.ess, repeats).mean(0)[..., None]
    assert_mean(variance, exact.std**2, bias * exact.std**2)
    assert out.joint == (smoother in JOINT)
    assert out.mean[-1, 7:].isnan().all()
    assert out.mean[-1, :7].isfinite().all()
    assert out.paths["value"][-1, :, 7:].isnan().all()


@SLOW
@pytest.mark.parametrize("smoother", JOINT)
def test_neighbouring_states_have_their_joint_law(smoother: str) -> None:
    model, (y, u), repeats = linear_model(), gappy(), 40
    draws = model.smooth(y, inputs=u).sample(40000, seed=0)
    exact = np.einsum("nsti,nstj->ntij", draws[:, :, :-1], draws[:, :, 1:]) / draws.shape[1]
    batch = repeated(model, y, repeats, u)
    rng = torch.Generator().manual_seed(2)
    path = trajectories(model, batch, SMCOptions(200), rng, 100, smoother).paths["value"]
    found = torch.einsum("nsti,nstj->ntij", path[:, :, :-1], path[:, :, 1:]) / path.shape[1]
    spread = np.sqrt(exact[:, :, [0, 1], [0, 1]] ** 2 + 1).max(-1)[..., None, None]
    assert_mean(by_seed(found, repeats), exact, 6 * spread / 200 + 5 * spread / 200)


@pytest.mark.parametrize("lag", [1, 3])
def test_fixed_lag_agrees_with_the_exact_one(lag: int) -> None:
    model, (y, u), repeats, count = linear_model(), gappy(), 25, 100
    exact = model.smooth(y, inputs=u, lag=lag)
    batch = repeated(model, y, repeats, u)
    rng = torch.Generator().manual_seed(3)
    out = trajectories(model, batch, SMCOptions(count), rng, 20, "fixed-lag", lag)
    assert_mean(by_seed(out.mean, repeats), exact.mean, 2 * exact.std / count)


def test_long_lag_is_the_genealogy() -> None:
    model, (y, u) = linear_model(), gappy()
    batch = repeated(model, y, 1, u)
    how = SMCOptions(300, resampler="multinomial")
    _, history, law = run(
        model, batch, how, torch.Generator().manual_seed(0), 5, "fixed-lag", lag=50
    )
    assert isinstance(law, Weighted)
    ends = history.lineages(torch.arange(300).expand(2, -1))
    assert torch.equal(law.particles[0], ends[0].T)
    assert torch.equal(law.log_weights[0, 0], history.steps[-1].log_weights[0])
    assert torch.equal(law.log_weights[1, 0], history.steps[6].log_weights[1])


class Growth(sq.StateSpaceModel):
    """Gordon, Salmond and Smith (1993), with an input in place of the cosine."""

    latent_dim = 1
    noise = 1.0

    def initial(self, u):
        return Normal(torch.zeros(1, dtype=self.dtype), 2.0)

    def transition(self, z, u):
        mean = z / 2 + 10 * z / (1 + z**2) + 2 * torch.cos(1.2 * u.t.to(z))[..., None]
        return self.law(mean + u.values.sum(-1, keepdim=True))

    def law(self, mean):
        return Normal(mean, self.noise)

    def emission(self, z, u):
        return Normal(z**2 / 10, 1.0)


class HeavyGrowth(Growth):
    def law(self, mean):
        return StudentT(5.0, mean, self.noise)


class ScaledGrowth(Growth):
    """The noise grows with the state: no covariance is shared."""

    def transition(self, z, u):
        return Normal(super().transition(z, u).mean, 0.5 + 0.2 * z.abs())


def grid_smoothed(model: Growth, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E[z_t | y] and E[z_t z_{t+1} | y] by sums over a fine grid."""
    grid = torch.linspace(-22, 22, 1101, dtype=torch.float64)[:, None]
    _, batch, _ = prepare(model, y, None)
    u = [batch.inputs_at(t) for t in range(len(y))]
    moves = []
    for t in range(1, len(y)):
        law = dist.expand(model.transition(grid, u[t]), (len(grid),), 1)
        moves.append(dist.log_prob(dist.stack([law], 1), grid[None]).exp().numpy())
    like = [
        np.ones(len(grid))
        if np.isnan(x)
        else model.emission(grid, u[t]).log_prob(torch.tensor(x)).exp().numpy()[:, 0]
        for t, x in enumerate(y)
    ]
    z = grid[:, 0].numpy()
    ahead = [model.initial(u[0]).log_prob(grid).exp().numpy()[:, 0] * like[0]]
    for t in range(1, len(y)):
        ahead.append((ahead[-1] @ moves[t - 1]) * like[t])
        ahead[-1] /= ahead[-1].sum()
    back = [np.ones(len(z))]
    for t in range(len(y) - 1, 0, -1):
        back.append(moves[t - 1] @ (like[t] * back[-1]))
        back[-1] /= back[-1].sum()
    back = back[::-1]
    mean = np.array([(a * b * z).sum() / (a * b).sum() for a, b in zip(ahead, back, strict=True)])
    cross = []
    for t in range(len(y) - 1):
        joint = ahead[t][:, None] * moves[t] * (like[t + 1] * back[t + 1])
        cross.append((joint * z[:, None] * z).sum() / joint.sum())
    return mean, np.array(cross)


@pytest.mark.parametrize(
    ("kind", "smoother"),
    [
        (Growth, "ffbs"),
        pytest.param(Growth, "ffbs-reject", marks=SLOW),
        pytest.param(Growth, "ffbs-mcmc", marks=SLOW),
        pytest.param(Growth, "marginal", marks=SLOW),
        pytest.param(Growth, "two-filter", marks=SLOW),
        pytest.param(HeavyGrowth, "ffbs", marks=SLOW),
        (HeavyGrowth, "ffbs-reject"),
        pytest.param(ScaledGrowth, "ffbs", marks=SLOW),
        pytest.param(ScaledGrowth, "ffbs-reject", marks=SLOW),
    ],
)
def test_nonlinear_models_agree_with_a_grid(kind: type[Growth], smoother: str) -> None:
    # Gaussian artificial priors fit two modes badly: more particles, for a smaller bias.
    model, repeats, count = kind(), 40, 300 if smoother == "two-filter" else 150
    y = np.array([1.0, 4.0, np.nan, 2.0, 6.0, 3.0])
    mean, cross = grid_smoothed(model, y)
    batch = repeated(model, y, repeats)
    rng = torch.Generator().manual_seed(4)
    how = smoother
    if smoother == "ffbs-mcmc":  # more moves, so that what is left of their bias does not show
        how = partial(backward.simulate, choose=partial(backward.metropolis, moves=30))
    out = trajectories(model, batch, SMCOptions(count), rng, 60, how)
    spread = by_seed(out.cov[..., 0], repeats).mean(0) ** 0.5
    assert_mean(by_seed(out.mean, repeats), mean[None, :, None], 6 * spread / count)
    if out.joint:
        z = out.paths["value"][..., 0]
        found = by_seed((z[:, :, 1:] * z[:, :, :-1]).mean(1), repeats)
        assert_mean(found, cross, 6 * (1 + np.abs(cross)) / count)


def test_pairs_are_the_transition_densities() -> None:
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(2, 7, 3, generator=rng, dtype=torch.float64)
    target = torch.randn(2, 5, 3, generator=rng, dtype=torch.float64)
    root = torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.4, 0.0], [-0.1, 0.1, 0.8]], dtype=z.dtype)
    laws = {
        "one scale": lambda z: Normal(0.9 * z, 0.3),
        "a scale for each element": lambda z: Normal(0.9 * z, torch.tensor([0.1, 1.0, 3.0])),
        "a scale for each particle": lambda z: Normal(0.9 * z, 0.1 + z.abs()),
        "narrow and far away": lambda z: Normal(1e6 + z, 1e-4 * (1 + 0 * z)),
        "shared, narrow and far away": lambda z: Normal(1e6 + z, 1e-5),
        "one covariance": lambda z: MultivariateNormal(z, scale_tril=root),
        "a covariance for each": lambda z: MultivariateNormal(
            z, scale_tril=root * (1 + z.abs().sum(-1))[..., None, None]
        ),
        "Student's t": lambda z: StudentT(4.0, z, 0.5),
    }
    for name, law in laws.items():

        class Model(sq.StateSpaceModel):
            latent_dim = 3

            def transition(self, z, u, law=law):
                return law(z)

        model = Model()
        _, batch, _ = prepare(model, np.zeros((2, 3, 1)), None)
        transition = Transition.of(model, batch, 1, z, None, (2, 7))
        aim = target + 1e6 if "far away" in name else target
        expected = torch.stack(
            [
                torch.stack(
                    [
                        dist.log_prob(dist.expand(law(z[n : n + 1, k]), (1,), 3), aim[n, m][None])[
                            0
                        ]
                        for k in range(7)
                    ]
                )
                for n in range(2)
                for m in range(5)
            ]
        ).reshape(2, 5, 7)
        torch.testing.assert_close(
            transition.pairs(aim), expected.double(), rtol=1e-9, atol=1e-6, msg=name
        )
        bound = transition.log_bound
        own = torch.stack([transition.pairs(law(z).mean)[n].diagonal() for n in range(2)])
        assert bool((own <= bound + 1e-6).all()), name


class HiddenMarkov(sq.StateSpaceModel):
    latent_dim = 1

    def initial(self, u):
        return Bernoulli(torch.tensor([0.3]).double())

    def transition(self, z, u):
        return Bernoulli(0.2 + 0.6 * z)

    def emission(self, z, u):
        return Normal(2 * z, 1.0)


@pytest.mark.parametrize("smoother", ["ffbs", "ffbs-reject", "marginal"])
def test_discrete_states_agree_with_an_exhaustive_sum(smoother: str) -> None:
    y, repeats = np.array([0.1, 2.2, np.nan, 1.9, -0.5]), 60
    total, mean = 0.0, np.zeros(5)
    for path in np.ndindex(*[2] * 5):
        z = np.array(path)
        up = np.r_[0.3, 0.2 + 0.6 * z[:-1]]
        p = np.prod(np.where(z == 1, up, 1 - up))
        p *= np.prod(np.exp(-0.5 * np.where(np.isnan(y), 0, y - 2 * z) ** 2))
        total, mean = total + p, mean + p * z
    model = HiddenMarkov()
    batch = repeated(model, y, repeats)
    rng = torch.Generator().manual_seed(0)
    out = trajectories(model, batch, SMCOptions(200), rng, 50, smoother)
    assert_mean(by_seed(out.mean, repeats)[..., 0], (mean / total)[None], 0.5 / 200)


@SLOW
def test_two_filter_takes_an_artificial_prior() -> None:
    model, (y, u), repeats = linear_model(), gappy(), 40
    exact = model.smooth(y, inputs=u)
    batch = repeated(model, y, repeats, u)
    n, steps = batch.x.shape[:2]
    prior = ArtificialPrior(
        torch.zeros(n, steps, 2).double(), 6.0 * torch.eye(2).double().expand(n, steps, 2, 2)
    )
    rng = torch.Generator().manual_seed(5)
    smoother = partial(two_filter, prior=prior)
    out = trajectories(model, batch, SMCOptions(300), rng, 10, smoother)
    assert_mean(by_seed(out.mean, repeats), exact.mean, 3 * exact.std / 300)


# -- observations -------------------------------------------------------------------------------


class Fed(sq.StateSpaceModel):
    """A level that reads the last observation, so that trajectories hold the missing ones."""

    latent_dim = 1
    feedback = True

    def start(self, batch_shape):
        return torch.zeros(*batch_shape, 1, dtype=self.dtype)

    def advance(self, s, x, u):
        return 0.6 * s + 0.5 * x

    def prior(self, h, u):
        return Normal(h, 0.8)

    def emission(self, s, u):
        return Normal(s, 0.5)


class FedWithMemory(Fed):
    """The same, but it says how it comes to its state."""

    def absorb(self, h, z):
        return z


def fed_by_matrices() -> sq.LinearGaussianSSM:
    """State (z, x): z' = 0.6 z + 0.5 x + e, x' = z' + v, seen without noise."""
    return sq.LinearGaussianSSM(
        F=[[0.6, 0.5], [0.6, 0.5]],
        H=[[0.0, 1.0]],
        Q=[[0.64, 0.64], [0.64, 0.89]],
        R=[[1e-10]],
        m0=[0.0, 0.0],
        P0=[[0.64, 0.64], [0.64, 0.89]],
    )


@pytest.mark.parametrize("smoother", ["genealogy", "ffbs", "ffbs-mcmc", "marginal", "fixed-lag"])
def test_feedback_agrees_with_the_augmented_system(smoother: str) -> None:
    y, repeats = np.array([0.5, np.nan, np.nan, 1.5, 0.2, np.nan, -0.4]), 30
    exact = fed_by_matrices().smooth(y)
    model = Fed()
    model.obs_dim_ = 1
    batch = repeated(model, y, repeats)
    rng = torch.Generator().manual_seed(6)
    how = SMCOptions(200, draw_observations=True)
    out = trajectories(
        model, batch, how, rng, 100, smoother, 9 if smoother == "fixed-lag" else None
    )
    assert_mean(by_seed(out.mean, repeats), exact.mean[..., :1], 2 * exact.std[..., :1] / 200)
    filled = by_seed(out.paths["x"].mean(1), repeats)[..., np.isnan(y), :]
    missing = np.isnan(y)
    assert_mean(filled, exact.mean[:, missing, 1:], 2 * exact.std[:, missing, 1:] / 200)


def test_two_filter_reads_back_complete_observations() -> None:
    y, repeats = np.array([0.5, 0.1, -0.7, 1.5, 0.2]), 60
    exact = fed_by_matrices().smooth(y)
    model = Fed()
    batch = repeated(model, y, repeats)
    out = trajectories(
        model, batch, SMCOptions(200), torch.Generator().manual_seed(7), 5, "two-filter"
    )
    assert_mean(by_seed(out.mean, repeats), exact.mean[..., :1], 2 * exact.std[..., :1] / 200)
    with pytest.raises(ValueError, match="cannot draw them backwards"):
        model.smooth(np.array([0.5, np.nan, 1.0]), smoother="two-filter", n_particles=50)


@SLOW
@pytest.mark.parametrize("smoother", ["ffbs", "marginal", "two-filter", "fixed-lag"])
def test_impute_agrees_with_the_exact_one(smoother: str) -> None:
    model = linear_model()
    y, u = gappy()
    exact = model.impute(y, inputs=u)
    options = {"lag": 9} if smoother == "fixed-lag" else {}
    found = np.array(
        [
            model.impute(
                y, u, method="particle", n_particles=150, smoother=smoother, seed=s, **options
            )[0]
            for s in range(12)
        ]
    )
    stderr = found.std(0, ddof=1) / np.sqrt(len(found))
    holes = np.isnan(y[0])
    assert np.all(np.abs(found.mean(0) - exact[0])[holes] <= 5 * stderr[holes] + 0.02)
    assert np.array_equal(found[0][~holes], y[0][~holes])


# -- additive functionals -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    ["ffbs", pytest.param("ffbs-reject", marks=SLOW), pytest.param("ffbs-mcmc", marks=SLOW)],
)
def test_additive_functional_agrees_with_the_exact_expectation(choice: str) -> None:
    model, (y, u), repeats = linear_model(), gappy(), 25
    smoothed = model.smooth(y, inputs=u)
    draws = np.nan_to_num(smoothed.sample(40000, seed=0))
    products = (draws[:, :, 1:, 0] * draws[:, :, :-1, 0]).sum(2)
    exact = np.stack([products.mean(1), np.nansum(smoothed.mean[..., 1], 1)], 1)
    error = products.std(1) / 200

    def h(before, z, t):
        product = torch.zeros_like(z[..., 0]) if before is None else before[..., 0] * z[..., 0]
        return torch.stack([product, z[..., 1]], -1)

    batch = repeated(model, y, repeats, u)
    rng = torch.Generator().manual_seed(8)
    out = additive_functional(model, batch, h, SMCOptions(100), rng, backward=choice)
    slack = np.stack([5 * error + 4 / 100, np.full(2, 4 / 100)], 1)
    assert_mean(by_seed(out.value, repeats), exact, slack)
    # A filter of its own has the same evidence.
    again = additive_functional(
        model, batch, h, SMCOptions(100), torch.Generator().manual_seed(9), backward=choice
    )
    gap = by_seed(out.log_likelihood - again.log_likelihood, repeats)
    assert_mean(gap, np.zeros(2))


# -- bad input ----------------------------------------------------------------------------------


class Bounded(sq.StateSpaceModel):
    """A uniform transition, which has no bound in the table."""

    latent_dim = 1
    log_bound: float | None = None

    def initial(self, u):
        return Normal(torch.zeros(1).double(), torch.ones(1).double())

    def transition(self, z, u):
        return Uniform(z - 1.0, z + 1.0, validate_args=False)

    def transition_bound(self, u):
        return self.log_bound

    def emission(self, z, u):
        return Normal(z, 1.0)


def test_a_model_may_give_its_bound() -> None:
    y, repeats = np.array([0.0, 1.0, 0.5, 2.0]), 40
    model = Bounded()
    with pytest.raises(ValueError, match=r"no upper bound is known.*Uniform"):
        model.smooth(y, smoother="ffbs-reject", n_particles=50)
    model.log_bound = -3.0
    with pytest.raises(ValueError, match="exceeds transition_bound"):
        model.smooth(y, smoother="ffbs-reject", n_particles=50)
    model.log_bound = float(np.log(0.5))
    batch = repeated(model, y, repeats)
    means = {
        name: by_seed(
            trajectories(
                model, batch, SMCOptions(100), torch.Generator().manual_seed(3), 100, name
            ).mean,
            repeats,
        )
        for name in ("ffbs-reject", "marginal")
    }
    assert_mean(means["ffbs-reject"] - means["marginal"], np.zeros((1, 4, 1)))


def test_errors_name_what_is_wrong() -> None:
    model, (y, u) = linear_model(), gappy()

    def smooth(**options):
        return model.smooth(y, inputs=u, method="particle", n_particles=20, **options)

    with pytest.raises(ValueError, match="no smoother 'rts'"):
        smooth(smoother="rts")
    with pytest.raises(ValueError, match="needs lag="):
        smooth(smoother="fixed-lag")
    with pytest.raises(ValueError, match="goes with smoother='fixed-lag'"):
        smooth(smoother="ffbs", lag=2)
    with pytest.raises(ValueError, match="lag"):
        smooth(lag=0)
    with pytest.raises(ValueError, match="n_trajectories"):
        smooth(n_trajectories=0)
    assert np.isfinite(smooth(lag=2).mean[0]).all()
    with pytest.raises(ValueError, match="Gaussian artificial priors"):
        HiddenMarkov().smooth(np.zeros(3), smoother="two-filter", n_particles=20)
    memory = FedWithMemory()
    for name in ("ffbs", "ffbs-mcmc", "marginal", "two-filter"):
        with pytest.raises(ValueError, match="memory besides z"):
            memory.smooth(np.zeros(3), smoother=name, n_particles=20)
    assert np.isfinite(memory.smooth(np.zeros(3), n_particles=20).mean).all()


def test_densities_that_are_no_numbers_are_refused() -> None:
    class Broken(Growth):
        def law(self, mean):
            return Normal(mean, torch.where(mean > 1e9, 1.0, 1.0), validate_args=False)

    model = Broken()
    y = np.array([1.0, 4.0, 2.0])
    batch = repeated(model, [y, y], 1)
    history = History(model)
    out = run(model, batch, SMCOptions(30), torch.Generator().manual_seed(0), 5, "genealogy")
    history.steps = list(out.history.steps)
    bad = history.steps[1].s.clone()
    bad[1] = torch.nan
    history.steps[1] = history.steps[1]._replace(s=bad)
    for choose in (backward.exact, backward.reject, backward.metropolis):
        with pytest.raises(ValueError, match=r"series 1.*step 2"):
            backward.simulate(
                model, batch, history, 5, torch.Generator().manual_seed(0), choose=choose
            )
    with pytest.raises(ValueError, match=r"series 1.*step 2"):
        SMOOTHERS["marginal"](model, batch, history, 5, torch.Generator().manual_seed(0))


def test_same_seed_gives_the_same_draws() -> None:
    model, (y, u) = linear_model(), gappy()
    for smoother in (*JOINT, *SINGLE):
        runs = [
            model.smooth(y, u, method="particle", n_particles=60, smoother=smoother, seed=3).mean
            for _ in range(2)
        ]
        assert np.array_equal(*runs, equal_nan=True)
    smoothed = model.smooth(y, u, method="particle", n_particles=60, seed=3)
    assert smoothed.sample(7, seed=1).shape == (2, 7, 10, 2)
    with pytest.raises(ValueError, match=r"sample|draw|joint"):
        model.smooth(y, u, method="particle", n_particles=60, smoother="marginal").sample(3)
