"""PGD against its definition, a closed form, and torchattacks."""

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.attacks import PGD, TorchAttack, pixels

ROUNDING = 1e-6


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).requires_grad_(False)


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(size, 3, 8, 8), torch.arange(size) % 5


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(0, 0.9),
    steps=st.integers(0, 4),
    keep=st.sampled_from(["last", "best"]),
    seed=st.integers(0, 2**31),
)
def test_pgd_stays_in_the_perturbation_set(norm: str, eps: float, steps: int, keep: str, seed: int) -> None:
    torch.manual_seed(seed)
    images, weights = torch.rand(4, 3, 5, 5), torch.randn(75, 3)
    attack = PGD(eps=eps, alpha=eps / 2, steps=steps, norm=norm, keep=keep)
    attacked = attack(images, lambda x: x.flatten(1) @ weights, torch.tensor([0, 1, 2, 0]), index=torch.arange(4))
    distance = (attacked - images).flatten(1).norm(p=float("inf") if norm == "linf" else 2, dim=1)
    assert (distance <= eps + ROUNDING).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    if eps == 0:
        assert torch.equal(attacked, images)


@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_equals_torchattacks_from_the_same_start(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, random_start: bool
) -> None:
    images, labels = batch()
    ours = PGD(eps="8/255", alpha="2/255", steps=5, random_start=random_start)
    start = PGD(eps="8/255", alpha="2/255", steps=0)(images, network, labels, index=torch.arange(6)) - images
    expected = ours(images, network, labels, index=torch.arange(6))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: start)
    theirs = torchattacks.PGD(network, eps=8 / 255, alpha=2 / 255, steps=5, random_start=random_start)
    torch.testing.assert_close(theirs(images, labels), expected, atol=ROUNDING, rtol=0)


def test_l2_pgd_equals_torchattacks_without_a_random_start(network: nn.Module) -> None:
    images, labels = batch()
    ours = PGD(eps=0.5, alpha=0.2, steps=5, norm="l2", random_start=False)(images, network, labels)
    theirs = torchattacks.PGDL2(network, eps=0.5, alpha=0.2, steps=5, random_start=False)(images, labels)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_finds_the_optimum_of_a_linear_model(norm: str) -> None:
    """For two classes the worst perturbation is eps * sign(w) or eps * w / |w|, where it stays inside the box."""
    torch.manual_seed(0)
    direction = torch.randn(3, 4, 4)
    images, labels = torch.full((2, 3, 4, 4), 0.5), torch.tensor([0, 1])
    attacked = PGD(eps=0.2, alpha=0.05, steps=80, norm=norm)(
        images, lambda x: torch.stack([(x * direction).sum((1, 2, 3)), -(x * direction).sum((1, 2, 3))], 1), labels
    )
    worst = 0.2 * (direction.sign() if norm == "linf" else direction / direction.norm())
    expected = images + torch.stack([-worst, worst])
    torch.testing.assert_close(attacked, expected, atol=1e-5, rtol=0)


def test_the_attack_is_driven_by_the_summed_loss() -> None:
    """With a mean over the batch a half-precision gradient of a confident sample underflows to zero."""
    seen = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(context, values):  # type: ignore[no-untyped-def]
            return values

        @staticmethod
        def backward(context, gradient):  # type: ignore[no-untyped-def]
            seen.append(gradient)
            return gradient

    images, labels = batch()
    PGD(steps=1)(
        images, lambda x: x.flatten(1)[:, :5], labels, lambda z, y: Spy.apply(F.cross_entropy(z, y, reduction="none"))
    )
    assert torch.equal(seen[0], torch.ones(6))


def test_a_verdict_does_not_depend_on_batch_or_order(network: nn.Module) -> None:
    images, labels = batch()
    index = torch.tensor([4, 8, 15, 16, 23, 42])
    attack = PGD(eps="4/255", alpha="1/255", steps=3)
    together = attack(images, network, labels, index=index)
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    torch.testing.assert_close(attack(images[order], network, labels[order], index=index[order]), together[order])
    alone = torch.cat([attack(images[[i]], network, labels[[i]], index=index[[i]]) for i in range(6)])
    torch.testing.assert_close(alone, together, atol=ROUNDING, rtol=0)


def test_best_keeps_the_worst_iterate_of_each_sample() -> None:
    images, labels = batch()

    def oscillating(x: Tensor) -> Tensor:
        return (40 * x.flatten(1)[:, :5]).sin() * 5

    settings_ = {"eps": "32/255", "alpha": "32/255", "steps": 4}
    value = {
        keep: F.cross_entropy(
            oscillating(PGD(**settings_, keep=keep)(images, oscillating, labels, index=labels)),
            labels,
            reduction="none",
        )
        for keep in ("last", "best")
    }
    assert (value["best"] >= value["last"] - ROUNDING).all()
    assert (value["best"] > value["last"] + 0.1).any()


def test_an_attack_works_inside_inference_mode_and_leaves_its_inputs_alone(network: nn.Module) -> None:
    with torch.inference_mode():
        images, labels = batch()
        before = images.clone()
        attacked = PGD(eps="8/255", alpha="8/255")(images, network, labels)
        assert torch.equal(images, before)
    assert not attacked.requires_grad
    assert not torch.equal(attacked, before)


def test_images_outside_the_box_are_refused(network: nn.Module) -> None:
    images, labels = batch()
    with pytest.raises(ValueError, match=r"\[0, 1\].*normalisation belongs in the model"):
        PGD()(images * 2 - 1, network, labels)


@pytest.mark.parametrize(
    ("text", "value"), [("4/255", 4 / 255), ("0.5/255", 0.5 / 255), (0.25, 0.25), ("1/2", 0.5), (0, 0)]
)
def test_radii_are_read_as_fractions(text: float | str, value: float) -> None:
    assert pixels(text, name="eps") == pytest.approx(value)


@pytest.mark.parametrize("text", [4, "4", "a/255", "1/2/3", "1/0", -0.1, float("nan")])
def test_wrong_radii_are_refused(text: float | str) -> None:
    with pytest.raises(ValueError, match="eps"):
        pixels(text, name="eps")


@pytest.mark.parametrize("name", ["FGSM", "APGD", "CW", "DeepFool", "Square", "AutoAttack"])
def test_torchattacks_are_harmless(network: nn.Module, name: str) -> None:
    network.train()
    network[0].weight.requires_grad_(True)
    images, labels = batch()
    generator = torch.get_rng_state()
    options = {"eps": "8/255"} if name not in ("CW", "DeepFool") else {}
    kwargs = {"steps": 5} if name in ("APGD", "CW", "DeepFool") else {"n_queries": 20} if name == "Square" else {}
    attacked = TorchAttack(name, **options, kwargs=kwargs)(images, network, labels)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    if options:
        assert (attacked - images).abs().max() <= 8 / 255 + ROUNDING
    assert network.training
    assert network[0].weight.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)
    network[0].weight.requires_grad_(False)


def test_torchattacks_autoattack_learns_the_number_of_classes(network: nn.Module) -> None:
    images, labels = batch()
    attacked = TorchAttack("AutoAttack", eps="32/255")(images, network, labels)
    assert (network(attacked).argmax(1) == labels).float().mean() <= (
        network(images).argmax(1) == labels
    ).float().mean()


def test_wrong_torchattacks_are_refused() -> None:
    with pytest.raises(ValueError, match="no attack 'PDG'"):
        TorchAttack("PDG")
    with pytest.raises(ValueError, match="takes no"):
        TorchAttack("FGSM", kwargs={"steps": 3})
