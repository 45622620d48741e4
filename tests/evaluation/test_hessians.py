"""The difference of two domains' Hessians against a dense Hessian, and what CRoFT's penalty does to it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import ShardWriter
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F

from robustclip.data import CLIPDataModule
from robustclip.evaluation import HessianDifference
from robustclip.evaluation.hessians import spectral_norm
from robustclip.methods import CRoFT

QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def dense(function: Any, point: Tensor) -> Tensor:
    """Largest absolute eigenvalue of the whole Hessian."""
    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(function, point)).abs().max()


def test_the_power_method_finds_the_largest_eigenvalue_of_either_sign() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(4, 3, dtype=torch.float64)
    for sign in (1, -1):

        def function(flat: Tensor, sign: int = sign) -> Tensor:
            a, b = flat[:12].view(4, 3), flat[12:]
            return sign * ((a * matrix).sin().sum() ** 2 + (a @ b).exp().sum())

        point = torch.randn(15, dtype=torch.float64)
        parameters = [part.clone().requires_grad_() for part in (point[:12].view(4, 3), point[12:], torch.ones(2))]
        value = function(torch.cat([part.flatten() for part in parameters[:2]]))
        found = spectral_norm(value, parameters, iterations=200)
        torch.testing.assert_close(found, dense(function, point), rtol=1e-6, atol=0)


def test_a_test_logs_the_difference_of_its_domains(tiny_model: Path, write_shards: ShardWriter, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        write_shards(tmp_path, name, "test", [9], seed=seed)
    torch.manual_seed(0)
    method = CRoFT(pretrained=str(tiny_model), ratio=0.7)
    data = CLIPDataModule(test=["wds:one", "wds:two"], root=str(tmp_path), batch_size=5, image_size=32)
    trainer = Trainer(callbacks=[HessianDifference(max_samples=7, iterations=100)], **QUIET)
    trainer.test(method, datamodule=data, verbose=False)
    found = trainer.callback_metrics["test/one_two/hessian/difference"]

    twin = method.double()
    with torch.no_grad():
        texts, scale = twin.clip.encode_classes(data.test_tasks[0]), twin.clip.logit_scale
        parts = [
            [torch.cat(part)[:7] for part in list(zip(*loader, strict=True))[:2]] for loader in data.test_dataloader()
        ]
        domains = [(F.normalize(twin.clip.embed_image(images.double()), dim=-1), labels) for images, labels in parts]

    def difference(flat: Tensor) -> Tensor:
        a, b = flat.view(2, 16, 16)
        v = F.normalize(0.5 * texts @ b.T + 0.5 * texts, dim=-1)
        one, two = (F.cross_entropy(scale * F.normalize(0.7 * x @ a.T + 0.3 * x, dim=-1) @ v.T, y) for x, y in domains)
        return one - two

    expected = dense(difference, torch.eye(16, dtype=torch.float64).repeat(2, 1).flatten())
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=0)  # of 100 products in fp32


def test_tasks_of_other_classes_have_nothing_to_compare(tiny_model: Path) -> None:
    data = CLIPDataModule(test=["shapes:colours", "shapes:counts"], batch_size=5, image_size=32)
    with pytest.raises(ValueError, match="HessianDifference needs two tasks of the same classes"):
        Trainer(callbacks=[HessianDifference()], **QUIET).test(CRoFT(pretrained=str(tiny_model)), datamodule=data)


@pytest.mark.parametrize("name", ["max_samples", "iterations"])
def test_what_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*at least 1, got 0"):
        HessianDifference(**{name: 0})
