"""Draws the loss of a float32 training beside PyTorch's, for the documentation.

    python tests/twin_curves.py          writes docs/results/training_twin.svg and .json

Both start from the same float32 weights and see the same batches of handwritten digits, with the
recipe of examples/train_digits.py. PyTorch's side is twin.py: its autograd, AdamW and schedule. The
two round differently, so they part slowly; how far is drawn below.
"""

import dataclasses
import json
import sys
from pathlib import Path

import conftest  # noqa: F401  (threads are set before NumPy starts)
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from twin import our_losses, twin_losses

from pvt_ref import init_params
from pvt_ref.train import start_training

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from train_digits import CONFIG, RECIPE, read_digits  # noqa: E402

EPOCHS = 15


def main() -> None:
    data, _ = read_digits()
    recipe = dataclasses.replace(RECIPE, epochs=EPOCHS)
    steps = EPOCHS * recipe.steps_per_epoch(len(data))
    params = init_params(CONFIG, np.random.default_rng([recipe.seed, 1]), np.float32)
    state = start_training(params, len(data), recipe.seed)
    _, ours = our_losses(state, data, CONFIG, recipe, steps)
    _, _, theirs = twin_losses(state, data, CONFIG, recipe, steps)
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    apart = np.abs(ours - theirs) / theirs

    folder = ROOT / "docs" / "results"
    with matplotlib.rc_context({"svg.hashsalt": "pvt_ref", "font.size": 9}):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        upper.plot(theirs, color="tab:orange", lw=3, alpha=0.6, label="PyTorch: autograd and AdamW")
        upper.plot(ours, color="tab:blue", lw=0.9, label="pvt_ref: derivatives by hand")
        upper.set(ylabel="loss of the batch", title="Handwritten digits, float32, the same batches")
        upper.legend()
        lower.semilogy(np.maximum(apart, 1e-9), color="tab:green", lw=0.8)
        lower.set(xlabel="step", ylabel="relative difference")
        for ax in (upper, lower):
            ax.grid(alpha=0.3)
        figure.savefig(folder / "training_twin.svg", metadata={"Date": None})
    record = {
        "command": "python tests/twin_curves.py",
        "steps": steps,
        "numpy": np.__version__,
        "torch": torch.__version__,
        "largest_relative_difference": float(apart.max()),
        "median_relative_difference": float(np.median(apart)),
        "ours": [round(float(x), 6) for x in ours],
        "pytorch": [round(float(x), 6) for x in theirs],
    }
    (folder / "training_twin.json").write_text(json.dumps(record) + "\n")
    print({k: v for k, v in record.items() if not isinstance(v, list)})


if __name__ == "__main__":
    main()
