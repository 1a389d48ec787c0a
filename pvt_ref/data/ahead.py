"""Photos read and decoded by threads, ahead of the training step that uses them.

Decoding releases the interpreter lock, so it runs in parallel with a step. The result for a photo
depends only on its own draws: neither the number of threads nor their order changes a bit. At most
a few batches are in memory, however many photos there are.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from pvt_ref.data.samples import Samples
from pvt_ref.kernels.cpu.threads import default_threads


def in_order(
    function: Callable[..., Any], items: Iterable[Any], ahead: int, workers: int | None = None
) -> Generator[Any, None, None]:
    """function(item) of every item, in order, computed by threads up to ahead items in advance.

    An error of function is raised when its turn comes. Closing the iterator ends the threads.
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
    """Threads that decode; None for the kernels' number, at most 16.

    At the end of its ``with``, tasks that have not begun are cancelled.
    """

    def __init__(self, workers: int | None = None) -> None:
        super().__init__(workers or min(16, default_threads()), "pvt_ref-decode")

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=True, cancel_futures=True)


class Ahead(Samples):
    """Samples that read and decode the pixels of coming steps while the present one computes.

    Samples in memory pass through unchanged. A context manager, which ends its threads.

    Attributes:
        waited: seconds that steps have waited for pixels so far.

    Args:
        data: the samples.
        workers: threads, as of :class:`Pool`.
    """

    __slots__ = (
        *("_asked", "_data", "_futures", "_pool"),
        *("has_label_maps", "labels", "preprocessing", "waited"),
    )

    def __init__(self, data: Samples, workers: int | None = None) -> None:
        self._data, self.preprocessing = data, data.preprocessing
        self.has_label_maps = data.has_label_maps
        if not data.has_label_maps:
            self.labels = data.labels
        self._pool = Pool(workers) if data.from_files else None
        self._futures: dict[tuple[int, int, int], Future[np.ndarray]] = {}
        self.waited = 0.0
        self._asked = 0.0, time.monotonic()  # seconds waited at the last query, and its time

    def __len__(self) -> int:
        return len(self._data)

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._futures.clear()
        if self._pool is not None:
            self._pool.__exit__()

    def share_waited(self) -> float:
        """The share of time, since the last call, that steps waited for pixels."""
        (waited, since), now = self._asked, time.monotonic()
        self._asked = self.waited, now
        return min(1.0, (self.waited - waited) / max(now - since, 1e-9))

    def expect(self, chosen: np.ndarray, seed: int, epoch: int) -> None:
        """Starts reading samples that a coming step will draw, unless they are being read."""
        if self._pool is None:
            return
        for i in chosen.tolist():
            if (seed, epoch, i) not in self._futures:
                drawn = self._pool.submit(self._data.drawn_pixels, np.array([i]), seed, epoch)
                self._futures[seed, epoch, i] = drawn

    @property
    def size(self) -> tuple[int, int]:
        """As of the samples."""
        return self._data.size

    def check_fits(self, config: Any, name: str) -> None:
        """As of the samples."""
        self._data.check_fits(config, name)

    def pixels(self, chosen: np.ndarray | slice) -> np.ndarray:
        """As of the samples."""
        return self._data.pixels(chosen)

    def drawn_pixels(self, chosen: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """As of the samples; waits for what is still being read."""
        if self._pool is None:
            return self._data.drawn_pixels(chosen, seed, epoch)
        self.expect(chosen, seed, epoch)
        futures = [self._futures.pop((seed, epoch, i)) for i in chosen.tolist()]
        start = time.monotonic()
        try:
            return np.concatenate([future.result() for future in futures])
        finally:
            self.waited += time.monotonic() - start

    def describe(self) -> dict[str, Any]:
        """As of the samples."""
        return self._data.describe()
