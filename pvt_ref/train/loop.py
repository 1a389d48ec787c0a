"""The loop: steps, epochs, saving, stopping, going on.

A run lives in a folder of its own::

    training.safetensors   the state after some step: all that is needed to go on
    best.safetensors       the averaged weights of the epoch that did best on what is held out
    metrics.jsonl          a line of JSON for every epoch, and for some steps in between
    curves.png             the same as a picture, drawn after every epoch
"""

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
from rich.console import Console

from pvt_ref.arrays import array_module, to_device, to_numpy
from pvt_ref.boundary import check_has_classifier
from pvt_ref.checkpoint import save
from pvt_ref.config import PVTConfig
from pvt_ref.errors import DeviceError, TrainingError
from pvt_ref.face import Model
from pvt_ref.info import ModelInfo
from pvt_ref.params import PVTParams, init_params, named_arrays
from pvt_ref.train.checks import check_number
from pvt_ref.train.data import LabelledImages, evaluate
from pvt_ref.train.diagnosis import first_non_finite
from pvt_ref.train.metrics import Metrics, draw_curves
from pvt_ref.train.progress import Progress
from pvt_ref.train.recipe import Recipe
from pvt_ref.train.saved import describe_run, load_state, save_state
from pvt_ref.train.step import TrainState, diverged, start_training, train_step

STATE, BEST = "training.safetensors", "best.safetensors"
METRICS, CURVES = "metrics.jsonl", "curves.png"


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What :func:`fit` leaves behind.

    Attributes:
        state: after the last step that was done.
        finished: whether all epochs are done; False if it was stopped.
        folder: where its files are.
    """

    state: TrainState
    finished: bool
    folder: Path


def fit(
    config: PVTConfig,
    recipe: Recipe,
    data: LabelledImages,
    held_out: LabelledImages,
    folder: str | os.PathLike[str],
    *,
    info: ModelInfo | None = None,
    first: PVTParams | None = None,
    resume: bool = False,
    device: str = "cpu",
    save_seconds: float = 120.0,
    log_steps: int = 50,
    stop_at_step: int | None = None,
    console: Console | None = None,
) -> Run:
    """Trains a model, or goes on training it.

    Ctrl-C (or SIGTERM, or the terminal closed) ends it after the step in progress, saved; a second
    Ctrl-C ends it at once, and what was saved last stays. Resumed on the same machine, with the
    same device and number of threads, it ends with the same bits as if it had never stopped.

    Args:
        config: the model, with drop-path rates as they are at their peak.
        recipe: how it is trained.
        data: what it learns from.
        held_out: what its epochs are compared on. Not the test set: choosing is learning too.
        folder: of the run; made if it is not there.
        info: goes into best.safetensors; its preprocessing is that of data.
        first: weights to begin with; None draws them from the recipe's seed. Resuming, those
            that were saved count.
        resume: go on with what the folder holds.
        device: ``"cpu"`` or ``"cuda"``.
        save_seconds: the state is saved after every epoch, and in between when so many seconds
            have passed.
        log_steps: a line of metrics comes every so many steps.
        stop_at_step: end there as Ctrl-C does, for trials.
        console: where progress is shown; None shows nothing.

    Returns:
        How it ended.

    Raises:
        TrainingError: if the data do not fit the model or are fewer than a batch, the folder cannot
            be made or holds another run, or loss, gradients or weights are no longer finite.
        ConfigError: if the model is a bare backbone, or info has another number of classes.
        ShapeError: if the model cannot take images of that size, or first belongs to another
            config.
        NonFiniteError: if first holds NaN or infinity.
        ArrayTypeError: if config or first is of another type.
        RangeError: if save_seconds, log_steps or stop_at_step is outside its range.
        CheckpointError: if something cannot be saved, or what was saved is damaged.
        MissingFileError: if there is nothing to go on with.
        DeviceError: if there is no such device.
        KeyboardInterrupt: at a second Ctrl-C.
    """
    _check_data(config, data, held_out)
    steps = recipe.steps_per_epoch(len(data))
    check_number("save_seconds", save_seconds, least=0)
    log_steps = check_number("log_steps", log_steps, least=1, whole=True)
    last = recipe.epochs * steps
    end = last
    if stop_at_step is not None:
        end = min(last, check_number("stop_at_step", stop_at_step, least=0, whole=True))
    if device not in ("cpu", "cuda"):
        raise DeviceError(
            f"device is {device!r}; a training runs on 'cpu' or 'cuda', the current CUDA device. "
            f"For another GPU: CUDA_VISIBLE_DEVICES=1, or inside `with cupy.cuda.Device(1):`"
        )
    info = dataclasses.replace(info or ModelInfo(), preprocessing=data.preprocessing)
    if first is None:  # of its own stream: what the steps draw does not depend on the model's size
        first = init_params(config, np.random.default_rng([recipe.seed, 1]))
    Model(to_numpy(first), config, info=info)  # refuses what is not finite or does not fit
    params: PVTParams = to_device(first, device)
    run = describe_run(config, recipe, data, held_out)

    place = _make_folder(folder)
    if resume:
        state = load_state(place / STATE, config, run, like=params.pos_embed1)
    else:
        _check_unused(place)
        state = start_training(params, len(data), recipe.seed)
        save_state(place / STATE, state, run)
    for orphan in place.glob(f".{'?' * 16}.tmp"):  # of a process that was killed while it wrote
        orphan.unlink(missing_ok=True)
    metrics = Metrics(place / METRICS, state.step)

    saved_at, report = time.monotonic(), None
    with _deferred_interrupts() as interrupted, Progress(console, last, state.step) as progress:
        while state.step < end and not interrupted:
            state, report = train_step(state, data, config, recipe)
            epoch, index = divmod(state.step, steps)
            progress.step(report, recipe.batch_size)
            line = {"step": state.step, "epoch": state.step / steps, "lr": report.lr}
            line |= {"images_per_second": round(progress.images_per_second, 1)}
            if index == 0:
                _check_weights(state, steps, report.lr)
                state, results = _finish_epoch(
                    state, epoch, report.lr, config, held_out, place / BEST, info
                )
                seen = steps * recipe.batch_size
                line |= {"epoch": epoch, "train_loss": state.epoch_loss / steps}
                line |= {"train_accuracy": state.epoch_hits / seen, **results}
                # the metrics come first: lines beyond what is saved are dropped on resuming, but
                # a line that was never written would be missed for ever
                metrics.write(line)
                save_state(place / STATE, state, run)
                saved_at = time.monotonic()
                _draw(place, console)
                progress.epoch(line)
            elif state.step % log_steps == 0:
                metrics.write({**line, "loss": report.loss, "grad_norm": report.grad_norm})
            if index and time.monotonic() - saved_at > save_seconds:
                _check_weights(state, steps, report.lr)
                save_state(place / STATE, state, run)
                saved_at = time.monotonic()
        if state.step % steps and report:
            _check_weights(state, steps, report.lr)
            save_state(place / STATE, state, run)
        elif state.step and report is None:  # nothing was left to do, but maybe to draw
            _draw(place, console)
    return Run(state, state.step == last, place)


def _check_data(config: PVTConfig, data: LabelledImages, held_out: LabelledImages) -> None:
    check_has_classifier(config)
    for name, samples in (("the samples to learn from", data), ("held out", held_out)):
        samples.check_fits(config, name)
    if data.preprocessing != held_out.preprocessing:
        raise TrainingError(
            f"the samples to learn from have {data.preprocessing}, those held out have "
            f"{held_out.preprocessing}; both must be prepared alike"
        )


def _check_unused(place: Path) -> None:
    there = [name for name in (STATE, BEST, METRICS) if (place / name).exists()]
    if there:
        raise TrainingError(
            f"{place} holds a training already ({', '.join(there)}). Go on with it "
            f"(resume=True, on the command line --resume), or name another folder"
        )


def _finish_epoch(
    state: TrainState,
    epoch: int,
    lr: float,
    config: PVTConfig,
    held_out: LabelledImages,
    path: Path,
    info: ModelInfo,
) -> tuple[TrainState, dict[str, float]]:
    """Measures the averaged weights, and keeps them if they are the best so far.

    They are written before the state that knows of it. Should the process end in between, the
    steps since are done again, and write the same file.
    """
    with np.errstate(all="ignore"):  # what is not finite is named below
        loss, accuracy = evaluate(state.average, config, held_out)
    if not math.isfinite(loss):
        what = f"the loss on what is held out is {loss}"
        images = held_out.batch(slice(0, 64), like=state.average.pos_embed1)
        culprit = first_non_finite(state.average, images, config)
        raise diverged(what, state.step - 1, epoch - 1, lr, culprit)
    if accuracy > state.best_accuracy:
        state = dataclasses.replace(state, best_accuracy=accuracy, best_epoch=epoch)
        save(path, Model(to_numpy(state.average), config, info=info))
    results = {
        "held_out_loss": loss,
        "held_out_accuracy": accuracy,
        "best_accuracy": state.best_accuracy,
        "best_epoch": state.best_epoch,
    }
    return state, results


def _check_weights(state: TrainState, steps: int, lr: float) -> None:
    """Raises TrainingError rather than let weights that are not finite be saved or measured."""
    for key, w in named_arrays(state.params):
        xp = array_module(w)
        if not bool(xp.all(xp.isfinite(w))):
            done = state.step - 1  # the steps before the one that did it
            culprit = f"The first array that is not finite is {key}"
            raise diverged("the weights are not finite", done, done // steps, lr, culprit)


def _draw(place: Path, console: Console | None) -> None:
    """The curves, if they can be drawn: no training ends for want of a picture."""
    try:
        draw_curves(place / METRICS, place / CURVES)
    except ImportError:
        return  # without matplotlib there is none
    except OSError as error:
        if console is not None:
            console.print(f"{place / CURVES} could not be written: {error}", highlight=False)


def _make_folder(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"{path}: the folder of the run cannot be made ({type(error).__name__}: "
            f"{error.strerror or error}). Name another"
        ) from error
    return path


@contextmanager
def _deferred_interrupts() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and SIGHUP fill the list that is given; a second Ctrl-C interrupts."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may say what a signal does
        return

    def note(number: int, _: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    names = ("SIGINT", "SIGTERM", "SIGHUP")  # the last one, of a closed terminal, is POSIX's
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
