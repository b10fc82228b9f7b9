"""EM and maximum likelihood of the linear-Gaussian model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import seqdgm as sq
from seqdgm.inference.em import Expected
from seqdgm.inference.kalman import conditional_emission
from seqdgm.models.linear_gaussian import Matrices
from seqdgm.types import Batch

F = np.array([[0.8, 0.3], [-0.2, 0.7]])
H = np.array([[1.0, 0.0], [0.3, 1.0], [0.5, -0.5]])
Q = np.array([[0.4, 0.1], [0.1, 0.2]])
R = np.array([[0.3, 0.1, 0.0], [0.1, 0.4, 0.05], [0.0, 0.05, 0.2]])


def truth() -> sq.LinearGaussianSSM:
    return sq.LinearGaussianSSM(F=F, H=H, Q=Q, R=R, m0=np.zeros(2), P0=np.eye(2))


def data(length: int, n: int, seed: int, holes: float = 0.1) -> list[np.ndarray]:
    values = truth().sample(length, n, seed=seed).values.copy()
    rng = np.random.default_rng(seed)
    values[rng.random(values.shape) < holes] = np.nan
    return [v[: length - 3 * k] for k, v in enumerate(values)]


LEARN = [
    {},
    {"F": F},
    {"F": F, "H": H},
    {"H": H, "R": R},
    {"Q": Q, "R": R},
    {"F": F, "H": H, "Q": Q, "R": R},
    {"F": F, "H": H, "diffuse": True},
    {"emission_cov": "diagonal"},
    {"F": F, "diffuse": [True, False]},
]


@pytest.mark.parametrize("given", LEARN, ids=lambda g: ",".join(g) or "nothing")
@pytest.mark.parametrize("pooled", [False, True])
def test_the_likelihood_never_decreases_and_what_is_given_stays(given, pooled) -> None:
    model = sq.LinearGaussianSSM(latent_dim=2, **given)
    model.fit(data(40, 3, seed=1), max_iter=30, tol=0.0, pooled=pooled)
    steps = np.diff(model.fit_report_.objective)
    assert len(steps) > 5
    assert steps.min() >= -1e-9 * np.abs(model.fit_report_.objective).max()
    for name, value in given.items():
        if name in "FHQR":
            held = getattr(model, f"{name}_").numpy()
            np.testing.assert_array_equal(held, np.broadcast_to(value, held.shape))
    for name in "QR":
        assert np.linalg.eigvalsh(getattr(model, f"{name}_").numpy()).min() > -1e-10


def test_it_recovers_a_known_system() -> None:
    y = data(400, 5, seed=2)
    model = sq.LinearGaussianSSM(latent_dim=2).fit(y, max_iter=300, pooled=True)
    # The state's basis is free: compare what is not, the eigenvalues and the spectrum at lag 0.
    found = np.sort_complex(np.linalg.eigvals(model.F_[0].numpy()))
    np.testing.assert_allclose(found, np.sort_complex(np.linalg.eigvals(F)), atol=0.1)
    exact = truth().log_prob(y).value.sum()
    learned = model.log_prob(y).value.sum()
    # A maximum over k parameters exceeds the truth by half a chi-square(k) variable.
    assert -1e-6 < learned - exact < 40
    assert abs(model.R_[0].numpy() - R).max() < 0.1


def test_the_maximum_is_where_scipy_finds_it() -> None:
    y = data(60, 1, seed=3)
    model = sq.LinearGaussianSSM(F=F, H=H, R=R, m0=np.zeros(2), P0=np.eye(2))

    def negative(theta: np.ndarray) -> float:
        root = np.array([[np.exp(theta[0]), 0], [theta[2], np.exp(theta[1])]])
        given = {"Q": root @ root.T, "F": F, "H": H, "R": R, "m0": np.zeros(2), "P0": np.eye(2)}
        return -sq.LinearGaussianSSM(**given).log_prob(y).value.sum()

    best = -minimize(negative, np.zeros(3), method="Nelder-Mead", tol=1e-9).fun
    for method, gap in (("mle", 1e-6), ("em", 1e-3)):
        options = {"tol": 1e-12, "max_iter": 2000} if method == "em" else {}
        model.fit(y, method=method, **options)
        assert model.fit_report_.log_likelihood.sum() == pytest.approx(best, abs=gap)


def test_em_steps_agree_with_a_numerical_m_step() -> None:
    """One EM step for R maximises the expected complete-data likelihood of the missing vectors."""
    y = data(50, 1, seed=4, holes=0.3)
    start = {"F": F, "H": H, "Q": Q, "m0": np.zeros(2), "P0": np.eye(2)}
    model = sq.LinearGaussianSSM(**start, R=0.5 * R + 0.2 * np.eye(3), learn=("R",))
    model.fit(y, max_iter=200, tol=0.0)
    found = model.fit_report_.log_likelihood.sum()

    def moved(delta: np.ndarray) -> float:
        given = model.R_[0].numpy() + delta
        return float(sq.LinearGaussianSSM(**start, R=given).log_prob(y).value.sum())

    rng = np.random.default_rng(0)
    for _ in range(10):
        step = rng.normal(size=(3, 3)) * 5e-3
        assert moved(step + step.T) < found + 1e-5


def test_inputs_are_learned() -> None:
    rng = np.random.default_rng(6)
    u = rng.normal(size=(300, 2))
    b, d = np.array([[1.0, -0.5]]), np.array([[0.7, 2.0]])
    z, x = 0.0, []
    for k in range(300):
        z = 0.6 * z + float(b[0] @ u[k]) + 0.3 * rng.normal() if k else rng.normal()
        x.append(z + float(d[0] @ u[k]) + 0.2 * rng.normal())
    model = sq.LinearGaussianSSM(
        F=[[0.6]], H=[[1.0]], m0=[0.0], P0=[[1.0]], learn=("B", "D", "Q", "R")
    ).fit(np.array(x), inputs=u)
    np.testing.assert_allclose(model.B_[0].numpy(), b, atol=0.12)
    np.testing.assert_allclose(model.D_[0].numpy(), d, atol=0.12)
    ahead = model.forecast(3, inputs=rng.normal(size=(3, 2)))
    assert np.isfinite(ahead.mean).all()


def test_conditional_emission_is_gaussian_conditioning() -> None:
    rng = np.random.default_rng(7)
    mask = np.array([[[True, False, True], [False, False, True], [True, True, True]]])
    x = rng.normal(size=(1, 3, 3))
    full = {"F": F, "H": H, "Q": Q, "R": R, "m0": np.zeros(2), "P0": np.eye(2)}
    full |= {"B": np.zeros((2, 0)), "D": np.zeros((3, 0)), "b": np.zeros(2), "d": np.ones(3)}
    matrices = Matrices(
        **{k: torch.from_numpy(np.array(v, dtype=float))[None] for k, v in full.items()}
    )
    u = torch.zeros(1, 3, 0, dtype=torch.float64)
    batch = Batch(
        torch.from_numpy(np.where(mask, x, 0.0)),
        torch.from_numpy(mask),
        torch.tensor([3]),
        u,
        torch.tensor([0]),
        ("a",),
    )
    system = matrices.system(u, torch.zeros(2, dtype=torch.bool))
    load, offset, noise = (part[0].numpy() for part in conditional_emission(system, batch))
    z = rng.normal(size=2)
    for t in range(3):
        o, m = np.flatnonzero(mask[0, t]), np.flatnonzero(~mask[0, t])
        gain = R[np.ix_(m, o)] @ np.linalg.inv(R[np.ix_(o, o)])
        mean = (H @ z + 1)[m] + gain @ (x[0, t, o] - (H @ z + 1)[o])
        cov = R[np.ix_(m, m)] - gain @ R[np.ix_(o, m)]
        np.testing.assert_allclose((load[t] @ z + offset[t])[m], mean, atol=1e-12)
        np.testing.assert_allclose(noise[t][np.ix_(m, m)], cov, atol=1e-12)
        np.testing.assert_allclose((load[t] @ z + offset[t])[o], x[0, t, o], atol=1e-12)
        np.testing.assert_allclose(noise[t][o], 0, atol=1e-12)


def test_the_best_of_several_starts_is_kept_and_named() -> None:
    y = data(60, 3, seed=8)
    one = sq.LinearGaussianSSM(latent_dim=2).fit(y, max_iter=25, seed=1)
    model = sq.LinearGaussianSSM(latent_dim=2, n_starts=4)
    several = model.clone().fit(y, max_iter=25, seed=1)
    again = model.clone().fit(y, max_iter=25, seed=1)
    gain = several.fit_report_.log_likelihood - one.fit_report_.log_likelihood
    assert gain.min() >= 0
    assert gain.max() > 0
    np.testing.assert_array_equal(several.F_.numpy(), again.F_.numpy())
    assert len(several.start_) == 3
    assert [k > 0 for k in several.start_] == (gain > 0).tolist()
    assert any("best of 4 starts" in note for note in several.fit_report_.messages)
    other = model.clone().fit(y, max_iter=25, seed=2)
    assert not np.array_equal(other.fit_report_.log_likelihood, several.fit_report_.log_likelihood)
    # A series draws the same starts alone as in company, and quasi-Newton goes on from the best.
    alone = model.clone().fit(y[0], max_iter=25, seed=1)
    np.testing.assert_allclose(
        alone.fit_report_.log_likelihood[0], several.fit_report_.log_likelihood[0], rtol=1e-7
    )
    climbed = model.clone().fit(y[:1], method="mle", max_iter=20, seed=1)
    assert climbed.fit_report_.log_likelihood[0] > alone.fit_report_.log_likelihood[0] - 0.5


@pytest.mark.parametrize("given", [{}, {"F": F}, {"H": H, "R": R}, {"emission_cov": "diagonal"}])
def test_quasi_newton_keeps_what_is_given_and_is_no_worse_than_em(given) -> None:
    y = data(40, 1, seed=9)
    start = {"m0": np.zeros(2), "P0": np.eye(2)}
    climbed = sq.LinearGaussianSSM(latent_dim=2, **start, **given).fit(y, max_iter=30)
    model = sq.LinearGaussianSSM(latent_dim=2, **start, **given).fit(y, method="mle", max_iter=30)
    found = model.fit_report_.log_likelihood[0]
    assert found == pytest.approx(model.log_prob(y).value[0], abs=1e-8)
    assert found >= climbed.fit_report_.log_likelihood[0]
    for name in ("F", "H", "R"):
        if name in given:
            np.testing.assert_array_equal(getattr(model, f"{name}_")[0].numpy(), given[name])
    if "emission_cov" in given:
        off = model.R_[0] - torch.diag(torch.diagonal(model.R_[0]))
        assert not off.any()


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_a_level_far_from_zero_costs_no_digits(shift) -> None:
    """Moments of residuals, not of the values, enter the M-step."""
    nile = np.asarray(sq.datasets.load("nile").y, dtype=float)
    model = sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], diffuse=True)
    model.fit(nile + shift, max_iter=1000, tol=1e-10)
    assert model.R_.item() == pytest.approx(15099, rel=2e-2)
    assert model.Q_.item() == pytest.approx(1469.1, rel=1e-1)
    far = model.fit_report_.log_likelihood[0]
    near = sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], diffuse=True)
    near.fit(nile, max_iter=1000, tol=1e-10)
    assert far == pytest.approx(near.fit_report_.log_likelihood[0], abs=1e-4)


@pytest.mark.parametrize("length", [4, 7])
def test_a_series_shorter_than_the_state_starts(length) -> None:
    y = data(60, 1, seed=10)[0][:length, :1]
    y[0] = 0.3  # something is observed
    model = sq.LinearGaussianSSM(latent_dim=4).fit(y, max_iter=10, tol=0.0)
    assert np.isfinite(model.forecast(2).mean).all()
    assert np.diff(model.fit_report_.objective).min() > -1e-8


def test_subspace_starts_take_inputs_out_first() -> None:
    """With strong inputs the start is near the end: few EM steps reach the likelihood of many."""
    rng = np.random.default_rng(11)
    u = 10 * rng.normal(size=(200, 1))
    z, x = np.zeros(200), np.zeros((200, 2))
    for t in range(200):
        z[t] = (0.8 * z[t - 1] if t else 0.0) + rng.normal()
        x[t] = z[t] * np.array([1.0, -0.5]) + u[t] * [3.0, 1.0] + 0.3 * rng.normal(size=2)
    model = sq.LinearGaussianSSM(latent_dim=1, B=np.zeros((1, 1)))
    few = model.clone().fit(x, inputs=u, max_iter=5).fit_report_.log_likelihood[0]
    many = model.fit(x, inputs=u, max_iter=200).fit_report_.log_likelihood[0]
    assert many - few < 10
    np.testing.assert_allclose(model.D_[0].numpy()[:, 0], [3.0, 1.0], atol=0.03)


def test_nile_estimates_are_the_published_ones() -> None:
    """Durbin and Koopman (2012), section 2.10: 15099 and 1469.1."""
    nile = sq.datasets.load("nile").y
    model = sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], diffuse=True).fit(nile, method="mle")
    assert model.R_.item() == pytest.approx(15099, rel=2e-4)
    assert model.Q_.item() == pytest.approx(1469.1, rel=2e-4)


@pytest.mark.parametrize("lengths", [(6,), (2, 6)])
def test_a_variance_that_collapses_ends_the_climb(lengths: tuple[int, ...]) -> None:
    """The likelihood of a constant series has no maximum: R goes to zero, where numbers end."""
    y = [np.full((n, 1), 1e8) for n in lengths]
    model = sq.LinearGaussianSSM(latent_dim=2).fit(y, seed=1)
    states = model.smooth(y)
    for k, n in enumerate(lengths):
        assert np.isfinite(states.cov[k, :n]).all()
    assert np.isfinite(model.forecast(3).mean).all()


def test_a_series_that_the_states_explain_exactly_keeps_some_noise() -> None:
    """Two values and two states: without a least noise the likelihood has no maximum."""
    fitted = sq.LinearGaussianSSM(latent_dim=2).fit([np.array([[1.2573e-4], [-1.321e-4]])], seed=1)
    assert np.isfinite(fitted.log_prob().value).all()
    low, high = fitted.forecast(3).interval(90)
    assert (low < high).all()


def test_the_least_noise_is_the_best_covariance_above_it() -> None:
    """Against a search over all covariances that are the floor and a square."""
    floor = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    residual = torch.tensor([[[3.0, 0.9], [0.9, 0.4]]], dtype=torch.float64)
    expected = Expected(None, None, None, True, floor)  # type: ignore[arg-type]
    found, given = expected.above_noise(residual)[0].numpy(), residual[0].numpy()

    def cost(entries: np.ndarray) -> float:
        root = np.array([[entries[0], 0.0], [entries[1], entries[2]]])
        cov = np.diag(floor[0].numpy()) + root @ root.T
        return float(
            np.linalg.slogdet(cov)[1] + np.trace(np.linalg.solve(cov, residual[0].numpy()))
        )

    best = min((minimize(cost, start, tol=1e-14) for start in np.eye(3)), key=lambda r: r.fun)
    value = np.linalg.slogdet(found)[1] + np.trace(np.linalg.solve(found, given))
    assert value <= best.fun + 1e-9
    assert np.linalg.eigvalsh(found - np.diag(floor[0].numpy())).min() > -1e-12
