"""Layers at learning rates of their own, and weights that stay as they are, in every network."""

import contextlib
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from closeness import relative
from hypothesis import given
from hypothesis import strategies as st
from kill_training import fingerprint
from small_training import CONFIG, DATA, HELD_OUT, RECIPE, without_chance
from strategies import normal, random_params, rng_of, seeds
from toy import ToyConfig, entered

import pvt_ref
from pvt_ref import REFERENCE, VARIANTS, Preprocessing, PVTv2Config, ViTConfig, to_state_dict
from pvt_ref.errors import ArrayTypeError, RangeError, ShapeError, TrainingError
from pvt_ref.models.architecture import layer_numbers, param_shapes
from pvt_ref.train import (
    AdamW,
    LabelledImages,
    Recipe,
    adamw_init,
    adamw_step,
    fit,
    global_norm,
    learning_rate_factors,
    start_training,
    step,
    train_step,
)
from pvt_ref.train.rates import without_frozen
from pvt_ref.tree import map_named, named_arrays

V2 = PVTv2Config(
    img_size=64, num_classes=3, in_chans=1, embed_dims=(4, 8, 12, 8), num_heads=(1, 2, 3, 2),
    mlp_ratios=(2, 1, 1, 2), depths=(1, 2, 1, 1), sr_ratios=(4, 2, 1, 1), drop_path_rate=0.2,
)  # fmt: skip
VIT = ViTConfig(
    img_size=16, patch_size=4, embed_dim=12, depth=12, num_heads=3, mlp_ratio=1, in_chans=1,
    num_classes=3,
)  # fmt: skip
TOY = ToyConfig(in_chans=1, num_classes=3)
NETWORKS = {"pvt": CONFIG, "pvt_v2": V2, "vit": VIT, "toy": TOY}

#: What is frozen of each: a part of stage 1, a block that is not alone in its stage, and one array.
FROZEN = {
    "pvt": ("patch_embed1", "pos_embed3", "block2.1", "norm.bias"),
    "pvt_v2": ("patch_embed1", "norm2", "block2.1", "block4.0.mlp.fc1.bias"),
    "vit": ("cls_token", "blocks.1", "norm.bias"),
    "toy": ("embed.weight", "head.bias"),
}


@pytest.fixture(autouse=True)
def toy():
    with entered():
        yield


def samples_of(config, count=12) -> LabelledImages:
    pixels = rng_of(3).integers(0, 256, (count, 1, config.img_size, config.img_size), np.uint8)
    return LabelledImages(
        pixels, rng_of(4).integers(0, 3, count), Preprocessing("L", (0.5,), (0.25,))
    )


def bits(tree) -> dict[str, bytes]:
    return {key: np.asarray(x).tobytes() for key, x in named_arrays(tree)}


# Which layer is which -----------------------------------------------------------------------------

#: By beginning of a key, how far the layer is from the head.
FROM_THE_HEAD = {
    "pvt_tiny": {
        **{"patch_embed1": 9, "pos_embed1": 9, "block1.0": 8, "block1.1": 7},
        **{"patch_embed2": 6, "pos_embed2": 6, "block2.0": 6, "block2.1": 5},
        **{"patch_embed3": 4, "pos_embed3": 4, "block3.0": 4, "block3.1": 3},
        **{"patch_embed4": 2, "pos_embed4": 2, "cls_token": 2, "block4.0": 2, "block4.1": 1},
        **{"norm": 0, "head": 0},
    },
    "pvt_v2_b0": {
        **{"patch_embed1": 9, "block1.0": 8, "block1.1": 7, "norm1": 7},
        **{"patch_embed2": 6, "block2.0": 6, "block2.1": 5, "norm2": 5},
        **{"patch_embed3": 4, "block3.0": 4, "block3.1": 3, "norm3": 3},
        **{"patch_embed4": 2, "block4.0": 2, "block4.1": 1, "norm4": 1},
        "head": 0,
    },
    "deit_ti_16": {
        **{"cls_token": 13, "pos_embed": 13, "patch_embed": 13},
        **{f"blocks.{k}": 12 - k for k in range(12)},
        **{"norm": 0, "head": 0},
    },
}


@pytest.mark.parametrize("name", FROM_THE_HEAD)
def test_the_factors_of_published_models(name):
    """Exactly: powers of 1/2 are."""
    for key, factor in learning_rate_factors(VARIANTS[name], 0.5).items():
        (begin,) = (x for x in FROM_THE_HEAD[name] if f"{key}.".startswith(f"{x}."))
        assert factor == 0.5 ** FROM_THE_HEAD[name][begin], key


def test_a_network_without_blocks_has_two_layers():
    assert learning_rate_factors(TOY, 0.5) == {
        **{"embed.weight": 0.5, "embed.bias": 0.5, "head.weight": 1.0, "head.bias": 1.0}
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_rates_rise_along_the_network(name):
    """In the order in which a forward pass asks for the weights, from the image to the head."""
    config = NETWORKS[name]
    params, used = random_params(config, 0), []
    ops = REFERENCE.watched(lambda call: used.append(call.path), params=params)
    pvt_ref.forward(params, normal(1, 1, 1, config.img_size, config.img_size), config, ops=ops)
    factors = learning_rate_factors(config, 0.7)
    order = {}
    for path in used:  # an operation returns before the one that asked for it
        for key in factors:
            if f"{key}.".startswith(f"{path}."):
                order.setdefault(key, factors[key])
    assert factors.keys() - order.keys() <= {"cls_token"}  # no operation takes it
    rates = list(order.values())
    assert rates == sorted(rates)
    assert max(factors.values()) == rates[-1] == 1
    assert (
        min(factors.values())
        == rates[0]
        == pytest.approx(0.7 ** max(layer_numbers(config).values()))
    )


def test_all_layers_alike_unless_asked():
    for config in NETWORKS.values():
        factors = learning_rate_factors(config)
        assert list(factors) == list(param_shapes(config))
        assert set(factors.values()) == {1.0}
        with pytest.raises(TypeError):  # it is kept for the next step
            factors["head.weight"] = 2.0  # type: ignore[index]


# What is frozen -----------------------------------------------------------------------------------


@given(network=st.sampled_from(sorted(NETWORKS)), data=st.data())
def test_a_prefix_freezes_what_lies_below_it(network, data):
    config = NETWORKS[network]
    keys = [key.split(".") for key in param_shapes(config)]
    cuts = st.sampled_from(keys).flatmap(
        lambda key: st.integers(1, len(key)).map(lambda n: ".".join(key[:n]))
    )
    frozen = data.draw(st.lists(cuts, max_size=4))
    below = {
        ".".join(key) for key in keys for p in frozen if key[: p.count(".") + 1] == p.split(".")
    }
    if len(below) == len(keys):
        with pytest.raises(TrainingError, match="nothing would be trained"):
            learning_rate_factors(config, 0.9, frozen)
        return
    factors = learning_rate_factors(config, 0.9, frozen)
    assert {key for key, factor in factors.items() if factor == 0} == below
    free = learning_rate_factors(config, 0.9)
    assert all(factors[key] == free[key] for key in free.keys() - below)


@given(network=st.sampled_from(sorted(NETWORKS)), text=st.text("block.s1head", min_size=1))
def test_what_is_no_prefix_is_refused(network, text):
    """A part of a name is none, nor is a name with a dot too many."""
    keys = param_shapes(NETWORKS[network])
    starts = {".".join(k.split(".")[:n]) for k in keys for n in range(1, k.count(".") + 2)}
    refused = contextlib.nullcontext()
    if text not in starts:
        refused = pytest.raises(TrainingError, match=re.escape(f"frozen has {text!r}; no key"))
    with refused:
        learning_rate_factors(NETWORKS[network], frozen=(text,))


def test_block_1_is_not_block_10():
    frozen = {k for k, f in learning_rate_factors(VIT, frozen=("blocks.1",)).items() if f == 0}
    assert {key.split(".")[1] for key in frozen} == {"1"}
    deep = dataclasses.replace(CONFIG, depths=(1, 11, 1, 1))
    frozen = {k for k, f in learning_rate_factors(deep, frozen=("block2.1",)).items() if f == 0}
    assert {key.split(".")[1] for key in frozen} == {"1"}


# The optimiser ------------------------------------------------------------------------------------


@given(
    seed=seeds,
    layer_decay=st.floats(0.05, 1),
    decay=st.floats(0, 0.5),
    frozen=st.lists(st.sampled_from(["block1", "norm", "pos_embed2", "head.bias"])),
)
def test_adamw_with_factors_is_pytorchs_with_groups(seed, layer_decay, decay, frozen):
    params = random_params(CONFIG, seed)
    factors = learning_rate_factors(CONFIG, layer_decay, frozen)
    theirs = {key: torch.tensor(np.array(x)) for key, x in to_state_dict(params).items()}
    plain = {k for k, x in theirs.items() if x.ndim == 1 or k == "cls_token" or "pos_embed" in k}
    groups = [
        {"params": [x], "weight_decay": 0.0 if key in plain else decay, "factor": factors[key]}
        for key, x in theirs.items()
    ]
    optimizer = torch.optim.AdamW(groups)
    state, settings = adamw_init(params), AdamW(weight_decay=decay)
    for number in range(4):
        lr = 0.02 / (1 + number)
        grads = random_params(CONFIG, seed + number + 1)
        for key, g in to_state_dict(grads).items():
            theirs[key].grad = torch.tensor(np.array(g)) if factors[key] else None
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        optimizer.step()
        params, state = adamw_step(params, grads, state, lr, settings, factors)
    for key, x in to_state_dict(params).items():
        assert relative(x, theirs[key].numpy()) < 1e-12, key


def test_without_factors_all_are_one():
    params, grads = random_params(CONFIG, 1, np.float32), random_params(CONFIG, 2, np.float32)
    state, settings = adamw_init(params), AdamW()
    expected = bits(adamw_step(params, grads, state, 0.1, settings)[0])
    for factors in ({}, learning_rate_factors(CONFIG), {"head.bias": 1}):
        assert bits(adamw_step(params, grads, state, 0.1, settings, factors)[0]) == expected
    twice = bits(adamw_step(params, grads, state, 0.1, settings, {"head.bias": 2})[0])
    assert [key for key in twice if twice[key] != expected[key]] == ["head.bias"]


def test_a_frozen_weight_keeps_its_bits_whatever_its_gradient():
    """Minus zero too, which a step of 0 would turn into zero; and means of steps before stay."""
    params = map_named(
        lambda k, x: -0.0 * np.abs(x) if k == "norm.bias" else x, random_params(CONFIG, 1)
    )
    grads = map_named(
        lambda k, x: x * math.nan if k == "norm.bias" else x, random_params(CONFIG, 2)
    )
    _, state = adamw_step(params, random_params(CONFIG, 3), adamw_init(params), 0.1, AdamW())
    after, moments = adamw_step(params, grads, state, 0.1, AdamW(), {"norm.bias": 0})
    assert after.norm.bias.tobytes() == params.norm.bias.tobytes()
    assert np.signbit(after.norm.bias).all()
    assert state.m.norm.bias.any()
    assert moments.m.norm.bias.tobytes() == state.m.norm.bias.tobytes()
    assert moments.v.norm.bias.tobytes() == state.v.norm.bias.tobytes()
    assert all(np.isfinite(x).all() for _, x in named_arrays(after))


def test_factors_run_on_every_library(library):
    here, there = random_params(CONFIG, 1, np.float32), random_params(CONFIG, 2, np.float32)
    factors = learning_rate_factors(CONFIG, 0.5, ("block1", "norm"))

    def moved(params, grads):
        grads = without_frozen(grads, factors)
        after, _ = adamw_step(params, grads, adamw_init(params), 0.1, AdamW(), factors)
        return global_norm(grads), after

    norm, after = moved(*(map_named(lambda _, x: library.asarray(x), t) for t in (here, there)))
    expected_norm, expected = moved(here, there)
    assert norm == pytest.approx(expected_norm, rel=1e-6)
    for (key, x), (_, y) in zip(named_arrays(after), named_arrays(expected), strict=True):
        x = x.get() if hasattr(x, "get") else np.asarray(x)
        assert relative(x, y) < 1e-5, key


@pytest.mark.parametrize(
    ("factors", "kind", "message"),
    [
        ({"head": 1.0}, ShapeError, "factors has 'head', which is no key of params"),
        ({"head.bias": -1.0}, RangeError, "factors['head.bias'] is -1.0; it must be a number at"),
        ({"head.bias": "1"}, RangeError, "factors['head.bias'] is '1'"),
        ([1.0], ArrayTypeError, "factors is a list; it must be a Mapping, of numbers by key, or"),
    ],
)
def test_wrong_factors_are_refused(factors, kind, message):
    params = random_params(CONFIG, 1)
    with pytest.raises(kind, match=re.escape(message)):
        adamw_step(params, params, adamw_init(params), 0.1, AdamW(), factors)


# Steps of a training ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_weights_stay_and_all_others_move(name):
    config, data = NETWORKS[name], samples_of(NETWORKS[name])
    recipe = dataclasses.replace(RECIPE, frozen=FROZEN[name], layer_decay=0.8)
    params = random_params(config, 5, np.float32)
    params = map_named(lambda k, x: -0.0 * np.abs(x) if k.endswith("bias") else x, params)
    state = start_training(params, len(data), seed=0)
    for _ in range(5):
        state, _ = train_step(state, data, config, recipe)
    before, after = bits(params), bits(state.params)
    still = {key for key in before if before[key] == after[key]}
    factors = learning_rate_factors(config, 0.8, FROZEN[name])
    assert still == {key for key, factor in factors.items() if factor == 0}
    trees = (state.params, state.average, state.optimizer.m, state.optimizer.v)
    for (key, w), (_, a), (_, m), (_, v) in zip(*map(named_arrays, trees), strict=True):
        np.testing.assert_array_equal(a, w) if key in still else None
        assert m.any() == v.any() == (key not in still), key


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_step_of_a_layer_is_its_factor_times_as_long(name):
    """Which the first of AdamW is, whatever the gradients: their norm is not changed."""
    config, data = NETWORKS[name], samples_of(NETWORKS[name])
    whole = dataclasses.replace(RECIPE, weight_decay=0.0)
    slow = dataclasses.replace(whole, layer_decay=0.5)
    state = start_training(random_params(config, 5), len(data), seed=0)
    (one, report), (other, same) = (train_step(state, data, config, r) for r in (whole, slow))
    assert report == same
    factors = learning_rate_factors(config, 0.5)
    trees = (state.params, one.params, other.params)
    for (key, w), (_, x), (_, y) in zip(*map(named_arrays, trees), strict=True):
        np.testing.assert_allclose(y - w, factors[key] * (x - w), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_gradients_of_frozen_weights_count_nowhere(bad, monkeypatch):
    recipe = dataclasses.replace(RECIPE, frozen=("block2", "pos_embed1"), clip_norm=0.1)
    state = start_training(random_params(CONFIG, 5, np.float32), len(DATA), seed=0)
    expected, report = train_step(state, DATA, CONFIG, recipe)
    free = dataclasses.replace(recipe, frozen=())
    assert 0.1 < report.grad_norm < train_step(state, DATA, CONFIG, free)[1].grad_norm
    inner = step.backward

    def spoilt(*arguments):
        grads, dimages = inner(*arguments)
        frozen = ("block2.", "pos_embed1")
        return map_named(lambda k, g: g * 0 + bad if k.startswith(frozen) else g, grads), dimages

    monkeypatch.setattr(
        step, "backward", lambda *arguments: pvt_ref.arrays.quietly(spoilt, *arguments)
    )
    again, same = train_step(state, DATA, CONFIG, recipe)
    assert fingerprint(again) == fingerprint(expected)
    assert same == report
    with pytest.raises(TrainingError, match="the norm of the gradients is"):
        train_step(state, DATA, CONFIG, dataclasses.replace(free, clip_norm=None))


def test_resumed_is_bit_for_bit_the_same(tmp_path):
    recipe = dataclasses.replace(RECIPE, layer_decay=0.65, frozen=("patch_embed1", "block1"))
    first = random_params(CONFIG, 6, np.float32)
    first = map_named(lambda k, x: -0.0 * np.abs(x) if k.endswith("bias") else x, first)
    whole = fit(CONFIG, recipe, DATA, HELD_OUT, tmp_path / "whole", first=first)
    assert whole.finished
    for stop in (1, 6):
        folder = tmp_path / str(stop)
        fit(CONFIG, recipe, DATA, HELD_OUT, folder, first=first, stop_at_step=stop)
        listed = dataclasses.replace(recipe, frozen=["patch_embed1", "block1"])
        done = fit(CONFIG, listed, DATA, HELD_OUT, folder, resume=True)
        assert fingerprint(done.state) == fingerprint(whole.state)
    best = to_state_dict(pvt_ref.load(tmp_path / "whole" / "best.safetensors").params)
    given = to_state_dict(first)
    same = {key for key, x in best.items() if np.array_equal(x, given[key])}
    assert same == {key for key in given if key.startswith(("patch_embed1.", "block1."))}
    other = dataclasses.replace(recipe, layer_decay=0.7, frozen=("block1",))
    message = r"(?s)recipe\.frozen is .*recipe\.layer_decay is 0\.65 there and 0\.7 here"
    with pytest.raises(TrainingError, match=message):
        fit(CONFIG, other, DATA, HELD_OUT, folder, resume=True)


def test_a_head_is_learnt_on_frozen_layers():
    """What the option is for: the loss falls though nothing but the head moves."""
    parts = ("patch_embed", "pos_embed", "block")
    frozen = (*(f"{part}{i}" for part in parts for i in range(1, 5)), "cls_token", "norm")
    config = dataclasses.replace(CONFIG, drop_path_rate=0.0)
    recipe = dataclasses.replace(without_chance(RECIPE), epochs=15, lr=0.1, frozen=frozen)
    state = start_training(random_params(config, 7, np.float32), len(DATA), seed=0)
    losses = []
    for _ in range(60):
        state, report = train_step(state, DATA, config, recipe)
        losses.append(report.loss)
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


# Recipes ------------------------------------------------------------------------------------------


def test_a_recipe_goes_through_json():
    recipe = dataclasses.replace(RECIPE, layer_decay=0.75, frozen=("block1", "head.bias"))
    again = Recipe(**json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.frozen == ("block1", "head.bias")
    assert dataclasses.replace(recipe, frozen=["block1", "head.bias"]) == recipe


@pytest.mark.parametrize("frozen", ["head", ("",), (1,), None, {"head"}, b"head", ("head", None)])
def test_frozen_is_a_tuple_of_texts(frozen):
    for make in (
        lambda: dataclasses.replace(RECIPE, frozen=frozen),
        lambda: learning_rate_factors(CONFIG, 1.0, frozen),
    ):
        with pytest.raises(RangeError, match=r"frozen is .*; it must be a tuple of beginnings"):
            make()


@pytest.mark.parametrize("layer_decay", [0, -0.5, 1.01, math.nan, "1", None, True])
def test_layer_decay_is_a_share(layer_decay):
    for make in (
        lambda: dataclasses.replace(RECIPE, layer_decay=layer_decay),
        lambda: learning_rate_factors(CONFIG, layer_decay),
    ):
        with pytest.raises(RangeError, match=r"layer_decay is .*above 0 and at most 1"):
            make()


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (("block5",), "frozen has 'block5'; no key .* Did you mean 'block4' or"),
        (("head", "block1.0.mlp.fc3"), r"'block1.0.mlp.fc3'; .* 'block1.0.mlp.fc2'"),
        (("block",), r"frozen has 'block'; .* Did you mean 'block4'"),
        (("head.",), r"frozen has 'head.'; .* Did you mean 'head'"),
        (("zzz",), "Keys begin with pos_embed1, pos_embed2,.* norm, head$"),
        (tuple(to_state_dict(random_params(CONFIG, 0))), "nothing would be trained. Leave some"),
    ],
)
def test_what_the_model_does_not_have_is_refused_at_the_start(frozen, message, tmp_path):
    recipe = dataclasses.replace(RECIPE, frozen=frozen)
    state = start_training(random_params(CONFIG, 5, np.float32), len(DATA), seed=0)
    with pytest.raises(TrainingError, match=message):
        train_step(state, DATA, CONFIG, recipe)
    with pytest.raises(TrainingError, match=message):
        fit(CONFIG, recipe, DATA, HELD_OUT, tmp_path / "run")
    assert not (tmp_path / "run").exists()
