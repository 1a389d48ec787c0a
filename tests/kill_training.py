"""Kills a training at random moments, many times, and sees whether it ends as if never disturbed.

    python tests/kill_training.py --rounds 50 --seed 0
    python tests/kill_training.py --rounds 5 --wait 8      waits 8 times as long before each kill
    python tests/kill_training.py --photos                 photos in folders, which threads read

A child process trains; the parent ends it with SIGKILL after a random time and starts the next one
with resume. After every kill what was saved must load. In the end weights, moments, averages
and metrics must be those of a run that nobody touched. With --full-disk, the file
system refuses larger files instead (as a full disk does), and what was saved before must be whole.

Children are forked, so that a round costs no start of Python; this needs a POSIX system. Curves are
not drawn: it would take most of the time, and most kills would strike there, where nothing is lost.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # threads would not survive the fork

import argparse
import json
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from small_training import CONFIG, DATA, HELD_OUT, RECIPE

import pvt_ref
from pvt_ref.errors import CheckpointError
from pvt_ref.train import fit, load_state, loop, read_metrics
from pvt_ref.train.loop import BEST, STATE
from pvt_ref.train.saved import describe_run
from pvt_ref.train.step import TrainState
from pvt_ref.tree import named_arrays

RUN = describe_run(CONFIG, RECIPE, DATA, HELD_OUT)


def train(folder: Path, resume: bool) -> None:
    """Saves after every step, so that there is much to interrupt."""
    fit(CONFIG, RECIPE, DATA, HELD_OUT, folder, resume=resume, save_seconds=0.0, log_steps=1)


def fingerprint(state: TrainState) -> dict[str, bytes | str]:
    """Every bit of a state."""
    trees = {"w": state.params, "m": state.optimizer.m, "v": state.optimizer.v}
    trees["average"] = state.average
    bits: dict[str, bytes | str] = {
        f"{name}.{key}": np.asarray(x).tobytes()
        for name, tree in trees.items()
        for key, x in named_arrays(tree)
    }
    numbers = (state.step, state.optimizer.t, state.epoch_loss, state.epoch_hits)
    rest = (numbers, state.best_accuracy, state.best_epoch, state.best_sha256)
    rest += (state.seed, state.samples)
    bits["rest"] = json.dumps(rest, sort_keys=True)
    return bits


def what_counts(folder: Path) -> list[dict]:
    """The metrics without what depends on the clock."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")}
        for line in lines
    ]


def saved(folder: Path) -> TrainState:
    return load_state(folder / STATE, CONFIG, RUN, like=np.empty(0))


def child(folder: Path, resume: bool) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            train(folder, resume)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    return pid


def kill_many_times(rounds: int, seed: int, wait: float = 1.0) -> tuple[int, int]:
    """Kills so many children, and returns how many there were and how many were too quick for it.

    Args:
        rounds: children to kill before they have finished.
        seed: of the moments.
        wait: how many times as long as usual they are given. From 2 on, as on a machine that has
            become faster since the first run, most of them finish, and each makes the next wait
            shorter.
    """
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        undisturbed, folder = Path(name, "undisturbed"), Path(name, "killed")
        began = time.monotonic()
        train(undisturbed, resume=False)
        typical = time.monotonic() - began
        expected = fingerprint(saved(undisturbed))
        killed = finished = runs = 0
        longest = 0.5 * typical * wait
        while killed < rounds:
            # a few runs from start to end, each killed over and over on the way
            resume = (folder / STATE).exists()
            if resume and saved(folder).step == RECIPE.epochs * 4:
                assert fingerprint(saved(folder)) == expected
                runs += 1
                folder = Path(name, f"killed{runs}")
                resume = False
            pid = child(folder, resume)
            time.sleep(rng.uniform(0, longest))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if os.WIFSIGNALED(status):
                killed += 1
            elif os.WEXITSTATUS(status):
                raise SystemExit("a child failed, see above")
            else:
                finished += 1
                longest *= 0.8
            if (folder / STATE).exists():
                saved(folder)  # raises if it is damaged
            if (folder / BEST).exists():
                pvt_ref.load(folder / BEST)
        begun = (folder / STATE).exists()
        if not begun or saved(folder).step < RECIPE.epochs * 4:
            train(folder, resume=begun)
        assert fingerprint(saved(folder)) == expected, "the bits differ"
        assert what_counts(folder) == what_counts(undisturbed), "the metrics differ"
        assert not list(folder.glob(".*")), "something half-written was left behind"
        best = [(Path(f) / BEST).read_bytes() for f in (folder, undisturbed)]
        assert best[0] == best[1], "the best weights differ"
    return killed, finished


def fill_the_disk(share: float) -> str:
    """What is said when a state can be written in part only; the state before must be whole."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fit(CONFIG, RECIPE, DATA, HELD_OUT, folder, stop_at_step=5)
        before = (folder / STATE).read_bytes()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(len(before) * share), hard))
        try:
            fit(CONFIG, RECIPE, DATA, HELD_OUT, folder, resume=True)
        except CheckpointError as error:
            message = str(error)
        else:
            raise SystemExit("the limit was not noticed")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert (folder / STATE).read_bytes() == before, "what was saved has changed"
        assert not list(folder.glob(".*")), "something half-written was left behind"
        assert fit(CONFIG, RECIPE, DATA, HELD_OUT, folder, resume=True).finished
        return message


def learn_from_photos(folder: Path) -> None:
    """From here on the trainings learn from photos in files, which are written there."""
    from small_photos import AUGMENT, photos, write_photos

    global DATA, HELD_OUT, RUN
    DATA = photos(write_photos(folder / "learnt", 27, 1), augment=AUGMENT)
    HELD_OUT = photos(write_photos(folder / "held_out", 9, 2))
    RUN = describe_run(CONFIG, RECIPE, DATA, HELD_OUT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kills a training at random moments.")
    parser.add_argument("--rounds", type=int, default=50, help="kills (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--wait", type=float, default=1.0, help="times as long (default 1)")
    parser.add_argument("--photos", action="store_true", help="learn from photos in folders")
    parser.add_argument("--full-disk", action="store_true", help="a full disk instead of kills")
    options = parser.parse_args()
    loop.draw_curves = lambda *_: None
    if options.full_disk:
        print(fill_the_disk(0.5))
    else:
        with tempfile.TemporaryDirectory() as photos_folder:
            if options.photos:
                learn_from_photos(Path(photos_folder))
            killed, finished = kill_many_times(options.rounds, options.seed, options.wait)
        print(f"killed {killed} times; the bits are the same ({finished} had finished before)")
