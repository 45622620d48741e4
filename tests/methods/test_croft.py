"""CRoFT against its formulas: the steps of both modes written out, and what the manual optimisation must survive."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from helpers import quick_trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from robustclip.data import CLIPDataModule
from robustclip.methods import CRoFT
from robustclip.types import Batch

R, R_T, LAMBDA1, LAMBDA2 = 0.2, 0.5, 2.0, 30.0
RATE, MOMENTUM, DECAY, STEPS = 0.05, 0.9, 0.1, 5
Penalty = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Batches(Callback):
    """Keeps what is trained on."""

    def __init__(self) -> None:
        self.seen: list[Batch] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.seen.append(batch)


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)


def build(folder: Path, cls: type[CRoFT] = CRoFT, **options: Any) -> CRoFT:
    defaults = {"lambda1": LAMBDA1, "lambda2": LAMBDA2, "warmup_epochs": 0, "optimizer": sgd}
    return cls(pretrained=str(folder), **{**defaults, **options})


def fit(method: CRoFT, *callbacks: Callback, epochs: int = 1, path: Path | None = None, **options: Any) -> Trainer:
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    limits = {"max_epochs": epochs, "limit_train_batches": STEPS, "limit_val_batches": 0}
    trainer = quick_trainer(*callbacks, enable_checkpointing=saves, **limits | options)
    trainer.fit(
        method, datamodule=CLIPDataModule(train="shapes:source", batch_size=8, image_size=32), ckpt_path=path,
        weights_only=True,
    )  # fmt: skip
    return trainer


# The authors' step, from the paper's specification: eps of 1e-6 beside norms, a shift of 1e-4, double backward passes.


def norm(vectors: Tensor) -> Tensor:
    return vectors / (vectors.norm(dim=-1, keepdim=True) + 1e-6)


def squared_gradient(x: Tensor, t: Tensor, a: Tensor, b: Tensor, shifts: tuple[Tensor, Tensor]) -> Tensor:
    """``sum (d mean_nk exp(cos) / d shift)^2``, shifts beside ``a`` and ``b``, which multiply from the right."""
    u, v = norm(R * x @ (a + shifts[0]) + (1 - R) * x), norm(R_T * t @ (b + shifts[1]) + (1 - R_T) * t)
    wanted = list({id(shift): shift for shift in shifts}.values())
    gradients = torch.autograd.grad((u @ v.T).exp().mean(), wanted, create_graph=True)
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum()


def away(z: Tensor, features: Tensor, y: Tensor) -> Tensor:
    pairs = [z[i] @ features[j] for i in range(len(y)) for j in range(len(y)) if y[i] == y[j]]
    return torch.stack(pairs).sum() / len(y) ** 2


def zero_shift(width: int, value: float) -> Tensor:
    return torch.full((width, width), value, dtype=torch.float64, requires_grad=True)


def reenacted(mode: str, generator_steps: int, data: list[tuple[Tensor, Tensor]], text: Tensor, s: Tensor) -> Any:
    """``A``, ``B`` and ``G`` after one pass over batches of embeddings ``(N, D)`` with labels."""
    width = text.shape[1]
    a, b, g = (torch.eye(width, dtype=torch.float64, requires_grad=True) for _ in range(3))
    both, alone = sgd([a, b]), sgd([g])
    everyone = [both, alone]
    is_clean = mode == "clean"

    def step(loss: Tensor, optimizers: list[torch.optim.SGD]) -> None:
        for each in optimizers:
            each.zero_grad()
        loss.backward(retain_graph=True)
        for each in optimizers:
            each.step()

    def ce(features: Tensor, v: Tensor, y: Tensor) -> Tensor:
        return cases.cross_entropy(s * features @ v.T, y).mean()

    for raw, y in data:
        x, t = norm(raw), norm(text)
        u, v = norm(R * raw @ a.T + (1 - R) * raw), norm(R_T * text @ b.T + (1 - R_T) * text)
        for _ in range(generator_steps):
            near, texts = (u.detach(), v.detach()) if is_clean else (u, v)
            z = norm(near @ g.T + near)
            step(ce(z, texts, y) + LAMBDA1 * away(z, near, y), [alone] if is_clean else everyone)
        z = norm(u @ g.T + u)
        if is_clean:
            z = z.detach()
            shifts = zero_shift(width, 0), zero_shift(width, 0)
            energy = squared_gradient(x, t, a.T, b.T, shifts) + squared_gradient(z, t, a.T, b.T, shifts)
            loss = ce(u, v, y) + LAMBDA1 * ce(norm(R * z @ a.T + (1 - R) * z), v, y) + LAMBDA2 * energy
            step(loss, [both])
            continue
        shift = zero_shift(width, 1e-4)
        if generator_steps and mode == "official":
            loss = ce(u, v, y) + ce(R * z + (1 - R) * z @ a, v, y) - LAMBDA1 * away(z, x, y)
            step(loss + LAMBDA2 * squared_gradient(torch.cat([x, z]), t, a, b, (shift, shift)), everyone)
        else:
            step(ce(u, v, y) + ce(z, v, y) + LAMBDA2 * squared_gradient(x, t, a, b, (shift, shift)), everyone)
    return [a, b, g]


@pytest.mark.parametrize(
    ("mode", "generator_steps"),
    [("clean", 2), ("clean", 1), ("official", 2), ("official", 0), ("official_vlcs", 1)],
)
def test_five_steps_are_those_written_out(mode: Any, generator_steps: int, tiny_model: Path) -> None:
    method, batches = build(tiny_model, mode=mode, generator_steps=generator_steps), Batches()
    fit(method, batches)
    assert len(batches.seen) == STEPS
    twin = cases.in_fp64(method)
    with torch.no_grad():
        data = [(cases.embed(twin, batch.images.double()), batch.labels) for batch in batches.seen]
    expected = reenacted(mode, generator_steps, data, twin.texts.double(), twin.clip.logit_scale.detach())
    start = torch.eye(len(method.generator), dtype=torch.float64)
    for found, reference in zip((method.image_adapter, method.text_adapter, method.generator), expected, strict=True):
        moved = (reference - start).norm()
        assert moved > 1e-3 or torch.equal(reference, start)
        # fp32 against fp64 over five steps, relative to the way that was gone.
        assert (found.double() - reference).norm() <= 1e-3 * moved


def test_identities_are_the_zero_shot_model(tiny_model: Path) -> None:
    for ratio in (0.0, 0.3, 1.0):
        method = cases.make(CRoFT, tiny_model, ratio=ratio, ratio_text=1 - ratio)
        images = cases.batch().images
        torch.testing.assert_close(method.logits(images), cases.logits(method, images), rtol=1e-4, atol=1e-4)


def test_cross_entropy_is_the_energy_less_the_logit_of_the_label(tiny_model: Path) -> None:
    """``CE = -f_y - E``."""
    method, data = cases.make(CRoFT, tiny_model, ratio=0.7), cases.batch()
    with torch.no_grad():
        for parameter in (method.image_adapter, method.text_adapter):
            parameter += 0.3 * torch.randn_like(parameter)
        method.prepare_training(cases.TASK)
        f = method.logits(data.images).double()
        energy = -f.exp().sum(1).log()
        ce = method.training_loss(data)["clean_ce"]
    torch.testing.assert_close(ce.double(), (-f[range(4), data.labels] - energy).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["clean", "official"])
def test_generator_steps_move_the_adapters_in_the_authors_code_alone(mode: Any, tiny_model: Path) -> None:
    class Generating(CRoFT):
        def adapter_loss(self, view: Any, labels: Tensor) -> dict[str, Tensor]:
            return {"nothing": 0 * sum(p.sum() for p in (self.image_adapter, self.text_adapter, self.generator))}

    method = build(tiny_model, Generating, mode=mode, optimizer=lambda params: torch.optim.SGD(params, lr=RATE))
    fit(method)
    start = torch.eye(len(method.generator))
    moved = [not torch.equal(each, start) for each in (method.image_adapter, method.text_adapter, method.generator)]
    assert moved == [mode == "official", mode == "official", True]


class Rates(Callback):
    """Learning rates of both optimisers in each epoch's last step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])


def test_both_rates_follow_the_codes_table(tiny_model: Path) -> None:
    """Epochs 1, 2, 3 and 30 of 30."""
    rates, method = Rates(), CRoFT(pretrained=str(tiny_model), lambda2=0)
    fit(method, rates, epochs=30, limit_train_batches=1)
    table = {1: 1e-5, 2: 2e-3, 3: 0.00199452, 30: 2.18524e-5}  # 0.002 (1 + cos(pi (epoch - 2) / 30)) / 2
    assert len(rates.seen) == 30
    for epoch, rate in table.items():
        assert rates.seen[epoch - 1] == pytest.approx([rate, rate], rel=1e-5)


@pytest.mark.parametrize("mode", ["clean", "official"])
@pytest.mark.parametrize("batches", [3, STEPS], ids=["within an epoch", "at its end"])
def test_a_continued_fit_ends_as_the_uninterrupted_one(
    mode: Any, batches: int, tiny_model: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    every = batches * (2 if mode == "clean" else 4)  # optimiser steps
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    whole, again = build(tiny_model, mode=mode), build(tiny_model, mode=mode)
    fit(whole, saved, epochs=3)
    fit(again, epochs=3, path=tmp_path / f"step={every}.ckpt")
    for name in ("image_adapter", "text_adapter", "generator"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name


def test_mixed_precision_encodes_and_the_rest_is_fp32(tiny_model: Path) -> None:
    methods = [build(tiny_model), build(tiny_model)]
    for method, precision in zip(methods, ("32", "bf16-mixed"), strict=True):
        trainer = fit(method, precision=precision)
        assert all(value.dtype == torch.float32 for value in trainer.callback_metrics.values())
    moved = [method.image_adapter - torch.eye(16) for method in methods]
    assert not torch.equal(*moved)
    # bf16 embeddings have 8 bits, and nothing after them is coarser.
    assert (moved[0] - moved[1]).norm() < 0.1 * moved[0].norm()


@pytest.mark.parametrize("scale", [1.0, 7.0, None])
def test_each_images_energy_has_the_scale_of_the_option(scale: float | None, tiny_model: Path) -> None:
    method = build(tiny_model, penalty="sample", energy_scale=scale, lambda1=0.0, lambda2=1.0).double()
    method.prepare_training(CLIPDataModule(train="shapes:source", image_size=32).train_task)
    embeddings, labels = torch.randn(4, method.width, dtype=torch.float64), torch.arange(4)
    view, factor = method.view(Batch(embeddings, labels, labels)), scale or float(method.clip.logit_scale.detach())
    generated = norm(method.generate(view.images.unit)).detach()

    def energies(images: Tensor) -> Tensor:
        u = norm(R * images @ method.image_adapter.T + (1 - R) * images)
        v = norm(R_T * method.texts @ method.text_adapter.T + (1 - R_T) * method.texts)
        return (factor * u @ v.T).logsumexp(1)

    adapters, expected = [method.image_adapter, method.text_adapter], 0.0
    for images in (view.images.inputs, generated):
        for energy in energies(images):
            expected += (
                sum(float(g.square().sum()) for g in torch.autograd.grad(energy, adapters, retain_graph=True)) / 4
            )
    assert float(method.adapter_loss(view, labels)["energy"].detach()) == pytest.approx(expected, rel=1e-4)


def test_accumulation_is_refused_in_one_line(tiny_model: Path) -> None:
    with pytest.raises(MisconfigurationException, match="accumulation is not supported for manual optimization"):
        fit(build(tiny_model), accumulate_grad_batches=2)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"mode": "exact"}, "mode must be one of clean, official, official_vlcs, got 'exact'"),
        ({"penalty": "mean"}, "penalty must be one of batch, sample, got 'mean'"),
        ({"reduction": "max"}, "reduction must be one of mean, sum, got 'max'"),
        ({"ratio": 1.5}, r"ratio must be in \[0, 1\], got 1.5"),
        ({"ratio_text": -0.1}, r"ratio_text must be in \[0, 1\], got -0.1"),
        ({"generator_steps": 0}, "generator_steps must be at least 1 in mode 'clean', got 0"),
        ({"generator_steps": -1, "mode": "official"}, "generator_steps must be .*at least 0, got -1"),
        ({"lambda2": -1.0}, "lambda2 must be at least 0, got -1.0"),
        ({"mode": "official", "penalty": "sample"}, "penalty must be 'batch' in mode 'official'"),
        ({"energy_scale": 10.0}, "energy_scale must be 1 where penalty is 'batch', got 10.0"),
    ],
)
def test_impossible_values_are_refused(kwargs: dict[str, Any], words: str, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=words):
        CRoFT(pretrained=str(tiny_model), **kwargs)
