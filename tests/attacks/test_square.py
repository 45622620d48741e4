"""Square Attack: legal images, samples of their own, and the authors' strength."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from victims import assert_inside, learnt, linear

from robustclip.attacks import Square, perturbation_set
from robustclip.attacks.attack import SkipsMisclassified
from robustclip.attacks.sample_losses import margin
from robustclip.attacks.square import DRAWS, _moved_square, area, pyramids

IDS = torch.arange(300)


@settings(max_examples=30, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2", "l1"]),
    eps=st.floats(0, 1),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    queries=st.integers(1, 80),
    seed=st.integers(0, 2**31),
)
def test_square_evaluates_only_images_in_the_perturbation_set(
    norm: str, eps: float, height: int, width: int, queries: int, seed: int
) -> None:
    torch.manual_seed(seed)
    images, weights = torch.rand(3, 3, height, width), torch.randn(3 * height * width, 3)
    seen: list[Tensor] = []

    class Model(SkipsMisclassified):  # it is called with the whole batch, as the evaluation's
        def __call__(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.flatten(1) @ weights

    attacked = Square(eps, queries, norm)(images, Model(), torch.tensor([0, 1, 2]), index=torch.arange(3), seed=seed)
    assert len(seen) <= queries
    for evaluated in [*seen, attacked]:
        assert_inside(evaluated, images, eps, norm)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_square_asks_for_no_gradient_and_its_loss_never_falls(norm: str) -> None:
    victim = learnt()
    images, labels = victim.images[:40], victim.labels[:40]

    def forward(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return victim.model(x)

    # A budget changes the schedule, so the same attack is stopped early instead.
    values, best = [], torch.full((40,), -torch.inf)

    def watched(x: Tensor) -> Tensor:
        nonlocal best
        outputs = forward(x)
        best = torch.maximum(best, margin(outputs, labels))
        values.append(best)
        return outputs

    attacked = Square({"linf": 0.03, "l2": 0.8, "l1": 6.0}[norm], 60, norm)(images, watched, labels, index=IDS[:40])
    torch.testing.assert_close(margin(victim.model(attacked), labels), values[-1], atol=1e-5, rtol=0)
    assert values[-1].mean() > values[0].mean()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_results_do_not_depend_on_batch_or_order(norm: str) -> None:
    """On a linear model whose sums are exact: with weights and pixels on a coarse grid no batch size rounds."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-8, 9, (192, 4), generator=generator) / 8
    images = torch.randint(0, 65, (12, 3, 8, 8), generator=generator) / 64
    labels, index = (images.flatten(1) @ weights).argmax(1), 100 + IDS[:12]
    attack = Square({"linf": 0.03125, "l2": 0.5, "l1": 2.0}[norm], 150, norm)

    def forward(x: Tensor) -> Tensor:
        return (x.flatten(1).double() @ weights.double()).mul(2**20).round() / 2**20

    together = attack(images, forward, labels, index=index, seed=3)
    order = torch.randperm(12, generator=generator)
    parts = [attack(images[p], forward, labels[p], index=index[p], seed=3) for p in order.split(5)]
    torch.testing.assert_close(torch.cat(parts), together[order], atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_never_succeeds_on_a_certified_sample(norm: str) -> None:
    victim = linear(5)
    eps = 0.03 if norm == "linf" else 0.15
    attacked = Square(eps, 400, norm)(victim.images, victim.model, victim.labels, index=IDS[:60])
    robust, survived = victim.robust(eps, norm), victim.model(attacked).argmax(1) == victim.labels
    assert survived[robust].all()
    assert survived.float().mean() <= robust.float().mean() + 0.2


def test_linf_perturbations_are_vertices_of_the_perturbation_set() -> None:
    victim = learnt()
    attacked = Square(0.03, 50)(victim.images[:20], victim.model, victim.labels[:20], index=IDS[:20])
    up, down = (victim.images[:20] + 0.03).clamp(max=1), (victim.images[:20] - 0.03).clamp(min=0)
    assert ((attacked == up) | (attacked == down)).all()


def test_samples_have_squares_of_their_own_and_ids_determine_them() -> None:
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x)
        return x.new_zeros(len(x), 2)

    images = torch.full((2, 3, 8, 8), 0.5)
    labels = torch.zeros(2, dtype=torch.long)
    Square(0.1, 20)(images, forward, labels, index=torch.tensor([4, 5]))
    assert sum(torch.equal(image, other) for image, other in seen) <= 1
    seen.clear()
    Square(0.1, 20)(images, forward, labels, index=torch.tensor([4, 4]))
    assert all(torch.equal(image, other) for image, other in seen)


def test_areas_halve_on_the_papers_schedule() -> None:
    """p is halved at queries 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10,000."""
    shares = [area(query, 10_000, 0.8) for query in range(10_000)]
    changes = [query for query, (before, after) in enumerate(pairwise(shares)) if before != after]
    assert changes == [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    assert shares[0] == 0.8
    assert shares[-1] == pytest.approx(0.8 / 512)
    assert area(2500, 5000, 0.8) == area(5000, 10_000, 0.8)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 9, 44])
def test_pyramids_have_norm_1_and_both_signs(side: int) -> None:
    patch = pyramids(side, torch.device("cpu"))
    assert patch.norm() == pytest.approx(1, abs=1e-6)
    assert (patch[: side // 2] >= 0).all()
    assert (patch[side // 2 :] <= 0).all()


def test_the_pyramid_of_side_6_is_that_of_the_formula() -> None:
    """Each half adds 1 / (k + 1)**2 over nested squares around its middle, from the outermost inwards."""
    upper = torch.zeros(3, 6)
    for ring in range(4):
        rows, columns = slice(max(1 - ring, 0), 2 + ring), slice(max(3 - ring, 0), 4 + ring)
        upper[rows, columns] += 1 / (ring + 1) ** 2
    expected = torch.cat([upper, -upper]) / (upper.norm() * math.sqrt(2))
    torch.testing.assert_close(pyramids(6, torch.device("cpu")), expected)


def test_pyramids_of_l1_are_steeper_and_their_sum_is_1() -> None:
    """Of side 3: a row of middle ``1 + 1/16`` between ``1/16``, and minus a block of two rows around it."""
    outer, inner = 1 / 16, 1 + 1 / 16
    upper, lower = torch.tensor([[outer, inner, outer]]), torch.tensor([[outer, outer, outer], [outer, inner, outer]])
    expected = torch.cat([upper / upper.sum(), -lower / lower.sum()]) / 2
    torch.testing.assert_close(pyramids(3, torch.device("cpu"), "l1"), expected)


def test_a_step_in_l1_shares_out_the_freed_and_the_unused_radius_and_projects() -> None:
    """Both squares are the whole image of side 3: per colour 0.1 is freed and 0.1 of 0.6 unused, three times that."""
    images, delta = torch.full((1, 3, 3, 3), 0.5), torch.zeros(1, 3, 3, 3)
    delta[0, :, 0, 0] = 0.1
    draws = torch.zeros(1, DRAWS)  # the pyramid is not transposed, and every sign is minus
    new = -pyramids(3, torch.device("cpu"), "l1")
    new[0, 0] += 1
    new = new / new.abs().sum() * 0.6
    expected = perturbation_set.project(images + new, images, 0.6, "l1")
    moved = _moved_square(images, images + delta, draws, 1.0, 0.6, ball="l1")
    torch.testing.assert_close(moved, expected)
    assert float((moved - images).abs().sum()) == pytest.approx(0.6, rel=1e-5)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"queries must be .*at least 1"):
        Square(0.1, 0)
    with pytest.raises(ValueError, match="p_init"):
        Square(0.1, p_init=0)


@pytest.mark.parametrize(("norm", "name", "eps"), [("linf", "Linf", 16 / 255), ("l2", "L2", 1.7), ("l1", "L1", 14.0)])
@pytest.mark.slow
def test_square_is_as_strong_as_the_authors(norm: str, name: str, eps: float) -> None:
    reference = pytest.importorskip("pyautoattack.square", reason="pyautoattack, the reference, is missing")
    victim = learnt()
    theirs, ours = [], []
    for seed in range(6):  # theirs moves one square over the whole batch, so its accuracy varies by some points
        reference_attack = reference.SquareAttack(
            victim.model, norm=name, n_queries=149, eps=eps, seed=seed, device="cpu"
        )
        theirs.append(victim.accuracy(reference_attack.perturb(victim.images, victim.labels)))
        attacked = Square(eps, 150, norm)(victim.images, victim.model, victim.labels, index=IDS, seed=seed)
        ours.append(victim.accuracy(attacked))
    assert all(0.2 < accuracy < 0.8 for accuracy in theirs)
    assert sum(ours) / 6 <= sum(theirs) / 6 + 0.03
