"""Checks of functions that a user's subclass overrides: their arguments and the shapes that they return."""

from collections.abc import Iterable
from inspect import Parameter, signature
from typing import Any


def check_overrides(owner: Any, base: type, names: Iterable[str]) -> None:
    """Calls each function's signature with the arguments of the base class.

    Args:
        owner: object whose class may override the functions.
        base: class that documents them.
        names: names of the functions.

    Raises:
        ValueError: a function takes other arguments.
    """
    for name in names:
        if not callable(getattr(owner, name)):
            raise ValueError(f"{type(owner).__name__}.{name} must be a function, got {getattr(owner, name)!r:.80}")
        expected, given = signature(getattr(base, name)), signature(getattr(owner, name))
        _, *arguments = expected.parameters.values()
        required = [argument for argument in arguments if argument.default is Parameter.empty]
        by_position = [argument.name for argument in required if argument.kind is not Parameter.KEYWORD_ONLY]
        by_name = {argument.name: argument.default for argument in arguments if argument.name not in by_position}
        try:
            given.bind(*by_position, **by_name)
        except TypeError as error:
            taken = ", ".join(map(str, arguments))
            raise ValueError(f"{type(owner).__name__}.{name}{given} must take ({taken}): {error}") from error


def check_shape(owner: Any, name: str, answer: Any, expected: tuple[int, ...], meaning: str) -> None:
    """Checks what an overridden function returned.

    Args:
        owner: object whose class overrides the function.
        name: name of the function.
        answer: what it returned.
        expected: shape of the tensor that it should return.
        meaning: words for the shape, as ``(B, C)``.

    Raises:
        ValueError: the answer is no tensor, or one of another shape.
    """
    shape = getattr(answer, "shape", None)
    if shape is None or tuple(shape) != expected or not hasattr(answer, "requires_grad"):
        given = type(answer).__name__ if shape is None else f"{type(answer).__name__} of shape {tuple(shape)}"
        where = f"{type(owner).__name__}.{name}"
        raise ValueError(f"{where} must return a tensor of shape {meaning}, here {expected}, got {given}")
