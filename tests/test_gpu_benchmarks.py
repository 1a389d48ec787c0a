"""The benchmarks of a GPU, without one: what is asked in which order, timed and told."""

import json
import re
import shutil
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import Emulation, StandIn

import pvt_ref
from pvt_ref import VARIANTS, Operation, PVTConfig, PVTv2Config, SegmentorConfig, ViTConfig
from pvt_ref.arrays import is_numpy
from pvt_ref.kernels.cuda.ladder.step import Step
from pvt_ref.kernels.cuda.launch import HERE, Cuda
from pvt_ref.kernels.cuda.table import table_with
from pvt_ref.layers.depthwise_conv import depthwise_conv
from pvt_ref.models.segmentor.config import SemanticFPNHead

ROOT = Path(__file__).parents[1]

no_gxx = pytest.mark.skipif(
    cuda_on_cpu.why_not() is not None, reason=cuda_on_cpu.why_not() or "there is g++"
)


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "tools"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


MACHINE = {"gpu": "a GPU", "driver": "1", "cuda": "13.0", "date": "2026-01-02", "commit": "abc"}


class FakeClock:
    """A device for which every piece of work takes a second, and on which waiting is counted."""

    def __init__(self):
        self.now, self.held, self.waits = 0.0, 0, 0

    def work(self):
        self.now += 1

    def note(self):
        return self.now

    def wait(self):
        self.waits += 1

    def seconds(self, begin, end):
        return end - begin

    def hold(self):
        self.held += 1
        self.now += 100  # none of what is timed


# What compute-sanitizer looks at ------------------------------------------------------------------


@no_gxx
def test_every_kernel_is_run_for_the_sanitizer_and_its_numbers_are_looked_at(monkeypatch):
    program, started = import_module("gpu_sanitized"), set()

    def launch(function, *given, **more):
        started.add(function.name)
        Emulation(1)(function, *given, **more)

    def table(precision, spoilt=False):
        products = "own" if precision in ("float32", "tf32") else "cublaslt"
        cuda = Cuda(launch, 6, products=products, precision=precision, cublaslt=StandIn())
        ops = table_with(cuda, is_numpy)
        if not spoilt:
            return ops
        wrong = ops[depthwise_conv].forward
        twin = Operation(lambda *given, **more: _larger(wrong(*given, **more)),
                         ops[depthwise_conv].backward)  # fmt: skip
        return ops.replace(depthwise_conv, twin)

    assert program.look(table) == []
    text = "".join(path.read_text("utf-8") for path in HERE.glob("*.cu"))
    of_files = re.findall(r"__global__ void\s+(?:__launch_bounds__\(.*?\)\s+)?(\w+)\(", text)
    assert started == set(of_files)
    monkeypatch.setattr(program, "CASES", program.CASES[1:2])
    logits, grads = program.look(lambda precision: table(precision, spoilt=True))
    assert logits.startswith("PVTv2Config in float32: the logits off by ")
    assert grads.startswith("PVTv2Config in float32: all gradients off by ")


def _larger(result):
    y, cache = result
    return 1.01 * y, cache


# The order of rows --------------------------------------------------------------------------------


def test_the_first_rows_are_the_most_important():
    gpu = import_module("gpu")
    rows = gpu.plan()
    keys = [gpu.key(row) for row in rows]
    assert len(set(keys)) == len(keys)
    told = [(row["how"], row["what"], row["batch"]) for row in rows[:8]]
    four = ("captured", "launched", "eager", "reduce-overhead")
    assert told == [(how, "forward", batch) for batch in (1, 64) for how in four]
    assert {row["model"] for row in rows[:40]} == {"pvt_small"} | {
        row["model"] for row in rows[12:40]
    }
    assert all(row["precision"] == "float32" for row in rows[:12])
    for model in gpu.MODELS:
        assert model in VARIANTS
        for what in gpu.WHATS:
            for batch in gpu.BATCHES:
                for precision in ("float32", "tf32"):
                    for contender, hows in gpu.HOW.items():
                        for how in hows:
                            assert (contender, how, model, what, batch, precision) in keys
    tuned = [key for key in keys if key[1] == "max-autotune"]
    assert len(tuned) == 3
    quick = [row["how"] not in gpu.LIMITS for row in rows[12:84]]
    assert all(quick)  # what compiles for a minute comes after what needs a second
    others = {(model, what, batch) for _, _, model, what, batch, p in keys[:84] if p == "float32"}
    for what in ("forward", "train"):
        for model, batches in (("pvt_v2_b1", (1, 64)), ("fpn_pvt_tiny", (1, 8))):
            for batch in batches:
                assert (model, what, batch) in others
                assert ("PyTorch", "reduce-overhead", model, what, batch, "float32") in keys


# What is asked, and when --------------------------------------------------------------------------


class Answers:
    """A worker that answers at once, as it is told to."""

    def __init__(self, answer=None, takes=1.0):
        self.asked, self.answer, self.takes = [], answer or {}, takes
        self.clock: Any = None  # a FakeClock

    def ask_within(self, seconds, order):
        self.asked.append((seconds, order))
        self.clock.now += self.takes
        return {"seconds": 0.5, "versions": "A 1"} | self.answer


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Runs gpu.measure on rows with workers that answer at once; returns the result."""
    gpu = import_module("gpu")
    monkeypatch.setattr(gpu, "make_weights", lambda model, folder: folder / model)
    monkeypatch.setattr(gpu, "exact_results", lambda *_: {"logits": np.ones(2)})

    def run(rows, workers, minutes, result=None):
        clock = FakeClock()
        for worker in workers.values():
            worker.clock = clock
        result = result or {"machine": MACHINE, "versions": {}, "rows": []}
        file = tmp_path / "gpu_kernels.json"
        gpu.measure(rows, result, file, workers, tmp_path, minutes, 0.1, now=lambda: clock.now)
        if file.exists():
            assert json.loads(file.read_text()) == result
        return result

    return run


def rows_of(*hows):
    case = {"model": "pvt_small", "what": "forward", "precision": "float32"}
    return [{"contender": "PyTorch", "how": how, "batch": b} | case for b, how in enumerate(hows)]


def test_a_row_that_was_measured_is_not_asked_for_again(measure):
    rows = rows_of("eager", "eager", "eager")
    first = measure(rows[:2], {"PyTorch": Answers()}, 10)
    assert [row["seconds"] for row in first["rows"]] == [0.5, 0.5]
    assert first["versions"] == {"PyTorch": "A 1"}
    worker = Answers()
    whole = measure(rows, {"PyTorch": worker}, 10, result=first)
    assert [order["batch"] for _, order in worker.asked] == [2]
    assert len(whole["rows"]) == 3
    assert "weights" not in whole["rows"][2]


def test_nothing_begins_that_the_time_would_cut_off(measure):
    worker = Answers(takes=45)
    rows = rows_of("eager", "reduce-overhead", "eager", "reduce-overhead", "eager", "eager")
    result = measure(rows, {"PyTorch": worker}, 3)
    # after 135 s a compilation is passed over; after 180 s it is over
    assert [row["batch"] for row in result["rows"]] == [0, 1, 2, 4]
    limits = [seconds for seconds, _ in worker.asked]
    assert limits == [60, 135, 60, 45]


def test_what_the_end_of_a_run_cuts_off_is_left_to_the_next(measure):
    late = Answers({"not_run": "not ready after 20 s"}, takes=20)
    assert measure(rows_of("eager"), {"PyTorch": late}, 20 / 60)["rows"] == []
    slow = Answers({"not_run": "not ready after 60 s"}, takes=60)
    (row,) = measure(rows_of("eager"), {"PyTorch": slow}, 10)["rows"]
    assert row["not_run"] == "not ready after 60 s"


def test_the_tests_and_the_sanitizer_come_first_and_say_how_they_ended(tmp_path, capsys):
    gpu, file, runs = import_module("gpu"), tmp_path / "gpu_kernels.json", tmp_path / "runs"
    note = f"open({str(runs)!r}, 'a').write('x')"
    checks = {
        "good": (1, (sys.executable, "-c", f"{note}; print('== 3 passed ==')")),
        "bad": (1, (sys.executable, "-c", "import sys; print('1 failed'); sys.exit(1)")),
        "late": (1 / 600, ("sh", "-c", "sleep 600 & wait")),  # its child holds the output open
        "absent": (1, ("no-such-program",)),
    }
    result = gpu.begin(file, MACHINE)
    for _ in range(2):  # the second time, only what was not done
        gpu.check(result, file, 10, checks)
    told = json.loads(file.read_text())["checks"]
    assert runs.read_text() == "x"
    assert [told["good"][k] for k in ("passed", "said")] == [True, "3 passed"]
    assert [told["bad"][k] for k in ("passed", "said")] == [False, "1 failed"]
    assert told["late"] == {"not_run": "not done after 1 s"}
    assert told["absent"] == {"not_run": "no-such-program is not installed"}
    assert sum(share for share, _ in gpu.CHECKS.values()) < 0.7  # most rows need a third


def test_figures_of_two_machines_or_commits_do_not_mix(tmp_path):
    gpu = import_module("gpu")
    file = tmp_path / "gpu_kernels.json"
    assert gpu.begin(file, MACHINE)["rows"] == []
    gpu.write(file, {"machine": MACHINE, "versions": {}, "rows": [1]})
    assert gpu.begin(file, MACHINE | {"date": "2026-01-03"})["rows"] == [1]
    for other in ({"gpu": "another"}, {"commit": "def"}):
        with pytest.raises(SystemExit, match="table cannot hold both: move the file away"):
            gpu.begin(file, MACHINE | other)


def test_a_process_that_is_late_or_dies_is_begun_again(tmp_path, monkeypatch):
    gpu = import_module("gpu")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_worker.py").write_text(
        "import json, sys, time\n"
        "for line in sys.stdin:\n"
        "    order = json.loads(line)\n"
        "    if order['do'] == 'sleep': time.sleep(100)\n"
        "    if order['do'] == 'die': sys.exit(3)\n"
        "    print(json.dumps({'by': sys.argv[1]}), flush=True)\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    worker = gpu.Impatient("PyTorch")
    try:
        assert worker.ask_within(60, {"do": "answer"}) == {"by": "PyTorch"}
        assert worker.ask_within(0.2, {"do": "sleep"}) == {"not_run": "not ready after 0 s"}
        assert worker.ask_within(60, {"do": "die"})["not_run"].startswith("its process ended")
        assert worker.ask_within(60, {"do": "answer"}) == {"by": "PyTorch"}
    finally:
        worker.process.kill()
        worker.process.communicate()


# What a contender answers -------------------------------------------------------------------------

_STAGES: Any = {"img_size": 32, "embed_dims": (8, 16, 20, 16), "num_heads": (1, 2, 2, 4)}
_STAGES |= {"mlp_ratios": (4, 2, 2, 2), "num_classes": 10}
SMALL = {
    "pvt_small": PVTConfig(**_STAGES),
    "pvt_v2_b2": PVTv2Config(**_STAGES),
    "deit_s_16": ViTConfig(img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=10),
    "fpn_pvt_tiny": SegmentorConfig(
        backbone=PVTConfig(**_STAGES | {"num_classes": 0}),
        head=SemanticFPNHead(neck_channels=8, channels=8),
        num_classes=10,
    ),
}


@pytest.fixture
def on_host(monkeypatch, tmp_path):
    """gpu_worker with small models and the host in the place of a device; makes an order."""
    worker, in_turn = import_module("gpu_worker"), import_module("in_turn")
    monkeypatch.setattr(worker, "SIZE", 32)
    monkeypatch.setattr(worker, "DENSE_SIZE", 64)  # so that position tables are resized
    monkeypatch.setattr(worker, "DEVICE", "cpu")
    monkeypatch.setattr(worker, "cuda_kernels", lambda *_: None)
    monkeypatch.setattr(pvt_ref, "to_device", lambda tree: tree)
    for name, config in SMALL.items():
        monkeypatch.setitem(VARIANTS, name, config)

    def order(model, what, how="launched", batch=3, precision="float32"):
        weights = in_turn.make_weights(model, tmp_path)
        exact = tmp_path / "exact.npz"
        np.savez(exact, **worker.exact_results(model, weights, what))
        asked = {"model": model, "what": what, "how": how, "batch": batch, "seconds": 0}
        return asked | {"precision": precision, "weights": str(weights), "exact": str(exact)}

    return order


def family(make, clock=None):
    clock = clock or FakeClock()
    free = iter(range(1000, 0, -100))
    return import_module("gpu_worker").Family(
        make, clock, "B 2", lambda: None, lambda: float(next(free))
    )


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (model, what)
        for model in SMALL
        for what in ("forward", "train", "step")
        if (model, what) != ("fpn_pvt_tiny", "step")
    ],
)
def test_contenders_give_the_numbers_of_float64_in_a_batch_of_others(on_host, model, what):
    """Gradients are of the first image alone, for the others are given none."""
    worker = import_module("gpu_worker")
    for make, how in ((worker.ours, "launched"), (worker.pytorch, "eager")):
        told = worker.answer_or_why_not(on_host(model, what, how), family(make))
        assert "not_run" not in told, told
        assert all(0 < error < 1e-5 for error in told["errors"].values())
        compared = 0 if what == "forward" else 4 if model == "fpn_pvt_tiny" else 3
        assert len(told["errors"]) == 1 + compared
        assert told["calls"] == 5  # the least, since none is asked to take time
        assert told["mib"] == 100
        assert told["versions"] == "B 2"


@no_gxx
@pytest.mark.parametrize("what", ["forward", "step"])
def test_kernels_get_what_a_user_gives_them(what, on_host, monkeypatch):
    """Weights laid out once for all forwards, as by a Model; a step in one launch for all."""
    worker, launched = import_module("gpu_worker"), []

    def launch(function, *given, **more):
        launched.append(function.name)
        Emulation(0)(function, *given, **more)

    table = table_with(Cuda(launch, blocks=6), is_numpy)
    monkeypatch.setattr(worker, "cuda_kernels", lambda *_: table)
    order = on_host("pvt_small", what)
    with np.load(order["exact"]) as exact:
        case = worker.make_case(1, SMALL["pvt_small"], first_only=True)
        found = worker.ours(order).results(case)
        errors = worker.errors_of(found, dict(exact), "pvt_small", "float32")
    forward = what == "forward"
    assert launched.count("adamw") == (not forward)
    assert len(table.settings.arranged) == forward
    assert len(errors) == (1 if forward else 4)


def test_a_step_is_compared_by_what_it_changes(on_host, monkeypatch):
    worker = import_module("gpu_worker")
    order = on_host("pvt_small", "step")
    monkeypatch.setattr(worker, "LR", 0.0)
    told = worker.answer_or_why_not(order, family(worker.ours))
    assert "is off by" in told["not_run"]


def test_who_is_wrong_or_fails_is_not_timed_and_says_why(on_host):
    worker = import_module("gpu_worker")

    def wrong(order):
        good = worker.ours(order)
        return good._replace(results=lambda case: {"logits": good.results(case)["logits"] * 1.01})

    def fails(order):
        raise MemoryError("no room\nfor it")

    clock = FakeClock()
    told = worker.answer_or_why_not(on_host("pvt_small", "forward"), family(wrong, clock))
    assert told["not_run"] == "its logits is off by 1.0e-02, and 1e-05 is allowed"
    assert clock.waits == 0
    told = worker.answer_or_why_not(on_host("pvt_small", "forward"), family(fails))
    assert told == {"not_run": "MemoryError: no room", "versions": "B 2"}
    nan = {"logits": np.array([np.nan])}
    with pytest.raises(worker.NotRunError, match="off by nan"):
        worker.errors_of(nan, {"logits": np.array([1.0])}, "pvt_small", "bfloat16")
    off = {"logits": np.ones(1), "weight": np.array([1 + 5e-4])}
    exact = {name: np.ones(1) for name in off}
    assert worker.errors_of(off, exact, "fpn_pvt_tiny", "float32")["weight"] > 4e-4  # past a ReLU
    for model, name in (("pvt_small", "weight"), ("fpn_pvt_tiny", "logits")):
        with pytest.raises(worker.NotRunError, match=f"its {name} is off by 5.0e-04"):
            worker.errors_of({name: off["weight"]}, {name: np.ones(1)}, model, "float32")


def test_captured_work_is_what_capture_returns(on_host, monkeypatch):
    worker, captured = import_module("gpu_worker"), []

    def capture(function, *arrays):
        captured.append([x.shape for x in arrays])
        return function

    monkeypatch.setattr(pvt_ref, "capture", capture)
    told = worker.answer_or_why_not(on_host("pvt_small", "train", "captured"), family(worker.ours))
    assert "errors" in told
    assert captured == [[(3, 3, 32, 32), (3, 10)]] * 2  # to be compared, and to be timed


# Clocks -------------------------------------------------------------------------------------------


def test_the_device_is_held_by_its_own_nanoseconds():
    """CUDA 13 has no clock rate among the properties of a device, so nobody may ask for it."""
    launches = []
    cupy = types.SimpleNamespace(RawKernel=lambda *_: lambda *given: launches.append(given))
    import_module("gpu_clock").CupyClock(cupy, milliseconds=2).hold()
    assert launches == [((1,), (1,), (2_000_000,))]
    assert launches[0][2][0].dtype == np.uint64


def test_single_calls_are_timed_on_an_empty_queue():
    time_calls, clock = import_module("gpu_clock").time_calls, FakeClock()
    assert time_calls(clock.work, clock, seconds=3, least=2) == [1, 1, 1]
    assert clock.waits == 6
    assert time_calls(clock.work, clock, seconds=0, least=2) == [1, 1]
    assert len(time_calls(lambda: None, clock, seconds=1, most=7)) == 7


def test_calls_in_a_row_begin_behind_what_holds_the_device():
    time_in_a_row, clock = import_module("gpu_clock").time_in_a_row, FakeClock()
    turns = []

    def call(name):
        def run():
            turns.append(name)
            clock.work()

        return run

    times = time_in_a_row([call("a"), call("b")], clock, repeats=4, rounds=2)
    assert times == [1, 1]
    assert clock.held == 2
    assert "".join(turns) == "ab" + "abab" * 2


# Ladders ------------------------------------------------------------------------------------------


@no_gxx
@pytest.mark.parametrize("name", ["sums", "attentions", "products"])
def test_steps_of_a_ladder_are_compared_before_they_are_timed(name):
    bench: Any = import_module("gpu_ladder")
    sizes = {"sums": (70, 33), "attentions": (1, 2, 5, 7, 8), "products": (9, 12, 8)}
    case = getattr(bench, name)(*sizes[name])
    wrong = Step("wrong", "none", lambda *given: 1.01 * steps[0].run(*given))
    steps = bench.LADDERS[case.ladder]
    cuda, clock = Cuda(Emulation(0), blocks=6), FakeClock()
    bench.BEYOND_CACHE, kept = 1, bench.BEYOND_CACHE  # one copy of the arguments will do
    try:
        rows = list(bench.times_of(case, (*steps, wrong), clock, lambda x: x, cuda))
    finally:
        bench.BEYOND_CACHE = kept
    assert [row["step"] for row in rows] == [*(step.title for step in steps), "wrong"]
    assert all(0 < row["error"] < bench.ALLOWED for row in rows[:-1])
    assert rows[-1]["not_run"].startswith("it is off by 1.0e-02")
    assert clock.held == 7 * len(steps)


def test_bounds_count_every_byte_once():
    bench = import_module("gpu_ladder")
    assert bench.sums(10, 3)[4:] == (4 * 33, 30)
    case = bench.attentions(1, 2, 5, 7, 8)
    arrays = [x for x in case.make() if isinstance(x, np.ndarray)]
    assert case.bytes == sum(x.nbytes for x in arrays) + arrays[0].nbytes  # y is as large as q
    assert case.operations == 2 * (2 * 5 * 7 * 8) * 2  # two heads, two products


# Pages --------------------------------------------------------------------------------------------


def timed(contender, how, seconds, **more):
    row = {"contender": contender, "how": how, "model": "pvt_small", "what": "forward", "batch": 1}
    row |= {"precision": "float32", "seconds": seconds, "mib": 1234.5, "errors": {"logits": 2e-7}}
    return row | more


def test_the_page_tells_times_ratios_and_what_did_not_run():
    report = import_module("gpu_report")
    rows = [
        timed("pvt_ref", "captured", 0.001),
        timed("PyTorch", "eager", 0.006),
        timed("pvt_ref", "captured", 0.0125, batch=64, precision="tf32", errors={"logits": 1e-3}),
        {k: v for k, v in timed("PyTorch", "eager", 0, batch=64, precision="tf32").items()
         if k not in ("seconds", "mib", "errors")} | {"not_run": "no room"},
    ]  # fmt: skip
    result = {"machine": MACHINE, "versions": {"PyTorch": "PyTorch 9"}, "rows": rows}
    segmented = timed("PyTorch", "eager", 0.02, model="fpn_pvt_tiny", what="train", batch=8)
    rows.append(segmented)
    tests = {"passed": True, "said": "90 passed | 1 s", "seconds": 1.0}
    result["checks"] = {"tests": tests, "memcheck": {"not_run": "no such program"}}
    plan = [
        *rows,
        timed("PyTorch", "eager", 0, batch=8),
        timed("PyTorch", "reduce-overhead", 0, batch=8),
        timed("pvt_ref", "launched", 0),
    ]
    lines = report.kernels_page(result, None, plan).splitlines()
    assert "| 224×224 | pvt_ref, captured | PyTorch eager |" in lines
    assert "| pvt_small, forward, B = 1 | 1 ms (6.00) | 6 ms (1.00) |" in lines
    assert "| pvt_small, forward, B = 64, tf32 | 12.5 ms | not run |" in lines
    assert "| pvt_small, forward, B = 1 | 1,234 | 1,234 |" in lines
    assert "- PyTorch eager: no room (pvt_small, forward, B = 64, tf32)" in lines
    assert "| pvt_ref | tf32 | 1.0e-03 | logits, pvt_small, forward, B = 64, tf32 |" in lines
    text = "\n".join(lines)
    assert "On one a GPU, driver 1, CUDA runtime 13.0, 2026-01-02, commit abc; PyTorch 9." in text
    assert "5 of 8 rows were run; the other 3 are named below." in text
    assert "- pvt_small, forward, B = 8: PyTorch eager; torch.compile, reduce-overhead" in lines
    assert "- pvt_small, forward, B = 1: pvt_ref, launched" in lines
    assert lines.index("| 512×512 | PyTorch eager |") > lines.index(
        "| 224×224 | pvt_ref, captured | PyTorch eager |"
    )
    assert "| fpn_pvt_tiny, forward + backward, B = 8 | 20 ms (1.00) |" in lines
    assert r"| tests | passed | 90 passed \| 1 s |" in lines
    assert "| memcheck | not run: no such program |  |" in lines
    assert "| racecheck | not run: nobody asked for it |  |" in lines
    assert "launched |" not in text  # who was never asked has no column
    assert text.count("Not measured yet") == 1  # the ladder
    tested = {"machine": MACHINE, "versions": {}, "rows": [], "checks": result["checks"]}
    text = report.kernels_page(tested, None, plan)
    assert "commit abc. 0 of 8 rows were run; the other 8 are named below." in text
    assert r"| tests | passed | 90 passed \| 1 s |" in text
    assert "float64" not in text


def test_the_page_of_the_repository_is_made_of_its_files(tmp_path):
    results = ROOT / "docs" / "results"
    for name in ("gpu_kernels.json", "gpu_ladder.json"):
        if (results / name).exists():
            shutil.copy(results / name, tmp_path)
    import_module("gpu_report").write_kernels_page(tmp_path)
    assert (tmp_path / "gpu_kernels.md").read_text("utf-8") == (
        results / "gpu_kernels.md"
    ).read_text("utf-8")


def test_the_course_shows_the_figures_of_a_ladder_or_that_there_are_none(tmp_path):
    tool = import_module("ladder")
    steps = (Step("plain", "a.cu", print), Step("fast", "b.cu", print))
    table = tool.figures("sum_rows", steps, tmp_path)
    assert table.count("not measured yet") == 2
    rows = [
        {"ladder": "sum_rows", "step": "plain", "case": "7 × 3", "bytes": 100, "operations": 1,
         "seconds": 1e-5},
        {"ladder": "sum_rows", "step": "fast", "case": "8 × 3", "not_run": "it is off by 1"},
        {"ladder": "other", "step": "fast", "case": "7 × 3", "seconds": 1.0},
    ]  # fmt: skip
    ceilings = {"bytes_per_second": 2e7, "operations_per_second": 1e9}
    stored = {"machine": MACHINE, "ceilings": ceilings, "rows": rows}
    (tmp_path / "gpu_ladder.json").write_text(json.dumps(stored))
    lines = tool.figures("sum_rows", steps, tmp_path).splitlines()
    assert lines[0] == "| step | 7 × 3 | 8 × 3 |"
    assert lines[2] == "| 1. plain | 10.0 µs (50%) | not measured yet |"
    assert lines[3] == "| 2. fast | not measured yet | it is off by 1 |"
    assert "Measured on one a GPU on 2026-01-02, commit abc" in lines[5]
    plan = [{"contender": "the first"}, *[{"contender": "the others"}] * 20]
    page = import_module("gpu_report").kernels_page(None, stored | {"rows": []}, plan)
    assert "21 rows" in page
    assert page.count("| the first |") == 1
    assert page.count("| the others |") == 11
    assert "a copy moves 0.00 terabytes a second" in page
    assert "sum_rows:" in page


def test_the_course_shows_kernels_as_they_are_in_their_files():
    tool = import_module("ladder")
    whole = tool.listing("ladder/sum_rows_1_plain.cu")
    file, code = whole.split("\n\n", 1)
    assert file == (
        "[`pvt_ref/kernels/cuda/ladder/sum_rows_1_plain.cu`]"
        "[pvt_ref.kernels.cuda.ladder.sum_rows]{ .listing }"
    )
    assert code.startswith('```cpp\nextern "C" __global__ void sum_rows_1(')
    one = tool.listing("sum_rows.cu", "add_parts")
    file, code = one.split("\n\n", 1)
    assert file.endswith("sum_rows.cu`][pvt_ref.kernels.cuda.sum_rows]{ .listing }")
    assert code.startswith("```cpp\n// y (columns), the sum of parts (count, columns).\nextern")
    assert "partial_sums" not in one
    assert one.endswith("}\n```\n")
    with pytest.raises(AssertionError, match="has not all of"):
        tool.listing("sum_rows.cu", "absent")


def test_the_rows_are_listed_without_a_gpu(monkeypatch, capsys):
    gpu = import_module("gpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--list"])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu.plan())
    assert lines[0] == "1\tpvt_ref\tcaptured\tpvt_small\tforward\t1\tfloat32"
