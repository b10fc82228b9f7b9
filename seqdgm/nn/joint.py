"""Base of the distributions over vectors that have no exact marginal in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributions import Distribution


class JointDistribution(Distribution):
    """Distribution over vectors, made of tensors (*batch, n) and of what the batch shares.

    Subclasses are built as ``Class(*tensors, *shared)`` and write `_density`, `_marginal`,
    `_complete` and `draw`. The first three work on rows: their first argument is the distribution
    with all axes of the batch flattened into one.

    Parameters
    ----------
    tensors : sequence of Tensor of shape (*batch, n)
        Parameters of each place of the batch; their batch shapes broadcast.
    shared : sequence
        Weights that the whole batch shares.
    dim : int
        Length of the vector.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    max_hidden: ClassVar[int]
    limit: ClassVar[str]

    def __init__(self, tensors: Sequence[Tensor], shared: Sequence[Any], dim: int) -> None:
        batch = torch.broadcast_shapes(*(t.shape[:-1] for t in tensors))
        self.tensors = tuple(t.expand(*batch, -1) for t in tensors)
        self.shared = tuple(shared)
        super().__init__(batch, torch.Size([dim]), validate_args=False)

    def rebuilt(self, tensors: Sequence[Tensor]) -> Self:
        """The same family and weights with other tensors."""
        build: Any = type(self)
        return build(*tensors, *self.shared)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        """Expand to a batch shape."""
        return self.rebuilt([t.expand(*batch_shape, -1) for t in self.tensors])

    @classmethod
    def stacked(cls, parts: Sequence[Any], dim: int) -> Self:
        """Stack along a new axis of the batch.

        Raises
        ------
        ValueError
            If the parts do not share their weights.
        """
        first: Self = parts[0]
        for part in parts:
            if any(a is not b for a, b in zip(first.shared, part.shared, strict=True)):
                raise ValueError(
                    f"{cls.__name__}s with different weights cannot be stacked; evaluate them one "
                    "by one"
                )
        columns = zip(*(part.tensors for part in parts), strict=True)
        return first.rebuilt([torch.stack(column, dim) for column in columns])

    def rows(self, batch_shape: Sequence[int], places: Int[Tensor, "rows"] | None = None) -> Self:
        """One axis in place of the batch's, expanded to a shape first; some places of it only."""
        flat = [t.expand(*batch_shape, -1).reshape(-1, t.shape[-1]) for t in self.tensors]
        return self.rebuilt(flat if places is None else [t[places] for t in flat])

    def log_prob(self, value: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Log-density of whole vectors, in nats."""
        batch = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        x = value.expand(*batch, -1).reshape(-1, value.shape[-1])
        return self.rows(batch)._density(x).view(batch)

    def log_prob_observed(
        self, x: Float[Tensor, "*batch dim"], mask: Bool[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch"]:
        """Log-density of the observed elements; 0 for a vector without any.

        Raises
        ------
        ValueError
            If more elements are missing than can be integrated out, naming the vector's place.
        """
        batch = torch.broadcast_shapes(self.batch_shape, x.shape[:-1], mask.shape[:-1])
        x, mask = (v.expand(*batch, -1).reshape(-1, v.shape[-1]) for v in (x, mask))
        x = torch.where(mask, x, 0.0)
        whole = mask.all(-1)
        out = torch.where(whole, self.rows(batch)._density(x), 0.0)
        places = self._partial(mask, batch)
        if len(places):
            some = self.rows(batch, places)._marginal(x[places], mask[places])
            out = out.index_copy(0, places, some.to(out.dtype))
        return out.view(batch)

    def condition(
        self,
        drawn: Float[Tensor, "*batch dim"],
        x: Float[Tensor, "*batch dim"],
        mask: Bool[Tensor, "*batch dim"],
        generator: torch.Generator,
    ) -> Float[Tensor, "*batch dim"]:
        """`drawn`, with vectors observed in part drawn anew given their observed elements.

        Raises
        ------
        ValueError
            As :meth:`log_prob_observed`, or if gradients are to flow through such a draw.
        """
        batch = drawn.shape[:-1]
        x, mask = (v.expand(*batch, -1).reshape(-1, v.shape[-1]) for v in (x, mask))
        places = self._partial(mask, batch)
        if not len(places):
            return drawn
        if drawn.requires_grad:
            raise ValueError(
                f"a {type(self).__name__} has no reparameterised draw given a part of a vector; "
                "mask the whole vector, or use an emission of independent columns"
            )
        x = torch.where(mask, x, 0.0)
        with torch.no_grad():
            some = self.rows(batch, places)._complete(x[places], mask[places], generator)
        flat = drawn.reshape(-1, drawn.shape[-1])
        return flat.index_copy(0, places, some.to(flat.dtype)).view(drawn.shape)

    def _partial(self, mask: Bool[Tensor, "rows dim"], batch: torch.Size) -> Int[Tensor, "some"]:
        places = (mask.any(-1) & ~mask.all(-1)).nonzero()[:, 0]
        many = self.hidden(mask[places]) > self.max_hidden
        if many.any():
            row = int(places[many][0])
            place = [int(i) for i in torch.unravel_index(torch.tensor(row), batch)]
            raise ValueError(f"at batch place {tuple(place)}: {self.remedy(mask.shape[-1])}")
        return places

    @classmethod
    def remedy(cls, dim: int) -> str:
        """What is wrong with a vector that misses too many elements, and what to do."""
        return (
            f"the vector of {dim} misses more elements than {cls.__name__} can integrate out, "
            f"{cls.limit}; mask the whole vector, or use an emission of independent columns or a "
            "Gaussian one"
        )

    def draw(
        self, shape: torch.Size, generator: torch.Generator
    ) -> Float[Tensor, "*shape_batch dim"]:
        """Independent draws, with gradients where `has_rsample`."""
        raise NotImplementedError

    @staticmethod
    def hidden(mask: Bool[Tensor, "rows dim"]) -> Int[Tensor, "rows"]:
        """Number of elements to integrate out in each vector."""
        raise NotImplementedError

    def _density(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows"]:
        raise NotImplementedError

    def _marginal(
        self, x: Float[Tensor, "rows dim"], mask: Bool[Tensor, "rows dim"]
    ) -> Float[Tensor, "rows"]:
        raise NotImplementedError

    def _complete(
        self,
        x: Float[Tensor, "rows dim"],
        mask: Bool[Tensor, "rows dim"],
        generator: torch.Generator,
    ) -> Float[Tensor, "rows dim"]:
        raise NotImplementedError
