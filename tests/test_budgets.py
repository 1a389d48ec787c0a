"""What is counted, not timed: Python calls, kernels, lines. Each count has a budget.

A count is the same on every machine, and a time is not. Budgets lie about a tenth above what was
counted when they were set. If you need more, raise one and say in the commit what for; a count that
falls below half of its budget fails, so that the budget is lowered.
"""

import ast
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import normal

import pvt_ref
from pvt_ref import REFERENCE
from pvt_ref.kernels.cuda.launch import Cuda
from pvt_ref.kernels.cuda.table import table_with
from pvt_ref.models.architecture import architecture_of

PACKAGE = Path(pvt_ref.__file__).parent
TOOLS = Path(__file__).parents[1] / "docs" / "tools"
WIDTHS: Any = {"embed_dims": (8, 8, 12, 16), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)}
FOUR_BLOCKS = {
    "pvt": pvt_ref.PVTConfig(img_size=32, num_classes=4, mlp_ratios=(2, 2, 2, 2), **WIDTHS),
    "pvt_v2": replace(pvt_ref.VARIANTS["pvt_v2_b0"], num_classes=4, **WIDTHS),
    "vit": pvt_ref.ViTConfig(img_size=32, num_classes=4, embed_dim=24, depth=4, num_heads=3),
}

#: Calls of the package's functions by one network of four blocks: a forward, and a backward.
CALLS = {
    ("pvt", "reference"): (600, 850),
    ("pvt", "blocked"): (2400, 3450),
    ("pvt_v2", "reference"): (1150, 1650),
    ("pvt_v2", "blocked"): (3450, 6150),
    ("vit", "reference"): (370, 515),
    ("vit", "blocked"): (1720, 2550),
}

#: What a device is told to start, by a forward and by its backward, two images of 224x224.
STARTS = {
    ("pvt_tiny", "reference"): (575, 845),
    ("pvt_tiny", "cuda"): (130, 390),
    ("pvt_v2_b0", "reference"): (885, 1635),
    ("pvt_v2_b0", "cuda"): (147, 430),
    ("deit_ti_16", "reference"): (600, 880),
    ("deit_ti_16", "cuda"): (113, 366),
}

#: Lines of code in a folder, as :func:`code_lines` counts them.
LINES = {"layers": 910, "blocks": 475, "heads": 425}


def calls(function: Callable[[], object]) -> int:
    """How many functions of the package are called, those that helper threads call left out."""
    count = 0

    def note(frame, event, arg):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(("network", "name"), CALLS)
def test_a_network_of_four_blocks_makes_few_python_calls(network, name):
    config = FOUR_BLOCKS[network]
    ops = pvt_ref.blocked_ops() if name == "blocked" else REFERENCE
    params = pvt_ref.init_params(config, np.random.default_rng(0))
    images = normal(1, 1, 3, 32, 32).astype(np.float32)
    logits, cache = pvt_ref.forward_with_cache(params, images, config, ops=ops)  # warms up
    forward = calls(lambda: pvt_ref.forward(params, images, config, ops=ops))
    backward = calls(lambda: pvt_ref.backward(params, cache, logits, config, ops=ops))
    for counted, budget in zip((forward, backward), CALLS[network, name], strict=True):
        assert budget / 2 < counted <= budget


def test_calls_are_counted():
    assert calls(lambda: None) == 0
    assert calls(lambda: pvt_ref.count_cost(pvt_ref.VARIANTS["pvt_tiny"])) > 10


@pytest.mark.parametrize(("variant", "name"), STARTS)
def test_a_device_starts_few_kernels(variant, name, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    device = importlib.import_module("launches").Device()
    monkeypatch.delitem(sys.modules, "launches")
    config = pvt_ref.VARIANTS[variant]
    row = architecture_of(config)
    ops = table_with(Cuda(device.launch, blocks=132), None) if name == "cuda" else REFERENCE
    params = row.build_params(config, lambda leaf: device.empty(leaf.shape, "float32"))
    images = device.empty((2, 3, 224, 224), "float32")
    with device.counted() as forward:
        logits, cache = row.forward(params, images, config, ops, None, True, None)
    with device.counted() as backward:
        row.backward(params, cache, logits, ops)
    for started, budget in zip((forward, backward), STARTS[variant, name], strict=True):
        assert budget / 2 < len(started) <= budget


def code_lines(source: str) -> int:
    """Lines on which a statement or an expression begins, docstrings left out."""
    tree = ast.parse(source)
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr) and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            lines.add(node.lineno)
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    for text in texts:
        lines -= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return len(lines)


def test_lines_of_code_are_counted():
    source = '"""One.\n\nTwo."""\n\nx = 1  # a\n# b\n\n'
    source += 'def f(\n    y,\n):\n    """Three."""\n    return y\n'
    assert code_lines(source) == 3


@pytest.mark.parametrize("part", LINES)
def test_what_the_papers_say_stays_short(part):
    files = sorted((PACKAGE / part).glob("*.py"))
    counted = sum(code_lines(path.read_text(encoding="utf-8")) for path in files)
    assert LINES[part] / 2 < counted <= LINES[part]
