"""Four versions of attention: an array of scores, streamed, keys shared, queries shared."""

from pvt_ref.arrays import Array, array_module
from pvt_ref.kernels.cuda.attention import attention_forward
from pvt_ref.kernels.cuda.ladder.step import Step
from pvt_ref.kernels.cuda.launch import THREADS, Cuda, Function, blocks_for
from pvt_ref.ops import REFERENCE

PLAIN = "ladder/attention_1_plain.cu"
STREAMED = "ladder/attention_2_streamed.cu"
SHARED = "ladder/attention_3_shared.cu"

#: Threads of a block, one for each of its queries.
_QUERIES = 128


def plain(q: Array, k: Array, v: Array, scale: float, cuda: Cuda) -> Array:
    """y (B, N, n, d) of q (B, N, n, d), k and v (B, N, m, d), contiguous: three launches."""
    (B, N, n, d), m, xp = q.shape, k.shape[2], array_module(q)
    scores, y = xp.empty((B, N, n, m), q.dtype), xp.empty(q.shape, q.dtype)
    rows, macros = B * N * n, (("D", d),)

    def launch(name: str, count: int, *arguments: Array | int | float) -> None:
        function = Function(PLAIN, f"attention_1_{name}", macros)
        cuda.launch(function, (blocks_for(count),), (THREADS,), arguments)

    launch("scores", rows * m, q, k, float(scale), scores, n, m, rows * m)
    launch("softmax", rows, scores, m, rows)
    launch("values", rows * d, scores, v, y, n, m, rows * d)
    return y


def streamed(q: Array, k: Array, v: Array, scale: float, cuda: Cuda) -> Array:
    """As :func:`plain`: one launch, one thread per query."""
    return _one_launch(STREAMED, "attention_2", q, k, v, scale, cuda)


def shared(q: Array, k: Array, v: Array, scale: float, cuda: Cuda) -> Array:
    """As :func:`streamed`, d divisible by 4: a block loads each key once."""
    return _one_launch(SHARED, "attention_3", q, k, v, scale, cuda)


def _one_launch(
    file: str, name: str, q: Array, k: Array, v: Array, scale: float, cuda: Cuda
) -> Array:
    (B, N, n, d), m = q.shape, k.shape[2]
    y = array_module(q).empty(q.shape, q.dtype)
    grid = (blocks_for(n, _QUERIES), B * N)
    function = Function(file, name, (("D", d),))
    cuda.launch(function, grid, (_QUERIES,), (q, k, v, float(scale), y, n, m))
    return y


def last(q: Array, k: Array, v: Array, scale: float, cuda: Cuda) -> Array:
    """As :func:`shared`, by the kernel that the tables use."""
    return attention_forward(None, (q, k, v), REFERENCE, scale, keep=False, cuda=cuda)[0]


STEPS = (
    Step("three launches", PLAIN, plain),
    Step("softmax carried along the keys", STREAMED, streamed),
    Step("keys in shared memory", SHARED, shared),
    Step("a query shared by threads", "attention.cu", last),
)
