"""Model: weights and their configuration in one object, for those who only want results."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pvt_ref.arrays import Array, array_module, dtype_name, from_host, is_array, to_numpy
from pvt_ref.boundary import check_finite, check_has_classifier, check_params
from pvt_ref.config import NUM_STAGES, PVTConfig, is_whole
from pvt_ref.cost import count_cost
from pvt_ref.errors import ArrayTypeError, ConfigError, RangeError
from pvt_ref.info import UNKNOWN, ModelInfo
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.model import forward, forward_pyramid
from pvt_ref.ops import Ops
from pvt_ref.params import PVTParams, check_rng, named_arrays
from pvt_ref.tables import format_cost

#: Images that go through the network together in :meth:`Model.predict`, for memory's sake.
_PREDICTED_AT_ONCE = 64


class Prediction(NamedTuple):
    """One answer of :meth:`Model.predict`.

    Attributes:
        label: name of the class.
        index: of the output, from 0.
        probability: Softmax(logits) there, in [0, 1].
    """

    label: str
    index: int
    probability: float


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """Weights and configuration. Frozen, and without state: a call keeps nothing.

    Attributes:
        params: the weights; to_device(model) and to_numpy(model) move them.
        config: their configuration.
        source: where they came from and what was recognised, in a sentence.
        info: what is known of them besides: class names, preprocessing, training.

    Raises:
        NonFiniteError: if a weight on the host is NaN or infinite.
        ShapeError: if params belong to another config.
        ArrayTypeError: if params or config are of another type, or the weights of several dtypes or
            devices.
        ConfigError: if info names another number of classes than config has.
    """

    params: PVTParams
    config: PVTConfig
    source: str = "made in memory"
    info: ModelInfo = UNKNOWN

    def __post_init__(self) -> None:
        check_params(self.params, self.config)
        self._check_info()
        for key, x in named_arrays(self.params):
            check_finite(
                key,
                x,
                "The file they came from is damaged, or the training that made them diverged",
            )

    def _check_info(self) -> None:
        names, K = self.info.classes, self.config.num_classes
        if names and len(names) != K:
            raise ConfigError(
                f"info names {len(names)} classes, and the configuration has num_classes={K}"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the num_classes outputs, in order; ``("0", "1", ...)`` if not known."""
        return self.info.classes or tuple(map(str, range(self.config.num_classes)))

    def preprocess(self, images: Any, size: int | tuple[int, int] | None = None) -> Array:
        """Pictures as a batch for this model, with the preprocessing of its training.

        Args:
            images: a picture or a list of them: paths, open files, PIL images, or arrays (H, W, 3)
                or (H, W) of uint8; or an array (B, H, W, 3) of uint8.
            size: side of the square, or (h, w), in pixels; None takes config.img_size.

        Returns:
            (B, in_chans, h, w) of the weights' library and dtype.

        Raises:
            ConfigError: if the model has another number of channels than its preprocessing.
            ImageError: as :func:`pvt_ref.load_image`.
            MissingFileError: as :func:`pvt_ref.load_image`.
            ArrayTypeError: as :func:`pvt_ref.load_image`; also for an array of another dtype.
            ShapeError: as :func:`pvt_ref.load_image`; also for an array of another shape, or no
                picture at all.
        """
        preprocessing = self.info.preprocessing
        if preprocessing.channels != self.config.in_chans:
            raise ConfigError(
                f"the model has in_chans={self.config.in_chans}, and its preprocessing makes "
                f"{preprocessing.channels} channels ({preprocessing.mode}). Give Model an "
                f"info that fits: ModelInfo(preprocessing=Preprocessing('bands', mean, std))"
            )
        like = self.params.pos_embed1
        x = from_host(preprocessing(images, self.config.img_size if size is None else size), like)
        return array_module(like).astype(x, like.dtype, copy=False)

    def predict(self, images: Any, top: int = 5) -> list[list[Prediction]]:
        """The likeliest classes of each image, likeliest first.

        Args:
            images: what :meth:`preprocess` takes, or made: (B, in_chans, H, W) floats.
            top: how many; all if there are fewer classes.

        Returns:
            A list of B lists of :class:`Prediction`. Probabilities are Softmax(logits), in float64.

        Raises:
            RangeError: if top is not a positive whole number; also as :func:`pvt_ref.forward`.
            ConfigError: if the model is a bare backbone; also as :meth:`preprocess`.
            NonFiniteError: if floats on the host hold NaN or infinity.
            ImageError: as :meth:`preprocess`.
            MissingFileError: as :meth:`preprocess`.
            ArrayTypeError: as :meth:`preprocess` and :func:`pvt_ref.forward`.
            ShapeError: as :meth:`preprocess` and :func:`pvt_ref.forward`.
        """
        if not is_whole(top) or top < 1:
            raise RangeError(f"top is {top!r}; it must be a whole number, at least 1")
        check_has_classifier(self.config)
        if not (is_array(images) and dtype_name(images).startswith(("float", "bfloat"))):
            images = self.preprocess(images)
        parts = [
            to_numpy(self(images[start : start + _PREDICTED_AT_ONCE]))
            for start in range(0, max(len(images), 1), _PREDICTED_AT_ONCE)
        ]
        logits = np.concatenate(parts).astype(np.float64)  # (B, K)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        best = np.argsort(-p, axis=1, kind="stable")[:, :top]  # (B, top)
        return [
            [Prediction(self.classes[k], int(k), float(row[k])) for k in indices]
            for row, indices in zip(p, best, strict=True)
        ]

    def __call__(self, images: Array, *, ops: Ops | None = None) -> Array:
        """Class logits; see :func:`pvt_ref.forward`.

        Args:
            images: (B, in_chans, H, W) normalised floats.
            ops: a record of operations; None takes the default.

        Returns:
            logits (B, num_classes) of the weights' dtype.

        Raises:
            NonFiniteError: if images on the host hold NaN or infinity, or numbers beyond the dtype
                of the weights.
            ArrayTypeError: as :func:`pvt_ref.forward`.
            ShapeError: as :func:`pvt_ref.forward`.
            ConfigError: as :func:`pvt_ref.forward`.
            RangeError: as :func:`pvt_ref.forward`.
        """
        self._check_images(images)
        return forward(self.params, images, self.config, ops=ops)

    def pyramid(self, images: Array, *, ops: Ops | None = None) -> list[Array]:
        """Feature maps for dense prediction; see :func:`pvt_ref.forward_pyramid`.

        Args:
            images: (B, in_chans, H, W) normalised floats.
            ops: a record of operations; None takes the default.

        Returns:
            [F_1, F_2, F_3, F_4], (B, C_i, H_i, W_i) each, of the weights' dtype.

        Raises:
            NonFiniteError: if images on the host hold NaN or infinity, or numbers beyond the dtype
                of the weights.
            ArrayTypeError: as :func:`pvt_ref.forward_pyramid`.
            ShapeError: as :func:`pvt_ref.forward_pyramid`.
            RangeError: as :func:`pvt_ref.forward_pyramid`.
        """
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
            size: of the image, (H, W) or a side, in pixels; None takes config.img_size.

        Returns:
            The table, with ``source`` above it: MACs in millions, memory in MiB, for a batch of
            one.

        Raises:
            ShapeError: if the model cannot take that size.
        """
        report = count_cost(self.config, size)
        return f"{self.source}\n\n{format_cost(report)}"


def with_new_head(model: Model, num_classes: int, rng: np.random.Generator) -> Model:
    """The same model with a fresh head, for fine-tuning on another data set.

    Args:
        model: any model; its arrays are shared, not copied. A bare backbone also gets a fresh cls
            token, its row of the position table, and a final norm.
        num_classes: at least 1.
        rng: a NumPy generator for the new weights (normal, std 0.02; bias 0); it is advanced.

    Returns:
        A model whose config has num_classes, of the same dtype and on the same device: head weight
        (num_classes, C_4) and bias (num_classes,).

    Raises:
        ArrayTypeError: if model is not a Model, or rng not a NumPy generator.
        ConfigError: if num_classes is not a positive whole number, or stage 4 of a backbone has
            spatial reduction, which leaves no place for a cls token.
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
    info = dataclasses.replace(model.info, title="", classes=(), training={})  # not true any more
    return Model(params, config, f"{model.source}; new head for {num_classes} classes", info)
