"""Compiled bootstrap filters of users' models, against their own functions and exact answers."""

from __future__ import annotations

import math

import numba
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import distributions as td

import seqdgm as sq
from seqdgm.inference import compiled, fused
from seqdgm.inference.smc import SMCOptions
from seqdgm.kernels import trace_source
from seqdgm.prepare import prepare

F = [[0.9, 0.2], [-0.1, 0.7]]
H = [[1.0, 0.0], [0.5, 1.0]]
Q = [[0.5, 0.1], [0.1, 0.3]]
R = [[0.4, 0.0], [0.0, 0.6]]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A cache of its own, so that the tests compile what they test."""
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_source, "cache_directory", lambda: place)
        yield place


def exact_model() -> sq.LinearGaussianSSM:
    return sq.LinearGaussianSSM(
        F=F, H=H, Q=Q, R=R, m0=[0.5, -0.5], P0=[[1.0, 0.0], [0.0, 2.0]], diffuse=False
    )


class Linear(sq.StateSpaceModel):
    """`exact_model` as a user would write it."""

    latent_dim = 2

    def __init__(self) -> None:
        super().__init__()
        for name, matrix in (("F", F), ("H", H), ("Q", Q)):
            self.register_buffer(name, torch.tensor(matrix).double())

    def initial(self, u):
        scale = torch.tensor([1.0, 2.0**0.5], dtype=self.dtype)
        return td.Normal(torch.tensor([0.5, -0.5], dtype=self.dtype), scale)

    def transition(self, z, u):
        return td.MultivariateNormal(z @ self.F.T, self.Q)

    def emission(self, z, u):
        scale = torch.tensor([0.4, 0.6], dtype=self.dtype).sqrt()
        return td.Independent(td.Normal(z @ self.H.T, scale), 1)


class Volatility(sq.StateSpaceModel):
    latent_dim = 1

    def __init__(self, mu: float = -1.0, rho: float = 0.95, sigma: float = 0.25) -> None:
        super().__init__()
        self.mu, self.rho, self.sigma = mu, rho, sigma

    def initial(self, u):
        spread = self.sigma / (1 - self.rho**2) ** 0.5
        return td.Normal(torch.full((1,), self.mu, dtype=self.dtype), spread)

    def transition(self, z, u):
        return td.Normal(self.mu + self.rho * (z - self.mu), self.sigma)

    def emission(self, z, u):
        return td.Normal(torch.zeros_like(z), torch.exp(z / 2))


def gappy(n: int = 1) -> np.ndarray:
    values = exact_model().sample(20, n, seed=0).values.copy()
    values[:, 5:8] = np.nan
    values[:, 9, 0] = np.nan
    values[0, 11, 1] = np.nan
    return values


def within(values: np.ndarray, target: np.ndarray | float) -> None:
    """Mean over the first axis lies within 5 standard errors of the target."""
    stderr = values.std(0, ddof=1) / np.sqrt(len(values))
    assert np.all(np.abs(values.mean(0) - target) <= 5 * stderr), (values.mean(0), target, stderr)


def run(model, y, inputs=None, *, n_particles=100, seed=0, moments=False, **options):
    """The compiled filter, over copies of a series."""
    _, batch, _ = prepare(model, y, inputs)
    how = SMCOptions(n_particles, compile=True, **options)
    return fused.bootstrap(model, batch, how, torch.Generator().manual_seed(seed), moments=moments)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("n_particles", [4, 16, 64])
def test_evidence_is_unbiased(n_particles: int, gaps: bool) -> None:
    y = gappy() if gaps else exact_model().sample(20, seed=0).values
    exact = exact_model().log_prob(y).value
    found = run(Linear(), y.repeat(4000, 0), n_particles=n_particles).increments.sum(1).numpy()
    within(np.exp(found - exact), 1.0)


def test_moments_agree_with_kalman() -> None:
    y = gappy()
    exact = exact_model().filter(y)
    out = run(Linear(), y.repeat(60, 0), n_particles=1000, moments=True)
    means, covs = out.mean.numpy(), out.cov.numpy()
    cov = np.asarray(exact.cov)
    # A ratio estimate is biased by O(1/N): allow for it beside the Monte-Carlo error.
    for found, target in ((means, exact.mean[0]), (covs, cov[0])):
        stderr = found.std(0, ddof=1) / np.sqrt(len(found))
        assert np.all(np.abs(found.mean(0) - target) <= 5 * stderr + 5 / 1000)
    np.testing.assert_allclose(covs.diagonal(0, 2, 3), out.var.numpy())


def test_covariances_are_those_of_the_weighted_particles() -> None:
    # Two blocks, so that their moments are put together.
    model, y = Linear(), exact_model().sample(1, seed=1).values
    out = run(model, y, n_particles=1500, moments=True)
    key = torch.tensor([0])
    from seqdgm.kernels.philox import normals
    from seqdgm.types import draw_seed

    seed = draw_seed(torch.Generator().manual_seed(0))
    noise = torch.stack([normals(key, 1500, 0, d, seed)[0] for d in range(2)], -1)
    law = model.initial(None)
    z = law.loc + law.scale * noise
    weights = model.emission(z, None).log_prob(torch.tensor(y[0, 0])).softmax(0)
    np.testing.assert_allclose(out.mean[0, 0], weights @ z, rtol=1e-9)
    expected = torch.from_numpy(np.cov(z.T.numpy(), aweights=weights.numpy(), ddof=0))
    np.testing.assert_allclose(out.cov[0, 0], expected, rtol=1e-9)


def test_verbs_take_it() -> None:
    model, y = Linear(), gappy(2)
    direct = run(model, y, n_particles=300, seed=4, moments=True)
    found = model.filter(y, n_particles=300, seed=4, compile=True)
    np.testing.assert_array_equal(found.mean, direct.mean)
    np.testing.assert_array_equal(found.cov, direct.cov)
    np.testing.assert_array_equal(found.ess, direct.ess)
    value = model.log_prob(y, n_particles=300, seed=4, compile=True)
    np.testing.assert_array_equal(value.value, direct.increments.sum(1))
    np.testing.assert_array_equal(value.stderr, direct.stderr)


def test_volatility_agrees_with_the_fused_kernel() -> None:
    y = Volatility().sample(30, seed=2).values
    own = sq.StochasticVolatility(mean=0.0, mu=-1.0, rho=0.95, sigma=0.25)
    many = own.log_prob(y.repeat(50, 0), n_particles=1000, seed=3).value
    level = many.max()
    reference = np.exp(many - level)
    found = np.exp(run(Volatility(), y.repeat(1000, 0)).increments.sum(1).numpy() - level)
    error = np.hypot(
        reference.std(ddof=1) / np.sqrt(len(reference)), found.std(ddof=1) / np.sqrt(len(found))
    )
    assert abs(found.mean() - reference.mean()) < 5 * error


def test_changed_parameters_are_seen_without_compiling_again() -> None:
    y = Volatility().sample(60, seed=2).values
    model = Volatility()
    first = run(model, y, n_particles=200).increments
    loads = trace_source.load.cache_info().misses
    model.sigma = 0.4
    changed = run(model, y, n_particles=200).increments
    assert trace_source.load.cache_info().misses == loads
    assert not torch.equal(first, changed)
    assert torch.equal(changed, run(Volatility(sigma=0.4), y, n_particles=200).increments)
    linear, z = Linear(), gappy()
    before = run(linear, z).increments
    linear.F.mul_(0.5)
    assert not torch.equal(before, run(linear, z).increments)


def test_ragged_panels_and_gaps() -> None:
    long = gappy(3)
    y = [long[0], long[1, :7], long[2, :1]]
    out = run(Linear(), y, moments=True)
    assert out.increments.shape == (3, 20)
    assert (out.increments[1, 7:] == 0).all()
    assert out.mean[1, 7:].isnan().all()
    assert out.increments[0, 5:8].tolist() == [0.0] * 3
    alone = run(Linear(), long[:2, :7])
    torch.testing.assert_close(out.increments[:2, :7], alone.increments)


class Driven(sq.StateSpaceModel):
    """A level that inputs and a table by the step move."""

    latent_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("season", torch.tensor([1.0, -2.0, 0.5]).double())

    def initial(self, u):
        return td.Normal(u.values[..., :1], 1.0)

    def transition(self, z, u):
        season = self.season[u.t % 3][..., None]
        return td.Normal(0.8 * z + u.values[..., :1] * u.values[..., 1:] + season, 0.7)

    def emission(self, z, u):
        return td.Normal(z + torch.cos(u.t.double())[..., None], 0.5)


def test_inputs_and_steps() -> None:
    rng = np.random.default_rng(0)
    inputs, y = rng.normal(size=(1, 12, 2)), rng.normal(size=(1, 12, 1))
    # By hand: a Kalman filter of one element.
    season, mean, var, total = [1.0, -2.0, 0.5], inputs[0, 0, 0], 1.0, 0.0
    for t in range(12):
        if t:
            mean = 0.8 * mean + inputs[0, t].prod() + season[t % 3]
            var = 0.64 * var + 0.49
        error, spread = y[0, t, 0] - mean - np.cos(t), var + 0.25
        total += -0.5 * (np.log(2 * np.pi * spread) + error**2 / spread)
        mean, var = mean + var / spread * error, var - var**2 / spread
    found = run(Driven(), y.repeat(3000, 0), inputs.repeat(3000, 0)).increments.sum(1).numpy()
    within(np.exp(found - total), 1.0)


STATES = {
    "student": lambda z: td.StudentT(5.0, torch.sin(z), 0.3),
    "laplace": lambda z: td.Laplace(z, 0.2 + z**2),
    "uniform": lambda z: td.Uniform(z - 1.0, z + 0.5),
    "log-normal": lambda z: td.LogNormal(0.1 * torch.tanh(z), 0.5),
    "half-normal": lambda z: td.HalfNormal(1.0 + z**2),
    "cauchy": lambda z: td.Cauchy(z, 0.1),
    "gumbel": lambda z: td.Gumbel(z / 2, 0.4),
    "exponential": lambda z: td.Exponential(1.0 + z.abs()),
    "bernoulli": lambda z: td.Bernoulli(torch.sigmoid(z)),
    "factor": lambda z: td.MultivariateNormal(
        z, scale_tril=torch.diag_embed(torch.ones(2).double() * 0.5)
    ),
}
EMISSIONS = {
    "student": (lambda z: td.StudentT(4.0, z, z.exp()), 0.3),
    "laplace": (lambda z: td.Laplace(z, 1.5), 0.3),
    "log-normal": (lambda z: td.LogNormal(z, 0.5), 0.7),
    "exponential": (lambda z: td.Exponential(torch.nn.functional.softplus(z)), 0.7),
    "gamma": (lambda z: td.Gamma(2.0, z.exp()), 0.7),
    "beta": (lambda z: td.Beta(1.0 + z.exp(), 2.0), 0.2),
    "bernoulli": (lambda z: td.Bernoulli(logits=z), 1.0),
    "probs": (lambda z: td.Bernoulli(torch.sigmoid(z)), 1.0),
    "poisson": (lambda z: td.Poisson(z.exp()), 3.0),
    "binomial": (lambda z: td.NegativeBinomial(3.0, logits=z), 2.0),
    "mixture": (
        lambda z: td.MixtureSameFamily(
            td.Categorical(logits=torch.stack([z, -z], -1)),
            td.Normal(torch.stack([z, 2 * z], -1), 1.0),
        ),
        0.4,
    ),
    "joint": (
        lambda z: td.MultivariateNormal(z, torch.tensor([[1.0, 0.3], [0.3, 2.0]]).double()),
        0.4,
    ),
}


class Any2(sq.StateSpaceModel):
    """Two elements under any laws."""

    latent_dim = 2

    def __init__(self, move=None, see=None) -> None:
        super().__init__()
        self.move, self.see = move, see

    def initial(self, u):
        return td.Normal(torch.zeros(2, dtype=self.dtype), 1.0)

    def transition(self, z, u):
        return self.move(z) if self.move else td.Normal(0.5 * z, 1.0)

    def emission(self, z, u):
        return self.see(z) if self.see else td.Normal(z, 1.0)


def interpreted(model, y) -> tuple[dict, compiled._Recorded]:
    """The generated functions in plain Python, and what they were made from."""
    _, batch, _ = prepare(model, y, None)
    with torch.no_grad():
        recorded = compiled._record(model, batch)
    source = trace_source.write(recorded.tape, recorded.program)
    body = source[source.index("@mover") : source.index("ADDRESSES")]
    scope = {
        "mover": lambda f: f,
        "scorer": lambda f: f,
        "wide": lambda: None,
        "carray": lambda array, shape: array,
        "exp": np.exp,
        "log": np.log,
        "sigmoid": scipy.special.expit,
        "xlogy": scipy.special.xlogy,
        "maximum": np.maximum,
        "minimum": np.minimum,
        "relu": lambda x: max(x, 0.0),
        "math": math,
        "np": np,
    }
    exec(body, scope)
    return scope, recorded


def rows_of_memory(program, seed: int = 0) -> np.ndarray:
    rng, state = np.random.default_rng(seed), len(program.initial)
    return rng.uniform(0.05, 0.95, (2 * state + program.draws, 1024))


@pytest.mark.parametrize("name", STATES)
def test_draws_of_every_law(name: str) -> None:
    """Each draw is its law's quantile function, or what torch makes of the same numbers."""
    model = Any2(move=STATES[name])
    scope, recorded = interpreted(model, np.zeros((1, 2, 2)))
    memory = rows_of_memory(recorded.program)
    values = np.array(recorded.tape.values)
    scope["transition"](values, np.zeros(0), 1, 1000, memory.reshape(-1))
    z, noise = torch.from_numpy(memory[:2, :1000].T), torch.from_numpy(memory[2:4, :1000].T)
    moved = torch.from_numpy(memory[-2:, :1000].T)
    law = model.transition(z, None)
    if name == "bernoulli":
        assert torch.equal(moved, (noise < law.probs).double())
    elif name == "student":
        turned = torch.from_numpy(memory[4:6, :1000].T)
        made = compiled.LAWS[td.StudentT].draw(law, [noise, turned])
        torch.testing.assert_close(moved, made)
    elif name in ("log-normal", "half-normal"):
        base = torch.special.ndtr(noise)
        cdf = law.cdf(moved)
        torch.testing.assert_close(cdf, base if name == "log-normal" else 2 * base - 1)
    elif name == "factor":
        torch.testing.assert_close(moved, z + 0.5 * noise)
    elif name == "exponential":
        torch.testing.assert_close(law.cdf(moved), 1 - noise)
    else:
        torch.testing.assert_close(law.cdf(moved), noise)


def test_student_draws_have_their_law() -> None:
    law = td.StudentT(torch.tensor([3.0]).double(), 1.0, 2.0)
    generator = torch.Generator().manual_seed(0)
    e = [torch.rand(20_000, 1, generator=generator, dtype=torch.float64) for _ in range(2)]
    drawn = compiled.LAWS[td.StudentT].draw(law, e).numpy()[:, 0]
    assert scipy.stats.kstest((drawn - 1.0) / 2.0, "t", (3.0,)).pvalue > 1e-4


@pytest.mark.parametrize("name", EMISSIONS)
def test_densities_of_every_law(name: str) -> None:
    see, value = EMISSIONS[name]
    model = Any2(see=see)
    scope, recorded = interpreted(model, np.full((1, 2, 2), value))
    memory = rows_of_memory(recorded.program)
    x, found = np.array([value, value]), np.zeros(50)
    values = np.array(recorded.tape.values)
    scope["density"](values, np.zeros(0), 1, x, -1, 50, memory.reshape(-1), found)
    law = see(torch.from_numpy(memory[-2:, :50].T))
    expected = law.log_prob(torch.from_numpy(x))
    expected = expected if law.event_shape else expected.sum(-1)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-10, atol=1e-12)
    if not law.event_shape:
        one = np.zeros(50)
        scope["density"](values, np.zeros(0), 1, x, 1, 50, memory.reshape(-1), one)
        np.testing.assert_allclose(one, law.log_prob(torch.from_numpy(x))[:, 1], rtol=1e-10)


OPERATIONS = {
    "arithmetic": lambda z: -z + 2 * z - z / 3 + 1 / z - (1 - z) ** 3 + z**0.5 + z**-1 + z**1.7,
    "powers": lambda z: 2.0**z + z.square() + z.rsqrt() + z.reciprocal() + torch.pow(z, z),
    "exponentials": lambda z: z.exp() + z.log() + z.log1p() + z.expm1() + z.log2() + z.log10(),
    "circles": lambda z: z.sin() + z.cos() + z.tan() + z.asin() + z.acos() + z.atan(),
    "hyperbolas": lambda z: z.sinh() + z.cosh() + z.tanh() + z.asinh() + z.atanh(),
    "activations": lambda z: (
        torch.sigmoid(z)
        + torch.relu(z - 0.5)
        + torch.nn.functional.softplus(z)
        + torch.nn.functional.silu(z)
        + torch.nn.functional.gelu(z)
        + torch.nn.functional.leaky_relu(z - 0.5)
        + torch.nn.functional.logsigmoid(z)
    ),
    "gamma": lambda z: z.lgamma() + z.erf() + z.erfc(),
    "rounding": lambda z: (5 * z).floor() + (5 * z).ceil() + (5 * z).round() + (5 * z).trunc(),
    "division": lambda z: z % 0.3 + torch.fmod(z, 0.3) + torch.div(z, 0.3, rounding_mode="floor"),
    "choices": lambda z: torch.where((z > 0.5) & ~(z > 0.8), z, -z) + z.clamp(0.2, 0.6) + z.sign(),
    "bounds": lambda z: torch.maximum(z, z.flip(-1)) + torch.minimum(z, 1 - z) + z.clamp_min(0.4),
    "masks": lambda z: z.masked_fill(z < 0.5, 2.0) + (z > 0.3).double() + (z > 0.2) * z,
    "pairs": lambda z: torch.atan2(z, z.flip(-1)) + torch.hypot(z, z) + torch.logaddexp(z, 2 * z),
    "products": lambda z: torch.addcmul(z, z, z, value=0.3) + torch.lerp(z, 2 * z, 0.3),
    "views": lambda z: torch.stack([z[..., 1], z[..., 0]], -1).unsqueeze(-2).squeeze(-2),
    "joins": lambda z: torch.cat([z[..., :1], z[..., 1:].mul(2)], -1).roll(1, -1),
    "parts": lambda z: torch.stack(z.unbind(-1)[::-1], -1) + torch.cat(z.split(1, -1), -1),
    "shapes": lambda z: (
        z.reshape(*z.shape[:-1], 2, 1).transpose(-1, -2).expand(*z.shape[:-1], 3, 2).sum(-2)
    ),
    "places": lambda z: z[..., [1, 0]] + z[..., torch.tensor([0, 0])],
    "sums": lambda z: z * z.sum(-1, keepdim=True) + z.mean(-1, keepdim=True) + z.cumsum(-1),
    "extremes": lambda z: (
        z * z.amax(-1, keepdim=True) - z.min(-1, keepdim=True).values + z.prod(-1, keepdim=True)
    ),
    "soft": lambda z: z.softmax(-1) + z.log_softmax(-1) + z.logsumexp(-1, keepdim=True),
    "norm": lambda z: z / torch.linalg.vector_norm(z, dim=-1, keepdim=True),
    "matrices": lambda z: z @ torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double(),
    "einsum": lambda z: torch.einsum(
        "ij,...j->...i", torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double(), z
    ),
    "linear": lambda z: torch.nn.functional.linear(
        z, torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double(), torch.ones(2).double()
    ),
    "triangle": lambda z: torch.linalg.solve_triangular(
        torch.tensor([[1.0, 0.0], [3.0, 4.0]]).double(), z[..., None], upper=False
    )[..., 0],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    operation = OPERATIONS[name]
    model = Any2(move=lambda z: td.Normal(operation(z), 1.0))
    scope, recorded = interpreted(model, np.zeros((1, 2, 2)))
    memory = rows_of_memory(recorded.program)
    memory[2:4] = 0.0
    scope["transition"](np.array(recorded.tape.values), None, 1, 50, memory.reshape(-1))
    expected = operation(torch.from_numpy(memory[:2, :50].T.copy()))
    np.testing.assert_allclose(memory[-2:, :50].T, expected, rtol=1e-12, atol=1e-14)


def test_logarithm_in_loops() -> None:
    from seqdgm.kernels.trace_math import log

    @numba.njit
    def loop(x, out):
        for i in range(len(x)):
            out[i] = log(x[i])

    x = np.array([0.0, -0.0, -1.0, np.nan, np.inf, 5e-324, 1e-310, 2.3e-308, 1e-5, 1.0, 7.0, 1e308])
    out = np.empty_like(x)
    loop(x, out)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(out, np.log(x), rtol=1e-15)


def refused(model, message: str, y=None, **options) -> None:
    y = np.zeros((1, 3, 2)) if y is None else y
    with pytest.raises(ValueError, match=message):
        run(model, y, **options)


def branch(z):
    return td.Normal(z if z.sum() > 0 else -z, 1.0)


def assign(z):
    moved = z.clone()
    moved[..., 0] = 0.0
    return td.Normal(moved, 1.0)


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (branch, "torch.where"),
        (assign, "aten.(copy_|fill_) writes"),
        (lambda z: td.Normal(torch.special.digamma(z), 1.0), "aten.digamma has no formula"),
        (lambda z: td.Normal(z + torch.randn(2).double(), 1.0), "draws random numbers"),
        (lambda z: td.Gamma(2.0 + z**2, 1.0), "returns Gamma"),
        (lambda z: td.Normal(z.float(), torch.ones(2)), "float64"),
        (lambda z: td.Normal(z + torch.zeros(3, 1, 2).double(), 1.0), "all series share"),
    ],
)
def test_what_cannot_be_compiled(move, message: str) -> None:
    refused(Any2(move=move), message)


def test_what_the_recording_does_not_see_is_found_by_the_comparison() -> None:
    refused(
        Any2(move=lambda z: td.Normal(z + torch.from_numpy(np.sin(z.numpy())), 1.0)),
        "transition is off by .* compile=False",
    )
    refused(
        Any2(see=lambda z: td.Normal(z + torch.from_numpy(np.sin(z.numpy())), 1.0)),
        "emission is off by",
    )


def test_what_the_options_ask_for_in_vain() -> None:
    refused(Any2(), "no resampler= and no lookahead=", resampler="multinomial", lookahead="mean")
    refused(Any2(), "no proposal=", proposal="ekf")
    refused(Any2(), "between 0 and 1", threshold=2.0)
    for verb in ("smooth", "forecast"):
        extra = {"horizon": 2} if verb == "forecast" else {}
        model = Linear()
        data = {"y": gappy()}
        with pytest.raises(ValueError, match="filter and log_prob"):
            getattr(model, verb)(**data, **extra, compile=True, method="particle")


def test_observations_that_cannot_be() -> None:
    joint = Any2(see=EMISSIONS["joint"][0])
    y = np.zeros((1, 3, 2))
    y[0, 1, 0] = np.nan
    refused(joint, "step 1 is observed in part", y)
    poisson = Any2(see=EMISSIONS["poisson"][0])
    refused(poisson, "step 2: .* outside the support", np.array([[[1.0, 1], [2, 0], [-1, 3]]]))
    narrow = Any2(see=lambda z: td.Uniform(z, z + 1.0, validate_args=False))
    refused(narrow, "step 1: every particle", np.array([[[0.5, 0.5], [1e3, 0.0]]]))
