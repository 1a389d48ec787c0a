"""What watched runs tell, of any network; and the columnar ViT, the second network of the house."""

import dataclasses
import gc
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loose import loose
from strategies import configs, normal, random_params, rng_of

import pvt_ref
from pvt_ref import (
    REFERENCE,
    VARIANTS,
    VITS,
    PVTConfig,
    PVTv2Config,
    SegmentorConfig,
    ViTConfig,
    blocked_ops,
    count_cost,
)
from pvt_ref.arrays import array_module
from pvt_ref.blocks.transformer import blocks
from pvt_ref.errors import ArrayTypeError, ConfigError, RangeError
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.softmax import softmax
from pvt_ref.models import architecture
from pvt_ref.models.architecture import Architecture, Leaf, Place, architecture_of, known_variants
from pvt_ref.ops import Operation
from pvt_ref.report.cost import cache_bytes
from pvt_ref.report.diagnosis import first_non_finite
from pvt_ref.report.shapes import ShapeArray, Shapes
from pvt_ref.report.times import time_operations, time_stages
from pvt_ref.tree import map_arrays, map_named, named_arrays, record

VIT = ViTConfig(
    patch_size=4,
    embed_dim=12,
    depth=3,
    num_heads=3,
    mlp_ratio=2,
    img_size=16,
    num_classes=5,
)
PVT = dataclasses.replace(
    VARIANTS["pvt_tiny"],
    img_size=32,
    depths=(1, 2, 1, 2),
    embed_dims=(4, 8, 12, 16),
    num_heads=(1, 2, 3, 4),
    num_classes=5,
)
BARE = dataclasses.replace(PVT, num_classes=0)
each_config = pytest.mark.parametrize("config", [VIT, PVT, BARE], ids=["vit", "pvt", "bare"])
each_table = pytest.mark.parametrize(
    "ops", [REFERENCE, blocked_ops(1, elements=2**12)], ids=["reference", "blocked"]
)


# Arrays without numbers ---------------------------------------------------------------------------


def on_shapes(config, size, batch=2, dtype="float32"):
    xp = Shapes()
    row = architecture_of(config)
    params = row.build_params(config, lambda leaf: xp.empty(leaf.shape, dtype))
    return xp, row, params, xp.empty((batch, config.in_chans, *size), dtype)


def assert_same_shapes(found, expected):
    pairs = zip(named_arrays(found), named_arrays(expected), strict=True)
    for (key, x), (other, y) in pairs:
        assert (key, x.shape, str(x.dtype)) == (other, y.shape, str(y.dtype))


def agrees_with_a_real_run(config, size):
    xp, row, params, images = on_shapes(config, size, dtype="float64")
    real, pixels = random_params(config, 0), normal(0, 2, config.in_chans, *size)
    for forward, backward in (
        (row.forward, row.backward),
        (row.forward_pyramid, row.backward_pyramid),
    ):
        if forward is None or (forward is row.forward and not config.has_classifier):
            continue
        y, cache = forward(params, images, config, REFERENCE, None, True, None)
        real_y, real_cache = forward(real, pixels, config, REFERENCE, None, True, None)
        assert_same_shapes(tuple(y) if isinstance(y, list) else y, _as_tuple(real_y))
        assert_same_shapes(cache, real_cache)
        assert_same_shapes(
            backward(params, cache, y, REFERENCE), backward(real, real_cache, real_y, REFERENCE)
        )
    assert xp.alive > 0
    del params, images, y, cache
    gc.collect()
    assert xp.alive == 0  # every array was let go


def _as_tuple(y):
    return tuple(y) if isinstance(y, list) else y


@each_config
def test_a_run_on_shapes_is_a_run(config):
    g = config.size_multiple
    agrees_with_a_real_run(config, (g, 2 * g))
    agrees_with_a_real_run(config, (config.img_size, config.img_size))


@settings(max_examples=15)
@given(config=configs())
def test_a_run_on_shapes_is_a_run_for_any_pvt(config):
    agrees_with_a_real_run(config, (config.size_multiple, 2 * config.size_multiple))


@given(data=st.data())
def test_views_are_where_numpy_has_views(data):
    """Reshaping after any slicing, permuting and broadcasting copies where NumPy copies."""
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)))
    real, ours = np.zeros(shape), Shapes().empty(shape)
    for _ in range(data.draw(st.integers(0, 3))):
        axes = tuple(data.draw(st.permutations(range(real.ndim))))
        real, ours = np.permute_dims(real, axes), ours.memory.shapes.permute_dims(ours, axes)
        key = data.draw(
            st.sampled_from([(..., slice(0, 2)), (slice(None, None, 2),), (0,), (...,)])
        )
        if real.ndim > 1 or key != (0,):
            real, ours = real[key], ours[key]
        axis = data.draw(st.sampled_from([0, -1]))
        real, ours = (
            np.expand_dims(real, axis=axis),
            array_module(ours).expand_dims(ours, axis=axis),
        )
        if data.draw(st.booleans()):
            wide = tuple(3 if n == 1 else n for n in real.shape)
            real = np.broadcast_to(real, wide)
            ours = array_module(ours).broadcast_to(ours, wide)
    assert ours.shape == real.shape
    divisors = [n for n in range(1, real.size + 1) if real.size % n == 0]
    first = data.draw(st.sampled_from(divisors))
    second = data.draw(st.sampled_from([n for n in divisors if (real.size // first) % n == 0]))
    new = (first, second, -1)
    reshaped = array_module(ours).reshape(ours, new)
    assert reshaped.shape == np.reshape(real, new).shape
    a_view = np.shares_memory(np.reshape(real, new), real)
    assert (reshaped.memory is ours.memory) == a_view
    for copy in (False, True):
        if copy or a_view:
            again = array_module(ours).reshape(ours, new, copy=copy)
            assert (again.memory is ours.memory) != copy
        else:
            with pytest.raises(ValueError, match="without a copy"):
                array_module(ours).reshape(ours, new, copy=False)


def test_shapes_that_do_not_fit_are_refused():
    xp = Shapes()
    a, b = xp.empty((2, 3)), xp.empty((4, 5))
    for wrong in (
        lambda: a + b,
        lambda: a @ b,
        lambda: xp.reshape(a, (4, 2)),
        lambda: a.__iadd__(xp.empty((5, 2, 3))),
        lambda: a.__setitem__((0,), b),
        lambda: xp.broadcast_to(a, (2, 2)),
    ):
        with pytest.raises(ValueError, match=r"\("):
            wrong()
    with pytest.raises(IndexError):
        a[2, 0]


def test_types_and_bytes_of_arrays_without_numbers():
    xp = Shapes()
    x = xp.empty((2, 3), "float32")
    assert (x.ndim, x.size, x.nbytes, xp.alive) == (2, 6, 24, 24)
    mask = xp.asarray(np.zeros((2, 1), bool))
    assert (x * mask).dtype == np.float32
    assert (x + xp.empty((3,))).dtype == np.float64
    assert (2.0 / x).dtype == (np.float64(2) * x).dtype == np.float32
    assert xp.astype(x, "float32", copy=False) is x
    assert xp.sum(x, axis=(0, 1), dtype=xp.float64).nbytes == 8
    y = x[:, :2]
    del x, mask
    gc.collect()
    assert xp.alive == 24  # a view keeps all of its memory
    assert xp.peak > 24
    del y
    assert xp.alive == 0


# What the backward's cache holds ------------------------------------------------------------------


def held_by_a_cache(config, params, images, ops) -> int:
    """Bytes that Python has allocated after a forward, its result left out."""
    run = pvt_ref.forward_with_cache
    if not config.has_classifier:
        run = pvt_ref.forward_pyramid_with_cache
    run(params, images, config, ops=ops)  # what threads keep for the next call is made now
    gc.collect()
    tracemalloc.start()
    try:
        y, cache = run(params, images, config, ops=ops)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del cache
    return after - sum(x.nbytes for x in (y if isinstance(y, list) else [y]))


@each_table
@pytest.mark.parametrize(
    "config",
    [
        VIT,
        PVT,
        BARE,
        dataclasses.replace(PVT, qkv_bias=False, sr_ratios=(1, 1, 2, 1)),
        dataclasses.replace(BARE, sr_ratios=(2, 1, 2, 2), patch_sizes=(2, 1, 2, 1)),
    ],
)
def test_bytes_of_the_cache_are_what_python_keeps(config, ops):
    size = (2 * config.img_size, config.img_size)
    params = random_params(config, 0)
    kept = sum(cache_bytes(config, size, 1, "float64", ops=ops).values())
    batch = math.ceil(6_000_000 / kept)
    images = normal(0, batch, 3, *size)
    found = held_by_a_cache(config, params, images, ops)
    expected = sum(cache_bytes(config, size, batch, "float64", ops=ops).values())
    assert abs(found - expected) <= 0.005 * expected + 64 * 1024, (found, expected)


@each_config
def test_the_cache_by_operation_and_block(config):
    found = cache_bytes(config, batch=3, ops=REFERENCE)
    assert len(
        {place.block for place in found if place.stage == 1 and place.block is not None}
    ) == (config.depth if isinstance(config, ViTConfig) else config.depths[0])
    cost = count_cost(config, batch=3)
    for item in cost.items:
        kept = [n for p, n in found.items() if (p.stage, p.part) == (item.stage, item.operation)]
        assert item.cache_bytes == sum(kept)
        assert len(set(kept)) <= 1  # blocks of a stage are alike
    assert cost.cache_bytes == sum(found.values())
    stage = cost.of_stage(1)
    assert stage.cache_bytes == sum(n for place, n in found.items() if place.stage == 1)
    doubled = count_cost(config, batch=3, dtype="float64")
    assert doubled.cache_bytes == 2 * cost.cache_bytes


def test_the_cache_of_one_gelu_by_hand():
    (gelus,) = [
        i for i in count_cost(PVT, 64, 3).items if (i.stage, i.operation) == (2, "mlp.gelu")
    ]
    hidden = 3 * 8 * 8 * 64 * 4  # B n E C floats
    assert gelus.cache_bytes == 2 * 2 * hidden  # two blocks: x and Phi(x) each


@pytest.mark.parametrize(("ratio", "with_keys"), [(1, False), (2, True)])
def test_tokens_that_queries_and_keys_share_are_kept_once(ratio, with_keys):
    found = cache_bytes(dataclasses.replace(PVT, sr_ratios=(ratio, 1, 1, 1)), ops=REFERENCE)
    parts = {place.part for place in found if (place.stage, place.block) == (1, 0)}
    assert "attn.q" in parts
    assert ("attn.kv" in parts) == with_keys


def test_kernels_are_measured_once_a_shape():
    calls = []
    twin = blocked_ops()[linear]

    def counted(*args, **kwargs):
        calls.append(args[1].shape)
        return twin.forward(*args, **kwargs)

    ops = REFERENCE.replace(linear, Operation(counted, twin.backward))
    deep = dataclasses.replace(PVT, depths=(9, 2, 2, 2))
    found = cache_bytes(deep, ops=ops)
    assert len({place.block for place in found if place.stage == 1}) == 10  # None is patch_embed
    assert 0 < len(calls) < 4 * 8
    assert sum(found.values()) == sum(cache_bytes(deep, ops=REFERENCE).values())


def test_the_default_table_keeps_less_than_the_reference():
    name = "pvt_tiny"
    blocked = cache_bytes(VARIANTS[name], 64, ops=blocked_ops())
    assert {place.part for place in blocked if place.block is not None} == {"block"}
    assert sum(blocked.values()) < count_cost(VARIANTS[name], 64).cache_bytes


# A network of its own -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    img_size: int = 8
    in_chans: int = 3
    num_classes: int = 4
    drop_path_rate: float = 0.0
    has_classifier: bool = True
    size_multiple: int = 1
    channels: tuple[int, ...] = (6,)
    strides: tuple[int, ...] = (1,)

    def grids(self, height, width):
        return ((height, width),)


@record
class ToyParams:
    pixels: LinearParams
    gain: object
    head: LinearParams


def toy_params(config, make):
    def dense(key, C_out, C_in):
        return LinearParams(
            make(Leaf(f"{key}.weight", (C_out, C_in), "normal")),
            make(Leaf(f"{key}.bias", (C_out,), "zeros")),
        )

    return ToyParams(dense("pixels", 6, 3), make(Leaf("gain", (6,), "ones")), dense("head", 4, 6))


def toy_forward(params, images, config, ops, rng=None, keep=True, constants=None):
    xp = array_module(images)
    x = xp.permute_dims(images, (0, 2, 3, 1))
    x, pixels = ops[linear].forward(params.pixels, x, ops, keep=keep)
    x, bent = ops[gelu].forward(None, x, ops, keep=keep)
    y = xp.mean(x * params.gain, axis=(1, 2))
    logits, head = ops[linear].forward(params.head, y, ops, keep=keep)
    return logits, (pixels, bent, x, head) if keep else None


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(architecture, "_rows", dict(architecture._rows))
    row = Architecture(
        name="toy",
        title="toy",
        config_type=ToyConfig,
        params_type=ToyParams,
        build_params=toy_params,
        prepare=lambda params, config, size: None,
        forward=toy_forward,
        backward=lambda params, cache, dlogits, ops: (params, dlogits),
        operations=frozenset({linear, gelu}),
        place=lambda path: Place(int(path != "head"), None, path),
        describe=lambda config: "toy",
    )
    architecture.register(row)
    yield ToyConfig()
    architecture.param_shapes.cache_clear()


def test_any_network_is_counted(toy):
    cost = count_cost(toy, (4, 6), 5)
    lines = {(i.stage, i.operation): i for i in cost.items}
    assert {key: i.parameters for key, i in lines.items()} == {
        (1, "pixels"): 24,
        (1, "gelu"): 0,
        (0, "head"): 28,
        (0, "other"): 6,  # the gain, which no operation was given
    }
    assert lines[1, "pixels"].macs == 5 * 24 * 18
    assert cost.macs == 5 * (24 * 18 + 24)
    (stage,) = cost.stages
    assert (stage.grid, stage.channels, stage.tokens, stage.keys) == ((4, 6), 6, 24, 0)
    tokens = 5 * 24 * 6 * 4
    images = 5 * 24 * 3 * 4
    assert lines[1, "gelu"].peak_bytes == images + 3 * tokens
    assert lines[1, "gelu"].cache_bytes == 2 * tokens
    assert lines[1, "pixels"].cache_bytes == 0  # it keeps the images, which are the caller's
    assert len(time_stages(toy_weights(toy), normal(0, 2, 3, 4, 4), toy)) == 2
    params = map_named(lambda k, x: np.full_like(x, 1e308), toy_weights(toy))
    with np.errstate(all="ignore"):
        assert "pixels (linear)" in first_non_finite(params, normal(0, 2, 3, 4, 4), toy)


def toy_weights(config):
    return toy_params(config, lambda leaf: normal(1, *leaf.shape))


def test_the_fullest_moment_may_lie_between_two_items(toy):
    """Where the network itself makes the largest arrays, the item before them is billed."""

    def wasteful(params, images, config, ops, rng=None, keep=True, constants=None):
        logits, cache = toy_forward(params, images, config, ops, rng, keep, constants)
        xp = array_module(images)
        assert xp.zeros((1000, 1000), dtype=xp.float64).nbytes == 8_000_000
        return logits, cache

    row = architecture_of(toy)
    architecture.register(dataclasses.replace(row, forward=wasteful))
    cost = count_cost(toy)
    (head,) = [i for i in cost.items if i.operation == "head"]
    assert cost.peak_bytes == head.peak_bytes > 8_000_000


def test_tables_that_cannot_be_measured_are_refused(toy):
    with pytest.raises(ArrayTypeError, match="ops is a str"):
        cache_bytes(PVT, ops=loose("blocked"))
    with pytest.raises(ConfigError, match="never asks for"):
        cache_bytes(toy, ops=REFERENCE.replace(softmax, softmax))


def test_a_network_that_asks_for_no_operation_is_counted(toy):
    def plain(params, images, config, ops, rng=None, keep=True, constants=None):
        xp = array_module(images)
        x = xp.mean(images * 2.0, axis=(2, 3))
        return x @ xp.matrix_transpose(params.pixels.weight), None

    architecture.register(dataclasses.replace(architecture_of(toy), forward=plain))
    cost = count_cost(toy, batch=2)
    (item,) = cost.items
    images = 2 * 3 * 8 * 8 * 4
    assert (item.stage, item.operation, item.parameters, item.macs) == (0, "other", 58, 0)
    assert 2 * images < item.peak_bytes < 2.1 * images


# Times, diagnosis, attention maps of any network --------------------------------------------------


@each_config
@each_table
def test_times_of_stages_and_operations(config, ops):
    params, images = random_params(config, 0), normal(0, 2, 3, 32, 32)
    times = time_stages(params, images, config, 1, ops=ops)
    assert len(times) == len(config.channels) + 1
    assert all(t > 0 for t in times)
    by_operation = time_operations(params, images, config, 2, ops=ops)
    assert all(t >= 0 for t in by_operation.values())
    named = {key for key in by_operation if "drop" not in key[1]}
    if ops == REFERENCE:
        assert named == {(i.stage, i.operation) for i in count_cost(config).items}
    else:
        assert (1, "block") in named
        assert (1, "mlp.fc1") not in named
    with pytest.raises(RangeError, match="repeats is 0"):
        time_operations(params, images, config, 0)


def test_time_spent_in_an_operation_is_that_operation_s(monkeypatch):
    """By a clock that only GELU moves, one second a call."""
    now = [0.0]

    def slow(*args, **kwargs):
        now[0] += 1
        return gelu.forward(*args, **kwargs)

    monkeypatch.setattr("pvt_ref.report.times.time.perf_counter", lambda: now[0])
    params, images = random_params(PVT, 0), normal(0, 1, 3, 32, 32)
    ops = REFERENCE.replace(gelu, Operation(slow, gelu.backward))
    by_operation = time_operations(params, images, PVT, 1, ops=ops)
    for stage, depth in enumerate(PVT.depths, start=1):
        assert by_operation.pop((stage, "mlp.gelu")) == depth
    assert not any(by_operation.values())
    assert time_stages(params, images, PVT, 1, ops=ops) == [*PVT.depths, 0]


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        (["patch_embed.proj.weight"], "the linear inside patch_embed"),
        (["blocks.1.mlp.fc1.weight"], "blocks.1.mlp.fc1 (linear)"),
        (["head.weight"], "head (linear)"),
        (["cls_token", "pos_embed"], "pos_embed (position)"),
    ],
)
def test_the_first_layer_of_a_vit_that_overflows_is_named(keys, where):
    params = map_named(
        lambda k, x: np.full_like(x, 1.7e308) if k in keys else x, random_params(VIT, 0)
    )
    assert where in first_non_finite(params, normal(0, 2, 3, 16, 16), VIT)


def test_the_spatial_reduction_is_named_by_its_weights():
    params = map_named(
        lambda k, x: np.full_like(x, 1e308) if k == "block1.0.attn.sr.weight" else x,
        random_params(BARE, 0),
    )
    message = first_non_finite(params, normal(0, 2, 3, 32, 32), BARE)
    assert "the linear inside block1.0.attn.sr" in message


def test_attention_maps_of_a_vit():
    params, images = random_params(VIT, 0), normal(0, 2, 3, 16, 16)
    maps = pvt_ref.attention_maps(params, images, VIT)
    assert set(maps) == {(1, k) for k in range(VIT.depth)}
    assert all(A.shape == (2, 3, 17, 17) for A in maps.values())
    for A in maps.values():
        np.testing.assert_allclose(A.sum(-1), 1)
    with pytest.raises(RangeError, match="from 1 to 1"):
        pvt_ref.attention_maps(params, images, VIT, [2])


def test_a_watch_leaves_alone_what_it_is_told_to():
    """Arguments of an operation that is seen live as long as it runs; of others, as they like."""
    params, images = random_params(PVT, 0), normal(0, 1, 3, 32, 32)
    seen = {}
    for unseen in ([], [blocks]):
        paths = seen[len(unseen)] = []
        table = REFERENCE.watched(
            lambda c, to=paths: to.append(c.path), params=params, unseen=unseen
        )
        pvt_ref.forward(params, images, PVT, ops=table)
    assert [path for path in seen[0] if path not in {f"block{i}" for i in range(1, 5)}] == seen[1]
    assert "block1.0.attn.attention.softmax" in seen[1]


# The columnar ViT ---------------------------------------------------------------------------------


@each_table
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_a_prepared_vit_computes_the_same(size, ops):
    params, images = random_params(VIT, 3), normal(3, 2, 3, *size)
    prepared = pvt_ref.prepare(params, VIT, size)
    np.testing.assert_array_equal(
        pvt_ref.forward(prepared, images, ops=ops), pvt_ref.forward(params, images, VIT, ops=ops)
    )
    (a,), (b,) = (
        pvt_ref.forward_pyramid(*args, ops=ops, blocks=[1])
        for args in ((prepared, images), (params, images, VIT))
    )
    np.testing.assert_array_equal(a, b)


@each_table
def test_a_vit_on_another_grid_by_differences(ops):
    params, images = random_params(VIT, 5), normal(5, 2, 3, 8, 24)
    logits, cache = pvt_ref.forward_with_cache(params, images, VIT, ops=ops)
    dlogits = normal(6, *logits.shape)
    grads, dimages = pvt_ref.backward(params, cache, dlogits, VIT)
    prepared = pvt_ref.prepare(params, VIT, (8, 24))
    np.testing.assert_allclose(pvt_ref.forward(prepared, images, ops=ops), logits, rtol=1e-12)

    def loss(params, images):
        return float((pvt_ref.forward(params, images, VIT, ops=ops) * dlogits).sum())

    v, step = normal(7, *images.shape), 1e-6
    along = (loss(params, images + step * v) - loss(params, images - step * v)) / (2 * step)
    assert along == pytest.approx(float((dimages * v).sum()), rel=1e-6)
    for key, g in named_arrays(grads):
        v = normal(8, *g.shape)

        def moved(by, key=key, v=v):
            return map_named(lambda k, x: x + by * v if k == key else x, params)

        along = (loss(moved(step), images) - loss(moved(-step), images)) / (2 * step)
        assert along == pytest.approx(float((g * v).sum()), rel=1e-5, abs=1e-7), key


def test_a_vit_is_drawn_and_stored_as_every_network(tmp_path):
    params = pvt_ref.init_params(VIT, rng_of(0))
    state = pvt_ref.to_state_dict(params)
    assert list(state)[:4] == [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    ]
    again = pvt_ref.from_state_dict(state, VIT)
    for key, x in named_arrays(again):
        np.testing.assert_array_equal(x, state[key])
    assert sum(x.size for x in state.values()) == count_cost(VIT).parameters
    with pytest.raises(ArrayTypeError, match="different networks"):
        pvt_ref.forward(params, normal(0, 1, 3, 32, 32), PVT)


def test_a_vit_says_what_it_is():
    describe = architecture_of(VIT).describe
    changed = dataclasses.replace(VITS["vit_s_16"], num_classes=10, img_size=32)
    assert describe(changed) == "vit_s_16, 10 classes, 32 px"
    assert describe(VIT) == "ViT of 3 blocks, 12 channels, 5 classes, 16 px"


@pytest.mark.parametrize("name", known_variants())
def test_every_known_variant_is_counted(name):
    config = known_variants()[name]
    cost = count_cost(config)
    shapes = architecture.param_shapes(config)
    trained = shapes.keys() - architecture.buffer_keys(config)
    assert cost.parameters == sum(math.prod(shapes[key]) for key in trained)
    assert cost.cache_bytes > cost.peak_bytes  # of a deep network, inference holds a small part
    assert isinstance(config, PVTConfig | PVTv2Config | ViTConfig | SegmentorConfig)
    assert isinstance(Shapes().empty((1,)), ShapeArray)
    assert map_arrays(lambda x: x.shape, Shapes().empty((2, 3))) == (2, 3)
