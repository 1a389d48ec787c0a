"""Options of the command line for trainings: one for each field of the recipe, and the rest."""

import argparse
import dataclasses
import shlex
import sys
from typing import Any

from rich.console import Console

from pvt_ref.data.picture_file import SUFFIXES
from pvt_ref.errors import ConfigError, PVTError, printable
from pvt_ref.kernels.cuda.launch import PRECISIONS
from pvt_ref.models.architecture import known_variants
from pvt_ref.ops import Ops
from pvt_ref.train.data_parallel import ranks_here
from pvt_ref.train.from_folder import (
    AUGMENTS,
    DEFAULT_WEIGHTS,
    FINE_TUNING,
    FROM_NOTHING,
    MODEL,
    Options,
    train_folder,
)
from pvt_ref.train.recipe import Recipe

#: Exit status of a training that was stopped before its end, as of one ended by Ctrl-C.
STOPPED = 130

_ABOUT = f"""DIR holds the folders train and val (or valid, validation), each with a folder a class
and photos in it. Without val, or where DIR holds the classes' folders itself, a tenth of each class
is held out. Photos are files named {", ".join(SUFFIXES)}. Everything goes into the folder RUN; at
its end, RUN/{MODEL} is what classify takes as --weights."""


def add_recipe_options(parser: argparse.ArgumentParser, recipe: Recipe | None) -> None:
    """An option for each field of the recipe. Without one, what is not given stays unset."""
    about = "see pvt_ref.train.Recipe"
    if recipe is None:
        kinds = (("beginning with weights", FINE_TUNING), ("from nothing", FROM_NOTHING))
        about += ". Defaults " + "; ".join(
            f"{kind}: {', '.join(f'{name} {value}' for name, value in values.items())}"
            for kind, values in kinds
        )
        about += "; else those of Recipe"
    group = parser.add_argument_group("recipe", about)
    typical = recipe or Recipe(epochs=1, batch_size=1)
    for field in dataclasses.fields(Recipe):
        value = getattr(typical, field.name)
        option = "--" + field.name.replace("_", "-")
        kind: dict[str, Any] = {"type": type(value)}
        if isinstance(value, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(value, tuple):
            kind = {"nargs": "*", "metavar": "PREFIX"}
        elif field.name == "clip_norm":
            kind = {"type": _number_or_none}
        if recipe is None:
            kind["default"] = argparse.SUPPRESS
        else:
            said = " ".join(value) or "none" if isinstance(value, tuple) else value
            kind |= {"default": value, "help": f"default {said}"}
        group.add_argument(option, **kind)


def _number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def recipe_values(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of a recipe that the options say."""
    names = (field.name for field in dataclasses.fields(Recipe))
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m pvt_ref train``."""
    parser.epilog = _ABOUT
    parser.add_argument("data", metavar="DIR", help="the folder of photos")
    parser.add_argument("--out", required=True, metavar="RUN", help="the folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in RUN")
    text = f"begin with these (default {DEFAULT_WEIGHTS}); with other classes they get a new head"
    parser.add_argument("--weights", metavar="NAME|FILE", help=text)
    text = f"begin from nothing with one of: {', '.join(known_variants())}"
    parser.add_argument("--variant", metavar="NAME", help=text)
    text = "side of what a photo becomes (default: that of the network)"
    parser.add_argument("--size", type=int, metavar="PIXELS", help=text)
    text = "how much photos are changed at random (default light, from nothing strong)"
    parser.add_argument("--augment", choices=tuple(AUGMENTS), help=text)
    text = "names of the classes: a line each, folder and name, or a JSON object"
    parser.add_argument("--class-names", metavar="FILE", help=text)
    text = "what to do with photos that cannot be read (default refuse)"
    parser.add_argument("--damaged", choices=("refuse", "skip"), help=text)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    text = "of the products of the CUDA kernels; needs --device cuda (default: the default table)"
    parser.add_argument("--precision", choices=PRECISIONS, help=text)
    text = "threads that read photos ahead (default as many as compute)"
    parser.add_argument("--workers", type=int, metavar="N", help=text)
    add_recipe_options(parser, None)


def train(args: argparse.Namespace) -> int:
    """``python -m pvt_ref train``, also started several times by mpiexec; returns its status."""
    names = (field.name for field in dataclasses.fields(Options) if field.name != "recipe")
    given = {name: getattr(args, name) for name in names}
    command = ["python", "-m", "pvt_ref", *(a for a in sys.argv[1:] if a != "--resume")]
    go_on = f"To go on:\n\n    {printable(shlex.join([*command, '--resume']))}"
    ranks = ranks_here()
    try:
        ranks = ranks.for_device(args.device)
        done = train_folder(
            args.data,
            args.out,
            Options(**given, recipe=recipe_values(args)),
            resume=args.resume,
            device=args.device,
            workers=args.workers,
            console=Console() if ranks.is_first else None,
            ranks=ranks,
            ops=_kernels(args.precision, args.device),
        )
    except PVTError:
        if ranks.is_first:
            raise
        return 0  # the first rank says it, and its status is that of all
    except KeyboardInterrupt:  # the second one, in the middle of a step
        print(f"Interrupted. {go_on}")
        return STOPPED
    except BaseException:
        ranks.abort()  # the others would wait for ever
        raise
    if not done.finished and ranks.is_first:
        print(f"Stopped and saved after step {done.state.step}. {go_on}")
        return STOPPED
    return 0


def _kernels(precision: str | None, device: str) -> Ops | None:
    """The CUDA kernels in a precision; None, the default table, where none is asked for."""
    if precision is None:
        return None
    if device != "cuda":
        what = f"--precision is {precision}, but the device is {device}"
        raise ConfigError(f"{what}; only the CUDA kernels have precisions. Add --device cuda")
    from pvt_ref.kernels.cuda.table import cuda_kernels  # loads what a CPU does not need

    return cuda_kernels(precision)
