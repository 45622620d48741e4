"""``robustclip list`` prints the names that options take, classes with the first sentence of their documentation."""

import ast
import re
import sys
from typing import Literal

from robustclip.signatures import subclasses
from robustclip.tools.configs import configs
from robustclip.tools.datasets import datasets

# Base class of each kind, and the modules that offer classes of it.
KINDS = {
    "methods": ("RobustMethod", ["robustclip.methods"]),
    "attacks": ("Attack", ["robustclip.attacks"]),
    "defences": ("Defence", ["robustclip.defences"]),
    "scores": ("Score", ["robustclip.objectives", "robustclip.evaluation.nearest_neighbours"]),
    "callbacks": ("Callback", ["robustclip.evaluation"]),
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
    base, modules = KINDS[kind]
    nodes = [written.node for module in modules for written in subclasses(base, module).values()]
    return {_option(node): _sentence(node) for node in nodes if isinstance(node, ast.ClassDef)}


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
