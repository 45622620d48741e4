"""Attacks that move images to a named class, against a model whose answer is known by hand and the library's PGD."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from victims import learnt

import robustclip
from robustclip.attacks import APGD, PGD, Attack, Member, Recipe, Square
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule
from robustclip.evaluation.engine import ROBUST, WRONG, examine
from robustclip.methods import TeCoA

CLASSES = ["tabby cat", "tiger cat", "dog"]


def red_green_blue(images: Tensor) -> Tensor:
    """Logits are the three colours of a single pixel."""
    return 10 * images[:, :, 0, 0]


# Class 2 wins within eps if its colour is less than 2 eps below both others: the gaps are .05, .05, .3, .05, 0 and -.1.
PIXELS = torch.tensor([[0.5, 0.3, 0.45], [0.2, 0.5, 0.45], [0.7, 0.2, 0.4], [0.5, 0.5, 0.45], [0.4, 0.3, 0.3],
                       [0.4, 0.3, 0.5]])[..., None, None]  # fmt: skip
LABELS = torch.tensor([0, 1, 0, 0, 2, 0])  # the third last is correct as it is, the last is predicted as the target
ATTACKS = [
    *(PGD(0.03, 0.01, 10, loss=loss, target="dog") for loss in (None, "margin")),
    *(APGD(0.03, 10, loss=loss, target="dog") for loss in ("ce", "margin")),
    Square(0.03, 60, target="dog"),
]


@pytest.mark.parametrize("stop", ["worst", "last"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{type(attack).__name__}-{attack.settings['loss']}")
def test_images_move_to_the_target_where_a_linear_model_lets_them(attack: Attack, stop: Any) -> None:
    members = attack.aimed_at("colours", CLASSES).members(3)
    verdict = examine(PIXELS, LABELS, red_green_blue, members, index=torch.arange(6), stop=stop)
    assert verdict.by[:4].tolist() == [0, 0, ROBUST, 0]
    assert verdict.prediction[:4].tolist() == [2, 2, 0, 2]
    if stop == "worst":  # an image of the target class, and one that is predicted as it, need no attack
        assert verdict.by[4:].tolist() == [WRONG, WRONG]
        assert torch.equal(verdict.attacked[4:], PIXELS[4:])


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_a_larger_radius_moves_more_images_of_a_trained_net(loss: Any) -> None:
    victim, counts = learnt(), []
    for eps in (0.01, 0.05, 0.15):
        attack = APGD(eps, 20, loss=loss, target="c").aimed_at("patterns", list("abcdef"))
        verdict = examine(victim.images[:60], victim.labels[:60], victim.model, attack.members(6))
        moved = (verdict.by >= 0).nonzero()[:, 0]
        assert (victim.model(verdict.attacked[moved]).argmax(1) == 2).all()
        assert (victim.labels[moved] != 2).all()
        counts.append(len(moved))
    assert counts[0] < counts[1] < counts[2] > 40


def test_targeted_pgd_is_that_of_torchattacks() -> None:
    victim, eps = learnt(), 0.06
    images, labels = victim.images[:60], victim.labels[:60]
    theirs = torchattacks.PGD(victim.model, eps=eps, alpha=eps / 4, steps=10, random_start=False)
    theirs.set_mode_targeted_by_label(quiet=True)
    attack = PGD(eps, eps / 4, 10, random_start=False, target="b").aimed_at("patterns", list("abcdef"))
    expected = theirs(images, torch.ones_like(labels))
    torch.testing.assert_close(attack(images, victim.model, labels), expected, atol=1e-6, rtol=0)
    assert 0 < int((victim.model(expected).argmax(1) == 1).sum()) < 60


def test_a_class_is_found_by_name_and_by_task() -> None:
    assert PGD(target="dog").aimed_at("pets", CLASSES).aim == 2
    assert PGD(target={"pets": "tiger cat", "birds": "owl"}).aimed_at("pets", CLASSES).aim == 1
    with pytest.raises(ValueError, match=r"task 'pets' has no class 'tabby'; near names are tabby cat"):
        PGD(target="tabby").aimed_at("pets", CLASSES)
    with pytest.raises(ValueError, match="names no class for the task 'pets'; it has birds"):
        PGD(target={"birds": "owl"}).aimed_at("pets", CLASSES)
    with pytest.raises(ValueError, match="targets must be 0 where target is set, got 9"):
        APGD(targets=9, loss="dlr", target="dog")
    with pytest.raises(ValueError, match="loss must be 'ce' or 'margin' where target is set, got 'dlr'"):
        APGD(loss="dlr", target="dog")


def test_settings_name_the_target_and_attacks_without_one_have_the_settings_of_before() -> None:
    assert PGD(target={"pets": "dog"}).aimed_at("pets", CLASSES).settings["target"] == "dog"
    for attack in (PGD(), APGD(), Square(), Recipe("cascade")):
        assert "target" not in attack.settings
        assert attack.aimed_at("pets", CLASSES) is attack
    aimed = PGD(target="dog").aimed_at("pets", CLASSES)
    assert aimed.scaled(steps=2) is not None
    assert aimed.scaled(steps=2).aim == 2  # type: ignore[union-attr]


def test_a_target_is_refused_where_no_classes_are_known() -> None:
    with pytest.raises(ValueError, match="target 'dog' is for attacks of an evaluation"):
        PGD(target="dog")(PIXELS, red_green_blue, LABELS)
    with pytest.raises(ValueError, match=r"attack\.target must be null in training, got 'dog'"):
        TeCoA(attack=PGD(target="dog"))


class Colours(nn.Module):
    """Answers by the tint of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean((2, 3))
        return 50 * (mean - mean.mean(1, keepdim=True)) @ self.weight.T


def test_an_evaluation_reports_the_share_that_moves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = Colours(), CLIPDataModule(test="shapes:colours", image_size=32, batch_size=7)
    attacks: dict[str, Attack] = {"pgd": PGD("12/255", "3/255", 5), "to_pink": PGD("12/255", "3/255", 5, target="pink")}
    tested = robustclip.evaluate(model, data, attacks, max_samples=24, folder=tmp_path, name="a")
    task = next(iter(data.test_tasks))
    aim = task.label_names.index("pink")
    members = [Member("pgd", attacks["to_pink"].aimed_at("colours", task.label_names))]
    moved, others, correct = 0, 0, 0
    data.connect(limit=24)
    for batch in data.test_dataloader()[0]:
        verdict = examine(batch.images, batch.labels, model, members, index=batch.index)
        is_other = batch.labels != aim
        answers = model(verdict.attacked).argmax(1)
        moved += int((is_other & (answers == aim)).sum())
        others, correct = others + int(is_other.sum()), correct + int((answers == batch.labels).sum())
    success = tested.result["tasks"]["colours"]["to_pink"]["success"]
    assert (success["count"], success["n"], success["left_out"]) == (moved, others, 24 - others)
    assert 0 < moved < others < 24
    assert success["rate"] == moved / others
    assert tested.result["tasks"]["colours"]["to_pink"]["correct"] == correct
    assert "success" not in tested.result["tasks"]["colours"]["pgd"]
    assert "| pgd | to_pink | to_pink success |" in (tested.folder / "table.md").read_text()
    assert tested.result["protocol"]["colours"]["to_pink"]["axes"]["steps"]["pgd"]["target"] == "pink"
    before = (tested.folder / "result.json").read_text()
    assert run(["score", str(tested.folder)]) == 0
    assert (tested.folder / "result.json").read_text() == before
    capsys.readouterr()
    assert run(["table", str(tested.folder)]) == 0
    printed = capsys.readouterr().out
    assert "success" in printed
    assert printed.count(f" {100 * moved / others:.1f} ") == 2, "of the task and of the mean"
    other = robustclip.evaluate(model, data, {**attacks, "to_pink": PGD("12/255", "3/255", 5, target="blue")},
                                max_samples=24, folder=tmp_path, name="b")  # fmt: skip
    capsys.readouterr()
    assert run(["compare", str(tested.folder), str(other.folder)]) != 0
    assert "pink" in "".join(capsys.readouterr())
    assert run(["report", str(tested.folder), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Images that to_pink moves to its target class" in page
    assert f"{100 * moved / others:.1f}" in page


def test_an_unknown_class_ends_an_evaluation_in_one_line(tmp_path: Path) -> None:
    attacks: dict[str, Attack] = {"to": PGD(target="redd")}
    with pytest.raises(ValueError, match="task 'colours' has no class 'redd'; near names are red"):
        robustclip.evaluate(Colours(), "shapes:colours", attacks, image_size=32, max_samples=4, folder=tmp_path)
