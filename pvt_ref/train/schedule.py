"""The schedules of a training: the learning rate and the drop-path rate."""

import dataclasses
import math
from typing import Any

from pvt_ref.checks import check_number
from pvt_ref.models.architecture import architecture_of


def warmup_cosine(
    step: int, total_steps: int, warmup_steps: int, peak: float, floor: float = 0.0
) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine.
    Raises: RangeError if a number is below 0, or a number of steps not whole.

    With T_warm warm-up steps out of T, all counted by tau (Loshchilov and Hutter 2017, arXiv
    1608.03983, eq. 5, without restarts), and u = (tau - T_warm) / (T - T_warm)::

        lr(tau) = peak (tau + 1) / T_warm                       tau < T_warm
        lr(tau) = floor + (peak - floor) (1 + cos(pi u)) / 2    tau >= T_warm

    The first steps are small because Adam's running means rest on few gradients.

    Args:
        step: tau, counted from 0.
        total_steps: T. From there on the rate is floor.
        warmup_steps: T_warm; 0 begins at the peak.
        peak: the highest rate.
        floor: the rate at the end.

    Returns:
        The learning rate.
    """
    step = check_number("step", step, least=0, whole=True)
    total_steps = check_number("total_steps", total_steps, least=0, whole=True)
    warmup_steps = check_number("warmup_steps", warmup_steps, least=0, whole=True)
    peak, floor = check_number("peak", peak, least=0), check_number("floor", floor, least=0)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def warmup_poly(
    step: int, total_steps: int, warmup_steps: int, peak: float, floor: float = 0.0
) -> float:
    """Learning rate of a step: linear warm-up, then polynomial decay, as for segmentation.
    Raises: RangeError as :func:`warmup_cosine`.

    With T_warm warm-up steps out of T, all counted by tau, as mmsegmentation does::

        lr(tau) = min(1, (tau + 1) / T_warm) (floor + (peak - floor) (1 - tau / T)^0.9)

    Args:
        step: tau, counted from 0.
        total_steps: T. From there on the rate is floor.
        warmup_steps: T_warm.
        peak: the rate without warm-up at step 0.
        floor: the rate at the end.

    Returns:
        The learning rate.
    """
    step = check_number("step", step, least=0, whole=True)
    total_steps = check_number("total_steps", total_steps, least=0, whole=True)
    warmup_steps = check_number("warmup_steps", warmup_steps, least=0, whole=True)
    peak, floor = check_number("peak", peak, least=0), check_number("floor", floor, least=0)
    left = 1 - min(step / max(total_steps, 1), 1.0)
    rate = floor + (peak - floor) * left**0.9
    return rate * min(1.0, (step + 1) / warmup_steps) if warmup_steps else rate


def drop_path_of_epoch(epoch: int, peak: float, ramp_epochs: int) -> float:
    """Drop-path rate of the last block in an epoch: linear from 0 to the peak.
    Raises: RangeError if a number is outside its range, or a number of epochs not whole.

    Dropping blocks prevents overfitting, which is not a risk at first.

    Args:
        epoch: counted from 0.
        peak: the rate in the end, in [0, 1).
        ramp_epochs: epochs in which it rises; 0 begins at the peak.

    Returns:
        The rate, from 0 to peak.
    """
    epoch = check_number("epoch", epoch, least=0, whole=True)
    peak = check_number("peak", peak, least=0, below=1)
    ramp_epochs = check_number("ramp_epochs", ramp_epochs, least=0, whole=True)
    return peak if epoch >= ramp_epochs else peak * epoch / ramp_epochs


def config_of_epoch(config: Any, epoch: int, ramp_epochs: int) -> Any:
    """config with the drop-path rates of an epoch (the authors' class: ``reset_drop_path``).
    Raises: ArrayTypeError if config is no configuration, RangeError as :func:`drop_path_of_epoch`.

    Args:
        config: the model, with drop-path rates as they are at their peak.
        epoch: counted from 0.
        ramp_epochs: epochs in which they rise.

    Returns:
        config with another drop_path_rate.
    """
    architecture_of(config)
    rate = drop_path_of_epoch(epoch, config.drop_path_rate, ramp_epochs)
    made_of_others = getattr(config, "with_drop_path_rate", None)
    return (
        made_of_others(rate) if made_of_others else dataclasses.replace(config, drop_path_rate=rate)
    )
