"""Memory of this process, and how much one run adds to it."""

import contextlib
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_mib() -> float:
    """Peak memory of this process, in MiB.

    On Linux, ru_maxrss is inherited from the process that started this one, which may be larger;
    the kernel's own record of this program is not.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def resident_mib() -> float:
    """Current memory of this process in MiB, or its peak if the system does not report it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 2**10
    return peak_mib()


def growth_mib(run: Callable[[], Any]) -> float:
    """Peak memory of the process during a run, less the memory before it, in MiB.

    Linux can reset its record of the peak. Elsewhere an earlier peak hides a lower one, so run this
    in a process that has not used much memory before.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_mib()
    run()
    return peak_mib() - before
