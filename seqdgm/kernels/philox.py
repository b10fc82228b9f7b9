r"""Philox4x32-10, the counter-based generator of the fused particle filters, in torch.

A draw is a function of what it is for, not of how many were made before it:

.. math::

    \mathrm{words} =
    \mathrm{Philox}_\text{seed}(\text{series}, k, \text{step}, \text{purpose})

four words of 32 bits for a counter of four words and a key of two (the low and the high half of the
seed). So a draw does not depend on blocks, threads or launch shapes. Two words make a number with
52 random bits,

.. math:: u = (2 m + 1)\, 2^{-53}, \quad m = 2^{20}\, w_\text{high} + \lfloor w_\text{low} / 2^{12}
    \rfloor ,

which lies strictly between 0 and 1, so a normal draw reaches 8.5 standard deviations. The first
number a and the second b of a counter are a pair of normal draws (Box and Muller 1958),

.. math:: \sqrt{-2 \log a}\, \cos 2 \pi b, \qquad \sqrt{-2 \log a}\, \sin 2 \pi b .

Particle i of a series finds its draw at :math:`k = 64 \lfloor i / 128 \rfloor + i \bmod 64`, the
cosine where :math:`i \bmod 128 < 64` and the sine elsewhere: both come in runs of 64, so that they
can be written as vectors.

References
----------
Salmon, Moraes, Dror and Shaw (2011), Parallel random numbers: as easy as 1, 2, 3, *Proceedings of
SC11*.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after every round
MASK = 0xFFFFFFFF
# Purposes: the element d of a state takes purpose d, resampling the last one.
RESAMPLING = 0xFFFFFFFF
RUN = 64  # draws that lie side by side; a pair of normal draws is so many particles apart


def split(seed: int) -> tuple[int, int]:
    """The key of a seed: its low and its high 32 bits.

    Raises
    ------
    ValueError
        If the seed has more than 64 bits or is negative.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must lie between 0 and 2^64 - 1")
    return seed & MASK, seed >> 32


def philox(
    counter: tuple[Int[Tensor, "*shape"], ...], seed: int
) -> tuple[Int[Tensor, "*shape"], ...]:
    """Four random words of 32 bits (int64) for counters of four words.

    Examples
    --------
    >>> import torch
    >>> zero = torch.tensor(0)
    >>> [f"{int(word):08x}" for word in philox((zero, zero, zero, zero), seed=0)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = split(seed)
    for _ in range(ROUNDS):
        # The product overflows int64 and wraps; its 64 bits are those of the unsigned product.
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (high >> 32 & MASK) ^ c1 ^ k0
        c2 = (low >> 32 & MASK) ^ c3 ^ k1
        c1, c3 = high & MASK, low & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _number(high: Int[Tensor, "*shape"], low: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    bits = high << 20 | low >> 12
    return (2 * bits + 1).double() * 2.0**-53


def uniform(series: Int[Tensor, "series"], step: int, seed: int) -> Float[Tensor, "series"]:
    """The uniform number with which each series resamples before a step."""
    zero = torch.zeros_like(series)
    words = philox((series, zero, zero + step, zero + RESAMPLING), seed)
    return _number(words[0], words[1])


def normals(
    series: Int[Tensor, "series"], count: int, step: int, purpose: int, seed: int
) -> Float[Tensor, "series particle"]:
    """Standard normal draws of the first `count` particles of each series."""
    particle = torch.arange(count, device=series.device)
    number = RUN * (particle // (2 * RUN)) + particle % RUN
    counter = torch.broadcast_tensors(
        series[:, None], number, torch.full_like(number, step), torch.full_like(number, purpose)
    )
    words = philox(counter, seed)
    radius = (-2.0 * _number(words[0], words[1]).log()).sqrt()
    angle = 2.0 * math.pi * _number(words[2], words[3])
    return radius * torch.where(particle % (2 * RUN) < RUN, angle.cos(), angle.sin())
