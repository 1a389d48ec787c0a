"""Whatever stands in the place of an argument, what comes out is an answer or this project's error.

Every function and method that `import pvt_ref` gives is called with good arguments, of which one at
a time is replaced by each of a catalogue of things that people type or pass on by mistake.
"""

import inspect
import math
from dataclasses import replace
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from PIL import Image
from strategies import normal, random_params, rng_of

import pvt_ref
from pvt_ref import VARIANTS, VITS, Model, ModelInfo, Preprocessing, PVTError
from pvt_ref.report.times import time_stages

SIZES = {
    "img_size": 32,
    "num_classes": 5,
    "embed_dims": (4, 8, 4, 8),
    "num_heads": (1, 2, 1, 2),
    "mlp_ratios": (1, 1, 1, 1),
    "depths": (1, 1, 1, 1),
}
SMALL = replace(VARIANTS["pvt_tiny"], **SIZES)
PARAMS = random_params(SMALL, 1)
MODEL = Model(PARAMS, SMALL)
IMAGES = normal(1, 1, 3, 32, 32)
LOGITS, CACHE = pvt_ref.forward_with_cache(PARAMS, IMAGES, SMALL)
MAPS, PYRAMID_CACHE = pvt_ref.forward_pyramid_with_cache(PARAMS, IMAGES, SMALL)
V2 = replace(VARIANTS["pvt_v2_b0"], **SIZES)
VIT = replace(VITS["deit_s_16"], img_size=32, num_classes=5, embed_dim=8, depth=2, num_heads=2)
V2_PARAMS, VIT_PARAMS = random_params(V2, 1), random_params(VIT, 1)
BARE = replace(SMALL, num_classes=0)
_HEAD = pvt_ref.SemanticFPNHead(neck_channels=4, channels=4)
SCENES = pvt_ref.with_segmentation_head(MODEL, _HEAD, 3, rng_of(1))
TWO = normal(2, 2, 3, 32, 32)
SCENE_CACHE = pvt_ref.forward_with_cache(SCENES.params, TWO, SCENES.config, batch_statistics=True)[
    1
]
PICTURE = Image.new("RGB", (40, 40), "red")

WRONG: dict[str, Any] = {
    "none": None,
    "zero": 0,
    "five": 5,
    "minus one": -1,
    "half": 0.5,
    "true": True,
    "huge": 10**30,
    "enormous": 10**5000,
    "minus huge": -(10**30),
    "nan": math.nan,
    "infinity": math.inf,
    "complex": 1j,
    "numpy scalar": np.float64(0.5),
    "numpy bool": np.True_,
    "text": "x",
    "no text": "",
    "long text": "x" * 100_000,
    "nul text": "a\0b",
    "surrogate": "a\udc80b",
    "variant": "pvt_tiny",
    "bytes": b"x",
    "list": [],
    "list of none": [None],
    "nested list": [[1, 2], [3]],
    "list of texts": ["a", "b"],
    "four numbers": (1, 2, 3, 4),
    "tuple": (),
    "pair": (32, "x"),
    "dict": {},
    "dict of numbers": {"a": 1, 2: 3},
    "set": {1, 2},
    "range": range(3),
    "generator": (x for x in ()),
    "object": object(),
    "class": int,
    "function": len,
    "module": np,
    "0-d array": np.array(1.0),
    "empty array": np.array([]),
    "array": np.ones((2, 3)),
    "pixels": np.zeros((4, 4, 3), np.uint8),
    "unnormalised": np.linspace(0, 1, 3072).reshape(1, 3, 32, 32),
    "array of text": np.array(["a", "b"]),
    "object array": np.array([None, 1], dtype=object),
    "bool array": np.ones((1, 3, 32, 32), bool),
    "dates": np.zeros(3, "M8[s]"),
    "structured": np.zeros(3, [("a", "f4")]),
    "half array": np.full((1, 3, 32, 32), 1e-4, np.float16),
    "infinite array": np.full((1, 3, 32, 32), np.inf),
    "masked": np.ma.masked_array(np.ones((1, 3, 32, 32))),
    "masked pixels": np.ma.masked_array(np.ones((4, 4, 3), np.uint8)),
    "tensor": torch.zeros(1, 3, 32, 32),
    "0-d tensor": torch.tensor(1),
    "tensor with gradient": torch.zeros(5, requires_grad=True),
    "list of tensors": [torch.zeros(3, 32, 32)],
    "another library": array_api_strict.ones((1, 3, 32, 32)),
    "picture": PICTURE,
    "dtype": np.dtype("float32"),
    "config": SMALL,
    "vit": VITS["deit_s_16"],
    "small vit": VIT,
    "version 2": V2,
    "params": PARAMS,
    "params of a vit": VIT_PARAMS,
    "params of version 2": V2_PARAMS,
    "model": MODEL,
    "cache": CACHE,
    "pyramid cache": PYRAMID_CACHE,
    "ops": pvt_ref.REFERENCE,
    "rng": np.random.default_rng(0),
    "old rng": np.random.RandomState(0),
}


def consumed(function):
    """The function, whose iterator is read to its end."""

    def call(*args, **kwargs):
        return list(function(*args, **kwargs))

    call.__signature__ = inspect.signature(function)
    return call


def cases(tmp_path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """By name: what is called, and good arguments."""
    net = {"params": PARAMS, "images": IMAGES, "config": SMALL, "ops": None}
    v2_net = {**net, "params": V2_PARAMS, "config": V2}
    vit_net = {**net, "params": VIT_PARAMS, "config": VIT}
    file = str(tmp_path / "model.safetensors")
    pvt_ref.save(file, MODEL)
    photo = str(tmp_path / "photo.png")
    PICTURE.save(photo)
    vit = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4}
    vit |= {"img_size": 224, "in_chans": 3, "num_classes": 1000, "qkv_bias": True}
    vit |= dict.fromkeys(("drop_rate", "attn_drop_rate", "drop_path_rate"), 0.0)
    vit |= {"qk_scale": None, "norm_eps": 1e-6, "position_resize": "bicubic"}
    config = {
        name: getattr(SMALL, name) for name in inspect.signature(pvt_ref.PVTConfig).parameters
    }
    v2 = {name: getattr(V2, name) for name in inspect.signature(pvt_ref.PVTv2Config).parameters}
    info = {"title": "", "classes": (), "preprocessing": Preprocessing(), "training": {}}
    info["colours"] = ()
    segmentor = {"backbone": BARE, "head": pvt_ref.SemanticFPNHead(), "num_classes": 3}
    return {
        "Model": (Model, {"params": PARAMS, "config": SMALL, "source": "", "info": ModelInfo()}),
        "Model.__call__": (MODEL, {"images": IMAGES, "ops": None}),
        "Model.preprocess": (MODEL.preprocess, {"images": PICTURE, "size": 32}),
        "Model.predict": (MODEL.predict, {"images": [PICTURE], "top": 2, "size": 32}),
        "Model.predict of floats": (MODEL.predict, {"images": IMAGES, "top": 2}),
        "Model.predict_each": (
            consumed(MODEL.predict_each),
            {"images": [PICTURE], "top": 2, "size": 32},
        ),
        "Model.pyramid": (MODEL.pyramid, {"images": IMAGES, "ops": None, "blocks": None}),
        "Model.summary": (MODEL.summary, {"size": 32}),
        "ModelInfo": (ModelInfo, info),
        "PVTConfig": (pvt_ref.PVTConfig, config),
        "PVTConfig.of_stage": (SMALL.of_stage, {"i": 1}),
        "PVTConfig.grids": (SMALL.grids, {"height": 32, "width": 32}),
        "PVTv2Config": (pvt_ref.PVTv2Config, v2),
        "PVTv2Config.grids": (V2.grids, {"height": 32, "width": 32}),
        "PVTv2Config.of_stage": (V2.of_stage, {"i": 1}),
        "Preprocessing": (
            Preprocessing,
            {"mode": "RGB", "mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0)},
        ),
        "SETRHead": (pvt_ref.SETRHead, {"upsampling": "pup", "channels": 4}),
        "SegmentorConfig": (pvt_ref.SegmentorConfig, segmentor),
        "SegmentorConfig.fitting_size": (SCENES.config.fitting_size, {"height": 33, "width": 40}),
        "SegmentorConfig.grids": (SCENES.config.grids, {"height": 32, "width": 32}),
        "SegmentorConfig.with_drop_path_rate": (
            SCENES.config.with_drop_path_rate,
            {"rate": 0.1},
        ),
        "SemanticFPNHead": (
            pvt_ref.SemanticFPNHead,
            {"neck_channels": 4, "channels": 4, "drop_rate": 0.1},
        ),
        "Model.segment": (SCENES.segment, {"pictures": [PICTURE], "size": 32, "window": None}),
        "Model.segment_each": (
            consumed(SCENES.segment_each),
            {"pictures": [PICTURE], "size": 32, "window": None},
        ),
        "ViTConfig": (pvt_ref.ViTConfig, vit),
        "ViTConfig.grids": (VIT.grids, {"height": 32, "width": 32}),
        "attention_maps": (pvt_ref.attention_maps, {**net, "stages": (1, 4)}),
        "backward": (
            pvt_ref.backward,
            {"params": PARAMS, "cache": CACHE, "dlogits": LOGITS, "config": SMALL, "ops": None},
        ),
        "backward_pyramid": (
            pvt_ref.backward_pyramid,
            {
                "params": PARAMS,
                "cache": PYRAMID_CACHE,
                "dmaps": MAPS,
                "config": SMALL,
                "ops": None,
            },
        ),
        "blocked_ops": (pvt_ref.blocked_ops, {"threads": 1, "elements": 1000}),
        "from_dlpack": (pvt_ref.from_dlpack, {"x": np.ones(2)}),
        "count_cost": (
            pvt_ref.count_cost,
            {"config": SMALL, "size": 32, "batch": 1, "dtype": "float32", "pyramid": False},
        ),
        "Cost.of_stage": (pvt_ref.count_cost(SMALL).of_stage, {"stage": 1}),
        "cross_entropy": (
            pvt_ref.cross_entropy,
            {
                "logits": LOGITS,
                "targets": np.array([1]),
                "label_smoothing": 0.1,
                "reduction": "mean",
                "ignore_index": None,
                "class_weights": None,
            },
        ),
        "forward": (pvt_ref.forward, net),
        "forward_pyramid": (pvt_ref.forward_pyramid, {**net, "blocks": None}),
        "forward_pyramid_with_cache": (
            pvt_ref.forward_pyramid_with_cache,
            {**net, "rng": None, "blocks": None},
        ),
        "forward_pyramid of a ViT": (pvt_ref.forward_pyramid, {**vit_net, "blocks": [0, 1]}),
        "forward_pyramid of version 2": (pvt_ref.forward_pyramid, {**v2_net, "blocks": None}),
        "forward_with_cache": (
            pvt_ref.forward_with_cache,
            {**net, "rng": None, "batch_statistics": False},
        ),
        "forward_with_cache of a segmentation network": (
            pvt_ref.forward_with_cache,
            {
                "params": SCENES.params,
                "images": TWO,
                "config": SCENES.config,
                "rng": None,
                "ops": None,
                "batch_statistics": True,
            },
        ),
        "from_state_dict": (
            pvt_ref.from_state_dict,
            {"state": pvt_ref.to_state_dict(PARAMS), "config": SMALL},
        ),
        "init_params": (
            pvt_ref.init_params,
            {"config": SMALL, "rng": rng_of(0), "dtype": "float32"},
        ),
        "export_onnx": (
            pvt_ref.export_onnx,
            {"model": MODEL, "path": str(tmp_path / "x.onnx"), "what": "logits", "size": 32}
            | dict.fromkeys(("float16", "resized", "with_preprocessing"), False),
        ),
        "load": (pvt_ref.load, {"name": file, "config": None, "eps": None, "mirror": None}),
        "load_image": (pvt_ref.load_image, {"source": photo, "size": 32}),
        "normalize": (pvt_ref.normalize, {"pixels": np.zeros((4, 4, 3), np.uint8)}),
        "pad_to_multiple": (pvt_ref.pad_to_multiple, {"images": IMAGES, "multiple": 32}),
        "prepare": (pvt_ref.prepare, {"params": PARAMS, "config": SMALL, "size": 32}),
        "preprocess": (pvt_ref.preprocess, {"images": [PICTURE], "size": 32}),
        "save": (
            pvt_ref.save,
            {"path": str(tmp_path / "saved.safetensors"), "model": MODEL, "dtype": None},
        ),
        "time_stages": (time_stages, {**net, "repeats": 1}),
        "to_device": (pvt_ref.to_device, {"tree": PARAMS, "device": "cpu"}),
        "to_numpy": (pvt_ref.to_numpy, {"tree": PARAMS}),
        "to_state_dict": (pvt_ref.to_state_dict, {"params": PARAMS}),
        "updated": (pvt_ref.updated, {"params": SCENES.params, "cache": SCENE_CACHE}),
        "with_segmentation_head": (
            pvt_ref.with_segmentation_head,
            {"model": MODEL, "head": _HEAD, "num_classes": 3, "rng": rng_of(0)},
        ),
        "with_channels": (pvt_ref.with_channels, {"model": MODEL, "in_chans": 1}),
        "with_image_size": (pvt_ref.with_image_size, {"model": MODEL, "img_size": 64}),
        "with_new_head": (
            pvt_ref.with_new_head,
            {"model": MODEL, "num_classes": 3, "rng": rng_of(0)},
        ),
    }


#: What is not wrong, and would be done: for ever.
TRUE_TO_THE_WORD = {("time_stages", "repeats", name) for name in ("huge", "enormous")}

#: Names that are no functions of arguments a caller types, or that others above stand for.
NOT_CALLED = {
    "OnnxFile",  # what export_onnx returns
    "Operation",  # a pair of functions
    "Ops",  # a table of operations
    "PVTError",
    "PVTParams",  # checked where it is used
    "PVTv2Params",  # as PVTParams
    "SegmentorParams",  # likewise
    "Prepared",  # likewise
    "Prediction",
    "REFERENCE",
    "VARIANTS",
    "VITS",
    "capture",  # on a device: test_capture.py
    "ViTParams",  # checked where it is used
}


def test_every_public_name_is_in_the_catalogue(tmp_path):
    called = {name.split(".")[0].split()[0] for name in cases(tmp_path)}
    assert set(pvt_ref.__all__) - called == NOT_CALLED
    methods = {
        f"Model.{name}"
        for name, value in vars(Model).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert methods <= set(cases(tmp_path))


def test_good_arguments_are_accepted_and_all_of_them_are_tried(tmp_path):
    for name, (function, good) in cases(tmp_path).items():
        function(**good)
        known = set(inspect.signature(function).parameters)
        missing = known - set(good) - {"size", "entry"}
        assert not missing, f"{name}: {missing}"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_gives_an_answer_or_this_projects_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # "x" is a path, too
    failures = []
    for where, (function, good) in cases(tmp_path).items():
        for argument in good:
            if (where, argument, name) in TRUE_TO_THE_WORD:
                continue  # it would take as long as was asked for
            try:
                with np.errstate(all="ignore"):
                    function(**{**good, argument: WRONG[name]})
            except PVTError as error:
                # a path is shown whole, and a state lists all keys
                known = where == "from_state_dict" or argument in ("name", "path", "source")
                if len(str(error)) > 5000 and not known:
                    failures.append(f"{where}({argument}=...): {len(str(error))} characters")
            except Exception as error:
                failures.append(f"{where}({argument}=...): {type(error).__name__}: {error}"[:300])
    assert not failures, "\n".join(failures)
