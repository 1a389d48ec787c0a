"""The reader's folder: its files, and the progress stored beside them."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pvt_ref.checkpoint.whole_file import write_whole
from pvt_ref.errors import RangeError, shown
from pvt_ref.exercises.catalogue import EXERCISES

#: Stands for the run of all functions in whole networks, among the names of exercises.
WHOLE = "whole"

_TEMPLATES = Path(__file__).with_name("templates")
_PROGRESS = "progress.json"
_FORMAT = "pvt_ref exercises 1"


def file_of(folder: Path, name: str) -> Path:
    """The file of an exercise: ``01_linear.py``."""
    return folder / f"{list(EXERCISES).index(name) + 1:02}_{name}.py"


def name_of(given: str) -> str:
    """The exercise, given its name or that of its file. Raises: RangeError."""
    name = re.sub(r"^\d+_|\.py$", "", Path(given).name)
    if name not in EXERCISES and name != WHOLE:
        what = f"there is no exercise {shown(given)}"
        raise RangeError(f"{what}; they are {', '.join(EXERCISES)}, and {WHOLE} for all together")
    return name


def template(name: str) -> str:
    """The initial text of an exercise's file: signatures, shapes and the equation."""
    number = list(EXERCISES).index(name) + 1
    text = (_TEMPLATES / f"{name}.txt").read_text(encoding="utf-8")
    page = f"docs/course/{EXERCISES[name].page}.md"
    return text.replace("{number}", str(number)).replace("{page}", page)


def write_new(folder: Path) -> tuple[list[Path], list[Path]]:
    """Writes the missing files. Returns those written, and those left as they are.

    Raises: OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, kept = [], []
    for name in EXERCISES:
        path = file_of(folder, name)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(template(name))
        except FileExistsError:
            kept.append(path)
        else:
            written.append(path)
    return written, kept


def digest_of(path: Path) -> str:
    """The digest that identifies a marked file; empty if there is no file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


@dataclass(slots=True)
class Remembered:
    """What is stored about an exercise: its marks, the digest of their file, and hints given."""

    forward: str = ""
    backward: str = ""
    digest: str = ""
    hints: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Progress:
    """What is stored in the folder, by exercise; whole: the digests of the files that passed
    in whole networks.
    """

    exercises: dict[str, Remembered]
    whole: str = ""

    def save(self, folder: Path) -> None:
        """Writes it whole or not at all. Raises: OSError."""
        known = {
            name: {f: getattr(r, f) for f in ("forward", "backward", "digest", "hints")}
            for name, r in self.exercises.items()
        }
        stated = {"format": _FORMAT, "exercises": known, "whole": self.whole}
        write_whole(folder / _PROGRESS, (json.dumps(stated, indent=1) + "\n").encode())


def read_progress(folder: Path) -> tuple[Progress, bool]:
    """The stored progress, and whether its file was unreadable, which counts as no progress."""
    progress = Progress({name: Remembered() for name in EXERCISES})
    path = folder / _PROGRESS
    if not path.exists():
        return progress, False
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        if stated["format"] != _FORMAT:
            return progress, True
        for name in EXERCISES:
            progress.exercises[name] = _remembered(stated["exercises"].get(name, {}))
        progress.whole = str(stated["whole"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Progress({name: Remembered() for name in EXERCISES}), True
    return progress, False


def _remembered(stated: Any) -> Remembered:
    texts = {name: str(stated.get(name, "")) for name in ("forward", "backward", "digest")}
    hints = {str(way): max(int(n), 0) for way, n in stated.get("hints", {}).items()}
    return Remembered(**texts, hints=hints)
