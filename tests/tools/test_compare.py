"""Two tests are compared sample by sample, or refused by the axis on which they differ."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from robustclip.intervals import newcombe
from robustclip.results.ledger import Ledger, columns
from robustclip.results.protocol import AXES, CLEAN_AXES, digest
from robustclip.results.run import LEDGERS, RESULT, Run
from robustclip.tools.compare import Comparison, compare, pair

Outcomes = dict[int, str]
"""Sample id to ``r``: robust, ``b``: misclassified under attack, ``w``: misclassified without attack."""


def write_run(
    folder: Path,
    tasks: dict[str, Outcomes],
    *,
    axes: dict[str, Any] | None = None,
    attack: str = "pgd",
    labels: Callable[[int], int] = lambda number: number % 3,
    pixels: Callable[[int], str] = str,
) -> Path:
    (folder / LEDGERS).mkdir(parents=True)
    protocols: dict[str, Any] = {}
    for task, outcomes in tasks.items():
        Ledger(folder / LEDGERS / f"{task}.csv", columns([attack])).append(
            [
                {
                    "id": number,
                    "label": labels(number),
                    "pixels": pixels(number),
                    "clean": labels(number) + (outcome == "w"),
                    f"{attack}.by": {"r": "", "b": "pgd", "w": "clean"}[outcome],
                }
                for number, outcome in outcomes.items()
            ]
        )
        found = {name: f"usual {name}" for name in AXES}
        found |= {"split": task, "sample_ids": digest([[each, labels(each)] for each in sorted(outcomes)])}
        hashes = [pixels(number) for number in sorted(outcomes)]
        found |= {"pixels": digest(hashes) if all(hashes) else None} | (axes or {})
        clean = {name: found[name] for name in CLEAN_AXES}
        protocols[task] = {"clean": {"axes": clean}, attack: {"axes": found}}
    result = {"method": "TeCoA", "tasks": {}, "mean": {"clean": {}, attack: {}}, "protocol": protocols}
    (folder / RESULT).write_text(json.dumps(result))
    return folder


def outcomes(text: str, start: int = 0) -> Outcomes:
    return dict(enumerate(text, start))


@pytest.mark.parametrize("axis", AXES)
def test_each_axis_is_refused_by_its_name_and_values(tmp_path: Path, axis: str) -> None:
    tasks = {"digits": outcomes("rrbw")}
    a = write_run(tmp_path / "a", tasks, axes={axis: "one"})
    b = write_run(tmp_path / "b", tasks, axes={axis: "another"})
    with pytest.raises(ValueError, match="measured different things") as error:
        compare(a, b)
    message = str(error.value)
    assert "\n" not in message
    attack, more = ("clean", "; as do 1 more") if axis in CLEAN_AXES else ("pgd", "")
    remedy = " (--shared_samples true compares those that both have)" if axis in ("sample_ids", "pixels") else ""
    assert message.endswith(f": digits under {attack} differs in {axis}: one against another{remedy}{more}")


@pytest.mark.parametrize("axis", [name for name in AXES if name not in ("sample_ids", "pixels")])
def test_shared_samples_excuse_no_other_axis(tmp_path: Path, axis: str) -> None:
    a = write_run(tmp_path / "a", {"digits": outcomes("rrbw")}, axes={axis: "one"})
    b = write_run(tmp_path / "b", {"digits": outcomes("rrb")}, axes={axis: "another"})
    with pytest.raises(ValueError, match=f"{axis}: one against another"):
        compare(a, b, shared_samples=True)


def test_all_differing_axes_are_reported_at_once(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"digits": outcomes("rr")}, axes={"eps": "linf 0.1", "stop_rule": "last"})
    b = write_run(tmp_path / "b", {"digits": outcomes("rr")}, axes={"eps": "linf 0.2", "stop_rule": "worst"})
    with pytest.raises(ValueError, match=r"eps: linf 0\.1 against linf 0\.2; stop_rule: last against worst$"):
        compare(a, b)


def test_numbers_equal_those_counted_by_hand(tmp_path: Path) -> None:
    """Digits: clean 9 and 10 of 10 right, attacked 2 and 9; letters: all alike."""
    a = write_run(tmp_path / "a", {"digits": outcomes("rrbbbbbbbw"), "letters": outcomes("rbrw")})
    b = write_run(tmp_path / "b", {"digits": outcomes("brrrrrrrrr"), "letters": outcomes("rbrw")})
    found = pair(Run.open(a), Run.open(b))
    rows = {(row.task, row.attack): row for row in found.rows}
    p = 2 * 9 / 2**9 + 2 / 2**9  # a split of 8 to 1, or more uneven
    expected = {
        ("digits", "clean"): Comparison("digits", "clean", 10, 0.9, 1.0, newcombe(9, 1, 0, 0), 0, 1, 1.0, 1.0),
        ("digits", "pgd"): Comparison("digits", "pgd", 10, 0.2, 0.9, newcombe(1, 8, 1, 0), 1, 8, p, 4 * p),
        ("letters", "clean"): Comparison("letters", "clean", 4, 0.75, 0.75, newcombe(3, 0, 0, 1), 0, 0, 1.0, 1.0),
        ("letters", "pgd"): Comparison("letters", "pgd", 4, 0.5, 0.5, newcombe(2, 0, 0, 2), 0, 0, 1.0, 1.0),
    }
    assert rows == expected
    assert p == pytest.approx(stats.binomtest(1, 9).pvalue)
    assert not rows["digits", "pgd"].is_significant
    clean, attacked = found.means
    assert (clean.attack, clean.a, clean.b) == ("clean", 0.825, 0.875)
    assert (attacked.a, attacked.b, attacked.difference.value) == pytest.approx((0.35, 0.7, 0.35))
    assert attacked.difference.low < 0.35 < attacked.difference.high
    assert found.notes == []


def test_pairs_go_by_id_and_not_by_place(tmp_path: Path) -> None:
    forward = outcomes("rbrbw")
    a = write_run(tmp_path / "a", {"digits": forward})
    b = write_run(tmp_path / "b", {"digits": dict(reversed(forward.items()))})
    assert all(row.only_a == row.only_b == 0 for row in pair(Run.open(a), Run.open(b)).rows)


def test_a_significant_difference_is_marked_and_the_rest_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    a = write_run(tmp_path / "a", {"digits": outcomes("b" * 40), "letters": outcomes("rr")})
    b = write_run(tmp_path / "b", {"digits": outcomes("r" * 40), "words": outcomes("rr")})
    compare(a, b / RESULT)
    output = capsys.readouterr().out
    lines = {tuple(line.split()[:2]): line for line in output.splitlines()}
    assert lines["digits", "pgd"].split()[2:] == ["40", "0.0", "100.0", "+100.0", "0", "/", "40", "2e-12"]
    marked = [line.split()[-2:] for line in output.splitlines() if line.strip().endswith("*")]
    assert marked == [["4e-12", "*"]]
    assert "+100.0" in lines["mean", "pgd"]
    assert "only in A: letters under clean, letters under pgd" in output
    assert "only in B: words under clean, words under pgd" in output


def test_shared_samples_are_compared_on_request_alone(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"digits": outcomes("rrrbb")})
    b = write_run(tmp_path / "b", {"digits": outcomes("rrbbw", start=2)})
    with pytest.raises(ValueError, match=r"differs in sample_ids: .*shared_samples true compares those that both have"):
        compare(a, b)
    found = pair(Run.open(a), Run.open(b), shared_samples=True)
    assert found.notes == ["digits: the 3 samples that both have, of 5 in A and 5 in B"]
    counts = [(row.n, row.only_a, row.only_b) for row in found.rows]
    assert counts == [(3, 0, 0), (3, 0, 1)]


def test_other_images_under_equal_ids_and_labels_are_refused_and_counted(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"digits": outcomes("rrbw")})
    b = write_run(tmp_path / "b", {"digits": outcomes("rrbw")}, pixels=lambda number: f"{2 * number}")
    with pytest.raises(ValueError, match=r"digits under clean differs in pixels: 3 of 4 samples show other images \("):
        compare(a, b)
    found = pair(Run.open(a), Run.open(write_run(tmp_path / "c", {"digits": outcomes("rrbwr")})), shared_samples=True)
    assert found.notes == ["digits: the 4 samples that both have, of 4 in A and 5 in B"]
    none = write_run(tmp_path / "none", {"digits": outcomes("rrbw")}, pixels=lambda number: "x")
    with pytest.raises(ValueError, match="share no sample of digits"):
        pair(Run.open(a), Run.open(none), shared_samples=True)
    c = write_run(tmp_path / "d", {"digits": outcomes("rrbw")}, pixels=lambda number: f"{number}{'x' * (number > 1)}")
    found = pair(Run.open(a), Run.open(c), shared_samples=True)
    assert found.notes == ["digits: the 2 samples that both have, of 4 in A and 4 in B; 2 more have different images"]
    assert [row.n for row in found.rows] == [2, 2]


@pytest.mark.parametrize("has_column", [True, False])
def test_results_without_hashes_of_images_are_compared_with_a_note(tmp_path: Path, has_column: bool) -> None:
    a = write_run(tmp_path / "a", {"digits": outcomes("rrbw"), "letters": outcomes("rr")})
    b = write_run(tmp_path / "b", {"digits": outcomes("rrbw"), "letters": outcomes("rr")}, pixels=lambda number: "")
    if not has_column:
        for path in (b / LEDGERS).glob("*.csv"):
            lines = [line.split(",") for line in path.read_text().splitlines()]
            path.write_text("".join(",".join([*line[:2], *line[3:]]) + "\n" for line in lines))
    (note,) = pair(Run.open(a), Run.open(b)).notes
    assert note.startswith("digits, letters: it is not checked that a and b used the same images")


def test_samples_with_other_labels_are_refused(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"digits": outcomes("rrrr")})
    b = write_run(tmp_path / "b", {"digits": outcomes("rrrr")}, labels=lambda number: number)
    c = write_run(tmp_path / "c", {"digits": outcomes("rrr")}, labels=lambda number: number + 1)
    with pytest.raises(ValueError, match="sample_ids"):
        compare(a, b)
    with pytest.raises(ValueError, match=r"sample 0 of digits has label 0 in .* and 1 in .*the data sets differ"):
        compare(a, c, shared_samples=True)


def test_runs_that_share_nothing_are_refused(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"digits": outcomes("rrr")})
    b = write_run(tmp_path / "b", {"letters": outcomes("rrr")})
    c = write_run(tmp_path / "c", {"digits": outcomes("rrr", start=9)})
    with pytest.raises(ValueError, match="share no task under the same attack"):
        compare(a, b)
    with pytest.raises(ValueError, match="share no sample of digits"):
        compare(a, c, shared_samples=True)


def test_attacks_of_one_run_alone_are_listed(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"digits": outcomes("rrr")})
    b = write_run(tmp_path / "b", {"digits": outcomes("rrr")}, attack="fgsm")
    found = pair(Run.open(a), Run.open(b))
    assert [row.attack for row in found.rows] == ["clean"]
    assert found.notes == ["only in A: digits under pgd", "only in B: digits under fgsm"]


def test_a_ledger_that_belies_its_protocol_is_refused(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"digits": outcomes("rrr")}, axes={"sample_ids": "same", "pixels": "same"})
    b = write_run(tmp_path / "b", {"digits": outcomes("rrrr")}, axes={"sample_ids": "same", "pixels": "same"})
    with pytest.raises(ValueError, match=r"differ in their samples, .*: 3 and 4, 3 in both"):
        compare(a, b)
    ledger = b / LEDGERS / "digits.csv"
    ledger.write_text(ledger.read_text() + ledger.read_text().strip().splitlines()[-1] + "\n")
    with pytest.raises(ValueError, match="5 rows for 4 samples"):
        compare(b, b)
    ledger.write_text(ledger.read_text().replace("pgd.by", "pgd.who"))
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"no column 'pgd\.by'"):
        compare(b, b)


def test_a_result_without_axes_is_refused(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"digits": outcomes("rrr")})
    result = json.loads((a / RESULT).read_text())
    (a / RESULT).write_text(json.dumps(result | {"protocol": {"digits": {"clean": "0123"}}}))
    with pytest.raises(ValueError, match="needs axes per task and attack"):
        compare(a, a)


def test_other_seeds_and_commits_are_noted(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, {"digits": outcomes("rrr")}) for name in ("a", "b")]
    for number, folder in enumerate(folders):
        result = json.loads((folder / RESULT).read_text())
        result |= {"commit": f"c{number}", "config": {"seed_everything": number}}
        (folder / RESULT).write_text(json.dumps(result))
    seeds, commits = pair(*map(Run.open, folders)).notes
    assert "seeds 0 and 1" in seeds
    assert "commits c0 and c1" in commits
    assert pair(Run.open(folders[0]), Run.open(folders[0])).notes == []
