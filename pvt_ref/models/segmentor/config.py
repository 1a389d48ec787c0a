"""The shape of a segmentation network: a backbone, a head, and how many classes it tells apart."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pvt_ref.checks import TOO_LARGE, is_real, is_whole
from pvt_ref.errors import ConfigError, ShapeError, shown
from pvt_ref.models.architecture import Architecture, architecture_of, architectures
from pvt_ref.models.fields import refuse, whole_pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticFPNHead:
    """The neck and the head of Semantic FPN (Kirillov et al. 2019, arXiv 1901.02446).

    Raises: ConfigError if a field is wrong; the message lists every reason.
    """

    name: ClassVar[str] = "semantic_fpn"

    neck_channels: int = 256  # of each map that the neck makes
    channels: int = 128  # of the units, and of their sum
    drop_rate: float = 0.1  # dropout of whole channels before the last convolution

    def __post_init__(self) -> None:
        problems = _counts(self, "neck_channels", "channels")
        rate = self.drop_rate
        if not is_real(rate) or not 0 <= rate < 1:
            problems["drop_rate"] = f"{shown(rate)}; it must be in [0, 1)"
        refuse("head", problems, [], "fpn_pvt_tiny")


@dataclass(frozen=True, slots=True, kw_only=True)
class SETRHead:
    """The heads of SETR (Zheng et al. 2021, arXiv 2012.15840), which read the last map alone.

    Raises: ConfigError if a field is wrong; the message lists every reason.
    """

    name: ClassVar[str] = "setr"

    #: "naive": one 1 x 1 unit, one enlargement by 4. "pup": four 3 x 3 units, each enlarged by 2.
    upsampling: str = "naive"
    channels: int = 256  # of the units

    def __post_init__(self) -> None:
        problems = _counts(self, "channels")
        if not isinstance(self.upsampling, str) or self.upsampling not in ("naive", "pup"):
            problems["upsampling"] = f"{shown(self.upsampling)}; it must be 'naive' or 'pup'"
        refuse("head", problems, [], "fpn_pvt_tiny")


def _counts(head: Any, *names: str) -> dict[str, str]:
    """What is wrong with fields that must be positive whole numbers, by field."""
    values = {name: getattr(head, name) for name in names}
    needed = "it must be a whole number, 1 or more, below 2**31"
    fits = {name: is_whole(value) and 1 <= value < TOO_LARGE for name, value in values.items()}
    return {name: f"{shown(values[name])}; {needed}" for name in names if not fits[name]}


HEADS: dict[str, Any] = {head.name: head for head in (SemanticFPNHead, SETRHead)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentorConfig:
    """A buildable segmentation network.

    Attributes:
        backbone: the configuration of a network with a pyramid, without classifier (num_classes 0).
        head: what makes logits of its maps, :class:`SemanticFPNHead` or :class:`SETRHead`.
        num_classes: K, of each pixel; at least 1.

    Raises:
        ConfigError: if it cannot be built; the message lists every reason.
    """

    backbone: Any
    head: Any = SemanticFPNHead()
    num_classes: int = 150

    def __post_init__(self) -> None:
        if isinstance(self.backbone, Mapping):
            object.__setattr__(self, "backbone", _backbone(self.backbone))
        if isinstance(self.head, Mapping):
            object.__setattr__(self, "head", _part("head", self.head, HEADS))
        problems = _counts(self, "num_classes")
        backbone: Any = self.backbone
        if type(self.head) not in HEADS.values():
            kinds = " or a ".join(kind.__name__ for kind in HEADS.values())
            problems["head"] = f"{shown(self.head)}; it must be a {kinds}"
        row = next((x for x in architectures() if x.config_type is type(self.backbone)), None)
        if row is None or row.dense or row.forward_pyramid is None:
            problems["backbone"] = (
                f"{shown(self.backbone)}; it must be the configuration of a network with a "
                f"pyramid, such as VARIANTS['pvt_tiny'] with num_classes=0"
            )
        elif backbone.has_classifier:
            problems["backbone"] = (
                f"one with a classifier (num_classes {backbone.num_classes}); a segmentation "
                f"network reads its maps: dataclasses.replace(backbone, num_classes=0)"
            )
        refuse("segmentation network", problems, [], "fpn_pvt_tiny")

    @property
    def row(self) -> Architecture:
        """What is known of the backbone's network."""
        return architecture_of(self.backbone)

    @property
    def has_classifier(self) -> bool:
        """True: its forward gives logits, for every place of a map."""
        return True

    @property
    def img_size(self) -> int:
        """Of the backbone: side in pixels of the pictures that its tables belong to."""
        return self.backbone.img_size

    @property
    def in_chans(self) -> int:
        """Channels of the image."""
        return self.backbone.in_chans

    @property
    def drop_path_rate(self) -> float:
        """Of the backbone."""
        return self.backbone.drop_path_rate

    def with_drop_path_rate(self, rate: float) -> "SegmentorConfig":
        """The same network with another one.

        Args:
            rate: of the last block, in [0, 1).

        Returns:
            A configuration.
        """
        backbone = dataclasses.replace(self.backbone, drop_path_rate=rate)
        return dataclasses.replace(self, backbone=backbone)

    @property
    def size_multiple(self) -> int:
        """Number whose multiples are sizes that need not be stretched."""
        return self.backbone.size_multiple

    @property
    def channels(self) -> tuple[int, ...]:
        """C_i of the backbone's maps, whose strides are :attr:`strides`."""
        return self.backbone.channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per side of a place in each map."""
        return self.backbone.strides

    def grids(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Sizes (H_i, W_i) of the backbone's maps for an image of height x width pixels.

        Args:
            height: H, in pixels.
            width: W, in pixels.

        Returns:
            ((H_1, W_1), ...), of the image as :meth:`fitting_size` stretches it.

        Raises:
            ShapeError: if these are no positive whole numbers.
        """
        return self.backbone.grids(*self.fitting_size(height, width))

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        """The size that an image is stretched to, so that the backbone loses none of its pixels.

        Args:
            height: H, in pixels.
            width: W, in pixels.

        Returns:
            (H, W) itself if the backbone takes it, or else both rounded up to its multiple.

        Raises:
            ShapeError: if these are no positive whole numbers.
        """
        height, width = whole_pixels(height, width)
        if height < 1 or width < 1:
            raise ShapeError(f"image size {height}x{width} must be positive numbers of pixels")
        return _fitting_size(self.backbone, height, width)


@functools.lru_cache(maxsize=1024)
def _fitting_size(backbone: Any, height: int, width: int) -> tuple[int, int]:
    try:
        backbone.grids(height, width)
    except ShapeError:
        multiple = backbone.size_multiple
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple
    return height, width


def _backbone(values: Mapping[str, Any]) -> Any:
    """The configuration that was saved as a dict. Raises: ConfigError."""
    return _part("backbone", values, {row.name: row.config_type for row in architectures()})


def _part(what: str, values: Mapping[str, Any], kinds: Mapping[str, Any]) -> Any:
    fields = dict(values)
    name = fields.pop("name", None)
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None or kind is SegmentorConfig:
        known = ", ".join(repr(name) for name, kind in kinds.items() if kind is not SegmentorConfig)
        raise ConfigError(f"{what} is called {shown(name)}; known are {known}")
    try:
        return kind(**fields)
    except TypeError as error:  # a field that it does not have
        raise ConfigError(f"{what}: {error}") from error


def describe(config: SegmentorConfig) -> str:
    """A configuration in a few words: ``pvt_tiny with semantic_fpn, 150 classes``."""
    backbone, head = config.row.describe(config.backbone), config.head
    kind = f"{head.name} {head.upsampling}" if isinstance(head, SETRHead) else head.name
    return f"{backbone.split(',')[0]} with {kind}, {config.num_classes} classes"
