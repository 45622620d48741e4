"""`robustclip table`: several results side by side within the width of a terminal."""

import json
from pathlib import Path
from typing import Any

import pytest

from robustclip.results.tables import audit_line
from robustclip.tools.table import table

METHODS = ("ZeroShot", "TeCoA", "PMGAFT", "ARF", "UEO", "CRoFT")


def write(folder: Path, method: str, number: int, **more: Any) -> Path:
    shares = {"clean": {"acc1": 0.5 + number / 100}, "pgd10": {"acc1": 0.2 + number / 100}}
    tasks = {"colours": shares, "mosaics": shares}
    result = {"method": method, "tasks": tasks, "mean": shares, "protocol": {}, "audit": {"grade": "B"}, **more}
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_six_results_are_readable_in_eighty_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table([write(tmp_path / method, method, number) for number, method in enumerate(METHODS)])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    of_clean, of_attack = shown.split("pgd10: top-1 accuracy")
    for number, method in enumerate(METHODS):
        assert method in of_clean
        assert method in of_attack
        assert f"{50 + number}.0" in of_clean
        assert f"{20 + number}.0" in of_attack


def test_two_results_share_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table([write(tmp_path / method, method, 0) for method in METHODS[:2]])
    shown = capsys.readouterr().out
    assert shown.count("top-1 accuracy") == 1
    assert [cell.strip() for cell in next(line for line in shown.splitlines() if "audit" in line).split("│")[2:-1]] == [
        *"BBBB"
    ]


def test_tests_of_one_method_are_named_by_their_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table([write(tmp_path / name, "TeCoA", 0) for name in ("a", "b")])
    shown = capsys.readouterr().out
    assert "TeCoA a" in shown
    assert "TeCoA b" in shown


def test_tests_of_other_norms_are_named_below_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def measured(name: str, eps: str) -> Path:
        axes = {"clean": {"axes": {"split": "test"}}, "pgd10": {"axes": {"split": "test", "eps": eps}}}
        return write(tmp_path / name, "TeCoA", 0, protocol={"colours": axes, "mosaics": axes})

    folders = [measured(name, eps) for name, eps in (("a", "l1 12.0"), ("b", "l1 12.0"), ("c", "linf 0.01"))]
    table(folders[:2])
    assert "not comparable" not in capsys.readouterr().out
    table(folders)
    shown = " ".join(capsys.readouterr().out.split())
    line = (
        "not comparable: TeCoA a and TeCoA c differ for colours under pgd10 in eps: l1 12.0 against linf 0.01; as do 1"
    )
    assert shown.count("not comparable") == 1
    assert line in shown


def test_averages_and_detection_stand_beside_the_accuracies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    averages = {"shifts": {"clean": {"acc1": 0.123}, "pgd10": {"acc1": 0.045}}}
    scores = {"mcm": {"auroc": 0.871, "h": 0.9, "attacked": {"auroc": 0.0312}}, "msp": {"auroc": 0.5, "h": 0.5}}
    detection = {"headline": "mcm", "attack": "PGD", "tasks": {"colours": {"unknown": {"others": {"scores": scores}}}}}
    table([write(tmp_path / "run", "UEO", 0, averages=averages, detection=detection)])
    shown = capsys.readouterr().out
    for text in ("12.3", "4.5", "87.1", "3.1", "others"):
        assert text in shown


def test_a_test_without_attacks_states_this_instead_of_twenty_checks() -> None:
    checks = [{"name": name, "status": "not_measured", "found": "no attack ran"} for name in ("transfer", "black_box")]
    audit = {"grade": "B", "checks": [*checks, {"name": "chance", "status": "warn", "found": "at chance"}]}
    clean = {"audit": audit, "mean": {"clean": {}}}
    assert audit_line(clean) == "Audit: B; warn: chance; no attack ran, and the checks of attacks were not measured"
    attacked = {"audit": audit, "mean": {"clean": {}, "pgd10": {}}}
    assert audit_line(attacked) == "Audit: B; not measured: transfer, black_box; warn: chance"
