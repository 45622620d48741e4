"""The difference of two domains' Hessians against a dense Hessian, and what CRoFT's penalty does to it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F

from robustclip.callbacks import HessianDifference
from robustclip.callbacks.hessians import spectral_norm
from robustclip.data import CLIPDataModule
from robustclip.methods import CRoFT
from robustclip.methods.energy import adapted, batch_penalty

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


def test_a_validation_logs_the_difference_of_its_domains(tiny_model: Path) -> None:
    method = CRoFT(pretrained=str(tiny_model), ratio=0.7)
    colours = [{"source": "shapes:colours", "name": name} for name in ("first", "second")]
    data = CLIPDataModule(test=[DataSource(**each) for each in colours], batch_size=5, image_size=32)
    trainer = Trainer(callbacks=[HessianDifference(max_samples=7, iterations=60)], **QUIET)
    trainer.test(method, datamodule=data, verbose=False)
