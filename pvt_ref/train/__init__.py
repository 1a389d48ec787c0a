"""Training with the package's own gradients: optimiser, schedule, augmentation, and the loop.

Each part is a function or a small record of its own file and can be used alone; :func:`fit` puts
them together. See docs/training.md.
"""

from pvt_ref.data.augment import (
    cutmix,
    cutout,
    mixup,
    one_hot,
    random_crop,
    random_erasing,
    random_flip,
)
from pvt_ref.data.folder import ImageFolder
from pvt_ref.data.iou import class_iou, count_pixels, mean_iou, pixel_accuracy
from pvt_ref.data.labelled import LabelledImages, confusion_matrix, evaluate
from pvt_ref.data.pair_augment import PairAugment
from pvt_ref.data.pairs import LabelledPairs
from pvt_ref.data.photo_augment import PhotoAugment
from pvt_ref.report.diagnosis import first_non_finite
from pvt_ref.train.adamw import AdamW, AdamWState, adamw_init, adamw_step, is_decayed
from pvt_ref.train.ema import ema_decay_of_step, ema_step
from pvt_ref.train.from_folder import Options, train_folder
from pvt_ref.train.gradients import add_gradients, clip_by_global_norm, global_norm
from pvt_ref.train.loop import Run, fit
from pvt_ref.train.loss_scale import LossScale
from pvt_ref.train.metrics import draw_confusion, draw_curves, read_metrics
from pvt_ref.train.rates import learning_rate_factors
from pvt_ref.train.recipe import Recipe, SegmentationRecipe
from pvt_ref.train.saved import load_state, save_state
from pvt_ref.train.schedule import (
    config_of_epoch,
    drop_path_of_epoch,
    warmup_cosine,
    warmup_poly,
)
from pvt_ref.train.segmentation import evaluate_pixels
from pvt_ref.train.step import StepReport, TrainState, start_training, train_step

__all__ = [
    "AdamW", "AdamWState", "ImageFolder", "LabelledImages", "LabelledPairs", "LossScale",
    "Options", "PairAugment", "PhotoAugment", "Recipe", "Run", "SegmentationRecipe", "StepReport",
    "TrainState", "adamw_init", "adamw_step", "add_gradients", "class_iou",
    "clip_by_global_norm", "config_of_epoch", "confusion_matrix", "count_pixels", "cutmix",
    "cutout", "draw_confusion", "draw_curves", "drop_path_of_epoch", "ema_decay_of_step",
    "ema_step", "evaluate", "evaluate_pixels", "first_non_finite", "fit", "global_norm",
    "is_decayed", "learning_rate_factors", "load_state", "mean_iou", "mixup", "one_hot",
    "pixel_accuracy", "random_crop", "random_erasing", "random_flip", "read_metrics",
    "save_state", "start_training", "train_folder", "train_step", "warmup_cosine",
    "warmup_poly",
]  # fmt: skip
