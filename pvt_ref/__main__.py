"""The command line: ``python -m pvt_ref classify cat.jpg``, ``summary pvt_small`` and so on."""

import argparse
import io
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from pvt_ref import __version__
from pvt_ref.app import Model
from pvt_ref.checkpoint import save
from pvt_ref.data.picture_file import SUFFIXES
from pvt_ref.errors import CheckpointError, ImageError, PVTError, printable, shown
from pvt_ref.models.architecture import known_variants
from pvt_ref.report.cost import count_cost
from pvt_ref.report.tables import format_cost, one_line, text_table
from pvt_ref.zoo import RELEASED, SHIPPED, load

#: Exit statuses: some inputs failed; all did, or the output cannot be written to its end; stopped
#: by Ctrl-C; the reader of standard output left.
_SOME, _NONE, _INTERRUPTED, _PIPE_CLOSED = 1, 2, 130, 141

#: What ``classify`` and ``segment`` ask if no weights are named.
_CLASSIFIER, _SEGMENTOR = "imagenette", "camvid"


def _parser(chosen: str) -> argparse.ArgumentParser:
    about = "The Pyramid Vision Transformer in NumPy."
    text = "Exit status: 0; 1 if some of several inputs failed; 2 if all did, if the command is "
    text += "wrong, or if the output could not be written to its end."
    parser = argparse.ArgumentParser("python -m pvt_ref", description=about, epilog=text)
    parser.add_argument("--version", action="version", version=f"pvt_ref {__version__}")
    commands = parser.add_subparsers(dest="command")

    of_file, of_size = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    text = "the model in a weights file that does not tell: a variant's name, or a JSON file"
    of_file.add_argument("--config", metavar="NAME|FILE", help=text)
    text = "which of several sets of weights in a file, such as model_ema"
    of_file.add_argument("--entry", metavar="NAME", help=text)
    text = "H W, or one side of a square (default: that of the training)"
    of_size.add_argument("--size", nargs="+", type=int, metavar="PIXELS", help=text)

    text = "what pictures show, with probabilities"
    classify = commands.add_parser("classify", parents=[of_file, of_size], help=text)
    text = "picture files; of a folder, the files directly in it that are named as pictures are "
    text += "(.jpg, .png and so on) and not hidden"
    classify.add_argument("images", nargs="+", metavar="IMAGE", help=text)
    shipped = ", ".join(name for name in SHIPPED if name != _SEGMENTOR)
    text = f"{shipped} (in the package), {', '.join(RELEASED)} (fetched when first "
    text += f"asked for), or a file (default {_CLASSIFIER}: ten classes of photos)"
    classify.add_argument("--weights", metavar="NAME|FILE", help=text)
    classify.add_argument("--top", type=int, default=5, help="classes a picture (default 5)")
    classify.add_argument("--json", action="store_true", help="a list, for programs")

    text = "the class of every pixel of pictures, as pictures"
    segment = commands.add_parser("segment", parents=[of_file], help=text)
    text = "as for classify"
    segment.add_argument("images", nargs="+", metavar="IMAGE", help=text)
    text = f"a file of a segmentation network (default {_SEGMENTOR}, in the package: eleven "
    text += "classes of street scenes)"
    segment.add_argument("--weights", metavar="NAME|FILE", help=text)
    text = "folder of the pictures that are made (default: this one): of a.jpg, a.overlay.png with "
    text += "a legend, and a.classes.png, whose palette's numbers are the classes"
    segment.add_argument("--out", metavar="DIR", default=".", help=text)
    text = "short side that the network sees (default: that of the training)"
    segment.add_argument("--size", type=int, metavar="PIXELS", help=text)
    text = "look at windows of so many pixels a side, or H W, instead of the whole"
    segment.add_argument("--window", nargs="+", type=int, metavar="PIXELS", help=text)
    segment.add_argument("--force", action="store_true", help="replace pictures that are there")
    segment.add_argument("--json", action="store_true", help="a list, for programs")

    text = "parameters, MACs, memory and cache by stage and operation, as a table"
    summary = commands.add_parser("summary", parents=[of_file, of_size], help=text)
    text = f"{', '.join(known_variants())}; {', '.join(SHIPPED)}; or a weights file"
    summary.add_argument("model", help=text)
    summary.add_argument("--batch", type=int, default=1, help="images at once (default 1)")
    dtypes = ["float32", "float64"]
    summary.add_argument("--dtype", choices=dtypes, default="float32", help="default float32")
    text = "the dense pyramid instead of the classifier"
    summary.add_argument("--pyramid", action="store_true", help=text)

    text = "a network on a folder of photos: TRAIN/CLASS/PHOTO.jpg"
    train = commands.add_parser("train", help=text)
    if chosen == "train":  # its options need the package's training, which takes a while to import
        from pvt_ref.train.options import add_options

        add_options(train)

    text = "build it yourself: the operations as exercises, marked by the laws they must obey"
    exercises = commands.add_parser("exercises", help=text)
    if chosen == "exercises":  # likewise
        from pvt_ref.exercises.command import add_options

        add_options(exercises)

    text = "weights of any readable layout to this project's .safetensors"
    convert = commands.add_parser("convert", parents=[of_file], help=text)
    convert.add_argument("src", nargs="+", help="weights files, or folders with one")
    convert.add_argument("dst", help="the .safetensors file to write, or a folder for them")
    convert.add_argument("--force", action="store_true", help="replace a file that is there")
    text = "epsilon of the norms, and of those after projections if another (default: that of the "
    text += "code which made the file; 1e-6 1e-5 for the authors' weights in Hugging Face's files)"
    convert.add_argument("--eps", nargs="+", type=float, metavar="EPS", help=text)

    text = "a network as an ONNX file, for other runtimes; needs the package onnx"
    export = commands.add_parser("export", parents=[of_file, of_size], help=text)
    text = f"{', '.join(SHIPPED)}, {', '.join(RELEASED)}; or a weights file"
    export.add_argument("model", help=text)
    text = "the file to write (default: in this folder, the model's name with .onnx)"
    export.add_argument("-o", "--out", metavar="FILE", help=text)
    text = "leave the size of the image open: for a PVT v2 without linear SRA"
    export.add_argument("--any-size", action="store_true", help=text)
    text = "the dense pyramid, outputs F1, F2 and so on, instead of logits"
    export.add_argument("--pyramid", action="store_true", help=text)
    text = "the attention weights of every block too, outputs A1.0, A1.1 and so on"
    export.add_argument("--attention", action="store_true", help=text)
    text = "of a segmentation network: logits at the size of the image"
    export.add_argument("--resized", action="store_true", help=text)
    text = "take pixels, (B, H, W, C) uint8, and normalise them in the graph"
    export.add_argument("--pixels", action="store_true", help=text)
    text = "store the weights in half the space; the graph computes in float32"
    export.add_argument("--float16", action="store_true", help=text)
    export.add_argument("--force", action="store_true", help="replace a file that is there")
    return parser


def _say(message: object) -> None:
    if sys.stderr is not None:  # for None, print would take standard output
        try:
            print(printable(str(message)), file=sys.stderr, flush=True)
        except OSError:  # a full disk, a closed pipe: the answers go on
            _give_up(sys.stderr)


def _give_up(stream: TextIO) -> None:
    """What could not be written goes nowhere: Python would try once more at exit, and fail."""
    with suppress(OSError):  # a stream of the caller's may have no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _status(inputs: int, failed: int) -> int:
    return 0 if not failed else _NONE if failed == inputs else _SOME


def _pictures(arguments: Iterable[str]) -> Iterator[tuple[str, PVTError | None]]:
    """The pictures named and those in the folders named, by name; or why there is none."""
    for path in arguments:
        if not os.path.isdir(path):
            yield path, None
            continue
        folder = shown(path, 400)
        try:
            with os.scandir(path) as entries:
                # hidden ones are not meant: macOS lays ._a.jpg, which is no picture, beside a.jpg
                files = [e for e in entries if e.name[0] != "." and not os.path.isdir(e.path)]
        except OSError as error:
            yield path, ImageError(f"{folder} cannot be read ({error.strerror})")
            continue
        pictures = sorted(e.name for e in files if e.name.lower().endswith(SUFFIXES))
        yield from ((os.path.join(path, name), None) for name in pictures)
        others = len(files) - len(pictures)
        if not pictures:
            why = f"of {others} files no name ends in one of {', '.join(SUFFIXES)}"
            what = f"{folder} is a folder without pictures: {why}"
            yield path, ImageError(f"{what} (and folders in it are not looked into)")
        elif others:
            several = f"{others} files with other names were"
            what = several if others > 1 else "1 file with another name was"
            _say(f"{folder}: {what} not looked at")


def _one_or_all(values: Sequence[Any] | None) -> Any:
    return values[0] if values and len(values) == 1 else values


def _say_classes(weights: str, model: Model) -> None:
    """What weights that nobody named can answer."""
    known = ", ".join(model.classes)
    _say(f"{weights} knows these classes and no other: {known}. --weights names another model")


def _classify(args: argparse.Namespace) -> int:
    weights = _CLASSIFIER if args.weights is None else args.weights
    model = load(weights, config=args.config, entry=args.entry)
    size = _one_or_all(args.size)
    inputs = list(_pictures(args.images))
    paths = (path for path, error in inputs if error is None)
    answers = model.predict_each(paths, args.top, size)
    failed = 0
    for index, (path, error) in enumerate(inputs):
        answer = next(answers) if error is None else error
        if isinstance(answer, PVTError):
            failed += 1
            _say(f"error: {answer}")
            said: dict[str, Any] = {"error": str(answer)}
        else:
            said = {"predictions": [a._asdict() for a in answer]}
        if args.json:
            record = {"image": path, "weights": weights, **said}
            text = textwrap.indent(json.dumps(record, indent=2), "  ")
            print(",\n" if index else "[\n", text, sep="", end="", flush=True)
        elif not isinstance(answer, PVTError):
            rows = ([a.label, f"{a.probability:.4f}"] for a in answer)
            table = text_table(["class", "probability"], rows)
            gap = "\n" if index > failed else ""  # between two tables
            print(f"{gap}{one_line(path)}\n{table}", flush=True)
    if args.json:
        print("\n]")
    elif args.weights is None and failed < len(inputs):  # who named weights knows what they know
        _say_classes(weights, model)
    return _status(len(inputs), failed)


def _segment(args: argparse.Namespace) -> int:
    from pvt_ref.data.overlay import class_colours

    weights = _SEGMENTOR if args.weights is None else args.weights
    model = load(weights, config=args.config, entry=args.entry)
    colours = model.info.colours or class_colours(model.config.num_classes)
    inputs = list(_pictures(args.images))
    paths = (path for path, error in inputs if error is None)
    maps = model.segment_each(paths, args.size, window=_one_or_all(args.window))
    failed, written = 0, {os.path.abspath(path) for path, _ in inputs}  # no input is replaced
    for index, (path, error) in enumerate(inputs):
        answer = next(maps) if error is None else error
        said: dict[str, Any] = {}
        try:
            if isinstance(answer, PVTError):
                raise answer
            said = _write_maps(path, answer, model.classes, colours, args, written)
        except (PVTError, OSError) as problem:
            if isinstance(problem, BrokenPipeError):
                raise
            failed += 1
            _say(f"error: {problem}")
            said = {"error": str(problem)}
        if args.json:
            record = {"image": path, "weights": weights, **said}
            text = textwrap.indent(json.dumps(record, indent=2), "  ")
            print(",\n" if index else "[\n", text, sep="", end="", flush=True)
        elif "error" not in said:
            rows = [[name, f"{share:.2%}"] for name, share in said["classes"].items()]
            gap = "\n" if index > failed else ""
            table = text_table(["class", "of the picture"], rows)
            print(f"{gap}{one_line(path)} -> {one_line(said['overlay'])}\n{table}", flush=True)
    if args.json:
        print("\n]")
    elif args.weights is None and failed < len(inputs):
        _say_classes(weights, model)
    return _status(len(inputs), failed)


def _write_maps(
    path: str,
    class_map: Any,
    classes: Sequence[str],
    colours: Sequence[Any],
    args: argparse.Namespace,
    written: set[str],
) -> dict[str, Any]:
    """Writes the two pictures of a class map; returns where they are, and the share of each class.
    Raises: ImageError if one is there already, or an OSError.
    """
    import numpy as np

    from pvt_ref.checkpoint.whole_file import write_whole
    from pvt_ref.data.image import read_rgb
    from pvt_ref.data.overlay import indexed, overlay

    base = os.path.join(args.out, Path(path).stem)
    targets = {"overlay": f"{base}.overlay.png", "class_map": f"{base}.classes.png"}
    for target in targets.values():
        if os.path.abspath(target) in written:
            what = f"{shown(path, 400)}: {shown(target, 400)} is one of the pictures named"
            what += ", or was just made of one of that name"
            raise ImageError(f"{what}. Name another --out for it")
        if os.path.lexists(target) and not args.force:
            what = f"{shown(path, 400)}: {shown(target, 400)} is there already"
            raise ImageError(f"{what}. --force replaces it")
    os.makedirs(args.out, exist_ok=True)
    pictures = {
        "overlay": overlay(read_rgb(path), class_map, classes, colours),
        "class_map": indexed(class_map, colours),
    }
    for name, picture in pictures.items():
        data = io.BytesIO()
        picture.save(data, "PNG")
        write_whole(Path(targets[name]), data.getvalue())
        written.add(os.path.abspath(targets[name]))
    counts = np.bincount(class_map.ravel(), minlength=len(classes))
    order = [k for k in np.argsort(-counts, kind="stable") if counts[k]]
    return {**targets, "classes": {classes[k]: int(counts[k]) / class_map.size for k in order}}


def _summary(args: argparse.Namespace) -> int:
    known, heading = known_variants(), ""
    if args.model in known:
        if args.config is not None or args.entry is not None:
            what = f"{args.model} is a known name, and a file called so ./{args.model}"
            raise CheckpointError(f"--config and --entry say what is in a weights file; {what}")
        config = known[args.model]
    else:
        model = load(args.model, config=args.config, entry=args.entry)
        config = model.config
        heading = "".join(f"{one_line(t)}\n" for t in (model.info.title, model.source) if t)
    cost = count_cost(config, _one_or_all(args.size), args.batch, args.dtype, args.pyramid)
    print(f"{heading}{one_line(args.model)}, {format_cost(cost)}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    into_folder = os.path.isdir(args.dst)
    if len(args.src) > 1 and not into_folder:
        what = f"there are {len(args.src)} files, and {shown(args.dst, 400)} is no folder"
        raise CheckpointError(f"{what}. Make it first, or convert one at a time")
    eps = _one_or_all(args.eps)
    failed, written = 0, set()
    for src in args.src:
        path = Path(os.path.abspath(src))
        name = path.name if path.is_dir() else path.stem
        target = os.path.join(args.dst, f"{name}.safetensors") if into_folder else args.dst
        try:
            there = f"{shown(src, 400)}: {shown(target, 400)}"
            if target in written:
                raise CheckpointError(f"{there} was just made of a file of the same name")
            if os.path.lexists(target) and not args.force:
                raise CheckpointError(f"{there} is there already. --force replaces it")
            model = load(src, config=args.config, entry=args.entry, eps=eps)
            save(target, model)
        except (BrokenPipeError, MemoryError):
            raise
        except Exception as error:  # also one that should not be: the others go on
            failed += 1
            kind = f"{shown(src, 400)}: {type(error).__name__}: "
            _say(f"error: {'' if isinstance(error, PVTError | OSError) else kind}{error}")
            continue
        written.add(target)
        did = f"{one_line(src)}: {one_line(model.source)}\nwritten to {one_line(target)}"
        print(did, flush=True)
    return _status(len(args.src), failed)


def _export(args: argparse.Namespace) -> int:
    from pvt_ref.export.onnx_file import export_onnx

    target = f"{Path(args.model).stem}.onnx" if args.out is None else args.out
    if os.path.lexists(target) and not args.force:
        raise CheckpointError(f"{shown(target, 400)} is there already. --force replaces it")
    model = load(args.model, config=args.config, entry=args.entry)
    parts = ["pyramid" if args.pyramid else "logits"]
    if args.attention:
        parts.append("attention")
    written = export_onnx(
        model,
        target,
        what=parts,
        size="any" if args.any_size else _one_or_all(args.size),
        float16=args.float16,
        resized=args.resized,
        with_preprocessing=args.pixels,
    )
    print(f"{one_line(args.model)}: {one_line(model.source)}\n{written}")
    return 0


def _train(args: argparse.Namespace) -> int:
    from pvt_ref.train.options import train

    return train(args)


def _exercises(args: argparse.Namespace) -> int:
    from pvt_ref.exercises.command import run

    return run(args)


def _run(argv: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser(chosen="".join(arguments[:1]))
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if sys.stdout is None:
        _say("error: standard output is closed: there is nowhere to print to")
        return _NONE
    commands = {
        "classify": _classify,
        "segment": _segment,
        "summary": _summary,
        "train": _train,
        "convert": _convert,
        "export": _export,
        "exercises": _exercises,
    }
    try:
        return commands[args.command](args)
    except (PVTError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        short = isinstance(error, MemoryError)
        _say(f"error: {'there is not enough memory for this' if short else error}")
        return _NONE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command of these arguments, or of the command line's; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may hold what a terminal cannot show
            stream.reconfigure(errors="replace")
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:  # the reader left, or the last flush noticed a full disk
        closed = isinstance(error, BrokenPipeError)
        if not closed:
            _say(f"error: {error}")
        assert sys.stdout is not None
        _give_up(sys.stdout)
        return _PIPE_CLOSED if closed else _NONE
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
