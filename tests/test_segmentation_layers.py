"""What segmentation adds to the layers: batch norm, dropout of channels, losses of many pixels.

That each operation equals PyTorch's, on every array library, say the tests of all operations
(operations.py). Here stand the laws of these, and what is no operation.
"""

import tracemalloc
from functools import partial

import array_api_strict
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import FORWARD, GRADIENT, assert_near, relative
from hypothesis import given
from hypothesis import strategies as st
from oracles import tensor
from strategies import normal, rng_of, seeds

from pvt_ref import cross_entropy
from pvt_ref.errors import ArrayTypeError, RangeError, ShapeError
from pvt_ref.layers.batch_norm import (
    BatchNormBuffers,
    BatchNormParams,
    batch_norm,
    moved,
    statistics,
)
from pvt_ref.layers.conv import ConvParams, conv
from pvt_ref.layers.dropout import dropout_channels
from pvt_ref.layers.relu import relu
from pvt_ref.layers.resize import resize
from pvt_ref.ops import REFERENCE
from pvt_ref.tree import map_arrays, named_arrays

small = st.integers(1, 4)
maps = st.tuples(small, st.integers(2, 4), small, small)  # two values per channel at least


def first_buffers(C: int) -> BatchNormBuffers:
    return BatchNormBuffers(np.zeros(C), np.ones(C), np.array(0))


def random_norm(seed: int, C: int) -> BatchNormParams:
    return BatchNormParams(1 + 0.3 * normal(seed, C), 0.3 * normal(seed + 1, C))


def in_training(p, x, buffers=None):
    return batch_norm.forward(p, x, REFERENCE, buffers or first_buffers(x.shape[-1]), True)


# Batch norm -----------------------------------------------------------------------------------


@given(shape=maps, batches=st.integers(1, 3), momentum=st.sampled_from([0.1, 0.6]), seed=seeds)
def test_running_statistics_equal_pytorchs(shape, batches, momentum, seed):
    C = shape[-1]
    theirs = torch.nn.BatchNorm2d(C, momentum=momentum).double()
    buffers = first_buffers(C)
    for k in range(batches):
        x = 2 + normal(seed + k, *shape)
        theirs(tensor(x).permute(0, 3, 1, 2))
        before = map_arrays(np.copy, buffers)
        _, cache = in_training(random_norm(seed, C), x, buffers)
        after = moved(buffers, statistics(cache), momentum)
        for (key, a), (_, b) in zip(named_arrays(before), named_arrays(buffers), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=key)  # new arrays, the old ones stay
        buffers = after
    for key, x in named_arrays(buffers):
        np.testing.assert_allclose(x, theirs.state_dict()[key].numpy(), rtol=1e-13, err_msg=key)
    assert isinstance(buffers.num_batches_tracked, np.ndarray)
    assert buffers.num_batches_tracked.dtype == np.int64
    assert buffers.num_batches_tracked.shape == ()


@given(shape=maps, k=st.integers(1, 5), momentum=st.sampled_from([0.1, 0.25]), seed=seeds)
def test_running_statistics_after_k_batches_in_closed_form(shape, k, momentum, seed):
    # the first values fade like (1 - m)^k, and batch j of k weighs m (1 - m)^(k - 1 - j)
    xs = [3 * normal(seed + j, *shape).reshape(-1, shape[-1]) for j in range(k)]
    buffers = first_buffers(shape[-1])
    for x in xs:
        _, cache = in_training(random_norm(seed, shape[-1]), x.reshape(shape), buffers)
        buffers = moved(buffers, statistics(cache), momentum)
    weights = momentum * (1 - momentum) ** (k - 1 - np.arange(k))
    mean = sum(w * x.mean(axis=0) for w, x in zip(weights, xs, strict=True))
    variance = sum(w * x.var(axis=0, ddof=1) for w, x in zip(weights, xs, strict=True))
    np.testing.assert_allclose(buffers.running_mean, mean, rtol=1e-12, atol=1e-14)
    faded = (1 - momentum) ** k
    np.testing.assert_allclose(buffers.running_var, faded + variance, rtol=1e-12)
    assert buffers.num_batches_tracked == k


@given(shape=maps, times=st.integers(2, 4), seed=seeds)
def test_a_repeated_batch_keeps_mean_and_biased_variance_but_not_the_running_one(
    shape, times, seed
):
    x, p, buffers = normal(seed, *shape), random_norm(seed, shape[-1]), first_buffers(shape[-1])
    y, once = in_training(p, x, buffers)
    many_y, many = in_training(p, np.concatenate([x] * times), buffers)
    assert_near(many_y, np.concatenate([y] * times), FORWARD)
    np.testing.assert_allclose(many.mean, once.mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(many.variance, once.variance, rtol=1e-12)
    a, b = moved(buffers, statistics(once)), moved(buffers, statistics(many))
    np.testing.assert_allclose(a.running_mean, b.running_mean, rtol=1e-12, atol=1e-14)
    assert (a.running_var > b.running_var).all()  # N/(N - 1) is larger for fewer values


@given(shape=maps, seed=seeds)
def test_in_training_dx_of_batch_norm_sums_to_0_per_channel(shape, seed):
    p, x, dy = random_norm(seed, shape[-1]), normal(seed, *shape), normal(seed + 1, *shape)
    _, cache = in_training(p, x)
    dx, _ = batch_norm.backward(p, cache, dy)
    allowed = 1e-13 * np.abs(dy).sum() * np.abs(cache.rstd).max()
    assert np.abs(dx.sum(axis=(0, 1, 2))).max() <= allowed
    # nor has it a part along x, but for eps
    alone = (dx * cache.x_hat).sum(axis=(0, 1, 2))
    eps_part = 1e-5 * cache.rstd**2 * (dy * cache.x_hat).sum(axis=(0, 1, 2))
    np.testing.assert_allclose(alone, p.weight * cache.rstd * eps_part, rtol=1e-5, atol=allowed)


@given(shape=maps, seed=seeds)
def test_with_running_statistics_batch_norm_is_one_line_per_channel(shape, seed):
    C = shape[-1]
    p, x = random_norm(seed, C), normal(seed, *shape)
    buffers = BatchNormBuffers(normal(seed, C), 0.5 + np.abs(normal(seed + 1, C)), np.array(9))
    y, cache = batch_norm.forward(p, x, REFERENCE, buffers, False)
    slope = p.weight / np.sqrt(buffers.running_var + 1e-5)
    assert_near(y, slope * x + (p.bias - slope * buffers.running_mean), FORWARD)
    dx, _ = batch_norm.backward(p, cache, np.ones(shape))
    np.testing.assert_allclose(dx, np.broadcast_to(slope, shape), rtol=1e-13)
    assert moved(buffers, statistics(cache)) is buffers


@given(C=small, lead=st.sampled_from([(2,), (3, 1), (2, 3, 1, 2)]), seed=seeds)
def test_batch_norm_takes_any_leading_axes(C, lead, seed):
    p, x, dy = random_norm(seed, C), normal(seed, *lead, C), normal(seed + 1, *lead, C)
    y, cache = in_training(p, x)
    rows, rows_cache = in_training(p, x.reshape(-1, C))
    np.testing.assert_array_equal(y.reshape(-1, C), rows)
    dx, grads = batch_norm.backward(p, cache, dy)
    drows, row_grads = batch_norm.backward(p, rows_cache, dy.reshape(-1, C))
    np.testing.assert_array_equal(dx.reshape(-1, C), drows)
    np.testing.assert_array_equal(grads.weight, row_grads.weight)


def test_one_value_per_channel_has_no_batch_statistics():
    p, x = random_norm(0, 3), normal(0, 1, 1, 1, 3)
    with pytest.raises(ShapeError, match=r"\(1, 1, 1, 3\): one value per channel.*larger batch"):
        in_training(p, x)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        F.batch_norm(torch.zeros(1, 3, 1, 1), None, None, training=True)
    y, _ = batch_norm.forward(p, x, REFERENCE, first_buffers(3), False)
    assert y.shape == x.shape


def test_float32_statistics_of_400000_cells_keep_their_digits():
    x = 100 + normal(1, 4, 250, 400, 2, dtype=np.float32)
    wide = x.astype(np.float64)
    p = BatchNormParams(np.ones(2, np.float32), np.zeros(2, np.float32))
    _, cache = in_training(p, x)
    assert cache.mean.dtype == cache.variance.dtype == np.float32
    assert relative(cache.mean, wide.mean(axis=(0, 1, 2))) < 1e-7
    assert relative(cache.variance, wide.var(axis=(0, 1, 2))) < 2e-7
    dy = 1 + normal(2, *x.shape, dtype=np.float32)
    _, grads = batch_norm.backward(p, cache, dy)
    assert relative(grads.bias, dy.astype(np.float64).sum(axis=(0, 1, 2))) < 1e-7


def test_running_statistics_in_another_library():
    x, p, buffers = normal(0, 2, 3, 2, 4), random_norm(0, 4), first_buffers(4)
    _, cache = in_training(p, x, buffers)
    expected = moved(buffers, statistics(cache))
    there, p, buffers = map_arrays(array_api_strict.asarray, (x, p, buffers))
    _, cache = in_training(p, there, buffers)
    for (key, a), (_, b) in zip(
        named_arrays(moved(buffers, statistics(cache))), named_arrays(expected), strict=True
    ):
        assert type(a) is type(there), key
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-14, err_msg=key)


@given(shape=maps, C_out=st.integers(1, 3), seed=seeds)
def test_a_constant_before_a_1x1_convolution_and_batch_norm_in_training_gets_gradient_0(
    shape, C_out, seed
):
    kernel = ConvParams(normal(seed, C_out, shape[-1], 1, 1), None)
    p, shift = random_norm(seed, C_out), normal(seed + 1, shape[-1])

    def run(x, batch_statistics=True):
        z, conv_cache = conv.forward(kernel, x, REFERENCE, 1, 0)
        buffers = first_buffers(C_out)
        y, cache = batch_norm.forward(p, z, REFERENCE, buffers, batch_statistics)
        dz, _ = batch_norm.backward(p, cache, normal(seed + 2, *y.shape))
        dx, _ = conv.backward(kernel, conv_cache, dz)
        return y, dx.sum(axis=(0, 1, 2)), np.abs(dx).sum()  # the gradient of the constant

    x = normal(seed, *shape)
    y, dshift, size = run(x)
    np.testing.assert_allclose(run(x + shift)[0], y, rtol=0, atol=1e-9)
    assert np.abs(dshift).max() <= 1e-11 * max(size, 1)
    assert np.abs(run(x, batch_statistics=False)[1]).max() > 1e-6  # not so at inference


# Dropout of channels --------------------------------------------------------------------------


@given(B=small, h=small, w=small, C=small, rate=st.sampled_from([0.1, 0.5]), seed=seeds)
def test_a_channel_is_kept_or_dropped_as_a_whole(B, h, w, C, rate, seed):
    x = 1 + np.abs(normal(seed, B, h, w, C))
    y, cache = dropout_channels.forward(None, x, REFERENCE, rate, rng_of(seed))
    kept = rng_of(seed).random((B, C), dtype=np.float32) >= rate  # one draw each
    np.testing.assert_allclose(y, x * kept[:, None, None] / (1 - rate), rtol=1e-15)
    dy = normal(seed + 1, *x.shape)
    dx, _ = dropout_channels.backward(None, cache, dy)
    np.testing.assert_allclose(dx, dy * kept[:, None, None] / (1 - rate), rtol=1e-15)


def test_dropout_of_channels_keeps_the_expectation_and_is_pytorchs_kind():
    x = np.ones((200, 2, 3, 50), np.float32)
    y, _ = dropout_channels.forward(None, x, REFERENCE, 0.1, rng_of(1))
    torch.manual_seed(0)
    theirs = F.dropout2d(torch.ones(200, 50, 2, 3), 0.1).numpy()
    assert set(np.unique(y)) == set(np.unique(theirs)) == {0, np.float32(1 / 0.9)}
    for drawn in (y, theirs):
        assert abs(drawn.mean() - 1) < 4 * 1 / 3 / 100  # four deviations of 10,000 draws


def test_without_a_generator_or_a_rate_no_channel_is_dropped():
    x = normal(0, 2, 3, 3, 4)
    for rate, rng in ((0.5, None), (0.0, rng_of(1))):
        y, cache = dropout_channels.forward(None, x, REFERENCE, rate, rng)
        assert y is x
        assert dropout_channels.backward(None, cache, x)[0] is x


# Resizing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_a_map_that_has_the_size_already_is_passed_on(mode, align_corners):
    x, dy = normal(0, 2, 5, 7, 3), normal(1, 2, 5, 7, 3)
    y, cache = resize.forward(None, x, REFERENCE, (5, 7), mode, align_corners)
    assert y is x
    assert resize.backward(None, cache, dy)[0] is dy
    if mode != "nearest" or not align_corners:
        corners = None if mode == "nearest" else align_corners
        theirs = F.interpolate(
            tensor(x).permute(0, 3, 1, 2), size=(5, 7), mode=mode, align_corners=corners
        )
        assert_near(y, theirs.permute(0, 2, 3, 1).numpy(), 1e-15)
    other, _ = resize.forward(None, x, REFERENCE, (7, 5), mode, align_corners)
    assert other.shape == (2, 7, 5, 3)


@given(B=small, old=st.tuples(small, small), new=st.tuples(small, small), seed=seeds)
def test_resizing_then_a_1x1_convolution_is_the_convolution_then_resizing(B, old, new, seed):
    # the rows of the resizing matrix sum to 1, so the bias passes too
    x, p = normal(seed, B, *old, 3), ConvParams(normal(seed, 2, 3, 1, 1), normal(seed, 2))
    large, _ = resize.forward(None, x, REFERENCE, new)
    first, _ = conv.forward(p, large, REFERENCE, 1, 0)
    small_y, _ = conv.forward(p, x, REFERENCE, 1, 0)
    assert_near(first, resize.forward(None, small_y, REFERENCE, new)[0], FORWARD)


def test_enlarging_twice_by_2_is_not_enlarging_by_4():
    x = normal(0, 1, 5, 6, 2)
    twice, _ = resize.forward(None, x, REFERENCE, (10, 12))
    twice, _ = resize.forward(None, twice, REFERENCE, (20, 24))
    at_once, _ = resize.forward(None, x, REFERENCE, (20, 24))
    assert 0.03 < relative(twice, at_once) < 0.3
    by_pytorch = tensor(x).permute(0, 3, 1, 2)
    for _ in range(2):
        by_pytorch = F.interpolate(by_pytorch, scale_factor=2, mode="bilinear")
    assert_near(twice, by_pytorch.permute(0, 2, 3, 1).numpy(), FORWARD)


# Cross-entropy of pixels ----------------------------------------------------------------------


def drawn_labels(seed: int, K: int, *cells: int, ignored: float = 0.3) -> np.ndarray:
    rng = rng_of(seed)
    labels = rng.integers(0, K, cells)
    labels[rng.random(cells) < ignored] = 255
    return labels


def pytorch(logits, labels, divisor=None, **kwargs):
    """F.cross_entropy and its gradient; with a divisor, of the sum over pixels divided by it."""
    x = tensor(logits, grad=True)
    reduction = "mean" if divisor is None else "sum"
    loss = F.cross_entropy(x, torch.tensor(labels), reduction=reduction, **kwargs)
    loss = loss / (divisor or 1)
    (dlogits,) = torch.autograd.grad(loss, x)
    return loss.item(), dlogits.numpy()


@given(
    B=st.integers(1, 3),
    K=st.integers(1, 4),
    cells=st.sampled_from([(), (1, 1), (2, 3)]),
    smoothing=st.sampled_from([0.0, 0.1]),
    reduction=st.sampled_from(["mean", "mean_of_all", "sum"]),
    weighted=st.booleans(),
    seed=seeds,
)
def test_weighted_losses_of_pixels_equal_pytorchs(
    B, K, cells, smoothing, reduction, weighted, seed
):
    logits, labels = normal(seed, B, K, *cells), drawn_labels(seed, K, B, *cells)
    weights = rng_of(seed + 1).random(K) * 3 if weighted else None
    loss, dlogits = cross_entropy(
        logits, labels, smoothing, reduction, ignore_index=255, class_weights=weights
    )
    if np.all(labels == 255):
        assert loss == 0
        assert dlogits.shape == logits.shape
        assert not dlogits.any()
        return
    expected = pytorch(
        logits,
        labels,
        {"mean": None, "mean_of_all": labels.size, "sum": 1}[reduction],
        label_smoothing=smoothing,
        ignore_index=255,
        weight=None if weights is None else tensor(weights),
    )
    np.testing.assert_allclose(loss, expected[0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(dlogits, expected[1], rtol=1e-10, atol=1e-15)


@given(B=st.integers(1, 3), K=st.integers(1, 4), mean=st.booleans(), seed=seeds)
def test_class_weights_of_distributions_equal_pytorchs(B, K, mean, seed):
    logits, targets = normal(seed, B, K, 2, 2), rng_of(seed).random((B, K, 2, 2))
    weights = rng_of(seed + 1).random(K)
    reduction = "mean" if mean else "sum"
    loss, dlogits = cross_entropy(logits, targets, 0.0, reduction, class_weights=weights)
    expected = pytorch(logits, targets, None if mean else 1, weight=tensor(weights))
    np.testing.assert_allclose(loss, expected[0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(dlogits, expected[1], rtol=1e-10, atol=1e-15)


@given(K=st.integers(2, 4), seed=seeds)
def test_logits_under_an_ignored_label_have_no_influence_and_get_no_gradient(K, seed):
    logits, labels = normal(seed, 2, K, 3, 4), drawn_labels(seed, K, 2, 3, 4)
    labels[0, 0, :2] = (255, 0)
    ignored = np.broadcast_to((labels == 255)[:, None], logits.shape)
    other = np.where(ignored, normal(seed + 1, *logits.shape, scale=50), logits)
    for reduction in ("mean", "mean_of_all", "sum"):
        loss, dlogits = cross_entropy(logits, labels, 0.1, reduction, ignore_index=255)
        assert not dlogits[ignored].any()
        assert dlogits[~ignored].all()
        assert cross_entropy(other, labels, 0.1, reduction, ignore_index=255)[0] == loss


@pytest.mark.parametrize("reduction", ["mean", "mean_of_all", "sum"])
def test_a_batch_of_which_nothing_counts_has_loss_0(reduction):
    logits, labels = normal(0, 2, 3, 4, 5), np.full((2, 4, 5), 255, np.uint8)
    of_weight_0 = np.zeros((2, 4, 5), np.uint8)
    weights = np.array([0.0, 1.0, 2.0])
    for kwargs in ({}, {"class_weights": weights}):
        loss, dlogits = cross_entropy(logits, labels, 0.0, reduction, ignore_index=255, **kwargs)
        assert loss == 0
        assert not dlogits.any()
    loss, dlogits = cross_entropy(logits, of_weight_0, 0.0, reduction, class_weights=weights)
    assert loss == 0
    assert not dlogits.any()


def test_weights_of_1_and_pixels_that_all_count_change_no_bit():
    logits, labels = normal(0, 2, 3, 4, 5, dtype=np.float32), drawn_labels(0, 3, 2, 4, 5, ignored=0)
    loss, dlogits = cross_entropy(logits, labels, 0.1)
    for reduction, weights in (("mean", np.ones(3)), ("mean_of_all", None)):
        same, dsame = cross_entropy(logits, labels, 0.1, reduction, class_weights=weights)
        assert same == loss
        assert dsame.dtype == np.float32
        np.testing.assert_array_equal(dsame, dlogits)


def test_only_the_ratios_of_class_weights_matter():
    logits, labels = normal(0, 1, 3, 2, 2), drawn_labels(0, 3, 1, 2, 2, ignored=0)
    weights = np.array([0.5, 2.0, 1.0])
    loss, dlogits = cross_entropy(logits, labels, class_weights=weights)
    tiny, dtiny = cross_entropy(logits, labels, class_weights=weights / 1024)  # sum to less than 1
    assert tiny == loss
    np.testing.assert_array_equal(dtiny, dlogits)


def test_a_weighted_loss_in_another_library_and_in_float32():
    logits = normal(0, 2, 3, 2, 2, dtype=np.float32)
    labels, weights = drawn_labels(1, 3, 2, 2, 2), np.array([0.5, 2, 1], np.float32)
    loss, dlogits = cross_entropy(logits, labels, ignore_index=255, class_weights=weights)
    assert loss.dtype == dlogits.dtype == np.float32
    there, targets, w = map(array_api_strict.asarray, (logits, labels, weights))
    theirs, dtheirs = cross_entropy(there, targets, ignore_index=255, class_weights=w)
    np.testing.assert_allclose(np.asarray(theirs), loss, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(dtheirs), dlogits, rtol=1e-6, atol=1e-8)


def test_class_weights_that_are_none():
    loss = partial(cross_entropy, normal(0, 2, 3), np.array([0, 1]))
    for weights, error, words in (
        ([1.0, 1.0, 1.0], ArrayTypeError, r"class_weights are a list.*numpy.ones"),
        (array_api_strict.ones(3), ArrayTypeError, "beside the logits"),
        (np.ones(3, int), ArrayTypeError, "class_weights have dtype int64"),
        (np.ones(4), ShapeError, r"class_weights have shape \(4,\).*must be \(3,\)"),
        (np.array([1, -1.0, 1]), RangeError, "below 0"),
        (np.array([1, np.inf, 1]), RangeError, "not finite"),
    ):
        with pytest.raises(error, match=words):
            loss(class_weights=weights)
    with pytest.raises(RangeError, match="it must be 'mean', 'mean_of_all' or 'sum'"):
        loss(reduction="mean_of_valid")


def test_a_loss_of_many_pixels_builds_few_copies_of_the_logits():
    logits = normal(0, 2, 64, 96, 11, dtype=np.float32).transpose(0, 3, 1, 2)  # as heads give them
    labels, weights = drawn_labels(0, 11, 2, 64, 96).astype(np.uint8), np.ones(11, np.float32)
    run = partial(cross_entropy, logits, labels, ignore_index=255, class_weights=weights)
    run()
    tracemalloc.start()
    try:
        run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5.5 * logits.nbytes


@given(seed=seeds)
def test_the_released_loss_is_that_of_the_valid_pixels_times_their_share(seed):
    logits, labels = normal(seed, 2, 3, 4, 5), drawn_labels(seed, 3, 2, 4, 5)
    labels[0, 0, 0] = 0
    share = np.mean(labels != 255)
    loss, dlogits = cross_entropy(logits, labels, ignore_index=255)
    all_loss, dall = cross_entropy(logits, labels, reduction="mean_of_all", ignore_index=255)
    np.testing.assert_allclose(all_loss, share * loss, rtol=1e-14)
    assert_near(dall, share * dlogits, GRADIENT)


def test_relu_does_not_hide_what_is_not_a_number():
    y, _ = relu.forward(None, np.array([np.nan, -1.0, 2.0]), REFERENCE)
    np.testing.assert_array_equal(y, [np.nan, 0.0, 2.0])
