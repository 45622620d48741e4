"""Methods x towers x attacks x ways to compute: whatever is put together by configuration alone works."""

import math
from pathlib import Path
from typing import Any

import method_cases as cases
import open_clip
import pytest
import torch
import tower_cases
from helpers import quick_trainer
from lightning.pytorch import Callback
from torch import Tensor, nn

from robustclip.attacks import APGD, PGD, Attack, Square, TorchAttack
from robustclip.cli.lightning import main
from robustclip.data import CLIPDataModule
from robustclip.evaluation import RobustEvaluation
from robustclip.methods import FARE, PMGAFT, UEO, CLIPAdapter, CRoFT, RobustMethod, TeCoA
from robustclip.models.clip import CLIPModel

METHODS: list[type[RobustMethod]] = [TeCoA, PMGAFT, FARE, UEO]
BEHIND: list[type[RobustMethod]] = [CRoFT, CLIPAdapter]  # a tower that is frozen
OWN: dict[type[RobustMethod], dict[str, Any]] = {
    UEO: {"norm_filter": "all", "weights": "uniform"},
    CRoFT: {"warmup_epochs": 0},
    CLIPAdapter: {"warmup_epochs": 0},
}
LINF, L2 = PGD(eps="4/255", alpha="2/255"), PGD(eps=0.5, alpha=0.25, norm="l2")
ATTACKS: dict[str, Attack] = {
    "l2": L2,
    "apgd": APGD(eps="4/255", steps=3),
    "square": Square(eps="4/255", queries=3),
    "torchattacks": TorchAttack("PGD", eps="4/255", kwargs={"steps": 2}),
}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of the method and of the trainer
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    "accumulation": ({}, {"accumulate_grad_batches": 2}),
    "activation checkpointing": ({"has_activation_checkpointing": True}, {}),
    "all three": ({"has_activation_checkpointing": True}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}),
}
each_method = pytest.mark.parametrize("cls", METHODS)
each_tower = pytest.mark.parametrize("tower", tower_cases.TOWERS)


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tower_cases.write(name, tmp_path_factory.mktemp(name)) for name in tower_cases.TOWERS}


class Outputs(Callback):
    """Keeps the clean logits of an evaluation."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
        self.logits.append(outputs)


def evaluate(method: RobustMethod, **options: Any) -> tuple[dict[str, float], Tensor]:
    """Metrics and clean logits of four samples."""
    kept = Outputs()
    callbacks = [RobustEvaluation({"linf": LINF, "l2": L2}, max_samples=4), kept]
    trainer = quick_trainer(*callbacks, **options)
    data = CLIPDataModule(test=["shapes:colours"], batch_size=4, image_size=32)
    trainer.test(method, datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, torch.cat(kept.logits)


def assert_it_works(method: RobustMethod, **options: Any) -> None:
    """Fits one step and evaluates: what is declared moves, the rest stays, and every number is one."""
    tensors = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    trainer = quick_trainer(max_steps=1, limit_val_batches=0, **options)
    trainer.fit(method, datamodule=CLIPDataModule(train="shapes:source", batch_size=4, image_size=32))
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    moved = {name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])}
    assert moved == declared(method)
    metrics, logits = evaluate(method, **{key: value for key, value in options.items() if key == "precision"})
    assert logits.isfinite().all()
    assert metrics["test/colours/n"] == 4
    for attack in ("linf", "l2"):
        assert 0 <= metrics[f"test/colours/{attack}/acc1"] <= metrics["test/colours/clean/acc1"] <= 1


def declared(method: RobustMethod) -> set[str]:
    """The whole image tower, or the norms that are a part of it and the context, or what is behind it."""
    learning = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    tower = {name for name, _ in method.named_parameters() if name.startswith("clip.net.visual.")}
    if isinstance(method, UEO):
        assert learning - tower == {"context.vectors"}
        assert learning < tower | {"context.vectors"}
    elif type(method) in BEHIND:
        assert not learning & tower
    else:
        assert learning == tower
    return learning


def make(cls: type[RobustMethod], folder: Path, attack: Attack = LINF, **options: Any) -> RobustMethod:
    """Steps large enough that every weight moves by more than its last digit."""
    rate = 1e-2
    optimizer = lambda params: torch.optim.AdamW(params, lr=rate)  # noqa: E731
    return cls(
        pretrained=str(folder), attack=attack, warmup_steps=0, optimizer=optimizer, **OWN.get(cls, {}), **options
    )


@each_tower
@each_method
def test_every_tower_learns_and_is_tested(cls: type[RobustMethod], tower: str, towers: dict[str, Path]) -> None:
    assert_it_works(make(cls, towers[tower]))


@each_tower
@pytest.mark.parametrize("cls", BEHIND)
def test_every_tower_can_be_followed_by_adapters(cls: type[RobustMethod], tower: str, towers: dict[str, Path]) -> None:
    assert_it_works(make(cls, towers[tower]), precision="bf16-mixed")


@pytest.mark.parametrize("way", WAYS)
@each_method
def test_every_way_to_compute_works(cls: type[RobustMethod], way: str, towers: dict[str, Path]) -> None:
    of_method, of_trainer = WAYS[way]
    assert_it_works(make(cls, towers["vit"], **of_method), **of_trainer)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("cls", [TeCoA, PMGAFT])
def test_any_attack_generates(cls: type[RobustMethod], attack: str, towers: dict[str, Path]) -> None:
    assert_it_works(make(cls, towers["vit"], ATTACKS[attack]))


@each_tower
@each_method
def test_every_declared_parameter_gets_a_gradient(cls: type[RobustMethod], tower: str, towers: dict[str, Path]) -> None:
    """So that DistributedDataParallel need not look for unused ones."""
    method = cases.make(cls, towers[tower], **OWN.get(cls, {}))
    torch.stack(list(method.training_loss(cases.batch(2)).values())).sum().backward()
    without = {name for name, parameter in method.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in method.named_parameters()} - declared(method)


@pytest.mark.parametrize(
    ("cls", "kwargs", "tower"),
    [*((cls, {}, tower) for cls in METHODS for tower in ("vit", "convnext", "efficientnet", "siglip")),
     *((PMGAFT, {"layer": -1, "distance": "l2"}, tower) for tower in ("vit", "convnext", "siglip"))],
)  # fmt: skip
def test_recomputed_activations_give_the_same_gradients(
    cls: type[RobustMethod], kwargs: dict[str, Any], tower: str, towers: dict[str, Path]
) -> None:
    gradients, passes = [], []
    for is_on in (False, True):
        method, calls = (
            cases.make(cls, towers[tower], has_activation_checkpointing=is_on, **OWN.get(cls, {}), **kwargs),
            [],
        )
        for module in method.clip.net.visual.modules():
            module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.stack(list(method.training_loss(cases.batch(2)).values())).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]))
        passes.append(len(calls))
    assert torch.equal(*gradients)
    assert passes[1] > passes[0]


def test_a_block_that_is_recomputed_in_parts_cannot_be_guided(towers: dict[str, Path]) -> None:
    method = cases.make(PMGAFT, towers["efficientnet"], has_activation_checkpointing=True, layer=-1)
    with pytest.raises(ValueError, match=r"layer -1 .*has_activation_checkpointing"):
        method.training_loss(cases.batch(2))


def test_a_tower_that_cannot_recompute_is_refused(towers: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="has_activation_checkpointing must be false for a ModifiedResNet"):
        make(TeCoA, towers["resnet-attention-pooling"], has_activation_checkpointing=True)


@each_tower
def test_verdicts_are_fp32_in_any_precision(tower: str, towers: dict[str, Path]) -> None:
    method = make(TeCoA, towers[tower])
    (metrics, logits), (of_mixed, mixed) = evaluate(method), evaluate(method, precision="bf16-mixed")
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, logits)
    assert {key: value for key, value in of_mixed.items() if "seconds" not in key} == {
        key: value for key, value in metrics.items() if "seconds" not in key
    }


def test_a_sigmoid_models_classes_are_those_of_open_clip(towers: dict[str, Path]) -> None:
    """SigLIP adds a bias to all logits, which moves neither their order nor their softmax."""
    name = f"local-dir:{towers['siglip']}"
    clip, net = CLIPModel(pretrained=str(towers["siglip"])).eval(), open_clip.create_model(name)
    tokens = open_clip.get_tokenizer(name, clean="canonicalize")
    prompts = [cases.TASK.templates[0].format(name) for name in cases.TASK.class_names]
    images = torch.rand(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    assert isinstance(net.logit_bias, nn.Parameter)
    with torch.no_grad():
        seen = (images - torch.tensor(0.5)) / torch.tensor(0.25)
        image, text, scale, bias = net.eval()(seen, tokens(prompts))
        theirs = scale * image @ text.T + bias
        ours = clip.logit_scale * clip.encode_image(images) @ clip.encode_classes(cases.TASK).T
    assert bias < -5
    torch.testing.assert_close(ours + bias, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.softmax(1), theirs.softmax(1))
    assert torch.equal(ours.argmax(1), theirs.argmax(1))


@pytest.mark.slow
def test_the_command_line_puts_them_together(
    towers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model", "PMGAFT", "--model.pretrained", str(towers["siglip"]), "--model.warmup_steps", "0"]
    words += ["--model.attack", "Square", "--model.attack.queries", "3", "--model.has_activation_checkpointing", "true"]
    words += ["--trainer.precision", "bf16-mixed", "--trainer.accumulate_grad_batches", "2", "--trainer.max_steps", "1"]
    words += ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.enable_model_summary", "false", "--trainer.limit_val_batches", "0", "--data.batch_size", "2"]
    words += ["--data.test", "[shapes:colours]", "--evaluation.max_samples", "4"]
    words += ["--evaluation.attacks", "{l2: {class_path: PGD, init_args: {norm: l2}}}"]
    main(["fit", *words, "--checkpoint.dirpath", "weights"])
    finished = main(["test", *words, "--ckpt_path", "weights/last.ckpt"])
    assert finished.trainer.callback_metrics["test/colours/n"] == 4
