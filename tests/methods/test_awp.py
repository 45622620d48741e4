"""Adversarial weight perturbation: the formula, one step written out, and what it leaves untouched."""

from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from helpers import quick_trainer, tiny_clip
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule
from robustclip.methods import TRADES, CleanFineTuning, RobustMethod, TeCoA
from robustclip.methods._shared.weight_perturbation import AWP, directions, matrices
from robustclip.models.lora import LoRA, is_factor
from robustclip.training import Checkpoints

BOX = PGD(eps="8/255", alpha="4/255", steps=2)
RATE = 0.05
GAMMA = 0.1


def test_the_length_is_relative_to_the_weight_and_the_direction_is_the_gradient() -> None:
    weights = [torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([[7.0]])]
    gradients = [torch.tensor([[0.0, -2.0]]), torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0]])]
    found = directions(weights, gradients, 0.1)
    assert found[0].tolist() == [[0, pytest.approx(-0.5)]]
    assert found[1].flatten().tolist() == pytest.approx([0.06, 0.08])
    assert found[2].tolist() == [[0.0]]


class Seen(Callback):
    """Keeps the weights before every optimiser step and at the start."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.batch: Any = None

    def _keep(self, module: LightningModule) -> None:
        self.weights.append({name: value.detach().clone() for name, value in module.named_parameters()})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch = batch
        self._keep(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._keep(pl_module)


def fit(cls: type[RobustMethod], model: Path, *callbacks: Callback, steps: int = 1, **settings: Any) -> RobustMethod:
    torch.manual_seed(0)
    defaults = {"warmup_steps": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=RATE)}
    if cls is not CleanFineTuning:
        defaults["attack"] = BOX
    method = cls(pretrained=str(model), **{**defaults, "schedule": "constant", **settings})
    trainer = quick_trainer(*callbacks, max_steps=steps, limit_val_batches=0)
    trainer.fit(method, datamodule=CLIPDataModule(train="shapes:source", batch_size=4, image_size=32))
    return method


def kernels(method: RobustMethod) -> set[str]:
    """Names of the weights that the paper moves, by the kind of their layer."""
    names = {"clip.net.visual.proj"}
    for name, module in method.clip.net.visual.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            names.add(f"clip.net.visual.{name}.weight")
        if isinstance(module, nn.MultiheadAttention):
            names.add(f"clip.net.visual.{name}.in_proj_weight")
    return names


def test_one_step_equals_the_equations_written_out(tiny_model: Path) -> None:
    seen = Seen()
    method = fit(TeCoA, tiny_model, seen, awp=AWP(GAMMA))
    batch, start = seen.batch, seen.weights[0]
    plain = TeCoA(pretrained=str(tiny_model), attack=BOX)
    plain.freeze_untrained()
    plain.prepare_training(CLIPDataModule(train="shapes:source").train_task)
    images, names = plain.perturb(batch).double(), kernels(plain)
    reference = cases.in_fp64(plain)
    head, scale = reference.heads["train"].double(), reference.clip.logit_scale.detach()
    learning = {name: value for name, value in start.items() if name.startswith("clip.net.visual.")}

    def gradients(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {
            name.removeprefix("clip.net.visual."): value.clone().requires_grad_() for name, value in weights.items()
        }
        pixels = (images - reference.clip.mean) / reference.clip.std
        features = F.normalize(functional_call(reference.clip.net.visual, leaves, (pixels,)), dim=-1)
        loss = F.cross_entropy(scale * features @ head.T, batch.labels)
        parts = torch.autograd.grad(loss, list(leaves.values()))
        return dict(zip(weights, parts, strict=True))

    weights = {name: value.double() for name, value in learning.items()}
    first = gradients(weights)
    moved = {
        name: value + (GAMMA * value.norm() * first[name] / first[name].norm() if name in names else 0)
        for name, value in weights.items()
    }
    second = gradients(moved)
    after = dict(method.named_parameters())
    for name, value in weights.items():
        expected = value - RATE * second[name]
        torch.testing.assert_close(after[name].detach().double(), expected, rtol=0, atol=2e-5)
    plain_step = max(float((first[name] - second[name]).abs().max()) for name in weights) * RATE
    assert plain_step > 1e-3  # far above the tolerance, so that the second gradient is the one that counts


@pytest.mark.parametrize("cls", [TeCoA, TRADES])
def test_weights_are_their_own_before_the_optimiser_moves_them(cls: type[RobustMethod], tiny_model: Path) -> None:
    seen = Seen()
    fit(cls, tiny_model, seen, awp=AWP(GAMMA), steps=2)
    for before, after in (seen.weights[:2], seen.weights[2:]):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(seen.weights[1][name], seen.weights[2][name]) for name in seen.weights[1])


def test_gamma_zero_is_the_method_itself(tiny_model: Path) -> None:
    plain, zero, moved = (fit(TeCoA, tiny_model, steps=2, awp=awp) for awp in (None, AWP(0), AWP(GAMMA)))
    states = [method.state_dict() for method in (plain, zero, moved)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_the_attack_runs_once_and_the_loss_rises(tiny_model: Path) -> None:
    attack, losses = cases.Recorded(BOX), []
    counted: list[int] = []

    class Noted(TeCoA):
        def perturb(self, *args: Any, **kwargs: Any) -> Tensor:
            images = super().perturb(*args, **kwargs)
            counted.append(id(attack.images))
            return images

        def training_loss(self, batch: Any) -> dict[str, Tensor]:
            terms = super().training_loss(batch)
            losses.append(float(terms["adversarial_ce"].detach()))
            return terms

    calls: list[int] = []
    original = attack.attack.perturb
    attack.attack.perturb = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]  # type: ignore
    try:
        fit(Noted, tiny_model, attack=attack.attack, awp=AWP(0.01), steps=3)
    finally:
        del attack.attack.perturb
    assert len(calls) == 3
    assert len(counted) == 6
    assert all(moved > plain for plain, moved in zip(losses[::2], losses[1::2], strict=True))


def test_frozen_weights_and_vectors_are_not_moved(tiny_model: Path) -> None:
    method = TeCoA(pretrained=str(tiny_model), attack=BOX, last_blocks=1, awp=AWP())
    names = {name for name, value in method.named_parameters() if any(value is other for other in matrices(method))}
    assert names
    assert all(".resblocks.1." in name for name in names if "resblocks" in name)
    assert names <= kernels(method)
    whole = TeCoA(pretrained=str(tiny_model), attack=BOX, awp=AWP())
    assert {n for n, v in whole.named_parameters() if any(v is other for other in matrices(whole))} == kernels(whole)


@pytest.mark.slow
def test_with_lora_the_factors_are_moved(tiny_model: Path) -> None:
    seen = Seen()
    method = fit(TeCoA, tiny_model, seen, awp=AWP(GAMMA), lora=LoRA(rank=2), steps=2)
    names = {name for name, value in method.named_parameters() if any(value is other for other in matrices(method))}
    assert names
    assert all(map(is_factor, names))
    for before, after in (seen.weights[:2], seen.weights[2:]):
        assert all(torch.equal(before[name], after[name]) for name in before)
    plain = fit(TeCoA, tiny_model, lora=LoRA(rank=2), steps=2)
    assert any(not torch.equal(value, plain.state_dict()[name]) for name, value in method.state_dict().items())


@pytest.mark.slow
def test_statistics_of_batch_norm_count_a_batch_once(tmp_path: Path) -> None:
    model = tiny_clip(tmp_path, layers=[1, 1, 1, 1], width=8)
    plain, moved = (fit(TeCoA, model, has_fixed_batch_norm=False, awp=awp) for awp in (None, AWP(0)))
    assert all(torch.equal(value, moved.state_dict()[name]) for name, value in plain.state_dict().items())


def test_an_error_in_the_backward_pass_leaves_the_weights(tiny_model: Path) -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            if len(passes) == 2:
                raise RuntimeError("broken")
            return gradients[0]

    passes: list[int] = []

    class Broken(TeCoA):
        def training_loss(self, batch: Any) -> dict[str, Tensor]:
            passes.append(1)
            return {"ce": Failing.apply(super().training_loss(batch)["adversarial_ce"])}  # type: ignore

    seen = Seen()
    with pytest.raises(RuntimeError, match="broken"):
        fit(Broken, tiny_model, seen, awp=AWP(GAMMA))
    assert len(passes) == 2
    assert len(seen.weights) == 1


@pytest.mark.parametrize(
    ("cls", "settings", "words"),
    [
        (CleanFineTuning, {}, "awp must be null for CleanFineTuning"),
        (TeCoA, {"prompt": "padding", "prompt_size": 4}, "no matrix or convolution is trained"),
    ],
)
def test_methods_without_attacks_or_matrices_refuse_it(
    cls: type[RobustMethod], settings: dict[str, Any], words: str, tiny_model: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        fit(cls, tiny_model, awp=AWP(), **settings)


def test_a_negative_gamma_is_refused() -> None:
    with pytest.raises(ValueError, match="gamma"):
        AWP(-1)


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_run(tiny_model: Path, tmp_path: Path) -> None:
    def run(place: Path, checkpoint: Path | None = None) -> TeCoA:
        torch.manual_seed(0)
        method = TeCoA(
            pretrained=str(tiny_model),
            attack=BOX,
            awp=AWP(GAMMA),
            warmup_steps=0,
            optimizer=lambda params: torch.optim.SGD(params, lr=RATE, momentum=0.9),
        )
        saves = Checkpoints(dirpath=place, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        trainer = quick_trainer(saves, max_steps=4, limit_val_batches=0, enable_checkpointing=True)
        data = CLIPDataModule(train="shapes:source", batch_size=4, image_size=32)
        trainer.fit(method, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return method

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "step=2.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
