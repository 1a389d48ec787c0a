"""What a file holds: which entry, which layout, which model, told from its keys and shapes."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, Protocol

from pvt_ref.arrays import FLOAT_DTYPES, dtype_name
from pvt_ref.checkpoint.key_maps import (
    AUTHORS,
    AUTHORS_DENSE,
    HUGGING_FACE,
    MMDETECTION,
    Layout,
    Shape,
    foreign_shapes,
)
from pvt_ref.config import NUM_STAGES, VARIANTS, PVTConfig, describe
from pvt_ref.errors import CheckpointError, ConfigError

READABLE_DTYPES = ("float16", "bfloat16", *FLOAT_DTYPES)

#: Keys of a training checkpoint under which the weights can lie.
STATE_ENTRIES = ("model", "state_dict")

#: Keys that every PVT has; one of them is enough to know a layout.
_PROBES = ("patch_embed1.proj.weight", "pos_embed1", "block1.0.norm1.weight")

LAYOUTS_READ = (
    "the authors' .pth files, training checkpoints, Hugging Face PvtForImageClassification, "
    "MMDetection PVT backbones, and this project's own .safetensors"
)


class Entry(Protocol):
    """A tensor of a file, read (an array) or not yet read."""

    @property
    def shape(self) -> Any:
        """Sizes."""
        ...

    @property
    def dtype(self) -> Any:
        """A dtype, or its name."""
        ...


def is_entry(value: object) -> bool:
    """Whether value is a tensor rather than a number, list or dict beside it.

    Args:
        value: anything.

    Returns:
        True if it has a shape and a dtype.
    """
    return hasattr(value, "shape") and hasattr(value, "dtype")


def find_state(tree: Any) -> tuple[dict[str, Any], str]:
    """The state dict in what a file holds, and the entry where it was.

    Args:
        tree: what the file holds.

    Returns:
        Key to tensor, and ``"model"``, ``"state_dict"``, or ``""`` for the top.

    Raises:
        CheckpointError: if there is none.
    """
    if isinstance(tree, Mapping):
        for name in STATE_ENTRIES:
            if _is_state(tree.get(name)):
                return {str(key): x for key, x in tree[name].items()}, name
        if _is_state(tree):
            return {str(key): x for key, x in tree.items()}, ""
        found = f"a dict with the entries {_some(tree)}"
    else:
        found = f"a {type(tree).__name__}"
    raise CheckpointError(
        f"no weights in it: it holds {found}; needed is a state dict (key names to tensors), at "
        f"the top or under 'model' or 'state_dict'. Save one with "
        f"torch.save(model.state_dict(), new_path)"
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(is_entry(x) for x in value.values())


def find_layout(state: Mapping[str, Any]) -> tuple[Layout, str]:
    """The layout of a state dict, and the prefix of the model's keys in it.

    A detector's checkpoint holds the model under ``backbone.``, beside its neck and heads.

    Args:
        state: key to tensor; only keys and shapes are looked at.

    Returns:
        The layout, and the prefix, with the dot at its end; ``""`` if there is none.

    Raises:
        CheckpointError: if the keys are of no known layout, or of several models.
    """
    keys = list(state)
    for layout in (HUGGING_FACE, MMDETECTION, AUTHORS):
        names = [layout.rename(probe) for probe in _PROBES]
        prefixes = {
            key.removesuffix(name)
            for name in names
            for key in keys
            if name and (key == name or key.endswith(f".{name}"))
        }
        if len(prefixes) > 1:
            raise CheckpointError(
                f"it holds several models, under the prefixes {_some(sorted(prefixes))}. Save the "
                f"one that you need by itself"
            )
        if prefixes:
            (prefix,) = prefixes
            if layout is AUTHORS and _is_dense(state, prefix):
                layout = AUTHORS_DENSE
            return layout, prefix
    if any(key.startswith("encoder.patch_embeddings.") for key in keys):
        raise CheckpointError(
            "it is a Hugging Face PvtModel, which has no classifier: missing are classifier.weight "
            "and classifier.bias. Save the whole PvtForImageClassification instead"
        )
    raise CheckpointError(
        f"its {len(keys)} keys are of no known layout: {_some(keys)}. {_other_model(keys)}"
        f"Needed is one of: {LAYOUTS_READ}"
    )


def _is_dense(state: Mapping[str, Any], prefix: str) -> bool:
    """Whether a bare backbone still has the cls token's row in its last table."""
    if any(f"{prefix}{key}" in state for key in ("cls_token", "norm.weight", "head.weight")):
        return False
    table = state.get(f"{prefix}pos_embed{NUM_STAGES}")
    rows = table.shape[1] if table is not None and len(getattr(table, "shape", ())) == 3 else 1
    return math.isqrt(rows) ** 2 != rows


def _other_model(keys: list[str]) -> str:
    if any("dwconv" in key for key in keys):
        return (
            "Depth-wise convolutions (dwconv) belong to PVT version 2, another architecture, which "
            "this project does not have. "
        )
    return ""


def _some(names: Any, count: int = 4) -> str:
    names = [repr(name)[:60] for name in names]
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "") or "none"


def list_problems(
    state: Mapping[str, Any], layout: Layout, config: PVTConfig, prefix: str = ""
) -> list[str]:
    """Every key of state that is missing, unexpected, mis-shaped or not of floats.

    In the names of the file, with its prefix, so that a reader can find them there.

    Args:
        state: key, without the prefix, to tensor.
        layout: how the file names and cuts the weights.
        config: the model that the file should hold.
        prefix: of the keys in the file.

    Returns:
        A line for each problem; empty if there is none.
    """
    shapes = foreign_shapes(layout, config)
    problems = [f"missing: {prefix}{k} {shape}" for k, shape in shapes.items() if k not in state]
    for key, x in state.items():
        name = f"{prefix}{key}"
        if not is_entry(x):
            problems.append(f"unexpected: {name} ({type(x).__name__}, not a tensor)")
        elif key not in shapes:
            problems.append(f"unexpected: {name} {tuple(x.shape)}")
        elif tuple(x.shape) != shapes[key]:
            problems.append(
                f"mis-shaped: {name} is {tuple(x.shape)}, the configuration needs {shapes[key]}"
            )
        elif dtype_name(x) not in READABLE_DTYPES:
            problems.append(f"wrong dtype: {name} is {dtype_name(x)}, weights are floats")
    return problems


def check_state(
    state: Mapping[str, Any], layout: Layout, config: PVTConfig, prefix: str = ""
) -> None:
    """Refuses a state that is not the model's.

    Args:
        state: key, without the prefix, to tensor.
        layout: how the file names and cuts the weights.
        config: the model that the file should hold.
        prefix: of the keys in the file.

    Raises:
        CheckpointError: with all problems of state together.
    """
    if layout.has_classifier is False and config.has_classifier:
        raise CheckpointError(
            f"it is a bare backbone ({layout.name}: no cls token, final norm or head), and the "
            f"configuration has num_classes={config.num_classes}. Pass "
            f"dataclasses.replace(config, num_classes=0); with_new_head(model, ...) adds a head"
        )
    problems = list_problems(state, layout, config, prefix)
    if problems:
        raise CheckpointError(
            f"{layout.name}, but it does not fit the configuration "
            f"({describe(config)}):{_lines(problems)}\n{_other_model(list(state))}The likely cause "
            f"is a configuration of another variant, class count or image size; "
            f"dataclasses.replace(config, ...) changes one"
        )


def _lines(problems: list[str]) -> str:
    return "".join(f"\n  - {problem}" for problem in problems)


def recognise_config(state: Mapping[str, Any], layout: Layout, prefix: str = "") -> PVTConfig:
    """The published variant whose keys and shapes are exactly those of state.

    Class count and image size are read off. Head counts leave no trace in any shape, so every other
    model needs its configuration from the caller.

    Args:
        state: key, without the prefix, to tensor.
        layout: how the file names and cuts the weights.
        prefix: of the keys in the file.

    Returns:
        The variant, with class count and image size of the file.

    Raises:
        CheckpointError: if it is no variant; with the differences from the nearest.
    """
    shapes = {key: tuple(x.shape) for key, x in state.items() if is_entry(x)}
    nearest = []
    for name, variant in VARIANTS.items():
        config = _like_variant(variant, shapes, layout)
        problems = list_problems(state, layout, config, prefix)
        if not problems:
            return config
        nearest.append((len(problems), name, config, problems))
    count, name, config, problems = min(nearest, key=lambda found: found[0])
    advice = (
        "If it is another model, pass its configuration, load(path, config=PVTConfig(...)): "
        "head counts (num_heads) cannot be read off shapes, so only the published variants are "
        "recognised without"
    )
    if count <= len(shapes) // 4:  # a variant with faults, or a variant changed a little
        raise CheckpointError(
            f"{layout.name}; nearest is {name} ({describe(config)}), but {count} keys "
            f"differ:{_lines(problems)}\n{_other_model(list(state))}{advice}"
        )
    raise CheckpointError(
        f"{layout.name}, but none of {', '.join(VARIANTS)}. {_other_model(list(state))}"
        f"{_read_off(shapes, layout)}{advice}"
    )


def _like_variant(variant: PVTConfig, shapes: Mapping[str, Shape], layout: Layout) -> PVTConfig:
    """variant with the class count and the image size of a file, where these can be read."""
    num_classes = variant.num_classes
    head = shapes.get(layout.rename("head.weight") or "")
    if layout.has_classifier is False:
        num_classes = 0
    elif head:
        num_classes = head[0]
    elif not any(layout.rename(key) in shapes for key in ("cls_token", "norm.weight", "head.bias")):
        num_classes = 0
    table = shapes.get(layout.rename("pos_embed1") or "", ())
    side = math.isqrt(table[1]) * variant.patch_sizes[0] if len(table) == 3 else variant.img_size
    for img_size in (side, variant.img_size):
        try:
            return dataclasses.replace(variant, num_classes=num_classes, img_size=img_size)
        except ConfigError:
            continue  # no such image size: the table is what is wrong
    return variant


def _read_off(shapes: Mapping[str, Shape], layout: Layout) -> str:
    """The configuration as far as shapes show it, as a line to complete; "" if they do not."""

    def shape(key: str) -> Shape:
        return shapes[layout.rename(key) or ""]

    def present(key: str) -> bool:
        return layout.rename(key) in shapes

    def ratio(i: int) -> float:
        hidden, C_i = shape(f"block{i}.0.mlp.fc1.weight")[:2]
        return hidden / C_i if hidden % C_i else hidden // C_i

    stages = range(1, NUM_STAGES + 1)
    try:
        P = [shape(f"patch_embed{i}.proj.weight")[2] for i in stages]
        fields = {
            "img_size": math.isqrt(shape("pos_embed1")[1]) * P[0],
            "in_chans": shape("patch_embed1.proj.weight")[1],
            "num_classes": shape("head.weight")[0] if present("head.weight") else 0,
            "patch_sizes": tuple(P),
            "embed_dims": tuple(shape(f"pos_embed{i}")[2] for i in stages),
            "mlp_ratios": tuple(ratio(i) for i in stages),
            "qkv_bias": present("block1.0.attn.q.bias"),
            "depths": tuple(
                next(b for b in itertools.count() if not present(f"block{i}.{b}.norm1.weight"))
                for i in stages
            ),
            "sr_ratios": tuple(
                shape(f"block{i}.0.attn.sr.weight")[2]
                if present(f"block{i}.0.attn.sr.weight")
                else 1
                for i in stages
            ),
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return ""
    text = ", ".join(f"{name}={value}" for name, value in fields.items())
    return f"Its shapes show PVTConfig({text}, num_heads=unknown). "
