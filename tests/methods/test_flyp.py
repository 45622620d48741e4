"""FLYP's step against its definition (specification sections 4.1, 4.5, 5, 6)."""

import math
from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from helpers import quick_trainer
from torch import Tensor

from robustclip.data import CLIPDataModule
from robustclip.methods import FLYP, FLYPCE, ZeroShot
from robustclip.objectives.losses import info_nce
from robustclip.tools.interpolate import interpolate
from robustclip.types import Batch, Task

BOLD = {"warmup_steps": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}


def symmetric(z: Tensor, t: Tensor, scale: Tensor) -> Tensor:
    """Mean of ``-log softmax(S)_ii`` over rows and over columns."""
    s = scale * z @ t.T
    return (s.logsumexp(0) + s.logsumexp(1) - 2 * s.diagonal()).mean() / 2


def read(method: FLYP, texts: list[str]) -> Tensor:
    """Unit features by the raw open_clip tower on the whole context."""
    return cases.unit(method.clip.net.encode_text(method.clip.tokenizer(texts)))


def gradients(method: FLYP, data: Batch) -> tuple[Tensor, list[Tensor]]:
    loss = torch.stack(list(method.training_loss(data).values())).sum()
    learning = [parameter for parameter in method.parameters() if parameter.requires_grad]
    return loss, list(torch.autograd.grad(loss, learning))


def test_the_gradient_in_the_logits_is_that_of_two_softmaxes() -> None:
    """``dL/dS = (softmax_rows + softmax_columns - 2 I) / 2B`` of ``S = s Z T^T``; the chain rule does the rest."""
    generator = torch.Generator().manual_seed(0)
    z, t = (cases.unit(torch.randn(5, 8, generator=generator, dtype=torch.float64)) for _ in range(2))
    log_scale = torch.tensor(3.0, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (z, t, log_scale)]
    found = torch.autograd.grad(info_nce(z, t, log_scale.exp()), leaves)
    with torch.no_grad():
        scale, cosines = log_scale.exp(), z @ t.T
        s = scale * cosines
        in_logits = (s.softmax(1) + s.softmax(0) - 2 * torch.eye(5)) / 10
        expected = (scale * in_logits @ t, scale * in_logits.T @ z, scale * (in_logits * cosines).sum())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_logits_keep_full_precision_under_autocast() -> None:
    z, t = (cases.unit(torch.randn(4, 8, generator=torch.Generator().manual_seed(n))) for n in (0, 1))
    scale = torch.tensor(100.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(z, t, scale)
    torch.testing.assert_close(found.double(), symmetric(z.double(), t.double(), scale.double()), rtol=1e-5, atol=1e-5)


def test_the_loss_is_symmetric_info_nce_of_images_and_class_prompts(tiny_model: Path) -> None:
    method, data = cases.make(FLYP, tiny_model), cases.batch(5)

    def expected(twin: Any, images: Tensor, _: Tensor) -> Tensor:
        prompts = [cases.TASK.prompts[label][0] for label in data.labels]
        return symmetric(cases.unit(cases.embed(twin, images)), read(twin, prompts), twin.clip.net.logit_scale.exp())

    cases.assert_the_loss_is(method, data, expected)


def test_its_ablation_is_cross_entropy_over_the_prompts_of_all_classes(tiny_model: Path) -> None:
    method, data = cases.make(FLYPCE, tiny_model), cases.batch(5)

    def expected(twin: Any, images: Tensor, _: Tensor) -> Tensor:
        head = read(twin, [prompts[0] for prompts in cases.TASK.prompts])
        z = twin.clip.net.logit_scale.exp() * cases.unit(cases.embed(twin, images)) @ head.T
        return cases.cross_entropy(z, data.labels).mean()

    cases.assert_the_loss_is(method, data, expected)


def test_each_class_of_the_ablation_draws_its_template_alone(tiny_model: Path) -> None:
    class Reader(FLYPCE):
        def encode_tokens(self, *tokens: Tensor) -> Tensor:
            self.texts = tokens[0]
            return super().encode_tokens(*tokens)

    method = cases.make(Reader, tiny_model)
    method.prepare_training(Task("train", tuple(f"thing {n}" for n in range(40)), ("a {}", "one {}", "my {}")))
    method.training_loss(cases.batch())
    drawn = [(method.prompts[n] == method.texts[n]).all(1).tolist() for n in range(40)]
    assert all(sum(each) == 1 for each in drawn)
    assert {each.index(True) for each in drawn} == {0, 1, 2}


def test_each_sample_draws_its_template_alone(tiny_model: Path) -> None:
    method = cases.make(FLYP, tiny_model)
    task = Task("train", ("cat", "dog"), tuple(f"{word} {{}}" for word in ("a", "one", "two", "my")))
    method.prepare_training(task)
    data = Batch(torch.empty(400, 0), torch.arange(400) % 2, torch.arange(400))
    whole = method.class_prompts(data)
    assert torch.equal(method.class_prompts(Batch(*(part[7:9] for part in data[:3]))), whole[7:9])
    for label in (0, 1):
        prompts, counts = whole[data.labels == label].unique(dim=0, return_counts=True)
        assert {tuple(row) for row in prompts.tolist()} == {tuple(row) for row in method.prompts[label].tolist()}
        assert counts.min() > 25  # 200 draws from four: 50 each, with a deviation of 6


def test_templates_change_from_step_to_step(tiny_model: Path) -> None:
    class Recorded(FLYP):
        drawn: list[Tensor] = []

        def class_prompts(self, batch: Batch) -> Tensor:
            self.drawn.append(super().class_prompts(batch._replace(labels=0 * batch.labels, index=0 * batch.index)))
            return super().class_prompts(batch)

    method = Recorded(pretrained=str(tiny_model), **BOLD)
    cases.fit(method, steps=8)  # three templates
    assert len({tuple(tokens[0].tolist()) for tokens in method.drawn}) > 1


def test_a_cached_step_is_the_step_of_the_whole_batch(tiny_model: Path) -> None:
    data = cases.batch(7)
    data = data._replace(images=data.images.double())
    loss, whole = gradients(cases.in_fp64(cases.make(FLYP, tiny_model)), data)
    for size in (3, 100):
        cached_loss, cached = gradients(cases.in_fp64(cases.make(FLYP, tiny_model, micro_batch=size)), data)
        torch.testing.assert_close(cached_loss, loss, rtol=1e-12, atol=1e-12)
        for one, other in zip(cached, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_cached_step_keeps_inputs_and_not_activations(tiny_model: Path) -> None:
    kept = []
    for size in (None, 4):
        method, data, numbers = cases.make(FLYP, tiny_model, micro_batch=size), cases.batch(16), [0]

        def count(tensor: Tensor, numbers: list[int] = numbers) -> Tensor:
            numbers[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            method.training_loss(data)
        kept.append(numbers[0])
    assert kept[1] < 0.2 * kept[0]


def test_norms_biases_and_the_scale_do_not_decay_unless_asked(tiny_model: Path) -> None:
    method = cases.make(FLYP, tiny_model)
    decaying, rest = method.parameter_groups()
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    exempt = {names[id(parameter)] for parameter in rest["params"]}
    assert rest["weight_decay"] == 0
    assert "clip.net.logit_scale" in exempt
    assert all(name.endswith(("bias", "weight", "class_embedding", "logit_scale")) for name in exempt)
    assert all(parameter.ndim > 1 for parameter in decaying["params"])
    assert len(exempt) + len(decaying["params"]) == len(names)
    (every,) = cases.make(FLYP, tiny_model, decay_all=True).parameter_groups()
    assert len(every["params"]) == len(names)


@pytest.mark.parametrize("clamp", [True, False])
def test_the_scale_stays_below_100_unless_asked(tiny_model: Path, clamp: bool) -> None:
    slow = {"warmup_steps": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=1e-9)}
    method = FLYP(pretrained=str(tiny_model), clamp=clamp, **slow)
    method.clip.net.logit_scale.data.fill_(5.0)
    cases.fit(method, steps=1)
    assert method.clip.net.logit_scale.item() == pytest.approx(math.log(100) if clamp else 5.0)


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FLYP, Path]:
    path = tmp_path_factory.mktemp("flyp") / "last.ckpt"
    method = FLYP(pretrained=str(tiny_model), **BOLD)
    cases.fit(method, steps=2).save_checkpoint(path)
    return method, path


def colour_logits(method: Any, checkpoint: Path | None) -> Tensor:
    """As a test run computes them, with the heads that it builds."""
    trainer = quick_trainer(limit_test_batches=1)
    data = CLIPDataModule(test=["shapes:colours"], batch_size=4, image_size=32)
    options = {} if checkpoint is None else {"ckpt_path": str(checkpoint), "weights_only": True}
    trainer.test(method, datamodule=data, verbose=False, **options)
    with torch.no_grad():
        return method.logits(cases.batch().images, "colours")


def test_heads_come_from_the_fine_tuned_text_tower(tuned: tuple[FLYP, Path], tiny_model: Path) -> None:
    method, path = tuned
    again = FLYP(pretrained=str(tiny_model))
    colour_logits(again, path)
    (task,) = again.trainer.datamodule.test_tasks
    with torch.no_grad():
        features = [read(method, prompts).mean(0) for prompts in task.prompts]
        before = [read(FLYP(pretrained=str(tiny_model)), prompts).mean(0) for prompts in task.prompts]
    torch.testing.assert_close(again.heads["colours"], cases.unit(torch.stack(features)), rtol=0, atol=1e-5)
    assert (again.heads["colours"] - cases.unit(torch.stack(before))).abs().max() > 1e-3


def test_the_ends_of_wise_ft_are_the_two_models(tuned: tuple[FLYP, Path], tiny_model: Path, tmp_path: Path) -> None:
    _, path = tuned
    zero, one = interpolate(FLYP(pretrained=str(tiny_model)), path, tmp_path / "out", alphas=(0.0, 1.0))
    original = colour_logits(ZeroShot(pretrained=str(tiny_model)), None)
    fine_tuned = colour_logits(FLYP(pretrained=str(tiny_model)), path)
    assert torch.equal(colour_logits(FLYP(pretrained=str(tiny_model)), zero), original)
    assert torch.equal(colour_logits(FLYP(pretrained=str(tiny_model)), one), fine_tuned)
    assert (original - fine_tuned).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"micro_batch": 0}, "micro_batch must be an integer at least 1 or null, got 0"),
        ({"micro_batch": 4, "has_fixed_batch_norm": False}, "must be null where has_fixed_batch_norm is false"),
    ],
)
def test_micro_batches_that_could_not_be_exact_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FLYP(pretrained="shapes", **options)
