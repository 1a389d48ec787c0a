"""A process that keeps one core busy, to measure times on a machine with other work."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: It checks now and then that its parent lives, so it ends even if the benchmark is killed.
SPIN = """
import os, sys
core, parent = map(int, sys.argv[1:])
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {core})
print("spinning", flush=True)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def busy_core() -> Iterator[subprocess.Popen]:
    """Inside this context, a Python loop runs on the last of the allowed cores."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    command = [sys.executable, "-c", SPIN, str(core), str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # from here on it spins
            yield process
            if process.poll() is not None:
                raise RuntimeError(f"the busy process ended early, with status {process.poll()}")
        finally:
            process.kill()
