"""Matrix products on CUDA: by a kernel of this package, by cuBLASLt or by CuPy.

``Cuda.products`` selects one of them, and ``Cuda.precision`` is what the factors are rounded to.
Sums are accumulated in float32 and results are float32, whatever the precision.
"""

import math

from pvt_ref.arrays import Array, address, array_module
from pvt_ref.kernels.cuda.cublaslt import Factor
from pvt_ref.kernels.cuda.launch import (
    HALVES,
    MOST_NUMBERS,
    THREADS,
    Cuda,
    Function,
    blocks_for,
    is_float32,
    packed,
)

ADD_PRODUCTS = Function("product_parts.cu", "add_products")

#: Threads of a block of product.cu, and the length of a row of its tiles, as defined there.
_THREADS, _DEPTH = 128, 32

#: The fewest terms for a part of a sum. Adding the parts takes another launch. For the gradient of
#: a weight it is worthwhile sooner: it has few elements, each a sum over all tokens.
_WORTH_A_PART, _WORTH_A_PART_OF_A_GRADIENT = 1024, 256

#: The most products of a stack: they are along z of the grid.
_MOST_IN_STACK = 65_535


def _factor(x: Array) -> Factor:
    """x (..., rows, K) in a supported memory layout: itself, or a copy."""
    rows, K = x.shape[-2:]
    outer, inner, row, column = (step // x.itemsize for step in (0, 0, *x.strides)[-4:])
    row, column = row if rows > 1 else K, column if K > 1 else 1
    if min(outer, inner) >= 0:
        if column == 1 and row >= K:
            return Factor(x, False, row, outer, inner)
        if row == 1 and column >= rows:
            return Factor(x, True, column, outer, inner)
    return _factor(packed(x))


def _piece(x: Factor) -> int:
    """The number of a factor's elements that can be copied at once: 4 or 1."""
    along = x.array.shape[-2 if x.in_columns else -1]
    even = all(n % 4 == 0 for n in (along, x.step, x.outer, x.inner))
    return 4 if even and address(x.array) % 16 == 0 else 1


def multiply(
    a: Array,
    b: Array,
    cuda: Cuda,
    bias: Array | None = None,
    residual: Array | None = None,
    has_gelu: bool = False,
) -> Array:
    """a (M, K) @ b (K, N) + bias (N,), then GELU if has_gelu, then + residual (M, N).

    Any memory layout is accepted: a transpose costs nothing. Stacks (B, N, M, K) and (B, N, K, N')
    are multiplied matrix by matrix. Only this package's kernel has GELU; see :func:`fuses_gelu`.
    """
    stack, (M, N) = a.shape[:-2], (a.shape[-2], b.shape[-1])
    size = math.prod(stack) * M * N
    small = max(size, a.size, b.size) <= MOST_NUMBERS and math.prod(stack) <= _MOST_IN_STACK
    if cuda.products == "cupy" or not (is_float32(a, b) and a.size and b.size and small):
        assert not has_gelu
        y = a @ b  # (M, N)
        for each in (bias, residual):
            if each is not None:
                y += each
        return y
    xp = array_module(a)
    bias = None if bias is None else packed(bias)
    residual = None if residual is None else packed(residual)
    if cuda.products == "own":
        return _by_own_kernel(a, xp.matrix_transpose(b), cuda, bias, residual, has_gelu)
    assert not has_gelu
    columns = xp.matrix_transpose(b)  # (N, K)
    if cuda.precision in HALVES:
        a, columns = _in_half(a, cuda), _in_half(columns, cuda)
    factors = (_factor(a), _factor(columns))
    library = cuda.cublaslt(a)
    return library.multiply(*factors, (*stack, M, N), cuda.precision, bias, residual)


def fuses_gelu(x: Array, columns: int, cuda: Cuda) -> bool:
    """Whether the product itself can apply GELU: cuBLASLt only has the tanh approximation."""
    fits = x.size // x.shape[-1] * columns <= MOST_NUMBERS
    return cuda.products == "own" and is_float32(x) and fits


def fuses_residual(x: Array, cuda: Cuda) -> bool:
    """Whether the product itself can add a residual."""
    return cuda.products != "cupy" and is_float32(x)


def _by_own_kernel(
    a: Array,
    b: Array,
    cuda: Cuda,
    bias: Array | None,
    residual: Array | None,
    has_gelu: bool,
) -> Array:
    """a (..., M, K) b (..., N, K)^T, then bias, GELU and residual."""
    left, right, xp = _factor(a), _factor(b), array_module(a)
    stack, (M, K), N = a.shape[:-2], a.shape[-2:], b.shape[-2]
    count, inner_count = math.prod(stack), stack[1] if stack else 1
    piece = min(_piece(left), _piece(right))
    large = count * blocks_for(M, 64) * blocks_for(N, 64)
    tile = 64 if piece == 4 and large >= cuda.blocks // 2 else 32
    tiles = blocks_for(M, tile) * blocks_for(N, tile)
    least = _WORTH_A_PART_OF_A_GRADIENT if left.in_columns else _WORTH_A_PART
    parts = 1 if stack else max(1, min(cuda.blocks // tiles, K // least))
    share = blocks_for(blocks_for(K, parts), _DEPTH) * _DEPTH
    parts = blocks_for(K, share)
    macros = {
        "TILE": tile,
        "TERMS": 3 if cuda.precision == "float32" else 1,
        "A_IN_COLUMNS": int(left.in_columns),
        "B_IN_COLUMNS": int(right.in_columns),
        "PIECE": piece,
    }
    y = xp.empty((*stack, M, N), xp.float32)
    epilogue = (bias, residual, int(has_gelu))
    alone, made = epilogue, y
    if parts > 1:
        alone, made = (None, None, 0), xp.empty((parts, M, N), xp.float32)
    inputs = (*_with_steps(left), *_with_steps(right), inner_count, *alone)
    function = Function("product.cu", "product", tuple(macros.items()))
    grid = (tiles, 1, max(parts, count))
    cuda.launch(function, grid, (_THREADS,), (*inputs, made, M, N, K, parts, share))
    if parts > 1:
        arguments = (made, parts, *epilogue, y, y.size, N)
        cuda.launch(ADD_PRODUCTS, (blocks_for(y.size),), (THREADS,), arguments)
    return y


def _with_steps(x: Factor) -> tuple[Array, int, int, int]:
    """The kernel's arguments for a factor."""
    return x.array, x.step, x.outer, x.inner


def _in_half(x: Array, cuda: Cuda) -> Array:
    """The bits of x (..., rows, K) in half precision, in x's memory layout."""
    xp = array_module(x)
    if _factor(x).in_columns:
        return xp.matrix_transpose(_in_half(xp.matrix_transpose(x), cuda))
    x = xp.ascontiguousarray(x)
    y = xp.empty(x.shape, xp.uint16)
    function = Function("cast.cu", "cast", (("CAST", f"to_{cuda.precision}"),))
    cuda.launch(function, (blocks_for(x.size),), (THREADS,), (x, y, x.size))
    return y
