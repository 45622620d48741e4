"""Checks of a training step: the terms of its loss, their values, and their gradients."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

log = logging.getLogger(__name__)
REMEDY = "lower the learning rate or clip gradients (--trainer.gradient_clip_val)"
CHECK_EVERY_STEPS = 50  # on an accelerator, where reading a value waits for all kernels before it


def check_attacked(method: Any) -> None:
    """Warns after the first epoch of a method that has a training attack and never runs it."""
    if method.attack is not None and not method.has_attacked and method.current_epoch == 0:
        log.warning(
            "%s has trained without its attack, since training_loss does not call self.perturb(batch); exported models"
            " will state no attack: call it, or give --model.attack null",
            type(method).__name__,
        )


class DivergenceWatch:
    """Records, on the device, the step in which each term of the loss was first not finite.

    `note` reads no value back, so that the accelerator need not wait; `check` reads the values and raises.
    """

    def __init__(self) -> None:
        self._first: dict[tuple[str, ...], Tensor] = {}  # names of terms -> first step of each, -1 while it is finite
        self._count = 0

    def note(self, names: tuple[str, ...], values: Tensor, step: int) -> bool:
        """Records one step, and returns whether a `check` is due.

        Args:
            names: names of the T terms.
            values: ``(T,)``, one per name.
            step: number of optimiser steps before this one.
        """
        first = self._first.get(names)
        if first is None:
            first = torch.full(values.shape, -1, device=values.device)
        self._first[names] = torch.where(values.isfinite() | (first >= 0), first, step)
        self._count += 1
        return values.device.type == "cpu" or self._count % CHECK_EVERY_STEPS == 0

    def check(self, trainer: Trainer) -> None:
        """Stops all processes if a term was not finite in any of them.

        Args:
            trainer: trainer of the fit; all its processes must call this together.

        Raises:
            ValueError: a term was not finite; the message names it, the first such step and the last good checkpoint.
        """
        steps = [
            (step, name)
            for names, first in self._first.items()
            for step, name in zip(first.tolist(), names, strict=True)
            if step >= 0
        ]
        # All processes vote, since one that raised alone would leave the others waiting in their next collective.
        if not trainer.strategy.reduce_boolean_decision(bool(steps), all=False):
            return
        parts = [steps]
        if trainer.world_size > 1:
            parts = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, steps)
        step, name = min((failure for part in parts for failure in part), key=lambda failure: failure[0])
        raise ValueError(
            f"the fit diverged: {name} is not finite in training step {step + 1}; {last_good_checkpoint(trainer)};"
            f" {REMEDY}"
        )


def check_weights(method: LightningModule, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuses weights that are not finite, which a step may produce although its loss is finite.

    Args:
        method: method with its trainer.
        groups: optimiser groups of the trained parameters.

    Raises:
        ValueError: a parameter is not finite; the message names it and the last good checkpoint.
    """
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    weights = {name: parameter.detach() for name, parameter in method.named_parameters() if id(parameter) in trained}
    if not weights:
        return
    is_finite = torch.stack([weight.isfinite().all() for weight in weights.values()]).tolist()
    bad = [name for name, is_good in zip(weights, is_finite, strict=True) if not is_good]
    if bad:
        raise ValueError(
            f"the fit diverged: {bad[0]} and {len(bad) - 1} more of {len(weights)} parameters are not finite after"
            f" training step {method.trainer.global_step}; {last_good_checkpoint(method.trainer)}; {REMEDY}"
        )


def last_good_checkpoint(trainer: Trainer) -> str:
    """Describes the checkpoint that was written last; checkpoints are written only if all weights are finite."""
    written = [getattr(callback, "_last_checkpoint_saved", "") for callback in trainer.checkpoint_callbacks]
    paths = [str(path) for path in (*written, trainer.ckpt_path) if path and Path(path).is_file()]
    return f"the last good checkpoint is {paths[0]}" if paths else "no checkpoint was written before"


def check_terms(terms: Any, method: LightningModule) -> None:
    """Checks the result of ``training_loss`` against its contract.

    Args:
        terms: must map names to scalar tensors on the method's device, with a gradient.
        method: method whose ``training_loss`` returned the terms.

    Raises:
        ValueError: the terms break the contract; the message names the method, the term and the expected type.
    """
    name = f"{type(method).__name__}.training_loss"
    if not isinstance(terms, Mapping) or not terms:
        raise ValueError(f"{name} must return a dict of scalar tensors such as {{'ce': loss}}, got {_describe(terms)}")
    for key, term in terms.items():
        is_scalar = isinstance(term, Tensor) and term.ndim == 0 and term.is_floating_point()
        if not isinstance(key, str) or not is_scalar:
            raise ValueError(f"{name}: term {key!r} must be a scalar floating-point tensor, got {_describe(term)}")
        if term.device != method.device:
            raise ValueError(f"{name}: term {key!r} must be on {method.device}, got a tensor on {term.device}")
    if torch.is_grad_enabled() and not any(term.requires_grad for term in terms.values()):
        raise ValueError(
            f"{name}: no term has a gradient, got {', '.join(terms)}, all detached or of frozen parameters;"
            " compute a term from the parameters of parameter_groups()"
        )


def check_gradients(method: LightningModule, optimizer: Optimizer, idle: Iterable[nn.Parameter]) -> bool:
    """Refuses the first step of an optimiser if one of its parameters has no gradient; returns whether any has one.

    Args:
        method: method that owns the parameters.
        optimizer: optimiser before its first step.
        idle: parameters that may have no gradient in this step.

    Raises:
        ValueError: a parameter has no gradient; the message names the first.
    """
    if not isinstance(method.trainer.strategy, SingleDeviceStrategy | DDPStrategy):  # others keep gradients elsewhere
        return True
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if all(parameter.grad is None for parameter in parameters):  # a training step may return None to be skipped
        return False
    allowed = {id(parameter) for parameter in idle}
    without = {id(parameter) for parameter in parameters if parameter.grad is None} - allowed
    names = [name for name, parameter in method.named_parameters() if id(parameter) in without]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"{type(method).__name__}: parameter {names[0]!r}{more} of parameter_groups() got no gradient in the first"
            " step; use it in training_loss, leave it out, or return it from idle_parameters()"
        )
    return True


def check_manual_step(method: LightningModule, *, is_epoch_over: bool) -> None:
    """Refuses manual optimisation without an optimiser step: such a fit trains nothing and may never end.

    Args:
        method: method after a training batch.
        is_epoch_over: also refuse gradients that no step has used in a whole epoch.

    Raises:
        ValueError: there was neither a step nor a gradient.
    """
    if method.automatic_optimization or method.trainer.global_step:
        return
    if is_epoch_over or all(parameter.grad is None for parameter in method.parameters()):
        raise ValueError(
            f"{type(method).__name__} sets automatic_optimization to False, so its training_step must call"
            " manual_backward and step self.optimizers(); it made no optimiser step"
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r:.60}"
