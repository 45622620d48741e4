"""One line for a person out of what a parser, a library or this package has raised."""

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Collection, Iterable
from typing import Any, NoReturn

from robustclip.names import plain

LONGEST = 400  # characters: some libraries print the whole configuration
LONGEST_VALUE = 80
HEADER = re.compile(
    r"(?P<indent> *)(?:- )?(?:Parser key \"(?P<key>[^\"]+)\"|Problem with given class_path '(?P<cls>[^']+)'):"
)
# jsonargparse frames the reason with these, none of which a user wrote or can act on.
SUBCLASS_FRAME = ("Not a valid subclass", "Subclass types expect", "a class path (str)", "a dict with")
FRAME = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a")

# A class whose arguments stand for those of all classes that a key takes, to suggest from.
TYPICAL = {"attack": "robustclip.attacks.PGD", "optimizer": "torch.optim.AdamW"}
# Which modules' classes to suggest for a key whose last part has this word.
OFFERED = {"model": "robustclip.methods", "attack": "robustclip.attacks", "optimizer": "torch.optim"}


class Answered(SystemExit):
    """A parser has printed what it was asked for, as after ``--help``; any other exit is of other code."""


class AnsweringParser:
    """Makes the exits of an argument parser `Answered`."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Ends the program."""
        sys.stderr.write(message or "")
        raise Answered(status)


def in_one_line(error: BaseException, keys: Collection[str] = ()) -> str:
    """What a person needs of an exception: where, what was expected, what was found.

    Args:
        error: its message may have several lines and jsonargparse's nesting.
        keys: that a configuration may have, to suggest from.
    """
    text = str(error)
    if "Traceback (most recent call last)" in text:  # of a loader's worker or of another process
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, KeyError) or not text.strip():
        text = f"{type(error).__name__}: {text}"
    is_top_level = "Parser key" not in text
    if is_top_level and (found := re.search(r"unrecognized arguments: (-*)(\S+)", text)):
        dashes, key = found.groups()
        return unknown_key(key, keys) if dashes == "--" else f"{dashes + key!r} is no option; write --KEY VALUE"
    if is_top_level and (found := re.search(r"does not accept option '([^']+)'", text)):
        return unknown_key(found[1], keys)
    if found := re.search(r"arguments are required: (.+)", text):
        return _required(found[1])
    return _shorten(_of_parser(text), LONGEST)


def _of_parser(text: str) -> str:
    path, cls, reasons = _innermost(text)
    where = f"{path}: " if path else ""
    block = "\n".join(reasons)
    value = _value(block) or _value(text)
    if found := re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: -*([^\s=]+)", block):
        made = cls or _value_class(block)
        names = _parameters(made)
        names += parameters_below(names)
        return unknown_key(f"{path}.{found[1] or found[2]}", [f"{path}.{name}" for name in names])
    if found := re.search(r"Unable to load config ['\"]([^'\"]+)", text):
        value = found[1]
    if found or ("Expected a path" in text and value.endswith((".yaml", ".yml", ".json"))):
        return f"{where}{value!r} is no file or no YAML; paths inside a config start at that config"
    option = re.search(r"NestedArg\(key='([^']+)'", text)
    if option and re.search("Not a valid subclass|is abstract", block):
        return f"{path}.{option[1]} has no class to belong to; put `--{path} CLASS` before it: {_classes(path, '')}"
    if "Expected a dot import path" in block:
        return f"{where}there is no class {value!r}; {_classes(path, value)}"
    if "not correspond to a subclass" in block:
        return f"{where}{value!r} is no subclass of {block.split('subclass of ')[1].split()[0]}"
    if found := re.search(r"No module named '([^']+)'", block):
        return f"{where}there is no module {found[1]!r} for {cls or value!r}; it would be found in the current folder"
    of_constructor = [line for line in reasons if not line.startswith((*FRAME, *SUBCLASS_FRAME))]
    if not of_constructor and (found := re.search(r"Not a valid subclass of (\w+)", block)):
        return (
            f"{where}expected a class of kind {found[1]}, got {_shorten(value, LONGEST_VALUE)!r}; {_classes(path, '')}"
        )
    told = of_constructor
    if not told and (expected := _expected(block)):
        return f"{where}expected {expected}, got {_shorten(value, LONGEST_VALUE)!r}"
    prefix = f"{where}{cls}: " if cls else where
    return prefix + " ".join(told or [text.strip().splitlines()[0]])


def _innermost(text: str) -> tuple[str, str, list[str]]:
    """Follows the first branch of jsonargparse's nesting: dotted key, class and the lines of the reason."""
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


def _value(text: str) -> str:
    found = (
        re.search(r"Got value: (.*)", text)
        or re.search(r"import path string: (.*)", text)
        or re.search(r"Given value: NestedArg\(key=.*?, val='?(.*?)'?\)$", text, re.MULTILINE)
        or re.search(r"Given value: (.*)", text)
    )
    return found[1].strip() if found else ""


def _value_class(text: str) -> str:
    found = re.search(r"Got value: Namespace\(class_path='([^']+)'", text)
    return found[1] if found else ""


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
        return f"model is missing; choose one, as in `--model TeCoA`: {', '.join(_names(OFFERED['model']))}"
    return f"{key} is missing; `robustclip COMMAND --help` tells what it takes"


def unknown_key(key: str, keys: Iterable[str]) -> str:
    """States that a key does not exist, and suggests others.

    Args:
        key: dotted key.
        keys: dotted keys that exist.
    """
    key, known = key.partition("=")[0], list(keys)
    parent, _, leaf = key.rpartition(".")
    leaves = {name: name.rpartition(".")[2] for name in known}
    siblings = {leaves[name]: name for name in known if name.rpartition(".")[0] == parent}
    below = [name for name in known if leaves[name] == leaf and name.startswith(f"{parent}." if parent else "")]
    close = below[:1] + [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=2)]
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    alike = difflib.get_close_matches(leaf, set(leaves.values()), n=1, cutoff=0.8)
    close = close or [name for name in known if leaves[name] in alike][:2]
    if close:
        return f"there is no key {key}; did you mean {' or '.join(dict.fromkeys(close))}?"
    return f"there is no key {key}" + (f"; known are {', '.join(sorted(siblings.values()))}" if siblings else "")


def parameters_below(names: Collection[str]) -> list[str]:
    """Dotted names of the arguments that some keys' classes usually take, as in ``optimizer.lr``."""
    return [f"{key}.{name}" for key, cls in TYPICAL.items() if key in names for name in _parameters(cls)]


def _parameters(cls: str) -> list[str]:
    """Names that a class takes, through ``**kwargs`` to its bases."""
    module, _, name = cls.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), name)
        names: list[str] = []
        for base in found.__mro__:
            parameters = inspect.signature(base.__init__).parameters.values()
            names += [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
            if not any(each.kind is each.VAR_KEYWORD for each in parameters):
                break
    except (ImportError, AttributeError, ValueError, TypeError):  # a hint is not worth a second error
        return []
    return [name for name in dict.fromkeys(names) if name != "self"]


def _classes(key: str, name: str) -> str:
    known = next((_names(module) for word, module in OFFERED.items() if word in key.rpartition(".")[2]), [])
    close = difflib.get_close_matches(name, known, n=1)
    own = "a class of your own is written module.Class"
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}; {own}" if known else own


def _names(module: str) -> list[str]:
    """Concrete classes that a module offers; none while it is not loaded."""
    offered = vars(sys.modules[module]) if module in sys.modules else {}
    names = offered.get("__all__", [])
    return [name for name in names if inspect.isclass(offered.get(name)) and not inspect.isabstract(offered[name])]


def _shorten(text: str, length: int) -> str:
    text = plain(" ".join(text.split()))
    return text if len(text) <= length else f"{text[: length - 3]}..."
