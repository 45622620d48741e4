"""Numbers of equal protocols alone are compared, and a run folder is read or refused."""

import json
import re
from pathlib import Path

import pytest

from robustclip.results.ledger import Ledger, columns
from robustclip.results.protocol import AXES, CLEAN_AXES, attack_axes, differences, digest, is_checked, listing
from robustclip.results.run import LEDGERS, RESULT, Run

AXES_OF_A_TEST = {name: f"value of {name}" for name in AXES}


def test_there_are_fifteen_axes_and_a_clean_image_has_those_without_an_attack() -> None:
    assert len(AXES) == 15
    assert set(AXES) - set(CLEAN_AXES) == {"eps", "steps", "loss", "precision", "stop_rule", "ways"}


@pytest.mark.parametrize("axis", AXES)
def test_each_axis_changes_the_hash_and_is_reported_with_both_values(axis: str) -> None:
    changed = AXES_OF_A_TEST | {axis: "other"}
    assert differences(AXES_OF_A_TEST, changed) == [f"{axis}: value of {axis} against other"]
    assert digest(changed) != digest(AXES_OF_A_TEST)


def test_equal_protocols_do_not_differ_after_a_round_through_json() -> None:
    axes = AXES_OF_A_TEST | attack_axes({"pgd": {"norm": "linf", "eps": 4 / 255, "steps": 10, "alpha": 1 / 255}})
    read = json.loads(json.dumps(axes, indent=2, sort_keys=True))
    assert differences(axes, read) == []
    assert digest(axes) == digest(read)


def test_a_hash_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest([1, 2]) != digest([2, 1])
    assert re.fullmatch(r"[0-9a-f]{16}", digest({}))


def test_an_axis_that_one_lacks_is_a_difference() -> None:
    clean = {name: AXES_OF_A_TEST[name] for name in CLEAN_AXES}
    assert [line.split(":")[0] for line in differences(AXES_OF_A_TEST, clean)] == [
        name for name in AXES if name not in CLEAN_AXES
    ]


def test_unknown_images_are_no_difference_but_are_not_checked() -> None:
    for unknown in ({"pixels": None}, {}):
        older = {name: value for name, value in AXES_OF_A_TEST.items() if name != "pixels"} | unknown
        assert differences(AXES_OF_A_TEST, older) == []
        assert not is_checked(AXES_OF_A_TEST, older)
        assert not is_checked(older, AXES_OF_A_TEST)
    assert is_checked(AXES_OF_A_TEST, AXES_OF_A_TEST)


def test_long_values_are_cut_around_their_first_difference() -> None:
    a, b = ({"steps": {"square": {"seeds": "0" * 500, "queries": number}}} for number in (100, 5000))
    (line,) = differences(a, b)
    assert '"queries": 100}' in line
    assert '"queries": 5000}' in line
    assert len(line) < 300
    (line,) = differences({"loss": "x"}, {"loss": "y" * 500})
    assert line.startswith("loss: x against yyy")
    assert len(line) < 300


def test_short_and_long_lists_are_never_confused() -> None:
    assert listing(("a", "b", "c")) == ["a", "b", "c"]
    long, swapped = listing("abcdef"), listing("abcdfe")
    assert long.startswith("6, digest ")
    assert long != swapped


def test_an_attack_of_several_members_states_a_shared_radius_once() -> None:
    members = {
        "pgd": {"norm": "linf", "eps": 0.1, "steps": 10, "loss": "ce"},
        "apgd": {"norm": "linf", "eps": 0.1, "steps": 20, "loss": "dlr"},
    }
    axes = attack_axes(members)
    assert axes["eps"] == "linf 0.1"
    assert axes["loss"] == {"pgd": "ce", "apgd": "dlr"}
    assert axes["steps"] == {"pgd": {"steps": 10}, "apgd": {"steps": 20}}
    assert attack_axes(members | {"pgd": {"norm": "l2", "eps": 0.5}})["eps"] == {"pgd": "l2 0.5", "apgd": "linf 0.1"}
    assert members["pgd"]["eps"] == 0.1
    assert attack_axes({"cw": {}}) == {"eps": "linf None", "steps": {"cw": {}}, "loss": "ce"}


def test_a_finished_run_is_read_by_its_folder_or_its_result(tmp_path: Path) -> None:
    result = {"method": "TeCoA", "tasks": {}, "mean": {"clean": {}, "pgd": {}}, "protocol": {}}
    (tmp_path / RESULT).write_text(json.dumps(result))
    (tmp_path / LEDGERS).mkdir()
    Ledger(tmp_path / LEDGERS / "digits.csv", columns(["pgd"])).append([{"id": 3}])
    for path in (tmp_path, tmp_path / RESULT):
        run = Run.open(path)
        assert run.folder == tmp_path
        assert run.name == tmp_path.name
        assert run.attacks == ["pgd"]
        assert run.rows("digits")[0]["id"] == "3"
    with pytest.raises(ValueError, match="no ledger"):
        run.rows("letters")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is no result of `robustclip test`"),
        ({"protocol.json": "{}"}, "has not finished; start the same command again"),
        ({"result.json": "{"}, "is no result of `robustclip test`"),
        ({"result.json": "[]"}, "lacks method, tasks, mean or protocol"),
        ({"result.json": '{"method": "A", "tasks": {}, "mean": {}}'}, "lacks method, tasks, mean or protocol"),
    ],
)
def test_unfinished_runs_are_refused_in_one_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Run.open(tmp_path)
    assert "\n" not in str(error.value)
