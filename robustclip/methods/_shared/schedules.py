"""Learning-rate schedules shared by the methods."""

import math
from functools import partial

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

NO_END = (
    "model.schedule is 'cosine', which needs the number of steps of the run; set trainer.max_epochs (for data without"
    " a length trainer.max_steps), or set model.schedule to constant, as for a fit that trainer.max_time ends"
)
WARMUP_RATE = 1e-5  # CoOp's and CRoFT's code, whatever the rate after it


def check_end(trainer: Trainer, schedule: str) -> None:
    """Refuses a cosine over a run whose length is unknown.

    Args:
        trainer: trainer of the fit.
        schedule: ``cosine`` or ``constant``.

    Raises:
        ValueError: the schedule is a cosine, and the trainer limits neither epochs nor steps.
    """
    if schedule == "cosine" and trainer.max_epochs == trainer.max_steps == -1:
        raise ValueError(NO_END)


def steps_of_run(trainer: Trainer, schedule: str) -> int | None:
    """Returns the number of optimiser steps of the run that a cosine needs; None for a constant schedule.

    Args:
        trainer: trainer of the fit.
        schedule: ``cosine`` or ``constant``.

    Raises:
        ValueError: the schedule is a cosine, and the number of steps is unknown.
    """
    check_end(trainer, schedule)
    total = int(trainer.estimated_stepping_batches) if schedule == "cosine" else None
    if total == -1:  # Lightning's value for data without a length and a run without a number of steps
        raise ValueError(NO_END)
    return total


def warmup_cosine(optimizer: Optimizer, *, warmup_steps: int, total_steps: int | None) -> LambdaLR:
    """Builds TeCoA's schedule per step: linear warm-up to each group's rate, then a cosine to 0.

    Args:
        optimizer: optimiser whose rates are scaled.
        warmup_steps: length of the warm-up.
        total_steps: optimiser steps of the whole run; None keeps the full rate after the warm-up.
    """
    return LambdaLR(optimizer, partial(_warmup_cosine_factor, warmup_steps=warmup_steps, total_steps=total_steps))


def _warmup_cosine_factor(step: int, *, warmup_steps: int, total_steps: int | None) -> float:
    """Computes the share of the full learning rate at a step, from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps is None:
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def constant_warmup_cosine(optimizer: Optimizer, *, warmup_epochs: int, epochs: int | None) -> LambdaLR:
    """Builds the schedule per epoch of CoOp's and CRoFT's code: 1e-5 at first, then each group's rate times a cosine.

    The cosine begins after the warm-up and has the length of the run, so that the run ends just before it reaches 0.

    Args:
        optimizer: optimiser whose rates are scaled.
        warmup_epochs: epochs at the constant rate.
        epochs: epochs of the whole run; None or -1 (unknown) keep the full rate after the warm-up.
    """
    return LambdaLR(
        optimizer, [partial(_epoch_factor, group["lr"], warmup_epochs, epochs) for group in optimizer.param_groups]
    )


def _epoch_factor(rate: float, warmup_epochs: int, epochs: int | None, epoch: int) -> float:
    if epoch < warmup_epochs:
        return WARMUP_RATE / rate
    if epochs is None or epochs < 0:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / epochs))
