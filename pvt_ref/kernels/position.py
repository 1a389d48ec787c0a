"""Adding the position embedding, shared among threads. The backward is the readable one."""

import numpy as np

from pvt_ref.kernels.blocking import Blocking, by_group
from pvt_ref.kernels.threads import Scratch
from pvt_ref.layers import position as readable
from pvt_ref.layers.position import PositionCache


def position_forward(
    table: np.ndarray,
    x: np.ndarray,
    grid: tuple[int, int],
    table_grid: tuple[int, int],
    cls: bool,
    keep: bool = True,
    *,
    blocking: Blocking,
) -> tuple[np.ndarray, PositionCache | None]:
    """As :func:`pvt_ref.layers.position.position_forward`, which makes the rows to be added.

    Args:
        table: (1, h*w, C), or (1, 1 + h*w, C) with a cls row.
        x: tokens (B, H*W, C), or (B, 1 + H*W, C) with the cls token first.
        grid: (H, W) of the tokens.
        table_grid: (h, w) of the table.
        cls: whether x starts with the cls token.
        keep: whether a cache for the backward is returned; without it, it is None.
        blocking: the settings.

    Returns:
        y, x's shape, and the cache.
    """
    B, n, C = x.shape
    zeros = np.zeros((1, n, C), x.dtype)
    rows, cache = readable.position_forward(table, zeros, grid, table_grid, cls, keep)
    y = np.empty(x.shape, x.dtype)

    def work(blocks: list[slice], scratch: Scratch) -> None:
        del scratch
        for block in blocks:
            for b, part, _ in by_group(block, n):
                np.add(x[b, part], rows[0, part], out=y[b, part])

    blocking.run(work, B * n, blocking.rows(C))
    return y, cache


def position_backward(
    table: np.ndarray, cache: PositionCache, dy: np.ndarray, *, blocking: Blocking
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`pvt_ref.layers.position.position_backward`.

    Args:
        table: the forward's, (1, h*w, C) or (1, 1 + h*w, C).
        cache: from the forward.
        dy: dL/dy, x's shape.
        blocking: the settings.

    Returns:
        dx, which is dy, and dtable, the table's shape.
    """
    del blocking
    return readable.position_backward(table, cache, dy)
