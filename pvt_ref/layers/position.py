"""Position embedding: a learned vector per token, resized when the grid is not the table's own.

Attention does not see order, so each stage adds a table with one row a token (paper section 3.1).
The table belongs to the square grid of the image size it was made for; on any other grid it is
resized bilinearly (paper section 4.2), half-pixel centres, no antialiasing (PyTorch:
``interpolate(mode="bilinear", align_corners=False)``). That is linear and separable, two small
matrices around the table, A_h P A_w^T, so its transpose is A_h^T dP A_w.
"""

import numpy as np

from pvt_ref.arrays import Array, Grid, array_module, from_host
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class PositionCache:
    """No array, since the forward is linear: only its own grid, table_grid and cls."""

    grid: Grid
    table_grid: Grid
    cls: bool


def resize_matrix(out_size: int, in_size: int) -> np.ndarray:
    """Bilinear interpolation along one axis as a matrix (out_size, in_size), float64, on the host.

    The centre of output cell i lies at ``(i + 1/2) in_size/out_size - 1/2`` on the input's axis; it
    takes its value from the two cells around it, by distance; beyond the border, from the last one.
    """
    centre = (np.arange(out_size) + 0.5) * (in_size / out_size) - 0.5
    centre = np.maximum(centre, 0)  # before the first cell
    left = np.floor(centre).astype(int)
    right = np.minimum(left + 1, in_size - 1)  # after the last one
    toward_right = centre - left
    A = np.zeros((out_size, in_size))
    rows = np.arange(out_size)
    A[rows, left] = 1 - toward_right
    A[rows, right] += toward_right  # added: at the border, left and right are one cell
    return A


def resize_positions(rows: Array, table_grid: Grid, grid: Grid) -> Array:
    """A_h P A_w^T for every channel, of rows (h*w, C); rows itself if the grids agree.

    The rows of the table P, without a cls row, are in raster order over table_grid (h, w), and
    those of the result over grid (H, W).
    """
    if grid == table_grid:
        return rows
    return _resize(rows, table_grid, grid, *_matrices(rows, table_grid, grid))


def resize_positions_backward(drows: Array, table_grid: Grid, grid: Grid) -> Array:
    """The transpose of :func:`resize_positions`: A_h^T dP A_w for every channel.

    Args:
        drows: dL/drows (H*W, C), in raster order over grid.
        table_grid: (h, w) of the table.
        grid: (H, W) that the table was resized to.

    Returns:
        (h*w, C) of drows' dtype; drows itself if the grids agree.
    """
    if grid == table_grid:
        return drows
    A_h, A_w = _matrices(drows, table_grid, grid)
    return _resize(drows, grid, table_grid, A_h.T, A_w.T)


def _matrices(like: Array, table_grid: Grid, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """A_h and A_w, from table_grid (h, w) to grid (H, W)."""
    make = getattr(array_module(like), "resize_matrix", resize_matrix)  # shapes need no numbers
    A_h = make(grid[0], table_grid[0])  # (H, h)
    A_w = make(grid[1], table_grid[1])  # (W, w)
    return A_h, A_w


def _resize(rows: Array, old: Grid, new: Grid, A_h: np.ndarray, A_w: np.ndarray) -> Array:
    """A_h along the first and A_w along the second axis: rows (h*w, C), old (h, w), new (H, W)."""
    xp = array_module(rows)
    C = rows.shape[-1]
    A_h, A_w = (xp.astype(from_host(A, like=rows), rows.dtype) for A in (A_h, A_w))
    rows = A_h @ xp.reshape(rows, (old[0], old[1] * C))  # (H, w*C)
    rows = xp.permute_dims(xp.reshape(rows, (new[0], old[1], C)), (1, 0, 2))  # (w, H, C)
    rows = A_w @ xp.reshape(rows, (old[1], new[0] * C))  # (W, H*C)
    rows = xp.permute_dims(xp.reshape(rows, (new[1], new[0], C)), (1, 0, 2))  # (H, W, C)
    return xp.reshape(rows, (new[0] * new[1], C))  # (H*W, C)


def positions(p: Array, grid: Grid, table_grid: Grid, cls: bool) -> Array:
    """What is added to the tokens of a grid (H, W), and with cls to the cls token before them.

    The table p (1, h*w, C), or (1, 1 + h*w, C) with a cls row, is resized from table_grid (h, w).
    """
    if cls and grid == table_grid:
        return p[0, :, :]
    rows = resize_positions(p[0, _cls_rows(p, table_grid) :, :], table_grid, grid)  # (H*W, C)
    return array_module(p).concat((p[0, :1, :], rows), axis=0) if cls else rows


def position_forward(
    p: Array, x: Array, ops: Ops, grid: Grid, table_grid: Grid, cls: bool, keep: bool = True
) -> tuple[Array, PositionCache | None]:
    """x plus the (resized) table.

    A table may have one row more than its grid: the first, which belongs to the cls token and is
    never resized. Tokens without a cls token (the dense pyramid) leave it out.

    Args:
        p: the table, (1, h*w, C), or (1, 1 + h*w, C) with a cls row.
        x: tokens (B, H*W, C), or (B, 1 + H*W, C) with the cls token first, of the table's dtype.
        ops: not asked.
        grid: (H, W) of the tokens.
        table_grid: (h, w) of the table.
        cls: whether x starts with the cls token; the table then must have its row.
        keep: whether to return a cache for the backward.

    Returns:
        y, x's shape and dtype, and the cache.
    """
    rows = positions(p, grid, table_grid, cls)  # (H*W, C), or (1 + H*W, C)
    return x + rows, PositionCache(grid, table_grid, cls) if keep else None


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
        drows[1:, :] if cache.cls else drows, cache.table_grid, cache.grid
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
