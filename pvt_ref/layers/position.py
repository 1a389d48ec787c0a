"""Position embedding: a learned vector per token, resized when the grid is not the table's own.

Attention ignores order, so each stage adds a table with one row per token (paper section 3.1).
The table belongs to the square grid of the image size it was made for; on any other grid it is
resized bilinearly (paper section 4.2), half-pixel centres, no antialiasing (PyTorch:
``interpolate(mode="bilinear", align_corners=False)``). That is linear and separable, two small
matrices around the table, A_h E_pos A_w^T, so its transpose is A_h^T dE_pos A_w (``resize.py``).
"""

from functools import partial

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.layers.resize import resize_matrix, separable, separable_transpose
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class PositionCache:
    """Only grid, table_grid, cls and mode, and no array, since the forward is linear."""

    grid: Grid
    table_grid: Grid
    cls: bool
    mode: str


def resize_positions(rows: Array, table_grid: Grid, grid: Grid, mode: str = "bilinear") -> Array:
    """A_h E_pos A_w^T for every channel; rows itself if the grids agree.

    Args:
        rows: (h*w, C), the table E_pos without a cls row, in raster order over table_grid.
        table_grid: (h, w).
        grid: (H, W), the grid wanted.
        mode: "bilinear" or "bicubic".
    """
    if grid == table_grid:
        return rows
    xp = array_module(rows)
    C = rows.shape[-1]
    table = xp.reshape(rows, (1, *table_grid, C))  # (1, h, w, C)
    resized = separable(table, grid, partial(resize_matrix, mode=mode))  # (1, H, W, C)
    return xp.reshape(resized, (grid[0] * grid[1], C))  # (H*W, C)


def resize_positions_backward(
    drows: Array, table_grid: Grid, grid: Grid, mode: str = "bilinear"
) -> Array:
    """The transpose of :func:`resize_positions`: A_h^T dE_pos A_w for every channel.

    Args:
        drows: dL/drows (H*W, C), in raster order over grid.
        table_grid: (h, w) of the table.
        grid: (H, W) that the table was resized to.
        mode: the forward's.

    Returns:
        (h*w, C) of drows' dtype; drows itself if the grids agree.
    """
    if grid == table_grid:
        return drows
    xp = array_module(drows)
    C = drows.shape[-1]
    dresized = xp.reshape(drows, (1, *grid, C))  # (1, H, W, C)
    make = partial(resize_matrix, mode=mode)
    dtable = separable_transpose(dresized, table_grid, make)  # (1, h, w, C)
    return xp.reshape(dtable, (table_grid[0] * table_grid[1], C))  # (h*w, C)


def positions(p: Array, grid: Grid, table_grid: Grid, cls: bool, mode: str = "bilinear") -> Array:
    """The summand for the tokens of a grid (H, W): the cls row if wanted, and the resized table.

    Args:
        p: the table, (1, h*w, C), or (1, 1 + h*w, C) with a cls row.
        grid: (H, W).
        table_grid: (h, w).
        cls: whether the cls row is wanted; the table then must have it.
        mode: how it is resized, "bilinear" or "bicubic".
    """
    if cls and grid == table_grid:
        return p[0, :, :]
    own = p[0, _cls_rows(p, table_grid) :, :]  # (h*w, C)
    rows = resize_positions(own, table_grid, grid, mode)  # (H*W, C)
    return array_module(p).concat((p[0, :1, :], rows), axis=0) if cls else rows


def position_forward(
    p: Array,
    x: Array,
    ops: Ops,
    grid: Grid,
    table_grid: Grid,
    cls: bool,
    mode: str = "bilinear",
    keep: bool = True,
) -> tuple[Array, PositionCache | None]:
    """x plus the (resized) table.

    A table may have one row more than its grid: the first, which belongs to the cls token. It is
    never resized. Tokens without a cls token (the dense pyramid) leave that row out.

    Args:
        p: the table, (1, h*w, C), or (1, 1 + h*w, C) with a cls row.
        x: tokens (B, H*W, C), or (B, 1 + H*W, C) with the cls token first, of the table's dtype.
        ops: not used.
        grid: (H, W) of the tokens.
        table_grid: (h, w) of the table.
        cls: whether x starts with the cls token; the table then must have its row.
        mode: how the table is resized, "bilinear" or "bicubic", as DeiT does it.
        keep: whether to return a cache for the backward.

    Returns:
        y, x's shape and dtype, and the cache.
    """
    rows = positions(p, grid, table_grid, cls, mode)  # (H*W, C), or (1 + H*W, C)
    return x + rows, PositionCache(grid, table_grid, cls, mode) if keep else None


def position_backward(
    p: Array, cache: PositionCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, Array]:
    """Gradients of :func:`position_forward`.

    Every sample adds the same table, so its gradient is the sum over the batch, taken back through
    the resizing. A cls row that was not used gets zeros.

    Args:
        p: the forward's table, (1, h*w, C) or (1, 1 + h*w, C).
        cache: from the forward, grid (H, W) and table_grid (h, w).
        dy: dL/dy (B, n, C), x's shape.
        ops: the table of operations; the sum over the batch comes from it.

    Returns:
        dx, which is dy, and dtable, the table's shape, of dy's dtype.
    """
    xp = array_module(dy)
    samples = xp.reshape(dy, (dy.shape[0], -1))  # (B, n*C)
    drows, _ = ops[sum_rows].forward(None, samples, ops, keep=False)  # (n*C,)
    drows = xp.reshape(drows, dy.shape[1:])  # (H*W, C), or (1 + H*W, C)
    # y = x + rows, with rows = [cls row; resized table]
    dpatches = resize_positions_backward(
        drows[1:, :] if cache.cls else drows, cache.table_grid, cache.grid, cache.mode
    )  # (h*w, C)
    if cache.cls:
        dpatches = xp.concat((drows[:1, :], dpatches), axis=0)  # (1 + h*w, C)
    elif _cls_rows(p, cache.table_grid):
        dpatches = xp.concat((xp.zeros_like(p[0, :1, :]), dpatches), axis=0)  # (1 + h*w, C)
    dtable = xp.expand_dims(dpatches, axis=0)  # (1, h*w, C), or (1, 1 + h*w, C)
    return dy, dtable


def _cls_rows(table: Array, table_grid: Grid) -> int:
    """1 if the table has a row for the cls token before those of its grid, else 0."""
    return table.shape[1] - table_grid[0] * table_grid[1]


position = Operation(position_forward, position_backward)
