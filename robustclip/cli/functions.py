"""Runs functions as commands: the signature is the command line, the docstring is its help.

A parameter without a default is given by position or by name, any other by name. A list is given by repeating its name,
a dataclass by its fields. Unknown options go to the function's ``*options``, if it has such a parameter.
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
        name: name on the command line.
        hint: type.
        default: default value; `inspect.Parameter.empty` for none.
        text: help.
        is_positional: it may be given without its name.
    """

    name: str
    hint: Any
    default: Any
    text: str
    is_positional: bool

    @property
    def is_list(self) -> bool:
        """Whether the parameter takes several values."""
        return get_origin(self.hint) in (list, Sequence)

    @property
    def is_path(self) -> bool:
        """Whether the parameter takes a path, several paths or a path or None."""
        return Path in (self.hint, *get_args(self.hint))


class Parser(AnsweringParser, ArgumentParser):
    """Parses the arguments of one command."""


def find(target: str, separator: str = ":") -> Function:
    """Imports a function; the user's modules are found in the current folder.

    Args:
        target: module and function.
        separator: character between the two.

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


def call(function: Function, arguments: Sequence[str], command: str) -> int:
    """Calls a function with the arguments of a command line.

    Args:
        function: function whose parameters have type hints.
        arguments: arguments behind the command.
        command: name for the help.

    Returns:
        Exit status: 1 after a function that returns a number of faults above 0, else 0.
    """
    signature, hints = inspect.signature(function), get_type_hints(function)
    names = {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}
    parameters = [
        parameter._replace(is_positional=parameter.is_positional and parameter.name not in names)
        for parameter in _parameters(function)
    ]
    takes_options = any(entry.kind is entry.VAR_POSITIONAL for entry in signature.parameters.values())
    own, options = _split(arguments, parameters) if takes_options else (list(arguments), [])
    values = vars(_parser(function, parameters, command).parse_args(own))
    for parameter in parameters:
        name, value = parameter.name, values[parameter.name]
        if parameter.is_path and value is not None:
            values[name] = [local_path(path, name) for path in value] if parameter.is_list else local_path(value, name)
    for name in signature.parameters:
        group: Any = hints.get(name)
        if isinstance(group, type) and is_dataclass(group):
            values[name] = group(**{field: values.pop(field) for field in inspect.signature(group).parameters})
    bound = signature.bind_partial(**values)
    faults = function(*bound.args, *options, **bound.kwargs)
    return int(isinstance(faults, int) and not isinstance(faults, bool) and faults > 0)


def _parameters(function: Function, is_field: bool = False) -> Iterator[Parameter]:
    hints, documented = get_type_hints(function), docstring_parser.parse(inspect.getdoc(function) or "").params
    texts = {entry.arg_name: entry.description or "" for entry in documented}
    for name, parameter in inspect.signature(function).parameters.items():
        hint: Any = hints.get(name, str)
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _parameters(hint, is_field=True)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            is_positional = parameter.default is parameter.empty and not is_field
            yield Parameter(name, hint, parameter.default, texts.get(name, ""), is_positional)


def _parser(function: Function, parameters: Sequence[Parameter], command: str) -> Parser:
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    text = "\n\n".join(filter(None, (doc.short_description, doc.long_description)))
    parser = Parser(prog=f"robustclip {command}", description=text, exit_on_error=False)
    for parameter in parameters:
        name, hint, default, text, is_positional = parameter
        # A path is parsed as text: jsonargparse would take a file for a configuration or a list of paths.
        kind = str if parameter.is_path else get_args(hint)[0] if parameter.is_list else hint
        options: dict[str, Any] = {"type": kind, "help": text.replace("%", "%%")}
        if parameter.is_list:
            options |= {"nargs": "+"} if is_positional else {"action": "append"}
        if default is not inspect.Parameter.empty:
            options["default"] = (
                list(default) if parameter.is_list else str(default) if isinstance(default, Path) else default
            )
        elif not is_positional:
            options["required"] = True
        parser.add_argument(name if is_positional else f"--{name}", **options)
    return parser


def _split(arguments: Sequence[str], parameters: Sequence[Parameter]) -> tuple[list[str], list[str]]:
    """Separates the arguments of a command from the options of ``fit`` or ``test``."""
    rest, options, names = list(arguments), list[str](), {f"--{parameter.name}" for parameter in parameters}
    count = sum(parameter.is_positional for parameter in parameters)
    own = [rest.pop(0) for argument in arguments[:count] if not argument.startswith("-")]
    while rest:
        argument = rest.pop(0)
        is_own = argument in HELP or argument.partition("=")[0] in names
        (own if is_own else options).append(argument)
        if argument in names and rest:
            own.append(rest.pop(0))
    return own, options
