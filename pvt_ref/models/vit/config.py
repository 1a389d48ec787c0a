"""The shape of a columnar ViT: one scale, plain attention, a cls token."""

import functools
import math
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import ClassVar, NamedTuple

from pvt_ref.blocks.sra import SRASettings
from pvt_ref.blocks.transformer import BlockSettings
from pvt_ref.checks import TOO_LARGE, is_whole
from pvt_ref.errors import ConfigError, ShapeError, shown

#: Epsilon of all norms, as in the released code of both.
NORM_EPS = 1e-6


class ViTStage(NamedTuple):
    """What its stage needs to know, by the names of a PVT's."""

    patch_size: int
    blocks: tuple[BlockSettings, ...]
    projection_norm_eps: float = NORM_EPS  # of the norm after the projection, which it lacks
    drop_rate: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTConfig:
    """A columnar ViT (Dosovitskiy et al. 2021, arXiv 2010.11929); DeiT is the same network.

    Raises: ConfigError if a field is no positive whole number, the patch does not divide img_size,
    or the heads do not divide the width.
    """

    patch_size: int  # P, in pixels
    embed_dim: int = 384  # C
    depth: int = 12  # blocks
    num_heads: int = 6  # N; must divide C
    mlp_ratio: int = 4  # E
    img_size: int = 224  # side in pixels of the square image that the position table is made for
    in_chans: int = 3  # channels of the image
    num_classes: int = 1000  # outputs of the classifier
    norm_eps: ClassVar[float] = NORM_EPS
    drop_path_rate: ClassVar[float] = 0.0  # nothing is dropped
    has_classifier: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_whole(value) or not 1 <= value < TOO_LARGE:
                need = "it must be a positive whole number below 2**31"
                raise ConfigError(f"{field.name} is {shown(value)}; {need}")
        P, C, N = self.patch_size, self.embed_dim, self.num_heads
        if self.img_size % P:
            raise ConfigError(f"img_size {self.img_size} is not a multiple of patch_size {P}")
        if C % N:
            raise ConfigError(f"num_heads {N} does not divide embed_dim {C}")

    @property
    def size_multiple(self) -> int:
        """Number of which H and W must be multiples for no pixel to be lost."""
        return self.patch_size

    @property
    def channels(self) -> tuple[int, ...]:
        """(C,), of its one scale."""
        return (self.embed_dim,)

    @property
    def strides(self) -> tuple[int, ...]:
        """(P,), pixels per side of a token."""
        return (self.patch_size,)

    @property
    def table_sides(self) -> tuple[int, ...]:
        """(S,), side of the square grid that the position table belongs to."""
        return (self.img_size // self.patch_size,)

    def of_stage(self, i: int) -> "ViTStage":
        """What its one stage needs.

        Args:
            i: 1.

        Returns:
            The settings of the stage.
        """
        return _stage(self)

    def grids(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """The token grid of an image, as the only one of a tuple.
        Raises: ShapeError if a border of the image would fall outside the last whole patch.

        Args:
            height: H, in pixels.
            width: W, in pixels.

        Returns:
            ((H / P, W / P),).
        """
        P = self.patch_size
        if height < 1 or width < 1 or height % P or width % P:
            need = f"positive multiples of the patch size {P}"
            raise ShapeError(f"image size {height}x{width} must be {need}")
        return ((height // P, width // P),)


@functools.lru_cache(maxsize=64)  # every forward asks
def _stage(config: ViTConfig) -> ViTStage:
    scale = 1 / math.sqrt(config.embed_dim // config.num_heads)
    attn = SRASettings(config.num_heads, scale, NORM_EPS)
    blocks = tuple(BlockSettings(NORM_EPS, attn, number=k) for k in range(config.depth))
    return ViTStage(config.patch_size, blocks)


_VIT_SMALL = {"embed_dim": 768, "depth": 8, "num_heads": 8, "mlp_ratio": 3}

#: Columnar models to compare with: DeiT-Small (deit_s_16 is in the paper's Table 2), the same on
#: other patches, and the paper's ViT-Small (vit_s_16 in Table 2, the other two in Table 8).
VITS: dict[str, ViTConfig] = {
    "deit_s_32": ViTConfig(patch_size=32),
    "deit_s_16": ViTConfig(patch_size=16),
    "deit_s_4": ViTConfig(patch_size=4),
    "vit_s_32": ViTConfig(patch_size=32, **_VIT_SMALL),
    "vit_s_16": ViTConfig(patch_size=16, **_VIT_SMALL),
    "vit_s_4": ViTConfig(patch_size=4, **_VIT_SMALL),
}


def describe(config: ViTConfig) -> str:
    """A configuration in a few words: its variant or shape, classes and image size."""
    shape = attrgetter("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "in_chans")
    fits = (name for name, vit in VITS.items() if shape(vit) == shape(config))
    name = next(fits, f"ViT of {config.depth} blocks, {config.embed_dim} channels")
    return f"{name}, {config.num_classes} classes, {config.img_size} px"
