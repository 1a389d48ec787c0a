"""The checks that anybody can import: a law holds for what is right, and fails for what is not."""

import contextlib
import importlib.util
import io
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pvt_ref import Operation
from pvt_ref.layers.attention import attention
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.testing import LawError, check_operation, check_vjp, close, shape_comments

PAGE = Path(__file__).parents[1] / "docs" / "api" / "testing.md"
rng = np.random.default_rng(3)


def normal(*shape):
    return rng.standard_normal(shape)


P, X = LinearParams(normal(4, 3), normal(4)), normal(2, 5, 3)


# close --------------------------------------------------------------------------------------------


def test_close_compares_whole_arrays_and_names_the_first_wrong_entry():
    x = normal(3, 4)
    close(x * (1 + 1e-13), x)
    wrong = x.copy()
    wrong[1, 2] += 1.0
    wrong[2, 0] += 5.0
    with pytest.raises(LawError, match=r"^values: y\[1, 2\] is \S+; it must be \S+$") as found:
        close(wrong, x, what="y")
    assert found.value.index == (1, 2)
    assert isinstance(found.value, AssertionError)
    close(wrong, x, tolerance=10.0)


def test_close_sees_what_is_not_finite():
    x = np.array([1.0, np.inf])
    close(x, x)
    for other in ([1.0, np.nan], [1.0, -np.inf], [np.nan, np.inf]):
        with pytest.raises(LawError):
            close(np.array(other), x, tolerance=1e9)
    with pytest.raises(LawError):
        close(np.array([1.0, np.nan]), np.ones(2), tolerance=1e9)


def test_close_refuses_other_shapes_and_comparisons_with_zeros():
    with pytest.raises(LawError, match=r"y has shape \(2,\); it must be \(2, 1\)"):
        close(np.ones(2), np.ones((2, 1)), what="y")
    with pytest.raises(ValueError, match="compared with zeros"):
        close(np.ones(2), np.zeros(2))
    close(np.full(2, 1e-14), np.zeros(2), floor=1.0)
    with pytest.raises(LawError):
        close(np.full(2, 1e-3), np.zeros(2), floor=1.0)
    with pytest.raises(LawError, match=r"0\.1234567; it must be 0\.1234568"):
        close(0.1234567, 0.1234568)


# check_operation ----------------------------------------------------------------------------------


def test_operations_of_the_package_obey_all_laws():
    check_operation(linear, P, X, expected=linear)
    check_operation(layer_norm, LayerNormParams(normal(4), normal(4)), normal(2, 3, 4), 1e-5)
    q, k, v = normal(2, 2, 3, 4), normal(2, 2, 5, 4), normal(2, 2, 5, 4)
    check_operation(attention, None, (q, k, v), 0.5, names={"x.0": "q", "x.1": "k", "x.2": "v"})


def changed(forward=None, backward=None):
    """Linear with something done to what it is given or gives."""

    def run(p, x, ops, keep=True):
        y, cache = linear.forward(p, x, ops, keep=keep)
        return forward(p, x, y, cache, keep) if forward else (y, cache)

    def back(p, cache, dy, ops):
        dx, grads = linear.backward(p, cache, dy, ops)
        return backward(p, cache, dy, dx, grads) if backward else (dx, grads)

    return Operation(run, back)


def written(x):
    x += 1.0
    return x


calls: list[float] = []


def counted(x):
    calls.append(1.0)
    return x + len(calls)


FORWARDS = {
    "returns": lambda p, x, y, cache, keep: y,
    "dtype": lambda p, x, y, cache, keep: (y.astype(np.float64), cache),
    "pure": lambda p, x, y, cache, keep: (y, (written(x), cache)[1]),
    "repeatable": lambda p, x, y, cache, keep: (counted(y), cache),
    "samples": lambda p, x, y, cache, keep: (y + y.mean(), cache),
    "keep=False": lambda p, x, y, cache, keep: (y, cache if keep else "something"),
}
BACKWARDS = {
    "gradient": lambda p, cache, dy, dx, g: (dx, (g.weight, g.bias)),
    "gradient shape": lambda p, cache, dy, dx, g: (dx, LinearParams(g.weight.T, g.bias)),
    "gradient dtype": lambda p, cache, dy, dx, g: (dx.astype(np.float64), g),
    "linear in dy": lambda p, cache, dy, dx, g: (dx, replace(g, bias=g.bias * np.abs(g.bias))),
    "batch": lambda p, cache, dy, dx, g: (dx, replace(g, bias=g.bias / len(dy))),
    "finite differences": lambda p, cache, dy, dx, g: (2 * dx, g),
    "pure": lambda p, cache, dy, dx, g: (dx, (written(dy), g)[1]),
    "cache": lambda p, cache, dy, dx, g: (dx, (written(cache.x), g)[1]),
}


@pytest.mark.parametrize("law", FORWARDS)
def test_a_broken_forward_is_named(law):
    with pytest.raises(LawError) as found:
        check_operation(changed(FORWARDS[law]), P, X)
    assert found.value.law == law


@pytest.mark.parametrize("law", BACKWARDS)
def test_a_broken_backward_is_named(law):
    with pytest.raises(LawError) as found:
        check_operation(changed(backward=BACKWARDS[law]), P, X)
    assert found.value.law == law


def test_a_cache_that_is_spoilt_once_is_noticed():
    def zeroed(p, cache, dy, dx, g):  # a second time there is nothing left to spoil
        cache.x.fill(0)
        return dx, g

    with pytest.raises(LawError) as found:
        check_operation(changed(backward=zeroed), P, X)
    assert found.value.law == "cache"


def test_another_operations_values_and_gradients_are_compared():
    twice = changed(lambda p, x, y, cache, keep: (2 * y, cache))
    with pytest.raises(LawError, match=r"^values: y\[0, 0, 0\]"):
        check_operation(twice, P, X, expected=linear)
    longer = changed(lambda p, x, y, cache, keep: (np.concatenate([y, y], axis=-1), cache))
    with pytest.raises(LawError, match=r"^shape: y has shape \(2, 5, 8\); it must be \(2, 5, 4\)"):
        check_operation(longer, P, X, expected=linear)

    def skewed(p, cache, dy, dx, g):  # less than differences can see
        return dx * (1 + 1e-7), g

    check_operation(changed(backward=skewed), P, X)
    with pytest.raises(LawError, match=r"^gradient values: the gradient of x, at \[0, 0, 0\]"):
        check_operation(changed(backward=skewed), P, X, expected=linear)


def test_memory_layouts_and_remembered_forwards_are_told():
    def raveled(p, x, ops, keep=True):
        y = x.ravel("K").reshape(x.shape)  # in the order of memory
        return y, x if keep else None

    op = Operation(raveled, lambda p, cache, dy, ops: (dy, None))
    with pytest.raises(LawError, match=r"^layout \(Fortran order\): y\[0, 0, 1\]"):
        check_operation(op, None, normal(2, 3, 4))
    kept = {}

    def remembers(p, x, ops, keep=True):
        kept["x"] = x
        return x * x, kept if keep else None

    op = Operation(remembers, lambda p, cache, dy, ops: (2 * cache["x"] * dy, None))
    with pytest.raises(LawError) as found:
        check_operation(op, None, normal(2, 3))
    assert found.value.law == "state"


# check_vjp ----------------------------------------------------------------------------------------


def test_check_vjp_takes_any_function():
    def forward(x, w):
        return np.sin(x) @ w, (x, w)

    def backward(cache, dy):
        x, w = cache
        return (dy @ w.T) * np.cos(x), np.sin(x).T @ dy

    x, w = normal(3, 2), normal(2, 4)
    check_vjp(forward, backward, x, w)
    with pytest.raises(LawError, match=r"the gradient of input 1, at \[0, 0\], is"):
        check_vjp(forward, lambda c, dy: (backward(c, dy)[0], c[0].T @ dy), x, w)
    with pytest.raises(LawError, match="a tuple of 2 gradients, one for each input"):
        check_vjp(forward, lambda c, dy: backward(c, dy)[0], x, w)
    with pytest.raises(LawError, match="must return two: y, cache"):
        check_vjp(lambda x, w: np.sin(x) @ w, backward, x, w)
    check_vjp(lambda x: (x * x, x), lambda x, dy: (2 * x * dy,), normal(4), batched=True)


def test_a_gradient_that_is_not_a_number_is_no_gradient():
    nan = math.nan
    with pytest.raises(LawError) as found:
        check_vjp(lambda x: (x * x, x), lambda x, dy: (nan * dy,), normal(4))
    assert found.value.law == "finite differences"


# shape_comments -----------------------------------------------------------------------------------

LAYER = '''
"""A layer."""


def f(x, w):
    """Doubles.

    Args:
        x: (B, C).
        w: (K, C).
    """
    y = x @ w.T  # (B, K)
    return y


def unused(x):
    """Nothing x (B, C)."""
    return x  # (B, C)
'''


def module(tmp_path, name, source):
    path = tmp_path / f"{name}.py"
    path.write_text(source, "utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_shape_comments_hold_or_are_told(tmp_path):
    before = sys.gettrace()
    right = module(tmp_path, "right", LAYER)
    wrong = module(tmp_path, "wrong", LAYER.replace("# (B, K)", "# (K, B)"))
    with shape_comments(right) as comments:
        right.f(normal(2, 3), normal(4, 3))
    assert [text.split(": ")[1] for text in comments.unreached()] == ["(B, C)"]
    with (
        pytest.raises(LawError, match=r"wrong\.py:12: # \(K, B\): it is \(2, 4\)"),
        shape_comments(wrong),
    ):
        wrong.f(normal(2, 3), normal(4, 3))
    with (
        pytest.raises(LawError, match="no line with a shape comment of right"),
        shape_comments(right),
    ):
        pass
    assert sys.gettrace() == before


def test_the_page_runs():
    blocks = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 3
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks:
            exec(block, names)
