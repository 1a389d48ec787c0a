"""The shape of a columnar ViT: one scale, plain attention, a cls token."""

import functools
import math
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from pvt_ref.blocks.sra import SRASettings
from pvt_ref.blocks.transformer import BlockSettings
from pvt_ref.errors import ShapeError
from pvt_ref.models.fields import fitting_sizes, refuse, settle_fields, whole_pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTConfig:
    """The configuration of a columnar ViT (Dosovitskiy et al. 2021, arXiv 2010.11929), or a DeiT.

    The defaults are DeiT-S/16. Fields with the name of a field of PVTConfig have its meaning.

    Attributes:
        img_size: side in pixels of the square image that the position table is made for.
        patch_size: P, in pixels; must divide img_size.
        embed_dim: C.
        depth: L, at most 1000.
        num_heads: N; must divide C.
        mlp_ratio: E; C * E must be an integer.
        qkv_bias: whether qkv has a bias.
        qk_scale: replaces 1 / sqrt(d) as the factor on the scores; None keeps it.
        in_chans: channels of the image.
        num_classes: outputs of the classifier. 0 makes a bare backbone: with the cls token, which
            the patches attend to, but without final norm and head.
        drop_rate: dropout after the position embedding, the attention projection and in the MLP.
        attn_drop_rate: dropout on the attention weights.
        drop_path_rate: stochastic depth of the last block.
        norm_eps: epsilon of all norms.
        position_resize: ``"bicubic"``, as DeiT and Hugging Face, or ``"bilinear"``, as SETR.

    Raises:
        ConfigError: if there is no such model; the message lists every reason.
    """

    img_size: int = 224
    patch_size: int = 16
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4
    qkv_bias: bool = True
    qk_scale: float | None = None
    in_chans: int = 3
    num_classes: int = 1000
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    norm_eps: float = 1e-6
    position_resize: str = "bicubic"

    def __post_init__(self) -> None:
        problems = settle_fields(self)
        refuse("ViT", problems, [] if problems else self._conflicts(), "deit_s_16")

    def _conflicts(self) -> list[str]:
        """What is wrong between fields that are right in themselves."""
        P, C, N, E = self.patch_size, self.embed_dim, self.num_heads, self.mlp_ratio
        conflicts = {
            f"img_size {self.img_size} is not a multiple of patch_size {P}; "
            f"a border of pixels would be lost": self.img_size % P,
            f"num_heads {N} does not divide embed_dim {C}; every head needs the same width": C % N,
            f"embed_dim {C} times mlp_ratio {E} is {C * E}, not a whole number of hidden units": (
                C * E % 1
            ),
        }
        return [conflict for conflict, rest in conflicts.items() if rest]

    @property
    def has_classifier(self) -> bool:
        """Whether there are a final norm and a head."""
        return self.num_classes > 0

    @property
    def hidden_dim(self) -> int:
        """E * C, of the MLPs."""
        return int(self.embed_dim * self.mlp_ratio)

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

    def grids(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """The token grid of an image, as the only one of a tuple.

        Args:
            height: H, in pixels.
            width: W, in pixels.

        Returns:
            ((H / P, W / P),).

        Raises:
            ShapeError: if these are no positive whole numbers, or a border would be lost.
        """
        P = self.patch_size
        height, width = whole_pixels(height, width)
        if height < 1 or width < 1 or height % P or width % P:
            near, padded = fitting_sizes(height, width, P)
            raise ShapeError(
                f"image size {height}x{width} does not fit: H and W must be positive multiples of "
                f"the patch size {P}, or a border of pixels would be lost. Resize to "
                f"{near}, or pad to {padded} with "
                f"pvt_ref.pad_to_multiple(images, {P})"
            )
        return ((height // P, width // P),)


@functools.lru_cache(maxsize=64)  # every forward asks
def block_settings(config: ViTConfig) -> tuple[BlockSettings, ...]:
    """What each block is told; rates of drop path rise in a line from the first to the last."""
    scale = config.qk_scale
    attn = SRASettings(
        num_heads=config.num_heads,
        scale=1 / math.sqrt(config.embed_dim // config.num_heads) if scale is None else scale,
        norm_eps=config.norm_eps,
        attn_drop_rate=config.attn_drop_rate,
        drop_rate=config.drop_rate,
    )
    rates = (config.drop_path_rate * k / max(config.depth - 1, 1) for k in range(config.depth))
    return tuple(
        BlockSettings(config.norm_eps, attn, config.drop_rate, rate, k)
        for k, rate in enumerate(rates)
    )


_VIT_SMALL: Any = {"embed_dim": 768, "depth": 8, "num_heads": 8, "mlp_ratio": 3}

#: DeiT as released (arXiv 2012.12877), and the columnar models that the paper compares with:
#: DeiT-Small (deit_s_16 is in Table 2), the same on other patches, and ViT-Small (vit_s_16 in Table
#: 2, the other two in Table 8).
VARIANTS: dict[str, ViTConfig] = {
    "deit_ti_16": ViTConfig(embed_dim=192, num_heads=3),
    "deit_s_16": ViTConfig(),
    "deit_b_16": ViTConfig(embed_dim=768, num_heads=12),
    "deit_s_32": ViTConfig(patch_size=32),
    "deit_s_4": ViTConfig(patch_size=4),
    "vit_s_32": ViTConfig(patch_size=32, **_VIT_SMALL),
    "vit_s_16": ViTConfig(patch_size=16, **_VIT_SMALL),
    "vit_s_4": ViTConfig(patch_size=4, **_VIT_SMALL),
}

#: The same, by its public name.
VITS = VARIANTS

#: timm's names, which those of the released files begin with.
ALIASES = {
    "deit_tiny_patch16_224": "deit_ti_16",
    "deit_small_patch16_224": "deit_s_16",
    "deit_base_patch16_224": "deit_b_16",
}

_STRUCTURE = attrgetter(
    *("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_scale")
)


def describe(config: ViTConfig) -> str:
    """A configuration in a few words: ``deit_s_16, 1000 classes, 224 px``."""
    fits = (name for name, vit in VARIANTS.items() if _STRUCTURE(vit) == _STRUCTURE(config))
    name = next(fits, f"ViT of {config.depth} blocks, {config.embed_dim} channels")
    head = f"{config.num_classes} classes" if config.has_classifier else "no classifier"
    channels = "" if config.in_chans == 3 else f", in_chans={config.in_chans}"
    resize = "" if config.position_resize == "bicubic" else f", {config.position_resize} resizing"
    return f"{name}, {head}, {config.img_size} px{channels}{resize}"
