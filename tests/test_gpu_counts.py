"""The device of the course that only counts: it notes the kernels that others see started."""

import importlib
from collections import Counter
from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import Emulation
from strategies import normal

import pvt_ref
from pvt_ref import REFERENCE
from pvt_ref.arrays import is_numpy
from pvt_ref.kernels.cuda.launch import Cuda
from pvt_ref.kernels.cuda.table import table_with
from pvt_ref.models.architecture import architecture_of

TOOLS = Path(__file__).parents[1] / "docs" / "tools"


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("launches")


def both_passes(config, params, images, ops):
    """A forward and its backward, unchecked as the cores are."""
    row = architecture_of(config)
    logits, cache = row.forward(params, images, config, ops, None, True, None)
    return logits, *row.backward(params, cache, logits, ops)


CONFIGS = [
    pvt_ref.PVTConfig(
        img_size=32, num_classes=4, embed_dims=(8, 8, 12, 16), num_heads=(1, 2, 3, 4),
        depths=(2, 1, 1, 1), mlp_ratios=(2, 2, 2, 2),
    ),
    pvt_ref.ViTConfig(img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=4),
]  # fmt: skip


@pytest.mark.skipif(
    cuda_on_cpu.why_not() is not None, reason=cuda_on_cpu.why_not() or "there is g++"
)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_it_notes_the_kernels_that_the_emulation_runs(config, launches):
    started = Counter()

    def launch(function, grid, threads, arguments, shared=0):
        started[function.name] += 1
        Emulation()(function, grid, threads, arguments, shared)

    params = pvt_ref.init_params(config, np.random.default_rng(0))
    images = normal(1, 2, 3, 32, 32).astype(np.float32)
    run = both_passes(config, params, images, table_with(Cuda(launch, blocks=6), is_numpy))

    device = launches.Device()
    there = architecture_of(config).build_params(
        config, lambda leaf: device.empty(leaf.shape, "float32")
    )
    shapes = device.empty(images.shape, "float32")
    told = both_passes(config, there, shapes, table_with(Cuda(device.launch, blocks=6), None))
    noted = Counter(start.name for start in device.starts if start.name in started)
    assert noted == started
    assert {start.name for start in device.starts if start.kind == "kernel"} <= set(started)
    assert told[0].shape == run[0].shape
    assert told[2].shape == run[2].shape


@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b0"])
def test_products_are_those_of_the_bill(name, launches):
    """Twice the multiply-accumulates, but for a depth-wise convolution, which is no product."""
    config = pvt_ref.VARIANTS[name]
    row, device = architecture_of(config), launches.Device()
    params = row.build_params(config, lambda leaf: device.empty(leaf.shape, "float32"))
    images = device.empty((2, 3, 224, 224), "float32")
    with device.counted() as started:
        row.forward_pyramid(params, images, config, REFERENCE, None, False, None)
    flops = sum(start.operations for start in started if start.kind == "product")
    bill = pvt_ref.count_cost(config, batch=2, pyramid=True)
    macs = sum(item.macs for item in bill.items if "dwconv" not in item.operation)
    assert flops == 2 * macs


def test_bytes_of_views_and_of_what_is_broadcast(launches):
    device = launches.Device()
    x, b = device.empty((4, 6), "float32"), device.empty((6,), "float32")
    with device.counted() as started:
        device.reshape(x, (24,))
        device.permute_dims(x, (1, 0))
        x[1:]
    assert started == []
    with device.counted() as started:
        y = x + b
        y += b
        device.reshape(device.permute_dims(x, (1, 0)), (24,))  # has to be copied
        device.broadcast_to(b, (4, 6)) * 2.0
        x[:2] = y[:2]
    assert [start.moved for start in started] == [
        4 * (24 + 6 + 24), 4 * (24 + 6 + 24), 4 * 48, 4 * (6 + 24), 4 * 24,
    ]  # fmt: skip
    assert [start.kind for start in started] == [
        "elementwise", "elementwise", "copy", "elementwise", "copy",
    ]  # fmt: skip


def test_a_kernel_is_noted_only_with_as_many_arguments_as_it_has(launches):
    from pvt_ref.kernels.cuda.gelu import GELU

    device = launches.Device()
    x = device.empty((8,), "float32")
    device.launch(GELU, (1,), (256,), (x, x, 2))
    assert device.starts[-1][:3] == ("gelu", "kernel", 64)
    with pytest.raises(AssertionError, match="gelu"):
        device.launch(GELU, (1,), (256,), (x, 2))
