"""Every operation against torch.nn.functional and autograd, in float64 and in float32."""

import dataclasses
from inspect import signature

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import (
    FORWARD,
    assert_float32_error,
    assert_gradients_near,
    assert_near,
    relative,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import OPERATIONS, READABLE, OpCase
from oracles import tensor
from strategies import normal, rng_of, seeds

from pvt_ref import cross_entropy
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.patch_embed import kernel_to_matrix, matrix_to_kernel, patchify, unpatchify
from pvt_ref.layers.position import position, resize_matrix
from pvt_ref.ops import REFERENCE


def run_ours(case: OpCase, dtype):
    inputs = case.cast(lambda x: x.astype(dtype))
    y, cache = case.forward(inputs)
    dy = normal(97, *y.shape, dtype=dtype)
    return y, case.backward(inputs, cache, dy)


def run_torch(case: OpCase, dtype):
    inputs = case.cast(lambda x: tensor(x.astype(dtype), grad=True))
    y = case.torch(inputs)
    dy = tensor(normal(97, *y.shape, dtype=dtype))
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    return y.detach().numpy(), {k: g.numpy() for k, g in zip(inputs, grads, strict=True)}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_pytorch_in_float64(name):
    @settings(max_examples=20)
    @given(OPERATIONS[name])
    def check(case):
        y, grads = run_ours(case, np.float64)
        their_y, their_grads = run_torch(case, np.float64)
        may_vanish = case.name.startswith("drop") or not np.any(their_y)
        if np.any(their_y):
            assert_near(y, their_y, FORWARD, "y")
        else:
            assert may_vanish
            assert not np.any(y)
        # dy is of size 1: where the derivative cancels, its rounding noise is left
        order = sorted(case.inputs)
        assert sorted(grads) == order
        mine, theirs = {k: grads[k] for k in order}, {k: their_grads[k] for k in order}
        assert_gradients_near(mine, theirs, scale=1.0, may_vanish=True)

    check()


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_errs_at_most_twice_as_much_as_pytorch_in_float32(name):
    outputs, gradients = [], []

    @settings(max_examples=30)  # whatever the profile: the errors of fewer scatter
    @given(OPERATIONS[name])
    def collect(case):
        rounded = OpCase(
            case.name,
            case.facts,
            case.cast(lambda x: x.astype(np.float32).astype(np.float64)),
            case.forward,
            case.backward,
            case.torch,
        )
        y, grads = run_ours(rounded, np.float32)
        assert y.dtype == np.float32
        their_y, their_grads = run_torch(rounded, np.float32)
        inputs = rounded.inputs
        exact_y, cache = rounded.forward(inputs)
        dy = normal(97, *y.shape, dtype=np.float32).astype(np.float64)
        exact_grads = rounded.backward(inputs, cache, dy)
        outputs.append((y, their_y, exact_y))
        largest = max(np.abs(g).max() for g in exact_grads.values())
        for key, g in grads.items():
            assert g.dtype == np.float32, key
            if np.abs(exact_grads[key]).max() > 1e-3 * largest:  # else cancellation noise
                gradients.append((g, their_grads[key], exact_grads[key]))

    collect()
    assert_float32_error(outputs, what=name)
    assert_float32_error(gradients, what=f"gradients of {name}")


def test_float32_gradients_of_400000_rows_keep_their_digits():
    # a plain float32 sum over so many rows is off by 2.5e-5
    x = 1 + normal(1, 1, 400_000, 2, dtype=np.float32)
    dy = 1 + normal(2, 1, 400_000, 2, dtype=np.float32)
    wide = dy.astype(np.float64)

    p = LinearParams(np.ones((2, 2), np.float32), np.zeros(2, np.float32))
    _, cache = linear.forward(p, x)
    _, grads = linear.backward(p, cache, dy)
    assert relative(grads.bias, wide.sum(axis=(0, 1))) < 1e-7

    p = LayerNormParams(np.ones(2, np.float32), np.zeros(2, np.float32))
    _, cache = layer_norm.forward(p, x, REFERENCE, 1e-6)
    shifted = dataclasses.replace(cache, x_hat=cache.x_hat + np.float32(2))  # sums far from 0
    _, grads = layer_norm.backward(p, shifted, dy)
    assert relative(grads.bias, wide.sum(axis=(0, 1))) < 1e-7
    assert relative(grads.weight, (wide * shifted.x_hat).sum(axis=(0, 1))) < 1e-7

    table = np.zeros((1, 1, 2), np.float32)
    many = dy.reshape(400_000, 1, 2)
    _, cache = position.forward(table, many, REFERENCE, (1, 1), (1, 1), cls=False)
    _, dtable = position.backward(table, cache, many)
    assert relative(dtable[0], wide.sum(axis=1)) < 1e-7


@given(
    B=st.integers(1, 4),
    K=st.integers(1, 6),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    soft=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=seeds,
)
def test_cross_entropy_equals_pytorch(B, K, smoothing, reduction, soft, scale, seed):
    logits = normal(seed, B, K, scale=scale)
    rng = rng_of(seed)
    # soft targets need not sum to 1
    targets = 2 * rng.random((B, 1)) * rng.dirichlet(np.ones(K), B) if soft else None
    targets = rng.integers(0, K, B) if targets is None else targets
    loss, dlogits = cross_entropy(logits, targets, smoothing, reduction)
    x = tensor(logits, grad=True)
    theirs = F.cross_entropy(
        x, torch.tensor(targets), label_smoothing=smoothing, reduction=reduction
    )
    (their_dlogits,) = torch.autograd.grad(theirs, x)
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(dlogits, their_dlogits.numpy(), rtol=1e-10, atol=1e-15)


def test_cross_entropy_of_extreme_logits_equals_pytorch():
    # rows far apart, a class ten thousand behind, and one that a mask took out
    logits = np.array([[0.0, 1.0, 2000.0], [5000.0, 5001.0, 4999.0], [-1e4, 0.0, -np.inf]])
    labels = np.array([0, 1, 0])
    loss, dlogits = cross_entropy(logits, labels)
    x = tensor(logits, grad=True)
    theirs = F.cross_entropy(x, torch.tensor(labels))
    (their_dlogits,) = torch.autograd.grad(theirs, x)
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-13)
    np.testing.assert_allclose(dlogits, their_dlogits.numpy(), atol=1e-15)


def test_cross_entropy_keeps_float32_whatever_targets_and_smoothing_are():
    logits = normal(0, 3, 4, dtype=np.float32)
    for targets in (np.full((3, 4), 0.25), np.full((3, 4), 0.25, np.float16)):
        for smoothing in (0.0, 0.1, np.float64(0.1)):
            loss, dlogits = cross_entropy(logits, targets, smoothing)
            assert loss.dtype == dlogits.dtype == np.float32


def test_cross_entropy_takes_labels_of_any_integer_type_and_keeps_the_dtype():
    logits = normal(0, 3, 300, dtype=np.float32)
    labels = [7, 0, 255]
    expected = cross_entropy(logits, np.array(labels))
    for dtype in (np.uint8, np.int16, np.int32, np.uint64):
        loss, dlogits = cross_entropy(logits, np.array(labels, dtype))
        assert loss == expected[0]
        assert loss.dtype == dlogits.dtype == np.float32
        np.testing.assert_array_equal(dlogits, expected[1])


@given(P=st.integers(1, 4), h=st.integers(1, 3), w=st.integers(1, 3), seed=seeds)
def test_kernel_and_matrix_are_the_same_numbers_in_the_order_of_the_blocks(P, h, w, seed):
    kernel = normal(seed, 3, 2, P, P)
    matrix = kernel_to_matrix(kernel)
    np.testing.assert_array_equal(matrix_to_kernel(matrix, kernel.shape), kernel)
    for row in range(P):  # block order is row, column, channel
        for col in range(P):
            for c in range(2):
                np.testing.assert_array_equal(
                    matrix[:, (row * P + col) * 2 + c], kernel[:, c, row, col]
                )
    x = normal(seed, 2, h * P, w * P, 2)
    blocks = patchify(x, P)
    for i in range(h):
        for j in range(w):
            cut = x[:, i * P : (i + 1) * P, j * P : (j + 1) * P]
            np.testing.assert_array_equal(blocks[:, i * w + j], cut.reshape(2, -1))
    np.testing.assert_array_equal(unpatchify(blocks, P, (h, w)), x)


@given(out_size=st.integers(1, 12), in_size=st.integers(1, 12))
def test_resize_matrix_equals_interpolate_of_unit_vectors(out_size, in_size):
    unit = torch.eye(in_size, dtype=torch.float64).reshape(in_size, 1, in_size)
    theirs = F.interpolate(unit, size=out_size, mode="linear", align_corners=False)
    np.testing.assert_allclose(
        resize_matrix(out_size, in_size), theirs.reshape(in_size, out_size).numpy().T, atol=1e-14
    )


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n != "drop"])
def test_a_forward_keeps_its_cache_unless_told_not_to(name):
    op = READABLE[name.removeprefix("vit ")]
    assert signature(op.forward).parameters["keep"].default is True

    @settings(max_examples=3)
    @given(OPERATIONS[name])
    def check(case):
        assert case.forward(case.inputs, keep=True)[1] is not None
        assert case.forward(case.inputs, keep=False)[1] is None

    check()
