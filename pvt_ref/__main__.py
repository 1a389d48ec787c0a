"""The command line: ``python -m pvt_ref classify cat.jpg``, ``summary pvt_small``, ``convert``."""

import argparse
import io
import json
import sys
from collections.abc import Sequence

from pvt_ref import __version__
from pvt_ref.checkpoint import save
from pvt_ref.config import VARIANTS
from pvt_ref.cost import VITS, count_cost
from pvt_ref.errors import PVTError
from pvt_ref.face import Prediction
from pvt_ref.tables import format_cost, text_table
from pvt_ref.zoo import RELEASED, SHIPPED, load


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pvt_ref", description="The Pyramid Vision Transformer in NumPy."
    )
    parser.add_argument("--version", action="version", version=f"pvt_ref {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    classify = commands.add_parser("classify", help="what pictures show, with probabilities")
    classify.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    classify.add_argument(
        "--weights",
        default="cifar10",
        metavar="NAME|FILE",
        help=f"{', '.join(SHIPPED)} (in the package), {', '.join(RELEASED)} (fetched when first "
        f"asked for), or a file (default cifar10)",
    )
    classify.add_argument("--top", type=int, default=5, help="classes a picture (default 5)")
    classify.add_argument("--json", action="store_true", help="a list, for programs")

    summary = commands.add_parser(
        "summary", help="parameters, MACs and memory by stage and operation, as a table"
    )
    summary.add_argument("model", choices=[*VARIANTS, *VITS], help="a PVT, or a ViT to compare")
    summary.add_argument(
        "--size", nargs="+", type=int, metavar="PIXELS", help="H W, or one side of a square"
    )
    summary.add_argument("--batch", type=int, default=1, help="images at once (default 1)")
    summary.add_argument(
        "--dtype", choices=["float32", "float64"], default="float32", help="default float32"
    )
    summary.add_argument(
        "--pyramid", action="store_true", help="the dense pyramid instead of the classifier"
    )

    convert = commands.add_parser(
        "convert", help="weights of any readable layout to this project's .safetensors"
    )
    convert.add_argument("src", help="a .pth, .bin or .safetensors file")
    convert.add_argument("dst", help="the .safetensors file to write")
    convert.add_argument(
        "--eps",
        nargs="+",
        type=float,
        metavar="EPS",
        help="epsilon of the norms, and of those after projections if another (default: that of "
        "the code which made the file; 1e-6 1e-5 for the authors' weights in Hugging Face's files)",
    )
    return parser


def _as_tables(args: argparse.Namespace, answers: list[list[Prediction]]) -> str:
    return "\n\n".join(
        f"{path}\n{text_table(['class', 'probability'], map(_row, answer))}"
        for path, answer in zip(args.images, answers, strict=True)
    )


def _row(answer: Prediction) -> list[str]:
    return [answer.label, f"{answer.probability:.4f}"]


def _as_json(args: argparse.Namespace, answers: list[list[Prediction]]) -> str:
    records = [
        {
            "image": path,
            "weights": args.weights,
            "predictions": [answer._asdict() for answer in predictions],
        }
        for path, predictions in zip(args.images, answers, strict=True)
    ]
    return json.dumps(records, indent=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: arguments; None takes the command line's.

    Returns:
        The exit status: 0, or 2 after a message on standard error.
    """
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may hold what a terminal cannot show
            stream.reconfigure(errors="replace")
    try:
        if args.command == "classify":
            model = load(args.weights)
            answers = model.predict(args.images, top=args.top)
            print(_as_json(args, answers) if args.json else _as_tables(args, answers))
        elif args.command == "summary":
            known = {**VARIANTS, **VITS}
            size = args.size[0] if args.size and len(args.size) == 1 else args.size
            cost = count_cost(known[args.model], size, args.batch, args.dtype, args.pyramid)
            print(f"{args.model}, {format_cost(cost)}")
        else:
            eps = args.eps[0] if args.eps and len(args.eps) == 1 else args.eps
            model = load(args.src, eps=eps)
            save(args.dst, model)
            print(f"{args.src}: {model.source}\nwritten to {args.dst}")
    except (PVTError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
