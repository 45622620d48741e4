"""Parameters of a tower that are trained or frozen, normalisation layers, and activation checkpointing."""

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
    """Lists the parameters of the normalisation layers of an image tower, in its order.

    Args:
        visual: image tower.
        norm_filter: ``official`` selects names that contain "bn" or "ln", as in OpenAI's towers, which omits the norms
            of a ResNet's shortcuts; ``all`` selects every layer of a known kind.

    Raises:
        ValueError: the filter selects nothing.
    """
    if norm_filter == "official":
        norms = [parameter for name, parameter in visual.named_parameters() if "bn" in name or "ln" in name]
    else:
        layers = (module for module in visual.modules() if isinstance(module, NORMS))
        norms = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    if not norms:
        raise ValueError(f"norm_filter {norm_filter!r} finds no norm in a {type(visual).__name__}; take 'all'")
    return norms


def trained_parameters(model: nn.Module, groups: Any) -> list[nn.Parameter]:
    """Checks optimiser groups and lists their parameters, in their order.

    Args:
        model: module that owns the parameters.
        groups: result of ``parameter_groups()``.

    Raises:
        ValueError: the groups are no list of dicts with ``params``, or a parameter occurs twice or is not the model's.
    """
    where = f"{type(model).__name__}.parameter_groups()"
    entries = groups if isinstance(groups, list | tuple) else [groups]
    if entries is not groups or not all(isinstance(entry, Mapping) and "params" in entry for entry in entries):
        kinds = (f"dict of {[*entry]}" if isinstance(entry, Mapping) else type(entry).__name__ for entry in entries)
        got = ", ".join(dict.fromkeys(kinds))
        raise ValueError(f"{where} must return a list of dicts such as {{'params': [...]}}, got {got}")
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


def train_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Freezes the model except for the given parameters.

    Args:
        model: module to freeze.
        parameters: parameters that get gradients.
    """
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freezes a model inside the context, in eval mode; every flag is restored afterwards, also after an error.

    Some attacks call ``backward()``, which would otherwise leave gradients in the parameters.
    """
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module in training:
        module.training = False
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_(True)


def checkpoint_activations(visual: Any) -> None:
    """Makes an image tower of open_clip store only the inputs of its blocks and recompute the rest in backward passes.

    Training and attacks then need the memory of about one block's activations, and another forward pass. BatchNorm
    that is not fixed would count a batch in both passes; see ``has_fixed_batch_norm``.

    Raises:
        ValueError: the tower does not support it.
    """
    # open_clip's own switch has no effect on a ModifiedResNet, and only logs when a trunk of timm refuses.
    tower = visual.trunk if isinstance(visual, TimmModel) else visual
    try:
        if isinstance(visual, ModifiedResNet):
            raise AssertionError  # the exception by which open_clip's other towers refuse
        tower.set_grad_checkpointing(True)
    except AssertionError:
        name = type(tower).__name__
        raise ValueError(f"has_activation_checkpointing must be false for a {name}, which cannot recompute") from None
