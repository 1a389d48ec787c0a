"""``python -m pvt_ref train DIR --out RUN``: from a folder of photos to a trained network.

The arguments of :func:`~pvt_ref.train.loop.fit` come from the folder and a few options: training
and held-out samples, the initial network, and a recipe. A run's folder has, besides fit's files::

    run.json             options, the photos held out, those that are damaged
    start.safetensors    the weights that the training began with, class names, preprocessing
    model.safetensors    at the end: the best weights in half precision, and what was measured
    confusion.png        at the end: which class was taken for which, of the photos held out
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pvt_ref.api import init_params
from pvt_ref.app import Model, with_image_size, with_new_head
from pvt_ref.arrays import dtype_name
from pvt_ref.checkpoint import save
from pvt_ref.checkpoint.bounded_json import parse_json
from pvt_ref.checks import check_flag, check_number, check_type, settle
from pvt_ref.data.folder import Damaged, ImageFolder
from pvt_ref.data.info import ModelInfo
from pvt_ref.data.labelled import confusion_matrix
from pvt_ref.data.photo_augment import PhotoAugment
from pvt_ref.draws import What, generator
from pvt_ref.errors import (
    ArrayTypeError,
    CheckpointError,
    ConfigError,
    MissingFileError,
    PVTError,
    RangeError,
    TrainingError,
    reason,
    shown,
)
from pvt_ref.models.architecture import architecture_of, config_to_dict, known_variants
from pvt_ref.ops import Ops
from pvt_ref.report.tables import text_table
from pvt_ref.train.checks import check_path
from pvt_ref.train.data_parallel import ALONE, Ranks
from pvt_ref.train.loop import BEST, METRICS, STATE, Run, fit
from pvt_ref.train.metrics import draw_confusion
from pvt_ref.train.progress import show
from pvt_ref.train.recipe import Recipe
from pvt_ref.tree import first_array, map_arrays, named_arrays
from pvt_ref.zoo import load

RUN, START, MODEL, CONFUSION = "run.json", "start.safetensors", "model.safetensors", "confusion.png"

#: What folders of photos held out are called.
_HELD_OUT_NAMES = ("val", "valid", "validation")
#: Of a class, the share that is held out where no folder is.
_HELD_OUT_SHARE = 0.1

#: How photos are changed at random, by the names of --augment.
AUGMENTS: Mapping[str, PhotoAugment | None] = {
    "none": None,
    "light": PhotoAugment(crop_area=(0.35, 1.0)),
    "strong": PhotoAugment(crop_area=(0.2, 1.0), rand_augment=(2, 6)),
}

#: Weights to begin with where nothing is said.
DEFAULT_WEIGHTS = "imagenette"
#: Recipes for photos. Those that begin with weights keep most of what these know.
FINE_TUNING = {"epochs": 10, "batch_size": 64, "lr": 3e-4, "layer_decay": 0.75}
FINE_TUNING |= {"warmup_epochs": 1.0, "ema_decay": 0.99, "crop_padding": 0}
FROM_NOTHING = {"epochs": 100, "batch_size": 64, "lr": 1e-3, "warmup_epochs": 5.0}
FROM_NOTHING |= {"mixup_alpha": 0.2, "cutmix_alpha": 0.5, "erasing": 0.1, "crop_padding": 0}

_FORMAT = "pvt_ref folder run 1"
_LONGEST_RUN = 2**28  # bytes of run.json that are read: it holds the names of photos held out


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is said of a run. None is the default, which can depend on the others.

    Raises: ArrayTypeError or RangeError if a field is of another type.
    """

    weights: str | None = None  # name or file to begin with
    variant: str | None = None  # network; without weights it begins from nothing
    size: int | None = None  # side of what a photo becomes, in pixels
    augment: str | None = None  # a name of AUGMENTS
    class_names: str | Mapping[str, str] | None = None  # by folder, or the file that says them
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of Recipe
    damaged: str | None = None  # "refuse" (default) or "skip"

    def __post_init__(self) -> None:
        for name in ("weights", "variant", "augment", "damaged"):
            if getattr(self, name) is not None:
                check_type(name, getattr(self, name), str, "or None")
        if self.size is not None:
            settle(self, "size", least=1, most=2**15, whole=True)
        if self.class_names is not None and not isinstance(self.class_names, str):
            check_type("class_names", self.class_names, Mapping, "a file's name, or None")
        for name, known in (("augment", AUGMENTS), ("damaged", ("refuse", "skip"))):
            if getattr(self, name) not in (None, *known):
                needed = f"it must be one of {', '.join(known)}"
                raise RangeError(f"{name} is {shown(getattr(self, name))}; {needed}")
        check_type("recipe", self.recipe, Mapping, "of fields of Recipe")
        fields = [field.name for field in dataclasses.fields(Recipe)]
        if strange := [name for name in self.recipe if name not in fields]:
            what = f"recipe has {shown(strange[0])}, which is no field of Recipe"
            raise TrainingError(f"{what}; these are {', '.join(fields)}")


def train_folder(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Options,
    *,
    config: Any = None,
    resume: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    console: Console | None = None,
    stop_at_step: int | None = None,
    ranks: Ranks = ALONE,
    ops: Ops | None = None,
) -> Run:
    """Trains on a folder of photos, or resumes a training.

    data holds ``train`` and ``val`` (or ``valid``, ``validation``), each with a folder per class.
    If there is only ``train``, or only the classes' folders themselves, a tenth of each class is
    held out, chosen by the seed, and the run keeps its list.

    Args:
        data: the folder of photos.
        out: the run's folder.
        options: see :class:`Options`. Resuming, those that are given must be those of the run.
        config: a network to begin from nothing with, instead of ``options.variant``; its number of
            classes becomes that of the folders. Resuming, it is that of the run.
        resume: continue the run in its folder.
        device: as for :func:`fit`.
        workers: as for :func:`fit`.
        console: where progress is shown; None shows nothing.
        stop_at_step: as for :func:`fit`.
        ranks: as for :func:`fit`. Where the recipe says nothing, each gets a micro-batch.
        ops: as for :func:`fit`.

    Returns:
        As :func:`fit`.

    Raises:
        TrainingError: if there are no samples, some are damaged, the options contradict one
            another, or the folder holds another run.
        MissingFileError: if a folder or file is not there.
        PVTError: as :func:`fit` and :func:`pvt_ref.load`.
    """
    check_type("ranks", ranks, Ranks, "from pvt_ref.train.data_parallel")
    try:
        of_data, place = check_path("data", data), check_path("out", out)
        check_type("options", options, Options)
        check_flag("resume", resume)
        ranks.gather(None)  # all are there
    except PVTError as error:
        ranks.fail(error)
        raise

    def begin() -> tuple[dict[str, Any], Model]:
        if resume:
            record, model = _read_run(place)
            _check_same(place, record, options)
            return record, model
        return _new_run(of_data, place, options, config, workers, console, ranks.size)

    record, model = ranks.from_first(begin)
    try:
        return _train(
            of_data, place, record, model, resume, console, ranks,
            device=device, workers=workers, stop_at_step=stop_at_step, ops=ops,
        )  # fmt: skip
    except PVTError as error:
        ranks.fail(error)
        if ranks.is_first and not resume and not (place / STATE).exists():
            _take_back(place)  # nothing was learnt: the same command may be given again, mended
        raise


def _train(
    data: Path,
    place: Path,
    record: Mapping[str, Any],
    model: Model,
    resume: bool,
    console: Console | None,
    ranks: Ranks,
    **settings: Any,
) -> Run:
    """Trains as a run's record says, from its first model or saved state; settings are fit's."""
    recipe = Recipe(**record["recipe"])
    learnt, held_out = _split(data, record)
    ranks.gather(None)  # all have the photos
    made = {"size": model.config.img_size, "preprocessing": model.info.preprocessing}
    learnt = learnt.replace(**made, augment=AUGMENTS[record["augment"]])
    held_out = held_out.replace(**made)
    K, N = len(learnt.classes), len(learnt)
    told = f"{N:,} photos of {K} classes to learn from, {len(held_out):,} held out"
    numbers = sum(x.size for _, x in named_arrays(model.params))
    begun = f"{record['begun_with']}, {numbers:,} parameters, {model.config.img_size} pixels"
    show(console, f"{told}; begun with {begun}; {recipe.epochs} epochs")
    there = ranks.from_first(lambda: (place / STATE).exists())
    done = fit(
        model.config,
        recipe,
        learnt,
        held_out,
        place,
        info=model.info,
        first=model.params,
        resume=resume and there,
        console=console,
        ranks=ranks,
        **settings,
    )
    if done.finished and ranks.is_first:
        _finish(done, held_out, record, console)
    ranks.gather(None)  # what rank 0 could not write, it says here
    return done


def _take_back(place: Path) -> None:
    """Removes what :func:`_new_run` wrote, and the folder if nothing else is in it."""
    for name in (RUN, START):
        (place / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        place.rmdir()


def _new_run(
    data: Path,
    place: Path,
    options: Options,
    config: Any,
    workers: int | None,
    console: Console | None,
    ranks: int,
) -> tuple[dict[str, Any], Model]:
    """The record of a run, and the network that it begins with, both written to its folder."""
    there = [name for name in (RUN, START, STATE, BEST, METRICS) if (place / name).exists()]
    if there:
        what = f"{place} holds a training already ({', '.join(there)})"
        raise TrainingError(f"{what}. Go on with it (--resume), or name another folder")
    learnt, held_out = _folders(data)
    from_nothing = options.weights is None and (options.variant or config) is not None
    seed = _recipe(options.recipe, from_nothing, len(learnt), ranks).seed  # refuses a wrong one
    model = _first_model(learnt.classes, options, config, seed)
    learnt, record = _samples(learnt, held_out, options, seed, workers, console)
    recipe = _recipe(options.recipe, from_nothing, len(learnt), ranks)
    record |= {"format": _FORMAT, "options": _plain(options), "recipe": recipe.to_dict()}
    random = options.variant or "a network of its own"
    weights = f"the weights {options.weights or DEFAULT_WEIGHTS}"
    record["begun_with"] = f"{random}, random weights" if from_nothing else weights
    record["augment"] = options.augment or ("strong" if from_nothing else "light")
    record = json.loads(json.dumps(record))  # as it will be read
    _write_run(place, record, model)
    return record, model


def _folders(data: Path) -> tuple[ImageFolder, ImageFolder | None]:
    """The photos to learn from, and those held out; None if they are to be split off."""
    if not data.is_dir():
        what = f"there is no folder {shown(str(data), 200)}"
        raise MissingFileError(f"{what}; check the spelling")
    if not (data / "train").is_dir():
        return ImageFolder(data), None
    there = [data / name for name in _HELD_OUT_NAMES if (data / name).is_dir()]
    if len(there) > 1:
        names = " and ".join(path.name for path in there)
        what = f"{shown(str(data), 200)} has the folders {names}"
        raise TrainingError(f"{what}; one of them must hold the photos held out. Move the other")
    learnt = ImageFolder(data / "train")
    return learnt, ImageFolder(there[0], classes=learnt.classes) if there else None


def _samples(
    learnt: ImageFolder,
    held_out: ImageFolder | None,
    options: Options,
    seed: int,
    workers: int | None,
    console: Console | None,
) -> tuple[ImageFolder, dict[str, Any]]:
    """What is learnt from, and the names of what is held out of it or damaged."""
    if len(learnt.classes) < 2:
        what = f"{shown(str(learnt.root), 200)} has one class, {shown(next(iter(learnt.classes)))}"
        raise TrainingError(f"{what}; it needs at least two. Add folders of other classes")
    folders = [folder for folder in (learnt, held_out) if folder is not None]
    show(console, f"reading {sum(map(len, folders)):,} photos, to see whether any is damaged")
    damaged = [[fault for fault in folder.check(workers) if fault] for folder in folders]
    if any(damaged):
        _refuse_or_say([photo for of_folder in damaged for photo in of_folder], options, console)
    left_out, names = {photo.file for photo in damaged[0]}, None
    learnt = _without(learnt, left_out)
    if held_out is None:
        chosen = stratified_split(learnt.labels, _HELD_OUT_SHARE, seed)
        if not len(chosen):
            what = f"no class of {shown(str(learnt.root), 200)} has two photos"
            raise TrainingError(f"{what}, one to learn from and one to hold out. Add photos")
        names = [learnt.files[i] for i in chosen]
        learnt = _without(learnt, set(names))
    return learnt, {"damaged": damaged, "held_out": names}


def _split(data: Path, record: Mapping[str, Any]) -> tuple[ImageFolder, ImageFolder]:
    """What is learnt from and what is held out, as a run's record says."""
    learnt, held_out = _folders(data)
    damaged = [{photo[0] for photo in of_folder} for of_folder in record["damaged"]]
    if record["held_out"] is not None:
        names = set(record["held_out"])
        held_out = learnt.subset([i for i, file in enumerate(learnt.files) if file in names])
        return _without(learnt, damaged[0] | names), held_out
    if held_out is None:
        what = f"{shown(str(data), 200)} has no folder of photos held out any more"
        raise TrainingError(f"{what}, on which the run's epochs were compared. Put it back")
    return _without(learnt, damaged[0]), _without(held_out, damaged[1])


def _without(folder: ImageFolder, left_out: Collection[str]) -> ImageFolder:
    return folder.subset([i for i, file in enumerate(folder.files) if file not in left_out])


def _refuse_or_say(damaged: list[Damaged], options: Options, console: Console | None) -> None:
    shown_ones = [f"\n  - {photo.why}" for photo in damaged[:20]]
    more = f"\n  - and {len(damaged) - 20} more" if len(damaged) > 20 else ""
    photos = "1 photo" if len(damaged) == 1 else f"{len(damaged):,} photos"
    what = f"{photos} cannot be read:{''.join(shown_ones)}{more}"
    if options.damaged != "skip":
        raise TrainingError(f"{what}\nMend or remove them, or leave them out: --damaged skip")
    show(console, f"left out: {what}")


def stratified_split(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Some samples of every class that has at least two, the rest of which stays.
    Raises: ArrayTypeError or RangeError if an argument is none of these.

    Args:
        labels: (N,) integers.
        share: of each class, above 0 and below 1; at least one sample is chosen, and one stays.
        seed: of the choice.

    Returns:
        (n,) int64, their numbers, rising.
    """
    share = check_number("share", share, above=0, below=1)
    seed = check_number("seed", seed, least=0, whole=True)
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ArrayTypeError(f"labels are {shown(labels)}; they must be an array (N,) of integers")
    if not labels.size or labels.min() < 0:
        raise RangeError("labels must be classes from 0 on, of at least one sample")
    chosen: list[np.ndarray] = []
    for k in np.unique(labels):
        places = np.flatnonzero(labels == k)
        rng = generator(seed, What.SPLIT, int(k))
        count = min(max(1, round(share * len(places))), len(places) - 1)
        chosen.append(rng.permutation(places)[:count])
    return np.sort(np.concatenate(chosen))


def _first_model(folders: tuple[str, ...], options: Options, config: Any, seed: int) -> Model:
    """The network before the first step, for classes in folders of these names."""
    rng, variants = generator(seed, What.FIRST_WEIGHTS), known_variants()
    names = _class_names(folders, options.class_names)
    if options.variant is not None and options.variant not in variants:
        what = f"variant is {shown(options.variant)}; known are {', '.join(variants)}"
        raise TrainingError(what)
    if config is not None and (options.weights is not None or options.variant is not None):
        raise TrainingError("config is given, and weights or variant too; it must stand alone")
    if options.weights is None and (config is not None or options.variant is not None):
        config = variants[options.variant or ""] if config is None else config
        config = dataclasses.replace(config, num_classes=len(names))
        if options.size is not None:
            config = dataclasses.replace(config, img_size=options.size)
        config.grids(config.img_size, config.img_size)  # refuses sizes that would lose pixels
        model = Model(init_params(config, rng), config, "random weights")
    else:
        model = load(options.weights or DEFAULT_WEIGHTS)
        _check_variant(model, options, variants)
        if model.info.classes != names:
            model = with_new_head(model, len(names), rng)
        if options.size is not None and options.size != model.config.img_size:
            model = with_image_size(model, options.size)
    if (row := architecture_of(model.config)).dense:
        what = f"a {row.title} learns a class for every pixel, and folders name one a photo"
        raise TrainingError(f"{what}. Name a classifier; LabelledPairs and fit train the other")
    info = ModelInfo(classes=names, preprocessing=model.info.preprocessing)
    return dataclasses.replace(model, info=info)


def _check_variant(model: Model, options: Options, variants: Mapping[str, Any]) -> None:
    """Refuses a variant that the weights are not of."""
    if options.variant is None:
        return
    wanted, free = variants[options.variant], {"num_classes", "img_size"}
    if type(wanted) is type(model.config):
        old, new = config_to_dict(model.config), config_to_dict(wanted)
        other = [name for name in old if old[name] != new[name] and name not in free]
        if not other:
            return
        differ = "in " + ", ".join(other)
    else:
        differ = f"in kind: they are for a {type(model.config).__name__}"
    what = (
        f"the weights {shown(options.weights)} are not of {options.variant}; they differ {differ}"
    )
    raise TrainingError(f"{what}. Leave --variant out, or --weights to begin from nothing")


def _class_names(
    folders: tuple[str, ...], given: str | Mapping[str, str] | None
) -> tuple[str, ...]:
    """Names of the classes: those of the folders, or what is said of these."""
    if given is None:
        return folders
    in_file = isinstance(given, str)
    known, said_by = (_read_names(given), shown(given, 200)) if in_file else (given, "class_names")
    if missing := [name for name in folders if not isinstance(known.get(name), str)]:
        what = f"{said_by} has no name for the folder {shown(missing[0])}"
        form = "a line each, the folder and the name, or a JSON object of them"
        raise TrainingError(f"{what}. Needed is {form}: {missing[0]} tench")
    names = tuple(known[name] for name in folders)
    if len(set(names)) < len(names):
        raise ConfigError(f"{said_by} gives two folders the same name: {shown(names, 200)}")
    return names


def _read_names(file: str) -> dict[str, Any]:
    try:
        text = Path(file).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = f"{shown(file, 200)}: class names cannot be read ({reason(error)})"
        raise MissingFileError(f"{what}. Check the name, and that it is text in UTF-8") from error
    if text.lstrip().startswith("{"):
        return parse_json(text, shown(file, 200))
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    return {line[0]: line[1].strip() for line in lines if len(line) == 2}


def _recipe(given: Mapping[str, Any], from_nothing: bool, samples: int, ranks: int) -> Recipe:
    """What is given, and for the rest what suits so many photos and ranks."""
    suits = FROM_NOTHING if from_nothing else FINE_TUNING
    values: dict[str, Any] = {"accumulate": ranks, **suits, **given}
    if "batch_size" not in given:
        values["batch_size"] = min(values["batch_size"], samples)
    if "warmup_epochs" not in given:
        values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] / 10)
    if "lr_floor" not in given:
        values["lr_floor"] = values["lr"] / 100
    return Recipe(**values)


def _plain(options: Options) -> dict[str, Any]:
    """As JSON would give it back."""
    return json.loads(json.dumps(dataclasses.asdict(options)))


def _write_run(place: Path, record: Mapping[str, Any], model: Model) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        with (place / RUN).open("x", encoding="utf-8") as file:  # of two at once, one is refused
            json.dump(record, file, indent=1)
    except FileExistsError as error:
        what = f"{place / RUN} is there already: another training begins in this folder"
        raise TrainingError(f"{what}. Name another folder") from error
    except OSError as error:
        what = f"{place}: the folder of the run cannot be made ({reason(error)})"
        raise TrainingError(f"{what}. Name another") from error
    try:
        save(place / START, model)
    except PVTError:
        _take_back(place)
        raise


def _read_run(place: Path) -> tuple[dict[str, Any], Model]:
    if not place.is_dir():
        what = f"{place}: there is no such folder, so no training to go on with"
        raise MissingFileError(f"{what}. Start one: without --resume")
    path = place / RUN
    try:
        data = path.read_bytes()
    except OSError as error:
        what = f"{path} cannot be read ({reason(error)}), so there is no training to go on with"
        raise MissingFileError(f"{what}. Start one: without --resume") from error
    record = parse_json(data, str(path), _LONGEST_RUN)
    if not isinstance(record, dict) or not _is_record(record):
        what = f"{path} is no record of a run that this version reads"
        raise CheckpointError(f"{what}. It was edited, or is of another version: start anew")
    return record, load(str(place / START))


def _is_record(record: dict[str, Any]) -> bool:
    """Whether it is what :func:`_new_run` writes, as far as the rest relies on it."""
    parts = {"format", "options", "recipe", "augment", "begun_with", "damaged", "held_out"}
    if record.keys() != parts or record["format"] != _FORMAT or record["augment"] not in AUGMENTS:
        return False
    options, recipe, damaged = record["options"], record["recipe"], record["damaged"]
    if not all(isinstance(x, dict) for x in (options, recipe)) or not isinstance(damaged, list):
        return False
    names = {field.name for field in dataclasses.fields(Options)}
    return options.keys() == names and isinstance(options["recipe"], dict)


def _check_same(place: Path, record: Mapping[str, Any], given: Options) -> None:
    """Refuses options that are not those of the run; those that are not given do not count."""
    new = _plain(given)
    recipe = new.pop("recipe")
    flat = {**record["options"], "augment": record["augment"], **record["recipe"]}
    wanted = {name: value for name, value in new.items() if value is not None} | recipe
    wrong = [name for name, value in wanted.items() if name not in flat or flat[name] != value]
    if wrong:
        differences = [
            f"\n  - {name} is {shown(flat.get(name))} there and {shown(wanted[name])} here"
            for name in wrong
        ]
        what = f"{place} holds another run:{''.join(differences)}"
        raise TrainingError(f"{what}\nResuming, options may be left out; or name another folder")


def _finish(
    done: Run, held_out: ImageFolder, record: Mapping[str, Any], console: Console | None
) -> None:
    """Writes the best weights in half precision, with what was measured of them as they are."""
    best = load(str(done.folder / BEST))
    dtype = dtype_name(first_array(best.params))
    rounded = map_arrays(
        lambda w: w.astype(np.float16).astype(dtype) if w.dtype.kind == "f" else w, best.params
    )
    counts = confusion_matrix(rounded, best.config, held_out)
    right, of = int(np.trace(counts)), len(held_out)
    training = {
        "data": "photos in folders",
        "options": {name: x for name, x in record["options"].items() if x is not None},
        "recipe": record["recipe"],
        "augment": record["augment"],
        "best_epoch": done.state.best_epoch,
        "steps": done.state.step,
        "samples": done.state.samples,
        "held_out_samples": of,
        "held_out_accuracy": right / of,
    }
    info, path = dataclasses.replace(best.info, training=training), done.folder / MODEL
    save(path, Model(rounded, best.config, info=info), dtype="float16")
    try:
        draw_confusion(counts, best.classes, done.folder / CONFUSION)
    except ImportError:  # without matplotlib there is none
        show(console, f"{CONFUSION} is not drawn: matplotlib is not installed (extra 'plots')")
    table = [
        [n, str(row[k]), str(row.sum())]
        for k, (n, row) in enumerate(zip(best.classes, counts, strict=True))
    ]
    show(console, text_table(["class", "right", "held out"], table))
    show(
        console,
        f"{right} of {of} photos held out are right: {right / of:.2%}. The epoch was chosen",
    )
    show(console, "by them, so photos that nobody looked at may do a little worse.")
    show(console, f"written: {path}. Ask it: python -m pvt_ref classify PHOTO --weights {path}")
