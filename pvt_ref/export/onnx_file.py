"""A network as an ONNX file: its own forward run on symbols, and its weights by key."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pvt_ref import __version__
from pvt_ref.api import check_has_classifier
from pvt_ref.app import Model
from pvt_ref.arrays import dtype_name, quietly
from pvt_ref.checkpoint.files import FilePath, as_path, cut_path
from pvt_ref.checkpoint.whole_file import write_whole
from pvt_ref.checks import Size, as_size, check_finite, check_flag, check_type
from pvt_ref.dense import resize_logits
from pvt_ref.errors import (
    CheckpointError,
    ConfigError,
    MissingPackageError,
    RangeError,
    printable,
    reason,
    shown,
)
from pvt_ref.export.symbols import BATCH, Dim, Graph, Node, Symbol
from pvt_ref.export.twins import ANY_SIZE, SIZED, SYMBOLIC
from pvt_ref.layers.attention import attention, attention_weights
from pvt_ref.models.architecture import architecture_of, config_to_dict
from pvt_ref.ops import Call
from pvt_ref.tree import first_array, map_arrays, named_arrays, to_numpy

#: The first version of the operators with a node for GELU, and the format that came with it: older
#: runtimes read no newer one.
_OPSET, _IR = 20, 9

#: What a graph can return, in this order.
_PARTS = ("logits", "pyramid", "attention")


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """A description of the file. A shape has names for sizes that vary: "batch", "height", "width";
    for attention weights, "queries" and "keys".

    Attributes:
        path: of the file.
        input: name, dtype and shape of the graph's input.
        outputs: shapes of its outputs, by name.
        weights: how they are stored, such as "float32, rounded from float64".
    """

    path: Path
    input: tuple[str, str, tuple[Any, ...]]
    outputs: dict[str, tuple[Any, ...]]
    weights: str

    def __str__(self) -> str:
        name, dtype, shape = self.input
        lines = [f"written to {printable(str(self.path))}, weights {self.weights}"]
        lines.append(f"input {name}: {dtype} ({', '.join(map(str, shape))})")
        lines += [
            f"output {k}: float32 ({', '.join(map(str, x))})" for k, x in self.outputs.items()
        ]
        return "\n".join(lines)


def export_onnx(
    model: Model,
    path: FilePath,
    *,
    what: str | Sequence[str] = "logits",
    size: Size | str | None = None,
    float16: bool = False,
    resized: bool = False,
    with_preprocessing: bool = False,
) -> OnnxFile:
    """Writes a network as an ONNX file, which ONNX Runtime, OpenVINO and others run.

    The file has the weights under the keys of the state dict, and its metadata hold classes,
    preprocessing and configuration as JSON. Batches may have any size. ``onnx.checker`` checks it
    before it is written; it appears complete or not at all. The same model gives the same bytes.
    Needs the package ``onnx``, the extra ``onnx``. The graph uses opset 20.

    Args:
        model: any model; arrays on a device are copied to the host.
        path: ends in ``.onnx``; its directory exists. An existing file of that name is replaced.
        what: ``"logits"``, one output of that name; ``"pyramid"``, outputs F1, F2, ..., as
            :func:`pvt_ref.forward_pyramid` returns them; ``"attention"``, outputs A1.0, A1.1, ...,
            for block 0 of stage 1 and so on, as :func:`pvt_ref.attention_maps`; or several of
            them, of one graph that computes what they share once.
        size: of the image, (H, W) or a side, in pixels, to which position tables are resized; None
            takes config.img_size. ``"any"``, for a PVT v2 without linear SRA, leaves it open: the
            graph takes what the network takes, and refuses other sizes when it runs.
        float16: store the weights in half the space, rounded to 11 bits. The graph casts them to
            float32, and computes in it.
        resized: of a segmentation network, logits at the size of the image, bilinearly resized as
            released, instead of at that of the head.
        with_preprocessing: the input is ``pixels``, (B, H, W, C) uint8 of that very size, and the
            graph normalises them; otherwise it is ``images``, (B, C, H, W) normalised float32.

    Returns:
        A description of the file. float64 weights are rounded to float32, and it says so.

    Raises:
        MissingPackageError: if the package onnx is not installed.
        CheckpointError: if path ends in something else, or the file cannot be written.
        ConfigError: if the model has no logits, no pyramid or no map to resize, size is "any" and
            something in it is made for one size, or it has no attention.
        ShapeError: if the model cannot take that size.
        RangeError: if what or a flag has another value.
        NonFiniteError: if a weight is not finite, also in the dtype that it is stored in.
        ArrayTypeError: if model is not a Model, or path no path.
    """
    check_type("model", model, Model, "from load(path) or Model(params, config)")
    for name, flag in (
        ("float16", float16),
        ("resized", resized),
        ("with_preprocessing", with_preprocessing),
    ):
        check_flag(name, flag)
    target, where = _checked_path(path)
    config, row = model.config, architecture_of(model.config)
    parts = _checked_parts(what)
    if "logits" in parts:
        check_has_classifier(config)
    if "pyramid" in parts and row.forward_pyramid is None:
        raise ConfigError(f"a {row.title} has no pyramid: no maps for dense prediction")
    if resized and not (row.dense and "logits" in parts):
        kind = f"the logits of a {row.title}" if "logits" in parts else "feature maps"
        raise ConfigError(f"resized is for logits of a segmentation network, not for {kind}")
    free = isinstance(size, str) and size == "any"
    side = config.size_multiple  # 3 and 5 of it: no axis of a map is 1, which would broadcast
    pixels = (3 * side, 5 * side) if free else as_size(config.img_size if size is None else size)
    config.grids(*pixels)  # refuses sizes that would lose pixels
    _import_onnx()  # before any work is done
    params, weights = _stored(model.params, float16)
    keys = {id(x): key for key, x in named_arrays(params)}
    graph = Graph(keys)
    images = _images(graph, model, pixels, free, with_preprocessing)
    outputs = _traced(graph, params, images, config, parts, free)
    if resized:
        outputs["logits"] = resize_logits(outputs["logits"], pixels)
    metadata = {
        "title": model.info.title,
        "classes": json.dumps(model.classes if config.has_classifier else []),
        "preprocessing": json.dumps(asdict(model.info.preprocessing)),
        "config": json.dumps({"name": row.name, **config_to_dict(config)}),
        "weights": weights,
    }
    half = frozenset(keys.values() if float16 else ())
    data = _encoded(graph, outputs, half, row.describe(config), metadata)
    try:
        write_whole(target, data)
    except OSError as error:
        raise CheckpointError(
            f"{where}: could not be written ({reason(error)}). An existing file of this name is "
            f"unchanged. Check that the directory exists, that it is writable, and that the disk "
            f"has {len(data)} bytes free"
        ) from error
    given = graph.given
    shapes = {name: _spoken(x, name) for name, x in outputs.items()}
    return OnnxFile(target, (given.name, dtype_name(given), _spoken(given)), shapes, weights)


def _checked_path(path: FilePath) -> tuple[Path, str]:
    """The path, and how it is called in messages. Raises: CheckpointError for another suffix."""
    target = as_path(path)
    where = cut_path(target)
    if target.suffix != ".onnx":
        other = cut_path(target.with_suffix(".onnx")) if target.name else "a name that ends so"
        raise CheckpointError(
            f"{where}: runtimes know such a file by its suffix .onnx. Use {other}"
        )
    return target, where


def _checked_parts(what: object) -> tuple[str, ...]:
    """What the graph returns, in the order of the outputs. Raises: RangeError."""
    given = [what] if isinstance(what, str) else what
    if not isinstance(given, list | tuple) or not given or any(x not in _PARTS for x in given):
        known = ", ".join(map(repr, _PARTS))
        raise RangeError(f"what is {shown(what)}; it must be one or several of {known}")
    return tuple(part for part in _PARTS if part in given)


def _import_onnx() -> Any:
    """The package onnx. Raises: MissingPackageError."""
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        advice = "pip install onnx (the extra onnx of a checkout: pip install -e '.[onnx]')"
        what = f"an export needs the package onnx, which cannot be imported ({error})"
        raise MissingPackageError(f"{what}. Install it: {advice}") from error
    return onnx


def _stored(params: Any, float16: bool) -> tuple[Any, str]:
    """Weights as the runtime will compute with them, all float32, and in words how they lie there.

    Raises: NonFiniteError.
    """
    given = dtype_name(first_array(params))
    kept = np.float16 if float16 else np.float32

    def cast(x: np.ndarray) -> np.ndarray:
        if x.dtype.kind != "f":
            return x  # numbers of batches, which nothing here reads
        return quietly(lambda: x.astype(kept).astype(np.float32))

    host = map_arrays(cast, to_numpy(params))
    name = np.dtype(kept).name
    cause = f"It is beyond {name}, or the training that made it diverged"
    for key, x in named_arrays(host):
        check_finite(key, x, f"{cause}. Leave float16 out" if float16 else cause)
    return host, name if name == given else f"{name}, rounded from {given}"


def _images(
    graph: Graph, model: Model, size: Sequence[int], free: bool, with_preprocessing: bool
) -> Symbol:
    """What the network is given, (B, C, H, W): the graph's input, or made of pixels."""
    H, W = size
    C = model.config.in_chans
    if not with_preprocessing:
        return graph.input("images", (BATCH, C, H, W), np.float32, (2, 3) if free else ())
    preprocessing = model.info.preprocessing
    if preprocessing.channels != C:
        raise ConfigError(
            f"the model has in_chans={C}, but its preprocessing makes {preprocessing.channels} "
            f"channels. Leave with_preprocessing out, or give Model an info of its own"
        )
    pixels = graph.input("pixels", (BATCH, H, W, C), np.uint8, (1, 2) if free else ())
    mean, std = (np.asarray(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
    x = (graph.astype(pixels, np.float32) / 255 - mean) / std
    return graph.permute_dims(x, (0, 3, 1, 2))


def _traced(
    graph: Graph, params: Any, images: Symbol, config: Any, parts: Sequence[str], free: bool
) -> dict[str, Symbol]:
    """The network's own forward on symbols: the outputs by name. Raises: ConfigError.

    A second pass notes only the nodes that the first did not. Attention is the classifier's, if
    there is one, as in attention_maps.
    """
    row, table = architecture_of(config), ANY_SIZE if free else SYMBOLIC
    weights = dict[str, Symbol]()

    def before(call: Call) -> None:
        if free and call.operation in SIZED:
            problem = f"size is 'any', and {call.path} is made for one size"
            raise ConfigError(f"{problem}. Give the size of the images, and export once for each")
        graph.paths.append(call.path)

    def after(call: Call) -> None:
        graph.paths.pop()
        place = row.place(call.path) if call.operation == attention else None
        if place is not None and place.block is not None:
            q, k, _ = call.args[1]  # the nodes of these weights are there already
            A = attention_weights(q, k, call.args[3], table)
            weights.setdefault(f"A{place.stage}.{place.block}", A)  # of the first pass only

    ops = table.watched(after, before=before, params=params)
    source = "logits" if config.has_classifier else "pyramid"
    passes = {source if part == "attention" else part for part in parts}
    found: dict[str, dict[str, Symbol]] = {"attention": weights}
    if "logits" in passes:
        logits, _ = row.forward(params, images, config, ops, None, False, None)
        found["logits"] = {"logits": logits}
    if "pyramid" in passes and row.forward_pyramid is not None:
        maps, _ = row.forward_pyramid(params, images, config, ops, None, False, None)
        found["pyramid"] = {f"F{i}": x for i, x in enumerate(maps, start=1)}
    if "attention" in parts and not weights:
        raise ConfigError(f"a {row.title} has no block with attention, so no weights of it")
    return {name: x for part in parts for name, x in found[part].items()}


def _spoken(x: Symbol, output: str = "") -> tuple[Any, ...]:
    """The shape, with names for sizes that may vary: those of an output are its own."""
    names = iter(["queries", "keys"] if output.startswith("A") else ["height", "width"])
    prefix = f"{output}_" if output else ""
    sizes = [f"{prefix}{next(names)}" if isinstance(n, Dim) else n for n in x.shape]
    return ("batch", *sizes[1:])


def _needed(nodes: Sequence[Node], outputs: Iterable[str]) -> list[Node]:
    """The nodes that outputs come from: others were noted on the way and are read by none."""
    wanted, kept = set(outputs), list[Node]()
    for node in reversed(nodes):
        if node.output in wanted:
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _encoded(
    graph: Graph,
    outputs: dict[str, Symbol],
    half: frozenset[str],
    title: str,
    metadata: dict[str, str],
) -> bytes:
    """The file's bytes, which onnx has checked. Weights of these names are float16 if they fit."""
    onnx = _import_onnx()
    helper, from_array = onnx.helper, onnx.numpy_helper.from_array
    names = {x.name: name for name, x in outputs.items()}
    needed = _needed(graph.nodes, list(names))
    used = dict.fromkeys(name for node in needed for name in node.inputs)
    nodes, tensors = [], []
    for key in used:
        x = graph.constants.get(key)
        if x is None:
            continue
        rounded = quietly(lambda x=x: x.astype(np.float16)) if key.split("/")[0] in half else None
        if rounded is not None and np.array_equal(rounded, x):  # a resized table would lose digits
            names[key] = f"{key}/float32"
            tensors.append(from_array(rounded, key))
            kind = onnx.TensorProto.FLOAT
            nodes.append(helper.make_node("Cast", [key], [names[key]], f"{key}/Cast", to=kind))
        else:
            tensors.append(from_array(np.ascontiguousarray(x).reshape(x.shape), key))
    for op, inputs, output, attributes in needed:
        told = {
            k: helper.np_dtype_to_tensor_dtype(v) if isinstance(v, np.dtype) else v
            for k, v in attributes.items()
        }
        ends = [names.get(name, name) for name in inputs], [names.get(output, output)]
        nodes.append(helper.make_node(op, *ends, name=output, **told))

    def described(name: str, x: Symbol) -> Any:
        kind = helper.np_dtype_to_tensor_dtype(x.dtype)
        return helper.make_tensor_value_info(name, kind, _spoken(x, name * (name in outputs)))

    made = helper.make_graph(
        nodes,
        title,
        [described(graph.given.name, graph.given)],
        [described(name, x) for name, x in outputs.items()],
        tensors,
    )
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR,
        producer_name="pvt_ref",
        producer_version=__version__,
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)
