"""Work shared among threads, while each of NumPy's matrix products uses a single thread.

NumPy's own threads only help inside a product; norms, GELUs and softmaxes run on one core. So the
kernels cut the rows into pieces, and each thread takes a piece through all operations. NumPy
releases the interpreter lock while it computes. The products then must not start threads of their
own: those of OpenBLAS keep spinning for milliseconds after a product, on cores that ours need.

Ctrl-C raises KeyboardInterrupt in the caller between any two steps of Python, also in this module.
Helper threads are never interrupted. So each step that must be undone is either a single operation
in C, which happens completely or not at all, or can be repeated, and is repeated until it has
completed.
"""

import _thread
import contextvars
import functools
import math
import operator
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np


class Scratch:
    """Memory of one thread, reused from piece to piece, with a name for each purpose."""

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads  # how many may share a step of the work; 1 if each has its own piece
        self._buffers: dict[str, np.ndarray] = {}

    def __call__(self, name: str, *shape: int, dtype: Any) -> np.ndarray:
        """An array with arbitrary values, valid until the same name is asked for again."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = np.empty(size, dtype)
        return np.reshape(buffer[:size], shape, copy=False)


#: The work on one piece; a piece is a list of tiles of rows, or a range of columns.
Work = Callable[[Any, Scratch], Any]


def run_pieces(work: Work, pieces: Sequence[Any], threads: int) -> list[Any]:
    """work(piece, scratch) for every piece, on at most this many threads, including the caller's.

    The results are in the order of the pieces, whichever thread computed each. If there is only one
    piece, its work may use the threads itself. An error in work, or an interrupt of the caller, is
    raised once no thread is at work any more.
    """
    call = _Call(work, pieces, threads)
    interrupt = None
    try:
        call.begin()
        call.context.run(call.work_off)
    finally:
        try:
            for _ in _OFTEN_ENOUGH:
                try:
                    call.end()
                    break
                except BaseException as error:  # an interrupt: end is called again
                    interrupt = error
        finally:
            call.end()  # for an interrupt that came just where the loop jumps back
        if interrupt is not None:
            try:
                raise interrupt
            finally:
                interrupt = None  # else frame and exception keep each other alive, and the arrays
    for failure in call.failures:
        raise failure
    return call.results


#: More repetitions than there are interrupts; made here, as calling range() could be interrupted.
_OFTEN_ENOUGH = range(10_000)


class _Call:
    """One call of run_pieces: the remaining pieces, and the threads that work on them."""

    def __init__(self, work: Work, pieces: Sequence[Any], threads: int) -> None:
        self.work = work
        self.threads_in_piece = threads if len(pieces) == 1 else 1
        self.waiting = deque(enumerate(pieces))
        self.results: list[Any] = [None] * len(pieces)
        self.failures: list[BaseException] = []
        # a copy of the caller's context, which has numpy.errstate; changes by work end with it
        self.context = contextvars.copy_context()
        # a lock for each helper, which holds it while at work; at the end the caller acquires all
        self.turns = [threading.RLock() for _ in range(min(threads, len(pieces)) - 1)]
        self.before: list[int] | None = None  # settings of libraries that are per thread
        self.ended = False

    def begin(self) -> None:
        libraries = _libraries(of_one_thread=True)
        self.before = _get(libraries)
        _set(libraries, [1] * len(libraries))
        _limit.enter(self)
        for turn in self.turns:
            _helpers.ask(functools.partial(self.help_out, turn, self.context.copy()))

    def end(self) -> None:
        """Ends the call: no thread works on it afterwards. May be interrupted and called again."""
        if self.ended:
            return
        self.waiting.clear()
        for turn in self.turns:
            turn.acquire()  # waits for a helper at work; one that has not begun will not begin
        _limit.leave(self)
        if self.before is not None:
            _set(_libraries(of_one_thread=True), self.before)
        self.ended = True

    def help_out(self, turn: threading.RLock, context: contextvars.Context) -> None:
        if not turn.acquire(blocking=False):
            return
        try:
            libraries = _libraries(of_one_thread=True)
            before = _get(libraries)
            _set(libraries, [1] * len(libraries))
            try:
                context.run(self.work_off)
            finally:
                _set(libraries, before)
        except BaseException as error:
            self.failures.append(error)
        finally:
            turn.release()

    def work_off(self) -> None:
        scratch = Scratch(self.threads_in_piece)
        try:
            while self.waiting:
                try:
                    i, piece = self.waiting.popleft()
                except IndexError:  # another thread took the last piece
                    return
                self.results[i] = self.work(piece, scratch)
        except BaseException:
            self.waiting.clear()
            raise

    def after_fork(self) -> None:
        """Called in a forked child, which has no helpers: the work they had begun is lost."""
        turns, self.turns = self.turns, []
        if [turn for turn in turns if not turn.acquire(blocking=False)]:
            self.failures.append(
                RuntimeError("forked amid this call; the threads that had a share are not here")
            )


class _Helpers:
    """Permanent helper threads that wait for work. Each records its own presence."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.there: set[int] = set()
        self.lock = threading.Lock()  # only for helpers, which are never interrupted

    def ask(self, job: Callable[[], None]) -> None:
        if len(self.there) < _limit.most_helpers:
            try:
                # Thread.start waits for the new thread, and an interrupt can end that wait
                _thread.start_new_thread(self.serve, ())
            except RuntimeError:  # a limit, or Python is exiting: the present helpers do the work
                if not self.there:
                    return
        self.jobs.put(job)

    def serve(self) -> None:
        with self.lock:
            if len(self.there) >= _limit.most_helpers:  # two calls have each started one
                return
            self.there.add(threading.get_ident())
        try:
            while True:
                self.jobs.get()()  # no variable holds the job, so it is freed when it is done
        finally:
            self.there.discard(threading.get_ident())


_helpers = _Helpers()


# One thread inside a matrix product ------------------------------------------------------------


@functools.cache
def _blas() -> list[Any]:
    """threadpoolctl's handles of the loaded BLAS libraries; NumPy has loaded its own."""
    from threadpoolctl import ThreadpoolController

    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


def _of_one_thread(library: Any) -> bool:
    """Whether the library's number of threads is set per thread rather than per process."""
    return library.internal_api == "mkl" or getattr(library, "threading_layer", "") == "openmp"


def _libraries(of_one_thread: bool) -> list[Any]:
    return [library for library in _blas() if _of_one_thread(library) == of_one_thread]


def _get(libraries: list[Any]) -> list[int]:
    return [library.get_num_threads() for library in libraries]


def _set(libraries: list[Any], counts: list[int]) -> None:
    for library, count in zip(libraries, counts, strict=True):
        # the public method for OpenBLAS only works in the thread that called it first, and has a
        # lock that an interrupt or a fork could leave locked; _Limit coordinates the calls instead
        set_num_threads = getattr(library, "_real_set_num_threads", library.set_num_threads)
        set_num_threads(count)


class HasLock(Protocol):
    """What :func:`holding` and :func:`at_fork` take."""

    lock: threading.RLock


def holding(owner: HasLock, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) while this thread holds owner.lock; may be interrupted anywhere."""
    # not "with": in Python 3.14 an interrupt can come after the lock is taken, before the block
    lock = owner.lock  # in a child that function forks, the owner has another
    try:
        lock.acquire()
        return function(*args)
    finally:
        try:  # noqa: SIM105 (an interrupt can come before suppress() is entered)
            lock.release()
        except RuntimeError:  # interrupted before it was acquired
            pass


def at_fork(owner: HasLock, in_child: Callable[[], None]) -> None:
    """Prevents forks while another thread holds owner.lock; the child gets a new lock.

    If a fork hook raises, Python prints the error and forks all the same. So an interrupt is held
    back until the lock is taken, and again until it is released. In the child, which has no other
    thread, in_child is called, perhaps twice.
    """
    taken: dict[int, list[bool]] = {}  # by thread: an entry for each time the lock was taken

    def until_done(step: Callable[[], bool]) -> None:
        interrupt = None
        for _ in _OFTEN_ENOUGH:
            try:
                if step():
                    break
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def before() -> None:
        mine = taken.setdefault(threading.get_ident(), [])

        def take() -> bool:
            mine.extend(map(owner.lock.acquire, [True]))  # one operation in C: taken and recorded
            return True

        until_done(take)

    def after() -> None:
        mine = taken.get(threading.get_ident(), [])

        def give_back() -> bool:
            if mine:
                deque(map(operator.call, (owner.lock.release, mine.pop)), 0)  # likewise
            return not mine

        until_done(give_back)

    def after_in_child() -> None:
        taken.clear()
        owner.lock = threading.RLock()
        in_child()

    if hasattr(os, "register_at_fork"):
        for _ in range(2):  # an interrupt just as a hook begins ends that hook, but not the other
            os.register_at_fork(before=before, after_in_parent=after, after_in_child=after_in_child)


class _Limit:
    """Whether BLAS is limited to one thread in this process, and what the user had set.

    Calls are active as long as they exist: one that could not leave is freed with its frame.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.calls: set[weakref.ref[_Call]] = set()
        self.most_helpers = 0  # the most that concurrent calls have ever asked for
        self.before: list[int] | None = None  # what the user had set; None if nothing was changed

    def enter(self, call: _Call) -> None:
        holding(self, self._update, self.calls.add, call)

    def leave(self, call: _Call) -> None:
        holding(self, self._update, self.calls.discard, call)

    def chosen_by_user(self) -> list[int]:
        return holding(self, lambda: self.before or _get(_libraries(of_one_thread=False)))

    def _update(self, change: Callable[[Any], None], call: _Call) -> None:
        """May be interrupted anywhere: the next update, of any call, corrects it.

        A signal handler may compute in the middle of this, so state is read after the change.
        """
        change(weakref.ref(call))
        under_way = [call for call in [call() for call in list(self.calls)] if call is not None]
        asked_for = sum([len(call.turns) for call in under_way])
        self.most_helpers = max(self.most_helpers, asked_for)
        libraries, chosen = _libraries(of_one_thread=False), self.before
        if under_way and chosen is None:
            self.before = _get(libraries)  # first, so that what follows can be undone
            _set(libraries, [1] * len(libraries))
        elif chosen is not None and not under_way:
            _set(libraries, chosen)
            self.before = None


_limit = _Limit()


def default_threads() -> int:
    """As many as NumPy's matrix products would use: the cores available, or what the user has set
    by ``OPENBLAS_NUM_THREADS``, ``OMP_NUM_THREADS`` or ``threadpoolctl.threadpool_limits``.
    """
    chosen = _limit.chosen_by_user() + _get(_libraries(of_one_thread=True))
    if chosen:
        return max(chosen)
    if hasattr(os, "sched_getaffinity"):  # a BLAS that threadpoolctl does not know
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _after_fork() -> None:
    """A forked child has neither its parent's other threads nor their running calls."""
    global _helpers
    _helpers = _Helpers()
    for call in [call() for call in _limit.calls]:
        if call is not None:
            call.after_fork()
    _limit.calls.clear()
    _limit.most_helpers = 0
    if _limit.before is not None:
        _set(_libraries(of_one_thread=False), _limit.before)
        _limit.before = None


# OpenBLAS's setter has a lock, which no other thread may hold during a fork
at_fork(_limit, _after_fork)
