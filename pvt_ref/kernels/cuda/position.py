"""Position tables on CUDA: resizing a table takes one launch, which a CUDA graph can record."""

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.kernels.cuda.launch import Cuda, Kernel, is_float32
from pvt_ref.kernels.cuda.resize import matrix_of, separable
from pvt_ref.layers.position import PositionCache, position
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops


def position_forward(
    p: Array,
    x: Array,
    ops: Ops,
    grid: Grid,
    table_grid: Grid,
    cls: bool,
    mode: str = "bilinear",
    keep: bool = True,
    *,
    cuda: Cuda,
) -> tuple[Array, PositionCache | None]:
    """As :func:`pvt_ref.layers.position.position_forward`."""
    if grid == table_grid or not is_float32(p, x):
        return position.forward(p, x, ops, grid, table_grid, cls, mode, keep)
    xp, (h, w), C = array_module(p), table_grid, p.shape[-1]
    table = xp.reshape(p[:, p.shape[1] - h * w :, :], (1, h, w, C))  # without a cls row
    rows = xp.reshape(separable(table, grid, matrix_of(mode, False), cuda), (-1, C))  # (H*W, C)
    if cls:
        rows = xp.concat((p[0, :1, :], rows), axis=0)  # (1 + H*W, C)
    return x + rows, PositionCache(grid, table_grid, cls, mode) if keep else None


def position_backward(
    p: Array, cache: PositionCache, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, Array]:
    """As :func:`pvt_ref.layers.position.position_backward`."""
    if cache.grid == cache.table_grid or not is_float32(p, dy):
        return position.backward(p, cache, dy, ops)
    xp, C, cls = array_module(dy), dy.shape[-1], int(cache.cls)
    samples = xp.reshape(dy, (dy.shape[0], -1))  # (B, n*C)
    drows, _ = ops[sum_rows].forward(None, samples, ops, keep=False)  # (n*C,)
    drows = xp.reshape(drows, (-1, C))  # (H*W, C), or (1 + H*W, C)
    dresized = xp.reshape(drows[cls:, :], (1, *cache.grid, C))  # (1, H, W, C)
    make = matrix_of(cache.mode, False)
    dpatches = separable(dresized, cache.table_grid, make, cuda, transposed=True)  # (1, h, w, C)
    dpatches = xp.reshape(dpatches, (-1, C))  # (h*w, C)
    if len(dpatches) < p.shape[1]:  # there is a cls row
        dcls = drows[:1, :] if cls else xp.zeros_like(p[0, :1, :])
        dpatches = xp.concat((dcls, dpatches), axis=0)  # (1 + h*w, C)
    return dy, xp.expand_dims(dpatches, axis=0)


position_kernel = Kernel(position, position_forward, position_backward)
