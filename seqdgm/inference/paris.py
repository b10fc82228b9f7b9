r"""PaRIS: smoothed expectations of additive functionals, online and in memory O(N).

For :math:`H_T = \sum_t h_t(z_{t-1}, z_t)` every particle carries an estimate of
:math:`\mathrm{E}[H_t \mid z_t, x_{1:t}]`,

.. math::

    \tau_t^k = \frac1M \sum_{m=1}^M \left[ \tau_{t-1}^{J_{km}}
        + h_t(z_{t-1}^{J_{km}}, z_t^k) \right], \qquad
    P(J_{km} = j) \propto W_{t-1}^j f(z_t^k \mid z_{t-1}^j)

with M = 2 backward draws, enough for its variance to grow only linearly with time.

References
----------
Olsson and Westerborn (2017), Efficient particle-based online smoothing in general hidden Markov
models: the PaRIS algorithm, *Bernoulli* 23, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from seqdgm.inference import backward, smc
from seqdgm.inference.pairwise import Transition
from seqdgm.inference.resampling import gather
from seqdgm.inference.smc import SMCOptions, Step
from seqdgm.types import Batch, check_count

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

# h(z_{t-1}, z_t, t) of states (series, particle, state) -> (series, particle, k).
Functional = Callable[[Tensor | None, Tensor, int], Tensor]

CHOICES: dict[str, backward.Choice] = {
    "ffbs": backward.exact,
    "ffbs-reject": backward.reject,
    "ffbs-mcmc": backward.metropolis,
}


class Smoothed(NamedTuple):
    r"""Estimates of :func:`additive_functional`.

    Attributes
    ----------
    value : Tensor of shape (series, k), float64
        :math:`\mathrm{E}[H_T \mid x_{1:T}]` at each series' own end.
    log_likelihood : Tensor of shape (series,)
    """

    value: Float[Tensor, "series k"]
    log_likelihood: Float[Tensor, "series"]


class AdditiveFunctional:
    """Collector that carries the functional along; `value` is up to date after every step."""

    def __init__(
        self,
        model: StateSpaceModel,
        batch: Batch,
        h: Functional,
        generator: torch.Generator,
        *,
        n_backward: int = 2,
        choose: backward.Choice = backward.exact,
    ) -> None:
        backward.check_memoryless(model)
        self._model, self._batch, self._h, self._generator = model, batch, h, generator
        self._n_backward, self._choose = n_backward, choose
        self._before: Step | None = None
        self._tau: Tensor | None = None
        self.value: Tensor | None = None

    def update(self, step: Step) -> None:
        """Take in one step."""
        assert step.z is not None
        now = self._first(step.z) if self._before is None else self._next(self._before, step)
        self._before, self._tau = step, now
        found = (step.log_weights.exp()[..., None] * now).sum(1)
        if self.value is not None:
            found = torch.where(step.active[:, None], found, self.value)
        self.value = found

    def _first(self, z: Tensor) -> Tensor:
        return self._check(self._h(None, z, 0), z, 0)

    def _next(self, before: Step, step: Step) -> Tensor:
        assert before.z is not None
        assert step.z is not None
        assert self._tau is not None
        m, shape = self._n_backward, step.z.shape[:2]
        target = step.z.repeat_interleave(m, 1)
        own = step.ancestors
        if own is None:
            own = torch.arange(shape[1], device=target.device).expand(shape)
        transition = Transition.of(
            self._model, self._batch, step.t, before.s, before.x, (shape[0], shape[1])
        )
        index = self._choose(
            transition, before.log_weights, own.repeat_interleave(m, 1), target, self._generator
        )
        added = self._check(self._h(gather(before.z, index), target, step.t), target, step.t)
        total = gather(self._tau, index) + added
        return total.reshape(*shape, m, -1).mean(2)

    def _check(self, value: Tensor, z: Tensor, t: int) -> Tensor:
        if value.ndim != 3 or value.shape[:2] != z.shape[:2]:
            raise ValueError(
                f"step {t}: h gave shape {tuple(value.shape)} for states of shape "
                f"{tuple(z.shape)}; it must give (series, particle, k)"
            )
        return value.double()


@torch.no_grad()
def additive_functional(
    model: StateSpaceModel,
    batch: Batch,
    h: Functional,
    options: SMCOptions,
    generator: torch.Generator,
    *,
    n_backward: int = 2,
    backward: str = "ffbs",
) -> Smoothed:
    r"""Estimate :math:`\mathrm{E}[\sum_t h_t(z_{t-1}, z_t) \mid x_{1:T}]` in one pass.

    Parameters
    ----------
    model : StateSpaceModel
        Without a memory besides z.
    batch : Batch
    h : function
        ``h(previous, z, t)`` with states of shape (series, particle, state), to (series, particle,
        k); `previous` is None at t = 0.
    options : SMCOptions
    generator : torch.Generator
    n_backward : int
        Backward draws of each particle; at least 2, or the variance grows as the genealogy's.
    backward : {"ffbs", "ffbs-reject", "ffbs-mcmc"}
        How they are drawn: exactly in O(N^2) a step, by rejection, or by Metropolis moves.

    Raises
    ------
    ValueError
        For a model with a memory besides z, or values of `h` of another shape.

    Examples
    --------
    The expected sum of the states of a random walk seen in noise:

    >>> import numpy as np, seqdgm as sq
    >>> from seqdgm.prepare import prepare
    >>> one = [[1.0]]
    >>> walk = sq.LinearGaussianSSM(F=one, H=one, Q=one, R=one, m0=[0.0], P0=one)
    >>> y = np.array([0.5, 1.0, 2.0])
    >>> _, batch, _ = prepare(walk, y, None)
    >>> rng = torch.Generator().manual_seed(0)
    >>> out = additive_functional(walk, batch, lambda z0, z, t: z, SMCOptions(2000), rng)
    >>> bool(abs(out.value.item() - walk.smooth(y).mean.sum()) < 0.2)
    True
    """
    check_count("n_backward", n_backward)
    if backward not in CHOICES:
        raise ValueError(f"backward={backward!r} is unknown; choose one of {list(CHOICES)}")
    collector = AdditiveFunctional(
        model, batch, h, generator, n_backward=n_backward, choose=CHOICES[backward]
    )
    out = smc.run(model, batch, options, generator, (collector,))
    assert collector.value is not None
    return Smoothed(collector.value, torch.where(batch.valid, out.increments, 0.0).sum(1))
