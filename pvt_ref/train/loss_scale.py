"""Loss scaling: gradients that half precision can hold (Micikevicius et al., arXiv 1710.03740).

float16 has no numbers between 0 and 6e-8, where many gradients are, and none beyond 65504. Since a
backward is linear in dL/dlogits, multiplying the loss by S makes all gradients S times as large in
the backward, and their sums are divided by S before they are used. S is a power of two, so
multiplying and dividing by it changes no bit of numbers inside the range.

S should be as large as possible. If a gradient is not finite, S was too large: the step is skipped
and S halved. After many steps without that, S is doubled. bfloat16 has float32's range and needs no
scaling.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from pvt_ref.checks import check_number
from pvt_ref.errors import RangeError
from pvt_ref.ops import Ops

#: PyTorch's GradScaler begins, and doubles, with these.
_FIRST, _STEPS_TO_DOUBLE = 2.0**16, 2000

#: A smaller one would not help: gradients that are not finite then have another cause.
_LEAST, _MOST = 2.0**-14, 2.0**40


@dataclass(frozen=True, slots=True)
class LossScale:
    """The factor of the loss, a power of two, and what decides when it changes.

    Raises: RangeError if a number is outside its range.
    """

    scale: float = _FIRST
    good_steps: int = 0  # since it changed, or a step was left out
    skipped: int = 0  # steps that were left out, of all

    def __post_init__(self) -> None:
        scale = check_number("scale", self.scale, least=_LEAST, most=_MOST)
        if math.frexp(scale)[0] != 0.5:
            raise RangeError(f"scale is {scale}; it must be a power of two, which rounds nothing")
        object.__setattr__(self, "scale", scale)
        for name, most in (("good_steps", _STEPS_TO_DOUBLE - 1), ("skipped", 2**53)):
            number = check_number(name, getattr(self, name), least=0, most=most, whole=True)
            object.__setattr__(self, name, number)

    def after(self, finite: bool) -> "LossScale":
        """The scale of the next step.

        Args:
            finite: whether all gradients of this step were.

        Returns:
            Another, or the same with one more step counted.
        """
        if not finite:
            return LossScale(max(self.scale / 2, _LEAST), 0, self.skipped + 1)
        if self.good_steps + 1 < _STEPS_TO_DOUBLE:
            return replace(self, good_steps=self.good_steps + 1)
        return LossScale(min(2 * self.scale, _MOST), 0, self.skipped)

    @property
    def is_least(self) -> bool:
        """Whether it can be halved no further."""
        return self.scale == _LEAST


def scale_for(ops: Ops, so_far: LossScale | None) -> LossScale | None:
    """The scale of a step: the training's own, a first one if the table has float16, or None."""
    precision: Any = getattr(ops.settings, "precision", None)
    return LossScale() if so_far is None and precision == "float16" else so_far
