"""``robustclip doctor`` finds what would stop a long run, and how long it would take."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from robustclip.attacks import APGD, PGD, Square, TorchAttack
from robustclip.cli.main import run

ARGUMENTS = (
    "--model ZeroShot --data.root {at} --data.test [wds:good] --trainer.accelerator cpu --trainer.devices 1"
    " --data.eval_batch_size 4 --trainer.logger false --trainer.enable_progress_bar false"
    " --trainer.default_root_dir {at}"
)
Shards = Callable[..., Path]
Doctor = Callable[..., tuple[int, list[list[str]], str]]


@pytest.fixture
def doctor(
    tmp_path: Path, write_shards: Shards, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Doctor:
    """Runs the command; gives its status, the rows of its table, and all that it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")  # one line per row
    write_shards(tmp_path, "good", "test", [4, 4])

    def command(*more: str) -> tuple[int, list[list[str]], str]:
        words = ARGUMENTS.replace("{at}", str(tmp_path)).split()
        status = run(["doctor", *words, *more])
        output = capsys.readouterr()
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.out.splitlines() if "│" in line]
        return status, rows, output.out + output.err

    return command


def found(rows: list[list[str]], mark: str) -> list[str]:
    return [f"{check}: {detail}" for check, result, detail in rows if result == mark]


def test_a_healthy_run_has_no_problem_and_nothing_is_written(doctor: Doctor, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, rows, text = doctor("--evaluation.attacks", '{"pgd3":{"class_path":"PGD","init_args":{"steps":3}}}')
    assert status == 0, text
    assert not found(rows, "problem")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert [check for check, *_ in rows] == [
        "versions", "machine", "trainer", "model", "forward pass", "test: good", "attack: pgd3", "time of test",
        "results",
    ]  # fmt: skip
    details = {check: detail for check, _, detail in rows}
    assert "8 samples, 3 classes" in details["test: good"]
    assert "3 gradient and 0 forward passes" in details["attack: pgd3"]


def test_one_failing_set_hides_no_other(doctor: Doctor, tmp_path: Path, write_shards: Shards) -> None:
    write_shards(tmp_path, "undecodable", "test", [8], broken=[5])
    nameless = write_shards(tmp_path, "nameless", "test", [8])
    (nameless / "classnames.txt").unlink()
    mislabelled = write_shards(tmp_path, "mislabelled", "test", [8])
    (mislabelled / "classnames.txt").write_text("red\ngreen\n")
    sets = "[wds:nowhere,wds:undecodable,wds:good,wds:nameless,wds:mislabelled]"
    status, rows, _ = doctor("--data.test", sets)
    problems = found(rows, "problem")
    assert status == 1
    assert len(problems) == 4
    for words in (
        ("wds:nowhere", "no such data set"),
        ("undecodable", "'s0000005' does not decode", "bad_samples: skip"),
        ("wds:nameless", "no class names"),
        ("wds:mislabelled", "label 2", "2 class names"),
    ):
        assert any(all(word in problem for word in words) for problem in problems), words
    assert any(line.startswith("test: good") for line in found(rows, "ok"))
    assert found(rows, "info")[-1].startswith("time of test"), "what is healthy is still timed"


def test_undecodable_images_and_missing_classes_are_warnings(
    doctor: Doctor, tmp_path: Path, write_shards: Shards
) -> None:
    poor = write_shards(tmp_path, "poor", "test", [8], broken=[5])
    (poor / "classnames.txt").write_text("red\ngreen\nblue\nmauve\n")
    status, rows, _ = doctor("--data.test", "[wds:poor]", "--data.bad_samples", "skip")
    assert status == 0
    warnings = found(rows, "warning")
    assert any("'s0000005' does not decode" in line for line in warnings)
    assert any("1 of 4 classes have no sample: mauve" in line for line in warnings)


def test_training_data_is_checked_for_methods_that_learn(doctor: Doctor, tmp_path: Path, write_shards: Shards) -> None:
    status, rows, _ = doctor("--model", "TeCoA", "--data.train", "wds:nowhere")
    assert status == 1
    assert [line.partition(": no shards")[0] for line in found(rows, "problem")] == ["training: wds:nowhere"]
    write_shards(tmp_path, "train", "train", [30])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    accumulated = ["--data.batch_size", "4", "--trainer.accumulate_grad_batches", "3"]
    status, rows, _ = doctor("--model", "TeCoA", "--data.train", "wds:train", *accumulated)
    assert status == 0
    details = {check: detail for check, _, detail in rows}
    assert "27 samples" in details["training: train"]
    assert "3 samples" in details["hold-out: train"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert details["effective batch"].startswith("12 images")
    assert details["schedule"].startswith("3 steps per epoch, no number of steps in the run; learning rate 1e-05")
    assert "of training and" in details["time of an epoch"]


def test_one_step_is_shared_out_over_the_planned_devices(doctor: Doctor, tmp_path: Path, write_shards: Shards) -> None:
    write_shards(tmp_path, "train", "train", [30])
    words = ["--model", "TeCoA", "--data.train", "wds:train", "--data.holdout", "0", "--data.drop_last", "true"]
    words += ["--trainer.devices", "2", "--trainer.max_epochs", "5", "--model.warmup_steps", "20"]
    status, rows, _ = doctor(*words, "--data.global_batch_size", "8")
    assert status == 0
    details = {check: detail for check, _, detail in rows}
    assert details["effective batch"] == "8 images per optimiser step: 4 x 2 devices x 1 accumulated batches"
    assert details["schedule"].startswith("3 steps per epoch, 15 in the run; learning rate 1e-05 after 20 steps")
    assert any("model.warmup_steps" in line for line in found(rows, "warning")), "the rate is never reached"
    status, rows, _ = doctor(*words, "--data.global_batch_size", "9")
    assert status == 1
    assert any("data.global_batch_size is 9, which 2 processes" in line for line in found(rows, "problem"))


@pytest.mark.parametrize(
    ("arguments", "check", "words"),
    [
        (["--trainer.accelerator", "gpu"], "trainer", "gpu"),
        (["--model.pretrained", "nowhere"], "model", "'nowhere' is no folder"),
        (["--ckpt_path", "none.ckpt"], "checkpoint", "none.ckpt"),
        (["--data.test", "[wds:good,wds:good]"], "data", "2 data sets are named 'good'"),
        (["--data.test", "[]"], "data", "nothing to test on"),
    ],
)
def test_a_part_that_does_not_build_leaves_the_others_checked(
    doctor: Doctor, arguments: list[str], check: str, words: str
) -> None:
    if arguments[-1] == "gpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status, rows, _ = doctor(*arguments)
    assert status == 1
    (problem,) = found(rows, "problem")
    assert problem.startswith(f"{check}: ")
    assert words in problem
    assert arguments[-1] == "[]" or any("test: good" in line for line in found(rows, "ok"))


def test_model_and_trainer_are_checked_apart(doctor: Doctor) -> None:
    status, rows, _ = doctor("--model.pretrained", "nowhere", "--trainer.strategy", "nonesuch")
    assert status == 1
    assert [line.partition(":")[0] for line in found(rows, "problem")] == ["model", "trainer"]


def test_a_stream_is_checked(doctor: Doctor, tmp_path: Path) -> None:
    status, rows, _ = doctor("--data.test", f"[wds:file://{tmp_path}/good]")
    assert status == 0
    assert any("uncounted samples" in line for line in found(rows, "ok"))
    (tmp_path / "good" / "test" / "0.tar").unlink()
    assert doctor("--data.test", f"[wds:file://{tmp_path}/good]")[0] == 1


def test_one_prediction_for_all_images_is_reported(doctor: Doctor, tmp_path: Path, write_shards: Shards) -> None:
    """The same names in every class but one: nothing else can be predicted than the first of the equals."""
    base = write_shards(tmp_path, "odd", "test", [9])
    (base / "zeroshot_classification_templates.txt").write_text("{c}\n")
    (base / "classnames.txt").write_text("red\nred\nred\n")
    _, rows, _ = doctor("--data.test", "[wds:odd]")
    assert any("all 9 images that were tried are classified as 'red'" in line for line in found(rows, "info"))


ATTACK = """
from robustclip.attacks import PGD, Cost

class Mine(PGD):
    def cost(self, classes):
        return Cost(70, classes)

class Broken(PGD):
    def perturb(self, images, forward, targets, loss, *, index, seed):
        return images.no_such_method()
"""


def test_an_attack_of_the_user_states_its_cost_and_is_tried(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_attacks.py").write_text(ATTACK)
    attacks = '{"mine":{"class_path":"own_attacks.Mine"},"broken":{"class_path":"own_attacks.Broken"}}'
    status, rows, _ = doctor("--evaluation.attacks", attacks)
    details = {check: detail for check, _, detail in rows}
    assert "70 gradient and 3 forward passes" in details["attack: mine"]
    assert status == 1
    (problem,) = found(rows, "problem")
    assert problem.startswith("attack: broken")
    assert "no_such_method" in problem


def test_passes_follow_from_the_settings() -> None:
    assert PGD(steps=7).cost(10) == (7, 0)
    assert PGD(steps=7, keep="best").cost(10) == (7, 1)
    assert APGD(steps=10, restarts=2).cost(10) == (2 * 11, 0), "the start has a gradient too"
    assert APGD(steps=10, loss="dlr", targets=9).cost(3) == (2 * 11, 1), "no more targets than wrong classes"
    assert TorchAttack("PGD", eps="1/255", kwargs={"steps": 4}).cost(10) == (4, 0)
    assert TorchAttack("AutoAttack").cost(10) is None
    assert Square(queries=50).cost(10) == (0, 50)


def test_the_stated_passes_are_those_of_the_attack() -> None:
    for attack in (PGD(steps=5, keep="best"), APGD(eps="1/255", steps=6), Square(queries=9)):
        forwards = []

        def forward(images: torch.Tensor, calls: list[int] = forwards) -> torch.Tensor:
            calls.append(len(images))
            return 100 * torch.eye(3)[0].expand(len(images), 3) + 0 * images.mean((1, 2, 3))[:, None]  # unbreakable

        attack(torch.full((2, 3, 8, 8), 0.5), forward, torch.zeros(2, dtype=torch.long))
        cost = attack.cost(3)
        assert cost is not None
        assert len(forwards) <= sum(cost) <= len(forwards) + 1


@pytest.mark.slow
def test_the_estimate_is_of_the_right_order(doctor: Doctor, tmp_path: Path) -> None:
    words = [
        "--model", "ZeroShot", "--data.test", "[shapes:colours]", "--data.eval_batch_size", "64",
        "--evaluation.attacks", '{"pgd10":{"class_path":"PGD","init_args":{"steps":10}}}',
    ]  # fmt: skip
    _, rows, _ = doctor(*words)
    (detail,) = [detail for check, _, detail in rows if check == "time of test"]
    estimated = float(detail.removeprefix("about ").split(" s ")[0])
    start = time.perf_counter()
    base = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    assert run(["test", *words, *base, "--results.folder", str(tmp_path / "results")]) == 0
    took = time.perf_counter() - start
    assert 0.1 * estimated <= took <= 3 * max(estimated, 1.0)  # a second of set-up has nothing to do with passes
