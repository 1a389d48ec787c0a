"""The table of the kernels for CuPy arrays."""

import functools

from pvt_ref.arrays import is_cupy
from pvt_ref.kernels.cuda.sum_rows import SUM_ROWS
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops


@functools.cache
def cuda_ops() -> Ops:
    """The readable layers, with the sum over rows by a matrix product."""
    return Ops({sum_rows: SUM_ROWS}, name="cuda", accepts=is_cupy)
