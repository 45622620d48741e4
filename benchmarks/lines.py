"""Counts the code lines of a method here and in three packages that also hold many methods on Lightning.

A code line is not blank, no comment and no docstring. The unit is what a package adds for one method: a file of
`methods/` here and in torch-uncertainty, the folder of a model in anomalib, and the file of a loss in lightly, whose
training modules are written by its users. Folders of installed packages are given by `--peers`.
"""

import argparse
import ast
import io
import statistics
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

from once import write

ROOT = Path(__file__).parents[1]
PLACES = {
    "torch-uncertainty": ("torch_uncertainty/methods", "*.py"),
    "anomalib": ("anomalib/models/image", "*/"),
    "lightly": ("lightly/loss", "*_loss.py"),
}
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
BASE = "base.py"


def code_lines(path: Path) -> int:
    """Counts the code lines of a file, or of all files of a folder."""
    if path.is_dir():
        return sum(map(code_lines, path.rglob("*.py")))
    text = path.read_text(encoding="utf-8")
    strings = {line for node in _docstrings(ast.parse(text)) for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    used = {line for token in tokens if token.type not in LAYOUT for line in range(token.start[0], token.end[0] + 1)}
    return len(used - strings)


def _docstrings(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            yield first.value


def ours() -> dict[str, dict[str, int]]:
    """Counts the code lines of the package's methods and of the tests of each, by file."""
    methods = [path for path in (ROOT / "robustclip/methods").glob("*.py") if path.name not in (BASE, "__init__.py")]
    tests = {path: ROOT / f"tests/methods/test_{path.name}" for path in methods}
    return {
        "method": {path.stem: code_lines(path) for path in methods},
        "test": {path.stem: code_lines(test) for path, test in tests.items() if test.is_file()},
    }


def theirs(peers: Path) -> dict[str, dict[str, int]]:
    """Counts the code lines of the methods of the other packages that are installed."""
    counts = {}
    for name, (folder, pattern) in PLACES.items():
        units = [path for path in sorted((peers / folder).glob(pattern)) if not path.name.startswith("__")]
        if units:
            counts[name] = {path.stem: code_lines(path) for path in units}
    return counts


def _row(name: str, counts: Mapping[str, int]) -> str:
    values = sorted(counts.values())
    return f"| {name} | {len(values)} | {statistics.median(values):.0f} | {values[0]} | {values[-1]} |"


def main() -> None:
    """Prints the table, and writes the counts."""
    command_line = argparse.ArgumentParser(description=__doc__)
    command_line.add_argument("--peers", type=Path, required=True, help="folder with the installed packages")
    command_line.add_argument("--out", type=Path, help="JSON file to write")
    arguments = command_line.parse_args()
    own = ours()
    counts = {"robustclip": own["method"], "robustclip, test of a method": own["test"], **theirs(arguments.peers)}
    print("| package | units | median lines | least | most |\n| --- | --: | --: | --: | --: |")
    print("\n".join(_row(name, values) for name, values in counts.items()))
    write(arguments.out, counts)


if __name__ == "__main__":
    main()
