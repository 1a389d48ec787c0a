"""The metrics of a run: a file with lines of JSON, and the picture drawn from it."""

import io
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pvt_ref.checkpoint.bounded_json import parse_json
from pvt_ref.checkpoint.whole_file import write_whole
from pvt_ref.checks import check_number
from pvt_ref.errors import (
    ArrayTypeError,
    CheckpointError,
    MissingFileError,
    PVTError,
    RangeError,
    ShapeError,
    TrainingError,
    reason,
    shown,
)
from pvt_ref.train.checks import check_path
from pvt_ref.train.step import TrainState

_NAMED = 40  # classes that have room for their names beside the confusion matrix
_LONGEST = 2**16  # bytes of a line that are read; ours have some 400
_AWAY = "or move the file away to resume without its lines"

#: What a line says, and within which bounds. Lines of epochs have all of _EPOCH.
_COUNT: dict[str, Any] = {"least": 1, "most": 2**53, "whole": True}
_FROM_0, _SHARE = {"least": 0}, {"least": 0, "most": 1}
_LINE: dict[str, dict[str, Any]] = {"step": _COUNT, "loss": {}, "epoch": _FROM_0, "lr": _FROM_0}
_LINE |= {"images_per_second": _FROM_0, "grad_norm": _FROM_0, "data_wait": _SHARE}
_EPOCH = {"epoch": _COUNT, "best_epoch": _COUNT, "train_loss": {}, "held_out_loss": {}}
_EPOCH |= {"train_accuracy": _SHARE, "held_out_accuracy": _SHARE}
_LINE |= {"held_out_miou": _SHARE}


def compared_by(line: Mapping[str, Any]) -> str:
    """The score by which epochs are compared: accuracy, or for segmentation miou."""
    return "miou" if "held_out_miou" in line else "accuracy"


class Metrics:
    """Lines of JSON in a file, of the epochs done; lines beyond the state's step are dropped.

    Raises: CheckpointError if it is no metrics file of this run, or cannot be written.
    """

    def __init__(self, path: Path, state: TrainState, steps: int) -> None:
        self.path = path
        kept, step = [], state.step
        if os.path.lexists(path):
            kept = [line for line in read_metrics(path) if line["step"] <= step]
            _check_run(path, kept, state, steps)
        self.epochs = [line["epoch"] for line in kept if "held_out_accuracy" in line]
        try:
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        except OSError as error:
            raise self._failed(error) from error

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line of finite numbers, or raises CheckpointError if it cannot be written."""
        try:
            with _open_file(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, "ab") as file:
                file.write((json.dumps(line, allow_nan=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())  # before the state that knows of it is written
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> CheckpointError:
        what = f"{self.path}: the metrics could not be written ({reason(error)})"
        advice = "What was saved of the training is whole: make room, and resume"
        return CheckpointError(f"{what}. {advice}")


def _check_run(path: Path, lines: list[dict[str, Any]], state: TrainState, steps: int) -> None:
    # a file may have been lost and begun anew; from there on no epoch is missing
    number, epoch = 0, -(-lines[0]["step"] // steps) if lines else 0
    before, best = {}, (-1.0, 0)
    try:
        for line in lines:
            number += 1
            of_epoch = "held_out_accuracy" in line
            if line.get("epoch", line["step"] / steps) != line["step"] / steps:
                raise CheckpointError(f"epoch is {line['epoch']} at step {line['step']}")
            if line["step"] > epoch * steps or (line["step"] == epoch * steps) != of_epoch:
                raise CheckpointError(f"the line of epoch {epoch} is missing")
            if of_epoch:
                name = compared_by(line)
                found = (line[f"best_{name}"], line["best_epoch"])
                if not before:  # what was best before the first line is unknown
                    best = found if line["epoch"] > 1 else (-1.0, 0)
                if line[f"held_out_{name}"] > best[0]:
                    best = (line[f"held_out_{name}"], line["epoch"])
                if found != best:
                    right = f"{found[0]} in epoch {found[1]}, not {best[0]} in {best[1]}"
                    raise CheckpointError(f"the best {name} is {right}")
                before, epoch = line, epoch + 1
        if lines and epoch <= state.step // steps:
            raise CheckpointError(f"after it, the line of epoch {epoch} is missing")
        if before:
            number = lines.index(before) + 1
            said = {"epoch": state.step // steps}
            best_name = f"best_{compared_by(before)}"
            said |= {"best_epoch": state.best_epoch, best_name: state.best_accuracy}
            if before["step"] == state.step:
                said["train_loss"] = state.epoch_loss / steps
            for name, saved in said.items():
                if before[name] != saved:
                    what = f"the last {name} is {before[name]}, and {saved} in the saved state"
                    raise CheckpointError(what)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}, line {number}: {error}. With {steps} steps an epoch, this run has written "
            f"something else: the file is another run's, or was edited. Put back a copy, {_AWAY}"
        ) from error


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file, each verified, without a last one that was cut off.

    Args:
        path: ``metrics.jsonl`` of a run.

    Returns:
        Values by name, a dict for each line: ``step``, which grows from line to line, and what was
        measured there. Lines of epochs have a ``held_out_accuracy``.

    Raises:
        MissingFileError: if there is no such file.
        CheckpointError: if it cannot be read, or a line is none that a run writes.
        ArrayTypeError, TrainingError: if path is none.
    """
    path = check_path("path", path)
    lines: list[dict[str, Any]] = []
    try:
        with _open_file(path, os.O_RDONLY, "rb") as file:
            while text := file.readline(_LONGEST + 1):
                try:
                    lines.append(_verified(text, lines[-1]["step"] if lines else 0))
                except CheckpointError:
                    if not text.endswith(b"\n") and len(text) <= _LONGEST:
                        break
                    raise
    except FileNotFoundError as error:
        raise MissingFileError(f"{path}: no such file. A run's is metrics.jsonl") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from error
    except PVTError as error:
        what = f"{path}, line {len(lines) + 1}: {error}. It was edited or damaged"
        raise CheckpointError(f"{what}. Mend the line, or delete it, {_AWAY}") from error
    return lines


def _verified(text: bytes, last: int) -> dict[str, Any]:
    """A line as a dict, if it is one that a run writes after a line of step last."""
    line = parse_json(text, "the line", _LONGEST)
    if not isinstance(line, dict) or "step" not in line:
        raise CheckpointError("needed is a JSON object with a step")
    of_epoch: dict[str, dict[str, Any]] = _EPOCH | {f"best_{compared_by(line)}": _SHARE}
    is_epoch = any(name in line for name in of_epoch if name != "epoch")
    for name, bounds in (_LINE | of_epoch if is_epoch else _LINE).items():
        if name in line:
            try:
                check_number(name, line[name], **bounds)
            except PVTError as error:
                raise CheckpointError(str(error)) from error
        elif is_epoch and name in of_epoch:
            raise CheckpointError(f"the line of an epoch has no {name}")
    if is_epoch and line["best_epoch"] > line["epoch"]:
        raise CheckpointError(f"best_epoch is {line['best_epoch']}, in epoch {line['epoch']}")
    if line["step"] <= last:
        raise CheckpointError(f"step is {line['step']}, and was {last} in the line before")
    return line


def _open_file(path: Path, flags: int, mode: str) -> BinaryIO:
    """The file, open, unless it is a pipe or the like, which could be waited for without end."""

    def opener(name: str, _: int) -> int:
        fd = os.open(name, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o666)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(None, "not a regular file")
        return fd

    return open(path, mode, opener=opener)  # type: ignore[return-value]


def draw_curves(metrics: str | os.PathLike[str], picture: str | os.PathLike[str]) -> None:
    """Loss and accuracy by epoch, from a metrics file. Needs matplotlib, the extra ``plots``.

    Args:
        metrics: ``metrics.jsonl`` of a run.
        picture: ends in .png, .svg or .pdf; it appears complete or not at all.

    Raises:
        ImportError: if there is no matplotlib.
        MissingFileError, CheckpointError: as :func:`read_metrics`; also if it cannot be written.
        TrainingError, ArrayTypeError: if picture ends in something else, or is no path.
    """
    target = _check_picture(picture)
    import matplotlib  # noqa: F401 (before the file is read: without it there is no picture)

    lines = [line for line in read_metrics(metrics) if "held_out_accuracy" in line]
    _write_picture(target, lambda file, form: _draw(lines, file, form))


def draw_confusion(
    counts: np.ndarray, classes: Sequence[str], picture: str | os.PathLike[str]
) -> None:
    """A confusion matrix as a picture. Needs matplotlib, the extra ``plots``.

    Args:
        counts: (K, K), rows are true classes and columns predictions, as
            :func:`~pvt_ref.train.confusion_matrix` makes it.
        classes: K names.
        picture: ends in .png, .svg or .pdf; it appears complete or not at all.

    Raises:
        ImportError: if there is no matplotlib.
        ShapeError, RangeError: if counts are not (K, K) for so many classes, or below 0.
        ArrayTypeError: if counts are no array of numbers, or classes no names.
        CheckpointError: if it cannot be written.
        TrainingError: if picture ends in something else, or is no path.
    """
    target = _check_picture(picture)
    good = isinstance(classes, Sequence) and all(isinstance(name, str) for name in classes)
    if not good or not len(classes):
        raise ArrayTypeError(f"classes are {shown(classes)}; they must be a list of names")
    if not isinstance(counts, np.ndarray) or counts.dtype.kind not in "iuf":
        what = f"counts are {shown(counts)}; they must be an array (K, K) of numbers"
        raise ArrayTypeError(f"{what}, from pvt_ref.train.confusion_matrix")
    K, shape = len(classes), counts.shape
    if shape != (K, K):
        raise ShapeError(f"counts have shape {shape}; for {K} classes they must be ({K}, {K})")
    if not (np.isfinite(counts).all() and counts.min() >= 0):
        raise RangeError("counts hold numbers below 0, or that are not finite")
    _write_picture(target, lambda file, form: _draw_confusion(counts, classes, file, form))


def _check_picture(picture: str | os.PathLike[str]) -> Path:
    target = check_path("picture", picture)
    if target.suffix not in (".png", ".svg", ".pdf"):
        raise TrainingError(f"picture is {shown(str(target))}; it must end in .png, .svg or .pdf")
    return target


#: The same run gives the same file, whenever it is drawn.
_UNDATED: Mapping[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def _write_picture(target: Path, draw: Callable[[BinaryIO, str], None]) -> None:
    from matplotlib import style

    drawn = io.BytesIO()
    # the user's own style may ask for what is not here, such as LaTeX; names inside an SVG are
    # random where no salt is given
    with style.context(["default", {"svg.hashsalt": "pvt_ref"}]):
        draw(drawn, target.suffix.removeprefix("."))
    try:
        write_whole(Path(os.path.realpath(target)), drawn.getvalue())
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {reason(error)}") from error


def _draw(lines: list[dict[str, Any]], file: BinaryIO, form: str) -> None:
    # without pyplot: no window, no global state, and a program's own figures are left alone
    from matplotlib.figure import Figure

    epochs = [line["epoch"] for line in lines]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for ax, name in ((loss, "loss"), (accuracy, "accuracy")):
        for kind, label, colour in (
            ("train", "in training, samples changed at random", "tab:blue"),
            ("held_out", "held out, averaged weights", "tab:orange"),
        ):
            # beyond that, the room between two ticks overflows
            values = np.clip([line[f"{kind}_{name}"] for line in lines], -1e100, 1e100)
            marker = "." if len(lines) < 40 else ""
            ax.plot(epochs, values, marker=marker, color=colour, label=label)
        ax.set(xlabel="epoch", title=name)
        ax.grid(alpha=0.3)
    if lines:
        name = compared_by(lines[-1])
        best = max(lines, key=lambda line: line[f"held_out_{name}"])
        where = f"{best[f'held_out_{name}']:.4f} in epoch {best['epoch']}"
        if name == "miou":
            values = [line["held_out_miou"] for line in lines]
            accuracy.plot(epochs, values, color="tab:green", label="mean IoU, held out")
            accuracy.legend(loc="lower right")
        titles = {"miou": "pixel accuracy and mean IoU", "accuracy": "accuracy"}
        accuracy.set_title(f"{titles[name]} (held out, best: {where})")
    loss.legend(loc="upper right")  # "best" warns where looking for it takes a second
    figure.savefig(file, format=form, dpi=120, metadata=_UNDATED.get(form))


def _draw_confusion(counts: np.ndarray, classes: Sequence[str], file: BinaryIO, form: str) -> None:
    from matplotlib.figure import Figure

    K = len(classes)
    of_true = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(14.0, 3.0 + 0.4 * K)
    figure = Figure(figsize=(side, side), layout="constrained")
    ax = figure.subplots()
    ax.imshow(of_true, cmap="Blues", vmin=0, vmax=1)
    ax.set(xlabel="answered", ylabel="true")
    if K <= _NAMED:
        names = [name if len(name) <= 20 else f"{name[:19]}\u2026" for name in classes]
        ax.set_xticks(range(K), names, rotation=90, parse_math=False)
        ax.set_yticks(range(K), names, parse_math=False)
        for (i, j), count in np.ndenumerate(counts):
            if count:
                colour = "white" if of_true[i, j] > 0.5 else "black"
                ax.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(file, format=form, dpi=120, metadata=_UNDATED.get(form))
