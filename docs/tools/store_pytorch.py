"""Stores what PyTorch gives for the numbers of each page, so that a build needs no PyTorch.

python docs/tools/store_pytorch.py [page ...]       writes docs/course/pytorch/*.json
"""

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
def notation() -> dict[str, torch.Tensor]:
    """The draws of docs/course/notation.md, in the same order: a linear layer, then GELU."""
    rng = np.random.default_rng(2)

    def draw(scale: float, *shape: int) -> torch.Tensor:
        return torch.tensor(scale * rng.standard_normal(shape), requires_grad=True)

    x = draw(1.0, 2, 12, 5)
    weight, bias, dy = draw(0.5, 6, 5), draw(1.0, 6), draw(1.0, 2, 12, 6)
    z = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    dx, dW, db = torch.autograd.grad(z, (x, weight, bias), dy)
    return {"z": z, "dx": dx, "dW": dW, "db": db}


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
def position() -> dict[str, torch.Tensor]:
    """The draws of docs/course/position.md, in the same order: interpolate, and its gradient."""
    rng = np.random.default_rng(8)
    h, w, C = 3, 4, 7
    table = torch.tensor(rng.standard_normal((1, 1 + h * w, C)), requires_grad=True)
    x = torch.tensor(rng.standard_normal((2, 1 + 5 * 6, C)), requires_grad=True)
    dy = torch.tensor(rng.standard_normal((2, 1 + 5 * 6, C)))

    def resized(size: tuple[int, int]) -> torch.Tensor:
        image = table[:, 1:].transpose(1, 2).unflatten(-1, (h, w))
        image = torch.nn.functional.interpolate(
            image, size=size, mode="bilinear", align_corners=False
        )
        return image.flatten(2).transpose(1, 2)

    y = x + torch.cat((table[:, :1], resized((5, 6))), dim=1)
    dx, dtable = torch.autograd.grad(y, (x, table), dy)
    results = {"y": y, "dx": dx, "dtable": dtable}
    for size in ((6, 8), (2, 2), (2, 9), (1, 7), (3, 5)):
        rows = resized(size)[0]
        (drows,) = torch.autograd.grad(rows, table, torch.tensor(rng.standard_normal(rows.shape)))
        name = "{}x{}".format(*size)
        results[f"rows_{name}"], results[f"drows_{name}"] = rows, drows[0, 1:]
    return results


@page
def sra() -> dict[str, torch.Tensor]:
    """The draws of docs/course/sra.md, in the same order: eq. 1 to 4 with PyTorch's own layers."""
    rng = np.random.default_rng(10)
    B, H, W, C, N, R = 4, 4, 6, 15, 3, 2
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


@page
def attention() -> dict[str, torch.Tensor]:
    """The draws of docs/course/attention.md, in the same order."""
    rng = np.random.default_rng(9)
    B, n, m, N, C = 3, 6, 4, 2, 10
    q, k, v = (
        torch.tensor(rng.standard_normal((B, rows, C)), requires_grad=True) for rows in (n, m, m)
    )
    dy = torch.tensor(rng.standard_normal((B, n, C)))
    qh, kh, vh = (x.unflatten(-1, (N, -1)).transpose(1, 2) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(qh, kh, vh).transpose(1, 2).flatten(2)
    dq, dk, dv = torch.autograd.grad(y, (q, k, v), dy)
    return {"y": y, "dq": dq, "dk": dk, "dv": dv}


@page
def patch_embed() -> dict[str, torch.Tensor]:
    """The draws of docs/course/patch_embed.md, in the same order; and two maps of odd sides."""
    rng = np.random.default_rng(7)
    F = torch.nn.functional

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    drawn = [0.5 * draw(5, 3, 2, 2), draw(5), 1 + 0.1 * draw(5), draw(5), draw(4, 6, 10, 3)]
    weight, bias, gamma, beta, x = (torch.tensor(array, requires_grad=True) for array in drawn)
    dy = torch.tensor(draw(4, 15, 5))
    projected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2).flatten(2).transpose(1, 2)
    y = F.layer_norm(projected, (5,), gamma, beta, eps=1e-5)
    names = ("dx", "dweight", "dbias", "dgamma", "dbeta")
    grads = torch.autograd.grad(y, (x, weight, bias, gamma, beta), dy)
    odd_1 = torch.arange(49.0).reshape(1, 1, 7, 7)
    odd_2 = odd_1.clone()
    odd_2[..., 6, :] = odd_2[..., 6] = 1000
    kernel = torch.tensor([[[[1.0, 2], [3, 4]]]])
    return {
        "projected": projected,
        "y": y,
        **dict(zip(names, grads, strict=True)),
        **{f"odd_{i}": x_map for i, x_map in ((1, odd_1), (2, odd_2))},
        **{f"tokens_{i}": F.conv2d(m, kernel, stride=2) for i, m in ((1, odd_1), (2, odd_2))},
    }


@page
def block() -> dict[str, torch.Tensor]:
    """The draws of docs/course/block.md, in the same order; without and with drop path."""
    rng = np.random.default_rng(11)
    F = torch.nn.functional
    B, H, W, C, E, N, R = 3, 2, 6, 4, 2, 2, 2

    def draw(scale: float, *shape: int) -> torch.Tensor:
        return torch.tensor(scale * rng.standard_normal(shape), requires_grad=True)

    def linear(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        return draw(0.5, *shape), draw(1.0, shape[0])

    def norm() -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.tensor(1 + 0.1 * rng.standard_normal(C), requires_grad=True)
        return weight, draw(1.0, C)

    norm1 = norm()
    q, kv, proj, sr = linear(C, C), linear(2 * C, C), linear(C, C), linear(C, C, R, R)
    reduced_norm, norm2 = norm(), norm()
    fc1, fc2 = linear(E * C, C), linear(C, E * C)
    x, dy = draw(1.0, B, H * W, C), draw(1.0, B, H * W, C)

    def heads(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (N, -1)).transpose(1, 2)

    def attend(tokens: torch.Tensor) -> torch.Tensor:
        x_map = tokens.transpose(1, 2).unflatten(-1, (H, W))
        reduced = F.conv2d(x_map, *sr, stride=R).flatten(2).transpose(1, 2)
        reduced = F.layer_norm(reduced, (C,), *reduced_norm, eps=1e-5)
        k, v = F.linear(reduced, *kv).chunk(2, dim=-1)
        y = F.scaled_dot_product_attention(heads(F.linear(tokens, *q)), heads(k), heads(v))
        return F.linear(y.transpose(1, 2).flatten(2), *proj)

    coins = np.random.default_rng(2).random((2, B), dtype=np.float32) >= 0.5
    kept = torch.tensor(coins).unflatten(-1, (B, 1, 1)) / 0.5
    results = {}
    for name, (first, second) in (("inference", torch.ones(2)), ("drop path", kept)):
        middle = x + first * attend(F.layer_norm(x, (C,), *norm1, eps=1e-6))
        hidden = F.gelu(F.linear(F.layer_norm(middle, (C,), *norm2, eps=1e-6), *fc1))
        y = middle + second * F.linear(hidden, *fc2)
        leaves = {"dx": x, "dfc1": fc1[0], "dfc2": fc2[0], "dnorm1": norm1[0], "dnorm2": norm2[0],
                  "dq": q[0], "dsr": sr[0]}  # fmt: skip
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        results |= {f"{name}.{key}": g for key, g in zip(leaves, grads, strict=True)}
        results[f"{name}.y"] = y
    return results


def _micro(seed: int, images_shape: tuple[int, ...], **sizes: Any) -> tuple:
    """A PVT of four narrow stages: generator, config, weights, images, logits and maps.

    The weights are drawn in the order of to_state_dict, the images after them. What is computed
    with them is written here once more, in PyTorch's own operations.
    """
    from pvt_ref import PVTConfig
    from pvt_ref.models.architecture import param_shapes

    config = PVTConfig(
        num_heads=(1, 2, 2, 2), mlp_ratios=(2, 2, 2, 2), depths=(1, 2, 1, 1),
        sr_ratios=(2, 2, 1, 1), **sizes,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    F = torch.nn.functional
    w = {
        key: torch.tensor(
            key.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
            + 0.3 * rng.standard_normal(shape),
            requires_grad=True,
        )
        for key, shape in param_shapes(config).items()
    }
    images = torch.tensor(rng.standard_normal(images_shape), requires_grad=True)

    def linear(key: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w[f"{key}.weight"], w[f"{key}.bias"])

    def norm(key: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{key}.weight"], w[f"{key}.bias"], eps)

    def patches(conv: str, after: str, x_map: torch.Tensor, P: int) -> torch.Tensor:
        x = F.conv2d(x_map, w[f"{conv}.weight"], w[f"{conv}.bias"], stride=P)
        return norm(after, x.flatten(2).transpose(1, 2), 1e-5)

    def attend(key: str, x: torch.Tensor, grid: tuple[int, ...], N: int, R: int) -> torch.Tensor:
        def heads(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.unflatten(-1, (N, -1)).transpose(1, 2)

        reduced = x
        if R > 1:
            x_map = x.transpose(1, 2).unflatten(-1, grid)
            reduced = patches(f"{key}.sr", f"{key}.norm", x_map, R)
        k, v = linear(f"{key}.kv", reduced).chunk(2, dim=-1)
        y = F.scaled_dot_product_attention(heads(linear(f"{key}.q", x)), heads(k), heads(v))
        return linear(f"{key}.proj", y.transpose(1, 2).flatten(2))

    def stage(i: int, x_map: torch.Tensor, with_cls: bool) -> torch.Tensor:
        P, side = config.patch_sizes[i], config.table_sides[i]
        grid = tuple(x_map.shape[axis] // P for axis in (2, 3))
        x = patches(f"patch_embed{i + 1}.proj", f"patch_embed{i + 1}.norm", x_map, P)
        table = w[f"pos_embed{i + 1}"]
        cls_rows = table.shape[1] - side * side
        rows = table[:, cls_rows:].transpose(1, 2).unflatten(-1, (side, side))
        rows = F.interpolate(rows, size=grid, mode="bilinear", align_corners=False)
        rows = rows.flatten(2).transpose(1, 2)
        if with_cls:
            x = torch.cat((w["cls_token"].expand(len(x), -1, -1), x), dim=1)
            rows = torch.cat((table[:, :1], rows), dim=1)
        x = x + rows
        for b in range(config.depths[i]):
            key = f"block{i + 1}.{b}"
            heads, R = config.num_heads[i], config.sr_ratios[i]
            x = x + attend(f"{key}.attn", norm(f"{key}.norm1", x, 1e-6), grid, heads, R)
            hidden = F.gelu(linear(f"{key}.mlp.fc1", norm(f"{key}.norm2", x, 1e-6)))
            x = x + linear(f"{key}.mlp.fc2", hidden)
        if with_cls:
            return x
        return x.transpose(1, 2).unflatten(-1, grid)

    maps, x_map = [], images
    for i in range(4):
        if i == 3:
            tokens = stage(i, x_map, with_cls=True)
        x_map = stage(i, x_map, with_cls=False)
        maps.append(x_map)
    logits = linear("head", norm("norm", tokens, 1e-6)[:, 0])
    return rng, w, images, logits, maps


@page
def stages() -> dict[str, torch.Tensor]:
    """The draws of docs/course/stages.md, in the same order: both readings of a small PVT."""
    rng, _, images, logits, maps = _micro(
        12, (1, 3, 16, 32), img_size=16, num_classes=3, patch_sizes=(2, 2, 2, 2),
        embed_dims=(4, 8, 8, 8),
    )  # fmt: skip
    dlogits = torch.tensor(rng.standard_normal(logits.shape))
    (dimages,) = torch.autograd.grad(logits, images, dlogits)
    named = {f"F{i}": x_map for i, x_map in enumerate(maps, start=1)}
    return {"logits": logits, **named, "dimages": dimages}


@page
def whole_backward() -> dict[str, torch.Tensor]:
    """The draws of docs/course/whole_backward.md, in the same order.

    Of each gradient its norm, and its inner product with a random direction of its shape.
    """
    rng, w, images, logits, maps = _micro(
        13, (2, 3, 32, 48), img_size=32, num_classes=9, patch_sizes=(4, 2, 2, 1),
        embed_dims=(8, 10, 12, 16),
    )  # fmt: skip
    dmaps = [torch.tensor(rng.standard_normal(x_map.shape)) for x_map in maps]
    leaves = [*w.values(), images]
    directions = [torch.tensor(rng.standard_normal(x.shape)) for x in leaves]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0]))
    results = {"loss": loss}
    for name, L in (
        ("classifier", loss),
        (
            "pyramid",
            sum(((y * d).sum() for y, d in zip(maps, dmaps, strict=True)), torch.zeros(())),
        ),
    ):
        grads = torch.autograd.grad(L, leaves, retain_graph=True, materialize_grads=True)
        results[f"{name}_norms"] = torch.stack([g.norm() for g in grads])
        results[f"{name}_along"] = torch.stack(
            [(g * v).sum() for g, v in zip(grads, directions, strict=True)]
        )
    return results


@page
def checkpoints() -> dict[str, torch.Tensor]:
    """The bytes of a file as torch.save writes it, and the tensors in it."""
    rng = np.random.default_rng(14)
    weight = torch.tensor(rng.standard_normal((2, 3)), dtype=torch.float32)
    bias = torch.tensor(rng.standard_normal(2)).to(torch.bfloat16)
    saved = {
        "model": {"head.weight": weight, "head.bias": bias},
        "epoch": 300,
        "args": argparse.Namespace(model="pvt_tiny", lr=0.0005),
    }
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    data = torch.tensor(list(buffer.getvalue()), dtype=torch.uint8)
    return {"file": data, "head.weight": weight, "head.bias": bias.float()}


@page
def training() -> dict[str, torch.Tensor]:
    """The draws of docs/course/training.md, in the same order: four clipped steps of AdamW."""
    rng = np.random.default_rng(15)

    def draw() -> list[torch.Tensor]:
        return [torch.tensor(rng.standard_normal(shape)) for shape in ((2, 3), (2,))]

    weight, bias = (x.requires_grad_() for x in draw())
    gradients = [draw() for _ in range(4)]
    groups = [{"params": [weight], "weight_decay": 0.3}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    weights, biases, norms = [], [], []
    for (weight.grad, bias.grad), lr in zip(gradients, (0.1, 0.2, 0.15, 0.05), strict=True):
        norms.append(torch.nn.utils.clip_grad_norm_([weight, bias], 2.9))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        weights.append(weight.detach().clone())
        biases.append(bias.detach().clone())
    return {
        "weight": torch.stack(weights),
        "bias": torch.stack(biases),
        "norms": torch.stack(norms),
    }


@page
def vit() -> dict[str, torch.Tensor]:
    """The draws of docs/course/vit.md, in the same order: attention, then a whole small ViT.

    PyTorch has the block of a ViT as a layer of its own, TransformerEncoderLayer.
    """
    from pvt_ref import ViTConfig
    from pvt_ref.models.architecture import param_shapes

    rng = np.random.default_rng(17)
    F = torch.nn.functional
    B, rows, C, N = 3, 7, 10, 2

    def draw(scale: float, *shape: int) -> torch.Tensor:
        return torch.tensor(scale * rng.standard_normal(shape), requires_grad=True)

    qkv, proj = ((draw(0.5, out, C), draw(1.0, out)) for out in (3 * C, C))
    x, dy = draw(1.0, B, rows, C), draw(1.0, B, rows, C)
    tokens_first = x.transpose(0, 1)
    attended, _ = F.multi_head_attention_forward(
        tokens_first, tokens_first, tokens_first, C, N, *qkv, None, None, False, 0.0, *proj,
        need_weights=False,
    )  # fmt: skip
    y = attended.transpose(0, 1)
    dx, dqkv, dqkv_bias, dproj = torch.autograd.grad(y, (x, *qkv, proj[0]), dy)
    results = {"y": y, "dx": dx, "dqkv": dqkv, "dqkv_bias": dqkv_bias, "dproj": dproj}

    config = ViTConfig(
        img_size=12, patch_size=4, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2, in_chans=1,
        num_classes=3,
    )  # fmt: skip
    norms = ("norm.weight", "norm1.weight", "norm2.weight")
    w = {
        key: torch.tensor(
            key.endswith(norms) + 0.3 * rng.standard_normal(shape), requires_grad=True
        )
        for key, shape in param_shapes(config).items()
    }
    images, dz = draw(1.0, 2, 1, 8, 20), torch.tensor(rng.standard_normal((2, 3)))
    encoder = torch.nn.TransformerEncoderLayer(
        8, 2, 16, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True, dtype=torch.float64
    )
    theirs = {
        "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    for mode in ("bicubic", "bilinear"):
        table = w["pos_embed"]
        patches = table[:, 1:].transpose(1, 2).unflatten(-1, (3, 3))
        patches = F.interpolate(patches, size=(2, 5), mode=mode, align_corners=False)
        added = torch.cat((table[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)
        embedded = F.conv2d(
            images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4
        )
        tokens = embedded.flatten(2).transpose(1, 2)
        tokens = torch.cat((w["cls_token"].expand(2, -1, -1), tokens), dim=1) + added
        for k in range(2):
            weights = {
                their + kind: w[f"blocks.{k}.{our}{kind}"]
                for their, our in theirs.items()
                for kind in ("weight", "bias")
            }
            tokens = torch.func.functional_call(encoder, weights, (tokens,))
        normed = F.layer_norm(tokens[:, 0], (8,), w["norm.weight"], w["norm.bias"], 1e-6)
        results[f"z_{mode}"] = F.linear(normed, w["head.weight"], w["head.bias"])
    names = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight",
             "blocks.1.mlp.fc1.weight", "head.weight")  # fmt: skip
    leaves = [images, *(w[name] for name in names)]
    grads = torch.autograd.grad(results["z_bicubic"], leaves, dz)
    return results | dict(zip(("images", *names), grads, strict=True))


@page
def convolution() -> dict[str, torch.Tensor]:
    """The draws of docs/course/convolution.md, in the same order: conv2d, pooling, resizing."""
    rng = np.random.default_rng(18)
    F = torch.nn.functional

    def leaf(scale: float, *shape: int) -> torch.Tensor:
        return torch.tensor(scale * rng.standard_normal(shape), requires_grad=True)

    def first(x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)

    def last(x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)

    weight, bias, x, dy = (
        leaf(0.5, 8, 6, 3, 3),
        leaf(1, 8),
        leaf(1, 2, 7, 10, 6),
        leaf(1, 2, 4, 5, 8),
    )
    depth_weight, depth_bias, depth_dy = leaf(1, 6, 1, 3, 3), leaf(1, 6), leaf(1, 2, 7, 10, 6)
    z = leaf(1, 1, 5, 4, 2)
    results = {}
    for title, w, b, given, settings in (
        ("conv", weight, bias, dy, {"stride": 2}),
        ("depth", depth_weight, depth_bias, depth_dy, {"groups": 6}),
    ):
        y = last(F.conv2d(first(x), w, b, padding=1, **settings))
        grads = torch.autograd.grad(y, (x, w, b), given)
        names = ("y", "dx", "dW", "db")
        results |= {f"{title}.{n}": v for n, v in zip(names, (y, *grads), strict=True)}
    fixed = {
        "pool": F.adaptive_avg_pool2d(first(z), (2, 7)),
        "nearest": F.interpolate(first(z), size=(3, 9), mode="nearest"),
        "bilinear": F.interpolate(first(z), size=(3, 9), mode="bilinear"),
        "corners": F.interpolate(first(z), size=(3, 9), mode="bilinear", align_corners=True),
        "bicubic": F.interpolate(first(z), size=(3, 9), mode="bicubic"),
        "relu": F.relu(first(z)),
    }
    for title, y in fixed.items():
        y = last(y)
        (dx,) = torch.autograd.grad(y, z, torch.arange(y.numel()).reshape(y.shape) - 9.0)
        results |= {f"{title}.y": y, f"{title}.dx": dx}
    zero = torch.zeros(1, requires_grad=True)
    (results["relu.at_zero"],) = torch.autograd.grad(F.relu(zero).sum(), zero)
    return results


@page
def pvt_v2() -> dict[str, torch.Tensor]:
    """The draws of docs/course/pvt_v2.md, in the same order: linear SRA, then the MLP."""
    rng = np.random.default_rng(20)
    F = torch.nn.functional
    B, H, W, C, N, EC = 2, 5, 8, 12, 4, 36

    def leaf(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x, requires_grad=True)

    def layer(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        return leaf(0.5 * rng.standard_normal(shape)), leaf(rng.standard_normal(shape[0]))

    q, kv, proj, sr = layer(C, C), layer(2 * C, C), layer(C, C), layer(C, C, 1, 1)
    gamma, beta = leaf(1 + 0.1 * rng.standard_normal(C)), leaf(rng.standard_normal(C))
    fc1, dwconv, fc2 = layer(EC, C), layer(EC, 1, 3, 3), layer(C, EC)
    x = leaf(rng.standard_normal((B, H * W, C)))
    dy = torch.tensor(rng.standard_normal((B, H * W, C)))

    def to_map(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.transpose(1, 2).unflatten(-1, (H, W))

    def to_tokens(x_map: torch.Tensor) -> torch.Tensor:
        return x_map.flatten(2).transpose(1, 2)

    def heads(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (N, C // N)).transpose(1, 2)

    cells = to_tokens(F.conv2d(F.adaptive_avg_pool2d(to_map(x), 7), *sr))
    cells = F.gelu(F.layer_norm(cells, (C,), gamma, beta, eps=1e-5))
    k, v = F.linear(cells, *kv).chunk(2, dim=-1)
    y = F.scaled_dot_product_attention(heads(F.linear(x, *q)), heads(k), heads(v))
    y_attn = F.linear(y.transpose(1, 2).flatten(2), *proj)
    hidden = F.conv2d(to_map(F.relu(F.linear(x, *fc1))), *dwconv, padding=1, groups=EC)
    y_mlp = F.linear(F.gelu(to_tokens(hidden)), *fc2)
    results = {"y_attn": y_attn, "y_mlp": y_mlp}
    for y, leaves in (
        (y_attn, {"dx_attn": x, "dW^Q": q[0], "dW^S": sr[0], "dgamma": gamma}),
        (y_mlp, {"dx_mlp": x, "db^(1)": fc1[1], "dW^D": dwconv[0], "db^D": dwconv[1]}),
    ):
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        results |= dict(zip(leaves, grads, strict=True))
    return results


@page
def semantic_fpn() -> dict[str, torch.Tensor]:
    """The draws of docs/course/semantic_fpn.md, in the same order: batch norm, then the head.

    Of each gradient its norm, and its inner product with a random direction of its shape.
    """
    from pvt_ref.models import head_parts

    rng = np.random.default_rng(21)
    F = torch.nn.functional

    def leaf(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x, requires_grad=True)

    def first(x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)

    def last(x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)

    u, gamma = leaf(3 + 2 * rng.standard_normal((12, 5))), leaf(1 + 0.2 * rng.standard_normal(5))
    beta, du = leaf(rng.standard_normal(5)), torch.tensor(rng.standard_normal((12, 5)))
    mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    y = F.batch_norm(u, mean, var, gamma, beta, training=True)
    dx, dgamma, dbeta = torch.autograd.grad(y, (u, gamma, beta), du)
    y_inference = F.batch_norm(u, mean, var, gamma, beta)
    (dx_inference,) = torch.autograd.grad(y_inference, u, du)
    results = {
        "bn.y": y, "bn.dx": dx, "bn.dweight": dgamma, "bn.dbias": dbeta,
        "bn.running_mean": mean, "bn.running_var": var,
        "bn.y_inference": y_inference, "bn.dx_inference": dx_inference,
    }  # fmt: skip

    w: dict[str, torch.Tensor] = {}

    def make(part: Any) -> torch.Tensor | None:
        if not part.shape:
            return None  # batches tracked
        drawn = rng.standard_normal(part.shape)
        if len(part.shape) == 4:
            drawn /= np.sqrt(np.prod(part.shape[1:]))
        else:
            drawn = part.key.endswith(("weight", "var")) + 0.2 * drawn
        return w.setdefault(part.key, leaf(drawn))

    widths, grids = (8, 10, 11, 14), ((17, 25), (9, 13), (5, 7), (3, 4))
    head_parts.build_fpn(make, widths, 12)
    head_parts.build_semantic_fpn(make, 12, 15, 6)
    weights = dict(w)
    head_parts.build_semantic_fpn_buffers(make, 15)
    statistics = {key: w[key].detach() for key in w.keys() - weights.keys()}
    maps = [leaf(rng.standard_normal((2, *grid, C))) for grid, C in zip(grids, widths, strict=True)]
    dz = torch.tensor(rng.standard_normal((2, 17, 25, 6)))
    leaves = [*weights.values(), *maps]
    rng = np.random.default_rng(23)
    directions = [torch.tensor(rng.standard_normal(x.shape)) for x in leaves]

    def conv(key: str, x: torch.Tensor) -> torch.Tensor:
        weight = w[f"{key}.weight"]
        return F.conv2d(x, weight, w.get(f"{key}.bias"), padding=weight.shape[-1] // 2)

    def resized(x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    def logits(training: bool, after: dict[str, torch.Tensor]) -> torch.Tensor:
        lateral = [conv(f"lateral_convs.{i}.conv", first(x)) for i, x in enumerate(maps)]
        for i in (3, 2, 1):
            told = F.interpolate(lateral[i], size=lateral[i - 1].shape[2:], mode="nearest")
            lateral[i - 1] = lateral[i - 1] + told
        total: Any = 0
        for i, x in enumerate(lateral):
            s = conv(f"fpn_convs.{i}.conv", x)
            for k in range(max(1, i)):
                key = f"scale_heads.{i}.{2 * k}"
                s = conv(f"{key}.conv", s)
                mean, var = (after[f"{key}.bn.running_{name}"] for name in ("mean", "var"))
                weight, bias = (w[f"{key}.bn.{name}"] for name in ("weight", "bias"))
                s = F.batch_norm(s, mean, var, weight, bias, training)
                s = F.relu(s)
                if i > 0:
                    s = resized(s, tuple(2 * n for n in s.shape[2:]))
            total = total + resized(s, grids[0])
        return last(conv("conv_seg", total))

    after = {key: x.clone() for key, x in statistics.items()}
    z = logits(True, after)
    grads = torch.autograd.grad(z, leaves, dz, retain_graph=True)
    results |= {
        "z": z[:, ::4, ::4],
        "z_inference": logits(False, statistics)[:, ::4, ::4],
        "norms": torch.stack([g.norm() for g in grads]),
        "along": torch.stack([(g * v).sum() for g, v in zip(grads, directions, strict=True)]),
        "last_mean": after["scale_heads.3.4.bn.running_mean"],
        "last_var": after["scale_heads.3.4.bn.running_var"],
    }
    labels = np.random.default_rng(22).integers(0, 6, (2, 68, 100))
    labels[:, :, 25:] = 255
    for name, reduction, divisor in (("mean", "mean", 1), ("mean_of_all", "sum", labels.size)):
        full = resized(first(z), (68, 100))
        loss = F.cross_entropy(full, torch.tensor(labels), ignore_index=255, reduction=reduction)
        (dlogits,) = torch.autograd.grad(loss / divisor, z, retain_graph=True)
        results |= {f"loss.{name}": loss / divisor, f"dz.{name}": dlogits[:, ::4, ::4]}
    return results


def main() -> None:
    """Writes the pages named, or all; floats in JSON keep every bit."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or _PAGES:
        arrays = _PAGES[name]()
        record = {symbol: x.detach().numpy().tolist() for symbol, x in arrays.items()}
        (FOLDER / f"{name}.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
