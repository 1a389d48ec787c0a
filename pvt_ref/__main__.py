"""The command line: ``python -m pvt_ref summary pvt_small --size 512 768`` and ``convert``."""

import argparse
import io
import sys
from collections.abc import Sequence

from pvt_ref import __version__
from pvt_ref.checkpoint import load, save
from pvt_ref.config import VARIANTS
from pvt_ref.cost import VITS, count_cost
from pvt_ref.errors import PVTError
from pvt_ref.tables import format_cost


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pvt_ref", description="The Pyramid Vision Transformer in NumPy."
    )
    parser.add_argument("--version", action="version", version=f"pvt_ref {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

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
        if args.command == "summary":
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
