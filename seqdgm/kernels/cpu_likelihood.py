"""Log-likelihoods by compiled loops that read tensors by their addresses.

Turning the twelve tensors of a call into arrays takes longer than the filter of a short series.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numba
import numpy as np
from jaxtyping import Bool, Float, Int
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from torch import Tensor

from seqdgm.kernels import cpu_filter, cpu_fixed, cpu_steps
from seqdgm.kernels import types as kernel_types
from seqdgm.kernels.cached import compiled, digest
from seqdgm.kernels.cpu_filter import LIKELIHOOD, forward
from seqdgm.kernels.cpu_steps import INNER, Memory, carve, glue
from seqdgm.kernels.types import System

_SOURCES: tuple[ModuleType, ...] = (kernel_types, cpu_steps, cpu_fixed, cpu_filter)


def narrowed(tensor: Tensor, shared: int) -> Tensor:
    """The tensor in contiguous memory; an axis up to `shared` that was expanded has length 1."""
    if tensor.is_contiguous():
        return tensor
    for axis in range(shared + 1):
        if tensor.stride(axis) == 0:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor.contiguous()


def addresses(
    system: System,
    x: Float[Tensor, "series time obs"],
    mask: Bool[Tensor, "series time obs"],
    lengths: Int[Tensor, "series"],
) -> tuple[Int[np.ndarray, "tensors 3"], list[Tensor]]:
    """Address and first two axes of each tensor, and the tensors that lie there."""
    tensors = [narrowed(field, 1 if k < 6 else 0) for k, field in enumerate(system)]
    tensors += [narrowed(x, -1), narrowed(mask, -1), narrowed(lengths, -1)]
    places: list[int] = []
    for tensor in tensors:
        shape = tensor.shape
        places += (tensor.data_ptr(), shape[0], shape[1] if len(shape) > 1 else 1)
    return np.array(places).reshape(-1, 3), tensors


def viewer(dtype: Any) -> Any:
    """A compiled function of an address and a shape: the array that lies there."""

    @intrinsic
    def view(context: Any, address: Any, shape: Any) -> Any:
        array = types.Array(dtype, shape.count, "C")

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place, sizes = arguments
            made = make_array(array)(context, builder)
            kind = context.get_data_type(dtype)
            width = context.get_abi_sizeof(kind)
            lengths = cgutils.unpack_tuple(builder, sizes)
            step = context.get_constant(types.intp, width)
            strides: list[Any] = []
            for length in reversed(lengths):
                strides.insert(0, step)
                step = builder.mul(step, length)
            populate_array(
                made,
                data=builder.inttoptr(place, kind.as_pointer()),
                shape=cgutils.pack_array(builder, lengths),
                strides=cgutils.pack_array(builder, strides),
                itemsize=context.get_constant(types.intp, width),
                meminfo=None,
            )
            return made._getvalue()

        return array(address, shape), generate

    return view


reals, flags, whole = viewer(types.float64), viewer(types.boolean), viewer(types.int64)


@glue
def matrices(places: Any, k: int, rows: int, columns: int) -> Any:
    """Matrices of each series and step."""
    return reals(places[k, 0], (places[k, 1], places[k, 2], rows, columns))


@glue
def vectors(places: Any, k: int, length: int) -> Any:
    """Vectors of each series and step."""
    return reals(places[k, 0], (places[k, 1], places[k, 2], length))


@numba.njit(**INNER)
def diffuse_elements(Pinf: Any) -> int:
    """The largest possible rank of a Pinf."""
    most = 0
    for n in range(Pinf.shape[0]):
        count = 0
        for i in range(Pinf.shape[1]):
            if Pinf[n, i, i] > 0.0:
                count += 1
        most = max(most, count)
    return most


def bind_likelihood(sources: str) -> Callable[..., None]:
    """The loop over a range of series, keyed by a digest of its sources."""

    def likelihood_range(
        places: Any,
        state: int,
        obs: int,
        start: int,
        stop: int,
        values: Any,
        ranks: Any,
        totals: Any,
        nothing: Any,
    ) -> None:
        """Add up the totals of series start..stop-1."""
        _ = sources
        system = System(
            matrices(places, 0, state, state),
            matrices(places, 1, state, state),
            matrices(places, 2, obs, state),
            matrices(places, 3, obs, obs),
            vectors(places, 4, state),
            vectors(places, 5, obs),
            reals(places[6, 0], (places[6, 1], state)),
            reals(places[7, 0], (places[7, 1], state, state)),
            reals(places[8, 0], (places[8, 1], state, state)),
        )
        shape = (places[9, 1], places[9, 2], obs)
        x = reals(places[9, 0], shape)
        mask = flags(places[10, 0], shape)
        lengths = whole(places[11, 0], (places[11, 1],))
        work = carve(Memory(values, ranks, diffuse_elements(system.Pinf)), state, obs)
        for n in range(start, stop):
            forward(system, x, mask, lengths[n], n, work, 0, totals, nothing, LIKELIHOOD)

    return likelihood_range


@cache
def likelihood_loop() -> Callable[..., None]:
    """The compiled loop, cached on disk."""
    return compiled(bind_likelihood(digest(*_SOURCES)))
