"""Parameters as random variables: priors, unconstrained coordinates, and models with many values.

A model is evaluated at many values of its parameters at once by `substitute`: each parameter gets
an axis of rows in front (the axis ``series`` of the engines) and one of length 1 for the particles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, biject_to

from seqdgm.nn import distributions as dist
from seqdgm.nn.drawing import draw
from seqdgm.types import Batch, tree_map

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

Values = Mapping[str, Tensor]
REMEDY = (
    "write the parameters so that they broadcast with (..., particle, dim), as in `self.rho * z`: "
    "each gets the axes (rows, 1, *shape) in front, a scalar (rows, 1, 1)"
)


def substitute(model: StateSpaceModel, values: Values) -> StateSpaceModel:
    """A model that holds several values of its parameters, one for each row of a batch.

    Parameters
    ----------
    model : StateSpaceModel
        It is not changed; the copy shares everything but the parameters named.
    values : mapping of str to Tensor of shape (rows, *shape)
        Parameters, buffers or plain numbers of the model by name, with dots for those of a
        submodule.

    Returns
    -------
    StateSpaceModel
        Each parameter has axes (rows, 1, *shape), and (rows, 1, 1) where it is a scalar, so that it
        broadcasts with (series, particle, dim) where the series are the rows.

    Raises
    ------
    ValueError
        If the model has no parameter of a name.

    Examples
    --------
    >>> import torch, seqdgm as sq
    >>> from torch.distributions import Normal
    >>> class Walk(sq.StateSpaceModel):
    ...     latent_dim, step = 1, 1.0
    ...     def initial(self, u): return Normal(torch.zeros(1), 1.0)
    ...     def transition(self, z, u): return Normal(z, self.step)
    ...     def emission(self, z, u): return Normal(z, 1.0)
    >>> both = substitute(Walk(), {"step": torch.tensor([0.1, 2.0])})
    >>> both.transition(torch.zeros(2, 5, 1), None).stddev[:, 0, 0]
    tensor([0.1000, 2.0000])
    """
    wide = {
        name: value[:, None, None] if value.ndim == 1 else value[:, None]
        for name, value in values.items()
    }
    return assign(model, wide)


def assign(model: StateSpaceModel, values: Values) -> StateSpaceModel:
    """A shallow copy of a model whose parameters of these names are plain tensors.

    Raises
    ------
    ValueError
        If the model has no parameter of a name.
    """
    clone = _shallow(model)
    copied: dict[str, nn.Module] = {"": clone}
    for name, value in values.items():
        find_parameter(model, name)
        *path, leaf = name.split(".")
        owner, prefix = clone, ""
        for part in path:
            prefix = f"{prefix}.{part}"
            if prefix not in copied:
                copied[prefix] = owner._modules[part] = _shallow(owner._modules[part])
            owner = copied[prefix]
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        owner.__dict__[leaf] = value
    return clone


def _shallow(module: Any) -> Any:
    clone = object.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    for table in ("_parameters", "_buffers", "_modules"):
        clone.__dict__[table] = clone.__dict__[table].copy()
    return clone


def find_parameter(model: StateSpaceModel, name: str) -> Tensor:
    """The value that a model holds under a name.

    Raises
    ------
    ValueError
        If there is none, or it is no number.
    """
    *path, leaf = name.split(".")
    owner: Any = model
    for part in path:
        owner = owner._modules.get(part) if isinstance(owner, nn.Module) else None
    held = getattr(owner, leaf, None) if isinstance(owner, nn.Module) else None
    if isinstance(held, Tensor) and held.is_floating_point():
        return held.detach()
    if isinstance(held, int | float | np.floating) and not isinstance(held, bool):
        return torch.tensor(float(held), dtype=torch.float64)
    if isinstance(held, np.ndarray) and held.dtype.kind == "f":
        return torch.from_numpy(held.copy())
    known = [n for n, _ in model.named_parameters()] + [n for n, _ in model.named_buffers()]
    known += [n for n, v in vars(model).items() if isinstance(v, float)]
    raise ValueError(
        f"{type(model).__name__} has no parameter {name!r}; it has {sorted(known)}. A parameter is "
        "a number, an nn.Parameter, a buffer or an array that the model reads as an attribute"
    )


# ------------------------------------------------------------------------------------- priors


@dataclass(frozen=True)
class ParameterSpace:
    r"""Priors of a model's parameters, and the coordinates in which they are unconstrained.

    With the map :math:`\theta = T(\phi)` of `torch.distributions.biject_to` from all of
    :math:`R^P` onto the prior's support, the density of :math:`\phi` is
    :math:`p(T(\phi))\, |\partial T / \partial \phi|`.

    Attributes
    ----------
    names : tuple of str
    priors : tuple of Distribution
        In float64.
    transforms : tuple of Transform
    """

    names: tuple[str, ...]
    priors: tuple[Distribution, ...]
    transforms: tuple[Transform, ...]

    @classmethod
    def of(cls, model: StateSpaceModel, priors: Mapping[str, Distribution]) -> ParameterSpace:
        """Check priors against a model.

        Raises
        ------
        ValueError
            If there are none, the model has no parameter of a name, a shape differs from the
            parameter's, or a prior is discrete or over a set without unconstrained coordinates.

        Examples
        --------
        >>> from seqdgm import LinearGaussianSSM
        >>> from torch.distributions import Gamma
        >>> walk = LinearGaussianSSM(F=[[1]], H=[[1]], Q=[[1]], R=[[1]], m0=[0], P0=[[1]])
        >>> space = ParameterSpace.of(walk, {"Q_": Gamma(torch.ones(1, 1, 1), 1.0)})
        >>> space.size
        1
        """
        if not priors:
            raise ValueError("priors is empty; name at least one parameter and its distribution")
        doubled, transforms = [], []
        for name, prior in priors.items():
            if not isinstance(prior, Distribution):
                raise ValueError(f"the prior of {name!r} is {prior!r}, no torch distribution")
            held, shape = find_parameter(model, name), _shape(prior)
            if held.shape != shape:
                raise ValueError(
                    f"the prior of {name!r} is over values of shape {tuple(shape)}, but the "
                    f"parameter has shape {tuple(held.shape)}; give the prior parameters of that "
                    "shape, as in Normal(torch.zeros(3), 1.0)"
                )
            doubled.append(_in_double(prior))
            transforms.append(_unconstrain(name, doubled[-1]))
        return cls(tuple(priors), tuple(doubled), tuple(transforms))

    @cached_property
    def blocks(self) -> tuple[torch.Size, ...]:
        """Shape of each parameter's unconstrained coordinates."""
        pairs = zip(self.transforms, self.priors, strict=True)
        return tuple(t.inverse_shape(_shape(prior)) for t, prior in pairs)

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates."""
        return sum(block.numel() for block in self.blocks)

    def constrain(self, free: Float[Tensor, "rows size"]) -> dict[str, Tensor]:
        """Values (rows, *shape) of unconstrained coordinates."""
        return {name: t(part) for name, t, part in self._parts(free)}

    def unconstrain(self, values: Values) -> Float[Tensor, "rows size"]:
        """Coordinates of values; not finite at the border of a support."""
        parts = [
            t.inv(values[name]).flatten(1) if block else t.inv(values[name])[:, None]
            for name, t, block in zip(self.names, self.transforms, self.blocks, strict=True)
        ]
        return torch.cat(parts, 1)

    def log_prior(self, values: Values) -> Float[Tensor, "rows"]:
        """Log-density of values; minus infinity outside the support."""
        total: Tensor | float = 0.0
        for name, prior in zip(self.names, self.priors, strict=True):
            value = values[name]
            support: Any = prior.support
            inside = _over_rows(support.check(value), torch.all)
            rows = inside.view(-1, *(1,) * (value.ndim - 1))
            safe = torch.where(rows, value, _inner(prior, value))
            each = _over_rows(prior.log_prob(safe), torch.sum)
            total = total + torch.where(inside, each, -torch.inf)
        assert isinstance(total, Tensor)
        return total

    def log_jacobian(self, free: Float[Tensor, "rows size"]) -> Float[Tensor, "rows"]:
        """Log of the determinant of the derivative of `constrain`."""
        total = free.new_zeros(len(free))
        for _, transform, part in self._parts(free):
            each = transform.log_abs_det_jacobian(part, transform(part))
            total = total + _over_rows(each, torch.sum)
        return total

    def sample(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`n` independent draws from the prior."""
        with torch.no_grad():
            return {
                name: draw(prior, torch.Size([n]), generator)
                for name, prior in zip(self.names, self.priors, strict=True)
            }

    def _parts(self, free: Tensor) -> list[tuple[str, Transform, Tensor]]:
        sizes = [block.numel() for block in self.blocks]
        parts = free.split(sizes, 1)
        shaped = [p.reshape(len(free), *b) for p, b in zip(parts, self.blocks, strict=True)]
        return list(zip(self.names, self.transforms, shaped, strict=True))


def _shape(prior: Distribution) -> torch.Size:
    return prior.batch_shape + prior.event_shape


def _in_double(prior: Distribution) -> Distribution:
    """The same distribution with parameters in float64, so that draws and densities are too."""
    out = copy.copy(prior)
    for name, held in vars(prior).items():
        if isinstance(held, Tensor) and held.is_floating_point():
            out.__dict__[name] = held.detach().double()
        elif isinstance(held, Distribution):
            out.__dict__[name] = _in_double(held)
    return out


def _unconstrain(name: str, prior: Distribution) -> Transform:
    family = type(prior).__name__
    try:
        support = prior.support
        if support is not None and support.is_discrete:
            raise ValueError(f"the prior of {name!r} is discrete ({family}); use a density")
        return biject_to(support)
    except NotImplementedError as error:
        raise ValueError(
            f"the prior of {name!r}, {family}, has a support without unconstrained coordinates; "
            "parameterise the model otherwise, for a covariance by its Cholesky factor"
        ) from error


def _over_rows(value: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    return reduce(value.flatten(1), 1) if value.ndim > 1 else value


def _inner(prior: Distribution, value: Tensor) -> Tensor:
    """A point of the support: where the unconstrained coordinates are 0."""
    transform = biject_to(prior.support)
    return transform(value.new_zeros(transform.inverse_shape(_shape(prior))))


# ---------------------------------------------------------------------------------- broadcast


def check_broadcast(
    model: StateSpaceModel, batch: Batch, values: Values, generator: torch.Generator
) -> None:
    """Check on two steps that a model with two rows of parameters is two models side by side.

    Parameters
    ----------
    model : StateSpaceModel
    batch : Batch
        Inputs and observations are those of its first series.
    values : mapping of str to Tensor of shape (rows, *shape)
        At least two rows.
    generator : torch.Generator

    Raises
    ------
    ValueError
        Naming the function of the model that does not broadcast, and the remedy.
    """
    pair = {name: value[:2].to(batch.x) for name, value in values.items()}
    both = substitute(model, pair)
    alone = [assign(model, {n: v[k] for n, v in pair.items()}) for k in range(2)]
    twice = batch.take(torch.zeros(2, dtype=torch.int64, device=batch.rows.device))
    own, x = batch.take(torch.zeros_like(twice.rows[:1])), twice.x[:, :1].expand(-1, 3, -1)
    s, parts = both.start((2, 3)), [one.start((1, 3)) for one in alone]
    short = {0: "initial", 1: "transition"} if model.markov else {0: "prior", 1: "prior"}
    with torch.no_grad():
        for t in range(min(2, batch.n_steps)):
            u, v = twice.inputs_at(t, 1), own.inputs_at(t, 1)
            fed = model.embed(x) if model.feedback else None
            seen = [None if fed is None else fed[:1]] * 2
            h = _same(
                model,
                "advance",
                [m.advance(p, e, v) for m, p, e in zip(alone, parts, seen, strict=True)],
                lambda s=s, fed=fed, u=u: both.advance(s, fed, u),
            )
            hs = [_row(h, k) for k in range(2)]
            laws = [m.prior(p, v) for m, p in zip(alone, hs, strict=True)]
            z = None
            if laws[0] is not None:
                together = _attempt(model, short[t], lambda h=h, u=u: both.prior(h, u))
                z = _same_law(model, short[t], laws, together, model.latent_dim, generator)
            zs = [None if z is None else z[k : k + 1] for k in range(2)]
            parts = [m.absorb(p, q) for m, p, q in zip(alone, hs, zs, strict=True)]
            s = _same(model, "absorb", parts, lambda h=h, z=z: both.absorb(h, z))
            if not model.has_density:
                # There is no density to compare; the driver checks the shape of what is simulated.
                _attempt(model, "simulate", partial(both.simulate, s, u, generator))
                continue
            laws = [m.emission(p, v) for m, p in zip(alone, parts, strict=True)]
            together = _attempt(model, "emission", lambda s=s, u=u: both.emission(s, u))
            _same_law(model, "emission", laws, together, x.shape[-1], generator)


def check_evidence(
    model: StateSpaceModel,
    batch: Batch,
    values: Values,
    run: Callable[[StateSpaceModel, Batch], Float[Tensor, "row"]],
) -> None:
    """As `check_broadcast`, for the likelihood of an exact engine.

    Raises
    ------
    ValueError
        If two rows together have other likelihoods than each alone.
    """
    pair = {name: value[:2].to(batch.x) for name, value in values.items()}
    none = torch.zeros(2, dtype=torch.int64, device=batch.rows.device)
    first, twice = batch.take(none[:1]), batch.take(none)
    alone = [run(assign(model, {n: v[k] for n, v in pair.items()}), first) for k in range(2)]
    _same(model, "linear_gaussian", alone, lambda: run(substitute(model, pair), twice))


def _same(model: StateSpaceModel, name: str, alone: list[Any], together: Callable[[], Any]) -> Any:
    """What two rows give together, if it is what each gives alone."""
    found = _attempt(model, name, together)
    if not all(_equal(_row(found, k), one) for k, one in enumerate(alone)):
        raise _refusal(model, name, "gives other values for two rows together than for each alone")
    return found


def _same_law(
    model: StateSpaceModel,
    name: str,
    alone: list[Distribution | None],
    together: Distribution,
    dim: int,
    generator: torch.Generator,
) -> Float[Tensor, "two three dim"]:
    """A draw from the distribution of two rows, if each row has it alone too."""
    wide = _attempt(model, name, lambda: dist.expand(together, (2, 3), dim))
    x = dist.sample(wide, generator)
    found = dist.log_prob(wide, x)
    for k, law in enumerate(alone):
        assert law is not None
        score = dist.log_prob(dist.expand(law, (1, 3), dim), x[k : k + 1])
        if not _equal(found[k : k + 1], score):
            raise _refusal(
                model, name, "gives another distribution for two rows together than for each alone"
            )
    return x


def _attempt(model: StateSpaceModel, name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _refusal(model, name, f"fails with two rows of parameters ({said})") from error


def _refusal(model: StateSpaceModel, name: str, what: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__}.{name} {what}: {REMEDY}; or pass batched=False, where there is "
        "that option, to run one chain after the other"
    )


def _row(tree: Any, k: int) -> Any:
    return tree_map(lambda leaf: leaf if len(leaf) == 1 else leaf[k : k + 1], tree)


def _equal(a: Any, b: Any) -> bool:
    """Whether two trees hold the same numbers up to rounding, where shapes may broadcast."""
    if a is None or b is None:
        return a is None and b is None
    if isinstance(a, Tensor):
        tolerance = 1e-6 if a.dtype == torch.float64 else 1e-3
        try:
            a, b = torch.broadcast_tensors(a, b)
        except RuntimeError:
            return False
        return torch.allclose(a.double(), b.double(), tolerance, tolerance, equal_nan=True)
    return len(a) == len(b) and all(_equal(p, q) for p, q in zip(a, b, strict=True))
