"""Parts of a step of the SMC driver: look-ahead, the reference's ancestor, draws of the state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.inference.proposals import predictive
from seqdgm.inference.resampling import Resampled, Resampler, normalise, resample_from
from seqdgm.nn import distributions as dist

if TYPE_CHECKING:
    from seqdgm.inference.smc import Cloud
    from seqdgm.inference.smc import _Facts as Facts
    from seqdgm.inference.smc import _Plan as Plan
    from seqdgm.recursion import StateSpaceModel


def lookahead(plan: Plan, h: Any, now: Facts) -> Float[Tensor, "series particle"]:
    """log eta(h_t, x_t); zero where nothing is observed or no particle looks possible."""
    rule, model = plan.options.lookahead, plan.model
    if model.latent_dim == 0:
        return now.x.new_zeros(plan.shape, dtype=torch.float64)
    log_eta = None
    if callable(rule):
        log_eta = rule(model, h, now.u, now.x, now.mask)
    elif rule == "ekf":
        log_eta = predictive(model, h, now.u, now.x, now.mask)
    elif rule == "mean":
        log_eta = model.lookahead(h, now.x, now.mask, now.u)
    if log_eta is None:
        prior = model.prior(h, now.u)
        assert prior is not None
        mean = dist.expand(prior, plan.shape, model.latent_dim).mean
        emission = model.emission(model.absorb(h, mean), now.u)
        shape = (*plan.shape, now.x.shape[-1])
        x, mask = now.x.expand(shape), now.mask.expand(shape)
        log_eta = dist.log_prob(emission, x, None if now.complete else mask)
    log_eta = log_eta.double().expand(plan.shape)
    # A particle that looks impossible may still move to where the observation is possible.
    top = log_eta.max(1, keepdim=True).values
    guided = now.mask.any(-1) & (top != -torch.inf)
    return torch.where(guided, torch.maximum(log_eta, top - 50.0), 0.0)


def renewing(
    model: StateSpaceModel,
    conditional: Resampler,
    target: Float[Tensor, "series one state"],
    log_weights: Float[Tensor, "series particle"],
    h: Any,
    now: Facts,
) -> Resampler:
    """Conditional resampling after a draw of the reference's ancestor from W_{t-1} f(z'_t | h_t).

    The ancestor comes first: the others' depend on it in every scheme but the multinomial.
    """

    def resampler(
        chances: Float[Tensor, "series particle"], generator: torch.Generator
    ) -> Resampled:
        prior = model.prior(h, now.u)
        assert prior is not None
        wide = target.expand(*chances.shape, model.latent_dim)
        log_w, total = normalise(log_weights + dist.log_prob(prior, wide).double())
        # A reference that no particle could have come from keeps its own ancestor.
        possible = (torch.isfinite(total) & now.inside)[:, None]
        safe = torch.where(possible, log_w.exp(), 1.0)
        pick = torch.multinomial(safe, 1, generator=generator)
        return resample_from(conditional, chances, pick.masked_fill(~possible, 0), generator)

    return resampler


def propose(plan: Plan, h: Any, t: int, now: Facts) -> tuple[Tensor | None, Tensor | None]:
    """Draw z; with it log f - log q, None where z comes from the prior without a gradient."""
    model, proposal = plan.model, plan.proposal
    prior = model.prior(h, now.u)
    if prior is None:
        return None, None
    prior = dist.expand(prior, plan.shape, model.latent_dim)
    if proposal is None or not now.any_inside:
        z, log_f = _draw(plan, prior)
        ratio = None if log_f is None else dist.log_prob(prior, z) - log_f
        return _follow(plan, z, t, now), ratio
    found = proposal.propose(model, plan.context, t, h, now.u, now.x, now.mask)
    found = dist.expand(found, plan.shape, model.latent_dim)
    z, log_q = _draw(plan, found)
    inside = now.inside[:, None]
    if not now.all_inside:
        # Beyond the end of a series nothing was observed: the future comes from the prior.
        z = torch.where(inside[..., None], z, _draw(plan, prior)[0])
    z = _follow(plan, z, t, now)
    ratio = dist.log_prob(prior, z) - (dist.log_prob(found, z) if log_q is None else log_q)
    return z, torch.where(inside, ratio, 0.0)


def _draw(plan: Plan, law: Distribution) -> tuple[Tensor, Tensor | None]:
    """A draw; with a constant log-density where the gradient has to come from the density."""
    if not plan.options.differentiable:
        return dist.sample(law, plan.generator), None
    if law.has_rsample:
        return dist.sample(law, plan.generator, reparameterised=True), None
    z = dist.sample(law, plan.generator)
    return z, dist.log_prob(law, z).detach()


def _follow(
    plan: Plan, z: Float[Tensor, "series particle state"], t: int, now: Facts
) -> Float[Tensor, "series particle state"]:
    """Put particle 0 on the reference trajectory, if there is one."""
    reference = plan.options.reference
    if reference is not None:
        z[:, 0] = torch.where(now.inside[:, None], reference.z[:, t].to(z), z[:, 0])
    return z


def evidence_stderr(cloud: Cloud) -> Float[Tensor, "series"]:
    """Standard error of the log-evidence (Lee and Whiteley 2018, equation 8)."""
    n, count = cloud.eve.shape
    if count == 1:
        return cloud.log_weights.new_full((n,), torch.inf)
    weights = cloud.log_weights.detach().exp()
    families = torch.zeros_like(weights).scatter_add_(1, cloud.eve, weights)
    growth = (count / (count - 1.0)) ** (cloud.resamplings + 1).double()
    relative = 1.0 - growth * (1.0 - families.square().sum(1))
    single = families.max(1).values > 1 - 1e-12
    return torch.where(single, torch.inf, relative.clamp_min(0.0).sqrt())
