"""The sum over rows on CUDA, for arrays whose rows are contiguous in memory.

CuPy's own reduction along the first axis took 62 % of a training step: it reads memory in steps of
a whole row. The kernels read whole lines. They do not support float64: for it, a product with a row
of ones adds groups of rows, and only the sums of the groups are reduced by CuPy.
"""

import math

from pvt_ref.arrays import Array, array_module, sum_in_float64
from pvt_ref.kernels.cuda.launch import Cuda, Function, Kernel, blocks_for, is_float32
from pvt_ref.layers.sum_rows import SumRowsCache, sum_rows
from pvt_ref.ops import Operation, Ops

PARTIAL_SUMS = Function("sum_rows.cu", "partial_sums")
ADD_PARTS = Function("sum_rows.cu", "add_parts")

#: Columns and rows of a block's threads.
_BLOCK = (32, 8)

#: The fewest rows for a part.
_ROWS_WORTH_A_PART = 64


def number_of_parts(rows: int, columns: int, cuda: Cuda) -> int:
    """The number of parts of a sum over rows: enough for all blocks, but none too small."""
    side_by_side = blocks_for(columns, _BLOCK[0])
    return max(1, min(2 * cuda.blocks // side_by_side, rows // _ROWS_WORTH_A_PART))


def add_parts(parts: Array, cuda: Cuda) -> Array:
    """The sum of parts (count, columns), float64, as float32 (columns,)."""
    count, columns = parts.shape
    xp = array_module(parts)
    y = xp.empty(columns, xp.float32)
    grid = (blocks_for(columns, _BLOCK[0]),)
    cuda.launch(ADD_PARTS, grid, _BLOCK, (parts, count, columns, y))
    return y


def _sum_of_groups(x: Array) -> Array:
    """The sum over rows; a product adds groups of up to sqrt(rows) terms in x's dtype."""
    xp = array_module(x)
    rows, C = x.shape
    group = max(math.isqrt(rows), 1)
    whole = rows - rows % group
    n = whole // group  # row i of parts is the sum of rows i, i + n, i + 2n, ...
    wide = xp.reshape(x[:whole, :], (group, n * C))
    parts = xp.reshape(xp.ones((1, group), dtype=x.dtype) @ wide, (n, C))
    if whole < rows:
        parts = xp.concat((parts, x[whole:, :]), axis=0)
    return sum_in_float64(parts, axis=0)


def sum_rows_forward(
    p: None, x: Array, ops: Ops, keep: bool = True, *, cuda: Cuda
) -> tuple[Array, SumRowsCache | None]:
    """As :func:`pvt_ref.layers.sum_rows.sum_rows_forward`, but 8 terms at a time in float32."""
    rows, C = x.shape
    if not is_float32(x) or not x.size:
        y = _sum_of_groups(x)
    else:
        xp = array_module(x)
        count = number_of_parts(rows, C, cuda)
        parts = xp.empty((count, C), xp.float64)
        grid = (blocks_for(C, _BLOCK[0]), count)
        cuda.launch(PARTIAL_SUMS, grid, _BLOCK, (xp.ascontiguousarray(x), rows, C, parts))
        y = add_parts(parts, cuda)
    return y, SumRowsCache(rows) if keep else None


def sum_by_product_forward(
    p: None, x: Array, ops: Ops, keep: bool = True
) -> tuple[Array, SumRowsCache | None]:
    """As :func:`pvt_ref.layers.sum_rows.sum_rows_forward`, by a product with a row of ones."""
    return _sum_of_groups(x), SumRowsCache(x.shape[0]) if keep else None


#: The sum over rows without a kernel, for any dtype.
SUM_BY_PRODUCT = Operation(sum_by_product_forward, sum_rows.backward)

sum_rows_kernel = Kernel(sum_rows, sum_rows_forward, None)
