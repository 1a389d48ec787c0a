"""Properties 37 to 51, of the operations on maps: convolutions, resizing, pooling, and ReLU.

That they equal PyTorch's is shown with all others in test_layers.py, for every kernel, stride,
padding and size. Here stands what must hold whatever the numbers, by the
numbers that test_properties.py begins, and what is shown where PyTorch is no oracle.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import FORWARD, assert_near, relative
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from operations import OPERATIONS, backward, forward, table_under_test
from oracles import tensor
from strategies import normal, seeds

from pvt_ref.layers.conv import ConvParams, fold, unfold, windows_along
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import (
    PatchEmbedParams,
    kernel_to_matrix,
    matrix_to_kernel,
    patchify,
    unpatchify,
)
from pvt_ref.layers.pool import pool_matrix
from pvt_ref.layers.position import resize_positions
from pvt_ref.layers.resize import resize_matrix
from pvt_ref.ops import REFERENCE
from pvt_ref.report.shapes import Shapes
from pvt_ref.tree import map_arrays, named_arrays

small = st.integers(1, 4)
sides = st.integers(1, 9)
grids = st.tuples(sides, sides)
kernels = st.tuples(small, small)

#: Every matrix of one axis, by name.
MATRICES = {
    "nearest": lambda out, n: resize_matrix(out, n, "nearest"),
    "bilinear": resize_matrix,
    "bilinear, corners": lambda out, n: resize_matrix(out, n, "bilinear", True),
    "bicubic": lambda out, n: resize_matrix(out, n, "bicubic"),
    "bicubic, corners": lambda out, n: resize_matrix(out, n, "bicubic", True),
    "pool": pool_matrix,
}
MODES = [name for name in MATRICES if name != "pool"]
each_matrix = pytest.mark.parametrize("name", MATRICES)


def resized(x: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """x by the operation that uses the matrix of that name."""
    if name == "pool":
        return forward("pool", None, x, size)[0]
    mode, _, corners = name.partition(", ")
    return forward("resize", None, x, size, mode, bool(corners))[0]


def conv_forward(p: ConvParams, x: np.ndarray, stride: int, padding: int) -> np.ndarray:
    return forward("conv", p, x, stride, padding)[0]


def assert_rounded(x: np.ndarray, y: np.ndarray) -> None:
    np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


# Convolution ----------------------------------------------------------------------------------


def windows_of(x: np.ndarray, k: tuple[int, int], stride: int, padding: int) -> np.ndarray:
    """(B, h, w, k_h, k_w, C), by NumPy's own sliding windows."""
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, around), k, (1, 2))
    return windows[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)


@given(k=kernels, stride=small, padding=st.integers(0, 3), size=grids, C=small, seed=seeds)
def test_37_convolution_is_unfold_and_a_product(k, stride, padding, size, C, seed):
    assume(min(size[i] + 2 * padding - k[i] for i in range(2)) >= 0)
    x, p = normal(seed, 2, *size, C), ConvParams(normal(seed, 3, C, *k), normal(seed, 3))
    expected = windows_of(x, k, stride, padding)
    B, h, w = expected.shape[:3]
    assert windows_along(size, k, stride, padding) == (h, w)
    windows = unfold(x, k, stride, padding)
    np.testing.assert_array_equal(windows, expected.reshape(B, h * w, -1))
    product = windows @ kernel_to_matrix(p.weight).T + p.bias
    y = conv_forward(p, x, stride, padding)
    np.testing.assert_allclose(y, product.reshape(B, h, w, 3), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(
        matrix_to_kernel(kernel_to_matrix(p.weight), p.weight.shape), p.weight
    )


@given(k=kernels, stride=small, padding=st.integers(0, 3), size=grids, C=small, seed=seeds)
def test_38_fold_is_the_transpose_of_unfold(k, stride, padding, size, C, seed):
    assume(min(size[i] + 2 * padding - k[i] for i in range(2)) >= 0)
    x = normal(seed, 2, *size, C)
    windows = unfold(x, k, stride, padding)
    u = normal(seed + 1, *windows.shape)
    left, right = (windows * u).sum(), (x * fold(u, size, k, stride, padding)).sum()
    np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-11)


@given(P=small, h=small, w=small, C=small, seed=seeds)
def test_39_windows_side_by_side_are_patches(P, h, w, C, seed):
    x = normal(seed, 2, h * P, w * P, C)
    patches = patchify(x, P)
    np.testing.assert_array_equal(unfold(x, (P, P), P, 0), patches)
    put_back = fold(patches, (h * P, w * P), (P, P), P, 0)
    np.testing.assert_array_equal(put_back, unpatchify(patches, P, (h, w)))


@given(P=small, h=small, w=small, C_in=small, C=small, seed=seeds)
def test_39_convolution_with_stride_its_kernel_is_the_patch_embedding(P, h, w, C_in, C, seed):
    x = normal(seed, 2, h * P, w * P, C_in)
    p = ConvParams(normal(seed, C, C_in, P, P), normal(seed, C))
    embed = PatchEmbedParams(LinearParams(p.weight, p.bias), None)
    y, cache = forward("conv", p, x, P, 0)
    tokens, embed_cache = forward("patch_embed", embed, x, 1e-6)
    exact = table_under_test() is REFERENCE
    assert_same = np.testing.assert_array_equal if exact else assert_rounded
    assert_same(y.reshape(tokens.shape), tokens)
    dy = normal(seed + 1, *y.shape)
    dx, grads = backward("conv", p, cache, dy)
    embed_dx, embed_grads = backward("patch_embed", embed, embed_cache, dy.reshape(tokens.shape))
    assert_same(dx, embed_dx)
    assert_same(grads.weight, embed_grads.proj.weight)
    assert_same(grads.bias, embed_grads.proj.bias)


@given(
    stride=small,
    k=st.integers(1, 5),
    padding=st.integers(0, 2),
    size=st.tuples(st.integers(12, 16), st.integers(12, 16)),
    seed=seeds,
)
def test_40_a_shift_by_the_stride_moves_the_inner_outputs_by_one(stride, k, padding, size, seed):
    x, p = normal(seed, 1, *size, 2), ConvParams(normal(seed, 3, 2, k, k), normal(seed, 3))
    moved = np.zeros_like(x)
    moved[:, stride:, stride:] = x[:, :-stride, :-stride]
    y, y_moved = conv_forward(p, x, stride, padding), conv_forward(p, moved, stride, padding)
    # windows of moved that lie inside of what was moved, with no padding
    first = -(-(stride + padding) // stride)
    last = [(n + padding - k) // stride for n in size]
    inner = y_moved[:, first : last[0] + 1, first : last[1] + 1]
    assert inner.size > 0
    np.testing.assert_allclose(inner, y[:, first - 1 : last[0], first - 1 : last[1]], atol=1e-12)


layers = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))  # k, stride, padding


@given(first=layers, second=layers, size=st.tuples(*[st.integers(30, 34)] * 2), seed=seeds)
@example(first=(7, 4, 3), second=(3, 2, 1), size=(32, 37), seed=0)  # of PVT v2
def test_40_a_shift_by_the_total_stride_moves_the_inner_outputs_by_one(first, second, size, seed):
    x, ((k, s, a), (k_2, s_2, a_2)) = normal(seed, 1, *size, 2), (first, second)
    p = ConvParams(normal(seed, 3, 2, k, k), normal(seed, 3))
    q = ConvParams(normal(seed, 2, 3, k_2, k_2), normal(seed, 2))
    moved = np.zeros_like(x)
    moved[:, s * s_2 :, s * s_2 :] = x[:, : -s * s_2, : -s * s_2]
    y, y_moved = (conv_forward(q, conv_forward(p, image, s, a), s_2, a_2) for image in (x, moved))

    def inner(n):  # outputs of moved that read what was moved, and no padding
        for i in range(1, n):
            begin = (i * s_2 - a_2) * s - a
            if begin >= s * s_2 and begin + (k_2 - 1) * s + k <= n:
                yield i

    rows, columns = (np.array(list(inner(n))) for n in size)
    assert min(len(rows), len(columns)) > 0
    expected = y[:, rows - 1][:, :, columns - 1]
    np.testing.assert_allclose(y_moved[:, rows][:, :, columns], expected, atol=1e-11)


@given(k=small, stride=st.integers(1, 6), padding=st.integers(0, 2), n=sides, seed=seeds)
def test_41_pixels_that_no_window_reaches_get_no_gradient(k, stride, padding, n, seed):
    assume(n + 2 * padding >= k)
    x, p = normal(seed, 1, n, n, 1), ConvParams(1 + np.abs(normal(seed, 1, 1, k, k)), None)
    y, cache = forward("conv", p, x, stride, padding)
    dx, grads = backward("conv", p, cache, np.ones_like(y))
    starts = range(0, n + 2 * padding - k + 1, stride)
    read = {start + u - padding for start in starts for u in range(k)} & set(range(n))
    expected = np.zeros((n, n), bool)
    expected[np.ix_(sorted(read), sorted(read))] = True
    np.testing.assert_array_equal(dx[0, :, :, 0] != 0, expected)
    assert grads.bias is None


@given(H=st.integers(1, 40), W=st.integers(1, 40))
def test_41_an_overlapping_embedding_loses_no_pixel(H, W):
    # the two convolutions of PVT v2: ceil(H/4) and ceil(H/2), whatever the size
    for k, stride in ((7, 4), (3, 2)):
        p = ConvParams(np.ones((1, 1, k, k)), None)
        y, cache = forward("conv", p, np.ones((1, H, W, 1)), stride, k // 2)
        assert y.shape == (1, math.ceil(H / stride), math.ceil(W / stride), 1)
        dx, _ = backward("conv", p, cache, np.ones_like(y))
        assert (dx > 0).all()


def test_a_cache_of_a_convolution_does_not_change_with_the_callers_map():
    x, p = normal(0, 2, 4, 5, 3), ConvParams(normal(1, 2, 3, 1, 1), None)
    mine = x.copy()
    y, cache = forward("conv", p, mine, 1, 0)  # windows of one pixel: a view would do
    expected = backward("conv", p, cache, y)[1].weight.copy()
    mine[...] = 7.0
    np.testing.assert_array_equal(backward("conv", p, cache, y)[1].weight, expected)


# Depth-wise -----------------------------------------------------------------------------------


@given(k=st.sampled_from([1, 3, 5]), size=grids, C=small, seed=seeds)
def test_42_depthwise_is_a_convolution_in_as_many_groups_as_channels(k, size, C, seed):
    x, p = normal(seed, 2, *size, C), ConvParams(normal(seed, C, 1, k, k), normal(seed, C))
    diagonal = np.zeros((C, C, k, k))
    diagonal[range(C), range(C)] = p.weight[:, 0]
    whole = ConvParams(diagonal, p.bias)
    y, cache = forward("depthwise_conv", p, x)
    other, other_cache = forward("conv", whole, x, 1, k // 2)
    np.testing.assert_allclose(y, other, rtol=1e-11, atol=1e-12)
    dy = normal(seed + 1, *y.shape)
    dx, grads = backward("depthwise_conv", p, cache, dy)
    other_dx, other_grads = backward("conv", whole, other_cache, dy)
    np.testing.assert_allclose(dx, other_dx, rtol=1e-11, atol=1e-12)
    of_channels = other_grads.weight[range(C), range(C)]
    np.testing.assert_allclose(grads.weight[:, 0], of_channels, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(grads.bias, other_grads.bias, rtol=1e-11, atol=1e-11)
    for c in range(C):  # and each group is a convolution of its own
        of_one = ConvParams(p.weight[c : c + 1], p.bias[c : c + 1])
        assert_rounded(conv_forward(of_one, x[..., c : c + 1], 1, k // 2), y[..., c : c + 1])


@given(k=st.sampled_from([(1, 3), (3, 3), (5, 3), (7, 7)]), size=grids, C=small, seed=seeds)
def test_43_a_kernel_with_a_one_in_the_middle_changes_nothing(k, size, C, seed):
    x, weight = normal(seed, 2, *size, C), np.zeros((C, 1, *k))
    weight[:, 0, k[0] // 2, k[1] // 2] = 1
    y, cache = forward("depthwise_conv", ConvParams(weight, None), x)
    np.testing.assert_array_equal(y, x)
    dy = normal(seed + 1, *x.shape)
    dx, grads = backward("depthwise_conv", ConvParams(weight, None), cache, dy)
    np.testing.assert_array_equal(dx, dy)
    assert grads.bias is None


def test_float32_gradients_of_a_large_depthwise_kernel_keep_their_digits():
    # a plain float32 sum over so many pixels is off by 2.5e-5
    x = 1 + normal(1, 1, 400_000, 1, 2, dtype=np.float32)
    dy = 1 + normal(2, 1, 400_000, 1, 2, dtype=np.float32)
    p = ConvParams(np.ones((2, 1, 1, 1), np.float32), np.zeros(2, np.float32))
    _, cache = forward("depthwise_conv", p, x)
    _, grads = backward("depthwise_conv", p, cache, dy)
    exact = (dy.astype(np.float64) * x).sum(axis=(0, 1, 2))
    assert relative(grads.weight[:, 0, 0, 0], exact) < 2e-7
    assert relative(grads.bias, dy.astype(np.float64).sum(axis=(0, 1, 2))) < 1e-7


# Resizing and pooling -------------------------------------------------------------------------


@each_matrix
@given(out=st.integers(1, 60), n=st.integers(1, 60))
def test_44_rows_sum_to_one(name, out, n):
    A = MATRICES[name](out, n)
    assert A.shape == (out, n)
    assert A.dtype == np.float64
    np.testing.assert_allclose(A.sum(axis=1), 1, rtol=1e-13)
    np.testing.assert_array_equal(MATRICES[name](n, n), np.eye(n))


@each_matrix
@given(size=grids, C=small, dtype=st.sampled_from([np.float32, np.float64]), seed=seeds)
def test_44_to_its_own_size_a_map_is_itself(name, size, C, dtype, seed):
    x = normal(seed, 2, *size, C, dtype=dtype)
    np.testing.assert_array_equal(resized(x, size, name), x)


@each_matrix
@given(size=grids, new=grids, C_in=small, C=small, seed=seeds)
def test_45_resizing_commutes_with_a_pointwise_convolution(name, size, new, C_in, C, seed):
    # the rows sum to 1, so that even the bias passes through
    x, p = normal(seed, 2, *size, C_in), ConvParams(normal(seed, C, C_in, 1, 1), normal(seed, C))
    first = resized(conv_forward(p, x, 1, 0), new, name)
    np.testing.assert_allclose(first, conv_forward(p, resized(x, new, name), 1, 0), atol=1e-12)


@each_matrix
@given(size=grids, new=grids, C=small, seed=seeds)
def test_46_height_and_width_can_change_places(name, size, new, C, seed):
    x = normal(seed, 2, *size, C)
    y = resized(x, new, name)
    turned = resized(x.transpose(0, 2, 1, 3), new[::-1], name)
    np.testing.assert_allclose(turned, y.transpose(0, 2, 1, 3), atol=1e-13)


@pytest.mark.parametrize("name", [name for name in MODES if name != "nearest"])
def test_twice_two_is_not_four(name):
    x = normal(1, 1, 8, 8, 3)
    twice = resized(resized(x, (16, 16), name), (32, 32), name)
    assert relative(twice, resized(x, (32, 32), name)) > 0.02


def test_nearest_twice_two_is_four():
    x = normal(1, 1, 8, 8, 3)
    twice = resized(resized(x, (16, 16), "nearest"), (32, 32), "nearest")
    np.testing.assert_array_equal(twice, resized(x, (32, 32), "nearest"))


@pytest.mark.parametrize("name", [name for name in MODES if name != "nearest"])
@given(out=st.integers(1, 60), n=st.integers(1, 60))
def test_the_matrix_is_that_of_interpolate(name, out, n):
    # by unit vectors; along the other axis, bicubic's weights at the centre of a cell are 0 and 1
    mode, _, corners = name.partition(", ")
    unit = torch.eye(n, dtype=torch.float64).reshape(n, 1, n, 1)
    theirs = F.interpolate(unit, size=(out, 1), mode=mode, align_corners=bool(corners))
    A = theirs.reshape(n, out).numpy().T
    np.testing.assert_allclose(MATRICES[name](out, n), A, atol=1e-13)


@given(out=st.integers(1, 200), n=st.integers(1, 200))
def test_47_nearest_takes_the_exact_quotient_rounded_down(out, n):
    read = resize_matrix(out, n, "nearest").argmax(axis=1)
    assert read.tolist() == [math.floor(i * Fraction(n, out)) for i in range(out)]


def test_nearest_is_exact_where_pytorch_is_not():
    read = resize_matrix(44, 26, "nearest").argmax(axis=1)
    assert read.tolist() == [math.floor(i * Fraction(26, 44)) for i in range(44)]
    cells = torch.arange(26, dtype=torch.float32).reshape(1, 1, 26, 1)
    theirs = F.interpolate(cells, size=(44, 1), mode="nearest").ravel()
    assert theirs[22] == 12  # 22 * 26/44 = 13, in float32 a little less
    assert read[22] == 13
    # the only sizes that a pyramid needs
    for n in range(1, 200):
        for out in (2 * n, 2 * n - 1):
            cells = torch.arange(n, dtype=torch.float64).reshape(1, 1, n)
            theirs = F.interpolate(cells, size=out, mode="nearest").ravel().numpy()
            np.testing.assert_array_equal(resize_matrix(out, n, "nearest").argmax(axis=1), theirs)


@given(size=grids, C=small, seed=seeds)
def test_47_back_from_twice_the_size_nearest_adds_up_squares(size, C, seed):
    x = normal(seed, 2, *size, C)
    y, cache = forward("resize", None, x, (2 * size[0], 2 * size[1]), "nearest")
    np.testing.assert_array_equal(y, x.repeat(2, axis=1).repeat(2, axis=2))
    dy = normal(seed + 1, *y.shape)
    dx, _ = backward("resize", None, cache, dy)
    squares = dy.reshape(2, size[0], 2, size[1], 2, C).sum(axis=(2, 4))
    np.testing.assert_allclose(dx, squares, atol=1e-13)


@given(out=sides, n=sides)
def test_48_pooling_is_the_mean_of_each_cell(out, n):
    x = normal(3, n)
    cells = [x[math.floor(i * n / out) : math.ceil((i + 1) * n / out)] for i in range(out)]
    np.testing.assert_allclose(pool_matrix(out, n) @ x, [c.mean() for c in cells], rtol=1e-12)


@given(n=st.integers(1, 30), more=st.integers(0, 30))
def test_48_enlarging_by_pooling_repeats_only_where_n_divides_o(n, more):
    P = pool_matrix(n + more, n)
    repeats = bool((P == 1).any(axis=1).all())
    assert repeats == ((n + more) % n == 0)
    if repeats:
        np.testing.assert_array_equal(P, np.eye(n).repeat((n + more) // n, axis=0))


def test_two_inputs_become_seven():
    mean = [0.5, 0.5]
    expected = [[1, 0]] * 3 + [mean] + [[0, 1]] * 3
    np.testing.assert_array_equal(pool_matrix(7, 2), expected)


@given(size=grids, new=grids, C=small, mode=st.sampled_from(["bilinear", "bicubic"]), seed=seeds)
def test_49_position_tables_are_resized_as_maps_are(size, new, C, mode, seed):
    rows = normal(seed, size[0] * size[1], C)
    y, _ = forward("resize", None, rows.reshape(1, *size, C), new, mode)
    found = resize_positions(rows, size, new, mode)
    if table_under_test() is REFERENCE:
        np.testing.assert_array_equal(found, y.reshape(-1, C))
    # the kernel for maps adds up the same numbers in another order
    np.testing.assert_allclose(found, y.reshape(-1, C), rtol=0, atol=1e-14)


# ReLU -----------------------------------------------------------------------------------------


@given(scale=st.sampled_from([0.0, 0.1, 10.0]), seed=seeds)
def test_50_relu_minus_its_mirror_is_x_and_a_positive_factor_passes(scale, seed):
    x, dy = normal(seed, 5, 7), normal(seed + 1, 5, 7)
    (y, cache), (mirror, mirror_cache) = (forward("relu", None, at) for at in (x, -x))
    np.testing.assert_array_equal(y - mirror, x)
    np.testing.assert_array_equal(y + mirror, np.abs(x))
    np.testing.assert_array_equal(forward("relu", None, y)[0], y)  # once is enough
    np.testing.assert_array_equal(forward("relu", None, scale * x)[0], scale * y)
    # every gradient goes through one of the two
    dx, dmirror = (backward("relu", None, at, dy)[0] for at in (cache, mirror_cache))
    np.testing.assert_array_equal(dx + dmirror, dy)
    assert not (dx * dmirror).any()


def test_relu_of_what_is_not_finite_is_pytorchs():
    x = np.array([-np.inf, -1.0, -0.0, 0.0, 5e-324, 1.0, np.inf, np.nan])
    y, _ = forward("relu", None, x)
    np.testing.assert_array_equal(y, F.relu(tensor(x)).numpy())
    finite = x[:-1]
    _, cache = forward("relu", None, finite)
    dy = np.full(finite.shape, np.inf)  # times 0 it would be NaN
    theirs = torch.autograd.grad(F.relu(t := tensor(finite, grad=True)), t, tensor(dy))[0]
    np.testing.assert_array_equal(backward("relu", None, cache, dy)[0], theirs.numpy())
    np.testing.assert_array_equal(backward("relu", None, cache, dy)[0][2:4], [0, 0])


# All of them ----------------------------------------------------------------------------------

#: Linear in x, so that A^T needs no differences.
LINEAR_IN_X = ("conv", "depthwise_conv", "pool", "resize")


@pytest.mark.parametrize("name", LINEAR_IN_X)
def test_51_adjoint_to_the_last_digits(name):
    @given(OPERATIONS[name], seeds)
    def check(case, seed):
        biasless = {key: x for key, x in case.inputs.items() if not key.endswith("bias")}
        Ax, cache = case.forward(biasless)
        u = normal(seed, *Ax.shape)
        x, ATu = case.inputs["x"], case.backward(biasless, cache, u)["x"]
        size = np.linalg.norm(x) * np.linalg.norm(ATu) + np.linalg.norm(Ax) * np.linalg.norm(u)
        assert abs((Ax * u).sum() - (x * ATu).sum()) <= 1e-14 * size

    check()


@pytest.mark.parametrize("name", [*LINEAR_IN_X, "relu", "position"])
def test_a_run_on_arrays_without_numbers_has_the_shapes_of_a_real_one(name, monkeypatch):
    monkeypatch.setenv("PVT_REF_OPS", "reference")

    @given(OPERATIONS[name])
    def check(case):
        y, cache = case.forward(case.inputs)
        grads = case.backward(case.inputs, cache, y)
        xp = Shapes()
        inputs = case.cast(lambda x: xp.empty(x.shape, x.dtype))
        their_y, their_cache = case.forward(inputs)
        theirs = (their_y, their_cache, case.backward(inputs, their_cache, their_y))
        for (key, a), (other, b) in zip(
            named_arrays(theirs), named_arrays((y, cache, grads)), strict=True
        ):
            assert (key, a.shape, a.dtype) == (other, b.shape, b.dtype)

    check()


@pytest.mark.parametrize("name", LINEAR_IN_X)
def test_every_kind_of_case_is_drawn(name):
    seen = set()

    @settings(max_examples=40)  # whatever the profile: fewer do not draw every kind
    @given(OPERATIONS[name])
    def collect(case):
        x, (y, _) = case.inputs["x"], case.forward(case.inputs)
        facts = {
            "B > 1": x.shape[0] > 1,
            "H != W": x.shape[1] != x.shape[2],
            "C > 1": x.shape[3] > 1,
            "smaller": y.shape[1] < x.shape[1],
            "larger": y.shape[1] > x.shape[1],
            "bias": "conv.bias" in case.inputs,
            "no bias": "conv.bias" not in case.inputs,
        }
        if name.endswith("conv"):
            k = case.inputs["conv.weight"].shape[2:]
            facts |= {"k_h != k_w": k[0] != k[1], "k > H": k[0] > x.shape[1]}
        seen.update(fact for fact, true in facts.items() if true)

    collect()
    needed = {"B > 1", "H != W", "C > 1"}
    if name != "depthwise_conv":
        needed |= {"smaller", "larger"}
    if name.endswith("conv"):
        needed |= {"bias", "no bias", "k_h != k_w", "k > H"}
    assert needed <= seen, needed - seen


def test_gradients_of_a_stack_are_those_of_autograd():
    # an overlapping embedding, depth-wise, ReLU, pooled and resized: caches fit one another
    x = normal(0, 2, 9, 11, 3)
    p, q = ConvParams(normal(1, 4, 3, 3, 3), normal(2, 4)), ConvParams(normal(3, 4, 1, 3, 3), None)
    a, conv_cache = forward("conv", p, x, 2, 1)
    b, depth_cache = forward("depthwise_conv", q, a)
    c, relu_cache = forward("relu", None, b)
    d, pool_cache = forward("pool", None, c, (7, 4))
    y, resize_cache = forward("resize", None, d, (5, 13), "bicubic", False)
    dy = normal(5, *y.shape)
    dd, _ = backward("resize", None, resize_cache, dy)
    dc, _ = backward("pool", None, pool_cache, dd)
    db, _ = backward("relu", None, relu_cache, dc)
    da, dq = backward("depthwise_conv", q, depth_cache, db)
    dx, dp = backward("conv", p, conv_cache, da)

    leaves = map_arrays(lambda leaf: tensor(leaf, grad=True), (x, p.weight, p.bias, q.weight))
    t = F.conv2d(leaves[0].permute(0, 3, 1, 2), leaves[1], leaves[2], stride=2, padding=1)
    t = F.relu(F.conv2d(t, leaves[3], padding=1, groups=4))
    t = F.interpolate(F.adaptive_avg_pool2d(t, (7, 4)), size=(5, 13), mode="bicubic")
    t = t.permute(0, 2, 3, 1)
    assert_near(y, t.detach().numpy(), FORWARD)
    theirs = torch.autograd.grad(t, leaves, tensor(dy))
    for ours, g in zip((dx, dp.weight, dp.bias, dq.weight), theirs, strict=True):
        assert_near(ours, g.numpy(), 1e-11)
