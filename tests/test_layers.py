"""The table of allowed imports between the layers of the package."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "robustclip"
RECORDS = {"statistics", "protocol", "ledger", "examples", "runs"}
ALLOWED = {
    "types": set(),
    "errors": set(),
    "metrics": {"types"},
    "statistics": set(),
    "protocol": set(),
    "ledger": set(),
    "examples": {"ledger"},
    "runs": {"ledger"},
    "text": set(),
    "tensors": set(),
    "clip": {"types", "tensors", "text"},
    "attacks": {"types"},
    "losses": {"types"},
    "scores": set(),
    "data": {"types", "tensors"},
    "methods": {"types", "tensors", "clip", "attacks", "losses", "metrics"},
    "callbacks": {"types", "clip", "attacks", "metrics", "scores", "methods", *RECORDS},
    "tools": {"types", "tensors", "clip", "attacks", "metrics", "methods", "callbacks", "data", *RECORDS},
    "cli": {"types", "errors", "callbacks", "data", "methods", "tools"},
    "assembly": {"cli", "data", "errors", "methods", "tools"},
    "commands": {"assembly", "cli", "runs", "tools"},
    "__main__": {"cli", "commands", "errors"},
    "__init__": set(),
}
NO_LIGHTNING = {"types", "errors", "tensors", "text", "clip", "attacks", "losses", "scores"}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_imports_only_layers_below_it() -> None:
    for path in PACKAGE.rglob("*.py"):
        layer = path.relative_to(PACKAGE).with_suffix("").parts[0]
        ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("robustclip.")} - {"__version__"}
        assert ours - {layer} <= ALLOWED[layer], f"{path.name} imports {sorted(ours - {layer} - ALLOWED[layer])}"


def test_the_lowest_layers_know_no_lightning() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).with_suffix("").parts[0] in NO_LIGHTNING:
            assert not [name for name in imports_of(path) if name.startswith("lightning")], path


def test_every_layer_is_in_the_table() -> None:
    found = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert found <= ALLOWED.keys()
