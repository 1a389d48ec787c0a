"""The whole model against Hugging Face's PVT and ViT (see oracles.py): values, all gradients."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from closeness import (
    FORWARD,
    GRADIENT,
    assert_errs_at_most_twice,
    assert_float32_error,
    assert_gradients_near,
    assert_near,
    split_key_bias,
    squared_errors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import transformers_backward, transformers_forward, transformers_vit_forward
from strategies import (
    MUST_BE_DRAWN,
    ModelCase,
    assert_all_drawn,
    model_cases,
    normal,
    random_params,
    rng_of,
    v2_cases,
    vit_cases,
)

import pvt_ref
from pvt_ref.models.pvt.config import VARIANTS
from pvt_ref.tree import named_arrays

TINY = VARIANTS["pvt_tiny"]
UNUSED_BY_A_PYRAMID = {"cls_token", "norm.weight", "norm.bias", "head.weight", "head.bias"}


def run_both(
    case: ModelCase, dtype: Any = np.float64, pyramid: bool = False, masks: int | None = None
):
    """Outputs and gradients, ours and theirs, for one case; masks is a seed for dropout."""
    config, params, images = case.config, case.params(dtype), case.images(dtype)
    rngs = [None if masks is None else rng_of(masks) for _ in range(2)]
    if pyramid:
        outputs, cache = pvt_ref.forward_pyramid_with_cache(params, images, config, rngs[0])
    else:
        logits, cache = pvt_ref.forward_with_cache(params, images, config, rngs[0])
        outputs = [logits]
    dys = [normal(case.seed + i, *y.shape, dtype=dtype) for i, y in enumerate(outputs)]
    if pyramid:
        grads, dimages = pvt_ref.backward_pyramid(params, cache, dys, config)
    else:
        grads, dimages = pvt_ref.backward(params, cache, dys[0], config)
    theirs, leaves, x = transformers_forward(params, images, config, rngs[1], pyramid)
    their_grads, their_dimages = transformers_backward(theirs, dys, leaves, x, config)
    if masks is not None:
        assert rngs[0].random() == rngs[1].random(), "not the same number of masks was drawn"
    return (
        outputs,
        [t.detach().numpy() for t in theirs],
        (grads, dimages),
        (
            their_grads,
            their_dimages,
        ),
    )


def assert_equal_in_float64(case: ModelCase, pyramid: bool = False, masks: int | None = None):
    ours, theirs, (grads, dimages), (their_grads, their_dimages) = run_both(
        case, np.float64, pyramid, masks
    )
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_near(a, b, FORWARD, f"output {i}")
    if masks is None or np.any(their_dimages):  # masks can cut the images off altogether
        assert_near(dimages, their_dimages, GRADIENT, "images")
    else:
        assert not np.any(dimages)
    unused = UNUSED_BY_A_PYRAMID if pyramid else ()
    assert_gradients_near(
        dict(named_arrays(grads)),
        dict(named_arrays(their_grads)),
        unused=unused,
        # masks, or a ReLU, may cut a part of a small model off
        may_vanish=masks is not None or getattr(case.config, "linear", False),
    )


@pytest.mark.parametrize("pyramid", [False, True], ids=["logits", "pyramid"])
@pytest.mark.parametrize("size", [(64, 64), (96, 160)], ids=str)
def test_tiny_equals_transformers_in_float64(size, pyramid):
    assert_equal_in_float64(ModelCase(TINY, 1, size, 11), pyramid)


def not_so_deep(config):
    """Up to eleven blocks a stage: more are more of the same, and pvt_huge_v2 has 300M weights."""
    return replace(config, depths=tuple(min(depth, 11) for depth in config.depths))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variants_forward_equals_transformers(variant):
    config = not_so_deep(VARIANTS[variant])
    params = random_params(config, 3, np.float32)
    images = normal(3, 1, 3, 64, 96, dtype=np.float32)
    (theirs,), _, _ = transformers_forward(params, images, config)
    ours = pvt_ref.forward(params, images, config)
    assert ours.dtype == np.float32
    assert_near(ours, theirs.detach().numpy(), 5e-5, variant)


@pytest.mark.parametrize("pyramid", [False, True], ids=["logits", "pyramid"])
def test_small_random_models_equal_transformers(pyramid):
    seen = Counter()

    @settings(max_examples=25)
    @given(model_cases(classifier=None if pyramid else True))
    def check(case):
        seen.update(case.tags())
        assert_equal_in_float64(case, pyramid)

    check()
    assert_all_drawn(seen, MUST_BE_DRAWN | {"backbone"} if pyramid else MUST_BE_DRAWN)


@pytest.mark.parametrize("pyramid", [False, True], ids=["logits", "pyramid"])
def test_dropout_and_drop_path_equal_transformers_with_the_same_masks(pyramid):
    seen = Counter()

    @settings(max_examples=15)
    @given(model_cases(dropout=True))
    def check(case):
        seen.update(case.tags())
        case = replace(case, batch=3)  # one sample alone may have every path dropped
        assert_equal_in_float64(case, pyramid, masks=case.seed)

    check()
    assert_all_drawn(seen, {"dropout"})


@pytest.mark.parametrize("pyramid", [False, True], ids=["logits", "pyramid"])
def test_small_random_models_of_version_2_equal_transformers(pyramid):
    seen = Counter()

    @settings(max_examples=25)
    @given(v2_cases(classifier=not pyramid))
    def check(case):
        seen.update(case.tags())
        assert_equal_in_float64(case, pyramid)

    check()
    kinds = MUST_BE_DRAWN - {"native size"} | {"linear", "not a multiple of 4"}
    assert_all_drawn(seen, kinds)


@pytest.mark.parametrize("pyramid", [False, True], ids=["logits", "pyramid"])
def test_version_2_drops_with_the_masks_of_transformers(pyramid):
    seen = Counter()

    @settings(max_examples=15)
    @given(v2_cases(dropout=True))
    def check(case):
        seen.update(case.tags())
        case = replace(case, batch=3)  # one sample alone may have every path dropped
        assert_equal_in_float64(case, pyramid, masks=case.seed)

    check()
    assert_all_drawn(seen, {"dropout", "linear"})


@pytest.mark.parametrize(
    "variant", [name for name in pvt_ref.VARIANTS if name.startswith("pvt_v2_b")]
)
def test_every_variant_of_version_2_equals_transformers(variant):
    config = not_so_deep(pvt_ref.VARIANTS[variant])
    params = random_params(config, 3, np.float32)
    images = normal(3, 1, 3, 64, 96, dtype=np.float32)
    (theirs,), _, _ = transformers_forward(params, images, config)
    assert_near(pvt_ref.forward(params, images, config), theirs.detach().numpy(), 5e-5, variant)


def test_qk_scale_replaces_the_root_of_d():
    base = ModelCase(replace(TINY, img_size=32), 2, (32, 64), 5)
    params, images = base.params(), base.images()
    doubled = replace(base.config, qk_scale=2 / 8)  # d is 64 at every stage
    state = pvt_ref.to_state_dict(params)
    by_weights = {k: 2 * x if ".attn.q." in k else x for k, x in state.items()}
    expected = pvt_ref.forward(
        pvt_ref.from_state_dict(by_weights, base.config), images, base.config
    )
    assert_near(pvt_ref.forward(params, images, doubled), expected, FORWARD)
    # zero is honoured: every query then sees the mean of all values
    flat = pvt_ref.attention_maps(params, images, replace(base.config, qk_scale=0.0))
    for weights in flat.values():
        np.testing.assert_allclose(weights, 1 / weights.shape[-1], rtol=1e-12)


@pytest.mark.parametrize("pyramid", [False, True], ids=["logits", "pyramid"])
def test_float32_errs_no_more_than_twice_as_much_as_pytorch(pyramid):
    case = ModelCase(TINY, 1, (224, 224), 21)
    exact, exact_grads, exact_dimages = exact_run(case, pyramid)
    ours, theirs, (grads, dimages), (their_grads, their_dimages) = run_both(
        case, np.float32, pyramid
    )
    for y in (*ours, dimages, *dict(named_arrays(grads)).values()):
        assert y.dtype == np.float32
    for triple in zip(ours, theirs, exact, strict=True):
        assert_float32_error([triple], what="output")
    assert_float32_error([(dimages, their_dimages, exact_dimages)], what="images")
    squares = []
    exact_by_key, theirs_by_key = dict(named_arrays(exact_grads)), dict(named_arrays(their_grads))
    for key, g in named_arrays(grads):
        if pyramid and key in UNUSED_BY_A_PYRAMID:
            continue
        parts = [split_key_bias(key, x)[1] for x in (g, theirs_by_key[key], exact_by_key[key])]
        if np.any(parts[2]):
            squares.append(squared_errors(*parts))
        assert_errs_at_most_twice(squares, what=key)  # one array alone scatters: all so far


def exact_run(case: ModelCase, pyramid: bool):
    """Float64 arithmetic on the numbers of float32, so that only the arithmetic differs."""
    config, state = case.config, pvt_ref.to_state_dict(case.params(np.float32))
    params = pvt_ref.from_state_dict({k: x.astype(np.float64) for k, x in state.items()}, config)
    images = case.images(np.float32).astype(np.float64)
    if pyramid:
        outputs, cache = pvt_ref.forward_pyramid_with_cache(params, images, config)
        dys = [normal(case.seed + i, *y.shape, dtype=np.float32) for i, y in enumerate(outputs)]
        grads, dimages = pvt_ref.backward_pyramid(params, cache, dys, config)
        return outputs, grads, dimages
    logits, cache = pvt_ref.forward_with_cache(params, images, config)
    dy = normal(case.seed, *logits.shape, dtype=np.float32)
    grads, dimages = pvt_ref.backward(params, cache, dy, config)
    return [logits], grads, dimages


# The columnar ViT ---------------------------------------------------------------------------------


def assert_vit_equals(case, blocks=None):
    config, params, images = case.config, case.params(), case.images()
    if blocks is None:
        logits, cache = pvt_ref.forward_with_cache(params, images, config)
        outputs = [logits]
    else:
        outputs, cache = pvt_ref.forward_pyramid_with_cache(params, images, config, blocks=blocks)
    dys = [normal(case.seed + i, *y.shape) for i, y in enumerate(outputs)]
    if blocks is None:
        grads, dimages = pvt_ref.backward(params, cache, dys[0], config)
    else:
        grads, dimages = pvt_ref.backward_pyramid(params, cache, dys, config)
    theirs, leaves, x = transformers_vit_forward(params, images, config, blocks)
    their_grads, their_dimages = transformers_backward(theirs, dys, leaves, x, config)
    for i, (a, b) in enumerate(zip(outputs, theirs, strict=True)):
        assert_near(a, b.detach().numpy(), FORWARD, f"output {i}")
    assert_near(dimages, their_dimages, GRADIENT, "images")
    mine, unused = dict(named_arrays(grads)), set()
    if blocks is not None:
        later = tuple(f"blocks.{k}." for k in range(blocks[-1] + 1, config.depth))
        unused = {key for key in mine if key.startswith(("norm.", "head.", *later))}
    assert_gradients_near(mine, dict(named_arrays(their_grads)), unused=unused)


MUST_BE_DRAWN_OF_A_VIT = {
    *("H != W", "heads > 1", "B > 1", "no qkv bias", "resized table", "native size"),
}


def test_small_random_vits_equal_transformers():
    seen = Counter()

    @settings(max_examples=25)
    @given(vit_cases())
    def check(case):
        seen.update(case.tags())
        assert_vit_equals(case)

    check()
    assert_all_drawn(seen, MUST_BE_DRAWN_OF_A_VIT)


def test_maps_of_small_random_vits_equal_transformers():
    seen = Counter()

    @settings(max_examples=25)
    @given(vit_cases(classifier=None, resizes=("bicubic", "bilinear")), st.data())
    def check(case, data):
        seen.update(case.tags())
        numbers = st.sets(st.integers(0, case.config.depth - 1), min_size=1)
        assert_vit_equals(case, sorted(data.draw(numbers)))

    check()
    assert_all_drawn(seen, MUST_BE_DRAWN_OF_A_VIT | {"no classifier"})


def test_deit_tiny_equals_transformers_in_float32():
    config = pvt_ref.VITS["deit_ti_16"]
    params = random_params(config, 3, np.float32)
    images = normal(3, 1, 3, 224, 224, dtype=np.float32)
    (theirs,), _, _ = transformers_vit_forward(params, images, config)
    ours = pvt_ref.forward(params, images, config)
    assert ours.dtype == np.float32
    assert_near(ours, theirs.detach().numpy(), 5e-5)
