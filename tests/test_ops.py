"""The table of operations: whatever is put into it is what the model uses, or it is refused."""

import copy
import dataclasses
import functools
import importlib
import multiprocessing
import pickle
import pkgutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
from loose import loose
from operations import READABLE as ALL
from strategies import ModelCase, normal, random_params, rng_of

import pvt_ref
import pvt_ref.blocks
import pvt_ref.heads
import pvt_ref.layers
from pvt_ref import REFERENCE, VARIANTS, Operation, Ops, blocked_ops
from pvt_ref.api import choose_ops, default_ops
from pvt_ref.errors import ArrayTypeError, ConfigError, RangeError
from pvt_ref.layers.gelu import gelu, gelu_forward
from pvt_ref.models.pvt import PVT
from pvt_ref.tree import map_arrays, named_arrays

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
TABLES = {"reference": REFERENCE, "blocked": blocked_ops(2)}

#: The operations of a PVT. Those of other networks no PVT asks for, and its tables refuse them.
READABLE = {name: op for name, op in ALL.items() if op in PVT.operations}

#: Asked for in a backward only.
IN_BACKWARD = {"sum_rows"}


def counted(op: Operation, calls: Counter, factor: float = 1.0) -> Operation:
    """The readable operation, counted; its result times a factor, which only tests can want."""

    def forward(*args, **kwargs):
        calls[f"{op.name}.forward"] += 1
        y, cache = op.forward(*args, **kwargs)
        if factor == 1.0:
            return y, cache
        return map_arrays(lambda x: x * x.dtype.type(factor), y), cache

    def backward(*args, **kwargs):
        calls[f"{op.name}.backward"] += 1
        return op.backward(*args, **kwargs)

    return Operation(forward, backward)


def counting(calls: Counter, table: Ops = REFERENCE) -> Ops:
    """A table with every operation counted."""
    for op in READABLE.values():
        table = table.replace(op, counted(op, calls))
    return table


FORWARD = {f"{name}.forward" for name in READABLE if name not in IN_BACKWARD}
BACKWARD = {f"{name}.backward" for name in READABLE if name not in IN_BACKWARD} | {
    "sum_rows.forward"  # what a backward asks for
}


def test_the_catalogue_holds_the_operations_of_layers_blocks_and_heads():
    found = set()
    for folder in (pvt_ref.layers, pvt_ref.blocks, pvt_ref.heads):
        for file in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."):
            values = vars(importlib.import_module(file.name)).values()
            found |= {value for value in values if isinstance(value, Operation)}
    assert found == set(ALL.values())
    assert {name: op.name for name, op in ALL.items()} == {name: name for name in ALL}


def test_the_operations_of_a_pvt_are_in_the_catalogue():
    assert set(READABLE.values()) == PVT.operations


@pytest.mark.parametrize("name", sorted(set(ALL) - set(READABLE)))
def test_what_no_pvt_asks_for_is_refused_by_name(name):
    op = ALL[name]
    assert op.is_readable()
    ops = REFERENCE.replace(op, counted(op, Counter()))
    with pytest.raises(ConfigError, match=f"ops replaces {name}, which a PVT never asks for"):
        pvt_ref.forward(CASE.params(), CASE.images(), CONFIG, ops=ops)


@pytest.mark.parametrize("table", TABLES)
def test_the_classifier_uses_every_operation_of_the_table_it_is_given(table):
    params, images, calls = CASE.params(), CASE.images(), Counter()
    ops = counting(calls, TABLES[table])
    logits = pvt_ref.forward(params, images, CONFIG, ops=ops)
    assert set(calls) == FORWARD
    np.testing.assert_array_equal(logits, pvt_ref.forward(params, images, CONFIG, ops=REFERENCE))
    calls.clear()
    logits, cache = pvt_ref.forward_with_cache(params, images, CONFIG, rng_of(1), ops=ops)
    assert set(calls) == FORWARD
    calls.clear()
    pvt_ref.backward(params, cache, logits, CONFIG)  # the cache knows its table
    assert set(calls) == BACKWARD
    calls.clear()
    pvt_ref.backward(params, cache, logits, CONFIG, ops=ops)
    assert set(calls) == BACKWARD


@pytest.mark.parametrize("table", TABLES)
def test_the_pyramid_uses_every_operation_of_the_table_it_is_given(table):
    params, images, calls = CASE.params(), CASE.images(), Counter()
    ops = counting(calls, TABLES[table])
    pvt_ref.forward_pyramid(params, images, CONFIG, ops=ops)
    assert set(calls) == FORWARD
    calls.clear()
    maps, cache = pvt_ref.forward_pyramid_with_cache(params, images, CONFIG, rng_of(1), ops=ops)
    assert set(calls) == FORWARD
    calls.clear()
    pvt_ref.backward_pyramid(params, cache, maps, CONFIG)
    assert set(calls) == BACKWARD


def test_a_model_uses_the_table_it_is_given():
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


def test_attention_maps_use_the_table_they_are_given():
    calls = Counter()
    pvt_ref.attention_maps(CASE.params(), CASE.images(), CONFIG, ops=counting(calls))
    assert set(calls) == FORWARD


# Never ignored --------------------------------------------------------------------------------


def classify(ops):
    logits, cache = pvt_ref.forward_with_cache(CASE.params(), CASE.images(), STILL, ops=ops)
    grads, dimages = pvt_ref.backward(CASE.params(), cache, logits, STILL)
    return [logits, dimages, *(x for _, x in named_arrays(grads))]


def infer(ops):
    return [pvt_ref.forward(CASE.params(), CASE.images(), STILL, ops=ops)]


def pyramid(ops):
    maps, cache = pvt_ref.forward_pyramid_with_cache(
        CASE.params(), CASE.images(), STILL, rng_of(1), ops=ops
    )
    grads, dimages = pvt_ref.backward_pyramid(CASE.params(), cache, maps, STILL)
    return [*maps, dimages, *(x for _, x in named_arrays(grads))]


def train(ops):
    logits, cache = pvt_ref.forward_with_cache(
        CASE.params(), CASE.images(), CONFIG, rng_of(1), ops=ops
    )
    loss, dlogits = pvt_ref.cross_entropy(logits, np.array([1, 2]))
    grads, _ = pvt_ref.backward(CASE.params(), cache, dlogits, CONFIG)
    return [np.asarray(loss), *(x for _, x in named_arrays(grads))]


#: No dropout, so that the kernels compute what they can.
STILL = dataclasses.replace(CONFIG, drop_rate=0.0, attn_drop_rate=0.0)
RUNS = {"classify": classify, "infer": infer, "pyramid": pyramid, "train": train}


@functools.cache
def undisturbed(run: str, table: str) -> list[np.ndarray]:
    return RUNS[run](TABLES[table])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize("table", TABLES)
def test_replacing_any_operation_takes_effect(table, name, run):
    if name in IN_BACKWARD and run == "infer":
        pytest.skip("this operation is asked for in a backward only")
    op, calls = READABLE[name], Counter()
    expected = undisturbed(run, table)
    # a counted one is asked for, and computes the same
    same = RUNS[run](TABLES[table].replace(op, counted(op, calls)))
    assert calls[f"{name}.forward"] > 0
    largest = max(np.abs(x).max() for x in expected)
    for x, y in zip(same, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10 * largest)
    # one that gives other numbers changes the result
    other = RUNS[run](TABLES[table].replace(op, counted(op, calls, factor=1.25)))
    assert max(np.abs(x - y).max() for x, y in zip(other, expected, strict=True)) > 1e-6 * largest


@pytest.mark.parametrize("name", [name for name in READABLE if name not in IN_BACKWARD])
def test_a_training_step_uses_what_the_environment_names(name, monkeypatch):
    # train_step names no table: the default one, here with an operation replaced, reaches it
    from pvt_ref import api
    from pvt_ref.train import LabelledImages, Recipe, start_training, train_step

    calls, op = Counter(), READABLE[name]
    pixels = rng_of(0).integers(0, 256, (4, 3, 32, 32)).astype(np.uint8)
    data = LabelledImages(pixels, np.arange(4), pvt_ref.Preprocessing())
    state = start_training(CASE.params(), len(data), 0)
    monkeypatch.setattr(
        api, "default_ops", lambda x: blocked_ops(2).replace(op, counted(op, calls))
    )
    train_step(state, data, CONFIG, Recipe(epochs=1, batch_size=4))
    assert calls[f"{name}.forward"] > 0
    assert calls[f"{name}.backward"] > 0


def relu_forward(p, x, ops=REFERENCE, keep=True):
    return np.maximum(x, 0), x if keep else None


def relu_backward(p, x, dy, ops=REFERENCE):
    return dy * (x > 0), None


RELU = Operation(relu_forward, relu_backward)


@pytest.mark.parametrize("table", TABLES)
def test_a_replaced_gelu_reaches_the_mlp_inside_a_block(table):
    ops = TABLES[table].replace(gelu, RELU)
    params, images = CASE.params(), CASE.images()
    logits, cache = pvt_ref.forward_with_cache(params, images, CONFIG, ops=ops)
    assert np.abs(logits - pvt_ref.forward(params, images, CONFIG)).max() > 1e-3
    _, dimages = pvt_ref.backward(params, cache, np.ones_like(logits), CONFIG)
    v = normal(3, *images.shape)
    up, down = (
        pvt_ref.forward(params, images + step * v, CONFIG, ops=ops) for step in (1e-6, -1e-6)
    )
    np.testing.assert_allclose((up - down).sum() / 2e-6, (dimages * v).sum(), rtol=1e-5)


def test_two_replacements_both_take_effect_in_either_order():
    sra, calls = READABLE["sra"], Counter()
    for first, second in ((gelu, sra), (sra, gelu)):
        calls.clear()
        ops = blocked_ops(2)
        for op in (first, second):
            ops = ops.replace(op, counted(op, calls))
        pvt_ref.forward(CASE.params(), CASE.images(), CONFIG, ops=ops)
        assert calls["gelu.forward"] == calls["sra.forward"] == sum(CONFIG.depths)
        assert ops.replaced == {gelu, sra}


def test_a_twin_that_absorbs_what_was_replaced_before_is_refused():
    mlp = READABLE["mlp"]
    twin = Operation(mlp.forward, mlp.backward, absorbs=(gelu,))
    with pytest.raises(ConfigError, match="this twin of mlp absorbs gelu, which the table replac"):
        blocked_ops(2).replace(gelu, RELU).replace(mlp, twin)
    # the other way round, the twin of the mlp steps aside
    calls = Counter()
    ops = blocked_ops(2).replace(mlp, twin).replace(gelu, counted(gelu, calls))
    pvt_ref.forward(CASE.params(), CASE.images(), CONFIG, ops=ops)
    assert calls["gelu.forward"] == sum(CONFIG.depths)


def test_a_table_made_by_hand_keeps_all_it_is_given_or_is_refused():
    calls = Counter()
    ops = Ops({gelu: counted(gelu, calls)}, name="mine")
    pvt_ref.forward(CASE.params(), CASE.images(), CONFIG, ops=ops)
    assert calls["gelu.forward"] == sum(CONFIG.depths)
    with pytest.raises(ConfigError, match=r"this twin of \w+ would have no effect: .*block"):
        Ops({**blocked_ops(2).twins, gelu: RELU})


def test_an_operation_that_no_model_asks_for_is_refused():
    with pytest.raises(ConfigError, match="is not an operation that a model uses"):
        REFERENCE.replace(Operation(lambda p, x, ops: (x, None), relu_backward), RELU)
    with pytest.raises(ConfigError, match="is not an operation that a model uses"):
        Ops({blocked_ops(2)[gelu]: RELU})  # a twin is no key
    names: dict[str, Any] = {"__name__": "no_module_of_this_name"}  # as in code that is run by exec
    exec("def mine(p, x, ops): return x, None", names)
    with pytest.raises(ConfigError, match="is not an operation that a model uses"):
        REFERENCE.replace(Operation(names["mine"], relu_backward), RELU)


# relu, this module's own, is readable: it is what this module has under that name
relu = RELU


def test_an_operation_that_this_network_never_asks_for_is_refused():
    ops = REFERENCE.replace(relu, RELU)
    with pytest.raises(ConfigError, match="ops replaces relu, which a PVT never asks for"):
        pvt_ref.forward(CASE.params(), CASE.images(), CONFIG, ops=ops)


# Caches, masks, the default -------------------------------------------------------------------


@pytest.mark.parametrize("run", ["forward", "forward_pyramid", "attention_maps"])
def test_inference_asks_no_operation_for_a_cache(run):
    keeps = []
    watched = REFERENCE.watched(lambda call: keeps.append((call.operation.name, call)))
    getattr(pvt_ref, run)(CASE.params(), CASE.images(), CONFIG, ops=watched)
    assert {name for name, _ in keeps} == set(READABLE) - IN_BACKWARD
    for name, call in keeps:
        # attention and sum_rows get keep by position, the others by name
        assert call.kwargs.get("keep", call.args[-1]) is False, name
        assert call.result[1] is None, name


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

        def random(self, size: Any = None, dtype=np.float64, out=None):
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


def test_the_default_table_is_that_of_the_environment(monkeypatch):
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
    with pytest.raises(RangeError, match="PVT_REF_OPS is 'fast'; use one of 'reference'"):
        pvt_ref.forward(CASE.params(), images, CONFIG)


def test_arrays_of_other_libraries_get_the_reference():
    strict = pytest.importorskip("array_api_strict")
    images = strict.asarray(CASE.images())
    assert default_ops(images) is REFERENCE
    with pytest.raises(ArrayTypeError, match="'blocked', which does not compute on array_api_str"):
        choose_ops(blocked_ops(), images)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"threads": True}, "threads is True"),
        ({"elements": 0}, "elements is 0"),
        ({"elements": 2.5}, "elements is 2.5"),
    ],
)
def test_settings_of_the_kernels_are_checked(settings, words):
    with pytest.raises(RangeError, match=f"{words}; it must be a whole number, at least 1"):
        blocked_ops(**settings)


def test_no_stages_give_no_attention_maps():
    assert pvt_ref.attention_maps(CASE.params(), CASE.images(), CONFIG, stages=[]) == {}


# Tables as values -----------------------------------------------------------------------------


def doubled_forward(p, x, ops=REFERENCE, keep=True):
    y, cache = gelu_forward(p, x, ops, keep)
    return y + y, cache


DOUBLED = Operation(doubled_forward, gelu.backward)
MANY = {
    "reference": REFERENCE,
    "blocked": blocked_ops(2),
    "replaced": blocked_ops(2).replace(gelu, DOUBLED),
    "by hand": Ops({gelu: DOUBLED}, name="mine"),
}


@pytest.mark.parametrize("name", MANY)
def test_tables_pickle_copy_and_compare_with_the_same_results(name):
    ops = MANY[name]
    expected = infer(ops)[0]
    for same in (pickle.loads(pickle.dumps(ops)), copy.deepcopy(ops), copy.copy(ops)):
        assert same == ops
        assert hash(same) == hash(ops)
        assert same.replaced == ops.replaced
        assert repr(same) == repr(ops)
        np.testing.assert_array_equal(infer(same)[0], expected)
    assert [other for other, table in MANY.items() if table == ops] == [name]


def test_tables_and_caches_cross_a_spawned_process_with_the_same_results():
    params, images = CASE.params(), CASE.images()
    work = []
    for ops in MANY.values():
        logits, cache = pvt_ref.forward_with_cache(params, images, STILL, ops=ops)
        # in one message, as a caller would send them: the cache refers to these params
        work.append((ops, pickle.dumps((params, cache, logits)), images))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        for (ops, data, _), (logits, dimages) in zip(work, pool.map(_there, work), strict=True):
            params_here, cache, dlogits = pickle.loads(data)
            np.testing.assert_array_equal(logits, pvt_ref.forward(params, images, STILL, ops=ops))
            expected = pvt_ref.backward(params_here, cache, dlogits, STILL, ops=ops)[1]
            np.testing.assert_array_equal(dimages, expected)


def _there(work):
    ops, data, images = work
    params, cache, dlogits = pickle.loads(data)
    dimages = pvt_ref.backward(params, cache, dlogits, STILL, ops=ops)[1]
    return pvt_ref.forward(params, images, STILL, ops=ops), dimages


def test_equal_settings_make_equal_tables():
    assert blocked_ops(2, elements=64) == blocked_ops(2, elements=64)
    assert blocked_ops(2) != blocked_ops(3)
    assert blocked_ops(2, elements=64) != blocked_ops(2, elements=65)
    assert blocked_ops(2) != REFERENCE
    assert "threads=2" in repr(blocked_ops(2))
    assert "another gelu" in repr(blocked_ops(2).replace(gelu, RELU))


def test_tables_do_not_change():
    with pytest.raises(AttributeError, match=r"frozen; ops\.replace makes a changed copy"):
        REFERENCE.name = "mine"  # type: ignore[misc]
    with pytest.raises(TypeError):
        blocked_ops(2).twins[gelu] = RELU  # type: ignore[index]


def test_tables_of_something_else_are_refused():
    wrong: Any
    for wrong in (np.tanh, None, "gelu", (relu_forward, relu_backward)):
        with pytest.raises(ArrayTypeError, match=r"twin is a .*; it must be an Operation"):
            REFERENCE.replace(gelu, wrong)
        with pytest.raises(ArrayTypeError, match=r"op is a .*; it must be an Operation"):
            REFERENCE.replace(wrong, RELU)
    with pytest.raises(ArrayTypeError, match="name is a int; it must be a str"):
        Ops(name=loose(3))
    with pytest.raises(ArrayTypeError, match="twins is a list; it must map"):
        Ops(loose([(gelu, RELU)]))
    with pytest.raises(ArrayTypeError, match="backward is a NoneType; an operation is made of two"):
        Operation(relu_forward, loose(None))
    with pytest.raises(ArrayTypeError, match="forward is a int"):
        Operation(loose(1), relu_backward)


@pytest.mark.parametrize("absorbs", [5, None, ("gelu",), [gelu], "ab", ((),), (gelu, 5)])
def test_what_an_operation_absorbs_is_a_tuple_of_operations(absorbs):
    with pytest.raises(ArrayTypeError, match=r"absorbs is .*a tuple of the readable operations"):
        Operation(relu_forward, relu_backward, absorbs)


# Watching ---------------------------------------------------------------------------------------


def test_a_watched_table_computes_the_same_and_tells_where():
    params, images = CASE.params(), CASE.images()
    seen, begun = [], []
    watched = REFERENCE.watched(
        lambda call: seen.append(call.path), before=lambda call: begun.append(call.path),
        params=params,
    )  # fmt: skip
    logits, cache = pvt_ref.forward_with_cache(params, images, CONFIG, ops=watched)
    np.testing.assert_array_equal(logits, pvt_ref.forward(params, images, CONFIG, ops=REFERENCE))
    assert sorted(seen) == sorted(begun)
    for path in ("patch_embed1.linear", "pos_embed4", "block1.0.attn.q", "block2.1.mlp.gelu",
                 "block3.0.attn.attention.softmax", "block4.1", "norm", "head"):  # fmt: skip
        assert path in seen
    assert begun.index("block1.0") < begun.index("block1.0.norm1")
    assert seen.index("block1.0") > seen.index("block1.0.mlp.fc2")
    seen.clear()
    pvt_ref.backward(params, cache, logits, CONFIG, ops=watched)
    assert seen.index("head") < seen.index("block4.1.mlp.fc2") < seen.index("patch_embed1")


def test_only_lets_the_twins_step_aside_that_would_hide_what_is_watched():
    params, images, seen = CASE.params(), CASE.images(), []
    watched = blocked_ops(2).watched(lambda call: seen.append(call.path), params=params)
    pvt_ref.forward(params, images, CONFIG, ops=watched)
    assert "block1.0" in seen
    assert "block1.0.mlp" not in seen  # the block's kernel asks for nothing
    seen.clear()
    watched = blocked_ops(2).watched(
        lambda call: seen.append(call.path), only=[READABLE["mlp"]], params=params
    )
    logits = pvt_ref.forward(params, images, CONFIG, ops=watched)
    assert seen == [f"block{i}.{b}.mlp" for i in (1, 2, 3, 4) for b in (0, 1)]
    np.testing.assert_allclose(logits, pvt_ref.forward(params, images, CONFIG), rtol=1e-9)


def test_an_error_inside_a_watched_call_leaves_the_table_usable():
    params, images, seen = CASE.params(), CASE.images(), []

    def stop(call):
        seen.append(call.path)
        if call.path == "block1.1.mlp.fc1" and len(seen) < 60:
            raise KeyError("here")

    watched = REFERENCE.watched(stop, params=params)
    with pytest.raises(KeyError, match="here"):
        pvt_ref.forward(params, images, CONFIG, ops=watched)
    pvt_ref.forward(params, images, CONFIG, ops=watched)
    assert seen[-1] == "head"


def test_a_table_is_not_iterated():
    # __getitem__ alone would make Python ask for items 0, 1, 2, ... for ever
    with pytest.raises(TypeError, match="not iterable"):
        iter(loose(REFERENCE))
