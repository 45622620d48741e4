"""Checks files, keys, classes and plain values of a command line and its configurations before slow libraries load.

The parser checks everything again. What the source files do not tell is left to it, such as a class that is computed.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from robustclip.cli._chosen_classes import ChosenClasses
from robustclip.cli.messages import parameters_below, unknown_key
from robustclip.cli.settings import (
    SECTIONS,
    SUFFIXES,
    WITHOUT_VALUE,
    get,
    joined,
    options,
    parse,
    places,
    read_config,
    short,
)
from robustclip.results.run import Run
from robustclip.signatures import parameters

BY_ROLE = ("", "null", "None", "best", "last", "hpc", "registry")  # Lightning finds these checkpoints itself
DATA = "robustclip.data.CLIPDataModule"
CSV_LOGGER = "lightning.pytorch.loggers.CSVLogger"
# Class of each section; that of the model and that of the data can be replaced.
OF_SECTIONS = {
    "trainer": "lightning.pytorch.Trainer",
    "data": DATA,
    "model": "robustclip.methods.RobustMethod",
    "evaluation": "robustclip.evaluation.RobustEvaluation",
    "results": "robustclip.evaluation.ResultsWriter",
    "checkpoint": "robustclip.training.Checkpoints",
}
REPLACEABLE = ("model", "data")
SHARES = (
    ("shard", 0, "number of the part of all test samples that this test evaluates, from 0"),
    ("shards", 1, "number of parts; `robustclip merge` joins them to one result"),
)


@cache
def known_keys() -> tuple[str, ...]:
    """Lists the dotted keys of a configuration, but for the options of chosen classes."""
    keys = [f"{section}.{name}" for section, cls in OF_SECTIONS.items() for name in parameters(cls) or ()]
    wholes = [f"{section}{part}" for section in REPLACEABLE for part in (".class_path", ".init_args")]
    below = [f"model.{name}" for name in parameters_below(("attack", "optimizer", "defence"))]
    shares = [name for name, *_ in SHARES]
    return ("config", "ckpt_path", "seed_everything", "verbose", *shares, *OF_SECTIONS, *wholes, *keys, *below)


def check_files(arguments: Sequence[str], *, needs_results: bool) -> None:
    """Checks the files that a command line and its configurations name.

    Args:
        arguments: arguments of the command line.
        needs_results: whether the command needs its checkpoint and its baseline to start.

    Raises:
        ValueError: a missing file, or an unreadable configuration.
    """
    named: dict[str, Any] = {}
    for key, value in options(joined(arguments)):
        if key == "config":
            tree = read_config(Path(value))
            results = tree.get("results")
            named |= {"ckpt_path": tree.get("ckpt_path", named.get("ckpt_path"))}
            if isinstance(results, Mapping) and "baseline" in results:
                named["results.baseline"] = results["baseline"]
        elif key in SECTIONS and value.endswith(SUFFIXES):
            read_config(Path(value))
        named[key] = value
    checkpoint, baseline = (str(named.get(key) or "") for key in ("ckpt_path", "results.baseline"))
    if needs_results and checkpoint not in BY_ROLE and "://" not in checkpoint and not Path(checkpoint).is_file():
        raise ValueError(f"ckpt_path {checkpoint!r} is no file; `robustclip fit` prints where it writes checkpoints")
    if needs_results and baseline not in BY_ROLE:
        try:
            Run.open(Path(baseline))
        except ValueError as error:
            raise ValueError(f"results.baseline: {error}") from error


def check_arguments(arguments: Sequence[str]) -> None:
    """Checks the order, the keys, the classes and the plain values of options and configurations.

    Args:
        arguments: command and its arguments.

    Raises:
        ValueError: an unreadable file, or an invalid order, key or class.
        ArgumentError: a value has another type.
    """
    check_order(arguments)
    defaults = {section: cls for section, cls in OF_SECTIONS.items() if section != "model"}
    classes = ChosenClasses({**defaults, "trainer.logger": CSV_LOGGER})
    for key, value in options(joined(arguments)):
        tree = tree_of(key, value)
        _check_shares(arguments, [key] if tree is None else tree)
        if tree is not None:
            check_keys(tree, known_keys())
        if key == "config":
            for section, content in (tree or {}).items():
                classes.read(section, content)
        elif f"--{key}" not in WITHOUT_VALUE and not key.endswith(".help"):
            _check_key(key)
            classes.read_option(key, value if tree is None else get(tree, key.split(".")))


def tree_of(key: str, value: str) -> dict[str, Any] | None:
    """Reads the configuration that an option names or holds.

    Args:
        key: name of the option.
        value: value as on the command line.

    Returns:
        The configuration from its sections down; None for a single value.

    Raises:
        ValueError: an unreadable file, or no YAML.
    """
    if key == "config":
        return read_config(Path(value))
    if key in SECTIONS and value.endswith(SUFFIXES):
        tree: Any = read_config(Path(value))
    elif value.startswith(("{", "[")) or key.endswith(".init_args"):
        tree = parse(value, f"--{key}")
    else:
        return None
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return dict(tree)


def check_order(arguments: Sequence[str]) -> None:
    """Refuses options before a configuration that would silently override them.

    Raises:
        ValueError: a later configuration sets the key of an option.
    """
    earlier: dict[str, str] = {}
    for key, value in options(arguments):
        if key != "config":
            earlier[key] = value
            continue
        tree = read_config(Path(value))
        for name, option in earlier.items():
            setting = get(tree, name.split("."))
            is_part = name in SECTIONS and isinstance(setting, Mapping) and "class_path" not in setting
            if setting is not None and not is_part and str(setting) != option:
                raise ValueError(f"{name} is set before --config {value}, which sets it too; put --config first")


def check_keys(tree: Mapping[str, Any], keys: Collection[str]) -> None:
    """Checks the keys of a configuration, but for the options of chosen classes.

    Args:
        tree: the configuration.
        keys: known dotted keys; a section with a ``class_path`` takes the options of a class.

    Raises:
        ValueError: an unknown key, a section or arguments without a mapping, or a class without a name.
    """
    for place, value in places(tree):
        key, section = ".".join(map(str, place)), str(place[0]).partition(".")[0]
        has_class = f"{section}.class_path" in keys
        if len(place) <= 2 and not (has_class and key != section) and key.removesuffix("+") not in keys:
            raise ValueError(unknown_key(key, keys))
        is_name = isinstance(value, str) and bool(value)
        is_mapping = place[-1] == "init_args" or (key in SECTIONS and not (has_class and is_name))
        if is_mapping and not isinstance(value, Mapping):
            raise ValueError(f"{key} must hold `key: value` lines, got {short(value)}")
        if place[-1] == "class_path" and not is_name:
            raise ValueError(f"{key} must be the name of a class, got {short(value)}")
        is_object = place[0] == "trainer" and len(place) == 3 and isinstance(place[2], int)
        if is_object and isinstance(value, Mapping) and "class_path" not in value:
            raise ValueError(f"{key} must have a class_path, got {short(dict(value))}")


def _check_key(key: str) -> None:
    """Refuses an unknown key of a command line, but for the options of chosen classes."""
    section, _, rest = key.removesuffix("+").partition(".")
    is_of_class = section in REPLACEABLE or "." in rest
    if not is_of_class and key.removesuffix("+") not in known_keys():
        raise ValueError(unknown_key(key, known_keys()))


def _check_shares(arguments: Sequence[str], keys: Iterable[str]) -> None:
    """Refuses the options of a shard in other commands than ``test``, which would only suggest them again."""
    for name, *_ in SHARES if arguments[:1] != ["test"] else ():
        if name in keys:
            raise ValueError(f"{name} is an option of `robustclip test` alone; leave it out")
