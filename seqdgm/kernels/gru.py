"""Backward pass of a gated recurrent unit through one step, compiled."""

from __future__ import annotations

from typing import Any

from seqdgm.kernels.cached import compiled


@compiled
def turn(
    total: Any,
    gates: Any,
    share: Any,
    turned: Any,
    before: Any,
    target: Any,
    first: int,
    count: int,
    offset: int,
) -> None:
    """Gradients of the gates of `count` rows from `first` on, and of the outputs before them.

    Parameters
    ----------
    total : array of shape (rows, hidden)
        Gradient for h.
    before, target : array of shape (others, hidden)
        Outputs before the step, and their gradient, which is added to; those of the step are the
        rows from `offset` on.
    gates : array of shape (rows, 3 hidden)
        r, s and n.
    share : array of shape (rows, hidden)
        What r is multiplied with.
    turned : array of shape (rows, 4 hidden)
        Gradients for the pre-activations of r and s, for the share, and for that of n.
    first, count, offset : int
    """
    width = share.shape[1]
    for i in range(count):
        row, other = first + i, offset + i
        for j in range(width):
            g, r, s = total[row, j], gates[row, j], gates[row, width + j]
            n, h = gates[row, 2 * width + j], before[other, j]
            kept = g * s
            for_n = (g - kept) * (1 - n * n)
            for_share = for_n * r
            turned[row, j] = for_share * share[row, j] * (1 - r)
            turned[row, width + j] = kept * (1 - s) * (h - n)
            turned[row, 2 * width + j] = for_share
            turned[row, 3 * width + j] = for_n
            target[other, j] += kept
