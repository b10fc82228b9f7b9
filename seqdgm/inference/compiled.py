r"""Bootstrap filters compiled from a user's own model.

``compile=True`` of the engine ``"particle"`` calls `initial`, `transition` and `emission` of a
Markov model once, for one series and one particle, and writes down the scalar operations that torch
performs. They become the loop over series, particles and steps that the package's own models run
in. Parameters are read anew at every call, so the values of a fit or of a sampler need no new
compilation; what is computed from parameters alone is computed by torch.

Before it is used, the compiled step is compared with the model's own functions: for random
particles, the state after the move given its random numbers, and the log-density of the
observation.

A model can be compiled whose functions

- have no course that depends on the state, the inputs or the step (`torch.where` in place of
  ``if``), write into no tensor, and draw no random numbers of their own;
- return for the first state and the transition one of the laws in `LAWS`, and for the emission any
  law whose log-density torch computes by operations with a formula (`seqdgm.kernels.trace_ops`,
  `seqdgm.kernels.trace_shapes`);
- compute in float64 on the CPU with parameters that all series share.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import fields
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from seqdgm.inference.smc import SMCOptions
from seqdgm.kernels.particles_types import Bootstrapped
from seqdgm.nn import distributions as dist
from seqdgm.nn.drawing import scale_tril
from seqdgm.types import Batch, Inputs, draw_seed

if TYPE_CHECKING:
    from seqdgm.kernels.particles_cpu_traced import Traced
    from seqdgm.kernels.trace_source import Program
    from seqdgm.kernels.trace_tape import Tape
    from seqdgm.recursion import StateSpaceModel

NORMAL, UNIFORM = 1, 2  # as in `seqdgm.kernels.particles_cpu_traced`, which is slow to import
_SERVED = ("n_particles", "threshold", "collapse", "compile", "proposal")
_REMEDY = "leave compile=False"
_CHECKED = 64  # particles in the comparison with the model's own functions
_ROUNDING, _SINGLE_ROUNDING = 1e-10, 1e-5


class Law(NamedTuple):
    """How a state is made from random numbers: their kinds, and a formula."""

    kinds: tuple[int, ...]
    draw: Callable[[Any, list[Tensor]], Tensor]


def _student(d: td.StudentT, e: list[Tensor]) -> Tensor:
    """Bailey (1994), Polar generation of random variates with the t-distribution."""
    radius = (d.df * (torch.exp(-2.0 / d.df * e[0].log()) - 1.0)).sqrt()
    return d.loc + d.scale * radius * torch.cos(2.0 * math.pi * e[1])


def _laplace(d: td.Laplace, e: list[Tensor]) -> Tensor:
    u = 2.0 * e[0] - 1.0
    return d.loc - d.scale * u.sign() * torch.log1p(-u.abs())


def _multivariate(d: td.MultivariateNormal, e: list[Tensor]) -> Tensor:
    return d.loc + (scale_tril(d) @ e[0][..., None])[..., 0]


LAWS: dict[type, Law] = {
    td.Normal: Law((NORMAL,), lambda d, e: d.loc + d.scale * e[0]),
    td.LogNormal: Law((NORMAL,), lambda d, e: torch.exp(d.loc + d.scale * e[0])),
    td.HalfNormal: Law((NORMAL,), lambda d, e: d.scale * e[0].abs()),
    td.MultivariateNormal: Law((NORMAL,), _multivariate),
    td.StudentT: Law((UNIFORM, UNIFORM), _student),
    td.Laplace: Law((UNIFORM,), _laplace),
    td.Cauchy: Law((UNIFORM,), lambda d, e: d.loc + d.scale * torch.tan(math.pi * (e[0] - 0.5))),
    td.Gumbel: Law((UNIFORM,), lambda d, e: d.loc - d.scale * (-e[0].log()).log()),
    td.Uniform: Law((UNIFORM,), lambda d, e: d.low + (d.high - d.low) * e[0]),
    td.Exponential: Law((UNIFORM,), lambda d, e: -e[0].log() / d.rate),
    td.Bernoulli: Law((UNIFORM,), lambda d, e: torch.where(e[0] < d.probs, 1.0, 0.0).double()),
}


class _Recorded(NamedTuple):
    tape: Tape
    program: Program
    joint: bool  # whether the emission's elements depend on each other


def bootstrap(
    model: StateSpaceModel,
    batch: Batch,
    options: SMCOptions,
    generator: torch.Generator,
    *,
    moments: bool = False,
) -> Bootstrapped:
    """Run the bootstrap filter in a loop that is compiled from the model's functions.

    Resampling is systematic, where the effective sample size falls below the threshold. The first
    call of a model takes seconds; the loop is kept on the disk for other processes.

    Raises
    ------
    ValueError
        If the options ask for more than that filter, the model cannot be compiled, a vector under a
        joint emission is observed in part, or the compiled step disagrees with the model.

    Examples
    --------
    >>> import torch, seqdgm as sq
    >>> from torch.distributions import Normal
    >>> class Walk(sq.StateSpaceModel):
    ...     latent_dim = 1
    ...     def initial(self, u):
    ...         return Normal(torch.zeros(1, dtype=self.dtype), 1.0)
    ...     def transition(self, z, u):
    ...         return Normal(z, 0.5)
    ...     def emission(self, z, u):
    ...         return Normal(z, 1.0)
    >>> y = Walk().sample(30, seed=0)
    >>> fast = Walk().log_prob(y, seed=1, compile=True)
    >>> slow = Walk().log_prob(y, seed=1)
    >>> bool(abs(fast.value - slow.value)[0] < 5 * (fast.stderr + slow.stderr)[0])
    True
    """
    from seqdgm.kernels import particles_cpu
    from seqdgm.kernels.particles_cpu_filter import COVARIANCES, NOTHING
    from seqdgm.kernels.trace_source import load, write

    _check_options(model, options)
    with torch.no_grad():
        recorded = _record(model, batch)
        if recorded.joint:
            _check_whole(batch)
        program = recorded.program
        state = len(program.initial)
        data = _arrays(recorded, batch, load(write(recorded.tape, program)))
        work = particles_cpu.traced(data, particles_cpu.Sizes(state, program.draws, state))
        _verify(model, batch, recorded, work)
        wanted = COVARIANCES if moments else NOTHING
        seed = draw_seed(generator)
        return particles_cpu.bootstrap(
            work, batch.lengths, options.n_particles, seed, options.threshold, wanted
        )


def _check_options(model: StateSpaceModel, options: SMCOptions) -> None:
    plain = SMCOptions()
    other = [
        field.name
        for field in fields(options)
        if field.name not in _SERVED and getattr(options, field.name) != getattr(plain, field.name)
    ]
    if options.proposal not in ("auto", "bootstrap"):
        other.append("proposal")
    if other:
        raise ValueError(
            "compile=True runs the bootstrap filter with systematic resampling and takes no "
            f"{' and no '.join(f'{name}=' for name in other)}; leave {_it(other)} out, or "
            f"{_REMEDY}"
        )
    if not 0 <= options.threshold <= 1:
        raise ValueError(f"threshold={options.threshold!r} must lie between 0 and 1")
    name = type(model).__name__
    if not model.markov or model.feedback or model.latent_dim == 0:
        raise ValueError(
            f"{name} is not written by initial, transition and emission alone, so compile=True "
            f"does not know its step; {_REMEDY}"
        )
    if options.proposal == "auto" and model.has_proposal:
        raise ValueError(
            f"{name} has a proposal of its own, which compile=True does not run; take "
            f"proposal='bootstrap', or {_REMEDY}"
        )
    if not model.has_density:
        raise ValueError(f"{name} simulates its observations and has no density for compile=True")


def _it(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"


# -- recording ----------------------------------------------------------------------------------


def _record(model: StateSpaceModel, batch: Batch) -> _Recorded:
    """Call the functions of the model once, with one series and one particle."""
    from seqdgm.kernels.trace_shapes import FORMULAS
    from seqdgm.kernels.trace_source import Program
    from seqdgm.kernels.trace_tape import Recorder, Tape

    if batch.x.device.type != "cpu":
        raise ValueError(f"compile=True runs on the CPU, and the model on {batch.x.device}")
    tape, dim, obs = Tape(), model.latent_dim, batch.x.shape[2]
    recorder = Recorder(tape, FORMULAS)
    z: Tensor | None = None
    made: list[list[int]] = []
    kinds: list[tuple[int, ...]] = []
    for step, name in enumerate(("initial", "transition")):
        u = _declare_inputs(tape, batch, min(step, batch.n_steps - 1))
        with recorder:
            law = _state_law(model, z, u, (1, 1))
        rule = _rule(law, f"{type(model).__name__}.{name}")
        if _precision(law) != torch.float64:
            raise ValueError(
                f"{type(model).__name__}.{name} computes in {_precision(law)}; compile=True needs "
                "float64: give its constants dtype=self.dtype"
            )
        noise = [
            _declare(tape, _noise(kind, dim), "noise", k * dim) for k, kind in enumerate(rule.kinds)
        ]
        with recorder:
            drawn = rule.draw(law, noise)
        made.append(tape.ids(drawn).ravel().tolist())
        kinds.append(tuple(kind for kind in rule.kinds for _ in range(dim)))
        z = _declare(tape, drawn.clone(), "old", 0)
    assert z is not None
    state = _declare(tape, z.clone(), "new", 0)
    x = _declare(tape, torch.zeros(1, 1, obs, dtype=torch.float64), "x", 0)
    with recorder:
        emission = _quiet(model.emission(state, u))
        _check_shared(emission, f"{type(model).__name__}.emission")
        joint = dist.is_joint(emission)
        density = (dist.log_prob if joint else dist.log_prob_elements)(emission, x)
    program = Program(
        made[0],
        made[1],
        (kinds[0], kinds[1]),
        tape.ids(density, torch.float64).ravel().tolist(),
        batch.u.shape[2],
        obs,
    )
    return _Recorded(tape, program, joint)


def _declare(tape: Tape, tensor: Tensor, op: str, first: int) -> Tensor:
    places = range(first, first + tensor.numel())
    ids = np.array([tape.entry(op, k) for k in places], dtype=np.int64)
    tape.declare(tensor, ids.reshape(tensor.shape))
    return tensor


def _declare_inputs(tape: Tape, batch: Batch, step: int) -> Inputs:
    values = _declare(tape, batch.u[:1, step][:, None].clone(), "u", 0)
    # Torch takes an index without axes for a Python number.
    return Inputs(values, _declare(tape, torch.tensor([step]), "t", 0))


def _noise(kind: int, dim: int) -> Tensor:
    """Random numbers of one particle, in the middle of their distribution."""
    middle = 0.1 if kind == NORMAL else 0.4
    return torch.linspace(middle, 1.5 * middle, dim, dtype=torch.float64)[None, None]


def _state_law(
    model: StateSpaceModel, z: Tensor | None, u: Inputs, shape: tuple[int, int]
) -> Distribution:
    law = model.initial(u) if z is None else model.transition(z, u)
    name = "initial" if z is None else "transition"
    if shape == (1, 1):
        _check_shared(law, f"{type(model).__name__}.{name}")
    return dist.expand(law, shape, model.latent_dim)


def _rule(law: Distribution, where: str) -> Law:
    if type(law) not in LAWS:
        known = ", ".join(sorted(each.__name__ for each in LAWS))
        raise ValueError(
            f"{where} returns {type(law).__name__}, which compile=True cannot draw from (it can "
            f"from {known}); {_REMEDY}"
        )
    return LAWS[type(law)]


def _precision(law: Distribution) -> torch.dtype:
    """The type of the law's draws."""
    kinds = [part.dtype for part in vars(law).values() if isinstance(part, Tensor)]
    kinds += [_precision(part) for part in vars(law).values() if isinstance(part, Distribution)]
    return reduce(torch.promote_types, kinds)


def _check_shared(law: Distribution, where: str) -> None:
    shape = law.batch_shape + law.event_shape
    if any(size != 1 for size in shape[:-1]):
        raise ValueError(
            f"{where} has shape {tuple(shape)} for one series and one particle: compile=True takes "
            f"parameters that all series share; {_REMEDY}"
        )


def _quiet(law: Distribution) -> Distribution:
    """The same law, which does not look at the values that it is given."""
    law = copy.copy(law)
    law._validate_args = False
    for name, part in list(vars(law).items()):
        if isinstance(part, Distribution):
            setattr(law, name, _quiet(part))
    return law


# -- data, and the comparison -------------------------------------------------------------------


def _check_whole(batch: Batch) -> None:
    partly = torch.nonzero(batch.mask.any(2) & ~batch.mask.all(2))
    if len(partly):
        k, t = partly[0].tolist()
        raise ValueError(
            f"series {batch.ids[k]!r}, step {t} is observed in part under a joint emission, which "
            f"compile=True does not marginalise; {_REMEDY}"
        )


def _arrays(recorded: _Recorded, batch: Batch, addresses: tuple[int, ...]) -> Traced:
    from seqdgm.kernels.particles_cpu_traced import Traced

    u = batch.u[:, : batch.n_steps]
    tensors = (u.double(), batch.x.double(), batch.mask)
    u_, y, mask = (np.ascontiguousarray(tensor.numpy()) for tensor in tensors)
    kinds = np.zeros((2, recorded.program.draws), dtype=np.int64)
    for row, own in zip(kinds, recorded.program.kinds, strict=True):
        row[: len(own)] = own
    values = np.array(recorded.tape.values, dtype=np.float64)
    return Traced(values, u_, y, mask, kinds, np.array(addresses, dtype=np.int64))


def _verify(model: StateSpaceModel, batch: Batch, recorded: _Recorded, work: Any) -> None:
    """Compare the compiled step with the model's own functions on random particles."""
    from seqdgm.kernels.particles_cpu_filter import (
        BASE,
        BEGIN,
        MOVE,
        Output,
        make_cloud,
        make_scratch,
    )

    state, rounding = work.sizes.state, _ROUNDING if recorded.tape.exact else _SINGLE_ROUNDING
    cloud, scratch = make_cloud(_CHECKED, state), make_scratch(*work.sizes)
    key, nothing = np.array([1, 2], dtype=np.uint64), np.zeros((1, 1))
    empty = np.zeros((0, 1, state))
    output = Output(nothing, nothing, nothing[0], empty, empty, np.zeros((0, 1, state, state)))
    lengths = batch.lengths.numpy()
    seen = batch.mask.all(2)
    z: Tensor | None = None
    for first in (0, 1):
        if batch.n_steps <= first:
            return
        # A step that is observed, if there is one.
        steps = seen[:, first:] if first else seen[:, :1]
        k, t = divmod(int(steps.int().argmax()), steps.shape[1])
        t += first
        args = (work.model, cloud, scratch, key, 0.5, output, k, lengths, t, 0, _CHECKED)
        work.loop(BEGIN, *args)
        cloud.facts[BASE] = 0.0
        cloud.log_weights[:] = 0.0
        if z is not None:
            cloud.z[0] = z[0].T.numpy()
        work.loop(MOVE, *args)
        found = torch.from_numpy(cloud.z[1].T.copy())[None]
        u = Inputs(batch.u[k : k + 1, t][:, None], torch.tensor(t))
        law = _state_law(model, z, u, (1, _CHECKED))
        noise = torch.from_numpy(
            scratch.draws.reshape(len(scratch.draws), -1)[:, :_CHECKED].T.copy()
        )
        rule = LAWS[type(law)]
        parts = list(noise[None, :, : state * len(rule.kinds)].split(state, -1))
        name = "transition" if z is not None else "initial"
        _compare(rule.draw(law, parts), found, rounding, f"{type(model).__name__}.{name}", t)
        emission = model.emission(found, u)
        if not first:
            _check_support(emission, batch)
        x, mask = batch.x[k : k + 1, t][:, None], batch.mask[k : k + 1, t][:, None]
        expected = dist.log_prob(_quiet(emission), x, mask).expand(1, _CHECKED)
        weights = torch.from_numpy(cloud.log_weights)[None]
        _compare(expected, weights, rounding, f"{type(model).__name__}.emission", t)
        z = found


def _compare(
    expected: Tensor, found: Float[Tensor, "..."], rounding: float, where: str, t: int
) -> None:
    expected = expected.double()
    if torch.allclose(found, expected, rounding, rounding, equal_nan=True):
        return
    gap = float((found - expected).abs().max())
    raise ValueError(
        f"the compiled step of {where} is off by {gap:.3g} at step {t}: it depends on something "
        "that the recording did not see, such as a number taken out of a tensor by NumPy, a "
        f"counter, or random numbers; {_REMEDY}"
    )


def _check_support(emission: Distribution, batch: Batch) -> None:
    """Refuse observations that the law's own check would refuse, where it is the same for all."""
    support = emission.support
    if not emission._validate_args or support is None:
        return
    if any(isinstance(each, Tensor) for each in vars(support).values()):
        return
    good = support.check(batch.x)
    good = good if good.ndim == 2 else (good | ~batch.mask).all(2)
    places = torch.nonzero(~good & batch.mask.any(2))
    if len(places):
        k, t = places[0].tolist()
        raise ValueError(
            f"series {batch.ids[k]!r}, step {t}: {batch.x[k, t].tolist()} lies outside the support "
            f"of the emission, {type(emission).__name__}: {support}"
        )
