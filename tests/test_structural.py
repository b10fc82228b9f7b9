"""Structural models against statsmodels, published estimates and closed forms."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import torch
from statsmodels.tsa.statespace.initialization import Initialization

import seqdgm as sq
from seqdgm.models.structural import StructuralSSM
from seqdgm.testing import check_model

STEPS = 90
# Our options, and the same model for statsmodels.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "level": ({}, {"level": "local level"}),
    "random walk": ({"irregular": False}, {"level": "random walk"}),
    "trend": ({"trend": "stochastic"}, {"level": "local linear trend"}),
    "smooth trend": (
        {"level": "deterministic", "trend": "stochastic"},
        {"level": "smooth trend"},
    ),
    "line": (
        {"level": "deterministic", "trend": "deterministic"},
        {"level": "deterministic trend"},
    ),
    "drift": (
        {"trend": "deterministic", "irregular": False},
        {"level": "random walk with drift"},
    ),
    "basic structural": (
        {"trend": "stochastic", "seasonal": 12},
        {"level": "local linear trend", "seasonal": 12},
    ),
    "fixed seasons": (
        {"seasonal": 4, "seasonal_stochastic": False},
        {"level": "local level", "seasonal": 4, "stochastic_seasonal": False},
    ),
    "trigonometric": (
        {"seasonal": 7, "seasonal_kind": "trigonometric"},
        {"level": "local level", "freq_seasonal": [{"period": 7}]},
    ),
    "two periods": (
        {"seasonal": (12, 5), "seasonal_kind": "trigonometric", "harmonics": (3, 2)},
        {
            "level": "local level",
            "freq_seasonal": [{"period": 5, "harmonics": 2}, {"period": 12, "harmonics": 3}],
        },
    ),
    "damped cycle": (
        {"cycle": "stochastic"},
        {"level": "local level", "cycle": True, "stochastic_cycle": True, "damped_cycle": True},
    ),
    "fixed cycle": (
        {"trend": "stochastic", "cycle": "deterministic"},
        {"level": "local linear trend", "cycle": True},
    ),
    "autoregression": ({"ar": 3}, {"level": "local level", "autoregressive": 3}),
    "regression": (
        {"level": "deterministic", "ar": 1},
        {"level": "deterministic constant", "autoregressive": 1, "inputs": 2},
    ),
    "all": (
        {"trend": "stochastic", "seasonal": 4, "cycle": "stochastic", "ar": 2},
        {
            "level": "local linear trend",
            "seasonal": 4,
            "cycle": True,
            "stochastic_cycle": True,
            "damped_cycle": True,
            "autoregressive": 2,
            "inputs": 1,
        },
    ),
}


def fixed(model: StructuralSSM, values: Any, n_inputs: int = 0) -> StructuralSSM:
    """The model with given parameters."""
    model.build(1, n_inputs)
    model.parameters_ = torch.as_tensor(np.asarray(values, dtype=float))[None]
    return model


def plausible(names: tuple[str, ...], rng: np.random.Generator) -> dict[str, float]:
    """Parameters drawn at random."""
    others = {"cycle.period": 9.3, "cycle.damping": 0.85, "trend.damping": 0.7}
    others |= {"ar.L1": 0.5, "ar.L2": -0.3, "ar.L3": 0.2}
    return {n: others[n] if n in others else float(rng.uniform(0.05, 2)) for n in names}


def reference(
    y: np.ndarray, known: dict[str, float], options: dict[str, Any], u: np.ndarray | None
):
    """Statsmodels' smoother at the same parameters, a damped cycle in its stationary law."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = sm.tsa.UnobservedComponents(
            y,
            exog=u,
            mle_regression=False,
            use_exact_diffuse=True,
            **{k: v for k, v in options.items() if k != "inputs"},
        )
    if options.get("damped_cycle"):
        at = theirs.k_states - theirs.ar_order - (0 if u is None else u.shape[1]) - 2
        start = Initialization(theirs.k_states)
        start.set((0, at), "diffuse")
        start.set((at, at + 2), "stationary")
        if theirs.ar_order:
            start.set((at + 2, at + 2 + theirs.ar_order), "stationary")
        if u is not None:
            start.set((at + 2 + theirs.ar_order, theirs.k_states), "diffuse")
        theirs.ssm.initialization = start
    seasons = [n for n in known if n.startswith("sigma2.seasonal")]
    params = []
    for name in theirs.param_names:
        if name == "frequency.cycle":
            params.append(2 * np.pi / known["cycle.period"])
        elif name == "damping.cycle":
            params.append(known["cycle.damping"])
        elif "seasonal" in name:
            params.append(known[seasons.pop(0)])
        else:
            params.append(known[name])
    return theirs.smooth(params)


@pytest.mark.parametrize("case", CASES)
def test_likelihood_and_states_equal_statsmodels(case: str) -> None:
    ours, theirs = CASES[case]
    rng = np.random.default_rng(sorted(CASES).index(case))
    n_inputs = theirs.get("inputs", 0)
    u = rng.normal(size=(STEPS, n_inputs)) if n_inputs else None
    y = np.cumsum(rng.normal(size=STEPS)) + 3 * np.sin(np.arange(STEPS))
    y[rng.random(STEPS) < 0.1] = np.nan
    y[30:34] = np.nan
    model = StructuralSSM(**ours)
    model.build(1, n_inputs)
    known = plausible(model.parameter_names, rng)
    fixed(model, list(known.values()), n_inputs)
    expected = reference(y, known, theirs, u)
    # Statsmodels keeps the 2 pi of the diffuse observations.
    convention = 0.5 * model.spec_.n_diffuse * np.log(2 * np.pi)
    found = model.log_prob(y, u)
    assert found.kind == "exact"
    assert float(found) == pytest.approx(expected.llf + convention, rel=1e-7)
    states = model.smooth(y, u)
    assert len(states.names) == states.mean.shape[2]
    scale = np.abs(expected.smoothed_state).max()
    np.testing.assert_allclose(states.mean[0].T, expected.smoothed_state, atol=1e-6 * scale)
    np.testing.assert_allclose(
        states.cov[0].transpose(1, 2, 0), expected.smoothed_state_cov, atol=1e-6 * scale
    )


def test_all_harmonics_of_an_even_period_equal_statsmodels() -> None:
    """Its last harmonic has a second element there that no observation ever sees."""
    y = np.random.default_rng(5).normal(size=60)
    model = StructuralSSM(seasonal=6, seasonal_kind="trigonometric")
    known = plausible(model.parameter_names, np.random.default_rng(6))
    fixed(model, list(known.values()))
    options = {"level": "local level", "freq_seasonal": [{"period": 6}]}
    expected = reference(y, known, options, None)
    convention = 0.5 * model.spec_.n_diffuse * np.log(2 * np.pi)
    assert float(model.log_prob(y)) == pytest.approx(expected.llf + convention, rel=1e-7)
    np.testing.assert_allclose(model.smooth(y).mean[0].T, expected.smoothed_state[:-1], atol=1e-6)


def by_hand(y: np.ndarray, T: Any, Z: np.ndarray, R: float, Q: Any) -> Any:
    """Statsmodels' filter of matrices written down here, all states diffuse."""
    model = sm.tsa.statespace.MLEModel(y, k_states=len(T), k_posdef=len(T))
    model["transition"], model["design"] = np.array(T, dtype=float), Z
    model["selection"] = np.eye(len(T))
    model["state_cov"], model["obs_cov"] = np.diag(Q).astype(float), np.array([[R]])
    model.ssm.initialization = Initialization(len(T), "diffuse")
    return model.ssm.smooth()


def test_damped_trend_equals_its_matrices_in_statsmodels() -> None:
    y = np.cumsum(np.random.default_rng(3).normal(size=50))
    y[20] = np.nan
    expected = by_hand(y, [[1, 1], [0, 0.8]], np.array([[1.0, 0.0]]), 0.5, [0.3, 0.2])
    model = fixed(StructuralSSM(trend="damped"), [0.5, 0.3, 0.2, 0.8])
    assert model.parameter_names[-1] == "trend.damping"
    assert float(model.log_prob(y)) == pytest.approx(expected.llf + np.log(2 * np.pi), rel=1e-7)
    np.testing.assert_allclose(model.smooth(y).mean[0].T, expected.smoothed_state, atol=1e-6)


def test_changing_coefficients_equal_their_matrices_in_statsmodels() -> None:
    rng = np.random.default_rng(4)
    y, u = rng.normal(size=50), rng.normal(size=(50, 2))
    design = np.concatenate([np.ones((1, 1, 50)), u.T[None]], 1)
    expected = by_hand(y, np.eye(3), design, 0.5, [0.3, 0.2, 0.1])
    model = fixed(StructuralSSM(time_varying_regression=True), [0.5, 0.3, 0.2, 0.1], 2)
    assert model.parameter_names == ("sigma2.irregular", "sigma2.level", "sigma2.u1", "sigma2.u2")
    convention = 1.5 * np.log(2 * np.pi)
    assert float(model.log_prob(y, u)) == pytest.approx(expected.llf + convention, rel=1e-7)
    np.testing.assert_allclose(model.smooth(y, u).mean[0].T, expected.smoothed_state, atol=1e-6)


def test_components_equal_statsmodels_and_add_up() -> None:
    y = np.log(sq.datasets.load("airline").y)
    y.iloc[[40, 41, 90]] = np.nan
    model = StructuralSSM(trend="stochastic", seasonal=12)
    known = dict(zip(model.parameter_names, [1e-4, 7e-4, 1e-6, 6e-5], strict=True))
    fixed(model, list(known.values()))
    table = model.components(y)
    options = {"level": "local linear trend", "seasonal": 12}
    expected = reference(y.to_numpy(), known, options, None)
    assert (table["ds"] == y.index).all()
    for name in ("level", "trend", "seasonal"):
        column = "seasonal_12" if name == "seasonal" else name
        part = getattr(expected, name)
        np.testing.assert_allclose(table[column], part.smoothed, atol=1e-6)
        np.testing.assert_allclose(table[f"{column}-std"] ** 2, part.smoothed_cov, atol=1e-8)
    total = table["level"] + table["seasonal_12"] + table["irregular"]
    seen = y.notna().to_numpy()
    np.testing.assert_allclose(total[seen], y[seen], atol=1e-12)
    assert (table["irregular"][~seen] == 0).all()
    np.testing.assert_allclose(table["irregular-std"][~seen] ** 2, 1e-4)
    filtered = model.components(y, smoothed=False)
    assert np.isinf(filtered["level-std"][:5]).all()
    late = expected.filtered_state[0, 30:]
    np.testing.assert_allclose(filtered["level"][30:], late, atol=1e-6)


def test_all_components_add_up_on_a_panel_with_regressors() -> None:
    rng = np.random.default_rng(8)
    panel = [rng.normal(size=n).cumsum() for n in (50, 40)]
    u = [rng.normal(size=(n, 2)) for n in (50, 40)]
    model = StructuralSSM(
        seasonal=(2, 6), cycle="stochastic", cycle_bounds=(8, 20), ar=1, irregular=False
    ).fit(panel, u, max_iter=5)
    table = model.components()
    names = ["level", "seasonal_2", "seasonal_6", "cycle", "ar", "regression"]
    assert list(table.columns[2::2]) == names
    np.testing.assert_allclose(table[names].sum(axis=1), np.concatenate(panel), atol=1e-7)
    assert np.isfinite(table[[f"{n}-std" for n in names]]).all().all()


def optimum(y: np.ndarray, options: dict[str, Any]) -> float:
    """Statsmodels' highest likelihood from its own start and from the optimum of another method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sm.tsa.UnobservedComponents(y, use_exact_diffuse=True, **options)
        first = model.fit(disp=False, maxiter=200)
        again = model.fit(first.params, disp=False, maxiter=200, method="bfgs")
    return max(first.llf, again.llf)


FITS = {
    "nile": ({}, {"level": "local level"}, False),
    "airline": (
        {"trend": "stochastic", "seasonal": 12},
        {"level": "local linear trend", "seasonal": 12},
        True,
    ),
    "seatbelts": (
        {"seasonal": 12, "seasonal_kind": "trigonometric", "harmonics": 5},
        {"level": "local level", "freq_seasonal": [{"period": 12, "harmonics": 5}]},
        True,
    ),
    "lynx": (
        {"trend": "stochastic", "ar": 1},
        {"level": "local linear trend", "autoregressive": 1},
        True,
    ),
    "sunspots": (
        {"level": "deterministic", "ar": 2},
        {"level": "deterministic constant", "autoregressive": 2},
        False,
    ),
    "austres": (
        {"level": "deterministic", "trend": "stochastic", "seasonal": 4},
        {"level": "smooth trend", "seasonal": 4},
        True,
    ),
    "co2_monthly": (
        {"trend": "stochastic", "seasonal": 12},
        {"level": "local linear trend", "seasonal": 12},
        False,
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_likelihood_at_the_optimum_is_not_below_statsmodels(name: str) -> None:
    ours, theirs, logs = FITS[name]
    y = sq.datasets.load(name).y
    y = np.log(y) if logs else y
    model = StructuralSSM(**ours).fit(y)
    assert bool(model.fit_report_.converged.all())
    best = optimum(y.to_numpy(), theirs)
    convention = 0.5 * model.spec_.n_diffuse * np.log(2 * np.pi)
    assert float(model.log_prob()) >= best + convention - 1e-3


def test_published_variances_of_the_nile() -> None:
    """Durbin and Koopman (2012), section 2.10.3: 15099 and 1469.1."""
    model = StructuralSSM().fit(sq.datasets.load("nile").y)
    assert model.estimates()["sigma2.irregular"] == pytest.approx(15099, abs=1)
    assert model.estimates()["sigma2.level"] == pytest.approx(1469.1, abs=0.1)


def test_published_variances_of_drivers_killed_or_seriously_injured() -> None:
    """Durbin and Koopman (2012), section 8.2: 3.41598e-3, 9.35852e-4 and 5.01096e-7."""
    y = sq.datasets.load("seatbelts").y
    model = StructuralSSM(seasonal=12, seasonal_kind="trigonometric", transform="log")
    found = model.fit(y).estimates()
    assert found["sigma2.irregular"] == pytest.approx(3.41598e-3, rel=1e-3)
    assert found["sigma2.level"] == pytest.approx(9.35852e-4, rel=1e-3)
    assert found["sigma2.seasonal_12"] == pytest.approx(5.01096e-7, rel=1e-2)


def test_a_variance_of_zero_is_reached() -> None:
    """White noise around a constant: the closed form is the mean and its residuals."""
    y = np.tile([1.0, -1.0, 2.0, 0.0], 15)
    model = StructuralSSM().fit(y)
    residual = y - y.mean()
    variance = (residual**2).sum() / (len(y) - 1)
    assert model.estimates()["sigma2.level"] < 1e-8 * variance
    assert model.estimates()["sigma2.irregular"] == pytest.approx(variance, rel=1e-6)
    closed = -0.5 * ((len(y) - 1) * (np.log(2 * np.pi * variance) + 1) + np.log(len(y)))
    assert float(model.log_prob()) == pytest.approx(closed, abs=1e-6)
    # A trending walk has no irregular: the likelihood is that of its differences.
    walk = np.cumsum(np.tile([1.0, 1.2, 0.9, 1.1, 1.0], 12))
    model = StructuralSSM().fit(walk)
    steps = np.diff(walk)
    variance = (steps**2).mean()
    assert model.estimates()["sigma2.irregular"] < 1e-8 * variance
    closed = -0.5 * len(steps) * (np.log(2 * np.pi * variance) + 1)
    assert float(model.log_prob()) == pytest.approx(closed, abs=1e-6)


@pytest.mark.parametrize("kind", ["dummy", "trigonometric"])
def test_two_periods_with_a_common_divisor_are_one_set_of_seasons(kind: str) -> None:
    """Fixed seasons 4 and 12 around a constant are the twelve means, by least squares."""
    rng = np.random.default_rng(9)
    y = rng.normal(size=60) + np.tile(rng.normal(size=12), 5)
    y[7] = np.nan
    model = StructuralSSM(
        level="deterministic", seasonal=(4, 12), seasonal_kind=kind, seasonal_stochastic=False
    ).fit(y)
    assert model.spec_.n_diffuse == 12
    parts = model.components()
    means = np.nanmean(y.reshape(5, 12), axis=0)
    fitted = parts["level"] + parts["seasonal_4"] + parts["seasonal_12"]
    np.testing.assert_allclose(fitted, np.tile(means, 5), atol=1e-7)
    np.testing.assert_allclose(parts["seasonal_4"].rolling(4).sum()[3:], 0, atol=1e-7)
    np.testing.assert_allclose(model.forecast(12).mean[0, :, 0], means, atol=1e-7)


def test_hours_of_the_day_and_of_the_week_forecast() -> None:
    rng = np.random.default_rng(10)
    t = np.arange(24 * 7 * 4)
    wave = 3 * np.sin(2 * np.pi * t / 24) + 2 * np.cos(2 * np.pi * t / 168)
    y = 10 + wave + 0.1 * rng.normal(size=len(t))
    model = StructuralSSM(seasonal=(24, 168), seasonal_kind="trigonometric", harmonics=(2, 3))
    model.fit(y[:-168])
    assert [f"seasonal_{s}" in model.components().columns for s in (24, 168)] == [True, True]
    error = model.forecast(168).mean[0, :, 0] - (10 + wave[-168:])
    assert np.abs(error).max() < 0.3


def test_a_cycle_is_found() -> None:
    t = np.arange(200)
    y = 5 + np.sin(2 * np.pi * t / 17.3) + 0.2 * np.random.default_rng(11).normal(size=200)
    for kind in ("stochastic", "deterministic"):
        model = StructuralSSM(level="deterministic", cycle=kind, cycle_bounds=(5, 60)).fit(y)
        assert model.estimates()["cycle.period"] == pytest.approx(17.3, abs=0.1)
        np.testing.assert_allclose(
            model.components()["cycle"], np.sin(2 * np.pi * t / 17.3), atol=0.25
        )


def test_a_fixed_cycle_keeps_away_from_what_is_there_already() -> None:
    """Where waves coincide, the diffuse likelihood has a pole that no estimate may run into."""
    y = np.log(sq.datasets.load("airline").y)
    plain = StructuralSSM(seasonal=12).fit(y)
    model = StructuralSSM(seasonal=12, cycle="deterministic", cycle_bounds=(12, np.inf)).fit(y)
    assert 12 < 1 / (1 / 12 - 1 / len(y)) - 1e-9 <= model.estimates()["cycle.period"] <= len(y)
    assert abs(float(model.log_prob()) - float(plain.log_prob())) < 10
    alternating = 3 * (-1.0) ** np.arange(60) + np.random.default_rng(16).normal(size=60)
    model = StructuralSSM(cycle="deterministic").fit(alternating)
    assert model.estimates()["cycle.period"] >= 60 / 29 - 1e-9


def test_regression_coefficients_are_generalised_least_squares() -> None:
    rng = np.random.default_rng(12)
    u = rng.normal(size=(80, 2))
    y = 3 + u @ [1.0, -2.0] + rng.normal(size=80)
    model = StructuralSSM(level="deterministic").fit(y[:70], inputs=u[:70])
    fit = sm.OLS(y[:70], sm.add_constant(u[:70])).fit()
    states = model.smooth()
    assert states.names == ("level", "u1", "u2")
    np.testing.assert_allclose(states.mean[0, -1], fit.params, atol=1e-8)
    np.testing.assert_allclose(states.std[0, -1], fit.bse, rtol=1e-6)
    ahead = model.forecast(10, inputs=u[70:])
    theirs = fit.get_prediction(sm.add_constant(u[70:])).summary_frame()
    np.testing.assert_allclose(ahead.mean[0, :, 0], theirs["mean"], atol=1e-8)


def test_the_units_of_regressors_do_not_matter() -> None:
    rng = np.random.default_rng(15)
    u, units = rng.normal(size=(60, 2)), np.array([1e6, 1e-6])
    y = np.tile(rng.normal(size=4), 15) + u @ [1.0, -2.0] + rng.normal(size=60)
    options = {"seasonal": 4, "time_varying_regression": True}
    plain = StructuralSSM(**options).fit(y, inputs=u)
    scaled = StructuralSSM(**options).fit(y, inputs=u * units)
    assert float(scaled.log_prob()) == pytest.approx(float(plain.log_prob()), abs=1e-6)
    np.testing.assert_allclose(
        scaled.smooth().mean[..., -2:] * units, plain.smooth().mean[..., -2:], atol=1e-3
    )


def test_a_panel_is_fitted_series_by_series() -> None:
    rng = np.random.default_rng(13)
    panel = [np.cumsum(rng.normal(size=n)) + rng.normal(size=n) for n in (60, 45)]
    joint = StructuralSSM(cycle="stochastic").fit(panel)
    for k, y in enumerate(panel):
        alone = StructuralSSM(cycle="stochastic").fit(y)
        assert float(alone.log_prob()) == pytest.approx(joint.log_prob().value[k], abs=1e-5)
    pooled = StructuralSSM(cycle="stochastic").fit(panel, pooled=True)
    assert pooled.parameters_.shape[0] == 1
    assert pooled.log_prob().value.sum() < joint.log_prob().value.sum() + 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"trend": "stochastic", "seasonal": 12, "transform": "log"},
        {"trend": "damped", "seasonal": (4, 12), "seasonal_kind": "trigonometric", "harmonics": 2},
        {"level": "deterministic", "cycle": "stochastic", "cycle_bounds": (6, 20), "ar": 1},
    ],
)
def test_the_model_keeps_the_promises_of_the_package(options: dict[str, Any]) -> None:
    assert "save and load" in check_model(StructuralSSM(**options))


def test_a_file_with_regressors_loads(tmp_path) -> None:
    rng = np.random.default_rng(14)
    index = pd.date_range("2001-01-01", periods=50, freq="MS")
    y = pd.Series(rng.normal(size=50).cumsum(), index)
    model = StructuralSSM(ar=1).fit(y, inputs=rng.normal(size=(50, 1)))
    model.save(tmp_path / "model.safetensors")
    again = sq.load(tmp_path / "model.safetensors")
    pd.testing.assert_frame_equal(again.components(), model.components())
    assert again.estimates() == model.estimates()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "smooth"}, "level='smooth' is unknown"),
        ({"level": None, "trend": "stochastic"}, "slope of a level"),
        ({"seasonal": 1}, "at least 2 whole steps"),
        ({"seasonal": (7, 7)}, "different"),
        ({"seasonal": 12, "harmonics": 3}, "trigonometric"),
        ({"seasonal": 12, "seasonal_kind": "trigonometric", "harmonics": 7}, "from 1 to 6"),
        (
            {"seasonal": (4, 8), "seasonal_kind": "trigonometric", "harmonics": (2, 9)},
            "from 1 to 4",
        ),
        ({"cycle": "stochastic", "cycle_bounds": (1, 9)}, "2 <= low < high"),
        ({"seasonal": 12, "cycle": "deterministic"}, "seasonal wave of 12"),
        ({"level": "deterministic", "irregular": False}, "nothing in the model is random"),
        ({"ar": -1}, "ar=-1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuralSSM(**options)


def test_bad_data_are_named() -> None:
    with pytest.raises(ValueError, match="no component"):
        StructuralSSM(level=None).fit(np.arange(20.0))
    with pytest.raises(ValueError, match="one column"):
        StructuralSSM().fit(np.ones((20, 2)))
    with pytest.raises(ValueError, match="too short"):
        StructuralSSM(seasonal=12).fit(np.arange(10.0))


FIXED = {
    "a variance": ({"trend": "stochastic"}, {"sigma2.irregular": 0.3}),
    "all variances": ({}, {"sigma2.irregular": 0.3, "sigma2.level": 0.2}),
    "a cycle": ({"cycle": "stochastic"}, {"cycle.period": 9.0, "cycle.damping": 0.9}),
    "a cycle's variance": ({"cycle": "stochastic"}, {"sigma2.cycle": 0.3}),
    "an AR part": ({"ar": 2}, {"ar.L1": 0.5, "ar.L2": -0.3}),
    "a slope": ({"trend": "damped"}, {"trend.damping": 0.8, "sigma2.trend": 0.0}),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_parameters_stay_and_the_others_are_at_their_maximum(name: str) -> None:
    options, values = FIXED[name]
    rng = np.random.default_rng(12)
    y = np.cumsum(rng.normal(size=60)) + 2 * np.sin(np.arange(60) * 0.7) + rng.normal(size=60)
    y[20:24] = np.nan
    model = StructuralSSM(**options, fixed=values).fit(y)
    found = model.estimates()
    for parameter, value in values.items():
        assert found[parameter] == value
    assert model.fit_report_.log_likelihood[0] == pytest.approx(float(model.log_prob(y)), abs=1e-9)
    free = [k for k, n in enumerate(model.parameter_names) if n not in values]
    given = np.array(list(found.values()))

    def value(theta: np.ndarray) -> float:
        at = given.copy()
        at[free] = theta
        return float(fixed(StructuralSSM(**options), at).log_prob(y))

    best = value(given[free])
    for k in range(len(free)):
        for factor in (0.97, 1.03):
            theta = given[free]
            theta[k] *= factor
            if abs(theta[k]) < 1 or not model.parameter_names[free[k]].startswith(
                ("ar", "cycle.d")
            ):
                assert value(theta) <= best + 1e-6


def test_fixed_at_the_maximum_the_rest_is_found_again() -> None:
    y = sq.datasets.load("nile").y
    whole = StructuralSSM().fit(y).estimates()
    part = StructuralSSM(fixed={"sigma2.level": whole["sigma2.level"]}).fit(y).estimates()
    assert part["sigma2.irregular"] == pytest.approx(whole["sigma2.irregular"], rel=1e-4)


def test_each_season_changes_or_stays() -> None:
    y = np.random.default_rng(13).normal(size=60)
    model = StructuralSSM(
        seasonal=(12, 5),
        seasonal_kind="trigonometric",
        harmonics=(3, 2),
        seasonal_stochastic=(False, True),
    )
    assert model.parameter_names == ("sigma2.irregular", "sigma2.level", "sigma2.seasonal_5")
    known = plausible(model.parameter_names, np.random.default_rng(14))
    fixed(model, list(known.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = sm.tsa.UnobservedComponents(
            y,
            level="local level",
            freq_seasonal=[{"period": 5, "harmonics": 2}, {"period": 12, "harmonics": 3}],
            stochastic_freq_seasonal=[True, False],
            use_exact_diffuse=True,
        )
    convention = 0.5 * model.spec_.n_diffuse * np.log(2 * np.pi)
    expected = theirs.loglike(list(known.values())) + convention
    assert float(model.log_prob(y)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fixed": {"sigma2.slope": 1.0}}, "sigma2.slope"),
        ({"fixed": {"sigma2.level": -1.0}}, "between 0"),
        ({"ar": 2, "fixed": {"ar.L1": 0.5}}, "all of them or none"),
        ({"ar": 1, "fixed": {"ar.L1": 1.0}}, "not stationary"),
        ({"ar": 2, "fixed": {"ar.L1": 1.5, "ar.L2": 1.0}}, "not stationary"),
        ({"seasonal": 4, "seasonal_stochastic": (True, False)}, "one for each"),
    ],
)
def test_what_cannot_be_fixed_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuralSSM(**options).fit(np.random.default_rng(0).normal(size=40))


def test_a_model_with_fixed_parameters_keeps_the_promises_of_the_package() -> None:
    check_model(StructuralSSM(trend="stochastic", fixed={"sigma2.irregular": 1.0}))
