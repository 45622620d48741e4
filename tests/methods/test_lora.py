"""Methods that train the factors of LoRA: what moves, what is saved, and what other commands make of it."""

from pathlib import Path
from typing import Any

import method_cases as cases
import open_clip
import pytest
import torch
from helpers import quick_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.utils import parametrize

from robustclip.attacks import PGD
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule
from robustclip.methods import (
    CAW,
    FARE,
    FLYP,
    PMGAFT,
    TRADES,
    UCAT,
    AdversarialTraining,
    CoOp,
    FineTuning,
    RobustMethod,
    TeCoA,
    ZeroShot,
)
from robustclip.models.clip import fingerprint
from robustclip.models.lora import LoRA, inject, is_factor, merged_state
from robustclip.tools.interpolate import interpolate

BOLD: dict[str, Any] = {"warmup_steps": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}
BOX = PGD(eps="4/255", alpha="2/255", steps=2)
METHODS: list[tuple[type[RobustMethod], dict[str, Any], tuple[str, ...]]] = [
    (TeCoA, {}, ()),
    (TeCoA, {"last_blocks": 1}, ()),
    (PMGAFT, {}, ()),
    (UCAT, {}, ()),
    (CAW, {}, ()),
    (TRADES, {}, ()),
    (FARE, {}, ()),
    (AdversarialTraining, {}, ("classifier.weight", "classifier.bias")),
    (FineTuning, {}, ("classifier",)),
    (FLYP, {"lora": LoRA(rank=2, towers="both")}, ("clip.net.logit_scale",)),
]


def answers(method: RobustMethod) -> torch.Tensor:
    with torch.no_grad():
        return method.eval().clip.encode_image(cases.batch().images)


@pytest.mark.parametrize(("cls", "options", "beside"), METHODS, ids=lambda value: getattr(value, "__name__", None))
def test_factors_alone_move_and_are_saved(
    cls: type[RobustMethod], options: dict[str, Any], beside: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    settings = {"pretrained": str(tiny_model), "lora": LoRA(rank=2), **BOLD, **options}
    method = cls(**settings)
    before = {name: tensor.clone() for name, tensor in method.named_parameters()}
    trainer = cases.fit(method, steps=2, shots=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    new = {name for name, tensor in method.named_parameters() if name not in before}  # a classifier
    changed = {name for name, tensor in method.named_parameters() if name in new or not tensor.equal(before[name])}
    assert all(is_factor(name) or name in beside for name in changed)
    factors = {name for name in changed if is_factor(name)}
    assert len(factors) == len([n for n in before if is_factor(n) and n in method.trained_names]) > 0
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {name for name in saved if name.startswith("clip.")} == factors | {n for n in beside if n[:5] == "clip."}
    if cls is TeCoA and not options:
        assert len(factors) == 8  # A and B of two matrices in each of two blocks
        again = cls(**settings)
        cases.test(again, tmp_path / "a.ckpt")
        assert torch.equal(answers(again), answers(method))


def test_a_run_resumes_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    first, resumed = (TeCoA(pretrained=str(tiny_model), attack=BOX, lora=LoRA(rank=2), **BOLD) for _ in range(2))
    path = tmp_path / "step=2.ckpt"
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    for method, source in ((first, None), (resumed, path)):
        trainer = quick_trainer(keep, enable_checkpointing=True, max_steps=4, limit_val_batches=0)
        data = CLIPDataModule("shapes:source", batch_size=4, image_size=32)
        trainer.fit(method, datamodule=data, ckpt_path=source, weights_only=True)
    again = resumed.state_dict()
    assert [name for name, value in first.state_dict().items() if not torch.equal(value, again[name])] == []


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (None, "trained with lora {.*'rank': 2.*}, this run has None; give --model.lora {"),
        (LoRA(rank=3), "trained with lora {.*'rank': 2.*}, this run has {.*'rank': 3"),
        (LoRA(rank=2, alpha=1.0), "trained with lora {.*'alpha': None.*}, this run has {.*'alpha': 1.0"),
    ],
)
def test_a_checkpoint_of_other_factors_is_refused(
    other: LoRA | None, words: str, tiny_model: Path, tmp_path: Path
) -> None:
    method = TeCoA(pretrained=str(tiny_model), lora=LoRA(rank=2), attack=BOX, **BOLD)
    cases.fit(method, steps=1, shots=1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=words):
        cases.test(TeCoA(pretrained=str(tiny_model), lora=other), tmp_path / "a.ckpt")


def test_a_full_checkpoint_is_refused_by_a_run_with_factors(tiny_model: Path, tmp_path: Path) -> None:
    method = TeCoA(pretrained=str(tiny_model), attack=BOX, **BOLD)
    cases.fit(method, steps=1, shots=1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"trained with lora None, this run has {.*give --model.lora null"):
        cases.test(TeCoA(pretrained=str(tiny_model), lora=LoRA(rank=2)), tmp_path / "a.ckpt")


def test_the_attack_computes_the_matrices_once_and_leaves_the_loss_its_gradient(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, data = cases.make(TeCoA, tiny_model, attack=BOX, lora=LoRA(rank=2)), cases.batch()
    counts: list[bool] = []
    change = method.clip.net.visual.transformer.resblocks[0].attn.parametrizations.in_proj_weight[0]
    change.register_forward_hook(lambda *_: counts.append(torch.is_grad_enabled()))
    once = method.perturb(data)
    assert len(counts) == 1
    loss = method.training_loss(data)["adversarial_ce"]
    loss.backward()
    learning = [parameter for parameter in method.parameters() if parameter.requires_grad]
    assert learning
    assert all(parameter.grad is not None for parameter in learning)
    assert all(parameter.grad is None for parameter in method.parameters() if not parameter.requires_grad)
    monkeypatch.setattr(parametrize, "_cache_enabled", -1000)  # never on
    assert torch.equal(once, method.perturb(data))


def test_interpolation_is_that_of_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    def fresh() -> TeCoA:
        return TeCoA(pretrained=str(tiny_model), lora=LoRA(rank=2), attack=BOX, **BOLD)

    tuned = fresh()
    cases.fit(tuned, steps=2, shots=1).save_checkpoint(tmp_path / "a.ckpt")
    files = interpolate(fresh(), tmp_path / "a.ckpt", tmp_path / "between", alphas=[0.0, 0.25, 1.0])
    original, end = ZeroShot(pretrained=str(tiny_model)), merged_state(tuned.clip.net)
    start = {name: value.clone() for name, value in original.clip.net.state_dict().items()}
    for file, alpha in zip(files, (0.0, 0.25, 1.0), strict=True):
        between = fresh()
        cases.test(between, file)
        original.clip.net.load_state_dict({name: torch.lerp(start[name], end[name], alpha) for name in start})
        torch.testing.assert_close(answers(between), answers(original), rtol=0, atol=1e-6)
    assert not torch.equal(answers(tuned), answers(ZeroShot(pretrained=str(tiny_model))))


def test_the_command_line_trains_and_exports_factors(tiny_model: Path, tmp_path: Path) -> None:
    words = [
        "fit", "--model", "TeCoA", "--model.pretrained", str(tiny_model), "--model.lora.rank", "3",
        "--model.lora.alpha", "6", "--model.lora.targets", "[q, v]", "--model.warmup_steps", "0",
        "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.05", "--data.train", "shapes:source",
        "--data.batch_size", "4", "--data.image_size", "32", "--data.shots", "1", "--trainer.max_steps", "2",
        "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0", "--trainer.logger", "false",
        "--checkpoint.dirpath", str(tmp_path / "weights"),
    ]  # fmt: skip
    assert run(words) == 0
    checkpoint = tmp_path / "weights" / "last.ckpt"
    assert run(["export", str(checkpoint), "--out", str(tmp_path / "exported")]) == 0
    lora = LoRA(rank=3, alpha=6.0, targets=("q", "v"))
    live, exported = TeCoA(pretrained=str(tiny_model), lora=lora), ZeroShot(pretrained=str(tmp_path / "exported"))
    cases.test(live, checkpoint)
    torch.testing.assert_close(answers(live), answers(exported), rtol=0, atol=1e-5)
    assert fingerprint(live) == fingerprint(exported) != fingerprint(ZeroShot(pretrained=str(tiny_model)))


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (CoOp, {"tokens": 4}, "lora must be null for a method and settings that train no matrix"),
        (FLYP, {"compile": True}, "compile must be false where lora is set"),
        (FineTuning, {"l2_sp": 0.1}, "l2_sp must be 0 where lora is set"),
    ],
)
def test_combinations_without_sense_are_refused(
    cls: type[RobustMethod], options: dict[str, Any], words: str, tiny_model: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        cls(pretrained=str(tiny_model), lora=LoRA(rank=2), **options).freeze_untrained()


def test_activation_checkpointing_gives_the_same_gradients(tiny_model: Path) -> None:
    def gradients(**options: Any) -> list[torch.Tensor]:
        method = cases.make(TeCoA, tiny_model, attack=BOX, lora=LoRA(rank=2), **options)
        method.training_loss(cases.batch())["adversarial_ce"].backward()
        return [parameter.grad for parameter in method.parameters() if parameter.grad is not None]

    for one, other in zip(gradients(), gradients(has_activation_checkpointing=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_the_number_of_factors_of_a_large_tower() -> None:
    with torch.device("meta"):
        net = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-32"))
        inject(net, LoRA(rank=8))
    factors = sum(parameter.numel() for name, parameter in net.named_parameters() if is_factor(name))
    assert factors == 12 * (6 + 2) * 8 * 768 == 589_824
