"""The switching model against sums over all regimes, dense Gaussians and the Kalman filter."""

from __future__ import annotations

import itertools
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

import seqdgm as sq
from seqdgm.inference import rao_blackwell, smc
from seqdgm.inference.parameters import check_broadcast
from seqdgm.inference.rao_blackwell import Information
from seqdgm.inference.smc import SMCOptions
from seqdgm.models._conditionally_linear import Linear
from seqdgm.models.switching import SwitchingLinearSSM
from seqdgm.prepare import prepare

F = [[0.9, 0.2], [-0.1, 0.7]]
H = [[1.0, 0.0], [0.5, 1.0]]
Q = [[0.5, 0.1], [0.1, 0.3]]
R = [[0.4, 0.15], [0.15, 0.6]]
STEPS = 6


def two_regimes() -> SwitchingLinearSSM:
    """A pair of columns that turns wild, and drifts, in the second regime."""
    return SwitchingLinearSSM(
        Pi=[[0.8, 0.2], [0.4, 0.6]],
        F=[F, [[0.5, -0.4], [0.3, 0.9]]],
        H=H,
        Q=[Q, 6 * np.array(Q)],
        R=[R, [[1.0, 0.0], [0.0, 0.3]]],
        m0=[0.5, -0.5],
        P0=[[1.0, 0.0], [0.0, 2.0]],
        b=[[0.0, 0.0], [1.0, -1.0]],
        d=[[0.0, 0.0], [0.5, 0.0]],
        p0=[0.7, 0.3],
    )


def three_regimes() -> SwitchingLinearSSM:
    """A level with three kinds of step, one column."""
    return SwitchingLinearSSM(
        Pi=[[0.8, 0.1, 0.1], [0.3, 0.7, 0.0], [0.2, 0.2, 0.6]],
        F=[[1.0]],
        H=[[1.0]],
        Q=[[[0.1]], [[2.0]], [[0.5]]],
        R=[[[0.5]], [[0.5]], [[3.0]]],
        b=[[0.0], [1.0], [-1.0]],
    )


def data(model: SwitchingLinearSSM, seed: int = 0) -> np.ndarray:
    """A short series with a gap, and a vector seen in part."""
    y = model.sample(STEPS, seed=seed).values[0].copy()
    y[3] = np.nan
    y[4, 0] = np.nan
    return y


def within(values: np.ndarray, target: np.ndarray | float, slack: np.ndarray | float = 0) -> None:
    """Mean over the first axis lies within five standard errors of the target."""
    stderr = values.std(0, ddof=1) / np.sqrt(len(values))
    gap = np.abs(values.mean(0) - target)
    assert np.all(gap <= 5 * stderr + slack + 1e-12), (gap, stderr)


# -- exact answers, by a dense Gaussian for every path of regimes ---------------------------------


class Exact(NamedTuple):
    """Exhaustive answers about one series."""

    log_likelihood: float
    mean: np.ndarray
    cov: np.ndarray


def dense(model: SwitchingLinearSSM, path: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Joint mean and covariance of all states, and the map to all observations."""
    f, h, q, r, m0, p0, b, d = (
        getattr(model, f"{name}_").numpy() for name in ("F", "H", "Q", "R", "m0", "P0", "b", "d")
    )
    n, steps, dim = f.shape[-1], len(path), h.shape[-2]
    mean, cov = np.zeros(steps * n), np.zeros((steps * n, steps * n))
    load, offset = np.zeros((steps * dim, steps * n)), np.zeros(steps * dim)
    noise = np.zeros((steps * dim, steps * dim))
    for t, k in enumerate(path):
        now = slice(t * n, (t + 1) * n)
        if t == 0:
            mean[now], cov[now, now] = m0[k], p0[k]
        else:
            last = slice((t - 1) * n, t * n)
            mean[now] = f[k] @ mean[last] + b[k]
            cov[now, : t * n] = f[k] @ cov[last, : t * n]
            cov[: t * n, now] = cov[now, : t * n].T
            cov[now, now] = f[k] @ cov[last, last] @ f[k].T + q[k]
        seen = slice(t * dim, (t + 1) * dim)
        load[seen, now], offset[seen], noise[seen, seen] = h[k], d[k], r[k]
    return mean, cov, load, offset, noise


def exhaustive(model: SwitchingLinearSSM, y: np.ndarray, known: int) -> Exact:
    """Evidence of the first `known` steps, and moments of (z, regime) of all steps given them."""
    steps, count, n = len(y), model.n_regimes, model.state_dim
    chain, first = model.Pi_.numpy(), model.p0_.numpy()
    x = np.where(np.arange(steps)[:, None] < known, y, np.nan).ravel()
    seen = np.isfinite(x)
    logs, means, covs = [], [], []
    for path in itertools.product(range(count), repeat=steps):
        chance = first[path[0]] * np.prod([chain[i, j] for i, j in itertools.pairwise(path)])
        if chance == 0:
            continue
        mean, cov, load, offset, noise = dense(model, path)
        h = load[seen]
        s = h @ cov @ h.T + noise[np.ix_(seen, seen)]
        centre = h @ mean + offset[seen]
        gain = np.linalg.solve(s, h @ cov).T
        logs.append(np.log(chance) + multivariate_normal(centre, s).logpdf(x[seen]))
        a = (mean + gain @ (x[seen] - centre)).reshape(steps, n)
        v = (cov - gain @ h @ cov).reshape(steps, n, steps, n)
        means.append(np.concatenate([a, np.eye(count)[list(path)]], 1))
        wide = np.zeros((steps, n + count, n + count))
        wide[:, :n, :n] = np.einsum("titj->tij", v)
        covs.append(wide)
    total = np.logaddexp.reduce(logs)
    weights = np.exp(np.array(logs) - total)
    mean = np.einsum("k,kti->ti", weights, np.array(means))
    centred = np.array(means) - mean
    cov = np.einsum("k,ktij->tij", weights, np.array(covs))
    cov += np.einsum("k,kti,ktj->tij", weights, centred, centred)
    return Exact(float(total), mean, cov)


MODELS = {"two regimes": two_regimes, "three regimes": three_regimes}


@cache
def filtered(name: str) -> Exact:
    model = MODELS[name]()
    y = data(model)
    steps = [exhaustive(model, y[: t + 1], t + 1) for t in range(STEPS)]
    means, covs = [s.mean[-1] for s in steps], [s.cov[-1] for s in steps]
    return Exact(steps[-1].log_likelihood, np.array(means), np.array(covs))


@cache
def smoothed(name: str) -> Exact:
    model = MODELS[name]()
    return exhaustive(model, data(model), STEPS)


def repeated(name: str, count: int) -> tuple[SwitchingLinearSSM, np.ndarray]:
    model = MODELS[name]()
    return model, np.repeat(data(model)[None], count, 0)


def evidence(model: SwitchingLinearSSM, y: np.ndarray, count: int, **options) -> np.ndarray:
    _, batch, _ = prepare(model, y, None)
    generator = torch.Generator().manual_seed(1)
    return smc.run(model, batch, SMCOptions(count, **options), generator).increments.sum(1).numpy()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_particles", [4, 16, 64])
def test_evidence_is_unbiased(name: str, n_particles: int) -> None:
    model, y = repeated(name, 16000 // n_particles)
    ratio = np.exp(evidence(model, y, n_particles) - filtered(name).log_likelihood)
    assert ratio.std() > 0
    within(ratio, 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_evidence_by_the_prior_is_unbiased_and_varies_more(name: str) -> None:
    model, y = repeated(name, 1000)
    ratios = {
        proposal: np.exp(evidence(model, y, 16, proposal=proposal) - filtered(name).log_likelihood)
        for proposal in ("auto", "bootstrap")
    }
    within(ratios["bootstrap"], 1.0)
    assert ratios["auto"].std() < 0.8 * ratios["bootstrap"].std()


@pytest.mark.parametrize("name", MODELS)
def test_filtered_moments_are_those_of_the_mixture(name: str) -> None:
    model, y = repeated(name, 100)
    found, exact = model.filter(y, n_particles=100, seed=0), filtered(name)
    scale = np.sqrt(np.einsum("tii->ti", exact.cov))
    # Ratios of estimates are biased by O(1/N): allow for it beside the Monte-Carlo error.
    within(found.mean, exact.mean, 3 * scale / 100)
    within(found.cov, exact.cov, 3 * scale[:, :, None] * scale[:, None] / 100)
    probabilities = found.mean[..., model.state_dim :]
    assert np.allclose(probabilities.sum(-1), 1)
    assert found.names[-model.n_regimes :] == tuple(f"regime{k}" for k in range(model.n_regimes))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("moves", [0, 10])
def test_smoothed_moments_are_those_of_the_mixture(name: str, moves: int) -> None:
    model, y = repeated(name, 60)
    exact = smoothed(name)
    _, batch, _ = prepare(model, y, None)
    generator = torch.Generator().manual_seed(0)
    found = rao_blackwell.smooth(model, batch, n_particles=100, generator=generator, moves=moves)
    scale = np.sqrt(np.einsum("tii->ti", exact.cov))
    within(found.mean.numpy(), exact.mean, 4 * scale / 100)
    within(found.cov.numpy(), exact.cov, 4 * scale[:, :, None] * scale[:, None] / 100)


def test_backward_moves_leave_more_distinct_paths() -> None:
    model = two_regimes()
    y = model.sample(60, 20, seed=3).values
    _, batch, _ = prepare(model, y, None)
    spread = {}
    for moves in (0, 10):
        generator = torch.Generator().manual_seed(0)
        out = rao_blackwell.smooth(model, batch, n_particles=30, generator=generator, moves=moves)
        probability = out.mean[:, :20, -1].numpy()
        spread[moves] = np.mean((probability > 0.01) & (probability < 0.99))
    assert spread[10] > 1.2 * spread[0]


def test_information_against_a_dense_gaussian() -> None:
    """What later data say of a_t integrates to their marginal density, up to a constant."""
    rng = np.random.default_rng(0)
    lin = Linear(
        *(torch.tensor(np.array(m, dtype=float)) for m in (F, [0.3, -1], Q, H, [0.2, 0], R))
    )
    x = torch.tensor([0.7, float("nan")], dtype=torch.float64)
    info = Information(torch.zeros(2, 2).double(), torch.zeros(2).double())
    info = info.observed(lin, x).carried(lin)
    gaps = []
    for _ in range(5):
        mean, root = rng.normal(size=2), rng.normal(size=(2, 2))
        cov = root @ root.T
        centre = (np.array(H) @ (np.array(F) @ mean + [0.3, -1]) + [0.2, 0])[0]
        predicted = np.array(F) @ cov @ np.array(F).T + Q
        variance = (np.array(H) @ predicted @ np.array(H).T + R)[0, 0]
        density = multivariate_normal(centre, variance).logpdf(0.7)
        gaps.append(float(info.log_integral(torch.tensor(mean), torch.tensor(cov))) - density)
    assert np.ptp(gaps) < 1e-10


def test_draws_and_forecasts_have_the_exact_moments() -> None:
    model = two_regimes()
    y = data(model)
    exact = exhaustive(model, np.concatenate([y, np.full((2, 2), np.nan)]), STEPS)
    draws = model.smooth(y, n_particles=2000, seed=0).sample(2000)[0]
    variance = np.einsum("tii->ti", exact.cov)
    within(draws, exact.mean[:STEPS])
    within((draws - exact.mean[:STEPS]) ** 2, variance[:STEPS])
    future = model.forecast(2, y, n_samples=2000, seed=0)
    within(future.sample(2000)[0], _observed(model, exact.mean[STEPS:]))
    found = future.states.sample(2000)[0]
    within(found, exact.mean[STEPS:])
    within((found - exact.mean[STEPS:]) ** 2, variance[STEPS:])
    assert np.allclose(future.states.mean[0], exact.mean[STEPS:], atol=0.15)


def _observed(model: SwitchingLinearSSM, mean: np.ndarray) -> np.ndarray:
    """E[x] = H E[z] + E[d]; H is shared by the regimes."""
    return mean[:, :2] @ np.array(H).T + mean[:, 2:] @ model.d_.numpy()


def test_imputed_values_have_the_exact_mean() -> None:
    model, y = repeated("three regimes", 100)
    exact = smoothed("three regimes")
    filled = model.impute(y, n_particles=100, seed=0)
    assert np.array_equal(filled[np.isfinite(y)], y[np.isfinite(y)])
    within(filled[:, 3], exact.mean[3, :1], 4 * np.sqrt(exact.cov[3, 0, 0]) / 100)


# -- special cases ---------------------------------------------------------------------------------


def test_a_single_regime_is_the_kalman_filter() -> None:
    start = {"m0": [0.5, -0.5], "P0": [[1.0, 0.0], [0.0, 2.0]]}
    single = SwitchingLinearSSM([[1.0]], F, H, Q, R, **start)
    known = sq.LinearGaussianSSM(F=F, H=H, Q=Q, R=R, **start)
    panel = [known.sample(length, seed=length).values[0].copy() for length in (20, 14)]
    panel[0][5:8] = np.nan
    panel[0][9, 0] = np.nan
    panel[1][11, 1] = np.nan
    a, b = single.log_prob(panel, n_particles=3, seed=0), known.log_prob(panel)
    assert np.allclose(a.value, b.value, rtol=0, atol=1e-10)
    for verb in ("filter", "smooth"):
        mine, theirs = (
            getattr(single, verb)(panel, n_particles=3, seed=0),
            getattr(known, verb)(panel),
        )
        assert np.allclose(mine.mean[..., :2], theirs.mean, rtol=0, atol=1e-10, equal_nan=True)
        assert np.allclose(mine.cov[..., :2, :2], theirs.cov, rtol=0, atol=1e-10, equal_nan=True)
        assert np.isnan(mine.mean[1, 14:]).all()
    ahead, exact = single.forecast(3, panel, n_samples=5, seed=0), known.forecast(3, panel)
    assert np.allclose(ahead.states.mean[..., :2], exact.states.mean, rtol=0, atol=1e-10)
    assert np.allclose(ahead.states.cov[..., :2, :2], exact.states.cov, rtol=0, atol=1e-10)


def test_samples_visit_the_regimes_as_often_as_the_chain_does() -> None:
    """Regimes told apart by their level: an independent average over many short series."""
    model = SwitchingLinearSSM(
        Pi=[[0.9, 0.1], [0.3, 0.7]],
        F=[[0.0]],
        H=[[1.0]],
        Q=[[0.0]],
        R=[[0.01]],
        P0=[[0.0]],
        d=[[0.0], [10.0]],
    )
    wild = model.sample(5, 4000, seed=0).values[..., 0] > 5
    within(wild.astype(float), 0.25)
    within((wild[:, 1:] & wild[:, :-1]).astype(float), 0.25 * 0.7)


def test_substituted_matrices_may_differ_from_row_to_row() -> None:
    """Matrices with axes (rows, 1) in front: each row has the evidence of its own model."""
    model, y = repeated("three regimes", 200)
    _, batch, _ = prepare(model, y, None)
    noisy = 2 * model.R_
    both = model.clone()
    both.R_ = torch.stack([model.R_, noisy]).repeat(100, 1, 1, 1)[:, None]
    both.Pi_ = model.Pi_.expand(200, 1, -1, -1)
    out = smc.run(both, batch, SMCOptions(100), torch.Generator().manual_seed(0))
    second = model.clone()
    second.R_ = noisy
    exact = np.array([exhaustive(m, data(model), STEPS).log_likelihood for m in (model, second)])
    within(np.exp(out.increments.sum(1).numpy().reshape(100, 2) - exact), 1.0)
    assert abs(exact[0] - exact[1]) > 0.2


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_may_have_rows(name: str) -> None:
    model = MODELS[name]()
    _, batch, _ = prepare(model, data(model), None)
    held = dict(model.named_buffers())
    for key in ("F_", "H_", "Q_", "R_", "m0_", "P0_", "b_", "d_"):
        rows = torch.stack([held[key], 1.2 * held[key]])
        check_broadcast(model, batch, {key: rows}, torch.Generator().manual_seed(0))
    chain = torch.stack([held["Pi_"], held["Pi_"].flip(-1)])
    check_broadcast(model, batch, {"Pi_": chain}, torch.Generator().manual_seed(0))


def test_an_observation_without_a_density_is_named() -> None:
    model = SwitchingLinearSSM([[1.0]], F=[[1.0]], H=[[1.0]], Q=[[0.0]], R=[[0.0]], P0=[[1.0]])
    with pytest.raises(ValueError, match=r"step 1"):
        model.log_prob(np.array([1.0, 2.0, 3.0]), n_particles=4, seed=0)


def test_smoothing_without_noise_asks_for_the_genealogy() -> None:
    """A Markov-switching autoregression has R = 0."""
    model = SwitchingLinearSSM(
        Pi=[[0.9, 0.1], [0.2, 0.8]], F=[[[0.5]], [[-0.5]]], H=[[1.0]], Q=[[1.0]], R=[[0.0]]
    )
    y = model.sample(20, seed=0)
    assert np.isfinite(model.log_prob(y, n_particles=20, seed=0).value).all()
    with pytest.raises(ValueError, match="moves=0"):
        model.smooth(y, n_particles=20, seed=0)


BAD = {
    "Pi does not add up": ({"Pi": [[0.5, 0.4], [0.5, 0.5]]}, "add up to 1"),
    "Pi is not square": ({"Pi": [[0.5, 0.5]]}, "square"),
    "no unique stationary law": ({"Pi": [[1.0, 0.0], [0.0, 1.0]]}, "give p0"),
    "too many regimes": ({"Q": np.ones((3, 1, 1))}, "regimes first"),
    "a negative variance": ({"R": [[-1.0]]}, "negative eigenvalue"),
    "offsets of another width": ({"b": [1.0, 2.0]}, "expected"),
    "p0 of another length": ({"p0": [1.0]}, "p0 has shape"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_matrices_are_refused(what: str) -> None:
    changed, match = BAD[what]
    good = {"Pi": [[0.5, 0.5], [0.5, 0.5]], "F": [[1.0]], "H": [[1.0]], "Q": [[1.0]], "R": [[1.0]]}
    with pytest.raises(ValueError, match=match):
        SwitchingLinearSSM(**{**good, **changed})


def test_bad_data_are_refused() -> None:
    model = three_regimes()
    with pytest.raises(ValueError, match="columns"):
        model.filter(np.zeros((10, 2)))
    with pytest.raises(ValueError, match="input"):
        model.filter(np.zeros(10), inputs=np.zeros((10, 1)))
    with pytest.raises(ValueError, match="takes none"):
        model.clone().fit(np.zeros(10), inputs=np.zeros((10, 1)))
