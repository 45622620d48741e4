"""Activation checkpointing: memory for time."""

from typing import Any

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel


def checkpoint_activations(visual: Any) -> None:
    """Lets an image tower of open_clip keep what enters a block and recompute the rest in the backward pass.

    Training and attacks then take the memory of about one block's activations, and another forward pass. BatchNorm
    that counts would count a batch in both passes; see ``has_fixed_batch_norm``.

    Raises:
        ValueError: a tower that does not offer it.
    """
    # open_clip's own switch does nothing in a ModifiedResNet, and where a trunk of timm refuses it only logs.
    tower = visual.trunk if isinstance(visual, TimmModel) else visual
    try:
        if isinstance(visual, ModifiedResNet):
            raise AssertionError
        tower.set_grad_checkpointing(True)
    except AssertionError:
        name = type(tower).__name__
        raise ValueError(f"has_activation_checkpointing must be false for a {name}, which cannot recompute") from None
