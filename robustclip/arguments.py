"""Checks of constructor arguments against their type hints, for Python callers as the command line does.

`checked` wraps the constructor of one class, `Checked` those of a base class and all its subclasses. The supported
hints are ``int``, ``float``, ``bool``, ``str``, ``None``, ``Literal``, unions, lists, tuples, sequences, dictionaries,
callables, classes, and ``Annotated`` with an `Interval`. An argument with any other hint is not checked.

- Scalars of numpy and torch are numbers; true and false are not.
- Integers are not converted: ``2.0`` is refused for an integer; ``2`` becomes ``2.0`` for a number.
- Names such as ``linf`` must be spelled exactly; the message suggests the closest one.
- A list is accepted for a tuple, one item for a `Sequence` of such items, a path for a text.
"""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor

T = TypeVar("T")
LONGEST_VALUE = 80  # maximal number of characters of a refused value in a message


@dataclass(frozen=True)
class Interval:
    """A range of finite numbers, the metadata of an ``Annotated`` hint.

    Args:
        low: lower end, which is included.
        high: upper end, which is included unless it is infinite.
        excludes: ends that are not included.
    """

    low: float
    high: float = math.inf
    excludes: tuple[float, ...] = ()

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high and math.isfinite(number) and number not in self.excludes

    def __repr__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.low in self.excludes else 'at least'} {self.low:g}"
        left, right = "(" if self.low in self.excludes else "[", ")" if self.high in self.excludes else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


Count = Annotated[int, Interval(1)]
CountOrZero = Annotated[int, Interval(0)]
Positive = Annotated[float, Interval(0, excludes=(0,))]
NonNegative = Annotated[float, Interval(0)]
Share = Annotated[float, Interval(0, 1)]
ShareBelowOne = Annotated[float, Interval(0, 1, excludes=(1,))]
PositiveShare = Annotated[float, Interval(0, 1, excludes=(0,))]


class Checked:
    """Base class whose constructor is `checked`, as are those of all subclasses."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if inspect.isfunction(vars(cls).get("__init__")):
            checked(cls)


def checked(cls: type[T]) -> type[T]:
    """Wraps the constructor of a class so that it raises ValueError for an argument that does not fit its hint."""
    init: Any = cls.__init__
    parameters = [*inspect.signature(init).parameters.values()][1:]
    names = [parameter.name for parameter in parameters if parameter.kind < inspect.Parameter.VAR_POSITIONAL]
    defaults = {parameter.name: parameter.default for parameter in parameters}

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        __class__ = _Caller  # noqa: F841  # `save_hyperparameters` searches the frames above the constructor for it
        hints = _hints(init)

        def fit(name: str, value: Any) -> Any:
            if value is None and name not in hints and defaults.get(name) is inspect.Parameter.empty:
                # The command line passes None for such an argument if no value is given.
                raise ValueError(
                    f"{type(self).__name__}: {name} must be given; its type may be written behind its name"
                )
            is_default = value is defaults.get(name, hints)
            return value if is_default else argument(value, hints.get(name, Any), f"{type(self).__name__}: {name}")

        args = (*map(fit, names, args), *args[len(names) :])
        kwargs = {name: fit(name, value) for name, value in kwargs.items()}
        init(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


def argument(value: Any, hint: Any, name: str) -> Any:
    """Converts the value of an argument as `fitted` does.

    Args:
        value: value that the caller gave.
        hint: type of the argument.
        name: name of the argument, for the message.

    Raises:
        ValueError: the value does not fit; the message has the name, the expected type, and the value.
    """
    try:
        return fitted(value, hint)
    except _Unfit:
        raise ValueError(f"{name} must be {expected(hint)}, got {_excerpt(value)}{_remedy(value, hint)}") from None


def imported(path: str, option: str) -> Any:
    """Imports an object that an option names by its path.

    Args:
        path: such as ``my_module.MyClass``.
        option: name of the option, for the message.

    Raises:
        ValueError: nothing is found there.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = f"write module.Class and start where {module or 'the module'} lies"
        raise ValueError(f"{option}: there is no class {path!r}; {remedy} ({error})") from error


def class_at(path: str, base: type, option: str) -> Any:
    """Imports a class that an option names by its path.

    Args:
        path: such as ``my_module.MyClass``.
        base: class that it must extend.
        option: name of the option, for the message.

    Raises:
        ValueError: no class is found there, or one of another kind.
    """
    named = imported(path, option)
    if not (isinstance(named, type) and issubclass(named, base)):
        raise ValueError(f"{option}: {path!r} must be a subclass of {base.__module__}.{base.__name__}")
    return named


def fitted(value: Any, hint: Any) -> Any:
    """Converts a value to the type of a hint: scalars to Python's, lists to tuples.

    Args:
        value: value of an argument.
        hint: type of the argument; a value for an unsupported hint is returned unchanged.

    Raises:
        ValueError: the value does not fit.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first_fit(value, parts)
    if origin is Annotated:
        value = fitted(value, parts[0])
        _require(all(value in part for part in parts[1:] if isinstance(part, Interval)))
        return value
    if origin is Literal:
        value = _plain(value)
        choices = [choice for choice in parts if isinstance(value, type(choice)) and choice == value]
        _require(bool(choices))
        return choices[0]
    if hint in (int, float, bool):
        return _number(_plain(value), hint)
    if origin in (list, tuple, Sequence):
        return _items(value, origin, parts)
    if origin in (dict, Mapping):
        _require(isinstance(value, Mapping))
        pairs = {fitted(key, parts[0]): fitted(entry, parts[1]) for key, entry in value.items()}
        return value if all(entry is value.get(key, _Unfit) for key, entry in pairs.items()) else pairs
    kind = (str, PathLike) if hint is str else origin or hint
    _require(not isinstance(kind, type | tuple) or _is_instance(value, kind))
    return value.item() if isinstance(value, np.generic) else value


def expected(hint: Any) -> str:
    """Describes in words the values that fit a type hint."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(expected, parts)))
    if origin is Annotated:
        limits = [repr(part) for part in parts[1:] if isinstance(part, Interval)]
        return " ".join(limits if limits and parts[0] is float else [expected(parts[0]), *limits])
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (list, tuple, Sequence):
        inner = [expected(part) for part in parts if part is not Ellipsis]
        return f"a list of ({', '.join(inner)})" if len(inner) > 1 else f"a list, each {inner[0]}"
    if origin in (dict, Mapping):
        return f"a mapping of {expected(parts[0])} to {expected(parts[1])}"
    if origin is Callable:
        return "callable"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", NoneType: "null", Any: "any"}
    return words.get(hint) or str(getattr(hint, "__name__", hint))


class _Unfit(ValueError):  # noqa: N818  # a signal
    """Signals that a value does not fit a hint."""


class _Caller:
    """Signature of a constructor's wrapper, which Lightning reads together with its frame."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


@cache
def _hints(init: Any) -> dict[str, Any]:
    """Evaluates a constructor's hints at its first call, since they may use names that its module defines later."""
    try:
        return get_type_hints(init, include_extras=True)
    except Exception:  # a user's hints may raise anything
        return {}


def _require(is_met: bool) -> None:
    if not is_met:
        raise _Unfit


def _first_fit(value: Any, hints: Iterable[Any]) -> Any:
    """Fits a value to one of several hints, if possible to one that leaves it unchanged."""
    fits = []
    for hint in hints:
        try:
            fits.append(fitted(value, hint))
        except _Unfit:
            continue
        if fits[-1] is value:
            return value
    _require(bool(fits))
    return fits[0]


def _plain(value: Any) -> Any:
    is_scalar = isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0
    return value.item() if is_scalar else value


def _number(value: Any, kind: type) -> Any:
    if type(value) is kind:
        return value
    _require(kind is not bool and not isinstance(value, bool) and isinstance(value, Integral if kind is int else Real))
    try:
        return kind(value)
    except OverflowError:
        raise _Unfit from None


def _items(value: Any, kind: Any, hints: tuple[Any, ...]) -> Any:
    is_sequence = isinstance(value, list | tuple) or (kind is Sequence and isinstance(value, Sequence))
    if not is_sequence or isinstance(value, str | bytes):
        _require(kind is Sequence)
        return [fitted(value, hints[0])]
    if kind is tuple and hints[-1] is not Ellipsis:
        _require(len(value) == len(hints))
    else:
        hints = hints[:1] * len(value)
    items = list(map(fitted, value, hints))
    is_same = kind in (Sequence, type(value)) and all(map(lambda old, new: old is new, value, items))
    return value if is_same else tuple(items) if kind is tuple else items


def _is_instance(value: Any, kind: Any) -> bool:
    try:
        return isinstance(value, kind)
    except TypeError:  # Any, and protocols that cannot be checked
        return True


def _excerpt(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _remedy(value: Any, hint: Any) -> str:
    value = _plain(value)
    parts = [hint, *get_args(hint)]
    if isinstance(value, float) and value.is_integer() and expected(hint).startswith("an integer"):
        return f"; write {value:.0f}"
    if isinstance(value, str):
        choices = [str(choice) for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        close = difflib.get_close_matches(value.lower(), choices, n=1)
        if close:
            return f"; did you mean {close[0]!r}?"
        if any(get_origin(part) is list and str in get_args(part) for part in parts):
            return f"; write [{value!r}]"
    return ""
