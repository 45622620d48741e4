"""Learning-rate schedule shared by the methods."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


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
