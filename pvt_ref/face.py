"""Model: weights and their configuration in one object, for those who only want results."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from pvt_ref.arrays import Array, array_module, dtype_name, from_host
from pvt_ref.boundary import check_finite, check_params
from pvt_ref.config import NUM_STAGES, PVTConfig
from pvt_ref.cost import count_cost
from pvt_ref.errors import ArrayTypeError, ConfigError
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.model import forward, forward_pyramid
from pvt_ref.ops import Ops
from pvt_ref.params import PVTParams, check_rng, named_arrays
from pvt_ref.tables import format_cost


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """Weights and configuration. Frozen, and without state: a call keeps nothing.

    Attributes:
        params: the weights; to_device(model) and to_numpy(model) move them.
        config: their configuration.
        source: where they came from and what was recognised, in a sentence.

    Raises:
        NonFiniteError: if a weight on the host is NaN or infinite.
        ShapeError, ArrayTypeError: if params do not belong to config.
    """

    params: PVTParams
    config: PVTConfig
    source: str = "made in memory"

    def __post_init__(self) -> None:
        check_params(self.params, self.config)
        for key, x in named_arrays(self.params):
            check_finite(
                key,
                x,
                "The file they came from is damaged, or the training that made them diverged",
            )

    def __call__(self, images: Array, *, ops: Ops | None = None) -> Array:
        """Class logits (B, num_classes) of images (B, in_chans, H, W); see :func:`forward`."""
        self._check_images(images)
        return forward(self.params, images, self.config, ops=ops)

    def pyramid(self, images: Array, *, ops: Ops | None = None) -> list[Array]:
        """Feature maps [F_1, ..., F_4], (B, C_i, H_i, W_i) each; see :func:`forward_pyramid`."""
        self._check_images(images)
        return forward_pyramid(self.params, images, self.config, ops=ops)

    def _check_images(self, images: Array) -> None:
        weight = self.params.pos_embed1
        if isinstance(images, np.ndarray) and images.dtype.kind == "f":
            with np.errstate(over="ignore"):  # what float32 cannot hold turns infinite: refused
                images = images.astype(dtype_name(weight), copy=False)
        check_finite("images", images, "Check the preprocessing: a division by a zero deviation?")

    def summary(self, size: int | tuple[int, int] | None = None) -> str:
        """Parameters, MACs and memory by stage and operation, as a text table.

        Args:
            size: of the image, H x W or a side; None takes config.img_size.
        """
        report = count_cost(self.config, size)
        return f"{self.source}\n\n{format_cost(report)}"


def with_new_head(model: Model, num_classes: int, rng: np.random.Generator) -> Model:
    """The same model with a fresh head, for fine-tuning on another data set.

    Args:
        model: any model; its arrays are shared, not copied. A bare backbone also gets a fresh cls
            token, its row of the position table, and a final norm.
        num_classes: at least 1.
        rng: a NumPy generator for the new weights (normal, std 0.02; bias 0).

    Returns:
        A model whose config has num_classes, of the same dtype and on the same device.

    Raises:
        ConfigError: if num_classes is not a positive whole number.
    """
    check_rng(rng)
    if not isinstance(model, Model):
        raise ArrayTypeError(
            f"model is a {type(model).__name__}; it must be a Model: load(path), or "
            f"Model(params, config)"
        )
    config = dataclasses.replace(model.config, num_classes=num_classes)
    if not config.has_classifier:
        raise ConfigError(f"num_classes is {num_classes}; a head needs at least 1")
    params, C = model.params, config.embed_dims[-1]
    like = params.pos_embed4
    xp = array_module(like)

    def normal(*shape: int) -> Array:
        return xp.astype(from_host(0.02 * rng.standard_normal(shape), like=like), like.dtype)

    def constant(value: float, *shape: int) -> Array:
        return xp.astype(from_host(np.full(shape, value), like=like), like.dtype)

    changes: dict[str, Any] = {
        "head": LinearParams(normal(num_classes, C), constant(0.0, num_classes))
    }
    if not model.config.has_classifier:
        changes["cls_token"] = normal(1, 1, C)
        changes[f"pos_embed{NUM_STAGES}"] = xp.concat((normal(1, 1, C), like), axis=1)
        changes["norm"] = LayerNormParams(constant(1.0, C), constant(0.0, C))
    params = dataclasses.replace(params, **changes)
    return Model(params, config, f"{model.source}; new head for {num_classes} classes")
