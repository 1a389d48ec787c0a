"""Tables and pictures from what cpu.py measured.

python benchmarks/report.py        renews them from docs/results/cpu.json
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from pvt_ref import VARIANTS, PVTConfig

RESULTS = Path(__file__).parent.parent / "docs" / "results"
RIVAL = "PyTorch eager"
COLOURS = {
    "pvt_ref": "#3f51b5",
    "pvt_ref, readable layers": "#9fa8da",
    "PyTorch eager": "#e65100",
    "PyTorch eager, fused attention": "#ff9800",
    "torch.compile": "#795548",
    "transformers": "#9e9e9e",
    "ONNX Runtime": "#00897b",
    "OpenVINO": "#8e24aa",
}
#: Keys that a run may have besides its machine and versions: lists of cases, each of one model.
CASES = ("errors", "times", "busy", "large")


def read_runs(file: Path) -> list[dict]:
    """The runs of a cpu.json; the first files had a single run."""
    stored = json.loads(file.read_text())
    return stored.get("runs", [stored])


def all_cases(run: dict) -> list[dict]:
    """All cases that were timed in a run."""
    return [case for key in CASES[1:] for case in run.get(key, [])]


def models_of(run: dict) -> list[str]:
    """The models that were timed in a run."""
    return list(dict.fromkeys(case["model"] for case in all_cases(run)))


def ratio(case: dict, name: str, rival: str = RIVAL) -> tuple[float, float, float]:
    """rival's time over name's in each round: median, least, most. Above 1, name is faster."""
    if not case["seconds"][name]:
        return math.nan, math.nan, math.nan
    ratios = [b / a for a, b in zip(case["seconds"][name], case["seconds"][rival], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def label(case: dict) -> str:
    what = "forward + backward" if case["train"] else "forward"
    return f"{case['model']}, {what}, B = {case['batch']}"


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    """The median, and the smallest and largest in brackets."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def not_run_note(cases: list[dict]) -> str:
    """Which contenders did not run, and why; empty if all ran."""
    reasons = {(n, why): None for case in cases for n, why in case.get("not_run", {}).items()}
    if not reasons:
        return ""
    lines = [f"- {name}: {why}" for name, why in reasons]
    return "\nNot run, in all cases or in some:\n\n" + "\n".join(lines) + "\n"


def times_table(result: dict) -> str:
    names = list(result["times"][0]["seconds"])
    rows = []
    for case in result["times"]:
        rows.append([label(case)])
        for name in names:
            why = "not run" if name in case.get("not_run", {}) else "failed"
            seconds = case["seconds"][name]
            rows[-1].append(spread([1e3 * t for t in seconds], 1) if seconds else why)
    return (
        "Milliseconds: median over the rounds (smallest-largest)\n\n"
        + markdown(["", *names], rows)
        + not_run_note(result["times"])
    )


def ratio_cell(case: dict, name: str, rival: str = RIVAL) -> str:
    if not case["seconds"][name]:
        return ""
    median, low, high = ratio(case, name, rival)
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def ratio_table(result: dict, rival: str = RIVAL) -> str:
    names = list(result["times"][0]["seconds"])
    rows = [
        [label(case), *(ratio_cell(case, name, rival) for name in names)]
        for case in result["times"]
    ]
    return (
        f"Time of {rival} over the contender's, in the same round: median (smallest-largest). "
        "Above 1 is faster.\n\n" + markdown(["", *names], rows)
    )


def time_tables(result: dict) -> str:
    return times_table(result) + "\n" + ratio_table(result)


def busy_table(result: dict) -> str:
    """The cases that were timed again while another process kept a core busy."""
    rows = []
    for case in result["busy"]:
        (alone,) = (other for other in result["times"] if label(other) == label(case))
        for name, seconds in case["seconds"].items():
            if not (seconds and alone["seconds"][name]):
                rows.append([label(case), name, "failed", "", "", ""])
                continue
            before, now = (statistics.median(c["seconds"][name]) for c in (alone, case))
            beside = spread([1e3 * t for t in seconds], 1)
            cells = [f"{1e3 * before:.1f}", beside, f"{now / before:.1f}", ratio_cell(case, name)]
            rows.append([label(case), name, *cells])
    headers = ["", "contender", "ms alone", "ms with it", "slowdown", f"{RIVAL}'s / its"]
    return (
        "Times while another process, a Python loop bound to one core, keeps that core busy: "
        "median over the rounds (smallest-largest).\n\n" + markdown(headers, rows)
    )


def summary_table(result: dict, digits: int = 0) -> str:
    """The table that the README shows."""
    rows = []
    for case in result["times"]:
        ours, theirs = (1e3 * statistics.median(case["seconds"][n]) for n in ("pvt_ref", RIVAL))
        cells = [
            label(case),
            f"{ours:.{digits}f} ms",
            f"{theirs:.{digits}f} ms",
            ratio_cell(case, "pvt_ref"),
        ]
        rows.append(cells)
    return markdown(["224×224", "pvt_ref", RIVAL, "ratio (smallest-largest)"], rows)


def large_table(result: dict) -> str:
    rows = []
    for case in result["large"]:
        for name, peaks in case["peak_mib"].items():
            if not peaks:
                rows.append([str(case["size"]), name, case["failures"][name], "", "", ""])
                continue
            rival = case["peak_mib"][RIVAL]
            share = f"{min(peaks) / min(rival):.2f}" if rival else ""
            seconds = statistics.median(case["seconds"][name])
            before = min(case["before_mib"][name])
            rows.append(
                [
                    str(case["size"]),
                    name,
                    f"{seconds:.2f}",
                    f"{min(peaks):.0f}",
                    f"{before:.0f}",
                    share,
                ]
            )
    headers = ["side", "contender", "seconds", "peak MiB", "of it before the pass"]
    return (
        "pvt_tiny, forward, B = 1, each contender in a fresh process. Peak memory is the process's "
        "largest resident set, including libraries and weights.\n\n"
        + markdown([*headers, f"peak / {RIVAL}'s"], rows)
        + not_run_note(result["large"])
    )


def machine_line(result: dict) -> str:
    m = result["machine"]
    versions = sorted({v for versions in result["versions"].values() for v in versions.split(", ")})
    return (
        f"Measured {m['date']} on {m['threads']} threads of: {m['processor']} ({m['machine']}, "
        f"{m['system']}, {m['memory_gib']} GiB). pvt_ref {m['pvt_ref']} (commit {m['commit']}), "
        f"Python {m['python']}, "
        f"{', '.join(versions)}; {'; '.join(m['blas'])}.\n"
    )


def _save(figure: Any, path: Path) -> None:
    """The same measurement gives the same bytes: no date, no random names."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "pvt_ref"}):
        figure.savefig(path, metadata={"Date": None})


def plot_ratios(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    cases = result["times"]
    names = list(dict.fromkeys(n for case in cases for n in case["seconds"] if n != RIVAL))
    figure = Figure(figsize=(9, (0.25 + 0.14 * len(names)) * len(cases) + 1.2))
    axes = figure.subplots()
    height = 0.8 / len(names)
    on_bars = [withStroke(linewidth=2.5, foreground="white")]  # keeps lines visible on dark bars
    for k, name in enumerate(names):
        ran = [i for i, case in enumerate(cases) if case["seconds"].get(name)]
        ys = [i + (k - (len(names) - 1) / 2) * height for i in ran]
        found = [ratio(cases[i], name) for i in ran]
        middle = [m for m, _, _ in found]
        errors = [[m - low for m, low, _ in found], [high - m for m, _, high in found]]
        axes.barh(ys, middle, height * 0.9, xerr=errors, color=COLOURS[name], label=name,
                  error_kw={"lw": 1, "ecolor": "#222222", "path_effects": on_bars})  # fmt: skip
    axes.axvline(1, color=COLOURS[RIVAL], lw=1.5)
    axes.text(1, -0.62, RIVAL, color=COLOURS[RIVAL], ha="center", va="bottom", fontsize=9,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # fmt: skip
    axes.set_yticks(range(len(cases)), [label(case) for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel(f"speed, as a multiple of {RIVAL}'s (bars: median; lines: all rounds)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.02), ncols=3)
    figure.tight_layout()
    _save(figure, path)


def plot_large(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4))
    left, right = figure.subplots(1, 2)
    for name in result["large"][0]["peak_mib"]:
        cases = [case for case in result["large"] if case["peak_mib"][name]]
        sizes = [case["size"] for case in cases]
        seconds = [statistics.median(case["seconds"][name]) for case in cases]
        peaks = [min(case["peak_mib"][name]) for case in cases]
        left.plot(sizes, seconds, "o-", color=COLOURS[name], label=name)
        right.plot(sizes, peaks, "o-", color=COLOURS[name])
    sides = [case["size"] for case in result["large"]]
    for axes, title in ((left, "seconds"), (right, "peak memory of the process, MiB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sides, [str(s) for s in sides])
        axes.minorticks_off()
        axes.set_xlabel("side of the image, pixels")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def run_tables(run: dict) -> list[str]:
    """A heading, the machine, and the tables of a run."""
    parts = ["## " + ", ".join(models_of(run)) + "\n", machine_line(run)]
    if "times" in run:
        parts += [summary_table(run), time_tables(run)]
    if "busy" in run:
        parts.append(busy_table(run))
    if "large" in run:
        parts.append(large_table(run))
    return parts


def plot_runs(runs: list[dict], folder: Path) -> None:
    """The pictures: ratios of PVT, ratios of other models, and large images."""
    cases = [case for run in runs for case in run.get("times", [])]
    pvt = [case for case in cases if isinstance(VARIANTS[case["model"]], PVTConfig)]
    others = [case for case in cases if case not in pvt]
    for name, chosen in (("cpu_ratios", pvt), ("cpu_ratios_others", others)):
        if chosen:
            plot_ratios({"times": chosen}, folder / f"{name}.svg")
    for run in runs:
        if "large" in run:
            plot_large(run, folder / "cpu_large.svg")


def write_report(runs: list[dict], folder: Path) -> None:
    """cpu_tables.md and the pictures; the ratios are printed too."""
    heading = (
        "# Times and memory on a CPU\n\n[How fast it is on a CPU](cpu.md) discusses these tables.\n"
    )
    parts = [heading, *(part for run in runs for part in run_tables(run))]
    (folder / "cpu_tables.md").write_text("\n".join(parts))
    plot_runs(runs, folder)
    print(f"\nSpeed as a multiple of {RIVAL}'s:\n")
    for run in runs:
        if "times" not in run:
            continue
        names = list(run["times"][0]["seconds"])
        rows = [
            [
                label(case),
                *(f"{ratio(case, name)[0]:.2f}" if case["seconds"][name] else "" for name in names),
            ]
            for case in run["times"]
        ]
        print(markdown(["", *names], rows))


if __name__ == "__main__":
    write_report(read_runs(RESULTS / "cpu.json"), RESULTS)
