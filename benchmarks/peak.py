"""How far one run raises the memory of this process above what it held before."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import peak_mib


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
