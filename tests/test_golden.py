"""Our numbers are those of the authors' own code: outputs, and the gradient of every parameter.

The golden files were computed once by the released classifiers and dense backbones, of PVT and of
PVT v2; that of the columnar ViT by Hugging Face's classifier, and its maps by MMSegmentation's
backbone. Weights, images and cotangents are drawn here by the recipe that all were made with.
"""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from closeness import split_key_bias

import pvt_ref
from pvt_ref import VARIANTS, PVTv2Config, ViTConfig
from pvt_ref.models.architecture import param_shapes
from pvt_ref.tree import named_arrays

FOLDER = Path(__file__).parent / "golden"
GOLDEN = [FOLDER / name for name in ("golden.npz", "pvt_v2.npz", "vit_setr.npz")]

TINY = VARIANTS["pvt_tiny"]
MICRO = replace(
    TINY,
    img_size=64,
    depths=(1, 2, 1, 2),
    embed_dims=(12, 24, 40, 48),
    num_heads=(1, 2, 5, 4),
    mlp_ratios=(2, 3, 4, 2),
    sr_ratios=(4, 2, 2, 1),
    num_classes=7,
)
MICRO_V2 = PVTv2Config(
    depths=MICRO.depths,
    embed_dims=MICRO.embed_dims,
    num_heads=MICRO.num_heads,
    mlp_ratios=MICRO.mlp_ratios,
    sr_ratios=MICRO.sr_ratios,
    num_classes=7,
)
MICRO_LI = replace(MICRO_V2, linear=True)
CASES = {  # seed, batch, size, configuration
    "tiny_224": (1, 2, (224, 224), TINY),
    "tiny_256x320": (2, 1, (256, 320), TINY),
    "small_224": (3, 1, (224, 224), VARIANTS["pvt_small"]),
    "micro_64": (4, 3, (64, 64), MICRO),
    "v2_b0_64": (11, 2, (64, 64), VARIANTS["pvt_v2_b0"]),
    "v2_b0_96x64": (12, 1, (96, 64), VARIANTS["pvt_v2_b0"]),
    "v2_b2_li_96x64": (13, 1, (96, 64), VARIANTS["pvt_v2_b2_li"]),
    "v2_micro_64x32": (14, 2, (64, 32), MICRO_V2),
    "v2_micro_li_72x56": (15, 2, (72, 56), MICRO_LI),
    "v2_micro_li_61x47": (16, 1, (61, 47), MICRO_LI),
}


def draw(name: str, shape, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)


def draw_weight(key: str, shape, seed: int) -> np.ndarray:
    x = draw(key, shape, seed)
    if len(shape) == 1:
        return 1 + 0.2 * x if key.endswith(".weight") else 0.1 * x  # only norms have such weights
    if key.startswith(("pos_embed", "cls_token")):
        return 0.2 * x
    return x / np.sqrt(np.prod(shape[1:]))


def inputs(case: str):
    seed, batch, size, config = CASES[case]
    state = {key: draw_weight(key, shape, seed) for key, shape in param_shapes(config).items()}
    images = draw("images", (batch, config.in_chans, *size), seed)
    return pvt_ref.from_state_dict(state, config), images, config, seed


def digest(name: str, x: np.ndarray, seed: int) -> np.ndarray:
    x = np.ascontiguousarray(x)
    probe = draw("probe:" + name, x.shape, seed)
    return np.array([np.linalg.norm(x.ravel()), (x * probe).sum(), *x.ravel()[:6]])


def assert_digest(name: str, x: np.ndarray, seed: int, golden, tolerance: float) -> None:
    expected = golden[name]
    assert expected[0] > 0
    np.testing.assert_allclose(
        digest(name, x, seed), expected, rtol=0, atol=tolerance * expected[0], err_msg=name
    )


def assert_gradient_digests(tag: str, grads, dimages, seed: int, golden) -> None:
    assert_digest(f"{tag}/grad/images", dimages, seed, golden, 1e-10)
    checked = {f"{tag}/grad/images"}
    for key, g in named_arrays(grads):
        name = f"{tag}/grad/{key}"
        if name not in golden:
            assert not np.any(g), f"{key} is not used by {tag}, yet its gradient is not 0"
            continue
        # the digest is of the whole array; the noise of the K half is far below its tolerance
        assert_digest(name, g, seed, golden, 1e-10)
        noise, signal = split_key_bias(key, g)
        if noise.size:
            assert np.abs(noise).max() < 1e-10 * np.abs(signal).max()
        checked.add(name)
    assert checked == {n for n in golden if n.startswith(f"{tag}/grad/")}


@pytest.fixture(scope="module")
def golden():
    """Entries of all files by name; every name begins with its case."""
    return {name: file[name] for file in map(np.load, GOLDEN) for name in file.files}


#: Networks of full size with some of the tables, where small ones are computed with every one.
FULL_SIZE = [
    ("tiny_224", "reference"),
    ("tiny_256x320", "blocked"),
    ("tiny_256x320", "reference"),
    ("small_224", "blocked"),
]
full_size = pytest.mark.parametrize(("case", "table"), FULL_SIZE, indirect=["table"])
small = pytest.mark.parametrize("case", [case for case in CASES if case not in dict(FULL_SIZE)])


@small
def test_classifier_equals_the_released_code(case, golden):
    params, images, config, seed = inputs(case)
    tag = f"{case}/logits"
    logits, cache = pvt_ref.forward_with_cache(params, images, config)
    expected = golden[f"{tag}/out0"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_array_equal(pvt_ref.forward(params, images, config), logits)
    dlogits = draw(f"{tag}/dy0", logits.shape, seed)
    grads, dimages = pvt_ref.backward(params, cache, dlogits, config)
    assert_gradient_digests(tag, grads, dimages, seed, golden)


@small
def test_pyramid_equals_the_released_dense_backbone(case, golden):
    params, images, config, seed = inputs(case)
    tag = f"{case}/pyramid"
    maps, cache = pvt_ref.forward_pyramid_with_cache(params, images, config)
    for i, (x, y) in enumerate(
        zip(maps, pvt_ref.forward_pyramid(params, images, config), strict=True)
    ):
        assert_digest(f"{tag}/out{i}", x, seed, golden, 1e-12)
        np.testing.assert_array_equal(x, y)
    dmaps = [draw(f"{tag}/dy{i}", x.shape, seed) for i, x in enumerate(maps)]
    grads, dimages = pvt_ref.backward_pyramid(params, cache, dmaps, config)
    assert_gradient_digests(tag, grads, dimages, seed, golden)


@full_size
def test_a_classifier_of_full_size_equals_the_released_code(case, table, golden):
    test_classifier_equals_the_released_code(case, golden)


@full_size
def test_a_pyramid_of_full_size_equals_the_released_dense_backbone(case, table, golden):
    test_pyramid_equals_the_released_dense_backbone(case, golden)


# The columnar ViT ---------------------------------------------------------------------------------

VIT_CASES = {  # seed, batch, size of the maps' images, blocks that have a map, configuration
    "vit_micro_32": (
        *(41, 2, (48, 64), [0, 2]),
        ViTConfig(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=7),
    ),
    "vit_micro_48": (
        *(42, 1, (64, 32), [1]),
        ViTConfig(img_size=48, embed_dim=32, depth=2, num_heads=4, mlp_ratio=3, num_classes=5),
    ),
}


def vit_params(config: ViTConfig, seed: int):
    state = {key: draw_weight(key, shape, seed) for key, shape in param_shapes(config).items()}
    return pvt_ref.from_state_dict(state, config)


@pytest.mark.parametrize("case", VIT_CASES)
def test_vit_equals_hugging_faces(case, golden):
    seed, batch, _, _, config = VIT_CASES[case]
    params, tag = vit_params(config, seed), f"{case}/logits"
    images = draw("images", (batch, 3, config.img_size, config.img_size), seed)
    logits, cache = pvt_ref.forward_with_cache(params, images, config)
    expected = golden[f"{tag}/out0"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_array_equal(pvt_ref.forward(params, images, config), logits)
    grads, dimages = pvt_ref.backward(params, cache, draw(f"{tag}/dy0", logits.shape, seed), config)
    assert_gradient_digests(tag, grads, dimages, seed, golden)


@pytest.mark.parametrize("bare", [False, True], ids=["classifier", "backbone"])
@pytest.mark.parametrize("case", VIT_CASES)
def test_maps_of_vit_equal_mmsegmentations(case, bare, golden):
    seed, batch, size, blocks, config = VIT_CASES[case]
    config = replace(config, position_resize="bilinear")
    config = replace(config, num_classes=0) if bare else config
    params, tag = vit_params(config, seed), f"{case}/maps"
    images = draw("images", (batch, 3, *size), seed)
    maps, cache = pvt_ref.forward_pyramid_with_cache(params, images, config, blocks=blocks)
    alone = pvt_ref.forward_pyramid(params, images, config, blocks=blocks)
    for i, (x, y) in enumerate(zip(maps, alone, strict=True)):
        assert_digest(f"{tag}/out{i}", x, seed, golden, 1e-12)
        np.testing.assert_array_equal(x, y)
    dmaps = [draw(f"{tag}/dy{i}", x.shape, seed) for i, x in enumerate(maps)]
    grads, dimages = pvt_ref.backward_pyramid(params, cache, dmaps, config)
    assert_gradient_digests(tag, grads, dimages, seed, golden)
