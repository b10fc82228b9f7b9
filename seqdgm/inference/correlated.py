r"""The likelihood as a smooth function of parameters and random numbers, for correlated PMMH.

With :math:`e_t^k, v_t \sim N(0, 1)` as arguments,

.. math::

    z_t^k = m_t(z_{t-1}^{a_k}) + s_t(z_{t-1}^{a_k})\, e_t^k, \quad
    a = \mathrm{systematic}(W_{t-1}; \Phi(v_t)), \quad
    \hat p(x) = \prod_t \frac1N \sum_k g(x_t \mid z_t^k)

where the particles are sorted before they are resampled, by value or, in several dimensions, along
a Hilbert curve, so that a small change of the arguments moves few ancestors far. The estimate is
unbiased over the arguments.

References
----------
Deligiannidis, Doucet and Pitt (2018), The correlated pseudomarginal method, *JRSS B* 80; Malik and
Pitt (2011), Particle filters for continuous likelihood evaluation and maximisation, *Journal of
Econometrics* 165; Gerber and Chopin (2015), Sequential quasi Monte Carlo, *JRSS B* 77, section 2.2
(the Hilbert sort); Skilling (2004), Programming the Hilbert curve, *AIP Conference Proceedings*
707.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributions import Independent, Normal

from seqdgm.inference.resampling import gather, normalise
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch, tree_map

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


MOST_BITS = 62  # of a place on the curve
FINEST = 16  # bits of one coordinate at most


class Noise(NamedTuple):
    """Every random number of a filter, standard normal.

    Attributes
    ----------
    moves : Tensor of shape (row, time, particle, state)
    levels : Tensor of shape (row, time)
        Of systematic resampling, through the normal distribution function.
    """

    moves: Float[Tensor, "row time particle state"]
    levels: Float[Tensor, "row time"]

    @classmethod
    def draw(
        cls, batch: Batch, n_particles: int, generator: torch.Generator, state_dim: int = 1
    ) -> Noise:
        """Fresh numbers for every row."""
        shape = (batch.n_series, batch.n_steps)
        return cls(
            _normal((*shape, n_particles, state_dim), batch.x, generator),
            _normal(shape, batch.x, generator),
        )

    def refresh(self, rho: float, generator: torch.Generator) -> Noise:
        """Numbers of the same law with correlation `rho` to these."""
        scale = math.sqrt(1 - rho**2)
        return Noise(
            *(rho * part + scale * _normal(tuple(part.shape), part, generator) for part in self)
        )

    def choose(self, rows: Bool[Tensor, "row"], other: Noise) -> Noise:
        """These numbers where `rows` is true, else the other ones."""
        return Noise(
            torch.where(rows[:, None, None, None], self.moves, other.moves),
            torch.where(rows[:, None], self.levels, other.levels),
        )


def check_correlated(model: StateSpaceModel, batch: Batch) -> None:
    """Raise a ValueError for a model that the correlated filter cannot run."""
    name = type(model).__name__
    if not 1 <= model.latent_dim <= MOST_BITS // 2:
        raise ValueError(
            f"{name} has states of {model.latent_dim} dimensions; correlated=True sorts particles "
            f"in 1 to {MOST_BITS // 2} of them"
        )
    if model.feedback and not batch.complete:
        raise ValueError(
            f"{name} feeds observations back and some are missing, so that they would have to be "
            "drawn; use correlated=False, or impute them first"
        )


@torch.no_grad()
def correlated_log_prob(model: StateSpaceModel, batch: Batch, noise: Noise) -> Float[Tensor, "row"]:
    """Log of the likelihood's estimate with the random numbers given.

    Parameters
    ----------
    model : StateSpaceModel
        Whose prior is Normal, independent over the dimensions of the state.
    batch : Batch
    noise : Noise
        With one entry for each series of the batch.

    Returns
    -------
    Tensor of shape (row,), float64
        Minus infinity where no particle survives.

    Raises
    ------
    ValueError
        If the prior is not Normal, or a weight is not a number.
    """
    n, count = noise.moves.shape[0], noise.moves.shape[2]
    s, z = model.start((n, count)), None
    total = noise.levels.new_zeros(n, dtype=torch.float64)
    log_w: Tensor | None = None
    for t in range(batch.n_steps):
        u = batch.inputs_at(t, 1)
        if z is not None and log_w is not None:
            ancestors = _sorted_systematic(z, log_w, noise.levels[:, t])
            s = tree_map(partial(gather, ancestors=ancestors), s)
        fed = None
        if model.feedback:
            last = batch.x[:, t - 1] if t else torch.zeros_like(batch.x[:, 0])
            fed = model.embed(last[:, None].expand(n, count, -1))
        h = model.advance(s, fed, u)
        mean, std = _location_scale(model, h, u, t, (n, count))
        z = mean + std * noise.moves[:, t]
        s = model.absorb(h, z)
        x, mask = batch.x[:, t, None], batch.mask[:, t, None]
        shape = (n, count, x.shape[-1])
        seen = None if bool(mask.all()) else mask.expand(shape)
        log_g = dist.log_prob(model.emission(s, u), x.expand(shape), seen).double()
        log_w, step = normalise(log_g.expand(n, count))
        step = torch.where(mask.any(-1)[:, 0], step - math.log(count), 0.0)
        if bool(torch.isnan(step).any()):
            k = int(torch.nonzero(torch.isnan(step))[0, 0])
            raise ValueError(
                f"series {batch.ids[k]!r}, step {t}: a weight is not a number; the model returned "
                "NaN for values of the parameters within their priors"
            )
        log_w = torch.where(torch.isfinite(step)[:, None], log_w, -math.log(count))
        total = total + step
    return total


def _location_scale(
    model: StateSpaceModel, h: object, u: object, t: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    prior = model.prior(h, u)  # type: ignore[arg-type]
    while isinstance(prior, Independent):
        prior = prior.base_dist
    if not isinstance(prior, Normal):
        raise ValueError(
            f"{type(model).__name__} has a prior {type(prior).__name__} at step {t}; "
            "correlated=True needs Normal, whose draws are linear in the random numbers"
        )
    wide = dist.expand(prior, shape, model.latent_dim)
    assert isinstance(wide, Normal)
    return wide.loc, wide.scale


def _sorted_systematic(
    z: Float[Tensor, "row particle state"],
    log_weights: Float[Tensor, "row particle"],
    level: Float[Tensor, "row"],
) -> Tensor:
    """Systematic resampling of the particles in the order of `_place`."""
    count = z.shape[1]
    order = torch.argsort(_place(z), 1)
    cumulative = torch.gather(log_weights, 1, order).exp().cumsum(1)
    grid = torch.arange(count, dtype=cumulative.dtype, device=z.device)
    grid = (grid + torch.special.ndtr(level.double())[:, None]) / count * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, grid, right=True).clamp_max(count - 1)
    return torch.gather(order, 1, place)


def _place(z: Float[Tensor, "row particle state"]) -> Tensor:
    """The value of each particle, or its place on a Hilbert curve through a cube.

    Coordinates enter the cube by the logistic function, after they are standardised in each row.
    """
    size = z.shape[-1]
    if size == 1:
        return z[..., 0]
    bits = min(FINEST, MOST_BITS // size)
    spread = z.std(1, keepdim=True, correction=0)
    unit = (z - z.mean(1, keepdim=True)) / torch.where(spread > 0, spread, 1.0)
    cell = (torch.sigmoid(unit.double()) * 2**bits).long().clamp(0, 2**bits - 1)
    return hilbert(cell, bits)


def hilbert(cell: Int[Tensor, "*batch state"], bits: int) -> Int[Tensor, "*batch"]:
    """Place of each cell of a grid of ``2**bits`` points a side on the Hilbert curve through it."""
    size = cell.shape[-1]
    x = list(cell.unbind(-1))
    for low in ((1 << k) - 1 for k in range(bits - 1, 0, -1)):
        for i in range(size):
            flip = (x[i] & (low + 1)) != 0
            swap = torch.where(flip, 0, (x[0] ^ x[i]) & low)
            x[0] = torch.where(flip, x[0] ^ low, x[0] ^ swap)
            x[i] = x[0] if i == 0 else x[i] ^ swap
    for i in range(1, size):
        x[i] = x[i] ^ x[i - 1]
    turn = torch.zeros_like(x[0])
    for k in range(bits - 1, 0, -1):
        turn = torch.where((x[-1] >> k) & 1 != 0, turn ^ ((1 << k) - 1), turn)
    place = torch.zeros_like(turn)
    for k in range(bits - 1, -1, -1):
        for part in x:
            place = (place << 1) | (((part ^ turn) >> k) & 1)
    return place


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
