"""What holds for every method that learns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch

from robustclip import methods
from robustclip.attacks import PGD
from robustclip.methods import RobustMethod, ZeroShot
from robustclip.types import Task

EXPORTED = [getattr(methods, name) for name in methods.__all__]
FROZEN: dict[type[RobustMethod], dict[str, Any]] = {  # with towers that are, and options for a tiny problem
    methods.APT: {"tokens": 4, "attack": PGD(steps=1)},
    methods.CLIPAdapter: {},
    methods.FAP: {"depth": 1, "attack": PGD(steps=1)},
    methods.CRoFT: {},
    methods.CoOp: {"tokens": 4},
    methods.TipAdapter: {"beta": 1.0},
}
PROMPTED = {"prompt": "padding", "prompt_size": 4, "prompt_tokens": 3, "prompt_lr": 0.1}
APART = (
    RobustMethod,
    ZeroShot,
    methods.AGFT,
    methods.ARF,
    methods.DANCE,
    methods.DiVE,
    methods.POUF,
    methods.UEO,
    *FROZEN,
)  # or with options
CASES: list[tuple[type[RobustMethod], dict[str, Any]]] = [
    *((cls, {}) for cls in EXPORTED if cls not in APART),
    *((cls, {"warmup_epochs": 0, **options}) for cls, options in FROZEN.items()),
    (methods.AGFT, {"gamma": 10.0}),  # sharp targets: cross-entropy cannot fall below their entropy
    (methods.ARF, {"caption_weight": 0.0, "anchor_weight": 0.0}),  # the data here have neither; see test_arf.py
    (methods.DiVE, {"average_weight": 0.0, "pair_weight": 0.0}),
    (methods.UEO, {"weights": "uniform"}),  # without a pass over all data before each fit; see test_ueo_training.py
    (methods.POUF, {"context_lr": 0.01}),  # small steps hardly bring random towers together
    (methods.DANCE, {"temperature": 0.001}),  # images of noise are close to each other
    (methods.AdversarialTraining, {"head": "cosine"}),
    (methods.TeCoA, PROMPTED),
    (methods.TeCoA, {"prompts_only": False, **PROMPTED}),
    (methods.PMGAFT, PROMPTED),
    (methods.TeCoA, {"pseudo_labels": True}),
]
BOLD = {"warmup_steps": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}

each_method = pytest.mark.parametrize(
    ("cls", "kwargs"), CASES, ids=["-".join([cls.__name__, *map(str, kwargs.values())]) for cls, kwargs in CASES]
)


@each_method
def test_only_declared_parameters_change(cls: type[RobustMethod], kwargs: dict[str, Any], tiny_model: Path) -> None:
    method = cls(pretrained=str(tiny_model), **kwargs, **BOLD)
    tensors = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    cases.fit(method, steps=2, shots=1)
    declared = {id(parameter) for group in method.parameter_groups() for parameter in group["params"]}
    assert declared
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]) != (id(tensor) in declared), name


@each_method
def test_the_loss_falls_on_a_fixed_batch(cls: type[RobustMethod], kwargs: dict[str, Any], tiny_model: Path) -> None:
    method, data = cases.make(cls, tiny_model, **kwargs), cases.batch()
    # Behind frozen towers there is less to learn with.
    optimizer = torch.optim.AdamW(method.parameter_groups(), lr=0.03 if cls in FROZEN else 1e-3)
    losses = []
    for _ in range(10):
        loss = torch.stack(list(method.training_loss(data).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@each_method
def test_a_checkpoint_holds_and_restores_the_trained_parameters(
    cls: type[RobustMethod], kwargs: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    first = cls(pretrained=str(tiny_model), **kwargs, **BOLD)
    trainer = cases.fit(first, steps=1, shots=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    task = trainer.datamodule.train_task  # type: ignore[attr-defined]
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    learned = {name for name, parameter in first.named_parameters() if parameter.requires_grad}
    assert saved.keys() - dict(first.named_buffers()).keys() == learned
    assert not [name for name in saved if "teacher" in name]
    again = cls(pretrained=str(tiny_model), **kwargs)
    assert cases.test(again, tmp_path / "a.ckpt")["test/colours/n"] == 4
    untrained = cls(pretrained=str(tiny_model), **kwargs)
    found, expected, other = (answers(each, task) for each in (again, first, untrained))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found, other)


def answers(method: RobustMethod, task: Task) -> torch.Tensor:
    method.prepare([replace(task, name="head")])
    with torch.no_grad():
        return method.logits(cases.batch().images, "head")
