"""Train a deep Markov model on a panel of series with missing values; fill the gaps and forecast.

Twenty-four sensors record pulses whose rhythm wanders. Each loses ten days in a row and a few
single ones. The model is told nothing about pulses: it learns their shape and rhythm from all
sensors together, and uses that to fill what each of them has lost and to go on from its end.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

import seqdgm as sq

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", type=Path, default=Path("example-output/dmm_on_a_panel.png"))
parser.add_argument("--quick", action="store_true", help="train briefly, only to see it run")
options = parser.parse_args()
options.output.parent.mkdir(parents=True, exist_ok=True)

# 1. Data: a long table (unique_id, ds, y). Simulated, so that the lost values are known.
rng = np.random.default_rng(0)
names, days = [f"sensor {k + 1}" for k in range(24)], pd.date_range("2026-01-01", periods=84)
shape = (len(names), len(days))
phase = rng.uniform(0, 2 * np.pi, (len(names), 1))
phase = phase + np.cumsum(2 * np.pi / 12 + 0.12 * rng.normal(size=shape), axis=1)
pulses = np.exp(1.2 * np.sin(phase + 0.5 * np.cos(phase))) + 0.15 * rng.normal(size=shape)
frame = pd.DataFrame({"unique_id": np.repeat(names, len(days)), "ds": np.tile(days, len(names))})
frame["y"] = pulses.ravel()
history, future = frame[frame.ds < days[-24]].copy(), frame[frame.ds >= days[-24]]

# 2. Take values away: ten days in a row from each sensor, and one day in twenty.
lost = rng.random((len(names), len(days) - 24)) < 0.05
for row, start in zip(lost, rng.integers(18, 44, len(names)), strict=True):
    row[start : start + 10] = True
observed = history.assign(y=history.y.mask(lost.ravel()))

# 3. Fit on the panel, missing values and all.
epochs = 3 if options.quick else 100
model = sq.DMM(latent_dim=4, max_epochs=epochs, learning_rate=1e-2).fit(observed, seed=0)
print(model.summary())

# 4. Fill and forecast the first six sensors. A fitted model takes any series, old or new.
six = observed[observed.unique_id.isin(names[:6])]
filled = model.impute(six, n_particles=100, seed=1)
forecast = model.forecast(24, six, seed=2)
by_sensor = six.groupby("unique_id").y
lines = by_sensor.transform(lambda y: y.interpolate(limit_direction="both"))
gone = six.index[six.y.isna()]
for what, guess in (("deep Markov model", filled.y), ("straight lines", lines)):
    error = (guess - history.y)[gone]
    print(f"lost values filled by {what}: root mean square error {np.sqrt((error**2).mean()):.2f}")

# 5. The picture: forecast fans, and over them what was lost and what the model put there.
figure = forecast.plot(actual=future[future.unique_id.isin(names[:6])], history=60)
for axis, name in zip(figure.axes, names, strict=False):
    truth, guess = (t[t.unique_id == name].set_index("ds").y for t in (history, filled))
    empty = six[six.unique_id == name].set_index("ds").y.isna()
    axis.plot(truth.where(empty), "o", mfc="none", mec="0.4", ms=3.5, label="lost")
    axis.plot(guess.where(empty), ".-", color="tab:orange", lw=1.4, ms=4, label="filled")
figure.suptitle("")
figure.legends[0].remove()
handles, labels = figure.axes[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside upper center", ncols=7, frameon=False, fontsize=9)
figure.savefig(options.output, dpi=150)
print(f"picture: {options.output}")
