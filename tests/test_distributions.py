"""Draws against scipy's distribution functions, densities against dense formulas."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributions as td

from seqdgm.nn import distributions as sd

F64 = torch.float64
NAN = float("nan")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vec(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def random_mvn(batch: tuple[int, ...], dim: int, seed: int = 0) -> td.MultivariateNormal:
    rng = np.random.default_rng(seed)
    root = torch.from_numpy(rng.normal(size=(*batch, dim, dim)))
    loc = torch.from_numpy(rng.normal(size=(*batch, dim)))
    return td.MultivariateNormal(loc, root @ root.mT + 0.5 * torch.eye(dim, dtype=F64))


class Triangular(td.Distribution):
    """A family that only its own methods can draw, from the global generator."""

    arg_constraints = {"width": td.constraints.positive}  # noqa: RUF012
    support = td.constraints.real
    has_rsample = True

    def __init__(self, width: torch.Tensor) -> None:
        self.width = width
        super().__init__(width.shape)

    def expand(self, batch_shape, _instance=None):
        return Triangular(self.width.expand(batch_shape))

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.width * (torch.rand(shape, dtype=F64) - torch.rand(shape, dtype=F64))

    def log_prob(self, value):
        return torch.log1p(-value.abs() / self.width) - self.width.log()


class ShiftedNormal(td.Normal):
    """A subclass that draws differently from its base."""

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape) + 100.0


MIXTURE = td.MixtureSameFamily(
    td.Categorical(probs=vec(0.2, 0.8)[None]), td.Normal(vec(-2, 1)[None], vec(0.5, 1.5)[None])
)

CONTINUOUS = {
    "normal": (td.Normal(vec(1.5), vec(2.0)), stats.norm(1.5, 2).cdf),
    "lognormal": (td.LogNormal(vec(0.3), vec(0.5)), stats.lognorm(0.5, scale=math.exp(0.3)).cdf),
    "studentt": (td.StudentT(vec(3.0), vec(1.0), vec(2.0)), stats.t(3, 1, 2).cdf),
    "laplace": (td.Laplace(vec(1.0), vec(2.0)), stats.laplace(1, 2).cdf),
    "uniform": (td.Uniform(vec(-1.0), vec(3.0)), stats.uniform(-1, 4).cdf),
    "exponential": (td.Exponential(vec(2.0)), stats.expon(scale=0.5).cdf),
    "gamma": (td.Gamma(vec(0.7), vec(2.0)), stats.gamma(0.7, scale=0.5).cdf),
    "chi2": (td.Chi2(vec(3.0)), stats.chi2(3).cdf),
    "beta": (td.Beta(vec(0.7), vec(2.0)), stats.beta(0.7, 2).cdf),
    "cauchy (own method)": (td.Cauchy(vec(1.0), vec(2.0)), stats.cauchy(1, 2).cdf),
    "user's family": (Triangular(vec(2.0)), stats.triang(0.5, -2, 4).cdf),
    "user's subclass": (ShiftedNormal(vec(1.5), vec(2.0)), stats.norm(101.5, 2).cdf),
    "independent": (td.Independent(td.Normal(vec(1.5), vec(2.0)), 1), stats.norm(1.5, 2).cdf),
    "scalar": (td.Normal(torch.tensor(1.5, dtype=F64), 2.0), stats.norm(1.5, 2).cdf),
    "mixture": (
        MIXTURE,
        lambda x: 0.2 * stats.norm(-2, 0.5).cdf(x) + 0.8 * stats.norm(1, 1.5).cdf(x),
    ),
    "transformed": (
        td.TransformedDistribution(
            td.Normal(vec(1.0), vec(2.0)), td.transforms.AffineTransform(3.0, 2.0)
        ),
        stats.norm(5, 4).cdf,
    ),
}

DISCRETE = {
    "bernoulli": (td.Bernoulli(vec(0.3)), stats.bernoulli(0.3).pmf),
    "bernoulli logits": (
        td.Bernoulli(logits=vec(1.2)),
        stats.bernoulli(1 / (1 + math.exp(-1.2))).pmf,
    ),
    "categorical": (
        td.Categorical(probs=vec(0.1, 0.6, 0.3)[None]),
        stats.rv_discrete(values=([0, 1, 2], [0.1, 0.6, 0.3])).pmf,
    ),
    "poisson": (td.Poisson(vec(3.5)), stats.poisson(3.5).pmf),
    "binomial": (td.Binomial(vec(7), vec(0.3)), stats.binom(7, 0.3).pmf),
    "negbinomial": (td.NegativeBinomial(vec(2.5), vec(0.4)), stats.nbinom(2.5, 0.6).pmf),
    "geometric (own method)": (td.Geometric(vec(0.3)), stats.geom(0.3, loc=-1).pmf),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_draws_follow_the_distribution_function(name):
    dist, cdf = CONTINUOUS[name]
    p_values = []
    for seed in range(20):
        draws = sd.sample(dist, generator(seed), (400,))
        assert draws.shape == (400, 1)
        p_values.append(stats.kstest(draws[:, 0].numpy(), cdf).pvalue)
    # Uniform if the draws are right: 20 of them, and the chance of a false alarm is 1e-6.
    assert stats.kstest(p_values, "uniform").pvalue > 1e-6


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_draws_follow_the_probability_function(name):
    dist, pmf = DISCRETE[name]
    draws = torch.cat([sd.sample(dist, generator(seed), (500,)) for seed in range(20)]).numpy()
    assert draws.dtype == np.float64
    n = draws.size
    for k in range(int(draws.max()) + 2):
        p = float(pmf(k))
        assert abs((draws == k).mean() - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1e-12


def test_joint_draws_have_the_right_covariance():
    for dist in (random_mvn((), 3), random_mvn((4,), 3)):
        draws = sd.sample(dist, generator(), (20_000,))
        assert draws.shape == (20_000, *dist.batch_shape, 3)
        centred = draws - dist.loc
        products = centred[..., :, None] * centred[..., None, :]
        error = (products.mean(0) - dist.covariance_matrix) / (products.std(0) / math.sqrt(20_000))
        assert error.abs().max() < 5
        assert (centred.mean(0) / (centred.std(0) / math.sqrt(20_000))).abs().max() < 5


def test_mixture_of_vectors_keeps_a_vector_in_one_component():
    parts = td.Independent(td.Normal(torch.tensor([[-9.0, -9.0], [9.0, 9.0]]), 1.0), 1)
    dist = td.MixtureSameFamily(td.Categorical(probs=torch.tensor([0.3, 0.7])), parts)
    draws = sd.sample(dist, generator(), (5, 400))
    assert draws.shape == (5, 400, 2)
    assert (draws.sign()[..., 0] == draws.sign()[..., 1]).all()
    assert abs((draws[..., 0] > 0).double().mean() - 0.7) < 5 * math.sqrt(0.21 / 2000)


@pytest.mark.parametrize("name", [*CONTINUOUS, *DISCRETE])
def test_draws_depend_on_the_generator_alone(name):
    dist, _ = {**CONTINUOUS, **DISCRETE}[name]
    before = torch.get_rng_state()
    numpy_before = copy.deepcopy(np.random.get_state())  # noqa: NPY002
    first = sd.sample(dist, generator(3), (50,))
    torch.rand(5)
    torch.set_rng_state(before)
    assert torch.equal(first, sd.sample(dist, generator(3), (50,)))
    assert not torch.equal(first, sd.sample(dist, generator(4), (50,)))
    x = first
    sd.log_prob(dist, x, torch.ones_like(x, dtype=torch.bool))
    sd.fill_missing(dist, x, torch.zeros_like(x, dtype=torch.bool), generator())
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        np.array_equal(a, b)
        for a, b in zip(numpy_before, np.random.get_state(), strict=True)  # noqa: NPY002
    )


def cdf_gradient(cdf, x: np.ndarray, place: int, parameters: list[float]) -> np.ndarray:
    """Implicit derivative -dF/dtheta / dF/dx by central differences of scipy's F."""
    h = 1e-5
    up, down = list(parameters), list(parameters)
    up[place] += h
    down[place] -= h
    slope = (cdf(x + h, *parameters) - cdf(x - h, *parameters)) / (2 * h)
    return -(cdf(x, *up) - cdf(x, *down)) / (2 * h) / slope


@pytest.mark.parametrize(
    ("family", "parameters", "cdf"),
    [
        (td.Normal, [1.0, 2.0], stats.norm.cdf),
        (td.Laplace, [1.0, 2.0], stats.laplace.cdf),
        (td.Uniform, [-1.0, 3.0], lambda x, a, b: stats.uniform.cdf(x, a, b - a)),
        (td.Exponential, [2.0], lambda x, r: stats.expon.cdf(x, scale=1 / r)),
        (td.Gamma, [1.7, 2.0], lambda x, a, r: stats.gamma.cdf(x, a, scale=1 / r)),
        (td.LogNormal, [0.3, 0.5], lambda x, m, s: stats.lognorm.cdf(x, s, scale=np.exp(m))),
    ],
)
def test_reparameterised_gradients_are_the_implicit_ones(family, parameters, cdf):
    leaves = [torch.full((40,), p, dtype=F64, requires_grad=True) for p in parameters]
    draws = sd.sample(family(*leaves), generator(), reparameterised=True)
    draws.sum().backward()
    for place, leaf in enumerate(leaves):
        expected = cdf_gradient(cdf, draws.detach().numpy(), place, parameters)
        np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "moment"),
    [
        # d/d theta of E[f(x)] where f's expectation is known in closed form.
        (lambda p: td.Beta(p, torch.full_like(p, 2.0)), lambda p: p / (p + 2)),
        (lambda p: td.Beta(torch.full_like(p, 2.0), p), lambda p: 2 / (p + 2)),
        (lambda p: td.Chi2(p), lambda p: p),
    ],
)
def test_gradients_of_expectations(build, moment):
    p = torch.full((40_000,), 3.0, dtype=F64, requires_grad=True)
    sd.sample(build(p), generator(), reparameterised=True).sum().backward()
    exact = torch.tensor(3.0, dtype=F64, requires_grad=True)
    moment(exact).backward()
    assert abs(p.grad.mean() - exact.grad) < 5 * p.grad.std() / math.sqrt(40_000)


def test_student_t_gradient_of_expectation():
    df = torch.full((40_000,), 9.0, dtype=F64, requires_grad=True)
    x = sd.sample(td.StudentT(df), generator(), reparameterised=True)
    x.square().sum().backward()
    # E[x^2] = df / (df - 2).
    assert abs(df.grad.mean() + 2 / 49) < 5 * df.grad.std() / math.sqrt(40_000)


def test_joint_gradient_equals_torch():
    loc = torch.zeros(3, dtype=F64, requires_grad=True)
    factor = random_mvn((), 3).scale_tril.detach().requires_grad_()
    dist = td.MultivariateNormal(loc, scale_tril=factor)
    x = sd.sample(dist, generator(), (4,), reparameterised=True)
    noise = torch.linalg.solve_triangular(factor.detach(), x.detach().T, upper=False).T
    weights = torch.arange(12, dtype=F64).view(4, 3)
    (x * weights).sum().backward()
    torch.testing.assert_close(loc.grad, weights.sum(0))
    torch.testing.assert_close(factor.grad.tril(), (weights.T @ noise).tril())


def test_plain_draws_carry_no_gradient_and_impossible_ones_are_refused():
    loc = torch.zeros(3, requires_grad=True)
    assert not sd.sample(td.Normal(loc, 1.0), generator()).requires_grad
    for dist in (td.Poisson(torch.ones(2)), MIXTURE):
        with pytest.raises(ValueError, match=rf"{type(dist).__name__} has no reparameterised"):
            sd.sample(dist, generator(), reparameterised=True)


# ------------------------------------------------------------------------------------ log_prob


def test_element_wise_density_sums_the_observed():
    x = torch.tensor([[0.5, NAN, -1.0], [NAN, NAN, NAN]], dtype=F64)
    dist = td.Normal(vec(0.0, 1.0, 2.0), vec(1.0, 2.0, 3.0))
    expected = stats.norm.logpdf(0.5, 0, 1) + stats.norm.logpdf(-1, 2, 3)
    for d in (dist, td.Independent(dist, 1)):
        np.testing.assert_allclose(sd.log_prob(d, x, ~x.isnan()), [expected, 0.0], rtol=1e-14)


@pytest.mark.parametrize("name", [*CONTINUOUS, *DISCRETE])
def test_missing_elements_leave_values_and_gradients_alone(name):
    scalar, _ = {**CONTINUOUS, **DISCRETE}[name]
    dist = scalar if scalar.batch_shape != () else scalar.expand((1,))
    if isinstance(dist, td.Independent):
        dist = dist.base_dist
    dist = dist.expand((4, 3))
    whole = sd.sample(dist, generator())
    mask = torch.rand(4, 3, generator=generator(1)) > 0.4
    elements = sd.log_prob_elements(dist, whole)
    assert torch.isfinite(elements).all()
    for filler in (NAN, math.inf, -7.5):
        x = torch.where(mask, whole, filler).requires_grad_()
        value = sd.log_prob(dist, x, mask)
        torch.testing.assert_close(value, torch.where(mask, elements, 0.0).sum(-1))
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), x)
            assert torch.isfinite(gradient).all()
            assert (gradient[~mask] == 0).all()


def test_parameter_gradients_are_finite_where_elements_are_missing():
    loc = torch.zeros(3, dtype=F64, requires_grad=True)
    scale = torch.full((3,), 1e-3, dtype=F64, requires_grad=True)
    x = vec(NAN, 0.5, 1e300)
    mask = torch.tensor([False, True, False])
    for build in (td.Normal, td.LogNormal, lambda m, s: td.Gamma(s, s + m)):
        value = sd.log_prob(build(loc, scale), x, mask)
        for gradient in torch.autograd.grad(value, [loc, scale]):
            assert torch.isfinite(gradient).all()
            assert (gradient[~mask] == 0).all()
            assert gradient[1] != 0


def test_gaussian_marginals_equal_scipy_for_mixed_patterns():
    rng = np.random.default_rng(1)
    dist = random_mvn((6,), 4)
    x = torch.from_numpy(rng.normal(size=(5, 6, 4)))
    mask = torch.from_numpy(rng.random((5, 6, 4)) > 0.5)
    value = sd.log_prob(dist, torch.where(mask, x, NAN), mask)
    patterns = set()
    for i, j in np.ndindex(5, 6):
        o = mask[i, j].numpy()
        patterns.add(tuple(o))
        expected = 0.0
        if o.any():
            cov = dist.covariance_matrix[j].numpy()[np.ix_(o, o)]
            expected = stats.multivariate_normal.logpdf(x[i, j][o], dist.loc[j][o], cov)
        assert value[i, j].item() == pytest.approx(expected, rel=1e-11, abs=1e-12)
    assert len(patterns) > 8
    torch.testing.assert_close(sd.log_prob(dist, x, torch.ones_like(mask)), dist.log_prob(x))


def test_gaussian_marginal_broadcasts_over_particles():
    dist = td.MultivariateNormal(
        torch.zeros(2, 50, 3, dtype=F64), random_mvn((), 3).covariance_matrix
    )
    x = vec(0.3, NAN, -1.0).expand(2, 1, 3)
    value = sd.log_prob(dist, x, ~x.isnan())
    cov = dist.covariance_matrix[0, 0].numpy()[np.ix_([0, 2], [0, 2])]
    expected = stats.multivariate_normal.logpdf([0.3, -1.0], [0, 0], cov)
    assert value.shape == (2, 50)
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_low_rank_gaussian_marginal():
    rng = np.random.default_rng(2)
    factor, diagonal = torch.from_numpy(rng.normal(size=(4, 2))), vec(1.0, 2.0, 0.5, 1.0)
    dist = td.LowRankMultivariateNormal(torch.zeros(4, dtype=F64), factor, diagonal)
    x = vec(0.3, NAN, -1.0, 2.0)
    o = [0, 2, 3]
    cov = (factor @ factor.T + diagonal.diag()).numpy()[np.ix_(o, o)]
    expected = stats.multivariate_normal.logpdf([0.3, -1.0, 2.0], [0, 0, 0], cov)
    assert sd.log_prob(dist, x, ~x.isnan()).item() == pytest.approx(expected, rel=1e-12)


def test_gaussian_marginal_gradients_equal_finite_differences():
    x = torch.tensor([[0.3, NAN, -1.0], [NAN, NAN, 0.2], [NAN, NAN, NAN]], dtype=F64)
    mask = ~x.isnan()
    factor = random_mvn((3,), 3).scale_tril.detach().requires_grad_()
    loc = torch.zeros(3, dtype=F64, requires_grad=True)

    def value(loc, factor):
        return sd.log_prob(td.MultivariateNormal(loc, scale_tril=factor.tril()), x, mask)

    assert torch.autograd.gradcheck(value, (loc, factor))


def test_other_joint_distributions_are_refused_in_part():
    dist = td.Dirichlet(torch.ones(2, 3, dtype=F64))
    x = torch.full((2, 3), 1 / 3, dtype=F64)
    mask = torch.tensor([[True, True, True], [False, False, False]])
    gone = torch.where(mask, x, NAN)
    np.testing.assert_allclose(sd.log_prob(dist, gone, mask), [math.log(2), 0.0], rtol=1e-12)
    filled = sd.fill_missing(dist, gone, mask, generator())
    assert torch.equal(filled[0], x[0])
    assert filled[1].sum().item() == pytest.approx(1.0)
    mask[1, 0] = True
    for call in (
        lambda: sd.log_prob(dist, x, mask),
        lambda: sd.fill_missing(dist, x, mask, generator()),
    ):
        with pytest.raises(ValueError, match=r"Dirichlet is a joint .*\(1,\) is observed in part"):
            call()
    with pytest.raises(ValueError, match="Dirichlet is a joint"):
        sd.log_prob_elements(dist, x)


def test_lengths_are_not_guessed():
    dist = td.Normal(torch.zeros(5, 1), 1.0)
    with pytest.raises(ValueError, match=r"vectors of length 1, but .* length 3"):
        sd.log_prob(dist, torch.zeros(5, 3))
    with pytest.raises(ValueError, match="vectors of length 1, expected 3"):
        sd.expand(dist, (5,), 3)
    with pytest.raises(ValueError, match="length 1 and 3"):
        sd.kl(dist, td.Normal(torch.zeros(3), 1.0))
    with pytest.raises(ValueError, match=r"events of shape \(2, 3\)"):
        sd.log_prob(td.Independent(td.Normal(torch.zeros(2, 3), 1.0), 2), torch.zeros(2, 3))


# -------------------------------------------------------------------------------- fill_missing


def test_gaussian_fill_is_the_conditional():
    dist = random_mvn((), 4, seed=3)
    x = vec(0.7, NAN, -1.2, NAN)
    o, m = [0, 2], [1, 3]
    cov, loc = dist.covariance_matrix.numpy(), dist.loc.numpy()
    gain = cov[np.ix_(m, o)] @ np.linalg.inv(cov[np.ix_(o, o)])
    expected_mean = loc[m] + gain @ (np.array([0.7, -1.2]) - loc[o])
    expected_cov = cov[np.ix_(m, m)] - gain @ cov[np.ix_(o, m)]
    n = 20_000
    draws = sd.fill_missing(dist, x.expand(n, 4), ~x.isnan(), generator()).numpy()
    assert (draws[:, o] == [0.7, -1.2]).all()
    centred = draws[:, m] - expected_mean
    assert np.abs(centred.mean(0) / np.sqrt(np.diag(expected_cov) / n)).max() < 5
    products = centred[:, :, None] * centred[:, None, :]
    error = (products.mean(0) - expected_cov) / (products.std(0) / math.sqrt(n))
    assert np.abs(error).max() < 5


def test_fill_draws_independently_for_each_particle():
    dist = td.Normal(torch.zeros(2, 1, 3), 1.0)
    x = torch.tensor([1.0, NAN, 3.0]).expand(2, 1, 3)
    filled = sd.fill_missing(dist, x.expand(2, 40, 3), ~x.isnan(), generator())
    assert filled.shape == (2, 40, 3)
    assert (filled[..., 0] == 1).all()
    assert filled[..., 1].unique().numel() == 80


def test_fill_carries_gradients_when_asked():
    loc = torch.zeros(3, dtype=F64, requires_grad=True)
    cov = random_mvn((), 3).covariance_matrix
    x = vec(0.5, NAN, NAN)
    dist = td.MultivariateNormal(loc, cov)
    assert not sd.fill_missing(dist, x, ~x.isnan(), generator()).requires_grad
    filled = sd.fill_missing(dist, x, ~x.isnan(), generator(), reparameterised=True)
    (gradient,) = torch.autograd.grad(filled[1], loc)
    torch.testing.assert_close(
        gradient, torch.stack([-cov[1, 0] / cov[0, 0], vec(1)[0], vec(0)[0]])
    )


# ------------------------------------------------------------------------------ moments, shapes


@pytest.mark.parametrize("name", ["categorical", "poisson", "negbinomial", "gamma", "mixture"])
def test_moments_are_those_of_draws(name):
    dist, _ = {**CONTINUOUS, **DISCRETE}[name]
    draws = sd.sample(dist, generator(), (40_000,))
    assert sd.mean(dist).shape == (1,)
    assert abs(draws.mean() - sd.mean(dist)) < 5 * draws.std() / 200
    squares = (draws - draws.mean()).square()
    assert abs(squares.mean() - sd.variance(dist)) < 5 * squares.std() / 200


def test_kl_equals_quadrature():
    q, p = td.Normal(vec(0.3, -1.0), vec(0.5, 1.5)), td.Normal(vec(0.0, 1.0), vec(1.0, 2.0))
    grid = torch.linspace(-15, 15, 200_001, dtype=F64)[:, None]
    integrand = (q.log_prob(grid).exp() * (q.log_prob(grid) - p.log_prob(grid))).sum(-1)
    expected = torch.trapezoid(integrand, grid[:, 0]).item()
    assert sd.kl(q, p).item() == pytest.approx(expected, rel=1e-6)
    assert sd.kl(td.Independent(q, 1), p).item() == pytest.approx(expected, rel=1e-6)
    joint = [td.MultivariateNormal(d.loc, d.scale.square().diag()) for d in (q, p)]
    assert sd.kl(*joint).item() == pytest.approx(expected, rel=1e-6)


STACKABLE = [
    lambda k: td.Normal(torch.full((2, 3), float(k)), 1.0),
    lambda k: td.StudentT(3.0 + k, torch.zeros(2, 3), 1.0),
    lambda k: td.Bernoulli(logits=torch.full((2, 3), float(k))),
    lambda k: td.Bernoulli(torch.full((2, 3), 0.1 * k)),
    lambda k: td.Categorical(logits=k * torch.arange(4.0).expand(2, 3, 4)),
    lambda k: td.Poisson(torch.full((2, 3), 1.0 + k)),
    lambda k: td.NegativeBinomial(torch.full((2, 3), 1.0 + k), logits=torch.zeros(2, 3)),
    lambda k: td.LogNormal(torch.full((2, 3), float(k)), 1.0),
    lambda k: td.MultivariateNormal(torch.full((2, 3), float(k)), torch.eye(3)),
    lambda k: td.Independent(td.Normal(torch.full((2, 3), float(k)), 1.0), 1),
    lambda k: td.MixtureSameFamily(
        td.Categorical(logits=torch.zeros(2, 3, 2)), td.Normal(torch.full((2, 3, 2), 1.0 * k), 1.0)
    ),
]


@pytest.mark.parametrize("build", STACKABLE)
@pytest.mark.parametrize("dim", [0, 1])
def test_stack_scores_like_its_parts(build, dim):
    parts = [build(k) for k in range(4)]
    x = torch.ones(2, 3)
    whole = sd.stack(parts, dim)
    assert type(whole) is type(parts[0])
    value = sd.log_prob(whole, torch.stack([x] * 4, dim))
    torch.testing.assert_close(value, torch.stack([sd.log_prob(p, x) for p in parts], dim))


def test_stack_refuses_what_it_cannot_rebuild():
    normal = td.Normal(torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match="not Normal and Poisson"):
        sd.stack([normal, td.Poisson(torch.ones(2))], 0)
    with pytest.raises(ValueError, match="ShiftedNormal cannot be rebuilt"):
        sd.stack([ShiftedNormal(vec(0.0), vec(1.0))] * 2, 0)
    affine = td.TransformedDistribution(normal, td.transforms.AffineTransform(3.0, 2.0))
    with pytest.raises(ValueError, match="TransformedDistribution cannot be rebuilt"):
        sd.stack([affine, affine], 0)


def test_shapes_and_kinds():
    assert sd.vector_dim(random_mvn((5,), 4)) == 4
    assert sd.is_joint(random_mvn((5,), 4))
    assert not sd.is_joint(td.Independent(td.Normal(torch.zeros(3), 1.0), 1))
    for name, (dist, _) in {**CONTINUOUS, **DISCRETE}.items():
        assert sd.is_discrete(dist) == (name in DISCRETE)
    assert sd.expand(random_mvn((5, 1), 4), (5, 7), 4).batch_shape == (5, 7)
    assert sd.expand(td.Normal(0.0, 1.0), (5, 7), 1).batch_shape == (5, 7, 1)
