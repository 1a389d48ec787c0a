"""The machine that a benchmark ran on, to be printed beside every figure."""

import contextlib
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import pvt_ref


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        names = ("model name", "cpu family", "model")  # a virtual machine often hides the name
        found = [re.search(rf"^{name}\s*:\s*(.+)", text, flags=re.MULTILINE) for name in names]
        values = [match[1] for match in found if match]
        if len(values) == len(names):
            name, family, model = values
            return f"{name}, family {family}, model {model}"
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the code, and whether it has been changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]

    def says(*words: str) -> str:
        return subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        changed = says("diff", "HEAD", "--", "../pvt_ref")
        return says("rev-parse", "--short", "HEAD").strip() + (", changed" if changed else "")
    return "not known"


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
        "commit": commit(),
        "blas": blas,
    }
