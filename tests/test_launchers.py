"""Processes that launchers start are counted and report themselves; logs without a terminal have lines."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import pytest
from lightning.pytorch import Callback

from robustclip.cli.main import run
from robustclip.data import CLIPDataModule
from robustclip.evaluation import ProgressLines, RobustEvaluation, progress_lines
from robustclip.methods import TeCoA
from robustclip.training.processes import check_processes, check_strategy, report_process

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "9"}
SRUN = {"SLURM_JOB_NAME": "fit", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "devices", "nodes", "words"),
    [
        # A trainer of fewer processes than there are: global batches would be too small, or every process run alone.
        (TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 2, 1, "--trainer.devices 4 --trainer.num_nodes 1"),
        (TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 2, 1, "--trainer.devices 2 --trainer.num_nodes 2"),
        (
            TORCHRUN | {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"},
            1,
            1,
            "starts 16 processes, 8 on this node",
        ),
        # A trainer of more processes than there are: it would wait for ever.
        (TORCHRUN | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, 2, 2, "make 2 x 2"),
        (TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, 2, 1, "torchrun starts 1 process, 1 on this node"),
        (SRUN | {"SLURM_NTASKS": "1"}, 4, 1, "srun starts 1 process,"),
        # As many processes, but not on the nodes that the trainer expects.
        (TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 4, 1, "--trainer.devices 2 --trainer.num_nodes 2"),
        (SRUN | {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}, 8, 1, "--trainer.devices 4 --trainer.num_nodes 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 1, 1, "torchrun starts 2 processes"),
        # These fit.
        (TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 2, 2, None),
        (TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", **SRUN, "SLURM_NTASKS": "2"}, 2, 2, None),
        (SRUN | {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}, 4, 2, None),
        (SRUN | {"SLURM_NTASKS": "8"}, 4, 2, None),
        (SRUN | {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "interactive"}, 1, 1, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 8, 2, None),  # two pods, in which Lightning starts eight processes each
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 4, 1, None),  # of Lightning's own launcher
        ({}, 8, 4, None),
    ],
)
def test_a_trainer_uses_as_many_processes_as_the_launcher_has_started(
    environment: dict[str, str], devices: int, nodes: int, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if words is None:
        check_processes(devices, nodes)
        return
    with pytest.raises(ValueError, match=r"trainer\.devices and") as refused:
        check_processes(devices, nodes)
    assert words in str(refused.value)


def test_the_check_comes_before_training_and_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (TORCHRUN | {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    words = ["fit", "--model", "TeCoA", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    assert run([*words, "--trainer.devices", "2", "--trainer.num_nodes", "1"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line]
    assert len(lines) == 1
    assert "torchrun starts 4 processes, 4 on this node" in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("strategy", ["fsdp", "FSDPStrategy", "deepspeed_stage_2", "lightning.x.ModelParallelStrategy"])
def test_strategies_that_divide_the_weights_are_refused(strategy: str) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.strategy .*{strategy}.* is not supported.*use ddp"):
        check_strategy(strategy)
    check_strategy("ddp_find_unused_parameters_true")


def test_each_of_several_processes_reports_rank_node_device_and_the_address(capsys: pytest.CaptureFixture[str]) -> None:
    environment = SimpleNamespace(main_address="10.0.0.1", main_port=29500)
    strategy = SimpleNamespace(cluster_environment=environment, root_device="cuda:1")
    place = {"global_rank": 5, "local_rank": 1, "node_rank": 1, "num_nodes": 2, "strategy": strategy}
    report_process(SimpleNamespace(world_size=8, **place))  # type: ignore[arg-type]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("process 5 of 8: node 1 of 2 (host ")
    assert "local rank 1, device cuda:1" in first
    assert second == "process 5 of 8 waits for the others at 10.0.0.1:29500"
    report_process(SimpleNamespace(world_size=1, **place))  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


# Lines of progress


class Clock(Callback):
    """Two seconds pass in every training step, one in every batch of an evaluation."""

    def __init__(self) -> None:
        self.now = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.now += 2

    def on_validation_batch_start(self, *_: Any) -> None:
        self.now += 1

    on_test_batch_start = on_validation_batch_start


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_lines, "monotonic", lambda: clock.now)
    return clock


def data(**options: Any) -> CLIPDataModule:
    return CLIPDataModule(train="shapes:source", image_size=32, batch_size=4, **options)


def test_a_log_has_a_line_every_n_steps(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    limits = {"max_steps": 12, "log_every_n_steps": 5, "limit_val_batches": 2, "limit_train_batches": 8}
    helpers.quick_trainer(clock, ProgressLines(), **limits).fit(TeCoA(), datamodule=data())
    lines = [re.sub(r"loss [\d.]+", "loss X", line) for line in capsys.readouterr().out.splitlines()]
    # Two seconds a step; the two seconds of the first epoch's validation count for the remaining time alone.
    assert lines == [
        "epoch 0, step 1 of 12, loss X, 2.0 images/s, 0:00:22 remaining",
        "epoch 0, step 5 of 12, loss X, 2.0 images/s, 0:00:14 remaining",
        "epoch 1, step 10 of 12, loss X, 2.0 images/s, 0:00:04 remaining",
    ]


def test_a_while_without_a_line_ends_with_one(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert progress_lines.PATIENCE_SECONDS == 60
    monkeypatch.setattr(progress_lines, "PATIENCE_SECONDS", 6)
    limits = {"max_steps": 8, "log_every_n_steps": 1000, "limit_val_batches": 0}
    helpers.quick_trainer(clock, ProgressLines(), **limits).fit(TeCoA(), datamodule=data())
    assert [line.split(",")[1] for line in capsys.readouterr().out.splitlines()] == [
        " step 1 of 8", " step 4 of 8", " step 7 of 8",
    ]  # fmt: skip


def test_every_test_set_has_lines(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate() -> list[str]:
        sets = data(test=["shapes:colours", "shapes:counts"])
        callbacks = [clock, RobustEvaluation(max_samples=12), ProgressLines()]
        helpers.run_test(TeCoA(), sets, *callbacks, log_every_n_steps=2)
        return capsys.readouterr().out.splitlines()

    assert evaluate() == [
        "test of colours, batch 1, 1 of 6 in all, 4.0 images/s, 0:00:05 remaining",
        "test of colours, batch 2, 2 of 6 in all, 4.0 images/s, 0:00:04 remaining",
        "test of counts, batch 1, 4 of 6 in all, 4.0 images/s, 0:00:02 remaining",
        "test of counts, batch 2, 5 of 6 in all, 4.0 images/s, 0:00:01 remaining",
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert evaluate() == []
