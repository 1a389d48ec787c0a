"""The MLP by blocks of rows: a block is widened, bent and narrowed again while it is in cache."""

from typing import Any

import numpy as np

from pvt_ref.blocks import mlp as readable
from pvt_ref.blocks.mlp import MLPParams
from pvt_ref.kernels.cpu.blocking import Blocking, share_columns
from pvt_ref.kernels.cpu.gelu import gelu_rows
from pvt_ref.kernels.cpu.linear import (
    add_up,
    column_sums,
    linear_columns,
    linear_rows,
    times_weight_rows,
    weight_gradients,
)
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.layers.linear import LinearParams
from pvt_ref.ops import Ops
from pvt_ref.tree import record


@record
class HiddenCache:
    """The hidden layer of all rows, for the backward.

    Attributes:
        y: (rows, E*C), after GELU.
        slope: (rows, E*C), the derivative of GELU.
    """

    y: np.ndarray  # (rows, E*C), after GELU: fc2's weight needs it
    slope: np.ndarray  # (rows, E*C), the derivative of GELU


def empty_hidden(p: MLPParams, rows: int, dtype: np.dtype) -> HiddenCache:
    """Room for the hidden layer of so many rows.

    Args:
        p: the weights, which say how wide it is.
        rows: how many.
        dtype: float32 or float64.

    Returns:
        A cache of two arrays (rows, E*C), with arbitrary values.
    """
    shape = (rows, p.fc1.weight.shape[0])
    return HiddenCache(np.empty(shape, dtype), np.empty(shape, dtype))


def mlp_rows(
    p: MLPParams,
    x: np.ndarray,
    y: np.ndarray,
    rows: slice,
    hidden: HiddenCache | None,
    scratch: Scratch,
) -> None:
    """y becomes fc2(GELU(fc1(x))) for a block.

    Args:
        p: the weights.
        x: (block, C).
        y: (block, C), written.
        rows: which rows of hidden the block has.
        hidden: keeps the hidden layer; None if nobody needs it afterwards.
        scratch: memory of this thread.
    """
    if hidden is None:
        wide = scratch("mlp.hidden", len(x), p.fc1.weight.shape[0], dtype=x.dtype)
        slope = None
    else:
        wide, slope = hidden.y[rows], hidden.slope[rows]

    def widen(columns: slice, scratch: Scratch) -> None:
        part = wide[:, columns]
        linear_columns(p.fc1, x, part, columns)
        gelu_rows(part, scratch, None if slope is None else slope[:, columns])

    share_columns(widen, wide.shape[1], scratch)
    linear_rows(p.fc2, wide, y, scratch)


def mlp_backward_rows(
    p: MLPParams,
    slope: np.ndarray,
    dy: np.ndarray,
    dhidden: np.ndarray,
    dx: np.ndarray,
    dbias1: np.ndarray,
    dbias2: np.ndarray,
    scratch: Scratch,
) -> None:
    """The gradients of a block's rows, and what the block adds to those of the biases.

    Args:
        p: the weights.
        slope: the derivative of GELU (block, E*C).
        dy: dL/dy (block, C).
        dhidden: (block, E*C), becomes the gradient before GELU; fc1's weight needs it.
        dx: (block, C), written.
        dbias1: float64 (E*C,), added to.
        dbias2: float64 (C,), added to.
        scratch: memory of this thread.
    """
    dbias2 += column_sums(dy)

    def widen(columns: slice, scratch: Scratch) -> None:
        del scratch
        part = dhidden[:, columns]
        np.matmul(dy, p.fc2.weight[:, columns], out=part)
        part *= slope[:, columns]
        dbias1[columns] += column_sums(part)

    share_columns(widen, dhidden.shape[1], scratch)
    times_weight_rows(dhidden, p.fc1, dx, scratch)


@record
class MLPCache:
    """Input and hidden layer.

    Attributes:
        x: (rows, C), the forward's input.
        hidden: the hidden layer, (rows, E*C).
    """

    x: np.ndarray  # (rows, C)
    hidden: HiddenCache


def mlp_forward(
    p: MLPParams,
    x: np.ndarray,
    ops: Ops,
    drop_rate: float = 0.0,
    rng: np.random.Generator | None = None,
    keep: bool = True,
    *,
    blocking: Blocking,
) -> tuple[np.ndarray, Any]:
    """As :func:`pvt_ref.blocks.mlp.mlp_forward`, which computes where there is dropout.

    Args:
        p: fc1, weight (E*C, C) and bias (E*C,), and fc2, weight (C, E*C) and bias (C,).
        x: tokens (B, n, C).
        ops: the record of operations, for the readable function.
        drop_rate: dropout after the GELU and after fc2, in [0, 1).
        rng: source of the dropout masks; None for inference.
        keep: whether a cache for the backward is returned; without it, it is None.
        blocking: the settings.

    Returns:
        y (B, n, C) and the cache.
    """
    if rng is not None and drop_rate > 0.0:
        return readable.mlp_forward(p, x, ops, drop_rate, rng, keep)
    y = np.empty(x.shape, x.dtype)
    x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, x.shape[-1])
    hidden = empty_hidden(p, len(x_rows), x.dtype) if keep else None

    def work(blocks: list[slice], scratch: Scratch) -> None:
        for rows in blocks:
            mlp_rows(p, x_rows[rows], y_rows[rows], rows, hidden, scratch)

    blocking.run(work, len(x_rows), blocking.rows(p.fc1.weight.shape[0]))
    return y, None if hidden is None else MLPCache(x_rows, hidden)


def mlp_backward(
    p: MLPParams, cache: Any, dy: np.ndarray, ops: Ops, *, blocking: Blocking
) -> tuple[np.ndarray, MLPParams]:
    """As :func:`pvt_ref.blocks.mlp.mlp_backward`.

    Args:
        p: the forward's weights.
        cache: from the forward.
        dy: dL/dy (B, n, C).
        ops: the record of operations, for the readable function.
        blocking: the settings.

    Returns:
        dx (B, n, C) and the gradients of the weights, in their shapes.
    """
    if not isinstance(cache, MLPCache):
        return readable.mlp_backward(p, cache, dy, ops)
    dx = np.empty(dy.shape, dy.dtype)
    dx_rows, dy_rows = dx.reshape(cache.x.shape), dy.reshape(cache.x.shape)
    dhidden = np.empty_like(cache.hidden.y)

    def work(blocks: list[slice], scratch: Scratch) -> tuple[np.ndarray, np.ndarray]:
        dbias1, dbias2 = np.zeros(dhidden.shape[-1]), np.zeros(dy.shape[-1])
        for rows in blocks:
            mlp_backward_rows(
                p, cache.hidden.slope[rows], dy_rows[rows], dhidden[rows], dx_rows[rows],
                dbias1, dbias2, scratch,
            )  # fmt: skip
        return dbias1, dbias2

    sums = blocking.run(work, len(dhidden), blocking.rows(dhidden.shape[-1]))
    dbias1, dbias2 = (add_up(parts, dy.dtype) for parts in zip(*sums, strict=True))
    dweight1, dweight2 = weight_gradients([(dhidden, cache.x), (dy_rows, cache.hidden.y)], blocking)
    return dx, MLPParams(
        LinearParams(dweight1, None if p.fc1.bias is None else dbias1),
        LinearParams(dweight2, None if p.fc2.bias is None else dbias2),
    )
