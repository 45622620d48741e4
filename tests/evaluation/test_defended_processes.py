"""A random defence has one ledger, for any size of batches, any number of processes, and after a kill."""

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
    return folder


@pytest.mark.parametrize("name", ["small", "two", "killed"])
def test_a_random_defence_has_one_ledger(folder: Path, name: str) -> None:
    one, other = (Run.open(folder / part).rows("colours") for part in ("one", name))
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
