"""Dropout with masks of a generator's own, one for each series and place.

A mask stays the same over all steps and all particles of a series for a whole update (Gal and
Ghahramani, 2016, section 4). What an update maximises is therefore the objective of one thinned
network for each series, whichever objective it is and in however many pieces it is computed: inside
or outside a time loop, with particles that are weighed twice, or in windows.

References
----------
Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov (2014), Dropout, *Journal of Machine
Learning Research* 15; Gal and Ghahramani (2016), A theoretically grounded application of dropout in
recurrent neural networks, *NIPS 29*.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass
class _Masks:
    """Masks that have been drawn, by the place they belong to."""

    generator: torch.Generator
    n_series: int
    drawn: dict[int, Bool[Tensor, "series features"]] = field(default_factory=dict)
    rows: Int[Tensor, "rows"] | None = None

    def of(self, place: Dropout, width: int) -> Bool[Tensor, "series features"]:
        """Mask of a place, the same whenever it is asked for."""
        mask = self.drawn.get(id(place))
        if mask is None:
            draws = torch.rand(
                (self.n_series, width), generator=self.generator, device=self.generator.device
            )
            mask = self.drawn[id(place)] = draws >= place.rate
        return mask


_open: ContextVar[_Masks | None] = ContextVar("dropout", default=None)


@contextmanager
def thinned(generator: torch.Generator, n_series: int) -> Iterator[None]:
    """Within it, every `Dropout` in training draws a mask for each series, once.

    Parameters
    ----------
    generator : torch.Generator
    n_series : int
        Series of the minibatch.
    """
    token = _open.set(_Masks(generator, n_series))
    try:
        yield
    finally:
        _open.reset(token)


@contextmanager
def rows_of(series: Int[Tensor, "rows"]) -> Iterator[None]:
    """Within it, the first axis is one of rows that belong to these series of the minibatch."""
    masks = _open.get()
    if masks is None:
        yield
        return
    outer, masks.rows = masks.rows, series
    try:
        yield
    finally:
        masks.rows = outer


class Dropout(nn.Module):
    r"""Elements set to 0 at random in training, the others divided by 1 - rate.

    Outside training, and at rate 0, the input itself.

    Parameters
    ----------
    rate : float
        Probability that an element is left out, in [0, 1).

    Raises
    ------
    ValueError
        For a rate out of its range.

    Examples
    --------
    >>> layer, x = Dropout(0.5), torch.ones(3, 7, 4)
    >>> with thinned(torch.Generator().manual_seed(0), n_series=3):
    ...     y = layer(x)
    >>> torch.equal(y[:, 0], y[:, 6]), sorted(set(y.flatten().tolist()))
    (True, [0.0, 2.0])
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        check_rate(rate)
        self.rate = rate

    def forward(self, x: Float[Tensor, "rows *batch features"]) -> Tensor:
        """Thinned features.

        The first axis is that of the series, each with as many rows one after another as it has
        paths; unless `rows_of` says otherwise.

        Raises
        ------
        RuntimeError
            In training outside of `thinned`, where there is nothing to draw from.
        """
        if not (self.training and self.rate):
            return x
        masks = _open.get()
        if masks is None:
            raise RuntimeError(
                "dropout in training needs a generator; call eval() on the model, or open "
                "seqdgm.nn.dropout.thinned(generator, n_series)"
            )
        mask = masks.of(self, x.shape[-1])
        if masks.rows is not None:
            mask = mask.index_select(0, masks.rows)
        elif x.shape[0] != masks.n_series:
            mask = mask.repeat_interleave(x.shape[0] // masks.n_series, 0)
        kept = mask.to(x.dtype) / (1 - self.rate)
        return x * kept.view(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])

    def extra_repr(self) -> str:
        """The rate."""
        return f"rate={self.rate}"


def check_rate(rate: float) -> None:
    """Raise a ValueError unless the rate of dropout lies in [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout={rate!r} must be at least 0 and below 1")
