"""The table of the kernels for CuPy arrays."""

import functools
from collections.abc import Callable

from pvt_ref.arrays import Array, is_cupy
from pvt_ref.kernels.cuda.attention import attention_kernel
from pvt_ref.kernels.cuda.blocks import blocks_kernel
from pvt_ref.kernels.cuda.depthwise_conv import depthwise_conv_kernel
from pvt_ref.kernels.cuda.gelu import gelu_kernel
from pvt_ref.kernels.cuda.launch import Cuda, Kernel
from pvt_ref.kernels.cuda.layer_norm import layer_norm_kernel
from pvt_ref.kernels.cuda.mlp import mlp_kernel
from pvt_ref.kernels.cuda.sum_rows import sum_rows_kernel
from pvt_ref.kernels.cuda.windows import conv_kernel, patch_embed_kernel
from pvt_ref.ops import Ops


def cuda_ops() -> Ops:
    """The kernels for CuPy arrays of float32; what they cannot compute, the readable layers do."""
    return table_with(Cuda(), is_cupy)


@functools.lru_cache(maxsize=16)
def table_with(settings: Cuda, accepts: Callable[[Array], bool]) -> Ops:
    """The table with these settings, for the arrays that its launch takes."""

    def of(*kernels: Kernel) -> dict:
        return {kernel.readable: kernel.with_settings(settings) for kernel in kernels}

    # what larger ones compute themselves: these serve outside of them, and where they step aside
    parts = of(layer_norm_kernel, sum_rows_kernel, attention_kernel, patch_embed_kernel)
    parts |= of(gelu_kernel)
    twins = of(blocks_kernel, mlp_kernel, depthwise_conv_kernel, conv_kernel)
    return Ops(twins, parts=parts, name="cuda", accepts=accepts, settings=settings)
