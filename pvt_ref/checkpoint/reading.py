"""From a weights file to a model."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pvt_ref import errors
from pvt_ref.api import from_state_dict
from pvt_ref.app import Model
from pvt_ref.arrays import dtype_name, quietly
from pvt_ref.checkpoint import recognise
from pvt_ref.checkpoint import safetensors_file as own
from pvt_ref.checkpoint import stated as statements
from pvt_ref.checkpoint.files import FilePath, as_path, cut_path
from pvt_ref.checkpoint.key_maps import foreign_shapes, to_native
from pvt_ref.checkpoint.legacy import is_legacy
from pvt_ref.checkpoint.other_kinds import refuse_other_kind
from pvt_ref.checkpoint.pth import open_pth
from pvt_ref.checkpoint.recognise import Found, few
from pvt_ref.checkpoint.stated import PREPROCESSOR_FILE, Stated, eps_of, from_argument, read_json
from pvt_ref.checkpoint.stored import PACK
from pvt_ref.checks import is_moderate
from pvt_ref.data.imagenet import released_info
from pvt_ref.data.info import UNKNOWN, ModelInfo
from pvt_ref.errors import CheckpointError, PVTError, printable, shown
from pvt_ref.models.architecture import Architecture, architecture_of, known_variants
from pvt_ref.models.layouts import Layout, same_key
from pvt_ref.tree import first_array

_SUFFIXES = {".safetensors", ".bin", ".ckpt", ".pkl", ".pt", ".pth", ".tar", ".th"}
_INDEX = ".index.json"
_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")  # of save_pretrained; the first wins
_MAX_SHARDS = 1000
_OWN_CONFIG = "Leave config out: the file brings its own"


def read_model(
    path: FilePath, config: Any, entry: str | None = None, eps: Any = None, released: str = ""
) -> Model:
    """:func:`load`; released is the origin of released weights, which need no JSON beside them."""
    path = as_path(path)
    stated = from_argument(config)
    if not isinstance(entry, str | None):
        raise errors.ArrayTypeError(f"entry is a {type(entry).__name__}, not a name such as 'ema'")
    if eps is not None:
        pair: Any = eps if isinstance(eps, Sequence) and not isinstance(eps, str) else (eps, eps)
        if len(pair) != 2 or not all(is_moderate(x) and x >= 0 for x in pair):
            form = "one number, or (norm_eps, projection_norm_eps), finite and 0 or more"
            raise errors.ConfigError(f"eps is {shown(eps)}; it must be {form}")
        eps = float(pair[0]), float(pair[1])
    try:
        path.stat()  # from Python 3.14 on, path.exists() returns False if it cannot tell
        if re.search(r"-\d{5}-of-(?!00001)\d{5}\.", path.name):
            raise CheckpointError(f"one of several files; load their folder, {path.parent}")
        with contextlib.ExitStack() as stack:
            return _load(_open(path, stack), config, stated, entry, eps, released)
    except errors.MissingFileError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise errors.MissingFileError(_missing(path)) from None
    except CheckpointError as error:
        raise CheckpointError(f"{cut_path(path)}: {error}") from error.__cause__
    except (PVTError, OSError) as error:
        what = f"cannot be read: {errors.reason(error)}" if isinstance(error, OSError) else error
        raise CheckpointError(f"{cut_path(path)}: {what}") from error


class _Opened(NamedTuple):
    """A file, or several parts of one checkpoint, before the weights are read."""

    path: Path
    tree: Any  # dicts of arrays, or of tensors that are not read yet
    metadata: dict[str, str]
    read: Callable[[dict[str, Any]], dict[str, np.ndarray]]
    notes: tuple[str, ...] = ()


def _open(path: Path, stack: contextlib.ExitStack) -> _Opened:
    if path.is_dir():
        opened = _open(_file_in(path), stack)
        return opened._replace(notes=(f"read from {opened.path.name}", *opened.notes))
    if not path.is_file():  # reading a pipe could block forever
        raise CheckpointError("not a regular file; copy the weights into one")
    if path.name.endswith(_INDEX):
        return _open_shards(path, stack)
    if path.suffix == ".json":
        what = "a JSON file, which holds no weights. Pass the weights file, or the folder of both"
        raise CheckpointError(f"{what}; load(weights, config={path.name!r}) reads a configuration")
    file = stack.enter_context(path.open("rb"))
    size = os.fstat(file.fileno()).st_size
    head = file.read(64)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _Opened(path, *own.read_tensors(file), own.widen)
    if not head.startswith(b"PK\x03\x04") and not is_legacy(head):
        raise refuse_other_kind(file, recognise.layouts_read())
    pth = open_pth(file)
    notes: list[str] = []
    if pth.foreign:
        notes.append(f"objects beside the weights were not made: {few(pth.foreign)}")
    if not pth.checksummed:
        notes.append("the file has no checksums")
    return _Opened(path, pth.tree, {}, pth.read, tuple(notes))  # tensors are read when needed


def _file_in(folder: Path) -> Path:
    for name in (x for file in _IN_FOLDER for x in (file, file + _INDEX)):
        if (folder / name).exists():
            return folder / name
    if (folder / "data.pkl").exists():
        what = f"the folder of an unpacked PyTorch file. {PACK} {shown(folder.name)}"
        raise CheckpointError(what)
    what = f"a directory without {' or '.join(_IN_FOLDER)}, which save_pretrained writes. Pass"
    raise CheckpointError(f"{what} the path of a weights file (it has: {_weights_in(folder)})")


def _open_shards(path: Path, stack: contextlib.ExitStack) -> _Opened:
    places = read_json(path, path.name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{path.name} has no weight_map from keys to file names")
    names = sorted(set(places.values()))
    if not 0 < len(names) <= _MAX_SHARDS:
        raise CheckpointError(f"{path.name} names {len(names)} files; 1 to {_MAX_SHARDS} are read")
    for name in names:
        what = f"{path.name} names the file {shown(name)}"
        if re.search(r"[/\\:\0]", name) or name.endswith(_INDEX) or name in ("", ".", ".."):
            raise CheckpointError(f"{what}; only names in its own folder are read")
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{what}, which is not beside it; all {len(names)} must be")
    shards = {name: _open(path.parent / name, stack) for name in names}
    tree: dict[str, Any] = {}
    for name, shard in shards.items():
        said = {key for key, place in places.items() if place == name}
        if not isinstance(shard.tree, dict) or shard.tree.keys() != said:
            what = f"{path.name} and {shown(name)} name different weights"
            raise CheckpointError(f"{what}: they are not of one checkpoint")
        own.check_foreign_metadata(shard.metadata)
        tree |= shard.tree
    place_of = {id(tree[key]): name for key, name in places.items()}

    def read(state: dict[str, Any]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for name, shard in shards.items():
            arrays |= shard.read({k: x for k, x in state.items() if place_of[id(x)] == name})
        return {key: arrays[key] for key in state}

    notes = tuple(dict.fromkeys(note for shard in shards.values() for note in shard.notes))
    return _Opened(path, {key: tree[key] for key in places}, {}, read, notes)


def _load(
    opened: _Opened, config: Any, stated: Stated | None, entry: str | None, eps: Any, released: str
) -> Model:
    notes = [released] if released else list(opened.notes)  # for `source`
    assumed: list[str] = []
    stored, info = own.own_header(opened.tree, opened.metadata)
    if not stored:
        model = _choose(opened, stated, entry, notes)
    elif entry is None:
        layout = Layout(name="pvt_ref file")
        model = Found(architecture_of(stored), "", "", layout, dict(opened.tree))
    else:
        raise CheckpointError("a pvt_ref file, which holds one model: leave entry out")
    row = model.row
    folder = opened.path.parent if model.layout.config_beside and not released else None
    if stated and type(stated.config) is not row.config_type:
        if not isinstance(config, str | os.PathLike) or config in known_variants():
            what = f"it holds a {row.title}, but config is a {type(stated.config).__name__}"
            raise CheckpointError(f"{what}. Leave config out, or pass a {row.config_type.__name__}")
        stated = from_argument(config, row)  # a JSON file, whose fields may fit several networks
    if stored:
        used = _as_stored(stated, stored, notes) if stated else stored
    else:
        if stated and stated.origin != "config" and not released:
            notes.append(f"configuration from {printable(stated.origin)}")
        if folder:
            stated = _ask_beside(folder / "config.json", stated, row, eps, notes)
        if stated is None:
            used = recognise.recognise_config(model)
            assumed.append(f"heads as in {row.describe(used).partition(',')[0]}")
        else:
            used = recognise.complete(stated, model)
            assumed += _unsaid(used, stated, eps)
    recognise.check_state(model, used, stated.origin if stated else "")
    chosen = eps_of(used)  # right for released weights in any layout
    if eps is not None:
        if not chosen and row.dense:
            what = f"eps is {eps}, but those of a {row.title} are in its backbone"
            raise CheckpointError(f"{what}. Set them in config's backbone, and leave eps out")
        if len(set(eps)) > len(chosen):
            what = f"eps is {eps}; a {row.title} has {len(chosen)}. Pass one number"
            raise CheckpointError(what)
        chosen = dict(zip(chosen, eps, strict=False))
    elif model.layout.eps and not released and not (stated and stated.says_eps):
        usual = dict(zip(chosen, model.layout.eps, strict=True))
        # the port's value, though its weights may be the authors'
        if stated is None or not chosen.keys().isdisjoint(stated.left_open) or chosen != usual:
            hint = f" ({model.layout.eps_advice})" if model.layout.eps_advice else ""
            assumed.append(f"eps of this layout's code{hint}")
        chosen = usual
    used = dataclasses.replace(used, **chosen)
    if model.layout.resize_assumed and (not stated or "position_resize" in stated.left_open):
        assumed.append(model.layout.resize_assumed)
    wanted = foreign_shapes(model.layout, used)
    state = {key: x for key, x in model.state.items() if key in wanted}
    rest = sorted(model.prefix + key for key in model.state.keys() - state.keys())
    if rest:
        names = ", ".join(rest)
        notes.append(
            f"left out: {few(rest)}" if row.dense else f"left out, since there is no head: {names}"
        )
    # casting a signalling NaN would warn; Model refuses it below
    params = from_state_dict(quietly(to_native, opened.read(state), model.layout, used), used)
    if not info:
        info, more = _info(used, stored, stated, folder, released, notes)
        assumed += more
    under = f" (under {shown(model.name, 200)})" if model.name else ""
    halves = {dtype_name(x) for x in state.values()} & {"float16", "bfloat16"}
    narrow = bool(halves) and first_array(params).itemsize == 4
    made = f", {' and '.join(sorted(halves))} made float32" if narrow else ""
    if assumed:
        notes.append(f"assumed: {', '.join(assumed)}")
    what = [f"{model.layout.name}{under}, {row.describe(used)}{made}"]
    if numbers := [f"{x:g}" for x in eps_of(used).values()]:
        several = len(set(numbers)) > 1
        where = f", and {numbers[1]} in the projection norms" if several else " in every norm"
        what.append(f"eps {numbers[0]}{where}")
    return Model(params, used, "; ".join((*what, *notes)), info)


def _unsaid(config: Any, stated: Stated, eps: tuple[float, ...] | None) -> Iterator[str]:
    """Facts missing from a JSON file that shapes do not show either, for ``source``."""
    names = [name for name in ("num_heads", "qk_scale") if hasattr(config, name)]
    if stated.says_eps and eps is None:  # it says one of the two
        names += eps_of(config)
    unsaid = [f"{name} {getattr(config, name)}" for name in names if name in stated.left_open]
    if unsaid:
        yield f"{' and '.join(unsaid)}, since {printable(stated.origin)} does not say"
    if stated.task:
        wanted = f"though problem_type is {printable(stated.task)}"
        advice = "take probabilities from the logits yourself"
        yield f"one class per picture, by softmax, {wanted}: {advice}"


def _choose(opened: _Opened, stated: Stated | None, entry: str | None, notes: list[str]) -> Found:
    """The chosen model, in the layout in which it will be read."""
    config = stated.config if stated else None
    models = recognise.find_models(opened.tree, config)
    chosen, others = recognise.choose_model(models, entry, config)
    if chosen.layout.rename is same_key:  # as files of save have it
        own.check_foreign_metadata(opened.metadata)
    if opened.metadata.keys() - {"format"}:
        notes.append("metadata of another program is ignored")
    if others:
        notes.append(f"other weights in the file: {few(others, Found.as_argument)}")
    bare = False
    if stated and "num_classes" not in stated.left_open:
        bare = not stated.config.has_classifier
    model, counters = recognise.as_read(chosen, bare)
    if chosen.layout.has_classifier and not model.layout.has_classifier:
        notes.append("the classifier is left out, as config asks")
    if chosen.beside:
        notes.append(f"left out: {few(chosen.beside)}")
    if counters:
        notes.append(f"counters beside the weights are ignored: {', '.join(counters)}")
    return model


def _ask_beside(
    path: Path, stated: Stated | None, row: Architecture, eps: Any, notes: list[str]
) -> Stated | None:
    """Combines config.json with what is known already; an error where they differ."""
    if not path.exists():
        return stated
    origin = f"{path.name} beside it"
    try:
        if stated is None and not statements.describes_model(read_json(path, origin), row):
            notes.append(f"not used: {origin}, which does not describe a {row.title}")
            return None
        said = statements.read_config(path, origin, row)
    except PVTError as error:
        if stated is not None:
            notes.append(f"not used: {' '.join(str(error).split())[:200]}")
            return stated
        advice = f"pass config={row.config_type.__name__}(...) for these, or a variant's name"
        what = f"{str(error).rstrip('.')}. If it belongs to other weights, {advice}"
        raise CheckpointError(what) from error
    if stated is None:
        notes.append(f"configuration from {origin}")
        return said
    both = eps_of(said.config)
    for name in ("num_heads", *(both if stated.says_eps and eps is None else ())):
        given, written = (
            "not said" if name in x.left_open else getattr(x.config, name) for x in (stated, said)
        )
        if written not in (given, "not said"):
            what = f"{name} is {given} in {stated.origin} and {written} in {origin}"
            decides = "; eps= decides" if name in both else ""
            raise CheckpointError(f"{what}{decides}. Leave config out, or correct {path.name}")
    found = {name: x for name, x in both.items() if said.says_eps and name not in said.left_open}
    notes.append(f"{'eps and ' if found else ''}labels from {origin}")
    return dataclasses.replace(
        said,
        config=dataclasses.replace(stated.config, **found),
        origin=stated.origin,
        left_open=tuple(name for name in stated.left_open if name not in found),
        says_eps=stated.says_eps or said.says_eps,
    )


def _info(
    config: Any, stored: Any, stated: Stated | None, folder: Path | None, released: str, notes: Any
) -> tuple[ModelInfo, list[str]]:
    """Class names and preprocessing, and which of them are assumed."""
    assumed: list[str] = []
    info = UNKNOWN if stored else released_info(config)
    if stated and stated.classes and config.has_classifier:
        info = ModelInfo(classes=stated.classes)
    elif info.classes and not released:
        assumed.append("ImageNet's class names")
    if folder and (path := folder / PREPROCESSOR_FILE).exists():
        preprocessing, said = statements.read_preprocessing(path, config)
        notes.append(said)
        if preprocessing:
            return dataclasses.replace(info, preprocessing=preprocessing), assumed
    if config.in_chans != info.preprocessing.channels:
        notes.append(f"no preprocessing is known for in_chans={config.in_chans}")
    elif not released:
        assumed.append("ImageNet's preprocessing")
    return info, assumed


def _as_stored(stated: Stated, stored: Any, notes: list[str]) -> Any:
    """The configuration in a file of save, with the eps and drop rates of a given one."""
    changes = {name: getattr(stored, name) for name in stated.left_open}
    if stated.num_labels not in (None, stored.num_classes):
        what = f"{stated.origin} says {stated.num_labels} labels, but the file says"
        raise CheckpointError(f"{what} num_classes={stored.num_classes}. {_OWN_CONFIG}")
    saved, given = dataclasses.asdict(stored), dataclasses.asdict(stated.config) | changes
    free = ("norm_eps", "drop_rate", "drop_path_rate")  # and names that end so: weights fit any
    wrong = [name for name in saved if not name.endswith(free) and saved[name] != given[name]]
    if wrong:
        what = "; ".join(f"{x} is {saved[x]} in the file and {given[x]} in config" for x in wrong)
        raise CheckpointError(f"a pvt_ref file of another model than config: {what}. {_OWN_CONFIG}")
    config = dataclasses.replace(stated.config, **changes)
    if not stated.says_eps and eps_of(config) != eps_of(stored):
        notes.append("eps as it was saved, since config has the defaults")
        config = dataclasses.replace(config, **eps_of(stored))
    return config


def _missing(path: Path) -> str:
    there = f"weights files there: {_weights_in(path.parent)}"
    if not path.parent.is_dir():
        there = f"nor is there a directory {cut_path(path.parent)}"
    try:
        here = os.getcwd()
    except OSError:
        here = "deleted"
    return f"{cut_path(path)}: there is no such file ({there}). The working directory is {here}"


def _weights_in(folder: Path) -> str:
    names = []
    with contextlib.suppress(OSError):
        names = sorted(path.name for path in folder.iterdir() if path.suffix in _SUFFIXES)
    return few(names, count=5)
