"""Learning rates over the course of training, as shares of the rate asked for."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Schedule = Literal["constant", "cosine", "plateau"]
SCHEDULES: tuple[str, ...] = ("constant", "cosine", "plateau")


def rate_share(
    schedule: Schedule, update: int, total: int, warmup: int, floor: float, plateau: float = 1.0
) -> float:
    r"""Share of the learning rate at an update.

    It rises linearly over the first `warmup` updates, :math:`(k + 1) / w` at update k. Afterwards
    ``"constant"`` stays at 1; ``"cosine"`` falls to the floor f along

    .. math:: f + (1 - f) \tfrac12 \left(1 + \cos \pi \frac{k - w}{K - w}\right);

    ``"plateau"`` is `plateau` (`Plateau.share`), and at least f.

    Parameters
    ----------
    schedule : {"constant", "cosine", "plateau"}
    update : int
        Number of the update, from 0.
    total : int
        Updates K of the whole training.
    warmup : int
        Updates w of the rise.
    floor : float
        Smallest share f, in [0, 1].
    plateau : float
        What a plateau schedule has come down to.

    References
    ----------
    Loshchilov and Hutter (2017), SGDR: stochastic gradient descent with warm restarts, ICLR,
    equation 5.

    Examples
    --------
    >>> [rate_share("cosine", k, 8, 2, 0.0) for k in (0, 1, 2, 5)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if update < warmup:
        return (update + 1) / warmup
    if schedule == "cosine":
        done = min(1.0, (update - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    return max(floor, plateau) if schedule == "plateau" else 1.0


class Plateau(NamedTuple):
    """How long the objective has not improved, and the share of the rate that is left.

    Examples
    --------
    >>> state = Plateau()
    >>> for value in (1.0, 0.5, 0.9, 0.8):
    ...     state = state.after(value, patience=2, factor=0.5)
    >>> state
    Plateau(best=1.0, waited=1, share=0.5)
    """

    best: float = -math.inf
    waited: int = 0
    share: float = 1.0

    def after(self, value: float, patience: int, factor: float) -> Plateau:
        """The state after one more evaluation of the objective (larger is better)."""
        if value > self.best:
            return Plateau(value, 0, self.share)
        if self.waited + 1 >= patience:
            return Plateau(self.best, 0, self.share * factor)
        return Plateau(self.best, self.waited + 1, self.share)
