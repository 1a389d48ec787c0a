"""What a file holds: which entry, which layout, which model, told from its keys and shapes."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pvt_ref.arrays import FLOAT_DTYPES, dtype_name
from pvt_ref.checkpoint.key_maps import (
    AUTHORS,
    AUTHORS_DENSE,
    HUGGING_FACE,
    HUGGING_FACE_BARE,
    MMDETECTION,
    Layout,
    Shape,
    foreign_shapes,
)
from pvt_ref.checkpoint.pickles import Record, whole_object
from pvt_ref.checkpoint.stated import SHOWN_BY_SHAPES, Stated
from pvt_ref.checkpoint.stored import SAFE_LOAD
from pvt_ref.errors import CheckpointError, ConfigError, key_name, shown
from pvt_ref.models.pvt.config import NUM_STAGES, VARIANTS, PVTConfig, describe

READABLE_DTYPES = ("float16", "bfloat16", *FLOAT_DTYPES)

#: Entries that are taken before others; "" is the top.
STATE_ENTRIES = ("", "model", "state_dict")

#: Entries whose object, if it is none of data, was a whole model.
_WHOLE_MODELS = {"model", "state_dict", "net", "network", "module", "ema", "model_ema"}

#: Dicts inside one another that are looked into, and characters of a name on the way there.
_MAX_DEPTH, _MAX_NAME = 4, 200

#: Keys that every PVT has; one of them is enough to know a layout.
_PROBES = ("patch_embed1.proj.weight", "pos_embed1", "block1.0.norm1.weight")
_LAYOUT_OF = {
    str(layout.rename(probe)): layout
    for layout in (HUGGING_FACE_BARE, MMDETECTION, AUTHORS)
    for probe in _PROBES
}

_ENDINGS = tuple(_LAYOUT_OF)

#: One number each, not of the model: the counters of the profiler thop, and of batch norms.
_COUNTERS = ("total_ops", "total_params", "num_batches_tracked")

_MAX_LINES = 20  # of a list of problems

_WRONG_DTYPE = "wrong dtype:"

_FEW = 100  # blocks of a configuration, whose missing keys can be listed whatever the file has

LAYOUTS_READ = (
    "the authors' .pth files, training checkpoints, Hugging Face PvtForImageClassification and "
    "PvtModel, MMDetection PVT backbones, and this project's own .safetensors"
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


class Found(NamedTuple):
    """One PVT among all that a file holds.

    Attributes:
        entry: names of the dicts that it lies in, joined by dots; "" for the top.
        prefix: of its keys there, with the dot at its end; "" if there is none.
        layout: how its keys are named.
        state: what stands under each of its keys, these without the prefix.
        beside: keys of the tensors in the same dict that belong to no PVT, such as a head's.
    """

    entry: str
    prefix: str
    layout: Layout
    state: dict[str, Any]
    beside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Entry and prefix as load's argument ``entry`` takes them."""
        return ".".join(name for name in (self.entry, self.prefix.removesuffix(".")) if name)


def find_models(tree: Any) -> list[Found]:
    """Every PVT in what a file holds, told from key names alone.

    A detector's checkpoint holds it under ``backbone.``, beside its neck and heads; a training can
    hold it twice, as ``model`` and ``model_ema``.

    Args:
        tree: what the file holds.

    Returns:
        At least one.

    Raises:
        CheckpointError: if there is none.
    """
    found = [
        model
        for entry, mapping in _mappings(tree)
        for model in _models_in(".".join(entry), mapping)
    ]
    if found:
        return found
    if isinstance(tree, Mapping):
        for name in sorted(_WHOLE_MODELS & tree.keys()):
            if isinstance(tree[name], Record):
                raise whole_object(tree[name].name, f"the entry {shown(name)}")
        states = [state for _, state in _mappings(tree) if any(map(is_entry, state.values()))]
        if states:
            keys = [str(key) for key in max(states, key=len)]
            raise CheckpointError(
                f"its {len(keys)} keys are of no known layout: {_some(keys)}. {_other_model(keys)}"
                f"Needed is one of: {LAYOUTS_READ}"
            )
        holds = f"a dict with the entries {_some(tree)}"
    else:
        holds = f"a {type(tree).__name__}"
    raise CheckpointError(
        f"no weights in it: it holds {holds}; needed is a state dict (key names to tensors), at "
        f"the top or in a dict there. Save one with torch.save(model.state_dict(), new_path)"
    )


def _mappings(tree: Any) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """All dicts down to a depth, each once, with the names that lead to it."""
    seen = set()  # a pickle can hold one dict in many places
    level: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    for _ in range(_MAX_DEPTH):
        inner = []
        for names, value in level:
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                yield names, value
                inner += [
                    ((*names, str(key)), x)
                    for key, x in value.items()
                    if isinstance(x, Mapping) and len(str(key)) <= _MAX_NAME
                ]
        level = inner


def _models_in(entry: str, mapping: Mapping[Any, Any]) -> list[Found]:
    """The PVTs among the keys of one dict, apart by their prefixes."""
    layouts: dict[str, Layout] = {}
    for key, value in mapping.items():
        if isinstance(key, str) and key.endswith(_ENDINGS) and is_entry(value):
            for probe, layout in _LAYOUT_OF.items():
                prefix = key.removesuffix(probe)
                if key.endswith(probe) and prefix[-1:] in ("", ".") and len(prefix) <= _MAX_NAME:
                    layouts.setdefault(prefix, layout)
    for prefix in [p for p, layout in layouts.items() if layout is HUGGING_FACE_BARE]:
        whole = prefix.removesuffix("pvt.")
        if whole != prefix and any(f"{whole}classifier.{x}" in mapping for x in ("weight", "bias")):
            del layouts[prefix]
            layouts[whole] = HUGGING_FACE
    states: dict[str, dict[str, Any]] = {prefix: {} for prefix in layouts}
    beside = []
    for key, value in mapping.items() if layouts else ():
        name = str(key)
        dots = [i + 1 for i, c in enumerate(name[:_MAX_NAME]) if c == "."]
        own = next((name[:i] for i in reversed([0, *dots]) if name[:i] in states), None)
        if own is not None:
            states[own][name.removeprefix(own)] = value
        elif is_entry(value) and not _is_counter(name, value):  # of a neck, a head, another model
            beside.append(name)
    return [
        Found(entry, prefix, layouts[prefix], state, tuple(beside))
        for prefix, state in states.items()
    ]


def choose_model(models: Sequence[Found], entry: str | None) -> tuple[Found, list[Found]]:
    """One of the models in a file.

    Args:
        models: all of them.
        entry: the name of one, or the beginning of its name, or its prefix; None takes the only
            one, or the only one at the top, under ``model`` or under ``state_dict``.

    Returns:
        It, and those that hold other weights.

    Raises:
        CheckpointError: if there is none or more than one.
    """
    names = "; ".join(f"entry={shown(model.name, _MAX_NAME)}" for model in models[:8])
    names += f"; and {len(models) - 8} more" if len(models) > 8 else ""
    if entry is not None:
        fitting = [model for model in models if model.name == entry] or [
            model
            for model in models
            if f"{model.name}.".startswith(f"{entry}.") or model.prefix.startswith(f"{entry}.")
        ]
        if len(fitting) != 1:
            asked = f"entry is {shown(entry, _MAX_NAME)}"
            if len(fitting) > 1 and {model.name for model in fitting} == {fitting[0].name}:
                raise CheckpointError(
                    f"{asked}, and {len(fitting)} models in it have exactly this name: one key has "
                    f"dots in it that stand for a dict in a dict elsewhere, so that no name tells "
                    f"them apart. Save the one that is meant alone, with PyTorch: {SAFE_LOAD}; "
                    f"torch.save(state[...], new_path)"
                )
            raise CheckpointError(
                f"{asked}, and {'several' if fitting else 'none'} of the models in it are called "
                f"so. There are: {names}"
            )
    else:
        fitting = models = _different(models)
        if len(models) > 1:
            fitting = [model for model in models if model.entry in STATE_ENTRIES]
        if len(fitting) != 1:
            raise CheckpointError(
                f"it holds several models, and which one is meant cannot be known. Choose one of: "
                f"{names}"
            )
    (chosen,) = fitting
    return chosen, [model for model in _different(models) if not _same(model, chosen)]


def _different(models: Sequence[Found]) -> list[Found]:
    """Without those that are another name for the weights of an earlier one."""
    kept: list[Found] = []
    for model in models:
        if len(kept) > 8 or not any(_same(model, other) for other in kept):
            kept.append(model)
    return kept


def _same(a: Found, b: Found) -> bool:
    """Whether two models are the same tensors of the file, or the same objects."""
    if a.state.keys() != b.state.keys():
        return False
    return all(
        x is y or (hasattr(x, "storage") and hasattr(y, "storage") and _place(x) == _place(y))
        for x, y in zip(a.state.values(), (b.state[key] for key in a.state), strict=True)
    )


def _place(x: Any) -> tuple[Any, ...]:
    return x.storage, x.offset, x.shape, x.strides


def without_counters(model: Found) -> tuple[Found, list[str]]:
    """The model without single numbers that profilers and batch norms leave beside weights.

    Args:
        model: any.

    Returns:
        It, and the names of what was left out.
    """
    state, names = {}, []
    for key, x in model.state.items():
        if _is_counter(key, x):
            names.append(key.rpartition(".")[2])
        else:
            state[key] = x
    return model._replace(state=state), sorted(set(names))


def _is_counter(key: str, x: Any) -> bool:
    return key.rpartition(".")[2] in _COUNTERS and is_entry(x) and math.prod(x.shape) == 1


def as_backbone(model: Found, wanted: bool) -> Found:
    """The model in the layout of a bare backbone, if it has no head or none is wanted.

    Args:
        model: any.
        wanted: whether the classifier shall be left out where there is one.

    Returns:
        It, or the same keys in another layout.
    """
    layout, state = model.layout, model.state
    if layout is AUTHORS:
        rows = getattr(state.get(f"pos_embed{NUM_STAGES}"), "shape", ())
        has_cls_row = len(rows) == 3 and math.isqrt(rows[1]) ** 2 != rows[1]
        if has_cls_row and (wanted or not any(f"head.{x}" in state for x in ("weight", "bias"))):
            return model._replace(layout=AUTHORS_DENSE)
    if layout is HUGGING_FACE and wanted:
        base = {k.removeprefix("pvt."): x for k, x in state.items() if k.startswith("pvt.")}
        return model._replace(layout=HUGGING_FACE_BARE, prefix=f"{model.prefix}pvt.", state=base)
    return model


def _other_model(keys: list[str]) -> str:
    if any("dwconv" in key for key in keys):
        return (
            "Depth-wise convolutions (dwconv) belong to PVT version 2, another architecture, which "
            "this project does not have. "
        )
    return ""


def _some(names: Any, count: int = 4) -> str:
    some = [shown(name, 60) for name in itertools.islice(names, count + 1)]
    return ", ".join(some[:count]) + (", ..." if len(some) > count else "") or "none"


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
    problems = [
        f"missing: {key_name(prefix + k)} {shape}" for k, shape in shapes.items() if k not in state
    ]
    for key, x in state.items():
        name = key_name(prefix + key)
        if key in layout.unused:
            continue
        if not is_entry(x):
            kind = shown(x.name) if isinstance(x, Record) else type(x).__name__
            problems.append(f"unexpected: {name} ({kind}, not a tensor)")
        elif key not in shapes:
            problems.append(f"unexpected: {name} {tuple(x.shape)}")
        elif tuple(x.shape) != shapes[key]:
            problems.append(
                f"mis-shaped: {name} is {tuple(x.shape)}, the configuration needs {shapes[key]}"
            )
        elif dtype_name(x) not in READABLE_DTYPES:
            problems.append(f"{_WRONG_DTYPE} {name} is {dtype_name(x)}, weights are floats")
    return problems


def check_state(
    state: Mapping[str, Any], layout: Layout, config: PVTConfig, prefix: str = "", origin: str = ""
) -> None:
    """Refuses a state that is not the model's.

    Args:
        state: key, without the prefix, to tensor.
        layout: how the file names and cuts the weights.
        config: the model that the file should hold.
        prefix: of the keys in the file.
        origin: where config comes from, for the message.

    Raises:
        CheckpointError: with the problems of state, the first twenty in full.
    """
    if layout.has_classifier is False and config.has_classifier:
        raise CheckpointError(
            f"it is a bare backbone ({layout.name}: it has no head), and the configuration has "
            f"num_classes={config.num_classes}. Pass dataclasses.replace(config, num_classes=0); "
            f"with_new_head(model, ...) adds a head"
        )
    blocks = sum(config.depths)
    if blocks > max(len(state), _FEW):  # before anything is built for each of them
        raise CheckpointError(
            f"the configuration{f' from {origin}' if origin else ''} has {blocks} blocks, and the "
            f"file only {len(state)} tensors. depths is {config.depths}: correct it"
        )
    problems = list_problems(state, layout, config, prefix)
    if problems:
        source = f" from {origin}" if origin not in ("", "config") else ""
        raise CheckpointError(
            f"{layout.name}, but it does not fit the configuration{source} "
            f"({describe(config)}):{_lines(problems)}\n{_other_model(list(state))}The likely cause "
            f"is a configuration of another variant, class count or image size; "
            f"dataclasses.replace(config, ...) changes one"
        )


def _lines(problems: list[str]) -> str:
    more = len(problems) - _MAX_LINES
    shown_lines = problems[:_MAX_LINES] + ([f"... and {more} more"] if more > 0 else [])
    return "".join(f"\n  - {problem}" for problem in shown_lines)


def complete(stated: Stated, state: Mapping[str, Any], layout: Layout) -> PVTConfig:
    """A stated configuration with the fields that it leaves open.

    They are read off the shapes; head counts, which these do not show, are those of the variant
    with the same widths.

    Args:
        stated: what is said of the model.
        state: key, without the prefix, to tensor.
        layout: how the file names and cuts the weights.

    Returns:
        The configuration that the file should fit.

    Raises:
        CheckpointError: if the file has another number of classes than is said, or head counts are
            neither said nor a variant's.
        ConfigError: if such a PVT cannot be built.
    """
    shapes = {key: tuple(x.shape) for key, x in state.items() if is_entry(x)}
    seen = _like_variant(stated.config, shapes, layout)
    if seen.has_classifier and stated.num_labels not in (None, seen.num_classes):
        raise CheckpointError(
            f"{stated.origin} says {stated.num_labels} labels, and the head in the file has "
            f"{seen.num_classes} outputs. They belong to different models, or labels were changed "
            f"afterwards: correct {stated.origin}, or pass config=PVTConfig(...)"
        )
    fields = {name: getattr(seen, name) for name in SHOWN_BY_SHAPES}
    if not set(stated.left_open) <= fields.keys():
        fields |= _shown_fields(shapes, layout) | {"num_classes": seen.num_classes}
    changes = {name: fields[name] for name in stated.left_open if name in fields}
    if "num_heads" in stated.left_open:
        widths = changes.get("embed_dims", stated.config.embed_dims)
        heads = [x.num_heads for x in VARIANTS.values() if x.embed_dims == widths]
        if not heads:
            raise CheckpointError(
                f"{stated.origin} does not say how many heads the model has, which no shape shows, "
                f"and embed_dims {widths} are those of no variant. Write num_heads into it "
                f"(num_attention_heads in Hugging Face's config.json), or pass "
                f"config=PVTConfig(...)"
            )
        changes["num_heads"] = heads[0]
    return dataclasses.replace(stated.config, **changes)


def recognise_config(state: Mapping[str, Any], layout: Layout, prefix: str = "") -> PVTConfig:
    """The published variant whose keys and shapes are exactly those of state.

    Class count, channels and image size are read off. Head counts leave no trace in any shape, so
    every other model needs its configuration from the caller.

    Args:
        state: key, without the prefix, to tensor.
        layout: how the file names and cuts the weights.
        prefix: of the keys in the file.

    Returns:
        The variant, with class count, channels and image size of the file.

    Raises:
        CheckpointError: if it is no variant; with the differences from the nearest.
    """
    shapes = {key: tuple(x.shape) for key, x in state.items() if is_entry(x)}
    count = math.inf
    for candidate, variant in VARIANTS.items():
        fitted = _like_variant(variant, shapes, layout)
        found = list_problems(state, layout, fitted, prefix)
        if not found:
            return fitted
        if all(problem.startswith(_WRONG_DTYPE) for problem in found):
            raise CheckpointError(
                f"{layout.name}, {describe(fitted)}, but {len(found)} of its {len(state)} tensors "
                f"are not of {', '.join(READABLE_DTYPES)}:{_lines(found)}\nQuantized weights are "
                f"no substitute: get the plain ones from the publisher, or save v.float() of each "
                f"tensor v, times its scale if it has one"
            )
        if len(found) < count:
            count, name, config, problems = len(found), candidate, fitted, found
    advice = (
        "If it is another model, pass its configuration, load(path, config=PVTConfig(...)) or "
        "config='path/to/config.json': head counts (num_heads) cannot be read off shapes, so only "
        "the published variants are recognised without"
    )
    if count <= len(shapes) // 4:  # a variant with faults, or a variant changed a little
        raise CheckpointError(
            f"{layout.name}; nearest is {name} ({describe(config)}), but "
            f"{'1 key differs' if count == 1 else f'{count} keys differ'}:{_lines(problems)}\n"
            f"{_other_model(list(state))}{advice}"
        )
    raise CheckpointError(
        f"{layout.name}, but none of {', '.join(VARIANTS)}. {_other_model(list(state))}"
        f"{_read_off(shapes, layout)}{advice}"
    )


def _like_variant(variant: PVTConfig, shapes: Mapping[str, Shape], layout: Layout) -> PVTConfig:
    """variant with class count, channels and image size of a file, where these can be read."""

    def first(*keys: str) -> Shape:
        return next((s for k in keys if (s := shapes.get(layout.rename(k) or ""))), ())

    num_classes, in_chans = variant.num_classes, variant.in_chans
    head = first("head.weight", "head.bias")
    if layout.has_classifier is False:
        num_classes = 0
    elif head:
        num_classes = head[0]
    elif not first("cls_token", "norm.weight"):
        num_classes = 0
    kernel, table = first("patch_embed1.proj.weight"), first("pos_embed1")
    if len(kernel) == 4:
        in_chans = kernel[1]
    side = math.isqrt(table[1]) * variant.patch_sizes[0] if len(table) == 3 else variant.img_size
    for img_size in (side, variant.img_size):
        try:
            return dataclasses.replace(
                variant, num_classes=num_classes, in_chans=in_chans, img_size=img_size
            )
        except ConfigError:
            continue  # no such image size: the table is what is wrong
    return variant


def _read_off(shapes: Mapping[str, Shape], layout: Layout) -> str:
    """The configuration as far as shapes show it, as a line to complete; "" if they do not."""
    fields = _shown_fields(shapes, layout)
    text = ", ".join(f"{name}={value}" for name, value in fields.items())
    return f"Its shapes show PVTConfig({text}, num_heads=unknown). " if fields else ""


def _shown_fields(shapes: Mapping[str, Shape], layout: Layout) -> dict[str, Any]:
    """The fields of PVTConfig that shapes show; {} if these are not a whole model's."""

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
        return {
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
        return {}
