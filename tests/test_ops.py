"""The record of operations: whatever is put into it is what the model uses, everywhere."""

import copy
import dataclasses
import pickle
from collections import Counter

import numpy as np
import pytest
from strategies import ModelCase, normal, random_params, rng_of

import pvt_ref
from pvt_ref import REFERENCE, VARIANTS, Ops
from pvt_ref.api import choose_ops, default_ops
from pvt_ref.errors import ArrayTypeError, ConfigError, RangeError
from pvt_ref.kernels.cpu.table import blocked_ops
from pvt_ref.ops import Operation

CONFIG = dataclasses.replace(
    VARIANTS["pvt_tiny"],
    img_size=32,
    embed_dims=(4, 8, 12, 16),
    num_heads=(1, 2, 3, 4),
    num_classes=5,
    drop_rate=0.1,
    attn_drop_rate=0.1,
    drop_path_rate=0.2,
)
CASE = ModelCase(CONFIG, 2, (32, 64), 1)
NAMES = [
    field.name for field in dataclasses.fields(Ops) if field.name not in ("name", "numpy_only")
]


def counting(calls: Counter, keeps: list | None = None) -> Ops:
    """The reference, with every call counted by operation and direction."""

    def spy(name: str, direction: str, function):
        def called(*args, **kwargs):
            calls[f"{name}.{direction}"] += 1
            if keeps is not None and direction == "forward" and "drop" not in name:
                # attention takes keep as its eighth argument, the others by name
                keeps.append((name, kwargs["keep"] if "keep" in kwargs else args[7:8]))
            return function(*args, **kwargs)

        return called

    operations = {
        name: Operation(
            spy(name, "forward", getattr(REFERENCE, name).forward),
            spy(name, "backward", getattr(REFERENCE, name).backward),
        )
        for name in NAMES
    }
    return Ops(name="counting", **operations)


FORWARD = {f"{name}.forward" for name in NAMES}
BACKWARD = {f"{name}.backward" for name in NAMES}


def test_the_classifier_uses_every_operation_of_the_record_it_is_given():
    params, images, calls = CASE.params(), CASE.images(), Counter()
    ops = counting(calls)
    logits = pvt_ref.forward(params, images, CONFIG, ops=ops)
    assert set(calls) == FORWARD
    np.testing.assert_array_equal(logits, pvt_ref.forward(params, images, CONFIG, ops=REFERENCE))
    calls.clear()
    logits, cache = pvt_ref.forward_with_cache(params, images, CONFIG, rng_of(1), ops=ops)
    assert set(calls) == FORWARD
    calls.clear()
    pvt_ref.backward(params, cache, logits, CONFIG)  # the cache knows its record
    assert set(calls) == BACKWARD
    calls.clear()
    pvt_ref.backward(params, cache, logits, CONFIG, ops=ops)
    assert set(calls) == BACKWARD


def test_the_pyramid_uses_every_operation_of_the_record_it_is_given():
    params, images, calls = CASE.params(), CASE.images(), Counter()
    ops = counting(calls)
    pvt_ref.forward_pyramid(params, images, CONFIG, ops=ops)
    assert set(calls) == FORWARD
    calls.clear()
    maps, cache = pvt_ref.forward_pyramid_with_cache(params, images, CONFIG, rng_of(1), ops=ops)
    assert set(calls) == FORWARD
    calls.clear()
    pvt_ref.backward_pyramid(params, cache, maps, CONFIG)
    assert set(calls) == BACKWARD


def test_a_model_uses_the_record_it_is_given():
    model, images, calls = pvt_ref.Model(CASE.params(), CONFIG), CASE.images(), Counter()
    ops = counting(calls)
    logits = model(images, ops=ops)
    assert set(calls) == FORWARD
    np.testing.assert_array_equal(logits, model(images, ops=REFERENCE))
    calls.clear()
    maps = model.pyramid(images, ops=ops)
    assert set(calls) == FORWARD
    for x, y in zip(maps, model.pyramid(images, ops=REFERENCE), strict=True):
        np.testing.assert_array_equal(x, y)


def test_attention_maps_use_the_record_they_are_given():
    calls = Counter()
    pvt_ref.attention_maps(CASE.params(), CASE.images(), CONFIG, ops=counting(calls))
    assert set(calls) == FORWARD


def test_a_replaced_gelu_reaches_the_mlp_inside_a_block():
    def relu_forward(x, keep=True):
        return np.maximum(x, 0), x if keep else None

    ops = dataclasses.replace(
        REFERENCE, name="relu", gelu=Operation(relu_forward, lambda x, dy: dy * (x > 0))
    )
    params, images = CASE.params(), CASE.images()
    logits, cache = pvt_ref.forward_with_cache(params, images, CONFIG, ops=ops)
    assert np.abs(logits - pvt_ref.forward(params, images, CONFIG)).max() > 1e-3
    _, dimages = pvt_ref.backward(params, cache, np.ones_like(logits), CONFIG)
    v = normal(3, *images.shape)
    up, down = (
        pvt_ref.forward(params, images + step * v, CONFIG, ops=ops) for step in (1e-6, -1e-6)
    )
    np.testing.assert_allclose((up - down).sum() / 2e-6, (dimages * v).sum(), rtol=1e-5)


@pytest.mark.parametrize("run", ["forward", "forward_pyramid", "attention_maps"])
def test_inference_asks_no_operation_for_a_cache(run):
    keeps: list = []
    ops = counting(Counter(), keeps)
    getattr(pvt_ref, run)(CASE.params(), CASE.images(), CONFIG, ops=ops)
    assert {name for name, _ in keeps} == {n for n in NAMES if "drop" not in n}
    wrong = [(name, keep) for name, keep in keeps if keep is not False and keep != (False,)]
    assert not wrong


def test_without_a_generator_nothing_is_dropped_and_with_one_something_is():
    params, images = CASE.params(), CASE.images()
    still = pvt_ref.forward(params, images, CONFIG)
    np.testing.assert_array_equal(pvt_ref.forward_with_cache(params, images, CONFIG)[0], still)
    dropped, _ = pvt_ref.forward_with_cache(params, images, CONFIG, rng_of(1))
    assert np.abs(dropped - still).max() > 1e-3
    maps = pvt_ref.forward_pyramid(params, images, CONFIG)
    kept, _ = pvt_ref.forward_pyramid_with_cache(params, images, CONFIG)
    changed, _ = pvt_ref.forward_pyramid_with_cache(params, images, CONFIG, rng_of(1))
    for a, b, c in zip(maps, kept, changed, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() > 1e-3


def test_every_kind_of_drop_happens_where_its_own_rate_says():
    # one rate at a time: how many masks are drawn, and of what shapes
    params, images, B = random_params(CONFIG, 2), CASE.images(), 2
    blocks = sum(CONFIG.depths)

    class Recorder(np.random.Generator):
        def __init__(self):
            super().__init__(np.random.PCG64(0))
            self.shapes = []

        def random(self, size=None, dtype=np.float64, out=None):
            self.shapes.append(tuple(size))
            return super().random(size, dtype)

    def shapes_drawn(**rates):
        off = {"drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.0}
        recorder = Recorder()
        config = dataclasses.replace(CONFIG, **(off | rates))
        pvt_ref.forward_with_cache(params, images, config, recorder)
        return recorder.shapes

    assert shapes_drawn() == []
    # the first block's rate is 0, so it draws nothing
    assert shapes_drawn(drop_path_rate=0.5) == [(B, 1, 1)] * (2 * (blocks - 1))
    n = [128, 32, 8, 3]  # tokens of a 32x64 image, with cls in stage 4
    m = [2, 2, 2, 3]
    attention = [(B, CONFIG.num_heads[i], n[i], m[i]) for i in range(4) for _ in range(2)]
    assert shapes_drawn(attn_drop_rate=0.5) == attention
    dropout = []
    for i, C in enumerate(CONFIG.embed_dims):
        hidden = int(C * CONFIG.mlp_ratios[i])
        dropout += [(B, n[i], C)]  # after the position embedding
        dropout += [(B, n[i], C), (B, n[i], hidden), (B, n[i], C)] * 2  # W^O, GELU, fc2
    assert shapes_drawn(drop_rate=0.5) == dropout


def test_the_default_record_is_that_of_the_environment(monkeypatch):
    images = CASE.images()
    for value, ops in (("", blocked_ops()), ("blocked", blocked_ops()), ("reference", REFERENCE)):
        monkeypatch.setenv("PVT_REF_OPS", value)
        for dtype in (np.float32, np.float64):
            assert default_ops(images.astype(dtype)) == ops
        _, cache = pvt_ref.forward_with_cache(CASE.params(), images, CONFIG)
        assert cache.ops == ops
    monkeypatch.delenv("PVT_REF_OPS")
    assert default_ops(images) == blocked_ops()
    monkeypatch.setenv("PVT_REF_OPS", "fast")
    with pytest.raises(RangeError, match="PVT_REF_OPS is 'fast'; known are 'reference'"):
        pvt_ref.forward(CASE.params(), images, CONFIG)


def test_arrays_of_other_libraries_get_the_reference():
    strict = pytest.importorskip("array_api_strict")
    images = strict.asarray(CASE.images())
    assert default_ops(images) is REFERENCE
    with pytest.raises(ArrayTypeError, match="'blocked', which computes on NumPy arrays only"):
        choose_ops(blocked_ops(), images)


def test_records_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        REFERENCE.gelu = None


def test_equal_settings_make_equal_records():
    assert blocked_ops(2, elements=64) == blocked_ops(2, elements=64)
    assert blocked_ops(2) != blocked_ops(3)
    assert blocked_ops(2) != REFERENCE
    assert pickle.loads(pickle.dumps(blocked_ops(2))) == blocked_ops(2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"threads": True}, "threads is True"),
        ({"elements": 0}, "elements is 0"),
        ({"elements": None}, "elements is None"),
    ],
)
def test_settings_of_the_kernels_are_checked(settings, words):
    with pytest.raises(RangeError, match=f"{words}; it must be a whole number, at least 1"):
        blocked_ops(**settings)


def test_no_stages_give_no_attention_maps():
    assert pvt_ref.attention_maps(CASE.params(), CASE.images(), CONFIG, stages=[]) == {}


# What a kernel computes itself ----------------------------------------------------------------


def ours(x, keep=True):
    return np.maximum(x, 0), x if keep else None


RELU = Operation(ours, lambda x, dy: dy * (x > 0))


@pytest.mark.parametrize(
    ("name", "absorbing"),
    [
        ("linear", ["patch_embed", "mlp", "block"]),
        ("layer_norm", ["patch_embed", "block"]),
        ("gelu", ["mlp", "block"]),
        ("softmax", ["attention", "block"]),
        ("dropout", ["attention", "mlp", "block"]),
        ("drop_path", ["block"]),
        ("patch_embed", ["block"]),
        ("attention", ["block"]),
        ("sra", ["block"]),
        ("mlp", ["block"]),
        ("position", []),
        ("block", []),
    ],
)
def test_replacing_what_a_kernel_computes_itself_is_refused(name, absorbing):
    ops = blocked_ops(2)
    other = dataclasses.replace(getattr(ops, name), forward=lambda *args, **kwargs: None)
    readable = {each: getattr(REFERENCE, each) for each in absorbing}
    if absorbing:
        with pytest.raises(ConfigError, match=f"another {name} would have no effect") as error:
            dataclasses.replace(ops, **{name: other})
        for each in absorbing:
            assert f"{each}=REFERENCE.{each}" in str(error.value)
        assert f"dataclasses.replace(REFERENCE, {name}=...)" in str(error.value)
        if len(absorbing) > 1:  # one of them replaced is not enough
            with pytest.raises(ConfigError, match=f"another {name} would have no effect"):
                dataclasses.replace(ops, **{name: other, "block": REFERENCE.block})
    # with what the message names replaced too, it is asked for
    replaced = dataclasses.replace(ops, **{name: other} | readable)
    assert getattr(replaced, name) == other


def test_what_the_message_advises_takes_effect():
    params, images = CASE.params(), CASE.images()
    expected = pvt_ref.forward(
        params, images, CONFIG, ops=dataclasses.replace(REFERENCE, gelu=RELU)
    )
    ops = dataclasses.replace(blocked_ops(2), gelu=RELU, mlp=REFERENCE.mlp, block=REFERENCE.block)
    np.testing.assert_allclose(pvt_ref.forward(params, images, CONFIG, ops=ops), expected)


def test_every_operation_of_the_kernels_is_asked_for_or_absorbed():
    # a counted twin of each, alone: if replacing it is allowed, the model calls it
    params, images = CASE.params(), CASE.images()
    ops, config = blocked_ops(2), dataclasses.replace(CONFIG, drop_rate=0.0, attn_drop_rate=0.0)
    allowed = set()
    for name in NAMES:
        calls = Counter()
        operation = getattr(ops, name)

        def spy(*args, calls=calls, operation=operation, **kwargs):
            calls["forward"] += 1
            return operation.forward(*args, **kwargs)

        try:
            spied = dataclasses.replace(ops, **{name: dataclasses.replace(operation, forward=spy)})
        except ConfigError:
            continue
        allowed.add(name)
        pvt_ref.forward_with_cache(params, images, config, rng_of(1), ops=spied)
        assert calls["forward"] > 0, name
    assert allowed == {"position", "block"}


def test_records_of_something_else_are_refused():
    for wrong in (np.tanh, None, "gelu", (ours, ours)):
        with pytest.raises(ArrayTypeError, match=r"gelu is a .*; it must be an Operation"):
            dataclasses.replace(REFERENCE, gelu=wrong)
    with pytest.raises(ArrayTypeError, match="name is a int; it must be a text"):
        dataclasses.replace(REFERENCE, name=3)
    with pytest.raises(ArrayTypeError, match="backward is a NoneType; an operation is made of two"):
        Operation(ours, None)
    with pytest.raises(ArrayTypeError, match="forward is a int"):
        Operation(1, ours)


def test_a_record_is_hashable_copied_and_pickled_with_what_it_absorbs():
    ops = blocked_ops(2)
    for same in (pickle.loads(pickle.dumps(ops)), copy.deepcopy(ops), blocked_ops(2)):
        assert same == ops
        assert hash(same) == hash(ops)
        with pytest.raises(ConfigError):
            dataclasses.replace(same, gelu=RELU)
    assert "absorbed" not in repr(ops)


@pytest.mark.parametrize(
    "absorbed",
    [5, None, ("gelu",), (("gelu", 5),), [("gelu", RELU)], "ab", (("linear", RELU, RELU),), ((),)],
)
def test_what_an_operation_absorbs_is_pairs_of_names_and_operations(absorbed):
    with pytest.raises(ArrayTypeError, match=r"absorbed is .*a tuple of pairs, each a name"):
        Operation(ours, ours, absorbed)


def test_an_operation_that_there_is_not_is_not_absorbed():
    block = dataclasses.replace(REFERENCE.block, absorbed=(("nope\n", RELU),))
    with pytest.raises(ConfigError, match=r"block is said to absorb 'nope\\n'; known are linear,"):
        dataclasses.replace(REFERENCE, block=block)


@pytest.mark.parametrize("wrong", ["no", None, 1])
def test_whether_a_record_is_numpys_only_is_yes_or_no(wrong):
    with pytest.raises(ArrayTypeError, match=r"numpy_only is a .*; it must be True or False"):
        dataclasses.replace(REFERENCE, numpy_only=wrong)


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_kernel_put_into_another_operation_absorbs_what_it_did(way):
    ops = blocked_ops(2)
    functions = {w: getattr(ops.block if w == way else RELU, w) for w in ("forward", "backward")}
    block = Operation(**functions)
    assert block.absorbed == ops.block.absorbed
    with pytest.raises(ConfigError, match="of block, which would go on"):
        dataclasses.replace(ops, block=block, gelu=RELU, mlp=REFERENCE.mlp)
    assert Operation(ops.block.forward, ops.block.backward) == ops.block
    # a function around the kernel says what it absorbs
    around = Operation(lambda *args, **kwargs: None, ours, ops.block.absorbed)
    with pytest.raises(ConfigError, match="of block, which would go on"):
        dataclasses.replace(ops, block=around, gelu=RELU, mlp=REFERENCE.mlp)


def test_a_record_shows_its_name_and_settings():
    assert repr(REFERENCE) == "Ops('reference')"
    shown = repr(blocked_ops(2))
    assert shown == "Ops('blocked', Blocking(threads=2, elements=262144))"
    mixed = dataclasses.replace(blocked_ops(2), name="m\x1b" * 99, position=blocked_ops(3).position)
    assert len(repr(mixed)) < 400
