"""Photos read and decoded by threads, ahead of the step that learns from them.

Decoding releases the interpreter lock, so it goes on beside a step. What a photo becomes depends on
its own draws only: neither the number of threads nor their order changes a bit. At most a few
batches are in memory, however many photos there are.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def default_workers() -> int:
    """Threads that decode: as many as the process has cores, at most 16."""
    if hasattr(os, "sched_getaffinity"):
        return min(16, len(os.sched_getaffinity(0)))
    return min(16, os.cpu_count() or 1)


def in_order(
    function: Callable[..., Any], items: Iterable[Any], ahead: int, workers: int | None = None
) -> Generator[Any, None, None]:
    """function(item) of every item, in their order, by threads that are so many items ahead.

    What function raises is raised when its turn comes. Closing the iterator ends the threads.
    """
    with Pool(workers) as pool:
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Pool(ThreadPoolExecutor):
    """Threads that decode. At the end of its ``with``, what was not begun is not done any more."""

    def __init__(self, workers: int | None = None) -> None:
        super().__init__(workers or default_workers(), thread_name_prefix="pvt_ref-decode")

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=True, cancel_futures=True)


class Waited:
    """How long somebody waited for results."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._then = (0.0, time.monotonic())

    def result(self, future: Future[Any]) -> Any:
        """The result, or what was raised instead."""
        start = time.monotonic()
        try:
            return future.result()
        finally:
            self.seconds += time.monotonic() - start

    def share(self) -> float:
        """Of the time since this was asked last, or since the beginning; from 0 to 1."""
        (waited, since), now = self._then, time.monotonic()
        self._then = (self.seconds, now)
        return min(1.0, (self.seconds - waited) / max(now - since, 1e-9))
