"""How the rows of an operation are cut up, so that blocks stay in cache and threads share them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pvt_ref.kernels.threads import Scratch, default_threads, run_pieces

#: Below so many numbers a thread costs more than it saves.
_WORTH_A_THREAD = 2**13


def cut(rows: slice, size: int) -> Iterator[slice]:
    """Consecutive parts of rows, as equal as can be, none longer than size."""
    length = rows.stop - rows.start
    parts = -(-length // size)
    for i in range(parts):
        yield slice(rows.start + length * i // parts, rows.start + length * (i + 1) // parts)


def by_group(rows: slice, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Splits rows where a new group (an image) of size rows starts.

    Yields:
        (group, rows within the group, rows counted from the start of the given ones).
    """
    start = rows.start
    while start < rows.stop:
        group = start // size
        stop = min(rows.stop, (group + 1) * size)
        within = slice(start - group * size, stop - group * size)
        yield group, within, slice(start - rows.start, stop - rows.start)
        start = stop


@dataclass(frozen=True, slots=True)
class Blocking:
    """Settings of the kernels.

    Attributes:
        threads: at most so many; None for as many as NumPy's matrix products would use.
        rows: tokens that go through a chain of operations together. 256 of them, with the hidden
            layer of an MLP, fill a level-2 cache; fewer make slow matrix products.
    """

    threads: int | None = None
    rows: int = 256

    @property
    def scores(self) -> int:
        """How many attention scores are held at once, at most, if a query's row is not longer."""
        return 1024 * self.rows

    def cut(self, piece: slice, rows: int | None = None) -> Iterator[slice]:
        """The blocks of a piece, of self.rows or the given number of rows."""
        return cut(piece, rows or self.rows)

    def run(
        self,
        work: Callable[[slice, Scratch], Any],
        count: int,
        width: int,
        rows: int | None = None,
    ) -> list[Any]:
        """work(piece, scratch) for pieces that make up ``slice(0, count)``, on the threads.

        Args:
            work: computes the rows of a piece, cutting it into blocks itself.
            count: how many rows there are.
            width: numbers in a row, to tell what is too little to share.
            rows: of a block, if not self.rows.

        Returns:
            What work returned, in the order of the pieces.
        """
        threads = self.threads or default_threads()
        blocks = -(-count // (rows or self.rows))
        affordable = min(threads, count, count * width // _WORTH_A_THREAD)
        # more pieces than threads, so that a thread that was held up can be helped out; a multiple,
        # so that they end together
        pieces = max(1, blocks, affordable)
        if pieces > threads:
            pieces = min(-(-pieces // threads), 4) * threads
        pieces = min(pieces, count)
        return run_pieces(work, list(cut(slice(0, count), -(-count // pieces))), threads)
