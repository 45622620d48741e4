"""Checks one value of a configuration against a type."""

from typing import Any

from jsonargparse import ArgumentError, ArgumentParser


def check_value(key: str, value: Any, kind: Any) -> None:
    """Parses a value as the parser of a run would.

    Args:
        key: dotted key of the value.
        value: value of a configuration, or the text of an option.
        kind: type hint.

    Raises:
        ArgumentError: the value has another type; the message names the key.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--entry", type=kind)
    try:
        parser.parse_object({"entry": value})
    except ArgumentError as error:
        raise ArgumentError(None, str(error).replace('Parser key "entry"', f'Parser key "{key}"', 1)) from error
