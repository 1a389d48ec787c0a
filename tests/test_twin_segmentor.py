"""Segmentation networks learn as PyTorch's: the same losses, weights and running statistics."""

import dataclasses

import numpy as np
import pytest
import torch
from closeness import FORWARD, assert_near, relative
from segmentors import SEGMENTORS, params_of
from small_pairs import AUGMENT, RECIPE, pairs, write_pairs
from strategies import normal
from twin_segmentor import pixel_loss, tensor, twin_forward, twin_training

import pvt_ref
from pvt_ref.draws import Draws
from pvt_ref.models.architecture import buffer_keys, count_keys, param_shapes
from pvt_ref.train import segmentation, start_training, train_step

SMALL = {name: SEGMENTORS[name] for name in ("pvt", "pvt_v2", "linear")}


@pytest.mark.parametrize("trained", [False, True], ids=["running", "batch"])
@pytest.mark.parametrize("size", [(64, 32), (32, 96)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_logits_and_running_statistics_are_pytorchs(name, size, trained):
    config, images, draws = SMALL[name], normal(1, 2, 3, *size), Draws(4, 5)
    params = params_of(config)
    state = {key: tensor(x) for key, x in pvt_ref.to_state_dict(params).items()}
    with torch.no_grad():
        theirs, _ = twin_forward(state, images, config, draws, trained)
    ours, cache = pvt_ref.forward_with_cache(
        params, images, config, draws, batch_statistics=trained
    )
    assert_near(ours, theirs.numpy(), FORWARD)
    after = dataclasses.replace(params, buffers=pvt_ref.api.updated(params, cache))
    for key, x in pvt_ref.to_state_dict(after).items():
        if key in buffer_keys(config):
            np.testing.assert_allclose(x, state[key].numpy(), rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("loss_mean", ["counted", "all"])
@pytest.mark.parametrize("weights", [(), (0.5, 2.0, 0.0, 1.5)], ids=["alike", "weighted"])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_pixels_is_pytorchs(loss_mean, weights, ignored, smoothing):
    given = {"class_weights": weights, "loss_mean": loss_mean, "label_smoothing": smoothing}
    recipe = dataclasses.replace(RECIPE, **given)
    logits, rng = normal(2, 2, 4, 5, 6), np.random.default_rng(3)
    labels = rng.integers(0, 4, (2, 17, 24))
    labels[rng.random(labels.shape) < ignored] = 255
    loss, dlogits, hits = segmentation.pixel_loss(logits, labels, recipe)
    if ignored == 1:  # where PyTorch divides by zero
        assert loss == hits == 0
        assert not dlogits.any()
        return
    leaf = tensor(logits, grad=True)
    theirs = pixel_loss(leaf, labels, recipe)
    np.testing.assert_allclose(loss, float(theirs.detach()), rtol=1e-12)
    assert_near(dlogits, torch.autograd.grad(theirs, leaf)[0].numpy(), 1e-12)
    full = torch.nn.functional.interpolate(leaf, size=(17, 24), mode="bilinear")
    assert hits == int((full.argmax(1).numpy() == labels).sum())


@pytest.mark.parametrize(("name", "steps"), [("pvt", 50), ("pvt_v2", 12)])
def test_steps_of_a_training_are_pytorchs(name, steps, tmp_path):
    config = SMALL[name]
    data = pairs(write_pairs(tmp_path, 10), (32, 64), whole=(24, 48), augment=AUGMENT)
    recipe = dataclasses.replace(RECIPE, epochs=30, warmup_epochs=2, lr=5e-3)
    params = pvt_ref.init_params(config, np.random.default_rng(2), np.float64)
    state, losses = start_training(params, len(data), seed=6), []
    first = state
    for _ in range(steps):
        state, report = train_step(state, data, config, recipe)
        losses.append(report.loss)
    weights, average, theirs = twin_training(first, data, config, recipe, steps)
    np.testing.assert_allclose(losses, theirs, rtol=1e-10)
    assert np.mean(losses[-5:]) < 0.98 * np.mean(losses[:5])
    buffers, counts = buffer_keys(config), count_keys(config)
    for tree, expected in ((state.params, weights), (state.average, average)):
        ours = pvt_ref.to_state_dict(tree)
        assert list(ours) == list(expected) == list(param_shapes(config))
        for key, x in ours.items():
            if key in counts:
                assert x == expected[key] == steps * recipe.accumulate
            elif key.endswith("attn.kv.bias"):  # its K half is noise that Adam makes large
                half = len(x) // 2
                assert relative(x[half:], expected[key][half:]) < 1e-9, key
            else:
                assert relative(x, expected[key]) < 1e-9, key
    moved = [key for key in buffers - counts if key.endswith("mean")]
    assert moved
    assert all(np.abs(weights[key]).max() > 0.01 for key in moved)
