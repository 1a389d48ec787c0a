"""Shared by the two training examples: their options, the run, and the report at its end."""

import argparse
import dataclasses
import os
import platform
import shlex
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

import pvt_ref
from pvt_ref import Model, ModelInfo, PVTConfig
from pvt_ref.errors import TrainingError, printable
from pvt_ref.train import LabelledImages, Recipe, Run, evaluate, fit
from pvt_ref.train.data_parallel import ranks_here
from pvt_ref.train.loop import STATE
from pvt_ref.train.options import add_recipe_options, recipe_values
from pvt_ref.train.progress import show
from pvt_ref.train.saved import different_fields, weights_sha256
from pvt_ref.tree import map_arrays

MODEL = "model.safetensors"


def add_run_arguments(parser: argparse.ArgumentParser, recipe: Recipe, folder: str) -> None:
    """--folder, --resume, --device, and one option for each field of the recipe."""
    parser.add_argument("--folder", default=folder, help=f"folder of the run (default {folder})")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    add_recipe_options(parser, recipe)


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The recipe given by the options."""
    return Recipe(**recipe_values(args))


def run(
    config: PVTConfig,
    data: LabelledImages,
    held_out: LabelledImages,
    info: ModelInfo,
    args: argparse.Namespace,
) -> Run:
    """Trains, on all ranks that mpiexec started, and says how to resume if it was stopped.

    Only the first rank returns; the others are through.
    """
    recipe, ranks = recipe_from(args), ranks_here()
    console = Console() if ranks.is_first else None
    model = Path(args.folder) / MODEL
    if os.path.lexists(model) and not args.resume and not os.path.lexists(model.with_name(STATE)):
        raise TrainingError(  # before the training rather than after it
            f"{model} belongs to another run, and this run would write a file of that name. Move "
            f"it away, or name another folder"
        )
    parameters = pvt_ref.count_cost(config).parameters
    steps = recipe.steps_per_epoch(len(data))
    samples = f"{len(data):,} samples, {recipe.epochs} epochs of {steps} steps"
    show(console, f"{parameters:,} parameters, {samples}")
    try:
        done = fit(
            config,
            recipe,
            data,
            held_out,
            args.folder,
            info=info,
            resume=args.resume,
            device=args.device,
            console=console,
            ranks=ranks,
        )
    except KeyboardInterrupt:  # the second one, in the middle of a step
        print(f"Interrupted. To resume from the last saved state:\n\n    {_how_to_resume()}")
        raise SystemExit(130) from None
    if not ranks.is_first:
        raise SystemExit(0 if done.finished else 130)
    if not done.finished:
        print(
            f"Stopped and saved after step {done.state.step} of {recipe.epochs * steps}. To "
            f"resume:\n\n    {_how_to_resume()}"
        )
    return done


def finish(
    done: Run,
    model: Model,
    held_out: LabelledImages,
    test: LabelledImages | None,
    about: dict[str, str | int | float],
    args: argparse.Namespace,
) -> Path:
    """Writes a model in half precision, with the accuracy of these rounded weights.

    The held-out samples were used to compare epochs. The test samples, if given, selected nothing
    and are measured once, here. The file also gets the entries of about, such as the data set's
    name. An existing file must be this run's.
    """
    path = done.folder / MODEL
    rounded = map_arrays(lambda w: w.astype(np.float16).astype(np.float32), model.params)
    known = {
        **about,
        "seed": args.seed,
        "epochs": args.epochs,
        "steps": done.state.step,
        "samples": done.state.samples,
        "held_out_samples": len(held_out),
    }
    if path.exists():  # resumed after the end: keeps the measured accuracy
        written = pvt_ref.load(path)
        said = written.info.training
        info = dataclasses.replace(model.info, training=said)
        wrong = [different_fields(written, model.config, info)]
        wrong += [name for name, value in known.items() if said.get(name) != value]
        if weights_sha256(written.params) != weights_sha256(rounded):
            wrong.append("weights")
        if wrong := ", ".join(filter(None, wrong)):
            raise TrainingError(
                f"{path} has other {wrong} than this run ended with: it belongs to another run, or "
                f"was edited. Move it away; the same command then writes this run's file"
            )
        model = written
    else:
        training = {**about, "command": _command(args), **known}
        training["held_out_accuracy"] = evaluate(rounded, model.config, held_out)[1]
        if test is not None:
            training["test_samples"] = len(test)
            training["test_accuracy"] = evaluate(rounded, model.config, test)[1]
        training |= {
            "pvt_ref": pvt_ref.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "device": args.device,
        }
        info = dataclasses.replace(model.info, training=training)
        model = Model(rounded, model.config, info=info)
        pvt_ref.save(path, model, dtype="float16")
    for name, value in model.info.training.items():
        print(printable(f"{name:>18}: {value}".replace("\n", " ")))
    print(printable(f"written: {path} ({path.stat().st_size:,} bytes)"))
    return path


def _arguments() -> list[str]:
    """The program's arguments without --resume."""
    return [argument for argument in sys.argv[1:] if argument != "--resume"]


def _how_to_resume() -> str:
    return printable(shlex.join(["python", sys.argv[0], *_arguments(), "--resume"]))


def _command(args: argparse.Namespace) -> str:
    """The command line for others: the program in the repository, and DIR for the data folder."""
    data = getattr(args, "data", None)
    arguments = ["DIR" if argument == data else argument for argument in _arguments()]
    return shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *arguments])
