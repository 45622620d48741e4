"""L1: the projection against a solver, attacks against exact answers and the authors' code, and a whole test."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack
from scipy.optimize import minimize
from torch import Tensor, nn
from victims import assert_inside, learnt

from robustclip.attacks import APGD, PGD, Attack, Recipe, Square, TorchAttack, l1_ball, perturbation_set
from robustclip.attacks.attack import Member
from robustclip.attacks.recipes import RECIPES, RecipeName
from robustclip.cli.main import run
from robustclip.evaluation.engine import ROBUST, examine
from robustclip.intervals import mcnemar
from robustclip.results.run import Run

IDS = torch.arange(300)


def nearest(image: Tensor, point: Tensor, eps: float) -> np.ndarray:
    """Solves the quadratic program with the change split into its positive and its negative part."""
    x, p = image.flatten().double().numpy(), point.flatten().double().numpy()
    n = len(x)

    def cost(parts: np.ndarray) -> tuple[float, np.ndarray]:
        rest = parts[:n] - parts[n:] - (p - x)
        return float(rest @ rest), np.concatenate([2 * rest, -2 * rest])

    budget = {"type": "ineq", "fun": lambda parts: eps - parts.sum(), "jac": lambda _: -np.ones(2 * n)}
    bounds = [(0, room) for room in (*(1 - x), *x)]
    found = minimize(cost, np.zeros(2 * n), jac=True, bounds=bounds, constraints=[budget], method="SLSQP",
                     options={"ftol": 1e-13, "maxiter": 500})  # fmt: skip
    return np.asarray(x + found.x[:n] - found.x[n:])


@pytest.mark.parametrize("eps", [0.05, 0.4, 1.5, 5.0])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_the_projection_is_the_nearest_point_of_the_perturbation_set(eps: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(5, 3, 2, 2, generator=generator) * 1.4 - 0.2).clamp(0, 1)  # some pixels have no room
    points = images + scale * torch.randn(images.shape, generator=generator)
    projected = l1_ball.project(images, eps, points)
    assert_inside(projected, images, eps, "l1")
    for image, point, ours in zip(images, points, projected, strict=True):
        np.testing.assert_allclose(ours.flatten().numpy(), nearest(image, point, eps), atol=2e-5)


def test_the_radius_holds_exactly_and_is_used_at_every_size() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 224, 224, generator=generator)
    for eps in (0.01, 12.0, 3000.0):
        attacked = l1_ball.project(images, eps, images + torch.randn(images.shape, generator=generator))
        assert_inside(attacked, images, eps, "l1")
        length = (attacked.double() - images.double()).abs().flatten(1).sum(1)
        assert (length >= eps * (1 - 1e-4) - 1e-6).all()
        assert torch.equal(l1_ball.project(images, eps, attacked), attacked), "a point of the set stays where it is"


def test_a_step_changes_the_largest_entries_by_equal_amounts() -> None:
    gradient = torch.tensor([0.1, -3.0, 0.2, 2.0]).view(1, 1, 2, 2)
    step = l1_ball.sparse_direction(gradient, torch.tensor([0.5]))
    assert step.flatten().tolist() == [0, -0.5, 0, 0.5]
    assert l1_ball.sparse_direction(gradient, torch.tensor([0.0])).flatten().tolist() == [0, -1, 0, 0]


def test_random_starts_are_even_in_all_directions_and_reach_all_lengths() -> None:
    images = torch.full((400, 3, 2, 2), 0.5)
    change = perturbation_set.start(images, 0.4, "l1", torch.arange(400), 0) - images
    length = change.abs().flatten(1).sum(1)
    assert length.max() <= 0.4
    assert abs(float(length.mean()) - 0.2) < 0.02
    assert abs(float((change > 0).float().mean()) - 0.5) < 0.03


def test_attacks_find_the_robust_samples_of_a_linear_model() -> None:
    """The margin falls most if the pixels of the largest weights move to the edge of the range, one after another."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).requires_grad_(False)
    images, eps = torch.rand(80, 3, 4, 4, generator=generator), 0.8
    model[1].weight.copy_(torch.randn(2, 48, generator=generator))
    model[1].bias.copy_(-model[1].weight.sum(1) / 2)
    labels = model(images).argmax(1)
    margins = (model(images).gather(1, labels[:, None]) - model(images).gather(1, 1 - labels[:, None]))[:, 0]
    slope = model[1].weight[labels] - model[1].weight[1 - labels]
    room = torch.where(slope > 0, images.flatten(1), 1 - images.flatten(1))
    order = slope.abs().argsort(dim=1, descending=True)
    room, slope = room.gather(1, order), slope.abs().gather(1, order)
    used = torch.minimum(room, (eps - room.cumsum(1) + room).clamp(min=0))
    left = margins - (slope * used).sum(1)
    is_robust = left > 0
    assert 10 < is_robust.sum() < 70
    for attack in (APGD(eps, 50, "l1"), APGD(eps, 50, "l1", "margin"), PGD(eps, eps / 10, 100, "l1")):
        verdict = examine(images, labels, model, [Member("a", attack)], index=IDS[:80])
        assert not (is_robust & (verdict.by != ROBUST)).any()
        # Steps are at least a tenth of the radius, so that a smaller rest of the margin may remain.
        assert not ((left < -0.1 * eps * slope.amax(1)) & (verdict.by == ROBUST)).any()
        assert (verdict.excess == 0).all(), "images of larger radii neither count nor are reported"


def test_apgd_misclassifies_about_as_many_samples_as_the_authors_code() -> None:
    """Random starts differ, hence the paired test; benchmarks/README.md has larger models."""
    victim, eps = learnt(), 4.0
    images, labels = victim.images[:100], victim.labels[:100]
    attack = APGDAttack(victim.model, n_iter=20, norm="L1", eps=eps, loss="ce", device="cpu", use_largereps=True)
    theirs = attack.perturb(images.clone(), labels.clone())
    assert_inside(theirs, images, eps * (1 + 1e-5), "l1")
    ours = APGD(eps, 20, "l1")(images, victim.model, labels, index=IDS[:100])
    mine, others = (victim.model(attacked).argmax(1) != labels for attacked in (ours, theirs))
    assert 10 < int(others.sum()) < 90
    assert mcnemar(int((mine & ~others).sum()), int((others & ~mine).sum())) > 0.05
    weak = PGD(eps, eps, 1, "l1")(images, victim.model, labels, index=IDS[:100])
    assert int((victim.model(weak).argmax(1) != labels).sum()) < int(others.sum()) - 10, "a weak attack is told apart"


def test_attacks_without_l1_are_refused() -> None:
    reasons: dict[RecipeName, str] = {"pgd10": "paper", "pgd100": "paper", "autoattack": "FAB"}
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=f"norm: {name} has no l1, since .*{reason}.*; take cascade"):
            Recipe(name, 1, "l1")
    for attack in ("FAB", "APGD", "APGDT", "Square", "AutoAttack"):
        with pytest.raises(ValueError, match=rf"kwargs\.norm: {attack} of torchattacks fails in L1"):
            TorchAttack(attack, 1, {"norm": "L1"})


@pytest.mark.parametrize("kind", [PGD, APGD, Square])
def test_radii_that_no_image_has_are_refused(kind: type[Attack]) -> None:
    for eps, words in (
        (-1, "eps must be at least 0, got -1"),
        ("-1/255", "eps must be at least 0, got '-1/255'"),
        (1e39, r"eps must be at most 1e\+09, got 1e\+39"),
        (1e300, "eps must be at most"),
        (float("nan"), "eps must be a number"),
        ("inf", "eps must be a number"),
    ):
        with pytest.raises(ValueError, match=words):
            kind(eps, norm="l1")  # type: ignore[call-arg]


@pytest.mark.slow
def test_every_member_of_the_cascade_in_l1_stays_in_its_radius_and_succeeds_alone() -> None:
    victim, eps = learnt(), 9.0
    images, labels = victim.images[:30], victim.labels[:30]
    clean = int((victim.model(images).argmax(1) != labels).sum())
    members = Recipe("cascade", eps, "l1", budget=0.1).members(6)
    assert [member.name for member in members] == list(RECIPES["cascade"])
    for member in members:
        assert member.attack.norm == "l1"
        attacked = member.attack(images, victim.model, labels, index=IDS[:30])
        assert_inside(attacked, images, eps, "l1")
        assert int((victim.model(attacked).argmax(1) != labels).sum()) > clean + 3, member.name


@pytest.mark.slow
def test_a_test_in_l1_is_audited_verified_and_reported(tmp_path: Path) -> None:
    attacks = ["{pgd: {class_path: PGD, init_args: {eps: 4, alpha: 1, steps: 4, norm: l1}},"
               " apgd: {class_path: APGD, init_args: {eps: 4, steps: 10, norm: l1}}}"]  # fmt: skip
    assert run(["test", "--model", "ZeroShot", "--data.test", "shapes:colours", "--evaluation.max_samples", "24",
                "--evaluation.attacks", *attacks, "--evaluation.save_examples", "3", "--results.folder", str(tmp_path),
                "--results.name", "l1", "--trainer.logger", "false", "--trainer.accelerator", "cpu",
                "--trainer.enable_progress_bar", "false"]) == 0  # fmt: skip
    assert run(["verify", str(tmp_path / "l1")]) == 0
    assert run(["report", str(tmp_path / "l1"), "--out", str(tmp_path / "page.html")]) == 0
    result = Run.open(tmp_path / "l1").result
    assert result["protocol"]["colours"]["apgd"]["axes"]["eps"] == "l1 4.0"
    assert result["tasks"]["colours"]["apgd"]["acc1"] < result["tasks"]["colours"]["clean"]["acc1"]
    checks = {check["name"]: check["status"] for check in result["audit"]["checks"]}
    assert checks["radius"] == "pass"
    assert "fail" not in checks.values()
