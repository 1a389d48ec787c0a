"""Measures how far this project's numbers are from PyTorch's, as a table for the README.

python tests/agreement.py

PyTorch's side is transformers' PVT with the authors' eps (see oracles.py). Float64: relative L2
distance between the two. Float32: distance of either from this project's float64 result on the
same float32 numbers, so that one can see whose rounding is larger.
"""

import datetime
import platform

import conftest  # noqa: F401  (threads are set before NumPy starts)
import numpy as np
import scipy
import torch
import transformers
from closeness import relative
from strategies import ModelCase
from test_transformers import UNUSED_BY_A_PYRAMID, exact_run, run_both

import pvt_ref
from pvt_ref import VARIANTS
from pvt_ref.tree import named_arrays

CASES = [
    ModelCase(VARIANTS["pvt_tiny"], 1, (224, 224), 21),
    ModelCase(VARIANTS["pvt_tiny"], 1, (256, 320), 22),
    ModelCase(VARIANTS["pvt_small"], 1, (224, 224), 23),
]


def flat(grads, pyramid: bool) -> np.ndarray:
    """All parameter gradients as one vector."""
    used = [
        np.asarray(g, np.float64).ravel()
        for key, g in named_arrays(grads)
        if not (pyramid and key in UNUSED_BY_A_PYRAMID)
    ]
    return np.concatenate(used)


def quantities(outputs, gradients, pyramid: bool) -> dict[str, np.ndarray]:
    grads, dimages = gradients
    names = [f"F{i}" for i in range(1, 5)] if pyramid else ["logits"]
    named = {name: np.asarray(y, np.float64) for name, y in zip(names, outputs, strict=True)}
    what = "pyramid" if pyramid else "logits"
    named[f"parameter gradients of {what}"] = flat(grads, pyramid)
    named[f"image gradient of {what}"] = np.asarray(dimages, np.float64)
    return named


def main() -> None:
    print("| model, image | quantity | float64, to PyTorch | float32, ours | float32, PyTorch's |")
    print("|---|---|---|---|---|")
    for case in CASES:
        name = next(name for name, config in VARIANTS.items() if config == case.config)
        for pyramid in (False, True):
            double = run_both(case, np.float64, pyramid)
            single = run_both(case, np.float32, pyramid)
            outputs, *gradients = exact_run(case, pyramid)
            exact = quantities(outputs, gradients, pyramid)
            ours64, theirs64, ours32, theirs32 = (
                quantities(run[k], run[k + 2], pyramid) for run in (double, single) for k in (0, 1)
            )
            for key, x in exact.items():
                print(
                    f"| {name}, {case.size[0]}×{case.size[1]} | {key} "
                    f"| {relative(ours64[key], theirs64[key]):.1e} "
                    f"| {relative(ours32[key], x):.1e} | {relative(theirs32[key], x):.1e} |"
                )
    versions = (
        f"pvt_ref {pvt_ref.__version__}, NumPy {np.__version__}, SciPy {scipy.__version__}, "
        f"PyTorch {torch.__version__.split('+')[0]} (CPU), "
        f"transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}"
    )
    print(f"\nMeasured {datetime.date.today().isoformat()}: {versions}.")


if __name__ == "__main__":
    main()
