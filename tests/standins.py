"""A model simple enough to check by hand: the last value, with independent Gaussian errors."""

from __future__ import annotations

import numpy as np
from scipy import stats

from seqdgm.model import SequenceModel
from seqdgm.panel import Panel
from seqdgm.results import Forecast, LogProb, StatePosterior


class LastValue(SequenceModel):
    """x_{T+h} ~ N(last known value + bias, std^2), independent over h."""

    def __init__(self, bias: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.bias, self.std = bias, std

    def fit(self, y, inputs=None, *, seed=None, progress=False, **options):
        if options:
            raise TypeError(f"unexpected {options}")
        self.data_ = Panel.of(y)
        return self

    def forecast(self, horizon, y=None, inputs=None, *, n_samples=1000, method="auto", seed=None):
        panel = self.data_ if y is None else Panel.of(y)
        last = np.stack([[row[~np.isnan(row)][-1] for row in series.T] for series in panel.values])
        mean = np.repeat(last[:, None], horizon, axis=1) + self.bias

        def draw(n, seed):
            rng = np.random.default_rng(seed)
            return mean[:, None] + self.std * rng.normal(size=(len(mean), n, *mean.shape[1:]))

        def score(y_future):
            x = Panel.of(y_future).values
            terms = stats.norm.logpdf(x, mean[:, : x.shape[1]], self.std)
            return LogProb(np.nansum(terms, axis=(1, 2)), "exact", np.zeros(len(mean)))

        index = panel.future_index(horizon)
        zero = np.zeros((*mean.shape[:2], 1))
        states = StatePosterior(
            zero, zero[..., None], np.zeros(len(mean)), ("z1",), panel, "predicted", index=index
        )
        return Forecast(
            mean=mean,
            panel=panel,
            index=index,
            model="LastValue",
            states=states,
            quantiles=lambda q: np.stack([mean + self.std * z for z in stats.norm.ppf(q)]),
            draw=draw,
            score=score,
        )


class Fragile(LastValue):
    """Fails to fit histories longer than `limit`."""

    def __init__(self, limit: int = 0) -> None:
        super().__init__()
        self.limit = limit

    def fit(self, y, inputs=None, *, seed=None, progress=False, **options):
        if Panel.of(y).n_steps > self.limit:
            raise ValueError("series 'y' is too much for me")
        return super().fit(y, inputs)
