"""The worked example of CONTRIBUTING runs as it stands, and is right."""

import ast
import re
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
from strategies import normal

import pvt_ref
from pvt_ref.layers import relu as relu_file
from pvt_ref.layers.gelu import gelu
from pvt_ref.ops import Operation

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
LAYER, TRIED = map(
    textwrap.dedent, re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL | re.MULTILINE)
)


def without_docstrings(source: str) -> str:
    """The code alone, in one form whatever its line breaks."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body.pop(0)
    return ast.unparse(tree)


def test_the_new_operation_is_the_one_in_the_package():
    source = Path(relu_file.__file__).read_text(encoding="utf-8")
    assert without_docstrings(LAYER) == without_docstrings(source)


def test_the_new_operation_is_right_and_its_twin_is_asked_for(monkeypatch):
    module = types.ModuleType("relu_of_contributing")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(LAYER, module.__dict__)
    x, dy = normal(0, 3, 4), normal(1, 3, 4)
    y, cache = module.relu.forward(None, x)
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    np.testing.assert_array_equal(module.relu.backward(None, cache, dy)[0], dy * (x > 0))
    assert module.relu.forward(None, x, keep=False)[1] is None
    assert module.relu.is_readable()

    config = pvt_ref.PVTConfig(
        img_size=32, num_classes=5, embed_dims=(4, 8, 12, 16), num_heads=(1, 2, 3, 4)
    )
    params = pvt_ref.init_params(config, np.random.default_rng(0))
    images = normal(2, 1, 3, 32, 32, dtype=np.float32)
    names = {**vars(module), "np": np, "pvt_ref": pvt_ref, "gelu": gelu, "Operation": Operation}
    names |= {"params": params, "images": images, "config": config}
    exec(TRIED, names)
    readable = pvt_ref.REFERENCE.replace(gelu, module.relu)
    expected = pvt_ref.forward(params, images, config, ops=readable)
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-4, atol=1e-6)
