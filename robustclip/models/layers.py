"""Layers of a tower: which of them learn, normalisation parameters, and activation checkpointing."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import nn

from robustclip.models.clip import BatchNorm

NormFilter = Literal["official", "all"]
NORMS = (nn.LayerNorm, BatchNorm, nn.GroupNorm, nn.RMSNorm)  # timm's own are subclasses


def norm_parameters(visual: nn.Module, norm_filter: NormFilter) -> list[nn.Parameter]:
    """Those of an image tower, in its order.

    Args:
        visual: the tower.
        norm_filter: ``official`` takes what has "bn" or "ln" in its name, as in OpenAI's towers, but for the norms of a
            ResNet's shortcuts; ``all`` takes every layer of a kind that is known.

    Raises:
        ValueError: a filter that lets nothing through.
    """
    if norm_filter == "official":
        found = [each for name, each in visual.named_parameters() if "bn" in name or "ln" in name]
    else:
        norms = (module for module in visual.modules() if isinstance(module, NORMS))
        found = [parameter for norm in norms for parameter in norm.parameters(recurse=False)]
    if not found:
        raise ValueError(f"norm_filter {norm_filter!r} finds no norm in a {type(visual).__name__}; take 'all'")
    return found


def learning_parameters(model: nn.Module, groups: Any) -> list[nn.Parameter]:
    """Parameters of optimiser groups, in their order.

    Args:
        model: whose parameters they must be.
        groups: result of ``parameter_groups()``.

    Raises:
        ValueError: no list of dicts with ``params``, a parameter that occurs twice, or one that is not of the model.
    """
    where = f"{type(model).__name__}.parameter_groups()"
    if not isinstance(groups, list | tuple) or not all(
        isinstance(each, Mapping) and "params" in each for each in groups
    ):
        raise ValueError(f"{where} must return a list of dicts such as {{'params': [...]}}, got {groups!r:.80}")
    parameters = [parameter for group in groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: set[int] = set()
    for parameter in parameters:
        if id(parameter) not in names:
            raise ValueError(f"{where} has a value that is no parameter of the module, got {parameter!r:.80}")
        if id(parameter) in seen:
            raise ValueError(f"{where} has {names[id(parameter)]!r} twice; a parameter belongs to one group")
        seen.add(id(parameter))
    return parameters


def learn_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Leaves gradients to these parameters of the model alone."""
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; every flag is put back after, also after an error.

    Some attacks call ``backward()``: without this their gradients would land in the parameters.
    """
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module in training:
        module.training = False
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


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
