r"""Joint densities of trajectories and data, in few calls over (series x trajectories x time)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.inference.pairwise import states_are_z
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch, Inputs, tree_map, tree_stack

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


class Along(NamedTuple):
    """The recursion along paths; the leaves of `h` and `s` have axes (series, n, time, ...).

    `h` begins at step `first`: 1 where the first state has no memory before it, else 0.
    """

    h: Any
    s: Any
    first: int


def joint_log_density(
    model: StateSpaceModel,
    batch: Batch,
    z: Float[Tensor, "series n time state"] | None,
    x: Float[Tensor, "series n time dim"] | None = None,
) -> Float[Tensor, "series n"]:
    r"""Log of :math:`p(x, z_{1:T}) = \prod_t f(z_t \mid h_t)\, g(x_t \mid s_t)`, with gradients.

    Parameters
    ----------
    model : StateSpaceModel
    batch : Batch
    z : Tensor of shape (series, n, time, state) or None
        Trajectories, finite beyond a series' end too; None for a model without random states.
    x : Tensor of shape (series, n, time, dim), optional
        Observations with the missing ones drawn, for a model that feeds them back: what was drawn
        counts as a latent variable then.

    Returns
    -------
    Tensor of shape (series, n), float64
        Sums over the steps within each series.

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> from seqdgm.prepare import prepare
    >>> one = [[1.0]]
    >>> walk = sq.LinearGaussianSSM(F=one, H=one, Q=one, R=one, m0=[0.0], P0=one)
    >>> _, batch, _ = prepare(walk, np.array([0.0]), None)
    >>> z = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    >>> round(joint_log_density(walk, batch, z).item(), 4)  # log N(0; 0, 1) twice
    -1.8379
    """
    path = follow(model, batch, z, x)
    count = 1 if z is None else z.shape[1]
    if x is not None:
        count = x.shape[1]
    seen, mask = _observed(model, batch, x, (batch.n_series, count, batch.n_steps))
    log_g = log_emission(model, batch, path, seen, mask)
    return log_g.sum(2) if z is None else (log_g + log_prior(model, batch, path, z)).sum(2)


def follow(
    model: StateSpaceModel,
    batch: Batch,
    z: Float[Tensor, "series n time state"] | None,
    x: Float[Tensor, "series n time dim"] | None = None,
) -> Along:
    """Run the recursion along given states; arguments as those of `joint_log_density`."""
    count = 1 if z is None else z.shape[1]
    if x is not None:
        count = x.shape[1]
    shape = (batch.n_series, count, batch.n_steps)
    fed = None
    if model.feedback:
        seen = batch.x[:, None].expand(*shape, -1) if x is None else x
        fed = model.embed(_previous(seen))
    if z is not None and model.memoryless and states_are_z(model):
        known = batch.inputs_all()
        return _at_once(model, batch, z, fed, Inputs(known.values[:, None], known.t), shape)
    return _loop(model, batch, z, fed, shape)


def log_emission(
    model: StateSpaceModel,
    batch: Batch,
    path: Along,
    x: Float[Tensor, "series n time dim"],
    mask: Bool[Tensor, "series n time dim"],
) -> Float[Tensor, "series n time"]:
    """Log g(x_t | s_t) in float64, zero beyond a series' end."""
    known = batch.inputs_all()
    emission = model.emission(path.s, Inputs(known.values[:, None], known.t))
    steps = dist.log_prob(dist.expand(emission, x.shape[:3], x.shape[3]), x, mask)
    return torch.where(batch.valid[:, None], steps.double(), 0.0)


def log_prior(
    model: StateSpaceModel, batch: Batch, path: Along, z: Float[Tensor, "series n time state"]
) -> Float[Tensor, "series n time"]:
    """Log f(z_t | h_t) in float64, zero beyond a series' end."""
    return _over_time(model, batch, path, z, model.prior)


def log_proposal(
    model: StateSpaceModel,
    batch: Batch,
    path: Along,
    z: Float[Tensor, "series n time state"],
    context: Float[Tensor, "series time features"],
) -> Float[Tensor, "series n time"]:
    """Log q(z_t | h_t, c_t) in float64, zero beyond a series' end."""
    wide = context[:, None]

    def law(h: Any, u: Inputs) -> Distribution:
        return model.proposal(h, wide[:, :, 0] if h is None else wide[:, :, path.first :], u)

    return _over_time(model, batch, path, z, law)


def _over_time(
    model: StateSpaceModel,
    batch: Batch,
    path: Along,
    z: Tensor,
    law: Callable[[Any, Inputs], Distribution | None],
) -> Float[Tensor, "series n time"]:
    """Log-density of z under a law of every step, in as few calls as the first step allows."""
    parts = []
    if path.first:
        first = law(None, batch.inputs_at(0, 1))
        assert first is not None
        first = dist.expand(first, z.shape[:2], model.latent_dim)
        parts.append(dist.log_prob(first, z[:, :, 0])[:, :, None])
    if z.shape[2] > path.first:
        known = batch.inputs_all()
        rest = law(path.h, Inputs(known.values[:, None, path.first :], known.t[path.first :]))
        assert rest is not None
        later = z[:, :, path.first :]
        rest = dist.expand(rest, later.shape[:3], model.latent_dim)
        parts.append(dist.log_prob(rest, later))
    steps = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return torch.where(batch.valid[:, None], steps.double(), 0.0)


def _observed(
    model: StateSpaceModel, batch: Batch, x: Tensor | None, shape: tuple[int, int, int]
) -> tuple[Tensor, Bool[Tensor, "series n time dim"]]:
    """Observations, and which of their elements have a density."""
    full = (*shape, batch.x.shape[2])
    mask = batch.mask[:, None].expand(full)
    if x is None:
        return batch.x[:, None].expand(full), mask
    # What the model drew and read back is part of the path; what it took as missing is not.
    return x, batch.valid[:, None, :, None].expand(full) if model.fills_missing else mask


def _previous(x: Tensor) -> Tensor:
    """Observations shifted by one step, zeros before the first."""
    return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)


def _at_once(
    model: StateSpaceModel,
    batch: Batch,
    z: Tensor,
    fed: Tensor | None,
    u: Inputs,
    shape: tuple[int, int, int],
) -> Along:
    first = model.advance(
        model.start(shape[:2]), None if fed is None else fed[:, :, 0], batch.inputs_at(0, 1)
    )
    h = None
    if shape[2] > 1:
        later = Inputs(u.values[:, :, 1:], u.t[1:])
        h = model.advance(z[:, :, :-1], None if fed is None else fed[:, :, 1:], later)
    if first is None:
        return Along(h, z, 1)
    if h is None:
        return Along(tree_map(lambda leaf: leaf[:, :, None], first), z, 0)
    return Along(_join(first, h), z, 0)


def _join(first: Any, later: Any) -> Any:
    """Memory of the first step in front of that of the later ones."""
    if isinstance(first, Tensor):
        shape = (*later.shape[:2], 1, *later.shape[3:])
        return torch.cat([first[:, :, None].expand(shape), later], 2)
    joined = [_join(a, b) for a, b in zip(first, later, strict=True)]
    return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)


def _loop(
    model: StateSpaceModel,
    batch: Batch,
    z: Tensor | None,
    fed: Tensor | None,
    shape: tuple[int, int, int],
) -> Along:
    s = model.start(shape[:2])
    hs, ss = [], []
    for t in range(shape[2]):
        h = model.advance(s, None if fed is None else fed[:, :, t], batch.inputs_at(t, 1))
        s = model.absorb(h, None if z is None else z[:, :, t])
        hs.append(h)
        ss.append(s)
    first = int(hs[0] is None)
    return Along(tree_stack(hs[first:], 2) if len(hs) > first else None, tree_stack(ss, 2), first)
