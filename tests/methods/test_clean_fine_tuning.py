"""Clean fine-tuning against its definition."""

from pathlib import Path
from typing import Any

import method_cases as cases
import torch
from torch import Tensor

from robustclip.methods import CleanFineTuning


def test_the_loss_is_cross_entropy_over_prompts_on_clean_images(tiny_model: Path) -> None:
    method, data = cases.make(CleanFineTuning, tiny_model), cases.batch()

    def expected(twin: Any, clean: Tensor, _: Tensor) -> Tensor:
        return cases.cross_entropy(cases.logits(twin, clean), data.labels).mean()

    cases.assert_the_loss_is(method, data, expected)


def test_the_image_tower_runs_once_per_step(tiny_model: Path) -> None:
    method, calls = cases.make(CleanFineTuning, tiny_model), []
    method.clip.net.visual.register_forward_hook(lambda *_: calls.append(1))
    method.training_loss(cases.batch())
    assert calls == [1]


def test_the_recipe_is_tecoas(tiny_model: Path) -> None:
    method = CleanFineTuning(pretrained=str(tiny_model))
    optimizer = method.optimizer(method.parameter_groups())
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (1e-5, 0.9, 0)
    assert method.warmup_steps == 1000
