"""Properties 1 to 35, and 58: what must hold of the mathematics, whatever the numbers.

They need no reference implementation, and they find what a reference cannot: a mistake that two
implementations share, an input that is written to, a sum that loses its digits. The letters say of
what kind a property is: V value, G gradient, L layout, S stability, P purity, R randomness.
The others stand with what they speak of: 36, on files, in test_checkpoint.py; 37 to 51, of the
operations on maps, in test_maps.py; 52 to 55, of PVT v2, in test_pvt_v2.py; 56 and 57, of ViT, in
test_vit.py.
"""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from closeness import FORWARD, assert_float32_error, assert_near, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import OPERATIONS, backward, forward, sra_settings, table_under_test
from strategies import (
    ModelCase,
    configs,
    model_cases,
    normal,
    random_params,
    rng_of,
    seeds,
    v2_cases,
    vit_cases,
)

import pvt_ref
from pvt_ref import REFERENCE, VARIANTS, cross_entropy
from pvt_ref.arrays import array_module
from pvt_ref.blocks.sra import SRAParams, sra
from pvt_ref.layers.attention import attention, attention_weights
from pvt_ref.layers.dropout import drop_path
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import PatchEmbedParams, patchify, unpatchify
from pvt_ref.layers.position import resize_matrix, resize_positions, resize_positions_backward
from pvt_ref.layers.softmax import softmax
from pvt_ref.tree import map_arrays, named_arrays

# The operations of the table under test, without what every call of them repeats.


def attention_forward(q, k, v, scale):
    return forward("attention", None, (q, k, v), scale)


def drop_backward(cache, dy):
    return backward("dropout", None, cache, dy)[0]


def drop_path_forward(x, rate, rng):
    return forward("drop_path", None, x, rate, rng)


def dropout_forward(x, rate, rng):
    return forward("dropout", None, x, rate, rng)


def gelu_forward(x):
    return forward("gelu", None, x)


def layer_norm_forward(p, x, eps):
    return forward("layer_norm", p, x, eps)


def patch_embed_forward(p, x, eps):
    return forward("patch_embed", p, x, eps)


def softmax_forward(x):
    return forward("softmax", None, x)


def softmax_backward(cache, dy):
    return backward("softmax", None, cache, dy)[0]


def sra_forward(p, x, grid, attn):
    return forward("sra", p, x, grid, attn)


any_operation = pytest.mark.parametrize("name", OPERATIONS)
any_network = pytest.mark.parametrize(
    "cases", [model_cases, v2_cases, vit_cases], ids=["PVT", "PVT v2", "ViT"]
)
small = st.integers(1, 4)


def unit_norm(C: int) -> LayerNormParams:
    return LayerNormParams(np.ones(C), np.zeros(C))


def random_norm(C: int, seed: int) -> LayerNormParams:
    return LayerNormParams(1 + 0.3 * normal(seed, C), 0.3 * normal(seed + 1, C))


def random_sra(C: int, R: int, seed: int) -> SRAParams:
    def linear(k: int, out: int) -> LinearParams:
        return LinearParams(normal(seed + k, out, C) / math.sqrt(C), normal(seed + k, out))

    sr = LinearParams(normal(seed + 3, C, C, R, R) / (R * math.sqrt(C)), normal(seed + 3, C))
    return SRAParams(
        linear(0, C),
        linear(1, 2 * C),
        linear(2, C),
        sr if R > 1 else None,
        random_norm(C, seed) if R > 1 else None,
    )


# Softmax --------------------------------------------------------------------------------------


@given(shape=st.tuples(small, small, small), scale=st.sampled_from([0, 1, 100.0]), seed=seeds)
def test_01_softmax_rows_are_distributions(shape, scale, seed):
    y, _ = softmax_forward(normal(seed, *shape, scale=scale))
    assert (y >= 0).all()
    np.testing.assert_allclose(y.sum(axis=-1), 1, rtol=1e-14)


@given(n=small, m=st.integers(2, 6), shift=st.floats(-1e4, 1e4), seed=seeds)
def test_02_softmax_ignores_a_shift_of_each_row(n, m, shift, seed):
    x = normal(seed, n, m)
    shifts = shift * normal(seed + 1, n, 1).clip(-1, 1)  # another one for each row
    y, _ = softmax_forward(x)
    np.testing.assert_allclose(softmax_forward(x + shifts)[0], y, atol=1e-11)


@given(n=small, m=st.integers(2, 6), seed=seeds)
def test_03_softmax_backward_rows_sum_to_zero(n, m, seed):
    _, cache = softmax_forward(normal(seed, n, m))
    dx = softmax_backward(cache, normal(seed + 1, n, m))
    assert np.abs(dx).max() > 1e-6
    np.testing.assert_allclose(dx.sum(axis=-1), 0, atol=1e-15)


# Layer norm -----------------------------------------------------------------------------------


@given(n=small, C=st.integers(3, 8), shift=st.floats(-100, 100), seed=seeds)
def test_04_layer_norm_ignores_a_shift(n, C, shift, seed):
    p, x = random_norm(C, seed), normal(seed, n, C)
    y, _ = layer_norm_forward(p, x, 1e-6)
    np.testing.assert_allclose(layer_norm_forward(p, x + shift, 1e-6)[0], y, atol=1e-9)


def test_04_layer_norm_of_tokens_far_from_zero_keeps_its_digits():
    # the mean of squares less the square of the mean would have none left
    x = 1e6 + normal(3, 5, 8)
    y, _ = layer_norm_forward(unit_norm(8), x, 1e-6)
    wide = x.astype(np.longdouble)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, expected.astype(float), atol=1e-8)


@given(
    n=small,
    C=st.integers(3, 8),
    a=st.sampled_from([1e-3, 0.5, 7.0]),
    eps=st.sampled_from([1e-6, 1e-1]),
    seed=seeds,
)
def test_05_layer_norm_scales_with_its_eps(n, C, a, eps, seed):
    p, x = random_norm(C, seed), normal(seed, n, C)
    y, _ = layer_norm_forward(p, x, eps)
    np.testing.assert_allclose(layer_norm_forward(p, a * x, a * a * eps)[0], y, atol=1e-11)


@given(n=small, C=st.integers(3, 8), seed=seeds)
def test_06_layer_norm_gives_mean_0_and_variance_1_with_ddof_0(n, C, seed):
    y, _ = layer_norm_forward(unit_norm(C), normal(seed, n, C), 0.0)
    np.testing.assert_allclose(y.mean(axis=-1), 0, atol=1e-13)
    np.testing.assert_allclose((y * y).mean(axis=-1), 1, rtol=1e-12)


def test_07_each_norm_has_its_own_eps():
    # With a tiny variance eps decides the result: its gain is sqrt(var / (var + eps)).
    config = dataclasses.replace(
        VARIANTS["pvt_tiny"], img_size=32, norm_eps=3e-3, projection_norm_eps=7e-4
    )
    seen: list[tuple[int, float]] = []

    spied = table_under_test().watched(
        lambda call: seen.append((call.args[1].shape[-1], call.args[3])), only=[layer_norm]
    )
    params = pvt_ref.init_params(config, rng_of(0), np.float64)
    pvt_ref.forward(params, normal(0, 1, 3, 32, 32), config, ops=spied)
    expected = []
    for C, R in zip(config.embed_dims, config.sr_ratios, strict=True):
        expected.append((C, 7e-4))  # patch_embed.norm
        for _ in range(2):
            expected += [(C, 3e-3)] + [(C, 7e-4)] * (R > 1) + [(C, 3e-3)]  # norm1, attn.norm, norm2
    assert seen == [*expected, (config.embed_dims[-1], 3e-3)]  # norm
    x = 1e-4 * normal(1, 5, 8)
    for eps in (1e-6, 1e-5):
        y, _ = layer_norm_forward(unit_norm(8), x, eps)
        gain = np.sqrt(x.var(axis=-1) / (x.var(axis=-1) + eps))
        np.testing.assert_allclose(y.std(axis=-1), gain, rtol=1e-10)


# GELU -----------------------------------------------------------------------------------------


@given(scale=st.sampled_from([0.1, 1, 10]), seed=seeds)
def test_08_gelu_minus_its_mirror_is_x(scale, seed):
    x = normal(seed, 50, scale=scale)
    np.testing.assert_allclose(gelu_forward(x)[0] - gelu_forward(-x)[0], x, atol=1e-14 * scale)
    one, _ = gelu_forward(np.array([1.0]))
    np.testing.assert_allclose(one, 0.8413447460685429, rtol=1e-15)


# Patches --------------------------------------------------------------------------------------


@given(P=st.integers(1, 3), h=small, w=small, C_in=small, seed=seeds)
def test_09_patch_embedding_is_a_strided_convolution_is_a_matrix_product(P, h, w, C_in, seed):
    C, B = 4, 2
    weight, bias = normal(seed, C, C_in, P, P), normal(seed + 1, C)
    x = normal(seed + 2, B, h * P, w * P, C_in)
    convolution = np.zeros((B, h, w, C))
    for i, j in itertools.product(range(h), range(w)):
        window = x[:, i * P : (i + 1) * P, j * P : (j + 1) * P]
        convolution[:, i, j] = np.einsum("bpqc,ocpq->bo", window, weight) + bias
    blocks = np.stack(
        [
            x[:, i * P : (i + 1) * P, j * P : (j + 1) * P].reshape(B, -1)
            for i, j in itertools.product(range(h), range(w))
        ],
        axis=1,
    )
    product = blocks @ weight.transpose(0, 2, 3, 1).reshape(C, -1).T + bias
    np.testing.assert_allclose(product, convolution.reshape(B, h * w, C), atol=1e-12)
    p = PatchEmbedParams(LinearParams(weight, bias), unit_norm(C))
    y, _ = patch_embed_forward(p, x, 1e-5)
    expected, _ = layer_norm_forward(unit_norm(C), product, 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-9)


@given(P=st.integers(1, 4), h=small, w=small, C=small, B=small, seed=seeds)
def test_10_unpatchify_inverts_patchify_bitwise(P, h, w, C, B, seed):
    x = normal(seed, B, h * P, w * P, C)
    np.testing.assert_array_equal(unpatchify(patchify(x, P), P, (h, w)), x)


@given(P=st.integers(1, 3), h=small, w=small, seed=seeds, data=st.data())
def test_11_one_pixel_moves_exactly_one_token(P, h, w, seed, data):
    C = 4  # more than 2: the norm of two numbers is always +1 and -1
    p = PatchEmbedParams(LinearParams(normal(seed, C, 3, P, P), normal(seed, C)), unit_norm(C))
    x = normal(seed, 1, h * P, w * P, 3)
    row = data.draw(st.integers(0, h * P - 1))
    col = data.draw(st.integers(0, w * P - 1))
    moved = x.copy()
    moved[0, row, col, 1] += 0.5
    before, _ = patch_embed_forward(p, x, 1e-5)
    after, _ = patch_embed_forward(p, moved, 1e-5)
    changed = np.flatnonzero((before != after).any(axis=-1)[0])
    assert changed.tolist() == [(row // P) * w + col // P]


@given(R=st.integers(2, 3), h=st.integers(1, 3), w=st.integers(1, 3), seed=seeds, data=st.data())
def test_12_each_key_and_value_depends_on_its_own_block_only(R, h, w, seed, data):
    C, grid, seen = 4, (h * R, w * R), []

    spied = table_under_test().watched(
        lambda call: seen.append(tuple(x.copy() for x in call.args[1][1:])), only=[attention]
    )
    p, attn = random_sra(C, R, seed), sra_settings(2, 1 / math.sqrt(2), 1e-5)
    x = normal(seed, 1, grid[0] * grid[1], C)
    token = data.draw(st.integers(0, grid[0] * grid[1] - 1))
    moved = x.copy()
    moved[0, token, 1] += 0.5
    for tokens in (x, moved):
        spied[sra].forward(p, tokens, spied, grid, attn)
    row, col = divmod(token, grid[1])
    own = (row // R) * w + col // R
    for before, after in zip(*seen, strict=True):  # k, then v: (1, N, m, d)
        assert before.shape == (1, 2, h * w, 2)
        changed = np.flatnonzero((before != after).any(axis=(0, 1, 3)))
        assert changed.tolist() == [own]


# Attention ------------------------------------------------------------------------------------


@given(N=st.integers(1, 3), n=small, d=st.integers(2, 3), B=small, seed=seeds)
def test_13_sra_with_r_1_is_plain_multi_head_attention(N, n, d, B, seed):
    C = N * d
    p, x = random_sra(C, 1, seed), normal(seed, B, n, C)
    y, _ = sra_forward(p, x, (1, n), sra_settings(N, 1 / math.sqrt(d), 1e-5))
    q = x @ p.q.weight.T + p.q.bias
    k = x @ p.kv.weight[:C].T + p.kv.bias[:C]
    v = x @ p.kv.weight[C:].T + p.kv.bias[C:]
    heads = []
    for j in range(N):  # head by head, as eq. 2 and 4 say
        own = slice(j * d, (j + 1) * d)
        scores = q[..., own] @ k[..., own].transpose(0, 2, 1) / math.sqrt(d)
        weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
        heads.append(weights @ v[..., own])
    expected = np.concatenate(heads, axis=-1) @ p.proj.weight.T + p.proj.bias
    np.testing.assert_allclose(y, expected, atol=1e-11)


def qkv(seed: int, n: int, m: int, d: int = 3, B: int = 2, N: int = 2):
    return normal(seed, B, N, n, d), normal(seed + 1, B, N, m, d), normal(seed + 2, B, N, m, d)


def attend(q, k, v, scale=0.7):
    return attention_forward(q, k, v, scale)[0]


@given(n=small, m=st.integers(2, 5), seed=seeds)
def test_14_permuting_keys_with_their_values_changes_nothing(n, m, seed):
    q, k, v = qkv(seed, n, m)
    order = rng_of(seed).permutation(m)
    np.testing.assert_allclose(
        attend(q, k[:, :, order], v[:, :, order]), attend(q, k, v), atol=1e-13
    )


@given(n=st.integers(2, 5), m=small, R=st.integers(1, 2), h=small, w=small, seed=seeds)
def test_15_permuting_queries_or_whole_blocks_permutes_the_outputs(n, m, R, h, w, seed):
    q, k, v = qkv(seed, n, m)
    order = rng_of(seed).permutation(n)
    np.testing.assert_allclose(
        attend(q[:, :, order], k, v), attend(q, k, v)[:, :, order], atol=1e-13
    )
    # SRA sees no positions: R x R blocks of tokens may change places, with their outputs
    C, grid = 4, (h * R, w * R)
    p, attn = random_sra(C, R, seed), sra_settings(2, 1 / math.sqrt(2), 1e-5)
    blocks = patchify(normal(seed, 2, *grid, C), R)  # (B, m, R*R*C)
    order = rng_of(seed).permutation(h * w)

    def run(blocks):
        x = unpatchify(blocks, R, (h, w)).reshape(2, -1, C)
        y, _ = sra_forward(p, x, grid, attn)
        return patchify(y.reshape(2, *grid, C), R)

    np.testing.assert_allclose(run(blocks[:, order]), run(blocks)[:, order], atol=1e-11)


@given(N=st.integers(2, 3), R=st.integers(1, 2), seed=seeds)
def test_16_permuting_heads_with_all_their_weights_changes_nothing(N, R, seed):
    d, grid = 2, (2 * R, R)
    C = N * d
    p, x = random_sra(C, R, seed), normal(seed, 2, grid[0] * grid[1], C)
    attn = sra_settings(N, 1 / math.sqrt(2), 1e-5)
    heads = rng_of(seed).permutation(N)
    rows = np.concatenate([np.arange(j * d, (j + 1) * d) for j in heads])
    both = np.concatenate([rows, C + rows])
    permuted = dataclasses.replace(
        p,
        q=LinearParams(p.q.weight[rows], p.q.bias[rows]),
        kv=LinearParams(p.kv.weight[both], p.kv.bias[both]),
        proj=LinearParams(p.proj.weight[:, rows], p.proj.bias),
    )
    y, _ = sra_forward(p, x, grid, attn)
    np.testing.assert_allclose(sra_forward(permuted, x, grid, attn)[0], y, atol=1e-11)


@given(n=small, m=small, seed=seeds)
def test_17_values_of_one_give_one(n, m, seed):
    q, k, v = qkv(seed, n, m)
    np.testing.assert_allclose(attend(q, k, np.ones_like(v)), 1, rtol=1e-14)


@given(n=small, m=small, c=st.sampled_from([-3.0, 0.01, 50.0]), seed=seeds)
def test_18_what_queries_gain_and_keys_lose_cancels(n, m, c, seed):
    q, k, v = qkv(seed, n, m)
    np.testing.assert_allclose(attend(c * q, k / c, v), attend(q, k, v), atol=1e-12)


@given(n=small, m=small, seed=seeds)
def test_19_a_zero_query_gets_the_mean_of_the_values(n, m, seed):
    q, k, v = qkv(seed, n, m)
    expected = np.broadcast_to(v.mean(axis=2, keepdims=True), q.shape)
    np.testing.assert_allclose(attend(np.zeros_like(q), k, v), expected, atol=1e-14)


@any_network
def test_20_samples_do_not_see_each_other(cases):
    @settings(max_examples=15)
    @given(cases(classifier=True))
    def check(case):
        assert_samples_are_apart(dataclasses.replace(case, batch=3))

    check()


def assert_samples_are_apart(case: ModelCase) -> None:
    params, images, config = case.params(), case.images(), case.config
    logits = pvt_ref.forward(params, images, config)
    maps = pvt_ref.forward_pyramid(params, images, config)
    order = [2, 0, 1]
    assert_near(pvt_ref.forward(params, images[order], config), logits[order], FORWARD)
    for b in range(3):
        assert_near(pvt_ref.forward(params, images[b : b + 1], config), logits[b : b + 1], FORWARD)
        alone = pvt_ref.forward_pyramid(params, images[b : b + 1], config)
        for one, all_ in zip(alone, maps, strict=True):
            assert_near(one, all_[b : b + 1], FORWARD)


# Gradients of every operation -----------------------------------------------------------------


@any_operation
def test_21_backward_is_linear_in_dy(name):
    @given(OPERATIONS[name], st.sampled_from([-2.0, 0.5]))
    def check(case, a):
        y, cache = case.forward(case.inputs)
        u, v = normal(1, *y.shape), normal(2, *y.shape)
        du, dv = case.backward(case.inputs, cache, u), case.backward(case.inputs, cache, v)
        both = case.backward(case.inputs, cache, a * u + v)
        zero = case.backward(case.inputs, cache, np.zeros_like(y))
        for key in case.inputs:
            np.testing.assert_allclose(both[key], a * du[key] + dv[key], rtol=1e-9, atol=1e-10)
            assert not np.any(zero[key])

    check()


def directional_derivative(f, inputs, direction, step=1e-6):
    """Central difference along a direction in all inputs, float64."""
    up = f({k: x + step * direction[k] for k, x in inputs.items()})
    down = f({k: x - step * direction[k] for k, x in inputs.items()})
    return (up - down) / (2 * step)


@any_operation
def test_22_adjoint_identity_of_every_operation(name):
    # <J v, u> = <v, J^T u>, J v by differences, J^T u by our backward; u and v are random
    @given(OPERATIONS[name])
    def check(case):
        y, cache = case.forward(case.inputs)
        u = normal(1, *y.shape)
        v = {key: normal(2 + i, *x.shape) for i, (key, x) in enumerate(case.inputs.items())}
        grads = case.backward(case.inputs, cache, u)
        right = sum((v[key] * grads[key]).sum() for key in v)
        size = math.sqrt(sum((grads[key] ** 2).sum() for key in v))
        # where a norm meets an almost constant token the function bends within the step
        allowed = 1e-5 * (size + abs(right)) + 1e-8  # and the differences' own rounding
        left = (
            (directional_derivative(lambda i: case.forward(i)[0], case.inputs, v, step) * u).sum()
            for step in (1e-6, 1e-5, 1e-7)
        )
        assert any(abs(x - right) <= allowed for x in left), right

    check()


@any_network
@pytest.mark.parametrize("pyramid", [False, True], ids=["logits", "pyramid"])
def test_22_adjoint_identity_of_the_model(pyramid, cases):
    @settings(max_examples=15)
    @given(cases(classifier=None if pyramid else True, dropout=True))
    def check(case):
        config, params, images = case.config, case.params(), case.images()
        tree = (params, images)
        v = map_arrays(lambda x: normal(5, *x.shape), tree)

        def run(tree: tuple[Any, Any]):
            # the same seed: the masks are part of the function
            if pyramid:
                outputs, cache = pvt_ref.forward_pyramid_with_cache(*tree, config, rng_of(9))
            else:
                logits, cache = pvt_ref.forward_with_cache(*tree, config, rng_of(9))
                outputs = [logits]
            return outputs, cache

        outputs, cache = run(tree)
        u = [normal(i, *y.shape) for i, y in enumerate(outputs)]
        if pyramid:
            grads = pvt_ref.backward_pyramid(params, cache, u, config)
        else:
            grads = pvt_ref.backward(params, cache, u[0], config)

        def dot(a, b):
            flat_a, flat_b = dict(named_arrays(a)), dict(named_arrays(b))
            return sum((flat_a[key] * flat_b[key]).sum() for key in flat_a)

        right = dot(v, grads)
        size = math.sqrt(dot(grads, grads))
        left = []
        for step in (1e-5, 1e-6, 1e-7):
            up, _ = run(map_arrays(lambda x, d: x + step * d, tree, v))  # noqa: B023
            down, _ = run(map_arrays(lambda x, d: x - step * d, tree, v))  # noqa: B023
            left.append(
                sum(((a - b) * w).sum() for a, b, w in zip(up, down, u, strict=True)) / (2 * step)
            )
        assert size > 0
        assert min(abs(x - right) for x in left) <= 1e-5 * (size + abs(right)), (left, right)

    check()


@any_operation
def test_23_complex_step_agrees_to_the_last_digits(name):
    # Im f(x + ih v) / h is J v without any cancellation, where f is analytic
    if table_under_test() is not REFERENCE:
        pytest.skip("the kernels take real numbers only; PVT_REF_OPS=reference runs this test")
    h = 1e-30

    @given(OPERATIONS[name])
    def check(case):
        y, cache = case.forward(case.inputs)
        u = normal(1, *y.shape)
        v = {key: normal(2 + i, *x.shape) for i, (key, x) in enumerate(case.inputs.items())}
        stepped, _ = case.forward({key: x + 1j * h * v[key] for key, x in case.inputs.items()})
        np.testing.assert_allclose(stepped.real, y, rtol=1e-12, atol=1e-14)
        left = (stepped.imag / h * u).sum()
        grads = case.backward(case.inputs, cache, u)
        size = math.sqrt(sum((grads[key] ** 2).sum() for key in v))
        right = sum((v[key] * grads[key]).sum() for key in v)
        # relative, or the rounding of terms of size 1 that cancel
        allowed = 1e-12 * (size + abs(left)) * math.sqrt(y.size) + 1e-14
        assert abs(left - right) <= allowed, (left, right)

    check()


def gradients(case: ModelCase, params, images, dlogits):
    logits, cache = pvt_ref.forward_with_cache(params, images, case.config)
    assert logits.shape == dlogits.shape
    return pvt_ref.backward(params, cache, dlogits, case.config)


@settings(max_examples=15)
@given(case=model_cases(classifier=True))
def test_24_gradients_of_parts_of_a_batch_add_up(case):
    case = dataclasses.replace(case, batch=4)
    params, images = case.params(), case.images()
    dlogits = normal(case.seed, 4, case.config.num_classes)
    whole, dimages = gradients(case, params, images, dlogits)
    first, dfirst = gradients(case, params, images[:1], dlogits[:1])
    rest, drest = gradients(case, params, images[1:], dlogits[1:])
    assert_near(np.concatenate([dfirst, drest]), dimages, 1e-10)
    total = max(np.abs(x).max() for _, x in named_arrays(whole))
    for (key, a), (_, b), (_, c) in zip(*map(named_arrays, (first, rest, whole)), strict=True):
        np.testing.assert_allclose(a + b, c, rtol=1e-9, atol=1e-12 * total, err_msg=key)


WITH_PARAMETERS = (
    *("linear", "layer_norm", "patch_embed", "conv", "depthwise_conv", "position"),
    *("sra", "linear_sra", "mha", "mlp", "conv_mlp", "block", "vit block"),
)


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_25_parameter_gradient_is_the_sum_of_per_sample_ones(name):
    @given(OPERATIONS[name])
    def check(case):
        shared = [key for key in case.inputs if key != "x"]
        y, cache = case.forward(case.inputs)
        dy = normal(3, *y.shape)
        grads = case.backward(case.inputs, cache, dy)
        total = dict.fromkeys(shared, 0.0)
        for b in range(y.shape[0]):
            one = {**case.inputs, "x": case.inputs["x"][b : b + 1]}
            _, cache = case.forward(one)
            parts = case.backward(one, cache, dy[b : b + 1])
            total = {key: total[key] + parts[key] for key in shared}
        for key in shared:
            np.testing.assert_allclose(grads[key], total[key], rtol=1e-9, atol=1e-11, err_msg=key)

    check()


@pytest.mark.parametrize(("name", "key"), [("sra", "kv"), ("linear_sra", "kv"), ("mha", "qkv")])
def test_58_the_bias_of_the_keys_has_no_influence(name, key):
    # it adds one number to all scores of a query, which softmax does not notice
    @given(OPERATIONS[name].filter(lambda case: f"{key}.bias" in case.inputs), seeds)
    def check(case, seed):
        y, cache = case.forward(case.inputs)
        bias = case.inputs[f"{key}.bias"]
        C = case.inputs["x"].shape[-1]
        of_keys = slice(len(bias) - 2 * C, len(bias) - C)
        moved = bias.copy()
        moved[of_keys] += normal(seed, C)
        assert_near(case.forward({**case.inputs, f"{key}.bias": moved})[0], y, 1e-11)
        grads = case.backward(case.inputs, cache, normal(seed + 1, *y.shape))
        largest = max(np.abs(g).max() for g in grads.values())
        assert np.abs(grads[f"{key}.bias"][of_keys]).max() <= 1e-12 * largest

    check()


# Positions ------------------------------------------------------------------------------------

sides = st.integers(1, 6)
grids = st.tuples(sides, sides)


@given(own=grids, other=grids, C=small, seed=seeds)
def test_26_position_resizing(own, other, C, seed):
    P = normal(seed, own[0] * own[1], C)
    np.testing.assert_array_equal(resize_positions(P, own, own), P)
    A = resize_matrix(other[0], own[0])
    np.testing.assert_allclose(A.sum(axis=1), 1, rtol=1e-14)
    np.testing.assert_array_equal(resize_matrix(own[0], own[0]), np.eye(own[0]))
    # a constant table stays constant
    ones = resize_positions(np.ones_like(P), own, other)
    np.testing.assert_allclose(ones, np.ones((other[0] * other[1], C)), rtol=1e-14)
    # adjoint: <A P, u> = <P, A^T u>
    u = normal(seed + 1, other[0] * other[1], C)
    left = (resize_positions(P, own, other) * u).sum()
    right = (P * resize_positions_backward(u, own, other)).sum()
    np.testing.assert_allclose(left, right, rtol=1e-11, atol=1e-11)

    # swapping H and W of table and grid swaps them in the result
    def swapped(x, grid):
        return x.reshape(*grid, C).swapaxes(0, 1).reshape(-1, C)

    np.testing.assert_allclose(
        resize_positions(swapped(P, own), own[::-1], other[::-1]),
        swapped(resize_positions(P, own, other), other),
        atol=1e-13,
    )


def test_26_grids_of_equal_area_get_different_tables():
    # the released code compares areas, and takes a 4x1 table for a 2x2 one
    P = normal(0, 4, 3)
    square, flat = resize_positions(P, (2, 2), (2, 2)), resize_positions(P, (2, 2), (1, 4))
    assert square.shape == flat.shape
    assert relative(flat, square) > 0.1


@settings(max_examples=15)
@given(case=model_cases(classifier=None))
def test_27_no_pixel_is_without_gradient(case):
    config = dataclasses.replace(  # a norm over one or two channels has no derivative
        case.config, embed_dims=tuple(4 * N for N in case.config.num_heads)
    )
    case = dataclasses.replace(case, config=config, batch=1)
    params, images = case.params(), case.images()
    maps, cache = pvt_ref.forward_pyramid_with_cache(params, images, config)
    dmaps = [None, None, None, normal(case.seed, *maps[3].shape)]
    _, dimages = pvt_ref.backward_pyramid(params, cache, dmaps, config)
    assert (dimages != 0).all()
    g = config.size_multiple
    if g > 1:  # and a size that would lose some is refused
        with pytest.raises(ValueError, match="multiples of"):
            pvt_ref.forward_pyramid(params, images[:, :, :-1], config)


# Cross-entropy --------------------------------------------------------------------------------


@given(B=small, K=st.integers(2, 6), smoothing=st.sampled_from([0.0, 0.1]), seed=seeds)
def test_28_cross_entropy_invariances(B, K, smoothing, seed):
    logits, rng = normal(seed, B, K, scale=3), rng_of(seed)
    targets = rng.dirichlet(np.ones(K), B)
    loss, dlogits = cross_entropy(logits, targets, smoothing)
    shifted, dshifted = cross_entropy(logits + 100 * normal(seed, B, 1), targets, smoothing)
    np.testing.assert_allclose(shifted, loss, rtol=1e-11)
    np.testing.assert_allclose(dshifted, dlogits, atol=1e-12)
    np.testing.assert_allclose(dlogits.sum(axis=-1), 0, atol=1e-14)
    at_zero, _ = cross_entropy(np.zeros((B, K)), targets, smoothing)
    np.testing.assert_allclose(at_zero, math.log(K), rtol=1e-14)


@given(B=small, K=st.integers(2, 6), smoothing=st.sampled_from([0.0, 0.3]), seed=seeds)
def test_29_mean_and_sum_agree(B, K, smoothing, seed):
    logits, labels = normal(seed, B, K), rng_of(seed).integers(0, K, B)
    mean, dmean = cross_entropy(logits, labels, smoothing)
    total, dtotal = cross_entropy(logits, labels, smoothing, reduction="sum")
    np.testing.assert_allclose(mean * B, total, rtol=1e-13)
    np.testing.assert_allclose(dmean * B, dtotal, atol=1e-14)


# Randomness -----------------------------------------------------------------------------------


class Enumerated(np.random.Generator):
    """A generator that deals out one given mask, so that all of them can be tried in turn."""

    def __init__(self, kept) -> None:
        super().__init__(np.random.PCG64(0))
        self.kept = np.asarray(kept)

    def random(self, size=None, dtype=np.float64, out=None):
        assert size is not None
        assert math.prod(size) == self.kept.size
        return np.where(self.kept, 1 - 2**-24, 0.0).astype(dtype).reshape(size)


@given(B=st.integers(1, 4), rate=st.sampled_from([0.1, 0.5, 0.9]), seed=seeds)
def test_30_drop_path_keeps_the_expectation(B, rate, seed):
    x = normal(seed, B, 2, 3)
    assert drop_path_forward(x, 0.0, rng_of(seed))[0] is x
    assert drop_path_forward(x, rate, None)[0] is x
    expectation = np.zeros_like(x)
    for kept in itertools.product([True, False], repeat=B):
        y, cache = drop_path_forward(x, rate, Enumerated(kept))
        for b in range(B):  # whole samples are kept or dropped
            expected = x[b] / (1 - rate) if kept[b] else np.zeros_like(x[b])
            np.testing.assert_allclose(y[b], expected, rtol=1e-14)
        np.testing.assert_array_equal(drop_backward(cache, x), y)  # the same mask
        expectation += y * math.prod(1 - rate if k else rate for k in kept)
    np.testing.assert_allclose(expectation, x, rtol=1e-12)


@given(rate=st.sampled_from([0.1, 0.5, 0.9]), seed=seeds)
def test_30_dropout_drops_elements_at_its_rate(rate, seed):
    x = 1 + np.abs(normal(seed, 40, 50))
    y, _ = dropout_forward(x, rate, rng_of(seed))
    kept = y != 0
    np.testing.assert_allclose(y[kept], (x / (1 - rate))[kept], rtol=1e-14)
    # 2000 independent draws: five standard deviations
    assert abs(kept.mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / 2000)
    again, _ = dropout_forward(x.astype(np.float32), rate, rng_of(seed))
    np.testing.assert_array_equal(again != 0, kept)  # one seed, one mask, whatever the dtype


def test_30_drop_path_rates_rise_linearly_over_all_blocks():
    config = dataclasses.replace(VARIANTS["pvt_small"], drop_path_rate=0.3, depths=(3, 4, 6, 3))
    rates = [rate for i in range(1, 5) for rate in config.of_stage(i).drop_path_rates]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 16), rtol=1e-14)
    seen = []

    spied = table_under_test().watched(lambda call: seen.append(call.args[3]), only=[drop_path])
    small_config = dataclasses.replace(config, img_size=32)
    params = pvt_ref.init_params(small_config, rng_of(0))
    pvt_ref.forward_with_cache(
        params, normal(0, 1, 3, 32, 32, dtype=np.float32), small_config, rng_of(1), ops=spied
    )
    assert seen == list(np.repeat(rates, 2))  # attention and MLP draw for themselves


# Purity ---------------------------------------------------------------------------------------


def read_only(tree):
    def freeze(x):
        x = x.copy()
        x.flags.writeable = False
        return x

    return map_arrays(freeze, tree)


@any_operation
def test_31_read_only_inputs_and_caches_are_accepted_and_left_unchanged(name):
    @given(OPERATIONS[name])
    def check(case):
        inputs = read_only(case.inputs)
        y, cache = case.forward(inputs)
        cache, dy = read_only(cache), read_only(normal(1, *y.shape))
        first = case.backward(inputs, cache, dy)
        second = case.backward(inputs, cache, dy)  # one cache serves again
        for key in first:
            np.testing.assert_array_equal(first[key], second[key])
        np.testing.assert_array_equal(case.forward(inputs, keep=False)[0], y)

    check()


@settings(max_examples=15)
@given(case=model_cases(classifier=True, dropout=True))
def test_31_the_model_leaves_everything_as_it_was(case):
    config, params, images = case.config, read_only(case.params()), read_only(case.images())
    before = map_arrays(np.copy, (params, images))
    logits, cache = pvt_ref.forward_with_cache(params, images, config, rng_of(1))
    maps, pyramid_cache = pvt_ref.forward_pyramid_with_cache(params, images, config, rng_of(1))
    frozen = read_only(dataclasses.replace(cache, ops=cache.ops))
    dlogits = read_only(normal(2, *logits.shape))
    for used in (cache, frozen):
        pvt_ref.backward(params, used, dlogits, config)
    pvt_ref.backward_pyramid(params, pyramid_cache, [read_only(m) for m in maps], config)
    pvt_ref.attention_maps(params, images, config)
    for (key, a), (_, b) in zip(named_arrays(before), named_arrays((params, images)), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=key)


@any_operation
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_32_dtype_in_is_dtype_out(name, dtype):
    @settings(max_examples=15)
    @given(OPERATIONS[name])
    def check(case):
        inputs = case.cast(lambda x: x.astype(dtype))
        y, cache = case.forward(inputs)
        assert y.dtype == case.forward(inputs, keep=False)[0].dtype == dtype
        for key, g in case.backward(inputs, cache, np.ones_like(y)).items():
            assert g.dtype == dtype, key
            assert g.shape == inputs[key].shape, key

    check()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_32_model_keeps_the_dtype_of_weights(dtype):
    @settings(max_examples=15)
    @given(
        model_cases(classifier=True, dropout=True),
        st.sampled_from([np.float16, np.float32, np.float64]),
    )
    def check(case, image_dtype):
        config, params = case.config, case.params(dtype)
        images = case.images().astype(image_dtype)
        logits, cache = pvt_ref.forward_with_cache(params, images, config, rng_of(1))
        maps, pyramid_cache = pvt_ref.forward_pyramid_with_cache(params, images, config, rng_of(1))
        weights = pvt_ref.attention_maps(params, images, config)
        results = [
            pvt_ref.backward(params, cache, logits, config),
            pvt_ref.backward_pyramid(params, pyramid_cache, maps, config),
        ]
        for y in (logits, *maps, *weights.values()):
            assert y.dtype == dtype
        for grads, dimages in results:
            assert dimages.dtype == dtype  # a narrower one could not hold every gradient
            assert dimages.shape == images.shape
            for (key, g), (_, w) in zip(named_arrays(grads), named_arrays(params), strict=True):
                assert (g.dtype, g.shape) == (w.dtype, w.shape), key

    check()


@settings(max_examples=15)
@given(case=model_cases(classifier=None), contiguous_inside=st.booleans())
def test_31_a_cache_does_not_change_with_the_callers_arrays(case, contiguous_inside):
    config, params, images = case.config, case.params(), case.images()
    if contiguous_inside:  # a layout in which channels-last is a plain view
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    maps, cache = pvt_ref.forward_pyramid_with_cache(params, images, config)
    dmaps = [normal(i, *x.shape) for i, x in enumerate(maps)]
    expected, dexpected = pvt_ref.backward_pyramid(params, cache, dmaps, config)
    expected, dexpected = map_arrays(np.copy, (expected, dexpected))
    for mine in (images, *maps):
        mine[...] = 7.0
    grads, dimages = pvt_ref.backward_pyramid(params, cache, dmaps, config)
    np.testing.assert_array_equal(dimages, dexpected)
    for (key, a), (_, b) in zip(named_arrays(grads), named_arrays(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=key)


def layouts(x: np.ndarray):
    """The same numbers in other memory layouts."""
    yield "F", np.asfortranarray(x)
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    yield "strided", wide[..., ::2]
    yield "negative stride", np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    raw = np.zeros(x.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    yield "unaligned", unaligned


@any_operation
def test_33_memory_layout_does_not_matter(name):
    @settings(max_examples=15)
    @given(OPERATIONS[name])
    def check(case):
        y, cache = case.forward(case.inputs)
        dy = normal(1, *y.shape)
        grads = case.backward(case.inputs, cache, dy)
        variants = zip(*(layouts(x) for x in (*case.inputs.values(), dy)), strict=True)
        for arrays in variants:
            label, inputs = (
                arrays[0][0],
                dict(zip(case.inputs, (a for _, a in arrays), strict=False)),
            )
            other, other_cache = case.forward(inputs)
            np.testing.assert_allclose(other, y, rtol=1e-11, atol=1e-12, err_msg=label)
            for key, g in case.backward(inputs, other_cache, arrays[-1][1]).items():
                np.testing.assert_allclose(
                    g, grads[key], rtol=1e-9, atol=1e-10, err_msg=f"{label} {key}"
                )

    check()


@settings(max_examples=15)
@given(case=model_cases(classifier=True, dropout=True))
def test_34_the_same_call_twice_gives_the_same_bits(case):
    config, params, images = case.config, case.params(np.float32), case.images(np.float32)
    runs = []
    for _ in range(2):
        logits, cache = pvt_ref.forward_with_cache(params, images, config, rng_of(4))
        grads, dimages = pvt_ref.backward(params, cache, logits, config)
        runs.append([logits, dimages, *(x for _, x in named_arrays(grads))])
        pvt_ref.forward(params, images[::-1], config)  # another call in between leaves no trace
    for a, b in zip(*runs, strict=True):
        assert a.tobytes() == b.tobytes()


def test_35_float32_error_at_every_depth_is_at_most_twice_pytorchs():
    from oracles import transformers_forward

    config = dataclasses.replace(VARIANTS["pvt_small"], img_size=64)
    pairs = [[] for _ in range(4)]
    for seed in range(3):
        params = random_params(config, seed, np.float32)
        images = normal(seed, 1, 3, 64, 64, dtype=np.float32)
        exact_params = map_arrays(lambda x: x.astype(np.float64), params)
        exact = pvt_ref.forward_pyramid(exact_params, images.astype(np.float64), config)
        ours = pvt_ref.forward_pyramid(params, images, config)
        theirs, _, _ = transformers_forward(params, images, config, pyramid=True)
        for i in range(4):
            pairs[i].append((ours[i], theirs[i].detach().numpy(), exact[i]))
    for i in range(4):
        assert_float32_error(pairs[i], what=f"F{i + 1}")


# Attention maps are what the forward uses -----------------------------------------------------


@settings(max_examples=15)
@given(case=model_cases(classifier=None))
def test_attention_maps_are_the_weights_the_forward_uses(case):
    seen = []

    config, params, images = case.config, case.params(), case.images()
    spied = REFERENCE.watched(lambda call: seen.append(call.result[0]), only=[softmax])
    if config.has_classifier:
        pvt_ref.forward(params, images, config, ops=spied)
    else:
        pvt_ref.forward_pyramid(params, images, config, ops=spied)
    maps = pvt_ref.attention_maps(params, images, config, ops=REFERENCE)
    assert list(maps) == [(i + 1, b) for i in range(4) for b in range(config.depths[i])]
    for weights, used in zip(maps.values(), seen, strict=True):
        np.testing.assert_array_equal(weights, used)
    some = pvt_ref.attention_maps(params, images, config, stages=[2])
    assert {i for i, _ in some} == {2}


def test_attention_weights_need_no_values():
    q, k, _ = qkv(3, 4, 5)
    weights = attention_weights(q, k, 0.7, table_under_test())
    np.testing.assert_allclose(weights @ np.ones((5, 1)), 1, rtol=1e-14)
    assert array_module(weights) is np


@given(config=configs())
def test_every_drawn_configuration_rebuilds_from_its_fields(config):
    assert dataclasses.replace(config) == config
