"""The loop: steps, epochs, saving, stopping, going on.

A run lives in a folder of its own::

    training.safetensors   the state after some step: all that is needed to go on
    best.safetensors       the averaged weights of the epoch that did best on what is held out
    metrics.jsonl          a line of JSON for every epoch, and for some steps in between
    curves.png             the same as a picture, drawn after every epoch
"""

import dataclasses
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

from pvt_ref.arrays import to_device, to_numpy
from pvt_ref.checkpoint import save
from pvt_ref.config import PVTConfig
from pvt_ref.errors import TrainingError
from pvt_ref.face import Model
from pvt_ref.info import ModelInfo
from pvt_ref.params import PVTParams, init_params
from pvt_ref.train.data import LabelledImages, evaluate
from pvt_ref.train.metrics import Metrics, can_draw, draw_curves
from pvt_ref.train.progress import Progress
from pvt_ref.train.recipe import Recipe
from pvt_ref.train.saved import describe_run, free_place, load_state, save_state
from pvt_ref.train.step import TrainState, start_training, train_step

STATE, BEST, CURVES = "training.safetensors", "best.safetensors", "curves.png"


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

    Ctrl-C (and SIGTERM) ends it after the step in progress, saved; a second one ends it at once,
    and what was saved last stays. Resumed, it ends with the same bits as if it had never stopped.

    Args:
        config: the model, with drop-path rates as they are at their peak.
        recipe: how it is trained.
        data: what it learns from.
        held_out: what its epochs are compared on. Not the test set: choosing is learning too.
        folder: of the run; made if it is not there.
        info: goes into best.safetensors; its preprocessing is that of data.
        first: weights to begin with; None draws them from the recipe's seed.
        resume: go on with what the folder holds.
        device: ``"cpu"`` or ``"cuda"``.
        save_seconds: the state is saved after every epoch, and in between when so many seconds
            have passed.
        log_steps: a line of metrics and a check of the clock come every so many steps.
        stop_at_step: end there as Ctrl-C does, for trials.
        console: where progress is shown; None shows nothing.

    Returns:
        How it ended.

    Raises:
        TrainingError: if the data do not fit the model, the folder holds another run, or the loss
            is no longer finite.
        CheckpointError: if something cannot be saved, or what was saved is damaged.
        MissingFileError: if there is nothing to go on with.
        DeviceError: if there is no such device.
    """
    for name, samples in (("the samples to learn from", data), ("held out", held_out)):
        samples.check_fits(config, name)
    steps = recipe.steps_per_epoch(len(data))
    info = dataclasses.replace(info or ModelInfo(), preprocessing=data.preprocessing)
    place = free_place(folder)
    if first is None:  # of its own stream: the draws of the steps do not depend on the model's size
        first = init_params(config, np.random.default_rng([recipe.seed, 1]))
    params: PVTParams = to_device(first, device)
    run = describe_run(config, recipe, data)

    if resume:
        state = load_state(place / STATE, config, run, like=params.pos_embed1)
    else:
        if (place / STATE).exists():
            raise TrainingError(
                f"{place} holds a training already. Go on with it (--resume), or name another "
                f"folder"
            )
        state = start_training(params, len(data), recipe.seed)
        save_state(place / STATE, state, run)
    metrics = Metrics(place / "metrics.jsonl", state.step)
    last = recipe.epochs * steps
    end = last if stop_at_step is None else min(last, stop_at_step)

    saved_at = time.monotonic()
    with _deferred_interrupts() as interrupted, Progress(console, last, state.step) as progress:
        while state.step < end and not interrupted:
            state, report = train_step(state, data, config, recipe)
            epoch, index = divmod(state.step, steps)
            progress.step(report, recipe.batch_size)
            line = {"step": state.step, "epoch": state.step / steps, "lr": report.lr}
            line |= {"images_per_second": round(progress.images_per_second, 1)}
            if index == 0:
                state, results = _finish_epoch(state, epoch, config, held_out, place / BEST, info)
                seen = steps * recipe.batch_size
                line |= {"epoch": epoch, "train_loss": state.epoch_loss / steps}
                line |= {"train_accuracy": state.epoch_hits / seen, **results}
                # the metrics come first: lines beyond what is saved are dropped on resuming, but
                # a line that was never written would be missed for ever
                metrics.write(line)
                save_state(place / STATE, state, run)
                saved_at = time.monotonic()
                progress.epoch(line)
                if can_draw():
                    draw_curves(metrics.path, place / CURVES)
            elif state.step % log_steps == 0:
                metrics.write({**line, "loss": report.loss, "grad_norm": report.grad_norm})
                if time.monotonic() - saved_at > save_seconds:
                    save_state(place / STATE, state, run)
                    saved_at = time.monotonic()
        if state.step % steps:
            save_state(place / STATE, state, run)
    return Run(state, state.step == last, place)


def _finish_epoch(
    state: TrainState,
    epoch: int,
    config: PVTConfig,
    held_out: LabelledImages,
    path: Path,
    info: ModelInfo,
) -> tuple[TrainState, dict[str, float]]:
    """Measures the averaged weights, and keeps them if they are the best so far.

    They are written before the state that knows of it. Should the process end in between, the
    steps since are done again, and write the same file.
    """
    loss, accuracy = evaluate(state.average, config, held_out)
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


@contextmanager
def _deferred_interrupts() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM fill the list that is given; a second Ctrl-C interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may say what a signal does
        return

    def note(number: int, _: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
