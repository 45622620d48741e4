"""FARE against its definition (https://arxiv.org/abs/2402.12336)."""

from pathlib import Path
from typing import Any

import method_cases as cases
import open_clip
import torch
from torch import Tensor

from robustclip.attacks import PGD
from robustclip.methods import FARE


def squared_distance(twin: Any, pretrained: Path, clean: Tensor, attacked: Tensor) -> Tensor:
    """``||phi(x') - phi_0(x)||_2^2`` per sample; ``phi_0`` is loaded anew."""
    original = open_clip.create_model(f"local-dir:{pretrained}").double().eval().visual
    with torch.no_grad():
        targets = original((clean - twin.clip.mean) / twin.clip.std)
    return (cases.embed(twin, attacked) - targets).pow(2).sum(1)


def test_the_loss_is_the_squared_distance_from_the_pretrained_embedding(tiny_model: Path) -> None:
    method, data = cases.make(FARE, tiny_model), cases.batch()
    cases.assert_the_loss_is(
        method, data, lambda twin, clean, attacked: squared_distance(twin, tiny_model, clean, attacked).mean()
    )


def test_the_attack_maximises_the_same_distance(tiny_model: Path) -> None:
    method, data = cases.make(FARE, tiny_model), cases.batch()
    cases.assert_the_attack_maximises(
        method, data, lambda twin, clean, attacked: squared_distance(twin, tiny_model, clean, attacked).sum()
    )


def test_the_attack_does_not_depend_on_the_batch(tiny_model: Path) -> None:
    cases.assert_the_attack_does_not_depend_on_the_batch(cases.make(FARE, tiny_model), cases.batch())


def test_embeddings_are_not_normalised(tiny_model: Path) -> None:
    """A tower with the pre-trained directions and twice the length is ``||phi_0(x)||^2`` away, not 0."""
    method, data = FARE(pretrained=str(tiny_model), attack=PGD(eps=0, steps=0)), cases.batch()
    original = cases.embed(method, data.images).detach()
    method.clip.net.visual.proj.data *= 2
    loss = method.training_loss(data)["squared_distance"]
    torch.testing.assert_close(loss, original.square().sum(1).mean())


def test_labels_are_not_used(tiny_model: Path) -> None:
    method, data = cases.make(FARE, tiny_model), cases.batch()
    first = method.training_loss(data)["squared_distance"]
    assert torch.equal(first, method.training_loss(data._replace(labels=data.labels + 100))["squared_distance"])


def test_the_momentum_of_the_authors_attack_changes_nothing() -> None:
    """``v <- sign(0.9 v + sign(g))`` is ``sign(g)`` for every ``v`` in {-1, 0, 1} and every ``g`` but 0."""
    velocity, sign = torch.tensor([-1.0, 0, 1]).repeat(2), torch.tensor([-1.0] * 3 + [1.0] * 3)
    assert torch.equal((0.9 * velocity + sign).sign(), sign)


def test_the_default_recipe_is_the_papers(tiny_model: Path) -> None:
    method = FARE(pretrained=str(tiny_model))
    optimizer = method.optimizer(method.parameter_groups())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (1e-5, 1e-4)
    assert (method.attack.eps, method.attack.alpha, method.attack.steps) == (4 / 255, 1 / 255, 10)
    assert method.warmup_steps == 1400
