"""Recipes, and the declared properties of every attack."""

import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from victims import assert_inside, learnt, linear

from robustclip.attacks import APGD, PGD, Attack, Member, Recipe, Square, TorchAttack

EXPECTED = {
    "pgd10": ["pgd10"],
    "pgd100": ["pgd100"],
    "cascade": ["pgd_ce", "pgd_margin", "apgd_ce", "apgd_t", "square"],
    "autoattack": ["apgd_ce", "apgd_t", "fab_t", "square"],
}
QUICK = 0.1
IDS = torch.arange(300)


class Plain(Attack):
    """The least that an attack may be."""

    def __init__(self) -> None:
        self.colour, self.weights = "grey", {"a": (1, None), "b": nn.Identity}

    def perturb(self, images: Tensor, *_: object, **__: object) -> Tensor:
        return images


@pytest.mark.parametrize("name", EXPECTED)
def test_recipes_have_the_members_of_their_definition(name: str) -> None:
    members = Recipe(name, "4/255").members(1000)
    assert [member.name for member in members] == EXPECTED[name]
    assert all(member.attack.eps == pytest.approx(4 / 255) for member in members)
    assert not any(member.note for member in members)


def test_the_standard_attacks_have_their_standard_settings() -> None:
    settings = {
        member.name: member.attack.settings for name in EXPECTED for member in Recipe(name, "4/255").members(1000)
    }
    eps = 4 / 255
    assert settings["pgd10"]["alpha"] == eps / 4
    assert (settings["pgd100"]["alpha"], settings["pgd100"]["steps"]) == (eps, 100)
    assert settings["pgd100"]["keep"] == "last"
    assert settings["pgd_margin"]["loss"] == "margin"
    assert (settings["apgd_ce"]["steps"], settings["apgd_ce"]["loss"], settings["apgd_ce"]["targets"]) == (100, "ce", 0)
    assert (settings["apgd_t"]["loss"], settings["apgd_t"]["targets"], settings["apgd_t"]["restarts"]) == ("dlr", 9, 1)
    assert settings["square"]["queries"] == 5000
    fab = {"norm": "Linf", "steps": 100, "n_restarts": 1, "multi_targeted": True, "n_classes": 10, "eps": eps}
    assert settings["fab_t"]["kwargs"] == fab


def test_few_classes_get_the_margin_and_say_so() -> None:
    by_name = {member.name: member for member in Recipe("autoattack", "4/255").members(3)}
    assert by_name["apgd_t"].attack.settings["loss"] == "margin"
    assert by_name["apgd_t"].note == "3 classes: the margin instead of DLR"
    assert by_name["apgd_ce"].note == ""
    for attack in (PGD(loss="dlr"), Square(loss="dlr"), APGD(loss="dlr")):
        (member,) = attack.members(2)
        assert member.attack.settings == {**attack.settings, "loss": "margin"}
        assert member.note
        assert attack.members(3) == [Member(type(attack).__name__.lower(), attack)]


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["cascade", "autoattack"])
def test_recipes_reach_the_exact_robust_accuracy_of_a_linear_model(name: str, norm: str, classes: int) -> None:
    victim = linear(classes)
    for eps in (0.01, 0.03) if norm == "linf" else (0.05, 0.15):
        robust = victim.robust(eps, norm)
        assert 0 < robust.sum() < 60
        attacked = Recipe(name, eps, norm, budget=QUICK)(victim.images, victim.model, victim.labels, index=IDS[:60])
        assert torch.equal(victim.model(attacked).argmax(1) == victim.labels, robust)
        assert_inside(attacked, victim.images, eps, norm)


@pytest.mark.parametrize("classes", [2, 5])
def test_fab_alone_finds_the_boundary_of_a_linear_model(classes: int) -> None:
    victim = linear(classes)
    fab = {member.name: member.attack for member in Recipe("autoattack", 0.02, budget=QUICK).members(classes)}["fab_t"]
    attacked = fab(victim.images, victim.model, victim.labels)
    survived, robust = victim.model(attacked).argmax(1) == victim.labels, victim.robust(0.02, "linf")
    assert survived[robust].all()
    assert (survived != robust).sum() <= 1  # it stops a hair beyond the boundary, perhaps outside the ball


def test_an_image_of_torchattacks_outside_the_radius_is_replaced_by_the_clean_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, labels = torch.full((4, 3, 4, 4), 0.5), torch.arange(4)
    attack = TorchAttack("FAB", eps=0.1)
    change = torch.tensor([0.05, 0.1 + 1e-8, 0.2, float("nan")]).view(-1, 1, 1, 1)
    monkeypatch.setattr(attack._attack, "__call__", lambda self, images, labels: images + change)
    attacked = attack(images, lambda x: x.flatten(1)[:, :5], labels)
    assert torch.equal(attacked[2:], images[2:])
    torch.testing.assert_close(attacked[:2], (images + change)[:2])
    assert_inside(attacked, images, 0.1, "linf")


def test_a_recipe_is_at_least_as_strong_as_each_member_and_ignores_batch_and_order() -> None:
    model, images, labels = learnt().model, learnt().images[:60], learnt().labels[:60]
    recipe = Recipe("cascade", "8/255", budget=QUICK / 2)
    broken = model(recipe(images, model, labels, index=IDS[:60])).argmax(1) != labels
    for member in recipe.members(6):
        alone = member.attack(images, model, labels, index=IDS[:60])
        assert broken[model(alone).argmax(1) != labels].all()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    parts = [recipe(images[p], model, labels[p], index=p) for p in order.split(25)]
    assert torch.equal(model(torch.cat(parts)).argmax(1) != labels[order], broken[order])


@pytest.mark.parametrize("classes", [1, 2])
def test_dead_models_do_no_harm(classes: int) -> None:
    images, labels = torch.rand(3, 3, 8, 8), torch.zeros(3, dtype=torch.long)
    attacked = Recipe("autoattack", 0.1, budget=0.02)(images, lambda x: 0 * x.flatten(1)[:, :classes], labels)
    assert_inside(attacked, images, 0.1, "linf")


SCALED = [
    (PGD(0.1, 0.05, 10), {"eps": 0.2, "alpha": 0.1, "steps": 5}),
    (PGD(0.1, 0.05, 0), {"eps": 0.2, "alpha": 0.1, "steps": 0}),
    (PGD(0.6, 0.6, 1), {"eps": 1.0, "alpha": 1.0, "steps": 1}),
    (PGD(0.6, 0.6, 1, norm="l2"), {"eps": 1.2, "alpha": 1.2, "steps": 1}),
    (APGD(0.1, 100), {"eps": 0.2, "steps": 50}),
    (Square(0.1, 101), {"eps": 0.2, "queries": 50}),
    (Recipe("cascade", 0.1), {"eps": 0.2, "budget": 0.5}),
    (
        TorchAttack("PGD", 0.1, {"steps": 10, "alpha": "1/10"}),
        {"eps": 0.2, "kwargs": {"eps": 0.2, "steps": 5, "alpha": 0.2}},
    ),
]


@pytest.mark.parametrize(("attack", "changed"), SCALED, ids=lambda value: type(value).__name__)
def test_scaled_copies_differ_in_radius_and_steps_alone(attack: Attack, changed: dict[str, object]) -> None:
    before = attack.settings
    twin = attack.scaled(radius=2, steps=0.5)
    assert twin is not None
    assert type(twin) is type(attack)
    assert twin.settings == {**before, **changed}
    assert attack.settings == before


def test_an_attack_that_cannot_be_scaled_returns_none() -> None:
    assert Plain().scaled(radius=2) is None
    assert TorchAttack("DeepFool").scaled(steps=2) is None
    assert TorchAttack("CW", kwargs={"steps": 3}).scaled(radius=2) is None
    assert TorchAttack("FGSM", 0.1).scaled(steps=2) is None
    assert TorchAttack("FGSM", 0.1).scaled(radius=2).eps == 0.2


def test_radii_that_the_library_chooses_are_recorded_and_kept() -> None:
    """The library's defaults: 8/255 of PGD, 16/255 of PIFGSM under another name, 1 of PGDL2."""
    assert TorchAttack("PGD").eps == TorchAttack("PGD").settings["kwargs"]["eps"] == 8 / 255
    assert TorchAttack("PIFGSM").eps == 16 / 255
    assert TorchAttack("PIFGSM", kwargs={"max_epsilon": "4/255"}).settings["kwargs"] == {"max_epsilon": 4 / 255}
    assert (TorchAttack("PGDL2").eps, TorchAttack("PGDL2").norm) == (1.0, "l2")
    assert TorchAttack("CW").eps is None


@pytest.mark.parametrize(
    ("name", "eps", "kwargs", "words"),
    [
        ("LGV", None, {}, "LGV of torchattacks needs trainloader; take another attack"),
        ("MultiAttack", None, {}, "MultiAttack of torchattacks needs attacks; take another"),
        ("PGD", None, {"model": 1}, "takes no .'model'.; it takes .'alpha', 'eps', 'random_start', 'steps'."),
        ("PIFGSM", None, {"max_epsilon": 16}, "max_epsilon is measured in .* got 16.0; write '16/255' for grey levels"),
        ("PGD", "8/255", {"eps": "4/255"}, "eps must be given once, got '8/255' and '4/255' in kwargs"),
        ("PGD", "8/255", {"random_start": "no"}, "kwargs.random_start must be true or false, got 'no'"),
        ("GN", None, {"std": "a"}, "kwargs.std must be a number, got 'a'"),
    ],
)
def test_arguments_that_the_library_would_misread_are_refused(name: str, eps: Any, kwargs: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TorchAttack(name, eps, kwargs)


def test_a_recipe_hands_its_scale_to_its_members() -> None:
    scaled = Recipe("autoattack", 0.1).scaled(radius=0.5, steps=0.1)
    settings = [member.attack.settings for member in scaled.members(10)]
    assert [each["eps"] for each in settings] == [0.05] * 4
    assert [settings[0]["steps"], settings[2]["kwargs"]["steps"], settings[3]["queries"]] == [10, 10, 500]


def test_settings_are_the_public_attributes_in_json() -> None:
    attacks = [attack for attack, _ in SCALED]
    for attack in [*attacks, Plain()]:
        assert json.loads(json.dumps(attack.settings)) == attack.settings
        assert repr(attack).startswith(f"{type(attack).__name__}(")
    assert Plain().settings["weights"]["a"] == [1, None]
    assert repr(PGD("1/255")).startswith("PGD(eps=0.00392156862745098, alpha=0.00392156862745098, steps=2, norm='linf'")


def test_an_attack_is_its_own_member_under_its_own_name() -> None:
    plain, wrapped = Plain(), TorchAttack("FGSM", 0.1)
    assert plain.members(10) == [Member("plain", plain)]
    assert wrapped.members(10) == [Member("torch_attack", wrapped)]


def test_attacks_declare_anytime_and_black_box() -> None:
    assert PGD.is_anytime
    assert APGD.is_anytime
    assert Square.is_anytime
    assert Square.is_black_box
    assert not any(attack.is_anytime for attack in (Attack, Recipe, TorchAttack))
    assert not any(attack.is_black_box for attack in (Attack, PGD, APGD, Recipe, TorchAttack))


def test_a_loss_given_to_pgd_replaces_the_callers() -> None:
    victim = learnt()

    def forbidden(outputs: Tensor, labels: Tensor) -> Tensor:
        raise AssertionError

    PGD(0.01, 0.01, loss="dlr")(victim.images[:4], victim.model, victim.labels[:4], forbidden)


def test_wrong_recipes_are_refused() -> None:
    with pytest.raises(ValueError, match="name must be one of pgd10, pgd100, cascade, autoattack, got 'pgd20'"):
        Recipe("pgd20", 0.1)
    with pytest.raises(ValueError, match="budget must be above 0"):
        Recipe("pgd10", 0.1, budget=0)
    with pytest.raises(ValueError, match=r"Recipe .*own loss"):
        Recipe("pgd10", 0.1)(torch.rand(1, 3, 4, 4), lambda x: x, torch.tensor([0]), lambda z, y: z)


def test_attacks_of_another_library_name_the_extra_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(ValueError, match=r"robustclip\[autoattack\]"):
        TorchAttack("FAB", "1/255")
