"""Times another commit of this project beside the current code and PyTorch, in the same run.

    python benchmarks/compare_commit.py bfea25b
    python benchmarks/compare_commit.py bfea25b --quick --rounds 9
    python benchmarks/compare_commit.py HEAD~1 --models pvt_v2_b0 deit_s_16

The other commit's files are written into a temporary folder and run by its own
benchmarks/worker.py, since the names of functions change between commits. Everything else is as in
cpu.py: processes run in turn, and nothing is timed before all results match. Prints tables; --out
stores them and the measurements in against.md and against.json.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from in_turn import NATIVE, ROOT, Worker, check_equality, make_weights, say, time_in_turn
from machine import cores, describe_machine
from report import RIVAL, machine_line, ratio_table, times_table

from pvt_ref import VARIANTS


def git(*words: str) -> str:
    """git's output in this checkout; git itself reports errors."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def take_out(commit: str, folder: Path) -> Path:
    """The package and the benchmarks of a commit, as files."""
    file, root = folder / "commit.zip", folder / "commit"
    git("archive", "--format=zip", f"--output={file}", commit, "pvt_ref", "benchmarks")
    shutil.unpack_archive(file, root)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("commit", help="any name that git knows")
    parser.add_argument("--quick", action="store_true", help="pvt_tiny, B = 1 only")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["pvt_tiny", "pvt_small"],
        choices=VARIANTS,
        metavar="NAME",
        help="models other than PVT need a commit that can time them",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing")
    parser.add_argument("--seconds", type=float, default=2.0, help="timing per case and round")
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results")
    args = parser.parse_args()
    threads = args.threads or cores()
    try:
        commit = git("rev-parse", "--short", "--verify", f"{args.commit}^{{commit}}")
    except subprocess.CalledProcessError:
        parser.error(f"git knows no commit {args.commit}")
    other = f"pvt_ref at {commit}"
    models, batches = (["pvt_tiny"], [1]) if args.quick else (args.models, [1, 8])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workers = [
            Worker("pvt_ref", threads),
            Worker("pvt_ref", threads, root=take_out(commit, folder), shown=other),
            Worker(RIVAL, threads),
        ]
        weights = {model: str(make_weights(model, folder)) for model in models}
        cases = [
            {"weights": weights[model], "model": model, "size": NATIVE}
            | {"batch": batch, "train": train}
            for model in models
            for train in (False, True)
            for batch in batches
        ]
        say("Checking that all results match")
        checks = [case for case in cases if case["train"] and case["batch"] == 1]
        result: dict = {"machine": describe_machine(threads), "against": commit}
        result["errors"] = check_equality(workers, checks, folder)
        say(f"Timing, {args.rounds} rounds; medians")
        result["times"] = time_in_turn(workers, cases, args.rounds, args.seconds)
        result["versions"] = {}
        for worker in workers:
            result["versions"][worker.name] = worker.ask(do="versions", **cases[0])["versions"]
            worker.close()
    tables = [times_table(result), ratio_table(result, other), ratio_table(result)]
    heading = f"# The current code and commit {commit}\n"
    text = "\n".join([heading, machine_line(result), *tables])
    print("\n" + text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "against.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "against.md").write_text(text)


if __name__ == "__main__":
    main()
