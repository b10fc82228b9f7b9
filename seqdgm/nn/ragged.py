"""Series of unequal length without their padding: one row a step, the longest series first.

Step after step, the rows of the series that have not ended yet stand below each other, so that a
loop over time works on a shrinking block and all else on one matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Ragged(NamedTuple):
    """Where each row belongs.

    Attributes
    ----------
    order : Tensor of int, shape (series,)
        Series from the longest to the shortest.
    sizes : tuple of int
        Number of series that reach each step; the rows of a step follow those of the one before.
    place : Tensor of int, shape (rows,)
        Place of each row in the padded (series x time), flattened.
    before : Tensor of int
        Row of the same series one step before, for all rows but those of the first step.
    shape : tuple of int
        Series and steps of the padded form.

    Examples
    --------
    >>> ragged = Ragged.of(torch.tensor([1, 3]), 3)
    >>> ragged.sizes, ragged.place.tolist(), ragged.before.tolist()
    ((2, 1, 1), [3, 0, 4, 5], [0, 2])
    """

    order: Int[Tensor, "series"]
    sizes: tuple[int, ...]
    place: Int[Tensor, "rows"]
    before: Int[Tensor, "later"]
    shape: tuple[int, int]

    @classmethod
    def of(cls, lengths: Int[Tensor, "series"], n_steps: int, backwards: bool = False) -> Ragged:
        """Rows of series with these lengths; `backwards` takes each from its own last step."""
        order = torch.argsort(lengths, descending=True, stable=True)
        t = torch.arange(n_steps, device=lengths.device)[:, None]
        ends = lengths[order]
        inside = t < ends
        counts = inside.sum(1)
        sizes = tuple(n for n in counts.tolist() if n)
        place = order * n_steps + (ends - 1 - t if backwards else t)
        offset = counts.cumsum(0) - counts
        row = offset[:, None] + torch.arange(len(order), device=lengths.device)
        return cls(order, sizes, place[inside], row[:-1][inside[1:]], (len(order), n_steps))

    def pack(self, x: Float[Tensor, "series time dim"]) -> Float[Tensor, "rows dim"]:
        """Rows of a padded tensor."""
        return x.flatten(0, 1).index_select(0, self.place)

    def shared(self, copies: int) -> Int[Tensor, "rows"]:
        """The places of the rows where each series has `copies` next to each other, if it had one.

        So do the rows of all copies take what they have in common from (series / copies x time).
        """
        steps = self.shape[1]
        return self.place // (copies * steps) * steps + self.place % steps

    def unpack(
        self, rows: Float[Tensor, "rows dim"], fill: float = 0.0
    ) -> Float[Tensor, "series time dim"]:
        """Padded tensor of rows, `fill` beyond each series' end."""
        n, steps = self.shape
        padded = rows.new_full((n * steps, rows.shape[-1]), fill)
        return padded.index_copy_(0, self.place, rows).unflatten(0, self.shape)
