"""Model: weights and their configuration in one object, for users who only want results."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pvt_ref.api import (
    Prepared,
    check_has_classifier,
    check_params,
    default_ops,
    draw_leaf,
    forward,
    forward_pyramid,
    prepare_checked,
)
from pvt_ref.arrays import (
    Array,
    Grid,
    array_module,
    dtype_name,
    from_host,
    is_array,
    quietly,
    sum_in_float64,
)
from pvt_ref.checks import Size, as_size, check_finite, check_number, check_rng, check_type
from pvt_ref.data.image import check_pixels, read_rgb
from pvt_ref.data.info import UNKNOWN, ModelInfo
from pvt_ref.data.preprocessing import Preprocessing
from pvt_ref.dense import check_dense, logit_bands, slide
from pvt_ref.draws import Generator
from pvt_ref.errors import (
    ConfigError,
    ImageError,
    PVTError,
    RangeError,
    ShapeError,
    printable,
    shown,
)
from pvt_ref.kernels.cuda.capture import replays
from pvt_ref.kernels.cuda.weights import arranged_for
from pvt_ref.models.architecture import Leaf, architecture_of
from pvt_ref.models.segmentor.config import SegmentorConfig
from pvt_ref.ops import Ops
from pvt_ref.report.cost import count_cost
from pvt_ref.report.tables import format_cost
from pvt_ref.tree import describe_arrays, first_array, map_named, named_arrays, to_numpy

#: At most how many images, and pixels of them, :meth:`Model.predict` holds in memory at once.
_IMAGES_AT_ONCE = 64
_PIXELS_AT_ONCE = 8 * 224 * 224


class Prediction(NamedTuple):
    """One answer of :meth:`Model.predict`: a class, its index and its probability."""

    label: str
    index: int
    probability: float


class _Core:
    """A slot for what is computed from the weights once. Not a field, so copies make their own."""

    __slots__ = ("_made",)
    _made: Prepared


@dataclass(frozen=True, slots=True, eq=False)
class Model(_Core):
    """Weights and configuration. Frozen and stateless: a call keeps nothing.

    Attributes:
        params: the weights; to_device(model) and to_numpy(model) move them.
        config: their configuration.
        source: a sentence that says where they came from and what was recognised.
        info: what else is known of them: class names, preprocessing, training.

    Raises:
        NonFiniteError: if a weight on the host is NaN or infinite.
        ShapeError: if params belong to another config.
        ArrayTypeError: if an argument has the wrong type, or the weights mix types.
        ConfigError: if info names another number of classes than config has.
    """

    params: Any
    config: Any
    source: str = "made in memory"
    info: ModelInfo = UNKNOWN

    def __post_init__(self) -> None:
        check_params(self.params, self.config)
        check_type("source", self.source, str, "or left out if nothing is known")
        check_type("info", self.info, ModelInfo, "or left out if nothing is known")
        names, K = self.info.classes, self.config.num_classes
        if names and len(names) != K:
            raise ConfigError(f"info names {len(names)} classes, but config has num_classes={K}")
        cause = "The file they came from is damaged, or the training that made them diverged"
        for key, x in named_arrays(self.params):
            check_finite(key, x, cause)

    def __repr__(self) -> str:
        what = architecture_of(self.config).describe(self.config)
        return f"Model({what}: {describe_arrays(self.params)}; {shown(self.source, 120)})"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the num_classes outputs, in order; ``("0", "1", ...)`` if unknown."""
        return self.info.classes or tuple(map(str, range(self.config.num_classes)))

    @property
    def feature_info(self) -> list[dict[str, int]]:
        """Channels and strides of the maps of :meth:`pyramid`, by timm's names; [] without maps.

        Each map has one record, ``num_chs`` and ``reduction``, from ``config.channels`` and
        ``config.strides``. A columnar ViT has one record, which holds for each of its maps if
        ``blocks`` asks for several. A PVT v2 may get a side that the stride does not divide; it is
        rounded up.
        """
        if architecture_of(self.config).forward_pyramid is None:
            return []
        maps = zip(self.config.channels, self.config.strides, strict=True)
        return [{"num_chs": channels, "reduction": stride} for channels, stride in maps]

    def preprocess(self, images: Any, size: Size | None = None) -> Array:
        """Pictures as a batch for this model, with the preprocessing of its training.

        Args:
            images: what :class:`Preprocessing` takes, one picture or several.
            size: side of the square, or (h, w), in pixels; None takes config.img_size.

        Returns:
            (B, in_chans, h, w) of the weights' library and dtype.

        Raises:
            PVTError: as :class:`Preprocessing`; a ConfigError if it makes other channels.
        """
        self._check_channels()
        like = first_array(self.params)
        pixels = self.config.img_size if size is None else size
        x = from_host(self.info.preprocessing(images, pixels), like)
        return array_module(like).astype(x, like.dtype, copy=False)

    def _check_channels(self) -> None:
        preprocessing = self.info.preprocessing
        if preprocessing.channels != self.config.in_chans:
            raise ConfigError(
                f"the model has in_chans={self.config.in_chans}, but its preprocessing makes "
                f"{preprocessing.channels} channels ({preprocessing.mode}). Give Model an info of "
                f"its own: ModelInfo(preprocessing=Preprocessing('bands', mean, std))"
            )

    def predict(
        self, images: Any, top: int = 5, size: Size | None = None
    ) -> list[list[Prediction]]:
        """The most likely classes of each image; a few pictures are in memory at a time.

        Args:
            images: what :meth:`preprocess` takes, or what it returns: (B, in_chans, H, W) floats.
            top: how many classes; all if there are fewer.
            size: for :meth:`preprocess`; None takes config.img_size.

        Returns:
            B lists of :class:`Prediction`, most likely first. Probabilities are in float64.

        Raises:
            RangeError: if top is not a positive whole number, or floats on the host look like
                pixels that were not normalised: none is negative, and the largest is at most 1 or
                above 20 (calling the model does not check this).
            NonFiniteError: if floats on the host hold NaN or infinity.
            ShapeError: if there is no picture.
            PVTError: as :meth:`preprocess` and :func:`pvt_ref.forward`.
        """
        answers: list[list[Prediction]] = []
        if is_array(images) and dtype_name(images).startswith(("float", "bfloat")):
            self._check_top(top)
            self._check_normalised(images)
            count = self._at_once(tuple(images.shape[2:]))
            if images.ndim != 4 or not images.shape[0]:
                self(images)  # refuses it
            for start in range(0, images.shape[0], count):
                part = images[start : min(start + count, images.shape[0]), ...]
                answers += self._answers(self._logits(part), top)
            return answers
        for answer in self.predict_each(images, top, size):
            if isinstance(answer, PVTError):
                raise answer
            answers.append(answer)
        return answers or self.preprocess([])  # refuses it

    def predict_each(
        self, images: Any, top: int = 5, size: Size | None = None
    ) -> Iterator[list[Prediction] | PVTError]:
        """As :meth:`predict`, picture by picture; an unreadable one does not stop the others.

        Args:
            images: what :meth:`preprocess` takes; also an iterator, read a few pictures at a time.
            top: as for predict.
            size: as for predict.

        Returns:
            An iterator: for each picture, what predict would return for it or the PVTError that it
            would raise. Any other exception becomes the ``__cause__`` of an ImageError.

        Raises:
            PVTError: as :meth:`predict`, if top, size or the model itself does not fit.
        """
        self._check_top(top)
        self._check_channels()
        H, W = as_size(self.config.img_size if size is None else size)
        self.config.grids(H, W)
        several = isinstance(images, list | tuple | Iterator) and not hasattr(images, "read")
        several = several or (isinstance(images, np.ndarray) and images.ndim == 4)
        return self._predict_each(images if several else [images], top, (H, W))

    def _predict_each(self, images: Iterable[Any], top: int, size: Grid) -> Iterator[Any]:
        rest = iter(images)
        while batch := list(itertools.islice(rest, self._at_once(size))):
            prepared = [self._preprocess_or_error(picture, size) for picture in batch]
            good = [x for x in prepared if not isinstance(x, PVTError)]  # (1, in_chans, H, W) each
            logits = [self._logits(array_module(good[0]).concat(good))] if good else []
            rows = (row for part in logits for row in self._answers(part, top))
            for x in prepared:
                yield x if isinstance(x, PVTError) else next(rows)

    def _preprocess_or_error(self, picture: Any, size: Grid) -> Array | PVTError:
        try:
            return self.preprocess([picture], size)
        except PVTError as error:
            return error
        except MemoryError:  # the next one would fail too
            raise
        except Exception as error:  # from the caller's own preprocessing, or own kind of picture
            why = f"{type(error).__name__}: {error}"
            refusal = ImageError(f"the picture {shown(picture)} cannot be prepared ({why})")
            refusal.__cause__ = error
            return refusal

    def _at_once(self, size: tuple[int, ...]) -> int:
        """How many images of that size go through the network together."""
        return min(_IMAGES_AT_ONCE, max(1, _PIXELS_AT_ONCE // max(1, math.prod(size))))

    def _check_top(self, top: Any) -> None:
        check_number("top", top, least=1, whole=True)
        check_has_classifier(self.config)
        row = architecture_of(self.config)
        if row.dense:
            raise ConfigError(f"a {row.title} gives a class for every pixel: model.segment(images)")

    def segment(
        self, pictures: Any, size: int | None = None, *, window: Size | None = None
    ) -> list[np.ndarray]:
        """The class of every pixel, at each picture's own size; one picture at a time.

        As released, a picture is resized so that its short side has ``size``, then stretched to a
        size that the backbone takes. The logits are resized to that size, then to the picture's.

        Args:
            pictures: one picture or several: paths, files opened in binary mode, or PIL images.
            size: short side that the network sees, in pixels; None takes config.img_size.
            window: side of the square, or (h, w), that it sees at a time, in pixels of the resized
            picture; windows overlap by a third. None takes the whole picture at once.

        Returns:
            (H, W) uint8 for each picture: class indices, whose names are in :attr:`classes`.

        Raises:
            ConfigError: if the model is not for segmentation, or has more classes than a byte
                holds, or its preprocessing is for bands.
            ShapeError: if there is no picture, or size or window is not a size.
            PVTError: as :meth:`preprocess`.
        """
        maps: list[np.ndarray] = []
        for answer in self.segment_each(pictures, size, window=window):
            if isinstance(answer, PVTError):
                raise answer
            maps.append(answer)
        return maps or self.preprocess([])  # refuses it

    def segment_each(
        self, pictures: Any, size: int | None = None, *, window: Size | None = None
    ) -> Iterator[np.ndarray | PVTError]:
        """As :meth:`segment`, picture by picture; an unreadable one does not stop the others.

        Args:
            pictures: as for segment; also an iterator.
            size: as for segment.
            window: as for segment.

        Returns:
            An iterator: for each picture, its class map or the PVTError that segment would raise.

        Raises:
            ConfigError: as :meth:`segment`, if the model does not fit.
            PVTError: as :meth:`segment`, if size or window does not.
        """
        check_dense(self.config)
        self._check_channels()
        if (K := self.config.num_classes) > 256:
            what = f"the model has {K} classes, but a class map holds one byte for each pixel"
            raise ConfigError(f"{what}. Use model(images) and pvt_ref.dense.resize_logits instead")
        preprocessing = self.info.preprocessing
        if preprocessing.mode == "bands":
            raise ConfigError("preprocessing has mode 'bands', but pictures are in colour or grey")
        side = self.config.img_size if size is None else size
        side = check_number("size", side, least=1, most=2**15, whole=True)
        part = None if window is None else as_size(window, least=1)
        several = isinstance(pictures, list | tuple | Iterator) and not hasattr(pictures, "read")
        each = iter(pictures if several else [pictures])
        return (self._segment_or_error(picture, side, part) for picture in each)

    def _segment_or_error(self, picture: Any, side: int, part: Grid | None) -> Any:
        try:
            return self._segment(picture, side, part)
        except PVTError as error:
            return error

    def _segment(self, picture: Any, side: int, part: Grid | None) -> np.ndarray:
        photo = read_rgb(picture)
        x = as_seen(self, photo, side, fitting=part is None)
        H, W = x.shape[2:]
        if part is None:
            logits = self._logits(x)
        else:
            h, w = (min(n, m) for n, m in zip(part, (H, W), strict=True))
            stride = max(1, 2 * h // 3), max(1, 2 * w // 3)
            logits = slide(self._logits, x, (h, w), stride)
        size = photo.height, photo.width
        answers = np.empty(size, np.uint8)
        # a band of rows at a time: all logits of a large picture would not fit in memory
        for top, bottom, full in logit_bands(logits, (H, W), size):
            answers[top:bottom] = to_numpy(array_module(full).argmax(full, axis=1))[0]
        return answers

    def _check_normalised(self, images: Array) -> None:
        """Refuses floats that look like pixels: normalised images are negative where dark."""
        preprocessing = self.info.preprocessing
        known = preprocessing.channels == self.config.in_chans and min(preprocessing.mean) > 0
        if not known or not isinstance(images, np.ndarray) or not images.size:
            return
        low, high = float(images.min()), float(images.max())
        if 0 <= low < high <= 1 or (low >= 0 and 20 < high <= 255):
            scale, times = ("0 to 1", "255 * ") if high <= 1 else ("0 to 255", "")
            raise RangeError(
                f"images hold floats from {low:.3g} to {high:.3g}. They look like pixels on a "
                f"scale of {scale} and not normalised: dark places would be negative. Pass the "
                f"pixels, numpy.rint({times}images).astype('uint8').transpose(0, 2, 3, 1), or "
                f"paths. If they are normalised after all, model(images) takes them as they are"
            )

    def _answers(self, logits: Array, top: int) -> list[list[Prediction]]:
        """The most likely classes of each row of logits (B, num_classes)."""
        logits = to_numpy(logits).astype(np.float64)  # (B, K)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        best = np.argsort(-p, axis=1, kind="stable")[:, :top]  # (B, top)
        return [
            [Prediction(self.classes[k], int(k), float(row[k])) for k in indices]
            for row, indices in zip(p, best, strict=True)
        ]

    def __call__(self, images: Array, *, ops: Ops | None = None) -> Array:
        """Class logits (B, num_classes) of normalised floats (B, in_chans, H, W).

        For segmentation, they are those of every position of a smaller map, (B, num_classes, h, w).

        Raises:
            NonFiniteError: if images on the host are not finite, also in the dtype of the weights.
            PVTError: as :func:`pvt_ref.forward`.
        """
        return forward(self._core(), self._checked(images), ops=ops)

    def _logits(self, images: Array) -> Array:
        """As calling the model; CUDA kernels are captured and replayed for shapes that repeat."""
        ops, core = default_ops(first_array(self.params)), self._core()
        seen = arranged_for(ops, core)
        if not replays(ops, images):
            return self(images) if seen is core else forward(seen, self._checked(images))

        def make() -> Any:
            made, size = core, tuple(images.shape[2:])
            if size != core.size:  # a graph cannot resize tables
                with contextlib.suppress(ShapeError):  # the forward says what is wrong
                    made = prepare_checked(self.params, self.config, size)
            return partial(forward, dataclasses.replace(made, params=seen.params), ops=ops)

        return ops.settings.graphs.run(core, make, images)

    def pyramid(
        self, images: Array, *, ops: Ops | None = None, blocks: Iterable[int] | None = None
    ) -> list[Array]:
        """Feature maps for dense prediction; :attr:`feature_info` describes them.

        Args:
            images: (B, in_chans, H, W) normalised floats.
            ops: a table of operations; None takes the default.
            blocks: of a ViT, as for :func:`pvt_ref.forward_pyramid`.

        Returns:
            [F_1, F_2, ...], (B, C_i, H_i, W_i) each, of the weights' dtype.

        Raises:
            PVTError: as calling the model, and :func:`pvt_ref.forward_pyramid`.
        """
        return forward_pyramid(self._core(), self._checked(images), ops=ops, blocks=blocks)

    def _core(self) -> Prepared:
        """The checked weights, with everything that is computed from them once for all calls."""
        if not hasattr(self, "_made"):  # the first call, or the first of a copy
            object.__setattr__(self, "_made", prepare_checked(self.params, self.config))
        return self._made

    def _checked(self, images: Array) -> Array:
        """images; host floats are cast, and refused if the weights' dtype cannot hold them."""
        if isinstance(images, np.ndarray) and images.dtype.kind == "f":
            weight = first_array(self.params)
            if images.dtype != weight.dtype:  # floats beyond float32 become infinite
                images = quietly(lambda: images.astype(dtype_name(weight), copy=False))
            check_finite("images", images, "Was the preprocessing's deviation zero?")
        return images

    def summary(self, size: Size | None = None) -> str:
        """Parameters, MACs and memory by stage and operation, for B = 1.

        Args:
            size: of the image, (H, W) or a side, in pixels; None takes config.img_size.

        Returns:
            A text table, with ``source`` above it: MACs in millions, memory in MiB.

        Raises:
            ShapeError: if the model cannot take that size.
        """
        return f"{printable(self.source)}\n\n{format_cost(count_cost(self.config, size))}"


def as_seen(model: Model, photo: Image.Image, side: int, fitting: bool = True) -> Array:
    """A photo in the form that :meth:`Model.segment` gives to the network.

    Args:
        model: the model whose preprocessing is used.
        photo: an RGB image of Pillow.
        side: length of the short side, in pixels.
        fitting: whether both sides are adjusted to what the network takes; windows do not need it.

    Returns:
        (1, C, H, W), of the weights' dtype and device.

    Raises:
        ImageError: if there would be too many pixels.
        ShapeError: if the network takes no such size.
    """
    scale = side / min(photo.size)
    H, W = (max(1, round(n * scale)) for n in (photo.height, photo.width))
    if fitting:
        H, W = model.config.fitting_size(H, W)
    check_pixels(H, W)
    resized = photo.resize((W, H), Image.Resampling.BILINEAR)
    preprocessing = model.info.preprocessing
    if preprocessing.mode == "L":
        resized = resized.convert("L")
    pixels = np.asarray(resized).reshape(1, H, W, -1).transpose(0, 3, 1, 2)
    return preprocessing.normalize(np.ascontiguousarray(pixels), first_array(model.params))


def _without_claims(info: ModelInfo) -> ModelInfo:
    """The part of an info that still holds for other classes: the preprocessing."""
    return dataclasses.replace(info, title="", classes=(), training={}, colours=())


def with_new_head(model: Model, num_classes: int, rng: Generator) -> Model:
    """The same model with a fresh head, for fine-tuning on another data set.

    Args:
        model: any model; its arrays are shared, not copied. A bare PVT backbone also gets the rest
            of a classifier: a cls token, its row of the position table, and a final norm.
        num_classes: at least 1.
        rng: a NumPy generator for the new weights, as of :func:`init_params`; it is advanced.

    Returns:
        A model whose config has num_classes, of the same dtype and on the same device.

    Raises:
        ArrayTypeError: if model is not a Model, or rng not a NumPy generator.
        ConfigError: if num_classes is not a positive whole number, or the model cannot have a head.
    """
    check_rng(rng)
    check_type("model", model, Model, "from load(path) or Model(params, config)")
    row = architecture_of(model.config)
    config = dataclasses.replace(model.config, num_classes=num_classes)
    if not config.has_classifier:
        raise ConfigError(f"num_classes is {num_classes}; a head needs at least 1")
    old, like = dict(named_arrays(model.params)), first_array(model.params)
    changed = set[str]()

    def make(leaf: Leaf) -> Array:
        kept = None if leaf.key.startswith(f"{row.head}.") else old.get(leaf.key)
        if kept is not None and tuple(kept.shape) == leaf.shape:
            return kept
        changed.add(leaf.key.split(".")[0])
        if kept is not None:  # a table of a backbone, which has no row for the cls token yet
            missing = leaf.shape[1] - kept.shape[1]
            leaf = leaf._replace(shape=(1, missing, *leaf.shape[2:]))
        drawn = from_host(draw_leaf(leaf, rng, np.dtype(dtype_name(like))), like=like)
        return drawn if kept is None else array_module(like).concat((drawn, kept), axis=1)

    built = row.build_params(config, make)
    params = dataclasses.replace(model.params, **{name: getattr(built, name) for name in changed})
    info = _without_claims(model.info)
    return Model(params, config, f"{model.source}; new head for {num_classes} classes", info)


def with_segmentation_head(model: Model, head: Any, num_classes: int, rng: Generator) -> Model:
    """A segmentation network on the backbone of a model, with a fresh head.

    Args:
        model: a network with a pyramid, with or without classifier. The arrays of its backbone are
            shared; a PVT's cls token, its row of the table, final norm and head are dropped.
        head: :class:`pvt_ref.SemanticFPNHead` or :class:`pvt_ref.SETRHead`.
        num_classes: of each pixel, at least 1.
        rng: a NumPy generator for the new weights, as of :func:`init_params`; it is advanced.

    Returns:
        A model whose config is a :class:`pvt_ref.SegmentorConfig`, of the same dtype and on the
        same device.

    Raises:
        ArrayTypeError: if model is not a Model, or rng not a NumPy generator.
        ConfigError: if the parts do not make a segmentation network.
    """
    check_rng(rng)
    check_type("model", model, Model, "from load(path) or Model(params, config)")
    config = SegmentorConfig(
        backbone=dataclasses.replace(model.config, num_classes=0),
        head=head,
        num_classes=num_classes,
    )
    old, like = dict(named_arrays(model.params)), first_array(model.params)

    def make(leaf: Leaf) -> Array:
        kept = old.get(leaf.key.removeprefix("backbone."))
        if kept is None or not leaf.key.startswith("backbone."):
            return from_host(draw_leaf(leaf, rng, np.dtype(dtype_name(like))), like=like)
        if tuple(kept.shape) != leaf.shape:  # a table, whose first row is the cls token's
            kept = kept[:, kept.shape[1] - leaf.shape[1] :, ...]
        return kept

    params = architecture_of(config).build_params(config, make)
    info = _without_claims(model.info)
    source = f"{model.source}; new {config.head.name} head for {num_classes} classes"
    return Model(params, config, source, info)


def with_image_size(model: Model, img_size: int) -> Model:
    """The same model for another image size, with its position tables resized permanently.

    A model takes any size without this, but resizes its tables in each call. Here the new size
    becomes the default for training, prediction and saving.

    Args:
        model: any model; arrays that stay the same are shared, not copied.
        img_size: side of the square, in pixels.

    Returns:
        A model whose config has img_size.

    Raises:
        ArrayTypeError: if model is not a Model.
        ConfigError, ShapeError: if the model cannot be made for that size.
    """
    check_type("model", model, Model, "from load(path) or Model(params, config)")
    if (row := architecture_of(model.config)).dense:
        what = f"a {row.title} has the image size of its backbone and stretches pictures to fit"
        raise ConfigError(f"{what}. Pass another size to each call: model.segment(pictures, size)")
    config = dataclasses.replace(model.config, img_size=img_size)
    H, W = as_size(img_size)
    config.grids(H, W)
    keys = [key for key, _ in named_arrays(model.params) if key.startswith("pos_embed")]
    made = architecture_of(config).prepare(model.params, model.config, (H, W)) if keys else ()
    tables = dict(zip(keys, made, strict=True))
    params = map_named(lambda key, w: tables.get(key, w), model.params)
    return Model(params, config, f"{model.source}; for {img_size} pixels", model.info)


def with_channels(model: Model, in_chans: int) -> Model:
    """The same model for another number of image channels, with its first weights adapted.

    As in timm's ``adapt_input_conv``, one channel gets the sum of the weights over the channels.
    For other numbers the weights are repeated in turn and scaled, so an image whose channels are
    all equal gives the same logits as before. Use it as a starting point for training.

    Args:
        model: any model; its other arrays are shared, not copied.
        in_chans: at least 1: for example 1 for grey, or 4 for colour and infrared.

    Returns:
        A model whose config has in_chans. From 3 channels to 1 or back, its preprocessing is
        adapted too; otherwise ``info`` keeps the old one, and :meth:`Model.preprocess` refuses.

    Raises:
        ArrayTypeError: if model is not a Model.
        ConfigError: if in_chans is not a positive whole number.
    """
    check_type("model", model, Model, "from load(path) or Model(params, config)")
    row, before = architecture_of(model.config), model.config.in_chans
    if row.stem is None:
        raise ConfigError(f"a {row.title} has no first layer to adapt")
    config = dataclasses.replace(model.config, in_chans=in_chans)
    if in_chans == before:
        return model

    def adapt(key: str, w: Array) -> Array:
        if key != row.stem:
            return w
        xp = array_module(w)  # w: (C_out, before, ...)
        if in_chans == 1:
            return xp.expand_dims(sum_in_float64(w, axis=1), axis=1)
        times = -(-in_chans // before)  # rounded up
        return xp.concat([w] * times, axis=1)[:, :in_chans, ...] * (before / in_chans)

    old = new = model.info.preprocessing
    if in_chans == 1 and old.mode == "RGB":
        new = Preprocessing("L", (sum(old.mean) / 3,), (sum(old.std) / 3,))
    elif in_chans == 3 and old.mode == "L":
        new = Preprocessing("RGB", 3 * old.mean, 3 * old.std)
    info = dataclasses.replace(model.info, preprocessing=new)
    source = f"{model.source}; first layer adapted from {before} channels to {in_chans}"
    return Model(map_named(adapt, model.params), config, source, info)
