r"""The likelihood as a smooth function of parameters and random numbers, for correlated PMMH.

With :math:`e_t^k, v_t \sim N(0, 1)` as arguments,

.. math::

    z_t^k = m_t(z_{t-1}^{a_k}) + s_t(z_{t-1}^{a_k})\, e_t^k, \quad
    a = \mathrm{systematic}(W_{t-1}; \Phi(v_t)), \quad
    \hat p(x) = \prod_t \frac1N \sum_k g(x_t \mid z_t^k)

where the particles are sorted by value before they are resampled, so that a small change of the
arguments moves few ancestors far. The estimate is unbiased over the arguments.

References
----------
Deligiannidis, Doucet and Pitt (2018), The correlated pseudomarginal method, *JRSS B* 80; Malik and
Pitt (2011), Particle filters for continuous likelihood evaluation and maximisation, *Journal of
Econometrics* 165.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Independent, Normal

from seqdgm.inference.resampling import gather, normalise
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch, tree_map

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


class Noise(NamedTuple):
    """Every random number of a filter, standard normal.

    Attributes
    ----------
    moves : Tensor of shape (row, time, particle, 1)
    levels : Tensor of shape (row, time)
        Of systematic resampling, through the normal distribution function.
    """

    moves: Float[Tensor, "row time particle one"]
    levels: Float[Tensor, "row time"]

    @classmethod
    def draw(cls, batch: Batch, n_particles: int, generator: torch.Generator) -> Noise:
        """Fresh numbers for every row."""
        shape = (batch.n_series, batch.n_steps)
        return cls(
            _normal((*shape, n_particles, 1), batch.x, generator),
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
    if model.latent_dim != 1:
        raise ValueError(
            f"{name} has states of {model.latent_dim} dimensions, which have no order to sort "
            "particles by; correlated=True is for one-dimensional states"
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
        With states of one dimension whose prior is Normal.
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
            ancestors = _sorted_systematic(z[..., 0], log_w, noise.levels[:, t])
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
    wide = dist.expand(prior, shape, 1)
    assert isinstance(wide, Normal)
    return wide.loc, wide.scale


def _sorted_systematic(
    value: Float[Tensor, "row particle"],
    log_weights: Float[Tensor, "row particle"],
    level: Float[Tensor, "row"],
) -> Tensor:
    """Systematic resampling of the particles in the order of their values."""
    count = value.shape[1]
    order = torch.argsort(value, 1)
    cumulative = torch.gather(log_weights, 1, order).exp().cumsum(1)
    grid = torch.arange(count, dtype=cumulative.dtype, device=value.device)
    grid = (grid + torch.special.ndtr(level.double())[:, None]) / count * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, grid, right=True).clamp_max(count - 1)
    return torch.gather(order, 1, place)


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
