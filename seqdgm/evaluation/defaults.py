"""The models that take part in a comparison when the user names none, and their settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from seqdgm.model import SequenceModel
from seqdgm.panel import Panel

# Name on the command line -> class. The first five are the default comparison.
MODEL_NAMES: Mapping[str, str] = {
    "seasonal-naive": "SeasonalNaive",
    "arima": "ARIMA",
    "linear-gaussian": "LinearGaussianSSM",
    "rnn": "RNN",
    "dmm": "DMM",
    "local-level": "LinearGaussianSSM",
}
# Fit options by model name. EM closes in on the variances of a local level too slowly. A short
# series has no steps to spare for deciding when to stop: held out, the newest ones are not learnt,
# and a growing series is under-forecast.
FIT_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "local-level": {"method": "mle"},
    "rnn": {"valid_fraction": 0.0},
    "dmm": {"valid_fraction": 0.0, "schedule": "cosine"},
}
DEFAULT_MODELS = ("seasonal-naive", "arima", "linear-gaussian", "rnn", "dmm")


def default_models(
    season: int = 1,
    horizon: int | None = None,
    defaults: Mapping[str, Any] | None = None,
    *,
    names: Sequence[str] = DEFAULT_MODELS,
    quick: bool = False,
) -> dict[str, SequenceModel]:
    """Build the models of the default comparison, unfitted.

    Parameters
    ----------
    season : int
        Season length in steps, 1 for none.
    horizon : int, optional
        Steps that will be forecast.
    defaults : mapping, optional
        Recommendations of a data set: keyword arguments by model name, and ``"transform"`` for
        every model that has one, as in ``{"arima": {"order": (2, 0, 0)}, "transform": "log"}``.
    names : sequence of str
        Which models, by their names on the command line.
    quick : bool
        Settings for a trial run: the deep models hardly learn.

    Returns
    -------
    dict of str to SequenceModel
        Class name (for ``local-level``: ``"LocalLevel"``) to model.

    Raises
    ------
    ValueError
        For a name that is not known.

    Examples
    --------
    >>> list(default_models(season=12, names=["seasonal-naive", "arima"]))
    ['SeasonalNaive', 'ARIMA']
    """
    return {
        title(name): build_model(name, season, horizon, defaults, quick=quick) for name in names
    }


def title(name: str) -> str:
    """Name in tables of a model by its name on the command line."""
    return "LocalLevel" if name == "local-level" else MODEL_NAMES.get(name, name)


def build_model(
    name: str,
    season: int = 1,
    horizon: int | None = None,
    defaults: Mapping[str, Any] | None = None,
    *,
    quick: bool = False,
    **overrides: Any,
) -> SequenceModel:
    """Build one model by its name on the command line; parameters as in `default_models`.

    `overrides` are keyword arguments of the model that come before every default.
    """
    import seqdgm

    if name not in MODEL_NAMES:
        raise ValueError(f"model {name!r} is unknown; choose among {', '.join(MODEL_NAMES)}")
    model_class = getattr(seqdgm, MODEL_NAMES[name])
    recommended = dict(defaults or {})
    given = settings(season, horizon, quick)[name] | dict(recommended.get(name, {}))
    transform = recommended.get("transform")
    if transform is not None and "transform" in inspect.signature(model_class).parameters:
        given.setdefault("transform", transform)
    return model_class(**(given | overrides))


def settings(season: int, horizon: int | None, quick: bool = False) -> dict[str, dict[str, Any]]:
    """Every setting of the default models, in one place."""
    seasonal = {"seasonal": (0, 1, 1, season)} if season > 1 else {}
    season_or_none = season if season > 1 else None
    deep: dict[str, Any] = {"season": season_or_none, "learning_rate": 1e-2}
    return {
        # The yardstick is the textbook one, whatever suits the other models.
        "seasonal-naive": {"season": season, "transform": None},
        "arima": {"order": (0, 1, 1) if season > 1 else (1, 1, 1), **seasonal},
        "linear-gaussian": {
            "latent_dim": season + 1 if season > 1 else 2,
            "scale": "standard",
        },
        "rnn": {"cell": "gru", "hidden_dim": 24, "max_epochs": 5 if quick else 300, **deep},
        "dmm": {
            "latent_dim": 2,
            "hidden_dim": 16,
            "encoder_dim": 16,
            "max_epochs": 5 if quick else 300,
            "kl_warmup": 2 if quick else 40,
            # A few hundred steps are little: decay keeps networks from learning the path by heart.
            "weight_decay": 0.1,
            **deep,
        },
        "local-level": {"F": [[1.0]], "H": [[1.0]], "diffuse": True},
    }


def infer_season(panel: Panel) -> int:
    """Season length of a panel's time index: 12 for months, 4 for quarters, 1 where unknown.

    The convention of `statsmodels.tsa.tsatools.freq_to_period` (also 52 for weeks, 7 for days, 5
    for business days, 24 for hours); a multiple of a unit (``"2D"``) has none.
    """
    from statsmodels.tsa.tsatools import freq_to_period

    index = panel.index[0]
    if isinstance(index, pd.PeriodIndex):
        offset = index.freq
    elif isinstance(index, pd.DatetimeIndex) and len(index) > 2:
        offset = pd.tseries.frequencies.to_offset(index.freq or pd.infer_freq(index))
    else:
        return 1
    if offset is None or offset.n != 1:
        return 1
    try:
        return int(freq_to_period(offset))
    except ValueError:  # its way to say that the unit (minutes, seconds) has no usual season
        return 1
