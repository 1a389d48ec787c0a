"""examples/forward_gpu.py with NumPy in the place of the device: everything but CuPy is run."""

import dataclasses
import importlib
import itertools
import sys
import types
from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import Emulation
from loose import loose
from strategies import normal, rng_of

import pvt_ref
from pvt_ref import VARIANTS, Model
from pvt_ref.arrays import is_numpy
from pvt_ref.errors import CheckpointError
from pvt_ref.kernels.cuda.launch import Cuda
from pvt_ref.kernels.cuda.table import table_with

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def plain_script(monkeypatch, tmp_path):
    """The script as it is, run in an empty folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    yield importlib.import_module("forward_gpu")
    for name in ("forward", "forward_gpu"):
        sys.modules.pop(name, None)


class FakePool:
    """A pool that holds more after every call."""

    def __init__(self):
        self.freed = 0

    def free_all_blocks(self):
        self.freed += 1

    def total_bytes(self):
        return self.freed * 2**20


def fake_cupy():
    """Of CuPy's module what is asked besides arrays."""
    runtime = types.SimpleNamespace(
        getDevice=lambda: 0,
        getDeviceProperties=lambda _: {"name": b"a CPU in disguise"},
    )
    pool = FakePool()
    return types.SimpleNamespace(
        __version__="0",
        cuda=types.SimpleNamespace(runtime=runtime),
        get_default_memory_pool=lambda: pool,
    )


def small_model():
    config = dataclasses.replace(
        VARIANTS["pvt_tiny"],
        embed_dims=(8, 16, 20, 16), num_classes=5, depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2),
    )  # fmt: skip
    return Model(pvt_ref.init_params(config, rng_of(0)), config, "test weights")


def ticking():
    """A clock on which a second passes at every look, and which knows when it waited."""
    from forward_gpu import Clock

    moments, done = itertools.count(), []
    return Clock(
        lambda: next(moments), lambda a, b: float(b - a), lambda: done.append("wait"),
        lambda: done.append("hold"),
    ), done  # fmt: skip


@pytest.fixture
def script(plain_script, monkeypatch):
    """The script on the host."""
    model = small_model()
    photo = normal(0, 1, 3, 32, 32, dtype=np.float32)
    monkeypatch.setattr(plain_script, "import_cupy", fake_cupy)
    monkeypatch.setattr(plain_script, "to_device", lambda tree: tree)
    monkeypatch.setattr(plain_script, "cuda_kernels", lambda precision: None)
    monkeypatch.setattr(plain_script, "device_clock", lambda cupy, like: plain_script.host_clock())
    monkeypatch.setattr(plain_script, "get_model", lambda *_: model)
    monkeypatch.setattr(plain_script, "get_images", lambda *_: ("noise", photo))
    monkeypatch.setattr(pvt_ref, "capture", lambda function, *arrays: function)
    return plain_script


def test_a_device_is_held_without_its_clock_rate_which_cuda_13_does_not_tell(plain_script):
    launches, cupy = [], fake_cupy()
    cupy.RawKernel = lambda *_: lambda *given: launches.append(given)
    plain_script.device_clock(cupy, None).hold()
    assert launches == [((1,), (1,), (100_000_000,))]
    assert launches[0][2][0].dtype == np.uint64


def test_without_cuda_it_says_what_to_install_and_exits_with_2(plain_script, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # an import of it fails
    assert plain_script.main([]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("error:") == 1
    assert "pip install cupy-cuda12x" in captured.err


def test_everything_is_compared_before_anything_is_timed(script, capsys, monkeypatch):
    assert script.main(["--batch", "2"]) == 0
    out = capsys.readouterr().out
    compared, timed = out.split("All results match.")
    for name in ("logits", "maps", "gradients of the classifier", "gradients of the maps"):
        assert compared.count(f"\n{name} ") == 2  # in two precisions
    for name in ("NumPy", "CUDA, launched", "CUDA, captured", "stage 1", "forward", "device"):
        assert f"\n{name}" in timed
    assert "images of 32x32 pixels" in compared
    assert "1 MiB for a forward, 2 MiB with its backward" in timed


def test_wrong_numbers_are_not_timed(script, capsys, monkeypatch):
    honest = script.run_all
    calls = []

    def dishonest(*given):
        results = honest(*given)
        calls.append(None)
        if len(calls) == 2:  # the device's turn
            results["logits"] = [results["logits"][0] * 1.01]
        return results

    monkeypatch.setattr(script, "run_all", dishonest)
    assert script.main(["--batch", "1"]) == 1
    out = capsys.readouterr().out
    assert "NO" in out
    assert "stage 1" not in out


def test_what_is_not_a_number_does_not_agree(script, monkeypatch):
    nan = {"logits": [np.array([np.nan])]}
    one = {"logits": [np.array([1.0])]}
    monkeypatch.setattr(script, "run_all", lambda *given: nan if len(given) == 4 else one)
    table, good = script.check(small_model(), np.zeros((1, 3, 32, 32), np.float32), None, "tf32")
    assert not good
    assert table.count("NO") == 2


def test_a_network_without_maps_is_compared_by_its_logits(plain_script):
    config = pvt_ref.ViTConfig(img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=4)
    params = pvt_ref.init_params(config, rng_of(0))
    results = plain_script.run_all(params, normal(0, 1, 3, 32, 32, dtype=np.float32), config)
    assert "logits" in results
    assert results["logits"][0].shape == (1, 4)


def test_weights_must_be_those_of_the_variant(plain_script, monkeypatch):
    model = small_model()
    monkeypatch.setattr(plain_script, "get_model", lambda weights, variant: model)
    with pytest.raises(CheckpointError, match="f holds another model than deit_s_16"):
        plain_script.model_of("f", "deit_s_16")
    assert plain_script.model_of("f", None) is model
    monkeypatch.setitem(VARIANTS, "pvt_tiny", dataclasses.replace(model.config, img_size=64))
    assert plain_script.model_of("f", "pvt_tiny") is model


def test_forwards_share_weights_that_were_laid_out_once(plain_script):
    table = table_with(Cuda(loose(None)), is_numpy)
    model = small_model()
    plain_script.laid_out(model.params, model.config, (32, 32), table)
    assert len(table.settings.arranged) == 1
    clock, _ = ticking()
    images = normal(0, 2, 3, 32, 32, dtype=np.float32)
    ours = plain_script.ours("NumPy", model, images, None, None, clock, None)
    assert np.array_equal(ours.forward(), pvt_ref.forward(model.params, images, model.config))


def test_a_call_is_timed_alone(plain_script):
    clock, done = ticking()
    assert plain_script.seconds(lambda: done.append("run"), clock, repeats=3) == 1
    assert done == ["wait", "run", "wait"] * 5


def test_stages_are_the_spans_between_their_ends(plain_script):
    model = small_model()
    images = normal(0, 1, 3, 32, 32, dtype=np.float32)
    clock, done = ticking()
    times = plain_script.stage_times(model.params, images, model.config, None, clock, repeats=1)
    assert len(times) == 5
    assert all(t >= 1 for t in times)  # at least one operation each
    assert done == ["wait"] * 4
    table = plain_script.stage_table([1.0] * 5, [0.5] * 5).splitlines()
    assert table[-1].split() == ["forward", "5,000.00", "2,500.000", "2.0"]
    assert table[2].split() == ["stage", "1", "1,000.00", "500.000", "2.0"]


def test_kernels_are_timed_one_by_one_behind_what_holds_the_device(plain_script, capsys):
    launched = []
    ops = table_with(Cuda(loose(lambda f, *_, **__: launched.append(f.name))), is_numpy)
    clock, done = ticking()

    def run(table):
        done.append("run")
        launch = table.settings.launch
        launch(types.SimpleNamespace(name="a"), (1,), (1,), ())
        launch(types.SimpleNamespace(name="b"), (1,), (1,), ())
        launch(types.SimpleNamespace(name="a"), (1,), (1,), (), shared=8)

    found, whole = plain_script.kernel_times(run, ops, clock)
    assert launched == ["a", "b", "a"] * 2
    assert found == {"a": [1, 1], "b": [1]}
    assert whole == 7  # a second at each of seven looks
    assert done == ["run", "wait", "hold", "run", "wait"]
    rows = [line.split() for line in plain_script.kernel_table(found, whole).splitlines()]
    assert ["a", "2", "2,000.000", "29%"] in rows
    assert ["products", "and", "copies", "by", "libraries", "4,000.000", "57%"] in rows


@pytest.mark.skipif(
    cuda_on_cpu.why_not() is not None, reason=cuda_on_cpu.why_not() or "there is g++"
)
def test_the_kernels_of_a_forward_are_told_by_name(script, capsys, monkeypatch):
    ops = table_with(Cuda(Emulation(0), blocks=6), is_numpy)
    monkeypatch.setattr(script, "cuda_kernels", lambda precision: ops)
    monkeypatch.setattr(script, "check", lambda *_: ("", True))  # that takes its time here
    assert script.main(["--batch", "1"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    names = [row[0] for row in rows if row]
    assert {"layer_norm", "add_layer_norm", "attention", "product"} <= set(names)


def test_pytorch_is_beside_it_if_it_is_there(script, capsys, monkeypatch):
    pytest.importorskip("torch")
    model = small_model()
    images, dlogits = normal(0, 2, 3, 32, 32, dtype=np.float32), normal(1, 2, 5, dtype=np.float32)
    eager = next(script.pytorch(model, images, dlogits, "float32", script.host_clock(), "cpu"))
    ours = pvt_ref.forward(model.params, images, model.config)
    assert script.difference([eager.forward().numpy()], [ours]) < 1e-5
    assert script.difference([eager.train().detach().numpy()], [ours]) < 1e-5


def test_without_pytorch_the_rest_is_told(script, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(script, "check", lambda *_: ("", True))
    assert script.main(["--batch", "1", "--compare"]) == 0
    out = capsys.readouterr().out
    assert "PyTorch is not compared" in out
    assert "CUDA, launched" in out


def test_pytorch_with_other_numbers_is_not_timed(script, capsys, monkeypatch):
    class Tensor(np.ndarray):
        cpu = lambda self: self  # noqa: E731
        numpy = cpu

    def wrong(*_):
        x = np.zeros((1, 5), np.float32).view(Tensor)
        yield script.Contender("wrong one", script.host_clock(), lambda: x, lambda: x)

    monkeypatch.setattr(script, "pytorch", wrong)
    monkeypatch.setattr(script, "check", lambda *_: ("", True))
    assert script.main(["--batch", "1", "--compare"]) == 0
    assert "wrong one is not timed: it is off by 1.0e+00" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--batch", "0"], ["--precision", "int8"], ["--variant", "fpn_pvt_tiny"]]
)
def test_unsuitable_arguments_are_refused(plain_script, arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        plain_script.main(arguments)
    assert refused.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", [[], ["--variant", "deit_s_16", "--size", "224", "224"]])
def test_on_a_gpu(plain_script, capsys, cupy, arguments):
    assert plain_script.main(["--batch", "2", *arguments]) == 0
    assert "All results match." in capsys.readouterr().out
