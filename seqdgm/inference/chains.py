"""Many chains of parameter values on one panel, evaluated as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.inference import ENGINES, find_verb, option_names
from seqdgm.inference.parameters import (
    ParameterSpace,
    Values,
    assign,
    check_broadcast,
    check_evidence,
    substitute,
)
from seqdgm.panel import Panel
from seqdgm.prepare import log_jacobian, prepare
from seqdgm.transform import Transform
from seqdgm.types import Batch, Evidence

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel

# Log-likelihood of every row of a batch.
Engine = Callable[["StateSpaceModel", Batch], Float[Tensor, "row"]]
REDRAWS = 100  # starts drawn from the prior before a chain is given up


@dataclass(frozen=True)
class Chains:
    """A panel, held once for every chain, and a model with values for each.

    Vectors of parameters are in the order chain, group, where a group is what has a posterior: the
    panel (`pooled`), or each of its series. Rows of a batch are in the order chain, series.

    Attributes
    ----------
    model : StateSpaceModel
    space : ParameterSpace
    panel : Panel
    batch : Batch
        The panel, once.
    transform : Transform
        From data to model units.
    n_chains : int
    pooled : bool
        Whether the series share their parameters.
    batched : bool
        Whether the model takes all rows at once.
    """

    model: StateSpaceModel
    space: ParameterSpace
    panel: Panel
    batch: Batch
    transform: Transform
    n_chains: int
    pooled: bool = True
    batched: bool = True

    @classmethod
    def of(
        cls,
        model: StateSpaceModel,
        y: Any,
        priors: Mapping[str, Distribution],
        inputs: Any,
        n_chains: int,
        *,
        pooled: bool = True,
        batched: bool = True,
    ) -> Chains:
        """Check data and priors against the model.

        Raises
        ------
        ValueError
            As `ParameterSpace.of` and the verbs do.
        """
        space = ParameterSpace.of(model, priors)
        panel, batch, transform = prepare(model, y, inputs)
        return cls(model, space, panel, batch, transform, n_chains, pooled, batched)

    @property
    def n_groups(self) -> int:
        """Number of posteriors."""
        return 1 if self.pooled else self.batch.n_series

    @property
    def n_vectors(self) -> int:
        """Number of vectors of parameters."""
        return self.n_chains * self.n_groups

    @cached_property
    def rows(self) -> Batch:
        """The panel once for every chain, with names that tell the chains apart."""
        return tile(self.batch, self.n_chains)

    @cached_property
    def log_jacobian(self) -> Float[Tensor, "vector"]:
        """What takes the log-likelihood of each vector from model to data units."""
        series = torch.from_numpy(log_jacobian(self.panel, self.transform))
        return self.total(series.to(self.batch.x.device).repeat(self.n_chains))

    def with_values(self, values: Values) -> StateSpaceModel:
        """The model of all rows."""
        rows = {k: self.to_rows(v).to(self.batch.x) for k, v in values.items()}
        return substitute(self.model, rows)

    def to_rows(self, value: Float[Tensor, "vector ..."]) -> Float[Tensor, "row ..."]:
        """One entry for each row of what there is one of for each vector."""
        if not self.pooled or self.batch.n_series == 1:
            return value
        return value.repeat_interleave(self.batch.n_series, 0)

    def total(self, value: Float[Tensor, "row"]) -> Float[Tensor, "vector"]:
        """Sums over the series that share a vector."""
        return value.view(self.n_chains, -1).sum(1) if self.pooled else value

    def parts(self, values: Values) -> Iterator[tuple[StateSpaceModel, Batch]]:
        """Models and the rows that they are for: all at once, or vector by vector."""
        if self.batched:
            yield self.with_values(values), self.rows
            return
        for k in range(self.n_vectors):
            one = {name: value[k].to(self.batch.x) for name, value in values.items()}
            own = torch.tensor([k % self.n_groups], device=self.batch.rows.device)
            part = self.batch if self.pooled else self.batch.take(own)
            yield assign(self.model, one), part

    def evidence(self, values: Values, run: Engine) -> Float[Tensor, "vector"]:
        """Log-likelihood of each vector."""
        return self.total(torch.cat([run(*part) for part in self.parts(values)]))

    def check(self, run: Engine | None, generator: torch.Generator) -> None:
        """Raise a ValueError if the model does not take several rows at once.

        `run` is the likelihood of an exact engine; particles call the model itself.
        """
        if not self.batched:
            return
        pair = self.space.sample(2, generator)
        if run is None:
            check_broadcast(self.model, self.batch, pair, generator)
        else:
            check_evidence(self.model, self.batch, pair, run)

    def start(
        self,
        init: Mapping[str, Any] | None,
        score: Callable[[Values], Float[Tensor, "vector"]],
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, "vector size"], Float[Tensor, "vector"]]:
        """Unconstrained starts of all chains and their scores, from `init` or from the prior.

        Raises
        ------
        ValueError
            If a start has density or likelihood zero, for given ones, or for every one of many
            draws.
        """
        given = {} if init is None else self._given(init)
        values = {**self.space.sample(self.n_vectors, generator), **given}
        self._refuse(self._inside(values), values, "lies outside the support of its prior")
        for _ in range(REDRAWS):
            sound = self._inside(values)
            if bool(sound.all()):
                found = score(values)
                sound = torch.isfinite(found)
                if bool(sound.all()):
                    return self.space.unconstrain(values), found
            if len(given) == len(values):
                break
            fresh = {**self.space.sample(self.n_vectors, generator), **given}
            values = choose(sound, values, fresh)
        self._refuse(sound, values, "has likelihood zero")
        raise AssertionError("a start that is not sound is refused")

    def _inside(self, values: Values) -> Bool[Tensor, "vector"]:
        free = self.space.unconstrain(values)
        return torch.isfinite(free).all(1) & torch.isfinite(self.space.log_prior(values))

    def _given(self, init: Mapping[str, Any]) -> dict[str, Tensor]:
        """Starts (vector, *shape) from what the caller gave."""
        unknown = sorted(set(init) - set(self.space.names))
        if unknown:
            raise ValueError(
                f"init names {unknown}, which have no prior; the parameters are "
                f"{list(self.space.names)}"
            )
        out = {}
        for name, value in init.items():
            place = self.space.names.index(name)
            prior = self.space.priors[place]
            shape = tuple(prior.batch_shape + prior.event_shape)
            held = torch.as_tensor(np.asarray(value, dtype=float)).to(self.batch.x.device)
            allowed = (shape, (self.n_chains, *shape), (self.n_vectors, *shape))
            if tuple(held.shape) not in allowed:
                raise ValueError(
                    f"init[{name!r}] has shape {tuple(held.shape)}; give {shape}, or a start for "
                    f"each chain, {allowed[1]}"
                )
            if tuple(held.shape) == shape:
                held = held.expand(self.n_vectors, *shape)
            elif len(held) != self.n_vectors:
                held = held.repeat_interleave(self.n_groups, 0)
            out[name] = held.double()
        return out

    def _refuse(self, sound: Tensor, values: Values, why: str) -> None:
        bad = torch.nonzero(~sound)
        if not len(bad):
            return
        k = int(bad[0, 0])
        held = ", ".join(f"{name}={value[k].tolist()}" for name, value in values.items())
        raise ValueError(
            f"the start of chain {k // self.n_groups}, {held}, {why} (its density is not finite); "
            "give starts near plausible values with init={name: value}"
        )


def tile(batch: Batch, times: int) -> Batch:
    """The series of a batch again and again."""
    if times == 1:
        return batch
    order = torch.arange(batch.n_series, device=batch.rows.device).repeat(times)
    ids = tuple(f"{name} (chain {k})" for k in range(times) for name in batch.ids)
    return replace(batch.take(order), ids=ids)


def choose(rows: Bool[Tensor, "vector"], yes: Values, no: Values) -> dict[str, Tensor]:
    """Entries of `yes` where `rows` is true, else of `no`."""
    return {
        name: torch.where(rows.view(-1, *(1,) * (value.ndim - 1)), value, no[name])
        for name, value in yes.items()
    }


class Likelihood:
    """The log-likelihood of an engine, as a function of model and batch.

    A parameter value under which no particle survives has likelihood zero.

    Attributes
    ----------
    kind : {"exact", "estimate", "lower bound", "approximation"}
        As the engine said at the last call.
    by_particles : bool
        Whether the engine calls the model's own functions.
    """

    def __init__(
        self,
        model: StateSpaceModel,
        method: str,
        n_particles: int,
        generator: torch.Generator,
        options: Mapping[str, Any],
    ) -> None:
        self._verb = find_verb(model, method, "log_prob", options)
        self._settings = {"n_particles": n_particles, "generator": generator, **options}
        if "collapse" in option_names(self._verb):
            self._settings.setdefault("collapse", "zero")
        self.by_particles = self._verb.__module__ in (ENGINES["particle"], ENGINES["abc"])
        self.kind = "estimate"

    @torch.no_grad()
    def __call__(self, model: StateSpaceModel, batch: Batch) -> Float[Tensor, "row"]:
        """Log-likelihood of each row."""
        found: Evidence = self._verb(model, batch, **self._settings)
        self.kind = found.kind
        return found.value
