"""Adding the position embedding, shared among threads."""

import numpy as np

from pvt_ref.arrays import Grid
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling, by_group
from pvt_ref.layers.position import PositionCache, position, positions
from pvt_ref.ops import Ops


def position_forward(
    p: np.ndarray,
    x: np.ndarray,
    ops: Ops,
    grid: Grid,
    table_grid: Grid,
    cls: bool,
    mode: str = "bilinear",
    keep: bool = True,
    *,
    tiling: Tiling,
) -> tuple[np.ndarray, PositionCache | None]:
    """As :func:`pvt_ref.layers.position.position_forward`."""
    B, n, C = x.shape
    rows = positions(p, grid, table_grid, cls, mode)  # (n, C)
    y = np.empty(x.shape, x.dtype)

    def work(tiles: list[slice], scratch: Scratch) -> None:
        for tile in tiles:
            for b, part, _ in by_group(tile, n):
                np.add(x[b, part], rows[part], out=y[b, part])

    tiling.run(work, B * n, tiling.rows(C))
    return y, PositionCache(grid, table_grid, cls, mode) if keep else None


position_kernel = Kernel(position, position_forward, None)  # the backward only sums over the batch
