"""Track ships by bearings alone, from a submarine that must turn to learn how far away they are.

The classic problem of Gordon, Salmond and Smith (1993), in one panel of thirty ships: all that is
measured is the direction in which each ship is seen. While the submarine keeps its course a near,
slow ship and a far, fast one give the same bearings; its turn half way tells them apart. The true
tracks are simulated, so the posterior can be held to its word: its errors should be as large as it
says they are.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.distributions import MultivariateNormal, Normal

import seqdgm as sq

STEPS, SHIPS, TURN = 30, 30, 15


class Ship(sq.StateSpaceModel):
    """Position (km) and speed (km a step) of a ship that drifts off a straight course."""

    latent_dim = 4  # east, north, and their speeds

    def initial(self, u):
        mean = torch.tensor([0.0, 8.0, 0.0, 0.0]).double()
        scale = torch.tensor([1.0, 2.0, 0.05, 0.05]).double()
        return MultivariateNormal(mean, scale_tril=torch.diag(scale))

    def transition(self, z, u):
        flow = torch.eye(4).double() + torch.diag(torch.ones(2).double(), 2)
        noise = torch.kron(torch.tensor([[1 / 3, 1 / 2], [1 / 2, 1.0]]), torch.eye(2)).double()
        return MultivariateNormal(z @ flow.T, 0.01**2 * noise)

    def emission(self, z, u):
        east, north = (z[..., :2] - u.values).unbind(-1)  # the inputs: where the submarine is
        return Normal(torch.atan2(east, north)[..., None], np.radians(0.5))


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", type=Path, default=Path("example-output/bearings_only.png"))
output = parser.parse_args().output
output.parent.mkdir(parents=True, exist_ok=True)

# 1. The submarine's track, known, and thirty ships drawn with numpy alone.
rng = np.random.default_rng(0)
course = np.where(np.arange(STEPS)[:, None] < TURN, [0.25, 0.0], [-0.25, 0.1])
submarine = np.cumsum(course, 0)
z = np.array([0.0, 8.0, 0.0, 0.0]) + np.array([1.0, 2.0, 0.05, 0.05]) * rng.normal(size=(SHIPS, 4))
track, root = [], np.linalg.cholesky([[1 / 3, 1 / 2], [1 / 2, 1.0]])
for _ in range(STEPS):
    track.append(z)
    kick = 0.01 * np.einsum("ij,kjd->kid", root, rng.normal(size=(SHIPS, 2, 2))).reshape(SHIPS, 4)
    z = np.concatenate([z[:, :2] + z[:, 2:], z[:, 2:]], 1) + kick
truth = np.stack(track, 1)
east, north = np.moveaxis(truth[..., :2] - submarine, -1, 0)
bearings = np.arctan2(east, north) + np.radians(0.5) * rng.normal(size=(SHIPS, STEPS))
inputs = np.broadcast_to(submarine, (SHIPS, STEPS, 2))

# 2. One call filters all ships.
states = Ship().filter(bearings[..., None], inputs, n_particles=4000, seed=1)

# 3. Is the posterior honest? Its errors should be as large as it says, and its 95 % ellipses should
#    hold 95 % of the ships.
print("position: root mean square error, what the posterior expects of it, ships in its ellipse")
print("step  error km  expected km  in the 95 % ellipse")
error = states.mean[..., :2] - truth[..., :2]
spread = np.trace(states.cov[..., :2, :2], axis1=2, axis2=3)
inverse = np.linalg.inv(states.cov[..., :2, :2])
held = np.einsum("kti,ktij,ktj->kt", error, inverse, error) < 5.99  # chi-squared, 2 degrees
for t in (0, 7, TURN - 1, 22, STEPS - 1):
    rmse = np.sqrt((error[:, t] ** 2).sum(-1).mean())
    says = np.sqrt(spread[:, t].mean())
    print(f"{t + 1:4d}  {rmse:8.2f}  {says:11.2f}  {held[:, t].sum():6d} of {SHIPS}")
print(f"all steps: {100 * held.mean():.0f} % in the 95 % ellipse")
print(f"effective particles: {states.ess.mean():.0f} of 4000, at worst {states.ess.min():.0f}")

# 4. The picture: the tracks of four ships, and what the turn does to the uncertainty.
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=[3, 2])
left.plot(*submarine.T, color="black", lw=2, label="submarine")
for k in range(4):
    line = left.plot(*truth[k, :, :2].T, color=f"C{k}", label="ship" if k == 0 else None)[0]
    left.plot(*states.mean[k, :, :2].T, ".", ms=4, color=line.get_color(), alpha=0.6)
left.plot([], [], ".", color="0.4", label="filtered position")
left.set(xlabel="east, km", ylabel="north, km")
left.legend(frameon=False, fontsize=9)
left.set_title("Four of the ships", loc="left")
steps = np.arange(1, STEPS + 1)
right.plot(steps, np.sqrt((error**2).sum(-1).mean(0)), label="error of the filter")
right.plot(steps, np.sqrt(spread.mean(0)), "--", label="error it expects")
right.axvline(TURN + 0.5, color="0.7", lw=1)
right.text(TURN + 1, right.get_ylim()[1] * 0.95, "the turn", va="top")
right.set(xlabel="step", ylabel="km, root mean square", ylim=(0, None))
right.legend(frameon=False, fontsize=9, loc="lower left")
right.set_title("Position, over all thirty ships", loc="left")
figure.tight_layout()
figure.savefig(output, dpi=150)
print(f"picture: {output}")
