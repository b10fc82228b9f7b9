"""Sequential state-space models, classical and deep, behind one set of verbs.

Every model has ``fit``, ``filter``, ``smooth``, ``forecast``, ``sample``, ``log_prob``, ``impute``,
``update`` and ``save``.

Examples
--------
>>> import seqdgm as sq
>>> airline = sq.datasets.load("airline")
>>> model = sq.ARIMA((0, 1, 1), seasonal=(0, 1, 1, 12), transform="log").fit(airline.y)
>>> model.forecast(12).to_frame(level=[80]).shape
(12, 5)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Panel": "seqdgm.panel",
    "SequenceModel": "seqdgm.model",
    "StateSpaceModel": "seqdgm.recursion",
    "StatePosterior": "seqdgm.results",
    "Forecast": "seqdgm.results",
    "FitReport": "seqdgm.results",
    "LogProb": "seqdgm.results",
    "ARIMA": "seqdgm.models.arima",
    "AutoARIMA": "seqdgm.models.auto_arima",
    "SeasonalNaive": "seqdgm.models.arima",
    "LinearGaussianSSM": "seqdgm.models.linear_gaussian",
    "StructuralSSM": "seqdgm.models.structural",
    "DynamicFactor": "seqdgm.models.dynamic_factor",
    "VARMA": "seqdgm.models.varma",
    "StochasticVolatility": "seqdgm.models.stochastic_volatility",
    "SwitchingLinearSSM": "seqdgm.models.switching",
    "RNN": "seqdgm.models.rnn",
    "DMM": "seqdgm.models.dmm",
    "VRNN": "seqdgm.models.vrnn",
    "SRNN": "seqdgm.models.srnn",
    "ZForcing": "seqdgm.models.zforcing",
    "STORN": "seqdgm.models.storn",
    "Noisin": "seqdgm.models.noisin",
    "LSTMSSM": "seqdgm.models.lstm_ssm",
    "load": "seqdgm.serialize",
    "abc": "seqdgm.inference.abc_smc",
    "pmmh": "seqdgm.inference.pmcmc",
    "particle_gibbs": "seqdgm.inference.particle_gibbs",
    "smc2": "seqdgm.inference.smc2",
    "ParameterPosterior": "seqdgm.inference.posterior",
    "backtest": "seqdgm.evaluation",
    "compare": "seqdgm.evaluation",
    "Comparison": "seqdgm.evaluation",
}
_MODULES = ("datasets", "testing", "plotting")

__all__ = [
    "ARIMA",
    "DMM",
    "LSTMSSM",
    "RNN",
    "SRNN",
    "STORN",
    "VARMA",
    "VRNN",
    "AutoARIMA",
    "Comparison",
    "DynamicFactor",
    "FitReport",
    "Forecast",
    "LinearGaussianSSM",
    "LogProb",
    "Noisin",
    "Panel",
    "ParameterPosterior",
    "SeasonalNaive",
    "SequenceModel",
    "StatePosterior",
    "StateSpaceModel",
    "StochasticVolatility",
    "StructuralSSM",
    "SwitchingLinearSSM",
    "ZForcing",
    "abc",
    "backtest",
    "compare",
    "datasets",
    "load",
    "particle_gibbs",
    "plotting",
    "pmmh",
    "smc2",
    "testing",
]

if TYPE_CHECKING:
    from seqdgm import datasets, plotting, testing
    from seqdgm.evaluation.backtest import backtest
    from seqdgm.evaluation.compare import Comparison, compare
    from seqdgm.inference.abc_smc import abc
    from seqdgm.inference.particle_gibbs import particle_gibbs
    from seqdgm.inference.pmcmc import pmmh
    from seqdgm.inference.posterior import ParameterPosterior
    from seqdgm.inference.smc2 import smc2
    from seqdgm.model import SequenceModel
    from seqdgm.models.arima import ARIMA, SeasonalNaive
    from seqdgm.models.auto_arima import AutoARIMA
    from seqdgm.models.dmm import DMM
    from seqdgm.models.dynamic_factor import DynamicFactor
    from seqdgm.models.linear_gaussian import LinearGaussianSSM
    from seqdgm.models.lstm_ssm import LSTMSSM
    from seqdgm.models.noisin import Noisin
    from seqdgm.models.rnn import RNN
    from seqdgm.models.srnn import SRNN
    from seqdgm.models.stochastic_volatility import StochasticVolatility
    from seqdgm.models.storn import STORN
    from seqdgm.models.structural import StructuralSSM
    from seqdgm.models.switching import SwitchingLinearSSM
    from seqdgm.models.varma import VARMA
    from seqdgm.models.vrnn import VRNN
    from seqdgm.models.zforcing import ZForcing
    from seqdgm.panel import Panel
    from seqdgm.recursion import StateSpaceModel
    from seqdgm.results import FitReport, Forecast, LogProb, StatePosterior
    from seqdgm.serialize import load


def __getattr__(name: str) -> Any:
    # Names load on first use, so that importing the package stays fast.
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = import_module(f"seqdgm.{name}")
    else:
        raise AttributeError(f"module 'seqdgm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
