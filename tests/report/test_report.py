"""The report shows the numbers of result and ledgers, and no text in them can harm it."""

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image
from report_cases import CLASSES, EPS, FEW, MEMBERS, N, Reader, axes, checks, keep_example, make_run, write_ledger

from robustclip.report import report
from robustclip.report.blocks import Block, Cell, Table
from robustclip.report.plots import interpolations
from robustclip.report.section import Section
from robustclip.report.view import View, views
from robustclip.results.run import LEDGERS, PROTOCOL, RESULT, Run
from robustclip.tools.compare import pair


def read_page(runs: list[Path], folder: Path) -> tuple[str, Reader]:
    out = folder / "report.html"
    report(runs, out=out)
    text = out.read_text()
    return text, Reader(text)


def cells(reader: Reader, caption: str) -> dict[str, dict[str, list[str]]]:
    head, *rows = reader.tables[caption]
    return {
        row[0].strip(): {name.strip(): cell.split() for name, cell in zip(head[1:], row[1:], strict=True)}
        for row in rows
    }


def formatted(score: dict[str, Any]) -> list[str]:
    low, high = score["interval"]
    return [f"{100 * score['acc1']:.1f}", f"{100 * low:.1f}", "to", f"{100 * high:.1f}"]


def test_one_run_shows_every_number_of_its_result(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    result = json.loads((run / RESULT).read_text())
    _, reader = read_page([run], tmp_path)
    shown, effort = cells(reader, "Accuracy of every task"), cells(reader, "Samples and seconds")
    for task, values in result["tasks"].items():
        assert effort[task] == {"n": [str(values["n"])], "TeCoA, seconds": [f"{values['seconds']:.1f}"]}
        for kind in result["mean"]:
            assert shown[task][kind] == formatted(values[kind])
    for kind, values in result["mean"].items():
        assert shown["mean"][kind] == formatted(values)


@pytest.mark.parametrize("count", [2, 5])
def test_several_runs_stand_side_by_side(tmp_path: Path, count: int) -> None:
    runs = [make_run(tmp_path / f"run{number}", strength=0.2 * number) for number in range(count)]
    _, reader = read_page(runs, tmp_path)
    for kind in ("clean", *EPS):
        title = "Clean accuracy" if kind == "clean" else f"Accuracy under {kind}"
        shown = cells(reader, title)
        means = cells(reader, "Mean accuracy over the tasks")
        for run in runs:
            result = json.loads((run / RESULT).read_text())
            assert means[f"TeCoA {run.name}"][kind] == formatted(result["mean"][kind])
            for task, values in [*result["tasks"].items(), ("mean", result["mean"])]:
                found = [word for word in shown[task][f"TeCoA {run.name}"] if word != "▲"]
                assert found == formatted(values[kind])


def test_the_best_run_is_marked_where_every_paired_difference_is_above_zero(tmp_path: Path) -> None:
    def marks(*robust: int, templates: str = "a photo of a {}") -> int:
        """Counts the marks of runs with this many robust samples of 200, of which the larger sets hold the smaller."""
        folder, n = tmp_path / f"{robust}{templates}", 200
        runs = []
        for number, count in enumerate(robust):
            run = make_run(
                folder / str(number), tasks=("pcam",), attacks=("pgd10",), templates=(templates,) * (number + 1)
            )
            by = [""] * count + ["pgd"] * (n - count)
            write_ledger(run / LEDGERS / "pcam.csv", {"pgd10": by}, n)
            result = json.loads((run / RESULT).read_text())
            result["tasks"]["pcam"]["n"] = n
            for place in (result["tasks"]["pcam"], result["mean"]):
                place["pgd10"] |= {"acc1": count / n, "correct": count}
                place["clean"] |= {"acc1": 1.0, "correct": n}
            if templates == "a photo of a {}":
                result["protocol"]["pcam"] = {kind: axes("pcam", kind, (templates,)) for kind in ("clean", "pgd10")}
            (run / RESULT).write_text(json.dumps(result))
            runs.append(run)
        text, _ = read_page(runs, folder)
        assert ("no run is best" in text.split("Under pgd10")[1].split(".")[0]) == ('title="best"' not in text)
        return text.count('<abbr title="best">')

    assert marks(40, 80) == 3  # the task, the mean, and the mean in the summary
    assert marks(40, 54) == 3  # the intervals of the accuracies overlap, that of the difference excludes 0
    assert marks(40, 42) == 0
    assert marks(40, 80, 82) == 0
    assert marks(40, 80, templates="another {}") == 0  # another protocol


def test_successes_of_members_equal_the_ledger(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    _, reader = read_page([run], tmp_path)
    for attack, members in MEMBERS.items():
        shown = cells(reader, f"Successes of the members of {attack}")
        for task in ("cifar10", "pcam"):
            with (run / LEDGERS / f"{task}.csv").open() as file:
                by = [row[f"{attack}.by"] for row in csv.DictReader(file)]
            named = {
                "misclassified without attack": "clean",
                "robust": "",
                **{name: name for name in members if name in by},
            }
            assert {name: shown[task][name] for name in named} == {k: [str(by.count(v))] for k, v in named.items()}
            assert shown[task]["samples"] == [str(N)]


def test_markdown_and_csv_hold_the_numbers_of_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    _, reader = read_page([run], tmp_path)
    shown = cells(reader, "Accuracy of every task")
    rows = [line.strip("| \n").split(" | ") for line in (tmp_path / "report.md").read_text().splitlines()]
    for task, values in shown.items():
        row = next(row for row in rows if row[0] == task)
        written = [word.strip("()") for cell in row[1:] for word in cell.split()]
        assert written == [word for cell in values.values() for word in cell]
    with (tmp_path / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 4
    for line in lines:
        assert shown[line["task"]][line["attack"]] == [line["percent"], line["low"], "to", line["high"]]


def test_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", attacks=FEW)
    keep_example(run, 3)
    text, reader = read_page([run], tmp_path)
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    assert not {"script", "link", "iframe", "object", "base"} & set(reader.names)


def test_ids_are_unique_and_links_lead_somewhere(tmp_path: Path) -> None:
    text, reader = read_page([make_run(tmp_path / "a", attacks=FEW), make_run(tmp_path / "b", attacks=FEW)], tmp_path)
    ids = Counter(value for name, value in reader.attributes if name == "id")
    assert max(ids.values()) == 1
    links = {value[1:] for name, value in reader.attributes if name == "href"}
    assert links | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)


def test_text_of_files_is_escaped(tmp_path: Path) -> None:
    evil = "\"><script>alert('x')</script>\\1 $a$"
    run = make_run(
        tmp_path / "run",
        attacks=FEW,
        method=evil,
        commit=evil,
        device=evil,
        notes=[evil],
        templates=(evil,),
        versions={evil: evil},
    )
    keep_example(run, 3)
    text, reader = read_page([run], tmp_path)
    assert "script" not in reader.names
    assert escape(CLASSES[1]) in text
    assert evil in reader.words
    assert "<script" not in (tmp_path / "report.md").read_text()


def test_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", attacks=FEW), make_run(tmp_path / "b", attacks=FEW)]
    keep_example(runs[0], 3)
    report(runs, out=tmp_path / "first" / "report.html")
    report(runs, out=tmp_path / "second" / "other.html")
    for ending in (".html", ".md", ".csv"):
        first, second = (tmp_path / place for place in ("first/report", "second/other"))
        assert first.with_suffix(ending).read_bytes() == second.with_suffix(ending).read_bytes()


def test_no_page_has_an_empty_section_of_images(tmp_path: Path) -> None:
    text, reader = read_page([make_run(tmp_path / "run", attacks=FEW)], tmp_path)
    assert 'id="images"' not in text
    assert not reader.names["img"]


def test_gallery_shows_names_and_is_limited(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", attacks=FEW)
    for number in range(5):
        keep_example(run, number)
    keep_example(run, 9, attack="autoattack")
    text, reader = read_page([run], tmp_path)
    assert reader.names["img"] == 3 * 3
    assert "3 of 6 images kept" in text
    assert any("sample 9" in word for word in reader.words)  # attacks take turns
    assert any(
        "perturbation \N{MULTIPLICATION SIGN}127" in word for word in reader.words
    )  # half of the range, over 1/255


def test_images_are_exported_as_png_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", attacks=FEW)
    keep_example(run, 3)
    report([run], out=tmp_path / "report.html", images=tmp_path / "png")
    folder = tmp_path / "png" / "run" / "cifar10" / "pgd10"
    assert {path.name for path in folder.iterdir()} == {f"3_{n}.png" for n in ("clean", "perturbation", "attacked")}
    clean, attacked = (np.asarray(Image.open(folder / f"3_{name}.png"), int) for name in ("clean", "attacked"))
    assert 1 <= abs(clean - attacked).max() <= 2  # 1/255, and the rounding of both images


def test_audit_shows_every_check_and_the_grade(tmp_path: Path) -> None:
    _, reader = read_page([make_run(tmp_path / "run", attacks=FEW)], tmp_path)
    for check in checks():
        assert check["found"] in reader.words
        assert check["why"] in reader.words
    assert {"✓ passed", "! warning", "\N{EN DASH} not measured", "B"} <= set(reader.words)


def test_a_run_without_audit_is_marked(tmp_path: Path) -> None:
    text, _ = read_page([make_run(tmp_path / "run", attacks=FEW, audit=None)], tmp_path)
    assert "This run has not been audited." in text


def test_unlike_protocols_are_flagged_above_the_tables(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", attacks=FEW, method="A"),
        make_run(tmp_path / "b", attacks=FEW, method="B", templates=("{}",)),
    ]
    text, _ = read_page(runs, tmp_path)
    assert text.index("Unlike protocols") < text.index("<caption>Clean accuracy")
    assert escape('A and B differ in templates: ["a photo of a {}"] against ["{}"]') in text
    assert "runs differ in templates" in text
    runs[1] = make_run(tmp_path / "c", attacks=FEW, method="C")
    assert "UNLIKE PROTOCOLS" in (tmp_path / "report.md").read_text()
    assert "Unlike protocols" not in read_page(runs, tmp_path)[0]


def test_tasks_and_attacks_of_a_single_run_are_flagged(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", attacks=("pgd10", "autoattack")),
        make_run(tmp_path / "b", tasks=("cifar10",), attacks=("pgd10",)),
    ]
    text, _ = read_page(runs, tmp_path)
    assert "task pcam is only in TeCoA a" in text
    assert "attack autoattack is only in TeCoA a" in text


def test_a_run_whose_audit_failed_is_marked_and_never_best(tmp_path: Path) -> None:
    failed = {"grade": "F", "checks": [{"name": "black_box", "status": "fail", "found": "found 9", "why": "masked"}]}
    runs = [
        make_run(tmp_path / "weak", attacks=FEW, method="Weak", strength=0.9),
        make_run(tmp_path / "masked", attacks=FEW, method="Masked", strength=0.0, audit=failed),
    ]
    text, reader = read_page(runs, tmp_path)
    assert "Masked ✕ failed audit" in reader.tables["Mean accuracy over the tasks"][2][0]
    for caption in ("Clean accuracy", "Accuracy under pgd10"):
        head, *rows = reader.tables[caption]
        assert head[2].strip() == "Masked ✕ failed audit"
        assert not any("▲" in row[2] for row in rows)
    assert "Masked failed black_box: found 9" in text
    assert text.count('aria-label="Mean accuracy against radius. Weak: ') == 1
    assert "Masked ✕ failed audit: mean" in text
    assert "Masked is best" not in text


def test_the_summary_states_the_paired_difference_of_the_best_run(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, attacks=FEW, method=name, n=200, strength=s) for name, s in (("A", 0.9), ("B", 0.1))
    ]
    differences = {each.attack: each.difference for each in pair(*map(Run.open, runs)).means}
    value, low, high = (f"{100 * number:+.1f}" for number in differences["pgd10"])
    text, _ = read_page(runs, tmp_path)
    interval = f"95\N{NO-BREAK SPACE}% interval of the paired difference {low} to {high}"
    sentence = f"Under pgd10: B is best, {value} points, {interval}"
    assert sentence in text
    assert text.index(sentence) < text.index("<nav")


class Peak(Section):
    title = "Memory"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        rows = [(view.label, [Cell(str(view.run.result["config"].get("peak", 3)))]) for view in views]
        return [Table("Peak memory, MiB", "run", ["peak"], rows)]


def test_a_section_of_a_user_is_accepted_by_its_class_path(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", attacks=FEW)
    report([run], out=tmp_path / "report.html", sections=[f"{__name__}.Peak"])
    text = (tmp_path / "report.html").read_text()
    assert cells(Reader(text), "Peak memory, MiB") == {"TeCoA": {"peak": ["3"]}}
    assert "| TeCoA | 3 |" in (tmp_path / "report.md").read_text()
    for wrong in ("nowhere.Peak", f"{__name__}.Path", "Peak"):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            report([run], out=tmp_path / "report.html", sections=[wrong])


def test_radii_of_one_attack_share_a_curve(tmp_path: Path) -> None:
    _, reader = read_page([make_run(tmp_path / "run")], tmp_path)
    assert "pgd10_half, pgd10" in reader.words
    assert any("Measured at one radius only: autoattack." in word for word in reader.words)


def test_models_between_the_same_two_are_joined_in_the_order_of_alpha(tmp_path: Path) -> None:
    def run(name: str, alpha: float, tuned: str) -> Path:
        model = {"pretrained": "openai", "interpolation": {"alpha": alpha, "fine_tuned": tuned}}
        return make_run(tmp_path / name, attacks=FEW, model=model)

    runs = [run("one", 1.0, "aa"), run("none", 0.0, "aa"), run("half", 0.5, "aa"), run("other", 0.5, "bb")]
    lines = interpolations(views([*runs, make_run(tmp_path / "plain", attacks=FEW)]))
    assert [[(alpha, view.run.name) for alpha, view in line] for line in lines] == [
        [(0.0, "none"), (0.5, "half"), (1.0, "one")]
    ]
    accuracies = [view.mean["pgd10"].text for _, view in lines[0]]
    told = ", ".join(f"{text} % at {alpha}" for text, alpha in zip(accuracies, ("0", "0.5", "1"), strict=True))
    assert f"pgd10: {told}" in read_page(runs, tmp_path)[0]
    assert "between the original" not in read_page(runs[-1:], tmp_path)[0]


def test_runs_without_an_attack_have_no_sections_of_attacks(tmp_path: Path) -> None:
    clean, attacked = make_run(tmp_path / "clean", attacks=()), make_run(tmp_path / "attacked", attacks=FEW)

    def sections(*runs: Path) -> list[str]:
        return re.findall(r'<section id="([^"]+)">', read_page([*runs], tmp_path)[0])

    assert sections(clean) == ["summary", "accuracy", "audit", "protocol", "runs"]
    of_attacks = ["clean-and-robust", "accuracy", "which-member-succeeded"]
    assert sections(clean, attacked) == ["summary", *of_attacks, "audit", "protocol", "runs"]


def test_attack_without_a_radius_has_no_curve(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", attacks=("pgd10",))
    result = json.loads((run / RESULT).read_text())
    for task in result["protocol"].values():
        task["pgd10"]["axes"]["eps"] = "linf None"
    (run / RESULT).write_text(json.dumps(result))
    assert "No curve shows pgd10: the radius is not known." in read_page([run], tmp_path)[0]


def test_unfinished_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^.*is no result of `robustclip test`.*$"):
        report([tmp_path / "nowhere"], out=tmp_path / "report.html")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / PROTOCOL).write_text("{}")
    with pytest.raises(ValueError, match="has not finished"):
        report([tmp_path / "unfinished"], out=tmp_path / "report.html")
    with pytest.raises(ValueError, match="lacks 'n or protocol of cifar10'"):
        report([make_run(tmp_path / "run", protocol={})], out=tmp_path / "report.html")
    with pytest.raises(ValueError, match=r"end in \.html"):
        report([tmp_path], out=tmp_path / "report.md")
    with pytest.raises(ValueError, match="at least one"):
        report([], out=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_missing_ledger_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / LEDGERS / "pcam.csv").unlink()
    with pytest.raises(ValueError, match="is no ledger"):
        report([run], out=tmp_path / "report.html")
