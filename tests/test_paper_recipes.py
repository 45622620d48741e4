"""The configuration of each paper has the values that its table in benchmarks/README.md lists."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from robustclip.cli.main import run

ROOT = Path(__file__).parents[1]
PAPERS = ("tecoa", "pmg_aft", "arf", "ueo", "croft")
SOURCES = re.compile(r"(paper|code|follow-ups|relatives|departure: .+)\b")
NOT_OF_A_RECIPE = re.compile(  # where and how a run is computed, and which sets are tested
    r"trainer\.(accelerator|devices|callbacks)|data\.(class_path|num_workers|train|test|unknown|root)\b|checkpoint\.mode"
    r"|evaluation\.(attacks\.\w+\.class_path|fit_|max_samples)|results\.averages\.shifts$|model\.attack\.class_path"
)


@cache
def tables() -> dict[str, list[tuple[str, str, str, str]]]:
    """Rows of the tables in the section on recipes, by configuration."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Recipes of the papers\n")[1].split("\n## ")[0]
    found = {}
    for part in section.split("\n### ")[1:]:
        name = re.search(r"`configs/(\w+)\.yaml`", part.splitlines()[0])
        assert name is not None
        rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
        assert rows[0] == ["recipe", "key", "value", "source"]
        found[name[1]] = [(row[0], row[1], row[2], row[3]) for row in rows[2:]]
    return found


def configured(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The configuration with all defaults, as the command line resolves it."""
    assert run(["fit", "--config", str(ROOT / "robustclip" / "configs" / f"{name}.yaml"), "--print_config"]) == 0
    tree: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return tree


def at(tree: Any, key: str) -> Any:
    """The value at a dotted key; arguments of classes need no `init_args`, and numbers are places in a list."""
    for part in key.split("."):
        if isinstance(tree, list):
            tree = tree[int(part)]
            continue
        tree = tree if part in tree else tree["init_args"]
        tree = tree[part]
    return tree


def plain(value: Any) -> Any:
    """A value with its numbers as such, which YAML reads as texts if written `1e-05`, and classes by their names."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, str) and value.startswith("robustclip."):
        return value.rpartition(".")[2]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value) else value


def stated(tree: Any, key: str = "") -> list[str]:
    """Dotted keys of all values of a file, without `init_args`."""
    if not isinstance(tree, dict):
        return [key]
    inner = {name: value for name, value in tree.items() if name != "init_args"} | tree.get("init_args", {})
    return [path for name, value in inner.items() for path in stated(value, f"{key}.{name}".strip("."))]


def test_every_paper_has_a_table() -> None:
    assert tuple(tables()) == PAPERS
    for rows in tables().values():
        keys = [key for _, key, _, _ in rows]
        assert len(keys) == len(set(keys)) >= 30
        for recipe, key, _, source in rows:
            assert recipe, key
            assert SOURCES.match(source), (key, source)


@pytest.mark.parametrize("name", PAPERS)
def test_a_configuration_has_the_values_of_its_table(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tree = configured(name, capsys)
    expected = {key: plain(yaml.safe_load(value)) for _, key, value, _ in tables()[name]}
    assert {key: plain(at(tree, key)) for key in expected} == expected


@pytest.mark.parametrize("name", PAPERS)
def test_a_table_misses_no_value_that_its_configuration_states(name: str) -> None:
    folder = ROOT / "robustclip" / "configs"
    tree = yaml.safe_load((folder / f"{name}.yaml").read_text())
    parts = {key: yaml.safe_load((folder / value).read_text()) for key, value in tree.items() if _is_file(value)}
    keys = {key for _, key, _, _ in tables()[name]}
    assert [key for key in stated(tree | parts) if key not in keys and not NOT_OF_A_RECIPE.match(key)] == []


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".yaml")
