"""The diary of a run: a line of JSON at a time, and the picture drawn from it."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvt_ref.checkpoint.whole_file import write_whole
from pvt_ref.errors import CheckpointError


class Metrics:
    """Lines of JSON in a file; each is in the file once it has been written.

    Args:
        path: the file.
        step: where the run stands. Lines of later steps are dropped: they belong to steps that
            were not saved, and will be done again.

    Attributes:
        path: the file.

    Raises:
        CheckpointError: if the file cannot be written.
        OSError: if there is one that cannot be read.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= step]
            self._replace("".join(json.dumps(line) + "\n" for line in kept))
        else:
            self._replace("")

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line.

        Args:
            line: plain values by name, fit for JSON; ``step`` is among them.

        Raises:
            CheckpointError: if it cannot be written.
            ValueError: if a number is NaN or infinite.
            TypeError: if a value is not fit for JSON.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the state that knows of it is written
        except OSError as error:
            raise self._failed(error) from error

    def _replace(self, text: str) -> None:
        try:
            write_whole(self.path, text.encode())
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: the metrics could not be written ({type(error).__name__}: "
            f"{error.strerror or error}). What was saved of the training is whole: make room, and "
            f"resume"
        )


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file. One that cannot be read, as if cut off, is left out.

    Args:
        path: a file of :class:`Metrics`.

    Returns:
        Values by name, a dict for each line.

    Raises:
        OSError: if the file is not there, or cannot be read.
    """
    lines = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # the process was ended while writing it
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def draw_curves(metrics: str | os.PathLike[str], picture: str | os.PathLike[str]) -> None:
    """Loss and accuracy by epoch, from a metrics file.

    Needs matplotlib, the extra ``plots``. The picture appears complete or not at all.

    Args:
        metrics: a file of :class:`Metrics`.
        picture: ends in .png, .svg or .pdf.

    Raises:
        ImportError: if there is no matplotlib.
        OSError: if the metrics cannot be read, or the picture cannot be written.
        ValueError: if the picture ends in something that matplotlib does not write.
    """
    # without pyplot: no window, no global state, and a program's own figures are left alone
    from matplotlib.figure import Figure

    lines = [line for line in read_metrics(metrics) if "held_out_accuracy" in line]
    epochs = [line["epoch"] for line in lines]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for ax, name in ((loss, "loss"), (accuracy, "accuracy")):
        for kind, label, colour in (
            ("train", "in training, samples changed at random", "tab:blue"),
            ("held_out", "held out, averaged weights", "tab:orange"),
        ):
            values = [line[f"{kind}_{name}"] for line in lines]
            marker = "." if len(lines) < 40 else ""
            ax.plot(epochs, values, marker=marker, color=colour, label=label)
        ax.set(xlabel="epoch", title=name)
        ax.grid(alpha=0.3)
    if lines:
        best = max(lines, key=lambda line: line["held_out_accuracy"])
        accuracy.set_title(
            f"accuracy (held out, best: {best['held_out_accuracy']:.4f} in epoch {best['epoch']})"
        )
    loss.legend()
    kind = Path(picture).suffix.removeprefix(".")
    undated = {"Date": None} if kind == "svg" else None  # the same run gives the same file
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=120, metadata=undated)
    write_whole(Path(picture).resolve(), drawn.getvalue())
