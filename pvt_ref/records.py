"""The records of operations that there are, and which of them is the default."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from pvt_ref.arrays import FLOAT_DTYPES, Array, dtype_name, is_numpy
from pvt_ref.block import block_backward, block_forward
from pvt_ref.config import is_whole
from pvt_ref.errors import RangeError, shown
from pvt_ref.kernels import (
    attention,
    block,
    gelu,
    layer_norm,
    linear,
    mlp,
    patch_embed,
    position,
    softmax,
)
from pvt_ref.kernels.blocking import Blocking
from pvt_ref.layers.attention import attention_backward, attention_forward
from pvt_ref.layers.drop import drop_backward, drop_path_forward, dropout_forward
from pvt_ref.layers.gelu import gelu_backward, gelu_forward
from pvt_ref.layers.layer_norm import layer_norm_backward, layer_norm_forward
from pvt_ref.layers.linear import linear_backward, linear_forward
from pvt_ref.layers.mlp import mlp_backward, mlp_forward
from pvt_ref.layers.patch_embed import patch_embed_backward, patch_embed_forward
from pvt_ref.layers.position import position_backward, position_forward
from pvt_ref.layers.softmax import softmax_backward, softmax_forward
from pvt_ref.layers.sra import sra_backward, sra_forward
from pvt_ref.ops import Operation, Ops

#: The layers as the paper writes them.
REFERENCE = Ops(
    name="reference",
    linear=Operation(linear_forward, linear_backward),
    layer_norm=Operation(layer_norm_forward, layer_norm_backward),
    gelu=Operation(gelu_forward, gelu_backward),
    softmax=Operation(softmax_forward, softmax_backward),
    dropout=Operation(dropout_forward, drop_backward),
    drop_path=Operation(drop_path_forward, drop_backward),
    patch_embed=Operation(patch_embed_forward, patch_embed_backward),
    position=Operation(position_forward, position_backward),
    attention=Operation(attention_forward, attention_backward),
    sra=Operation(sra_forward, sra_backward),
    mlp=Operation(mlp_forward, mlp_backward),
    block=Operation(block_forward, block_backward),
)


@dataclasses.dataclass(frozen=True, slots=True)
class _WithSettings:
    """A kernel and its settings; equal to another of the same, so that records can be compared."""

    function: Callable[..., Any]
    blocking: Blocking
    absorbed: tuple[tuple[str, Operation], ...] = dataclasses.field(compare=False, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs, blocking=self.blocking)


#: What the kernels compute themselves. Dropout too: they ask for it only where its rate is not 0.
ABSORBED: dict[str, tuple[str, ...]] = {
    "attention": ("softmax", "dropout"),
    "patch_embed": ("linear", "layer_norm"),
    "mlp": ("linear", "gelu", "dropout"),
    "block": (
        *("linear", "layer_norm", "gelu", "softmax", "dropout", "drop_path"),
        *("patch_embed", "attention", "sra", "mlp"),
    ),
}


def blocked_ops(threads: int | None = None, *, elements: int = 2**18) -> Ops:
    """The kernels for NumPy arrays: cut into blocks that stay in the processor's cache, threaded.

    They compute what the layers compute; float32 rounds otherwise, no worse, and float64 agrees to
    the last digits. Where there is dropout, the layers themselves are used.

    The kernel of a block asks for no smaller operation. To replace one, start from REFERENCE, or
    replace ``block`` and whatever else the message names by REFERENCE's.

    Args:
        threads: at most so many; None for as many as NumPy's matrix products would use: the cores
            available, unless ``OPENBLAS_NUM_THREADS``, ``OMP_NUM_THREADS`` or threadpoolctl says
            otherwise.
        elements: numbers in the widest array of a block; the default suits caches of 1 to 2 MB.

    Returns:
        A record, equal to every other one made with the same arguments.

    Raises:
        RangeError: if threads or elements is no positive whole number.
    """
    for name, value in (("threads", 1 if threads is None else threads), ("elements", elements)):
        if not is_whole(value) or value < 1:
            raise RangeError(f"{name} is {shown(value)}; it must be a whole number, at least 1")
    blocking = Blocking(threads, elements)

    twins: dict[str, Operation] = {}
    # the larger after those that they are made of
    for module in (linear, layer_norm, gelu, softmax, position, attention, patch_embed, mlp, block):
        name = module.__name__.rsplit(".", 1)[-1]
        forward, backward = (getattr(module, f"{name}_{way}") for way in ("forward", "backward"))
        absorbed = tuple(
            (other, twins[other] if other in twins else getattr(REFERENCE, other))
            for other in ABSORBED.get(name, ())
        )
        twins[name] = Operation(
            _WithSettings(forward, blocking, absorbed), _WithSettings(backward, blocking, absorbed)
        )
    return dataclasses.replace(REFERENCE, name="blocked", numpy_only=True, **twins)


def default_ops(x: Array) -> Ops:
    """The record used when the caller names none, by the kind and dtype of the array x.

    NumPy arrays get :func:`blocked_ops`, all others REFERENCE. The environment variable
    ``PVT_REF_OPS``, ``reference`` or ``blocked``, decides it for NumPy arrays instead.

    Args:
        x: what will be computed on, of any shape.

    Returns:
        A record; REFERENCE also for what is no array of float32 or float64.

    Raises:
        RangeError: if the variable says something else, and x is a NumPy array of float32 or
            float64.
    """
    if not is_numpy(x) or dtype_name(x) not in FLOAT_DTYPES:
        return REFERENCE
    wanted = os.environ.get("PVT_REF_OPS") or "blocked"
    if wanted == "reference":
        return REFERENCE
    if wanted == "blocked":
        return blocked_ops()
    raise RangeError(
        f"the environment variable PVT_REF_OPS is {wanted!r}; known are 'reference' (the readable "
        f"layers) and 'blocked' (their faster twins, the default)"
    )
