"""How good the estimates of a linear-Gaussian model are, and what it left in the residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from seqdgm.inference.hessian import observed_information
from seqdgm.inference.innovations import innovations
from seqdgm.kernels import kalman_filter
from seqdgm.prepare import log_jacobian, prepare
from seqdgm.transform import Transform
from seqdgm.types import Batch

if TYPE_CHECKING:
    from seqdgm.models._diagnostics import LinearGaussianModel
    from seqdgm.panel import Panel

# Smallest eigenvalue of the information, in units of its diagonal: below lies what differences of
# log-likelihoods cannot tell from zero.
_SINGULAR = 1e-7
_FEWEST = 8  # residuals below which no test says anything


def parameter_covariance(
    model: LinearGaussianModel,
) -> Float[np.ndarray, "fits parameters parameters"]:
    """Covariance of the maximum-likelihood estimates: the inverse observed information.

    Parameters
    ----------
    model : LinearGaussianModel
        A fitted model, with its data.

    Returns
    -------
    ndarray of shape (fits, parameters, parameters)
        In the order of ``model.natural().names``. NaN in the row and column of what was given, of
        an estimate at the boundary of its domain (the others are then conditional on it), and of
        everything where the likelihood is not concave. The power of a Box-Cox transformation is
        taken as known.

    Raises
    ------
    ValueError
        If the model is not fitted or holds no data.

    References
    ----------
    Harvey (1989), *Forecasting, Structural Time Series Models and the Kalman Filter*, section
    3.4.6; Efron and Hinkley (1978), *Biometrika* 65(3), 457-483, on observed against expected
    information.
    """
    _, batch, _ = _own_data(model)
    names, values, free = model.natural()
    information = observed_information(model, batch)
    at = np.flatnonzero(free)
    known = np.isfinite(np.diagonal(information, axis1=1, axis2=2))
    block = known[:, :, None] & known[:, None, :]
    filled = np.where(block, information, np.eye(len(at)))
    scale = np.sqrt(np.maximum(np.diagonal(filled, axis1=1, axis2=2), np.finfo(float).tiny))
    # In units of the standard errors, so that neither test nor inverse depends on the data's own.
    units = scale[:, :, None] * scale[:, None, :]
    correlation = np.where(np.isfinite(filled), filled / units, 0.0)
    concave = np.linalg.eigvalsh(correlation).min(1, initial=1.0) > _SINGULAR
    safe = np.where(concave[:, None, None], correlation, np.eye(len(at)))
    inverse = np.linalg.inv(safe) / units
    out = np.full((len(values), len(names), len(names)), np.nan)
    keep = block & concave[:, None, None]
    out[:, at[:, None], at] = np.where(keep, inverse, np.nan)
    return out


def parameter_table(model: LinearGaussianModel, level: float = 95) -> pd.DataFrame:
    """Estimates with standard errors, z-tests and confidence intervals.

    Parameters
    ----------
    model : LinearGaussianModel
        A fitted model, with its data.
    level : float
        Coverage of the intervals in per cent.

    Returns
    -------
    DataFrame
        ``unique_id, parameter, estimate, std_err, z, p_value, lo-95, hi-95, fixed``, a row for each
        parameter of each fit (a fit that the series share is called ``pooled``). The p-value is
        that of the two-sided normal test against zero, and the intervals are normal too: both mean
        little for a variance. Where the standard error is not known they are NaN; see
        `parameter_covariance`.

    Examples
    --------
    >>> import seqdgm as sq
    >>> model = sq.ARIMA((1, 0, 0), trend="c").fit(sq.datasets.load("nile").y)
    >>> parameter_table(model)[["parameter", "std_err"]].round(2).to_numpy().tolist()[0]
    ['ar.L1', 0.09]
    """
    from scipy.special import ndtr, ndtri

    if not 1 <= level < 100:
        raise ValueError(f"level={level!r} must lie between 1 and 100 per cent")
    panel, _, _ = _own_data(model)
    names, values, free = model.natural()
    error = np.sqrt(np.diagonal(parameter_covariance(model), axis1=1, axis2=2))
    z = values / error
    half = ndtri(0.5 + level / 200) * error
    columns = {
        "estimate": values,
        "std_err": error,
        "z": z,
        "p_value": 2.0 * ndtr(-np.abs(z)),
        f"lo-{level:g}": values - half,
        f"hi-{level:g}": values + half,
        "fixed": np.broadcast_to(~np.asarray(free, dtype=bool), values.shape),
    }
    head = {
        "unique_id": np.repeat(np.array(_fits(panel, len(values)), dtype=object), len(names)),
        "parameter": list(names) * len(values),
    }
    return pd.DataFrame({**head, **{name: value.ravel() for name, value in columns.items()}})


def information_criteria(model: LinearGaussianModel) -> pd.DataFrame:
    r"""Log-likelihood and information criteria of every fit.

    .. math:: \text{AIC} = -2\ell + 2k, \quad
        \text{AICc} = \text{AIC} + \frac{2k(k + 1)}{n - k - 1}, \quad
        \text{BIC} = -2\ell + k \log n

    n counts the observations that have a density: those left after differencing, or in general
    those that determine no diffuse element. :math:`\ell` is the log density of these given the
    others, in the units of the data (a transformation's Jacobian covers them and no others), so
    models with the same differences can be compared across transformations. k counts what was
    estimated, the innovation variance and the power of a Box-Cox transformation included; diffuse
    coefficients are no parameters. These are the conventions of R's ``arima``. Models of different
    diffuse order are not comparable.

    Parameters
    ----------
    model : LinearGaussianModel
        A fitted model, with its data.

    Returns
    -------
    DataFrame
        ``unique_id, n, k, log_likelihood, aic, aicc, bic``, a row a fit; ``aicc`` is infinite for
        :math:`n \le k + 1`, and all are NaN for a series whose fit failed.

    References
    ----------
    Akaike (1974), *IEEE Transactions on Automatic Control* 19(6), 716-723; Hurvich and Tsai (1989),
    *Biometrika* 76(2), 297-307; Schwarz (1978), *Annals of Statistics* 6(2), 461-464.

    Examples
    --------
    >>> import seqdgm as sq
    >>> model = sq.ARIMA((2, 0, 0), trend="c").fit(sq.datasets.load("lynx").y)
    >>> information_criteria(model).round(1)["aic"].item()
    1878.0
    """
    panel, batch, transform = _own_data(model)
    _, values, free = model.natural()
    system = model.linear_gaussian(batch.u[:, : batch.n_steps], batch.rows)
    out = kalman_filter(system, batch.x, batch.mask, batch.lengths, store="likelihood")
    value, n = out.loglik.numpy(), out.n_obs.numpy()
    if not transform.trivial:
        value = value + log_jacobian(
            panel, transform, diffuse=lambda: innovations(model, batch).diffuse
        )
    if len(values) == 1:
        value, n = value.sum(keepdims=True), n.sum(keepdims=True)
    value = np.where(n > 0, value, np.nan)
    k = sum(free) + (model.transform == "boxcox")
    aic = -2.0 * value + 2.0 * k
    spare = n - k - 1.0
    with np.errstate(divide="ignore"):
        correction = np.where(spare > 0, 2.0 * k * (k + 1) / np.maximum(spare, 0.0), np.inf)
    return pd.DataFrame(
        {
            "unique_id": _fits(panel, len(values)),
            "n": n,
            "k": k,
            "log_likelihood": value,
            "aic": aic,
            "aicc": aic + correction,
            "bic": -2.0 * value + k * np.log(np.maximum(n, 1)),
        }
    )


def residual_tests(
    model: LinearGaussianModel, y: Any = None, inputs: Any = None, *, lags: int | None = None
) -> pd.DataFrame:
    """Test the standardised innovations for what a true model would not leave in them.

    Parameters
    ----------
    model : LinearGaussianModel
        A fitted model.
    y, inputs : array_like, optional
        Data; default those of the fit.
    lags : int, optional
        Lags of the Ljung-Box test; default two seasons, or 10 without a season, and at most a fifth
        of the residuals.

    Returns
    -------
    DataFrame
        One row for every series and column: ``unique_id, column, n``;
        ``ljung_box, ljung_box_p, lags`` (correlation; no degrees of freedom are taken off for
        estimated parameters); ``break_variance, break_variance_p`` (the sum of squares of the last
        third over that of the first, two-sided F test); ``jarque_bera, jarque_bera_p, skewness,
        kurtosis`` (normality). They are the tests of statsmodels' state-space results; missing
        residuals are left out, of the autocorrelations pair by pair. NaN with fewer than 8
        residuals.

    Raises
    ------
    ValueError
        For a number of lags that is not positive, or not below that of the steps.

    References
    ----------
    Ljung and Box (1978), *Biometrika* 65(2), 297-303; Harvey (1989), section 5.4.2; Jarque and Bera
    (1980), *Economics Letters* 6(3), 255-259.

    Examples
    --------
    >>> import seqdgm as sq
    >>> model = sq.ARIMA((0, 1, 1)).fit(sq.datasets.load("nile").y)
    >>> bool(residual_tests(model)["ljung_box_p"].item() > 0.05)
    True
    """
    panel, batch, _ = prepare(model._checked(), y, inputs)
    found = innovations(model, batch)
    standardised, diffuse = found.standardised.numpy(), found.diffuse.numpy()
    rows = []
    for k, length in enumerate(panel.lengths):
        for d, column in enumerate(panel.columns):
            ends = np.flatnonzero(diffuse[k, :, d])
            first = int(ends[-1]) + 1 if len(ends) else 0
            row = {"unique_id": panel.ids[k], "column": column}
            rows.append(row | _tests(standardised[k, first:length, d], model.season_steps(), lags))
    return pd.DataFrame(rows)


def _tests(e: Float[np.ndarray, "time"], season: int, lags: int | None) -> dict[str, float]:
    """The three tests of one series of residuals."""
    from statsmodels.stats.stattools import jarque_bera
    from statsmodels.tsa.stattools import acf, breakvar_heteroskedasticity_test, q_stat

    if lags is not None and not 0 < lags < len(e):
        raise ValueError(f"lags={lags!r} must be at least 1 and below the {len(e)} residuals")
    seen = e[np.isfinite(e)]
    most = min(2 * season if season else 10, len(e) // 5) if lags is None else int(lags)
    names = ["ljung_box", "ljung_box_p", "lags", "break_variance", "break_variance_p"]
    names += ["jarque_bera", "jarque_bera_p", "skewness", "kurtosis"]
    if len(seen) < _FEWEST:
        return {"n": len(seen)} | dict.fromkeys(names, np.nan)
    correlations = acf(e, nlags=most, fft=False, missing="conservative")[1:]
    statistic, p_value = q_stat(correlations, len(seen))
    variance, variance_p = breakvar_heteroskedasticity_test(seen)
    found = (statistic[-1], p_value[-1], most, variance, variance_p, *jarque_bera(seen))
    return {"n": len(seen)} | dict(zip(names, map(float, found), strict=True))


def summary_lines(model: LinearGaussianModel) -> list[str]:
    """What `summary` says about the estimates of a model."""
    if not model.ready or model.data_ is None:
        return []
    lines = []
    power = None if model.transform_ is None else model.transform_.power
    if model.transform == "boxcox" and power is not None:
        shown = f"{power.item():.4g}" if power.numel() == 1 else f"{len(power)}, one a series"
        lines.append(f"power     {shown} (Box-Cox, estimated)")
    if len(model.natural().values) > 1:
        return lines
    n, k, _, aic, aicc, bic = information_criteria(model).iloc[0, 1:]
    lines.append(
        f"criteria  AIC {aic:.2f}, AICc {aicc:.2f}, BIC {bic:.2f} ({n:.0f} observations after "
        f"diffuse ones, {k:.0f} parameters)"
    )
    table = parameter_table(model)
    if table.empty:
        return lines
    names = [
        f"{name} (fixed)" if given else name
        for name, given in zip(table["parameter"], table["fixed"], strict=True)
    ]
    width = max(map(len, names))
    head = f"{'estimate':>11} {'std. err.':>11} {'z':>8} {'P>|z|':>7}   95 %"
    lines.append(f"  {'':<{width}}  {head}")
    for name, row in zip(names, table.itertuples(index=False), strict=True):
        if row.fixed:
            lines.append(f"  {name:<{width}}  {row.estimate:11.5g}")
            continue
        lines.append(
            f"  {name:<{width}}  {row.estimate:11.5g} {row.std_err:11.4g} {row.z:8.2f} "
            f"{row.p_value:7.3f}   [{row[6]:.4g}, {row[7]:.4g}]"
        )
    return lines


def _own_data(model: LinearGaussianModel) -> tuple[Panel, Batch, Transform]:
    return prepare(model._checked(), None, None)


def _fits(panel: Panel, n: int) -> list[Any]:
    """Names of the fits: those of the series, or one for all."""
    return list(panel.ids) if n == panel.n_series else ["pooled"]
