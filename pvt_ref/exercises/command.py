"""``python -m pvt_ref exercises new DIR`` and ``check DIR [NAME]``."""

import argparse
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from pvt_ref.errors import MissingFileError, RangeError, printable, shown
from pvt_ref.exercises import running
from pvt_ref.exercises.catalogue import EXERCISES
from pvt_ref.exercises.marking import FAILED, NOT_STARTED, PASSED, Mark
from pvt_ref.exercises.reading import (
    WHOLE,
    Progress,
    Remembered,
    digest_of,
    file_of,
    name_of,
    read_progress,
    write_new,
)
from pvt_ref.report.tables import one_line, text_table


def add_options(parser: argparse.ArgumentParser) -> None:
    """The subcommands and their options."""
    commands = parser.add_subparsers(dest="exercises", required=True)
    text = "writes one short file per operation, in the order of the course; existing files stay"
    new = commands.add_parser("new", help=text)
    new.add_argument("folder", metavar="DIR", help="where to write them")
    text = "marks the files, and shows how far you are"
    check = commands.add_parser("check", help=text)
    check.add_argument("folder", metavar="DIR", help="with the files")
    text = f"one exercise (linear, layer_norm and so on), or {WHOLE}: all in whole networks"
    check.add_argument("name", metavar="NAME", nargs="?", help=text)
    text = "one more hint for the first open problem"
    check.add_argument("--hint", action="store_true", help=text)
    text = "a picture file for the shipped weights, at the end (default: a cat)"
    check.add_argument("--photo", metavar="FILE", help=text)
    text = f"time after which a function counts as endless (default {running.SECONDS:g})"
    check.add_argument("--seconds", type=float, default=running.SECONDS, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns 0, or 1 if something is not right yet.

    Raises:
        PVTError, OSError: if the folder or a file is missing, or a name is unknown.
    """
    folder = Path(args.folder)
    if args.exercises == "new":
        return _new(folder)
    if not 0 < args.seconds < math.inf:
        raise RangeError(f"--seconds is {args.seconds:g}; it must be a number above 0, such as 60")
    if not folder.is_dir():
        what = f"there is no folder {shown(args.folder, 400)}"
        raise MissingFileError(f"{what}. Make it: python -m pvt_ref exercises new DIR")
    return _check(folder, args)


def _new(folder: Path) -> int:
    written, kept = write_new(folder)
    if kept:
        print(f"left as they are: {', '.join(path.name for path in kept)}")
    if written:
        print(f"written to {one_line(str(folder))}: {', '.join(path.name for path in written)}")
    print(f"Next: python -m pvt_ref exercises check {one_line(str(folder))}")
    return 0


def _check(folder: Path, args: argparse.Namespace) -> int:
    progress, damaged = read_progress(folder)
    if damaged:
        print("progress.json cannot be read: it starts again")
    name = None if args.name is None else name_of(args.name)
    if name is not None and name != WHOLE and not file_of(folder, name).is_file():
        what = f"there is no {file_of(folder, name).name} in {shown(str(folder), 400)}"
        raise MissingFileError(f"{what}. python -m pvt_ref exercises new DIR writes it again")
    wanted = list(EXERCISES) if name in (None, WHOLE) else [str(name)]
    there = [n for n in wanted if file_of(folder, n).is_file()]
    found: list[Mark] = []
    digests = {n: digest_of(file_of(folder, n)) for n in there}
    for mark, printed in running.marks(folder, there, args.seconds):
        found.append(mark)
        known = progress.exercises[mark.exercise]
        setattr(known, mark.way, mark.state)
        known.digest = digests[mark.exercise]
        progress.save(folder)
        if mark.state == FAILED:
            print(_report(mark, printed), end="\n\n", flush=True)
    print(_table(folder, progress))
    if args.hint:
        print(_hint(found, progress))
        progress.save(folder)
    done = sum(_passed(folder, progress, n) for n in EXERCISES)
    if done == len(EXERCISES):
        if name in (None, WHOLE) and not _whole(folder, progress, args):
            return 1
    elif name == WHOLE:
        print("The whole networks are for the end, when every exercise has passed")
        return 1
    right = all(mark.state == PASSED for mark in found)
    return 0 if right and len(there) == len(wanted) else 1


def _report(mark: Mark, printed: str) -> str:
    """What is wrong with one way of an exercise, and where to look."""
    rows = [("law", f"{mark.law}: {mark.says}" if mark.says else mark.law)]
    rows += [("case", mark.case), ("found", mark.found), ("trace", mark.trace)]
    rows += [("printed", printed.strip()), ("read", mark.line)]
    lines = [f"{mark.exercise}, {mark.way}"]
    for label, text in rows:
        if text:
            lines.append(f"  {label:<8}" + printable(text).replace("\n", "\n" + " " * 10))
    return "\n".join(lines)


def _passed(folder: Path, progress: Progress, name: str) -> bool:
    known = progress.exercises[name]
    fresh = known.digest and known.digest == digest_of(file_of(folder, name))
    return bool(fresh) and known.forward == known.backward == PASSED


def _table(folder: Path, progress: Progress) -> str:
    """All exercises with their states."""
    rows: list[list[str]] = []
    for name in EXERCISES:
        known, path = progress.exercises[name], file_of(folder, name)
        states = [known.forward or NOT_STARTED, known.backward or NOT_STARTED]
        if not path.is_file():
            states = ["no file", "no file"]
        elif known.digest and known.digest != digest_of(path):
            states = [f"{state}, changed since" for state in states]
        rows.append([path.name, *states])
    done = sum(_passed(folder, progress, n) for n in EXERCISES)
    table = text_table(["exercise", "forward", "backward"], rows)
    whole = ", and the whole networks" if progress.whole == _all_files(progress) else ""
    return f"{table}\n{done} of {len(EXERCISES)} exercises{whole} done"


def _all_files(progress: Progress) -> str:
    """One digest of all the files that the last marks are of."""
    files = "".join(progress.exercises[name].digest for name in EXERCISES)
    return hashlib.sha256(files.encode()).hexdigest()


def _hint(found: Sequence[Mark], progress: Progress) -> str:
    """The hints given so far for the first open problem, and one more."""
    first = next((mark for mark in found if mark.state in (FAILED, NOT_STARTED)), None)
    if first is None:
        return "There is nothing to give a hint for"
    hints = EXERCISES[first.exercise].hints[first.way]
    known: Remembered = progress.exercises[first.exercise]
    count = min(known.hints.get(first.way, 0) + 1, len(hints))
    known.hints[first.way] = count
    left = len(hints) - count
    more = f"{left} more" if left else "no more"
    lines = [f"Hints for the {first.way} of {first.exercise} ({more}):"]
    return "\n".join([*lines, *(f"  {k}. {text}" for k, text in enumerate(hints[:count], 1))])


def _whole(folder: Path, progress: Progress, args: argparse.Namespace) -> bool:
    """Runs all functions in whole networks; returns whether they give PyTorch's numbers."""
    print("\nYour functions, as the operations of whole networks:", flush=True)
    right = True
    for what, result, wrong in running.whole(folder, args.photo, max(args.seconds, 600.0)):
        right = right and not wrong
        print(
            f"  {what}: {printable(wrong or result)}{' (not right)' if wrong else ''}", flush=True
        )
    progress.whole = _all_files(progress) if right else ""
    progress.save(folder)
    if right:
        print("That is a Pyramid Vision Transformer of your own, forward and backward")
    return right
