"""The table of the kernels for NumPy arrays."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pvt_ref.arrays import is_numpy
from pvt_ref.blocks.mlp import mlp
from pvt_ref.blocks.sra import sra
from pvt_ref.blocks.transformer import block
from pvt_ref.checks import is_whole
from pvt_ref.errors import RangeError, shown
from pvt_ref.kernels.cpu import attention as attention_kernel
from pvt_ref.kernels.cpu import block as block_kernel
from pvt_ref.kernels.cpu import gelu as gelu_kernel
from pvt_ref.kernels.cpu import layer_norm as layer_norm_kernel
from pvt_ref.kernels.cpu import linear as linear_kernel
from pvt_ref.kernels.cpu import mlp as mlp_kernel
from pvt_ref.kernels.cpu import patch_embed as patch_embed_kernel
from pvt_ref.kernels.cpu import position as position_kernel
from pvt_ref.kernels.cpu import softmax as softmax_kernel
from pvt_ref.kernels.cpu.blocking import Blocking
from pvt_ref.layers.attention import attention
from pvt_ref.layers.dropout import drop_path, dropout
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.layer_norm import layer_norm
from pvt_ref.layers.linear import linear
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.layers.position import position
from pvt_ref.layers.softmax import softmax
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Operation, Ops


@dataclass(frozen=True, slots=True)
class _WithSettings:
    """A kernel and its settings; equal to another of the same, so that tables can be compared."""

    function: Callable[..., Any]
    blocking: Blocking

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs, blocking=self.blocking)


def blocked_ops(threads: int | None = None, *, elements: int = 2**18) -> Ops:
    """The kernels for NumPy arrays: cut into blocks that stay in the processor's cache, threaded.

    They compute what the layers compute; float32 rounds otherwise, no worse, and float64 agrees to
    the last digits. Where there is dropout, the layers themselves are used.

    Args:
        threads: at most so many; None for as many as NumPy's matrix products would use: the cores
            available, unless ``OPENBLAS_NUM_THREADS``, ``OMP_NUM_THREADS`` or threadpoolctl says
            otherwise.
        elements: numbers in the widest array of a block; the default suits caches of 1 to 2 MB.

    Returns:
        A table, equal to every other one made with the same arguments.

    Raises:
        RangeError: if threads or elements is no positive whole number.
    """
    for name, value in (("threads", 1 if threads is None else threads), ("elements", elements)):
        if not is_whole(value) or value < 1:
            raise RangeError(f"{name} is {shown(value)}; it must be a whole number, at least 1")
    return _table(Blocking(threads, elements))


@functools.lru_cache(maxsize=16)
def _table(blocking: Blocking) -> Ops:
    def twin(forward: Any, backward: Any, *absorbs: Operation) -> Operation:
        return Operation(
            _WithSettings(forward, blocking), _WithSettings(backward, blocking), absorbs
        )

    in_mlp = (linear, gelu, dropout, sum_rows)
    in_attention = (softmax, dropout)
    in_patch_embed = (linear, layer_norm, sum_rows)
    in_block = (*(layer_norm, sra, drop_path, mlp, attention, patch_embed), *in_mlp, softmax)
    k = linear_kernel
    parts = {
        linear: twin(k.linear_forward, k.linear_backward, sum_rows),
        layer_norm: twin(
            layer_norm_kernel.layer_norm_forward, layer_norm_kernel.layer_norm_backward, sum_rows
        ),
        gelu: twin(gelu_kernel.gelu_forward, gelu_kernel.gelu_backward),
        softmax: twin(softmax_kernel.softmax_forward, softmax_kernel.softmax_backward),
        attention: twin(
            attention_kernel.attention_forward, attention_kernel.attention_backward, *in_attention
        ),
        patch_embed: twin(
            patch_embed_kernel.patch_embed_forward,
            patch_embed_kernel.patch_embed_backward,
            *in_patch_embed,
        ),
        mlp: twin(mlp_kernel.mlp_forward, mlp_kernel.mlp_backward, *in_mlp),
    }
    twins = {
        position: Operation(
            _WithSettings(position_kernel.position_forward, blocking), position.backward
        ),
        block: twin(block_kernel.block_forward, block_kernel.block_backward, *in_block),
    }
    return Ops(twins, parts=parts, name="blocked", accepts=is_numpy, settings=blocking)
