"""What a benchmark reports is what it did: who ran, beside what, and which code."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from loose import loose

from pvt_ref import REFERENCE, VARIANTS, PVTConfig, PVTv2Config, ViTConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


MACHINE = {"date": "2026-01-02", "processor": "a chip", "machine": "x", "system": "y"}
MACHINE |= {"memory_gib": 1, "threads": 2, "cores": 2, "python": "3", "pvt_ref": "0"}
MACHINE |= {"commit": "abc", "blas": ["a BLAS"]}


def timed(train, not_run, **seconds):
    case = {"model": "pvt_tiny", "size": 224, "batch": 1, "train": train, "not_run": not_run}
    names = {"ours": "pvt_ref", "torch": "PyTorch eager", "ort": "ONNX Runtime"}
    return case | {"seconds": {names[key]: times for key, times in seconds.items()}}


def test_tables_tell_who_ran_and_why_others_did_not(tmp_path, capsys):
    absent = {"OpenVINO": "not installed: openvino"}
    ours, torch = [0.050, 0.040, 0.060], [0.025, 0.040, 0.030]
    no_backward = absent | {"ONNX Runtime": "it computes no gradients"}
    run = {
        "machine": MACHINE,
        "versions": {"pvt_ref": "NumPy 2"},
        "times": [
            timed(False, absent, ours=ours, torch=torch, ort=[0.020, 0.020, 0.030]),
            timed(True, no_backward, ours=[0.3] * 3, torch=[0.15] * 3, ort=[]),
        ],
        "busy": [timed(False, absent, ours=[0.1] * 3, torch=[0.2, 0.4, 0.3], ort=[])],
    }
    later = run | {"times": [timed(False, {}, ours=ours, torch=torch)]}
    del later["busy"]
    import_module("report").write_report([run, later], tmp_path)
    lines = (tmp_path / "cpu_tables.md").read_text("utf-8").splitlines()
    case = "| pvt_tiny, forward, B = 1 "
    assert f"{case}| 50.0 (40.0-60.0) | 30.0 (25.0-40.0) | 20.0 (20.0-30.0) |" in lines
    # ratios are taken within each round: 25/50, 40/40, 30/60, and 25/20, 40/20, 30/30
    assert f"{case}| 0.50 (0.50-1.00) | 1.00 (1.00-1.00) | 1.25 (1.00-2.00) |" in lines
    train = "| pvt_tiny, forward + backward, B = 1 "
    assert f"{train}| 300.0 (300.0-300.0) | 150.0 (150.0-150.0) | not run |" in lines
    assert f"{train}| 0.50 (0.50-0.50) | 1.00 (1.00-1.00) |  |" in lines
    start = lines.index("Not run, in all cases or in some:") + 2
    assert lines[start : start + 3] == [
        "- OpenVINO: not installed: openvino",
        "- ONNX Runtime: it computes no gradients",
        "",
    ]
    assert f"{case}| pvt_ref | 50.0 | 100.0 (100.0-100.0) | 2.0 | 3.00 (2.00-4.00) |" in lines
    assert (
        f"{case}| PyTorch eager | 30.0 | 300.0 (200.0-400.0) | 10.0 | 1.00 (1.00-1.00) |" in lines
    )
    assert f"{case}| ONNX Runtime | failed |  |  |  |" in lines
    assert "nan" not in capsys.readouterr().out
    assert (tmp_path / "cpu_ratios.svg").stat().st_size > 1000


class Answers:
    """A contender that answers at once; what it was asked is kept."""

    made = ()

    def __init__(self, name, threads=1, trains=True, outputs=None):
        self.name, self.trains, self.outputs, self.asked = name, trains, outputs, []
        Answers.made += (name,)

    def ask(self, **order):
        self.asked.append(order)
        if order["train"] and not self.trains:
            return {"not_run": "it computes no gradients"}
        if self.outputs and order["do"] == "outputs":
            np.savez(order["file"], **self.outputs)
        return {"times": [0.25, 0.5, 0.75], "versions": self.name, "peak": 9, "before": 4}

    def close(self):
        pass


@pytest.fixture
def run_cpu(monkeypatch, tmp_path):
    """Runs cpu.py with contenders that answer at once; returns the runs it stored.

    Its ``drawn`` is, by picture, what the last one would draw.
    """
    cpu, contenders = import_module("cpu"), import_module("contenders")
    needs = dict.fromkeys(contenders.CONTENDERS, ("json",)) | {"OpenVINO": ("json", "no_library")}
    monkeypatch.setattr(contenders, "NEEDS", needs)
    monkeypatch.setattr(cpu, "Worker", Answers)
    monkeypatch.setattr(cpu, "make_weights", lambda name, folder: folder / name)
    monkeypatch.setattr(cpu, "bench_segmentation", lambda **asked: run.segmented.append(asked))
    monkeypatch.setattr(
        cpu,
        "check_equality",
        lambda workers, orders, folder: [{"model": order["model"]} for order in orders],
    )

    report = import_module("report")
    for plot in ("plot_ratios", "plot_large"):
        monkeypatch.setattr(
            report, plot, lambda result, file: run.drawn.update({file.name: result})
        )

    def run(*arguments):
        run.drawn, run.segmented = {}, []
        monkeypatch.setattr(Answers, "made", ())
        monkeypatch.setattr(sys, "argv", ["cpu.py", *arguments, "--out", str(tmp_path)])
        cpu.main()
        return json.loads((tmp_path / "cpu.json").read_text())["runs"]

    return run


def test_an_absent_library_is_reported_as_not_run_and_never_asked(run_cpu, tmp_path, capsys):
    (result,) = run_cpu("--quick", "--rounds", "2", "--skip", "transformers")
    assert "OpenVINO is not run; not installed: no_library" in capsys.readouterr().out
    names = import_module("contenders").CONTENDERS
    asked = [name for name in names if name not in ("OpenVINO", "transformers")]
    assert list(Answers.made) == asked
    assert (len(result["times"]), len(result["busy"])) == (4, 1)
    for case in result["times"] + result["busy"]:
        assert case["seconds"] == {name: [0.5, 0.5] for name in asked}
        assert case["not_run"] == {"OpenVINO": "not installed: no_library"}
    assert (result["busy"][0]["batch"], result["busy"][0]["train"]) == (1, False)
    assert "- OpenVINO: not installed: no_library" in (tmp_path / "cpu_tables.md").read_text(
        "utf-8"
    )


FEW = ("pvt_ref", "pvt_ref, readable layers", "PyTorch eager", "torch.compile")


def timed_models(run):
    return [case["model"] for case in run.get("times", ())]


def test_models_other_than_pvt_are_timed_beside_few_and_in_fewer_rounds(run_cpu):
    pvt, others, large = run_cpu("--rounds", "4")
    assert timed_models(pvt) == ["pvt_tiny"] * 4 + ["pvt_small"] * 4
    assert timed_models(others) == ["pvt_v2_b0"] * 4 + ["pvt_v2_b2"] * 4 + ["deit_s_16"] * 4
    cases = [(case["train"], case["batch"]) for case in others["times"][:4]]
    assert cases == [(False, 1), (False, 8), (True, 1), (True, 8)]
    assert others["times"][0]["seconds"] == {name: [0.5] * 3 for name in FEW}
    assert "not_run" not in others["times"][0]  # what is not wanted is not missed
    assert others["versions"] == {name: name for name in FEW}
    assert len(pvt["times"][0]["seconds"]) == 7
    assert pvt["times"][0]["seconds"]["pvt_ref"] == [0.5] * 4
    assert "busy" in pvt
    assert "busy" not in others
    assert [case["size"] for case in large["large"]] == [224, 512, 1024, 2048]
    assert set(large["versions"]) == set(large["large"][0]["peak_mib"])
    assert run_cpu.drawn == {
        "cpu_ratios.svg": {"times": pvt["times"]},
        "cpu_ratios_others.svg": {"times": others["times"]},
        "cpu_large.svg": large,
    }


@pytest.mark.parametrize("some", [("--quick",), ("--large",), ("--models", "deit_s_16")])
def test_segmentation_is_measured_where_everything_is(some, run_cpu, tmp_path):
    run_cpu("--rounds", "3", "--seconds", "0.5")
    assert run_cpu.segmented == [{"rounds": 3, "seconds": 0.5, "out": tmp_path}]
    run_cpu(*some, "--rounds", "1")
    assert run_cpu.segmented == []


def test_all_contenders_are_asked_of_any_model_if_told_to(run_cpu):
    (run,) = run_cpu("--models", "deit_s_16", "--all")
    assert len(run["times"][0]["seconds"]) == 7
    assert list(run["times"][0]["not_run"]) == ["OpenVINO"]


def test_what_is_not_measured_again_stays_with_the_machine_it_was_measured_on(run_cpu, tmp_path):
    pvt, _, large = run_cpu("--rounds", "1")
    # the first file that was stored had one run, the large images in it
    old = pvt | {"machine": MACHINE, "large": large["large"]}
    (tmp_path / "cpu.json").write_text(json.dumps(old))
    kept, small, deit = run_cpu("--rounds", "2", "--models", "deit_s_16", "pvt_small")
    assert kept["machine"] == MACHINE
    assert timed_models(kept) == ["pvt_tiny"] * 4
    assert {case["model"] for case in kept["errors"]} == {"pvt_tiny"}
    assert (kept["busy"], kept["large"]) == (old["busy"], old["large"])
    assert timed_models(small) == ["pvt_small"] * 4
    assert small["times"][0]["seconds"]["pvt_ref"] == [0.5] * 2
    assert timed_models(deit) == ["deit_s_16"] * 4
    assert run_cpu.drawn["cpu_ratios.svg"] == {"times": kept["times"] + small["times"]}
    *times, again = run_cpu("--large")
    assert times == [{key: x for key, x in kept.items() if key != "large"}, small, deit]
    assert list(again) == ["machine", "versions", "large"]
    lines = (tmp_path / "cpu_tables.md").read_text("utf-8").splitlines()
    assert [line for line in lines if line.startswith("## ")] == [
        *("## pvt_tiny", "## pvt_small", "## deit_s_16", "## pvt_tiny")
    ]
    measured = [line[: len("Measured 2026-01-02")] for line in lines if "Measured" in line]
    assert measured[0] == "Measured 2026-01-02"
    assert len(measured) == 4
    assert "Measured 2026-01-02" not in measured[1:]


def test_nothing_is_timed_without_what_all_is_compared_with(monkeypatch, capsys):
    cpu, contenders = import_module("cpu"), import_module("contenders")
    monkeypatch.setattr(contenders, "NEEDS", {"PyTorch eager": ("no_library",)})
    monkeypatch.setattr(sys, "argv", ["cpu.py"])
    with pytest.raises(SystemExit):
        cpu.main()
    assert "PyTorch eager is not installed: no_library" in capsys.readouterr().err


def test_a_contender_without_backward_is_not_run_where_there_is_one():
    can, cannot = Answers("can"), Answers("cannot", trains=False)
    order = {"model": "m", "size": 224, "batch": 1, "train": True}
    both = [order, order | {"train": False}]
    first, second = import_module("in_turn").time_in_turn([can, cannot], both, 3, 0)
    assert first["seconds"] == {"can": [0.5] * 3, "cannot": []}
    assert first["not_run"] == {"cannot": "it computes no gradients"}
    assert second["seconds"] == {"can": [0.5] * 3, "cannot": [0.5] * 3}
    assert "not_run" not in second
    assert len(cannot.asked) == 1 + 3


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("wrong", [None, "logits", "dimages"])
def test_no_contender_is_timed_whose_results_do_not_match(tmp_path, monkeypatch, trains, wrong):
    in_turn = import_module("in_turn")
    exact = {"logits": np.array([3.0, 4.0]), "dimages": np.array([1.0, 0.0])}
    monkeypatch.setattr(in_turn, "exact_outputs", lambda *_: exact)
    found = {
        key: x * (1 + 2e-5 * (key == wrong))
        for key, x in exact.items()
        if trains or key == "logits"
    }
    order = {"model": "pvt_tiny", "weights": "w", "size": 224, "batch": 2, "train": True}
    worker = Answers("one", trains=trains, outputs=found)
    if wrong in found:
        with pytest.raises(SystemExit, match=rf"one is not timed: its {wrong} .* off by 2\.0e-05"):
            in_turn.check_equality([worker], [order], tmp_path)
    else:
        errors = in_turn.check_equality([worker], [order], tmp_path)
        assert [error["quantity"] for error in errors] == list(found)


@pytest.mark.parametrize(
    ("wrong", "error", "refused"),
    [("logits", 2e-5, True), ("dimages", 2e-5, False), ("dimages", 2e-3, True)],
)
def test_gradients_through_a_relu_may_differ_more(tmp_path, monkeypatch, wrong, error, refused):
    in_turn = import_module("in_turn")
    exact = {"logits": np.array([3.0, 4.0]), "dimages": np.array([1.0, 0.0])}
    monkeypatch.setattr(in_turn, "exact_outputs", lambda *_: exact)
    worker = Answers("one", outputs=exact | {wrong: exact[wrong] * (1 + error)})
    order = {"model": "pvt_v2_b2_li", "weights": "w", "size": 224, "batch": 2, "train": True}
    if refused:
        with pytest.raises(SystemExit, match=rf"one is not timed: its {wrong} "):
            in_turn.check_equality([worker], [order], tmp_path)
    else:
        in_turn.check_equality([worker], [order], tmp_path)


def test_contenders_give_the_numbers_of_the_readable_layers(tmp_path):
    in_turn = import_module("in_turn")
    weights = str(in_turn.make_weights("pvt_tiny", tmp_path))
    order = {"weights": weights, "model": "pvt_tiny", "size": 64, "batch": 1, "train": True}
    workers = [in_turn.Worker(name, 1) for name in ("pvt_ref", "PyTorch eager")]
    errors = in_turn.check_equality(workers, [order], tmp_path)
    for worker in workers:
        worker.close()
        assert worker.process.returncode == 0
    assert len(errors) == 2 * 5
    assert all(0 < error["error"] < in_turn.ALLOWED for error in errors)


_STAGES = {"img_size": 64, "embed_dims": (8, 16, 20, 16), "num_heads": (1, 2, 2, 4)}
_STAGES |= {"mlp_ratios": (4, 2, 2, 2)}
SMALL = {
    "pvt": PVTConfig(**_STAGES),
    "pvt_v2": PVTv2Config(**_STAGES),
    "pvt_v2_li": PVTv2Config(**_STAGES, linear=True),
    "vit": ViTConfig(img_size=64, embed_dim=24, depth=2, num_heads=3),
}
TORCH = ("PyTorch eager", "PyTorch eager, fused attention")


@pytest.mark.parametrize(
    ("model", "size", "names"),
    [
        ("pvt", 64, ("pvt_ref", *TORCH, "transformers")),
        ("pvt_v2", 64, ("pvt_ref", *TORCH, "transformers")),
        ("pvt_v2_li", 72, ("pvt_ref", *TORCH, "transformers")),  # averaged cells overlap
        ("vit", 64, ("pvt_ref", *TORCH, "transformers")),
        ("vit", 96, TORCH[:1]),  # its table is resized
    ],
)
def test_every_kind_of_network_has_its_contenders(model, size, names, tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, model, SMALL[model])
    in_turn, contenders = import_module("in_turn"), import_module("contenders")
    weights = in_turn.make_weights(model, tmp_path)
    exact = in_turn.exact_outputs(model, weights, size, 2, train=True)
    assert set(exact) == {"logits", "dimages", *contenders.COMPARED[type(SMALL[model])]}
    for name in names:
        contender = contenders.CONTENDERS[name](weights, SMALL[model], size, 1, "cpu")
        images, dlogits = map(contender.prepare, in_turn.inputs(2, size))
        found = contender.to_numpy(contender.train(images, dlogits))
        assert found.keys() == exact.keys()
        for key, x in exact.items():
            error = np.linalg.norm(found[key] - x) / np.linalg.norm(x)
            assert 0 < error < in_turn.ALLOWED, (name, key)
        logits = contender.to_numpy(contender.forward(images))["logits"]
        np.testing.assert_allclose(logits, found["logits"], rtol=1e-4, atol=1e-5)


def test_a_contender_of_ours_computes_with_the_operations_of_its_name(monkeypatch):
    contenders = import_module("contenders")
    asked = {"load": lambda *_: SimpleNamespace(params=None), "to_device": lambda x, _: x}
    asked["forward"] = lambda params, images, config, ops: ops
    for name, function in asked.items():
        monkeypatch.setattr(contenders.pvt_ref, name, function)
    arguments = (Path("w"), VARIANTS["pvt_tiny"], 224, 1, "cpu")
    default, readable = (
        contenders.CONTENDERS[name](*arguments).forward(None)
        for name in ("pvt_ref", "pvt_ref, readable layers")
    )
    assert default is None
    assert readable is REFERENCE


def test_a_contender_that_dies_is_told_from_the_others_and_starts_again(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    worker_py = tmp_path / "benchmarks" / "worker.py"
    worker_py.write_text("import sys\nfor line in sys.stdin:\n    sys.exit(3)\n")
    in_turn = import_module("in_turn")
    dies, lives = in_turn.Worker("dies", 1, root=tmp_path), Answers("lives")
    order = {"model": "m", "size": 224, "batch": 1, "train": False}
    (case,) = in_turn.time_in_turn([dies, lives], [order], 2, 0)
    assert case["seconds"] == {"dies": [], "lives": [0.5, 0.5]}
    assert dies.process.poll() is None
    with pytest.raises(in_turn.ContenderError, match="dies ended with status 3"):
        dies.ask(**order)
    dies.close()


def test_a_worker_runs_the_code_that_it_is_given(tmp_path, monkeypatch):
    (tmp_path / "pvt_ref").mkdir()
    (tmp_path / "pvt_ref" / "__init__.py").write_text("WHERE = 'the other commit'\n")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "worker.py").write_text(
        "import json, os, sys\nimport pvt_ref\nsys.stdin.readline()\n"
        "print(json.dumps([pvt_ref.WHERE, sys.argv[1:], os.environ.get('PVT_REF_OPS')]))\n"
    )
    monkeypatch.setenv("PVT_REF_OPS", "reference")
    worker = import_module("in_turn").Worker("a", 3, root=tmp_path, shown="a, as it was")
    assert worker.ask() == ["the other commit", ["a", "cpu", "3"], None]
    assert worker.name == "a, as it was"
    worker.close()


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_another_commit_is_taken_out_as_it_was(tmp_path, monkeypatch):
    compare, repository = import_module("compare_commit"), tmp_path / "repository"
    monkeypatch.setattr(compare, "ROOT", repository)
    for folder in ("pvt_ref", "benchmarks", "docs"):
        (repository / folder).mkdir(parents=True)
        (repository / folder / "file.py").write_text("old\n")
    subprocess.run(["git", "init", "-q", repository], check=True)
    compare.git("add", ".")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    compare.git(*who, "-c", "commit.gpgsign=false", "commit", "-q", "-m", "old")
    (repository / "pvt_ref" / "file.py").write_text("new\n")
    root = compare.take_out("HEAD", tmp_path)
    files = {str(p.relative_to(root)): p.read_text() for p in root.rglob("*.py")}
    assert files == {"pvt_ref/file.py": "old\n", "benchmarks/file.py": "old\n"}


# Segmentation ------------------------------------------------------------------------------------


def test_a_segmentation_network_is_timed_beside_its_twin(tmp_path):
    """In processes of their own, on a small image."""
    segmentation = import_module("segmentation")
    segmentation.bench(threads=1, rounds=1, seconds=0.0, out=tmp_path, side=64)
    run = json.loads((tmp_path / "cpu_segmentation.json").read_text())
    errors = {error["contender"]: error["error"] for error in run["errors"]}
    assert set(errors) == {"pvt_ref", "PyTorch eager"}
    assert all(0 < error < 1e-5 for error in errors.values())
    (grown,) = run["growth"]
    assert all(len(mib) == 1 and 0 <= mib[0] < 500 for mib in grown["mib"].values())
    assert "PyTorch" in run["versions"]["PyTorch eager"]
    assert segmentation.page(run) == (tmp_path / "cpu_segmentation.md").read_text("utf-8")


def test_the_page_of_segmentation_says_what_was_asked_for():
    segmentation = import_module("segmentation")
    case = {"model": "fpn_pvt_tiny", "size": 512, "batch": 1, "train": False}
    seconds = {"pvt_ref": [0.5, 0.4, 0.5], "PyTorch eager": [0.3, 0.4, 0.45]}
    run = {"machine": MACHINE, "versions": {"pvt_ref": "NumPy 2"}, "errors": [{"error": 2e-6}]}
    run["times"] = [case | {"seconds": seconds}]
    mib = {"pvt_ref": [30.0, 40.0, 50.0], "PyTorch eager": [100.0]}
    run["growth"] = [{"size": 512, "mib": mib}]
    page = segmentation.page(run).splitlines()
    # within the rounds: 0.3 / 0.5, 0.4 / 0.4, 0.45 / 0.5
    assert "| speed, as a multiple of PyTorch eager's | at least 0.8 | 0.90 (0.60-1.00) |" in page
    assert "| memory growth, as a fraction of PyTorch eager's | at most 0.5 | 0.40 |" in page
    assert "| pvt_ref | 40 (30-50) |" in page
    seconds["pvt_ref"] = [1.0, 1.0, 1.0]
    assert "| 0.40 (0.30-0.45): missed |" in segmentation.page(run)


# Time by operation -------------------------------------------------------------------------------


def test_time_by_operation_knows_the_kernels_of_every_network(tmp_path, monkeypatch):
    """In a process of its own, since the kernels are replaced for good."""
    code = (
        "import sys, json, by_operation as b\n"
        "from pvt_ref import VARIANTS, PVTv2Config\n"
        "VARIANTS['pvt_v2_b0'] = PVTv2Config(**json.loads(sys.argv.pop(1)))\n"
        "b.REPEATS = 1\n"
        "b.main()\n"
    )
    small = json.dumps({**_STAGES, "num_classes": 5})
    arguments = ["--model", "pvt_v2_b0", "--batch", "2", "--threads", "2", "--out", str(tmp_path)]
    stored = {"machine": MACHINE, "model": "pvt_tiny", "batch": 8}
    old = {"whole": 0.5, "parts": {"matrix products": 0.5, "GELU": 0.25}}
    stored["seconds"] = {"forward": old, "readable layers, forward": old}
    cases = [stored, stored | {"model": "pvt_v2_b0", "batch": 2}]  # the second is measured again
    (tmp_path / "cpu_operations.json").write_text(json.dumps({"cases": cases}))
    path = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    subprocess.run(
        [sys.executable, "-c", code, small, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
    )
    kept, new = json.loads((tmp_path / "cpu_operations.json").read_text())["cases"]
    assert kept == stored
    assert (new["model"], new["batch"]) == ("pvt_v2_b0", 2)
    forward, train = new["seconds"]["forward"], new["seconds"]["forward + backward"]
    assert {"depth-wise convolution", "unfolding windows of convolutions"} <= set(forward["parts"])
    assert {"GELU", "matrix products", "layer norm"} <= set(forward["parts"])
    assert {"layer norm, backward", "softmax of attention, backward"} <= set(train["parts"])
    readable = new["seconds"]["readable layers, forward"]["parts"]
    assert {"conv", "depthwise_conv", "sra"} <= set(readable)
    page = (tmp_path / "cpu_operations.md").read_text("utf-8")
    assert "| GELU | 250.0 | 25% |" in page.splitlines()
    assert (
        "Kernels, pvt_tiny, forward, B = 8, 2 threads, 500 ms; share of matrix products 0.50"
        in page
    )
    assert page.index("## pvt_tiny, B = 8") < page.index("## pvt_v2_b0, B = 2")


def test_every_kernel_that_is_timed_by_name_exists():
    by_operation = import_module("by_operation")
    modules = by_operation.kernel_modules()
    for name in by_operation.KERNELS:
        assert any(hasattr(module, name) for module in modules), name


# The busy core -----------------------------------------------------------------------------------

SPINS = pytest.mark.skipif(sys.platform == "win32", reason="the loop asks for its parent by POSIX")


@SPINS
def test_one_core_is_kept_busy_and_then_let_go():
    with import_module("busy").busy_core() as process:
        assert process.poll() is None
        if hasattr(os, "sched_getaffinity"):
            (core,) = os.sched_getaffinity(process.pid)
            assert core in os.sched_getaffinity(0)
    assert process.returncode == -signal.SIGKILL


@SPINS
def test_the_busy_process_ends_when_the_timing_fails():
    with pytest.raises(ZeroDivisionError), import_module("busy").busy_core() as process:
        1 / 0  # noqa: B018
    assert process.returncode == -signal.SIGKILL


@SPINS
def test_times_beside_a_busy_process_that_had_ended_are_refused():
    def end_early():
        with import_module("busy").busy_core() as process:
            process.terminate()
            process.wait()

    with pytest.raises(RuntimeError, match="ended early"):
        end_early()


@SPINS
def test_the_busy_process_ends_with_a_benchmark_that_is_killed():
    code = (
        "import os, busy\nwith busy.busy_core() as p:\n    print(p.pid, flush=True)\n    input()\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command,
        cwd=BENCHMARKS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as benchmark:
        spinning = int(benchmark.stdout.readline())
        try:
            benchmark.kill()
            benchmark.wait()
            # both held it open: its end is theirs
            assert select.select([loose(benchmark.stderr)], [], [], 60)[0]
            assert benchmark.stderr.read() == b""
        finally:
            with suppress(ProcessLookupError):
                os.kill(spinning, signal.SIGKILL)
