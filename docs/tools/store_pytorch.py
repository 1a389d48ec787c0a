"""Stores what PyTorch gives for the numbers of each page, so that a build needs no PyTorch.

python docs/tools/store_pytorch.py          writes docs/course/pytorch.json
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch


def linear() -> dict[str, torch.Tensor]:
    """The draws of docs/course/linear.md, in the same order."""
    rng = np.random.default_rng(3)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.tensor(rng.standard_normal(shape), requires_grad=True)

    x, W, b = leaf(2, 5, 4), leaf(3, 4), leaf(3)
    y = torch.nn.functional.linear(x, W, b)
    dx, dW, db = torch.autograd.grad(y, (x, W, b), torch.tensor(rng.standard_normal(y.shape)))
    return {"y": y, "dx": dx, "dW": dW, "db": db}


def main() -> None:
    """Writes all pages' numbers; floats in JSON keep every bit."""
    pages: dict[str, Any] = {"linear": linear()}
    record = {
        page: {symbol: x.detach().numpy().tolist() for symbol, x in arrays.items()}
        for page, arrays in pages.items()
    }
    path = Path(__file__).parents[1] / "course" / "pytorch.json"
    path.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
