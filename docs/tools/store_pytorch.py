"""Stores what PyTorch gives for the numbers of each page, so that a build needs no PyTorch.

python docs/tools/store_pytorch.py [page ...]       writes docs/course/pytorch/*.json
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "course" / "pytorch"

_PAGES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {}


def page(
    function: Callable[[], dict[str, torch.Tensor]],
) -> Callable[[], dict[str, torch.Tensor]]:
    """Registers the numbers of docs/course/NAME.md: the same draws, in the same order."""
    _PAGES[function.__name__] = function
    return function


@page
def linear() -> dict[str, torch.Tensor]:
    """The draws of docs/course/linear.md, in the same order."""
    rng = np.random.default_rng(3)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.tensor(rng.standard_normal(shape), requires_grad=True)

    x, W, b = leaf(2, 5, 4), leaf(3, 4), leaf(3)
    y = torch.nn.functional.linear(x, W, b)
    dx, dW, db = torch.autograd.grad(y, (x, W, b), torch.tensor(rng.standard_normal(y.shape)))
    return {"y": y, "dx": dx, "dW": dW, "db": db}


@page
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


@page
def gelu() -> dict[str, torch.Tensor]:
    """The draws of docs/course/gelu.md, in the same order."""
    rng = np.random.default_rng(5)
    x = torch.tensor(2 * rng.standard_normal((2, 3, 4)), requires_grad=True)
    y = torch.nn.functional.gelu(x)
    (dx,) = torch.autograd.grad(y, x, torch.tensor(rng.standard_normal(y.shape)))
    return {"y": y, "dx": dx}


@page
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


@page
def sra() -> dict[str, torch.Tensor]:
    """The draws of docs/course/sra.md, in the same order: eq. 1 to 4 with PyTorch's own layers."""
    rng = np.random.default_rng(10)
    B, H, W, C, N, R = 2, 4, 6, 8, 2, 2
    F = torch.nn.functional

    def leaf(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x, requires_grad=True)

    def linear(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        return leaf(0.5 * rng.standard_normal(shape)), leaf(rng.standard_normal(shape[0]))

    q, kv, proj, sr = linear(C, C), linear(2 * C, C), linear(C, C), linear(C, C, R, R)
    gamma, beta = leaf(1 + 0.1 * rng.standard_normal(C)), leaf(rng.standard_normal(C))
    x = leaf(rng.standard_normal((B, H * W, C)))
    dy = torch.tensor(rng.standard_normal((B, H * W, C)))

    def attend(keys_from: torch.Tensor) -> torch.Tensor:
        def heads(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.unflatten(-1, (N, C // N)).transpose(1, 2)

        k, v = F.linear(keys_from, *kv).chunk(2, dim=-1)
        y = F.scaled_dot_product_attention(heads(F.linear(x, *q)), heads(k), heads(v))
        return F.linear(y.transpose(1, 2).flatten(2), *proj)

    token_map = x.transpose(1, 2).unflatten(-1, (H, W))
    reduced = F.conv2d(token_map, *sr, stride=R).flatten(2).transpose(1, 2)
    y = attend(F.layer_norm(reduced, (C,), gamma, beta, eps=1e-5))
    dx, *weights = torch.autograd.grad(y, (x, q[0], kv[0], proj[0], sr[0], gamma), dy)
    names = ("dq", "dkv", "dproj", "dsr", "dnorm")
    return {"y": y, "dx": dx, "y_plain": attend(x), **dict(zip(names, weights, strict=True))}


def main() -> None:
    """Writes the pages named, or all; floats in JSON keep every bit."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or _PAGES:
        arrays = _PAGES[name]()
        record = {symbol: x.detach().numpy().tolist() for symbol, x in arrays.items()}
        (FOLDER / f"{name}.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
