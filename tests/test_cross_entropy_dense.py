"""Cross-entropy of maps, and with labels to leave out, as PyTorch computes them."""

from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, rng_of

from pvt_ref import cross_entropy
from pvt_ref.errors import RangeError, ShapeError

seeds = st.integers(0, 1000)
cells = st.sampled_from([(), (1, 1), (2, 3), (4, 1)])


def pytorch(logits, targets, **kwargs):
    x = torch.tensor(logits, requires_grad=True)
    loss = F.cross_entropy(x, torch.tensor(targets), **kwargs)
    (dlogits,) = torch.autograd.grad(loss, x)
    return loss.item(), dlogits.numpy()


@given(
    B=st.integers(1, 3),
    K=st.integers(1, 4),
    cells=cells,
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    soft=st.booleans(),
    seed=seeds,
)
def test_maps_equal_pytorch(B, K, cells, smoothing, reduction, soft, seed):
    logits, rng = normal(seed, B, K, *cells, scale=3), rng_of(seed)
    targets = rng.random((B, K, *cells)) if soft else rng.integers(0, K, (B, *cells))
    loss, dlogits = cross_entropy(logits, targets, smoothing, reduction)
    expected = pytorch(logits, targets, label_smoothing=smoothing, reduction=reduction)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(dlogits, expected[1], rtol=1e-10, atol=1e-15)
    assert dlogits.shape == logits.shape


@given(
    B=st.integers(1, 4),
    K=st.integers(1, 4),
    cells=cells,
    ignore=st.sampled_from([-100, 0, 2, 255]),
    smoothing=st.sampled_from([0.0, 0.1]),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=seeds,
)
def test_ignored_labels_equal_pytorch(B, K, cells, ignore, smoothing, reduction, seed):
    logits, rng = normal(seed, B, K, *cells), rng_of(seed)
    labels = rng.integers(0, K, (B, *cells))
    labels[rng.random(labels.shape) < 0.4] = ignore
    loss, dlogits = cross_entropy(logits, labels, smoothing, reduction, ignore_index=ignore)
    expected = pytorch(
        logits, labels, label_smoothing=smoothing, reduction=reduction, ignore_index=ignore
    )
    if np.all(labels == ignore):
        assert loss == 0  # PyTorch's mean is NaN, which would end a training
        assert not dlogits.any()
    else:
        np.testing.assert_allclose(loss, expected[0], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(dlogits, expected[1], rtol=1e-10, atol=1e-15)


def test_a_label_of_minus_100_among_bytes_ignores_nothing():
    logits, labels = normal(0, 2, 3), np.array([2, 0], np.uint8)
    for xp in (np, array_api_strict):
        there = xp.asarray(logits), xp.asarray(labels)
        loss, _ = cross_entropy(*there, ignore_index=-100)
        assert float(loss) == float(cross_entropy(logits, labels)[0])


def test_ignored_maps_in_another_library_and_in_float32():
    logits = normal(0, 2, 3, 2, 2, dtype=np.float32)
    labels = np.array([[[0, 255], [1, 2]], [[255, 255], [2, 0]]], np.uint8)
    loss, dlogits = cross_entropy(logits, labels, 0.1, ignore_index=255)
    assert loss.dtype == dlogits.dtype == np.float32
    x, y = (array_api_strict.asarray(a) for a in (logits, labels))
    their_loss, their_dlogits = cross_entropy(x, y, 0.1, ignore_index=255)
    np.testing.assert_allclose(np.asarray(their_loss), loss, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(their_dlogits), dlogits, rtol=1e-6, atol=1e-8)
    assert not dlogits[0, :, 0, 1].any()


def test_what_cannot_be_ignored_or_is_no_map():
    logits = normal(0, 2, 3)
    wrong: Any
    for wrong in (1.0, "255", True, [1]):
        with pytest.raises(RangeError, match="ignore_index is"):
            cross_entropy(logits, np.array([0, 1]), ignore_index=wrong)
    with pytest.raises(RangeError, match="no labels but distributions"):
        cross_entropy(logits, np.ones((2, 3)), ignore_index=255)
    with pytest.raises(RangeError, match=r"labels run from 0 to 255.*ignore_index"):
        cross_entropy(logits, np.array([0, 255]))
    maps = normal(0, 2, 3, 4, 5)
    with pytest.raises(ShapeError, match=r"\(2, 5, 4\); .* must be \(2, 4, 5\)"):
        cross_entropy(maps, np.zeros((2, 5, 4), int))
    with pytest.raises(ShapeError, match=r"soft targets have shape \(2, 3\)"):
        cross_entropy(maps, np.ones((2, 3)))
