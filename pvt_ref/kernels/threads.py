"""Work shared among threads, while NumPy's matrix products keep to one thread each.

NumPy's own threads only help inside a product; norms, GELUs and softmaxes run on one core. So the
kernels cut the rows into pieces and let each thread take a piece through all operations. NumPy
releases the interpreter lock while it computes. The products then must not start threads of their
own: OpenBLAS's go on spinning for milliseconds after a product, on cores that ours need.
"""

import contextvars
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController


class Scratch:
    """What belongs to one thread.

    Memory, used again from piece to piece under a name for each purpose; and the right to call on
    other threads, if the work was too little to be shared as a whole.

    Attributes:
        threads: how many threads may share a step of the work; 1 if all have pieces of their own.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._buffers: dict[str, np.ndarray] = {}

    def __call__(self, name: str, *shape: int, dtype: Any) -> np.ndarray:
        """An array with arbitrary values. It is lent until the same name is asked for again."""
        size = 1
        for length in shape:
            size *= length
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = np.empty(size, dtype)
        return buffer[:size].reshape(shape)


def run_pieces(
    work: Callable[[Any, Scratch], Any], pieces: Sequence[Any], threads: int
) -> list[Any]:
    """work(piece, scratch) for every piece, on several threads of which the caller's is one.

    Args:
        work: must write only what belongs to its piece; who gets which piece is left to chance.
        pieces: what there is to do. A single piece gets the right to call on the threads.
        threads: at most so many at once, 1 or more.

    Returns:
        The results in the order of the pieces.

    Raises:
        What work raises, once no thread is at work any more.
    """
    results: list[Any] = [None] * len(pieces)
    waiting = deque(enumerate(pieces))

    def work_off() -> None:
        scratch = Scratch(threads if len(pieces) == 1 else 1)
        try:
            while waiting:
                try:
                    i, piece = waiting.popleft()
                except IndexError:  # another thread was faster
                    return
                results[i] = work(piece, scratch)
        except BaseException:
            waiting.clear()
            raise

    with one_blas_thread():
        helpers = _start_helpers(work_off, min(threads, len(pieces)) - 1)
        try:
            work_off()
        finally:
            waiting.clear()
            # a helper that no thread has begun has nothing left to do: do not wait for its turn
            started = [helper for helper in helpers if not helper.cancel()]
            failures = [helper.exception() for helper in started]
    for failure in failures:
        if failure is not None:
            raise failure
    return results


def _start_helpers(work_off: Callable[[], None], count: int) -> list[Future[None]]:
    helpers: list[Future[None]] = []
    try:
        for _ in range(count):
            # each in a copy of the caller's context, which holds numpy.errstate
            context = contextvars.copy_context()
            helpers.append(_pool().submit(context.run, work_off))
    except RuntimeError:  # no thread can be started (a limit, or the interpreter is closing):
        pass  # those there are do the work
    return helpers


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # threads are started as needed and kept; the number only bounds how many calls at once get help
    return ThreadPoolExecutor(max_workers=128, thread_name_prefix="pvt_ref")


# One thread inside a matrix product ------------------------------------------------------------


@functools.cache
def _blas() -> list[Any]:
    """threadpoolctl's handles of the BLAS libraries that are loaded; NumPy has loaded its own."""
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


def _set_blas_threads(counts: list[int]) -> None:
    for library, count in zip(_blas(), counts, strict=True):
        library.set_num_threads(count)


class _Calls:
    """How many calls are under way, and how many threads the user had given the libraries."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.before: list[int] = []

    def enter(self) -> None:
        with self.lock:
            if self.count == 0:
                self.before = [library.get_num_threads() for library in _blas()]
                _set_blas_threads([1] * len(self.before))
            self.count += 1

    def leave(self) -> None:
        with self.lock:
            self.count -= 1
            if self.count == 0:
                _set_blas_threads(self.before)

    def chosen_by_user(self) -> int | None:
        with self.lock:
            counts = self.before if self.count else [b.get_num_threads() for b in _blas()]
        return max(counts, default=None)


_calls = _Calls()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Matrix products use one thread inside, and afterwards as many as before.

    The setting belongs to the whole process. Of several calls at once, the first to enter saves it
    and the last to leave restores it.
    """
    calls = _calls  # a fork inside would put another in its place
    calls.enter()
    try:
        yield
    finally:
        calls.leave()


def default_threads() -> int:
    """As many threads as NumPy's matrix products would use: the cores available, or fewer.

    Fewer if the user said so, by ``OPENBLAS_NUM_THREADS``, ``OMP_NUM_THREADS`` or
    ``threadpoolctl.threadpool_limits``.
    """
    chosen = _calls.chosen_by_user()
    if chosen is not None:
        return chosen
    if hasattr(os, "sched_getaffinity"):  # a BLAS that threadpoolctl does not know
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _after_fork() -> None:
    """A forked child has none of its parent's threads: no pool, and no call under way."""
    global _calls
    _pool.cache_clear()
    inherited, _calls = _calls, _Calls()
    if inherited.count:
        _set_blas_threads(inherited.before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
