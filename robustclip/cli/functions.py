"""Runs functions as commands: the signature is the command line, the docstring is its help.

A parameter without a default, or before a "/", is given by position or by name, any other by name. A list is given by
repeating its name, a dataclass by its fields. Unknown options go to the function's ``*options``, if it has such a
parameter.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser

from robustclip.cli.messages import AnsweringParser
from robustclip.paths import local_path

HELP = ("-h", "--help")
Function = Callable[..., Any]


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
    signature, groups = inspect.signature(function), _groups(function)
    names = {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}
    parameters = [
        entry.replace(kind=entry.KEYWORD_ONLY) if entry.name in names else entry
        for entry in _parameters(function, groups)
    ]
    own, options = _split(arguments, parameters) if _takes_options(function) else (list(arguments), [])
    values = vars(_parser([function, *groups.values()], parameters, command).parse_args(own))
    for parameter in parameters:
        name, value = parameter.name, values[parameter.name]
        if _is_path(parameter) and value is not None:
            paths = [local_path(path, name) for path in (value if _is_list(parameter) else [value])]
            values[name] = paths if _is_list(parameter) else paths[0]
    for name, group in groups.items():
        values[name] = group(**{field: values.pop(field) for field in inspect.signature(group).parameters})
    first = [values.pop(name) for name, entry in signature.parameters.items() if entry.kind is entry.POSITIONAL_ONLY]
    bound = signature.bind_partial(*first, **values)
    faults = function(*bound.args, *options, **bound.kwargs)
    return int(isinstance(faults, int) and not isinstance(faults, bool) and faults > 0)


def options_of(function: Function) -> tuple[list[str], bool]:
    """Returns the names of a command's parameters, and whether it takes the options of a run too."""
    return [parameter.name for parameter in _parameters(function, _groups(function))], _takes_options(function)


def _groups(function: Function) -> dict[str, Any]:
    """Returns the dataclasses among the types of the parameters, by the parameters' names."""
    hints = get_type_hints(function)
    return {name: hints[name] for name in inspect.signature(function).parameters if is_dataclass(hints.get(name))}


def _takes_options(function: Function) -> bool:
    return any(entry.kind is entry.VAR_POSITIONAL for entry in inspect.signature(function).parameters.values())


def _parameters(function: Function, groups: Mapping[str, Any]) -> Iterator[inspect.Parameter]:
    """Yields the parameters of a command with their types; one that may be given without its name is positional."""
    hints = get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            yield from (field.replace(kind=field.KEYWORD_ONLY) for field in _parameters(groups[name], {}))
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            is_positional = parameter.kind is parameter.POSITIONAL_ONLY or parameter.default is parameter.empty
            kind = parameter.POSITIONAL_ONLY if is_positional else parameter.KEYWORD_ONLY
            yield parameter.replace(annotation=hints.get(name, str), kind=kind)


def _parser(documented: Sequence[Function], parameters: Sequence[inspect.Parameter], command: str) -> Parser:
    docs = [docstring_parser.parse(inspect.getdoc(owner) or "") for owner in documented]
    texts = {entry.arg_name: entry.description or "" for doc in docs for entry in doc.params}
    text = "\n\n".join(filter(None, (docs[0].short_description, docs[0].long_description)))
    parser = Parser(prog=f"robustclip {command}", description=text, exit_on_error=False)
    for parameter in parameters:
        name, hint, default = parameter.name, parameter.annotation, parameter.default
        is_positional = parameter.kind is parameter.POSITIONAL_ONLY
        # A path is parsed as text: jsonargparse would take a file for a configuration or a list of paths.
        kind = str if _is_path(parameter) else get_args(hint)[0] if _is_list(parameter) else hint
        options: dict[str, Any] = {"type": kind, "help": texts.get(name, "").replace("%", "%%")}
        if _is_list(parameter):
            options |= {"nargs": "+"} if is_positional else {"action": "append"}
        if default is not inspect.Parameter.empty:
            options |= {"nargs": "?"} if is_positional else {}
            options["default"] = (
                list(default) if _is_list(parameter) else str(default) if isinstance(default, Path) else default
            )
        elif not is_positional:
            options["required"] = True
        parser.add_argument(name if is_positional else f"--{name}", **options)
    return parser


def _is_list(parameter: inspect.Parameter) -> bool:
    return get_origin(parameter.annotation) in (list, Sequence)


def _is_path(parameter: inspect.Parameter) -> bool:
    """Whether a parameter takes a path, several paths, or a path or None."""
    return Path in (parameter.annotation, *get_args(parameter.annotation))


def _split(arguments: Sequence[str], parameters: Sequence[inspect.Parameter]) -> tuple[list[str], list[str]]:
    """Separates the arguments of a command from the options of ``fit`` or ``test``."""
    rest, options, names = list(arguments), list[str](), {f"--{parameter.name}" for parameter in parameters}
    count = sum(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters)
    if any(_is_list(parameter) and parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters):
        count = next((place for place, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    own = [rest.pop(0) for argument in arguments[:count] if not argument.startswith("-")]
    while rest:
        argument = rest.pop(0)
        is_own = argument in HELP or argument.partition("=")[0] in names
        (own if is_own else options).append(argument)
        if argument in names and rest:
            own.append(rest.pop(0))
    return own, options
