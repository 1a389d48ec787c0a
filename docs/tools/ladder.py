"""What the course shows of kernels in CUDA C++: their text as it is, and what each step took.

Everything here returns text; pages print it.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from pvt_ref.kernels.cuda.ladder.step import Step
from pvt_ref.kernels.cuda.launch import HERE

RESULTS = Path(__file__).parents[1] / "results"

NOT_YET = "not measured yet"


def listing(file: str, *kernels: str) -> str:
    """The kernels of a .cu file, by their names; without names all of it but its first comment.

    A line above names the file and links the reference of the module that launches it.
    """
    text = (HERE / file).read_text(encoding="utf-8")
    if kernels:
        found = [
            re.search(
                rf'^(?://[^\n]*\n)*extern "C" __global__[^{{]*\b{name}\(.*?^}}\n', text, _LINES
            )
            for name in kernels
        ]
        assert all(found), f"{file} has not all of {kernels}"
        text = "\n".join(match[0] for match in found if match)
    else:
        text = re.sub(r"\A(?://.*\n)+\n*", "", text)
    launched_by = "pvt_ref.kernels.cuda." + re.sub(r"(_\d\w*)?\.cu$", "", file).replace("/", ".")
    name = f"[`pvt_ref/kernels/cuda/{file}`][{launched_by}]{{ .listing }}"
    return f"{name}\n\n```cpp\n{text.rstrip()}\n```\n"


_LINES = re.DOTALL | re.MULTILINE


def measured(results: Path = RESULTS) -> dict | None:
    """What benchmarks/gpu_ladder.py stored, or None."""
    path = results / "gpu_ladder.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def figures(ladder: str, steps: Sequence[Step], results: Path = RESULTS) -> str:
    """A table of the steps and their times; where nothing was measured, it says so."""
    found = measured(results)
    if found is None:
        rows = [f"| {k}. {step.title} | {NOT_YET} |" for k, step in enumerate(steps, start=1)]
        return "\n".join(["| step | time |", "| --- | --- |", *rows, ""])
    return figures_of(found, ladder, steps)


def figures_of(found: dict, ladder: str, steps: Sequence[Step]) -> str:
    """Microseconds of each step in each case, and the share of the bound that it reaches."""
    by_place = {(row["step"], row["case"]): row for row in found["rows"] if row["ladder"] == ladder}
    cases = list(dict.fromkeys(case for _, case in by_place))
    rows = [f"| step | {' | '.join(cases)} |", f"| --- |{' --- |' * len(cases)}"]
    for k, step in enumerate(steps, start=1):
        cells = [_cell(by_place.get((step.title, case)), found["ceilings"]) for case in cases]
        rows.append(f"| {k}. {step.title} | {' | '.join(cells)} |")
    on = found["machine"]
    rows += [
        "",
        f"Measured on one {on['gpu']} on {on['date']}, commit {on['commit']}, by device events; in "
        "brackets the share of the bound by bytes or by operations, whichever is larger.",
        "",
    ]
    return "\n".join(rows)


def bound(row: dict, ceilings: dict) -> float:
    """The seconds that a step takes at least, by what the device was seen to reach."""
    by_bytes = row["bytes"] / ceilings["bytes_per_second"]
    return max(by_bytes, row["operations"] / ceilings["operations_per_second"])


def _cell(row: dict | None, ceilings: dict) -> str:
    if row is None:
        return NOT_YET
    if "not_run" in row:
        return row["not_run"]
    return f"{1e6 * row['seconds']:,.1f} µs ({bound(row, ceilings) / row['seconds']:.0%})"
