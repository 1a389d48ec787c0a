"""The operations of a run as items of a report: their names and places."""

from collections.abc import Callable
from typing import Any

from pvt_ref.blocks.transformer import blocks
from pvt_ref.layers.attention import attention
from pvt_ref.models.architecture import Architecture, Place
from pvt_ref.ops import Call, Operation, Ops

#: Where operations are made of others, which are the items instead.
_PASSING = ("pvt_ref.blocks.", "pvt_ref.heads.")


def watch_items(
    row: Architecture,
    ops: Ops,
    params: Any,
    begin: Callable[[Place], Any],
    end: Callable[[Place, Call], Any],
    inner: Callable[[Place, Call], Any] = lambda item, call: None,
) -> Ops:
    """A table to run that turns the calls of ops into items.

    An item is an operation that no other item asks for: what the network and the operations of
    ``blocks/`` ask for, if the table has no twin of these. So the norm inside a patch embedding
    belongs to it, while a block is told by its parts, unless a kernel computes it at once.

    ``begin(item)`` is called when an item begins, ``end(item, call)`` when it has returned, and
    ``inner(item, call)`` for every operation that returns inside an item, itself included.
    """
    item: Place | None = None
    depth = 0  # of calls inside the item, itself included

    def passes_on(op: Operation) -> bool:
        readable = ops.twins.get(op, op) == op
        return readable and op.forward.__module__.startswith(_PASSING)

    def before(call: Call) -> None:
        nonlocal item, depth
        if item is None and not passes_on(call.operation):
            stage, block, part = row.place(call.path) or Place(0, None, call.path)
            if call.operation == attention:
                part = part.removesuffix("attention") + "weights"  # attn.weights, A of the paper
            item = Place(stage, block, part or call.operation.name)
            begin(item)
        depth += item is not None

    def after(call: Call) -> None:
        nonlocal item, depth
        if item is not None:
            inner(item, call)
            depth -= 1
            if not depth:
                ended, item = item, None
                end(ended, call)

    unseen = [blocks] if passes_on(blocks) else []  # its first tokens are let go early
    return ops.watched(after, before=before, params=params, unseen=unseen)
