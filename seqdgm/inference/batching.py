"""Minibatches of series: which go together, how much of them is padding, which process has which.

A minibatch costs as many steps as its longest series, for every series in it. Series of like length
are therefore put together, as loosely as a bound on the padding permits: the looser, the more the
minibatches of one epoch differ from those of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from seqdgm.types import Batch

# How far from sorted by length the series may be mixed: 1 is fully at random, 0 not at all.
_MIXING = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.09, 0.06, 0.04, 0.03, 0.02, 0.01, 0.0)


def minibatches(
    lengths: Int[np.ndarray, "series"],
    size: int,
    padding: float,
    generator: torch.Generator,
) -> list[Int[np.ndarray, "chosen"]]:
    r"""Divide series at random into minibatches of which at most a share is padding.

    Series are sorted by :math:`(1 - w) r_n + w\, e_n`, where :math:`r_n \in [0, 1)` is the rank of
    the length of series n (ties at random) and :math:`e_n` is uniform; then cut into minibatches,
    and these are shuffled. The mixing :math:`w` is the largest of a grid at which the padding stays
    within the bound: 1, a uniformly random division, where lengths differ little, and 0, sorted by
    length, where even that exceeds the bound.

    Parameters
    ----------
    lengths : ndarray of int, shape (series,)
    size : int
        Series in a minibatch; one of them, at random, takes what is left over.
    padding : float
        Largest share of the work that may be padding, in [0, 1].
    generator : torch.Generator
        A CPU generator.

    Returns
    -------
    list of ndarray
        Row numbers of each minibatch.

    Examples
    --------
    >>> lengths = np.array([9, 50, 10, 49, 11, 51])
    >>> parts = minibatches(lengths, 3, 0.1, torch.Generator().manual_seed(0))
    >>> sorted(sorted(lengths[rows].tolist()) for rows in parts)
    [[9, 10, 11], [49, 50, 51]]
    """
    n = len(lengths)
    count = -(-n // size)
    ties, noise = torch.rand(2, n, generator=generator, dtype=torch.float64).numpy()
    order = torch.randperm(count, generator=generator).numpy()
    sizes = np.full(count, size)
    # `order` also says where the minibatch of what is left over stands among the sorted ones.
    sizes[order[0]] -= count * size - n
    ends = np.cumsum(sizes)
    rank = np.empty(n)
    rank[np.lexsort((ties, lengths))] = np.arange(n) / n
    for mixing in _MIXING:
        parts = np.split(np.argsort((1 - mixing) * rank + mixing * noise), ends[:-1])
        if padded_share(lengths, parts) <= padding:
            break
    shuffled = torch.randperm(count, generator=generator).numpy()
    return [parts[k] for k in shuffled]


def padded_share(
    lengths: Int[np.ndarray, "series"], parts: Sequence[Int[np.ndarray, "chosen"]]
) -> float:
    """Share of the steps computed that lie beyond the ends of their series."""
    work = sum(len(rows) * int(lengths[rows].max()) for rows in parts)
    return 1.0 - int(sum(lengths[rows].sum() for rows in parts)) / work


def split_tail(batch: Batch, fraction: float) -> tuple[Batch, Int[Tensor, "series"]]:
    """Cut the tail of every series off for validation (series of under ten steps stay whole).

    Returns
    -------
    Batch
        The heads.
    Tensor of int, shape (series,)
        Where each tail begins.
    """
    t = torch.arange(batch.n_steps, device=batch.x.device)
    # Counted from the last observation: a tail without any would decide by nothing.
    last = (batch.mask.any(-1) * (t + 1)).amax(1)
    held = torch.where(
        batch.lengths >= 10,
        (batch.lengths * fraction).ceil().long(),
        torch.zeros_like(batch.lengths),
    )
    cut = (last - held).clamp_min(1)
    inside = t[None] < cut[:, None]
    head = replace(batch, mask=batch.mask & inside[..., None], lengths=cut)
    return trim(head), cut


def trim(batch: Batch) -> Batch:
    """Drop the padding beyond the longest series."""
    steps = int(batch.lengths.max())
    if steps == batch.n_steps:
        return batch
    return replace(batch, x=batch.x[:, :steps], mask=batch.mask[:, :steps])


def move(batch: Batch, device: torch.device) -> Batch:
    """The same series on another device."""
    tensors = {name: getattr(batch, name).to(device) for name in ("x", "mask", "lengths", "u")}
    return replace(batch, rows=batch.rows.to(device), **tensors)
