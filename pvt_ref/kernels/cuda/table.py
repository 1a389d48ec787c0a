"""The tables for CuPy arrays: the default, and that of the kernels in CUDA C++."""

import functools
from collections.abc import Callable

from pvt_ref.arrays import Array, is_cupy
from pvt_ref.kernels.cuda.attention import attention_kernel
from pvt_ref.kernels.cuda.batch_norm import batch_norm_kernel, conv_unit_kernel
from pvt_ref.kernels.cuda.blocks import blocks_kernel
from pvt_ref.kernels.cuda.depthwise_conv import depthwise_conv_kernel
from pvt_ref.kernels.cuda.gelu import gelu_kernel
from pvt_ref.kernels.cuda.launch import Cuda, Kernel
from pvt_ref.kernels.cuda.layer_norm import layer_norm_kernel
from pvt_ref.kernels.cuda.linear import linear_kernel
from pvt_ref.kernels.cuda.mlp import mlp_kernel
from pvt_ref.kernels.cuda.position import position_kernel
from pvt_ref.kernels.cuda.resize import pool_kernel, resize_kernel
from pvt_ref.kernels.cuda.sum_rows import SUM_BY_PRODUCT, sum_rows_kernel
from pvt_ref.kernels.cuda.windows import conv_kernel, patch_embed_kernel
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Operation, Ops


@functools.cache
def cuda_ops() -> Ops:
    """The readable layers, with the sum over rows by a matrix product: the default."""
    return Ops({sum_rows: SUM_BY_PRODUCT}, name="cuda", accepts=is_cupy)


def cuda_kernels(
    precision: str = "float32", products: str | None = None, *, capture: bool = True
) -> Ops:
    """The kernels for CuPy arrays of float32; the readable layers do what the kernels cannot.

    They have only run on the CPU, in the tests' emulation of CUDA, and not on a GPU yet. So they
    are not the default: select them with ``ops=cuda_kernels()``, or with PVT_REF_OPS=kernels in the
    environment.

    Args:
        precision: what the factors of matrix products are rounded to: ``"float32"``, no rounding;
            ``"tf32"``, ``"float16"`` or ``"bfloat16"``. Arrays and all else stay float32. With
            float16, training needs a scaled loss.
        products: ``"own"``, a kernel of this package, for float32 and TF32; ``"cublaslt"``; or
            ``"cupy"``, for float32. None means ``"own"`` for float32, else ``"cublaslt"``.
        capture: whether predict and training replay what repeats as CUDA graphs.

    Returns:
        A table, equal to every other one made with the same arguments, which its ``settings`` hold.

    Raises:
        RangeError: if precision or products is none of these.
        ConfigError: if products cannot have that precision.
    """
    if products is None:
        products = "own" if precision == "float32" else "cublaslt"
    return table_with(Cuda(products=products, precision=precision, capture=capture), is_cupy)


@functools.lru_cache(maxsize=16)
def table_with(settings: Cuda, accepts: Callable[[Array], bool]) -> Ops:
    """The table with these settings, for the arrays that their launch takes."""

    def of(*kernels: Kernel) -> dict[Operation, Operation]:
        return {kernel.readable: kernel.with_settings(settings) for kernel in kernels}

    # larger twins compute these themselves: they serve outside those, or where those are not used
    parts = of(layer_norm_kernel, sum_rows_kernel, attention_kernel, patch_embed_kernel)
    parts |= of(gelu_kernel, linear_kernel, mlp_kernel, batch_norm_kernel)
    twins = of(blocks_kernel, depthwise_conv_kernel, conv_kernel, conv_unit_kernel)
    twins |= of(resize_kernel, pool_kernel, position_kernel)
    return Ops(twins, parts=parts, name="cuda kernels", accepts=accepts, settings=settings)
