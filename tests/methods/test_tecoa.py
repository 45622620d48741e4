"""TeCoA's training step against its definition (specification sections 3, 4, 6, 7)."""

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers import quick_trainer
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule
from robustclip.methods import RobustMethod, TeCoA, ZeroShot
from robustclip.types import Batch, Task

TASK = Task("train", ("a red circle", "a blue square", "a green star"), ("This is a photo of a {}",))


def make(model: Path, **kwargs: object) -> TeCoA:
    torch.manual_seed(0)
    method = TeCoA(pretrained=str(model), **kwargs)
    method.freeze_untrained()
    method.prepare_training(TASK)
    return method


def batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(size, 3, 32, 32, generator=generator)
    return Batch(images, torch.arange(size) % 3, torch.arange(size) + 10)


def logits_by_hand(method: RobustMethod, images: Tensor) -> Tensor:
    """``s * cos(f(x), t)`` from the raw open_clip towers."""
    net = method.clip.net
    prompts = method.clip.tokenizer([f"This is a photo of a {name}" for name in TASK.class_names])
    image = net.encode_image((images - method.clip.mean) / method.clip.std)
    text = net.encode_text(prompts)
    cosine = (image @ text.T) / image.norm(dim=1, keepdim=True) / text.norm(dim=1)
    return net.logit_scale.exp() * cosine


class Fit:
    def __call__(self, method: RobustMethod, *, steps: int, **kwargs: object) -> Trainer:
        trainer = quick_trainer(max_steps=steps, limit_val_batches=0, **kwargs)
        trainer.fit(method, datamodule=CLIPDataModule(train="shapes:source", batch_size=4, image_size=32))
        return trainer


@pytest.fixture
def fit() -> Fit:
    return Fit()


def test_the_loss_is_cross_entropy_over_prompts_on_attacked_images(tiny_model: Path) -> None:
    method, data = make(tiny_model), batch()
    terms = method.training_loss(data)
    z = logits_by_hand(method, method.perturb(data))
    expected = -(z.exp() / z.exp().sum(1, keepdim=True))[range(4), data.labels].log().mean()
    assert list(terms) == ["adversarial_ce"]
    torch.testing.assert_close(terms["adversarial_ce"], expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_softmax_minus_onehot_through_the_tower(tiny_model: Path) -> None:
    method, data = make(tiny_model), batch()
    attacked = method.perturb(data)
    method.training_loss(data)["adversarial_ce"].backward()
    parameters = list(method.clip.net.visual.parameters())
    z = logits_by_hand(method, attacked)
    dloss_dz = (z.softmax(1) - F.one_hot(data.labels, 3)) / 4
    expected = torch.autograd.grad(z, parameters, grad_outputs=dloss_dz.detach())
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_perturb_follows_the_specified_iteration(tiny_model: Path) -> None:
    """``d <- clip(clamp(d + a sign(g), -eps, eps), -x, 1 - x)``, twice, last iterate, on the current weights."""
    method, data = make(tiny_model), batch()
    start = PGD(eps="1/255", alpha="1/255", steps=0)(data.images, nn.Identity(), data.labels, index=data.index, seed=0)
    delta = start - data.images
    for _ in range(2):
        delta = delta.detach().requires_grad_()
        loss = F.cross_entropy(logits_by_hand(method, data.images + delta), data.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = (delta + gradient.sign() / 255).clamp(-1 / 255, 1 / 255)
        delta = torch.minimum(torch.maximum(delta, -data.images), 1 - data.images)
    # A gradient that is zero up to rounding may change its sign; no more than one pixel in a thousand may differ.
    differs = ((data.images + delta) - method.perturb(data)).abs() > 1e-6
    assert differs.float().mean() < 1e-3


def test_perturb_leaves_gradients_modes_and_flags_alone(tiny_model: Path) -> None:
    method = make(tiny_model)
    method.clip.net.visual.eval()
    flags = [parameter.requires_grad for parameter in method.parameters()]
    seen_modes, seen_flags = set(), set()

    def look(*_: object) -> None:
        seen_modes.update(module.training for module in method.modules())
        seen_flags.update(parameter.requires_grad for parameter in method.parameters())

    method.clip.net.visual.register_forward_hook(look)
    method.train()
    modes = [module.training for module in method.modules()]
    attacked = method.perturb(batch())
    assert seen_modes == {False}
    assert seen_flags == {False}
    assert modes == [module.training for module in method.modules()]
    assert flags == [parameter.requires_grad for parameter in method.parameters()]
    assert all(parameter.grad is None for parameter in method.parameters())
    assert not attacked.requires_grad


def test_flags_come_back_after_an_attack_that_fails(tiny_model: Path) -> None:
    method = make(tiny_model)
    flags = [parameter.requires_grad for parameter in method.parameters()]
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        method.perturb(batch()._replace(images=batch().images + 1))
    assert flags == [parameter.requires_grad for parameter in method.parameters()]
    assert method.training


def test_the_text_tower_runs_zero_times_per_step(tiny_model: Path) -> None:
    method, calls = make(tiny_model), []
    method.clip.net.transformer.register_forward_hook(lambda *_: calls.append(1))
    method.training_loss(batch())["adversarial_ce"].backward()
    assert calls == []
    method.prepare_training(TASK)
    assert calls == [1]


def test_the_image_tower_runs_steps_plus_one_times_per_step(tiny_model: Path) -> None:
    method, calls = make(tiny_model), []
    method.clip.net.visual.register_forward_hook(lambda *_: calls.append(1))
    method.training_loss(batch())
    assert len(calls) == 3


def test_the_random_start_changes_from_step_to_step_and_not_with_the_batch(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make(tiny_model, attack=PGD(steps=0))
    first = method.perturb(batch())
    assert torch.equal(first[:2], method.perturb(Batch(*(part[:2] for part in batch()[:3]))))
    monkeypatch.setattr(type(method), "global_step", 1)
    assert not torch.equal(first, method.perturb(batch()))


def test_last_blocks_are_those_blocks_and_the_closing_norm(tiny_model: Path) -> None:
    method = make(tiny_model, last_blocks=1)
    learning = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    prefixes = ("clip.net.visual.transformer.resblocks.1.", "clip.net.visual.ln_post.")
    assert learning == {name for name, _ in method.named_parameters() if name.startswith(prefixes)}
    assert len(learning) == 2 + 12  # ln_post and the twelve tensors of a block, as in the authors' order


def test_the_default_recipe_is_the_papers(tiny_model: Path) -> None:
    method = make(tiny_model)
    optimizer = method.optimizer(method.parameter_groups())
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (1e-5, 0.9, 0, False)
    assert (method.attack.eps, method.attack.alpha, method.attack.steps) == (1 / 255, 1 / 255, 2)
    assert method.warmup_steps == 1000


def test_the_schedule_warms_up_linearly_and_falls_as_a_cosine(tiny_model: Path, fit: Fit) -> None:
    rates: list[float] = []

    class Recorder(TeCoA):
        def training_loss(self, batch: Batch) -> dict[str, Tensor]:
            rates.append(self.optimizers().param_groups[0]["lr"])
            return super().training_loss(batch)

    fit(Recorder(pretrained=str(tiny_model), warmup_steps=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.5)), steps=8)
    expected = [0.5 * (k + 1) / 3 for k in range(3)]
    expected += [0.5 * 0.5 * (1 + math.cos(math.pi * (k - 3) / (8 - 3))) for k in range(3, 8)]
    assert rates == pytest.approx(expected)


def test_only_the_declared_parameters_move(tiny_model: Path, fit: Fit) -> None:
    method = TeCoA(
        pretrained=str(tiny_model), last_blocks=1, warmup_steps=0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    fit(method, steps=2)
    moved = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    declared = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert moved == declared


def test_one_step_is_plain_sgd_on_the_formula(tiny_model: Path) -> None:
    """The update of a Lightning step equals one written with autograd alone."""
    method, data = make(tiny_model), batch()
    reference = copy.deepcopy(method)
    optimizer = torch.optim.SGD(method.parameter_groups()[0]["params"], lr=0.1)
    method.training_loss(data)["adversarial_ce"].backward()
    optimizer.step()
    parameters = list(reference.clip.net.visual.parameters())
    loss = F.cross_entropy(logits_by_hand(reference, reference.perturb(data)), data.labels)
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.data -= 0.1 * gradient
    for ours, theirs in zip(method.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_zero_shot_learns_nothing(tiny_model: Path) -> None:
    method = ZeroShot(pretrained=str(tiny_model))
    method.freeze_untrained()
    assert not [parameter for parameter in method.parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match="nothing to fit"):
        method.setup("fit")
