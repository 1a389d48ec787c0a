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


def layer_norm() -> dict[str, torch.Tensor]:
    """The draws of docs/course/layer_norm.md, in the same order."""
    rng = np.random.default_rng(4)
    x = torch.tensor(5 + 2 * rng.standard_normal((2, 3, 6)), requires_grad=True)
    weight = torch.tensor(1 + 0.1 * rng.standard_normal(6), requires_grad=True)
    bias = torch.tensor(rng.standard_normal(6), requires_grad=True)
    y = torch.nn.functional.layer_norm(x, (6,), weight, bias, eps=1e-6)
    dy = torch.tensor(rng.standard_normal(y.shape))
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}


def gelu() -> dict[str, torch.Tensor]:
    """The draws of docs/course/gelu.md, in the same order."""
    rng = np.random.default_rng(5)
    x = torch.tensor(2 * rng.standard_normal((2, 3, 4)), requires_grad=True)
    y = torch.nn.functional.gelu(x)
    (dx,) = torch.autograd.grad(y, x, torch.tensor(rng.standard_normal(y.shape)))
    return {"y": y, "dx": dx}


def softmax() -> dict[str, torch.Tensor]:
    """The draws of docs/course/softmax.md, in the same order."""
    rng = np.random.default_rng(6)
    x = torch.tensor(rng.standard_normal((2, 3, 4, 5)), requires_grad=True)
    y = torch.softmax(x, dim=-1)
    (dx,) = torch.autograd.grad(y, x, torch.tensor(rng.standard_normal(y.shape)))
    logits = torch.tensor(2 * rng.standard_normal((2, 6)), requires_grad=True)
    t = rng.random((2, 6))
    t /= t.sum(axis=1, keepdims=True)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(t), label_smoothing=0.1)
    (dlogits,) = torch.autograd.grad(loss, logits)
    return {"y": y, "dx": dx, "loss": loss, "dlogits": dlogits}


def main() -> None:
    """Writes all pages' numbers; floats in JSON keep every bit."""
    pages: dict[str, Any] = {
        "linear": linear(),
        "layer_norm": layer_norm(),
        "gelu": gelu(),
        "softmax": softmax(),
    }
    record = {
        page: {symbol: x.detach().numpy().tolist() for symbol, x in arrays.items()}
        for page, arrays in pages.items()
    }
    path = Path(__file__).parents[1] / "course" / "pytorch.json"
    path.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
