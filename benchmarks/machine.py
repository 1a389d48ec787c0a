"""What a benchmark ran on: to be printed beside every figure."""

import contextlib
import datetime
import os
import platform
import re
from pathlib import Path

import pvt_ref


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def describe_machine(threads: int) -> dict:
    from threadpoolctl import threadpool_info

    blas = sorted({f"{i['internal_api']} {i['version']}, {i.get('architecture', '')} kernels"
                   for i in threadpool_info() if i["user_api"] == "blas"})  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "machine": platform.machine(),
        "system": platform.system(),
        "memory_gib": round(memory, 1),
        "threads": threads,
        "cores": cores(),
        "python": platform.python_version(),
        "pvt_ref": pvt_ref.__version__,
        "blas": blas,
    }
