"""Writes tools/locked/: for every extra of pyproject.toml, all required files with their hashes.

    pip install uv && python tools/lock.py

The releases are those of constraints.txt, for every Python from 3.11.2 on and every platform. pip
verifies hashes only of files, not of a checkout, so the targets of the Makefile install one of
these lists first, and then the project alone. PyTorch and CUDA's libraries are not included: its
CPU and CUDA builds have the same version but different hashes.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("examples", "test", "bench", "docs", "site", "lint", "mutation", "coverage", "fuzz")
UNLOCKED = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
HEAD = """\
# What `make` installs for the extra '{extra}', and hatchling and editables to build the project.
# Made by tools/lock.py from pyproject.toml and constraints.txt; do not edit.
"""


def lock(extra: str) -> str:
    """The list for one extra, in the format of pip's --require-hashes."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "pyproject.toml", "-"]
    command += ["--extra", extra, "--constraint", "constraints.txt"]
    command += ["--universal", "--python-version", "3.11.2", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--no-emit-index-url"]
    builds = "hatchling\neditables\n"
    done = subprocess.run(
        command, cwd=ROOT, input=builds, stdout=subprocess.PIPE, text=True, check=True
    )
    packages = re.split(r"\n(?=\S)", done.stdout.rstrip("\n"))
    kept = [package for package in packages if not UNLOCKED.match(package)]
    return HEAD.format(extra=extra) + "\n" + "\n".join(kept) + "\n"


def main() -> None:
    """Writes all lists."""
    folder = ROOT / "tools" / "locked"
    folder.mkdir(exist_ok=True)
    for extra in EXTRAS:
        (folder / f"{extra}.txt").write_text(lock(extra), encoding="utf-8")
        print(f"tools/locked/{extra}.txt")


if __name__ == "__main__":
    main()
