"""Checks that tests cover enough lines and branches. Reads the output of ``coverage json``.

    python tools/coverage_floors.py coverage.json

Tests must cover every line and branch of the layers, blocks, heads and models, and 95 % of the
package, since some lines of kernels run only on a GPU. Uncovered lines are listed by file.
"""

import json
import sys
from pathlib import Path
from typing import Any

#: Parts of the package, by path prefix, and the coverage that each must have, in %.
FLOORS = {
    "pvt_ref/layers/": 100,
    "pvt_ref/blocks/": 100,
    "pvt_ref/heads/": 100,
    "pvt_ref/models/": 100,
    "pvt_ref/": 95,
}


def missing(file: dict[str, Any]) -> str:
    """Lines that were not run, and branches that were not taken, ``3, 12-14, 20->25``."""
    runs: list[list[int]] = []
    for line in file["missing_lines"]:
        if runs and runs[-1][-1] == line - 1:
            runs[-1].append(line)
        else:
            runs.append([line])
    lines = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    gone = set(file["missing_lines"])
    # leaves out branches into or out of a listed line; a negative end is an exit
    branches = [
        f"{start}->{'exit' if end < 0 else end}"
        for start, end in file["missing_branches"]
        if start not in gone and end not in gone
    ]
    return ", ".join([*lines, *branches])


def judge(report: dict[str, Any], floors: dict[str, int]) -> tuple[list[str], bool]:
    """Lines to print, and whether every floor is reached.

    Args:
        report: the output of ``coverage json``, with branches.
        floors: per cent by path prefix.

    Raises:
        ValueError: if branches were not measured, or a part has no files, so that its floor would
            always be reached.
    """
    if not report["meta"].get("branch_coverage"):
        raise ValueError("branches were not measured; run coverage with branch = true")
    told, held = [], True
    for part, floor in floors.items():
        files = {
            path: file
            for path, file in sorted(report["files"].items())
            if path.replace("\\", "/").startswith(part)
        }
        totals = [file["summary"] for file in files.values()]
        wanted = sum(x["num_statements"] + x["num_branches"] for x in totals)
        if not wanted:
            raise ValueError(f"no file of {part} was measured; run coverage where it lies")
        run = sum(x["covered_lines"] + x["covered_branches"] for x in totals)
        enough = 100 * run >= floor * wanted
        held &= enough
        told.append(f"{part:<17} {100 * run / wanted:6.2f} %, needs {floor} %")
        if not enough:
            lacking = {path: missing(file) for path, file in files.items()}
            told += [f"    {path}: {lines}" for path, lines in lacking.items() if lines]
    return told, held


def main() -> int:
    """Prints the coverage of each part; the exit status is 1 if it is too low."""
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    told, held = judge(report, FLOORS)
    print("\n".join(told))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
