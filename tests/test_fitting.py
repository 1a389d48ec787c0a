"""A configuration is fitted to a file's shapes, also where no network has such shapes.

What does not fit is said when the weights are checked; here nothing may fail before that.
"""

import dataclasses

import pytest
from segmentors import PVT, PVT_V2, SEGMENTORS, VIT

from pvt_ref.errors import CheckpointError
from pvt_ref.models.architecture import architecture_of
from pvt_ref.models.layouts import renaming
from pvt_ref.models.segmentor.config import SegmentorConfig

KERNELS = {"pvt": "patch_embed1.proj.weight", "pvt_v2": "patch_embed1.proj.weight"}
CONFIGS = {"pvt": PVT, "pvt_v2": PVT_V2, "vit": VIT}


def files_of(config):
    files = architecture_of(config).files
    assert files is not None
    return files, files.layouts[-1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_image_without_channels_leaves_the_configuration(kind):
    config = dataclasses.replace(CONFIGS[kind], num_classes=0)
    files, layout = files_of(config)
    shapes = {KERNELS.get(kind, "patch_embed.proj.weight"): (8, 0, 4, 4)}
    assert files.fit(config, shapes, layout) == config


def test_a_kernel_that_is_none_says_nothing_about_channels():
    files, layout = files_of(VIT)
    assert files.fit(VIT, {"patch_embed.proj.weight": (8, 3)}, layout).in_chans == VIT.in_chans


def test_shapes_that_are_missing_show_nothing():
    files, layout = files_of(PVT_V2)
    assert files.shown({}, layout) == {}


def test_a_classifier_of_a_segmentation_network_that_is_none():
    config = SEGMENTORS["pvt"]
    files, layout = files_of(config)
    key = "decode_head.conv_seg.weight"
    assert files.fit(config, {key: (7,)}, layout) == dataclasses.replace(config, num_classes=7)
    assert files.fit(config, {key: (0, 6, 1, 1)}, layout) == config


def test_a_backbone_whose_network_has_no_files_is_taken_as_it_is(monkeypatch):
    config = SEGMENTORS["pvt"]
    files, layout = files_of(config)
    row = dataclasses.replace(config.row, files=None)
    monkeypatch.setattr(SegmentorConfig, "row", property(lambda self: row))
    shapes = {"backbone.patch_embed1.proj.weight": (8, 5, 4, 4)}
    assert files.fit(config, shapes, layout).backbone.in_chans == config.backbone.in_chans


def test_hugging_faces_fields_may_say_little():
    for config in (PVT_V2, VIT):
        assert files_of(config)[0].hugging_face({}) == {"qk_scale": None}
    with pytest.raises(CheckpointError, match="segmentation networks are not read"):
        files_of(SEGMENTORS["pvt"])[0].hugging_face({})


def test_a_key_of_no_known_form_has_no_other_name():
    assert renaming({"norm": "n"})("9 norms") is None
