"""The Python face of the package: names at their first use, any model evaluated, fine-tuned models loaded."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import quick_trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

import robustclip
from robustclip.attacks import PGD, Square
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule, DataSource
from robustclip.evaluation.any_model import AnyModel
from robustclip.methods import TeCoA, ZeroShot


class Colours(nn.Module):
    """Answers by the mean colour of the image, with three times as many classes as colours."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(12, 3, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return 20 * images.mean((2, 3)) @ self.weight.T


def test_names_are_imported_at_their_first_use() -> None:
    code = "import robustclip, sys; print('torch' in sys.modules); robustclip.PGD; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "True"]


def test_every_public_name_exists() -> None:
    for name in robustclip.__all__:
        assert getattr(robustclip, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        robustclip.nothing  # noqa: B018


def test_a_module_gets_the_accuracy_of_its_own_answers(tmp_path: Path) -> None:
    model, data = Colours().train(), CLIPDataModule(test="shapes:colours", image_size=32, batch_size=7)
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    tested = robustclip.evaluate(model, data, {"pgd": PGD("4/255", steps=3)}, max_samples=20, folder=tmp_path)
    assert not any(modes), "it ran in eval mode"
    assert (model.training, model.weight.requires_grad) == (True, True), "it is left as it was"
    axes = tested.result["protocol"]["colours"]["pgd"]["axes"]
    assert axes["model_preprocessing"]["image_size"] == 32, "the data module states the size of the images"
    data.connect(limit=20)
    batches = list(data.test_dataloader()[0])
    with torch.no_grad():
        correct = sum(int((model(batch.images).argmax(1) == batch.labels).sum()) for batch in batches)
    result = tested.result
    assert result["tasks"]["colours"]["clean"]["correct"] == correct
    assert result["tasks"]["colours"]["n"] == 20
    assert result["mean"]["pgd"]["acc1"] <= result["mean"]["clean"]["acc1"]
    assert result["audit"]["grade"] in "ABCF"
    assert run(["score", str(tested.folder)]) == 0, "the result follows from the ledger, as for every test"


def test_a_function_needs_a_name_and_takes_a_black_box_attack(tmp_path: Path) -> None:
    colours = Colours()

    def answer(images: Tensor) -> Tensor:
        with torch.no_grad():
            return colours(images)

    attacks = {"square": Square("8/255", queries=20)}
    options = {"image_size": 32, "max_samples": 12, "folder": tmp_path}
    with pytest.raises(ValueError, match="name must be given for a model without parameters"):
        robustclip.evaluate(answer, "shapes:colours", attacks, **options)
    tested = robustclip.evaluate(answer, "shapes:colours", attacks, name="by_colour", **options)
    assert tested.folder == tmp_path / "by_colour"
    rows = tested.rows("colours")
    assert all(row["square.steps"] == "0" for row in rows), "no gradient was taken"
    assert {row["square.by"] for row in rows} <= {"", "clean", "square"}


def test_another_number_of_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must return logits of shape \(4, 12\) on 'colours', got \(4, 5\)"):
        robustclip.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)), "shapes:colours", image_size=32,
                            max_samples=4, folder=tmp_path)  # fmt: skip


def tinted(images: Tensor) -> Tensor:
    """Logits of twelve classes by the first and second colour."""
    return 20 * images.mean((2, 3))[:, :2].repeat(1, 6)


@pytest.mark.parametrize(
    "model",
    [
        lambda x: SimpleNamespace(logits=tinted(x)),  # answers of Hugging Face's models
        lambda x: tinted(x).numpy(),
        lambda x: tinted(x).half(),
        lambda x: tinted(x.double()),
        lambda x: 2 * tinted(x.mul_(0.5)),
    ],
    ids=["attribute", "numpy", "half", "double", "in place"],
)
def test_logits_of_other_types_have_their_values(model: Any) -> None:
    method, images = AnyModel(model, 32, "mine"), torch.rand(3, 3, 32, 32)
    method.class_counts["colours"] = 12
    before = images.clone()
    logits = method.logits(images, "colours")
    assert logits.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(logits, tinted(images), atol=1e-2, rtol=0, check_dtype=False)
    assert torch.equal(images, before), "a model may change its images, and not those of the test"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: (tinted(x), x), "must return a tensor of logits, got tuple; wrap it in a function"),
        (lambda x: tinted(x).tolist(), "must return a tensor of logits, got list; wrap it in a function"),
        (lambda x: tinted(x).to_sparse(), "must return a dense tensor of real numbers as logits, got .*sparse"),
        (lambda x: tinted(x).to(torch.complex64), "a dense tensor of real numbers as logits, got torch.complex64"),
        (lambda x: tinted(x).numpy().astype(object), "a dense tensor of real numbers as logits, got object"),
        (lambda x: tinted(x).argmax(1), r"must return logits of shape \(3, 12\) on 'colours', got \(3,\)"),
    ],
    ids=["tuple", "list", "sparse", "complex", "objects", "classes"],
)
def test_an_answer_without_logits_is_refused(model: Any, message: str) -> None:
    method = AnyModel(model, 32, "mine")
    method.class_counts["colours"] = 12
    with pytest.raises(ValueError, match=message):
        method.logits(torch.rand(3, 3, 32, 32), "colours")


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_answers_in_reused_memory_stay_as_they_were(kind: str) -> None:
    buffer = torch.zeros(3, 12)

    def answer(images: Tensor) -> Any:
        buffer[:] = tinted(images)
        return buffer.numpy() if kind == "numpy" else buffer

    method, images = AnyModel(answer, 32, "mine"), torch.rand(2, 3, 3, 32, 32)
    method.class_counts["colours"] = 12
    first, second = (method.logits(batch, "colours") for batch in images)
    torch.testing.assert_close(first, tinted(images[0]))
    torch.testing.assert_close(second, tinted(images[1]))


def test_images_of_several_sizes_are_probed_one_size_at_a_time(tmp_path: Path) -> None:
    class Sizes(Dataset[Any]):
        classes = tuple("abcdefghijkl")

        def __len__(self) -> int:
            return 6

        def __getitem__(self, number: int) -> Any:
            return torch.full((3, 8 + number // 2, 8), number / 6), number

    source = DataSource(Sizes(), name="sizes", native_size=True)
    data = CLIPDataModule(test=source, image_size=8, batch_size=1)
    tested = robustclip.evaluate(Colours(), data, {"pgd": PGD("4/255", steps=1)}, folder=tmp_path)
    rows = tested.rows("sizes")
    assert [int(row["id"]) for row in rows] == list(range(6))
    assert all(row["repeat"] for row in rows), "every sample was probed"


def test_a_script_module_gets_the_result_of_its_module(tmp_path: Path) -> None:
    options = {"image_size": 32, "max_samples": 8, "folder": tmp_path}
    results = [
        robustclip.evaluate(model, "shapes:colours", {"pgd": PGD("4/255", steps=1)}, name=name, **options).result
        for name, model in (("plain", Colours()), ("script", torch.jit.script(Colours())))
    ]
    assert results[0]["mean"] == results[1]["mean"]


def test_an_error_of_the_model_names_the_size_of_its_images(tmp_path: Path) -> None:
    method = AnyModel(nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 12)), 32)
    method.class_counts["colours"] = 12
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        method.logits(torch.rand(3, 3, 32, 32), "colours")
    (note,) = caught.value.__notes__
    assert note.startswith("The model received float32 images of shape (3, 3, 32, 32); image_size sets their side")
    with pytest.raises(ValueError, match=r"must be an instance, got the class Colours; write Colours\(\)"):
        robustclip.evaluate(Colours, "shapes:colours", image_size=32, folder=tmp_path)


@pytest.mark.slow
def test_a_model_that_changes_its_images_gets_the_verdicts_of_one_that_does_not(tmp_path: Path) -> None:
    colours, rows = Colours(), []
    for name, model in (
        ("whole", lambda x: colours(x.clamp(0.2, 0.6))),
        ("in_place", lambda x: colours(x.clamp_(0.2, 0.6))),
    ):
        options = {"image_size": 32, "max_samples": 12, "folder": tmp_path, "name": name}
        tested = robustclip.evaluate(model, "shapes:colours", {"pgd": PGD("8/255", steps=3)}, **options)
        rows.append([{key: value for key, value in row.items() if key != "seconds"} for row in tested.rows("colours")])
    assert rows[0] == rows[1]


def test_a_method_is_evaluated_as_itself(tmp_path: Path) -> None:
    tested = robustclip.evaluate(ZeroShot(), "shapes:colours", max_samples=8, folder=tmp_path)
    assert tested.result["protocol"]["colours"]["clean"]["axes"]["attack_space"] == "32 x 32", "the size of the method"
    assert tested.result["method"] == "ZeroShot"
    assert list(tested.result["mean"]) == ["clean", "pgd10"]


def test_a_checkpoint_of_the_command_line_loads_with_its_weights(tmp_path: Path) -> None:
    fit = ["fit", "--config", "demo", "--trainer.max_steps", "2", "--evaluation.fit_max_samples", "2"]
    fit += ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    assert run([*fit, "--checkpoint.dirpath", str(tmp_path), "--trainer.default_root_dir", str(tmp_path)]) == 0
    method = robustclip.load(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert isinstance(method, TeCoA)
    assert not method.training
    assert stored
    assert all(torch.equal(method.state_dict()[name], tensor) for name, tensor in stored.items())


def test_a_checkpoint_of_a_program_is_refused_with_the_remedy(tmp_path: Path) -> None:
    trainer = quick_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(TeCoA(), datamodule=CLIPDataModule(train="shapes:source", image_size=32, batch_size=4))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match="holds no settings"):
        robustclip.load(tmp_path / "own.ckpt")


def test_logits_of_a_task_that_was_not_prepared_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="ZeroShot has no classifier for task 'colours'; call `prepare`"):
        ZeroShot().logits(torch.rand(1, 3, 32, 32), "colours")
