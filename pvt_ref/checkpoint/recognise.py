"""Recognises entry, network, layout and model of a file from its keys and shapes."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pvt_ref.models  # noqa: F401 (registers the networks)
from pvt_ref.arrays import FLOAT_DTYPES, dtype_name
from pvt_ref.checkpoint.key_maps import foreign_shapes
from pvt_ref.checkpoint.pickles import Record, is_known, whole_object
from pvt_ref.checkpoint.safetensors_file import QUANTIZED
from pvt_ref.checkpoint.stated import Stated, shown_by_file
from pvt_ref.checkpoint.stored import SAFE_LOAD, StoredTensor
from pvt_ref.errors import CheckpointError, key_name, shown
from pvt_ref.models.architecture import Architecture, architectures, count_keys, param_shapes
from pvt_ref.models.layouts import Layout, Shape

READABLE_DTYPES = ("float16", "bfloat16", *FLOAT_DTYPES)
STATE_ENTRIES = ("", "model", "state_dict")  # taken before others; "" is the top
#: Entries in which an object other than data was a whole model.
_WHOLE_MODELS = {"model", "state_dict", "net", "network", "module", "ema", "model_ema"}
#: Scalars that are not weights: the counters of the profiler thop, and of batch norms.
_COUNTERS = ("total_ops", "total_params", "num_batches_tracked")
_WRONG_DTYPE = "wrong dtype:"
_MAX_DEPTH = 4  # of nested dicts that are searched
_MAX_NAME = 200  # characters of a name on the way there
_MAX_LINES = 20  # of a list of problems
_FEW = 100  # blocks: a configuration with fewer is always cheap enough to list missing keys of


def layouts_read() -> str:
    """Which files are read, for messages."""
    others = [row.files.readable for row in architectures() if row.files]
    return f"{', '.join(others)}, and this project's own .safetensors"


def is_entry(value: object) -> bool:
    """Whether value is a tensor, read or unread, rather than a number, list or dict."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _shapes(state: Mapping[str, Any]) -> dict[str, Shape]:
    return {key: tuple(x.shape) for key, x in state.items() if is_entry(x)}


class Found(NamedTuple):
    """One of the models in a file."""

    row: Architecture  # of its network
    entry: str  # names of the dicts around it, joined by dots; "" for the top
    prefix: str  # of its keys there, with the final dot; "" if there is none
    layout: Layout
    state: dict[str, Any]  # the values by key, without the prefix
    beside: tuple[str, ...] = ()  # keys of other tensors in the same dict, such as a head's
    is_part: bool = False  # part of another model here: the backbone of a segmentation network

    @property
    def name(self) -> str:
        """Entry and prefix in the form of load's argument ``entry``."""
        return ".".join(name for name in (self.entry, self.prefix.removesuffix(".")) if name)

    def as_argument(self) -> str:
        """How to ask for this one, for messages."""
        return f"entry={shown(self.name, _MAX_NAME)}"


class _Sign(NamedTuple):
    """A key that identifies a network and a layout, if one of the marks is present too."""

    probe: str
    marks: tuple[str, ...]
    row: Architecture
    layout: Layout


def _signs(config: Any) -> list[_Sign]:
    """The signs of all networks, and of config's own keys if its network has no file layouts."""
    signs: list[_Sign] = []
    for row in architectures():
        if row.files:
            for layout in row.files.layouts:
                marks = tuple(layout.rename(key) or "" for key in layout.marks)
                probes = (layout.rename(key) or "" for key in row.files.probes)
                signs += [_Sign(probe, marks, row, layout) for probe in probes]
        elif type(config) is row.config_type:
            layout = Layout(name=f"{row.title} state dict")
            signs.append(_Sign(next(iter(param_shapes(config))), (), row, layout))
    return sorted(signs, key=lambda sign: not sign.marks)


def find_models(tree: Any, config: Any = None) -> list[Found]:
    """All models in a file's tree, recognised by their keys."""
    signs, mappings = _signs(config), list(_mappings(tree))
    found = [model for entry, state in mappings for model in _models_in(entry, state, signs)]
    if found:
        return found
    states = [state for _, state in mappings if any(map(is_entry, state.values()))]
    for name, x in [("", tree), *(item for _, state in mappings for item in state.items())]:
        if isinstance(x, Record) and not is_known(x.name) and (name in _WHOLE_MODELS or not states):
            raise whole_object(x.name, f"the entry {shown(name)}" if name else "what was saved")
    if states:
        keys = [str(key) for key in max(states, key=len)]
        what = f"its {len(keys)} keys are of no known layout: {few(keys)}"
        raise CheckpointError(f"{what}. Known layouts: {layouts_read()}")
    is_dict = isinstance(tree, Mapping)
    holds = f"a dict with the entries {few(tree)}" if is_dict else f"a {type(tree).__name__}"
    what = f"no weights in it: it holds {holds}; it must have a state dict (keys to tensors) at"
    advice = "Save one with torch.save(model.state_dict(), new_path)"
    raise CheckpointError(f"{what} the top or in a dict there. {advice}")


def _mappings(tree: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """All dicts down to a depth, each once, with its path of names, joined by dots."""
    seen: set[int] = set()  # one dict can be in many places of a pickle
    values: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    for names, value in values:  # and everything inside them
        if isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            yield ".".join(names), value
            for key, x in value.items() if len(names) < _MAX_DEPTH - 1 else ():
                if isinstance(x, Mapping) and len(str(key)) <= _MAX_NAME:
                    values.append(((*names, str(key)), x))


def _models_in(entry: str, mapping: Mapping[Any, Any], signs: list[_Sign]) -> list[Found]:
    found: dict[str, _Sign] = {}
    for key in (key for key, x in mapping.items() if isinstance(key, str) and is_entry(x)):
        for sign in (sign for sign in signs if key.endswith(sign.probe)):
            prefix = key.removesuffix(sign.probe)
            marked = not sign.marks or any(prefix + mark in mapping for mark in sign.marks)
            if marked and prefix[-1:] in ("", ".") and len(prefix) <= _MAX_NAME:
                found.setdefault(prefix, sign)
                break
    whole = [prefix for prefix, sign in found.items() if sign.row.dense]  # with its backbone
    states: dict[str, dict[str, Any]] = {prefix: {} for prefix in found}
    beside: dict[str, list[str]] = {prefix: [] for prefix in found}
    for key, value in mapping.items() if found else ():
        name = str(key)
        dots = [i + 1 for i, c in enumerate(name[:_MAX_NAME]) if c == "."]
        parts = (name[:i] for i in reversed([0, *dots]))
        own = next((part for part in parts if part in states and part not in whole), None)
        holders = {prefix for prefix in whole if name.startswith(prefix)}
        holders |= set() if own is None else {own}
        for prefix in holders:
            states[prefix][name.removeprefix(prefix)] = value
        if is_entry(value) and not _is_counter(name, value):  # from a neck, a head, another model
            for prefix in found.keys() - holders if own is None else ():
                beside[prefix].append(name)
    return [
        Found(
            sign.row, entry, prefix, sign.layout, states[prefix], tuple(beside[prefix]),
            any(prefix != outer and prefix.startswith(outer) for outer in whole),
        )
        for prefix, sign in found.items()
    ]  # fmt: skip


def choose_model(
    models: Sequence[Found], entry: str | None, config: Any = None
) -> tuple[Found, list[Found]]:
    """The model called entry, the only one, or the one in STATE_ENTRIES; and the other weights.

    If there are several, those of config's network are preferred.
    """

    def meant(models: Sequence[Found]) -> Sequence[Found]:
        whole = [x for x in models if not x.is_part] or models
        return [x for x in models if type(config) is x.row.config_type] or whole

    there, names = models, few(models, Found.as_argument, 8, "; ")
    if entry is not None:
        begin = f"{entry}."
        fitting = [x for x in models if x.name == entry] or meant(
            [x for x in models if f"{x.name}.".startswith(begin) or x.prefix.startswith(begin)]
        )
        if len(fitting) != 1:
            what = f"{'several' if fitting else 'none'} of the models in it have this name"
            advice = f"The names are: {names}"
            if len({model.name for model in fitting}) == 1:
                what = f"{len(fitting)} models in it have exactly this name"
                advice = f"Save one alone: {SAFE_LOAD}; torch.save(state[...], new_path)"
            raise CheckpointError(f"entry is {shown(entry, _MAX_NAME)}, but {what}. {advice}")
    else:
        fitting = models = _different(meant(models))
        if len(models) > 1:
            fitting = [model for model in models if model.entry in STATE_ENTRIES]
        if len(fitting) != 1:
            raise CheckpointError(f"it holds several models. Choose one of: {names}")
    (chosen,) = fitting
    others = [model for model in _different(there) if not _same(model, chosen)]
    return chosen, [model for model in others if not model.is_part]


def _different(models: Sequence[Found]) -> list[Found]:
    """The models without those that repeat the weights of an earlier one under another name."""
    kept: list[Found] = []
    for model in models:
        if len(kept) > 8 or not any(_same(model, other) for other in kept):
            kept.append(model)
    return kept


def _same(a: Found, b: Found) -> bool:
    """Whether two models are the same tensors of the file, or the same objects."""
    pairs = ((x, b.state.get(key)) for key, x in a.state.items())
    return a.state.keys() == b.state.keys() and all(
        x is y or (isinstance(x, StoredTensor) and x == y) for x, y in pairs
    )


def _is_counter(key: str, x: Any) -> bool:
    return key.rpartition(".")[2] in _COUNTERS and is_entry(x) and math.prod(x.shape) == 1


def as_read(model: Found, bare: bool) -> tuple[Found, list[str]]:
    """The model in the layout to read, without head if bare; and the counters it leaves out."""
    layout, base = model.layout, ""
    if model.row.files:
        layout, base = model.row.files.bare(layout, model.state, bare)
    counters = {key for key, x in model.state.items() if _is_counter(key, x)}
    if model.row.batch_buffers is not None:  # its batch norms keep these counters
        counters = {key for key in counters if not key.endswith("num_batches_tracked")}
    kept = (key for key in model.state if key.startswith(base) and key not in counters)
    state = {key.removeprefix(base): model.state[key] for key in kept}
    model = model._replace(layout=layout, prefix=model.prefix + base, state=state)
    return model, sorted({key.rpartition(".")[2] for key in counters})


def few(names: Collection[Any], show: Any = None, count: int = 3, joint: str = ", ") -> str:
    """For a message: the first names, formatted by show, and how many more there are."""
    texts = map(show or (lambda name: shown(name, 60)), itertools.islice(names, count))
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return (joint.join(texts) or "none") + more


def _problems(model: Found, config: Any) -> list[str]:
    shapes, counts = foreign_shapes(model.layout, config), count_keys(config)
    names = {key: key_name(model.prefix + key) for key in (*shapes, *model.state)}
    problems = [f"missing: {names[k]} {shapes[k]}" for k in shapes if k not in model.state]
    for key, x in model.state.items():
        if key in model.layout.unused:
            continue
        if not is_entry(x):
            kind = shown(x.name) if isinstance(x, Record) else type(x).__name__
            problems.append(f"unexpected: {names[key]} ({kind}, not a tensor)")
        elif key not in shapes:
            problems.append(f"unexpected: {names[key]} {tuple(x.shape)}")
        elif tuple(x.shape) != shapes[key]:
            needed = f"the configuration needs {shapes[key]}"
            problems.append(f"mis-shaped: {names[key]} is {tuple(x.shape)}, {needed}")
        elif key in counts:
            if not dtype_name(x).startswith(("int", "uint")):
                what = f"{names[key]} is {dtype_name(x)}, but counts batches"
                problems.append(f"{_WRONG_DTYPE} {what}")
        elif dtype_name(x) not in READABLE_DTYPES:
            problems.append(f"{_WRONG_DTYPE} {names[key]} is {dtype_name(x)}, weights are floats")
    return problems


def check_state(model: Found, config: Any, origin: str = "") -> None:
    """Refuses a state that does not fit config, which is from origin. Raises: CheckpointError."""
    layout, state = model.layout, model.state
    if layout.has_classifier is False and config.has_classifier:
        what = f"it is a bare backbone ({layout.name}: it has no head), but the configuration has"
        bare = "dataclasses.replace(config, num_classes=0); with_new_head(model, ...) adds a head"
        raise CheckpointError(f"{what} num_classes={config.num_classes}. Pass {bare}")
    whose = f"the configuration{'' if origin in ('', 'config') else f' from {origin}'}"
    blocks = model.row.files.blocks(config) if model.row.files else 0
    if blocks > max(len(state), _FEW):  # refused before anything is built for each block
        what = f"{whose} has {blocks} blocks, but the file only {len(state)} tensors"
        raise CheckpointError(f"{what}. Correct its depth")
    if problems := _problems(model, config):
        what = f"{layout.name}, but it does not fit {whose} ({model.row.describe(config)})"
        raise CheckpointError(f"{what}:{_lines(problems)}\n{_cause(model, config)}")


def _cause(model: Found, config: Any) -> str:
    """Why a state does not fit, with the fields for which its shapes show other values."""
    files = model.row.files
    seen = files.shown(_shapes(model.state), model.layout) if files else {}
    if seen.get("linear"):  # then its ratios are not used
        seen = {name: value for name, value in seen.items() if name != "sr_ratios"}
    other = [f"{k}={value}" for k, value in seen.items() if getattr(config, k) != value]
    if seen and not other:
        return "The likely cause is a damaged file, or one of a related network"
    cause = "The likely cause is a configuration of another variant, class count or image size"
    return f"{cause}: the shapes in the file show {', '.join(other)}" if other else cause


def _lines(problems: list[str]) -> str:
    more = [f"... and {len(problems) - _MAX_LINES} more"] if len(problems) > _MAX_LINES else []
    return "".join(f"\n  - {problem}" for problem in [*problems[:_MAX_LINES], *more])


def complete(stated: Stated, model: Found) -> Any:
    """A stated configuration, with open fields filled from the file. Raises: CheckpointError."""
    files, kind = model.row.files, model.row.config_type.__name__
    if not files:
        return stated.config
    shapes = _shapes(model.state)
    seen = files.fit(stated.config, shapes, model.layout)
    if model.row.dense:  # its parts are records themselves, each matched as a whole
        return seen
    if seen.has_classifier and stated.num_labels not in (None, seen.num_classes):
        what = f"{stated.origin} says {stated.num_labels} labels, but the head in the file has"
        advice = f"Correct {stated.origin}, or pass config={kind}(...)"
        raise CheckpointError(f"{what} {seen.num_classes} outputs. {advice}")
    fields = shown_by_file(seen)
    if not set(stated.left_open) <= fields.keys():
        fields |= files.shown(shapes, model.layout) | {"num_classes": seen.num_classes}
    changes = {name: fields[name] for name in stated.left_open if name in fields}
    if "num_heads" in stated.left_open:
        widths = changes.get(files.widths, getattr(stated.config, files.widths))
        known = model.row.variants.values()
        heads = {x.num_heads for x in known if getattr(x, files.widths) == widths}
        if len(heads) != 1:
            what = f"{stated.origin} does not say how many heads the model has"
            whose = "variants with different ones" if heads else "no variant"
            other = f"which no shape shows, and {files.widths} {widths} are those of {whose}"
            advice = "Write num_heads into it (num_attention_heads in Hugging Face's config.json)"
            raise CheckpointError(f"{what}, {other}. {advice}, or pass config={kind}(...)")
        (changes["num_heads"],) = heads
    return dataclasses.replace(stated.config, **changes)


def recognise_config(model: Found) -> Any:
    """The published variant with the keys and shapes of a model. Raises: CheckpointError."""
    row, layout, state = model.row, model.layout, model.state
    assert row.files is not None  # else the model would not have been found without config
    shapes = _shapes(state)
    tried: list[tuple[int, str, Any, list[str]]] = []
    for name, variant in row.variants.items():
        config = row.files.fit(variant, shapes, layout)
        problems = _problems(model, config)
        if not problems:
            return config
        if all(problem.startswith(_WRONG_DTYPE) for problem in problems):
            what = f"{layout.name}, {row.describe(config)}, but {len(problems)} of its {len(state)}"
            kinds = f"tensors are not of {', '.join(READABLE_DTYPES)}"
            raise CheckpointError(f"{what} {kinds}:{_lines(problems)}\n{QUANTIZED}")
        tried.append((len(problems), name, config, problems))
    kind = row.config_type.__name__
    advice = (
        f"If it is another model, pass its configuration, load(path, config={kind}(...)) or "
        f"config='path/to/config.json': shapes do not show head counts (num_heads), so only the "
        f"published variants are recognised without it"
    )
    count, name, config, problems = min(tried, key=lambda entry: entry[0])
    if count <= len(shapes) // 4:  # a damaged or slightly changed variant
        differ = "1 key differs" if count == 1 else f"{count} keys differ"
        what = f"{layout.name}; nearest is {name} ({row.describe(config)}), but {differ}"
        raise CheckpointError(f"{what}:{_lines(problems)}\n{advice}")
    fields = ", ".join(f"{k}={value}" for k, value in row.files.shown(shapes, layout).items())
    read_off = f"Its shapes show {kind}({fields}, num_heads=unknown). " if fields else ""
    known = ", ".join(row.variants)
    raise CheckpointError(f"{layout.name}, but none of {known}. {read_off}{advice}")
