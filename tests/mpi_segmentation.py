"""A small training of a segmentation network on the ranks that mpiexec started.

mpiexec -n 2 python tests/mpi_segmentation.py FOLDER SCENES
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the same on one rank and on two, which share the cores

import dataclasses
import sys
from pathlib import Path

from small_pairs import AUGMENT, CONFIG, RECIPE, pairs

from pvt_ref.train import fit
from pvt_ref.train.data_parallel import ranks_here


def main(folder: str, scenes: str) -> None:
    ranks, root = ranks_here(), Path(scenes)
    data = pairs(root / "learnt", whole=(24, 48), augment=AUGMENT)
    held_out = pairs(root / "held_out")
    recipe = dataclasses.replace(RECIPE, epochs=2, accumulate=2)
    done = fit(CONFIG, recipe, data, held_out, folder, log_steps=1, ranks=ranks)
    print(f"rank {ranks.rank} of {ranks.size}: step {done.state.step}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
