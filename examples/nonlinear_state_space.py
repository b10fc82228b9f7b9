"""Write down a non-linear state-space model of your own, and follow its state with particles.

The growth model of Gordon, Salmond and Smith (1993), the classic hard case: the data show the
square of the state, so its sign must be found from the dynamics, and the posterior often has two
modes. Three functions describe the model; every verb then works on it.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.distributions import Normal

import seqdgm as sq


class Growth(sq.StateSpaceModel):
    latent_dim = 1

    def initial(self, u):
        return Normal(torch.zeros(1), torch.ones(1))

    def transition(self, z, u):
        mean = z / 2 + 25 * z / (1 + z**2) + 8 * torch.cos(1.2 * u.t)[..., None]
        return Normal(mean, 10**0.5)

    def emission(self, z, u):
        return Normal(z**2 / 20, 1.0)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", type=Path, default=Path("example-output/nonlinear_state_space.png"))
output = parser.parse_args().output
output.parent.mkdir(parents=True, exist_ok=True)

# 1. Data whose states are known, drawn with numpy alone.
rng = np.random.default_rng(5)
z = rng.normal(size=80)
for t in range(1, len(z)):
    noise = 10**0.5 * rng.normal()
    z[t] = z[t - 1] / 2 + 25 * z[t - 1] / (1 + z[t - 1] ** 2) + 8 * np.cos(1.2 * t) + noise
y = z**2 / 20 + rng.normal(size=len(z))

# 2. Likelihood, filter and smoother. All are Monte Carlo, and say how far they can be trusted.
model = Growth()
evidence = model.log_prob(y, n_particles=2000, seed=1)
print(f"log-likelihood {float(evidence):.2f}, standard error {evidence.stderr[0]:.2f} nats")
filtered = model.filter(y, n_particles=2000, seed=1)
smoothed = model.smooth(y, n_particles=500, seed=1)
print(f"effective particles: {filtered.ess.mean():.0f} of 2000, at worst {filtered.ess.min():.0f}")

# 3. The picture: the data, and the true state against what each posterior makes of them.
figure, axes = plt.subplots(3, 1, figsize=(10, 8.5), sharex=True, height_ratios=[1, 2, 2])
axes[0].plot(y, ".-", color="0.5", lw=0.8)
axes[0].set_title("What is observed: the square of the state over 20, with noise", loc="left")
axes[0].spines[["top", "right"]].set_visible(False)
axes[2].plot(smoothed.sample(30, seed=2)[0, :, :, 0].T, color="tab:orange", lw=0.4)
axes[2].plot([], color="tab:orange", lw=1, label="trajectories drawn")
rows = ((axes[1], filtered, "the data so far"), (axes[2], smoothed, "all data"))
for ax, states, given in rows:
    states.plot(ax=ax, level=95)
    ax.plot(z, "o", color="black", ms=3, label="true state")
    rmse = np.sqrt(np.mean((states.mean[0, :, 0] - z) ** 2))
    ax.set_title(f"State given {given}: root mean square error {rmse:.1f}", loc="left")
    ax.set_ylim(-38, 32)
    ax.set_ylabel("state")
    ax.legend(ncols=4, frameon=False, loc="lower right")
axes[1].set_xlabel("")
figure.tight_layout()
figure.savefig(output, dpi=150)
print(f"picture: {output}")
