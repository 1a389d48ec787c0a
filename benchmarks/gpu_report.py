"""Tables of the measurements on a GPU.

python benchmarks/gpu_report.py        renews them from the files in docs/results/

gpu_kernels.md shows the measurements of gpu.py and gpu_ladder.py, and says what they left out;
gpu_tables.md and a picture show gpu.json: times of an earlier commit, without kernels.
"""

import importlib
import json
import re
import sys
from pathlib import Path

from gpu_worker import side_of
from report import (
    RESULTS,
    RIVAL,
    label,
    machine_line,
    markdown,
    plot_ratios,
    summary_table,
    time_tables,
)

from pvt_ref import VARIANTS

PRODUCTS = "matrix products"
#: Matches names of kernels that multiply matrices; PyTorch's patch embeddings are convolutions.
_PRODUCT = re.compile(r"gemm|gemv|cutlass|xmma|dot_kernel|splitK|dgrad|wgrad")


def kind(name: str) -> str:
    """The kind of a kernel: ``add`` for CuPy's ``cupy_add__float32_float32_float32``."""
    if _PRODUCT.search(name):
        return PRODUCTS
    if name.startswith("Mem"):
        return "copies and fills"
    cupy = re.match(r"cupyx?_(?:scipy_special_)?(\w+?)(?:__|$)", name)
    if cupy:
        return cupy[1]
    # "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, ...>(...)"
    own = re.match(r"(?:void )?(?:(?:\w+|\(anonymous namespace\))::)*(\w+)", name)
    return own[1] if own else name


def kernel_table(result: dict, most: int = 5) -> str:
    rows = []
    for case in result["kernels"]:
        for name, kernels in case["kernels"].items():
            count = sum(often for often, _ in kernels.values())
            whole = sum(seconds for _, seconds in kernels.values())
            spent = sorted(((s, k) for k, (_, s) in kernels.items()), reverse=True)[:most]
            largest = ", ".join(f"{k} {1e3 * s:.1f} ({s / whole:.0%})" for s, k in spent)
            rows.append([label(case), name, f"{count:,}", f"{1e3 * whole:.1f}", largest])
    headers = ["", "contender", "kernels", "device's ms", f"the {most} largest kinds"]
    return (
        "Kernels started by one call, and the time that the device works on them, without waiting "
        "for the next.\n\n" + markdown(headers, rows)
    )


def memory_table(result: dict) -> str:
    names = list(result["memory"][0]["mib"])
    rows = []
    for case in result["memory"]:
        rival = case["mib"][RIVAL]
        cells = [f"{mib:,.0f} ({mib / rival:.2f})" for mib in case["mib"].values()]
        rows.append([label(case), *cells])
    return (
        "MiB that the library's allocator held on the device after the call (PyTorch: the peak "
        "during it), including weights and images; in brackets the fraction of "
        f"{RIVAL}'s.\n\n" + markdown(["", *names], rows)
    )


def write_gpu_report(result: dict, folder: Path) -> None:
    """gpu_tables.md and the picture; the tables are printed too."""
    m = result["machine"]
    device = f"On one {m['gpu']}, driver {m['driver']}, CUDA runtime {m['cuda']}. "
    tables = [
        "# Times, memory and kernels on a GPU\n\n[How fast it is on a GPU](gpu.md) discusses these "
        "tables.\n",
        device + machine_line(result),
        summary_table(result, digits=1),
        time_tables(result),
        memory_table(result),
        kernel_table(result),
    ]
    text = "\n".join(tables)
    (folder / "gpu_tables.md").write_text(text)
    plot_ratios(result, folder / "gpu_ratios.svg")
    print(text)


# Kernels ------------------------------------------------------------------------------------------

WHATS = {"forward": "forward", "train": "forward + backward", "step": "step with AdamW"}

#: The columns, in this order: process, how the work is started, and the column's title.
COLUMNS = (
    ("pvt_ref", "captured", "pvt_ref, captured"),
    ("pvt_ref", "launched", "pvt_ref, launched"),
    ("PyTorch", "eager", "PyTorch eager"),
    ("PyTorch", "reduce-overhead", "torch.compile, reduce-overhead"),
    ("PyTorch", "max-autotune", "torch.compile, max-autotune"),
)


def case_of(row: dict) -> str:
    """A row's case, in words."""
    what = f"{row['model']}, {WHATS[row['what']]}, B = {row['batch']}"
    return what + ("" if row["precision"] == "float32" else f", {row['precision']}")


def by_size(rows: list[dict], cell) -> str:
    """A table for each size of the images."""
    sides = {row["model"]: side_of(VARIANTS[row["model"]]) for row in rows}
    tables = []
    for side in dict.fromkeys(sides.values()):
        own = [row for row in rows if sides[row["model"]] == side]
        tables.append(by_case(own, cell, f"{side}×{side}"))
    return "\n".join(tables)


def by_case(rows: list[dict], cell, title: str) -> str:
    """A table with a line for each case and a column for each contender that has a row."""
    shown = [c for c in COLUMNS if any((r["contender"], r["how"]) == c[:2] for r in rows)]
    lines = []
    for case in dict.fromkeys(map(case_of, rows)):
        own = {(r["contender"], r["how"]): r for r in rows if case_of(r) == case}
        lines.append([case, *(cell(own.get(c[:2]), own) for c in shown)])
    return markdown([title, *(name for _, _, name in shown)], lines)


def time_cell(row: dict | None, own: dict) -> str:
    """Milliseconds, and in brackets PyTorch eager's time over this one."""
    if row is None:
        return "not measured"
    if "not_run" in row:
        return "not run"
    eager = own.get(("PyTorch", "eager"), {}).get("seconds")
    ratio = f" ({eager / row['seconds']:.2f})" if eager else ""
    return f"{1e3 * row['seconds']:.3g} ms{ratio}"


def memory_cell(row: dict | None, own: dict) -> str:
    return f"{row['mib']:,.0f}" if row and "mib" in row else ""


def reasons(rows: list[dict]) -> str:
    """Which contenders did not run in which cases, and why; empty if all ran."""
    names = {(contender, how): name for contender, how, name in COLUMNS}
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "not_run" in row:
            place = names[row["contender"], row["how"]], row["not_run"]
            found.setdefault(place, []).append(case_of(row))
    if not found:
        return ""
    lines = [f"- {name}: {why} ({'; '.join(cases)})" for (name, why), cases in found.items()]
    return "Not run:\n\n" + "\n".join(lines) + "\n"


def not_reached(rows: list[dict], plan: list[dict]) -> str:
    """The rows of the plan that there are no results of, by case; nothing if there are none."""
    names = {(contender, how): name for contender, how, name in COLUMNS}
    done = {(case_of(row), row["contender"], row["how"]) for row in rows}
    left: dict[str, list[str]] = {}
    for row in plan:
        place = row["contender"], row["how"]
        if (case_of(row), *place) not in done:
            left.setdefault(case_of(row), []).append(names[place])
    if not left:
        return ""
    lines = [f"- {case}: {'; '.join(missing)}" for case, missing in left.items()]
    return "For these there was no time:\n\n" + "\n".join(lines) + "\n"


def check_table(checks: dict[str, dict]) -> str:
    """How the tests and compute-sanitizer ended, and what of them was not run."""
    lines = []
    for name in importlib.import_module("gpu").CHECKS:
        told = checks.get(name, {"not_run": "nobody asked for it"})
        if "not_run" in told:
            lines.append([name, f"not run: {told['not_run']}", ""])
        else:
            said = told["said"].replace("|", "\\|")
            lines.append([name, "passed" if told["passed"] else "**failed**", said])
    return markdown(["before anything was timed", "", "last line"], lines)


def error_table(rows: list[dict]) -> str:
    """The largest error of each contender and precision, over all comparisons."""
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        for quantity, error in row.get("errors", {}).items():
            place = row["contender"], row["precision"]
            worst[place] = max(worst.get(place, (0.0, "")), (error, f"{quantity}, {case_of(row)}"))
    lines = [[*place, f"{error:.1e}", where] for place, (error, where) in worst.items()]
    return markdown(["contender", "precision", "largest error", "of"], lines)


#: Rows of the plan that a page without results shows.
FIRST = 12


def kernels_page(result: dict | None, ladder: dict | None, plan: list[dict]) -> str:
    """The page: the measurements with machine and versions, or the beginning of gpu.py's plan."""
    in_all = len(plan)
    parts = [
        "# Kernels on a GPU\n\n[How fast it is on a GPU](gpu.md) discusses these tables, and the "
        "measurements before there were kernels. `benchmarks/gpu_report.py` wrote this page.\n"
    ]
    if result is None or not (result["rows"] or result.get("checks")):
        parts.append(
            "**Not measured yet.** `python benchmarks/gpu.py` runs the tests that need a device "
            "and compute-sanitizer. Then it times the kernels, launched and captured, beside "
            f"PyTorch eager and compiled: {in_all} rows, the most important first. None of this "
            "has been run with the code that stands here. The first rows:\n"
        )
        parts.append(markdown(list(plan[0]), [list(map(str, x.values())) for x in plan[:FIRST]]))
    else:
        m, rows = result["machine"], result["rows"]
        versions = "; ".join([f"commit {m['commit']}", *result["versions"].values()])
        left = in_all - len(rows)
        parts += [
            f"On one {m['gpu']}, driver {m['driver']}, CUDA runtime {m['cuda']}, {m['date']}, "
            f"{versions}. {len(rows)} of {in_all} rows were run"
            + (f"; the other {left} are named below.\n" if left else ".\n"),
            check_table(result.get("checks", {})),
        ]
        if rows:
            parts += [
                "Medians of single calls by device events, launches included. In brackets PyTorch "
                "eager's time over this one: above 1 is faster. PyTorch has fused attention.\n",
                by_size(rows, time_cell),
                reasons(rows),
                "MiB of the device that the work took, weights, images and what libraries keep for "
                "later included:\n",
                by_size([row for row in rows if "mib" in row], memory_cell),
                "Before anything was timed, results were compared with float64, relative L2:\n",
                error_table(rows),
            ]
        parts.append(not_reached(rows, plan))
    parts += ["## Steps of single kernels\n", ladder_tables(ladder)]
    return "\n".join(part for part in parts if part)


def ladder_tables(ladder: dict | None) -> str:
    """The times of gpu_ladder.py, in the course's format."""
    if ladder is None:
        return (
            "**Not measured yet.** `python benchmarks/gpu_ladder.py` times each version of a "
            "kernel that [the course](../course/gpu_ladder.md) builds up, beside what the device "
            "allows.\n"
        )
    sys.path.insert(0, str(RESULTS.parent / "tools"))
    figures = importlib.import_module("ladder").figures_of
    steps = importlib.import_module("gpu_ladder").LADDERS
    ceilings = ladder["ceilings"]
    seen = (
        f"Measured on this device, a copy moves {ceilings['bytes_per_second'] / 1e12:.2f} "
        f"terabytes a second (read and written), and matrix multiplication reaches "
        f"{ceilings['operations_per_second'] / 1e12:.0f} tera-operations a second in float32. "
        f"Times are those of one call among many without gaps between them.\n"
    )
    tables = [f"{name}:\n\n{figures(ladder, name, s)}" for name, s in steps.items() if s]
    return "\n".join([seen, *tables])


def read(file: Path) -> dict | None:
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def write_kernels_page(folder: Path) -> None:
    """gpu_kernels.md, from the files in folder."""
    result, ladder = (read(folder / f"{name}.json") for name in ("gpu_kernels", "gpu_ladder"))
    page = kernels_page(result, ladder, importlib.import_module("gpu").plan())
    (folder / "gpu_kernels.md").write_text(page, "utf-8")


if __name__ == "__main__":
    write_gpu_report(json.loads((RESULTS / "gpu.json").read_text()), RESULTS)
    write_kernels_page(RESULTS)
