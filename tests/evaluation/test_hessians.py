"""The difference of two domains' Hessians against a dense Hessian, and what CRoFT's penalty does to it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ShardWriter, quick_trainer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustclip.cli.main import run
from robustclip.data import CLIPDataModule
from robustclip.evaluation import HessianDifference
from robustclip.evaluation.hessians import spectral_norm
from robustclip.methods import CoOp, CRoFT, RobustMethod, TeCoA, TipAdapter, ZeroShot
from robustclip.results.run import Run

NAME = "test/one_two/hessian/difference"


@pytest.fixture(scope="module")
def root(write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of nine images of the same three classes."""
    folder = tmp_path_factory.mktemp("domains")
    for seed, name in enumerate(("one", "two")):
        write_shards(folder, name, "test", [9], seed=seed)
    return folder


def domains(root: Path) -> CLIPDataModule:
    return CLIPDataModule(test=["wds:one", "wds:two"], root=str(root), batch_size=5, image_size=32)


def measured(method: RobustMethod, data: CLIPDataModule, **options: Any) -> Tensor:
    trainer = quick_trainer(HessianDifference(**options))
    trainer.test(method, datamodule=data, verbose=False)
    return trainer.callback_metrics[NAME]


def first(data: CLIPDataModule, n: int) -> list[tuple[Tensor, Tensor]]:
    """Images in fp64 and labels of each domain."""
    columns = [list(zip(*loader, strict=True))[:2] for loader in data.test_dataloader()]
    return [(torch.cat(images)[:n].double(), torch.cat(labels)[:n]) for images, labels in columns]


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


def test_a_test_logs_the_difference_of_its_domains(tiny_model: Path, root: Path) -> None:
    torch.manual_seed(0)
    method, data = CRoFT(pretrained=str(tiny_model), ratio=0.7), domains(root)
    found = measured(method, data, max_samples=7, iterations=100)

    twin = method.double()
    with torch.no_grad():
        texts, scale = twin.clip.encode_classes(data.test_tasks[0]), twin.clip.logit_scale
        sides = [(F.normalize(twin.clip.embed_image(images), dim=-1), labels) for images, labels in first(data, 7)]

    def difference(flat: Tensor) -> Tensor:
        a, b = flat.view(2, 16, 16)
        v = F.normalize(0.5 * texts @ b.T + 0.5 * texts, dim=-1)
        one, two = (F.cross_entropy(scale * F.normalize(0.7 * x @ a.T + 0.3 * x, dim=-1) @ v.T, y) for x, y in sides)
        return one - two

    expected = dense(difference, torch.eye(16, dtype=torch.float64).repeat(2, 1).flatten())
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=0)  # of 100 products in fp32


def test_attention_is_differentiated_twice(tiny_model: Path, root: Path) -> None:
    """The context of a text tower, against the whole Hessian, row by row in fp64."""
    torch.manual_seed(0)
    method, data = CoOp(pretrained=str(tiny_model), tokens=2, phrase=None), domains(root)
    found = measured(method, data, max_samples=7, iterations=100)

    twin, context = method.double(), method.context.vectors
    with sdpa_kernel(SDPBackend.MATH):
        texts = twin.class_features(data.test_tasks[0])
        one, two = (
            F.cross_entropy(twin.clip.logit_scale * twin.image_features(images) @ texts.T, labels)
            for images, labels in first(data, 7)
        )
        (gradient,) = torch.autograd.grad(one - two, context, create_graph=True)
        rows = [torch.autograd.grad(entry, context, retain_graph=True)[0].flatten() for entry in gradient.flatten()]
    expected = torch.linalg.eigvalsh(torch.stack(rows)).abs().max()
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("cls", "shared", "recompute"),
    [(TeCoA, {}, {"has_activation_checkpointing": True}), (CoOp, {"tokens": 2}, {"classes_per_pass": 1})],
)
def test_recomputed_activations_change_nothing(
    cls: type[RobustMethod], shared: dict[str, Any], recompute: dict[str, Any], tiny_model: Path, root: Path
) -> None:
    found = []
    for options in (shared, shared | recompute):
        torch.manual_seed(0)
        found.append(measured(cls(pretrained=str(tiny_model), **options), domains(root), iterations=2))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_keys_that_only_the_logits_use_have_a_curvature(tiny_model: Path, root: Path) -> None:
    torch.manual_seed(0)
    method = TipAdapter(pretrained=str(tiny_model), beta=1.0)
    method.add_cache(("red", "green", "blue"), F.normalize(torch.randn(6, 16), dim=-1), torch.arange(6) % 3)
    assert measured(method, domains(root), iterations=2) > 0


def test_a_linear_value_has_no_curvature() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert spectral_norm((2 * weight).sum(), [weight], iterations=2) == 0
    assert spectral_norm(torch.tensor(1.0), [weight], iterations=2) == 0


# Until a result keeps what callbacks log beside its own numbers, it refuses this one's.
def test_the_command_keeps_it_beside_the_result(tiny_model: Path, root: Path, tmp_path: Path) -> None:
    status = run(
        ["test", "--model", "TeCoA", "--model.pretrained", str(tiny_model), "--data.test", "[wds:one, wds:two]",
         "--data.root", str(root), "--data.image_size", "32", "--trainer.accelerator", "cpu",
         "--trainer.callbacks", "{class_path: robustclip.evaluation.HessianDifference, init_args: {iterations: 2}}",
         "--results.folder", str(tmp_path), "--results.name", "run"]
    )  # fmt: skip
    assert status == 0
    result = Run.open(tmp_path / "run").result
    (value,) = [value for name, value in result["other_metrics"].items() if name.endswith("hessian/difference")]
    assert value > 0


def test_tasks_of_other_classes_have_nothing_to_compare(tiny_model: Path) -> None:
    data = CLIPDataModule(test=["shapes:colours", "shapes:counts"], batch_size=5, image_size=32)
    with pytest.raises(ValueError, match="HessianDifference needs two tasks of the same classes"):
        measured(CRoFT(pretrained=str(tiny_model)), data)


@pytest.mark.parametrize("cls", [ZeroShot, TipAdapter])
def test_a_method_without_learning_parameters_is_refused(cls: type[RobustMethod], tiny_model: Path, root: Path) -> None:
    with pytest.raises(ValueError, match=f"learning parameters, but {cls.__name__} has none"):
        measured(cls(pretrained=str(tiny_model)), domains(root))


@pytest.mark.parametrize("name", ["max_samples", "iterations"])
def test_impossible_values_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*at least 1, got 0"):
        HessianDifference(**{name: 0})
