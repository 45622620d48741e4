"""Reads configuration files and command lines."""

import codecs
import locale
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import yaml

from robustclip.textfiles import read_text
from robustclip.tools.configs import packaged, remedy

SECTIONS = ("trainer", "data", "model", "evaluation", "results", "checkpoint")
SUFFIXES = (".yaml", ".yml", ".json")
WITHOUT_VALUE = ("--", "--help", "--version", "--print_config", "--print_shtab")
MOST_VALUES = 20_000  # of one file; only an alias that contains itself has more

Place = tuple[Any, ...]


class _StrictLoader(yaml.SafeLoader):
    """Loads YAML and refuses a repeated key, as the standard demands; PyYAML silently takes the last value."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compares the keys of a mapping as written."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                problem = f"key {key.value!r} occurs twice, first in line {lines[key.value]}, again"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[str(key.value)] = key.start_mark.line + 1
        return node


def read_config(path: Path) -> dict[str, Any]:
    """Reads a configuration and the files that its sections name.

    Args:
        path: YAML file.

    Raises:
        ValueError: no such file, no mapping in YAML, a repeated key, or a value that contains itself.
    """
    tree = _read(path)
    for place, value in list(places(tree)):
        if not isinstance(value, str) or not value.endswith(SUFFIXES):
            continue
        part, is_section = path.parent / value, len(place) == 1 and place[0] in SECTIONS
        if not part.is_file() and is_section:
            raise ValueError(f"{place[0]}: {value!r} is no file; paths inside a config start at that config, {path}")
        if part.is_file():
            content = _read(part)
            tree |= {place[0]: content} if is_section else {}
    return tree


def options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields key and value of each option of a command line."""
    for argument, following in pairwise([*arguments, ""]):
        key, sign, value = argument.partition("=")
        if key.startswith("--") or key == "-c":
            yield "config" if key == "-c" else key[2:], value if sign else following


def configurations(arguments: Sequence[str]) -> list[str]:
    """Returns the options of a command line that name configurations."""
    return [f"--config={value}" for key, value in options(arguments) if key == "config"]


def located(arguments: Sequence[str]) -> list[str]:
    """Replaces names of packaged configurations by their paths, and reports each replacement on stderr.

    Args:
        arguments: arguments of the command line.
    """
    written = list(arguments)
    for place, argument in enumerate(arguments):
        key, sign, value = argument.partition("=")
        option = "config" if key == "-c" else key.removeprefix("--")
        if not sign:
            value = next(iter(arguments[place + 1 : place + 2]), "")
        path = packaged(option, value) if key.startswith("-") else None
        if path is not None:
            sys.stderr.write(f"{option}: {value} of the package, {path}\n")
            written[place if sign else place + 1] = f"{key}={path}" if sign else str(path)
    return written


def joined(arguments: Sequence[str]) -> list[str]:
    """Writes ``--KEY -1`` as ``--KEY=-1``, since the parser would read the value as an option.

    Args:
        arguments: arguments of the command line.

    Raises:
        ValueError: an option without a value; the parser would only name its section.
    """
    rest, written = list(arguments), []
    while rest:
        key = rest.pop(0)
        if not key.startswith("--") or "=" in key or key in WITHOUT_VALUE or key.endswith(".help"):
            written.append(key)
            continue
        value = rest.pop(0) if rest else "--"
        if value.startswith("--") or value in ("-c", "-h"):
            raise ValueError(f"{key[2:]}: a value is missing; `robustclip COMMAND --help` lists the valid ones")
        written += [f"{key}={value}"] if value.startswith("-") else [key, value]
    return written


def parse(text: str, name: str) -> Any:
    """Reads YAML or JSON.

    Args:
        text: content of a file or value of an option.
        name: name of the file or option.

    Raises:
        ValueError: no YAML, a repeated key, or a value that contains itself.
    """
    try:
        content = yaml.load(text, _StrictLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{name} is no YAML: {error.problem}{mark}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # dates that do not exist, control characters
        raise ValueError(f"{name} is no YAML: {error}") from error
    if sum(1 for _ in islice(places(content), MOST_VALUES)) == MOST_VALUES:
        raise ValueError(f"{name} holds {MOST_VALUES:,} values or more; does an alias contain itself?")
    return content


def places(tree: Any) -> Iterator[tuple[Place, Any]]:
    """Yields the keys and the value of every entry of nested mappings and lists, outer entries first."""
    queue: deque[tuple[Place, Any]] = deque([((), tree)])
    while queue:
        place, value = queue.popleft()
        if place:
            yield place, value
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        queue.extend(((*place, key), entry) for key, entry in pairs)


def get(tree: Any, keys: Sequence[str]) -> Any:
    """Finds the value of a dotted key, also in the arguments of classes; None where there is none.

    Args:
        tree: a configuration.
        keys: parts of the dotted key.
    """
    for key in keys:
        tree = tree.get("init_args", tree) if isinstance(tree, Mapping) and key not in tree else tree
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(
            f"config {str(path)!r} is no file and no configuration of the package; {remedy('config', str(path))}"
        )
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"config {str(path)!r} cannot be read: {error}; --config takes a YAML file") from error
    encoding = locale.getpreferredencoding(False)
    if not text.isascii() and codecs.lookup(encoding).name != "utf-8":  # jsonargparse opens files in the locale's
        raise ValueError(
            f"config {path} has letters outside of ASCII, and the locale reads {encoding}; set PYTHONUTF8=1"
        )
    content = parse(text, f"config {path}")
    if not isinstance(content, dict):
        raise ValueError(f"config {path} must hold `key: value` lines in YAML, got {short(content)}")
    return content


def short(value: object) -> str:
    """Writes the first 40 characters of a value, for a message."""
    return "null" if value is None else repr(str(value)[:40])
