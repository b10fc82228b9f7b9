"""Estimate the weather on a small planet: the Lorenz-96 model with half of its sites observed.

Lorenz (1996): eight sites on a circle of latitude, dx_d/dt = (x_{d+1} - x_{d-2}) x_{d-1} - x_d + 8,
chaotic. Every other site is measured, with noise, every 0.1 time units, about half a day of the
earth's weather. The model is Gaussian given the last state, so the best proposal,
p(z_t | z_{t-1}, x_t), is known in closed form: a model that says so needs fewer particles than the
bootstrap filter.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.distributions import Normal

import seqdgm as sq

SITES, STEPS, NOISE, ERROR = 8, 100, 0.3, 0.5
SEEN = torch.arange(0, SITES, 2)


def flow(z, steps=2, dt=0.05):
    """Runge-Kutta steps of the equations, for arrays of any leading shape (numpy or torch)."""
    roll = torch.roll if isinstance(z, torch.Tensor) else np.roll

    def slope(z):
        return (roll(z, -1, -1) - roll(z, 2, -1)) * roll(z, 1, -1) - z + 8.0

    for _ in range(steps):
        k1 = slope(z)
        k2 = slope(z + dt / 2 * k1)
        k3 = slope(z + dt / 2 * k2)
        k4 = slope(z + dt * k3)
        z = z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z


class Lorenz96(sq.StateSpaceModel):
    """The equations with a little noise every step."""

    latent_dim = SITES

    def initial(self, u):
        return Normal(2.0 * torch.ones(SITES).double(), 3.0)

    def transition(self, z, u):
        return Normal(flow(z), NOISE)

    def emission(self, z, u):
        return Normal(z[..., SEEN], ERROR)


class Guided(Lorenz96):
    """The same, with the law of z given the last state and the observation as its proposal."""

    def encode(self, batch):
        x, seen = (batch.x.new_zeros(*batch.x.shape[:2], SITES) for _ in range(2))
        x[..., SEEN], seen[..., SEEN] = batch.x, batch.mask.double()
        return torch.cat([x, seen], -1)

    def proposal(self, h, c, u):
        prior, (x, seen) = self.prior(h, u), c.chunk(2, -1)
        gain = seen * prior.variance / (prior.variance + ERROR**2)
        return Normal(prior.mean + gain * (x - prior.mean), (prior.variance * (1 - gain)).sqrt())


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", type=Path, default=Path("example-output/lorenz96.png"))
output = parser.parse_args().output
output.parent.mkdir(parents=True, exist_ok=True)

# 1. A true planet, run by numpy alone until it has forgotten where it began, then measured. Two
#    instruments fail for a while.
rng = np.random.default_rng(0)
z = 2 + rng.normal(size=SITES)
path = []
for _ in range(100 + STEPS):
    z = flow(z) + NOISE * rng.normal(size=SITES)
    path.append(z)
truth = np.array(path[100:])
y = truth[:, SEEN] + ERROR * rng.normal(size=(STEPS, len(SEEN)))
y[40:60, :2] = np.nan

# 2. Two filters. The log-likelihoods estimate the same number; the better filter does it with a
#    smaller error. Errors and spreads are root mean squares over the sites, after ten steps.
hidden = np.setdiff1d(np.arange(SITES), SEEN)
print("filter     particles  effective  log-likelihood  error seen/hidden  expected")
results = {}
for model, count in ((Lorenz96(), 1000), (Lorenz96(), 10000), (Guided(), 3000)):
    states = model.filter(y, n_particles=count, seed=1)
    error, spread = states.mean[0] - truth, states.std[0]
    errors, spreads = (
        [np.sqrt((part[10:, sites] ** 2).mean()) for sites in (SEEN.numpy(), hidden)]
        for part in (error, spread)
    )
    name = "guided" if model.has_proposal else "bootstrap"
    results[name, count] = states
    print(
        f"{name:9}  {count:9d}  {states.ess.mean():9.0f}  {states.log_likelihood[0]:14.1f}  "
        f"{errors[0]:8.2f} / {errors[1]:.2f}  {spreads[0]:5.2f} / {spreads[1]:.2f}"
    )
print(f"for comparison: the sites vary by {truth.std():.2f}, the instruments by {ERROR}")

# 3. The picture: truth, estimate and error of the whole planet, and one hidden site.
states = results["guided", 3000]
figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), sharex=True, layout="constrained")
panels = ((axes[0, 0], truth, "The true planet"), (axes[0, 1], states.mean[0], "Filtered mean"))
for ax, field, title in panels:
    image = ax.imshow(field.T, aspect="auto", cmap="RdBu_r", vmin=-10, vmax=10, origin="lower")
    ax.set_title(title, loc="left")
    ax.set_ylabel("site (even ones are seen)")
figure.colorbar(image, ax=axes[0])
for ax, site, kind in ((axes[1, 0], 2, "seen, but for the gap"), (axes[1, 1], 3, "never seen")):
    mean, std = states.mean[0, :, site], states.std[0, :, site]
    ax.fill_between(np.arange(STEPS), mean - 1.96 * std, mean + 1.96 * std, alpha=0.25)
    ax.plot(mean, label="filter, with its 95 % band")
    ax.plot(truth[:, site], color="black", lw=0.9, label="truth")
    if site in SEEN:
        ax.plot(y[:, site // 2], ".", color="0.5", ms=4, label="measured")
    ax.set_title(f"Site {site}: {kind}", loc="left")
    ax.set_xlabel("step")
    ax.legend(frameon=False, fontsize=8, ncols=3)
figure.savefig(output, dpi=150)
print(f"picture: {output}")
