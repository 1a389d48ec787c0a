"""The exercises, in the order of the course: the laws that mark each, and the lines they cite.

A line is a sentence or an equation of the derivation on a page of the course. It says where the
reader's code contradicts the mathematics, and never what the code should be.
"""

import functools
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pvt_ref.blocks.mlp import mlp
from pvt_ref.blocks.sra import sra
from pvt_ref.blocks.transformer import block
from pvt_ref.exercises import cases
from pvt_ref.exercises import properties as law
from pvt_ref.exercises.network import pyramid, stage
from pvt_ref.heads.semantic_fpn import semantic_fpn
from pvt_ref.layers.attention import attention
from pvt_ref.layers.conv import conv
from pvt_ref.layers.cross_entropy import cross_entropy
from pvt_ref.layers.depthwise_conv import depthwise_conv
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.layer_norm import layer_norm
from pvt_ref.layers.linear import linear
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.layers.position import position
from pvt_ref.layers.softmax import softmax
from pvt_ref.ops import Operation
from pvt_ref.testing.laws import Trial


class Line(NamedTuple):
    """A line of a derivation: its page, section, and the words or the equation to look for."""

    page: str  # of docs/course, "linear"
    section: str  # "the-backward"
    words: str = ""  # quoted from the page
    equation: int | None = None

    @property
    def address(self) -> str:
        """``"docs/course/linear.md#the-backward"``."""
        return f"docs/course/{self.page}.md#{self.section}"

    def __str__(self) -> str:
        parts = [self.address]
        if self.equation is not None:
            parts.append(f"equation {self.equation}")
        if self.words:
            parts.append(f'"{self.words}"')
        return ", ".join(parts)


class Property(NamedTuple):
    """A law of one operation, and the line of the derivation that says it."""

    check: Callable[[Trial], None]
    line: Line

    @property
    def name(self) -> str:
        """``"shift of token"``."""
        return self.check.__name__.replace("_", " ")

    @property
    def says(self) -> str:
        """The law in words."""
        return (self.check.__doc__ or "").strip()


@dataclass(frozen=True, slots=True)
class Exercise:
    """One exercise: a file for the reader to complete.

    Attributes:
        name: of the operation.
        operation: the package's own, which gives the right values.
        cases: makes the inputs, the smallest first.
        settings: names of the arguments of the forward after ops.
        forward, backward: laws of this operation alone.
        lines: of the derivation, by what is wrong: "y", an input's name, or the name of a law.
        names, order: of arrays, as in :class:`pvt_ref.testing.laws.Trial`.
        alone: whether one function gives y and its gradient together, as a loss does.
    """

    name: str
    operation: Operation
    cases: Callable[[], Iterator[cases.Case]]
    lines: Mapping[str, Line]
    settings: tuple[str, ...] = ()
    forward: tuple[Property, ...] = ()
    backward: tuple[Property, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    alone: bool = False

    @property
    def hints(self) -> Mapping[str, Sequence[str]]:
        """Hints for the forward and the backward, each more specific."""
        return _hints()[self.name]

    @property
    def page(self) -> str:
        """The course page that derives it."""
        return self.lines["y"].page

    @property
    def functions(self) -> tuple[str, ...]:
        """The names that the reader's file defines."""
        if self.alone:
            return (self.name,)
        return (f"{self.name}_forward", f"{self.name}_backward")

    def line(self, broken: str, where: str) -> Line:
        """The line that a broken law contradicts, for the array that is wrong."""
        keys = [f"{broken}:{where}", broken]
        if broken in IDIOM:
            return next((self.lines[k] for k in keys if k in self.lines), IDIOM[broken])
        steps = where.split(".")
        keys += [".".join(steps[:k]) for k in range(len(steps), 0, -1)] if where else []
        keys.append("dy" if broken in _OF_GRADIENTS else "y")
        return next(self.lines[k] for k in keys if k in self.lines)


@functools.cache
def _hints() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads(Path(__file__).with_name("hints.toml").read_text(encoding="utf-8"))


_OF_GRADIENTS = (*("gradient shape", "gradient values", "finite differences", "adjoint", "batch"),)

#: Lines of laws that every operation obeys.
IDIOM = {
    "returns": Line("notation", "the-one-idiom", "It returns the output and a cache"),
    "gradient": Line("notation", "the-one-idiom", "as a record of the same type as the weights"),
    "dtype": Line("gpu", "what-must-not-be-written", "A Python number adapts to the array"),
    "gradient dtype": Line(
        "gpu", "what-must-not-be-written", "A Python number adapts to the array"
    ),
    "pure": Line(
        "gpu",
        "what-must-not-be-written",
        "A layer may change only arrays that it made itself",
    ),
    "cache": Line(
        "notation", "the-one-idiom", "It leaves its cache as it was, so it can be called again"
    ),
    "state": Line("notation", "the-one-idiom", "holds what the backward needs of the forward"),
    "repeatable": Line("notation", "the-one-idiom", "All pairs have the same signatures"),
    "aliased cache": Line(
        "gpu",
        "what-must-not-be-written",
        "a slice or a reshape may or may not share memory with the array it came from",
    ),
    "layout": Line(
        "gpu",
        "what-must-not-be-written",
        "a slice or a reshape may or may not share memory with the array it came from",
    ),
    "linear in dy": Line(
        "notation", "the-backward", "A backward multiplies by the transpose of the Jacobian", 4
    ),
}


def _cross_entropy_forward(p: None, x: Any, ops: Any, labels: Any) -> Any:
    return cross_entropy(x, labels)


def _cross_entropy_backward(p: None, cache: Any, dy: Any, ops: Any) -> Any:
    return dy * cache, None


def _equation(page: str, section: str) -> Callable[..., Line]:
    def line(number: int | None = None, words: str = "") -> Line:
        return Line(page, section, words, number)

    return line


def _pages(page: str, forward: str = "the-equation") -> tuple[Callable[..., Line], ...]:
    """Lines of a page's forward and of its backward."""
    return _equation(page, forward), _equation(page, "the-backward")


def _linear() -> Exercise:
    f, b = _pages("linear")
    return Exercise(
        "linear",
        linear,
        cases.linear,
        lines={
            "y": f(2),
            "samples": f(2, "no sum connects two rows"),
            "x": b(5),
            "weight": b(3, "The sum over rows is a matrix product"),
            "bias": b(4, "for every row, with the factor 1"),
            "dy": b(3),
        },
        forward=(Property(law.bias_at_zero, f(1)),),
    )


def _layer_norm() -> Exercise:
    f, b = _pages("layer_norm")
    return Exercise(
        "layer_norm",
        layer_norm,
        cases.layer_norm,
        settings=("eps",),
        lines={
            "y": f(1),
            "samples": f(None, "Nothing here connects two tokens or two images"),
            "x": b(3),
            "weight": b(4),
            "bias": b(4),
            "dy": b(3),
        },
        forward=(
            Property(law.tokens_apart, f(None, "Nothing here connects two tokens or two images")),
            Property(law.shift_of_token, f(1)),
            Property(law.variance_one, f(None, "The variance divides by")),
            Property(law.scales_with_eps, f(1)),
            Property(law.keeps_digits, f(1, "with every mean over its")),
        ),
        backward=(
            Property(law.gradient_counts_weight, b(None, "which is where")),
            Property(law.gradient_mean_zero, b(3, "so the mean of the gradient is subtracted")),
            Property(law.gradient_across, b(2, "where the last step substitutes")),
        ),
    )


def _gelu() -> Exercise:
    f, b = _pages("gelu")
    return Exercise(
        "gelu",
        gelu,
        cases.gelu,
        lines={"y": f(1), "x": b(3), "dy": b(3)},
        forward=(
            Property(law.gelu_mirror, f(1)),
            Property(law.gelu_near_one, f(1, "is the density of the normal distribution")),
            Property(law.gelu_of_one, f(1, "PVT was trained with the exact form")),
        ),
        backward=(Property(law.gelu_slopes, b(3)),),
    )


def _softmax() -> Exercise:
    f, b = _pages("softmax")
    return Exercise(
        "softmax",
        softmax,
        cases.softmax,
        lines={"y": f(1), "x": b(3), "dy": b(3)},
        forward=(
            Property(law.rows_sum_to_one, f(None, "is positive and a row sums to 1")),
            Property(law.shift_of_row, f(1)),
            Property(law.no_overflow, f(None, "no exponent is above 0, so nothing overflows")),
        ),
        backward=(
            Property(law.gradient_rows_zero, b(3, "sums to 0, because adding the same number")),
        ),
    )


def _cross_entropy() -> Exercise:
    f, b = _pages("softmax")
    return Exercise(
        "cross_entropy",
        Operation(_cross_entropy_forward, _cross_entropy_backward),
        cases.cross_entropy,
        settings=("labels",),
        alone=True,
        lines={"y": f(2), "x": b(4), "dy": b(4)},
        forward=(
            Property(law.loss_is_a_mean, f(2, "and takes the mean over the batch")),
            Property(law.loss_at_zero, f(2)),
            Property(law.shift_of_row, f(1)),
            Property(law.no_overflow, f(None, "no exponent is above 0, so nothing overflows")),
        ),
        backward=(Property(law.gradient_rows_zero, b(4)),),
        names={"x": "logits"},
    )


def _patch_embed() -> Exercise:
    f, b = _pages("patch_embed")
    norm = Line("layer_norm", "the-backward", "Here the tokens need an index", 4)
    return Exercise(
        "patch_embed",
        patch_embed,
        cases.patch_embed,
        settings=("eps",),
        lines={
            "y": f(3, "rows of the square, then columns, then channels"),
            "x": b(6),
            "proj.weight": b(5),
            "proj.bias": b(5),
            "norm": norm,
            "dy": b(7),
        },
        forward=(
            Property(law.tokens_are_normed, f(2)),
            Property(law.one_pixel_one_token, f(3, "Here no two windows share a pixel")),
        ),
        backward=(
            Property(law.norm_comes_first, b(None, "The backward of the norm")),
            Property(law.one_token_one_patch, b(6, "So there is no sum over cells")),
        ),
    )


def _position() -> Exercise:
    f, b = _equation("position", "another-grid"), _equation("position", "the-backward")
    return Exercise(
        "position",
        position,
        cases.position,
        settings=("grid", "table_grid", "cls"),
        lines={
            "y": f(4),
            "x": b(8),
            "table": b(10),
            "dy": b(9),
            "batch:table": b(9),
            "gradient shape:table": b(9),
        },
        forward=(
            Property(law.cls_row_stays, f(None, "It has no cell")),
            Property(law.own_grid, Line("position", "the-equation", "on the table's own grid", 1)),
            Property(law.constant_table, f(7, "a constant table stays constant")),
            Property(law.rows_stay_rows, f(3)),
            Property(law.height_and_width_swap, f(3, "So it is separable")),
            Property(law.borders_clamped, f(4, "and they take the first value")),
        ),
        backward=(
            Property(law.passes_dy, b(8)),
            Property(law.unused_row_zero, b(None, "so there its gradient is zero")),
            Property(law.cls_gradient_copied, b(None, "so its gradient is copied back")),
            Property(law.nothing_lost, b(11, "The weights sum to 1, so the total is preserved")),
        ),
        names={"p": "table"},
    )


def _attention() -> Exercise:
    f, b = _pages("attention")
    return Exercise(
        "attention",
        attention,
        cases.attention,
        settings=("scale",),
        lines={
            "y": f(4),
            "samples": f(5),
            "q": b(9),
            "k": b(9),
            "v": b(6, "sums over queries"),
            "dy": b(7),
        },
        forward=(
            Property(law.values_of_one, f(3, "is positive and sums to 1")),
            Property(law.zero_query, f(3)),
            Property(law.keys_change_places, f(4)),
            Property(law.scale_counts, f(2)),
        ),
        backward=(Property(law.key_gradients_cancel, b(8)),),
        names={"x.0": "q", "x.1": "k", "x.2": "v"},
    )


def _sra() -> Exercise:
    f, b = _pages("sra")
    return Exercise(
        "sra",
        sra,
        cases.sra,
        settings=("grid", "settings"),
        order=("proj", "kv", "norm", "sr", "q"),
        lines={
            "y": f(1),
            "q": b(None, "The weights of the queries get"),
            "kv": b(None, "Both come from"),
            "proj": b(None, "is linear"),
            "sr": b(None, "so only one term of the sum over patches is not zero"),
            "norm": Line("layer_norm", "the-backward", "Here the tokens need an index", 4),
            "x": b(None, "Only one thing is new:"),
            "dy": b(None, "Go through the five steps"),
        },
        forward=(
            Property(law.values_stand_last, f(None, "Its upper half makes keys")),
            Property(law.sra_scale, f(4)),
            Property(law.heads_change_places, f(None, "owns the channels")),
            Property(law.reduction_is_normed, f(3)),
            Property(law.blocks_change_places, f(None, "Flattened to one row")),
        ),
    )


def _mlp() -> Exercise:
    f, b = _pages("block")
    second = b(None, "The second layer is")
    return Exercise(
        "mlp",
        mlp,
        cases.mlp,
        lines={
            "y": f(3),
            "fc1": b(None, "GELU acts elementwise"),
            "fc2": second,
            "x": b(None, "and the first layer is linear again"),
            "dy": second,
        },
        forward=(Property(law.tokens_apart, f(3, "no token affects another")),),
    )


def _block() -> Exercise:
    f, b = _pages("block")
    return Exercise(
        "block",
        block,
        cases.block,
        settings=("grid", "settings"),
        lines={
            "y": f(2),
            "x": b(7),
            "norm1": b(7),
            "attn": b(7),
            "norm2": b(5),
            "mlp": b(5),
            "dy": b(5),
        },
        forward=(
            Property(law.skips, f(1)),
            Property(law.norms_stand_first, f(None, "The norm comes first in each branch")),
        ),
        backward=(Property(law.gradient_skips, b(5, "A fork")),),
    )


def _stage() -> Exercise:
    f, b = _equation("stages", "the-equation"), _equation("whole_backward", "the-backward")
    return Exercise(
        "stage",
        stage,
        cases.stage,
        settings=("settings",),
        lines={
            "y": f(3),
            "shape": f(1),
            "x": b(7),
            "patch_embed": b(7),
            "pos_embed": b(None, "adds the same table"),
            "blocks": b(None, "The blocks of stage 4, in reverse"),
            "dy": b(7),
        },
    )


def _pyramid() -> Exercise:
    f, b = _equation("whole_backward", "the-equation"), _equation("whole_backward", "the-backward")
    return Exercise(
        "pyramid",
        pyramid,
        cases.pyramid,
        settings=("settings",),
        lines={"y": f(1), "x": f(3), "dy": b(8)},
        forward=(Property(law.coarse_told_by_fine, Line("stages", "the-equation", "", 1)),),
        backward=(Property(law.maps_add_up, b(8, "Where gradients meet")),),
    )


def _conv() -> Exercise:
    f, b = _pages("convolution")
    return Exercise(
        "conv",
        conv,
        cases.conv,
        settings=("stride", "padding"),
        lines={
            "y": f(1),
            "shape": f(2),
            "x": b(15, "turned by 180 degrees, and with the two channel axes swapped"),
            "weight": b(13),
            "bias": b(12),
            "dy": b(12),
        },
        forward=(Property(law.frame_of_zeros, f(1, "zeros on each side")),),
        backward=(
            Property(law.windows_counted, b(14, "Where the forward copies, the backward adds")),
        ),
    )


def _depthwise_conv() -> Exercise:
    f, b = _pages("convolution")
    return Exercise(
        "depthwise_conv",
        depthwise_conv,
        cases.depthwise_conv,
        lines={"y": f(7), "x": b(17), "weight": b(16), "bias": b(16), "dy": b(16)},
        forward=(Property(law.channels_apart, f(6, "the kernel is diagonal in the channels")),),
    )


def _semantic_fpn() -> Exercise:
    f, b = _pages("semantic_fpn")
    return Exercise(
        "semantic_fpn",
        semantic_fpn,
        cases.semantic_fpn,
        settings=("buffers", "batch_statistics"),
        lines={
            "y": f(5),
            "shape": f(5),
            "Q_1": b(12),
            "Q_2": b(12),
            "Q_3": b(12),
            "Q_4": b(12),
            "conv_seg": b(12),
            "scale_heads": b(12, "Then each level goes back through its enlargements and units"),
            "dy": b(12),
        },
        forward=(Property(law.levels_are_summed, f(5)),),
        backward=(
            Property(law.summands_alike, b(12, "A sum passes its gradient to every summand")),
        ),
        names={f"x.{i}": f"Q_{i + 1}" for i in range(4)},
    )


#: All exercises by name, in the order of the course.
EXERCISES: dict[str, Exercise] = {
    exercise.name: exercise
    for exercise in (
        *(_linear(), _layer_norm(), _gelu(), _softmax(), _cross_entropy(), _patch_embed()),
        *(_position(), _attention(), _sra(), _mlp(), _block(), _stage(), _pyramid()),
        *(_conv(), _depthwise_conv(), _semantic_fpn()),
    )
}
