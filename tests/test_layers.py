"""The table of allowed imports between the rooms of the package, and the rules of the house that a program can hold."""

import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "robustclip"
COMMON = {
    "arguments",
    "names",
    "overrides",
    "paths",
    "persistence",
    "signatures",
    "textfiles",
    "types",
}  # of every room
ALLOWED = {
    "__init__": {"api", "attacks", "data", "evaluation", "methods"},  # for type checkers alone
    "arguments": set(),
    "names": set(),
    "overrides": set(),
    "paths": set(),
    "persistence": set(),
    "signatures": set(),
    "textfiles": set(),
    "types": set(),
    "display": set(),
    "intervals": set(),
    "metrics": set(),
    "models": set(),
    "attacks": set(),
    "objectives": set(),
    "defences": {"attacks", "models"},
    "data": set(),
    "results": {"attacks", "intervals"},
    "methods": {"attacks", "defences", "metrics", "models", "objectives"},
    "evaluation": {
        *("attacks", "defences", "display", "intervals", "methods", "metrics", "models", "objectives", "results")
    },
    "training": {"evaluation", "methods", "results"},
    "convert": {"methods", "models", "results"},
    "tools": {"attacks", "data", "display", "evaluation", "intervals", "methods", "models", "results", "convert"},
    "report": {"intervals", "results", "tools"},
    "api": {"attacks", "cli", "data", "evaluation", "methods", "results"},
    "cli": {"attacks", "convert", "data", "evaluation", "methods", "report", "results", "tools", "training"},
    "__main__": {"cli"},
}
NO_LIGHTNING = {*COMMON, "display", "intervals", "models", "attacks", "defences", "objectives", "results"}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_module_imports_only_rooms_below_it() -> None:
    for path in PACKAGE.rglob("*.py"):
        ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("robustclip.")}
        above = ours - {room_of(path), "__version__"} - COMMON - ALLOWED[room_of(path)]
        assert not above, f"{path} imports {sorted(above)}"


def test_the_lowest_rooms_know_no_lightning() -> None:
    for path in PACKAGE.rglob("*.py"):
        if room_of(path) in NO_LIGHTNING:
            assert not [name for name in imports_of(path) if name.startswith("lightning")], path


def test_every_room_is_in_the_table() -> None:
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} <= ALLOWED.keys()


def test_a_base_name_occurs_once() -> None:
    names = Counter(path.stem for path in PACKAGE.rglob("*.py") if path.stem != "__init__")
    assert [name for name, count in names.items() if count > 1] == []
