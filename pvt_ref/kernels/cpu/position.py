"""Adding the position embedding, shared among threads."""

import numpy as np

from pvt_ref.kernels.cpu.blocking import Blocking, by_group
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.layers.position import PositionCache, positions
from pvt_ref.ops import Ops


def position_forward(
    p: np.ndarray,
    x: np.ndarray,
    ops: Ops,
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
    rows = positions(p, grid, table_grid, cls)  # (n, C)
    y = np.empty(x.shape, x.dtype)

    def work(blocks: list[slice], scratch: Scratch) -> None:
        del scratch
        for block in blocks:
            for b, part, _ in by_group(block, n):
                np.add(x[b, part], rows[part], out=y[b, part])

    blocking.run(work, B * n, blocking.rows(C))
    return y, PositionCache(grid, table_grid, cls) if keep else None
