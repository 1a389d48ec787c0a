"""CUDA graphs: on a stand-in for CuPy that keeps CUDA's rules for them, and on a GPU."""

import copy
import operator
import pickle
import sys
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
import recording_cupy
from cuda_on_cpu import Emulation
from PIL import Image
from recording_cupy import RecordingCuPy, external_stream, launched_by
from segmentors import SEGMENTORS, params_of
from strategies import normal, random_params, rng_of

import pvt_ref
from pvt_ref import REFERENCE, VARIANTS, Model, Ops, capture
from pvt_ref.arrays import array_module, cuda_error, explained, from_host, is_cupy
from pvt_ref.errors import ArrayTypeError, DeviceError, ShapeError
from pvt_ref.kernels.cuda import table
from pvt_ref.kernels.cuda.capture import Graphs, constant, is_recording, replays
from pvt_ref.kernels.cuda.launch import Cuda
from pvt_ref.kernels.cuda.table import table_with
from pvt_ref.tree import map_arrays, named_arrays

no_gxx = pytest.mark.skipif(
    cuda_on_cpu.why_not() is not None, reason=cuda_on_cpu.why_not() or "there is g++"
)

CONFIG = replace(
    VARIANTS["pvt_tiny"],
    img_size=32,
    num_classes=5,
    embed_dims=(4, 8, 4, 8),
    num_heads=(1, 2, 1, 2),
    mlp_ratios=(1, 1, 1, 1),
    depths=(1, 1, 1, 1),
)


@pytest.fixture
def fake(monkeypatch):
    """The stand-in, as if it were imported."""
    made = RecordingCuPy()
    monkeypatch.setitem(sys.modules, "cupy", made)
    return made


def bits(tree):
    return {key: np.asarray(x).tobytes() for key, x in named_arrays(pvt_ref.to_numpy(tree))}


def on_device(cupy, tree):
    return map_arrays(cupy.asarray, tree)


def model_on(cupy):
    params = on_device(cupy, random_params(CONFIG, 1, np.float32))
    return pvt_ref.prepare(params, CONFIG)


def images_on(cupy, seed, B=2, side=32):
    return cupy.asarray(normal(seed, B, 3, side, side, dtype=np.float32))


# What a replay computes ---------------------------------------------------------------------------


def affine(w):
    return lambda x: (x * w + 1, [(x.T @ x).sum(axis=0), None])


def test_a_replay_has_the_bits_of_direct_calls(fake):
    w = fake.asarray(normal(0, 3, dtype=np.float32))
    function = affine(w)
    graph = capture(function, fake.asarray(normal(1, 4, 3, dtype=np.float32)))
    for seed in range(5):
        x = fake.asarray(normal(seed, 4, 3, dtype=np.float32))
        map_arrays(lambda y: y.fill(np.nan), graph.outputs)
        assert bits(graph(x)) == bits(function(x))
    assert graph(x)[1][1] is None


def test_results_stay_when_the_graph_is_replayed(fake):
    example = fake.asarray(np.zeros(3))
    graph = capture(lambda x: x + 1, example)
    first = graph(fake.asarray(np.full(3, 1.0)))
    graph(fake.asarray(np.full(3, 7.0)))
    np.testing.assert_array_equal(first.get(), 2)
    np.testing.assert_array_equal(example.get(), 0)


def test_a_result_may_be_what_came_in(fake):
    graph = capture(lambda x: (x, x[1:]), fake.asarray(np.zeros(3)))
    x = fake.asarray(np.arange(3.0))
    whole, part = graph(x)
    np.testing.assert_array_equal(whole.get(), [0, 1, 2])
    np.testing.assert_array_equal(part.get(), [1, 2])
    whole.fill(9)
    np.testing.assert_array_equal(x.get(), [0, 1, 2])


def test_it_runs_three_times_and_only_the_third_is_recorded(fake):
    ran = []

    def function(x):
        ran.append((is_recording(), fake.cuda.get_current_stream().is_capturing()))
        return x * 2

    graph = capture(function, fake.asarray(np.ones(2)))
    assert ran == [(True, False), (True, False), (True, True)]
    assert not is_recording()
    graph(fake.asarray(np.ones(2)))
    assert len(ran) == 3


def test_weights_are_read_where_they_lie_and_kept(fake):
    weights = [fake.asarray(np.ones(2))]
    graph = capture(partial(operator.mul, weights[0]), fake.asarray(np.ones(2)))
    weights[0][...] = 5.0
    np.testing.assert_array_equal(graph(fake.asarray(np.ones(2))).get(), 5)
    weights.clear()
    others = [fake.asarray(np.full(2, np.nan)) for _ in range(50)]  # would take its memory
    np.testing.assert_array_equal(graph(fake.asarray(np.ones(2))).get(), 5)
    assert others


def test_what_lies_between_has_memory_of_its_own(fake):
    def function(x):
        for _ in range(4):
            x = x * 2 + 1  # each gives memory back that the next takes
        return x

    graph = capture(function, fake.asarray(np.zeros(100)))
    others = [fake.asarray(np.full(100, np.nan)) for _ in range(50)]
    np.testing.assert_array_equal(graph(fake.asarray(np.zeros(100))).get(), 15)
    for x in others:
        assert np.isnan(x.get()).all()


def test_a_constant_of_the_host_is_the_same_in_every_replay(fake):
    seen = []

    def function(x):
        y = x * 3.0  # its memory is free when the constant is made, and written in each replay
        y = None
        c = constant(np.array([1.0, 2.0]), like=x)
        seen.append(c.get() if not fake.cuda.get_current_stream().is_capturing() else None)
        z = x + c
        del c
        return z * 1.0 + (x * 0.0), y

    graph = capture(function, fake.asarray(np.zeros(2)))
    for value in (0.0, 10.0, 20.0):
        result = graph(fake.asarray(np.full(2, value)))[0]
        np.testing.assert_array_equal(result.get(), [value + 1, value + 2])
    np.testing.assert_array_equal(seen[:2], [[1, 2], [1, 2]])
    np.testing.assert_array_equal(constant(np.ones(2), np.zeros(1)), 1)  # NumPy's own


@pytest.mark.parametrize("pyramid", [False, True])
def test_a_forward_and_a_pyramid(pyramid, fake):
    model = model_on(fake)
    forward = pvt_ref.forward_pyramid if pyramid else pvt_ref.forward

    def function(x):
        return forward(model, x, ops=REFERENCE)

    graph = capture(function, images_on(fake, 0))
    for seed in (1, 2):
        x = images_on(fake, seed)
        assert bits(tuple(graph(x)) if pyramid else (graph(x),)) == bits(
            tuple(function(x)) if pyramid else (function(x),)
        )


def test_a_forward_with_its_backward(fake):
    model = model_on(fake)

    def function(x, dlogits):
        logits, cache = pvt_ref.forward_with_cache(model, x, ops=REFERENCE)
        grads, dimages = pvt_ref.backward(model, cache, dlogits)
        return logits, grads, dimages

    dlogits = [fake.asarray(normal(i, 2, 5, dtype=np.float32)) for i in range(2)]
    graph = capture(function, images_on(fake, 0), dlogits[0])
    x = images_on(fake, 1)
    result = graph(x, dlogits[1])
    assert type(result[1]) is type(model.params)
    assert bits(result) == bits(function(x, dlogits[1]))


# What is refused ----------------------------------------------------------------------------------


def test_without_cuda_it_says_so():
    with pytest.raises(DeviceError, match="array 0 is numpy float64, but a CUDA graph needs CuPy"):
        capture(lambda x: x, np.zeros(2))
    arguments: Any
    for arguments, words in (
        ((3, np.zeros(2)), "function is 3"),
        ((abs,), "an example of each array"),
        ((abs, [1]), "array 0 is a list"),
    ):
        with pytest.raises(ArrayTypeError, match=words):
            capture(*arguments)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * float(x[0]),
        lambda x: x * 1 if x[0] > 0 else x * 2,
        lambda x: x + array_module(x).asarray(np.ones(2)),
        lambda x: from_host(pvt_ref.to_numpy(x) + 1, like=x),
        lambda x: capture(abs, x)(x),
    ],
)
def test_work_of_the_host_is_refused(function, fake):
    with pytest.raises(DeviceError, match="captured"):
        capture(function, fake.asarray(np.ones(2)))
    assert not is_recording()
    assert fake.cuda.get_current_stream().ptr == 0
    graph = capture(lambda x: x + 1, fake.asarray(np.ones(2)))  # nothing is left behind
    np.testing.assert_array_equal(graph(fake.asarray(np.ones(2))).get(), 2)


def test_ctrl_c_leaves_nothing_behind(fake):
    def function(x):
        if fake.cuda.get_current_stream().is_capturing():
            raise KeyboardInterrupt
        return x + 1

    with pytest.raises(KeyboardInterrupt):
        capture(function, fake.asarray(np.ones(2)))
    assert not is_recording()
    assert not fake.cuda.get_current_stream().is_capturing()


def test_a_recording_that_cannot_begin_leaves_nothing_behind(fake, monkeypatch):
    def refuse(self):
        raise RuntimeError("cudaErrorStreamCaptureUnsupported")

    x = fake.asarray(np.ones(2))
    with monkeypatch.context() as m:
        m.setattr(type(fake.cuda.Stream(non_blocking=True)), "begin_capture", refuse)
        with pytest.raises(DeviceError, match="StreamCaptureUnsupported"):
            capture(lambda x: x * 2, x)
    assert not is_recording()
    np.testing.assert_array_equal(constant(np.arange(3.0), like=x).get(), [0, 1, 2])


def test_cupys_own_products_are_refused(fake):
    fake.products_captured = False
    with pytest.raises(DeviceError, match=r"cannot be captured .*cuBLAS.*cuda_kernels\(\)"):
        capture(lambda x: x @ x, fake.asarray(np.ones((2, 2))))


def test_masks_and_tables_of_other_sizes_are_refused(fake):
    model = model_on(fake)
    config = replace(CONFIG, drop_path_rate=0.5)
    with pytest.raises(DeviceError, match="masks that are drawn"):
        capture(
            lambda x: pvt_ref.forward_with_cache(model.params, x, config, rng_of(1), ops=REFERENCE)[
                0
            ],
            images_on(fake, 0),
        )
    images = images_on(fake, 0, side=64)
    with pytest.raises(DeviceError, match=r"prepare\(params, config, size\) resizes"):
        capture(lambda x: pvt_ref.forward(model, x, ops=REFERENCE), images)
    prepared = pvt_ref.prepare(model.params, CONFIG, 64)
    graph = capture(lambda x: pvt_ref.forward(prepared, x, ops=REFERENCE), images)
    direct = pvt_ref.forward(prepared, images, ops=REFERENCE)
    assert bits((graph(images),)) == bits((direct,))


def test_results_that_no_replay_would_renew_are_refused(fake):
    x = fake.asarray(np.ones(2))
    for function, words in (
        (lambda x: None, "returned None"),
        (lambda x: {"a": (1, "b")}, "needs arrays to write"),
        (lambda x: (x + 1, np.ones(2)), "numpy float64: the device does not compute it"),
    ):
        with pytest.raises(DeviceError, match=words):
            capture(function, x)


def test_errors_of_the_function_itself_are_its_own(fake):
    model = model_on(fake)
    with pytest.raises(ShapeError, match="multiples of 32"):
        capture(lambda x: pvt_ref.forward(model, x), images_on(fake, 0, side=40))


def test_a_graph_is_called_with_what_it_was_captured_for(fake):
    x = fake.asarray(np.ones((2, 3), np.float32))
    graph = capture(lambda x: x + 1, x)
    with fake.cuda.Device(1):
        elsewhere = fake.asarray(np.ones((2, 3), np.float32))
    for given, error, words in (
        ((), ShapeError, "captured for 1 arrays, called with 0"),
        ((x, x), ShapeError, "called with 2"),
        ((fake.asarray(np.ones((3, 2), np.float32)),), ShapeError, r"shape \(3, 2\); the graph"),
        ((fake.asarray(np.ones((2, 3))),), ArrayTypeError, "cupy float64"),
        ((np.ones((2, 3), np.float32),), ArrayTypeError, "numpy float32"),
        (([1],), ArrayTypeError, "array 0 is a list"),
        ((elsewhere,), ArrayTypeError, "CUDA Device 1"),
    ):
        with pytest.raises(error, match=words):
            graph(*given)
    with pytest.raises(DeviceError, match="a graph needs one device"):
        capture(lambda x, y: x, x, elsewhere)


# Streams, threads, devices ------------------------------------------------------------------------


def test_a_replay_runs_in_the_current_stream_after_the_one_before(fake):
    x = fake.asarray(np.ones(2))
    graph = capture(lambda x: x + 1, x)
    fake.history.clear()
    for ptr in (77, 88):
        with external_stream(ptr):
            graph(x)
    assert [entry[:2] for entry in fake.history] == [
        ("wait", 77), ("launch", 77), ("record", 77), ("wait", 88), ("launch", 88), ("record", 88),
    ]  # fmt: skip
    assert len({entry[2] for entry in fake.history if entry[0] != "launch"}) == 1  # one event


def test_a_capture_waits_for_the_current_stream(fake):
    x = fake.asarray(np.ones(2))
    fake.history.clear()
    with external_stream(55):
        capture(lambda x: x + 1, x)
        assert fake.cuda.get_current_stream().ptr == 55
    (record, wait), begin = fake.history[:2], [entry[0] for entry in fake.history].index("begin")
    assert record[:2] == ("record", 55)
    assert (wait[0], wait[2]) == ("wait", record[2])
    assert wait[1] == fake.history[begin][1] != 55
    assert fake.history[begin - 1] == ("synchronize", wait[1])  # the warm-up is over


def test_threads_take_turns(fake):
    def function(x):
        for _ in range(20):
            x = x + 1
        return x

    graph = capture(function, fake.asarray(np.zeros(1000)))
    wrong, begin = [], threading.Barrier(4)

    def ask(value):
        x = fake.asarray(np.full(1000, value))
        begin.wait()
        for _ in range(50):
            with external_stream(int(value)):
                if not (graph(x).get() == value + 20).all():
                    wrong.append(value)

    threads = [threading.Thread(target=ask, args=(100.0 * i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_arrays_are_computed_on_their_own_device(fake):
    with fake.cuda.Device(1):
        x = fake.asarray(np.ones(2))
    fake.history.clear()
    graph = capture(lambda x: x + 1, x)  # the current device is 0
    result = graph(x)
    assert result.device.id == 1
    assert ("launch", 0, 1) in fake.history
    assert fake.cuda.runtime.getDevice() == 0


# Where shapes repeat ------------------------------------------------------------------------------


def table_of(cuda):
    """Readable layers, with the settings of the kernels."""
    return Ops(name="cuda kernels", accepts=is_cupy, settings=cuda)


class Counted:
    """A function, and how often it ran."""

    def __init__(self):
        self.ran = self.made = 0

    def make(self):
        self.made += 1
        return self

    def __call__(self, x):
        self.ran += 1
        return x * 2


def test_the_second_use_of_a_shape_captures(fake):
    graphs, owner, function = Graphs(), object(), Counted()
    runs = []
    for shape in (2, 2, 2, 3, 3, 2):
        x = fake.asarray(np.arange(float(shape)))
        result = graphs.run(owner, function.make, x)
        np.testing.assert_array_equal(result.get(), 2 * np.arange(shape))
        runs.append(function.ran)
    assert runs == [1, 4, 4, 5, 8, 8]
    assert function.made == 4
    assert len(graphs) == 2
    graphs.run(object(), function.make, x)  # of other weights
    assert function.ran == 9
    graphs.clear()
    assert len(graphs) == 0


def test_the_graph_unused_for_longest_makes_room(fake):
    graphs, owner, function = Graphs(most=2), object(), Counted()

    def use(shape):
        before = function.ran
        graphs.run(owner, function.make, fake.asarray(np.ones(shape)))
        return function.ran - before

    assert [use(n) for n in (2, 2, 3, 3, 2, 4, 4)] == [1, 3, 1, 3, 0, 1, 3]
    assert len(graphs) == 2
    assert use(2) == 0
    assert use(3) == 1


def test_what_is_refused_is_called_as_it_is(fake):
    fake.products_captured = False
    graphs, calls = Graphs(), []

    def make():
        return lambda x: calls.append(0) or x @ x

    x = fake.asarray(np.full((2, 2), 2.0))
    for _ in range(4):
        np.testing.assert_array_equal(graphs.run(0, make, x).get(), 8)
    assert len(calls) == 1 + (3 + 1) + 1 + 1
    assert len(graphs) == 0


def test_what_is_inside_a_capture_or_not_for_it_is_called_as_it_is(fake):
    x, inside = fake.asarray(np.ones(2)), []
    assert replays(table_of(Cuda()), x)
    assert not replays(table_of(Cuda(capture=False)), x)
    assert not replays(REFERENCE, x)
    assert not replays(pvt_ref.blocked_ops(), np.ones(2))
    assert not replays(table_of(Cuda()), np.ones(2))
    capture(lambda x: inside.append(replays(table_of(Cuda()), x)) or x + 1, x)
    assert inside == [False, False, False]


def test_settings_are_equal_and_copied_without_their_graphs(fake):
    cuda = Cuda()
    for _ in range(2):
        cuda.graphs.run(0, Counted().make, fake.asarray(np.ones(2)))
    assert len(cuda.graphs) == 1
    assert cuda == Cuda()
    assert cuda != Cuda(capture=False)
    assert hash(cuda) == hash(Cuda())
    for other in (copy.deepcopy(cuda), pickle.loads(pickle.dumps(cuda))):
        assert other == cuda
        assert len(other.graphs) == 0


def test_predict_replays_where_shapes_repeat(fake, monkeypatch):
    monkeypatch.setenv("PVT_REF_OPS", "kernels")
    ops = table_of(Cuda())
    monkeypatch.setattr(table, "cuda_kernels", lambda: ops)
    params = random_params(CONFIG, 1, np.float32)
    plain = Model(params, CONFIG)
    model = Model(on_device(fake, params), CONFIG)
    images = normal(3, 2, 3, 32, 32, dtype=np.float32)
    launches = []
    for x in (images, images, images + 1, np.concatenate([images, images])):
        fake.history.clear()
        answers = model.predict(fake.asarray(x), top=2)
        launches.append(sum(entry[0] == "launch" for entry in fake.history))
        for mine, theirs in zip(answers, plain.predict(x, top=2), strict=True):
            assert [p.index for p in mine] == [p.index for p in theirs]
            np.testing.assert_allclose(mine[0].probability, theirs[0].probability, rtol=1e-5)
    assert launches == [0, 1, 1, 0]
    assert len(ops.settings.arranged) == 1
    monkeypatch.setattr(table, "cuda_kernels", lambda: table_of(Cuda(capture=False)))
    fake.history.clear()
    for _ in range(3):
        model.predict(fake.asarray(images))
    assert not [entry for entry in fake.history if entry[0] == "launch"]


def test_predict_replays_at_another_size_too(fake, monkeypatch):
    monkeypatch.setenv("PVT_REF_OPS", "kernels")
    ops = table_of(Cuda())
    monkeypatch.setattr(table, "cuda_kernels", lambda: ops)
    model = Model(on_device(fake, random_params(CONFIG, 1, np.float32)), CONFIG)
    images = images_on(fake, 0, side=64)
    answers = [model.predict(images) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert len(ops.settings.graphs) == 1


@no_gxx
def test_segment_replays_where_shapes_repeat(fake, monkeypatch):
    monkeypatch.setenv("PVT_REF_OPS", "kernels")
    ops = table_with(Cuda(launched_by(Emulation()), 6), is_cupy)
    monkeypatch.setattr(table, "cuda_kernels", lambda: ops)
    config = SEGMENTORS["pvt"]
    params = params_of(config, 1, np.float32)
    plain, model = Model(params, config), Model(on_device(fake, params), config)
    picture = Image.fromarray(rng_of(1).integers(0, 256, (20, 32, 3), np.uint8))
    expected = plain.segment(picture, size=20)[0]
    launches = []
    for _ in range(3):
        fake.history.clear()
        found = model.segment(picture, size=20)[0]
        launches.append(sum(entry[0] == "launch" for entry in fake.history))
        assert (found == expected).mean() > 0.99  # of two classes alike, either may win
    assert launches == [0, 1, 1]
    fake.history.clear()
    windows = model.segment(picture, size=40, window=32)[0]  # six, of the shape captured before
    assert sum(entry[0] == "launch" for entry in fake.history) == 6
    assert (windows == plain.segment(picture, size=40, window=32)[0]).mean() > 0.99


# What CUDA complains of ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cudaErrorInsufficientDriver: CUDA driver version is insufficient", "Update the driver"),
        ("cudaErrorUnsupportedPtxVersion: the provided PTX was compiled", "Update the driver"),
        ("cudaErrorMemoryAllocation: out of memory", "free_all_blocks"),
        ("cudaErrorNoKernelImageForDevice: no kernel image", "does not support the GPU"),
        ('error: could not open source file "cuda_fp16.h"', "does not find the headers"),
        ("libnvrtc.so.12: cannot open shared object file", r"cupy-cuda12x\[ctk\]"),
        ("libcublasLt.so.13: undefined symbol: cublasLtCreate", "another version"),
    ],
)
def test_errors_of_cuda_name_their_cure(text, words):
    with pytest.raises(DeviceError, match=words) as told, explained():
        raise RuntimeError(text)
    assert text in str(told.value)


def test_other_errors_stay_what_they_are():
    for error in (ValueError("x"), ShapeError("out of memory"), RuntimeError("another thing")):
        with pytest.raises(type(error), match=str(error)), explained():
            raise error
    strange = type("CUDARuntimeError", (RuntimeError,), {"__module__": "cupy_backends.cuda.api"})
    assert "process is restarted" in str(cuda_error(strange("cudaErrorIllegalAddress")))


def test_no_memory_left_is_said_of_a_forward_and_of_a_capture(fake, monkeypatch):
    model, images = model_on(fake), images_on(fake, 0)
    monkeypatch.setattr(recording_cupy, "most_bytes", [0])
    with pytest.raises(DeviceError, match=r"no memory is left .*smaller batch"):
        pvt_ref.forward(model, images, ops=table_of(Cuda()))
    with pytest.raises(DeviceError, match="no memory is left"):
        capture(lambda x: x + 1, images)


# On a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_a_replay_is_what_direct_launches_are(cupy):
    ops = table.cuda_kernels()
    config = replace(CONFIG, embed_dims=(32, 64, 64, 64), depths=(2, 1, 1, 1))
    params = on_device(cupy, random_params(config, 1, np.float32))
    model = pvt_ref.prepare(params, config)

    def function(x, dlogits):
        alone = pvt_ref.forward(model, x, ops=ops)
        logits, cache = pvt_ref.forward_with_cache(model, x, ops=ops)
        return alone, logits, pvt_ref.backward(model, cache, dlogits)[0]

    def inputs(seed):
        dlogits = cupy.asarray(normal(seed, 2, 5, dtype=np.float32))
        return images_on(cupy, seed), dlogits

    graph = capture(function, *inputs(0))
    for seed in range(100):
        given = inputs(seed)
        map_arrays(lambda y: y.fill(np.nan), graph.outputs)
        results = bits(graph(*given))
        assert results == bits(function(*given)), seed
        assert results == bits(graph(*given)), seed  # and the same bits twice


@pytest.mark.gpu
def test_on_a_gpu_threads_and_streams_do_not_disturb_each_other(cupy):
    ops, model = table.cuda_kernels(), model_on(cupy)
    graph = capture(lambda x: pvt_ref.forward(model, x, ops=ops), images_on(cupy, 0))
    images = [images_on(cupy, seed) for seed in range(4)]
    expected = [pvt_ref.forward(model, x, ops=ops).get() for x in images]
    wrong = []

    def ask(i):
        with cupy.cuda.Stream(non_blocking=True):
            for _ in range(100):
                for logits in (graph(images[i]), pvt_ref.forward(model, images[i], ops=ops)):
                    if logits.get().tobytes() != expected[i].tobytes():
                        wrong.append(i)

    cupy.cuda.Device().synchronize()
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_on_a_gpu_predict_replays(cupy, monkeypatch):
    monkeypatch.setenv("PVT_REF_OPS", "kernels")
    model = Model(on_device(cupy, random_params(CONFIG, 1, np.float32)), CONFIG)
    graphs = table.cuda_kernels().settings.graphs
    graphs.clear()
    answers = [model.predict(images_on(cupy, 0)) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert len(graphs) == 1


@pytest.mark.gpu
def test_on_a_gpu_segment_replays(cupy, monkeypatch):
    monkeypatch.setenv("PVT_REF_OPS", "kernels")
    config = SEGMENTORS["pvt"]
    model = Model(on_device(cupy, params_of(config, 1, np.float32)), config)
    graphs = table.cuda_kernels().settings.graphs
    graphs.clear()
    picture = Image.fromarray(rng_of(1).integers(0, 256, (20, 32, 3), np.uint8))
    answers = [model.segment(picture, size=20)[0].tobytes() for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert len(graphs) == 1


@pytest.mark.gpu
def test_on_a_gpu_work_of_the_host_is_refused(cupy):
    for function in (
        lambda x: x * float(x[0]),
        lambda x: x + cupy.asarray(np.ones(2)),
        lambda x: x[None] @ x[:, None],
    ):
        with pytest.raises(DeviceError, match="cannot be captured"):
            capture(function, cupy.ones(2))
    assert capture(lambda x: x + 1, cupy.ones(2))(cupy.ones(2)).get().tolist() == [2, 2]
