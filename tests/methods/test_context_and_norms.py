"""What learns without labels: which parameters, how the towers run, and where the heads come from."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import method_cases as cases
import open_clip
import pytest
import torch
from torch import Tensor

from robustclip.methods import UEO
from robustclip.models.layers import norm_parameters

NAMES = cases.TASK.class_names


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """open_clip takes longer to build a tokenizer than most of these tests take."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(open_clip.factory, "SimpleTokenizer", functools.cache(open_clip.SimpleTokenizer))
        yield


def ueo(model: Path, **kwargs: Any) -> Any:
    return cases.make(UEO, model, **kwargs)


def learning(method: UEO) -> dict[str, Tensor]:
    method.freeze_untrained()
    return {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("arch", "layers", "numbers", "everywhere"),
    [
        ("ViT-B-16-quickgelu", 26, 39_936, 39_936),
        ("RN50-quickgelu", 51, 45_568, 45_568 + 2 * 3_840),  # with the norms of the shortcuts
    ],
)
def test_the_papers_towers_have_the_papers_number_of_parameters(
    arch: str, layers: int, numbers: int, everywhere: int
) -> None:
    method = UEO(arch=arch, pretrained=None)
    context, norms = method.optimizer(method.parameter_groups()).param_groups
    assert sum(each.numel() for each in context["params"]) == 4 * 512 == 2_048
    assert sum(each.numel() for each in norms["params"]) == numbers
    assert len(norms["params"]) == 2 * layers
    assert sum(each.numel() for each in learning(method).values()) == 2_048 + numbers
    assert sum(each.numel() for each in norm_parameters(method.clip.net.visual, "all")) == everywhere


@pytest.mark.parametrize(("learns", "expected"), [("context", {"context.vectors"}), ("norms", {"clip.net.visual"})])
def test_either_part_learns_alone(learns: Any, expected: set[str], tiny_model: Path) -> None:
    names = learning(UEO(pretrained=str(tiny_model), learns=learns))
    assert {name if "context" in name else name[:15] for name in names} == expected
    assert all("ln" in name for name in names if "visual" in name)


def test_towers_stay_in_eval_mode(tiny_model: Path) -> None:
    method = UEO(pretrained=str(tiny_model), has_fixed_batch_norm=False).train()
    assert (method.training, method.clip.training) == (True, False)
    assert not any(module.training for module in method.clip.modules())


def test_heads_come_from_the_learnt_context_for_any_task(tiny_model: Path) -> None:
    method = ueo(tiny_model)
    task = cases.Task("other", ("traffic_light", "dog"), ("a drawing of {}", "a {}"))
    plain = method.clip.encode_text(["a photo of a traffic light.", "a photo of a dog."])
    assert torch.equal(method.class_features(task), plain)
    with torch.no_grad():
        method.context.vectors += 0.1 * torch.randn_like(method.context.vectors)
    method.prepare([task])
    assert torch.equal(method.heads["other"], method.class_features(task).detach())
    assert (method.heads["other"] - plain).abs().max() > 1e-3


def test_the_text_tower_reads_every_class_once_per_step(tiny_model: Path) -> None:
    method, shapes = ueo(tiny_model), []
    method.clip.net.transformer.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    torch.stack(list(method.training_loss(cases.batch()).values())).sum().backward()
    tokens = method.clip.tokenizer([f"a photo of a {name}." for name in NAMES])
    assert shapes == [(3, int(tokens.argmax(1).max()) + 1, 16)]


def test_logits_keep_full_precision_under_autocast(tiny_model: Path) -> None:
    method, data = ueo(tiny_model), cases.batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, features = method.log_probabilities(data.images), method.image_features(data.images)
        classes = method.class_features(cases.TASK)
    expected = (method.clip.logit_scale * features.double() @ classes.double().T).log_softmax(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learns": "all"}, "learns must be one of both, context, norms, got 'all'"),
        ({"norm_filter": "some"}, "norm_filter must be one of official, all, got 'some'"),
    ],
)
def test_settings_without_trainable_parameters_are_refused(
    options: dict[str, Any], words: str, tiny_model: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        UEO(pretrained=str(tiny_model), **options)


def test_a_tower_whose_norms_have_other_names_needs_all_of_them() -> None:
    tower = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GroupNorm(1, 2))
    with pytest.raises(ValueError, match="'official' finds no norm in a Sequential; take 'all'"):
        norm_parameters(tower, "official")
    assert norm_parameters(tower, "all") == list(tower[1].parameters())
