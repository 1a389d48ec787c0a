"""The device's own clock: events that it notes as it comes to them.

A time between two events holds what the device did and what it waited for in between, but not how
long the host took to look at a clock.
"""

from collections.abc import Callable
from typing import Any, Protocol

#: A kernel that does nothing for so many ticks: while it runs, the host can queue what is timed, so
#: that kernels which take less time than their launch follow one another without a gap.
_SPIN = r"""
extern "C" __global__ void spin(long long ticks)
{
    long long begin = clock64();
    while (clock64() - begin < ticks) {}
}
"""


class Clock(Protocol):
    """A device that can note when it comes to a place in its queue."""

    def note(self) -> Any:
        """An event at this place of the queue."""

    def wait(self) -> None:
        """Returns when the queue is empty."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two events that the device has come to."""
        ...

    def hold(self) -> None:
        """Keeps the device busy for some milliseconds."""


class CupyClock:
    """Of CuPy's current device and stream."""

    def __init__(self, cupy: Any, milliseconds: float = 5.0) -> None:
        self.cupy = cupy
        device = cupy.cuda.runtime.getDevice()
        kilohertz = cupy.cuda.runtime.getDeviceProperties(device)["clockRate"]
        self.ticks, self.spin = int(milliseconds * kilohertz), cupy.RawKernel(_SPIN, "spin")

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

        self.spin((1,), (1,), (np.int64(self.ticks),))


class TorchClock:
    """Of PyTorch's current device and stream."""

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

    As many calls as take so many seconds together, but at least and at most so many.
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
    """Seconds of one of these calls, when the device does all of them in turn without waiting.

    The calls do the same in different memory, more of it together than a cache holds. One time for
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
