"""Forecast the airline passengers for two years, with intervals, and hold them against the data.

The airline model of Box and Jenkins: the logarithm of the series is an ARIMA(0,1,1)(0,1,1)12
process. It is fitted by exact maximum likelihood to the years up to 1958; 1959 and 1960 are held
out. The intervals are those of thousands of passengers, not of their logarithm.
"""

import argparse
from pathlib import Path

import seqdgm as sq

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", type=Path, default=Path("example-output/forecast_airline.png"))
output = parser.parse_args().output
output.parent.mkdir(parents=True, exist_ok=True)

# 1. Data: a pandas Series with a monthly index. Any Series of your own works the same way.
airline = sq.datasets.load("airline")
train, held_out = airline.y[:-24], airline.y[-24:]

# 2. Fit, and see what was estimated.
model = sq.ARIMA((0, 1, 1), seasonal=(0, 1, 1, 12), transform="log").fit(train)
print(model.summary(), end="\n\n")

# 3. Forecast. The table continues the index of the data.
forecast = model.forecast(24)
table = forecast.to_frame(level=[80, 95])
print(table.head().to_string(index=False, float_format="%.1f"), end="\n\n")

# 4. How good was it? Coverage of the intervals, and the joint density of what happened.
actual = held_out.to_numpy()
for level in (80, 95):
    inside = actual >= table[f"ARIMA-lo-{level}"]
    inside &= actual <= table[f"ARIMA-hi-{level}"]
    print(f"{level} % interval: holds {inside.sum()} of {len(inside)} months")
error = (table["ARIMA"] - actual).abs() / actual
print(f"mean absolute error: {100 * error.mean():.1f} %")
score = float(forecast.log_prob(held_out))
print(f"log density of the two years: {score / 24:.2f} nats a month")

# 5. The picture: ten years of history, the forecast fan, and the data it did not see.
figure = forecast.plot(actual=held_out, level=[80, 95], history=120)
title = "Airline passengers: two years ahead with ARIMA(0,1,1)(0,1,1)12 in logs"
figure.axes[0].set_title(title, loc="left")
figure.axes[0].set_ylabel("thousands a month")
figure.savefig(output, dpi=150)
print(f"picture: {output}")
