"""Work shared among threads, and how many of them a matrix product may use meanwhile.

NumPy's own threads only help inside a product; norms, GELUs and softmaxes run on one core. So the
kernels cut the rows into pieces and let each thread take a piece through all operations. NumPy
releases the interpreter lock while it computes. The products then must not start threads of their
own, or the two kinds would fight over the cores.
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
    """Memory of one thread, used again from piece to piece under a name for each purpose."""

    def __init__(self) -> None:
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

    Of a single piece, the matrix products use the threads.

    Args:
        work: must write only what belongs to its piece; who gets which piece is left to chance.
        pieces: what there is to do.
        threads: at most so many at once, 1 or more.

    Returns:
        The results in the order of the pieces.

    Raises:
        What work raises, once no thread is at work any more.
    """
    results: list[Any] = [None] * len(pieces)
    waiting = deque(enumerate(pieces))

    def work_off() -> None:
        scratch = Scratch()
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

    with product_threads(threads if len(pieces) == 1 else 1):
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


# Threads inside a matrix product ---------------------------------------------------------------


@functools.cache
def _blas() -> list[Any]:
    """threadpoolctl's handles of the BLAS libraries that are loaded; NumPy has loaded its own."""
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


def _set_blas_threads(counts: list[int]) -> None:
    for library, count in zip(_blas(), counts, strict=True):
        library.set_num_threads(count)


class _ProductThreads:
    """How many threads the libraries use, while calls that want to say so are under way.

    The setting belongs to the whole process. The first call to enter saves what the user had, the
    last to leave restores it; in between it only goes down, so that nobody gets more than it wants.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls = 0
        self.limit = 0
        self.before: list[int] = []

    def enter(self, threads: int) -> None:
        with self.lock:
            if self.calls == 0:
                self.before = [library.get_num_threads() for library in _blas()]
            if self.calls == 0 or threads < self.limit:
                self.limit = threads
                _set_blas_threads([threads] * len(self.before))
            self.calls += 1

    def leave(self) -> None:
        with self.lock:
            self.calls -= 1
            if self.calls == 0:
                _set_blas_threads(self.before)

    def chosen_by_user(self) -> int | None:
        with self.lock:
            counts = self.before if self.calls else [b.get_num_threads() for b in _blas()]
        return max(counts, default=None)


_product_threads = _ProductThreads()


@contextmanager
def product_threads(threads: int) -> Iterator[None]:
    """Matrix products use so many threads inside, and afterwards as many as before."""
    state = _product_threads  # a fork inside would put another in its place
    state.enter(threads)
    try:
        yield
    finally:
        state.leave()


def default_threads() -> int:
    """As many threads as NumPy's matrix products would use: the cores available, or fewer.

    Fewer if the user said so, by ``OPENBLAS_NUM_THREADS``, ``OMP_NUM_THREADS`` or
    ``threadpoolctl.threadpool_limits``.
    """
    chosen = _product_threads.chosen_by_user()
    if chosen is not None:
        return chosen
    if hasattr(os, "sched_getaffinity"):  # a BLAS that threadpoolctl does not know
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _after_fork() -> None:
    """A forked child has none of its parent's threads: no pool, and no call under way."""
    global _product_threads
    _pool.cache_clear()
    inherited, _product_threads = _product_threads, _ProductThreads()
    if inherited.calls:
        _set_blas_threads(inherited.before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
