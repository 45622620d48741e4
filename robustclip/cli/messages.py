"""Shortens errors of a parser, a library or this package to one line."""

import difflib
import re
import sys
from collections.abc import Collection, Iterable
from functools import cache
from typing import NoReturn

from robustclip.names import plain
from robustclip.signatures import parameters, subclasses
from robustclip.tools.configs import PARTS, SUFFIX, close_name, remedy

LONGEST = 400  # characters: some libraries print the whole configuration
LONGEST_VALUE = 80
HEADER = re.compile(
    r"(?P<indent> *)(?:- )?(?:Parser key \"(?P<key>[^\"]+)\"|Problem with given class_path '(?P<cls>[^']+)'):"
)
# Lines that jsonargparse puts around the reason; a user can do nothing about them.
SUBCLASS_FRAME = ("Not a valid subclass", "Subclass types expect", "a class path (str)", "a dict with")
VALUES = (  # places of the given value in a message, from the most exact to the least
    r"Got value: (.*)",
    r"import path string: (.*)",
    r"Given value: NestedArg\(key=.*?, val='?(.*?)'?\)$",
    r"Given value: (.*)",
)
FRAME = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a")

# What to do about an error of a library that does not say so.
REMEDIES = {"No supported gpu backend found": "; without a GPU, give --trainer.accelerator cpu"}
# A typical class of a key, whose arguments are suggested.
TYPICAL = {"attack": "robustclip.attacks.PGD", "optimizer": "torch.optim.AdamW"}
# The one class of a key, which takes its arguments without a choice of class.
SETTINGS = {
    "awp": "robustclip.methods._shared.weight_perturbation.AWP",
    "augmentation": "robustclip.data.transforms.Augmentation",
    "corruptions": "robustclip.data.corrupted_sets.Corruptions",
    "lora": "robustclip.models.lora.LoRA",
    "ways": "robustclip.evaluation.ways.Ways",
}
# Base class of the classes that a key takes, and modules that offer them, by a part of the key.
OFFERED = {
    "attack": ("Attack", ["robustclip.attacks"]),
    "callbacks": ("Callback", ["robustclip.evaluation", "lightning.pytorch.callbacks"]),
    "defence": ("Defence", ["robustclip.defences"]),
    "logger": ("Logger", ["lightning.pytorch.loggers"]),
    "model": ("RobustMethod", ["robustclip.methods"]),
    "optimizer": ("Optimizer", ["torch.optim"]),
}


class Answered(SystemExit):
    """A parser exits after it has answered, as after ``--help``; other code exits otherwise."""


class AnsweringParser:
    """Makes the exits of an argument parser `Answered`."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Ends the program.

        Args:
            status: exit status.
            message: last line on stderr.
        """
        sys.stderr.write(message or "")
        raise Answered(status)


def in_one_line(error: BaseException, keys: Collection[str] = ()) -> str:
    """Shortens an exception to key, expected value and given value.

    Args:
        error: exception, whose message may have several lines and jsonargparse's nesting.
        keys: known keys of a configuration, for suggestions.
    """
    text = str(error)
    if "Traceback (most recent call last)" in text:  # of a loader's worker or of another process
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, KeyError) or not text.strip():
        text = f"{type(error).__name__}: {text}"
    is_top_level = "Parser key" not in text
    if is_top_level and (match := re.search(r"unrecognized arguments: (-*)(\S+)", text)):
        dashes, key = match.groups()
        return unknown_key(key, keys) if dashes == "--" else f"{dashes + key!r} is no option; write --KEY VALUE"
    if is_top_level and (match := re.search(r"does not accept option '([^']+)'", text)):
        return unknown_key(match[1], keys)
    if match := re.search(r"arguments are required: (.+)", text):
        return _required(match[1])
    remedy = next((remedy for cause, remedy in REMEDIES.items() if cause in text), "")
    return _shorten(_of_parser(text), LONGEST) + remedy


def _of_parser(text: str) -> str:
    path, cls, reasons = _innermost(text)
    where = f"{path}: " if path else ""
    block = "\n".join(reasons)
    value = _first(block, *VALUES) or _first(text, *VALUES)
    if match := re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: -*([^\s=]+)", block):
        names = parameters(cls or _first(block, r"Got value: Namespace\(class_path='([^']+)'"))
        return unknown_argument(path, match[1] or match[2], names or ())
    if match := re.search(r"Unable to load config ['\"]([^'\"]+)", text):
        value = match[1]
    if match and path in PARTS and not value.endswith(SUFFIX):
        return f"{where}{value!r} is no file and no configuration of the package; {remedy(path, value)}"
    if match or ("Expected a path" in text and value.endswith((".yaml", ".yml", ".json"))):
        return f"{where}{value!r} is no file or no YAML; paths inside a config start at that config"
    option = re.search(r"NestedArg\(key='([^']+)'", text)
    if option and re.search("Not a valid subclass|is abstract", block):
        return f"{path}.{option[1]} has no class to belong to; put `--{path} CLASS` before it: {_remedy(path, '')}"
    if re.search("Expected a dot import path|Unexpected import path format", block):
        return unknown_class(path, value)
    if "but is abstract" in block and (missing := _abstract(value)):
        return f"{where}{value} must define {' and '.join(missing)}"
    if "not correspond to a subclass" in block:
        return f"{where}{value!r} is no subclass of {block.split('subclass of ')[1].split()[0]}"
    if match := re.search(r"No module named '([^']+)'", block):
        return f"{where}there is no module {match[1]!r} for {cls or value!r}; it would be found in the current folder"
    of_constructor = [line for line in reasons if not line.startswith((*FRAME, *SUBCLASS_FRAME))]
    short = repr(_shorten(value, LONGEST_VALUE))
    if not of_constructor and (match := re.search(r"Not a valid subclass of (\w+)", block)):
        return f"{where}expected a class of kind {match[1]}, got {short}; {_remedy(path, '')}"
    if not of_constructor and (expected := _expected(block)):
        return f"{where}expected {expected}, got {short}"
    prefix = f"{where}{cls}: " if cls else where
    return prefix + " ".join(of_constructor or [text.strip().splitlines()[0]])


def _innermost(text: str) -> tuple[str, str, list[str]]:
    """Follows the first branch of jsonargparse's nesting to the dotted key, the class and the lines of the reason."""
    keys: list[str] = []
    cls, depth, reasons = "", -1, []
    for line in text.splitlines():
        header = HEADER.match(line)
        indent = len(line) - len(line.lstrip())
        if header and indent > depth:
            keys, cls = ([*keys, header["key"]], "") if header["key"] else (keys, header["cls"])
            depth, reasons = indent, [line[header.end() :].strip()]
        elif line.strip() and indent <= depth:
            break
        else:
            reasons.append(line.strip(" \t-"))
    return ".".join(keys), cls, [reason for reason in reasons if reason]


def _first(text: str, *patterns: str) -> str:
    """Gives the group of the first pattern that occurs in a text."""
    matches = (re.search(pattern, text, re.MULTILINE) for pattern in patterns)
    return next((match[1].strip() for match in matches if match), "")


def _expected(block: str) -> str:
    kinds: list[str] = []
    for kind in re.findall(r"Expected an? (.*?)(?:\. Got value|$)", block, re.MULTILINE):
        if kind.startswith("path but"):
            continue
        choices = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
        kind = " or ".join(choices[1].split(", ")) if choices else re.sub(r"<class '([^']+)'>", r"\1", kind)
        kinds.append(re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", kind).replace("NoneType", "null"))
    return " or ".join(dict.fromkeys(kinds))


def _required(names: str) -> str:
    key = names.split(",")[0].strip().removeprefix("test.").removeprefix("fit.").removeprefix("validate.")
    if key == "model":
        return f"model is missing; choose one, as in `--model TeCoA`: {', '.join(offered('model'))}"
    return f"{key} is missing; `robustclip COMMAND --help` lists its values"


def unknown_key(key: str, keys: Iterable[str]) -> str:
    """States that a key does not exist, and suggests others.

    Args:
        key: unknown dotted key.
        keys: known dotted keys.
    """
    key, known = key.partition("=")[0], list(keys)
    parent, _, leaf = key.rpartition(".")
    leaves = {name: name.rpartition(".")[2] for name in known}
    siblings = {leaves[name]: name for name in known if name.rpartition(".")[0] == parent}
    inside = {leaves[name]: name for name in reversed(known) if name.startswith(f"{parent}." if parent else "")}
    close = [inside[leaf]] if leaf in inside else []
    for group, cutoff in ((siblings, 0.8), (inside, 0.8), (siblings, 0.6)):
        close = close or [group[name] for name in difflib.get_close_matches(leaf, group, n=2, cutoff=cutoff)]
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    alike = difflib.get_close_matches(leaf, set(leaves.values()), n=1, cutoff=0.8)
    close = close or [name for name in known if leaves[name] in alike or leaf in leaves[name].split("_")][:2]
    if close:
        return f"there is no key {key}; did you mean {' or '.join(dict.fromkeys(close))}?"
    return f"there is no key {key}" + (f"; known are {', '.join(sorted(siblings.values()))}" if siblings else "")


def unknown_argument(key: str, name: str, known: Collection[str]) -> str:
    """States that a class takes no such argument, and suggests others.

    Args:
        key: dotted key of the class.
        name: name of the argument.
        known: names of its arguments.
    """
    return unknown_key(f"{key}.{name}", [f"{key}.{argument}" for argument in (*known, *parameters_below(known))])


def unknown_class(key: str, name: str) -> str:
    """States that there is no such class, and suggests another one.

    Args:
        key: dotted key that takes a class.
        name: name of the class.
    """
    if key.rpartition(".")[2] in SETTINGS:
        return class_expected(key, name)
    where = f"{key}: " if key else ""
    return f"{where}there is no class {name!r}; {_remedy(key, name)}"


def class_expected(key: str, value: object) -> str:
    """States that a key takes one class, or its arguments, in place of a number or a list.

    Args:
        key: dotted key.
        value: value as given.
    """
    only = SETTINGS.get(key.rpartition(".")[2])
    if only is None:
        return f"{key}: expected the name of one class, got {value!r}; {_remedy(key, '')}"
    names = ", ".join(f"{key}.{name}" for name in parameters(only) or ())
    return f"{key}: expected arguments ({names}), got {value!r}"


@cache
def offered(key: str) -> dict[str, str]:
    """Returns the import paths of the classes that a key takes by their names; empty for other keys.

    Args:
        key: dotted key, such as ``model.attack`` or ``evaluation.attacks.pgd``.
    """
    for part in reversed(key.split(".")):
        for word, (base, modules) in OFFERED.items():
            if word in part:
                return {name: f"{module}.{name}" for module in modules for name in subclasses(base, module)}
    return {}


def parameters_below(names: Collection[str]) -> list[str]:
    """Lists the usual arguments of the classes of some keys as dotted names, such as ``optimizer.lr``."""
    return [f"{key}.{name}" for key, cls in TYPICAL.items() if key in names for name in parameters(cls) or ()]


def _abstract(cls: str) -> list[str]:
    """Lists the methods that a class must still define; none if there is no such class."""
    module, _, name = cls.strip("'\"").rpartition(".")
    return sorted(getattr(getattr(sys.modules.get(module), name, None), "__abstractmethods__", ()))


def _remedy(key: str, name: str) -> str:
    known = list(offered(key))
    close = difflib.get_close_matches(name, known, n=1)
    own = "a class of your own is written module.Class"
    if key == "data" and (close_config := close_name(key, name)):
        return f"did you mean {close_config}?"
    if key == "data":
        return f"{own}, and a data set is an option of it, such as --data.test folder:/my/photos"
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}; {own}" if known else own


def _shorten(text: str, length: int) -> str:
    text = plain(" ".join(text.split()))
    return text if len(text) <= length else f"{text[: length - 3]}..."
