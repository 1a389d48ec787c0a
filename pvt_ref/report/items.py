"""The operations of a run as items of a report: which they are, and where they stand."""

from collections.abc import Callable
from typing import Any

from pvt_ref.blocks.transformer import blocks
from pvt_ref.layers.attention import attention
from pvt_ref.models.architecture import Architecture, Place
from pvt_ref.ops import Call, Operation, Ops


class Items:
    """Turns the calls of a watched table into items.

    An item is an operation that no other item asks for: what the network and the operations of
    ``blocks/`` ask for, if the table has no twin of these. So the norm inside a patch embedding
    belongs to it, while a block is told by its parts, unless a kernel computes it at once.

    ``begin(item)`` is called when an item begins, ``end(item, call)`` when it has returned, and
    ``inner(item, call)`` for every operation that returns inside an item, itself included.
    """

    def __init__(
        self,
        row: Architecture,
        ops: Ops,
        begin: Callable[[Place], Any],
        end: Callable[[Place, Call], Any],
        inner: Callable[[Place, Call], Any] = lambda item, call: None,
    ) -> None:
        self.row, self.ops, self.begin, self.end, self.inner = row, ops, begin, end, inner
        self.item: Place | None = None
        self._depth = 0  # of calls inside the item, itself included

    def watched(self, params: Any) -> Ops:
        """The table to run."""
        unseen = [blocks] if self._passes_on(blocks) else []  # its first tokens are let go early
        return self.ops.watched(self._after, before=self._before, params=params, unseen=unseen)

    def _passes_on(self, op: Operation) -> bool:
        readable = self.ops.twins.get(op, op) == op
        return readable and op.forward.__module__.startswith("pvt_ref.blocks.")

    def _before(self, call: Call) -> None:
        if self.item is None and not self._passes_on(call.operation):
            self.item = self._place(call)
            self.begin(self.item)
        self._depth += self.item is not None

    def _after(self, call: Call) -> None:
        if self.item is None:
            return
        self.inner(self.item, call)
        self._depth -= 1
        if not self._depth:
            item, self.item = self.item, None
            self.end(item, call)

    def _place(self, call: Call) -> Place:
        stage, block, part = self.row.place(call.path) or Place(0, None, call.path)
        if call.operation == attention:
            part = part.removesuffix("attention") + "weights"  # attn.weights, A of the paper
        return Place(stage, block, part or call.operation.name)
