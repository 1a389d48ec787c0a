"""Random numbers by counter: they name a place, and nothing that was drawn before changes them."""

import dataclasses
import io
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
from kill_training import fingerprint, saved
from loose import loose
from rich.console import Console
from small_training import CONFIG, DATA, HELD_OUT, RECIPE
from strategies import random_params, rng_of

from pvt_ref import backward, cross_entropy, forward_with_cache, to_state_dict
from pvt_ref.checkpoint.safetensors_file import TRAINING_KEY, read_safetensors
from pvt_ref.draws import Draws, SampleDraws, What, generator
from pvt_ref.errors import ArrayTypeError, RangeError, ShapeError
from pvt_ref.train import (
    adamw_step,
    add_gradients,
    clip_by_global_norm,
    fit,
    mixup,
    random_crop,
    start_training,
    train_step,
)
from pvt_ref.train.loop import STATE
from pvt_ref.train.step import draw_batch, order_of_epoch

PARAMS = random_params(CONFIG, 0, np.float32)
DROPPING = dataclasses.replace(CONFIG, drop_rate=0.2, attn_drop_rate=0.1, drop_path_rate=0.5)


def bits(tree) -> dict[str, bytes]:
    return {key: x.tobytes() for key, x in to_state_dict(tree).items()}


def logits_of(draws: Draws) -> np.ndarray:
    images = rng_of(1).standard_normal((5, 1, 16, 16), np.float32)
    return forward_with_cache(PARAMS, images, DROPPING, draws)[0]


def test_no_two_places_share_their_numbers():
    """NumPy fills a short key up with zeros, so that [5] and [5, 0] would be one generator."""
    places = [(What.FIRST_WEIGHTS,)]
    places += [(What.ORDER, epoch) for epoch in range(8)]
    for what in (What.AUGMENTATION, What.PHOTO):
        places += [(what, *where) for where in itertools.product(range(8), repeat=2)]
    for what in (What.MIXUP, What.STAGE_DROPOUT, What.BLOCK):
        places += [(what, *where) for where in itertools.product(range(6), repeat=3)]
    seeds = (0, 1, 2, 2**40)
    keys: list[Any] = [(seed, *place) for seed in seeds for place in places]
    first = {int(generator(*key).integers(2**63)) for key in keys}
    assert len(first) == len(keys)


def test_the_first_weights_are_those_of_version_0_1_0():
    expected = np.random.default_rng([5, 1]).random(9)
    assert np.array_equal(generator(5, What.FIRST_WEIGHTS).random(9), expected)


def test_masks_are_the_same_whatever_was_drawn_before():
    draws = Draws(3, 7, 1)
    expected = logits_of(draws)
    for other in (Draws(4, 7, 1), Draws(3, 8, 1), Draws(3, 7, 0)):
        assert not np.array_equal(logits_of(other), expected)
    generator(3, What.ORDER, 0).random(1000)
    assert np.array_equal(logits_of(draws), expected)
    assert np.array_equal(logits_of(Draws(3, 7, 1)), expected)


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_only():
    order = order_of_epoch(5, 2, 100)
    assert sorted(order) == list(range(100))
    order_of_epoch.cache_clear()
    order_of_epoch(5, 0, 100)
    assert np.array_equal(order_of_epoch(5, 2, 100), order)
    for other in (order_of_epoch(5, 3, 100), order_of_epoch(6, 2, 100)):
        assert not np.array_equal(other, order)
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1  # it is kept for the next step


def test_a_sample_is_changed_alike_in_every_batch():
    """Alone, in another order, or beside others: the same pixels; in another epoch, others."""
    recipe = dataclasses.replace(RECIPE, mixup_alpha=0.0, cutmix_alpha=0.0, erasing=0.6)

    def changed(chosen, epoch: int, step: int) -> np.ndarray:
        return draw_batch(
            PARAMS, DATA, np.asarray(chosen), CONFIG, recipe, epoch, Draws(3, step, step % 2)
        )[0]

    together = changed(range(27), 1, 4)
    backwards = changed(range(26, -1, -1), 1, 5)
    assert np.array_equal(backwards[::-1], together)
    for sample in range(27):
        assert np.array_equal(changed([sample], 1, sample)[0], together[sample])
    elsewhere = changed(range(27), 2, 4)
    assert sum(np.array_equal(x, y) for x, y in zip(together, elsewhere, strict=True)) < 3


@pytest.mark.parametrize("alphas", [(0.5, 0.0), (0.0, 1.0), (0.5, 1.0)])
def test_pairs_of_mixup_and_cutmix_are_inside_a_micro_batch(alphas):
    recipe = dataclasses.replace(RECIPE, mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
    labels = np.zeros(27, int)
    labels[:3] = 1
    data = dataclasses.replace(DATA, labels=labels)
    for step in range(20):
        draws = Draws(3, step, 1)
        _, targets = draw_batch(PARAMS, data, np.arange(3), CONFIG, recipe, 0, draws)
        np.testing.assert_allclose(targets, [[0, 1, 0]] * 3, atol=1e-6)
    draws = [Draws(3, 0, number) for number in range(2)]
    images = [draw_batch(PARAMS, data, np.arange(9), CONFIG, recipe, 0, d)[0] for d in draws]
    assert not np.array_equal(*images)  # other pairs and shares in the next micro-batch


@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_a_step_is_the_sum_of_its_micro_batches_in_any_order(accumulate):
    """As of ranks that share them: each is computed alone, the last one first."""
    recipe = dataclasses.replace(RECIPE, accumulate=accumulate, drop_path_ramp_epochs=0)
    state = start_training(PARAMS, len(DATA), seed=9)
    for _ in range(5):
        state, _ = train_step(state, DATA, DROPPING, recipe)
    following, _ = train_step(state, DATA, DROPPING, recipe)

    chosen = order_of_epoch(9, 1, len(DATA))[6:12]  # the second of four steps
    parts = np.array_split(chosen, accumulate)
    grads = {}
    for number in reversed(range(accumulate)):
        draws = Draws(9, 5, number)
        images, targets = draw_batch(state.params, DATA, parts[number], DROPPING, recipe, 1, draws)
        logits, cache = forward_with_cache(state.params, images, DROPPING, draws)
        _, dlogits = cross_entropy(logits, targets, recipe.label_smoothing)
        grads[number], _ = backward(state.params, cache, dlogits, DROPPING)
    total = None
    for number in range(accumulate):
        total = add_gradients(total, grads[number], len(parts[number]) / 6)
    total, _ = clip_by_global_norm(total, loose(recipe.clip_norm))
    lr = recipe.learning_rate(5, 4)
    params, _ = adamw_step(state.params, total, state.optimizer, lr, recipe.optimizer)
    assert bits(params) == bits(following.params)


def test_a_step_repeated_is_the_same_step():
    state = start_training(PARAMS, len(DATA), seed=2)
    once, _ = train_step(state, DATA, CONFIG, RECIPE)
    train_step(once, DATA, CONFIG, RECIPE)
    again, _ = train_step(state, DATA, CONFIG, RECIPE)
    assert fingerprint(again) == fingerprint(once)
    other, _ = train_step(start_training(PARAMS, len(DATA), seed=3), DATA, CONFIG, RECIPE)
    assert bits(other.params) != bits(once.params)


@pytest.mark.parametrize("name", ["seed", "step", "micro_batch"])
@pytest.mark.parametrize("value", [-1, 0.5, None, "x", np.nan])
def test_draws_of_what_is_no_place_are_refused(name, value):
    with pytest.raises(RangeError, match=f"{name} is .*; it must be a whole number at least 0"):
        dataclasses.replace(Draws(0, 0), **{name: value})


def test_generators_of_samples_are_for_as_many_images():
    images = np.zeros((4, 1, 8, 8), np.float32)
    with pytest.raises(ShapeError, match="4 images but the generators of 3 samples"):
        random_crop(images, 2, SampleDraws(0, 0, range(3)))
    with pytest.raises(ArrayTypeError, match="rng is SampleDraws"):
        mixup(images, np.eye(4, dtype=np.float32), 0.5, loose(SampleDraws(0, 0, range(4))))


# The table of operations ------------------------------------------------------------------------


def test_the_table_is_stored_and_another_one_is_said(tmp_path, monkeypatch):
    def train(**options) -> str:
        seen = io.StringIO()
        console = Console(file=seen, width=300)
        fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, console=console, **options)
        return seen.getvalue()

    def stored() -> str:
        _, metadata = read_safetensors(tmp_path / STATE)
        return json.loads(metadata[TRAINING_KEY])["run"]["operations"]["table"]

    monkeypatch.setenv("PVT_REF_OPS", "blocked")
    train(stop_at_step=1)
    assert re.fullmatch(r"Ops\('blocked', Tiling\(.*elements=\d+.*\)\), \d+ threads", stored())
    assert "saved with" not in train(stop_at_step=2, resume=True)
    monkeypatch.setenv("PVT_REF_OPS", "reference")
    said = train(stop_at_step=3, resume=True)
    assert re.search(r"saved with \"Ops\('blocked'.*, goes on with Ops\('reference'\)", said)
    assert said.count("last bits may differ") == 1
    assert (saved(tmp_path).step, "reference" in stored()) == (3, True)
    assert "saved with" not in train(stop_at_step=4, resume=True)
