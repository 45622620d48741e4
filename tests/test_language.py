"""The rules of plain English that a program can hold: first words, `Args:`, names of variables."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "robustclip"
RIDDLES = re.compile(
    r"(what|whatever|of|as|which|whichever|that|those|these|whose|who|where|such|it|its|they|their|and|but|so|else|also"
    r"|the same)\b",
    re.IGNORECASE,
)
NO_NOUNS = {"found", "told", "each", "what", "wanted", "said", "shown"}
# Signatures that PyTorch, Lightning or rich document.
HOOK = re.compile(
    r"on_\w+|(training|validation|test|predict)_step|forward|backward|setup|teardown|configure_\w+|lr_scheduler_step"
    r"|transfer_batch_to_device|(load_)?state_dict|save_checkpoint|load_checkpoint|clip_gradients|render_str|reduce_boxed"
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """A module of the package."""

    name: str
    tree: ast.Module


MODULES = [
    Module(path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8")))
    for path in sorted(PACKAGE.rglob("*.py"))
]
CLASSES = [node for module in MODULES for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]

every_module = pytest.mark.parametrize("module", MODULES, ids=[module.name for module in MODULES])


def docstrings(module: Module) -> Iterator[tuple[str, str]]:
    """Gives the place and the text of every docstring."""
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.Module, ast.ClassDef, Function)) and (text := ast.get_docstring(node)):
            yield f"{module.name}:{getattr(node, 'lineno', 1)}", text


def messages(module: Module) -> Iterator[tuple[str, str]]:
    """Gives the place and the first literal part of every raised message that begins with one."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            first = node.exc.args[0]
            while isinstance(first, (ast.BinOp, ast.JoinedStr)):
                first = first.left if isinstance(first, ast.BinOp) else first.values[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield f"{module.name}:{node.lineno}", first.value


def functions(node: ast.AST, owner: ast.ClassDef | None = None) -> Iterator[tuple[ast.ClassDef | None, Function]]:
    """Gives the public functions, and the public methods and constructors of public classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from functions(child, child)
        elif isinstance(child, Function) and (child.name in ("__init__", "__call__") or not child.name.startswith("_")):
            yield owner, child


def parameters(function: Function, *, is_method: bool) -> list[str]:
    """Lists the parameters but for self, ``*args`` and ``**kwargs``."""
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)]
    kept = names[1:] if is_method and "staticmethod" not in decorators else names
    return [name for name in (*kept, *(arg.arg for arg in function.args.kwonlyargs)) if not name.startswith("_")]


def fields(cls: ast.ClassDef) -> list[str]:
    """Lists the constructor's parameters of a named tuple or of a dataclass."""
    text = " ".join(ast.unparse(node) for node in (*cls.decorator_list, *cls.bases))
    if not re.search(r"\b(dataclass|NamedTuple)\b", text):
        return []
    names = [ast.unparse(node.target) for node in cls.body if isinstance(node, ast.AnnAssign)]
    return [name for name in names if not name.startswith("_")]


def bases(cls: ast.ClassDef) -> Iterator[ast.ClassDef]:
    """Gives the classes of the package from which a class inherits."""
    names = {ast.unparse(base).split("[")[0].split(".")[-1] for base in cls.bases}
    for base in CLASSES:
        if base.name in names and base is not cls:
            yield base
            yield from bases(base)


def undocumented(text: str, names: list[str]) -> list[str]:
    """Lists the parameters without an entry in the section ``Args:`` or ``Attributes:``."""
    sections = re.findall(r"^(?:Args|Attributes):\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE)
    entries = [
        re.split(r"[,\s]+", entry) for entry in re.findall(r"^ +(\w[\w, ]*)(?: \(.*\))?:", "".join(sections), re.M)
    ]
    return [name for name in names if name not in {word for entry in entries for word in entry}]


def is_inherited(owner: ast.ClassDef, function: Function) -> bool:
    """Says whether a base class documents the method."""
    names = [node.name for base in bases(owner) for node in base.body if isinstance(node, Function)]
    return function.name in names


@every_module
def test_docstrings_and_messages_begin_with_a_subject_or_a_verb(module: Module) -> None:
    texts = [*docstrings(module), *messages(module)]
    assert [f"{place}: {text[:60]}" for place, text in texts if RIDDLES.match(text)] == []


@every_module
def test_the_first_sentence_of_a_docstring_has_three_words(module: Module) -> None:
    sentences = [(place, re.split(r"[.?!](?:\s|$)", text)[0]) for place, text in docstrings(module)]
    assert [f"{place}: {sentence}" for place, sentence in sentences if len(sentence.split()) < 3] == []


@every_module
def test_two_parameters_are_documented_by_name(module: Module) -> None:
    missing = []
    for owner, function in functions(module.tree):
        names = parameters(function, is_method=owner is not None)
        is_documented_elsewhere = owner is not None and (HOOK.fullmatch(function.name) or is_inherited(owner, function))
        if len(names) < 2 or (is_documented_elsewhere and function.name != "__init__"):
            continue
        text = ast.get_docstring(function) or ""
        if function.name == "__init__" and owner is not None:
            inherited = [ast.get_docstring(base) or "" for base in bases(owner)]
            text = "\n\n".join([text, ast.get_docstring(owner) or "", *inherited])
        missing += [f"{module.name}:{function.lineno} {function.name}: {name}" for name in undocumented(text, names)]
    for cls in (node for node in module.tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")):
        if len(names := fields(cls)) >= 2:
            missing += [f"{cls.name}: {name}" for name in undocumented(ast.get_docstring(cls) or "", names)]
    assert missing == []


@every_module
def test_variables_are_nouns(module: Module) -> None:
    names = [(node.id, node.lineno) for node in ast.walk(module.tree) if isinstance(node, ast.Name)]
    names += [(node.arg, node.lineno) for node in ast.walk(module.tree) if isinstance(node, ast.arg)]
    assert sorted({f"{module.name}:{line} {name}" for name, line in names if name in NO_NOUNS}) == []


def test_an_entry_may_name_several_parameters() -> None:
    text = "Adds two numbers.\n\nArgs:\n    first, second: any numbers.\n    third (int): one more.\n"
    assert undocumented(text, ["first", "second", "third", "fourth"]) == ["fourth"]
