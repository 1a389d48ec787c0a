"""Weights of a model that does not change, stored once in the layout that the kernels read.

A forward permutes each convolution kernel (C_out, C_in, k_h, k_w) into the matrix of its product,
and joins W^Q and W^KV if they are applied to the same rows. Each is a copy. Both can be done in
advance, with the same bits. A convolution kernel keeps its shape, but is stored in memory as the
matrix is, so that the forward's own permutation is a view. A PVT's attention without reduction
becomes that of a ViT.

Training does not use this: its weights change.
"""

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from pvt_ref.arrays import Array, array_module, is_array
from pvt_ref.blocks.conv_mlp import DWConvParams
from pvt_ref.blocks.mha import MHAParams
from pvt_ref.blocks.sra import SRAParams
from pvt_ref.layers.conv import ConvParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.ops import Ops
from pvt_ref.tree import branches


def can_join(p: Any) -> bool:
    """Whether W^Q and W^KV have the same input, so that one product can give q, k and v."""
    reduces = not isinstance(p, SRAParams) or p.sr is not None or p.norm is not None
    return not reduces and (p.q.bias is None) == (p.kv.bias is None)


def joined(p: SRAParams) -> MHAParams:
    """The same weights in the form of a ViT: q (C, C) above kv (2C, C)."""
    xp, bias = array_module(p.q.weight), None
    if p.q.bias is not None:
        bias = xp.concat((p.q.bias, p.kv.bias), axis=0)  # (3C,)
    weight = xp.concat((p.q.weight, p.kv.weight), axis=0)  # (3C, C)
    return MHAParams(LinearParams(weight, bias), p.proj)


def taken_apart(p: MHAParams) -> SRAParams:
    """Undoes :func:`joined`, for weights or their gradients. The results are views."""
    C, (weight, bias) = p.qkv.weight.shape[1], (p.qkv.weight, p.qkv.bias)
    q, kv = (
        LinearParams(weight[rows, :], None if bias is None else bias[rows])
        for rows in (slice(C), slice(C, None))
    )
    return SRAParams(q, kv, p.proj, None, None)


def arranged(tree: Any) -> Any:
    """Weights with the same values, arranged for a forward; what need not move is shared."""
    if is_array(tree):
        return _laid_out(tree, (0, 2, 3, 1)) if tree.ndim == 4 else tree
    if can_join(tree):
        return joined(tree)
    if isinstance(tree, DWConvParams):
        conv = tree.dwconv
        return DWConvParams(ConvParams(_laid_out(conv.weight, (2, 3, 1, 0)), conv.bias))
    parts = [arranged(branch) for _, branch in branches(tree)]
    if not parts:
        return tree
    return tuple(parts) if type(tree) is tuple else type(tree)(*parts)


def _laid_out(x: Array, order: tuple[int, ...]) -> Array:
    """An array equal to x, whose numbers are stored in memory in the order of these axes."""
    xp = array_module(x)
    y = xp.ascontiguousarray(xp.permute_dims(x, order))
    return xp.permute_dims(y, tuple(order.index(axis) for axis in range(x.ndim)))


class Arranged:
    """The arranged weights of the most recently used models.

    The key is the id of their owner. The entry keeps the owner alive, so no other object can get
    the same id.
    """

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self._known: OrderedDict[int, tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Arranged, (self.most,)  # a copy starts empty

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forgets all of them."""
        with self._lock:
            self._known.clear()

    def of(self, owner: Any, params: Any) -> Any:
        """params, arranged, for an owner whose weights do not change."""
        with self._lock:
            _, found = self._known.pop(id(owner), (None, None))
            if found is None:
                found = arranged(params)
            self._known[id(owner)] = owner, found
            while len(self._known) > self.most:
                self._known.popitem(last=False)
        return found


def arranged_for(ops: Ops | None, model: Any) -> Any:
    """A record with params arranged for this table's kernels; the same one if it has none."""
    known = None if ops is None else getattr(ops.settings, "arranged", None)
    return model if known is None else replace(model, params=known.of(model, model.params))
