"""``robustclip list`` prints the names that options take, classes with the first sentence of their documentation."""

import ast
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

from robustclip.textfiles import read_text
from robustclip.tools.configs import configs
from robustclip.tools.datasets import datasets

PACKAGE = Path(__file__).parents[1]
FOLDERS = {
    "methods": ("RobustMethod", ["methods", "methods/_shared"]),
    "attacks": ("Attack", ["attacks"]),
    "defences": ("Defence", ["defences"]),
    "scores": ("Score", ["objectives", "evaluation"]),
    "callbacks": ("Callback", ["evaluation"]),
}
Kind = Literal["methods", "attacks", "defences", "scores", "callbacks"]
Listed = Literal[Kind, "configs", "datasets"]


def listing(kind: Listed) -> None:
    """Lists the names that options take, with one line each: classes, configurations or published data sets.

    Args:
        kind: methods, attacks, defences, scores, callbacks, configs or datasets.
    """
    if kind == "configs":
        return configs()
    if kind == "datasets":
        return datasets()
    lines = sorted(classes(kind).items(), key=lambda line: line[0].lower())
    width = max(len(name) for name, _ in lines)
    for name, sentence in lines:
        sys.stdout.write(f"{name:<{width}}  {sentence}\n")
    return None


def classes(kind: Kind) -> dict[str, str]:
    """Returns the public classes of a kind with the first sentence of their docstrings; nothing is imported.

    Args:
        kind: see `listing`.
    """
    base, folders = FOLDERS[kind]
    paths = [path for folder in folders for path in sorted((PACKAGE / folder).glob("*.py"))]
    nodes = {node.name: node for path in paths for node in _top_classes(path)}
    return {
        _option(node): _sentence(node)
        for name, node in nodes.items()
        if base in _ancestors(node, nodes) and not name.startswith("_") and name in _public(folders[0], nodes)
    }


def _top_classes(path: Path) -> Iterator[ast.ClassDef]:
    """Yields the classes at the top level of a module."""
    yield from (node for node in ast.parse(read_text(path)).body if isinstance(node, ast.ClassDef))


def _ancestors(node: ast.ClassDef, nodes: Mapping[str, ast.ClassDef]) -> Iterator[str]:
    """Yields the names of the direct and indirect base classes."""
    for base in node.bases:
        name = ast.unparse(base).split("[")[0].rpartition(".")[2]
        yield name
        yield from _ancestors(nodes[name], nodes) if name in nodes else ()


def _public(folder: str, nodes: Mapping[str, ast.ClassDef]) -> Collection[str]:
    """Returns the names that a folder exports; all names if its `__init__` lists none."""
    for node in ast.parse(read_text(PACKAGE / folder / "__init__.py")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return nodes


def _option(node: ast.ClassDef) -> str:
    """Returns the word that options take: the attribute ``name`` of a score, else the name of the class."""
    for statement in node.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "name":
            return ast.unparse(statement.value).strip("'")
    return node.name


def _sentence(node: ast.ClassDef) -> str:
    """Returns the first sentence of a docstring on one line."""
    paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return re.split(r"\.(?: |$)|: *$", paragraph)[0]
