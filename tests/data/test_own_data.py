"""Data of a user: the members that a data module must have, and own data modules that satisfy them."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import run_test
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from robustclip.cli.build import Assembled
from robustclip.cli.lightning import start
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule
from robustclip.evaluation import RobustEvaluation
from robustclip.methods import ZeroShot
from robustclip.results.run import Run
from robustclip.types import MEMBERS, Batch, Data, Task, data_of


class Gradients(Data, LightningDataModule):
    """Two images, one darker than the other."""

    test_tasks = [Task("shades", ("black", "white"))]

    def test_dataloader(self) -> DataLoader[Batch]:
        images = torch.linspace(0, 1, 2)[:, None, None, None].expand(2, 3, 32, 32)
        batch = Batch(images, torch.tensor([0, 1]), torch.tensor([0, 1]), digests=("a", "b"))
        return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]  # a list of whole batches


def trainer_of(data: object) -> SimpleNamespace:
    return SimpleNamespace(datamodule=data)


def test_our_data_module_has_every_member() -> None:
    data = CLIPDataModule()
    assert data_of(trainer_of(data)) is data
    assert len(MEMBERS) == 16
    for name in MEMBERS:
        assert name in vars(CLIPDataModule), name


def test_a_data_module_that_lacks_a_member_is_refused_by_the_name_of_the_member() -> None:
    members = dict.fromkeys(MEMBERS)
    for missing in MEMBERS:
        own = type("Own", (LightningDataModule,), {name: 0 for name in members if name != missing})
        with pytest.raises(ValueError, match=f"^Own lacks '{missing}'"):
            data_of(trainer_of(own()))
    with pytest.raises(ValueError, match="no data module"):
        data_of(trainer_of(None))


def test_looking_for_the_members_opens_no_data_set() -> None:
    data = CLIPDataModule(train="folder:/nowhere")
    assert data_of(trainer_of(data)) is data
    with pytest.raises(ValueError, match="/nowhere"):
        _ = data.train_task


def test_a_data_module_of_a_few_lines_is_tested_on(tiny_model: Path) -> None:
    assert len(inspect.getsource(Gradients).splitlines()) <= 15
    trainer = run_test(ZeroShot(pretrained=str(tiny_model)), Gradients(), RobustEvaluation())
    assert trainer.callback_metrics["test/shades/clean/acc1"] in (0, 0.5, 1)


OWN_MODULES = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from robustclip.cli.build import Assembled
from robustclip.cli.lightning import start
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule
from robustclip.types import Batch, Data, Task

class Ours(CLIPDataModule):
    def __init__(self, name: str = "colours", **kwargs):
        super().__init__(test=f"shapes:{name}", **kwargs)

class Theirs(Data, LightningDataModule):
    val_tasks = [Task("shades", ("black", "white"))]
    def val_dataloader(self):
        images = torch.linspace(0, 1, 2)[:, None, None, None].expand(2, 3, 32, 32)
        return DataLoader([Batch(images, torch.tensor([0, 1]), torch.tensor([0, 1]))], batch_size=None)
"""


def test_own_data_modules_are_taken_by_the_path_of_their_class(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_modules.py").write_text(OWN_MODULES)
    words = ["--model", "ZeroShot", "--model.pretrained", str(tiny_model), "--trainer.accelerator", "cpu"]
    words += ["--trainer.enable_progress_bar", "false"]
    ours = ["--data", "own_modules.Ours", "--data.name", "counts", "--evaluation.max_samples", "2"]
    assert run(["test", *words, *ours, "--results.folder", "results", "--results.name", "ours"]) == 0
    assert list(Run.open(tmp_path / "results" / "ours").result["tasks"]) == ["counts"]
    assert run(["validate", *words, "--data", "own_modules.Theirs"]) == 0


def test_the_seed_of_the_command_line_orders_the_training_data() -> None:
    words = ["fit", "--model", "ZeroShot", "--model.pretrained", "shapes", "--trainer.accelerator", "cpu"]
    for given, seed in (("7", 7), ("true", 0), ("false", 0)):
        assembled = start(Assembled, [*words, "--seed_everything", given])
        assert assembled.datamodule.seed == seed
        assert "seed" not in assembled.run_settings["data"]["init_args"]  # one place for the user to set it


def test_a_limit_that_a_data_module_does_not_apply_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"Gradients has no `connect`.* got 1"):
        run_test(ZeroShot(pretrained=str(tiny_model)), Gradients(), RobustEvaluation(max_samples=1))


def test_connect_limits_the_samples_and_leaves_finished_ones_out() -> None:
    data = CLIPDataModule(test=["shapes:colours"], batch_size=64)
    data.setup("test")

    def ids() -> list[int]:
        return [number for loader in data.test_dataloader() for batch in loader for number in batch.index.tolist()]

    every = ids()
    data.connect(limit=5)
    few = ids()
    assert len(few) == 5
    assert set(few) < set(every)
    data.connect(limit=5, done=lambda task: frozenset(few[:2]) if task == "colours" else frozenset())
    assert ids() == few[2:]
    data.connect()
    assert ids() == every
