"""GELU on CUDA: one launch forward and one backward; the cache has only x."""

from typing import Any

from pvt_ref.arrays import Array, array_module
from pvt_ref.kernels.cuda.launch import (
    THREADS,
    Cuda,
    Function,
    Kernel,
    blocks_for,
    is_float32,
    packed,
)
from pvt_ref.layers.gelu import gelu
from pvt_ref.ops import Ops
from pvt_ref.tree import record

GELU = Function("gelu.cu", "gelu")
GELU_BACKWARD = Function("gelu.cu", "gelu_backward")


@record
class GeluCache:
    """What :func:`gelu_backward` needs: the forward's x, not a copy if it was contiguous."""

    x: Array


def gelu_forward(
    p: None, x: Array, ops: Ops, keep: bool = True, *, cuda: Cuda
) -> tuple[Array, Any]:
    """As :func:`pvt_ref.layers.gelu.gelu_forward`, with the polynomial of the CPU kernels."""
    if not is_float32(x) or x.size % 4 or not x.size:
        return gelu.forward(p, x, ops, keep)
    xp = array_module(x)
    x = packed(x)
    y, count = xp.empty_like(x), x.size // 4
    cuda.launch(GELU, (blocks_for(count),), (THREADS,), (x, y, count))
    return y, GeluCache(x) if keep else None


def gelu_backward(p: None, cache: Any, dy: Array, ops: Ops, *, cuda: Cuda) -> tuple[Array, None]:
    """As :func:`pvt_ref.layers.gelu.gelu_backward`; Phi is recomputed rather than kept."""
    if not isinstance(cache, GeluCache):
        return gelu.backward(p, cache, dy, ops)
    xp = array_module(dy)
    dy = packed(dy)
    dx, count = xp.empty_like(dy), dy.size // 4
    cuda.launch(GELU_BACKWARD, (blocks_for(count),), (THREADS,), (cache.x, dy, dx, count))
    return dx, None


gelu_kernel = Kernel(gelu, gelu_forward, gelu_backward)
