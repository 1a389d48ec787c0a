"""Tables and the picture from what gpu.py measured.

python benchmarks/gpu_report.py        makes them again from docs/results/gpu.json
"""

import json
import re
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
    return re.match(r"(?:void )?(?:(?:\w+|\(anonymous namespace\))::)*(\w+)", name)[1]


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


if __name__ == "__main__":
    write_gpu_report(json.loads((RESULTS / "gpu.json").read_text()), RESULTS)
