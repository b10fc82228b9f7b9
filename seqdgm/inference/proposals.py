"""Proposals of particle filters: what z_t is drawn from, given the memory and the observation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.types import Batch, Inputs

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


class Proposal(Protocol):
    """Where the particles of a step are drawn from."""

    def begin(self, model: StateSpaceModel, batch: Batch) -> Any:
        """What `propose` needs of the data, computed once."""

    def propose(
        self,
        model: StateSpaceModel,
        context: Any,
        t: int,
        h: Any,
        u: Inputs,
        x: Float[Tensor, "series one dim"],
        mask: Bool[Tensor, "series one dim"],
    ) -> Distribution:
        """Distribution of z_t for every particle; `h` has axes (series, particle, ...)."""
        ...


class LearnedProposal:
    """The model's own proposal, which reads the encoded data."""

    def begin(self, model: StateSpaceModel, batch: Batch) -> Tensor:
        """Encode the data."""
        context = model.encode(batch)
        if context is None:
            raise ValueError(
                f"{type(model).__name__} has a proposal, but encode(batch) gives it nothing to "
                "read; return what it needs, (series, time, features)"
            )
        return context

    def propose(
        self,
        model: StateSpaceModel,
        context: Tensor,
        t: int,
        h: Any,
        u: Inputs,
        x: Float[Tensor, "series one dim"],
        mask: Bool[Tensor, "series one dim"],
    ) -> Distribution:
        """The model's `proposal` at step t."""
        return model.proposal(h, context[:, t, None], u)


def make_proposal(spec: str | Proposal, model: StateSpaceModel) -> Proposal | None:
    """The proposal of a name, or the one given; None draws from the prior.

    Raises
    ------
    ValueError
        For an unknown name, or "learned" where the model has no proposal of its own.
    """
    if not isinstance(spec, str):
        return spec
    if spec not in ("auto", "learned", "bootstrap"):
        raise ValueError(
            f"there is no proposal {spec!r}; choose 'auto', 'bootstrap', 'learned', or an object "
            "with begin and propose"
        )
    own = model.has_proposal
    if spec == "learned" and not own:
        raise ValueError(f"{type(model).__name__} has no proposal of its own; use 'bootstrap'")
    return LearnedProposal() if own and spec != "bootstrap" else None
