"""`robustclip list` and `robustclip datasets`: what there is, without the slow libraries."""

import subprocess
import sys
from pathlib import Path

import pytest

import robustclip.attacks
import robustclip.defences
import robustclip.evaluation
import robustclip.methods
from robustclip.cli.main import run
from robustclip.data.catalog import CATALOG
from robustclip.evaluation.detection import FURTHER
from robustclip.objectives.scores import SCORES
from robustclip.tools.datasets import published
from robustclip.tools.listing import Kind, classes


def names_of(room: object, base: str) -> set[str]:
    kind = getattr(room, base)
    exported = {name: getattr(room, name) for name in room.__all__}  # type: ignore[attr-defined]
    return {name for name, value in exported.items() if isinstance(value, type) and issubclass(value, kind)} - {base}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("methods", names_of(robustclip.methods, "RobustMethod")),
        ("attacks", names_of(robustclip.attacks, "Attack")),
        ("defences", names_of(robustclip.defences, "Defence")),
        ("scores", {*SCORES, *FURTHER}),
    ],
)
def test_the_list_has_all_classes_that_options_take(kind: Kind, names: set[str]) -> None:
    assert {*classes(kind)} == names
    assert all(len(sentence.split()) > 2 for sentence in classes(kind).values())


def test_the_list_of_callbacks_has_those_of_the_evaluation() -> None:
    assert {"OODDetection", "RobustEvaluation", "FeatureGeometry"} <= {*classes("callbacks")}
    assert {*classes("callbacks")} <= {*robustclip.evaluation.__all__}


@pytest.mark.parametrize("command", [["list", "methods"], ["datasets"], ["claims", "TeCoA"], ["configs"]])
def test_a_list_loads_no_slow_library(command: list[str]) -> None:
    code = (
        "import sys; from robustclip.cli.main import run;"
        f"status = run({command}); slow = {{'torch', 'lightning', 'open_clip'}} & {{*sys.modules}};"
        "sys.exit(f'{status} {slow}' if status or slow else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_every_set_of_the_catalogue_has_a_page_and_a_licence() -> None:
    for entry in CATALOG.values():
        licence, page, stream = published(entry)
        assert licence
        assert page.startswith("http")
        assert "/" not in stream


def test_the_table_of_data_sets_shows_which_ones_are_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "oxford_pets").mkdir()
    assert run(["datasets", "--root", str(tmp_path)]) == 0
    lines = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["oxford_pets"] == "yes"
    assert lines["dtd"] == "-"


def test_a_data_set_is_described_with_the_command_that_streams_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["datasets", "cifar10"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "https://huggingface.co/datasets/clip-benchmark/wds_vtab-cifar10/resolve/main" in lines["stream"]
    assert lines["classes"] == "10"


def test_an_unknown_data_set_is_refused_with_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["datasets", "cifar11"]) == 2
    assert "cifar10" in capsys.readouterr().err
