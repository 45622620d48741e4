"""Which parameters learn, and attacks that look at a model without touching it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


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
