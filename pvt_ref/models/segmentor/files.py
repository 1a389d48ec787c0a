"""A segmentation network in mmsegmentation's files, as the authors released theirs.

The backbone lies below ``backbone.`` in one of the layouts of its own network; neck and head have
the same names here and there.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pvt_ref.errors import CheckpointError, ConfigError
from pvt_ref.models.layouts import WHOLE, Files, Layout, Piece, Seen, Shape
from pvt_ref.models.pvt.files import AUTHORS, AUTHORS_DENSE
from pvt_ref.models.pvt_v2.files import AUTHORS as AUTHORS_V2
from pvt_ref.models.segmentor.config import SegmentorConfig, SemanticFPNHead
from pvt_ref.models.vit.files import MMSEGMENTATION

_BACKBONE, _CLASSIFIER = "backbone.", "decode_head.conv_seg.weight"
_LAST_TABLE, _AUXILIARY = "backbone.pos_embed4", "auxiliary_head."


def _around(base: Layout, name: str, *marks: str) -> Layout:
    """The layout of a segmentation network whose backbone lies in layout base."""

    def rename(key: str) -> str | None:
        if not key.startswith(_BACKBONE):
            return key
        theirs = base.rename(key.removeprefix(_BACKBONE))
        return theirs and _BACKBONE + theirs

    def pieces_of(key: str, shape: Shape, config: SegmentorConfig) -> list[Piece]:
        if not key.startswith(_BACKBONE):
            return [Piece(key, WHOLE, key, WHOLE, shape)]
        pieces = base.pieces_of(key.removeprefix(_BACKBONE), shape, config.backbone)
        return [x._replace(key=key, foreign=_BACKBONE + x.foreign) for x in pieces]

    unused = tuple(_BACKBONE + key for key in base.unused)
    marked = tuple(_BACKBONE + mark for mark in marks)
    return Layout(
        name=f"mmsegmentation layout, {name} backbone",
        rename=rename,
        pieces_of=pieces_of,
        marks=marked,
        unused=unused,
        has_classifier=True,
    )


#: Each with the layout of its backbone, of which shapes and configurations are asked.
_BASES: dict[str, Layout] = {}


def _layouts() -> tuple[Layout, ...]:
    dwconv = tuple(f"block{i}.0.mlp.dwconv.dwconv.weight" for i in range(1, 5))
    made: list[Layout] = []
    for base, name, marks in (
        (AUTHORS_V2, "PVT v2", dwconv),
        (AUTHORS_DENSE, "PVT", ("pos_embed1", "pos_embed4")),
        (MMSEGMENTATION, "ViT", ("pos_embed", "cls_token")),
    ):
        layout = _around(base, name, *marks)
        _BASES[layout.name] = base
        made.append(layout)
    return tuple(made)


def _backbone_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    below = (key for key in shapes if key.startswith(_BACKBONE))
    return {key.removeprefix(_BACKBONE): shapes[key] for key in below}


def _fit(config: SegmentorConfig, shapes: Mapping[str, Shape], layout: Layout) -> SegmentorConfig:
    seen, row = Seen(shapes, layout), config.row
    backbone, head = config.backbone, config.head
    if row.files is not None:
        base = _BASES.get(layout.name, layout)
        backbone = row.files.fit(backbone, _backbone_shapes(shapes), base)
    classifier, lateral = seen.first(_CLASSIFIER), seen.first("neck.lateral_convs.0.conv.weight")
    changes: dict[str, Any] = {"num_classes": classifier[0]} if classifier else {}
    if len(classifier) > 1 and classifier[1]:
        sizes = {"channels": classifier[1]}
        if isinstance(head, SemanticFPNHead) and lateral:
            sizes["neck_channels"] = lateral[0]
        head = dataclasses.replace(head, **sizes)
    try:
        backbone = dataclasses.replace(backbone, num_classes=0)
        return dataclasses.replace(config, backbone=backbone, head=head, **changes)
    except ConfigError:
        return config  # no such class count: the head is what is wrong


def _shown(shapes: Mapping[str, Shape], layout: Layout) -> dict[str, Any]:
    classifier = Seen(shapes, layout).first(_CLASSIFIER)
    return {"num_classes": classifier[0]} if classifier else {}


def _partial(values: dict[str, Any]) -> SegmentorConfig:
    if "backbone" not in values:
        raise CheckpointError("it does not say which backbone a segmentation network has")
    return SegmentorConfig(**values)


def _no_hugging_face(fields: Mapping[str, Any]) -> dict[str, Any]:
    raise CheckpointError("Hugging Face's segmentation networks are not read here")


def _bare(layout: Layout, state: Mapping[str, Any], wanted: bool) -> tuple[Layout, str]:
    rows = getattr(state.get(_LAST_TABLE), "shape", ())
    square = len(rows) == 3 and math.isqrt(rows[1]) ** 2 == rows[1]
    if square and _BASES.get(layout.name) is AUTHORS_DENSE:  # no cls row: as to_state_dict has it
        layout = _around(AUTHORS, "PVT")
    # of SETR's training: the same head on other blocks, which nobody reads afterwards
    auxiliary = tuple(key for key in state if key.startswith(_AUXILIARY))
    if auxiliary:
        layout = dataclasses.replace(layout, unused=(*layout.unused, *auxiliary))
    return layout, ""


def _blocks(config: SegmentorConfig) -> int:
    files = config.row.files
    return files.blocks(config.backbone) if files else 0


FILES = Files(
    readable="segmentation networks of the authors (mmsegmentation, Semantic FPN and SETR)",
    layouts=_layouts(),
    probes=(_CLASSIFIER,),
    bare=_bare,
    model_type="",
    telling=frozenset(("backbone", "head")),
    hugging_face=_no_hugging_face,
    partial=_partial,
    fit=_fit,
    shown=_shown,
    widths="num_classes",
    blocks=_blocks,
)
