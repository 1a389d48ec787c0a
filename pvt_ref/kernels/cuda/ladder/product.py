"""Three versions of a product, a (M, K) b (N, K)^T: one thread per element, tiles, tensor cores."""

from dataclasses import replace

from pvt_ref.arrays import Array, array_module
from pvt_ref.kernels.cuda.ladder.step import Step
from pvt_ref.kernels.cuda.launch import Cuda, Function, blocks_for
from pvt_ref.kernels.cuda.product import multiply

PLAIN = Function("ladder/product_1_plain.cu", "product_1")
TILED = Function("ladder/product_2_tiled.cu", "product_2")

#: Threads along both sides of a block, and elements along both sides of a tile of TILED.
_SIDE, _TILE = 16, 64


def _launched(function: Function, side: int, a: Array, b: Array, cuda: Cuda) -> Array:
    """The product by a kernel whose blocks compute side x side elements."""
    (M, K), N, xp = a.shape, len(b), array_module(a)
    y = xp.empty((M, N), a.dtype)
    grid = (blocks_for(N, side), blocks_for(M, side))
    arguments = (xp.ascontiguousarray(a), xp.ascontiguousarray(b), y, M, N, K)
    cuda.launch(function, grid, (_SIDE, _SIDE), arguments)
    return y


def plain(a: Array, b: Array, cuda: Cuda) -> Array:
    """One thread for each element, which reads a row of a and a row of b."""
    return _launched(PLAIN, _SIDE, a, b, cuda)


def tiled(a: Array, b: Array, cuda: Cuda) -> Array:
    """Tiles of both factors are loaded into shared memory."""
    return _launched(TILED, _TILE, a, b, cuda)


def last(a: Array, b: Array, cuda: Cuda) -> Array:
    """Three TF32 products on tensor cores, by the kernel that the tables use."""
    return multiply(a, array_module(b).matrix_transpose(b), replace(cuda, products="own"))


STEPS = (
    Step("a thread an element", PLAIN.file, plain),
    Step("tiles in shared memory", TILED.file, tiled),
    Step("three TF32 on tensor cores", "product.cu", last),
)
