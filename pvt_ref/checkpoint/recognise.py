"""What a file holds: which entry, network, layout and model, told from keys and shapes."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pvt_ref.models  # noqa: F401 (enters the networks)
from pvt_ref.arrays import FLOAT_DTYPES, dtype_name
from pvt_ref.checkpoint.key_maps import foreign_shapes
from pvt_ref.checkpoint.pickles import Record, whole_object
from pvt_ref.checkpoint.safetensors_file import QUANTIZED
from pvt_ref.checkpoint.stated import SHOWN_BY_SHAPES, Stated
from pvt_ref.checkpoint.stored import SAFE_LOAD
from pvt_ref.errors import CheckpointError, key_name, shown
from pvt_ref.models.architecture import Architecture, architectures, param_shapes
from pvt_ref.models.layouts import Layout, Shape

READABLE_DTYPES = ("float16", "bfloat16", *FLOAT_DTYPES)
STATE_ENTRIES = ("", "model", "state_dict")  # that are taken before others; "" is the top
#: Entries whose object, if it is none of data, was a whole model.
_WHOLE_MODELS = {"model", "state_dict", "net", "network", "module", "ema", "model_ema"}
#: One number each, not of the model: the counters of the profiler thop, and of batch norms.
_COUNTERS = ("total_ops", "total_params", "num_batches_tracked")
_WRONG_DTYPE = "wrong dtype:"
_MAX_DEPTH = 4  # of dicts inside one another that are looked into
_MAX_NAME = 200  # characters of a name on the way there
_MAX_LINES = 20  # of a list of problems
_FEW = 100  # blocks of a configuration, whose missing keys can be listed whatever the file has


def layouts_read() -> str:
    """Which files are read, for messages."""
    others = [row.files.readable for row in architectures() if row.files]
    return f"{', '.join(others)}, and this project's own .safetensors"


def is_entry(value: object) -> bool:
    """Whether value is a tensor, read or not, rather than a number, list or dict beside it."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _shapes(state: Mapping[str, Any]) -> dict[str, Shape]:
    return {key: tuple(x.shape) for key, x in state.items() if is_entry(x)}


class Found(NamedTuple):
    """One model among all that a file holds."""

    row: Architecture  # of its network
    entry: str  # names of the dicts that it lies in, joined by dots; "" for the top
    prefix: str  # of its keys there, with the dot at its end; "" if there is none
    layout: Layout
    state: dict[str, Any]  # what stands under each of its keys, these without the prefix
    beside: tuple[str, ...] = ()  # keys of the other tensors in the same dict, such as a head's

    @property
    def name(self) -> str:
        """Entry and prefix as load's argument ``entry`` takes them."""
        return ".".join(name for name in (self.entry, self.prefix.removesuffix(".")) if name)


class _Sign(NamedTuple):
    """A key that shows a network and a layout, if one of the marks is there besides."""

    probe: str
    marks: tuple[str, ...]
    row: Architecture
    layout: Layout


def _signs(config: Any) -> list[_Sign]:
    """Of all networks; and of config's, if that has only the keys of its own parameters."""
    signs = []
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
    """Every model in what a file holds, told from key names; of config's network if there are any.

    Raises: CheckpointError if there is none.
    """
    signs = _signs(config)
    found: list[Found] = []
    for entry, mapping in _mappings(tree):
        found += _models_in(".".join(entry), mapping, signs)
    if found:
        return [model for model in found if type(config) is model.row.config_type] or found
    if isinstance(tree, Mapping):
        for name in sorted(_WHOLE_MODELS & tree.keys()):
            if isinstance(tree[name], Record):
                raise whole_object(tree[name].name, f"the entry {shown(name)}")
        states = [state for _, state in _mappings(tree) if any(map(is_entry, state.values()))]
        if states:
            keys = [str(key) for key in max(states, key=len)]
            what = f"its {len(keys)} keys are of no known layout: {_some(keys)}. {_advice(keys)}"
            raise CheckpointError(f"{what}Needed is one of: {layouts_read()}")
    is_dict = isinstance(tree, Mapping)
    holds = f"a dict with the entries {_some(tree)}" if is_dict else f"a {type(tree).__name__}"
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


def _models_in(entry: str, mapping: Mapping[Any, Any], signs: list[_Sign]) -> list[Found]:
    endings = tuple(sign.probe for sign in signs)
    found: dict[str, _Sign] = {}
    for key, value in mapping.items():
        if isinstance(key, str) and key.endswith(endings) and is_entry(value):
            for sign in signs:
                prefix = key.removesuffix(sign.probe)
                if (
                    key.endswith(sign.probe)
                    and prefix[-1:] in ("", ".")
                    and len(prefix) <= _MAX_NAME
                    and (not sign.marks or any(prefix + mark in mapping for mark in sign.marks))
                ):
                    found.setdefault(prefix, sign)
                    break
    states: dict[str, dict[str, Any]] = {prefix: {} for prefix in found}
    beside = []
    for key, value in mapping.items() if found else ():
        name = str(key)
        dots = [i + 1 for i, c in enumerate(name[:_MAX_NAME]) if c == "."]
        own = next((name[:i] for i in reversed([0, *dots]) if name[:i] in states), None)
        if own is not None:
            states[own][name.removeprefix(own)] = value
        elif is_entry(value) and not _is_counter(name, value):  # of a neck, a head, another model
            beside.append(name)
    return [
        Found(sign.row, entry, prefix, sign.layout, states[prefix], tuple(beside))
        for prefix, sign in found.items()
    ]


def choose_model(models: Sequence[Found], entry: str | None) -> tuple[Found, list[Found]]:
    """The model called entry, and those that hold other weights.

    Without entry, the only model, or the only one at the top, under ``model`` or ``state_dict``.
    Raises: CheckpointError if there is none, or more than one.
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
                    f"{asked}, and {len(fitting)} models in it have exactly this name. Save one "
                    f"alone, with PyTorch: {SAFE_LOAD}; torch.save(state[...], new_path)"
                )
            many = "several" if fitting else "none"
            what = f"{many} of the models in it are called so"
            raise CheckpointError(f"{asked}, and {what}. There are: {names}")
    else:
        fitting = models = _different(models)
        if len(models) > 1:
            fitting = [model for model in models if model.entry in STATE_ENTRIES]
        if len(fitting) != 1:
            raise CheckpointError(f"it holds several models. Choose one of: {names}")
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

    def place(x: Any) -> Any:
        return (x.storage, x.offset, x.shape, x.strides) if hasattr(x, "storage") else id(x)

    return a.state.keys() == b.state.keys() and all(
        x is b.state[key] or place(x) == place(b.state[key]) for key, x in a.state.items()
    )


def without_counters(model: Found) -> tuple[Found, list[str]]:
    """The model without single numbers that profilers and batch norms leave, and their names."""
    counters = {key for key, x in model.state.items() if _is_counter(key, x)}
    state = {key: x for key, x in model.state.items() if key not in counters}
    return model._replace(state=state), sorted({key.rpartition(".")[2] for key in counters})


def _is_counter(key: str, x: Any) -> bool:
    return key.rpartition(".")[2] in _COUNTERS and is_entry(x) and math.prod(x.shape) == 1


def as_backbone(model: Found, wanted: bool) -> Found:
    """The model in the layout of a bare backbone, if it has no head or none is wanted."""
    if not model.row.files:
        return model
    layout, base = model.row.files.bare(model.layout, model.state, wanted)
    state = {k.removeprefix(base): x for k, x in model.state.items() if k.startswith(base)}
    return model._replace(layout=layout, prefix=model.prefix + base, state=state)


def _advice(keys: Iterable[str]) -> str:
    files = (row.files for row in architectures() if row.files)
    return next((advice for x in files if (advice := x.advice(keys))), "")


def _some(names: Any, count: int = 4) -> str:
    some = [shown(name, 60) for name in itertools.islice(names, count + 1)]
    return ", ".join(some[:count]) + (", ..." if len(some) > count else "") or "none"


def _problems(model: Found, config: Any) -> list[str]:
    shapes = foreign_shapes(model.layout, config)
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
        elif dtype_name(x) not in READABLE_DTYPES:
            problems.append(f"{_WRONG_DTYPE} {names[key]} is {dtype_name(x)}, weights are floats")
    return problems


def check_state(model: Found, config: Any, origin: str = "") -> None:
    """Refuses what is not the model of config, which origin says. Raises: CheckpointError."""
    layout, state = model.layout, model.state
    if layout.has_classifier is False and config.has_classifier:
        raise CheckpointError(
            f"it is a bare backbone ({layout.name}: it has no head), and the configuration has "
            f"num_classes={config.num_classes}. Pass dataclasses.replace(config, num_classes=0); "
            f"with_new_head(model, ...) adds a head"
        )
    blocks = model.row.files.blocks(config) if model.row.files else 0
    if blocks > max(len(state), _FEW):  # before anything is built for each of them
        whose = f" from {origin}" if origin else ""
        what = f"the configuration{whose} has {blocks} blocks, and the file only"
        raise CheckpointError(f"{what} {len(state)} tensors. Correct its depth")
    problems = _problems(model, config)
    if problems:
        source = f" from {origin}" if origin not in ("", "config") else ""
        raise CheckpointError(
            f"{layout.name}, but it does not fit the configuration{source} "
            f"({model.row.describe(config)}):{_lines(problems)}\n{_advice(state)}The likely cause "
            f"is a configuration of another variant, class count or image size"
        )


def _lines(problems: list[str]) -> str:
    more = [f"... and {len(problems) - _MAX_LINES} more"] if len(problems) > _MAX_LINES else []
    return "".join(f"\n  - {problem}" for problem in [*problems[:_MAX_LINES], *more])


def complete(stated: Stated, model: Found) -> Any:
    """A stated configuration; what it leaves open is read off shapes. Raises: CheckpointError."""
    files, kind = model.row.files, model.row.config_type.__name__
    if not files:
        return stated.config
    shapes = _shapes(model.state)
    seen = files.fit(stated.config, shapes, model.layout)
    if seen.has_classifier and stated.num_labels not in (None, seen.num_classes):
        raise CheckpointError(
            f"{stated.origin} says {stated.num_labels} labels, and the head in the file has "
            f"{seen.num_classes} outputs. Correct {stated.origin}, or pass config={kind}(...)"
        )
    fields = {name: getattr(seen, name) for name in SHOWN_BY_SHAPES}
    if not set(stated.left_open) <= fields.keys():
        fields |= files.shown(shapes, model.layout) | {"num_classes": seen.num_classes}
    changes = {name: fields[name] for name in stated.left_open if name in fields}
    if "num_heads" in stated.left_open:
        widths = changes.get(files.widths, getattr(stated.config, files.widths))
        known = model.row.variants.values()
        heads = {x.num_heads for x in known if getattr(x, files.widths) == widths}
        if len(heads) != 1:
            whose = "variants with different ones" if heads else "no variant"
            raise CheckpointError(
                f"{stated.origin} does not say how many heads the model has, which no shape shows, "
                f"and {files.widths} {widths} are those of {whose}. Write num_heads into it "
                f"(num_attention_heads in Hugging Face's config.json), or pass config={kind}(...)"
            )
        (changes["num_heads"],) = heads
    return dataclasses.replace(stated.config, **changes)


def recognise_config(model: Found) -> Any:
    """The published variant whose keys and shapes are a model's. Raises: CheckpointError."""
    row, layout, state = model.row, model.layout, model.state
    assert row.files is not None  # or nobody would have found it without a configuration
    shapes = _shapes(state)
    count = math.inf
    for candidate, variant in row.variants.items():
        fitted = row.files.fit(variant, shapes, layout)
        found = _problems(model, fitted)
        if not found:
            return fitted
        if all(problem.startswith(_WRONG_DTYPE) for problem in found):
            raise CheckpointError(
                f"{layout.name}, {row.describe(fitted)}, but {len(found)} of its {len(state)} "
                f"tensors are not of {', '.join(READABLE_DTYPES)}:{_lines(found)}\n{QUANTIZED}"
            )
        if len(found) < count:
            count, name, config, problems = len(found), candidate, fitted, found
    kind = row.config_type.__name__
    advice = (
        f"If it is another model, pass its configuration, load(path, config={kind}(...)) or "
        f"config='path/to/config.json': head counts (num_heads) cannot be read off shapes, so only "
        f"the published variants are recognised without"
    )
    if count <= len(shapes) // 4:  # a variant with faults, or a variant changed a little
        raise CheckpointError(
            f"{layout.name}; nearest is {name} ({row.describe(config)}), but "
            f"{'1 key differs' if count == 1 else f'{count} keys differ'}:{_lines(problems)}\n"
            f"{_advice(state)}{advice}"
        )
    fields = ", ".join(f"{k}={value}" for k, value in row.files.shown(shapes, layout).items())
    read_off = f"Its shapes show {kind}({fields}, num_heads=unknown). " if fields else ""
    raise CheckpointError(
        f"{layout.name}, but none of {', '.join(row.variants)}. {_advice(state)}{read_off}{advice}"
    )
