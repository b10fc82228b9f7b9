"""Where is the robot? Particles among landmarks, with ranges, bearings and odometry.

A robot drives among 17 tubes. Its wheels tell its speed and turning rate, a laser the range and
bearing of the tubes in view; both are noisy, and alone the wheels lose their way. The data are
those of the course on state estimation of Barfoot (University of Toronto), dataset2, whose true
poses come from cameras: SEQDGM_DATA names the folder that holds `localization/dataset2.mat`.
Without it the script simulates a world of the same kind.
"""

import argparse
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.io import loadmat
from torch.distributions import Normal

import seqdgm as sq

STEP = 0.1  # seconds


def wrap(angle):
    return (angle + np.pi) % (2 * np.pi) - np.pi


class RangeBearing(Normal):
    """Independent normal errors; those of the bearings, the second half, go around the circle."""

    def log_prob(self, value):
        error = value - self.loc
        half = error.shape[-1] // 2
        error = torch.cat([error[..., :half], wrap(error[..., half:])], -1)
        return -0.5 * (error / self.scale) ** 2 - self.scale.log() - 0.5 * np.log(2 * np.pi)


class Robot(sq.StateSpaceModel):
    """Pose (x, y, heading) driven by odometry; the laser sits `ahead` of the robot's centre.

    The random part z of a step is the noise of the odometry: of the speed, of the turning rate, and
    a little slip sideways. The pose is what follows from it, in the long form of the recursion.
    """

    latent_dim = 3

    def __init__(self, tubes, pose, ahead, noise):
        super().__init__()
        self.tubes, self.pose = torch.as_tensor(tubes), torch.as_tensor(pose)
        self.ahead, self.noise = ahead, noise
        spread = [noise["range"]] * len(tubes) + [noise["bearing"]] * len(tubes)
        self.spread = torch.tensor(spread, dtype=torch.float64)

    def start(self, batch_shape):
        return self.pose.expand(*batch_shape, 3)

    def advance(self, s, x, u):
        """Move by the odometry; the heading of the move is kept for its noise."""
        heading = s[..., 2:]
        speed, turn = u.values.chunk(2, -1)
        move = torch.cat([speed * heading.cos(), speed * heading.sin(), turn + 0 * heading], -1)
        return torch.cat([s + STEP * move, heading], -1)

    def prior(self, h, u):
        """Standard normal noise; ten times as much at first, where the robot was put down."""
        return Normal(torch.zeros(3).double(), torch.where(u.t == 0, 10.0, 1.0))

    def absorb(self, h, z):
        pose, heading = h[..., :3], h[..., 3]
        along, turn, slip = (STEP * z * z.new_tensor(self.noise["odometry"])).unbind(-1)
        x = along * heading.cos() - slip * heading.sin()
        y = along * heading.sin() + slip * heading.cos()
        return pose + torch.stack([x, y, turn], -1)

    def report(self, h, z):
        return self.absorb(h, z)

    def emission(self, s, u):
        x, y, heading = s.unbind(-1)
        laser = torch.stack([x + self.ahead * heading.cos(), y + self.ahead * heading.sin()], -1)
        away = self.tubes - laser[..., None, :]
        bearing = torch.atan2(away[..., 1], away[..., 0]) - heading[..., None]
        return RangeBearing(torch.cat([away.norm(dim=-1), bearing], -1), self.spread)


def recorded(path, steps):
    """The first steps of the course's data: tubes, true poses, odometry, ranges and bearings."""
    data = loadmat(path)
    truth = np.stack([data[k][:steps, 0] for k in ("x_true", "y_true", "th_true")], 1)
    truth[data["true_valid"][:steps, 0] == 0] = np.nan  # the cameras did not see the robot
    ranges, bearings = data["r"][:steps], data["b"][:steps]
    seen = ranges > 0
    y = np.concatenate([np.where(seen, ranges, np.nan), np.where(seen, bearings, np.nan)], 1)
    odometry = np.concatenate([data["v"][:steps], data["om"][:steps]], 1)
    std = {k: float(data[k + "_var"][0, 0]) ** 0.5 for k in ("r", "b", "v", "om")}
    return data["l"], float(data["d"][0, 0]), truth, odometry, y, std


def simulated(steps):
    """Tubes at random, and a robot that drives in slow curves among them."""
    rng = np.random.default_rng(0)
    tubes = rng.uniform([-4, -3], [4, 5], (17, 2))
    std = {"r": 0.03, "b": 0.026, "v": 0.066, "om": 0.09}
    speed = 0.15 + 0.05 * np.sin(np.arange(steps) / 90)
    driven = np.stack([speed, 0.1 + 0.1 * np.sin(np.arange(steps) / 130)], 1)
    odometry = driven + np.array([std["v"], std["om"]]) * rng.normal(size=driven.shape)
    truth = np.zeros((steps, 3))
    for t in range(1, steps):
        heading = truth[t - 1, 2]
        move = [driven[t, 0] * np.cos(heading), driven[t, 0] * np.sin(heading), driven[t, 1]]
        truth[t] = truth[t - 1] + STEP * np.array(move)
    ahead = 0.22
    forward = np.stack([np.cos(truth[:, 2]), np.sin(truth[:, 2])], 1)
    away = tubes - (truth[:, :2] + ahead * forward)[:, None]
    ranges = np.linalg.norm(away, axis=-1)
    bearings = wrap(np.arctan2(away[..., 1], away[..., 0]) - truth[:, 2:])
    seen = (ranges < 5) & (np.abs(bearings) < 2) & (rng.random(ranges.shape) < 0.7)
    ranges = np.where(seen, ranges + std["r"] * rng.normal(size=ranges.shape), np.nan)
    bearings = np.where(seen, bearings + std["b"] * rng.normal(size=ranges.shape), np.nan)
    return tubes, ahead, truth, odometry, np.concatenate([ranges, bearings], 1), std


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--output", type=Path, default=Path("example-output/robot_localization.png"))
parser.add_argument("--steps", type=int, default=1000, help="how much of the drive, at 10 a second")
options = parser.parse_args()
options.output.parent.mkdir(parents=True, exist_ok=True)

# 1. The drive. Not seen means NaN; the tubes in view differ from step to step.
path = Path(os.environ.get("SEQDGM_DATA", "")) / "localization" / "dataset2.mat"
world = recorded(path, options.steps) if path.is_file() else simulated(options.steps)
tubes, ahead, truth, odometry, y, std = world
odometry[0] = 0.0  # the move into the first step, which there is none of
print(f"world: {'recorded, ' + path.name if path.is_file() else 'simulated'}")
print(f"{len(y)} steps, {np.isfinite(y).sum(1).mean() / 2:.1f} of 17 tubes in view on average")

# 2. Dead reckoning from the same start, and the particle filter.
reckoned = np.empty_like(truth)
reckoned[0] = truth[0]
for t in range(1, len(truth)):
    (speed, turn), heading = odometry[t], reckoned[t - 1, 2]
    move = np.array([speed * np.cos(heading), speed * np.sin(heading), turn])
    reckoned[t] = reckoned[t - 1] + STEP * move
noise = {"range": std["r"], "bearing": std["b"], "odometry": [std["v"], std["om"], 0.02]}
states = Robot(tubes, truth[0], ahead, noise).filter(y, odometry, n_particles=500, seed=0)

# 3. Errors against the true poses, and whether the posterior knows how large they are. In the
#    simulated world it does. On the recorded drive it is too sure of itself once the robot moves:
#    the errors of real instruments are not independent from step to step, as the model says.
known = np.isfinite(truth[:, 0])
print("               position rmse   heading rmse")
for name, pose in (("odometry", reckoned), ("particles", states.mean[0])):
    gap = (pose - truth)[known]
    metres, degrees = np.hypot(gap[:, 0], gap[:, 1]), np.degrees(wrap(gap[:, 2]))
    rmse = [np.sqrt((part**2).mean()) for part in (metres, degrees)]
    print(f"{name:12}  {100 * rmse[0]:11.1f} cm   {rmse[1]:8.1f} deg")
spread = np.trace(states.cov[0, known, :2, :2], axis1=1, axis2=2)
print(f"{'expected':12}  {100 * np.sqrt(spread.mean()):11.1f} cm")
print(f"effective particles: {states.ess.mean():.0f} of 500, at worst {states.ess.min():.0f}")

# 4. The picture.
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=[3, 2])
left.plot(*tubes.T, "s", color="0.5", ms=5, label="tubes")
left.plot(*reckoned[:, :2].T, color="tab:orange", lw=1, label="odometry")
left.plot(*states.mean[0, :, :2].T, color="tab:blue", lw=2, label="particles")
left.plot(*truth[:, :2].T, color="black", lw=0.8, label="true path")
left.set(xlabel="x, m", ylabel="y, m", aspect="equal")
left.legend(frameon=False, fontsize=9)
seconds = STEP * np.arange(len(y))
gap = states.mean[0] - truth
right.plot(seconds, 100 * np.hypot(gap[:, 0], gap[:, 1]), lw=0.8, label="error")
expected = np.sqrt(np.trace(states.cov[0, :, :2, :2], axis1=1, axis2=2))
right.plot(seconds, 100 * expected, lw=1, label="expected error")
right.set(xlabel="seconds", ylabel="cm", ylim=(0, None), title="Position")
right.legend(frameon=False, fontsize=9)
figure.tight_layout()
figure.savefig(options.output, dpi=150)
print(f"picture: {options.output}")
