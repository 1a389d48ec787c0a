"""Runs the reader's code in its own process: an endless loop or a crash costs one exercise."""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pvt_ref.exercises.catalogue import EXERCISES
from pvt_ref.exercises.marking import BACKWARD, FAILED, FORWARD, WAITS, Mark
from pvt_ref.exercises.reading import WHOLE

#: Seconds for one way of an exercise, and for a process to begin.
SECONDS, BEGIN = 60.0, 300.0


class _Worker:
    """The process, and the lines that it writes."""

    def __init__(self, folder: Path, args: Sequence[str]) -> None:
        command = [sys.executable, "-m", "pvt_ref.exercises.worker", str(folder), *args]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, encoding="utf-8"
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def fact(self, seconds: float) -> dict[str, Any] | str:
        """The next fact, or why there is none."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return f"it did not end within {seconds:g} seconds. Is there an endless loop?"
        if line is None:
            code = self._process.wait()
            how = f"by signal {-code}" if code < 0 else f"with status {code}"
            return f"the process that ran it ended {how}" if code else ""
        return json.loads(line)

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def marks(
    folder: Path, names: Sequence[str], seconds: float = SECONDS
) -> Iterator[tuple[Mark, str]]:
    """The marks of some exercises, two each, and the text that the code printed.

    Args:
        folder: with the reader's files, all of those named among them.
        names: of exercises.
        seconds: for one way of an exercise.

    Yields:
        Mark and printed text, forward before backward.
    """
    waiting = [(name, way) for name in names for way in (FORWARD, BACKWARD)]
    while waiting:
        todo = list(dict.fromkeys(name for name, _ in waiting))
        with _Worker(folder, todo) as worker:
            answer = worker.fact(BEGIN)
            while waiting and isinstance(answer, dict):
                answer = worker.fact(seconds)
                if isinstance(answer, str):
                    break
                if "unreadable" in answer:
                    answer = f"the file cannot be read: {answer['why']}"
                    break
                mark = Mark(**answer["mark"])
                if mark.index is not None:
                    mark = _with_index(mark)
                if (mark.exercise, mark.way) in waiting:  # repeated after a restart
                    waiting.remove((mark.exercise, mark.way))
                    yield mark, answer["printed"]
        if waiting and isinstance(answer, str):
            name, way = waiting.pop(0)
            line = EXERCISES[name].line("values" if way == FORWARD else "adjoint", "")
            why = answer or "the process that ran it ended"
            says = "The function runs through."
            yield Mark(name, way, FAILED, "runs", says, "", why, line.address, line.address), ""
            if way == FORWARD:
                waiting.remove((name, BACKWARD))
                yield Mark(name, BACKWARD, WAITS), ""


def _with_index(mark: Mark) -> Mark:
    from dataclasses import replace

    return replace(mark, index=tuple(mark.index or ()))


def whole(folder: Path, photo: str | None, seconds: float) -> Iterator[tuple[str, str, str]]:
    """The steps of the run in whole networks: what was compared, the result, and any fault.

    Args:
        folder: with all of the reader's files.
        photo: a picture file, or None for the one that comes with the package.
        seconds: for each step.

    Yields:
        Texts, as in :class:`pvt_ref.exercises.whole.Step`.
    """
    with _Worker(folder, [WHOLE, *([photo] if photo else [])]) as worker:
        answer = worker.fact(BEGIN)
        while isinstance(answer, dict):
            answer = worker.fact(seconds)
            if isinstance(answer, dict):
                what, found, wrong = answer["step"]
                yield what, found, wrong
        if answer:
            yield "the whole network", "", str(answer)
