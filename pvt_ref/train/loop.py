"""The loop: steps, epochs, saving, stopping, going on.

A run lives in a folder of its own::

    training.safetensors   the state after some step: all that is needed to go on
    best.safetensors       the averaged weights of the epoch that did best on what is held out
    metrics.jsonl          a line of JSON for every epoch, and for some steps in between
    curves.png             the same as a picture, drawn after every epoch
    run.lock               while a process trains here: no second one may
"""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pvt_ref import errors
from pvt_ref.api import choose_ops, init_params
from pvt_ref.app import Model
from pvt_ref.arrays import dtype_name, quietly
from pvt_ref.checkpoint import load, save
from pvt_ref.checks import check_flag, check_number, check_type
from pvt_ref.data.ahead import Ahead
from pvt_ref.data.info import ModelInfo
from pvt_ref.data.iou import mean_iou, pixel_accuracy
from pvt_ref.data.labelled import evaluate
from pvt_ref.data.samples import Samples
from pvt_ref.draws import What, generator
from pvt_ref.errors import PVTError, TrainingError, reason, shown
from pvt_ref.kernels.cpu.threads import default_threads
from pvt_ref.models.architecture import architecture_of
from pvt_ref.ops import Ops
from pvt_ref.report.diagnosis import first_non_finite, is_finite
from pvt_ref.train.captured import CapturedSteps
from pvt_ref.train.checks import check_path
from pvt_ref.train.data_parallel import ALONE, Ranks
from pvt_ref.train.interrupts import Interrupts
from pvt_ref.train.lock import RunLock
from pvt_ref.train.metrics import Metrics, draw_curves
from pvt_ref.train.progress import Progress, show
from pvt_ref.train.recipe import Recipe
from pvt_ref.train.saved import (
    describe_run,
    different_fields,
    load_state_and_run,
    save_state,
    weights_sha256,
)
from pvt_ref.train.segmentation import evaluate_pixels
from pvt_ref.train.step import (
    TrainState,
    batch_of_step,
    check_samples,
    diverged,
    next_step,
    shard_of,
    start_training,
    train_step,
)
from pvt_ref.tree import first_array, named_arrays, record, to_device, to_numpy

#: Steps whose photos are read at once, the present one's among them.
_STEPS_AHEAD = 3

STATE, BEST = "training.safetensors", "best.safetensors"
METRICS, CURVES = "metrics.jsonl", "curves.png"


@record
class Run:
    """What :func:`fit` leaves behind."""

    state: TrainState  # after the last step that was done
    finished: bool  # whether all epochs are done; False if it was stopped
    folder: Path  # where its files are, an absolute path


def fit(
    config: Any,
    recipe: Recipe,
    data: Samples,
    held_out: Samples,
    folder: str | os.PathLike[str],
    *,
    info: ModelInfo | None = None,
    first: Any = None,
    resume: bool = False,
    device: str = "cpu",
    save_seconds: float = 120.0,
    log_steps: int = 50,
    stop_at_step: int | None = None,
    workers: int | None = None,
    console: Console | None = None,
    ranks: Ranks = ALONE,
    ops: Ops | None = None,
) -> Run:
    """Trains a model, or goes on training it.

    Ctrl-C (or SIGTERM, or the terminal closed) ends it after the step in progress, saved; a second
    Ctrl-C ends it at once, unless a file is just being written, and what was saved last stays.
    Signals that are ignored stay ignored, as nohup has it. Resumed on the same machine, with the
    same device, table of operations and number of threads, it ends with the same bits as if it had
    never stopped. With others it goes on, says so, and the last bits may differ.

    Until it ends, the folder is locked: a second training there is refused. A run whose folder is
    moved or removed meanwhile writes nothing further, and ends with an error.

    Args:
        config: the model, with drop-path rates as they are at their peak.
        recipe: how it is trained.
        data: what it learns from.
        held_out: what its epochs are compared on. Not the test set: choosing is learning too.
        folder: of the run; made if it is not there.
        info: goes into best.safetensors; its preprocessing is that of data.
        first: weights to begin with; None draws them from the recipe's seed. Resuming, they need
            not be given; if they are, they must be those that the run began with.
        resume: go on with what the folder holds.
        device: ``"cpu"`` or ``"cuda"``.
        save_seconds: how often the state is saved, besides after every epoch.
        log_steps: a line of metrics comes every so many steps.
        stop_at_step: end there as Ctrl-C does, for trials.
        workers: threads that read and decode photos ahead of the step; None takes as many as the
            kernels have. They change no bit.
        console: where progress is shown; None shows nothing.
        ranks: the processes that train together; each calls this with the same arguments. Rank 0
            alone touches the folder. Their number changes no bit, if the table of operations and
            the number of threads are the same.
        ops: the table of operations for the device; None takes the default. With that of the
            kernels for CUDA and one rank, steps are replayed as CUDA graphs, unless its settings
            say ``capture=False``; no bit depends on it. Several ranks launch theirs, and say so.

    Returns:
        How it ended.

    Raises:
        TrainingError: if data do not suit, the folder is not this run's alone, or something is no
            longer finite.
        ConfigError, ShapeError, NonFiniteError: if config or first does not fit the data.
        ArrayTypeError, RangeError, DeviceError: if another argument is wrong.
        CheckpointError: if something cannot be saved, or what was saved is damaged.
        MissingFileError: if there is nothing to go on with.
        KeyboardInterrupt: at a second Ctrl-C.
    """
    check_type("ranks", ranks, Ranks, "from pvt_ref.train.data_parallel")
    try:
        job = _job(config, recipe, data, held_out, folder, info, console, ranks)
        check_flag("resume", resume)
        check_number("save_seconds", save_seconds, least=0)
        log_steps = check_number("log_steps", log_steps, least=1, whole=True)
        last = end = recipe.epochs * job.steps
        if stop_at_step is not None:
            end = min(last, check_number("stop_at_step", stop_at_step, least=0, whole=True))
        if workers is not None:
            workers = check_number("workers", workers, least=1, most=2**10, whole=True)
        if not isinstance(device, str) or device not in ("cpu", "cuda"):
            cuda = "'cuda', the current CUDA device (for another GPU: CUDA_VISIBLE_DEVICES=1)"
            what = f"device is {shown(device)}; a training runs on 'cpu' or {cuda}"
            raise errors.DeviceError(what)
        said = first is not None or not resume  # whether the first weights must be those of the run
        if first is None:
            first = init_params(config, generator(recipe.seed, What.FIRST_WEIGHTS))
        Model(to_numpy(first), config, info=job.info)  # refuses what is not finite or does not fit
        params: Any = to_device(first, device)
        run = describe_run(config, recipe, data, held_out, first if said else None)
        ops = choose_ops(ops, first_array(params), architecture_of(config))
        job = dataclasses.replace(job, ops=ops)
        table = f"{ops!r}, {default_threads()} threads"
        _check_same_table(ranks.gather(table))  # it decides the last bits
        run["operations"] = {"table": table}
    except PVTError as error:
        ranks.fail(error)
        raise

    interrupts, report = Interrupts(), None
    try:
        interrupts.install()
        state, run = ranks.from_first(lambda: _begin(job, params, data, run, resume))
        state = to_device(state, device)
        captured = None
        if CapturedSteps.can(ops, state.params):
            if ranks.size == 1:
                captured = CapturedSteps(ops)
            elif ranks.is_first:
                what = f"{ranks.size} ranks launch every kernel of a step, with the same bits"
                job.say(f"{what}: a CUDA graph cannot hold the exchange of gradients")
        metrics = Metrics(job.place / METRICS, state, job.steps) if ranks.is_first else None
        if metrics and metrics.epochs != list(range(1, state.step // job.steps + 1)):
            job.say(f"{metrics.path} lacks epochs that were done, and so will the curves")
        saved_at = time.monotonic()
        with Progress(console, last, state.step) as progress, Ahead(data, workers) as samples:
            while state.step < end and not any(ranks.gather(bool(interrupts))):
                coming = min(end, state.step + _STEPS_AHEAD) if data.from_files else state.step
                for step in range(state.step, coming):
                    epoch, chosen = batch_of_step(state.seed, step, len(data), recipe)
                    for _, mine in shard_of(chosen, recipe, ranks):
                        samples.expect(mine, state.seed, epoch)
                given = (state, samples, config, recipe, ranks, ops)
                if captured is None:
                    state, report = interrupts.allow(train_step, *given)
                else:
                    state, report = interrupts.allow(next_step, *given, captured)
                index = state.step % job.steps
                progress.step(report, recipe.batch_size, job.answers)
                line = {"step": state.step, "epoch": state.step / job.steps, "lr": report.lr}
                line |= {"images_per_second": round(progress.images_per_second, 1)}
                if data.from_files and (index == 0 or state.step % log_steps == 0):
                    line["data_wait"] = samples.share_waited()
                if index == 0:
                    _check_weights(job, state, report.lr)
                    loss, scores = interrupts.allow(_measure, job, state, report.lr)
                    state, of_epoch = _end_of_epoch(job, state, loss, scores)
                    line |= of_epoch
                    # the metrics come first: lines beyond what is saved are dropped on
                    # resuming, but a line that was never written would be missed for ever
                    _write(job, metrics, line)
                    _save(job, state, run)
                    if state.best_epoch == line["epoch"]:
                        _save_best(job, state)
                    saved_at = time.monotonic()
                    _draw(job)
                    progress.epoch(line)
                    samples.share_waited()  # evaluation is no part of the next steps' time
                elif state.step % log_steps == 0:
                    line["loss"] = report.loss
                    if not report.skipped:
                        line["grad_norm"] = report.grad_norm
                    _write(job, metrics, line)
                if index and time.monotonic() - saved_at > save_seconds:
                    _check_weights(job, state, report.lr)
                    _save(job, state, run)
                    saved_at = time.monotonic()
            if state.step % job.steps and report:
                _check_weights(job, state, report.lr)
                _save(job, state, run)
            elif state.step and report is None:  # nothing was left to do, but maybe to draw
                _draw(job)
        if state.step == last and ranks.is_first:
            job.lock.check()
            _check_best(job, state)
        ranks.gather(None)  # rank 0 may have failed to save, and says so here
    except PVTError as error:
        ranks.fail(error)
        raise
    except BaseException:  # amid anything: the others cannot go on without this one
        ranks.abort()
        raise
    finally:
        try:
            _end(job.lock, interrupts)
        finally:  # a signal's handler that raises can break it off
            _end(job.lock, interrupts)
    return Run(state, state.step == last, job.place)


def _check_same_table(tables: list[str]) -> None:
    """Refuses ranks that would round differently."""
    for rank, table in enumerate(tables):
        if table != tables[0]:
            what = f"rank 0 computes with {shown(tables[0], 200)}, and rank {rank} with {table}"
            cure = "Give all the same number of threads: OPENBLAS_NUM_THREADS=1, for instance"
            raise TrainingError(f"{what}: their last bits would differ. {cure}")


def _begin(
    job: "_Job", params: Any, data: Samples, run: dict[str, Any], resume: bool
) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from, and what is saved of the run. The folder is this process's now."""
    _make_folder(job.place, resume)
    job.lock.acquire()
    if resume:
        table = run["operations"]["table"]
        state, saved = load_state_and_run(job.place / STATE, job.config, run, first_array(params))
        _check_resumed(job, state)
        if (then := saved.get("operations", {}).get("table")) != table:
            then = shown(then, 200)
            job.say(f"saved with {then}, goes on with {table}: last bits may differ")
        run = saved | {"operations": run["operations"]}  # saved may know the first weights
    else:
        there = [name for name in (STATE, BEST, METRICS) if os.path.lexists(job.place / name)]
        if there:
            what = f"{job.place} holds a training already ({', '.join(there)})"
            go_on = "Go on with it (resume=True, on the command line --resume)"
            raise TrainingError(f"{what}. {go_on}, or name another folder")
        state = start_training(params, len(data), job.recipe.seed)
        _save(job, state, run)
    for orphan in job.place.glob(f".{'[0-9a-f]' * 16}.tmp"):  # killed while it was written
        with contextlib.suppress(OSError):
            orphan.unlink()
    return state, run


@record
class _Job:
    """What stays the same from the first step to the last; steps are those of an epoch.

    answers is how many classes a step tells: one for each sample, or for each of its pixels.
    """

    config: Any
    recipe: Recipe
    samples: int
    answers: int
    held_out: Samples
    info: ModelInfo
    place: Path
    lock: RunLock
    steps: int
    console: Console | None
    ranks: Ranks
    ops: Ops | None = None  # None until it is known where the weights lie

    def say(self, text: str) -> None:
        show(self.console, text)


def _job(
    config: Any,
    recipe: Recipe,
    data: Any,
    held_out: Any,
    folder: Any,
    info: Any,
    console: Any,
    ranks: Ranks,
) -> _Job:
    check_samples(data, "the samples to learn from", config, recipe)
    check_samples(held_out, "held out", config, recipe)
    if data.preprocessing != held_out.preprocessing:
        what = f"the samples to learn from have {data.preprocessing}, those held out have"
        raise TrainingError(f"{what} {held_out.preprocessing}; both must be prepared alike")
    if info is not None:
        check_type("info", info, ModelInfo, "or None")
    if console is not None:
        check_type("console", console, Console, "of rich, or None")
    place = check_path("folder", folder)
    try:
        place = place.absolute()  # once, whatever the working directory is later
    except OSError as error:
        what = f"{place}: there is no working directory any more"
        raise TrainingError(f"{what}. Name the folder by its whole path") from error
    info = dataclasses.replace(info or ModelInfo(), preprocessing=data.preprocessing)
    if recipe.accumulate < ranks.size:
        what = f"there are {ranks.size} ranks, and the recipe has accumulate={recipe.accumulate}"
        cure = f"Each rank needs a micro-batch of its own: accumulate={ranks.size} or more"
        raise TrainingError(f"{what}. {cure}, or fewer ranks")
    steps, lock = recipe.steps_per_epoch(len(data)), RunLock(place)
    answers = recipe.batch_size * (math.prod(data.size) if data.has_label_maps else 1)
    return _Job(
        config, recipe, len(data), answers, held_out, info, place, lock, steps, console, ranks
    )


def _end(lock: RunLock, interrupts: Interrupts) -> None:
    try:
        lock.release()
    finally:
        interrupts.restore()


def _save(job: _Job, state: TrainState, run: Mapping[str, Any]) -> None:
    if not job.ranks.is_first:
        return
    job.lock.check()
    save_state(job.place / STATE, state, run)


def _write(job: _Job, metrics: Metrics | None, line: Mapping[str, Any]) -> None:
    if metrics is not None:
        job.lock.check()
        metrics.write(line)


def _make_folder(place: Path, resume: bool) -> None:
    if resume and not os.path.isdir(place):  # a name that was mistyped leaves nothing behind
        what = f"{place}: there is no such folder, so no training to go on with"
        raise errors.MissingFileError(f"{what}. Start one: on the command line without --resume")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"{place}: the folder of the run cannot be made ({reason(error)})"
        raise TrainingError(f"{what}. Name another") from error


def _check_resumed(job: _Job, state: TrainState) -> None:
    """Refuses a state that this run cannot have left, and best weights that are not its own."""
    done = (state.step - 1) % job.steps + 1 if state.step else 0  # steps of the epoch
    most_loss = done * float(np.finfo(dtype_name(first_array(state.params))).max)
    at_most = {"step": job.recipe.epochs * job.steps, "best_epoch": state.step // job.steps}
    at_most |= {"epoch_hits": done * job.answers, "epoch_loss": most_loss}
    for name, most in at_most.items():
        if getattr(state, name) > most:
            raise _edited(job, f"{name} is {getattr(state, name)}, and can be {most} at most")
    skipped = 0 if state.loss_scale is None else state.loss_scale.skipped
    if state.optimizer.t + skipped != state.step:
        without = f", {skipped} of them skipped" if skipped else ""
        raise _edited(job, f"t is {state.optimizer.t} after step {state.step}{without}")
    accuracy, shown_to = state.best_accuracy, len(job.held_out)
    dense = job.held_out.has_label_maps  # then it is a mean over classes
    if state.best_epoch and not dense and accuracy != round(accuracy * shown_to) / shown_to:
        raise _edited(job, f"best_accuracy is {accuracy}, which is no share of {shown_to} samples")
    if not state.best_epoch and state.step >= job.steps:
        raise _edited(job, f"best_epoch is 0 after step {state.step}")
    for name, of_run in (("samples", job.samples), ("seed", job.recipe.seed)):
        if getattr(state, name) != of_run:
            raise _edited(job, f"{name} is {getattr(state, name)}, and {of_run} in the run")
    # right after the best epoch, the process may have ended before it wrote the weights
    if state.best_epoch and state.step == state.best_epoch * job.steps and _best_fault(job, state):
        _save_best(job, state)
    _check_best(job, state)


def _edited(job: _Job, what: str) -> errors.CheckpointError:
    advice = "the file was edited. Put back a copy, or start anew in another folder"
    return errors.CheckpointError(f"{job.place / STATE}: {what}: {advice}")


def _measure(job: _Job, state: TrainState, lr: float) -> tuple[float, dict[str, float]]:
    """Loss, and accuracy and the like, of the averaged weights on what is held out."""
    config, held_out = job.config, job.held_out
    if architecture_of(config).dense:
        loss, counts = quietly(evaluate_pixels, state.average, config, held_out, job.ranks, job.ops)
        scores = {"accuracy": pixel_accuracy(counts), "miou": mean_iou(counts)}
        if math.isnan(scores["miou"]):
            raise TrainingError("what is held out has no pixel with a label, so no epoch is best")
    else:
        loss, accuracy = quietly(
            evaluate, state.average, config, held_out, None, job.ranks, job.ops
        )
        scores = {"accuracy": accuracy}
    if not math.isfinite(loss):
        images = held_out.batch(slice(0, 64), like=first_array(state.average))
        culprit = first_non_finite(state.average, images, config)
        what = f"the loss on what is held out is {loss}"
        raise diverged(what, state.step - 1, job.steps, lr, culprit)
    return loss, scores


def _end_of_epoch(
    job: _Job, state: TrainState, loss: float, scores: dict[str, float]
) -> tuple[TrainState, dict[str, float]]:
    """The state that knows whether the epoch did best, and the line of metrics."""
    steps, seen = job.steps, job.steps * job.answers
    line = {"epoch": state.step // steps, "train_loss": state.epoch_loss / steps}
    line |= {"train_accuracy": state.epoch_hits / seen, "held_out_loss": loss}
    line |= {f"held_out_{name}": score for name, score in scores.items()}
    name, score = list(scores.items())[-1]  # what epochs are compared by
    if score > state.best_accuracy:
        best = {"best_accuracy": score, "best_epoch": line["epoch"]}
        state = dataclasses.replace(state, **best, best_sha256=weights_sha256(state.average))
    return state, line | {f"best_{name}": state.best_accuracy, "best_epoch": state.best_epoch}


def _save_best(job: _Job, state: TrainState) -> None:
    """Writes the averaged weights, which have just done best, after the state that knows of them.

    Should the process end in between, they are written again from its average.
    """
    if not job.ranks.is_first:
        return
    job.lock.check()
    save(job.place / BEST, Model(to_numpy(state.average), job.config, info=job.info))


def _check_best(job: _Job, state: TrainState) -> None:
    if fault := _best_fault(job, state):
        copy = f"Put back the file that belongs to {STATE} from a copy of the folder"
        what = f"{job.place / BEST} {fault}. {copy}, or start anew in another"
        raise TrainingError(f"{what}: this run cannot make it again")


def _best_fault(job: _Job, state: TrainState) -> str:
    """What is wrong with the file of the best weights; nothing, if they are those of the state."""
    path = job.place / BEST
    if not os.path.lexists(path):
        done = f"the weights of epoch {state.best_epoch}, which did best, are lost"
        return f"is not there: {done}" if state.best_epoch else ""
    if not state.best_epoch:
        return f"is there, though {STATE} is from before the end of the first epoch"
    try:
        model = load(path)
        found = weights_sha256(model.params)
    except PVTError as error:
        return f"cannot be read ({error})"
    if other := different_fields(model, job.config, job.info):
        why = "it was edited, is of another run, or fit was given another info than at first"
        return f"has another {other} than this run: {why}"
    if found == state.best_sha256:
        return ""
    best = f"the weights of epoch {state.best_epoch}, which did best"
    return f"does not hold {best}: it is of another run, or of another moment of this one"


def _check_weights(job: _Job, state: TrainState, lr: float) -> None:
    for prefix, tree in (("", state.params), ("average", state.average)):
        for key, w in named_arrays(tree, prefix):
            if not is_finite(w):
                culprit = f"The first array that is not finite is {key}"
                raise diverged("the weights are not finite", state.step - 1, job.steps, lr, culprit)


def _draw(job: _Job) -> None:
    if not job.ranks.is_first:
        return
    job.lock.check()
    try:
        draw_curves(job.place / METRICS, job.place / CURVES)
    except ImportError:  # without matplotlib there is none
        return
    except Exception as error:  # matplotlib has many; no training ends for want of a picture
        kind = "" if isinstance(error, PVTError) else f"{type(error).__name__}: "
        job.say(f"{CURVES} is not up to date: {kind}{error}")
