"""Four versions of the sum over rows: too few threads, wasted reads, whole lines, fewer doubles."""

from pvt_ref.arrays import Array, array_module
from pvt_ref.kernels.cuda.ladder.step import Step
from pvt_ref.kernels.cuda.launch import THREADS, Cuda, Function, blocks_for
from pvt_ref.kernels.cuda.sum_rows import add_parts, number_of_parts, sum_rows_forward
from pvt_ref.ops import REFERENCE

PLAIN = Function("ladder/sum_rows_1_plain.cu", "sum_rows_1")
COLUMNS = Function("ladder/sum_rows_2_columns.cu", "sum_rows_2")
LINES = Function("ladder/sum_rows_3_lines.cu", "sum_rows_3")


def plain(x: Array, cuda: Cuda) -> Array:
    """y (C,) of x (rows, C), contiguous: one thread per column."""
    rows, C = x.shape
    y = array_module(x).empty(C, x.dtype)
    cuda.launch(PLAIN, (blocks_for(C, 32),), (32,), (x, rows, C, y))
    return y


def columns(x: Array, cuda: Cuda) -> Array:
    """As :func:`plain`: one block per column."""
    rows, C = x.shape
    y = array_module(x).empty(C, x.dtype)
    cuda.launch(COLUMNS, (C,), (THREADS,), (x, rows, C, y))
    return y


def lines(x: Array, cuda: Cuda) -> Array:
    """As :func:`plain`: blocks of 32 columns, and as many parts as the last version has."""
    (rows, C), xp = x.shape, array_module(x)
    parts = xp.empty((number_of_parts(rows, C, cuda), C), xp.float64)
    cuda.launch(LINES, (blocks_for(C, 32), len(parts)), (32, 8), (x, rows, C, parts))
    return add_parts(parts, cuda)


def last(x: Array, cuda: Cuda) -> Array:
    """As :func:`plain`, by the kernel that the tables use."""
    return sum_rows_forward(None, x, REFERENCE, keep=False, cuda=cuda)[0]


STEPS = (
    Step("a thread a column", PLAIN.file, plain),
    Step("a block a column", COLUMNS.file, columns),
    Step("whole lines, in parts", LINES.file, lines),
    Step("eight terms in float32 first", "sum_rows.cu", last),
)
