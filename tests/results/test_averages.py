"""Named averages over some of the tasks, and the geometry: from a test to its tables, the report and a comparison."""

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers import run_test
from report_cases import Reader, make_run

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule
from robustclip.evaluation import FeatureGeometry, ResultsWriter, RobustEvaluation
from robustclip.intervals import mean_interval
from robustclip.methods import ZeroShot
from robustclip.report import report
from robustclip.results.run import RESULT, Run
from robustclip.tools.compare import pair

AVERAGES = {"shift": ["outlines", "colours"], "alone": ["counts"]}


def finished(folder: Path, name: str, averages: dict[str, list[str]], *, seed: int = 0) -> Path:
    callbacks = [
        RobustEvaluation({"pgd": PGD(eps="8/255", alpha="4/255")}, max_samples=12, seed=seed),
        FeatureGeometry(),
        ResultsWriter(str(folder), name=name, averages=averages),
    ]
    data = CLIPDataModule(test=["shapes:colours", "shapes:counts", "shapes:outlines"], image_size=32, batch_size=12)
    run_test(ZeroShot(), data, *callbacks)
    return folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return finished(folder, "a", AVERAGES), finished(folder, "b", {"shift": AVERAGES["shift"]}, seed=1)


def test_an_average_is_the_mean_of_its_tasks_with_the_interval_of_a_mean(runs: tuple[Path, Path]) -> None:
    result = json.loads((runs[0] / RESULT).read_text())
    for name, tasks in AVERAGES.items():
        found = result["averages"][name]
        assert found["tasks"] == tasks
        for kind in ("clean", "pgd"):
            counts = [(result["tasks"][task][kind]["correct"], result["tasks"][task]["n"]) for task in tasks]
            assert found[kind]["acc1"] == pytest.approx(sum(right / n for right, n in counts) / len(counts))
            assert found[kind]["interval"] == pytest.approx(mean_interval(counts))


def test_the_tables_have_a_row_per_average(runs: tuple[Path, Path]) -> None:
    averages = json.loads((runs[0] / RESULT).read_text())["averages"]
    rows = {row["task"]: row for row in csv.DictReader((runs[0] / "table.csv").open())}
    assert list(rows) == ["colours", "counts", "outlines", "shift", "alone", "mean"]
    assert float(rows["shift"]["pgd"]) == pytest.approx(averages["shift"]["pgd"]["acc1"], abs=1e-6)
    assert f"| shift |  | {100 * averages['shift']['clean']['acc1']:.1f} (" in (runs[0] / "table.md").read_text()


def test_a_comparison_has_the_averages_that_both_took(runs: tuple[Path, Path]) -> None:
    found = pair(*map(Run.open, runs))
    assert [(mean.name, mean.attack) for mean in found.means] == [
        ("shift", "clean"), ("shift", "pgd"), ("mean", "clean"), ("mean", "pgd"),
    ]  # fmt: skip
    of_pgd = [row for row in found.rows if row.attack == "pgd" and row.task in AVERAGES["shift"]]
    assert found.means[1].b == pytest.approx(sum(row.b for row in of_pgd) / 2)
    assert found.means[1].difference.value == pytest.approx(sum(row.b - row.a for row in of_pgd) / 2)


@pytest.mark.parametrize(
    ("averages", "words"),
    [
        ({"shift": ["colours", "sketches"]}, r"must list tasks of the test \(colours, .*got \['colours', 'sketches'\]"),
        ({"shift": []}, "once each, got \\[\\]"),
        ({"shift": ["colours", "colours"]}, "once each"),
        ({"colours": ["counts"]}, "average 'colours' must .* be neither a task"),
        ({"mean": ["counts"]}, "nor 'mean'"),
        ({"Domain shift": ["counts"]}, r"must match \[a-z0-9_\]\+"),
    ],
)
def test_averages_that_cannot_be_taken_are_refused_before_the_test(
    averages: dict[str, list[str]], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        finished(tmp_path, "a", averages)
    assert not list(tmp_path.iterdir())


def geometry(shift: float) -> dict[str, dict[str, float | None]]:
    return {
        "cifar10": {"collapse": 1.25 - shift, "pearson": 0.9, "spearman": 0.8},
        "pcam": {"collapse": None, "pearson": 0.7 - shift, "spearman": 0.6},
        "flickr8k": {"image_to_text_r1": 0.5 - shift, "text_to_image_r10": 0.25},
    }


def shown(folder: Path, **changes: Any) -> tuple[str, Reader]:
    runs = [make_run(folder / name, **{key: value[i] for key, value in changes.items()}) for i, name in enumerate("ab")]
    report(runs, out=folder / "report.html")
    text = (folder / "report.html").read_text()
    return text, Reader(text)


def test_the_report_shows_averages_and_geometry_of_every_run(tmp_path: Path) -> None:
    score = {"acc1": 0.4321, "interval": [0.4, 0.5]}
    averages = [{"shift": {"tasks": ["pcam"], **dict.fromkeys(("clean", "pgd10_half", "pgd10", "autoattack"), score)}}]
    text, reader = shown(tmp_path, averages=averages * 2, geometry=[geometry(0.0), geometry(0.125)])
    rows = {row[0].strip(): [cell.split() for cell in row[1:]] for row in reader.tables["Clean accuracy"]}
    assert [cell[0] for cell in rows["shift"]] == ["43.2", "43.2"]
    collapse = reader.tables["Class scatter, tr(S_within) / tr(S_between)"]
    assert [cell.strip() for cell in collapse[1]] == ["cifar10", "1.250", "1.125"]
    assert len(collapse) == 2  # no run has a ratio of pcam
    recall = {
        row[0].strip(): [cell.strip() for cell in row[1:]] for row in reader.tables["Retrieval of captions, percent"]
    }
    assert recall["flickr8k: image to text, first 1"] == ["50.0", "37.5"]
    assert "TeCoA b, cifar10: 1.12" in text
    assert "| cifar10 | 1.250 | 1.125 |" in (tmp_path / "report.md").read_text()
    lines = [line.split(",") for line in (tmp_path / "report.csv").read_text().splitlines()]
    assert ["a", "TeCoA", "B", "shift", "clean", "", "", "43.2", "40.0", "50.0", ""] in lines


def test_a_report_without_geometry_has_no_section_of_it(tmp_path: Path) -> None:
    text, _ = shown(tmp_path, method=["TeCoA", "FARE"])
    sections = ["accuracy", "audit"]
    assert all(text.index(f'id="{a}"') < text.index(f'id="{b}"') for a, b in pairwise(sections))
    assert 'id="geometry"' not in text
    assert 'href="#geometry"' not in text
