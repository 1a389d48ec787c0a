"""The same lines on other array libraries: NumPy's numbers, in the library's own arrays.

The libraries are those of the fixture in conftest.py: a NumPy that refuses to be written to, the
strict reading of the array API standard, and CuPy where there is a GPU.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from closeness import assert_near, relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operations import OPERATIONS, table_under_test
from strategies import ModelCase, model_cases, normal, random_params, rng_of, vit_cases

import pvt_ref
from pvt_ref import VARIANTS, Model, cross_entropy
from pvt_ref.arrays import array_module, is_array
from pvt_ref.tree import map_arrays, named_arrays

EXACT = 1e-12  # the same operations in the same order, summed perhaps in another

# The fixture only says which library: it holds nothing that one example could leave for the next
few = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def to_host(x) -> np.ndarray:
    """An array of any library, in NumPy."""
    return np.asarray(x.get() if hasattr(x, "get") else x)


def assert_same(theirs, ours, like, tolerance: float = EXACT, what: str = "") -> None:
    """The numbers, shape and dtype of NumPy's result, in an array of the library of like."""
    assert is_array(theirs), f"{what} is a {type(theirs).__name__}"
    assert array_module(theirs) is array_module(like), what
    assert tuple(theirs.shape) == tuple(ours.shape), what
    host = to_host(theirs)
    assert host.dtype == ours.dtype, what
    scale = np.abs(ours).max() if ours.size else 0.0
    np.testing.assert_allclose(host, ours, rtol=0, atol=tolerance * max(scale, 1e-3), err_msg=what)


def assert_all_same(theirs: dict, ours: dict, like, tolerance: float = EXACT) -> None:
    """Of each array, relative to the largest of all: some vanish but for rounding."""
    assert list(theirs) == list(ours)
    largest = max(np.abs(x).max() for x in ours.values())
    assert largest > 0
    for key, x in theirs.items():
        assert array_module(x) is array_module(like), key
        host = to_host(x)
        assert (host.dtype, host.shape) == (ours[key].dtype, ours[key].shape), key
        np.testing.assert_allclose(host, ours[key], rtol=0, atol=tolerance * largest, err_msg=key)


# Operations -----------------------------------------------------------------------------------


def skip_where_the_kernels_do_not_compute(library) -> None:
    if table_under_test().accepts is not None and library.name != "read-only numpy":
        pytest.skip("the kernels are for NumPy arrays; PVT_REF_OPS=reference runs this test")


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name, library):
    skip_where_the_kernels_do_not_compute(library)

    @few
    @given(OPERATIONS[name])
    def check(case):
        y, cache = case.forward(case.inputs)
        dy = normal(97, *y.shape)
        grads = case.backward(case.inputs, cache, dy)
        inputs = case.cast(library.asarray)
        like = next(iter(inputs.values()))
        their_y, their_cache = case.forward(inputs)
        assert_same(their_y, y, like, what="y")
        assert_same(case.forward(inputs, keep=False)[0], y, like, what="y without a cache")
        their_grads = case.backward(inputs, their_cache, library.asarray(dy))
        assert_all_same(their_grads, grads, like, 1e-11)

    check()


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_in_float32_stays_float32(name, library):
    skip_where_the_kernels_do_not_compute(library)

    @few
    @given(OPERATIONS[name])
    def check(case):
        inputs = case.cast(lambda x: library.asarray(x.astype(np.float32)))
        y, cache = case.forward(inputs)
        dy = library.asarray(normal(97, *y.shape, dtype=np.float32))
        results = [y, case.forward(inputs, keep=False)[0]]
        results += case.backward(inputs, cache, dy).values()
        for x in results:
            assert to_host(x).dtype == np.float32

    check()


@few
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(2, 6)),
    smoothing=st.sampled_from([0.0, 0.1]),
    reduction=st.sampled_from(["mean", "sum"]),
    soft=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 1000),
)
def test_cross_entropy(library, shape, smoothing, reduction, soft, dtype, seed):
    rng = rng_of(seed)
    logits = (3 * rng.standard_normal(shape)).astype(dtype)
    B, K = shape
    targets = rng.dirichlet(np.ones(K), B).astype(dtype) if soft else rng.integers(0, K, B)
    loss, dlogits = cross_entropy(logits, targets, smoothing, reduction)
    there = library.asarray(logits)
    their_loss, their_dlogits = cross_entropy(there, library.asarray(targets), smoothing, reduction)
    tolerance = EXACT if dtype is np.float64 else 1e-6
    assert their_loss.shape == ()
    assert_same(their_loss, loss, there, tolerance)
    assert_same(their_dlogits, dlogits, there, tolerance)


def test_cross_entropy_with_labels_of_other_integers(library):
    logits = normal(0, 3, 4)
    expected = cross_entropy(logits, np.array([0, 3, 1]))
    for dtype in (np.int8, np.uint8, np.int32, np.uint64):
        labels = library.asarray(np.array([0, 3, 1], dtype))
        loss, dlogits = cross_entropy(library.asarray(logits), labels)
        assert_same(loss, expected[0], dlogits)
        assert_same(dlogits, expected[1], dlogits)
    with pytest.raises(pvt_ref.PVTError, match="labels run from 0 to 4"):
        cross_entropy(library.asarray(logits), library.asarray(np.array([0, 4, 1])))


# The whole model ------------------------------------------------------------------------------


def move(library, case: ModelCase):
    params, images = case.params(), case.images()
    there = map_arrays(library.asarray, params)
    return params, images, there, library.asarray(images)


@few
@given(case=model_cases(classifier=True) | vit_cases(classifier=True))
def test_forward(library, case):
    params, images, their_params, their_images = move(library, case)
    logits = pvt_ref.forward(params, images, case.config)
    theirs = pvt_ref.forward(their_params, their_images, case.config)
    assert_same(theirs, logits, their_images)
    assert_same(Model(their_params, case.config)(their_images), logits, their_images)


@few
@given(case=model_cases(classifier=True, dropout=True) | vit_cases(dropout=True))
def test_forward_with_cache_and_backward(library, case):
    params, images, their_params, their_images = move(library, case)
    config, dropless = case.config, case.seed % 2 == 0

    def rng():
        return None if dropless else rng_of(case.seed)  # the same masks for both

    logits, cache = pvt_ref.forward_with_cache(params, images, config, rng())
    their_logits, their_cache = pvt_ref.forward_with_cache(
        their_params, their_images, config, rng()
    )
    assert_same(their_logits, logits, their_images)
    dlogits = normal(5, *logits.shape)
    grads, dimages = pvt_ref.backward(params, cache, dlogits, config)
    their_grads, their_dimages = pvt_ref.backward(
        their_params, their_cache, library.asarray(dlogits), config
    )
    assert_all_same(
        {"images": their_dimages, **dict(named_arrays(their_grads))},
        {"images": dimages, **dict(named_arrays(grads))},
        their_images,
        1e-11,
    )


def test_masks_are_those_of_numpy(library):
    # not only close: a mask that differs would change the result by its whole size
    config = replace(VARIANTS["pvt_tiny"], **TINY_CHANGES, drop_rate=0.5, drop_path_rate=0.5)
    params, images = random_params(config, 1), normal(1, 4, 3, 32, 32)
    dropped, _ = pvt_ref.forward_with_cache(params, images, config, rng_of(1))
    plain = pvt_ref.forward(params, images, config)
    assert relative(dropped, plain) > 0.1
    there = map_arrays(library.asarray, params)
    theirs, _ = pvt_ref.forward_with_cache(there, library.asarray(images), config, rng_of(1))
    assert_same(theirs, dropped, there.pos_embed1)


@few
@given(case=model_cases(None, dropout=True) | vit_cases(None, dropout=True))
def test_pyramid_and_its_backward(library, case):
    params, images, their_params, their_images = move(library, case)
    config = case.config
    maps, cache = pvt_ref.forward_pyramid_with_cache(params, images, config, rng_of(3))
    their_maps, their_cache = pvt_ref.forward_pyramid_with_cache(
        their_params, their_images, config, rng_of(3)
    )
    inference = pvt_ref.forward_pyramid(params, images, config)
    their_inference = pvt_ref.forward_pyramid(their_params, their_images, config)
    for i in range(len(maps)):
        assert_same(their_maps[i], maps[i], their_images, what=f"F{i + 1}")
        assert_same(their_inference[i], inference[i], their_images, what=f"F{i + 1}")
    dmaps: list[Any] = [normal(i, *x.shape) for i, x in enumerate(maps)]
    if len(maps) > 1:
        dmaps[case.seed % 4] = None
    their_dmaps = [None if x is None else library.asarray(x) for x in dmaps]
    grads, dimages = pvt_ref.backward_pyramid(params, cache, dmaps, config)
    their_grads, their_dimages = pvt_ref.backward_pyramid(
        their_params, their_cache, their_dmaps, config
    )
    assert_all_same(
        {"images": their_dimages, **dict(named_arrays(their_grads))},
        {"images": dimages, **dict(named_arrays(grads))},
        their_images,
        1e-11,
    )


@few
@given(case=model_cases(classifier=None) | vit_cases(classifier=None))
def test_attention_maps(library, case):
    params, images, their_params, their_images = move(library, case)
    maps = pvt_ref.attention_maps(params, images, case.config)
    theirs = pvt_ref.attention_maps(their_params, their_images, case.config)
    assert list(theirs) == list(maps)
    for key, x in theirs.items():
        assert_same(x, maps[key], their_images, what=str(key))


TINY_CHANGES = {
    "img_size": 32,
    "num_classes": 5,
    "embed_dims": (4, 8, 4, 8),
    "num_heads": (1, 2, 1, 2),
    "mlp_ratios": (1, 1, 1, 1),
    "depths": (1, 1, 1, 1),
}
SMALL = replace(VARIANTS["pvt_tiny"], **TINY_CHANGES)


@pytest.mark.parametrize("image_dtype", [np.float32, np.float64])
def test_images_of_another_float_dtype_are_cast(library, image_dtype):
    params = random_params(SMALL, 1, np.float32)
    images = normal(1, 2, 3, 32, 32, dtype=image_dtype)
    there, their_images = map_arrays(library.asarray, params), library.asarray(images)
    logits, cache = pvt_ref.forward_with_cache(params, images, SMALL)
    theirs, their_cache = pvt_ref.forward_with_cache(there, their_images, SMALL)
    assert_same(theirs, logits, their_images, 1e-5)
    _, dimages = pvt_ref.backward(params, cache, logits, SMALL)
    _, their_dimages = pvt_ref.backward(there, their_cache, library.asarray(logits), SMALL)
    assert dimages.dtype == np.float32  # the weights', which holds every gradient
    assert_same(their_dimages, dimages, there.pos_embed1, 1e-5)


def test_bad_input_is_refused_in_every_library(library):
    params = map_arrays(library.asarray, random_params(SMALL, 1))
    for shape, words in (
        ((3, 32, 32), "rank 3"),
        ((1, 32, 32, 3), "look channels-last"),
        ((0, 3, 32, 32), "the batch is empty"),
        ((1, 3, 32, 40), "multiples of 32"),
    ):
        with pytest.raises(pvt_ref.PVTError, match=words):
            pvt_ref.forward(params, library.asarray(np.zeros(shape)), SMALL)
    for dtype in (np.uint8, np.bool_, np.complex128):
        with pytest.raises(pvt_ref.PVTError, match="dtype"):
            pvt_ref.forward(params, library.asarray(np.zeros((1, 3, 32, 32), dtype)), SMALL)


def test_weights_come_and_go_in_every_library(library):
    params = random_params(SMALL, 1)
    there = map_arrays(library.asarray, params)
    state = pvt_ref.to_state_dict(there)
    again = pvt_ref.from_state_dict(state, SMALL)
    for key, x in named_arrays(again):
        assert x is state[key]
    back = pvt_ref.to_numpy(there)
    for (key, x), (_, y) in zip(named_arrays(back), named_arrays(params), strict=True):
        assert isinstance(x, np.ndarray)
        np.testing.assert_array_equal(x, y, err_msg=key)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, num_classes=0)])
def test_a_new_head_in_every_library(library, config):
    params = random_params(config, 1)
    model = pvt_ref.with_new_head(Model(params, config), 3, rng_of(2))
    there = Model(map_arrays(library.asarray, params), config)
    theirs = pvt_ref.with_new_head(there, 3, rng_of(2))
    for (key, x), (_, y) in zip(
        named_arrays(theirs.params), named_arrays(model.params), strict=True
    ):
        assert_same(x, y, there.params.pos_embed1, 0.0, key)
    images = normal(1, 2, 3, 32, 32)
    assert_same(theirs(library.asarray(images)), model(images), there.params.pos_embed1)


# On the GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cuda_and_back(cupy):
    params = random_params(SMALL, 1, np.float32)
    there = pvt_ref.to_device(params, "cuda")
    for key, x in named_arrays(there):
        assert isinstance(x, cupy.ndarray), key
    back = pvt_ref.to_numpy(there)
    again = pvt_ref.to_device(there, "cpu")
    for tree in (back, again):
        for (key, x), (_, y) in zip(named_arrays(tree), named_arrays(params), strict=True):
            assert type(x) is np.ndarray
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=key)
    model = pvt_ref.to_device(Model(params, SMALL, "a source"))
    assert isinstance(model, Model)
    assert (model.config, model.source) == (SMALL, "a source")
    images = pvt_ref.to_device([normal(1, 2, 3, 32, 32)], "cuda:0")[0]
    assert isinstance(model(images), cupy.ndarray)
    assert model(images).dtype == np.float32


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "forward", "gradient"), [(np.float32, 1e-4, 1e-3), (np.float64, 1e-10, 1e-10)]
)
def test_pvt_tiny_on_cuda(cupy, dtype, forward, gradient):
    config = VARIANTS["pvt_tiny"]
    params = random_params(config, 1, dtype)
    images = normal(1, 2, 3, 224, 224, dtype=dtype)
    there, their_images = pvt_ref.to_device(params), pvt_ref.to_device(images)
    logits, cache = pvt_ref.forward_with_cache(params, images, config)
    their_logits, their_cache = pvt_ref.forward_with_cache(there, their_images, config)
    assert_near(to_host(their_logits), logits, forward)
    assert_near(to_host(pvt_ref.forward(there, their_images, config)), logits, forward)
    labels = np.array([3, 700])
    loss, dlogits = cross_entropy(logits, labels)
    their_loss, their_dlogits = cross_entropy(their_logits, pvt_ref.to_device(labels))
    assert math.isclose(float(their_loss), float(loss), rel_tol=forward)
    grads, dimages = pvt_ref.backward(params, cache, dlogits, config)
    their_grads, their_dimages = pvt_ref.backward(there, their_cache, their_dlogits, config)
    assert_near(to_host(their_dimages), dimages, gradient)
    largest = max(np.abs(g).max() for _, g in named_arrays(grads))
    for (key, x), (_, y) in zip(named_arrays(their_grads), named_arrays(grads), strict=True):
        assert isinstance(x, cupy.ndarray), key
        assert x.dtype == dtype, key
        error = np.linalg.norm((to_host(x) - y).ravel())
        allowed = gradient * np.linalg.norm(y.ravel()) + 1e-6 * gradient * largest * y.size**0.5
        if key.endswith("kv.bias"):  # the K half is 0 but for rounding
            allowed += gradient * largest
        assert error <= allowed, f"{key}: {error:.1e} > {allowed:.1e}"


@pytest.mark.gpu
def test_the_pyramid_of_pvt_tiny_on_cuda(cupy):
    config = VARIANTS["pvt_tiny"]
    params = random_params(config, 1, np.float32)
    images = normal(1, 1, 3, 192, 256, dtype=np.float32)  # tables are resized on the device
    there = pvt_ref.to_device(params)
    theirs = pvt_ref.forward_pyramid(there, pvt_ref.to_device(images), config)
    for x, y in zip(theirs, pvt_ref.forward_pyramid(params, images, config), strict=True):
        assert isinstance(x, cupy.ndarray)
        assert_near(to_host(x), y, 1e-4)


@pytest.mark.gpu
def test_host_and_cuda_mixed_are_refused(cupy):
    params, images = random_params(SMALL, 1), normal(1, 2, 3, 32, 32)
    there, their_images = pvt_ref.to_device(params), pvt_ref.to_device(images)
    logits, cache = pvt_ref.forward_with_cache(params, images, SMALL)
    half = replace(there, norm=params.norm)
    for call, words in (
        (lambda: pvt_ref.forward(params, their_images, SMALL), "one device"),
        (lambda: pvt_ref.forward(there, images, SMALL), "one device"),
        (lambda: pvt_ref.forward_pyramid(there, images, SMALL), "one device"),
        (lambda: pvt_ref.attention_maps(params, their_images, SMALL), "one device"),
        (lambda: pvt_ref.backward(params, cache, cupy.asarray(logits), SMALL), "one device"),
        (lambda: pvt_ref.forward(half, their_images, SMALL), "params mix"),
        (lambda: cross_entropy(logits, cupy.asarray([0, 1])), "to_device or to_numpy"),
        (lambda: cross_entropy(cupy.asarray(logits), np.array([0, 1])), "to_device or to_numpy"),
    ):
        with pytest.raises(pvt_ref.PVTError, match=words):
            call()


@pytest.mark.gpu
def test_cross_entropy_on_cuda_knows_the_range_of_labels(cupy):
    logits = cupy.zeros((2, 4), dtype=cupy.float32)
    loss, dlogits = cross_entropy(logits, cupy.asarray([0, 3]))
    assert isinstance(dlogits, cupy.ndarray)
    assert loss.dtype == dlogits.dtype == np.float32
    assert math.isclose(float(loss), math.log(4), rel_tol=1e-6)
    with pytest.raises(pvt_ref.PVTError, match="labels run from 0 to 4"):
        cross_entropy(logits, cupy.asarray([0, 4]))


@pytest.mark.gpu
def test_a_model_on_cuda_is_saved_like_one_on_the_host(cupy, tmp_path):
    model = Model(random_params(SMALL, 1, np.float32), SMALL)
    there = pvt_ref.to_device(model)
    pvt_ref.save(tmp_path / "host.safetensors", model)
    pvt_ref.save(tmp_path / "cuda.safetensors", there)
    host, cuda = (tmp_path / f"{name}.safetensors" for name in ("host", "cuda"))
    assert host.read_bytes() == cuda.read_bytes()
    for key, x in named_arrays(there.params):
        assert isinstance(x, cupy.ndarray), key  # saving moved nothing away
