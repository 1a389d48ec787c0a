"""Splitting the rows of an operation into tiles that stay in cache, shared among threads."""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pvt_ref.kernels.cpu.threads import Scratch, Work, default_threads, run_pieces
from pvt_ref.ops import Operation
from pvt_ref.tree import map_arrays

#: The fewest columns of a matrix product that are worth another thread.
_COLUMNS_WORTH_A_THREAD = 32

#: Where Linux describes the caches of the first core; those of the others are similar.
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def cut(rows: slice, size: int) -> Iterator[slice]:
    """Consecutive parts of rows, as equal as possible, none longer than size."""
    length = rows.stop - rows.start
    parts = -(-length // size)
    for i in range(parts):
        yield slice(rows.start + length * i // parts, rows.start + length * (i + 1) // parts)


def times(groups: slice, size: int) -> slice:
    """The rows of consecutive groups (lines, images) of size rows each."""
    return slice(groups.start * size, groups.stop * size)


def rows_of(arrays: Any, rows: slice) -> Any:
    """These rows of an array, or of all arrays of a record, as views; None for None."""
    return map_arrays(lambda x: x[rows], arrays)


def by_group(rows: slice, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Splits rows where a new group (an image) of size rows starts.

    Yields (group, rows relative to the group, rows relative to the start of the given rows).
    """
    for group in range(rows.start // size, -(-rows.stop // size)):
        start, stop = max(rows.start, group * size), min(rows.stop, (group + 1) * size)
        within = slice(start - group * size, stop - group * size)
        yield group, within, slice(start - rows.start, stop - rows.start)


def share_columns(work: Work, width: int, scratch: Scratch) -> list[Any]:
    """work(columns, scratch) for columns that make up ``slice(0, width)``; its results, in order.

    It uses several threads only if there were too few rows to share.
    """
    parts = max(1, min(scratch.threads, width // _COLUMNS_WORTH_A_THREAD))
    if parts == 1:
        return [work(slice(0, width), scratch)]
    return run_pieces(work, list(cut(slice(0, width), -(-width // parts))), parts)


@functools.cache
def cache_size() -> int:
    """Bytes of a core's second-level cache, from Linux or POSIX; else 1 MiB, which is common."""
    for index in sorted(_CACHES.glob("index*")):
        try:
            level, size = ((index / name).read_text().strip() for name in ("level", "size"))
        except OSError:
            continue
        if level == "2" and size.endswith("K") and size[:-1].isdecimal():
            return int(size[:-1]) * 1024
    try:
        size = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):  # no POSIX, or no such name
        size = 0
    return size if size > 0 else 2**20


def elements_for(cache: int) -> int:
    """How many numbers the widest array of a tile has, for a second-level cache of this many bytes.

    At most 2^18, 1 MiB of float32, because more gives no gain. Else the largest power of two that
    the cache holds, but at least 2^15. It affects how sums are rounded, so it is not timed.
    """
    return min(2**18, max(2**15, 2 ** (max(1, cache // 4).bit_length() - 1)))


@dataclass(frozen=True, slots=True)
class Tiling:
    """Settings of the kernels: threads and elements, as :func:`blocked_ops` takes them.

    A row wider than 1,024 counts as 1,024. Larger tiles do not stay in cache. With smaller ones,
    matrix products are slow, and threads wait for the interpreter lock between NumPy calls.
    """

    threads: int | None = None
    elements: int = 2**18

    def rows(self, width: int) -> int:
        """The number of rows in a tile whose widest array has width elements per row."""
        return max(1, self.elements // min(width, 1024))

    def run(self, work: Work, count: int, size: int, tokens: int = 1) -> list[Any]:
        """work(tiles, scratch) for pieces that make up ``slice(0, count)``, on the threads.

        A piece is a list of consecutive tiles of at most size rows. Lines may be shared instead of
        rows: then tokens is the number of tokens of a line. Returns the results of work, in the
        order of the pieces.
        """
        threads = self.threads or default_threads()
        # a thread needs some rows for its products to be fast; fewer rows are shared by columns,
        # product by product (share_columns)
        worth_a_thread = max(1, self.elements // 2048)
        sharing = min(threads, count, count * tokens // worth_a_thread)
        pieces = 1
        if sharing > 1:
            # a few for each thread, so that others can take over from one that is delayed
            pieces = min(count, sharing * min(4, -(-count // (size * sharing))))
        bounds = [count * i // pieces for i in range(pieces + 1)]
        tiles = [list(cut(slice(*ends), size)) for ends in pairwise(bounds)]
        return run_pieces(work, tiles, threads)

    def run_lines(self, work: Work, count: int, tokens: int, width: int) -> list[Any]:
        """As :meth:`run`, for count lines of tokens tokens, each with width numbers."""
        return self.run(work, count, self.rows(width) // tokens or 1, tokens)

    def by_rows(self, work: Callable[..., Any], *arrays: Any, width: int | None = None) -> None:
        """work(*tiles, scratch) for all tiles of the rows of arrays; those written are contiguous.

        Arguments may also be records, or None. The widest array of a tile has width numbers per
        row; None means the width of the first array.
        """
        rows = map_arrays(lambda x: x.reshape(-1, x.shape[-1] if x.ndim else 1), arrays)

        def run(tiles: list[slice], scratch: Scratch) -> None:
            for tile in tiles:
                work(*rows_of(rows, tile), scratch)

        self.run(run, len(rows[0]), self.rows(width or rows[0].shape[1]))


@dataclass(frozen=True, slots=True)
class _WithTiling:
    """A function and its settings; compares by content, so that tables can be compared."""

    function: Callable[..., Any]
    tiling: Tiling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs, tiling=self.tiling)


class Kernel(NamedTuple):
    """A twin whose functions take their settings by name.

    If backward is None, the readable operation's is used.
    """

    readable: Operation
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    absorbs: tuple[Operation, ...] = ()

    def with_tiling(self, tiling: Tiling) -> Operation:
        """The twin for the table."""
        backward = _WithTiling(self.backward, tiling) if self.backward else self.readable.backward
        return Operation(_WithTiling(self.forward, tiling), backward, self.absorbs)
