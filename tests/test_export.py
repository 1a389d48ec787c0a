"""What is exported to ONNX computes what the network computes, in ONNX Runtime."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import toy
from closeness import assert_near
from loose import loose
from segmentors import PVT, PVT_V2, SEGMENTORS, VIT, params_of

import pvt_ref
from pvt_ref import REFERENCE, Model, PVTError, export_onnx
from pvt_ref.__main__ import main
from pvt_ref.dense import resize_logits
from pvt_ref.export.onnx_file import _encoded
from pvt_ref.export.symbols import BATCH, Graph
from pvt_ref.export.twins import SYMBOLIC
from pvt_ref.layers.batch_norm import BatchNormBuffers, BatchNormParams, batch_norm
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.models.architecture import count_keys, param_shapes
from pvt_ref.models.segmentor.config import SegmentorConfig
from pvt_ref.tree import map_arrays
from pvt_ref.zoo import SHIPPED

PICTURE = Path(__file__).parents[1] / "examples" / "chelsea.jpg"

#: Relative, of float32 computed in another order, against float64.
FLOAT32 = 2e-6

CLASSIFIERS = {
    "pvt": dataclasses.replace(PVT, num_classes=5),
    "pvt_v2": dataclasses.replace(PVT_V2, num_classes=5),
    "linear": dataclasses.replace(PVT_V2, num_classes=5, linear=True),
    "vit": dataclasses.replace(VIT, num_classes=5),
    "vit, bicubic": dataclasses.replace(VIT, num_classes=5, position_resize="bicubic"),
}
BACKBONES = {"pvt": PVT, "pvt_v2": PVT_V2, "vit": VIT}
NETWORKS = CLASSIFIERS | {f"{name} with a head": config for name, config in SEGMENTORS.items()}


def model_of(config, dtype: Any = np.float32) -> Model:
    return Model(params_of(config, dtype=dtype), config)


def images_of(config, B=2, size=(32, 32)) -> np.ndarray:
    shape = (B, config.in_chans, *size)
    return np.random.default_rng(B).standard_normal(shape).astype(np.float32)


def run(path, x) -> dict[str, Any]:
    """Outputs by name."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what it refuses is looked at here
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {session.get_inputs()[0].name: x}), strict=True))


def assert_same(path, config, what: Any = "logits", batches=(1, 3), size=(32, 32)) -> None:
    """The file computes what the network does in float64, up to float32."""
    params = params_of(config)
    for B in batches:
        x = images_of(config, B, size)
        found, expected = run(path, x), {}
        if "logits" in what:
            expected["logits"] = pvt_ref.forward(params, x, config)
        if "pyramid" in what:
            maps = pvt_ref.forward_pyramid(params, x, config)
            expected |= {f"F{i}": y for i, y in enumerate(maps, start=1)}
        if "attention" in what:
            maps = pvt_ref.attention_maps(params, x, config)
            expected |= {f"A{stage}.{block}": A for (stage, block), A in maps.items()}
        assert list(found) == list(expected)
        for name, y in found.items():
            assert y.dtype == np.float32
            assert_near(y, expected[name], FLOAT32, f"{name} of {B}")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.onnx"


# What it computes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifiers_logits(name, path):
    config = CLASSIFIERS[name]
    export_onnx(model_of(config), path)
    assert_same(path, config)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_pyramids_maps(name, path):
    config = BACKBONES[name]
    export_onnx(model_of(config), path, what="pyramid")
    assert_same(path, config, "pyramid")


#: Everything at once: classifiers, of which a PVT runs stage 4 twice, a backbone, and heads.
ALL = ("logits", "pyramid", "attention")


@pytest.mark.parametrize("name", NETWORKS)
def test_all_outputs_of_one_graph(name, path):
    config = NETWORKS[name]
    written = export_onnx(model_of(config), path, what=ALL)
    assert_same(path, config, ALL)
    for key, y in run(path, images_of(config, 3)).items():
        assert written.outputs[key] == ("batch", *y.shape[1:])


@pytest.mark.parametrize("name", BACKBONES)
def test_attention_alone_of_a_classifier_and_of_a_backbone(name, path):
    for config in (BACKBONES[name], CLASSIFIERS[name]):
        export_onnx(model_of(config), path, what="attention")
        assert_same(path, config, ["attention"])


def test_what_passes_share_is_computed_once(path):
    config = CLASSIFIERS["pvt"]
    counts = {}
    for what in ("logits", ("attention", "logits"), ("pyramid", "logits")):
        export_onnx(model_of(config), path, what=what)
        counts[what] = [node.name for node in onnx.load(path).graph.node]
    first, with_attention, with_maps = counts.values()
    assert sorted(with_attention) == sorted(first)  # the weights are there, they are only shown
    assert set(first) < set(with_maps)
    again = set(with_maps) - set(first)
    assert all(re.match(r"(pos_embed4|block4|(Reshape|Transpose)(_\d+)?$)", name) for name in again)


@pytest.mark.parametrize("name", SEGMENTORS)
def test_a_segmentation_networks_logits(name, path):
    config = SEGMENTORS[name]
    export_onnx(model_of(config), path)
    assert_same(path, config)


@pytest.mark.parametrize("name", ["pvt", "vit, bicubic"])
def test_another_size_resizes_the_position_tables(name, path):
    config = CLASSIFIERS[name]
    export_onnx(model_of(config), path, size=(64, 96))
    assert_same(path, config, size=(64, 96))


@pytest.mark.parametrize("name", ["pvt", "pvt_v2", "pup"])
def test_a_size_that_is_stretched_and_logits_at_the_size_of_the_image(name, path):
    config, size = SEGMENTORS[name], (40, 52)
    export_onnx(model_of(config), path, size=size)
    assert_same(path, config, batches=[2], size=size)
    written = export_onnx(model_of(config), path, size=size, resized=True)
    assert written.outputs == {"logits": ("batch", 4, *size)}
    x = images_of(config, 2, size)
    exact = resize_logits(pvt_ref.forward(params_of(config), x, config), size)
    assert_near(run(path, x)["logits"], exact, FLOAT32)


@pytest.mark.parametrize("what", ["logits", "pyramid", ALL])
def test_a_version_2_takes_any_size_if_it_is_left_open(what, path):
    config = CLASSIFIERS["pvt_v2"]
    written = export_onnx(model_of(config), path, what=what, size="any")
    assert written.input == ("images", "float32", ("batch", 3, "height", "width"))
    for name, shape in written.outputs.items():
        if name.startswith("A"):
            assert shape[2:] == (f"{name}_queries", f"{name}_keys")
    for size in ((32, 32), (64, 96), (32, 160)):
        assert_same(path, config, what, size=size)


def test_left_open_it_refuses_a_size_that_spatial_reduction_would_cut(path):
    config = CLASSIFIERS["pvt_v2"]
    model = model_of(config)
    export_onnx(model, path, size="any")
    for B in (1, 4):
        x = images_of(config, B, (40, 32))
        with pytest.raises(PVTError, match="40x32 does not fit"):
            model(x)
        with pytest.raises(Exception, match="Non-zero status code"):
            run(path, x)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_on_a_photo(name, path):
    model = pvt_ref.load(name)
    grey = model.info.preprocessing.mode == "L"
    x = model.preprocess(PICTURE)
    export_onnx(model, path)
    assert_near(run(path, x)["logits"], model(x), 10 * FLOAT32)  # float32, both of them
    written = export_onnx(model, path, with_preprocessing=True)
    pixels = model.info.preprocessing.pixels([PICTURE], model.config.img_size)
    assert pixels.shape[1:] == written.input[2][1:]
    assert pixels.shape[-1] == (1 if grey else 3)
    assert_near(run(path, pixels)["logits"], model(x), 10 * FLOAT32)


def test_pixels_of_any_size(path):
    model = pvt_ref.Model(params_of(PVT_V2, dtype=np.float32), PVT_V2)
    export_onnx(model, path, what="pyramid", size="any", with_preprocessing=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 32, 3), np.uint8)
    expected = model.pyramid(pvt_ref.normalize(pixels))
    for y, found in zip(expected, run(path, pixels).values(), strict=True):
        assert_near(found, y, FLOAT32)


def test_a_network_of_a_few_plain_expressions(path):
    with toy.entered():
        config = toy.ToyConfig()
        params = pvt_ref.init_params(config, np.random.default_rng(0))
        x = images_of(config, 2, (8, 12))
        export_onnx(Model(params, config), path, size=(8, 12))
        assert_near(run(path, x)["logits"], pvt_ref.forward(params, x, config), FLOAT32)
        export_onnx(Model(params, config), path, what="pyramid", size="any")
        (expected,) = pvt_ref.forward_pyramid(params, x, config)
        assert_near(run(path, x)["F1"], expected, FLOAT32)


def test_norms_have_the_eps_that_they_are_given_or_their_own(path):
    x = 1e-3 * np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    ones, small = np.ones(3, np.float32), np.full(3, 1e-5, np.float32)
    buffers = BatchNormBuffers(0 * ones, small, np.array(0))
    for op, p, args in (
        (layer_norm, LayerNormParams(ones, ones), (3e-6,)),
        (batch_norm, BatchNormParams(ones, ones), (buffers, False)),
        (batch_norm, BatchNormParams(ones, ones), (buffers, False, 3e-6)),
    ):
        graph = Graph({})
        symbol = graph.input("x", (BATCH, 4, 4, 3), np.float32)
        y, _ = SYMBOLIC[op].forward(p, symbol, SYMBOLIC, *args)
        path.write_bytes(_encoded(graph, {"y": y}, frozenset(), "norm", {}))
        exact, _ = op.forward(p, x, REFERENCE, *args, keep=False)
        assert_near(run(path, x)["y"], exact, FLOAT32)


def test_symbols_have_the_shapes_of_arrays_and_refuse_what_a_graph_cannot_say(path):
    graph = Graph({})
    x = graph.input("x", (BATCH, 6, 4), np.float32)
    assert x[:, 1:5:2, 0].shape == (BATCH, 2)
    assert x[..., -1:].shape == (BATCH, 6, 1)
    assert graph.reshape(x, (-1, 4)).shape == (-6, 4)
    assert graph.reshape(graph.reshape(x, (-1, 4)), (BATCH, 2, 3, 4)).shape == (BATCH, 2, 3, 4)
    assert graph.reshape(x, x.shape) is x
    assert graph.permute_dims(graph.permute_dims(x, (0, 2, 1)), (0, 2, 1)) is x
    for wrong in (
        lambda: x[1:],
        lambda: graph.reshape(x, (BATCH, 5, 4)),
        lambda: graph.reshape(x, (24,)),
        lambda: x @ np.ones((5, 2), np.float32),
        lambda: x + np.ones((6, 3), np.float32),
        lambda: graph.broadcast_to(np.ones((1, 1, 4), np.float32), (2, 1, 4)),
    ):
        with pytest.raises(ValueError, match=r"cannot|no matrix product"):
            wrong()
    with pytest.raises(NotImplementedError):
        x[:, 0, :] = x[:, 1, :]
    table = np.ones((6, 4), np.float32)
    other = 2 * table
    graph = Graph({id(table): "table", id(other): "table"})
    y = graph.input("y", (BATCH, 6, 4), np.float32) + table
    with pytest.raises(ValueError, match="two arrays want to be called table"):
        y + other


def test_what_is_made_of_a_weight_has_its_name_and_a_number_where_it_is_not_the_same():
    table = np.ones((6, 4), np.float32)
    graph = Graph({id(table): "table"})
    assert graph.called(table[:3], like=table) is not table
    for x in (table[:3].copy(), table.copy(), table[:3].copy(), table.copy()):
        graph.input("x", (BATCH, *x.shape), np.float32) + graph.called(x, like=table)
    assert {key: x.shape for key, x in graph.constants.items()} == {
        "table": (3, 4),
        "table/2": (6, 4),
    }
    assert graph.called(other := table[1:], like=table[2:]) is other  # no weight


# What is in the file ------------------------------------------------------------------------------


def weights_in(path) -> dict[str, np.ndarray]:
    tensors = onnx.load(path).graph.initializer
    return {t.name: onnx.numpy_helper.to_array(t) for t in tensors if "constant" not in t.name}


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_the_weights_lie_under_their_keys(config, path):
    model = model_of(config)
    export_onnx(model, path)
    found = weights_in(path)
    expected = pvt_ref.to_state_dict(model.params)
    assert set(found) == set(param_shapes(config)) - count_keys(config)
    for key, x in found.items():
        np.testing.assert_array_equal(x, expected[key], err_msg=key)


def test_of_any_size_it_also_has_all_keys(path):
    config = CLASSIFIERS["pvt_v2"]
    export_onnx(model_of(config), path, size="any", float16=True)
    found = weights_in(path)
    assert set(found) == set(param_shapes(config))
    assert {x.dtype for x in found.values()} == {np.dtype(np.float16)}
    assert found["block1.0.attn.sr.weight"].shape == (4, 4 * 4 * 4)  # as a matrix


def test_the_file_says_what_it_is(path):
    model = pvt_ref.load("digits")
    written = export_onnx(model, path)
    assert written.path == path
    assert written.outputs == {"logits": ("batch", 10)}
    assert str(written).splitlines()[1] == "input images: float32 (batch, 1, 32, 32)"
    file = onnx.load(path)
    told = {entry.key: entry.value for entry in file.metadata_props}
    assert told["title"] == model.info.title
    assert json.loads(told["classes"]) == list(model.classes)
    assert pvt_ref.Preprocessing(**json.loads(told["preprocessing"])) == model.info.preprocessing
    values = json.loads(told["config"])
    assert values.pop("name") == "pvt"
    assert pvt_ref.PVTConfig(**values) == model.config
    assert told["weights"] == "float32"
    assert (file.producer_name, file.producer_version) == ("pvt_ref", pvt_ref.__version__)
    assert (file.ir_version, file.opset_import[0].version) == (9, 20)


def test_the_same_model_gives_the_same_bytes(path):
    model = model_of(SEGMENTORS["pvt"])
    export_onnx(model, path)
    first = path.read_bytes()
    export_onnx(model, path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_no_node_is_idle_or_undoes_the_one_before(config, path):
    export_onnx(model_of(config), path)
    graph = onnx.load(path).graph
    makers = {output: node for node in graph.node for output in node.output}
    read = {name for node in graph.node for name in node.input} | {"logits"}
    assert set(makers) <= read
    assert len({node.name for node in graph.node}) == len(graph.node)
    told = [(n.op_type, *n.input, str(n.attribute)) for n in graph.node]
    assert len(set(told)) == len(told)  # nothing is computed twice
    for node in graph.node:
        before = makers.get(node.input[0])
        if before is not None and node.op_type in ("Transpose", "Reshape"):
            assert before.op_type != node.op_type, node.name
        if node.op_type == "Transpose":
            assert list(node.attribute[0].ints) != sorted(node.attribute[0].ints), node.name


def test_nodes_are_named_by_the_weights_that_they_use(path):
    export_onnx(model_of(CLASSIFIERS["pvt"]), path)
    graph = onnx.load(path).graph
    names = [node.name for node in graph.node]
    for name in ("patch_embed1/Conv", "block2.1.attn.sr/Conv", "block1.0.mlp.gelu/Gelu"):
        assert name in names
    assert "block3.0.attn.attention.softmax/Softmax" in names
    # nothing stands between the two products of an MLP but its GELU
    inputs = {node.name: node.input[0] for node in graph.node}
    assert inputs["block1.0.mlp.fc2/Gemm"] == "block1.0.mlp.gelu/Gelu"
    assert inputs["block1.0.mlp.gelu/Gelu"] == "block1.0.mlp.fc1/Gemm"


def test_float16_halves_the_file_and_rounds_nothing_but_the_weights(path):
    config = SEGMENTORS["pvt"]
    model = model_of(config)
    written = export_onnx(model, path, float16=True)
    assert written.weights == "float16, rounded from float32"
    rounded = map_arrays(
        lambda x: x.astype(np.float16).astype(np.float64) if x.dtype.kind == "f" else x,
        model.params,
    )
    assert {x.dtype for x in weights_in(path).values()} == {np.dtype(np.float16)}
    x = images_of(config)
    assert_near(run(path, x)["logits"], pvt_ref.forward(rounded, x, config), FLOAT32)
    # a table that was resized has other digits, and is stored with all of them
    export_onnx(model, path, float16=True, size=(64, 96))
    assert weights_in(path)["backbone.pos_embed1"].dtype == np.float32
    x = images_of(config, size=(64, 96))
    assert_near(run(path, x)["logits"], pvt_ref.forward(rounded, x, config), FLOAT32)


def test_float64_is_rounded_and_it_says_so(path):
    config = CLASSIFIERS["vit"]
    written = export_onnx(model_of(config, np.float64), path)
    assert written.weights == "float32, rounded from float64"
    assert_same(path, config)


# What is refused ----------------------------------------------------------------------------------


def refusal(model, path, **options) -> str:
    with pytest.raises(PVTError) as caught:
        export_onnx(model, path, **options)
    assert not path.parent.exists() or not list(path.parent.iterdir())  # nothing half-written
    return str(caught.value)


def test_without_onnx_it_says_what_to_install(path, monkeypatch):
    model = model_of(CLASSIFIERS["vit"])
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install onnx" in refusal(model, path)
    with pytest.raises(ImportError):
        export_onnx(model, path)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("pvt", {"what": "maps"}, "what is 'maps'; it must be one or several of 'logits', "),
        ("pvt", {"what": ("logits", "A")}, "what is ('logits', 'A'); it must be"),
        ("pvt", {"what": []}, "what is []; it must be"),
        ("pvt", {"what": 3}, "what is 3; it must be"),
        ("pvt", {"size": (32, 33)}, "32x33 does not fit"),
        ("pvt", {"size": "all"}, "size is 'all'"),
        ("pvt", {"size": "any"}, "pos_embed1 is made for one size"),
        ("linear", {"size": "any"}, "block1.0.attn.pool is made for one size"),
        ("vit", {"size": "any"}, "pos_embed is made for one size"),
        ("pvt", {"float16": 1}, "float16 is 1; it must be True or False"),
        ("pvt", {"resized": True}, "not for the logits of a PVT"),
        ("pvt", {"resized": True, "what": "pyramid"}, "not for feature maps"),
    ],
)
def test_options_that_do_not_fit(name, options, words, path):
    assert words in refusal(model_of(CLASSIFIERS[name]), path, **options)


def test_a_segmentation_network_of_any_size_is_refused_whatever_its_backbone(path):
    for config in SEGMENTORS.values():
        assert "made for one size" in refusal(model_of(config), path, size="any")


def test_a_bare_backbone_has_no_logits_and_a_network_without_maps_no_pyramid(path, monkeypatch):
    assert "bare backbone" in refusal(model_of(PVT), path)
    with toy.entered():
        row = dataclasses.replace(toy.TOY, forward_pyramid=None, backward_pyramid=None)
        pvt_ref.models.architecture.register(row)
        config = toy.ToyConfig()
        model = Model(pvt_ref.init_params(config, np.random.default_rng(0)), config)
        assert "a toy has no pyramid" in refusal(model, path, what="pyramid")
        assert "a toy has no block with attention" in refusal(model, path, what="attention")


def test_preprocessing_of_other_channels(path):
    model = pvt_ref.with_channels(model_of(CLASSIFIERS["vit"]), 4)
    assert "in_chans=4" in refusal(model, path, with_preprocessing=True)


def test_a_path_that_is_none_or_cannot_be_written(path):
    model = model_of(CLASSIFIERS["vit"])
    assert "network.onnx" in refusal(model, path.with_suffix(".pb"))
    assert "could not be written" in refusal(model, path.parent / "nowhere" / "network.onnx")
    path.write_bytes(b"old")
    path.chmod(0o444)
    with pytest.raises(PVTError, match="read-only"):
        export_onnx(model, path)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(PVTError, match=r"model is a \w+Path; it must be a Model"):
        loose(export_onnx)(path, model)


def test_weights_beyond_the_dtype_that_they_are_stored_in(path):
    config = CLASSIFIERS["vit"]
    model = model_of(config, np.float64)
    model.params.head.weight[0, 0] = 1e5
    assert "Leave float16 out" in refusal(model, path, float16=True)
    model.params.head.weight[0, 0] = 1e300
    assert "head.weight" in refusal(model, path)


def test_a_file_that_onnx_finds_wrong_is_not_written(path, monkeypatch):
    def refuse(model, full_check):
        raise onnx.checker.ValidationError("wrong")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(onnx.checker.ValidationError):
        export_onnx(model_of(CLASSIFIERS["vit"]), path)
    assert not path.exists()


# On the command line ------------------------------------------------------------------------------


def test_the_command_line_exports_and_replaces_only_when_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "digits"]) == 0
    out = capsys.readouterr().out
    assert "written to digits.onnx, weights float32\n" in out
    assert "output logits: float32 (batch, 10)\n" in out
    assert main(["export", "digits", "--float16"]) == 2
    assert "digits.onnx' exists already" in capsys.readouterr().err
    before = (tmp_path / "digits.onnx").stat().st_size
    assert main(["export", "digits", "--float16", "--force"]) == 0
    assert (tmp_path / "digits.onnx").stat().st_size < 0.6 * before
    capsys.readouterr()
    options = ["--pyramid", "--size", "64", "32", "--pixels", "-o", "maps.onnx"]
    assert main(["export", "digits", *options]) == 0
    out = capsys.readouterr().out
    assert "input pixels: uint8 (batch, 64, 32, 1)\n" in out
    assert "output F4: " in out


def test_the_command_line_adds_attention_to_logits_or_maps(tmp_path, capsys):
    target, depths = str(tmp_path / "a.onnx"), pvt_ref.load("digits").config.depths
    blocks = [f"A{i}.{j}" for i, depth in enumerate(depths, start=1) for j in range(depth)]
    for more, first in (([], ["logits"]), (["--pyramid"], ["F1", "F2", "F3", "F4"])):
        assert main(["export", "digits", "--attention", "--force", "-o", target, *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        outputs = [line.split()[1].rstrip(":") for line in lines if line.startswith("output ")]
        assert outputs == first + blocks


def test_the_command_line_exports_a_segmentation_network(tmp_path, capsys):
    config = dataclasses.replace(SEGMENTORS["pvt_v2"], num_classes=3)
    assert isinstance(config, SegmentorConfig)
    source, target = tmp_path / "a.safetensors", tmp_path / "a.onnx"
    pvt_ref.save(source, model_of(config))
    assert main(["export", str(source), "-o", str(target), "--resized", "--size", "64"]) == 0
    assert "output logits: float32 (batch, 3, 64, 64)\n" in capsys.readouterr().out
    source = tmp_path / "b.safetensors"
    pvt_ref.save(source, model_of(PVT_V2))
    arguments = ["export", str(source), "-o", str(target), "--force", "--pyramid", "--any-size"]
    assert main(arguments) == 0
    assert "(batch, 4, F1_height, F1_width)" in capsys.readouterr().out
