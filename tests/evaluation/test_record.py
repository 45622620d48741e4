"""The result of a test is a function of its ledgers, also with callbacks, sections and loaders of a user."""

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from robustclip.attacks import PGD
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule
from robustclip.evaluation import ResultsWriter, RobustEvaluation
from robustclip.evaluation.writer import Section
from robustclip.methods import ZeroShot
from robustclip.results.run import Run
from robustclip.results.summary import Record
from robustclip.types import Batch


class PowerCut(Exception):  # noqa: N818  # not ours to catch
    """Ends a test."""


class Cut(Callback):
    """Ends the test before one of its batches."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_test_batch_start(self, trainer: Any, module: Any, batch: Batch, number: int, task: int = 0) -> None:
        if number == self.batch:
            raise PowerCut


class Counted(PGD):
    """Notes the samples that it attacks."""

    seen: list[int] = []  # no setting

    def perturb(self, images: Tensor, *args: Any, index: Tensor | None, **kwargs: Any) -> Tensor:
        if (self.steps, self.eps) == (2, 4 / 255) and index is not None:  # no probe
            Counted.seen += index.tolist()
        return super().perturb(images, *args, index=index, **kwargs)


ATTACK = Counted(eps="4/255", alpha="2/255", steps=2)


def run_test(folder: Path, *others: Callback, data: CLIPDataModule | None = None, **limits: Any) -> Run:
    writer = ResultsWriter(str(folder), name="run")
    callbacks = [*others, RobustEvaluation({"pgd": ATTACK}, max_samples=12), writer]
    data = data or CLIPDataModule(test=["shapes:colours"], image_size=32, batch_size=4)
    helpers.run_test(ZeroShot(), data, *callbacks, **limits)
    assert writer.path is not None
    return Run.open(writer.path)


# Code of a user


class Memory(Callback):
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("test/memory/peak", 1.5)
        pl_module.log("undefined", torch.nan)


class Own(CLIPDataModule):
    def test_dataloader(self) -> Any:
        batches = [batch._replace(labels=batch.labels + self.shift) for batch in BATCHES]
        return DataLoader(batches, batch_size=None)

    shift = 0


def confused(record: Record) -> dict[str, int]:
    return {task: len({row["clean"] for row in record.rows[task]}) for task in record.facts["tasks"]}


class Confusion(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, ResultsWriter):
                callback.sections["confusion"] = Section(confused)


def batches() -> list[Batch]:
    data = CLIPDataModule(test=["shapes:colours"], image_size=32, batch_size=4)
    data.max_samples = 10
    data.setup("test")
    return list(data.test_dataloader()[0])


BATCHES = batches()


def own_data(shift: int = 0) -> Own:
    data = Own(test=["shapes:colours"], image_size=32)
    data.shift = shift
    return data


def test_metrics_of_a_users_callback_are_kept_beside_the_result(tmp_path: Path) -> None:
    result = run_test(tmp_path, Memory()).result
    assert result["other_metrics"] == {"test/memory/peak": 1.5, "undefined": None}
    assert result["tasks"].keys() == {"colours"}
    assert "other_metrics" not in run_test(tmp_path / "without").result


def test_a_data_module_with_loaders_of_its_own_has_a_result(tmp_path: Path) -> None:
    run = run_test(tmp_path, data=own_data())
    assert run.result["tasks"]["colours"]["n"] == 10
    expected = torch.cat([batch.index for batch in BATCHES]).sort().values.tolist()
    assert [int(row["id"]) for row in run.rows("colours")] == expected


def test_loaders_that_give_finished_samples_again_resume_too(tmp_path: Path) -> None:
    whole = run_test(tmp_path / "whole", data=own_data())
    Counted.seen.clear()
    with pytest.raises(PowerCut):
        run_test(tmp_path / "cut", Cut(2), data=own_data())
    resumed = run_test(tmp_path / "cut", data=own_data())
    assert sorted(Counted.seen) == sorted({*Counted.seen}), "a finished sample was attacked again"
    for each in (whole, resumed):
        del each.result["finished"], each.result["tasks"]["colours"]["seconds"]
    assert resumed.result == whole.result


def test_finished_samples_with_other_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PowerCut):
        run_test(tmp_path, Cut(1), data=own_data())
    with pytest.raises(ValueError, match=r"4 of 4 samples of colours .* now have other images or labels"):
        run_test(tmp_path, data=own_data(shift=1))


def test_a_test_that_ends_without_a_result_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the test ended without a result"):
        run_test(tmp_path, limit_test_batches=0)
    with pytest.raises(ValueError, match="ResultsWriter needs a RobustEvaluation"):
        helpers.run_test(ZeroShot(), own_data(), ResultsWriter(str(tmp_path)), limit_test_batches=1)


def test_a_section_of_a_user_is_a_function_of_the_rows(tmp_path: Path) -> None:
    run_of_user = run_test(tmp_path, Confusion())
    clean = {row["clean"] for row in run_of_user.rows("colours")}
    assert run_of_user.result["confusion"] == {"colours": len(clean)}


def test_score_makes_every_file_again_from_the_ledgers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_test(tmp_path, Confusion(), Memory()).folder
    names = ("result.json", "table.csv", "table.md")
    before = {name: (folder / name).read_bytes() for name in names}
    capsys.readouterr()
    assert run(["score", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/result.json\n"
    assert {name: (folder / name).read_bytes() for name in names} == before
    ledger = (folder / "ledger" / "colours.csv").read_text().splitlines()
    (folder / "ledger" / "colours.csv").write_text("\n".join(ledger[:6]) + "\n")
    assert run(["score", str(folder / "result.json")]) == 0
    assert Run.open(folder).result["tasks"]["colours"]["n"] == 5


def test_score_refuses_a_folder_without_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["score", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} has no facts.json of `robustclip test`")
