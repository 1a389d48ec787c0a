"""Ctrl-C at any moment, forks, the end of the interpreter: nothing is left behind, nothing hangs.

An interrupt is an exception that Python raises in the middle of our own lines. It does so where it
looks for signals: when a function is entered, after every call, and where a loop jumps back. The
first test puts one at each of these places in turn; the second sends real ones at random moments.
"""

import dis
import gc
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from pvt_ref.kernels.cpu import threads as threads_module
from pvt_ref.kernels.cpu.threads import default_threads, run_pieces
from pvt_ref.kernels.cpu.tiling import share_columns

HERE = Path(__file__).parent
posix = pytest.mark.skipif(os.name != "posix", reason="this system neither forks nor sends signals")


def blas_threads() -> list[int]:
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


def run(script: str, *arguments: str, seconds: float = 120, **environment: str) -> None:
    """Runs a script, or with arguments a file of one, in a fresh Python."""
    command = [sys.executable, "-W", "ignore", *(arguments or ("-c", script))]
    done = subprocess.run(
        command, env=os.environ | environment, timeout=seconds, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Interrupts -----------------------------------------------------------------------------------


class Interrupter:
    """Raises KeyboardInterrupt at the n-th place where Python looks for signals in threads.py."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.last: dict[int, int] = {}  # the instruction before, of each frame

    def _here(self, frame) -> None:
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt

    def profile(self, frame, event: str, arg) -> None:
        # after a call of C's, and when one of Python's is entered or has returned
        if frame.f_code.co_filename == threads_module.__file__ and event != "c_call":
            self._here(frame)

    def trace(self, frame, event: str, arg):
        # after a jump back
        if frame.f_code.co_filename != threads_module.__file__:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            before = self.last.get(id(frame))
            self.last[id(frame)] = frame.f_lasti
            if before is not None and before in jumps(frame.f_code):
                self._here(frame)
        return self.trace


_jumps: dict[object, set[int]] = {}


def jumps(code) -> set[int]:
    if code not in _jumps:
        _jumps[code] = {i.offset for i in dis.get_instructions(code) if "BACKWARD" in i.opname}
    return _jumps[code]


def strike(call: Callable[[], object], n: int, way: str) -> bool:
    """Whether there was an n-th place at which call could be interrupted."""
    interrupter = Interrupter(n)
    install, before = {
        "profile": (sys.setprofile, sys.getprofile()),
        "trace": (sys.settrace, sys.gettrace()),
    }[way]
    try:
        install(getattr(interrupter, way))
        call()
    except KeyboardInterrupt:
        pass
    finally:
        install(before)
    return interrupter.left < 0


@pytest.mark.parametrize("way", ["profile", "trace"])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupt_anywhere_leaves_nothing_behind(way, threads):
    at_work: set[int] = set()
    caller = threading.get_ident()

    def columns(part, scratch):
        return part.stop - part.start

    def work(i, scratch):
        me = threading.get_ident()
        if me == caller:  # shared again, as the products of few rows are
            return i + sum(share_columns(columns, 64, threads_module.Scratch(2)))
        at_work.add(me)
        time.sleep(0.0005)
        at_work.discard(me)
        return i + 64

    def call():
        return run_pieces(work, range(4), threads)

    right = [64, 65, 66, 67]
    with threadpool_limits(3, user_api="blas"):
        before, n = blas_threads(), 0
        while strike(call, n, way):
            assert not at_work, n
            assert blas_threads() == before, n
            assert default_threads() == 3
            assert threads_module._limit.before is None
            n += 1
        assert call() == right
        assert blas_threads() == before
    assert n > (100 if way == "profile" else 5)


def test_interrupts_one_after_the_other_change_nothing(monkeypatch):
    # nobody who waits has the patience to press Ctrl-C only once
    caller, begun, at_work, strikes = threading.get_ident(), threading.Event(), [], 0

    def interrupt():
        nonlocal strikes
        if threading.get_ident() == caller and strikes < 50:
            strikes += 1
            raise KeyboardInterrupt

    class Turn:
        def __init__(self):
            self.lock = threading.RLock()

        def acquire(self, blocking=True):
            interrupt()
            acquired = self.lock.acquire(blocking)
            interrupt()
            return acquired

        def release(self):
            self.lock.release()

    class Threading:
        RLock = Turn

    def work(i, scratch):
        if threading.get_ident() == caller:
            assert begun.wait(20)
            raise KeyboardInterrupt
        at_work.append(i)
        begun.set()
        time.sleep(0.05)
        at_work.remove(i)

    with threadpool_limits(3, user_api="blas"):
        before = blas_threads()
        monkeypatch.setattr(threads_module, "threading", Threading)
        with pytest.raises(KeyboardInterrupt):
            run_pieces(work, range(2), 2)
        assert strikes == 50
        assert not at_work
        assert blas_threads() == before


def test_a_call_that_could_not_end_is_forgotten(monkeypatch):
    # as if interrupted more often than anybody would: the next call restores
    def interrupted(self):
        raise KeyboardInterrupt

    with threadpool_limits(3, user_api="blas"):
        before = blas_threads()
        with monkeypatch.context() as patch:
            patch.setattr(threads_module._Call, "end", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_pieces(lambda i, scratch: i, range(2), 2)
        assert default_threads() == 3
        gc.collect()
        assert run_pieces(lambda i, scratch: i, range(2), 2) == [0, 1]
        assert blas_threads() == before


@posix
def test_a_hundred_interrupts_at_random_moments():
    run("", str(HERE / "interrupt_campaign.py"), "--count", "100", "--seed", "1", seconds=600)


# Nothing grows -------------------------------------------------------------------------------


def tasks() -> int:
    """Threads of this process, whoever started them, without the helpers that wait for work."""
    folder = Path("/proc/self/task")
    there = len(threads_module._helpers.there)
    return (len(list(folder.iterdir())) if folder.is_dir() else threading.active_count()) - there


def settled(limit: int) -> bool:
    """Whether no more are left than that, once those that were one too many have ended."""
    for _ in range(1000):
        if tasks() <= limit:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def fresh(monkeypatch):
    """No helpers yet, and the number of other threads."""
    monkeypatch.setattr(threads_module, "_helpers", threads_module._Helpers())
    monkeypatch.setattr(threads_module._limit, "most_helpers", 0)
    return tasks()


def test_a_thousand_calls_leave_three_helpers_and_no_memory(fresh):
    def call():
        assert run_pieces(lambda i, scratch: i, range(12), 4) == list(range(12))

    for _ in range(20):
        call()
    gc.collect()
    tracemalloc.start()
    try:
        call()
        held = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            call()
        for _ in range(200):  # on a busy machine, helpers come late to calls that are over
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - held
            if grown < 50_000:
                break
            time.sleep(0.05)
    finally:
        tracemalloc.stop()
    assert grown < 50_000  # 50 bytes a call
    assert settled(fresh)
    assert len(threads_module._helpers.there) <= 3


def test_helpers_are_as_many_as_calls_at_once_ask_for(fresh):
    both = threading.Barrier(2, timeout=60)

    def work(i, scratch):
        if i == 0:
            both.wait()  # two calls at once
        time.sleep(0.001)

    def calls():
        for _ in range(20):
            run_pieces(work, range(20), 3)

    callers = [threading.Thread(target=calls) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert settled(fresh)
    assert len(threads_module._helpers.there) <= 4
    assert threads_module._limit.most_helpers <= 4


def test_helpers_that_wait_hold_nothing_of_the_call():
    class Result:
        pass

    made = run_pieces(lambda i, scratch: time.sleep(0.001) or Result(), range(20), 3)
    left = [weakref.ref(result) for result in made]
    made.clear()
    for _ in range(1000):
        gc.collect()
        if not any(ref() for ref in left):
            break
        time.sleep(0.01)
    assert not any(ref() for ref in left)


# Forks and the end ----------------------------------------------------------------------------

COMMON = """
import os, sys, threading, time, signal
import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits
from pvt_ref.kernels.cpu.threads import default_threads, run_pieces
limits = threadpool_limits(3, user_api="blas")
def blas():
    return {i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}
def square(i, scratch):
    return i * i
def sound():
    assert blas() == {3}, blas()
    assert default_threads() == 3
    assert run_pieces(square, range(50), 3) == [i * i for i in range(50)]
    assert blas() == {3}, blas()
def in_child(check):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            check()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
"""


@posix
def test_a_forked_child_computes():
    run(COMMON + "sound(); in_child(sound); sound()")


@posix
def test_a_child_forked_while_other_threads_compute_computes():
    script = """
images = np.zeros((2, 64, 64))
stop = threading.Event()
def busy():
    while not stop.is_set():
        run_pieces(lambda i, scratch: images[0] @ images[1], range(6), 3)
others = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
for other in others: other.start()
for _ in range(20):
    in_child(sound)
stop.set()
for other in others: other.join()
sound()
"""
    run(COMMON + script)


@posix
def test_a_child_forked_by_a_piece_goes_on_or_says_that_it_cannot():
    script = """
caller = threading.get_ident()
helping, leave = threading.Event(), threading.Event()
def alone(i, scratch):
    if i == 0:
        in_child(sound)
    return i
def forks(i, scratch):
    if i == 0:
        return os.fork()
    return i
results = run_pieces(forks, range(4), 1)
if results[0] == 0:  # the child has all pieces
    assert results == [0, 1, 2, 3]
    sound()
    os._exit(0)
_, status = os.waitpid(results[0], 0)
assert status == 0, status
def forks_amid_help(i, scratch):
    if threading.get_ident() != caller:
        helping.set()
        leave.wait(20)
        return i
    assert helping.wait(20)
    child = os.fork()
    leave.set()
    return child
parent = os.getpid()
try:
    child = max(run_pieces(forks_amid_help, range(2), 2))
except RuntimeError as error:  # what the helper had is lost
    assert os.getpid() != parent and "forked amid this call" in str(error), error
    sound()
    os._exit(0)
assert os.getpid() == parent
_, status = os.waitpid(child, 0)
assert status == 0, status
sound()
"""
    run(COMMON + script)


def test_the_interpreter_ends_while_threads_compute():
    script = """
import atexit
images = np.zeros((2, 64, 64))
def busy():
    while True:
        run_pieces(lambda i, scratch: images[0] @ images[1], range(6), 3)
for _ in range(2):
    threading.Thread(target=busy, daemon=True).start()
atexit.register(lambda: run_pieces(square, range(50), 3))
time.sleep(0.05)
"""
    for _ in range(3):
        run(COMMON + script)


def test_after_the_last_thread_could_be_started_the_caller_does_it_all():
    script = """
class Last:
    def __del__(self):
        assert run_pieces(square, range(9), 3) == [i * i for i in range(9)]
        print("computed")
sys.last = Last()  # goes when the modules do
"""
    run(COMMON + script)
