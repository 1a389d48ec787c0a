"""The training of a segmentation network done by PyTorch: all of it, from images to statistics.

The backbone is transformers' (see oracles.py); neck, head and loss are torch.nn.functional on
tensors by mmsegmentation's names. Batches and masks are those of this project.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from loose import loose
from oracles import tensor, transformers_forward

from pvt_ref import from_state_dict, to_state_dict
from pvt_ref.data.pairs import LabelledPairs
from pvt_ref.draws import Draws, What
from pvt_ref.models.architecture import buffer_keys, count_keys
from pvt_ref.models.segmentor.config import SegmentorConfig, SemanticFPNHead
from pvt_ref.train.recipe import SegmentationRecipe
from pvt_ref.train.schedule import config_of_epoch
from pvt_ref.train.step import TrainState, draw_batch, order_of_epoch

Tensors = dict[str, torch.Tensor]


def unit(x: torch.Tensor, state: Tensors, name: str, trained: bool) -> torch.Tensor:
    """Convolution, batch norm and ReLU; training moves the running statistics in state."""
    weight = state[f"{name}.conv.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    if trained:
        state[f"{name}.bn.num_batches_tracked"] += 1
    x = F.batch_norm(
        x,
        *(state[f"{name}.bn.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")),
        training=trained,
        momentum=0.1,
        eps=1e-5,
    )
    return F.relu(x)


def semantic_fpn(
    maps: list[torch.Tensor], state: Tensors, head: SemanticFPNHead, trained: bool, rng
) -> torch.Tensor:
    """Neck and head, on tensors by their keys without ``backbone.``."""

    def conv(x: torch.Tensor, name: str, padding: int = 0) -> torch.Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    levels = [conv(x, f"neck.lateral_convs.{i}.conv") for i, x in enumerate(maps)]
    for i in (3, 2, 1):
        size = levels[i - 1].shape[2:]
        levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=size, mode="nearest")
    levels = [conv(x, f"neck.fpn_convs.{i}.conv", 1) for i, x in enumerate(levels)]
    total: Any = 0
    for i, x in enumerate(levels):
        for k in range(max(1, i)):
            x = unit(x, state, f"decode_head.scale_heads.{i}.{2 * k}", trained)
            if i:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        size = levels[0].shape[2:]
        total = total + F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    if rng is not None and head.drop_rate:
        drawn = rng.random((total.shape[0], 1, 1, total.shape[1]), dtype=np.float32)
        kept = torch.tensor(drawn >= head.drop_rate).permute(0, 3, 1, 2).to(total.dtype)
        total = total * kept / (1 - head.drop_rate)
    return conv(total, "decode_head.conv_seg")


def twin_forward(
    state: Tensors, images: np.ndarray, config: SegmentorConfig, draws: Draws | None, trained: bool
) -> tuple[torch.Tensor, Tensors]:
    """Logits, and the leaves that the backbone made of its weights, by key."""
    ours = {
        key.removeprefix("backbone."): x.detach().numpy()
        for key, x in state.items()
        if key.startswith("backbone.")
    }
    backbone = from_state_dict(ours, config.backbone)
    maps, leaves, _ = transformers_forward(backbone, images, config.backbone, draws, pyramid=True)
    rng = None if draws is None else draws.at(What.STAGE_DROPOUT, 0)
    logits = semantic_fpn(maps, state, config.head, trained, rng)
    return logits, {f"backbone.{key}": x for key, x in leaves.items()}


def pixel_loss(
    logits: torch.Tensor, labels: np.ndarray, recipe: SegmentationRecipe
) -> torch.Tensor:
    size = labels.shape[1:]
    full = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    target = torch.tensor(labels)
    weights = torch.tensor(recipe.class_weights, dtype=full.dtype) if recipe.class_weights else None
    given = {"weight": weights, "ignore_index": 255, "label_smoothing": recipe.label_smoothing}
    if recipe.loss_mean == "all":
        return F.cross_entropy(full, target, reduction="sum", **given) / target.numel()
    return F.cross_entropy(full, target, **given)


def twin_training(
    state: TrainState,
    data: LabelledPairs,
    config: SegmentorConfig,
    recipe: SegmentationRecipe,
    steps: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[float]]:
    """Weights and averaged weights by key after so many steps, and the loss of each."""
    buffers, counts = buffer_keys(config), count_keys(config)
    values = to_state_dict(state.params)
    tensors = {key: tensor(x, grad=key not in buffers) for key, x in values.items()}
    trained = {key: x for key, x in tensors.items() if key not in buffers}
    plain = {
        key
        for key, x in trained.items()
        if x.ndim == 1 or key == "backbone.cls_token" or key.startswith("backbone.pos_")
    }
    optimizer = torch.optim.AdamW(
        [
            {"params": [x], "weight_decay": 0.0 if key in plain else recipe.weight_decay}
            for key, x in trained.items()
        ],
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        eps=1e-8,
    )
    per_epoch = len(data) // recipe.batch_size
    warmup, total = round(recipe.warmup_epochs * per_epoch), recipe.epochs * per_epoch
    poly = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (1 - s / total) ** 0.9 * (min(1.0, (s + 1) / warmup) if warmup else 1.0),
    )
    average = {key: x.detach().clone() for key, x in tensors.items()}
    losses = []
    for step in range(steps):
        epoch, index = divmod(step, per_epoch)
        order = order_of_epoch(state.seed, epoch, len(data))
        chosen = order[index * recipe.batch_size : (index + 1) * recipe.batch_size]
        of_epoch = config_of_epoch(config, epoch, recipe.drop_path_ramp_epochs)
        optimizer.zero_grad()
        total_loss = 0.0
        for number, part in enumerate(np.array_split(chosen, recipe.accumulate)):
            draws = Draws(state.seed, step, number)
            images, labels = draw_batch(state.params, data, part, config, recipe, epoch, draws)
            logits, used = twin_forward(tensors, images, of_epoch, draws, trained=True)
            loss = pixel_loss(logits, labels, recipe) * (len(part) / len(chosen))
            loss.backward()
            for key, leaf in used.items():
                own, grad = trained[key], loose(leaf.grad)
                own.grad = grad if own.grad is None else own.grad + grad
            total_loss += float(loss.detach())
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(trained.values()), recipe.clip_norm)
        optimizer.step()
        poly.step()
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        for key, x in tensors.items():
            now = x.detach()
            average[key] = (
                now.clone() if key in counts else decay * average[key] + (1 - decay) * now
            )
        losses.append(total_loss)
    return (
        {key: x.detach().numpy() for key, x in tensors.items()},
        {key: x.numpy() for key, x in average.items()},
        losses,
    )
