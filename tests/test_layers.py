"""The table of allowed imports between the layers of the package."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "robustclip"
RECORDS = {"statistics", "protocol", "ledger", "examples", "runs", "paths"}
COMMON = {"textfiles", "arguments", "names"}  # every layer may import them
ALLOWED = {
    "arguments": set(),
    "types": {"arguments"},
    "errors": {"names"},
    "metrics": {"types"},
    "statistics": set(),
    "protocol": set(),
    "ledger": set(),
    "examples": {"ledger"},
    "paths": set(),
    "runs": {"ledger", "paths"},
    "text": set(),
    "clip": {"arguments", "tensors", "text", "types"},
    "attacks": {"arguments", "types"},
    "losses": {"types"},
    "scores": set(),
    "data": {"arguments", "paths", "tensors", "types"},
    "methods": {"arguments", "attacks", "clip", "losses", "metrics", "tensors", "types"},
    "callbacks": {
        "arguments",
        "attacks",
        "clip",
        "display",
        "examples",
        "ledger",
        "methods",
        "metrics",
        "names",
        "paths",
        "protocol",
        "runs",
        "scores",
        "statistics",
        "types",
    },
    "tools": {
        "arguments",
        "attacks",
        "callbacks",
        "clip",
        "data",
        "display",
        "examples",
        "ledger",
        "methods",
        "metrics",
        "names",
        "paths",
        "protocol",
        "runs",
        "statistics",
        "tensors",
        "types",
    },
    "cli": {"attacks", "callbacks", "data", "errors", "methods", "settings", "tools", "types"},
    "assembly": {"cli", "data", "errors", "methods", "paths", "settings", "tools"},
    "commands": {"assembly", "cli", "errors", "paths", "runs", "tools"},
    "__main__": {"cli", "commands", "errors", "settings"},
    "__init__": set(),
    "names": set(),
    "display": {"names"},
    "settings": {"errors", "runs"},
    "textfiles": set(),
    "tensors": set(),
}
NO_LIGHTNING = {
    "arguments",
    "attacks",
    "clip",
    "display",
    "errors",
    "losses",
    "names",
    "scores",
    "settings",
    "tensors",
    "text",
    "textfiles",
    "types",
}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_imports_only_layers_below_it() -> None:
    for path in PACKAGE.rglob("*.py"):
        layer = path.relative_to(PACKAGE).with_suffix("").parts[0]
        ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("robustclip.")}
        above = ours - {layer, "__version__"} - COMMON - ALLOWED[layer]
        assert not above, f"{path.name} imports {sorted(above)}"


def test_the_lowest_layers_know_no_lightning() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).with_suffix("").parts[0] in NO_LIGHTNING:
            assert not [name for name in imports_of(path) if name.startswith("lightning")], path


def test_every_layer_is_in_the_table() -> None:
    found = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert found <= ALLOWED.keys()
