"""Threads over the series of a panel, for loops that release the interpreter lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Below so many multiplications a second thread costs more than it saves.
_WORTH_A_THREAD = 200_000


def spread(run: Callable[[int, int], Result], n: int, work: int, *, block: int = 1) -> list[Result]:
    """Results of `run` on ranges that cover the series, in threads where that pays.

    Parameters
    ----------
    run : callable
        Called with the first series and the one after the last.
    n : int
        Number of series.
    work : int
        Multiplications that a series takes, about.
    block : int
        Ranges begin at multiples of it.
    """
    blocks = -(-n // block)
    threads = min(torch.get_num_threads(), blocks, 1 + n * work // _WORTH_A_THREAD)
    if threads <= 1:
        return [run(0, n)]
    # Several ranges a thread even out series of unequal length.
    count = min(blocks, 4 * threads)
    edges = [min(n, block * (blocks * k // count)) for k in range(count + 1)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, edges[:-1], edges[1:]))
