"""Which parameters learn, and attacks that look at a model without touching it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


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
