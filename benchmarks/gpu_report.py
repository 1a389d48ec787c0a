"""Tables of what was measured on a GPU.

python benchmarks/gpu_report.py        makes them again from what docs/results/ holds

gpu_kernels.md is made of what gpu.py and gpu_ladder.py measured, and says what they did not;
gpu_tables.md and a picture, of gpu.json: times of an earlier commit, without kernels.
"""

import importlib
import json
import re
import sys
from pathlib import Path

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

PRODUCTS = "matrix products"
#: In the name of a kernel that multiplies matrices; PyTorch's patch embeddings are convolutions.
_PRODUCT = re.compile(r"gemm|gemv|cutlass|xmma|dot_kernel|splitK|dgrad|wgrad")


def kind(name: str) -> str:
    """What a kernel does: ``add`` for CuPy's ``cupy_add__float32_float32_float32``."""
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
        "One call: how many kernels it starts, and for how long the device works on them, without "
        "the time in which it waits for the next.\n\n" + markdown(headers, rows)
    )


def memory_table(result: dict) -> str:
    names = list(result["memory"][0]["mib"])
    rows = []
    for case in result["memory"]:
        rival = case["mib"][RIVAL]
        cells = [f"{mib:,.0f} ({mib / rival:.2f})" for mib in case["mib"].values()]
        rows.append([label(case), *cells])
    return (
        "MiB of the device that the library's allocator held after the call (PyTorch: at most "
        "during it), weights and images included; in brackets the share of "
        f"{RIVAL}'s.\n\n" + markdown(["", *names], rows)
    )


def write_gpu_report(result: dict, folder: Path) -> None:
    """gpu_tables.md and the picture; the tables are printed too."""
    m = result["machine"]
    device = f"On one {m['gpu']}, driver {m['driver']}, CUDA runtime {m['cuda']}. "
    tables = [
        "# Times, memory and kernels on a GPU\n\nWhat is read off them: [how fast it is on a GPU]"
        "(gpu.md).\n",
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

#: Who is shown, in this order: process, how the work is started, and the name for people.
COLUMNS = (
    ("pvt_ref", "captured", "pvt_ref, captured"),
    ("pvt_ref", "launched", "pvt_ref, launched"),
    ("PyTorch", "eager", "PyTorch eager"),
    ("PyTorch", "reduce-overhead", "torch.compile, reduce-overhead"),
    ("PyTorch", "max-autotune", "torch.compile, max-autotune"),
)


def case_of(row: dict) -> str:
    """What a row is about, for people."""
    what = f"{row['model']}, {WHATS[row['what']]}, B = {row['batch']}"
    return what + ("" if row["precision"] == "float32" else f", {row['precision']}")


def by_case(rows: list[dict], cell) -> str:
    """A table with a line for each case and a column for each contender that has a row."""
    shown = [c for c in COLUMNS if any((r["contender"], r["how"]) == c[:2] for r in rows)]
    lines = []
    for case in dict.fromkeys(map(case_of, rows)):
        own = {(r["contender"], r["how"]): r for r in rows if case_of(r) == case}
        lines.append([case, *(cell(own.get(c[:2]), own) for c in shown)])
    return markdown(["224×224", *(name for _, _, name in shown)], lines)


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
    """Who did not run where, and why; nothing if all did."""
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


def error_table(rows: list[dict]) -> str:
    """The largest error of each contender and precision, of all that it was compared in."""
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
    """The page: what was measured, with machine and versions; or what of gpu.py's plan will be."""
    in_all = len(plan)
    parts = [
        "# Kernels on a GPU\n\nWhat is read off these tables, and what was measured before there "
        "were kernels: [how fast it is on a GPU](gpu.md). Made by `benchmarks/gpu_report.py`.\n"
    ]
    if result is None or not result["rows"]:
        parts.append(
            "**Not measured yet.** `python benchmarks/gpu.py` times the kernels, launched and "
            f"captured, beside PyTorch eager and compiled: {in_all} rows, the most important "
            "first. No row has been run with the code that stands here. It begins with:\n"
        )
        parts.append(markdown(list(plan[0]), [list(map(str, x.values())) for x in plan[:FIRST]]))
    else:
        m, rows = result["machine"], result["rows"]
        versions = ", ".join(result["versions"].values())
        left = in_all - len(rows)
        parts += [
            f"On one {m['gpu']}, driver {m['driver']}, CUDA runtime {m['cuda']}, {m['date']}, "
            f"commit {m['commit']}; {versions}. {len(rows)} of {in_all} rows were run"
            + (f"; for the other {left} there was no time.\n" if left else ".\n"),
            "Medians of single calls by device events, launches included. In brackets PyTorch "
            "eager's time over this one: above 1 is faster. PyTorch has fused attention.\n",
            by_case(rows, time_cell),
            reasons(rows),
            "MiB of the device that the work took, weights, images and what libraries keep for "
            "later included:\n",
            by_case([row for row in rows if "mib" in row], memory_cell),
            "Before anything was timed, results were compared with float64, relative L2:\n",
            error_table(rows),
        ]
    parts += ["## Steps of single kernels\n", ladder_tables(ladder)]
    return "\n".join(part for part in parts if part)


def ladder_tables(ladder: dict | None) -> str:
    """The times of gpu_ladder.py, as the course shows them."""
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
        f"The device was seen to copy {ceilings['bytes_per_second'] / 1e12:.2f} terabytes a second "
        f"(read and written) and to multiply matrices at "
        f"{ceilings['operations_per_second'] / 1e12:.0f} tera-operations in float32. Times are "
        f"those of one call among many that follow each other without a gap.\n"
    )
    tables = [f"{name}:\n\n{figures(ladder, name, s)}" for name, s in steps.items() if s]
    return "\n".join([seen, *tables])


def read(file: Path) -> dict | None:
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def write_kernels_page(folder: Path) -> None:
    """gpu_kernels.md, of the files in folder."""
    result, ladder = (read(folder / f"{name}.json") for name in ("gpu_kernels", "gpu_ladder"))
    page = kernels_page(result, ladder, importlib.import_module("gpu").plan())
    (folder / "gpu_kernels.md").write_text(page, "utf-8")


if __name__ == "__main__":
    write_gpu_report(json.loads((RESULTS / "gpu.json").read_text()), RESULTS)
    write_kernels_page(RESULTS)
