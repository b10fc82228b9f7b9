"""Daily counts with a lost month: a hidden rate behind Poisson counts, filled and forecast.

How many calls come in a day depends on a rate that wanders and on the day of the week. Counts are
small, so nothing here is Gaussian; a particle filter does not mind. The persistence of the rate is
unknown and read off the likelihood, which the filter estimates together with the error of its
estimate. A month of counts is lost: missing means NaN.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch.distributions import Normal, Poisson

import seqdgm as sq


class Calls(sq.StateSpaceModel):
    """Poisson counts whose log-rate is an autoregression plus the effect of the weekend."""

    latent_dim = 1

    def __init__(self, rho=0.95, sigma=0.2, level=1.8, weekend=-0.6):
        super().__init__()
        self.rho, self.sigma, self.level, self.weekend = rho, sigma, level, weekend

    def initial(self, u):
        return Normal(torch.full((1,), self.level).double(), self.sigma / (1 - self.rho**2) ** 0.5)

    def transition(self, z, u):
        return Normal(self.level + self.rho * (z - self.level), self.sigma)

    def emission(self, z, u):
        return Poisson((z + self.weekend * u.values).exp())


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", type=Path, default=Path("example-output/poisson_counts.png"))
output = parser.parse_args().output
output.parent.mkdir(parents=True, exist_ok=True)

# 1. Nine months of counts drawn with numpy alone, of which August is lost; October is held out.
days = pd.date_range("2026-01-01", "2026-10-28", name="ds")
weekend = pd.DataFrame({"weekend": (days.dayofweek >= 5).astype(float)}, index=days)
rng = np.random.default_rng(4)
log_rate = np.empty(len(days))
log_rate[0] = 1.8 + 0.2 / np.sqrt(1 - 0.95**2) * rng.normal()
for t in range(1, len(days)):
    log_rate[t] = 1.8 + 0.95 * (log_rate[t - 1] - 1.8) + 0.2 * rng.normal()
rate = np.exp(log_rate - 0.6 * weekend.weekend)
complete = pd.Series(rng.poisson(rate), days, name="calls", dtype=float)
history = complete[:"2026-09-30"].copy()
history["2026-08"] = np.nan
past, held_out = complete[: len(history)], complete[len(history) :]
known = weekend[: len(history)]

# 2. The likelihood of some persistences, each with the error of its estimate. The variance of the
#    log-rate is held at its value, so only its memory changes.
print("persistence  log-likelihood  standard error")
found = {}
for rho in (0.5, 0.8, 0.9, 0.95, 0.98):
    model = Calls(rho, sigma=0.2 * np.sqrt((1 - rho**2) / (1 - 0.95**2)))
    estimate = model.log_prob(history, known, n_particles=1000, seed=0)
    found[rho] = float(estimate)
    print(f"{rho:11.2f}  {float(estimate):14.2f}  {estimate.stderr[0]:14.2f}")
best = max(found, key=found.get)
print(f"best of them: {best} (the counts were drawn with 0.95)")

# 3. The lost month from both sides, and four weeks ahead.
model = Calls(best, sigma=0.2 * np.sqrt((1 - best**2) / (1 - 0.95**2)))
smoothed = model.smooth(history, known, n_particles=300, seed=1)
filled = model.impute(history, known, n_particles=300, seed=1)
lost = history.isna()
draws = smoothed.sample(200, seed=2)[0, :, :, 0] - 0.6 * known.weekend.to_numpy()
counts = np.random.default_rng(0).poisson(np.exp(draws))
low, high = np.quantile(counts, [0.05, 0.95], axis=0, method="inverted_cdf")
inside = (past >= low) & (past <= high)
print(f"lost month: the 90 % band holds {inside[lost].sum()} of {lost.sum()} counts")
mean = (filled - past)[lost].abs().mean()
naive = (history.mean() - past)[lost].abs().mean()
print(f"mean absolute error of the filled counts {mean:.2f}, of the mean of all counts {naive:.2f}")
forecast = model.forecast(len(held_out), history, weekend, n_samples=2000, seed=3)
table = forecast.to_frame(level=[90])
held = held_out.to_numpy()
hits = (held >= table["Calls-lo-90"]) & (held <= table["Calls-hi-90"])
print(f"forecast:   the 90 % band holds {hits.sum()} of {len(held)} counts")

# 4. The picture.
figure, axes = plt.subplots(2, 1, figsize=(10, 7))
start = days.get_loc("2026-07-01")
shown = days[start : len(history)]
axes[0].fill_between(shown, low[start:], high[start:], step="mid", alpha=0.25, label="90 % band")
axes[0].plot(shown, history[start:], ".", color="0.2", label="counted")
axes[0].plot(past[lost], "o", mfc="none", color="0.5", ms=4, label="lost")
axes[0].plot(filled[lost], color="tab:orange", label="filled")
axes[0].plot(shown, rate[start : len(history)], color="black", lw=0.8, label="true rate")
axes[0].set_title("A lost month, filled from both sides", loc="left")
axes[0].legend(frameon=False, ncols=5, fontsize=9)
band = (table["Calls-lo-90"], table["Calls-hi-90"])
axes[1].fill_between(table.ds, *band, step="mid", alpha=0.25, label="90 % band")
axes[1].plot(table.ds, table.Calls, color="tab:orange", label="forecast")
axes[1].plot(held_out, ".", color="0.2", label="counted")
axes[1].plot(rate[len(history) :], color="black", lw=0.8, label="true rate")
axes[1].set_title("Four weeks ahead", loc="left")
axes[1].legend(frameon=False, ncols=4, fontsize=9)
for ax in axes:
    ax.set_ylabel("calls a day")
    ax.set_ylim(0, None)
    ax.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(output, dpi=150)
print(f"picture: {output}")
