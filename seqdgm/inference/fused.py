"""Bootstrap filters that run in one compiled loop.

A model says by `StateSpaceModel.fused` that the kernels know it; any other is compiled where the
options ask for it (`seqdgm.inference.compiled`). The result is what the driver
(`seqdgm.inference.smc`) estimates, by other random numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from seqdgm.inference.smc import SMCOptions
from seqdgm.kernels.particles import (
    Bootstrapped,
    bootstrap_linear_gaussian,
    bootstrap_volatility,
)
from seqdgm.kernels.particles_types import Volatility
from seqdgm.types import Batch, draw_seed

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


def bootstrap(
    model: StateSpaceModel,
    batch: Batch,
    options: SMCOptions,
    generator: torch.Generator,
    *,
    moments: bool = False,
) -> Bootstrapped | None:
    """Run the fused filter; None where the model or the options ask for the general one.

    With `moments`, those of the state: its variances at least, or its covariances.

    Raises
    ------
    ValueError
        If every particle of a series has weight zero, or a weight is not a number: the series and
        the step are named.
    """
    if options.compile:
        from seqdgm.inference import compiled

        out = compiled.bootstrap(model, batch, options, generator, moments=moments)
    else:
        found = _known(model, batch, options, generator, moments)
        if found is None:
            return None
        out = found
    possible = torch.isfinite(out.increments)
    if options.collapse == "zero":
        possible |= torch.isneginf(out.increments)
    bad = torch.nonzero(~possible)
    if len(bad):
        k, t = bad[0].tolist()
        raise ValueError(
            f"series {batch.ids[k]!r}, step {t}: every particle has weight zero or a weight that "
            "is not a number; the observation is impossible under the model: check it, use a "
            "heavier-tailed emission or more particles"
        )
    return out


def _known(
    model: StateSpaceModel,
    batch: Batch,
    options: SMCOptions,
    generator: torch.Generator,
    moments: bool,
) -> Bootstrapped | None:
    """The filter of a model that the kernels know."""
    if not _plain(model, options):
        return None
    # The kernels give variances, not covariances.
    known = None if moments and model.latent_dim > 1 else model.fused(batch)
    if known is None:
        return None
    seed = draw_seed(generator)
    if isinstance(known, Volatility):
        out = bootstrap_volatility(
            known,
            batch.x[..., 0],
            batch.mask[..., 0],
            batch.lengths,
            n_particles=options.n_particles,
            seed=seed,
            threshold=options.threshold,
            moments=moments,
        )
    else:
        out = bootstrap_linear_gaussian(
            known,
            batch.x,
            batch.mask,
            batch.lengths,
            n_particles=options.n_particles,
            seed=seed,
            threshold=options.threshold,
            moments=moments,
        )
    return out


def _plain(model: StateSpaceModel, options: SMCOptions) -> bool:
    """Whether the options ask for a bootstrap filter and nothing else."""
    from_prior = options.proposal == "bootstrap" or (
        options.proposal == "auto" and not model.has_proposal
    )
    return from_prior and options == SMCOptions(
        options.n_particles,
        threshold=options.threshold,
        proposal=options.proposal,
        collapse=options.collapse,
    )
