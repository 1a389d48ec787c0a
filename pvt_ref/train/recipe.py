"""Recipe: every setting of a training except the model and the data, in one frozen record."""

from dataclasses import asdict, dataclass
from typing import Any

from pvt_ref.checks import check_flag, check_number, settle
from pvt_ref.errors import RangeError, TrainingError, shown
from pvt_ref.train.adamw import AdamW
from pvt_ref.train.rates import as_prefixes
from pvt_ref.train.schedule import warmup_cosine, warmup_poly


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is trained. The same recipe, data and machine give the same weights, bit by bit.

    (The rate of drop path belongs to the model's configuration, as dropout does.)
    :func:`pvt_ref.train.learning_rate_factors` explains layer_decay and frozen.
    Raises: RangeError if a number is outside its range, or frozen is not a tuple or list of texts.
    """

    epochs: int  # passes through the data
    batch_size: int  # samples per step; an incomplete last batch of an epoch is dropped
    accumulate: int = 1  # micro-batches of a batch, to save memory; each draws its mixup and drops
    lr: float = 1e-3  # the learning rate at its peak
    lr_floor: float = 1e-5  # the learning rate at the end
    warmup_epochs: float = 1.0  # epochs over which it rises; may be a fraction
    schedule: str = "cosine"  # how it falls: "cosine", or "poly", by (1 - t/T)^0.9
    layer_decay: float = 1.0  # of the learning rate, from a layer to the one before it; in (0, 1]
    frozen: tuple[str, ...] = ()  # prefixes of keys, up to a dot, whose weights are not trained
    weight_decay: float = 0.05  # lambda of AdamW, at least 0
    decay_positions: bool = False  # whether position embeddings are decayed too
    beta1: float = 0.9  # how slowly AdamW's running mean forgets, in [0, 1)
    beta2: float = 0.999  # how slowly AdamW's running mean square forgets, in [0, 1)
    clip_norm: float | None = 1.0  # largest norm of the gradients, or None
    label_smoothing: float = 0.1  # share of each target spread over all classes
    mixup_alpha: float = 0.0  # see pvt_ref.train.mixup; 0 is off
    cutmix_alpha: float = 0.0  # see pvt_ref.train.cutmix; with both, each micro-batch takes one
    crop_padding: int = 4  # pixels by which images are shifted at most
    flip: bool = True  # whether images are mirrored at random. (Digits must not be.)
    cutout: int = 0  # side of the square that is set to 0, in pixels; 0 is off
    erasing: float = 0.0  # probability of pvt_ref.train.random_erasing
    ema_decay: float = 0.999  # how slowly the averaged weights forget; with 0 they are the last
    drop_path_ramp_epochs: int = 0  # epochs until config.drop_path_rate is reached
    seed: int = 0  # of all random numbers; see pvt_ref.draws

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            settle(self, name, least=1, whole=True)
        for name in ("drop_path_ramp_epochs", "seed"):
            settle(self, name, least=0, whole=True)
        for name in ("crop_padding", "cutout"):  # more than any image has
            settle(self, name, least=0, most=2**15, whole=True)
        check_flag("flip", self.flip)
        settle(self, "lr", above=0)
        settle(self, "lr_floor", least=0, most=self.lr)
        settle(self, "warmup_epochs", least=0, most=self.epochs)
        _check_word(self, "schedule", "cosine", "poly")
        settle(self, "layer_decay", above=0, most=1)
        object.__setattr__(self, "frozen", as_prefixes(self.frozen))
        for name in ("label_smoothing", "erasing"):
            settle(self, name, least=0, most=1)
        for name in ("mixup_alpha", "cutmix_alpha"):
            settle(self, name, least=0)
        settle(self, "ema_decay", least=0, below=1)
        if self.clip_norm is not None:
            settle(self, "clip_norm", above=0)
        for name in ("weight_decay", "beta1", "beta2"):  # checked by the optimiser, with the flag
            object.__setattr__(self, name, getattr(self.optimizer, name))
        if self.accumulate > self.batch_size:
            samples = f"{self.batch_size} samples"
            raise RangeError(f"accumulate is {self.accumulate}, but a batch has only {samples}")

    @property
    def optimizer(self) -> AdamW:
        """The optimiser's constants."""
        names = ("beta1", "beta2", "weight_decay", "decay_positions")
        return AdamW(**{name: getattr(self, name) for name in names})

    def steps_per_epoch(self, samples: int) -> int:
        """Full batches in an epoch.
        Raises: TrainingError if there is not even one, RangeError if samples is not a whole number.

        Args:
            samples: how many there are to learn from.

        Returns:
            Steps, at least 1.
        """
        samples = check_number("samples", samples, least=0, whole=True)
        if samples < self.batch_size:
            there = f"there are {samples} samples, fewer than one batch of {self.batch_size}"
            raise TrainingError(f"{there}. Choose a smaller batch_size")
        return samples // self.batch_size

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step: :func:`pvt_ref.train.warmup_cosine`, or ``warmup_poly``.
        Raises: RangeError if step is not a whole number of at least 0, or steps_per_epoch of 1.

        Args:
            step: counted from 0 over all epochs.
            steps_per_epoch: from :meth:`steps_per_epoch`.

        Returns:
            A number from 0 to lr.
        """
        steps_per_epoch = check_number("steps_per_epoch", steps_per_epoch, least=1, whole=True)
        total, warmup = self.epochs * steps_per_epoch, round(self.warmup_epochs * steps_per_epoch)
        fall = warmup_poly if self.schedule == "poly" else warmup_cosine
        return fall(step, total, warmup, self.lr, self.lr_floor)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field name, fit for JSON; ``Recipe(**values)`` is this recipe again."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationRecipe(Recipe):
    """How a segmentation network is trained; fields that do not apply to pairs must stay off.

    Scale, crop, mirroring and colours are those of :class:`pvt_ref.train.PairAugment`.
    Raises: RangeError as Recipe, and if a field that is not used is on.
    """

    schedule: str = "poly"
    label_smoothing: float = 0.0
    crop_padding: int = 0
    flip: bool = False
    #: Weights of the loss of a pixel, by its class; () weights all equally.
    class_weights: tuple[float, ...] = ()
    #: What the loss of a batch is divided by: the weight of the pixels that count ("counted"), or
    #: the number of all pixels ("all", as the released code does, without weights).
    loss_mean: str = "counted"

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        _check_word(self, "loss_mean", "counted", "all")
        weights = self.class_weights
        if not isinstance(weights, tuple | list):
            raise RangeError(f"class_weights are {shown(weights)}; they must be a tuple of numbers")
        checked = [
            check_number(f"class_weights[{k}]", w, least=0, most=1e6) for k, w in enumerate(weights)
        ]
        object.__setattr__(self, "class_weights", tuple(checked))
        unused = ("mixup_alpha", "cutmix_alpha", "crop_padding", "flip", "cutout", "erasing")
        for name in unused:
            if getattr(self, name):
                what = f"{name} is {getattr(self, name)}, which is for classification"
                raise RangeError(f"{what}. PairAugment changes photos and labels together")


def _check_word(recipe: Recipe, name: str, *known: str) -> None:
    value = getattr(recipe, name)
    if not isinstance(value, str) or value not in known:
        given, words = shown(value), " or ".join(map(repr, known))
        raise RangeError(f"{name} is {given}; it must be {words}")
