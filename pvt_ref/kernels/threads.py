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
        """An array with arbitrary values. It is lent until the same name is asked for again.

        Args:
            name: what it is for.
            shape: its sizes.
            dtype: its dtype.

        Returns:
            (shape), C-contiguous, of dtype.
        """
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
        BaseException: what work raises, once no thread is at work any more.
    """
    results: list[Any] = [None] * len(pieces)
    waiting = deque(enumerate(pieces))

    def help_out() -> None:
        with one_blas_thread():
            work_off()

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
        helpers = _start_helpers(help_out, min(threads, len(pieces)) - 1)
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


def _start_helpers(help_out: Callable[[], None], count: int) -> list[Future[None]]:
    helpers: list[Future[None]] = []
    try:
        for _ in range(count):
            # each in a copy of the caller's context, which holds numpy.errstate
            context = contextvars.copy_context()
            helpers.append(_pool().submit(context.run, help_out))
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


def _of_one_thread(library: Any) -> bool:
    """Whether its setting belongs to the thread that makes it, rather than to the process."""
    return library.internal_api == "mkl" or getattr(library, "threading_layer", "") == "openmp"


def _libraries(of_one_thread: bool) -> list[Any]:
    return [library for library in _blas() if _of_one_thread(library) == of_one_thread]


def _get(libraries: list[Any]) -> list[int]:
    return [library.get_num_threads() for library in libraries]


def _set(libraries: list[Any], counts: list[int]) -> None:
    for library, count in zip(libraries, counts, strict=True):
        # threadpoolctl lets the first thread that set OpenBLAS's number do so alone, and passes
        # over the others in silence; who may set it when is counted in _Calls
        release = getattr(library, "clear_controlling_thread", lambda force=False: None)
        release(force=True)
        library.set_num_threads(count)
        release()


class _Calls:
    """How many calls are under way, and what the user had set for the process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.before: list[int] = []

    def enter(self) -> list[int]:
        """One thread from now on. Returns what was set for the calling thread."""
        mine = _libraries(of_one_thread=True)
        mine_before = _get(mine)
        _set(mine, [1] * len(mine))
        with self.lock:
            everyones = _libraries(of_one_thread=False)
            if self.count == 0:
                self.before = _get(everyones)
            self.count += 1  # first: a fork in between must know that there is something to undo
            if self.count == 1:
                _set(everyones, [1] * len(everyones))
        return mine_before

    def leave(self, mine_before: list[int]) -> None:
        _set(_libraries(of_one_thread=True), mine_before)
        with self.lock:
            if self.count == 1:
                _set(_libraries(of_one_thread=False), self.before)
            self.count -= 1

    def chosen_by_user(self) -> int | None:
        with self.lock:
            counts = self.before if self.count else _get(_libraries(of_one_thread=False))
        return max(counts + _get(_libraries(of_one_thread=True)), default=None)


_calls = _Calls()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Matrix products use one thread inside, and afterwards as many as before.

    OpenBLAS has one setting for the whole process: of several calls at once, the first to enter
    saves it and the last to leave restores it. MKL and OpenMP have one for each thread.
    """
    calls = _calls  # a fork inside would put another in its place
    before = calls.enter()
    try:
        yield
    finally:
        calls.leave(before)


def default_threads() -> int:
    """As many threads as NumPy's matrix products would use: the cores available, or fewer.

    Fewer if the user said so, by ``OPENBLAS_NUM_THREADS``, ``OMP_NUM_THREADS`` or
    ``threadpoolctl.threadpool_limits``.

    Returns:
        At least 1.
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
        _set(_libraries(of_one_thread=False), inherited.before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
