"""The leaderboard: unlike protocols never share a table, failed audits stand last, and nothing is fetched."""

import json
import re
import time
from pathlib import Path

import pytest
from report_cases import FEW, Reader, checks, make_run

from robustclip.cli.main import run
from robustclip.report.leaderboard import leaderboard

OTHER = ("a picture of a {}",)


def page(runs: list[Path], out: Path) -> str:
    leaderboard(runs, out=out)
    return (out / "index.html").read_text()


def names(text: str) -> list[list[str]]:
    """Lists the names of the models of every table, in order."""
    return [re.findall(r'scope="row" data-order="([^"]*)"', part) for part in text.split("<table>")[1:]]


def test_results_of_unlike_protocols_have_tables_of_their_own(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, method=name, attacks=FEW) for name in ("A", "B")]
    runs += [make_run(tmp_path / "C", method="C", attacks=FEW, templates=OTHER)]
    tables = names(page(runs, tmp_path / "site"))
    assert [sorted(table) for table in tables] == [["A", "B"], ["C"]]


def test_the_best_robust_accuracy_comes_first_and_failed_audits_last(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"r{i}", method=f"M{i}", attacks=FEW, strength=0.2 + 0.2 * i) for i in range(3)]
    failed = {"audit": {"grade": "F", "checks": checks()}}
    runs += [make_run(tmp_path / "bad", method="Masked", attacks=FEW, strength=0, **failed)]
    (table,) = names(page(runs, tmp_path / "site"))
    values = {run.name: json.loads((run / "result.json").read_text())["mean"]["pgd10"]["acc1"] for run in runs}
    assert values["bad"] == max(values.values())
    expected = sorted(range(3), key=lambda i: -values[f"r{i}"])
    assert table == [*(f"M{i}" for i in expected), "Masked ✕ failed audit"]


def test_every_result_has_a_file_with_its_numbers(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, attacks=FEW) for name in ("a", "A_")]
    text = page(runs, tmp_path / "site")
    files = re.findall(r'href="([^"]+\.json)"', text)
    assert len({*files}) == 2
    means = [json.loads((tmp_path / "site" / name).read_text())["mean"] for name in sorted(files)]
    assert sorted(map(str, means)) == sorted(str(json.loads((run / "result.json").read_text())["mean"]) for run in runs)


def test_claims_stand_beside_the_measured_numbers(tmp_path: Path) -> None:
    text = page([make_run(tmp_path / "run", method="PMGAFT", attacks=FEW)], tmp_path / "site")
    assert "AutoAttack at 1/255: 17.9 to 31.6" in text


def test_nothing_is_fetched_and_names_are_escaped(tmp_path: Path) -> None:
    text = page([make_run(tmp_path / "run", method="<script>alert(1)</script>", attacks=FEW)], tmp_path / "site")
    Reader(text)
    assert text.count("<script>") == 1, "only the page's own script"
    assert "default-src 'none'" in text
    assert not re.search(r'(src|href)="(https?:)?//', text)


def test_a_folder_that_exists_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", attacks=FEW)
    assert run(["leaderboard", str(folder), "--out", str(tmp_path)]) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_thirty_results_take_less_than_five_seconds(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run{i}", attacks=FEW) for i in range(30)]
    start = time.process_time()
    page(runs, tmp_path / "site")
    assert time.process_time() - start < 5
