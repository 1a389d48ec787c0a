"""What a model costs: parameters, multiply-accumulates (MACs) and memory, item by item.

It watches a network run once on arrays without numbers (:mod:`pvt_ref.report.shapes`).

MACs, by the rule that reproduces the paper's GFLOPs: every linear and convolution weight counts
once per token it is applied to, the cls token included; the two products of attention count
2 n m C per block, patch tokens only; norms, softmax, GELU, biases and resizing are free.

Memory is the peak of inference with the reference operations: the image and all arrays alive at
the same moment, without weights. A test compares it with what Python allocates.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pvt_ref.api import choose_ops, default_ops
from pvt_ref.arrays import FLOAT_DTYPES, Array, Grid, is_array
from pvt_ref.blocks.transformer import BlockSettings
from pvt_ref.checks import Size, as_size, is_whole
from pvt_ref.errors import ConfigError, RangeError, shown
from pvt_ref.layers.attention import attention
from pvt_ref.layers.depthwise_conv import depthwise_conv
from pvt_ref.layers.linear import linear
from pvt_ref.layers.position import position
from pvt_ref.models.architecture import Place, architecture_of, buffer_keys, param_shapes
from pvt_ref.ops import REFERENCE, Call, Operation, Ops
from pvt_ref.report.items import watch_items
from pvt_ref.report.shapes import ShapeArray, Shapes
from pvt_ref.tree import branches, map_arrays, to_device


@dataclass(frozen=True, slots=True)
class CostItem:
    """One operation of one stage, all its repetitions together.

    An array that several operations keep for the backward counts for the first. Dropout would add
    its masks.
    """

    stage: int  # from 1; 0 is the classifier
    operation: str  # named like the weights: "patch_embed", "attn.q", "mlp.fc1" and so on
    repeats: int  # blocks it occurs in
    parameters: int  # numbers in its weights, over all repeats
    macs: int  # multiply-accumulates, over all repeats and the whole batch
    peak_bytes: int  # of the arrays alive while it runs, image included, weights not
    cache_bytes: int  # that a backward needs of it, over all repeats, weights not included


@dataclass(frozen=True, slots=True)
class StageShape:
    """The shapes of a stage."""

    stage: int
    grid: Grid  # (H_i, W_i)
    channels: int  # C_i
    tokens: int  # n_i, of patches
    keys: int  # m_i = n_i / R_i^2, of patches, or 49 with linear SRA; 0 without attention


@dataclass(frozen=True, slots=True)
class Cost:
    """The whole bill."""

    size: Grid  # (H, W) of the image, in pixels
    batch: int  # B
    dtype: str  # of all arrays, "float32" or "float64"
    stages: tuple[StageShape, ...]  # what each stage works on
    items: tuple[CostItem, ...]  # one for every operation of every stage

    def __repr__(self) -> str:
        return (
            f"Cost(image {self.size[0]}x{self.size[1]}, batch {self.batch}, {self.dtype}: "
            f"{self.parameters:,} parameters, {self.macs / 1e6:,.2f} MMACs, "
            f"{self.peak_bytes / 2**20:,.2f} MiB at most)"
        )

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(item.parameters for item in self.items)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a forward pass over the whole batch."""
        return sum(item.macs for item in self.items)

    @property
    def peak_bytes(self) -> int:
        """Largest sum of arrays alive at once in inference, image included, weights not."""
        return max(item.peak_bytes for item in self.items)

    @property
    def cache_bytes(self) -> int:
        """What a forward keeps for its backward, weights and result not included."""
        return sum(item.cache_bytes for item in self.items)

    def of_stage(self, stage: int) -> "Cost":
        """The bill of one stage. Raises: RangeError if the model has no such stage.

        Args:
            stage: from 1; 0 is the classifier.

        Returns:
            A bill with the items of that stage only.
        """
        known = sorted({item.stage for item in self.items})
        if not is_whole(stage) or stage not in known:
            has = f"this bill has {known} (0 is the classifier)"
            raise RangeError(f"stage is {shown(stage)}; {has}")
        stages = tuple(s for s in self.stages if s.stage == stage)
        return replace(self, stages=stages, items=tuple(i for i in self.items if i.stage == stage))


def count_cost(
    config: Any,
    size: Size | None = None,
    batch: int = 1,
    dtype: str = "float32",
    pyramid: bool = False,
) -> Cost:
    """Parameters, MACs, and bytes of the reference operations in a forward pass.

    Args:
        config: of any network.
        size: (H, W) of the image, or a side, in pixels; None takes config.img_size.
        batch: B.
        dtype: ``"float32"`` or ``"float64"``.
        pyramid: count the dense pyramid instead of the classifier: no final norm or head, of a PVT
            no cls token either, and all maps stay alive.

    Returns:
        The bill. Weights that a pyramid leaves unused are not in it.

    Raises:
        ShapeError: if size is not one or two whole numbers, or the model cannot take it.
        ArrayTypeError: if config is no configuration.
        RangeError: if another argument is none of the above.
        ConfigError: if the pyramid of a network without one is asked for.
    """
    run = _Run(config, size, batch, dtype, pyramid)
    bill = _Bill(run)
    kept: Counter[tuple[int, str]] = Counter()
    for place, amount in _kept_bytes(run, REFERENCE).items():
        kept[place.stage, place.part] += amount
    items = tuple(
        CostItem(*key, s.repeats, s.parameters, s.macs, s.peak, kept[key])
        for key, s in bill.lines.items()
    )
    stages = tuple(
        StageShape(i, grid, channels, math.prod(grid), bill.keys.get(i, 0))
        for i, (grid, channels) in enumerate(zip(run.grids, config.channels, strict=True), start=1)
    )
    return Cost(run.size, run.batch, dtype, stages, items)


def cache_bytes(
    config: Any,
    size: Size | None = None,
    batch: int = 1,
    dtype: str = "float32",
    pyramid: bool = False,
    *,
    ops: Ops | None = None,
) -> dict[Place, int]:
    """Bytes that the backward's cache holds, by stage, block and operation, where it is not empty.

    Arguments as for :func:`count_cost`; ops None takes the default table for NumPy arrays. To find
    what a twin keeps, it runs once for every shape that occurs, on zeros, one block per stage.
    """
    run = _Run(config, size, batch, dtype, pyramid)
    table = default_ops(np.empty(0, dtype)) if ops is None else choose_ops(ops, None, run.row)
    return _kept_bytes(run, table)


class _Run:
    """A forward on shapes, of arguments that are checked."""

    def __init__(self, config: Any, size: Any, batch: Any, dtype: Any, pyramid: Any) -> None:
        self.row, self.config = architecture_of(config), config
        if not is_whole(batch) or batch < 1:
            raise RangeError(f"batch is {shown(batch)}; it must be a whole number, 1 or more")
        if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
            raise RangeError(f"dtype is {shown(dtype)}; it must be 'float32' or 'float64'")
        if not isinstance(pyramid, bool | np.bool_):
            raise RangeError(f"pyramid is {shown(pyramid)}; it must be True or False")
        self.batch, self.dtype = int(batch), dtype
        self.size = as_size(config.img_size if size is None else size)
        self.grids = config.grids(*self.size)  # refuses sizes that would lose pixels
        self.pyramid = bool(pyramid) or not config.has_classifier
        if self.pyramid and self.row.forward_pyramid is None:
            what = f"a {self.row.title} has no pyramid"
            raise ConfigError(f"{what}; leave pyramid=False")

    def arrays(self, xp: Shapes) -> tuple[Any, ShapeArray]:
        """Weights and images; of these, the images count."""
        params = self.row.build_params(self.config, lambda leaf: xp.empty(leaf.shape, self.dtype))
        images = xp.empty((self.batch, self.config.in_chans, *self.size), self.dtype)
        xp.alive = xp.peak = images.nbytes
        return params, images

    def forward(self, params: Any, images: ShapeArray, ops: Ops, keep: bool) -> Any:
        core: Any = self.row.forward_pyramid if self.pyramid else self.row.forward
        return core(params, images, self.config, ops, None, keep, None)


def _arrays(tree: Any) -> Iterator[Array]:
    """All arrays of a cache, of whatever it is made."""
    if is_array(tree):
        yield tree
    for _, branch in branches(tree):
        yield from _arrays(branch)


@dataclass(slots=True)
class _Line:
    """What is added up for one item; after is the fullest moment before the next one begins."""

    repeats: int = 0
    parameters: int = 0
    macs: int = 0
    peak: int = 0
    after: int = 0


class _Bill:
    """A forward on shapes, its items added up, all blocks of a stage together."""

    def __init__(self, run: _Run) -> None:
        self.tokens = dict(enumerate(map(math.prod, run.grids), start=1))
        self.lines: defaultdict[tuple[int, str], _Line] = defaultdict(_Line)
        self.keys: dict[int, int] = {}
        self._xp, outside = Shapes(), _Line()
        self._last = outside
        self._paid: set[Any] = set()  # memory of weights that were counted
        params, images = run.arrays(self._xp)
        watched = watch_items(run.row, REFERENCE, params, self._begin, self._end, self._inner)
        run.forward(params, images, watched, False)
        self._last.after = max(self._last.after, self._xp.peak)
        if run.config.has_classifier != run.pyramid:  # every weight serves
            shapes, buffers = param_shapes(run.config), buffer_keys(run.config)
            every = sum(math.prod(x) for key, x in shapes.items() if key not in buffers)
            rest = every - sum(line.parameters for line in self.lines.values())
            if rest:  # used outside of operations
                self.lines[0, "other"] = _Line(1, rest, 0, images.nbytes, outside.after)
        # between two items, as where branch and skip are added, it is seldom as full as in one
        fullest = max(self.lines.values(), key=lambda line: line.after)
        if fullest.after > max(line.peak for line in self.lines.values()):
            fullest.peak = fullest.after

    def _begin(self, place: Place) -> None:
        self._last.after = max(self._last.after, self._xp.peak)
        self._xp.peak = self._xp.alive

    def _inner(self, place: Place, call: Call) -> None:
        """MACs, where there are some."""
        key = place.stage, place.part
        if call.operation in (linear, depthwise_conv):
            p, x = call.args[:2]
            self.lines[key].macs += math.prod(x.shape[:-1]) * p.weight.size
        elif call.operation == attention:
            q, k, _ = call.args[1]
            B, N, n, d = q.shape
            cls = max(n - self.tokens.get(place.stage, n), 0)  # patch tokens count only
            self.keys[place.stage] = k.shape[2] - cls
            self.lines[key].macs += 2 * B * N * (n - cls) * (k.shape[2] - cls) * d

    def _end(self, place: Place, call: Call) -> None:
        if call.result[0] is call.args[1]:
            return  # a dropout that dropped nothing
        line = self._last = self.lines[place.stage, place.part]
        line.repeats += 1
        line.peak = max(line.peak, self._xp.peak)
        self._xp.peak = self._xp.alive
        if call.operation == position:  # with a cls token, its row, and the token itself
            table, (h, w), cls = call.args[0], call.args[4], call.args[5]
            line.parameters += (h * w + 2 * cls) * table.shape[-1]
            return
        for x in _arrays(call.args[0]):
            if x.memory not in self._paid:
                self._paid.add(x.memory)
                line.parameters += x.size


def _kept_bytes(run: _Run, ops: Ops) -> dict[Place, int]:
    xp, kept = Shapes(), Counter[Place]()
    params, images = run.arrays(xp)
    counted = {x.memory for x in _arrays((params, images))}

    def end(place: Place, call: Call) -> None:
        new = {x.memory for x in _arrays(call.result[1])} - counted
        counted.update(new)
        kept[place] += sum(memory.bytes for memory in new)

    twins = {op: _stand_in(op, twin, ops) for op, twin in ops.twins.items()}
    table = Ops(parts=twins, name=ops.name)
    watched = watch_items(run.row, table, params, lambda place: None, end)
    run.forward(params, images, watched, True)
    return {place: amount for place, amount in kept.items() if amount}


def _stand_in(op: Operation, twin: Operation, ops: Ops) -> Operation:
    """A twin for shapes: what the readable operation gives, and a cache as large as the twin's."""
    measured: dict[Any, tuple[list[int], bool, int]] = {}  # by shapes and settings

    def real(x: ShapeArray) -> Array:
        zeros = np.zeros(x.shape, x.dtype)
        return zeros if ops.accepts is None or ops.accepts(zeros) else to_device(zeros)

    def roots(tree: Any) -> dict[int, Array]:
        """The arrays whose memory those of a tree are views of, by identity."""
        found = {}
        for x in _arrays(tree):
            while isinstance(x.base, type(x)):
                x = x.base
            found[id(x)] = x
        return found

    def measure(p: Any, x: Any, args: Any, kwargs: Any) -> tuple[list[int], bool, int]:
        """Which arrays of x the cache holds, whether it holds the result, and other bytes."""
        p, x = map_arrays(real, (p, x))
        with ops.scope():
            y, cache = twin.forward(p, x, ops, *args, **kwargs)
        held, given = roots(cache), roots((p, x, y))
        inputs = [i for i, a in enumerate(_arrays(x)) if not held.keys().isdisjoint(roots(a))]
        other = sum(a.nbytes for key, a in held.items() if key not in given)
        return inputs, not held.keys().isdisjoint(roots(y)), other

    def forward(p: Any, x: Any, table: Ops, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        y, _ = op.forward(p, x, REFERENCE, *args, **kwargs)
        # blocks of a stage are alike but for their number and a rate that drops nothing here
        alike = [
            replace(a, number=0, drop_path_rate=0.0) if isinstance(a, BlockSettings) else a
            for a in args
        ]
        key = (*(a.shape for a in _arrays((p, x))), repr((alike, kwargs)))
        if key not in measured:
            measured[key] = measure(p, x, args, kwargs)
        inputs, result, other = measured[key]
        xp = y.memory.shapes
        held = [a for i, a in enumerate(_arrays(x)) if i in inputs]
        return y, (*held, *([y] if result else []), xp.empty((other,), np.uint8))

    return Operation(forward, twin.backward, twin.absorbs)
