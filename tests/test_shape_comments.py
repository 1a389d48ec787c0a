"""The shape comments of layers, blocks and model hold: testing/comments.py executes them."""

import importlib.util
import pkgutil
import re
import sys
import textwrap
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import pvt_ref
import pvt_ref.blocks
import pvt_ref.heads
import pvt_ref.layers
from pvt_ref import PVTConfig, PVTv2Config, ViTConfig
from pvt_ref.heads.fpn import fpn
from pvt_ref.heads.mla import mla_head, mla_neck
from pvt_ref.heads.semantic_fpn import semantic_fpn
from pvt_ref.heads.setr import setr
from pvt_ref.layers.batch_norm import BatchNormBuffers, BatchNormParams, batch_norm
from pvt_ref.layers.conv import ConvParams, conv
from pvt_ref.layers.cross_entropy import cross_entropy
from pvt_ref.layers.depthwise_conv import depthwise_conv
from pvt_ref.layers.dropout import dropout_channels
from pvt_ref.layers.pool import pool
from pvt_ref.layers.position import position
from pvt_ref.layers.relu import relu
from pvt_ref.layers.resize import resize
from pvt_ref.models import head_parts
from pvt_ref.models.architecture import Leaf
from pvt_ref.models.pvt import model
from pvt_ref.models.pvt_v2 import model as model_v2
from pvt_ref.models.vit import model as vit_model
from pvt_ref.ops import REFERENCE
from pvt_ref.testing.comments import ShapeComments, find_shapes, read_functions, spelt

#: Sizes that coincide nowhere within a stage, not even those that are made of others.
B, H, W, K = 11, 96, 224, 13
CONFIG = PVTConfig(
    img_size=64,  # so the tables are resized
    in_chans=5,
    num_classes=K,
    patch_sizes=(4, 2, 2, 2),
    embed_dims=(10, 15, 32, 8),
    num_heads=(2, 3, 4, 2),
    mlp_ratios=(3, 4, 5, 5),
    depths=(1, 2, 1, 1),
    sr_ratios=(4, 2, 2, 1),
    drop_rate=0.1,
    attn_drop_rate=0.1,
    drop_path_rate=0.1,
)
_SHARED = ("in_chans", "num_classes", "embed_dims", "num_heads", "mlp_ratios", "depths")
#: PVT v2 on the same grids, with both kinds of attention.
V2 = PVTv2Config(**{name: getattr(CONFIG, name) for name in _SHARED}, sr_ratios=(4, 2, 2, 1))
GRIDS = ((H, W), *CONFIG.grids(H, W))
STAGES = {
    "C": (CONFIG.in_chans, *CONFIG.embed_dims),
    "H": tuple(h for h, _ in GRIDS),
    "W": tuple(w for _, w in GRIDS),
}


def modules() -> list[types.ModuleType]:
    """Every file of layers, blocks and heads, and the models."""
    found = [model, model_v2, vit_model]
    for package in (pvt_ref.layers, pvt_ref.blocks, pvt_ref.heads):
        for file in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            found.append(importlib.import_module(file.name))
    return found


@pytest.fixture(scope="module")
def comments() -> ShapeComments:
    """After a classifier and a pyramid, forward and backward, and what is in neither."""
    rng = np.random.default_rng(0)
    params = pvt_ref.init_params(CONFIG, rng)
    images = rng.standard_normal((B, CONFIG.in_chans, H, W), np.float32)
    cache: Any
    comments = ShapeComments(modules(), STAGES)
    with comments:
        logits, cache = model.forward(params, images, CONFIG, REFERENCE, rng)
        model.backward(params, cache, logits, REFERENCE)
        maps, cache = model.forward_pyramid(params, images, CONFIG, REFERENCE, rng)
        model.backward_pyramid(params, cache, maps, REFERENCE)
        for config in (V2, replace(V2, linear=True)):
            params = pvt_ref.init_params(config, rng)
            logits, cache = model_v2.forward(params, images, config, REFERENCE, rng)
            model_v2.backward(params, cache, logits, REFERENCE)
            maps, cache = model_v2.forward_pyramid(params, images, config, REFERENCE, rng)
            model_v2.backward_pyramid(params, cache, maps, REFERENCE)

        labels = np.arange(B)
        cross_entropy(logits, labels, ignore_index=3)
        logit_maps = rng.standard_normal((B, K, 3, 7))
        many = {"ignore_index": 3, "class_weights": np.ones(K)}
        cross_entropy(logit_maps, np.zeros((B, 3, 7), int), **many)
        cross_entropy(logit_maps, logit_maps)
        # a model's own tables are square, so h and w would be one number
        table, x = rng.standard_normal((1, 1 + 4 * 9, 8)), rng.standard_normal((B, 1 + 3 * 7, 8))
        _, cache = position.forward(table, x, REFERENCE, (3, 7), (4, 9), True)
        position.backward(table, cache, x)
        run_on_maps(rng)
        run_vit(rng)
        run_heads(rng)
    return comments


def run_vit(rng: np.random.Generator) -> None:
    """The columnar ViT, on sizes of which no two agree."""
    config = ViTConfig(
        img_size=8, patch_size=4, embed_dim=10, depth=2, num_heads=2, mlp_ratio=3, in_chans=5,
        num_classes=K, drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1,
    )  # fmt: skip
    params = pvt_ref.init_params(config, rng)
    images = rng.standard_normal((B, 5, 12, 28), np.float32)
    cache: Any
    logits, cache = vit_model.forward(params, images, config, REFERENCE, rng)
    vit_model.backward(params, cache, logits, REFERENCE)
    maps, cache = vit_model.forward_pyramid(params, images, config, REFERENCE, rng, numbers=(0, 1))
    vit_model.backward_pyramid(params, cache, maps, REFERENCE)


def run_on_maps(rng: np.random.Generator) -> None:
    """The operations that no PVT asks for, on sizes of which no two agree."""
    x = rng.standard_normal((B, 13, 17, 10))
    p = ConvParams(rng.standard_normal((8, 10, 4, 3)), rng.standard_normal(8))
    y, cache = conv.forward(p, x, REFERENCE, stride=2, padding=1)
    conv.backward(p, cache, y)
    p = ConvParams(rng.standard_normal((10, 1, 5, 3)), None)
    y, cache = depthwise_conv.forward(p, x)
    depthwise_conv.backward(p, cache, y)
    for op in (resize, pool):
        y, cache = op.forward(None, x, REFERENCE, (23, 29))
        op.backward(None, cache, y)
    y, cache = relu.forward(None, x)
    relu.backward(None, cache, y)
    _, cache = dropout_channels.forward(None, x, REFERENCE, 0.5, rng)
    dropout_channels.backward(None, cache, x)
    C = np.ones(10)
    for batch_statistics in (True, False):
        buffers = BatchNormBuffers(C, C, np.array(0))
        p = BatchNormParams(C, C)
        y, cache = batch_norm.forward(p, x, REFERENCE, buffers, batch_statistics)
        batch_norm.backward(p, cache, y)


def run_heads(rng: np.random.Generator) -> None:
    """The heads, on maps of the stages' sizes and on others of which no two agree."""

    def make(leaf: Leaf) -> np.ndarray:
        return rng.random(leaf.shape)

    maps = [
        rng.standard_normal((B, *grid, C))
        for grid, C in zip(GRIDS[1:], STAGES["C"][1:], strict=True)
    ]
    p = head_parts.build_fpn(make, STAGES["C"][1:], 19)
    maps, cache = fpn.forward(p, maps, REFERENCE)
    fpn.backward(p, cache, maps)
    p = head_parts.build_semantic_fpn(make, 19, 17, K)
    buffers = head_parts.build_semantic_fpn_buffers(make, 17)
    logits, cache = semantic_fpn.forward(p, maps, REFERENCE, buffers, True, 0.1, rng)
    semantic_fpn.backward(p, cache, logits)
    semantic_fpn.forward(p, maps, REFERENCE, buffers, False, keep=False)
    x = rng.standard_normal((B, 3, 7, 23))
    p = head_parts.build_setr(make, 23, 17, K, 1, 3)
    buffers = head_parts.build_setr_buffers(make, 17, 1)
    logits, cache = setr.forward(p, x, REFERENCE, buffers, True)
    setr.backward(p, cache, logits)
    p = head_parts.build_mla_neck(make, 23, 17)
    buffers = head_parts.build_mla_neck_buffers(make, 17)
    sums, cache = mla_neck.forward(p, [x] * 4, REFERENCE, buffers, True)
    mla_neck.backward(p, cache, sums)
    p = head_parts.build_mla_head(make, 17, 10, K)
    buffers = head_parts.build_mla_head_buffers(make, 10)
    logits, cache = mla_head.forward(p, sums, REFERENCE, buffers, True)
    mla_head.backward(p, cache, logits)


def test_sizes_coincide_nowhere():
    for i in range(1, 5):
        stage, (h, w), C = CONFIG.of_stage(i), GRIDS[i], STAGES["C"][i]
        N, R, n = stage.num_heads, stage.sr_ratio, h * w
        reduced = [R, h // R, w // R, n // R**2] if R > 1 else []
        inside = [B, h, w, n, 1 + n, C, 2 * C, N, C // N, stage.hidden_dim, *reduced]
        assert len({*inside, 1}) == 1 + len(inside), f"stage {i}"
        entry = [B, stage.patch_size, *GRIDS[i - 1], STAGES["C"][i - 1], h, w, n, C]
        assert len(set(entry)) == len(entry), f"entry of stage {i}"
    everywhere = [B, K, *STAGES["C"], *STAGES["H"], *STAGES["W"], *(h * w for h, w in GRIDS)]
    assert len(set(everywhere)) == len(everywhere)


def test_every_comment_holds(comments):
    assert len(comments.comments) > 100
    assert not comments.faults, "\n".join(comments.faults)


def test_every_comment_is_reached_and_every_shape_that_it_offers(comments):
    assert not comments.unreached(), "\n".join(comments.unreached())


def test_a_wrong_last_dimension_is_caught_in_every_comment(comments):
    assert not comments.survivors(), "\n".join(comments.survivors())


def test_another_letter_is_caught_in_every_place(comments):
    assert not comments.confusable(), "\n".join(comments.confusable())


# The executor -------------------------------------------------------------------------------------


def run(tmp_path, source: str, *arguments, stages=None) -> ShapeComments:
    """Runs the function f of a module with that source."""
    path = tmp_path / "planted.py"
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    spec: Any = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    comments = ShapeComments([module], stages)
    before = sys.gettrace()
    with comments:
        module.f(*arguments)
    assert sys.gettrace() is before
    return comments


@pytest.mark.parametrize(
    ("shapes", "numbers"),
    [
        ("(B, n, C)", ["(B, n, C)"]),
        ("(C,), () and (...)", ["(C,)", "()", "(...,)"]),
        ("(..., 2C)", ["(..., (2 * C))"]),
        ("(B, 1 + n_i, (H/P)(W/P))", ["(B, (1 + n_i), ((H / P) * (W / P)))"]),
        ("(H_{i-1}, B H W, a - b*c)", ["(H_{i-1}, ((B * H) * W), (a - (b * c)))"]),
        ("(rows, num_classes)", ["(rows, num_classes)"]),
        ("f(x, y), (channels, last), (x, ), (PPC, 2), (B, *), (B, n", ["(x,)"]),
    ],
)
def test_shapes_are_found(shapes, numbers):
    assert [spelt(one.shape) for one in find_shapes(shapes)] == numbers


GOOD = """
    import types

    import numpy as np

    def f():
        p = types.SimpleNamespace(weight=np.ones((10, 4)), bias=None, num_heads=5)
        for tokens in (6, 7):
            g(p, np.ones((2, tokens, 4)), (2, 3))
        for i in (1, 2):
            x = np.ones(((7, 5, 3)[i], (7, 5, 3)[i - 1]))  # (C_i, C_{i-1})
        h([x.T])

    def g(p, x, grid):
        '''Docstring.

        Args:
            p: weight (C, C_in) and bias (C,), which may be None; num_heads (N).
            x: tokens (B, H*W, C_in), or (B, 1 + H*W, C_in) with
                a cls token.
            grid: (H, W).
        '''
        y = x @ p.weight.T  # (B, H*W, C), or (B, 1 + H*W, C)
        (heads, first), _ = (
            (y.reshape(*y.shape[:2], p.num_heads, -1)[:, -6:], x[:, 0]),
            None,
        )  # (B, H*W, N, d), the first array's
        n = x.shape[1]
        y = x.reshape(-1, n * 4)  # (B, n*C_in)
        shape = heads.shape  # (B, H W, N, C/N)
        first += 1  # (B, C_in)
        first[...] = 1  # (B, C_in)
        a, b = first, first  # (B, C_in) each
        return a, shape  # (B, C_in)

    def h(maps):
        '''Docstring.

        Args:
            maps: (C_i, C_{i+1}) each.
        '''
        try:
            never = maps[5]  # (B, n, C), not assigned since that raises
        except IndexError:
            never = maps[0].sum()  # ()
        return never  # ()
"""


def test_what_is_right_is_no_fault(tmp_path):
    comments = run(tmp_path, GOOD, stages={"C": (7, 5, 3)})
    assert comments.faults == []
    assert len(comments.comments) == 12
    assert [one.partition(": ")[2] for one in comments.unreached()] == ["(B, n, C)"]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("(B, n*C_in)", "(B, n*C)", r"# \(B, n\*C\): it is \(2, 24\)"),
        ("(B, n*C_in)", "(B, n, C_in)", r"it is \(2, 24\)"),
        ("(B, n*C_in)", "(B, k*C_in)", "k has no size"),
        ("(B, n*C_in)", "(..., C_in)", r"\.\.\. has no size"),
        ("(B, n*C_in)", "(B, n_1)", "n_1 has no size"),
        ("(B, H*W, C), or (B, 1 + H*W, C)", "(B, H*W, C)", r"it is \(2, 7, 10\)"),
        ("(B, H*W, N, d)", "(B, H*W, d, N)", r"it is \(2, 6, 5, 2\)"),
        ("(B, H W, N, C/N)", "(B, H W, N, N/C)", r"it is \(2, 6, 5, 2\)"),
        ("first  # (B, C_in) each", "x  # (B, C_in) each", r"it is \(2, [67], 4\)"),
        ("return a, shape  # (B, C_in)", "return x, a  # (B, C_in)", r"it is \(2, [67], 4\)"),
        ("(C_i, C_{i-1})", "(C_{i-1}, C_i)", r"it is \(5, 7\)"),
        ("(C_i, C_{i-1})", "(C_i, 7)", r"it is \(3, 5\)"),
        ("n = x.shape[1]", "n, H = x.shape[1], 1", "H is 2 in the docstring, 1 as assigned"),
        ("weight (C, C_in)", "weight (C, C)", r"weight \(C, C\): it is \(10, 4\)"),
        ("grid: (H, W)", "grid: (H, W, 1)", r"grid \(H, W, 1\): it is \(2, 3\)"),
        ("grid: (H, W)", "grid: H, W", "x .*: H has no size"),
        ("num_heads (N)", "heads (N)", "N has no size"),
        ("weight (C, C_in)", "kernel (C, C_in)", r"\(C, C_in\) stands beside no attribute"),
        ("1 + H*W, C_in)", "n, C_in)", "more than one of them fits"),
        ("maps: (C_i, C_{i+1})", "maps: (C_i, C_i)", r"maps\[0\] \(C_i, C_i\): it is \(5, 3\)"),
        ("never = maps[0].sum()", "never = None", "there is no array"),
    ],
)
def test_what_is_wrong_is_a_fault(tmp_path, old, new, fault):
    assert GOOD.count(old) == 1
    comments = run(tmp_path, GOOD.replace(old, new), stages={"C": (7, 5, 3)})
    assert any(re.search(fault, one) for one in comments.faults), comments.faults


@pytest.mark.parametrize(
    "line",
    [
        "x.sort()  # (B, C)",
        "x[0] = 1  # (C,)",
        "x.flags = 1  # (C,)",
        "if x:  # (B, C)",
        "x = 1  # (channels, last)",
        "x = 1  # (B, C) before, afterwards (C, B)",
        "x = 1  # not (B, C)",
        "x = (1,  # (B, C)",
    ],
)
def test_a_shape_where_it_cannot_be_checked_is_refused(tmp_path, line):
    path = tmp_path / "planted.py"
    end = {":": "\n        pass", ",": "\n    )"}.get(line.partition("  #")[0][-1], "")
    path.write_text(f"def f(x):\n    {line}{end}\n")
    with pytest.raises(ValueError, match=r"^planted.py:2: '# "):
        read_functions(path)


def test_a_shape_beside_a_field_is_refused(tmp_path):
    (tmp_path / "planted.py").write_text("class Record:\n    x: Array  # (B, C)\n")
    with pytest.raises(ValueError, match=r"^planted.py:2: '# \(B, C\)' stands where nothing"):
        read_functions(tmp_path / "planted.py")


def test_what_a_run_cannot_tell_apart_is_named(tmp_path):
    source = """
        import numpy as np

        def f(B, C):
            x = np.zeros((B, C))  # (B, C)
            return x[:0]  # (...)
    """
    comments = run(tmp_path, source.replace("  # (...)", ""), 3, 3)
    assert comments.confusable() == ["planted.py:5: (C, C)", "planted.py:5: (B, B)"]
    comments = run(tmp_path, source.replace("  # (...)", ""), 3, 4)
    assert comments.confusable() == comments.survivors() == []
    assert run(tmp_path, source, 3, 4).faults == ["planted.py:6: # (...): ... has no size"]
