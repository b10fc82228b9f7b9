"""Backward pass of a long short-term memory through one step, compiled."""

from __future__ import annotations

from typing import Any

from seqdgm.kernels.cached import compiled


@compiled
def turn(
    total: Any,
    total_cell: Any,
    gates: Any,
    squashed: Any,
    turned: Any,
    before: Any,
    places: Any,
    target: Any,
    first: int,
) -> None:
    """Gradients of the gates of the rows from `first` on, and of the cells before them.

    Parameters
    ----------
    total, total_cell : array of shape (rows, hidden)
        Gradients for h and, but for what comes through h, for the cell.
    gates : array of shape (rows, 4 hidden)
        i, f, g and o.
    squashed : array of shape (rows, hidden)
        tanh of the cell.
    turned : array of shape (rows, 4 hidden)
        Gradients for the pre-activations of the gates.
    before : array of shape (others, hidden)
        Cells that the rows go on from.
    places : array of int, shape (count,)
        Which of these each row of the step goes on from.
    target : array of shape (count, hidden)
        Gradient for what each row of the step goes on from, which is added to.
    first : int
    """
    width = squashed.shape[1]
    for k in range(len(places)):
        row, other = first + k, places[k]
        for j in range(width):
            enter, forget = gates[row, j], gates[row, width + j]
            new, out = gates[row, 2 * width + j], gates[row, 3 * width + j]
            s, g = squashed[row, j], total[row, j]
            # Written without constants, which would make it double precision.
            for_out, shown = g * s, g * out
            cell = total_cell[row, j] + (shown - shown * s * s)
            for_new = cell * enter
            turned[row, j] = cell * new * (enter - enter * enter)
            turned[row, width + j] = cell * before[other, j] * (forget - forget * forget)
            turned[row, 2 * width + j] = for_new - for_new * new * new
            turned[row, 3 * width + j] = for_out * (out - out * out)
            target[k, j] += cell * forget
