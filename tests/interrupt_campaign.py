"""Interrupts forwards, backwards, loads and saves at random moments; the process must stay sound.

    python tests/interrupt_campaign.py --count 5000 --seed 0

An interrupt is what Ctrl-C does: a signal whose handler raises KeyboardInterrupt wherever the main
thread is; sometimes several follow each other within milliseconds. A quarter of the computations
run in another thread, which gets the exception by PyThreadState_SetAsyncExc, as timeouts of
notebooks and servers do it. After each one: BLAS has as many threads as before, no helper is
at work, no thread is left over, the next computation gives the right bits, the saved file is whole,
and no other file lies beside it. A step that takes a minute ends the campaign with a traceback of
every thread.

This needs a POSIX system: elsewhere no timer interrupts a process.
"""

import argparse
import ctypes
import faulthandler
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

import pvt_ref
from pvt_ref import VARIANTS, Model
from pvt_ref.kernels.cpu import threads, tiling
from pvt_ref.tree import named_arrays

CONFIG = replace(
    VARIANTS["pvt_tiny"],
    img_size=32,
    embed_dims=(8, 12, 20, 32),
    num_heads=(1, 2, 5, 4),
    depths=(1, 1, 1, 1),
    num_classes=7,
)
MODEL = Model(pvt_ref.init_params(CONFIG, np.random.default_rng(0)), CONFIG)
IMAGES = np.random.default_rng(1).normal(size=(3, 3, 64, 64)).astype(np.float32)
OPS = pvt_ref.blocked_ops(3, elements=1024)

_helpers: set[int] = set()  # that are at work in this moment


def watch_helpers() -> None:
    """From now on every piece that another thread than its caller has is entered in _helpers."""
    run_pieces = tiling.run_pieces

    def watched(work, pieces, threads):
        caller = threading.get_ident()

        def entered(piece, scratch):
            me = threading.get_ident()
            if me == caller:
                return work(piece, scratch)
            _helpers.add(me)
            try:
                return work(piece, scratch)
            finally:
                _helpers.discard(me)

        return run_pieces(entered, pieces, threads)

    tiling.run_pieces = watched


def blas_threads() -> list[int]:
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


def tasks() -> int:
    """Threads of this process, whoever started them, without the helpers that wait for work."""
    folder, there = Path("/proc/self/task"), len(threads._helpers.there)
    return (len(list(folder.iterdir())) if folder.is_dir() else threading.active_count()) - there


def bits(arrays: Any) -> bytes:
    return b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)


class Operations:
    """What is interrupted, as functions without arguments that return the bits of their result."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.safetensors"
        pvt_ref.save(self.path, MODEL)
        logits, self.cache = pvt_ref.forward_with_cache(MODEL.params, IMAGES, CONFIG, ops=OPS)
        self.dlogits = np.ones_like(logits)

    def forward(self) -> bytes:
        return bits([pvt_ref.forward(MODEL.params, IMAGES, CONFIG, ops=OPS)])

    def backward(self) -> bytes:
        grads, dimages = pvt_ref.backward(MODEL.params, self.cache, self.dlogits, CONFIG)
        return bits([dimages, *(x for _, x in named_arrays(grads))])

    def save(self) -> bytes:
        pvt_ref.save(self.path, MODEL)
        return b""

    def load(self) -> bytes:
        return bits(x for _, x in named_arrays(pvt_ref.load(self.path).params))


# Interrupting ---------------------------------------------------------------------------------


class Ctrl:
    """The handler: raises so many times, and only where a frame of ``interruptible`` is below."""

    left = 0

    def __call__(self, signum: int, frame: Any) -> None:
        while frame is not None and frame.f_code is not interruptible.__code__:
            frame = frame.f_back
        if frame is not None and self.left > 0:
            self.left -= 1
            raise KeyboardInterrupt


CTRL_C = Ctrl()


def interruptible(operation: Callable[[], bytes]) -> bytes:
    return operation()


def by_signal(operation: Callable[[], bytes], delay: float, times: int, gap: float) -> bool:
    """Whether the operation was interrupted."""
    CTRL_C.left = times
    signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6), gap)
    try:
        interruptible(operation)
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    return False


def in_thread(operation: Callable[[], bytes], delay: float) -> bool:
    """The same for an operation in another thread."""
    outcome: list[str] = []

    def call() -> None:
        try:
            try:
                operation()
            except KeyboardInterrupt:
                outcome.append("interrupted")
        except KeyboardInterrupt:  # while it noted that it was
            outcome.append("interrupted")

    _strayed.clear()
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert thread.ident is not None
    time.sleep(delay)
    if thread.is_alive() and not outcome:
        ident = ctypes.c_ulong(thread.ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))
    thread.join()
    assert not _strayed or sys.version_info < (3, 12), _strayed
    return bool(outcome)


_strayed: list[Any] = []


def unraisable(hook: Any) -> None:
    """Python 3.11 may give the exception to a thread that the one it is for is just starting."""
    _strayed.append(hook.exc_type)
    if hook.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(hook)


# What must hold afterwards --------------------------------------------------------------------


def settled(limit: int) -> bool:
    """Whether there are no more threads than that, once those that found nothing to do are gone."""
    for _ in range(200):
        if tasks() <= limit:
            return True
        time.sleep(0.01)
    return False


def campaign(count: int, seed: int, folder: Path) -> Counter:
    """Returns how many of each operation were interrupted, by what.

    Raises:
        AssertionError: if an interrupt left something behind.
    """
    rng = random.Random(seed)
    operations = Operations(folder)
    watch_helpers()
    named = {name: getattr(operations, name) for name in ("forward", "backward", "save", "load")}
    right, seconds = {}, {}
    for name, operation in named.items():
        right[name] = operation()
        start = time.perf_counter()
        for _ in range(5):
            assert operation() == right[name], name
        seconds[name] = (time.perf_counter() - start) / 5
    faulthandler.dump_traceback_later(60, exit=True)  # has a thread of its own
    before, others = blas_threads(), tasks()
    files = sorted(p.name for p in folder.iterdir())
    assert set(before) == {3}, before
    signal.signal(signal.SIGALRM, CTRL_C)
    sys.unraisablehook = unraisable
    # most of the time is given to what shares its work
    names = ["forward"] * 3 + ["backward"] * 3 + ["save", "load"] * 2
    interrupts: Counter = Counter()
    while interrupts.total() < count:
        faulthandler.dump_traceback_later(60, exit=True)
        name = rng.choice(names)
        delay = rng.uniform(0, 1.1 * seconds[name])
        computes = name in ("forward", "backward")
        times = rng.choice([1, 1, 1, 2, 5]) if computes else 1
        if computes and rng.random() < 0.25:
            way, hit = "exception in a thread", in_thread(named[name], delay)
        else:
            way = "signal" if times == 1 else "several signals"
            hit = by_signal(
                named[name], delay, times, 0.0 if times == 1 else rng.uniform(2e-4, 5e-3)
            )
        said = f"{name}, {way}, after {interrupts.total()} interrupts, seed {seed}"
        assert not _helpers, f"{said}: helpers at work"
        assert blas_threads() == before, f"{said}: BLAS has {blas_threads()} threads"
        interrupts[name, way] += hit
        if hit:
            assert sorted(p.name for p in folder.iterdir()) == files, (
                f"{said}: {os.listdir(folder)}"
            )
            after = rng.choice(["forward", "backward"]) if name != "save" else "load"
            assert named[after]() == right[after], f"{said}: wrong bits from {after}"
        assert settled(others), f"{said}: {tasks()} other threads, {others} before"
        assert len(threads._helpers.there) <= 2, f"{said}: {len(threads._helpers.there)} helpers"
        if interrupts.total() % 500 == 0:
            gc.collect()
    faulthandler.cancel_dump_traceback_later()
    return interrupts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="interrupts that strike")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not hasattr(signal, "setitimer"):
        sys.exit("this system has no timer that could interrupt")
    # three, so that a restored number can be told from one and from the number of cores
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(3, user_api="blas"):
        interrupts = campaign(args.count, args.seed, Path(folder))
    for (name, way), struck in sorted(interrupts.items()):
        print(f"{name:10} {way:24} {struck:6}")
    print(f"{interrupts.total()} interrupts; everything as before after each")


if __name__ == "__main__":
    main()
