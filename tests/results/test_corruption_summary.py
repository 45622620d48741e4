"""Errors on corrupted copies: hand-made figures, the whole way from a test to tables and report, and its baseline."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import run_test

from robustclip.data import CLIPDataModule
from robustclip.data.corrupted_sets import Corruptions
from robustclip.data.corruptions import KINDS
from robustclip.evaluation import ResultsWriter, RobustEvaluation
from robustclip.intervals import clustered_interval, mean_interval
from robustclip.methods import ZeroShot
from robustclip.report import report
from robustclip.results.corruption_error import ALEXNET, CATEGORIES, errors_of, mean_corruption_error
from robustclip.results.corruption_summary import corrupted
from robustclip.results.ledger import read
from robustclip.results.run import RESULT, Run
from robustclip.results.summary import Record
from robustclip.tools.compare import pair
from robustclip.tools.score import score
from robustclip.tools.table import table


def errors(uncorrupted: float | None, **kinds: float) -> dict[str, Any]:
    return {"uncorrupted": uncorrupted, "kinds": {kind: {"error": error} for kind, error in kinds.items()}}


def test_mean_corruption_error_of_two_kinds_by_hand() -> None:
    ours, theirs = errors(0.1, snow=0.3, fog=0.6), errors(0.2, snow=0.6, fog=0.8)
    found = mean_corruption_error(ours, theirs)
    assert found["mce"] == pytest.approx((0.3 / 0.6 + 0.6 / 0.8) / 2)
    assert found["relative_mce"] == pytest.approx((0.2 / 0.4 + 0.5 / 0.6) / 2)
    assert mean_corruption_error(theirs, theirs) == {"mce": 1, "relative_mce": 1}


def test_ratios_without_a_denominator_are_none() -> None:
    assert mean_corruption_error(errors(0.1, fog=0.5), errors(0.6, fog=0.6)) == {
        "mce": pytest.approx(5 / 6),
        "relative_mce": None,
    }
    assert mean_corruption_error(errors(None, fog=0.5), errors(0.0, fog=0.0)) == {"mce": None, "relative_mce": None}


def test_categories_and_references_have_the_fifteen_kinds() -> None:
    assert {name: kind.category for name, kind in KINDS.items()} == {
        name: category for category, names in CATEGORIES.items() for name in names
    }
    assert list(ALEXNET["kinds"]) == list(KINDS)
    assert (ALEXNET["kinds"]["snow"]["error"], ALEXNET["kinds"]["jpeg_compression"]["error"]) == (0.866816, 0.6065)


def record(of: str, cells: dict[tuple[str, int], str], clean: str, **facts: Any) -> Record:
    """A record whose predictions are given as one character per sample; the label is always 0."""

    def rows(predictions: str) -> list[dict[str, str]]:
        return [
            {"id": str(number), "label": "0", "clean": prediction, "pixels": f"{prediction}{number}"}
            for number, prediction in enumerate(predictions)
        ]

    ledgers = {of: rows(clean)} | {f"{of}_{kind}_{level}": rows(text) for (kind, level), text in cells.items()}
    axes: dict[str, Any] = {of: {"clean": {}}}
    for kind, level in cells:
        axis = {"of": of, "kind": kind, "severity": level, "constants": facts.get("constants", "x")}
        axes[f"{of}_{kind}_{level}"] = {"clean": {"corruption": axis}}
    return Record({"baseline": None, "protocol": axes, "members": {task: {} for task in ledgers}}, ledgers)


def test_errors_are_means_over_severities_then_over_kinds() -> None:
    cells = {("snow", 1): "0001", ("snow", 3): "0011", ("fog", 1): "0111", ("fog", 3): "1111", ("pixelate", 1): "0000"}
    section = corrupted(record("toys", cells, "0000"))["toys"]
    assert section["tasks"] == ["toys_snow_1", "toys_snow_3", "toys_fog_1", "toys_fog_3", "toys_pixelate_1"]
    clean = section["clean"]
    assert clean["kinds"]["snow"] == {"errors": {"1": 0.25, "3": 0.5}, "error": 0.375}
    assert clean["kinds"]["fog"]["error"] == 0.875
    assert clean["categories"] == {"weather": 0.625, "digital": 0}
    assert clean["error"] == pytest.approx((0.375 + 0.875 + 0) / 3)
    assert clean["uncorrupted"] == 0
    assert clean["relative_to"] == {}


def test_the_interval_takes_images_as_clusters_with_the_weights_of_the_mean() -> None:
    cells = {("snow", 1): "0011", ("fog", 1): "0111"}
    clean = corrupted(record("toys", cells, "0000"))["toys"]["clean"]
    assert clean["interval"] == pytest.approx(clustered_interval([0, 0.5, 1, 1]))
    uneven = {("snow", 1): "0011", ("snow", 2): "0111", ("fog", 1): "0111"}
    clean = corrupted(record("toys", uneven, "0000"))["toys"]["clean"]
    assert clean["interval"] == pytest.approx(clustered_interval([0, 0.75, 1, 1]))


def test_alexnet_is_the_reference_of_the_whole_published_set_alone() -> None:
    cells = {(kind, level): "0001" for kind in KINDS for level in range(1, 6)}
    published = corrupted(record("imagenet", cells, "0000", constants="published files"))["imagenet"]["clean"]
    expected = sum(0.25 / value["error"] for value in ALEXNET["kinds"].values()) / 15
    assert published["relative_to"]["alexnet"]["mce"] == pytest.approx(expected)
    assert corrupted(record("imagenet", cells, "0000"))["imagenet"]["clean"]["relative_to"] == {}
    del cells["fog", 2]
    part = corrupted(record("imagenet", cells, "0000", constants="published files"))["imagenet"]["clean"]
    assert part["relative_to"] == {}


def finished(folder: Path, name: str, **settings: Any) -> Path:
    kinds = settings.pop("corruptions", Corruptions(["gaussian_noise", "fog"], (2, 5)))
    data = CLIPDataModule(test="shapes:colours", image_size=32, batch_size=24, corruptions=kinds)
    writer = ResultsWriter(str(folder), name=name, **settings)
    run_test(ZeroShot(), data, RobustEvaluation({}, max_samples=24), writer)
    return folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    first = finished(folder, "a")
    return first, finished(folder, "b", baseline=str(first))


def test_a_test_reports_its_errors(runs: tuple[Path, Path]) -> None:
    result = json.loads((runs[0] / RESULT).read_text())
    section = result["corruptions"]["colours"]["clean"]
    for kind in ("gaussian_noise", "fog"):
        for severity in ("2", "5"):
            rows = read(runs[0] / "ledger" / f"colours_{kind}_{severity}.csv")
            wrong = sum(row["clean"] != row["label"] for row in rows) / 24
            assert section["kinds"][kind]["errors"][severity] == pytest.approx(wrong)
    assert section["error"] > section["uncorrupted"]
    chance = next(check for check in result["audit"]["checks"] if check["name"] == "better_than_chance")
    assert chance["status"] == "pass"
    tables = (runs[0] / "table.md").read_text()
    assert "| colours | 24 |" in tables
    assert "| colours_fog_5 |" not in tables
    assert "| mean of all 5 |" in tables
    assert f"| all kinds |  |  | {100 * section['error']:.1f} (" in tables
    assert "colours_fog_5," in (runs[0] / "table.csv").read_text()


def test_the_mean_over_copies_of_one_set_has_the_interval_of_dependent_tasks(runs: tuple[Path, Path]) -> None:
    result = json.loads((runs[0] / RESULT).read_text())
    counts = [(task["clean"]["correct"], task["n"]) for task in result["tasks"].values()]
    assert {task["images_of"] for task in result["tasks"].values()} == {"colours"}
    low, high = result["mean"]["clean"]["interval"]
    assert (low, high) == pytest.approx(mean_interval(counts, images=[0] * 5))
    assert high - low > 1.5 * (mean_interval(counts)[1] - mean_interval(counts)[0])
    difference = pair(Run.open(runs[0]), Run.open(runs[1])).means[-1].difference
    assert difference.high - difference.low > 0.08


def test_a_baseline_and_the_first_run_of_a_report_are_references(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((runs[1] / RESULT).read_text())
    section = result["corruptions"]["colours"]["clean"]
    assert section["relative_to"] == {"baseline": {"mce": 1, "relative_mce": 1}}
    assert "| mCE, relative to baseline |  |  | 100.0 |" in (runs[1] / "table.md").read_text()
    report([*runs], out=tmp_path / "report.html")
    page = (tmp_path / "report.md").read_text() if (tmp_path / "report.md").exists() else ""
    page += (tmp_path / "report.html").read_text()
    assert "Mean errors on corrupted copies of colours, percent" in page
    assert "mCE, relative to the first run" in page
    table([*runs])
    assert "error on corrupted copies" in capsys.readouterr().out


def test_a_baseline_of_other_kinds_is_named_beside_the_missing_ratio(runs: tuple[Path, Path], tmp_path: Path) -> None:
    part = finished(tmp_path, "part", baseline=str(runs[0]), corruptions=Corruptions(["fog"], (5,)))
    result = json.loads((part / RESULT).read_text())
    values = result["corruptions"]["colours"]["clean"]["relative_to"]["baseline"]
    reason = "other kinds or severities, 'colours_fog_2', 'colours_gaussian_noise_2', 'colours_gaussian_noise_5'"
    assert values == {"mce": None, "relative_mce": None, "unlike": reason}
    assert f"| mCE, relative to baseline |  | none: baseline has {reason} |" in (part / "table.md").read_text()


def test_references_measure_alike_in_any_order_and_else_say_why(runs: tuple[Path, Path]) -> None:
    result = json.loads((runs[0] / RESULT).read_text())
    turned, few, damaged = (json.loads(json.dumps(result)) for _ in range(3))
    turned["corruptions"]["colours"]["tasks"].reverse()
    assert errors_of(turned, result, "colours", "clean") == result["corruptions"]["colours"]["clean"]
    few["protocol"]["colours_fog_5"]["clean"]["axes"]["sample_ids"] = "3, digest 0"
    assert "another protocol of colours_fog_5 under clean: sample_ids: 3" in errors_of(few, result, "colours", "clean")
    damaged["corruptions"]["colours"]["clean"].pop("kinds")
    assert "damaged" in errors_of(damaged, result, "colours", "clean")
    assert errors_of(result, result, "colours", "pgd") == "no errors on corrupted copies of colours under pgd"


def test_a_result_is_computed_again_from_its_ledgers(runs: tuple[Path, Path]) -> None:
    before = json.loads((runs[1] / RESULT).read_text())
    score(runs[1])
    assert json.loads((runs[1] / RESULT).read_text()) == before


def test_a_baseline_that_is_gone_is_named_with_its_key(runs: tuple[Path, Path], tmp_path: Path) -> None:
    base = finished(tmp_path, "base")
    scored = finished(tmp_path, "scored", baseline=str(base))
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"results\.baseline of this test must be where it was: {base} is no result"):
        score(scored)


def test_unlike_corruptions_do_not_compare(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in runs[0].rglob("*"):
        if path.is_file():
            (other / path.relative_to(runs[0])).parent.mkdir(parents=True, exist_ok=True)
            (other / path.relative_to(runs[0])).write_bytes(path.read_bytes())
    result = json.loads((other / RESULT).read_text())
    result["protocol"]["colours_fog_5"]["clean"]["axes"]["corruption"]["constants"] = "others"
    (other / RESULT).write_text(json.dumps(result))
    with pytest.raises(ValueError, match="colours_fog_5 under clean differs in corruption"):
        pair(Run.open(runs[0]), Run.open(other))
