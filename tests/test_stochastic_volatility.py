"""Stochastic volatility against integration on a grid, closed forms, and statsmodels."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from scipy import special, stats
from scipy.optimize import minimize
from statsmodels.tsa.statespace.mlemodel import MLEModel

from seqdgm.inference import particle_score, smc
from seqdgm.inference.parameters import check_broadcast
from seqdgm.inference.particle_score import draw_trajectories
from seqdgm.inference.smc import Reference, SMCOptions
from seqdgm.inference.smoothing import trajectories
from seqdgm.kernels.particles import bootstrap_volatility
from seqdgm.models.stochastic_volatility import StochasticVolatility
from seqdgm.prepare import prepare

MU, RHO, SIGMA = -0.7, 0.9, 0.5
KNOWN = {"mu": MU, "rho": RHO, "sigma": SIGMA}
BETA = [0.8, -0.3]
MODELS = {
    "gaussian": StochasticVolatility(**KNOWN),
    "studentt": StochasticVolatility("studentt", df=5.0, mean=0.2, **KNOWN),
    "gaussian with leverage": StochasticVolatility(
        leverage=True, correlation=-0.7, beta=BETA, mean=0.1, **KNOWN
    ),
    "studentt with leverage": StochasticVolatility(
        "studentt", leverage=True, correlation=-0.7, df=5.0, **KNOWN
    ),
}


def within(values: np.ndarray, target: np.ndarray | float, errors: float = 5.0) -> None:
    """Mean over the first axis lies within so many standard errors of the target."""
    stderr = values.std(0, ddof=1) / np.sqrt(len(values))
    gap = np.abs(values.mean(0) - target)
    assert np.all(gap <= errors * stderr), (values.mean(0), target, stderr)


def score(model: StochasticVolatility, v: np.ndarray) -> np.ndarray:
    """What correlates with the innovation of the log-variance."""
    if model.df is None:
        return v
    df = model.df.item()
    return v * np.sqrt((df + 1) / (df + v**2))


def on_a_grid(
    model: StochasticVolatility, y: np.ndarray, u: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Log-likelihood, filtered means and variances, and smoothed means, on 601 log-variances.

    With leverage a missing error is integrated by 20 nodes of Gauss and Hermite, or over 200
    quantiles of a Student-t law.
    """
    z = np.linspace(-8, 7, 601)
    width = z[1] - z[0]
    forward, kernels, sight = [], [], []
    mu, rho, sigma = (getattr(model, name).item() for name in ("mu", "rho", "sigma"))
    mean = model.mean.item() + (0 if model.beta is None else u @ model.beta.detach().numpy())
    mean = np.broadcast_to(mean, len(y))
    law = stats.norm if model.df is None else stats.t(model.df.item())
    phi = 0.0 if model.correlation is None else model.correlation.item()
    density = stats.norm.pdf(z, mu, sigma / np.sqrt(1 - rho**2))
    total, means, variances = 0.0, [], []
    for t, x in enumerate(y):
        if t:
            centre = mu + rho * (z - mu)
            last = y[t - 1] - mean[t - 1]
            if np.isfinite(last):
                shifts, shares = [score(model, last * np.exp(-z / 2))], [1.0]
            else:
                shifts, shares = [0.0], [1.0]
                if phi and model.df is None:
                    shifts, shares = np.polynomial.hermite_e.hermegauss(20)
                elif phi:
                    shifts = score(model, law.ppf((np.arange(200) + 0.5) / 200))
                    shares = np.ones(200)
            scale = sigma * np.sqrt(1 - phi**2)
            error = (z[:, None] - centre) / scale
            kernel = sum(
                share * np.exp(-0.5 * (error - sigma * phi * s / scale) ** 2)
                for s, share in zip(shifts, shares, strict=True)
            )
            kernel = kernel / (sum(shares) * scale * np.sqrt(2 * np.pi))
            density = kernel @ density * width
            kernels.append(kernel * width)
        seen = np.ones_like(z)
        if np.isfinite(x):
            seen = law.pdf((x - mean[t]) * np.exp(-z / 2)) * np.exp(-z / 2)
        density = density * seen
        evidence = density.sum() * width
        total += np.log(evidence)
        density = density / evidence
        forward.append(density)
        sight.append(seen)
        means.append((z * density).sum() * width)
        variances.append((z**2 * density).sum() * width - means[-1] ** 2)
    back, smoothed = np.ones_like(z), [means[-1]]
    for density, kernel, seen in zip(forward[-2::-1], kernels[::-1], sight[:0:-1], strict=True):
        back = (back * seen) @ kernel
        back = back / back.max()
        smoothed.append((z * density * back).sum() / (density * back).sum())
    return float(total), np.array(means), np.array(variances), np.array(smoothed[::-1])


def case(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Seven returns, one missing and one large, with covariates where the model has them."""
    rng = np.random.default_rng(1)
    y = np.array([0.3, -0.9, 2.5, 0.1, np.nan, -0.4, 0.6])
    return y, rng.normal(size=(len(y), 2 if MODELS[name].beta is not None else 0))


@cache
def exact(name: str) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    return on_a_grid(MODELS[name], *case(name))


def particles(name: str, count: int, n_particles: int, **options):
    """Many independent runs at once: the series as so many rows of one batch."""
    y, u = case(name)
    model = MODELS[name]
    panel = np.repeat(y[None, :, None], count, 0)
    inputs = np.repeat(u[None], count, 0) if u.shape[1] else None
    _, batch, _ = prepare(model, panel, inputs)
    generator = torch.Generator().manual_seed(0)
    return smc.run(model, batch, SMCOptions(n_particles, **options), generator)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_particles", [4, 16, 64])
def test_evidence_is_unbiased(name: str, n_particles: int) -> None:
    out = particles(name, 64000 // n_particles, n_particles)
    within(np.exp(out.increments.sum(1).numpy() - exact(name)[0]), 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_the_fused_filter_is_of_the_same_model(name: str) -> None:
    y, u = case(name)
    model, count = MODELS[name], 2000
    inputs = np.repeat(u[None], count, 0) if u.shape[1] else None
    _, batch, _ = prepare(model, np.repeat(y[None, :, None], count, 0), inputs)
    parameters = model.fused(batch)
    if name == "studentt with leverage":
        assert parameters is None
        return
    out = bootstrap_volatility(
        parameters,
        batch.x[..., 0],
        batch.mask[..., 0],
        batch.lengths,
        n_particles=32,
        seed=1,
        implementation="reference",
    )
    within(np.exp(out.increments.sum(1).numpy() - exact(name)[0]), 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_filtered_moments_agree_with_the_grid(name: str) -> None:
    y, u = case(name)
    panel = np.repeat(y[None, :, None], 100, 0)
    inputs = np.repeat(u[None], 100, 0) if u.shape[1] else None
    found = MODELS[name].filter(panel, inputs, n_particles=500, seed=0)
    _, mean, variance, _ = exact(name)
    stderr = found.mean[..., 0].std(0, ddof=1) / 10
    # A ratio of estimates is biased by O(1/N).
    assert np.all(np.abs(found.mean[..., 0].mean(0) - mean) <= 5 * stderr + 3 / 500)
    spread = found.cov[..., 0, 0]
    stderr = spread.std(0, ddof=1) / 10
    assert np.all(np.abs(spread.mean(0) - variance) <= 5 * stderr + 3 / 500)


def test_leverage_matters_in_the_case_above() -> None:
    plain = StochasticVolatility(beta=BETA, mean=0.1, **KNOWN)
    y, u = case("gaussian with leverage")
    assert abs(on_a_grid(plain, y, u)[0] - exact("gaussian with leverage")[0]) > 0.3


@pytest.mark.parametrize("name", MODELS)
def test_samples_have_the_moments_of_the_model(name: str) -> None:
    """Variance, kurtosis, autocovariance of log-squares and leverage, averaged over series."""
    model = MODELS[name]
    n, steps, lag = 4000, 12, 3
    inputs = None if model.beta is None else np.zeros((n, steps, 2))
    x = model.sample(steps, n, inputs, seed=5).values[..., 0] - model.mean.item()
    spread = SIGMA**2 / (1 - RHO**2)
    df = np.inf if model.df is None else model.df.item()
    tail = 1.0 if model.df is None else df / (df - 2)
    within((x**2).mean(1), np.exp(MU + spread / 2) * tail)
    if model.df is None:
        variance = np.exp(MU + spread / 2)
        within((x**4).mean(1) / variance**2, 3 * np.exp(spread))
    logs = np.log(x**2)
    centre = special.digamma(0.5) + np.log(2)
    noise = np.pi**2 / 2
    if model.df is not None:
        centre = special.digamma(0.5) - special.digamma(df / 2) + np.log(df)
        noise += special.polygamma(1, df / 2)
    within(logs.mean(1), MU + centre)
    within(((logs - MU - centre) ** 2).mean(1), spread + noise)
    if model.correlation is None:
        # With leverage log v^2 and the later log-variances are dependent.
        product = (logs[:, :-lag] - MU - centre) * (logs[:, lag:] - MU - centre)
        within(product.mean(1), RHO**lag * spread)
    # cov(sign v_t, log x^2_{t+1}) = phi sigma E|s(v)|
    size = np.sqrt(2 / np.pi)
    if model.df is not None:
        size = np.sqrt((df + 1) / np.pi) * special.gamma((df + 1) / 2) / special.gamma(df / 2 + 1)
    phi = 0.0 if model.correlation is None else model.correlation.item()
    within((np.sign(x[:, :-1]) * (logs[:, 1:] - MU - centre)).mean(1), phi * SIGMA * size)


def test_a_smoothed_state_conditions_on_what_follows() -> None:
    y, u = case("gaussian with leverage")
    model = MODELS["gaussian with leverage"]
    smoothed = model.smooth(y, u, n_particles=500, seed=0)
    filtered = model.filter(y, u, n_particles=500, seed=0)
    assert smoothed.mean.shape == filtered.mean.shape == (1, 7, 1)
    assert smoothed.cov[0, 3, 0, 0] < filtered.cov[0, 3, 0, 0]


def test_forecasts_are_those_of_the_model() -> None:
    """From the exact filtered moments on: E z and E x, with the covariates of the horizon."""
    name = "gaussian with leverage"
    model, (y, u) = MODELS[name], case(name)
    ahead = np.random.default_rng(2).normal(size=(3, 2))
    future = model.forecast(3, y, np.concatenate([u, ahead]), n_samples=20000, seed=0)
    x = future.sample(20000)[0, :, :, 0]
    within(x, 0.1 + ahead @ np.array(BETA))
    z = future.states.sample(20000)[0, :, :, 0]
    assert np.allclose(z[:, 1:].mean(0) - MU, RHO * (z[:, :-1].mean(0) - MU), atol=0.04)


class LogSquareModel(MLEModel):
    """The quasi-likelihood of Harvey, Ruiz and Shephard, written for statsmodels."""

    start_params = np.array([-1.0, 0.9, 0.4])
    param_names = ("mu", "rho", "sigma")

    def __init__(self, y: np.ndarray) -> None:
        super().__init__(y, k_states=1, initialization="stationary")
        self["design", 0, 0] = self["selection", 0, 0] = 1.0
        self["obs_cov", 0, 0] = np.pi**2 / 2
        self["obs_intercept", 0] = special.digamma(0.5) + np.log(2)

    def transform_params(self, free):
        return np.array([free[0], np.tanh(free[1]), np.exp(free[2])])

    def untransform_params(self, params):
        return np.array([params[0], np.arctanh(params[1]), np.log(params[2])])

    def update(self, params, **kwargs):
        params = super().update(params, **kwargs)
        mu, rho, sigma = params
        self["transition", 0, 0] = rho
        self["state_intercept", 0] = (1 - rho) * mu
        self["state_cov", 0, 0] = sigma**2


def test_quasi_likelihood_has_the_optimum_of_statsmodels() -> None:
    model = StochasticVolatility(mu=-0.5, rho=0.95, sigma=0.3)
    x = model.sample(1500, seed=0).values[0, :, 0].copy()
    x[100:120] = np.nan
    fitted = StochasticVolatility().fit(x, method="qml")
    reference = LogSquareModel(np.log(x**2)).fit(disp=False)
    found = [getattr(fitted, name).item() for name in LogSquareModel.param_names]
    assert np.allclose(found, reference.params, atol=2e-3)
    assert fitted.fit_report_.objective[-1] == pytest.approx(reference.llf, abs=1e-3)
    assert fitted.fit_report_.converged.all()


LEARNED = {
    "gaussian": ("gaussian", False, {}),
    "studentt": ("studentt", False, {"df": 6.0}),
    "gaussian with leverage": ("gaussian", True, {"correlation": -0.6}),
    "studentt with leverage": ("studentt", True, {"df": 6.0, "correlation": -0.6}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "student" in n else ()) for n in LEARNED]
)
def test_quasi_likelihood_is_consistent(name: str) -> None:
    """Learned from long series, parameters given one by one included."""
    distribution, leverage, more = LEARNED[name]
    truth = {"mu": -0.5, "rho": 0.9, "sigma": 0.6, **more}
    model = StochasticVolatility(distribution, leverage, mean=0.3, beta=[0.5], **truth)
    u = np.random.default_rng(0).normal(size=(10, 2000, 1))
    x = model.sample(2000, 10, u, seed=1)
    given = {"df": 6.0} if leverage and more.get("df") else {}
    fitted = StochasticVolatility(distribution, leverage, mean=None, **given).fit(x.values, u)
    assert fitted.rho.item() == pytest.approx(0.9, abs=0.03)
    assert fitted.sigma.item() == pytest.approx(0.6, abs=0.08)
    assert fitted.mu.item() == pytest.approx(-0.5, abs=0.2 if distribution == "studentt" else 0.1)
    assert fitted.mean.item() == pytest.approx(0.3, abs=0.03)
    assert fitted.beta.item() == pytest.approx(0.5, abs=0.03)
    if leverage:
        assert fitted.correlation.item() == pytest.approx(-0.6, abs=0.1)
    if given:
        assert fitted.df.item() == 6.0
    assert fitted.estimates().keys() >= {"mu", "rho", "sigma", "beta[0]"}


def test_returns_of_zero_have_a_logarithm() -> None:
    x = StochasticVolatility(**KNOWN).sample(400, seed=0).values[0].copy()
    x[::50] = 0.0
    assert np.isfinite(StochasticVolatility().fit(x, method="qml").fit_report_.objective[-1])
    with pytest.raises(ValueError, match="no volatility"):
        StochasticVolatility().fit(np.zeros(50), method="qml")


def test_substituted_parameters_differ_from_row_to_row() -> None:
    """Parameters with axes (rows, 1, 1), the same result as one model a row."""
    name = "gaussian with leverage"
    y, u = case(name)
    panel, inputs = np.repeat(y[None, :, None], 2000, 0), np.tile(u, (2000, 1, 1))
    _, batch, _ = prepare(MODELS[name], panel, inputs)
    both = MODELS[name].clone()
    wide = {"mu": -0.7, "rho": 0.9, "sigma": 0.5, "mean": 0.1, "correlation": -0.7}
    for key, value in wide.items():
        del both._parameters[key]
        column = torch.full((2000, 1, 1), value, dtype=torch.float64)
        if key == "sigma":
            column[1000:] = 0.8
        setattr(both, key, column)
    out = smc.run(both, batch, SMCOptions(32), torch.Generator().manual_seed(0))
    found = out.increments.sum(1).numpy()
    within(np.exp(found[:1000] - exact(name)[0]), 1.0)
    other = MODELS[name].clone().set_params(sigma=0.8)
    _, single, _ = prepare(other, panel[:1000], inputs[:1000])
    alone = smc.run(other, single, SMCOptions(32), torch.Generator().manual_seed(1))
    gap = np.exp(found[1000:] - exact(name)[0]) - np.exp(
        alone.increments.sum(1).numpy() - exact(name)[0]
    )
    within(gap, 0.0)
    fused = both.fused(batch)
    assert fused is not None
    assert fused.sigma.shape == (2000,)
    assert fused.mean.shape == (2000, 7)
    assert abs(found[1000:].mean() - found[:1000].mean()) > 0.05


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_may_have_rows(name: str) -> None:
    model, (y, u) = MODELS[name], case(name)
    _, batch, _ = prepare(model, y, u if u.shape[1] else None)
    held = {key: value.detach() for key, value in model.named_parameters()}
    for key, value in held.items():
        rows = torch.stack([value, 0.9 * value + 0.01])
        check_broadcast(model, batch, {key: rows}, torch.Generator().manual_seed(0))
    both = {key: torch.stack([value, 0.9 * value + 0.01]) for key, value in held.items()}
    check_broadcast(model, batch, both, torch.Generator().manual_seed(0))


BAD = {
    "distribution": ({"distribution": "cauchy"}, "unknown"),
    "rho": ({"rho": 1.0}, "between -1 and 1"),
    "sigma": ({"sigma": 0.0}, "above 0"),
    "df": ({"distribution": "studentt", "df": 2.0}, "above 2"),
    "df of a gaussian": ({"df": 5.0}, "studentt"),
    "correlation": ({"leverage": True, "correlation": 1.0}, "between -1 and 1"),
    "correlation without leverage": ({"correlation": 0.5}, "leverage=True"),
    "not finite": ({"mu": np.nan}, "finite"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_parameters_are_refused(what: str) -> None:
    changed, match = BAD[what]
    with pytest.raises(ValueError, match=match):
        StochasticVolatility(**changed)


def test_bad_data_are_refused() -> None:
    model = StochasticVolatility(beta=[1.0], **KNOWN)
    with pytest.raises(ValueError, match="input"):
        model.filter(np.zeros(10))
    with pytest.raises(ValueError, match="coefficients"):
        model.clone().fit(np.ones(20), inputs=np.zeros((20, 2)))
    with pytest.raises(ValueError, match="one column"):
        StochasticVolatility().fit(np.zeros((20, 2)))
    with pytest.raises(ValueError, match="not fitted"):
        StochasticVolatility().filter(np.ones(20))
    with pytest.raises(ValueError, match="too short"):
        StochasticVolatility().fit(np.ones(5))


# -- smoothing and learning ---------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("smoother", ["ffbs", "marginal"])
def test_backward_smoothing_agrees_with_the_grid(name: str, smoother: str) -> None:
    y, u = case(name)
    count = 100
    _, batch, _ = prepare(
        MODELS[name],
        np.repeat(y[None, :, None], count, 0),
        np.repeat(u[None], count, 0) if u.shape[1] else None,
    )
    rng = torch.Generator().manual_seed(0)
    found = trajectories(MODELS[name], batch, SMCOptions(400), rng, 100, smoother)
    within(found.mean[..., 0].numpy(), exact(name)[3])


def test_ancestor_sampling_leaves_the_smoothing_law_invariant() -> None:
    """With leverage: a memory, but none beside z and the return. Few particles, many chains."""
    name, count = "gaussian with leverage", 2000
    y, u = case(name)
    model, rng = MODELS[name], torch.Generator().manual_seed(0)
    _, batch, _ = prepare(model, np.repeat(y[None, :, None], count, 0), np.tile(u, (count, 1, 1)))
    z = torch.zeros(count, len(y), 1).double()
    for _ in range(30):
        how = SMCOptions(5, "multinomial", reference=Reference(z, ancestor_sampling=True))
        z = draw_trajectories(model, batch, how, rng, 1, "genealogy").z[:, 0]
    within(z[..., 0].numpy(), exact(name)[3])


def learnable(name: str) -> StochasticVolatility:
    model = MODELS[name].clone()
    for p in model.parameters():
        p.requires_grad_()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_score_is_the_derivative_of_the_likelihood_on_a_grid(name: str) -> None:
    model, (y, u) = learnable(name), case(name)
    if name == "studentt with leverage":
        y = np.nan_to_num(y, nan=0.2)  # the grid takes seconds for a missing error
    slopes = {}
    for key, p in model.named_parameters():
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p.view(-1)[0] += sign * 1e-4
                values.append(on_a_grid(model, y, u)[0])
                p.view(-1)[0] -= sign * 1e-4
        slopes[key] = (values[0] - values[1]) / 2e-4
    rows = 20
    _, batch, _ = prepare(
        model,
        np.repeat(y[None, :, None], rows, 0),
        np.repeat(u[None], rows, 0) if u.shape[1] else None,
    )
    found = []
    for seed in range(12):
        rng = torch.Generator().manual_seed(seed)
        one = particle_score.score(model, batch, SMCOptions(300), rng, 20)
        found.append([one[key].view(-1)[0].item() / rows for key in slopes])
    within(np.array(found), np.array(list(slopes.values())))


def long_grid(theta: np.ndarray, y: np.ndarray) -> float:
    """Log-likelihood of (mu, atanh rho, log sigma) on 201 log-variances, all series together."""
    mu, rho, sigma = theta[0], np.tanh(theta[1]), np.exp(theta[2])
    spread = sigma / np.sqrt(1 - rho**2)
    z = mu + spread * np.linspace(-6, 6, 201)
    width = z[1] - z[0]
    kernel = stats.norm.pdf(z[:, None], mu + rho * (z - mu), sigma) * width
    density = np.repeat(stats.norm.pdf(z, mu, spread)[:, None], len(y), 1)
    total = 0.0
    for x in y.T:
        density = density * stats.norm.pdf(x, 0, np.exp(z / 2)[:, None])
        evidence = density.sum(0) * width
        total += np.log(evidence).sum()
        density = kernel @ (density / evidence)
    return float(total)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mle", "particle-em"])
def test_learning_reaches_the_maximum_on_a_grid(method: str) -> None:
    y = StochasticVolatility(**KNOWN).sample(100, n=6, seed=0).values[..., 0]
    start = np.array([MU, np.arctanh(RHO), np.log(SIGMA)])
    best = minimize(
        lambda theta: -long_grid(theta, y), start, method="Nelder-Mead", options={"fatol": 1e-3}
    )
    options = {"n_particles": 50, "n_trajectories": 10, "max_iter": 100}
    if method == "particle-em":
        options |= {"burn_in": 150, "max_iter": 220, "n_particles": 20}
    model = StochasticVolatility().fit(y[..., None], method=method, seed=0, **options)
    found = np.array([model.mu.item(), np.arctanh(model.rho.item()), np.log(model.sigma.item())])
    # The truth lies 1.5 below the maximum on average (three parameters).
    assert -best.fun - long_grid(found, y) < 0.25


def test_learning_keeps_to_the_domain() -> None:
    y = StochasticVolatility(**KNOWN).sample(40, n=3, seed=1).values
    for method, options in (("mle", {"learning_rate": 0.5}), ("particle-em", {"burn_in": 4})):
        model = StochasticVolatility(mu=MU).fit(
            y, method=method, seed=0, n_particles=20, n_trajectories=4, max_iter=6, **options
        )
        assert model.mu.item() == MU
        assert -1 < model.rho.item() < 1
        assert model.sigma.item() > 0
