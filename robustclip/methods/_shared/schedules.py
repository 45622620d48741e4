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
        trainer: of the fit.
        schedule: ``cosine`` or ``constant``.

    Raises:
        ValueError: the schedule is a cosine, and the trainer limits neither epochs nor steps.
    """
    if schedule == "cosine" and trainer.max_epochs == trainer.max_steps == -1:
        raise ValueError(NO_END)


def steps_of_run(trainer: Trainer, schedule: str) -> int | None:
    """Number of optimiser steps that a schedule over the whole run needs; None for a constant one.

    Args:
        trainer: of the fit.
        schedule: ``cosine`` or ``constant``.

    Raises:
        ValueError: the schedule is a cosine, and the number of steps is unknown.
    """
    check_end(trainer, schedule)
    total = int(trainer.estimated_stepping_batches) if schedule == "cosine" else None
    if total == -1:  # Lightning's for data without a length where no number of steps is set
        raise ValueError(NO_END)
    return total


def warmup_cosine(optimizer: Optimizer, *, warmup_steps: int, total_steps: int | None) -> LambdaLR:
    """Per step: linear warm-up to each group's rate, then a cosine to 0 (TeCoA's schedule).

    Args:
        optimizer: whose rates are scaled.
        warmup_steps: length of the warm-up.
        total_steps: optimiser steps of the whole run; None keeps the full rate after the warm-up.
    """
    return LambdaLR(optimizer, partial(warmup_cosine_factor, warmup_steps=warmup_steps, total_steps=total_steps))


def warmup_cosine_factor(step: int, *, warmup_steps: int, total_steps: int | None) -> float:
    """Share of the full learning rate at a 0-based step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps is None:
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def constant_warmup_cosine(optimizer: Optimizer, *, warmup_epochs: int, epochs: int | None) -> LambdaLR:
    """Per epoch: 1e-5 at first, then each group's rate times a cosine (the schedule of CoOp's and CRoFT's code).

    The cosine begins after the warm-up and lasts as long as the run, so that the run ends just before it reaches 0.

    Args:
        optimizer: whose rates are scaled.
        warmup_epochs: epochs at the constant rate.
        epochs: of the whole run; None or -1, which do not tell its end, keep the full rate after the warm-up.
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
