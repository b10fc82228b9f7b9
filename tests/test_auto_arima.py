"""AutoARIMA: tests and criteria against statsmodels, searches against brute force and R."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.tsa.seasonal import MSTL
from statsmodels.tsa.stattools import kpss as reference_kpss

import seqdgm as sq
from seqdgm.models import _unit_roots
from seqdgm.models._arima import ArimaSpec
from seqdgm.models._auto_arima import Limits, Orders, Plan, criteria, exhaustive, stepwise
from seqdgm.testing import CHECKS, check_model

FIELDS = ["p", "d", "q", "P", "D", "Q", "constant"]


def arma(n: int, ar: list[float], ma: list[float], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    process = sm.tsa.ArmaProcess(np.r_[1.0, -np.array(ar)], np.r_[1.0, ma])
    return process.generate_sample(n, distrvs=rng.standard_normal, burnin=100)


def chosen(model: sq.AutoARIMA) -> list[tuple[int, ...]]:
    return [tuple(map(int, row)) for row in model.orders_[FIELDS].to_numpy()]


def reference(x, order, seasonal=(0, 0, 0, 0), trend="n", **options):
    """The same differenced likelihood by statsmodels."""
    return sm.tsa.SARIMAX(
        x, order=order, seasonal_order=seasonal, trend=trend, simple_differencing=True, **options
    )


# -- differences --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The test statistic", "ignore::FutureWarning")
@pytest.mark.parametrize("n", [8, 30, 131, 400])
def test_kpss_is_that_of_statsmodels(n: int) -> None:
    x = np.random.default_rng(n).normal(size=n).cumsum()
    for lags in (0, 1, 4, None):
        used = int(3 * np.sqrt(n) / 13) if lags is None else lags
        expected = reference_kpss(x, "c", nlags=used)[0]
        assert _unit_roots.kpss(x, lags) == pytest.approx(expected, rel=1e-12)


@pytest.mark.filterwarnings("ignore:The test statistic", "ignore::FutureWarning")
def test_differences_are_those_of_repeated_tests_by_statsmodels() -> None:
    rng = np.random.default_rng(1)
    found = []
    for k in range(60):
        x = rng.normal(size=rng.integers(20, 150))
        for _ in range(k % 3):
            x = x.cumsum()
        d, rest = 0, x
        while d < 2 and reference_kpss(rest, "c", nlags=int(3 * len(rest) ** 0.5 / 13))[1] < 0.05:
            d, rest = d + 1, np.diff(rest)
        found.append(d)
        assert _unit_roots.n_differences(x, 2, np.abs(x).max()) == d
    assert set(found) == {0, 1, 2}


@pytest.mark.parametrize("season", [4, 7, 12])
def test_strength_of_a_season_is_that_of_a_decomposition_by_statsmodels(season: int) -> None:
    rng = np.random.default_rng(season)
    for scale in (0.0, 0.5, 1.0, 5.0):
        x = scale * np.tile(rng.normal(size=season), 12) + rng.normal(size=12 * season).cumsum()
        trend = int(1.5 * season / (1 - 1.5 / 11)) + 2
        jumps = {
            "seasonal_jump": 2,
            "trend_jump": -(-trend // 10),
            "low_pass_jump": season // 10 + 1,
        }
        options = {"seasonal_deg": 0, "inner_iter": 2, "outer_iter": 0, **jumps}
        parts = MSTL(x, periods=season, windows=11, stl_kwargs=options).fit()
        strength = 1 - np.var(parts.resid) / np.var(parts.resid + parts.seasonal)
        assert _unit_roots.seasonal_strength(x, season) == pytest.approx(max(strength, 0), rel=1e-9)


def test_differences_of_known_series() -> None:
    """R: nsdiffs and ndiffs of the classic series, as in Hyndman and Athanasopoulos (2021), 9.1."""
    airline = sq.datasets.load("airline").y.to_numpy()
    for x in (airline, np.log(airline)):
        assert _unit_roots.n_seasonal_differences(x, 12, 1, x.max()) == 1
        assert _unit_roots.n_differences(_unit_roots.difference(x, 0, 1, 12), 2, x.max()) == 1
    assert _unit_roots.n_differences(sq.datasets.load("nile").y.to_numpy(), 2, 1e3) == 1
    assert _unit_roots.n_differences(sq.datasets.load("lynx").y.to_numpy(), 2, 1e3) == 0


# -- criteria -----------------------------------------------------------------------------------


def test_criteria_are_those_of_statsmodels() -> None:
    x = arma(90, [0.6], [0.3], 3).cumsum()
    model = reference(x, (1, 1, 1), (0, 1, 1, 4))
    result = model.smooth([0.5, 0.2, -0.4, 1.3])
    spec = ArimaSpec(1, 1, 1, 0, 1, 1, 4)
    for ic in ("aic", "aicc", "bic"):
        found = criteria(
            spec, np.array([[0.5, 0.2, -0.4]]), np.array([result.llf]), np.array([85]), ic
        )
        assert found[0] == pytest.approx(getattr(result, ic), rel=1e-12)


@pytest.mark.parametrize(
    ("spec", "coefficients"),
    [
        (ArimaSpec(2), [0.2, 0.79]),
        (ArimaSpec(0, 1, 2), [0.1, -0.6]),
        (ArimaSpec(0, 1, 1, 1, 0, 1, 4), [0.5, 0.97, 0.2]),
        (ArimaSpec(0, 1, 1, 1, 0, 1, 4), [0.5, 0.2, -0.95]),
        (ArimaSpec(0, 1, 1, 1, 0, 1, 4), [0.5, 0.2, 0.6]),
    ],
)
def test_models_near_a_unit_root_are_rejected(spec: ArimaSpec, coefficients: list[float]) -> None:
    ar, ma, sar, sma, *_ = (part[0] for part in spec.split(np.array([coefficients])))
    sparse = [np.kron(part, np.eye(max(spec.s, 1))[-1]) for part in (sar, sma)]
    full_ar = np.polymul(np.r_[-sparse[0][::-1], 1], np.r_[-ar[::-1], 1])
    full_ma = np.polymul(np.r_[sparse[1][::-1], 1], np.r_[ma[::-1], 1])
    nearest = min(np.abs(np.r_[np.roots(full_ar), np.roots(full_ma), 2.0]))
    assert abs(nearest - 1.01) > 1e-3
    found = criteria(spec, np.array([coefficients]), np.zeros(1), np.array([50]), "aicc")
    assert np.isinf(found[0]) == (nearest < 1.01)


def test_a_model_with_too_many_parameters_is_rejected() -> None:
    spec, values = ArimaSpec(2, 0, 1, trend="c"), np.array([[0.1, 0.1, 0.1, 0.0]])
    found = [criteria(spec, values, np.zeros(1), np.array([n]), "aicc")[0] for n in (6, 7)]
    assert np.isinf(found[0])
    assert np.isfinite(found[1])


# -- search -------------------------------------------------------------------------------------


def run(search, value) -> list[list[Orders]]:
    """Everything that a search asks for, answered by `value`."""
    asked = [next(search)]
    while True:
        try:
            asked.append(search.send([value(orders) for orders in asked[-1]]))
        except StopIteration:
            return asked


def test_search_begins_with_the_published_models() -> None:
    plan = Plan(Orders(0, 1, 0, 0, 0, 0, True), Limits().within(100, 12), 100, None)
    (first, *_) = run(stepwise(plan), lambda orders: 0.0)
    assert [tuple(map(int, orders)) for orders in first] == [
        (2, 1, 2, 1, 0, 1, 1),
        (0, 1, 0, 0, 0, 0, 1),
        (1, 1, 0, 1, 0, 0, 1),
        (0, 1, 1, 0, 0, 1, 1),
        (0, 1, 0, 0, 0, 0, 0),
    ]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    season=st.sampled_from([1, 4, 12]),
    n=st.integers(6, 200),
    constant=st.booleans(),
)
def test_search_ends_where_no_neighbour_is_better(seed, season, n, constant) -> None:
    rng = np.random.default_rng(seed)
    limits = Limits().within(n, season)
    plan = Plan(Orders(0, 0, 0, 0, 0, 0, constant), limits, n, None)
    value = dict.fromkeys(product(range(6), range(6), range(3), range(3), (False, True)), 0.0)
    value = {key: float(rng.choice([rng.normal(), np.inf], p=[0.8, 0.2])) for key in value}

    def place(orders: Orders) -> tuple:
        return (orders.p, orders.q, orders.P, orders.Q, orders.constant)

    asked = run(stepwise(plan), lambda orders: value[place(orders)])
    tried = [orders for batch in asked for orders in batch]
    assert len(set(tried)) == len(tried) <= 94
    assert all(len(batch) == 1 for batch in asked[1:])
    for orders in tried:
        assert 0 <= orders.p <= min(5, n // 3)
        assert 0 <= orders.P <= (min(2, n // 3 // season) if season > 1 else 0)
        assert constant or not orders.constant
    best = min(tried, key=lambda orders: value[place(orders)])
    seen = {place(orders) for orders in tried}
    for key in value if len(tried) < 94 else ():
        gaps = [abs(a - b) for a, b in zip(key[:4], place(best)[:4], strict=True)]
        apart = (max(gaps[:2]), max(gaps[2:]), int(key[4] != best.constant))
        inside = key[0] <= limits.p and key[1] <= limits.q
        inside &= key[2] <= limits.P and key[3] <= limits.Q
        if sorted(apart) == [0, 0, 1] and inside and (constant or not key[4]):
            assert key in seen


def test_exhaustive_search_asks_for_all_models() -> None:
    plan = Plan(Orders(0, 0, 0, 0, 0, 0, True), Limits(total=3).within(200, 12), 200, None)
    (asked,) = run(exhaustive(plan), lambda orders: 0.0)
    every = product(range(6), range(6), range(3), range(3), (0, 1))
    expected = {key for key in every if sum(key[:4]) <= 3}
    assert {(o.p, o.q, o.P, o.Q, int(o.constant)) for o in asked} == expected
    assert len(asked) == len(expected)


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::statsmodels.tools.sm_exceptions.ConvergenceWarning"
)
@pytest.mark.parametrize("seed", [0, 4])
def test_the_best_of_all_models_is_that_of_statsmodels(seed: int) -> None:
    x = 5 + arma(120, [0.7], [0.5], seed)
    model = sq.AutoARIMA(max_p=2, max_q=1, max_order=4, stationary=True, stepwise=False).fit(x)
    best, orders = np.inf, None
    for p, q, trend in product(range(3), range(2), "nc"):
        result = reference(x, (p, 0, q), trend=trend).fit(disp=False, maxiter=200)
        roots = np.r_[np.abs(result.arroots), np.abs(result.maroots), 2.0]
        if result.aicc < best and roots.min() > 1.01:
            best, orders = result.aicc, (p, 0, q, 0, 0, 0, int(trend == "c"))
    assert chosen(model) == [orders]
    k = len(model.coefficient_names) + 1
    own = -2 * model.log_prob().value[0] + 2 * k + 2 * k * (k + 1) / (120 - k - 1)
    assert own == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "transform", "season", "orders", "log_likelihood"),
    [
        ("airline", "log", 12, (0, 1, 1, 0, 1, 1, 0), 244.70),
        ("airline", None, 12, (2, 1, 1, 0, 1, 0, 0), -504.92),
        ("nile", None, 1, (1, 1, 1, 0, 0, 0, 0), -630.63),
        ("lynx", None, 1, (2, 0, 2, 0, 0, 0, 1), -932.08),
    ],
)
def test_r_chooses_the_same(name, transform, season, orders, log_likelihood) -> None:
    """auto.arima of the R package forecast: orders and log-likelihood as it prints them."""
    model = sq.AutoARIMA(season=season, transform=transform).fit(sq.datasets.load(name).y)
    assert chosen(model) == [orders]
    assert model.fit_report_.log_likelihood[0] == pytest.approx(log_likelihood, abs=0.006)


# -- panels -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def panel() -> list[np.ndarray]:
    rng = np.random.default_rng(8)
    season = 10 * np.sin(2 * np.pi * np.arange(72) / 4)
    return [
        20 + arma(72, [0.6], [], 1),
        arma(60, [], [0.6], 2).cumsum(),
        30 + season + arma(72, [0.5], [], 3) + 0.2 * np.arange(72),
        arma(48, [], [], 4).cumsum().cumsum(),
        rng.normal(size=40),
    ]


@pytest.fixture(scope="module")
def fitted(panel) -> sq.AutoARIMA:
    return sq.AutoARIMA(season=4).fit(panel)


def test_a_series_is_fitted_as_it_is_alone(panel, fitted) -> None:
    assert fitted.orders_[["d", "D"]].drop_duplicates().shape[0] >= 3
    future = fitted.forecast(6)
    lo, _ = future.interval(95)
    for k, x in enumerate(panel):
        alone = sq.AutoARIMA(season=4).fit(x)
        assert alone.labels_ == [fitted.labels_[k]]
        np.testing.assert_allclose(alone.forecast(6).mean[0], future.mean[k], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(
            alone.forecast(6).interval(95)[0][0], lo[k], rtol=1e-6, atol=1e-6
        )


def test_likelihood_and_forecasts_are_those_of_statsmodels(panel, fitted) -> None:
    future = fitted.forecast(5)
    found = fitted.log_prob(panel).value
    std = (future.interval(95)[1] - future.mean) / 1.959963984540054
    for k, (x, row) in enumerate(zip(panel, chosen(fitted), strict=True)):
        p, d, q, P, D, Q, constant = row
        names = fitted.coefficient_names
        own = dict(zip(names, fitted.coefficients_[k].tolist(), strict=True))
        groups = [["const"] * constant, [f"ar.L{j + 1}" for j in range(p)]]
        groups += [[f"ma.L{j + 1}" for j in range(q)], [f"ar.S.L{4 * j + 4}" for j in range(P)]]
        groups += [[f"ma.S.L{4 * j + 4}" for j in range(Q)]]
        used = [name for group in groups for name in group]
        assert all(own[name] == 0 for name in names if name not in used)
        values = [own[name] for name in used] + [float(fitted.sigma2_[k])]
        shape = {"order": (p, d, q), "seasonal": (P, D, Q, 4), "trend": "c" if constant else "n"}
        assert found[k] == pytest.approx(reference(x, **shape).loglike(values), rel=1e-9)
        model = sm.tsa.SARIMAX(
            x,
            order=(p, d, q),
            seasonal_order=(P, D, Q, 4),
            trend=shape["trend"],
            use_exact_diffuse=True,
        )
        expected = model.smooth(values).get_forecast(5)
        np.testing.assert_allclose(future.mean[k, :, 0], expected.predicted_mean, rtol=1e-6)
        np.testing.assert_allclose(std[k, :, 0], expected.se_mean, rtol=1e-6)


def test_plain_model_of_a_series(panel, fitted) -> None:
    alone = sq.AutoARIMA(season=4).fit(panel[2])
    plain = alone.arima_
    assert isinstance(plain, sq.ARIMA)
    np.testing.assert_array_equal(plain.forecast(4).mean, alone.forecast(4).mean)
    assert plain.estimates() == alone.estimates()
    with pytest.raises(ValueError, match="orders_"):
        _ = fitted.arima_


def test_summary_counts_the_orders(fitted) -> None:
    text = fitted.summary()
    for label in fitted.labels_:
        assert f"orders    {label}, {fitted.labels_.count(label)} series" in text


def test_saved_panel(fitted, tmp_path) -> None:
    fitted.save(tmp_path / "model.safetensors")
    again = sq.load(tmp_path / "model.safetensors")
    assert again.labels_ == fitted.labels_
    np.testing.assert_array_equal(again.forecast(3).mean, fitted.forecast(3).mean)


def test_conforms() -> None:
    assert check_model(sq.AutoARIMA(season=12, max_p=2, max_q=2, max_P=1)) == tuple(CHECKS)


# -- regressors, gaps, constant series, errors --------------------------------------------------


def test_regressors_take_part_in_the_choice() -> None:
    u = np.random.default_rng(5).normal(size=(100, 1)).cumsum(0)
    x = 3 * u[:, 0] + arma(100, [0.6], [], 6)
    model = sq.AutoARIMA(max_p=2, max_q=2).fit(x, inputs=u)
    assert chosen(model) == [(1, 0, 0, 0, 0, 0, 0)]
    values = [model.estimates()[name] for name in ("u1", "ar.L1", "sigma2")]
    expected = sm.tsa.SARIMAX(x, exog=u, order=(1, 0, 0)).fit(disp=False)
    np.testing.assert_allclose(values, expected.params, rtol=1e-3)
    ahead = np.full((2, 1), 7.0)
    np.testing.assert_allclose(
        model.forecast(2, inputs=ahead).mean[0, :, 0],
        sm.tsa.SARIMAX(x, exog=u, order=(1, 0, 0)).smooth(values).forecast(2, exog=ahead),
        rtol=1e-9,
    )


@pytest.mark.parametrize("missing", [6, 45])
def test_missing_values_stay_missing(missing: int) -> None:
    x = arma(120, [0.8], [], 7)
    x[np.random.default_rng(missing).choice(np.arange(1, 119), missing, replace=False)] = np.nan
    model = sq.AutoARIMA(max_p=1, max_q=1, stationary=True, allow_mean=False).fit(x)
    assert chosen(model) == [(1, 0, 0, 0, 0, 0, 0)]
    values = [model.estimates()[name] for name in ("ar.L1", "sigma2")]
    result = sm.tsa.SARIMAX(x, order=(1, 0, 0)).fit(disp=False)
    np.testing.assert_allclose(values, result.params, rtol=1e-3)
    assert model.fit_report_.log_likelihood[0] == pytest.approx(result.llf, abs=1e-5)


def test_series_without_noise() -> None:
    t = np.arange(40.0)
    y = [np.full(40, 3.0), 2 + 0.1 * t, np.tile([1.0, 5.0, 2.0, 8.0], 10), np.zeros(40)]
    model = sq.AutoARIMA(season=4).fit(y)
    assert chosen(model) == [
        (0, 0, 0, 0, 0, 0, 1),
        (0, 1, 0, 0, 0, 0, 1),
        (0, 0, 0, 0, 1, 0, 1),
        (0, 0, 0, 0, 0, 0, 1),
    ]
    future = model.forecast(4).mean[..., 0]
    ahead = np.arange(40.0, 44.0)
    expected = [[3.0] * 4, 2 + 0.1 * ahead, [1.0, 5.0, 2.0, 8.0], [0.0] * 4]
    np.testing.assert_allclose(future, expected, rtol=1e-9, atol=1e-12)
    assert (model.sigma2_ == 0).all()
    assert sum("innovation variance is 0" in text for text in model.fit_report_.messages) == 4
    for result in (model.log_prob().value, model.smooth().mean, model.sample(5, seed=0).values):
        assert np.isfinite(result).all()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(6, 40),
    season=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([1e-8, 1.0, 1e8]),
    kind=st.sampled_from(["noise", "walk", "steps", "constant"]),
    holes=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_short_and_odd_series(n, season, scale, kind, holes, seed) -> None:
    """A clear error if there are fewer than six observations, else a result; never NaN."""
    rng = np.random.default_rng(seed)
    x = {
        "noise": rng.normal(size=n),
        "walk": rng.normal(size=n).cumsum(),
        "steps": rng.integers(0, 2, n).astype(float),
        "constant": np.full(n, 1.5),
    }[kind] * scale
    x[rng.choice(n, holes, replace=False)] = np.nan
    model = sq.AutoARIMA(season=season, max_p=2, max_q=2)
    if np.isfinite(x).sum() < 6:
        with pytest.raises(ValueError, match="series 0"):
            model.fit(x)
        return
    model.fit(x)
    future = model.forecast(3)
    assert np.isfinite(future.mean).all()
    assert np.isfinite(future.interval(95)[0]).all()
    assert np.isfinite(model.log_prob().value).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ic": "hqic"}, "ic="),
        ({"D": 1}, "season"),
        ({"season": 0}, "season"),
        ({"max_p": -1}, "max_p"),
        ({"d": 1.5}, "d=1.5"),
        ({"stationary": True, "d": 1}, "stationary"),
    ],
)
def test_bad_options(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sq.AutoARIMA(**options)


def test_bad_data(panel) -> None:
    with pytest.raises(ValueError, match="one column"):
        sq.AutoARIMA().fit(np.ones((20, 2)))
    with pytest.raises(ValueError, match="too short"):
        sq.AutoARIMA().fit(np.array([1.0, 2.0, 4.0]))
    with pytest.raises(ValueError, match="series 1 has 8 observations"):
        sq.AutoARIMA(season=4, d=2, D=1).fit([panel[0], panel[1][:8]])
    with pytest.raises(ValueError, match="pooled"):
        sq.AutoARIMA().fit(panel, pooled=True)
