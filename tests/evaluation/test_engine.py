"""The engine: same verdicts as a plain loop over every sample, in any batch, order, precision and composition."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustclip.attacks import APGD, PGD, Attack, Member, Recipe, Square, TorchAttack, cross_entropy
from robustclip.attacks.perturbation_set import distance, start
from robustclip.evaluation.engine import ROBUST, SIZES, WRONG, Rung, Verdict, examine

SHAPE = (3, 6, 6)
CLASSES = 4
Case = tuple[nn.Module, Tensor, Tensor, Tensor]


def network(seed: int, classes: int = CLASSES) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(128, classes))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return net.eval().requires_grad_(False)


def case(seed: int, count: int = 24) -> Case:
    """A model that is right about two samples of three, at margins that attacks can or cannot overcome."""
    net = network(seed)
    images = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed + 1))
    labels = net(images).argmax(1)
    labels[::3] = (labels[::3] + 1) % CLASSES
    return net, images, labels, torch.arange(100, 100 + count)


def by_plain_loop(net: nn.Module, images: Tensor, labels: Tensor, index: Tensor, attack: PGD) -> Tensor:
    """Which samples stay right in every image of PGD's path; nothing is left out, nothing stops early."""
    attacked = start(images, attack.eps, attack.norm, index, 0)
    is_robust = net(images).argmax(1) == labels
    for _ in range(attack.steps):
        attacked = attacked.detach().requires_grad_()
        logits = net(attacked)
        is_robust &= logits.argmax(1) == labels
        (gradient,) = torch.autograd.grad(cross_entropy(logits, labels).sum(), attacked)
        attacked = attacked.detach() + attack.alpha * gradient.sign()
        attacked = torch.max(torch.min(attacked, images + attack.eps), images - attack.eps).clamp(0, 1)
    return is_robust & (net(attacked).argmax(1) == labels)


@pytest.mark.parametrize("check_every", [1, 3, 100])
@pytest.mark.parametrize("seed", range(4))
def test_verdicts_are_those_of_a_loop_that_attacks_every_sample(seed: int, check_every: int) -> None:
    net, images, labels, index = case(seed)
    attack = PGD(eps=0.06, alpha=0.01, steps=12)
    verdict = examine(images, labels, net, attack.members(CLASSES), index=index, check_every=check_every)
    expected = by_plain_loop(net, images, labels, index, attack)
    assert torch.equal(verdict.by == ROBUST, expected)
    assert torch.equal(verdict.by == WRONG, net(images).argmax(1) != labels)
    assert 0 < expected.sum() < (verdict.by != WRONG).sum(), "a case that says something"


def test_misclassified_samples_are_not_attacked_further_and_batches_have_few_sizes() -> None:
    net, images, labels, index = case(0, count=48)
    sizes: list[int] = []

    def forward(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return net(batch)

    attack = PGD(eps=0.06, alpha=0.01, steps=40)
    verdict = examine(images, labels, forward, attack.members(CLASSES), index=index)
    evaluated = 48 * (attack.steps + 2)
    assert sum(sizes) < evaluated / 2
    assert set(sizes[1:]) <= {48 * part // SIZES for part in range(1, SIZES + 1)}
    assert sizes[-1] - 48 // SIZES < (verdict.by == ROBUST).sum() <= sizes[-1]


ATTACKS: dict[str, Callable[[float, str], Attack]] = {
    "pgd": lambda eps, norm: PGD(eps=eps, alpha=eps / 3, steps=6, norm=norm),
    "pgd_margin": lambda eps, norm: PGD(eps=eps, alpha=eps / 3, steps=6, norm=norm, loss="margin"),
    "apgd": lambda eps, norm: APGD(eps=eps, steps=6, norm=norm),
    "apgd_t": lambda eps, norm: APGD(eps=eps, steps=4, norm=norm, loss="dlr", targets=2),
    "square": lambda eps, norm: Square(eps=eps, queries=12, norm=norm),
    "cascade": lambda eps, norm: Recipe("cascade", eps=eps, norm=norm, budget=0.05),
}
norms = st.sampled_from(["linf", "l2"])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(ATTACKS)), norms, st.floats(0, 0.3), st.integers(0, 99), st.integers(1, 9))
def test_attacked_images_stay_in_the_perturbation_set(name: str, norm: str, eps: float, seed: int, count: int) -> None:
    net, images, labels, index = case(seed, count)
    radius = eps * (1 if norm == "linf" else 5)
    verdict = examine(images, labels, net, ATTACKS[name](radius, norm).members(CLASSES), index=index)
    assert (distance(verdict.attacked, images, norm) <= radius + 1e-6).all()
    assert verdict.attacked.min() >= 0
    assert verdict.attacked.max() <= 1
    assert (verdict.excess <= 1e-6).all()
    is_broken = verdict.by >= 0
    assert torch.equal(net(verdict.attacked).argmax(1)[is_broken], verdict.prediction[is_broken])
    assert (verdict.prediction[is_broken] != labels[is_broken]).all()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(ATTACKS)), norms, st.integers(0, 99))
def test_a_radius_of_zero_changes_nothing(name: str, norm: str, seed: int) -> None:
    net, images, labels, index = case(seed, 6)
    verdict = examine(images, labels, net, ATTACKS[name](0.0, norm).members(CLASSES), index=index)
    assert (verdict.attacked - images).abs().max() <= 1e-6
    assert torch.equal(verdict.by == ROBUST, net(images).argmax(1) == labels)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(ATTACKS)), norms, st.integers(0, 99), st.integers(1, 12), st.integers(1, 4))
def test_verdicts_do_not_depend_on_batch_order_or_the_rest_of_the_batch(
    name: str, norm: str, seed: int, size: int, check_every: int
) -> None:
    net, images, labels, index = case(seed, 12)
    members = ATTACKS[name](0.05 if norm == "linf" else 0.4, norm).members(CLASSES)
    whole = examine(images, labels, net, members, index=index)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    for rows in order.split(size):
        part = examine(images[rows], labels[rows], net, members, index=index[rows], check_every=check_every)
        assert torch.equal(part.by, whole.by[rows])
        if check_every == 1:
            assert torch.equal(part.prediction, whole.prediction[rows])


@settings(max_examples=25, deadline=None)
@given(norms, st.integers(0, 99), st.integers(1, 6), st.integers(0, 10))
def test_more_steps_and_more_attacks_never_help_the_model(norm: str, seed: int, few: int, more: int) -> None:
    net, images, labels, index = case(seed, 12)
    eps = 0.05 if norm == "linf" else 0.4

    def robust(members: list[Member]) -> Tensor:
        return examine(images, labels, net, members, index=index).by == ROBUST

    weak, strong = (PGD(eps=eps, alpha=eps / 4, steps=steps, norm=norm) for steps in (few, few + more))
    assert not (robust(strong.members(CLASSES)) & ~robust(weak.members(CLASSES))).any()
    both = [*weak.members(CLASSES), Member("apgd", APGD(eps=eps, steps=4, norm=norm))]
    assert not (robust(both) & ~robust(weak.members(CLASSES))).any()


@settings(max_examples=25, deadline=None)
@given(norms, st.integers(0, 99), st.floats(0, 0.1), st.floats(1, 3))
def test_a_larger_radius_never_helps_a_linear_model(norm: str, seed: int, eps: float, factor: float) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 2)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    net[1].weight.data = torch.randn(2, 108, generator=generator)
    images = 0.3 + 0.4 * torch.rand(12, *SHAPE, generator=generator)
    labels = net(images).argmax(1)
    members = [PGD(eps=radius, alpha=radius, steps=3, norm=norm).members(2) for radius in (eps, eps * factor)]
    small, large = (examine(images, labels, net, each, index=torch.arange(12)).by == ROBUST for each in members)
    assert not (large & ~small).any()


def test_nothing_of_model_or_random_generators_changes() -> None:
    net, images, labels, index = case(5)
    net.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    copies, state = (images.clone(), labels.clone(), index.clone()), torch.get_rng_state()
    for make in ATTACKS.values():
        examine(images, labels, net, make(0.05, "linf").members(CLASSES), index=index)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip((images, labels, index), copies, strict=True))


class Leaving(Attack):
    """Claims to stay in its ball and does not."""

    is_anytime = True
    eps = 0.01

    def __init__(self, returns_outside: bool) -> None:
        self.returns_outside = returns_outside

    def perturb(self, images, forward, targets, loss, *, index, seed):  # type: ignore[no-untyped-def]
        outside = 1 - images
        forward(outside)
        return outside if self.returns_outside else images


@pytest.mark.parametrize("returns_outside", [True, False])
def test_images_outside_of_the_radius_never_count_and_are_noted(returns_outside: bool) -> None:
    net, images, labels, index = case(1)
    verdict = examine(images, labels, net, [Member("leaving", Leaving(returns_outside))], index=index)
    assert set(verdict.by.tolist()) == {ROBUST, WRONG}
    is_attacked = verdict.by == ROBUST
    expected = (1 - 2 * images).abs().flatten(1).amax(1) - 0.01
    assert torch.allclose(verdict.excess[is_attacked], expected[is_attacked])


def test_dead_gradients_and_nans_are_counted() -> None:
    net, images, labels, index = case(2)
    attack = PGD(eps=0.05, alpha=0.01, steps=5)
    dead = examine(images, labels, lambda x: net(x.detach()), attack.members(CLASSES), index=index)
    is_attacked = dead.by != WRONG
    is_open = dead.by == ROBUST
    assert (dead.steps[is_open] == 5).all()
    assert torch.equal(dead.dead[is_attacked], dead.steps[is_attacked])

    def faulty(batch: Tensor) -> Tensor:
        return torch.where((batch != images[: len(batch)]).flatten(1).any(1)[:, None], torch.nan, net(batch))

    clean = net(images)
    verdict = examine(images, labels, faulty, attack.members(CLASSES), index=index, clean_logits=clean)
    assert (verdict.nans[verdict.by != WRONG] > 0).all()


def test_the_order_of_the_classes_makes_no_sample_robust() -> None:
    """Saturated logits tie; the verdicts are those of the model whose classes are in reverse order."""
    net, images, labels, index = case(5)
    attack = PGD(eps=0.03, alpha=0.01, steps=8)

    def saturated(batch: Tensor) -> Tensor:
        return net(batch).clamp(-torch.inf, 1.0)

    verdict = examine(images, labels, saturated, attack.members(CLASSES), index=index, clean_logits=net(images))
    turned = examine(
        images,
        CLASSES - 1 - labels,
        lambda batch: saturated(batch).flip(1),
        attack.members(CLASSES),
        index=index,
        clean_logits=net(images).flip(1),
    )
    assert torch.equal(verdict.by, turned.by)
    succeeded = verdict.by >= 0
    logits = saturated(verdict.attacked)
    ties = (logits == logits.amax(1, keepdim=True)).sum(1) > 1
    assert (succeeded & ties & (logits.argmax(1) == labels)).any(), "a case that says something"
    assert (verdict.prediction != labels)[succeeded].all()


def test_an_intact_attack_has_no_dead_gradient() -> None:
    net, images, labels, index = case(3)
    verdict = examine(images, labels, net, PGD(eps=0.05, alpha=0.01, steps=5).members(CLASSES), index=index)
    assert verdict.steps.sum() > 0
    assert verdict.dead.sum() == verdict.nans.sum() == 0


def test_members_break_in_their_order() -> None:
    net, images, labels, index = case(4)
    nothing, weak, strong = (PGD(eps=eps, alpha=eps / 4, steps=8) for eps in (0.0, 0.02, 0.04))
    members = [Member(name, attack) for name, attack in (("a", nothing), ("b", weak), ("c", strong))]
    verdict = examine(images, labels, net, members, index=index)
    alone = {each.name: examine(images, labels, net, [each], index=index).by for each in members}
    assert not (verdict.by == 0).any()
    assert torch.equal(verdict.by == 1, alone["b"] == 0)
    assert torch.equal(verdict.by == 2, (alone["c"] == 0) & (alone["b"] != 0))
    assert len(set(verdict.by.tolist())) == 4


def in_bfloat16(net: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = net(batch)
        return logits

    return forward


@pytest.mark.parametrize("seed", range(3))
def test_low_precision_attacks_first_and_fp32_decides(seed: int) -> None:
    net, images, labels, index = case(seed)
    members = PGD(eps=0.05, alpha=0.01, steps=8).members(CLASSES)
    fp32 = examine(images, labels, net, members, index=index)
    mixed = examine(images, labels, net, members, index=index, cheaper=[Rung(in_bfloat16(net))])
    assert not ((mixed.by == ROBUST) & (fp32.by != ROBUST)).any(), "what survives was attacked in fp32 as well"
    is_broken = mixed.by >= 0
    assert (net(mixed.attacked).argmax(1)[is_broken] != labels[is_broken]).all()


def test_a_useless_cheap_model_changes_no_verdict() -> None:
    net, images, labels, index = case(6)
    members = PGD(eps=0.05, alpha=0.01, steps=8).members(CLASSES)
    fp32 = examine(images, labels, net, members, index=index)
    other = network(77)
    verdict = examine(images, labels, net, members, index=index, cheaper=[Rung(lambda x: other(x) - 100 * net(x))])
    assert not ((verdict.by == ROBUST) & (fp32.by != ROBUST)).any()
    is_broken = verdict.by >= 0
    assert (net(verdict.attacked).argmax(1)[is_broken] != labels[is_broken]).all()


def test_the_last_iterate_decides_under_the_papers_rule() -> None:
    net, images, labels, index = case(7, 48)
    attack = PGD(eps=0.05, alpha=0.05, steps=7)
    verdict = examine(images, labels, net, attack.members(CLASSES), index=index, stop="last")
    returned = attack(images, net, labels, index=index)
    assert torch.equal(verdict.attacked, returned)
    assert torch.equal(verdict.by == ROBUST, net(returned).argmax(1) == labels)
    assert (verdict.steps == 7).all(), "every sample is attacked to the end"
    worst = examine(images, labels, net, attack.members(CLASSES), index=index)
    assert not ((worst.by == ROBUST) & (verdict.by != ROBUST)).any()


def test_attacks_of_torchattacks_count_by_the_returned_image() -> None:
    net, images, labels, index = case(8)
    attack = TorchAttack("PGD", eps=0.05, kwargs={"alpha": 0.01, "steps": 5, "random_start": False})
    verdict = examine(images, labels, net, attack.members(CLASSES), index=index)
    right = net(images).argmax(1) == labels
    returned = attack(images[right], net, labels[right])
    assert torch.equal((verdict.by == ROBUST)[right], net(returned).argmax(1) == labels[right])


def test_an_empty_batch_has_an_empty_verdict() -> None:
    net, images, labels, index = case(0)
    verdict = examine(images[:0], labels[:0], net, PGD().members(CLASSES), index=index[:0])
    assert isinstance(verdict, Verdict)
    assert len(verdict.by) == 0
