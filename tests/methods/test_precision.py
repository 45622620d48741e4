"""Logits are products in fp32 of the features, also where the towers run in half precision."""

from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import text_cases
import torch
from helpers import quick_trainer
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from robustclip import methods
from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule
from robustclip.methods import RobustMethod
from robustclip.models.heads import head_logits

TAKES_LOGITS = (F.cross_entropy, F.log_softmax, F.softmax, Tensor.log_softmax, Tensor.softmax, torch.softmax)
OPTIONS: dict[type[RobustMethod], dict[str, Any]] = {
    methods.ARF: {"caption_weight": 0.0, "anchor_weight": 0.0},
    methods.APT: {"tokens": 4},
    methods.FAP: {"depth": 1},
    methods.CoOp: {"tokens": 4},
    methods.DiVE: {"average_weight": 0.0, "pair_weight": 0.0},
    methods.DANCE: {"temperature": 0.001},
    methods.FineTuning: {"lwf": 1.0},
    methods.TipAdapter: {"beta": 1.0},
    methods.UEO: {"weights": "uniform"},
}
EXPORTED = [getattr(methods, name) for name in methods.__all__ if name != "RobustMethod"]
LEARNING = [(cls, OPTIONS.get(cls, {})) for cls in EXPORTED if cls is not methods.ZeroShot]
LEARNING += [(methods.AdversarialTraining, {"head": "cosine"}), (text_cases.TrainedContext, {"attack": PGD()})]
NO_LOGITS = {methods.FARE}


class Watch(TorchFunctionMode):
    """Keeps the logits of every loss and softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TAKES_LOGITS:
            self.logits.append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))


def is_coarse(values: Tensor, half: torch.dtype) -> bool:
    return torch.equal(values, values.to(half).to(values.dtype))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", EXPORTED, ids=lambda cls: cls.__name__)
def test_logits_are_fp32_products_of_the_features(cls: type[RobustMethod], half: torch.dtype, tiny_model: Path) -> None:
    method, images = cases.make(cls, tiny_model, **OPTIONS.get(cls, {})), cases.batch().images
    method.eval()
    with torch.no_grad(), torch.autocast("cpu", half):
        found, features, head = method.logits(images), method.image_features(images), method.head()
    assert found.dtype == torch.float32
    expected = method.clip.logit_scale * (features.double() @ head.double().T)
    if cls is methods.TipAdapter:
        weights = (features.double() @ method.keys.double().T - 1).exp()
        expected = expected + weights @ F.one_hot(method.key_labels, 3).double()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    assert not is_coarse(found, half)


@pytest.mark.parametrize(("cls", "options"), LEARNING, ids=lambda value: getattr(value, "__name__", ""))
def test_losses_take_logits_in_fp32(cls: type[RobustMethod], options: dict[str, Any], tiny_model: Path) -> None:
    """The logits of attack and loss are fp32, and finer than bf16, in a step under mixed precision."""
    method, data = cases.make(cls, tiny_model, **options), cases.batch()
    step = (
        method.embedded(data) if isinstance(method, methods.CRoFT | methods.CLIPAdapter | methods.TipAdapter) else data
    )
    is_fp32_behind_the_tower = step is not data
    with torch.autocast("cpu", torch.bfloat16, enabled=not is_fp32_behind_the_tower), Watch() as watch:
        method.training_loss(step)
    assert bool(watch.logits) != (cls in NO_LOGITS)
    assert all(logits.dtype in (torch.float32, torch.float64) for logits in watch.logits)
    assert not [logits for logits in watch.logits if is_coarse(logits, torch.bfloat16)]


def test_grouped_labels_are_compared_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    features, head = (F.normalize(torch.randn(shape, generator=generator), dim=-1) for shape in ((4, 16), (3, 2, 16)))
    with torch.autocast("cpu", torch.bfloat16):
        found = head_logits(features.bfloat16(), head, torch.tensor(100.0))
    expected = 100 * torch.einsum("bd,cgd->bcg", features.bfloat16().double(), head.double()).amax(-1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_fp64_stays_fp64() -> None:
    one = torch.ones(1, 2, dtype=torch.float64)
    assert head_logits(one, one, torch.tensor(1.0, dtype=torch.float64)).dtype == torch.float64


def test_a_fit_under_mixed_precision_stays_close_to_fp32(tiny_model: Path) -> None:
    moved = []
    for precision in ("32", "bf16-mixed"):
        torch.manual_seed(0)
        sgd = text_cases.sgd
        method = methods.TeCoA(pretrained=str(tiny_model), attack=PGD(), warmup_steps=0, optimizer=sgd)
        start = method.clip.net.visual.proj.detach().clone()
        trainer = quick_trainer(max_steps=1, limit_val_batches=0, precision=precision)
        trainer.fit(method, datamodule=CLIPDataModule("shapes:source", batch_size=16, image_size=32))
        moved.append(method.clip.net.visual.proj.detach() - start)
    assert moved[0].norm() > 0
    assert (moved[0] - moved[1]).norm() < 0.1 * moved[0].norm()
