"""Weights of a model that does not change, once laid out as the kernels read them.

A forward permutes each kernel (C_out, C_in, k_h, k_w) into the matrix of its product, and puts W^Q
and W^KV together where they see the same rows: a copy each. Both can be done before, with the same
bits. A kernel keeps its shape, and lies in memory as the matrix does, so that the forward's own
permutation is a view; and a PVT's attention without reduction becomes that of a ViT.

A training does not use this: its weights change.
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
    """Whether W^Q and W^KV see the same rows, and one product can make queries, keys and values."""
    reduces = not isinstance(p, SRAParams) or p.sr is not None or p.norm is not None
    return not reduces and (p.q.bias is None) == (p.kv.bias is None)


def joined(p: SRAParams) -> MHAParams:
    """The same weights as a ViT has them: q (C, C) over kv (2C, C)."""
    xp, bias = array_module(p.q.weight), None
    if p.q.bias is not None:
        bias = xp.concat((p.q.bias, p.kv.bias), axis=0)  # (3C,)
    weight = xp.concat((p.q.weight, p.kv.weight), axis=0)  # (3C, C)
    return MHAParams(LinearParams(weight, bias), p.proj)


def taken_apart(p: MHAParams) -> SRAParams:
    """What :func:`joined` put together, or its gradients: views."""
    C, (weight, bias) = p.qkv.weight.shape[1], (p.qkv.weight, p.qkv.bias)
    q, kv = (
        LinearParams(weight[rows, :], None if bias is None else bias[rows])
        for rows in (slice(C), slice(C, None))
    )
    return SRAParams(q, kv, p.proj, None, None)


def arranged(tree: Any) -> Any:
    """Weights of the same numbers, for a forward; what need not move is shared."""
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
    """x itself as it is seen, its numbers in memory in the order of these axes."""
    xp = array_module(x)
    y = xp.ascontiguousarray(xp.permute_dims(x, order))
    return xp.permute_dims(y, tuple(order.index(axis) for axis in range(x.ndim)))


class Arranged:
    """The arranged weights of the models used last, at most so many.

    They are known by their owner, which an entry keeps alive, so that no other takes its place.
    """

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self._known: OrderedDict[int, tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Arranged, (self.most,)  # a copy arranges for itself

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forgets all of them."""
        with self._lock:
            self._known.clear()

    def of(self, owner: Any, params: Any) -> Any:
        """params, arranged, of an owner whose weights nobody changes."""
        with self._lock:
            _, found = self._known.pop(id(owner), (None, None))
            if found is None:
                found = arranged(params)
            self._known[id(owner)] = owner, found
            while len(self._known) > self.most:
                self._known.popitem(last=False)
        return found


def arranged_for(ops: Ops | None, model: Any) -> Any:
    """A record with params as this table's kernels read it; the same one if it has no kernels."""
    known = None if ops is None else getattr(ops.settings, "arranged", None)
    return model if known is None else replace(model, params=known.of(model, model.params))
