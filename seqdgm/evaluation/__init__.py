"""How well models forecast: metrics, rolling-origin backtests, comparisons."""

from seqdgm.evaluation.backtest import backtest
from seqdgm.evaluation.compare import Comparison, compare, default_models

__all__ = ["Comparison", "backtest", "compare", "default_models"]
