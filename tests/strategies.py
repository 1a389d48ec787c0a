"""What the property tests draw: small models of every shape, and tensors to feed them.

Tensors come from a NumPy generator with a drawn seed rather than element by element: a failing
case is then one line, printed by its repr, that anyone can paste.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import assume, event
from hypothesis import strategies as st

from pvt_ref import PVTConfig, PVTv2Config, ViTConfig, from_state_dict
from pvt_ref.models.architecture import param_shapes

seeds = st.integers(0, 2**32 - 1)
float_dtypes = st.sampled_from([np.float32, np.float64])


def rng_of(*key) -> np.random.Generator:
    return np.random.default_rng(list(key))


def normal(seed: int, *shape: int, dtype: Any = np.float64, scale: float = 1.0) -> np.ndarray:
    return (rng_of(seed, len(shape), *shape).standard_normal(shape) * scale).astype(dtype)


def random_params(config: Any, seed: int, dtype: Any = np.float64) -> Any:
    """Weights of a size at which every part of the model matters, norms and biases included."""
    rng = rng_of(seed, 7)

    def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(shape, dtype=dtype)
        if key.split(".")[-2:-1] and key.split(".")[-2].startswith("norm"):
            return 1 + 0.3 * x if key.endswith("weight") else 0.3 * x
        if len(shape) == 1 or "pos_embed" in key or "cls" in key:
            return 0.3 * x
        return x / math.sqrt(math.prod(shape[1:]))

    state = {key: weight(key, shape) for key, shape in param_shapes(config).items()}
    return from_state_dict(state, config)


@dataclass(frozen=True)
class ModelCase:
    """A model, an image size and a seed. The repr reproduces it."""

    config: Any
    batch: int
    size: tuple[int, int]
    seed: int

    def params(self, dtype: Any = np.float64) -> Any:
        return random_params(self.config, self.seed, dtype)

    def images(self, dtype: Any = np.float64) -> np.ndarray:
        return normal(self.seed, self.batch, self.config.in_chans, *self.size, dtype=dtype)

    def tags(self) -> set[str]:
        """What is special about the case: tests assert that every kind was drawn."""
        c = self.config
        square = self.size[0] == self.size[1]
        native = self.size == (c.img_size, c.img_size)
        facts = {
            "R > 1": max(c.sr_ratios) > 1,
            "H != W": not square,
            "heads > 1": max(c.num_heads) > 1,
            "B > 1": self.batch > 1,
            "no qkv bias": not c.qkv_bias,
            "resized tables": not native,
            "native size": native,
            "backbone": not c.has_classifier,
            "linear": getattr(c, "linear", False),
            "not a multiple of 4": self.size[0] % 4 > 0,
            "dropout": c.drop_rate > 0 and c.attn_drop_rate > 0 and c.drop_path_rate > 0,
        }
        tags = {name for name, true in facts.items() if true}
        for tag in tags:
            event(tag)
        return tags


#: Kinds of case that a test over the whole model must have met.
MUST_BE_DRAWN = {
    "R > 1",
    "H != W",
    "heads > 1",
    "B > 1",
    "no qkv bias",
    "resized tables",
    "native size",
}


def assert_all_drawn(seen: Counter, needed: set[str] = MUST_BE_DRAWN) -> None:
    missing = needed - set(seen)
    assert not missing, f"the strategy never drew {sorted(missing)}; it drew {dict(seen)}"


@st.composite
def configs(draw, classifier: bool | None = None, dropout: bool = False) -> PVTConfig:
    """Small models. classifier None draws bare backbones too."""
    patch_sizes = draw(st.sampled_from([(2, 2, 1, 2), (1, 2, 2, 1), (3, 1, 2, 1), (2, 1, 1, 2)]))
    has_classifier = draw(st.booleans()) if classifier is None else classifier
    last_ratio = 1 if has_classifier else draw(st.sampled_from([1, 2]))
    sr_ratios = (*draw(st.tuples(*[st.sampled_from([1, 2, 3])] * 3)), last_ratio)
    num_heads = draw(st.tuples(*[st.sampled_from([1, 2, 3])] * 4))
    widths = draw(st.tuples(*[st.integers(2, 4)] * 4))
    strides = [math.prod(patch_sizes[: i + 1]) for i in range(4)]
    multiple = math.lcm(*(s * R for s, R in zip(strides, sr_ratios, strict=True)))
    assume(multiple <= 12)
    return PVTConfig(
        img_size=multiple * draw(st.integers(1, 2)),
        in_chans=draw(st.sampled_from([1, 3])),
        num_classes=draw(st.integers(1, 5)) if has_classifier else 0,
        patch_sizes=patch_sizes,
        embed_dims=tuple(
            N * max(d, 3 if N == 1 else 2) for N, d in zip(num_heads, widths, strict=True)
        ),
        num_heads=num_heads,
        mlp_ratios=draw(st.tuples(*[st.sampled_from([1, 2, 3])] * 4)),
        qkv_bias=draw(st.booleans()),
        depths=draw(st.tuples(*[st.integers(1, 2)] * 4)),
        sr_ratios=sr_ratios,
        drop_rate=0.3 if dropout else 0.0,
        attn_drop_rate=0.2 if dropout else 0.0,
        drop_path_rate=0.4 if dropout else 0.0,
        norm_eps=draw(st.sampled_from([1e-6, 1e-3])),
        projection_norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
    )


@st.composite
def model_cases(draw, classifier: bool | None = True, dropout: bool = False) -> ModelCase:
    """A model with a batch of images, often not square, often of another size than its tables."""
    config = draw(configs(classifier, dropout))
    g = config.size_multiple
    sides = st.integers(1, 3 if g < 12 else 2).map(lambda k: k * g)
    native = (config.img_size, config.img_size)
    size = native if draw(st.integers(0, 3)) == 0 else draw(st.tuples(sides, sides))
    return ModelCase(config, draw(st.integers(1, 3)), size, draw(seeds))


@st.composite
def v2_cases(draw, classifier: bool = True, dropout: bool = False) -> ModelCase:
    """A small PVT v2 of either attention with images of any size that it takes."""
    num_heads = draw(st.tuples(*[st.sampled_from([1, 2, 3])] * 4))
    widths = draw(st.tuples(*[st.integers(2, 4)] * 4))
    linear = draw(st.booleans())
    ratios = [(1, 1, 1, 1), (4, 2, 2, 1), (3, 1, 1, 1), (2, 2, 1, 1), (1, 2, 1, 2), (2, 1, 2, 1)]
    sr_ratios = draw(st.sampled_from(ratios))
    config = PVTv2Config(
        img_size=192,
        in_chans=draw(st.sampled_from([1, 3])),
        num_classes=draw(st.integers(1, 5)) if classifier else 0,
        embed_dims=tuple(
            N * max(d, 3 if N == 1 else 2) for N, d in zip(num_heads, widths, strict=True)
        ),
        num_heads=num_heads,
        mlp_ratios=draw(st.tuples(*[st.sampled_from([1, 2, 3])] * 4)),
        qkv_bias=draw(st.booleans()),
        depths=draw(st.tuples(*[st.integers(1, 2)] * 4)),
        sr_ratios=sr_ratios,
        linear=linear,
        drop_rate=0.3 if dropout else 0.0,
        attn_drop_rate=0.2 if dropout else 0.0,
        drop_path_rate=0.4 if dropout else 0.0,
        norm_eps=draw(st.sampled_from([1e-6, 1e-3])),
        projection_norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
    )
    grids = ((side, tuple(-(-side // s) for s in config.strides)) for side in range(1, 66))
    fitting = [
        side
        for side, grid in grids
        if linear or not any(n % R for n, R in zip(grid, sr_ratios, strict=True))
    ]
    size = draw(st.tuples(st.sampled_from(fitting), st.sampled_from(fitting)))
    return ModelCase(config, draw(st.integers(1, 3)), size, draw(seeds))


@dataclass(frozen=True)
class ViTCase(ModelCase):
    """A columnar ViT, an image size and a seed."""

    config: ViTConfig

    def tags(self) -> set[str]:
        c = self.config
        facts = {
            "H != W": self.size[0] != self.size[1],
            "heads > 1": c.num_heads > 1,
            "B > 1": self.batch > 1,
            "no qkv bias": not c.qkv_bias,
            "resized table": self.size != (c.img_size, c.img_size),
            "native size": self.size == (c.img_size, c.img_size),
            "no classifier": not c.has_classifier,
        }
        return {name for name, true in facts.items() if true}


@st.composite
def vit_cases(
    draw, classifier: bool | None = True, dropout: bool = False, resizes=("bicubic",)
) -> ViTCase:
    """A small ViT with a batch of images, often not square, often not of its table's size."""
    P, N = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    has_classifier = draw(st.booleans()) if classifier is None else classifier
    config = ViTConfig(
        img_size=P * draw(st.integers(1, 5)),
        patch_size=P,
        embed_dim=N * draw(st.integers(3 if N == 1 else 2, 4)),
        depth=draw(st.integers(1, 3)),
        num_heads=N,
        mlp_ratio=draw(st.sampled_from([1, 2, 3])),
        qkv_bias=draw(st.booleans()),
        in_chans=draw(st.sampled_from([1, 3])),
        num_classes=draw(st.integers(1, 5)) if has_classifier else 0,
        norm_eps=draw(st.sampled_from([1e-6, 1e-3])),
        position_resize=draw(st.sampled_from(resizes)),
        drop_rate=0.3 if dropout else 0.0,
        attn_drop_rate=0.2 if dropout else 0.0,
        drop_path_rate=0.4 if dropout else 0.0,
    )
    sides = st.integers(1, 6).map(lambda k: k * P)
    native = (config.img_size, config.img_size)
    size = native if draw(st.integers(0, 3)) == 0 else draw(st.tuples(sides, sides))
    return ViTCase(config, draw(st.integers(1, 3)), size, draw(seeds))


def without_dropout(config: PVTConfig) -> PVTConfig:
    return replace(config, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0)
