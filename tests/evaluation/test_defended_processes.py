"""Tests of a random defence, and with a target class, have one ledger: in any batches and processes, after a kill."""

from pathlib import Path

import defended_cases
import pytest
from helpers import ROUNDED
from ranks import in_background

from robustclip.results.run import Run

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("defended_cases.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("defended")
    with in_background(SCRIPT, folder):
        defended_cases.run(folder, "one")
        defended_cases.run(folder, "small", size=3)
        defended_cases.run(folder, "plain_one", is_defended=False)
    return folder


@pytest.mark.parametrize("name", ["small", "two", "killed", "plain_two", "plain_killed"])
def test_a_test_has_one_ledger(folder: Path, name: str) -> None:
    first = "plain_one" if name.startswith("plain") else "one"
    one, other = (Run.open(folder / part).rows("colours") for part in (first, name))
    assert len(one) == defended_cases.SAMPLES
    for ours, theirs in zip(one, other, strict=True):
        measured = {column for column in ours if column.endswith(ROUNDED)}
        for column in ours.keys() - measured - {"seconds", "bare_seconds", "defended_seconds"}:
            assert ours[column] == theirs[column], column
        for column in measured:
            assert float(theirs[column] or 0) == pytest.approx(float(ours[column] or 0), rel=1e-2, abs=1e-3), column


def test_the_ledger_has_different_outcomes(folder: Path) -> None:
    rows = Run.open(folder / "one").rows("colours")
    assert len({row["pgd.by"] for row in rows}) > 2
    assert len({row["pgd.share"] for row in rows}) > 2
    assert {row["draws"] == "" for row in rows} == {True, False}
    for name in ("one", "plain_one"):
        run = Run.open(folder / name)
        success = run.result["tasks"]["colours"]["to_pink"]["success"]
        assert 0 < success["count"] < success["n"] < defended_cases.SAMPLES
        assert success["count"] == sum(
            int(row["to_pink.prediction"]) == success["aim"] != int(row["label"]) for row in run.rows("colours")
        )
