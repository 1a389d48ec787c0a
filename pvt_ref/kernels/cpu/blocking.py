"""How the rows of an operation are cut up, so that blocks stay in cache and threads share them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pvt_ref.kernels.cpu.threads import Scratch, default_threads, run_pieces

#: Fewer columns of a matrix product are not worth another thread.
_COLUMNS_WORTH_A_THREAD = 32


def cut(rows: slice, size: int) -> Iterator[slice]:
    """Consecutive parts of rows, as equal as can be, none longer than size.

    Args:
        rows: a slice with start and stop.
        size: at least 1.

    Yields:
        The parts as slices, in order.
    """
    length = rows.stop - rows.start
    parts = -(-length // size)
    for i in range(parts):
        yield slice(rows.start + length * i // parts, rows.start + length * (i + 1) // parts)


def by_group(rows: slice, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Splits rows where a new group (an image) of size rows starts.

    Args:
        rows: a slice with start and stop.
        size: rows of a group.

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


def share_columns(work: Callable[[slice, Scratch], Any], width: int, scratch: Scratch) -> list[Any]:
    """work(columns, scratch) for columns that make up ``slice(0, width)``.

    All at once where every thread has its own rows; in parts, on several threads, where the rows
    were too few to be shared.

    Args:
        work: computes some columns, and writes nothing else.
        width: how many columns there are.
        scratch: of the calling thread; says how many threads may help.

    Returns:
        What work returned, in the order of the columns.
    """
    parts = max(1, min(scratch.threads, width // _COLUMNS_WORTH_A_THREAD))
    if parts == 1:
        return [work(slice(0, width), scratch)]
    return run_pieces(work, list(cut(slice(0, width), -(-width // parts))), parts)


@dataclass(frozen=True, slots=True)
class Blocking:
    """Settings of the kernels.

    Attributes:
        threads: at most so many; None for as many as NumPy's matrix products would use.
        elements: numbers in the widest array of a block of rows, if a row has no more than 1,024;
            of wider ones, a block has as many rows as if it had 1,024. Larger blocks leave the
            cache; smaller ones make slow matrix products, and threads that wait for each other:
            they take turns at the interpreter between any two NumPy calls.
    """

    threads: int | None = None
    elements: int = 2**18

    def scope(self) -> AbstractContextManager[None]:
        """Entered once around every public call."""
        return nullcontext()

    def rows(self, width: int) -> int:
        """How many rows a block has.

        Args:
            width: numbers in a row of the block's widest array.

        Returns:
            At least 1.
        """
        return max(1, self.elements // min(width, 1024))

    def run(
        self, work: Callable[[list[slice], Scratch], Any], count: int, block: int, tokens: int = 1
    ) -> list[Any]:
        """work(blocks, scratch) for pieces that make up ``slice(0, count)``, on the threads.

        Args:
            work: computes a piece, which it gets as consecutive blocks.
            count: how many rows (or lines, or whatever is shared) there are.
            block: how many of them a block has.
            tokens: what one of them is worth in tokens.

        Returns:
            What work returned, in the order of the pieces.
        """
        threads = self.threads or default_threads()
        # a thread needs some rows for its products to be fast; fewer rows are shared by columns,
        # product by product (share_columns)
        worth_a_thread = max(1, self.elements // 2048)
        sharing = min(threads, count, count * tokens // worth_a_thread)
        pieces = 1
        if sharing > 1:
            # a few for each thread, so that one that is held up can be helped out
            pieces = sharing * min(4, -(-count // (block * sharing)))
        bounds = [count * i // pieces for i in range(pieces + 1)]
        blocks = [list(cut(slice(*ends), block)) for ends in pairwise(bounds)]
        return run_pieces(work, blocks, threads)
