r"""Objectives of learning: bounds of the log-likelihood, step by step and with gradients.

With K particles, :math:`w_t^k = g(x_t \mid s_t^k) f(z_t^k \mid h_t^k) / q(z_t^k \mid h_t^k, x)`:

========== ===================================================================================
``"elbo"`` :math:`E_q \sum_t [\log g(x_t \mid s_t) - \mathrm{KL}(q \,\|\, f)]`, the divergence in
           closed form where there is one, averaged over K paths
``"iwae"`` :math:`E_q \log \frac1K \sum_k \prod_t w_t^k`; tighter the larger K is
``"fivo"`` :math:`E \log \hat Z`, the evidence of a particle filter that resamples as it goes; it
           tightens with K for long series too
``"rws"``  reweighted wake-sleep: in place of a bound's gradient
           :math:`\sum_k W^k \nabla \log p(x, z^k)` for the model and
           :math:`\sum_k W^k \nabla \log q(z^k \mid x)` for the proposal, which come nearer to the
           gradients of the likelihood and of -KL(posterior || q) with K. With resampling it is
           neural adaptive sequential Monte Carlo, with the weights of the filter at each step
========== ===================================================================================

All are the same loop; :math:`E_q \log \hat Z \le \log p(x)` because the estimate of the likelihood
is unbiased. Weights are kept in float64.

Gradients flow through the draws of z. Resampling jumps, and is left out of them unless
`resampling_gradients`: then each step's choice of ancestors adds its score times the evidence of
the steps from there on (exact for ``threshold=1``; the gradient has a large variance). The
doubly reparameterised gradient of ``"iwae"`` leaves the score of q out as well, with
:math:`\sum_k (W^k)^2 \partial_z \log w^k\, \mathrm{d} z^k / \mathrm{d}\phi` in its place: the same
expectation, and a signal that does not drown as K grows.

References
----------
Krishnan, Shalit and Sontag (2017), Structured inference networks for nonlinear state space models,
*AAAI*, equations 4-6; Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders,
*ICLR*; Maddison et al. (2017), Filtering variational objectives, *NIPS 30*, section 4; Le et al.
(2018), Auto-encoding sequential Monte Carlo, *ICLR*; Naesseth et al. (2018), Variational sequential
Monte Carlo, *AISTATS*; Tucker, Lawson, Gu and Maddison (2019), Doubly reparameterized gradient
estimators for Monte Carlo objectives, *ICLR*, section 3; Bornschein and Bengio (2015), Reweighted
wake-sleep, *ICLR*, section 2; Gu, Ghahramani and Turner (2015), Neural adaptive sequential Monte
Carlo, *NIPS 28*, section 3; Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016),
Improved variational inference with inverse autoregressive flow, *NIPS 29*, appendix (free bits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.inference import joint
from seqdgm.inference.particle_scan import (
    Steering,
    Swarm,
    densities,
    increments,
    particle_scan,
)
from seqdgm.inference.scan import Piece, Trace, copied, prior_over_time, scan
from seqdgm.nn import distributions as dist
from seqdgm.types import Batch, Inputs, check_count, tree_map

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

Name = Literal["elbo", "iwae", "fivo", "rws"]


@dataclass(frozen=True)
class Objective:
    """What to maximise; see the module's table.

    Attributes
    ----------
    name : {"elbo", "iwae", "fivo", "rws"}
    n_particles : int
        Particles of every series.
    threshold : float, optional
        ``"fivo"`` and ``"rws"`` resample a series when its effective sample size falls below this
        share of the particles: 1 at every step, 0 never; 0.5 by default.
    resampling_gradients : bool
        For ``"fivo"`` that resamples: whether the choice of ancestors has a gradient too.
    doubly_reparameterised : bool
        For ``"iwae"``: leave the score of the proposal out of the gradient.
    free_bits : float
        For ``"elbo"``: nats of divergence that cost nothing at each step of each series; a smaller
        one counts as this many, and has no gradient.

    Raises
    ------
    ValueError
        For an unknown name, a number out of its range, or an option of another objective.

    Examples
    --------
    >>> Objective("iwae", n_particles=8, doubly_reparameterised=True).n_particles
    8
    """

    name: Name = "elbo"
    n_particles: int = 1
    threshold: float | None = None
    resampling_gradients: bool = False
    doubly_reparameterised: bool = False
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        check_count("n_particles", self.n_particles)
        if self.name not in get_args(Name):
            raise ValueError(f"objective={self.name!r} is unknown; choose one of {get_args(Name)}")
        if self.name == "rws" and self.n_particles < 2:
            raise ValueError("objective='rws' compares particles: n_particles must be at least 2")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r} must lie between 0 and 1")
        if self.threshold is not None and self.name not in ("fivo", "rws"):
            raise ValueError(f"threshold goes with 'fivo' and 'rws', not {self.name!r}")
        if not self.free_bits >= 0:
            raise ValueError(f"free_bits={self.free_bits!r} must not be negative")
        for option, owner in (
            ("resampling_gradients", "fivo"),
            ("doubly_reparameterised", "iwae"),
            ("free_bits", "elbo"),
        ):
            if getattr(self, option) and self.name != owner:
                raise ValueError(f"{option} goes with objective={owner!r}, not {self.name!r}")
        if self.resampling_gradients and not self.resamples:
            raise ValueError(
                "resampling_gradients=True needs a threshold above 0 and at least 2 particles"
            )

    @property
    def share(self) -> float:
        """The threshold, or its default."""
        return 0.5 if self.threshold is None else self.threshold

    @property
    def resamples(self) -> bool:
        """Whether particles choose ancestors."""
        return self.name in ("fivo", "rws") and self.share > 0 and self.n_particles > 1


class Terms(NamedTuple):
    """An objective, step by step; zero beyond a series' end.

    Attributes
    ----------
    value : Tensor of shape (series, time)
        To be maximised, with gradients. Several particles: increments of the log of the mean
        weight, which add up to the bound.
    reconstruction : Tensor of shape (series, time)
        log g(x_t | s_t) over observed elements; the mean by the weights after the step.
    divergence : Tensor of shape (series, time)
        Of the proposal from the prior; zero without latent states. Several particles: what the
        bound falls short of the reconstruction. With ``beta=1`` the bound of the log-likelihood,
        without a model's auxiliary term, is the reconstruction less the divergence.
    """

    value: Float[Tensor, "series time"]
    reconstruction: Float[Tensor, "series time"]
    divergence: Float[Tensor, "series time"]


def evaluate(
    model: StateSpaceModel,
    batch: Batch,
    objective: Objective,
    beta: float,
    generator: torch.Generator,
) -> Terms:
    """An objective of every step of a batch, with gradients.

    Parameters
    ----------
    model : StateSpaceModel
        One without latent states has its log-likelihood as every objective.
    batch : Batch
    objective : Objective
    beta : float
        Weight of the divergence; below 1 while it is warmed up.
    generator : torch.Generator

    Examples
    --------
    >>> import numpy as np, seqdgm as sq
    >>> from seqdgm.prepare import prepare
    >>> model = sq.DMM(2, 4, 4, max_epochs=1).fit(np.arange(12.0), seed=0)
    >>> _, batch, _ = prepare(model, np.arange(12.0), None)
    >>> terms = evaluate(model, batch, Objective(), 1.0, torch.Generator().manual_seed(0))
    >>> terms.value.shape
    torch.Size([1, 12])
    """
    if objective.name == "elbo" or not model.latent_dim:
        return _elbo(model, batch, objective, beta, generator)[0]
    if objective.name == "iwae" or (objective.name == "fivo" and not objective.resamples):
        return _iwae(model, batch, objective, beta, generator)
    return _fivo(model, batch, objective, beta, generator)


def evaluate_piece(
    model: StateSpaceModel,
    batch: Batch,
    objective: Objective,
    beta: float,
    generator: torch.Generator,
    piece: Piece,
) -> tuple[Terms, Piece]:
    """The evidence lower bound of a window of the series, and what the next takes over.

    Nothing that is taken over has a gradient. Parameters as in `evaluate`, with one particle.
    """
    terms, trace = _elbo(model, batch, objective, beta, generator, piece)
    s = tree_map(lambda leaf: leaf[:, -1].detach(), trace.s)
    last = (batch.x if trace.x is None else trace.x)[:, -1]
    return terms, piece._replace(s=s, x=last)


# ------------------------------------------------------------------------------ independent paths


class Path(NamedTuple):
    """Terms of the bound along one path, zero beyond a series' end; see `Terms`."""

    reconstruction: Float[Tensor, "series time"]
    divergence: Float[Tensor, "series time"]


def along(model: StateSpaceModel, batch: Batch, trace: Trace, *, closed: bool = True) -> Path:
    """Reconstruction and divergence along a path that the proposal drew.

    The divergence is in closed form where there is one and it is wanted, else log q(z) - log f(z).
    """
    emission = model.emission(trace.s, batch.inputs_all())
    shape = (batch.n_series, batch.n_steps)
    wide = dist.expand(emission, shape, batch.x.shape[2])
    valid = batch.valid
    reconstruction = torch.where(valid, dist.log_prob(wide, batch.x, batch.mask), 0.0)
    if trace.context is None or trace.z is None:
        # Nothing proposes: z comes from the prior itself.
        return Path(reconstruction, torch.zeros_like(reconstruction))
    parts = []
    for steps, prior in prior_over_time(model, batch, trace):
        parts.append(_divergence(trace.proposal(steps), prior, trace.z[:, steps], closed))
    return Path(reconstruction, torch.where(valid, torch.cat(parts, 1), 0.0))


def _divergence(
    q: Distribution, p: Distribution, z: Tensor, closed: bool
) -> Float[Tensor, "*batch"]:
    if closed:
        try:
            return dist.kl(q, p)
        except NotImplementedError:
            pass
    return dist.log_prob(q, z) - dist.log_prob(p, z)


def replicate(batch: Batch, count: int) -> Batch:
    """Every series `count` times over, one after another."""
    return batch if count == 1 else batch.take(copied(batch, count))


def _elbo(
    model: StateSpaceModel,
    batch: Batch,
    objective: Objective,
    beta: float,
    generator: torch.Generator,
    piece: Piece | None = None,
) -> tuple[Terms, Trace]:
    count = objective.n_particles if model.latent_dim else 1
    wide = replicate(batch, count)
    trace = scan(model, batch, generator, count, piece)
    found = along(model, wide, trace)
    charged = found.divergence
    if objective.free_bits and model.latent_dim:
        charged = torch.where(wide.valid, charged.clamp_min(objective.free_bits), 0.0)
    value = found.reconstruction - beta * charged
    if trace.z is not None and trace.context is not None:
        extra = model.auxiliary(trace.h, trace.z, trace.context, batch.inputs_all())
        value = _added(wide, value, extra)
    terms = Terms(value, found.reconstruction, found.divergence)
    if count == 1:
        return terms, trace
    mean = (part.unflatten(0, (batch.n_series, count)).mean(1) for part in terms)
    return Terms(*mean), trace


def _added(batch: Batch, value: Tensor, extra: Tensor | None) -> Tensor:
    """Add the model's own term of training, where it has one; the mean over particles."""
    if extra is None:
        return value
    if extra.ndim > 2:
        extra = extra.mean(1)
    return value + torch.where(batch.valid, extra, 0.0)


def _iwae(
    model: StateSpaceModel,
    batch: Batch,
    objective: Objective,
    beta: float,
    generator: torch.Generator,
) -> Terms:
    count = objective.n_particles
    shape = (batch.n_series, count)
    trace = scan(model, batch, generator, count)
    never = torch.zeros_like(batch.valid)
    h = tree_map(lambda leaf: leaf.unflatten(0, shape), trace.h)
    assert trace.z is not None
    z = trace.z.unflatten(0, shape)
    context = None if trace.context is None else trace.context[::count]
    if objective.doubly_reparameterised and torch.is_grad_enabled():
        x = None if trace.x is None else trace.x.unflatten(0, shape)
        value, reconstruction, bound = _doubly(model, batch, z, context, x, beta)
    else:
        found = along(model, replicate(batch, count), trace, closed=False)
        log_g, ratio = (part.unflatten(0, shape).double() for part in found)
        bound, log_weights = increments(log_g - beta * ratio, never)
        value, reconstruction = bound, _mean(log_g, log_weights)
    if context is not None:
        known = batch.inputs_all()
        u = Inputs(known.values[:, None], known.t)
        value = _added(batch, value, model.auxiliary(h, z, context[:, None], u))
    return Terms(value, reconstruction, reconstruction - bound.detach())


def _mean(x: Tensor, log_weights: Tensor) -> Float[Tensor, "series time"]:
    """Mean over particles, without a gradient."""
    return (log_weights.exp() * x).sum(1).detach()


def _with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of one and the gradient of the other."""
    return value.detach() + surrogate - surrogate.detach()


def _doubly(
    model: StateSpaceModel,
    batch: Batch,
    z: Float[Tensor, "series particle time state"],
    context: Tensor | None,
    x: Tensor | None,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Value, reconstruction and bound of IWAE with the doubly reparameterised gradient.

    Along paths that are held fixed, the gradient of the model's density is explicit, with weights
    W, and that of :math:`\log w` with respect to z is known; the latter, with weights
    :math:`\beta W^2 + (1 - \beta) W`, pulls on the paths as they were drawn. (For
    :math:`\beta \ne 1` the score of q enters only with the factor beta.)
    """
    if context is None:
        raise ValueError(
            f"{type(model).__name__} has no proposal of its own, whose gradient could be doubly "
            "reparameterised; use doubly_reparameterised=False"
        )
    fixed = z.detach().requires_grad_()
    path = joint.follow(model, batch, fixed, x)
    wide = (*fixed.shape[:3], batch.x.shape[2])
    seen, mask = batch.x[:, None].expand(wide), batch.mask[:, None].expand(wide)
    log_g = joint.log_emission(model, batch, path, seen, mask)
    log_f = joint.log_prior(model, batch, path, fixed)
    log_q = joint.log_proposal(model, batch, path, fixed, context.detach())
    log_w = log_g + beta * (log_f - log_q)
    (pull,) = torch.autograd.grad(log_w.sum(), fixed, retain_graph=True)
    bound, log_weights = increments(log_w.detach(), torch.zeros_like(batch.valid))
    final = log_weights[:, :, -1:].exp()
    squared = (beta * final.square() + (1 - beta) * final)[..., None]
    explicit = (final * (log_g + beta * log_f)).sum(1)
    surrogate = explicit + (squared * pull.double() * z.double()).sum((1, 3))
    return _with_gradient_of(bound, surrogate), _mean(log_g, log_weights), bound


# ----------------------------------------------------------------------------- resampled particles


def _fivo(
    model: StateSpaceModel,
    batch: Batch,
    objective: Objective,
    beta: float,
    generator: torch.Generator,
) -> Terms:
    """Particle filters, for a filtering bound or for reweighted wake-sleep."""
    wake = objective.name == "rws"
    how = Steering(
        objective.n_particles,
        objective.share,
        beta,
        independent=objective.resampling_gradients,
        reparameterised=not wake,
    )
    swarm = particle_scan(model, batch, how, generator)
    found = densities(model, batch, swarm, prior=wake or swarm.log_q is not None)
    log_w = found.emission
    if found.prior is not None and found.proposal is not None:
        log_w = log_w + beta * (found.prior - found.proposal)
    bound, log_weights = increments(log_w, swarm.resampled)
    value = bound
    if wake:
        parts = [part for part in found[:3] if part is not None]
        # Paths that were never resampled are weighed as a whole.
        weights = log_weights if objective.share else log_weights[:, :, -1:]
        value = _with_gradient_of(bound, (weights.detach().exp() * sum(parts)).sum(1))
    elif objective.resampling_gradients:
        value = _with_gradient_of(bound, bound + _scores(swarm, log_weights, bound))
    reconstruction = _mean(found.emission, log_weights)
    value = _added(batch, value, found.auxiliary)
    return Terms(value, reconstruction, reconstruction - bound.detach())


def _scores(
    swarm: Swarm,
    log_weights: Float[Tensor, "series particle time"],
    bound: Float[Tensor, "series time"],
) -> Float[Tensor, "series time"]:
    """Log-probability of the ancestors of each step times the log-evidence from there on."""
    before = log_weights[:, :, :-1]
    chosen = before.gather(1, swarm.ancestors[:, :, 1:]).sum(1)
    chosen = torch.where(swarm.resampled[:, 1:], chosen, 0.0)
    future = bound.detach().flip(1).cumsum(1).flip(1)[:, 1:]
    return torch.nn.functional.pad(chosen * future, (1, 0))
