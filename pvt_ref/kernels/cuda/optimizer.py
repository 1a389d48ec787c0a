"""One step of AdamW for all arrays of a model in one launch, and the clipping before it in two.

The equations are those of :mod:`pvt_ref.train.adamw` and :mod:`pvt_ref.train.gradients`. Nothing
here waits for the device: the factor by which gradients are clipped stays on the device.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from pvt_ref.arrays import Array, address, array_module
from pvt_ref.kernels.cuda.capture import constant
from pvt_ref.kernels.cuda.launch import THREADS, Cuda, Function
from pvt_ref.tree import record

ADAMW = Function("optimizer.cu", "adamw")
SUMS_OF_SQUARES = Function("optimizer.cu", "sums_of_squares")
CLIP_FACTOR = Function("optimizer.cu", "clip_factor")

#: The most numbers that a block of threads updates.
_CHUNK = 4096

#: New arrays begin at multiples of this many numbers, as CuPy's own do.
_ALIGNMENT = 128


@record
class Arrays:
    """Weights, gradients, m and v of a step, the new w, m and v, and tables for the kernels.

    addresses (arrays, 7) and chunks (blocks, 3) are on the device; optimizer.cu describes them.
    """

    given: tuple[tuple[Array, ...], ...]  # held: the device has only their addresses
    made: tuple[tuple[Array, ...], ...]
    addresses: Array
    chunks: Array


def _like(arrays: Sequence[Array]) -> tuple[Array, ...]:
    """New arrays of the same shapes, in one piece of memory."""
    sizes = [-(-x.size // _ALIGNMENT) * _ALIGNMENT for x in arrays]
    xp = array_module(arrays[0])
    memory = xp.empty(sum(sizes), arrays[0].dtype)
    starts = [0, *accumulate(sizes)]
    return tuple(
        xp.reshape(memory[start : start + x.size], x.shape)
        for start, x in zip(starts, arrays, strict=False)
    )


def gather(
    weights: Sequence[Array],
    grads: Sequence[Array],
    m: Sequence[Array],
    v: Sequence[Array],
    in_place: bool = False,
) -> Arrays:
    """The arrays of one step: four sequences of float32 arrays with the same shapes.

    in_place: whether the step overwrites weights, m and v, which must be contiguous.
    """
    xp = array_module(weights[0])
    given = tuple(tuple(map(xp.ascontiguousarray, each)) for each in (weights, grads, m, v))
    made = (given[0], *given[2:]) if in_place else tuple(_like(weights) for _ in range(3))
    addresses = [[address(x) for x in row] for row in zip(*given, *made, strict=True)]
    chunks = [
        (a, first, min(first + _CHUNK, x.size))
        for a, x in enumerate(weights)
        for first in range(0, x.size, _CHUNK)
    ]
    tables = np.array(addresses, np.uint64), np.array(chunks, np.int32)
    return Arrays(given, made, *(constant(table, like=weights[0]) for table in tables))


def clip_factor(arrays: Arrays, max_norm: float, cuda: Cuda, scale: Array | None = None) -> Array:
    """(2,): the factor that makes the gradients' common norm at most max_norm, and the norm.

    scale (1,) float32: the loss scale, by which the gradients are too large. The norm is that of
    the unscaled gradients, and the factor includes the division by the scale.
    """
    xp, blocks = array_module(arrays.chunks), len(arrays.chunks)
    parts, clip = xp.empty(blocks, xp.float64), xp.empty(2, xp.float32)
    squares = (arrays.addresses, arrays.chunks, parts)
    cuda.launch(SUMS_OF_SQUARES, (blocks,), (THREADS,), squares)
    cuda.launch(CLIP_FACTOR, (1,), (THREADS,), (parts, blocks, float(max_norm), scale, clip))
    return clip


def adamw(
    arrays: Arrays,
    rates: Array,
    beta1: float,
    beta2: float,
    eps: float,
    cuda: Cuda,
    clip: Array | None = None,
) -> tuple[tuple[Array, ...], ...]:
    """The new weights, m and v.

    Args:
        arrays: of the step.
        rates: (arrays, 3) float32 on the device: the factor of w, 1 - lr lambda; that of the
            quotient, -lr / bias_1; and 1 / sqrt(bias_2). All that changes from step to step is
            here, so a captured step can be replayed with another learning rate.
        beta1: as in AdamW.
        beta2: as in AdamW.
        eps: as in AdamW.
        cuda: the settings.
        clip: what :func:`clip_factor` returned; None leaves the gradients as they are. If its norm
            is not finite, the new arrays equal the old ones.
    """
    betas = (beta1, 1 - beta1, beta2, 1 - beta2)
    arguments = (arrays.addresses, rates, arrays.chunks, clip, *map(float, betas), float(eps))
    cuda.launch(ADAMW, (len(arrays.chunks),), (THREADS,), arguments)
    return arrays.made
