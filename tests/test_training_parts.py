"""Each part of a training alone: against PyTorch's own where it has one, else against its words."""

import dataclasses
import itertools
import json
import math
import re
from typing import Any

import numpy as np
import pytest
import small_training
import torch
import torch.nn.functional as F
from closeness import relative
from hypothesis import given
from hypothesis import strategies as st
from loose import loose
from scipy.stats import kstest
from small_training import CONFIG, DATA, RECIPE, stripes
from strategies import float_dtypes, normal, random_params, rng_of, seeds

from pvt_ref import VARIANTS, Preprocessing, cross_entropy, forward, init_params, to_state_dict
from pvt_ref.arrays import array_module
from pvt_ref.draws import Draws, SampleDraws, What, generator
from pvt_ref.errors import ConfigError, PVTError, RangeError, ShapeError, TrainingError
from pvt_ref.models.architecture import param_shapes
from pvt_ref.train import (
    AdamW,
    LabelledImages,
    Recipe,
    adamw_init,
    adamw_step,
    add_gradients,
    clip_by_global_norm,
    config_of_epoch,
    cutmix,
    cutout,
    drop_path_of_epoch,
    ema_decay_of_step,
    ema_step,
    evaluate,
    first_non_finite,
    global_norm,
    is_decayed,
    mixup,
    one_hot,
    random_crop,
    random_erasing,
    random_flip,
    start_training,
    train_step,
    warmup_cosine,
)
from pvt_ref.train.step import draw_batch, order_of_epoch
from pvt_ref.tree import map_named, named_arrays


def params_of(seed: int, dtype: Any = np.float64):
    return random_params(CONFIG, seed, dtype)


def leaves_of(params) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(np.array(x)) for key, x in to_state_dict(params).items()}


# The optimiser ------------------------------------------------------------------------------------


@given(
    seed=seeds,
    dtype=float_dtypes,
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.9999),
    eps=st.floats(1e-10, 1e-3),
    decay=st.floats(0, 0.5),
    positions=st.booleans(),
)
def test_adamw_is_pytorchs(seed, dtype, beta1, beta2, eps, decay, positions):
    params = params_of(seed, dtype)
    settings = AdamW(
        beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay, decay_positions=positions
    )
    theirs = leaves_of(params)
    # the grouping that the released training code gets from its helper library, written out
    skipped = {"cls_token"} | (set() if positions else {f"pos_embed{i}" for i in range(1, 5)})
    plain = [x for k, x in theirs.items() if x.ndim == 1 or k.endswith(".bias") or k in skipped]
    decayed = [x for x in theirs.values() if not any(x is other for other in plain)]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": decay}]
    optimizer = torch.optim.AdamW(groups, betas=(beta1, beta2), eps=eps)
    state = adamw_init(params)
    for step in range(3):
        lr = 0.01 / (1 + step)
        grads = params_of(seed + step + 1, dtype)
        for key, g in to_state_dict(grads).items():
            theirs[key].grad = torch.tensor(np.array(g))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        before = {k: x.copy() for k, x in to_state_dict(params).items()}
        old = params
        params, state = adamw_step(params, grads, state, lr, settings)
        assert all(np.array_equal(x, before[k]) for k, x in to_state_dict(old).items())
    assert state.t == 3
    for key, x in to_state_dict(params).items():
        assert x.dtype == dtype
        assert relative(x, theirs[key].numpy()) < (1e-13 if dtype == np.float64 else 1e-5), key


def test_first_adamw_step_by_hand():
    """From zero means the first step is lr in the direction of the sign, whatever the size."""
    params, grads = params_of(1), params_of(2)
    settings = AdamW(weight_decay=0.0, eps=1e-300)
    moved, _ = adamw_step(params, grads, adamw_init(params), 0.5, settings)
    for (_, w), (_, g), (_, new) in zip(*map(named_arrays, (params, grads, moved)), strict=True):
        np.testing.assert_allclose(new, w - 0.5 * np.sign(g), rtol=0, atol=1e-12)


def test_decay_is_for_matrices_only():
    decayed = {k for k, x in named_arrays(params_of(0)) if is_decayed(k, x)}
    for key, shape in param_shapes(CONFIG).items():
        expected = len(shape) > 1 and "pos_embed" not in key and key != "cls_token"
        assert (key in decayed) == expected, key
    with_positions = {k for k, x in named_arrays(params_of(0)) if is_decayed(k, x, True)}
    assert with_positions - decayed == {f"pos_embed{i}" for i in range(1, 5)}


# Gradients ----------------------------------------------------------------------------------------


@given(seed=seeds, dtype=float_dtypes, max_norm=st.floats(1e-3, 1e3))
def test_clipping_is_pytorchs(seed, dtype, max_norm):
    grads = params_of(seed, dtype)
    theirs = [torch.zeros_like(x) for x in leaves_of(grads).values()]
    for x, g in zip(theirs, leaves_of(grads).values(), strict=True):
        x.grad = g
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    clipped, ours = clip_by_global_norm(grads, max_norm)
    tolerance = 1e-13 if dtype == np.float64 else 1e-5
    assert ours == pytest.approx(float(norm), rel=tolerance)
    for (_, g), x in zip(named_arrays(clipped), theirs, strict=True):
        assert g.dtype == dtype
        assert relative(g, x.grad.numpy()) < tolerance
    assert global_norm(clipped) <= max_norm * (1 + 1e-6)


def test_the_norm_of_large_float32_gradients_does_not_overflow():
    grads = map_named(lambda _, x: np.full_like(x, 1e25), params_of(0, np.float32))
    size = sum(x.size for _, x in named_arrays(grads))
    assert global_norm(grads) == pytest.approx(1e25 * math.sqrt(size), rel=1e-6)
    bad = map_named(lambda k, x: x * math.nan if k == "norm.bias" else x, grads)
    assert math.isnan(global_norm(bad))
    assert clip_by_global_norm(bad, 1.0)[0] is bad  # for the caller to see


def test_shares_of_a_batch_add_up():
    a, b = params_of(1), params_of(2)
    total = add_gradients(add_gradients(None, a, 0.25), b, 0.75)
    for (_, x), (_, y), (_, z) in zip(*map(named_arrays, (a, b, total)), strict=True):
        np.testing.assert_allclose(z, 0.25 * x + 0.75 * y, rtol=1e-14)


@pytest.mark.parametrize("accumulate", [2, 4, 6])
def test_accumulation_changes_the_memory_and_not_the_step(accumulate):
    """Without anything random, a batch in parts gives the weights of the batch as a whole."""
    config = dataclasses.replace(CONFIG, drop_path_rate=0.0)
    recipe = dataclasses.replace(small_training.without_chance(RECIPE), accumulate=1)
    parts = dataclasses.replace(recipe, accumulate=accumulate)
    state = start_training(params_of(3), len(DATA), seed=0)
    whole, report = train_step(state, DATA, config, recipe)
    split, split_report = train_step(state, DATA, config, parts)
    assert split_report.loss == pytest.approx(report.loss, rel=1e-12)
    assert split_report.hits == report.hits
    for (key, x), (_, y) in zip(
        named_arrays(split.optimizer.m), named_arrays(whole.optimizer.m), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-15, err_msg=key)


# Schedules ----------------------------------------------------------------------------------------


@given(total=st.integers(4, 60), data=st.data())
def test_the_learning_rate_is_pytorchs(total, data):
    warmup = data.draw(st.integers(2, total - 1))
    peak, floor = 0.5, 0.01
    x = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=peak)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, floor)
    for step in range(total):
        theirs = rise.get_last_lr()[0] if step < warmup else fall._get_closed_form_lr()[0]
        assert warmup_cosine(step, total, warmup, peak, floor) == pytest.approx(theirs, rel=1e-12)
        optimizer.step()
        if step < warmup - 1:
            rise.step()
        elif step >= warmup:
            fall.last_epoch += 1


def test_the_learning_rate_of_a_recipe():
    recipe = dataclasses.replace(RECIPE, epochs=10, warmup_epochs=2.5, lr=1.0, lr_floor=0.1)
    rates = [recipe.learning_rate(step, 4) for step in range(41)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0  # 2.5 epochs of 4 steps
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[40] == pytest.approx(0.1)
    assert rates[25] == pytest.approx(0.55)  # half-way down the cosine
    no_warmup = dataclasses.replace(recipe, warmup_epochs=0)
    assert no_warmup.learning_rate(0, 4) == 1.0


def test_a_fraction_of_an_epoch_is_rounded_to_the_nearest_step():
    recipe = dataclasses.replace(RECIPE, epochs=1, lr=1.0, lr_floor=0.0)
    for fraction, steps in ((0.29, 29), (0.286, 29), (0.284, 28)):  # 0.29 * 100 is 28.999...
        warming = dataclasses.replace(recipe, warmup_epochs=fraction)
        assert warming.learning_rate(steps - 1, 100) == 1.0
        assert warming.learning_rate(steps - 2, 100) < 1.0


def test_the_optimiser_gets_the_recipes_numbers():
    numbers = {"weight_decay": 0.3, "decay_positions": True, "beta1": 0.5, "beta2": 0.7}
    assert dataclasses.replace(RECIPE, **numbers).optimizer == AdamW(**numbers)


def test_drop_path_is_reset_between_epochs():
    config = dataclasses.replace(VARIANTS["pvt_small"], drop_path_rate=0.1)
    seen = [config_of_epoch(config, epoch, 4).drop_path_rate for epoch in range(6)]
    assert seen == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1])
    half = config_of_epoch(config, 2, 4)
    rates = [b.drop_path_rate for i in range(1, 5) for b in half.of_stage(i).blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.05, 16), atol=1e-15)
    assert dataclasses.replace(half, drop_path_rate=0.1) == config  # nothing else changed
    assert drop_path_of_epoch(0, 0.1, 0) == 0.1


# The average --------------------------------------------------------------------------------------


@given(seed=seeds, dtype=float_dtypes, decay=st.floats(0, 0.9999))
def test_the_average_is_pytorchs(seed, dtype, decay):
    average = params_of(seed, dtype)
    theirs = list(leaves_of(average).values())
    update = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    for step in range(3):
        params = params_of(seed + 1 + step, dtype)
        update(theirs, list(leaves_of(params).values()), None)
        average = ema_step(average, params, decay)
    for (key, x), y in zip(named_arrays(average), theirs, strict=True):
        assert x.dtype == dtype
        assert relative(x, y.numpy()) < (1e-13 if dtype == np.float64 else 1e-5), key


def test_a_young_average_forgets_faster():
    decays = [ema_decay_of_step(step, 0.99) for step in range(2000)]
    assert decays[0] == 0.1
    assert decays[8] == 0.5
    assert decays == sorted(decays)
    assert decays[-1] == 0.99
    assert ema_decay_of_step(5, 0.0) == 0.0


# Augmentation -------------------------------------------------------------------------------------


def batch(seed: int, B: int = 6, C: int = 2, H: int = 7, W: int = 5) -> np.ndarray:
    return normal(seed, B, C, H, W)


@given(seed=seeds, padding=st.integers(0, 4))
def test_a_crop_is_a_window_of_the_padded_image(seed, padding):
    images = batch(seed)
    cropped = random_crop(images, padding, rng_of(seed))
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    for b in range(6):
        windows = [
            (i, j)
            for i in range(2 * padding + 1)
            for j in range(2 * padding + 1)
            if np.array_equal(padded[b, :, i : i + 7, j : j + 5], cropped[b])
        ]
        assert windows, b


def test_crops_flips_and_cutouts_reach_everything_evenly():
    rng = rng_of(3)
    images = np.ones((4000, 1, 9, 9))
    images[:, :, 4, 4] = 2
    moved = random_crop(images, 2, rng)
    places = np.argwhere(moved[:, 0] == 2)[:, 1:]
    counts = np.zeros((9, 9))
    np.add.at(counts, tuple(places.T), 1)
    reached = counts[2:7, 2:7]
    assert counts.sum() == reached.sum() == 4000
    assert reached.min() > 100  # 160 expected
    assert reached.max() < 230

    images[:, :, 4, 4] = 1
    images[:, :, :, 0] = 3
    flipped = random_flip(images, rng)
    assert set(np.unique(flipped[:, 0, 0, 0] + 10 * flipped[:, 0, 0, -1])) == {13, 31}
    assert 0.45 < np.mean(flipped[:, 0, 0, -1] == 3) < 0.55

    holes = cutout(np.ones((4000, 2, 9, 9)), 4, rng) == 0
    np.testing.assert_array_equal(holes[:, 0], holes[:, 1])
    sizes = holes[:, 0].sum(axis=(1, 2))
    assert sizes.max() == 16
    assert sizes.min() == 4  # the centre in a corner: half of either side lies outside
    assert 0.10 < holes[:, 0, 4, 4].mean() < 0.30  # 16 of 81 centres blank the middle


def rectangles(erased: np.ndarray) -> np.ndarray:
    """Rows and columns of the holes of images that were above 0: top, bottom, left, right.

    Raises: AssertionError unless every hole is a rectangle, the same in all channels.
    """
    holes = erased == 0
    assert np.array_equal(holes, np.repeat(holes[:, :1], holes.shape[1], axis=1))
    found = []
    for hole in holes[:, 0]:
        rows, columns = hole.any(axis=1).nonzero()[0], hole.any(axis=0).nonzero()[0]
        found.append((rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if len(rows) else [0] * 4)
        assert np.array_equal(hole, np.outer(hole.any(axis=1), hole.any(axis=0)))
    return np.array(found)


@given(
    seed=seeds,
    H=st.integers(1, 40),
    W=st.integers(1, 40),
    areas=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    ratios=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
)
def test_an_erased_rectangle_has_area_and_ratio_in_bounds(seed, H, W, areas, ratios):
    area, ratio = loose((sorted(areas), sorted(ratios)))
    images = 0.1 + np.abs(batch(seed, 3, 2, H, W))
    erased = random_erasing(images, 1.0, rng_of(seed), area, ratio)
    assert np.array_equal(erased[erased != 0], images[erased != 0])
    for top, bottom, left, right in rectangles(erased):
        h, w = bottom - top, right - left
        assert h >= 1 <= w
        if min(h, w) > 1:  # to half a pixel
            assert (h - 0.5) * (w - 0.5) <= area[1] * H * W
            assert (h + 0.5) * (w + 0.5) >= area[0] * H * W
            # further only if it would not have fitted
            assert (h - 0.5) / (w + 0.5) <= ratio[1] or w == W
            assert (h + 0.5) / (w - 0.5) >= ratio[0] or h == H


def test_erased_areas_ratios_and_places_are_drawn_evenly():
    H, W = 90, 110
    images = np.ones((3000, 1, H, W), np.float32)
    top, bottom, left, right = rectangles(random_erasing(images, 1.0, rng_of(4))).T
    h, w = bottom - top, right - left
    assert kstest((h * w / (H * W) - 0.02) / (1 / 3 - 0.02), "uniform").statistic < 0.03
    small = h * w < 0.2 * H * W  # of which every ratio fits
    shape = np.log((h / w)[small] / 0.3) / np.log(3.3 / 0.3)
    assert kstest(shape, "uniform").statistic < 0.04
    assert kstest((top + 0.5) / (H - h + 1), "uniform").statistic < 0.03
    assert kstest((left + 0.5) / (W - w + 1), "uniform").statistic < 0.03
    sides = (0.1, 0.1), (1, 1)  # in 9 x 9 pixels, squares of 3
    erased = random_erasing(images[:, :, :9, :9], 1.0, rng_of(6), *sides)
    for first in rectangles(erased)[:, ::2].T:
        counts = np.bincount(first)
        assert len(counts) == 7
        assert 350 < counts.min() <= counts.max() < 510  # 429 expected
    for share in (0.0, 0.25, 1.0):
        some = random_erasing(images[:2000, :, :9, :9], share, rng_of(5))
        assert abs(np.mean((some == 0).any(axis=(1, 2, 3))) - share) < 0.03


def test_what_is_erased_of_a_sample_does_not_depend_on_its_batch():
    images = np.ones((40, 1, 12, 9), np.float32)
    together = random_erasing(images, 0.5, SampleDraws(3, 1, range(40)))
    assert 0.2 < np.mean((together == 0).any(axis=(1, 2, 3))) < 0.8
    assert len(np.unique(together, axis=0)) > 10
    for sample in range(40):
        alone = random_erasing(images[:1], 0.5, SampleDraws(3, 1, [sample]))
        assert np.array_equal(alone[0], together[sample])


def test_cutout_reaches_every_place_of_an_oblong_image():
    holes = cutout(np.ones((3000, 1, 5, 17)), 2, rng_of(8))[:, 0] == 0
    assert holes.any(axis=0).all()
    tall = cutout(np.ones((3000, 1, 17, 5)), 2, rng_of(8))[:, 0] == 0
    assert tall.any(axis=0).all()
    assert abs(holes.sum() - tall.sum()) < 0.05 * holes.sum()


def test_a_batch_is_changed_as_the_recipe_says():
    recipe, params = small_training.without_chance(RECIPE), params_of(0)
    draws, chosen, epoch = Draws(2, 9, 1), np.array([4, 1, 7]), 3
    images, targets = draw_batch(params, DATA, chosen, CONFIG, recipe, epoch, draws)
    expected = (DATA.images[chosen] / 255 - 0.5) / 0.25
    np.testing.assert_allclose(images, expected, rtol=1e-12, atol=1e-12)
    assert targets.tolist() == DATA.labels[chosen].tolist()
    everything = dataclasses.replace(RECIPE, erasing=0.5, cutmix_alpha=0.0)
    changed = []
    for image, sample in zip(expected, chosen, strict=True):
        rng = generator(2, What.AUGMENTATION, epoch, sample)
        moved = cutout(random_flip(random_crop(image[None], 2, rng), rng), 4, rng)
        changed.append(random_erasing(moved, 0.5, rng))
    changed, labels = np.concatenate(changed), np.eye(3)[DATA.labels[chosen]]
    mixing = {(0.5, 0.0): mixup, (0.0, 0.7): cutmix}
    for (mixup_alpha, cutmix_alpha), mix in mixing.items():
        recipe = dataclasses.replace(everything, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)
        images, targets = draw_batch(params, DATA, chosen, CONFIG, recipe, epoch, draws)
        alpha, rng = mixup_alpha + cutmix_alpha, draws.at(What.MIXUP)  # nothing drawn before
        expected = mix(changed, labels, alpha, rng)
        np.testing.assert_allclose(images, expected[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(targets, expected[1], rtol=1e-12)


def test_with_mixup_and_cutmix_each_micro_batch_takes_one_of_them():
    """Half of them each. A step, and so the way of mixing, does not depend on earlier ones."""
    recipe = dataclasses.replace(small_training.without_chance(RECIPE), cutmix_alpha=1.0)
    recipe = dataclasses.replace(recipe, mixup_alpha=1.0)
    params, chosen, mixed = params_of(0), np.arange(6), []
    plain = (DATA.images[chosen] / 255 - 0.5) / 0.25
    for step in range(100):
        for micro_batch in range(2):
            draws = Draws(1, step, micro_batch)
            images, targets = draw_batch(params, DATA, chosen, CONFIG, recipe, 0, draws)
            assert np.allclose(targets.sum(axis=1), 1)
            # CutMix leaves every number what it was, in one image of the batch or another
            mixed.append(not np.isclose(images[:, None], plain[None]).any(axis=1).all())
            rng = draws.at(What.MIXUP)
            kind = (mixup, cutmix)[rng.integers(2)]
            assert (kind is mixup) == mixed[-1]
            expected = kind(plain, np.eye(3)[DATA.labels[chosen]], 1.0, rng)
            np.testing.assert_allclose(images, expected[0], rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(targets, expected[1], rtol=1e-12)
    assert 0.4 < np.mean(mixed) < 0.6
    assert {(a, b) for a, b in zip(mixed[::2], mixed[1::2], strict=True)} == {
        (a, b) for a in (False, True) for b in (False, True)
    }


def test_a_hit_is_the_class_with_the_larger_share():
    """Counted again from the logits of a step without drop path."""
    config = dataclasses.replace(CONFIG, drop_path_rate=0.0)
    recipe = dataclasses.replace(RECIPE, accumulate=1, batch_size=27)
    for seed in range(4):
        state = start_training(params_of(seed), 27, seed=seed)
        _, report = train_step(state, DATA, config, recipe)
        order = order_of_epoch(seed, 0, 27)
        draws = Draws(seed, 0)
        images, targets = draw_batch(state.params, DATA, order, config, recipe, 0, draws)
        answers = forward(state.params, images, config).argmax(axis=1)
        assert report.hits == np.sum(answers == targets.argmax(axis=1))
        assert report.loss == pytest.approx(
            float(cross_entropy(forward(state.params, images, config), targets, 0.1)[0])
        )


def test_sums_are_those_of_the_epoch():
    state, reports = start_training(params_of(0), len(DATA), seed=0), []
    for step in range(1, 9):  # two epochs of four steps
        state, report = train_step(state, DATA, CONFIG, RECIPE)
        reports = [*reports, report] if step != 5 else [report]
        assert state.epoch_hits == sum(r.hits for r in reports)
        assert state.epoch_loss == pytest.approx(sum(r.loss for r in reports))


@given(seed=seeds, alpha=st.floats(0.05, 4))
def test_mixup_blends_images_and_targets_alike(seed, alpha):
    images, targets = batch(seed), np.eye(6)
    mixed, soft = mixup(images, targets, alpha, rng_of(seed))
    rng = rng_of(seed)
    lam, partner = rng.beta(alpha, alpha), rng.permutation(6)
    for b in range(6):
        np.testing.assert_allclose(mixed[b], lam * images[b] + (1 - lam) * images[partner[b]])
        expected = np.zeros(6)
        expected[b] += lam
        expected[partner[b]] += 1 - lam
        np.testing.assert_allclose(soft[b], expected)
    # the loss is linear in the targets, as the paper of mixup writes it; and PyTorch's is the same
    logits = normal(seed, 6, 6)
    blended = lam * cross_entropy(logits, np.arange(6))[0]
    blended += (1 - lam) * cross_entropy(logits, partner)[0]
    assert float(cross_entropy(logits, soft)[0]) == pytest.approx(float(blended), rel=1e-12)
    theirs = F.cross_entropy(torch.tensor(logits), torch.tensor(soft), label_smoothing=0.1)
    assert float(cross_entropy(logits, soft, 0.1)[0]) == pytest.approx(float(theirs), rel=1e-12)


@given(
    seed=seeds, alpha=st.floats(0.05, 4), H=st.integers(1, 9), W=st.integers(1, 9),
    B=st.integers(1, 6), dtype=float_dtypes,
)  # fmt: skip
def test_targets_of_cutmix_are_the_shares_of_the_pixels(seed, alpha, H, W, B, dtype):
    """Counted: pixels of image b are b + 1, so each says whose it is."""
    images = np.broadcast_to(np.arange(1, B + 1, dtype=dtype)[:, None, None, None], (B, 2, H, W))
    mixed, soft = cutmix(images, np.eye(B, dtype=dtype), alpha, rng_of(seed))
    assert mixed.shape == images.shape
    assert mixed.dtype == soft.dtype == dtype
    for b in range(B):
        shares = [np.mean(mixed[b] == other + 1) for other in range(B)]
        np.testing.assert_allclose(soft[b], shares, rtol=0, atol=1e-6)
        assert np.isclose(soft[b].sum(), 1)
    replaced = mixed != images
    rectangles(np.where(replaced, 0, images))
    assert len({r.tobytes() for r in replaced if r.any()}) <= 1  # the same place for all


def test_cutmix_takes_the_rectangle_of_the_paper():
    """Sides in proportion to sqrt(1 - lambda), the centre anywhere; cut off at the border."""
    H, W = 40, 60
    images = np.stack([np.full((1, H, W), 1.0), np.full((1, H, W), 2.0)])

    def cut(seed: int, alpha: float) -> tuple[float, np.ndarray | None]:
        """lambda, and the rectangle if the two were exchanged."""
        rng = rng_of(seed)
        lam, partner = rng.beta(alpha, alpha), rng.permutation(2)
        mixed, _ = cutmix(images, np.eye(2), alpha, rng_of(seed))
        return lam, rectangles(np.where(mixed != images, 0, images))[0] if partner[0] else None

    whole = 0
    for seed in range(800):
        lam, found = cut(seed, 1.0)
        if found is not None and found.all() and found[1] < H and found[3] < W:
            top, bottom, left, right = found
            assert abs(bottom - top - H * math.sqrt(1 - lam)) <= 0.5
            assert abs(right - left - W * math.sqrt(1 - lam)) <= 0.5
            whole += 1
    assert whole > 30
    found = np.array([f for seed in range(2000) for _, f in [cut(seed, 1e9)] if f is not None])
    top, bottom, left, right = found.T  # lambda is 1/2, and the sides 28 and 42
    row = np.where(top > 0, top + 14, bottom - 14)
    column = np.where(left > 0, left + 21, right - 21)
    assert kstest((row + 0.5) / H, "uniform").statistic < 0.06
    assert kstest((column + 0.5) / W, "uniform").statistic < 0.06
    assert (row.min(), row.max(), column.min(), column.max()) == (0, H - 1, 0, W - 1)


def test_what_is_off_draws_nothing():
    images, rng = batch(0), rng_of(1)
    before = rng.bit_generator.state
    assert random_crop(images, 0, rng) is images
    assert cutout(images, 0, rng) is images
    assert random_erasing(images, 0, rng) is images
    assert mixup(images, images, 0, rng) == (images, images)
    assert cutmix(images, images, 0, rng) == (images, images)
    assert rng.bit_generator.state == before


def test_augmentation_is_the_same_on_every_library(library):
    images = batch(4).astype(np.float32)
    there = library.asarray(images)
    host = library.asarray if library.name == "read-only numpy" else np.asarray
    for change in (
        lambda x: random_crop(x, 3, rng_of(5)),
        lambda x: random_flip(x, rng_of(5)),
        lambda x: cutout(x, 3, rng_of(5)),
        lambda x: random_erasing(x, 0.7, rng_of(5)),
        lambda x: mixup(x, x, 0.5, rng_of(5))[0],
        lambda x: cutmix(x, x, 1.0, rng_of(5))[0],
        lambda x: cutmix(x, x, 1.0, rng_of(5))[1],
        lambda x: one_hot(np.arange(6), 7, x),
    ):
        here, result = change(images), change(there)
        assert array_module(result) is array_module(there)
        result = result.get() if hasattr(result, "get") else host(result)
        assert np.array_equal(result, here)
        assert here.dtype == np.float32


def test_the_optimiser_runs_on_every_library(library):
    params = map_named(lambda _, x: library.asarray(x), params_of(1, np.float32))
    grads = map_named(lambda _, x: library.asarray(x), params_of(2, np.float32))
    clipped, norm = clip_by_global_norm(grads, 0.5)
    moved, _ = adamw_step(params, clipped, adamw_init(params), 0.1, AdamW())
    average = ema_step(params, moved, 0.9)
    here, there = params_of(1, np.float32), params_of(2, np.float32)
    expected, expected_norm = clip_by_global_norm(there, 0.5)
    expected, _ = adamw_step(here, expected, adamw_init(here), 0.1, AdamW())
    assert norm == pytest.approx(expected_norm, rel=1e-6)
    for (key, x), (_, y) in zip(
        named_arrays(average), named_arrays(ema_step(here, expected, 0.9)), strict=True
    ):
        x = x.get() if hasattr(x, "get") else np.asarray(x)
        assert relative(x, y) < 1e-5, key


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be a whole number at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5; it must be a whole number"),
        ({"accumulate": 7}, "a batch has only 6 samples"),
        ({"lr": 0.0}, "lr is 0.0; it must be a number above 0"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr_floor": 1.0}, "lr_floor is 1.0; it must be a number at least 0 and at most 0.003"),
        ({"warmup_epochs": 4}, "warmup_epochs is 4"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"beta1": 1.0}, "beta1 is 1.0; it must be a number at least 0 and below 1"),
        ({"clip_norm": 0}, "clip_norm is 0"),
        ({"label_smoothing": 1.1}, "label_smoothing is 1.1"),
        ({"mixup_alpha": "0.2"}, "mixup_alpha is '0.2'"),
        ({"cutmix_alpha": -1}, "cutmix_alpha is -1; it must be a number at least 0"),
        ({"erasing": 1.1}, "erasing is 1.1; it must be a number at least 0 and at most 1"),
        ({"flip": 1}, "flip is 1; it must be True or False"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"layer_decay": 0}, "layer_decay is 0; it must be a number above 0 and at most 1"),
        ({"frozen": "head"}, "frozen is 'head'; it must be a tuple of beginnings of keys"),
        ({"seed": -1}, "seed is -1"),
        ({"crop_padding": True}, "crop_padding is True"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_it(change, message):
    with pytest.raises(RangeError, match=re.escape(message)):
        dataclasses.replace(RECIPE, **change)


def test_optimizer_settings_are_checked():
    with pytest.raises(RangeError, match="eps is 0"):
        AdamW(eps=0)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([[1]], np.zeros(1, int), "must be NumPy arrays"),
        (np.zeros((2, 1, 4, 4)), np.zeros(2, int), r"dtype float64 .* \(N, C, H, W\) uint8"),
        (np.zeros((0, 1, 4, 4), np.uint8), np.zeros(0, int), "at least one"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, int), "channels-last"),
        (np.zeros((2, 3, 4, 4), np.uint8), np.zeros(2, int), r"must be \(N, 1, H, W\)"),
        (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(2), "dtype float64 .* 2 integers"),
        (np.zeros((2, 1, 4, 4), np.uint8), np.zeros(3, int), r"shape \(3,\)"),
    ],
)
def test_unsuitable_samples_are_refused(images, labels, message):
    with pytest.raises(TrainingError, match=message):
        LabelledImages(images, labels, small_training.PREPROCESSING)


def test_samples_that_do_not_fit_the_model_are_refused():
    high = LabelledImages(DATA.images, DATA.labels + 1, DATA.preprocessing)
    with pytest.raises(TrainingError, match=r"labels run from 1 to 3, .* classes 0 to 2"):
        high.check_fits(CONFIG, "data")
    low = LabelledImages(DATA.images, DATA.labels - 1, DATA.preprocessing)
    with pytest.raises(TrainingError, match="labels run from -1"):
        low.check_fits(CONFIG, "data")
    with pytest.raises(TrainingError, match="in_chans=3"):
        DATA.check_fits(dataclasses.replace(CONFIG, in_chans=3), "data")
    odd = LabelledImages(DATA.images[:, :, :, :15], DATA.labels, DATA.preprocessing)
    with pytest.raises(ShapeError, match="image size 16x15"):
        odd.check_fits(CONFIG, "data")
    with pytest.raises(TrainingError, match="27 samples, fewer than one batch of 28"):
        dataclasses.replace(RECIPE, batch_size=28).steps_per_epoch(27)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("CMYK",), "mode is 'CMYK'"),
        (("L",), "mean is .* needs 1 finite"),
        (("L", (0.5,), (0.0,)), "std is .* above 0"),
        (("RGB", (0.5, 0.5, math.nan)), "mean is"),
        (("RGB", "abc"), "mean is 'abc'"),
    ],
)
def test_preprocessing_says_what_is_wrong_with_it(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Preprocessing(*arguments)


# Measuring and diagnosing -------------------------------------------------------------------------


def test_evaluate_counts_every_sample_once():
    data = stripes(11, 6)
    params = params_of(4)
    loss, accuracy = evaluate(params, CONFIG, data, batch_size=4)
    whole_loss, whole_accuracy = evaluate(params, CONFIG, data, batch_size=100)
    assert loss == pytest.approx(whole_loss, rel=1e-12)
    assert accuracy == whole_accuracy
    assert accuracy * 11 == round(accuracy * 11)


@pytest.mark.parametrize(
    ("key", "where"),
    [
        ("patch_embed1.proj.weight", "the linear inside patch_embed1"),
        ("block2.1.mlp.fc1.weight", "block2.1.mlp.fc1 (linear)"),
        ("block1.0.attn.kv.weight", "block1.0.attn.kv (linear)"),
        ("norm.weight", "norm (layer_norm)"),
        ("head.weight", "head (linear)"),
    ],
)
def test_the_first_layer_that_overflows_is_named(key, where):
    params = map_named(
        lambda k, x: np.full_like(x, 3e38) if k == key else x,
        init_params(CONFIG, rng_of(1), np.float32),
    )
    images = DATA.batch(slice(0, 3), params.pos_embed1)
    message = first_non_finite(params, images, CONFIG, rng_of(0))
    assert where in message, message


def test_a_block_that_was_dropped_is_not_blamed():
    """Of two blocks that overflow, drop path sometimes skips the earlier for the only sample."""
    config = dataclasses.replace(CONFIG, depths=(2, 1, 1, 1), drop_path_rate=0.9)
    params = map_named(
        lambda k, x: np.full_like(x, 3e38) if "block" in k and k.endswith("fc1.weight") else x,
        init_params(config, rng_of(1), np.float32),
    )
    images = DATA.batch(slice(0, 1), params.pos_embed1)
    named = {first_non_finite(params, images, config, rng_of(seed)) for seed in range(30)}
    assert len(named) == 1  # inside the branch it is computed, and found, all the same
    state = start_training(params, len(DATA), seed=1)
    with pytest.raises(TrainingError, match=r"block1\.0\.mlp\.fc1 \(linear\)"):
        train_step(state, DATA, config, RECIPE)


def test_weights_and_gradients_that_are_not_finite_are_named():
    params = map_named(lambda k, x: x * math.nan if k == "block3.0.norm2.bias" else x, params_of(0))
    assert "block3.0.norm2.bias" in first_non_finite(params)
    images = np.full((1, 1, 16, 16), np.inf)
    assert "images themselves" in first_non_finite(params_of(0), images, CONFIG)
    fine = DATA.batch(slice(0, 2), params.pos_embed1)
    assert "loss itself" in first_non_finite(params_of(0), fine, CONFIG)
    assert issubclass(TrainingError, PVTError)


def test_recipes_are_records_of_plain_numbers():
    assert Recipe(**RECIPE.to_dict()) == RECIPE
    numpys = dataclasses.replace(
        RECIPE,
        batch_size=np.int64(6),
        lr=np.float64(3e-3),
        clip_norm=np.float64(1.0),
        ema_decay=np.float64(0.9),
        beta1=np.float64(0.9),
        warmup_epochs=1,
    )
    assert numpys == RECIPE
    values = numpys.to_dict()
    assert (values.pop("frozen"), values.pop("schedule")) == ((), "cosine")
    assert all(type(v) in (int, float, bool) for v in values.values())
    assert all(
        type(v) in (float, bool) for v in dataclasses.asdict(AdamW(eps=np.float64(1))).values()
    )
    json.dumps(numpys.to_dict())
    assert Recipe(epochs=1, batch_size=1).warmup_epochs == 1


def test_without_averaging_the_average_is_the_last_weights():
    params = params_of(1)
    assert ema_step(params_of(0), params, 0.0) is params
