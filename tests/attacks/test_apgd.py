"""Auto-PGD against closed forms and the authors' code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from victims import assert_inside, learnt, linear

from robustclip.attacks import APGD, PGD, Attack, perturbation_set
from robustclip.attacks.attack import SkipsMisclassified
from robustclip.attacks.searches import checkpoints

HALF_A_POINT = 0.005
IDS = torch.arange(300)


@settings(max_examples=30, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2", "l1"]),
    eps=st.floats(0, 1),
    targets=st.integers(0, 4),
    steps=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_apgd_evaluates_only_images_in_the_perturbation_set(
    norm: str, eps: float, targets: int, steps: int, seed: int
) -> None:
    torch.manual_seed(seed)
    images, weights = torch.rand(4, 3, 5, 5), torch.randn(75, 4)
    seen: list[Tensor] = []

    class Model(SkipsMisclassified):  # it is called with the whole batch, as the evaluation's
        def __call__(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return x.flatten(1) @ weights

    attack = APGD(eps, steps, norm, "margin", targets)
    attacked = attack(images, Model(), torch.tensor([0, 1, 2, 0]), index=torch.arange(4))
    assert_inside(attacked, images, eps, norm)
    widest = 3 if norm == "l1" else 1  # its search begins at three times the radius
    for evaluated in seen:
        assert_inside(evaluated, images, widest * eps, norm)


LINEAR = {"linf": (0.01, 0.03), "l2": (0.05, 0.15)}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("classes", [2, 5])
def test_pgd_and_apgd_reach_the_exact_robust_accuracy_of_a_linear_model(norm: str, loss: str, classes: int) -> None:
    """With five classes an untargeted attack may follow the wrong class, so there APGD has one run per class."""
    victim = linear(classes)
    for eps in LINEAR[norm]:
        attacks: list[Attack] = [APGD(eps, 50, norm, "margin", targets=4)]
        if classes == 2:
            attacks += [APGD(eps, 50, norm, loss), PGD(eps, eps / 4, 40, norm, loss=loss)]
        robust = victim.robust(eps, norm)
        assert 0 < robust.sum() < 60
        for attack in attacks:
            attacked = attack(victim.images, victim.model, victim.labels, index=IDS[:60])
            assert torch.equal(victim.model(attacked).argmax(1) == victim.labels, robust)


@pytest.mark.parametrize("classes", [2, 5])
def test_apgd_is_exact_where_the_box_binds(classes: int) -> None:
    victim = linear(classes, interior=False)
    for eps in (0.02, 0.05):
        robust = victim.robust(eps, "linf")
        assert 0 < robust.sum() < 60
        attacked = APGD(eps, 50, "linf", "margin", targets=4)(
            victim.images, victim.model, victim.labels, index=IDS[:60]
        )
        assert torch.equal(victim.model(attacked).argmax(1) == victim.labels, robust)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("targets", [0, 3])
def test_results_do_not_depend_on_batch_or_order(norm: str, targets: int) -> None:
    victim = learnt()
    images, labels, index = victim.images[:12], victim.labels[:12], 100 + IDS[:12]
    attack = APGD({"linf": 0.04, "l2": 0.7, "l1": 6.0}[norm], 20, norm, "dlr", targets, restarts=2)
    together = attack(images, victim.model, labels, index=index, seed=3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    parts = [attack(images[p], victim.model, labels[p], index=index[p], seed=3) for p in order.split(5)]
    # Convolutions of another batch size round differently, which a sign turns into a step: verdicts stay, as do nearly
    # all pixels.
    apart = torch.cat(parts)
    assert torch.equal(victim.model(apart).argmax(1), victim.model(together).argmax(1)[order])
    assert ((apart - together[order]).abs() > 1e-4).float().mean() < 0.01


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_dead_gradients_and_constant_logits_do_no_harm(loss: str) -> None:
    images, labels = torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 2])
    models = [lambda x: x.new_zeros(len(x), 5), lambda x: 0 * x.flatten(1)[:, :5]]
    for model in models:
        for norm in ("linf", "l2"):
            for targets in (0, 2):
                if targets and loss == "ce":
                    continue
                attacked = APGD(0.1, 12, norm, loss, targets)(images, model, labels, index=labels)
                assert_inside(attacked, images, 0.1, norm)


def test_a_run_evaluates_one_gradient_per_step_and_one_for_the_start() -> None:
    victim = learnt()
    calls = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return victim.model(x)

    APGD(1e-4, 10)(victim.images[:2], forward, victim.labels[:2])
    assert calls == 11
    calls = 0
    APGD(1e-4, 10, loss="dlr", targets=9, restarts=2)(victim.images[:2], forward, victim.labels[:2])
    assert calls == 1 + 2 * 5 * 11


def test_checkpoints_are_the_papers() -> None:
    """p_1 = 0.22 and p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06); the windows are rounded down to steps."""
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1000)[:3] == [220, 410, 570]
    assert checkpoints(20) == [4, 7, 9, *range(10, 21)]
    assert checkpoints(1) == [1]


@pytest.mark.parametrize("steps", [7, 20, 100])
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted"])
@pytest.mark.parametrize(("norm", "name", "eps"), [("linf", "Linf", 8 / 255), ("l2", "L2", 0.6)])
def test_from_one_start_the_images_are_those_of_the_authors_code(
    norm: str, name: str, eps: float, loss: str, steps: int
) -> None:
    model, images, labels = learnt()
    index = (model(images).argmax(1) == labels).nonzero()[:, 0]
    images, labels = images[index], labels[index]
    reference = pytest.importorskip("pyautoattack.autopgd_base", reason="pyautoattack, the reference, is missing")
    options = {"n_iter": steps, "norm": name, "eps": eps, "device": "cpu"}
    if loss == "targeted":
        theirs, ours = reference.APGDAttack_targeted(model, **options), APGD(eps, steps, norm, "dlr", targets=1)
        theirs.y_target = model(images).topk(2).indices[:, 1]
    else:
        theirs, ours = reference.APGDAttack(model, loss=loss, **options), APGD(eps, steps, norm, loss)
    theirs.init_hyperparam(images)
    start = perturbation_set.surface_start(images, eps, norm, index, perturbation_set.stream(3, 0))
    best, correct, _, _ = theirs.attack_single_run(images, labels, start)
    attacked = ours(images, model, labels, index=index, seed=3)
    robust = model(attacked).argmax(1) == labels
    assert torch.equal(robust, correct.bool())
    assert 0 < robust.sum() < len(robust)
    if loss != "targeted":  # of targeted runs ours returns the image of the highest margin
        # Steps in L-infinity are signs, so that images are equal; lengths in L2 are rounded.
        torch.testing.assert_close(attacked[robust], best[robust], rtol=0, atol=0 if norm == "linf" else 1e-3)


def test_the_best_point_is_kept() -> None:
    victim = learnt()
    values = []
    for steps in (1, 5, 20):
        attacked = APGD(0.03, steps)(victim.images, victim.model, victim.labels, index=IDS)
        values.append(F.cross_entropy(victim.model(attacked), victim.labels).item())
    assert values == sorted(values)


def test_wrong_arguments_are_refused() -> None:
    victim = learnt()
    with pytest.raises(ValueError, match="'dlr' or 'margin' where targets > 0"):
        APGD(0.1, targets=3)
    with pytest.raises(ValueError, match=r"steps must be .*at least 1"):
        APGD(0.1, steps=0)
    with pytest.raises(ValueError, match="own loss"):
        APGD(0.1)(victim.images, victim.model, victim.labels, lambda z, y: z.sum(1))


@pytest.mark.parametrize(("norm", "name", "eps"), [("linf", "Linf", 8 / 255), ("l2", "L2", 0.6)])
def test_apgd_is_as_strong_as_the_authors(norm: str, name: str, eps: float) -> None:
    victim = learnt()
    reference = pytest.importorskip("pyautoattack.autopgd_base", reason="pyautoattack, the reference, is missing")
    theirs = reference.APGDAttack(victim.model, n_iter=30, norm=name, eps=eps, loss="ce", device="cpu")
    ours = APGD(eps, 30, norm)(victim.images, victim.model, victim.labels, index=IDS)
    theirs.init_hyperparam(victim.images)
    torch.manual_seed(0)
    best_loss = theirs.attack_single_run(victim.images, victim.labels)[2].mean().item()
    # Starts differ, so single samples do; their mean differs by a few thousandths.
    assert F.cross_entropy(victim.model(ours), victim.labels).item() >= best_loss - 0.01
    found = victim.accuracy(theirs.perturb(victim.images, victim.labels))
    assert 0.2 < found < 0.8
    assert victim.accuracy(ours) <= found + HALF_A_POINT


@pytest.mark.parametrize(("norm", "name", "eps"), [("linf", "Linf", 8 / 255), ("l2", "L2", 0.6)])
def test_targeted_apgd_is_as_strong_as_the_authors(norm: str, name: str, eps: float) -> None:
    victim = learnt()
    reference = pytest.importorskip("pyautoattack.autopgd_base", reason="pyautoattack, the reference, is missing")
    theirs = reference.APGDAttack_targeted(
        victim.model, n_iter=15, norm=name, eps=eps, n_target_classes=5, device="cpu"
    )
    ours = APGD(eps, 15, norm, "dlr", targets=5)(victim.images, victim.model, victim.labels, index=IDS)
    found = victim.accuracy(theirs.perturb(victim.images, victim.labels))
    assert victim.accuracy(ours) <= found + HALF_A_POINT
