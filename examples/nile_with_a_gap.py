"""Filter and smooth the Nile across two gaps of twenty years, and fill the gaps.

Durbin and Koopman (2012), Time Series Analysis by State Space Methods, section 2.7: the flow of the
Nile at Aswan as a level that wanders plus noise, with 1891-1910 and 1931-1950 taken away. Missing
means NaN. The filter holds the last level and grows less sure of it; the smoother, which also knows
what came after, draws a straight line through the gap and is least sure in the middle.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

import seqdgm as sq

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", type=Path, default=Path("example-output/nile_with_a_gap.png"))
output = parser.parse_args().output
output.parent.mkdir(parents=True, exist_ok=True)

# 1. Data: 100 years, 40 of them hidden.
complete = sq.datasets.load("nile").y
nile = complete.copy()
nile["1891":"1910"] = float("nan")
nile["1931":"1950"] = float("nan")

# 2. The local level model: F and H are given, the two variances Q and R are learned, and the first
#    level is exactly diffuse.
model = sq.LinearGaussianSSM(F=[[1.0]], H=[[1.0]], diffuse=True).fit(nile, method="mle")
print(model.summary())

# 3. States given the past (filter) and given everything (smooth), and the missing years.
filtered, smoothed = model.filter(), model.smooth()
hidden = nile.isna()
table = smoothed.to_frame().set_index("ds")[["z1", "z1-std"]]
table["imputed"] = model.impute()
table["hidden value"] = complete
print(table["1905":"1912"].round(1))

# 4. The picture: levels with 95 % bands on the left, their variances on the right.
figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), sharex=True, width_ratios=[3, 2])
rows = ((filtered, "the years so far"), (smoothed, "all years"))
for (left, right), (states, given) in zip(axes, rows, strict=True):
    states.plot(ax=left, observed=True)
    style = {"color": "none", "edgecolors": "0.55", "s": 14}
    left.scatter(complete.index[hidden], complete[hidden], label="hidden", **style)
    left.legend(ncols=4, fontsize=9, frameon=False, loc="lower center")
    left.set_ylim(280, 1500)
    left.set_ylabel("flow, 1e8 cubic metres a year")
    left.set_title(f"Level given {given}, with its 95 % band", loc="left")
    right.plot(nile.index, states.cov[0, :, 0, 0])
    right.set_ylim(0, None)
    right.set_title(f"Variance of the {states.kind} level", loc="left")
    right.spines[["top", "right"]].set_visible(False)
    for ax in (left, right):
        for start, end in (("1890-07", "1910-07"), ("1930-07", "1950-07")):
            ax.axvspan(start, end, color="0.93", zorder=0)
figure.tight_layout()
figure.savefig(output, dpi=150)
print(f"picture: {output}")
