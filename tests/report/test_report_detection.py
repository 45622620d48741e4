"""The detection of unknown classes in the tables of a test and in the report."""

import re
from pathlib import Path
from typing import Any

from report_cases import FEW, Reader, make_run

from robustclip.report import report
from robustclip.report.view import MISSING
from robustclip.results.run import Run
from robustclip.results.tables import detection_rows, markdown_table, rich_detection

ATTACK = {"class": "PGD", "eps": 0.125, "steps": 10}


def scores(shift: float, kinds: tuple[str, ...]) -> dict[str, Any]:
    """As a test leaves them: two histogram bins, three points of a curve."""
    found: dict[str, Any] = {"auroc": 0.875 - shift, "aupr": 0.75, "fpr95": 0.5, "h": 0.625 - shift}
    counts, curve = {"known": [1, 3], "unknown": [4, 1]}, {"unknown": [0.0, 0.25, 1.0], "known": [0.0, 0.5, 1.0]}
    if "attacked" in kinds:
        found["attacked"] = {"auroc": 0.125, "aupr": 0.25, "fpr95": 1.0}
    found["histogram"] = {"range": [0.25, 0.75], **dict.fromkeys(kinds, counts)}
    found["roc"] = dict.fromkeys(kinds, curve)
    return found


def section(shift: float, *, has_attack: bool) -> dict[str, Any]:
    kinds = ("clean", "attacked") if has_attack else ("clean",)
    undrawn = {"auroc": None, "aupr": None, "fpr95": None, "h": None}  # a set without a sample
    sets = {"svhn": {"n": 5, "scores": {"mcm": scores(shift, kinds), "energy": undrawn}}}
    tasks = {"cifar10": {"n": 4, "class_accuracy": 0.5625 - shift, "ece": 0.0625, "unknown": sets}}
    settings = {"headline": "mcm", "is_correct_only": False, "attack": ATTACK if has_attack else None}
    return settings | ({"attacked": ["mcm"]} if has_attack else {}) | {"tasks": tasks}


def shown(folder: Path, **sections: dict[str, Any] | None) -> tuple[str, Reader]:
    runs = [
        make_run(folder / name, attacks=FEW, **({} if found is None else {"detection": found}))
        for name, found in sections.items()
    ]
    report(runs, out=folder / "report.html")
    text = (folder / "report.html").read_text()
    return text, Reader(text)


def rows(reader: Reader, caption: str) -> dict[str, list[str]]:
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in reader.tables[caption]}


def test_the_report_shows_the_detection_of_every_run(tmp_path: Path) -> None:
    text, reader = shown(tmp_path, a=section(0, has_attack=True), b=section(0.125, has_attack=False), c=None)
    areas = rows(reader, "Known against unknown classes: AUROC, percent")
    assert areas["cifar10 / svhn: mcm"] == ["87.5", "75.0", MISSING]
    assert areas["cifar10 / svhn: mcm, attacked"] == ["12.5", MISSING, MISSING]
    assert len(areas) == 1 + 2  # no run has a number of the energy
    assert rows(reader, "Mean accuracy of the known classes, percent")["cifar10"] == ["56.2", "43.8", MISSING]
    assert len(re.findall(r'aria-label="ROC of mcm\. TeCoA a: AUROC 87\.5 %, 12\.5 % attacked; TeCoA b', text)) == 1
    assert len(re.findall('aria-label="Histograms of mcm', text)) == 2
    assert "TeCoA a: all known samples; attack {&#34;class&#34;: &#34;PGD&#34;" in text
    assert "| cifar10 / svhn: mcm, attacked | 12.5 |" in (tmp_path / "report.md").read_text()
    assert text.index('id="accuracy"') < text.index('id="unknown-classes"') < text.index('id="audit"')


def test_the_report_shows_knn_over_k(tmp_path: Path) -> None:
    curved, plain = (section(0, has_attack=False) for _ in range(2))
    curved["scores"] = {"knn": {"class": "Neighbours", "k": 3, "bank": 300}}
    found = curved["tasks"]["cifar10"]["unknown"]["svhn"]
    found["scores"]["knn"] = {"auroc": 0.75, "aupr": 0.5, "fpr95": 0.25, "h": 0.5}
    curve = {"names": ["1", "5", "100"], "auroc": [0.625, 0.875, None], "fpr95": [0.5, 0.25, None]}
    found["variants"] = {"knn": curve, "mcm": {"names": ["cold"], "auroc": [0.25], "fpr95": [0.5]}}
    text, reader = shown(tmp_path, a=curved, b=plain)
    assert text.count('aria-label="AUROC of knn over K. TeCoA a: 62.5 % at 1, 87.5 % at 5"') == 1
    assert "<b>cifar10 against svhn</b>" in text
    areas = rows(reader, "Known against unknown classes: AUROC, percent")
    assert areas["cifar10 / svhn: knn"] == ["75.0", MISSING]
    assert areas["cifar10 / svhn: mcm, cold"] == ["25.0", MISSING]
    assert "cifar10 / svhn: knn, 5" not in areas
    (tmp_path / "other").mkdir()
    assert "knn" not in shown(tmp_path / "other", b=plain)[0]


def test_the_report_states_how_many_unknown_names_a_score_knows(tmp_path: Path) -> None:
    part = section(0, has_attack=False)
    names = {"count": 40, "of_unknown": {"svhn": ["seven", "three"], "own": None}}
    part["tasks"]["cifar10"]["further_names"] = {"neg_label": names}
    text, _ = shown(tmp_path, a=part)
    assert "neg_label compares cifar10 with 40 further names, 2 of which are classes of svhn" in text
    assert "an unknown number of which are classes of own" in text


def test_results_without_detection_still_load_and_have_no_section_of_it(tmp_path: Path) -> None:
    text, _ = shown(tmp_path, a=None)
    assert "unknown-classes" not in text
    result = Run.open(tmp_path / "a").result
    assert detection_rows(result) == []
    assert rich_detection(result) is None
    assert "AUROC" not in markdown_table(result)


def test_the_tables_of_a_test_have_a_row_per_set_and_headline(tmp_path: Path) -> None:
    result = Run.open(make_run(tmp_path, detection=section(0, has_attack=True))).result
    head, row = detection_rows(result)
    assert row[:3] == ["cifar10", "svhn", "mcm"]
    assert dict(zip(head[3:], row[3:], strict=True)) == {
        "class acc": "56.2", "H": "62.5", "AUROC": "87.5", "AUPR": "75.0", "FPR95": "50.0",
        "attacked AUROC": "12.5", "attacked AUPR": "25.0", "attacked FPR95": "100.0",
    }  # fmt: skip
    assert f"| {' | '.join(row)} |\n" in markdown_table(result)
    table = rich_detection(result)
    assert table is not None
    assert (table.row_count, len(table.columns)) == (2, 8)  # under attack on a second line
    plain = detection_rows({**result, "detection": section(0, has_attack=False)})
    assert plain == [head[:8], row[:8]]
