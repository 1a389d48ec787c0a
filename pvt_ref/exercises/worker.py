"""The process that runs the reader's code, and writes each result as one line of JSON.

``python -m pvt_ref.exercises.worker FOLDER NAME ...``; what the code prints is caught.
"""

import contextlib
import dataclasses
import io
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pvt_ref.exercises.catalogue import EXERCISES
from pvt_ref.exercises.marking import ReadersError, mark_file, readers_pair
from pvt_ref.exercises.reading import WHOLE, file_of

_PRINTED = 1000  # characters of what the reader's code prints


class _Bounded(io.StringIO):
    """Keeps only the beginning of a text: finite differences call a function many times."""

    def write(self, text: str) -> int:
        if self.tell() < _PRINTED:
            super().write(text[: _PRINTED - self.tell()])
        return len(text)


def main(argv: Sequence[str]) -> None:
    """Marks the exercises of these names, or runs the whole networks if the name is "whole"."""
    # the reader's code may write to descriptor 1, and must not be mistaken for a result
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**fact: Any) -> None:
        channel.write(json.dumps(fact) + "\n")
        channel.flush()

    warnings.simplefilter("ignore")  # an overflow shows in the law that it breaks
    np.seterr(all="ignore")
    say(ready=True)
    folder, names = Path(argv[0]), argv[1:]
    for name in names:
        if name == WHOLE:
            _whole(folder, Path(names[1]) if len(names) > 1 else None, say)
            return
        printed = _Bounded()
        marks = mark_file(EXERCISES[name], file_of(folder, name))
        while True:
            try:
                with contextlib.redirect_stdout(printed):
                    mark = next(marks, None)
            except OSError as error:
                say(unreadable=name, why=str(error))
                break
            if mark is None:
                break
            say(mark=dataclasses.asdict(mark), printed=printed.getvalue())


def _whole(folder: Path, photo: Path | None, say: Any) -> None:
    from pvt_ref.exercises.whole import PHOTO, steps

    printed = _Bounded()
    with contextlib.redirect_stdout(printed):
        try:
            pairs = {n: readers_pair(e, file_of(folder, n)) for n, e in EXERCISES.items()}
            for step in steps(pairs, photo or PHOTO):
                say(step=step)
        except ReadersError as error:
            say(step=("the whole network", "", f"{error}\n{error.trace}"))
        except Exception as error:  # from values that the reader's functions passed on
            what = f"{type(error).__name__}: {error}"
            say(step=("the whole network", "", what))


if __name__ == "__main__":
    main(sys.argv[1:])
