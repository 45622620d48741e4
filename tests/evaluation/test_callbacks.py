"""Evaluation, warnings and progress."""

import warnings
from pathlib import Path

import helpers
import pytest
import torch
from rich.progress import Progress
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from robustclip.attacks import PGD, Attack
from robustclip.data import CLIPDataModule
from robustclip.evaluation import ResultsWriter, RobustEvaluation, TaskProgress
from robustclip.methods import TeCoA, ZeroShot
from robustclip.metrics import Top1
from robustclip.results.run import Run
from robustclip.results.summary import accuracies, scalars
from robustclip.results.tables import markdown_table, readable_rows
from robustclip.training import ChanceLevelWarning, Checkpoints
from robustclip.types import Batch

TESTS = ["shapes:colours", "shapes:counts"]


def data(**kwargs: object) -> CLIPDataModule:
    return CLIPDataModule(train="shapes:source", test=TESTS, image_size=32, batch_size=8, **kwargs)


def test_top1_equals_torchmetrics_accuracy() -> None:
    torch.manual_seed(0)
    ours, theirs = Top1(), MulticlassAccuracy(5, average="micro")
    for size in (7, 3, 1):
        logits, labels = torch.randn(size, 5), torch.randint(5, (size,))
        ours.update(logits.argmax(1) == labels)
        theirs.update(logits, labels)
    values = ours.compute()
    assert values["acc1"] == theirs.compute()
    assert values["n"] == 11
    assert values["correct"] == round(11 * float(theirs.compute()))


def test_attacked_accuracy_is_that_of_the_attacked_images() -> None:
    """Counts again with a loop of its own, over the same fixed samples."""
    attack = PGD(eps="2/255", alpha="1/255", steps=2)
    method, module = ZeroShot(), data()
    evaluation = RobustEvaluation({"pgd": attack}, max_samples=20, seed=5)
    trainer = helpers.run_test(method, module, evaluation)
    for task, loader in zip(module.test_tasks, module.test_dataloader(), strict=True):
        head = method.clip.encode_classes(task)
        correct = {"clean": 0, "pgd": 0}
        for batch in loader:

            def forward(images: Tensor, head: Tensor = head) -> Tensor:
                return method.clip.logit_scale * method.clip.encode_image(images) @ head.T

            attacked = attack(batch.images, forward, batch.labels, index=batch.index, seed=5)
            correct["clean"] += int((forward(batch.images).argmax(1) == batch.labels).sum())
            correct["pgd"] += int((forward(attacked).argmax(1) == batch.labels).sum())
        for kind, count in correct.items():
            assert trainer.callback_metrics[f"test/{task.name}/{kind}/correct"] == count
            assert trainer.callback_metrics[f"test/{task.name}/{kind}/acc1"] == pytest.approx(count / 20)
    assert correct["pgd"] < correct["clean"]


def test_clean_and_attacked_accuracy_share_their_samples() -> None:
    """An attack that does nothing must reproduce the clean count, on the same number of samples."""
    evaluation = RobustEvaluation({"nothing": PGD(eps=0, alpha=0, steps=1)}, max_samples=13)
    trainer = helpers.run_test(ZeroShot(), data(), evaluation)
    for task in ("colours", "counts"):
        assert trainer.callback_metrics[f"test/{task}/n"] == 13
        clean, same = (trainer.callback_metrics[f"test/{task}/{kind}/correct"] for kind in ("clean", "nothing"))
        assert clean == same


def test_evaluation_leaves_the_model_as_it_was() -> None:
    method = TeCoA()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    helpers.run_test(method, data(), RobustEvaluation({"pgd": PGD()}, max_samples=8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert all(parameter.grad is None for parameter in method.parameters())


def test_validation_during_fit_runs_its_own_attacks_on_the_hold_out() -> None:
    evaluation = RobustEvaluation(
        {"strong": PGD(steps=9)}, fit_attacks={"cheap": PGD(steps=1)}, fit_max_samples=16, max_samples=4
    )
    trainer = helpers.quick_trainer(evaluation, max_epochs=1, limit_train_batches=2)
    trainer.fit(TeCoA(), datamodule=data())
    assert trainer.callback_metrics["val/source/n"] == 16
    assert "val/mean/cheap/acc1" in trainer.callback_metrics
    assert "val/mean/strong/acc1" not in trainer.callback_metrics


class Constant(TeCoA):
    """A model that guesses: its loss is log C."""

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Chance level, with a gradient."""
        loss = 0 * self.logits(batch.images).sum()
        return {"adversarial_ce": loss + self.level}


@pytest.mark.parametrize(("share", "is_collapsed"), [(1.0, True), (0.9, False)])
def test_a_run_at_the_chance_level_warns(share: float, is_collapsed: bool) -> None:
    method = Constant()
    method.level = share * torch.tensor(144.0).log()
    limits = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 0, "log_every_n_steps": 1}
    trainer = helpers.quick_trainer(ChanceLevelWarning(), **limits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(method, datamodule=data())
    messages = [str(warning.message) for warning in caught if "chance is 4.970" in str(warning.message)]
    assert bool(messages) == is_collapsed


def test_the_last_checkpoint_is_the_last_even_if_it_is_not_the_best(tmp_path: Path) -> None:
    # The number of samples never improves, so the first epoch stays the best.
    keeper = Checkpoints(tmp_path, monitor="val/source/n", mode="max", save_last=True, filename="best")
    limits = {"max_epochs": 3, "limit_train_batches": 4, "limit_val_batches": 1, "enable_checkpointing": True}
    trainer = helpers.quick_trainer(keeper, **limits)
    trainer.fit(TeCoA(), datamodule=data())
    steps = {path.stem: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.glob("*.ckpt")}
    assert steps == {"best": 4, "last": 12}


def test_progress_names_data_set_and_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    update = Progress.update

    def record(self: Progress, task_id: object, **fields: object) -> None:
        if "description" in fields:
            seen.append(str(fields["description"]))
        update(self, task_id, **fields)  # type: ignore[arg-type]

    monkeypatch.setattr(Progress, "update", record)
    attacks: dict[str, Attack] = {"one": PGD(steps=1), "two": PGD(steps=1)}
    callbacks = [TaskProgress(), RobustEvaluation(attacks, max_samples=4)]
    helpers.run_test(ZeroShot(), data(), *callbacks, enable_progress_bar=True)
    assert seen == [f"{task} under {attack}" for task in ("colours", "counts") for attack in ("one", "two")]


def row(number: int, label: int, clean: int, by: str) -> dict[str, str]:
    return {"id": str(number), "label": str(label), "clean": str(clean), "pgd.by": by, "seconds": "0.1875"}


# Of eight samples four are correct without attack, and two of these under it.
ROWS = [row(0, 1, 1, ""), row(1, 0, 0, ""), row(2, 1, 1, "ce"), row(3, 2, 2, "margin")]
ROWS += [row(number, 1, 0, "clean") for number in range(4, 8)]


def test_results_have_the_documented_shape() -> None:
    table = accuracies({"a": ROWS}, {"a": {"pgd": ["ce", "margin"]}}, {"a": 1})
    task, mean = table["tasks"]["a"], table["mean"]
    for values in (*mean.values(), task["clean"], task["pgd"]):
        assert len(values.pop("interval")) == 2
    assert table == {
        "tasks": {
            "a": {
                "n": 8, "clean": {"acc1": 0.5, "correct": 4},
                "pgd": {"acc1": 0.25, "correct": 2, "broken_by": {"ce": 1, "margin": 1}},
                "bad_samples": 1, "seconds": 1.5,
            }
        },
        "mean": {"clean": {"acc1": 0.5}, "pgd": {"acc1": 0.25}},
    }  # fmt: skip
    assert scalars(table) == {
        "a/n": 8, "a/clean/acc1": 0.5, "a/clean/correct": 4, "a/pgd/acc1": 0.25, "a/pgd/correct": 2,
        "a/bad_samples": 1, "a/seconds": 1.5, "mean/clean/acc1": 0.5, "mean/pgd/acc1": 0.25,
    }  # fmt: skip


def test_tables_show_intervals_left_out_images_and_the_grade() -> None:
    result = accuracies({"a": ROWS}, {"a": {"pgd": ["ce", "margin"]}}, {"a": 1})
    result["audit"] = {"grade": "C", "checks": [{"name": "finite", "status": "warn"}, {"name": "x", "status": "pass"}]}
    rows = readable_rows(result)
    assert rows[0] == ["task", "n", "clean", "pgd", "seconds", "left out"]
    # Wilson's interval of 4 of 8 is 0.5 -+ sqrt(1.96^2 / 8 / 4 + 1.96^4 / 4 / 64) / (1 + 1.96^2 / 8)
    assert rows[1] == ["a", "8", "50.0 (21.5-78.5)", "25.0 (6.3-59.9)", "1.5", "1"]
    assert rows[2][2].startswith("50.0 (")
    lines = markdown_table(result).splitlines()
    assert lines[1] == "| --- | --: | --: | --: | --: | --: |"
    assert lines[-1] == "Audit: C; warn: finite"


def run_test(folder: Path, *, attacks: dict[str, Attack] | None = None, **options: object) -> ResultsWriter:
    writer = ResultsWriter(str(folder), **options)
    helpers.run_test(ZeroShot(), data(), RobustEvaluation(attacks, max_samples=4), writer)
    return writer


def test_a_test_leaves_one_folder_with_everything_and_never_overwrites_it(tmp_path: Path) -> None:
    paths = [run_test(tmp_path).path for _ in range(3)]
    assert len(set(paths)) == 3
    for path in paths:
        assert path is not None
        run = Run.open(path)
        assert run.result["tasks"]["counts"]["n"] == 4
        assert len(run.rows("counts")) == 4
        names = {each.name for each in path.iterdir()}
        assert names == {"result.json", "facts.json", "table.csv", "table.md", "ledger"}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_named_folder_that_is_finished_is_kept(tmp_path: Path) -> None:
    path = run_test(tmp_path, name="mine").path
    assert path == tmp_path / "mine"
    before = (path / "result.json").read_bytes()
    with pytest.raises(ValueError, match="finished test; choose another"):
        run_test(tmp_path, name="mine")
    assert (path / "result.json").read_bytes() == before


@pytest.mark.parametrize("name", ["clean", "PGD 10", "n", "images_of", "cost", "tasks"])
def test_attack_names_that_could_not_be_keys_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="attack name"):
        RobustEvaluation({name: PGD()})
