r"""Stochastic-approximation EM with conditional particle filters.

At iteration k a conditional particle filter moves a reference trajectory by a kernel that leaves
:math:`p_\theta(z_{1:T} \mid x)` invariant, with any number of particles. The expected
complete-data log-likelihood is followed by

.. math::

    Q_k(\theta) = (1 - \gamma_k) Q_{k-1}(\theta)
        + \gamma_k \frac1n \sum_{m=1}^n \log p_\theta(x, z_{1:T}^{(k, m)})

and maximised. :math:`\gamma_k` is 1 while the chain forgets its start and falls as
:math:`k^{-0.7}` then; so Q is a weighted sum over the trajectories of late iterations, which is how
it is kept for models that are no exponential family.

Networks take gradient steps towards that maximum instead, one pass over the series at each
iteration (`fit_networks`), and their proposal learns the density of the same trajectories.

References
----------
Delyon, Lavielle and Moulines (1999), Convergence of a stochastic approximation version of the EM
algorithm, *Annals of Statistics* 27; Lindsten (2013), An efficient stochastic approximation EM
algorithm using conditional particle filters, ICASSP; Whiteley (2010), discussion of Andrieu, Doucet
and Holenstein, *JRSS B* 72 (backward simulation of the reference); Zheng, Zaheer, Ahmed, Wang, Xing
and Smola (2017), State space LSTM models with particle MCMC inference, arXiv:1711.11179 (networks).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqdgm.inference.coordinates import Coordinates
from seqdgm.inference.joint import (
    follow,
    joint_log_density,
    log_emission,
    log_prior,
    log_proposal,
)
from seqdgm.inference.particle_score import (
    draw_trajectories,
    settled,
    shown,
    stopped,
)
from seqdgm.inference.proposals import Proposal
from seqdgm.inference.smc import Reference, SMCOptions
from seqdgm.inference.training import TrainingOptions
from seqdgm.inference.updates import groups
from seqdgm.nn.dropout import thinned
from seqdgm.results import FitReport
from seqdgm.types import Batch, check_count, seeded, tree_map

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

DECAY = 0.7  # exponent of the weights after the burn-in
NEGLIGIBLE = 1e-3  # trajectories of a smaller relative weight are forgotten
INNER_STEPS = 5  # quasi-Newton iterations of an M-step at most


class Retained(NamedTuple):
    """Smoothed trajectories of one or several iterations.

    Attributes
    ----------
    z : Tensor of shape (series, n, time, state)
        Finite beyond a series' end too, where it means nothing.
    x : Tensor of shape (series, n, time, dim) or None
        Observations as the model read them back; None for a model that does not.
    """

    z: Float[Tensor, "series n time state"]
    x: Float[Tensor, "series n time dim"] | None


@runtime_checkable
class ClosedForm(Protocol):
    """A model with an M-step of its own."""

    def m_step(self, batch: Batch, trajectories: Retained, weights: Float[Tensor, "n"]) -> None:
        r"""Set the parameters to the maximum of :math:`\sum_m w_m \log p_\theta(x, z^{(m)})`.

        The weights sum to 1 and are the same for all series.
        """


@dataclass
class _Memory:
    """The trajectories behind Q, and what was seen of the iterates."""

    kept: list[Retained] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)
    past: list[dict[str, Tensor]] = field(default_factory=list)
    converged: bool = False
    message: str = ""

    def add(self, new: Retained, gamma: float) -> None:
        """Give the newest trajectories weight gamma, and the others what is left."""
        weights = [*(w * (1 - gamma) for w in self.weights), gamma]
        kept = [*self.kept, new]
        alive = [k for k, w in enumerate(weights) if w > NEGLIGIBLE * max(weights)]
        total = sum(weights[k] for k in alive)
        self.weights = [weights[k] / total for k in alive]
        self.kept = [kept[k] for k in alive]

    def all(self) -> tuple[Retained, Float[Tensor, "n"]]:
        """Every trajectory behind Q, and its weight."""
        z = torch.cat([part.z for part in self.kept], 1)
        x = None
        if self.kept[0].x is not None:
            x = torch.cat([part.x for part in self.kept if part.x is not None], 1)
        each = [w / part.z.shape[1] for w, part in zip(self.weights, self.kept, strict=True)]
        repeats = torch.tensor([part.z.shape[1] for part in self.kept])
        weights = torch.tensor(each, dtype=torch.float64).repeat_interleave(repeats)
        return Retained(z, x), weights.to(z.device)


def fit(
    model: StateSpaceModel,
    batch: Batch,
    *,
    method: str,
    generator: torch.Generator,
    progress: bool,
    n_particles: int = 50,
    n_trajectories: int = 5,
    max_iter: int = 200,
    burn_in: int = 100,
    tol: float = 1e-3,
) -> FitReport:
    r"""Maximise the likelihood by stochastic-approximation EM.

    The M-step is the model's `m_step` (see `ClosedForm`) where it has one, else a few
    quasi-Newton iterations on the weighted joint log-densities, in unconstrained coordinates of the
    parameters that have a domain (`seqdgm.inference.coordinates`). All series share the parameters.

    Parameters
    ----------
    model, batch, method, generator, progress
        As every learner.
    n_particles : int
        Particles of each conditional filter; they set how fast the chain mixes, not where to.
    n_trajectories : int
        Trajectories drawn from each filter.
    max_iter : int
    burn_in : int
        Iterations that are forgotten at once: :math:`\gamma_k = 1`.
    tol : float
        Stop when no parameter has moved by more than ``tol * (1 + |parameter|)`` in 20 iterations.

    Returns
    -------
    FitReport
        `objective` holds the log-evidence estimate of each filter, of all series and in model
        units; the reference trajectory makes it too large, the less so the more particles.

    Raises
    ------
    ValueError
        If the model has nothing to learn, feeds back observations that are missing, or fails in
        the first iteration. A later failure stops the fit: the report says why, and names the
        series; the model keeps the last good parameters.
    """
    if tol < 0:
        raise ValueError(f"tol={tol!r} must be at least 0")
    model.set_starts(batch)
    at = Coordinates.of(model)
    scheme = _Scheme(
        at,
        SMCOptions(n_particles, resampler="multinomial"),
        n_trajectories,
        max_iter,
        burn_in,
        tol,
        lambda memory: _maximise(model, batch, memory, at),
    )
    return _learn(model, batch, scheme, method, generator, progress)


def fit_networks(
    model: StateSpaceModel,
    batch: Batch,
    *,
    method: str,
    generator: torch.Generator,
    progress: bool,
    n_particles: int = 20,
    n_trajectories: int = 1,
    max_epochs: int | None = None,
    burn_in: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    batch_size: int | None = None,
    clip: float = 5.0,
    proposal: str | Proposal = "bootstrap",
) -> FitReport:
    r"""Learn the networks of a model along trajectories that conditional particle filters draw.

    An epoch draws trajectories of all series, by a filter with the model's own predictive law as
    proposal, and takes one pass of AdamW over minibatches of series on :math:`\log p_\theta(x, z) +
    \log q_\phi(z \mid x)`. The proposal q learns the smoothing distribution that way, and reads
    the memory without a gradient to it.

    Parameters
    ----------
    model, batch, method, generator, progress
        As every learner.
    n_particles, n_trajectories : int
        As in `fit`.
    max_epochs : int, optional
        Epochs, all of which are run. As `learning_rate`, `weight_decay` and `batch_size` it is the
        model's own by default.
    burn_in : int, optional
        Epochs that forget earlier trajectories at once; all of them by default, which leaves the
        averaging to the gradient steps.
    learning_rate, weight_decay : float, optional
        Of AdamW.
    batch_size : int, optional
        Series in one update.
    clip : float
        Largest norm of the gradient.
    proposal : str or Proposal
        Of the filters; see `seqdgm.inference.proposals.make_proposal`.

    Raises
    ------
    ValueError
        As `fit`.

    References
    ----------
    Zheng et al. (2017), section 3.
    """
    own = model.get_params()
    defaults = TrainingOptions()
    chosen: dict[str, Any] = {}
    for name, value in (
        ("max_epochs", max_epochs),
        ("learning_rate", learning_rate),
        ("weight_decay", weight_decay),
        ("batch_size", batch_size),
    ):
        chosen[name] = own.get(name, getattr(defaults, name)) if value is None else value
    check_count("batch_size", chosen["batch_size"])
    if chosen["learning_rate"] <= 0 or clip <= 0:
        raise ValueError(
            f"learning_rate={chosen['learning_rate']!r} and clip={clip!r} must be positive"
        )
    if model.feedback and model.fills_missing and not batch.complete:
        raise ValueError(
            f"{type(model).__name__} feeds observations back, and some are missing: the "
            "trajectories of particle EM do not hold them; impute them first, or use another method"
        )
    at = Coordinates.of(model)
    decayed = groups(at.parameters.values(), chosen["weight_decay"])
    optimizer = torch.optim.AdamW(decayed, lr=chosen["learning_rate"])
    scheme = _Scheme(
        at,
        SMCOptions(n_particles, resampler="multinomial", proposal=proposal),
        n_trajectories,
        chosen["max_epochs"],
        chosen["max_epochs"] if burn_in is None else burn_in,
        None,
        lambda memory: _climb(
            model, batch, memory, optimizer, chosen["batch_size"], clip, generator
        ),
    )
    model.eval()
    report = _learn(model, batch, scheme, method, generator, progress)
    model.eval()
    return report


class _Scheme(NamedTuple):
    """How to learn: the filters, how long, and the M-step."""

    at: Coordinates
    options: SMCOptions
    n_trajectories: int
    max_iter: int
    burn_in: int
    tol: float | None
    maximise: Callable[[_Memory], None]


def _learn(
    model: StateSpaceModel,
    batch: Batch,
    scheme: _Scheme,
    method: str,
    generator: torch.Generator,
    progress: bool,
) -> FitReport:
    """Alternate between trajectories and M-steps."""
    begin = time.perf_counter()
    for name in ("max_iter", "n_trajectories"):
        check_count(name, getattr(scheme, name))
    if scheme.options.n_particles < 2:
        raise ValueError(f"n_particles={scheme.options.n_particles!r} must be at least 2")
    if model.latent_dim == 0:
        raise ValueError(f"{type(model).__name__} has no latent states; use method='mle'")
    memory = _Memory()
    good = scheme.at.snapshot()

    def iterate() -> Iterator[int]:
        nonlocal good
        reference: Reference | None = None
        for k in range(scheme.max_iter):
            gamma = 1.0 if k < scheme.burn_in else (k - scheme.burn_in + 1.0) ** -DECAY
            try:
                options = replace(scheme.options, reference=reference)
                draws = draw_trajectories(model, batch, options, generator, scheme.n_trajectories)
                assert draws.z is not None
                memory.add(Retained(draws.z, draws.x), gamma)
                scheme.maximise(memory)
            except ValueError as error:
                if k == 0:
                    raise
                memory.message = stopped(k, error)
                return
            good = scheme.at.snapshot()
            reference = Reference(draws.z[:, 0], ancestor_sampling=False)
            memory.objective.append(float(draws.log_likelihood.sum()))
            yield k
            if scheme.tol is not None:
                memory.past = [*memory.past[-20:], good]
                if k > scheme.burn_in and settled(memory.past, scheme.tol):
                    memory.converged = True
                    return

    for _ in shown(iterate(), scheme.max_iter) if progress else iterate():
        pass
    scheme.at.restore(good)
    return FitReport(
        method=method,
        objective=tuple(memory.objective),
        valid_objective=(),
        converged=np.array([memory.converged]),
        n_iter=len(memory.objective),
        seconds=time.perf_counter() - begin,
        messages=(memory.message,) if memory.message else (),
    )


def _climb(
    model: StateSpaceModel,
    batch: Batch,
    memory: _Memory,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    clip: float,
    generator: torch.Generator,
) -> None:
    """One pass of gradient steps over the series; ValueError, with the series named, if it fails.

    The parameters are then what they were before the failing step.
    """
    retained, weights = memory.all()
    order = torch.randperm(batch.n_series, generator=generator, device=batch.x.device)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    with seeded(generator), torch.enable_grad():
        for rows in order.split(batch_size):
            part = batch.take(rows)
            with thinned(generator, part.n_series):
                each = (_complete_data(model, part, retained.z[rows]) * weights).sum(1)
            bad = torch.nonzero(~each.isfinite())
            if len(bad):
                raise ValueError(
                    f"series {part.ids[int(bad[0, 0])]!r}: its expected complete-data "
                    "log-likelihood is not finite; scale the data or lower learning_rate"
                )
            optimizer.zero_grad()
            (-each.sum() / part.lengths.sum()).backward()
            norm = nn.utils.clip_grad_norm_(parameters, clip)
            if not bool(torch.isfinite(norm)):
                raise ValueError(
                    f"the gradient of the M-step by series {list(part.ids)} was not finite; scale "
                    "the data or lower learning_rate"
                )
            optimizer.step()
    optimizer.zero_grad()
    model.eval()


def _complete_data(
    model: StateSpaceModel, batch: Batch, z: Float[Tensor, "series n time state"]
) -> Float[Tensor, "series n"]:
    """log p(x, z), and log q(z | x) of a model with a proposal."""
    path = follow(model, batch, z)
    wide = (*z.shape[:3], batch.x.shape[2])
    x, mask = batch.x[:, None].expand(wide), batch.mask[:, None].expand(wide)
    density = log_emission(model, batch, path, x, mask) + log_prior(model, batch, path, z)
    context = model.encode(batch) if model.has_proposal else None
    if context is not None:
        fixed = path._replace(h=tree_map(Tensor.detach, path.h))
        density = density + log_proposal(model, batch, fixed, z, context)
    return density.sum(2)


def _maximise(model: StateSpaceModel, batch: Batch, memory: _Memory, at: Coordinates) -> None:
    """The M-step; ValueError, with the series named, if it leads nowhere finite."""
    retained, weights = memory.all()
    if isinstance(model, ClosedForm):
        with torch.no_grad():
            model.m_step(batch, retained, weights)
        at.read()
    else:
        _quasi_newton(model, batch, retained, weights, at)
    _check(model, batch, retained, weights, at)


def _quasi_newton(
    model: StateSpaceModel,
    batch: Batch,
    retained: Retained,
    weights: Float[Tensor, "n"],
    at: Coordinates,
) -> None:
    """A few quasi-Newton iterations."""
    scale = 1.0 / max(1, int(batch.mask.sum()))
    optimizer = torch.optim.LBFGS(
        at.free.values(), max_iter=INNER_STEPS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        at.write()
        density = joint_log_density(model, batch, retained.z, retained.x)
        value: Tensor = -(density * weights).sum() * scale
        given = torch.autograd.grad(
            value, list(at.parameters.values()), allow_unused=True, materialize_grads=True
        )
        found = at.pull_back(dict(zip(at.parameters, given, strict=True)))
        for name, p in at.free.items():
            p.grad = found[name]
        return value.detach()

    with torch.enable_grad():
        optimizer.step(loss)
    at.write()


@torch.no_grad()
def _check(
    model: StateSpaceModel,
    batch: Batch,
    retained: Retained,
    weights: Float[Tensor, "n"],
    at: Coordinates,
) -> None:
    wrong = [name for name, p in at.free.items() if not bool(p.isfinite().all())]
    if wrong:
        raise ValueError(f"the M-step left {wrong} not finite")
    density = (joint_log_density(model, batch, retained.z, retained.x) * weights).sum(1)
    bad = torch.nonzero(~density.isfinite())
    if len(bad):
        raise ValueError(
            f"series {batch.ids[int(bad[0, 0])]!r}: its expected complete-data log-likelihood is "
            "not finite after the M-step; keep scales away from 0"
        )
