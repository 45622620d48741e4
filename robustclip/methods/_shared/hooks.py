"""Checks that the functions which a subclass overrides take the arguments that they are called with."""

from inspect import Parameter, signature
from typing import Any

HOOKS = (
    *("training_loss", "parameter_groups", "idle_parameters"),
    *("image_features", "grid_features", "class_features", "head", "logits"),
)


def check_hooks(method: Any, base: type) -> None:
    """Calls each overridden function's signature with the arguments of the base class.

    Args:
        method: method with its model.
        base: class that documents the functions.

    Raises:
        ValueError: a function takes other arguments.
    """
    for name in HOOKS:
        if not callable(getattr(method, name)):
            raise ValueError(f"{type(method).__name__}.{name} must be a function, got {getattr(method, name)!r:.80}")
        expected, given = signature(getattr(base, name)), signature(getattr(method, name))
        _, *arguments = expected.parameters.values()
        required = [argument.name for argument in arguments if argument.default is Parameter.empty]
        optional = {argument.name: argument.default for argument in arguments if argument.name not in required}
        try:
            given.bind(*required, **optional)
        except TypeError as error:
            taken = ", ".join(map(str, arguments))
            raise ValueError(f"{type(method).__name__}.{name}{given} must take ({taken}): {error}") from error
