"""A small training on the ranks that mpiexec started; what it ends with is compared by its tests.

mpiexec -n 2 python tests/mpi_training.py FOLDER [--photos DIR] [--network pvt|pvt_v2|vit]
    [--accumulate 4] [--stop 5] [--resume] [--fail RANK STEP HOW] [--double] ...
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the same on one rank and on four, which share the cores

import argparse
import dataclasses
import signal
import sys
from pathlib import Path

import numpy as np
from small_training import CONFIG, DATA, HELD_OUT, RECIPE, without_chance

import pvt_ref
from pvt_ref.errors import CheckpointError, PVTError, TrainingError
from pvt_ref.train import fit, loop, step
from pvt_ref.train.data_parallel import ranks_here
from pvt_ref.tree import map_arrays, named_arrays

NETWORKS = {
    "pvt": CONFIG,
    "pvt_v2": pvt_ref.PVTv2Config(
        img_size=32, in_chans=1, num_classes=3, embed_dims=(8, 8, 12, 8), num_heads=(1, 2, 3, 2),
        mlp_ratios=(2, 2, 1, 2), depths=(1, 1, 1, 1), sr_ratios=(4, 2, 1, 1), drop_path_rate=0.3,
    ),
    "vit": pvt_ref.ViTConfig(
        img_size=16, in_chans=1, num_classes=3, patch_size=4, embed_dim=16, depth=2, num_heads=2,
        drop_path_rate=0.3,
    ),
}  # fmt: skip


def fail_at(rank: int, number: int, how: str, ranks) -> None:
    """Makes a rank fail when it computes a step, or when it saves the state after so many."""
    if how == "save":
        save = loop.save_state

        def fail_to_save(path, state, run):
            if ranks.rank == rank and state.step == number:
                raise CheckpointError("made to fail at saving")
            save(path, state, run)

        loop.save_state = fail_to_save
        return
    inner = step.draw_batch

    def draw(*arguments):
        if ranks.rank == rank and arguments[-1].step == number:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise TrainingError("made to fail") if how == "error" else ZeroDivisionError("a bug")
        return inner(*arguments)

    step.draw_batch = draw


def keep_gradients(path: str, ranks) -> None:
    """Writes the sum of a step's gradients over all micro-batches."""
    inner = ranks.sum

    def add_up(*arguments):
        total = inner(*arguments)
        if ranks.is_first:
            np.savez(path, **dict(named_arrays(total)))
        return total

    type(ranks).sum = lambda self, *arguments: add_up(*arguments)


def count_photos(data) -> list[int]:
    """The samples that this rank's steps have read so far."""
    read: list[int] = []
    inner = type(data).drawn_pixels

    def drawn_pixels(self, chosen, seed, epoch):
        read.extend(chosen.tolist())
        return inner(self, chosen, seed, epoch)

    type(data).drawn_pixels = drawn_pixels
    return read


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--network", choices=NETWORKS, default="pvt")
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--stop", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--fail", nargs=3)
    parser.add_argument("--calm", action="store_true")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--gradients")
    parser.add_argument("--threads-by-rank", action="store_true")
    args = parser.parse_args()
    ranks = ranks_here()
    config = NETWORKS[args.network]
    data, held_out = DATA, HELD_OUT
    if args.photos:
        from small_photos import AUGMENT, photos

        data = photos(args.photos / "learnt", config.img_size, augment=AUGMENT)
        held_out = photos(args.photos / "held_out", config.img_size)
    elif config.img_size == 32:
        data, held_out = (
            dataclasses.replace(part, images=part.images.repeat(2, axis=2).repeat(2, axis=3))
            for part in (DATA, HELD_OUT)
        )
    first = pvt_ref.init_params(config, np.random.default_rng(3))
    if args.double:
        first = map_arrays(lambda w: w.astype(np.float64), first)
    recipe = dataclasses.replace(RECIPE, accumulate=args.accumulate)
    if args.calm:
        recipe = without_chance(recipe)
        config = dataclasses.replace(config, drop_path_rate=0.0)
    if args.threads_by_rank:
        loop.default_threads = lambda: 1 + ranks.rank
    if args.gradients:
        keep_gradients(args.gradients, ranks)
    read = count_photos(data) if args.count else []
    if args.fail:
        rank, number, how = args.fail
        fail_at(int(rank), int(number), how, ranks)
    try:
        done = fit(
            config, recipe, data, held_out, args.folder, first=first, resume=args.resume,
            stop_at_step=args.stop, log_steps=1, ranks=ranks,
        )  # fmt: skip
    except PVTError as error:
        print(f"rank {ranks.rank}: {error}", file=sys.stderr)
        return 2 if ranks.is_first else 0
    if args.count:
        print(f"rank {ranks.rank} read {len(read)} photos")
    print(f"rank {ranks.rank} of {ranks.size}: step {done.state.step}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
