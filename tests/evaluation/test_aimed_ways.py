"""Attacks that move images to a named class go through a test-time defence in every way."""

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor

from robustclip.attacks import PGD, Member
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule
from robustclip.defences import Defence, GaussianNoise
from robustclip.evaluation import ResultsWriter, RobustEvaluation
from robustclip.evaluation.engine import ROBUST, WRONG, examine
from robustclip.evaluation.ways import Ways, examine_defended, members_through
from robustclip.methods import ZeroShot
from robustclip.results.run import Run
from robustclip.types import Batch

COUNT, FEW = 24, Ways(draws=2, judges=3, queries=30)
TO_PINK = PGD("12/255", "3/255", 5, target="pink")


class Cut(Defence):
    """Leaves the image as it is, but cuts the gradient."""

    backward = "none"

    def purify(self, method: Any, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        return images.detach()


class Blue(Defence):
    """Every image but a red one becomes blue, so that no image moves to pink."""

    def forward(self, method: Any, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        logits = method.logits(images, task)
        names = method.tasks[task].label_names
        return logits + 1e3 * torch.eye(len(names))[names.index("blue")]


@pytest.fixture(scope="module")
def setting() -> tuple[Any, Batch]:
    data = CLIPDataModule(test=["shapes:colours"], image_size=32, eval_batch_size=COUNT)
    data.connect(limit=COUNT, done=None)
    data.setup("test")
    return data.test_tasks[0], next(iter(data.test_dataloader()[0]))


def aimed(task: Any) -> list[Member]:
    return [Member("pgd", TO_PINK.aimed_at(task.name, task.label_names))]


def attacked(defence: Defence, task: Any, batch: Batch) -> tuple[ZeroShot, Any]:
    method = ZeroShot(defence=defence)
    method.eval().prepare([task])
    images, labels, index = batch[:3]
    return method, examine_defended(method, task.name, images, labels, aimed(task), FEW, index=index)


@pytest.mark.slow
def test_a_defence_that_changes_no_answer_moves_as_many_images(setting: tuple[Any, Batch]) -> None:
    task, (images, labels, index, *_) = setting
    aim = task.label_names.index("pink")
    for defence in (Defence(), Cut()):
        method, verdict = attacked(defence, *setting)
        expected = examine(images, labels, lambda x: method.logits(x, task.name), aimed(task), index=index)  # noqa: B023
        moved = expected.by >= 0
        assert 0 < int(moved.sum()) < COUNT
        assert torch.equal(verdict.undefended.by, expected.by)
        assert torch.equal(verdict.static, expected.by), "replayed images move as they are"
        assert (verdict.adaptive.by[moved] >= 0).all()
        assert torch.equal(verdict.adaptive.by == WRONG, (labels == aim) | (expected.by == WRONG))
        moved = verdict.adaptive.by >= 0
        answers = method.answers(verdict.adaptive.attacked, task.name, index=index).argmax(1)
        assert (answers[moved] == aim).all()


def test_another_wrong_class_is_no_success(setting: tuple[Any, Batch]) -> None:
    task, batch = setting
    _, verdict = attacked(Blue(), task, batch)
    assert (verdict.undefended.by >= 0).any()
    is_pink = batch.labels == task.label_names.index("pink")
    assert (verdict.adaptive.by == torch.where(is_pink, WRONG, ROBUST)).all()
    assert (verdict.adaptive.prediction == task.label_names.index("blue")).all()


def test_the_random_search_after_the_gradients_has_the_target(setting: tuple[Any, Batch]) -> None:
    task = setting[0]
    members = members_through(Cut(), aimed(task), FEW)
    assert [member.name for member in members] == ["replay.pgd", "own.pgd", "identity.pgd", "bare.pgd",
                                                   "black_box.square"]  # fmt: skip
    assert {member.attack.aim for member in members} == {task.label_names.index("pink")}


@pytest.mark.slow
@pytest.mark.parametrize("defence", [Defence(), GaussianNoise(0.05, 1)], ids=["identity", "noise"])
def test_a_test_reports_the_success_without_the_defence_and_through_it(
    defence: Defence, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {}
    for name, method in (("plain", ZeroShot()), ("defended", ZeroShot(defence=defence))):
        evaluation = RobustEvaluation({"to_pink": TO_PINK}, max_samples=COUNT, ways=FEW, probes=4)
        data = CLIPDataModule(test=["shapes:colours"], image_size=32, eval_batch_size=12)
        helpers.run_test(method, data, evaluation, ResultsWriter(str(tmp_path), name))
        runs[name] = Run.open(tmp_path / name)
    plain, ours = (tested.result["tasks"]["colours"]["to_pink"] for tested in runs.values())
    success = ours["success"]
    assert success["undefended"]["count"] == plain["success"]["count"] > 0
    assert success["count"] >= success["static"]["count"]
    rows, aim = runs["defended"].rows("colours"), str(plain["success"]["aim"])
    others = [row for row in rows if row["label"] != aim]
    assert success["n"] == success["static"]["n"] == len(others) < COUNT
    assert success["count"] == sum(row["to_pink.prediction"] == aim for row in others)
    assert ours["correct"] == sum(row["to_pink.prediction"] == row["label"] for row in rows)
    assert "adaptive" not in ours, "the accuracy on aimed images is not the worst case over wrong classes"
    assert runs["defended"].result["mean"]["to_pink"]["success"]["static"]["rate"] == success["static"]["rate"]
    heads = "| to_pink | to_pink success undefended | to_pink success static | **to_pink success adaptive** |"
    assert heads in (tmp_path / "defended" / "table.md").read_text()
    before = (tmp_path / "defended" / "result.json").read_text()
    assert run(["score", str(tmp_path / "defended")]) == 0
    assert (tmp_path / "defended" / "result.json").read_text() == before
    page = tmp_path / "report.html"
    assert run(["report", str(tmp_path / "plain"), str(tmp_path / "defended"), "--out", str(page)]) == 0
    assert "Images that to_pink moves to its target class" in page.read_text()
    assert run(["compare", str(tmp_path / "plain"), str(tmp_path / "defended")]) == 0
    capsys.readouterr()
