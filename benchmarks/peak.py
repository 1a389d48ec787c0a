"""How much memory this process takes, and how far one run raises it above what was held before."""

import contextlib
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_mib() -> float:
    """Most memory that this process ever had in use, in MiB.

    Linux hands ru_maxrss on from the process that started this one, and that one may be larger;
    the kernel's own account of this program does not.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def resident_mib() -> float:
    """What this process has in memory now, in MiB; where the system does not say, its peak."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 2**10
    return peak_mib()


def growth_mib(run: Callable[[], Any]) -> float:
    """Most that the process holds during a run, less what it held before it, in MiB.

    Linux begins its account of the peak anew when asked. Elsewhere a peak from before hides a lower
    one: run this in a process that has done nothing large.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_mib()
    run()
    return peak_mib() - before
