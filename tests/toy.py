"""A second network, as small as one can be: two linear layers and a mean over the patches.

It is entered by :func:`entered` and goes wherever a network can go, so whatever would only do for a
PVT shows.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

from pvt_ref.arrays import array_module
from pvt_ref.errors import ConfigError, ShapeError
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.patch_embed import patchify, unpatchify
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.models import architecture
from pvt_ref.models.architecture import Architecture, Leaf, Place
from pvt_ref.tree import record


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyConfig:
    """Patches of P pixels, a hidden layer of C channels."""

    img_size: int = 8
    in_chans: int = 3
    num_classes: int = 4
    patch_size: int = 4
    width: int = 6
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"width is {self.width}; it must be at least 1")

    @property
    def has_classifier(self) -> bool:
        return self.num_classes > 0

    @property
    def size_multiple(self) -> int:
        return self.patch_size

    @property
    def channels(self) -> tuple[int, ...]:
        return (self.width,)

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.patch_size,)

    def grids(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        P = self.patch_size
        if height < 1 or width < 1 or height % P or width % P:
            raise ShapeError(f"image size {height}x{width} does not fit: multiples of {P} do")
        return ((height // P, width // P),)


@record
class ToyParams:
    """embed (C, P*P*C_0), head (num_classes, C)."""

    embed: LinearParams
    head: LinearParams | None


def build_params(config: ToyConfig, make: Any) -> ToyParams:
    def layer(key: str, C_out: int, C_in: int) -> LinearParams:
        return LinearParams(
            make(Leaf(f"{key}.weight", (C_out, C_in), "normal")),
            make(Leaf(f"{key}.bias", (C_out,), "zeros")),
        )

    width = config.in_chans * config.patch_size**2
    head = layer("head", config.num_classes, config.width) if config.has_classifier else None
    return ToyParams(layer("embed", config.width, width), head)


def _tokens(params, images, config, ops, keep):
    x = array_module(images).permute_dims(images, (0, 2, 3, 1))
    return ops[linear].forward(params.embed, patchify(x, config.patch_size), ops, keep=keep)


def forward(params, images, config, ops, rng, keep, constants):
    x, embed_cache = _tokens(params, images, config, ops, keep)  # (B, n, C)
    xp = array_module(x)
    logits, head_cache = ops[linear].forward(params.head, xp.mean(x, axis=1), ops, keep=keep)
    cache = (embed_cache, head_cache, tuple(x.shape), tuple(images.shape), config.patch_size)
    return logits, cache if keep else None


def backward(params, cache, dlogits, ops):
    embed_cache, head_cache, shape, images_shape, P = cache
    xp = array_module(dlogits)
    dmean, dhead = ops[linear].backward(params.head, head_cache, dlogits, ops)
    dx = xp.broadcast_to(xp.expand_dims(dmean / shape[1], axis=1), shape)
    dpatches, dembed = ops[linear].backward(params.embed, embed_cache, dx, ops)
    grid = (images_shape[2] // P, images_shape[3] // P)
    dimages = xp.permute_dims(unpatchify(dpatches, P, grid), (0, 3, 1, 2))
    return ToyParams(dembed, dhead), dimages


def forward_pyramid(params, images, config, ops, rng, keep, constants):
    x, cache = _tokens(params, images, config, ops, keep)
    xp = array_module(x)
    grid = config.grids(*images.shape[2:])[0]
    x_map = xp.permute_dims(xp.reshape(x, (x.shape[0], *grid, x.shape[-1])), (0, 3, 1, 2))
    return [x_map], (cache, tuple(images.shape), config.patch_size) if keep else None


def backward_pyramid(params, cache, dmaps, ops):
    embed_cache, images_shape, P = cache
    (dmap,) = dmaps
    xp = array_module(dmap)
    B, C = dmap.shape[:2]
    dx = xp.reshape(xp.permute_dims(dmap, (0, 2, 3, 1)), (B, math.prod(dmap.shape[2:]), C))
    dpatches, dembed = ops[linear].backward(params.embed, embed_cache, dx, ops)
    grid = (images_shape[2] // P, images_shape[3] // P)
    dimages = xp.permute_dims(unpatchify(dpatches, P, grid), (0, 3, 1, 2))
    head = params.head
    if head is not None:
        head = LinearParams(xp.zeros_like(head.weight), xp.zeros_like(head.bias))
    return ToyParams(dembed, head), dimages


TOY = Architecture(
    name="toy",
    title="toy",
    config_type=ToyConfig,
    params_type=ToyParams,
    build_params=build_params,
    prepare=lambda params, config, size: None,
    forward=forward,
    backward=backward,
    forward_pyramid=forward_pyramid,
    backward_pyramid=backward_pyramid,
    operations=frozenset({linear, sum_rows}),
    place=lambda path: Place(0 if path.startswith("head") else 1, None, path),
    describe=lambda config: f"toy, {config.num_classes} classes, {config.img_size} px",
    variants={"toy_small": ToyConfig()},
)


@contextlib.contextmanager
def entered():
    """The toy is a network like the others, inside the with."""
    before = dict(architecture._rows)
    architecture.register(TOY)
    try:
        yield TOY
    finally:
        architecture._rows.clear()
        architecture._rows.update(before)
