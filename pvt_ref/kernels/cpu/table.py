"""The table of the kernels for NumPy arrays."""

import functools

from pvt_ref.arrays import is_numpy
from pvt_ref.checks import is_whole
from pvt_ref.errors import RangeError, shown
from pvt_ref.kernels.cpu.attention import attention_kernel
from pvt_ref.kernels.cpu.block import block_kernel
from pvt_ref.kernels.cpu.conv import conv_kernel
from pvt_ref.kernels.cpu.conv_mlp import conv_mlp_kernel
from pvt_ref.kernels.cpu.depthwise_conv import depthwise_conv_kernel
from pvt_ref.kernels.cpu.gelu import gelu_kernel
from pvt_ref.kernels.cpu.layer_norm import layer_norm_kernel
from pvt_ref.kernels.cpu.linear import linear_kernel
from pvt_ref.kernels.cpu.mlp import mlp_kernel
from pvt_ref.kernels.cpu.patch_embed import patch_embed_kernel
from pvt_ref.kernels.cpu.position import position_kernel
from pvt_ref.kernels.cpu.resize import resize_kernel
from pvt_ref.kernels.cpu.softmax import softmax_kernel
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling, cache_size, elements_for
from pvt_ref.ops import Operation, Ops


def blocked_ops(threads: int | None = None, *, elements: int | None = None) -> Ops:
    """The kernels for NumPy arrays: cut into tiles that stay in the processor's cache, threaded.

    They compute what the layers compute. Rounding in float32 differs, but is no worse; in float64
    results agree to the last digits. If there is dropout, the layers themselves are used.

    Args:
        threads: the most threads; None for as many as NumPy's matrix products would use: all cores,
            or what ``OPENBLAS_NUM_THREADS``, ``OMP_NUM_THREADS`` or threadpoolctl says.
        elements: how many numbers the widest array of a tile has. None chooses this by the
            second-level cache of a core: 2^18, or, if it has less than 1 MiB, as many float32 as it
            holds (at least 2^15). With another value, results differ by rounding.

    Returns:
        A table, equal to every other one made with the same arguments.

    Raises:
        RangeError: if threads or elements is not a positive whole number.
    """
    if elements is None:
        elements = elements_for(cache_size())
    for name, value in (("threads", 1 if threads is None else threads), ("elements", elements)):
        if not is_whole(value) or value < 1:
            raise RangeError(f"{name} is {shown(value)}; it must be a whole number, at least 1")
    return _table(Tiling(threads, elements))


@functools.lru_cache(maxsize=16)
def _table(tiling: Tiling) -> Ops:
    def of(*kernels: Kernel) -> dict[Operation, Operation]:
        return {kernel.readable: kernel.with_tiling(tiling) for kernel in kernels}

    # the block's kernel computes these itself: they serve outside it, or where it is not used
    layers = of(linear_kernel, layer_norm_kernel, gelu_kernel, softmax_kernel)
    parts = layers | of(attention_kernel, patch_embed_kernel, mlp_kernel)
    parts |= of(conv_mlp_kernel, depthwise_conv_kernel)
    twins = of(position_kernel, block_kernel, conv_kernel, resize_kernel)
    return Ops(twins, parts=parts, name="blocked", accepts=is_numpy, settings=tiling)
