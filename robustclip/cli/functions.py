"""Functions as commands: the signature is the command line, the docstring is its help.

A parameter without a default is given by position or by name, any other by name. A list is given by repeating its name,
a dataclass by its fields. Options that the function does not know go to its ``*options``, if it has such a parameter.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser

from robustclip.cli.messages import AnsweringParser
from robustclip.paths import local_path

HELP = ("-h", "--help")
Function = Callable[..., Any]


class Parameter(NamedTuple):
    """A parameter of a function or a field of its dataclass.

    Attributes:
        name: on the command line.
        hint: its type.
        default: `inspect.Parameter.empty` for none.
        text: help.
        is_positional: it may be given without its name.
    """

    name: str
    hint: Any
    default: Any
    text: str
    is_positional: bool


class Parser(AnsweringParser, ArgumentParser):
    """Parses the arguments of one command."""


def find(target: str, separator: str = ":") -> Function:
    """Imports a function; a module of the user may lie in the current folder.

    Args:
        target: module and function.
        separator: between the two.

    Raises:
        ValueError: no such module or function.
    """
    module, _, name = target.rpartition(separator)
    sys.path.insert(0, str(Path.cwd()))
    try:
        function: Function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no command {target!r}: {error}") from error
    return function


def call(function: Function, words: Sequence[str], command: str) -> int:
    """Calls a function with the arguments of a command line.

    Args:
        function: its parameters have type hints.
        words: of the command line.
        command: name for the help.

    Returns:
        Exit status: 1 after a function that returns a number of faults above 0, else 0.
    """
    signature, hints = inspect.signature(function), get_type_hints(function)
    named = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    parameters = [each._replace(is_positional=each.is_positional and each.name not in named)
                  for each in _parameters(function)]  # fmt: skip
    takes_options = any(each.kind is each.VAR_POSITIONAL for each in signature.parameters.values())
    own, options = _split(words, parameters) if takes_options else (list(words), [])
    values = vars(_parser(function, parameters, command).parse_args(own))
    for name, hint, *_ in parameters:
        if Path in (hint, *get_args(hint)) and values[name] is not None:
            is_list = isinstance(values[name], list)
            values[name] = (
                [local_path(each, name) for each in values[name]] if is_list else local_path(values[name], name)
            )
    for name in signature.parameters:
        made: Any = hints.get(name)
        if _is_group(made):
            values[name] = made(**{field: values.pop(field) for field in inspect.signature(made).parameters})
    bound = signature.bind_partial(**values)
    faults = function(*bound.args, *options, **bound.kwargs)
    return int(isinstance(faults, int) and not isinstance(faults, bool) and faults > 0)


def _parameters(function: Function, is_field: bool = False) -> Iterator[Parameter]:
    hints, documented = get_type_hints(function), docstring_parser.parse(inspect.getdoc(function) or "").params
    texts = {each.arg_name: each.description or "" for each in documented}
    for name, parameter in inspect.signature(function).parameters.items():
        hint: Any = hints.get(name, str)
        if _is_group(hint):
            yield from _parameters(hint, is_field=True)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            is_positional = parameter.default is parameter.empty and not is_field
            yield Parameter(name, hint, parameter.default, texts.get(name, ""), is_positional)


def _is_group(hint: Any) -> bool:
    return is_dataclass(hint)


def _parser(function: Function, parameters: Sequence[Parameter], command: str) -> Parser:
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    text = "\n\n".join(filter(None, (doc.short_description, doc.long_description)))
    parser = Parser(prog=f"robustclip {command}", description=text, exit_on_error=False)
    for name, hint, default, text, is_positional in parameters:
        is_list = get_origin(hint) in (list, Sequence)
        # A path is parsed as text: jsonargparse would take a file for a configuration or a list of paths.
        kind = str if Path in (hint, *get_args(hint)) else get_args(hint)[0] if is_list else hint
        options: dict[str, Any] = {"type": kind, "help": text.replace("%", "%%")}
        if is_list:
            options |= {"nargs": "+"} if is_positional else {"action": "append"}
        if default is not inspect.Parameter.empty:
            options["default"] = list(default) if is_list else str(default) if isinstance(default, Path) else default
        elif not is_positional:
            options["required"] = True
        parser.add_argument(name if is_positional else f"--{name}", **options)
    return parser


def _split(words: Sequence[str], parameters: Sequence[Parameter]) -> tuple[list[str], list[str]]:
    """Separates the words of a command from options of ``fit`` or ``test``, which it hands on."""
    rest, options, names = list(words), list[str](), {f"--{each.name}" for each in parameters}
    count = sum(each.is_positional for each in parameters)
    own = [rest.pop(0) for word in words[:count] if not word.startswith("-")]
    while rest:
        word = rest.pop(0)
        is_own = word in HELP or word.partition("=")[0] in names
        (own if is_own else options).append(word)
        if word in names and rest:
            own.append(rest.pop(0))
    return own, options
