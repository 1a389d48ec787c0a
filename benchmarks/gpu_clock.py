"""The device's own clock: events that the device records when it reaches them.

The time between two events includes the device's work and waiting in between, but not the host's
delay in reading a clock.
"""

from collections.abc import Callable
from typing import Any, Protocol

#: A kernel that does nothing for so long: while it runs, the host can queue what is timed, so that
#: kernels which take less time than their launch follow one another without a gap. It reads the
#: device's nanoseconds, since CUDA 13 no longer tells how fast clock64() ticks.
_SPIN = r"""
extern "C" __global__ void spin(unsigned long long nanoseconds)
{
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); while (now - begin < nanoseconds);
}
"""


class Clock(Protocol):
    """A device that can record when it reaches a place in its queue."""

    def note(self) -> Any:
        """An event at this place of the queue."""

    def wait(self) -> None:
        """Returns when the queue is empty."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Time between two events that the device has reached."""
        ...

    def hold(self) -> None:
        """Keeps the device busy for some milliseconds."""


class CupyClock:
    """The clock of CuPy's current device and stream."""

    def __init__(self, cupy: Any, milliseconds: float = 5.0) -> None:
        self.cupy, self.spin = cupy, cupy.RawKernel(_SPIN, "spin")
        self.nanoseconds = int(1e6 * milliseconds)

    def note(self) -> Any:
        event = self.cupy.cuda.Event()
        event.record()
        return event

    def wait(self) -> None:
        self.cupy.cuda.get_current_stream().synchronize()

    def seconds(self, begin: Any, end: Any) -> float:
        return self.cupy.cuda.get_elapsed_time(begin, end) / 1e3

    def hold(self) -> None:
        import numpy as np

        self.spin((1,), (1,), (np.uint64(self.nanoseconds),))


class TorchClock:
    """The clock of PyTorch's current device and stream."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch

    def note(self) -> Any:
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        self.torch.cuda.synchronize()

    def seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3

    def hold(self) -> None:
        self.torch.cuda._sleep(10_000_000)


def time_calls(
    run: Callable[[], Any], clock: Clock, seconds: float, least: int = 5, most: int = 200
) -> list[float]:
    """Times of single calls on a device with nothing else to do, launches included.

    The calls take about the given seconds together, within the given numbers of calls.
    """
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds and len(times) < most):
        clock.wait()
        begin = clock.note()
        run()
        end = clock.note()
        clock.wait()
        times.append(clock.seconds(begin, end))
    return times


def time_in_a_row(
    runs: list[Callable[[], Any]], clock: Clock, repeats: int = 20, rounds: int = 7
) -> list[float]:
    """Seconds of one of these calls, when the device runs all of them in turn without waiting.

    The calls do the same in different memory, together more than a cache holds. One time for
    each round.
    """
    times = []
    for run in runs:
        run()  # compiles, and warms up
    for _ in range(rounds):
        clock.wait()
        clock.hold()
        begin = clock.note()
        for k in range(repeats):
            runs[k % len(runs)]()
        end = clock.note()
        clock.wait()
        times.append(clock.seconds(begin, end) / repeats)
    return times
