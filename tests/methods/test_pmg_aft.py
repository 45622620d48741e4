"""PMG-AFT's training step against its definition (specification sections 3, 4, 6, 7, 10)."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import method_cases as cases
import pytest
import torch
from helpers import quick_trainer, tiny_clip
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from robustclip.attacks import APGD, PGD
from robustclip.cli.lightning import main
from robustclip.data import CLIPDataModule
from robustclip.methods import PMGAFT, RobustMethod, TeCoA
from robustclip.types import Batch

BOLD: dict[str, Any] = {"warmup_steps": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}
UNMOVED_KL = 1e-7  # inference runs a fused attention kernel: logits differ by 1e-5, their divergence by its square


def total(method: RobustMethod, data: Batch) -> Tensor:
    return torch.stack(list(method.training_loss(data).values())).sum()


def fit(
    method: RobustMethod,
    *callbacks: Any,
    steps: int,
    batch_size: int = 4,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Any:
    trainer = quick_trainer(*callbacks, max_steps=steps, limit_val_batches=0, **options)
    data = CLIPDataModule(train="shapes:source", batch_size=batch_size, image_size=32)
    trainer.fit(method, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum(-1, keepdim=True)


def kl(q: Tensor, p: Tensor) -> Tensor:
    """``KL(q || p)`` per sample."""
    return (q * (q.log() - p.log())).sum(-1)


def teacher_of(method: Any) -> Any:
    """The teacher's image tower beside what it shares with the student."""
    clip, visual = method.clip, method.teacher.clip.net.visual
    net = SimpleNamespace(visual=visual, encode_text=clip.net.encode_text, logit_scale=clip.net.logit_scale)
    return SimpleNamespace(clip=SimpleNamespace(net=net, tokenizer=clip.tokenizer, mean=clip.mean, std=clip.std))


def block_of(method: Any, images: Tensor, number: int) -> Tensor:
    """Class token after that block, from the tower's parts."""
    visual = method.clip.net.visual
    tokens = visual.conv1((images - method.clip.mean) / method.clip.std).flatten(2).transpose(1, 2)
    first = visual.class_embedding.expand(len(images), 1, -1)
    tokens = visual.ln_pre(torch.cat([first, tokens], 1) + visual.positional_embedding)
    for block in visual.transformer.resblocks[: number + 1]:
        tokens = block(tokens)
    return tokens[:, 0]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_value_and_gradient_are_those_of_the_formula(direction: str, tiny_model: Path) -> None:
    """``CE(z_a, y) + alpha KL(P_o || P_a) + beta KL(P_c || P_a)``, with gradients through clean predictions too."""
    method = cases.make(PMGAFT, tiny_model, alpha=0.7, beta=1.3, kl_direction=direction)
    data = cases.batch()

    def expected(twin: Any, clean: Tensor, attacked: Tensor) -> Tensor:
        z_a, z_c, z_o = (cases.logits(twin, attacked), cases.logits(twin, clean),
                         cases.logits(teacher_of(twin), attacked).detach())  # fmt: skip
        p_a, p_c, p_o = softmax(z_a), softmax(z_c), softmax(z_o)
        guidance, pull = (kl(p_o, p_a), kl(p_c, p_a)) if direction == "forward" else (kl(p_a, p_o), kl(p_a, p_c))
        return (cases.cross_entropy(z_a, data.labels) + 0.7 * guidance + 1.3 * pull).mean()

    cases.assert_the_loss_is(method, data, expected)


def test_detached_clean_predictions_are_constants(tiny_model: Path) -> None:
    method, data = cases.make(PMGAFT, tiny_model, alpha=0.0, beta=2.0, detach_clean=True), cases.batch()

    def expected(twin: Any, clean: Tensor, attacked: Tensor) -> Tensor:
        z_a, p_c = cases.logits(twin, attacked), softmax(cases.logits(twin, clean)).detach()
        return (cases.cross_entropy(z_a, data.labels) + 2 * kl(p_c, softmax(z_a))).mean()

    cases.assert_the_loss_is(method, data, expected)


@pytest.mark.parametrize(
    ("distance", "layer"),
    [("kl", "features"), ("kl", 0), ("kl", -1), ("l1", "logits"), ("l1", "features"), ("l2", "logits"), ("l2", -1),
     ("cosine", 0)],
)  # fmt: skip
def test_the_guidance_measures_each_distance_at_each_layer(distance: str, layer: Any, tiny_model: Path) -> None:
    method = cases.make(PMGAFT, tiny_model, alpha=3.0, beta=0.0, distance=distance, layer=layer)
    data = cases.batch()

    def look(twin: Any, images: Tensor) -> Tensor:
        if isinstance(layer, int):
            return block_of(twin, images, layer % 2)
        return cases.logits(twin, images) if layer == "logits" else cases.unit(cases.embed(twin, images))

    def expected(twin: Any, clean: Tensor, attacked: Tensor) -> Tensor:
        a, o = look(twin, attacked), look(teacher_of(twin), attacked).detach()
        values = {
            "kl": kl(softmax(o), softmax(a)),
            "l1": (a - o).abs().mean(-1),
            "l2": ((a - o) ** 2).mean(-1),
            "cosine": 1 - (cases.unit(a) * cases.unit(o)).sum(-1),
        }
        return (cases.cross_entropy(cases.logits(twin, attacked), data.labels) + 3 * values[distance]).mean()

    cases.assert_the_loss_is(method, data, expected)


def test_code_mode_is_paper_mode_at_scale_one_with_weights_of_the_batch_size(tiny_model: Path) -> None:
    data = cases.batch(6)
    common = {"logit_scale": 1.0, "normalisation": "imagenet"}
    code = cases.make(PMGAFT, tiny_model, reduction="sum", **common)
    paper = cases.make(PMGAFT, tiny_model, alpha=6.0, beta=6.0, **common)
    for one, other in zip(code.training_loss(data).values(), paper.training_loss(data).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert code.training_loss(data)["guidance"] > 0


def test_code_mode_sees_cosines_of_pixels_in_imagenets_statistics(tiny_model: Path) -> None:
    method, images = PMGAFT(pretrained=str(tiny_model), logit_scale=1.0, normalisation="imagenet"), cases.batch().images
    method.prepare_training(cases.TASK)
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    features = cases.unit(method.clip.net.visual((images - mean) / std))
    torch.testing.assert_close(method.logits(images), features @ method.heads["train"].T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.teacher.clip.encode_image(images), features, rtol=1e-5, atol=1e-6)


def test_the_attack_is_tecoas_and_follows_the_student(tiny_model: Path) -> None:
    data = cases.batch()
    one, other = (cases.make(cls, tiny_model) for cls in (PMGAFT, TeCoA))
    assert torch.equal(one.perturb(data), other.perturb(data))


def test_any_attack_generates(tiny_model: Path) -> None:
    method = cases.make(PMGAFT, tiny_model, attack=APGD(eps="2/255", steps=3))
    total(method, cases.batch()).backward()
    moved = (method.attack.images - cases.batch().images).abs().max()
    assert 0 < moved <= 2 / 255 + 1e-6


def test_without_guidance_and_pull_it_is_tecoa_bit_for_bit(tiny_model: Path) -> None:
    ours = PMGAFT(pretrained=str(tiny_model), alpha=0.0, beta=0.0, **BOLD)
    theirs = TeCoA(pretrained=str(tiny_model), **BOLD)
    before = copy.deepcopy(theirs.clip)
    for method in (ours, theirs):
        fit(method, steps=3)
    for name, tensor in theirs.clip.state_dict().items():
        assert torch.equal(tensor, ours.clip.state_dict()[name]), name
    assert not torch.equal(before.net.visual.proj, ours.clip.net.visual.proj)


def test_the_guidance_is_nothing_at_the_start_and_its_gradient_too(tiny_model: Path) -> None:
    torch.manual_seed(0)
    method = PMGAFT(pretrained=str(tiny_model))
    method.freeze_untrained()
    method.prepare_training(cases.TASK)
    terms = method.training_loss(cases.batch())
    parameters = list(method.clip.net.visual.parameters())
    of_guidance = torch.autograd.grad(terms["guidance"], parameters, retain_graph=True)
    of_tecoa = torch.autograd.grad(terms["adversarial_ce"], parameters)
    assert terms["guidance"].abs() < UNMOVED_KL
    for small, large in zip(of_guidance, of_tecoa, strict=True):
        assert small.abs().max() <= 1e-4 * large.abs().max() + 1e-8


def test_unattacked_images_need_no_pull(tiny_model: Path) -> None:
    method = cases.make(PMGAFT, tiny_model, attack=PGD(eps=0.0))
    assert method.training_loss(cases.batch())["clean_pull"] == 0


def test_the_teacher_never_moves_nor_leaves_eval_mode(tiny_model: Path) -> None:
    method = PMGAFT(pretrained=str(tiny_model), **BOLD)
    modes: set[bool] = set()
    visual = method.teacher.clip.net.visual
    visual.register_forward_hook(lambda *_: modes.update(module.training for module in visual.modules()))
    before = {name: tensor.clone() for name, tensor in method.named_parameters()}
    fit(method, steps=3)
    moved = {name for name, tensor in method.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.startswith("clip.net.visual.")}
    assert modes == {False}
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


def test_the_towers_run_as_often_as_needed(tiny_model: Path) -> None:
    """Two steps of the attack, the attacked pass and the clean pass; one pass of the teacher; no text."""
    method, calls = cases.make(PMGAFT, tiny_model), []
    towers = {"student": method.clip.net.visual, "teacher": method.teacher.clip.net.visual}
    for name, tower in {**towers, "text": method.clip.net.transformer}.items():
        tower.register_forward_hook(lambda *_, name=name: calls.append(name))
    method.training_loss(cases.batch())
    assert calls == ["student"] * 3 + ["teacher", "student"]
    assert method.teacher.clip.net.transformer is None


def test_every_declared_parameter_gets_a_gradient_also_under_autocast(tiny_model: Path) -> None:
    """DistributedDataParallel waits for all; and weights cast without a graph must not be used with one."""
    method = cases.make(PMGAFT, tiny_model, detach_clean=True)
    with torch.autocast("cpu", torch.bfloat16):
        total(method, cases.batch()).backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == name.startswith("clip.net.visual."), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0 or name.endswith("in_proj_bias"), name


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_fit_equals_an_uninterrupted_one(tiny_model: Path, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    whole, resumed = (PMGAFT(pretrained=str(tiny_model), **BOLD) for _ in range(2))
    fit(whole, keep, steps=4, enable_checkpointing=True)
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"clip"}
    fit(resumed, steps=4, ckpt_path=tmp_path / "step=2.ckpt")
    for name, tensor in whole.named_parameters():
        assert torch.equal(tensor, resumed.get_parameter(name)), name


def test_accumulated_batches_equal_a_large_one(tiny_model: Path) -> None:
    """For means over the batch. A sum over it weighs the divergences by the size of the pieces, by design."""
    ends = {}
    for reduction in ("mean", "sum"):
        for size, pieces in ((8, 1), (4, 2)):
            method = PMGAFT(pretrained=str(tiny_model), reduction=reduction, last_blocks=1, **BOLD)
            fit(method, steps=2, batch_size=size, accumulate_grad_batches=pieces)
            ends[reduction, pieces] = torch.cat([p.detach().flatten() for p in method.clip.net.visual.parameters()])
    torch.testing.assert_close(ends["mean", 2], ends["mean", 1], rtol=1e-5, atol=1e-5)
    assert (ends["sum", 2] - ends["sum", 1]).abs().max() > 1e-4


def test_a_convolutional_tower_is_guided_by_means_over_its_pixels(tmp_path: Path) -> None:
    method = cases.make(
        PMGAFT, tiny_clip(tmp_path, layers=[1, 1, 1, 1], width=8), beta=0.0, alpha=1.0, distance="l2", layer=-1
    )
    data, outputs = cases.batch(), []
    for clip in (method.clip, method.teacher.clip):
        clip.net.visual.layer4.register_forward_hook(lambda *call: outputs.append(call[-1].detach().double()))
    guidance = method.training_loss(data)["guidance"]
    student, teacher = (output.sum((2, 3)) / output.shape[2:].numel() for output in outputs[-2:])
    torch.testing.assert_close(guidance.double(), ((student - teacher) ** 2).mean(), rtol=1e-5, atol=1e-9)


def test_the_default_recipe_is_the_papers(tiny_model: Path) -> None:
    method = PMGAFT(pretrained=str(tiny_model))
    (group,) = method.optimizer(method.parameter_groups()).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (5e-5, 0.9, 0, False)
    assert (method.attack.eps, method.attack.alpha, method.attack.steps) == (1 / 255, 1 / 255, 2)
    assert (method.alpha, method.beta, method.warmup_steps) == (1, 1, 1000)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("alpha", -1.0, "alpha must be at least 0"), ("beta", float("nan"), "beta must be at least 0"),
     ("logit_scale", 0.0, "logit_scale must be above 0"), ("layer", 2, r"layer must be a block in \[-2, 1\], got 2"),
     ("pretrained", None, "pretrained")],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(option: str, value: Any, message: str, tiny_model: Path) -> None:
    options = {"arch": None, "pretrained": str(tiny_model), option: value}
    if option == "pretrained":
        options["arch"] = "ViT-S-32-alt"
    with pytest.raises(ValueError, match=message):
        PMGAFT(**options)


@pytest.mark.slow
def test_the_command_line_fits_and_tests_an_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model", "PMGAFT", "--model.layer=-1", "--model.distance", "cosine", "--model.alpha", "2"]
    words += ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.enable_model_summary=false"]
    words += ["--data.batch_size", "4", "--data.test", "[shapes:colours]", "--evaluation.max_samples", "4"]
    words += ["--evaluation.attacks", "{pgd: {class_path: PGD}}", "--checkpoint.dirpath", "weights"]
    main(["fit", *words])
    finished = main(["test", *words, "--ckpt_path", "weights/last.ckpt"])
    assert (finished.model.layer, finished.model.alpha) == (-1, 2.0)
    assert finished.trainer.callback_metrics["test/colours/n"] == 4
