"""The same training done by PyTorch: its optimiser, schedulers, clipping, loss and autograd.

The network is transformers' PVT (see oracles.py). Weights, batches and drop-path masks are those of
this project: both sides draw from the same counters.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from oracles import tensor, transformers_forward

from pvt_ref import PVTConfig, PVTParams, from_state_dict, to_state_dict
from pvt_ref.draws import Draws
from pvt_ref.train import LabelledImages, Recipe, learning_rate_factors, train_step
from pvt_ref.train.step import TrainState, draw_batch, order_of_epoch


def our_losses(
    state: TrainState, data: LabelledImages, config: PVTConfig, recipe: Recipe, steps: int
) -> tuple[TrainState, list[float]]:
    losses = []
    for _ in range(steps):
        state, report = train_step(state, data, config, recipe)
        losses.append(report.loss)
    return state, losses


def twin_losses(
    state: TrainState, data: LabelledImages, config: PVTConfig, recipe: Recipe, steps: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[float]]:
    """Weights and averaged weights by key after so many steps, and the loss of each."""
    leaves = {key: tensor(x, grad=True) for key, x in to_state_dict(state.params).items()}
    plain = {k for k, x in leaves.items() if x.ndim == 1 or k == "cls_token" or k[:4] == "pos_"}
    factors = learning_rate_factors(config, recipe.layer_decay, recipe.frozen)
    trained = {key: x for key, x in leaves.items() if factors[key]}
    groups = [{"params": [x], "lr": recipe.lr * factors[key]} for key, x in trained.items()]
    for key, group in zip(trained, groups, strict=True):
        group |= {"weight_decay": 0.0} if key in plain else {}
    optimizer = torch.optim.AdamW(
        groups,
        betas=(recipe.beta1, recipe.beta2),
        eps=1e-8,
        weight_decay=recipe.weight_decay,
    )
    per_epoch = len(data) // recipe.batch_size
    warmup, total = round(recipe.warmup_epochs * per_epoch), recipe.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            (s + 1) / warmup
            if s < warmup
            else (
                recipe.lr_floor
                + (recipe.lr - recipe.lr_floor)
                * (1 + np.cos(np.pi * (s - warmup) / (total - warmup)))
                / 2
            )
            / recipe.lr
        ),
    )
    average = [x.detach().clone() for x in leaves.values()]
    losses = []
    for step in range(steps):
        epoch, index = divmod(step, per_epoch)
        order = order_of_epoch(state.seed, epoch, len(data))
        ramp = recipe.drop_path_ramp_epochs
        share = min(1.0, epoch / ramp) if ramp else 1.0
        of_epoch = dataclasses.replace(config, drop_path_rate=share * config.drop_path_rate)
        chosen = order[index * recipe.batch_size : (index + 1) * recipe.batch_size]
        optimizer.zero_grad()
        total_loss = 0.0
        for number, part in enumerate(np.array_split(chosen, recipe.accumulate)):
            draws = Draws(state.seed, step, number)
            images, targets = draw_batch(state.params, data, part, config, recipe, epoch, draws)
            params = current(leaves, config)
            (logits,), used, _ = transformers_forward(params, images, of_epoch, draws)
            loss = F.cross_entropy(
                logits, torch.tensor(targets), label_smoothing=recipe.label_smoothing
            ) * (len(part) / len(chosen))
            loss.backward()
            for key, leaf in leaves.items():  # the forward made leaves of its own
                grad: Any = used[key].grad
                leaf.grad = grad if leaf.grad is None else leaf.grad + grad
            total_loss += float(loss.detach())
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(trained.values()), recipe.clip_norm)
        optimizer.step()
        schedule.step()
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(
            average, [x.detach() for x in leaves.values()], None
        )
        losses.append(total_loss)
    weights = {key: x.detach().numpy() for key, x in leaves.items()}
    return weights, dict(zip(leaves, (x.numpy() for x in average), strict=True)), losses


def current(leaves: dict[str, torch.Tensor], config: PVTConfig) -> PVTParams:
    return from_state_dict({key: x.detach().numpy() for key, x in leaves.items()}, config)
