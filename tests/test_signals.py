"""Signals and SLURM: statuses, the checkpoint that is left, and from which checkpoint a fit starts."""

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ShardWriter
from test_resume import SLURM

from robustclip.cli.main import run
from robustclip.training import Interruption

STRIKING = ["--model.attack", "resume_cases.Striking"]
CALLBACK = ["--trainer.callbacks", '[{"class_path": "resume_cases.Strike"}]']


class Runs:
    """Commands on tiny data, in this process."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.common = ["--model.pretrained", str(model), "--data.root", str(folder), "--data.image_size", "32"]
        self.common += ["--data.batch_size", "4", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar"]
        self.common += ["false", "--trainer.enable_model_summary", "false", "--trainer.logger", "false"]
        self.common += ["--trainer.default_root_dir", str(folder / "root"), *CALLBACK]

    def fit(self, *words: str, method: str = "TeCoA", place: str = "fit", strike: str = "") -> int:
        self.monkeypatch.setenv("STRIKE", strike)
        fixed = [
            "fit",
            "--model",
            method,
            "--data.train",
            "wds:set",
            "--data.holdout",
            "0",
            "--trainer.max_epochs",
            "2",
        ]
        optimizer = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.01"]
        folder = ["--checkpoint.dirpath", str(self.folder / place)]
        return run([*fixed, *self.common, *optimizer, *folder, *words])

    def test(self, *words: str, strike: str = "") -> int:
        self.monkeypatch.setenv("STRIKE", strike)
        fixed = ["test", "--model", "TeCoA", "--data.test", '["wds:set"]', "--results.name", "result"]
        return run([*fixed, *self.common, "--evaluation.attacks", "{pgd: {class_path: PGD}}", *words])

    def weights(self, path: str) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(self.folder / path, weights_only=True)
        return content


@pytest.fixture
def runs(tmp_path: Path, tiny_model: Path, write_shards: ShardWriter, monkeypatch: pytest.MonkeyPatch) -> Runs:
    write_shards(tmp_path, "set", "train", [20])
    write_shards(tmp_path, "set", "test", [10])
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path)
    return Runs(tmp_path, tiny_model, monkeypatch)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Variables of a job, and an `scontrol` that writes down what it is asked for; returns its list."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    (tmp_path / "bin/scontrol").chmod(0o755)
    for name, value in (SLURM | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "requeued"


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_in_an_attack_leaves_a_checkpoint_of_all_that_learns(
    runs: Runs, capfd: pytest.CaptureFixture[str], name: str, status: int
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    assert runs.fit(*STRIKING, strike=f"{name} train 0.2") == status
    content = runs.weights("fit/last.ckpt")
    assert content["global_step"] == 3
    assert any(key.startswith("clip.net.visual.") for key in content["state_dict"])
    assert str(runs.folder / "fit/last.ckpt") in capfd.readouterr().err
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.slow
def test_a_requeued_job_continues_where_it_was_preempted_and_another_fit_does_not(
    runs: Runs, slurm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert runs.fit(*STRIKING, place="whole") == 0
    assert "starts from the base model (step 0)" in capfd.readouterr().out
    assert runs.fit(*STRIKING, strike="SIGUSR1 train 0.2") == 138
    place = runs.folder / "root/preempted/hpc_ckpt_9.ckpt"
    assert slurm.read_text() == "requeue 9\n"
    assert str(place) in capfd.readouterr().err
    assert runs.fit(method="CleanFineTuning", place="other") == 2
    error = capfd.readouterr().err
    assert str(place) in error
    assert "model TeCoA (here CleanFineTuning)" in error
    assert runs.fit(*STRIKING) == 0
    assert f"starts from {place} (step 3)" in capfd.readouterr().out
    assert not place.exists()  # for the next fit of this job
    whole, resumed = runs.weights("whole/last.ckpt"), runs.weights("fit/last.ckpt")
    assert all(torch.equal(whole["state_dict"][key], resumed["state_dict"][key]) for key in whole["state_dict"])
    assert whole["global_step"] == resumed["global_step"] == 10


@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
def test_a_signal_in_the_last_step_leaves_a_finished_run(runs: Runs, slurm: Path, limit: str) -> None:
    last, steps = {"max_epochs": ("1.4", "10"), "max_steps": ("0.1", "2")}[limit]
    end = [f"--trainer.{limit}", "2"]
    assert runs.fit(*STRIKING, *end, strike=f"SIGUSR1 train {last}") == 138
    assert runs.weights("fit/last.ckpt")["global_step"] == int(steps)
    assert not slurm.exists()
    assert not (runs.folder / "root/preempted").exists()


def test_another_jobs_preempted_checkpoint_is_left_alone(
    runs: Runs, slurm: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runs.fit(*STRIKING, strike="SIGTERM train 0.1") == 143  # without a requeue by us
    assert not slurm.exists()
    monkeypatch.setenv("SLURM_JOB_ID", "10")
    capfd.readouterr()
    assert runs.fit("--trainer.max_steps", "1") == 0
    assert "starts from the base model (step 0)" in capfd.readouterr().out


def test_a_checkpoint_that_lightning_would_load_unasked_is_refused(
    runs: Runs, slurm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stray = runs.folder / "root/hpc_ckpt_1.ckpt"
    stray.touch()
    for command in (runs.fit, runs.test):
        assert command() == 2
        assert str(stray) in capfd.readouterr().err


def test_a_test_that_sigterm_ends_is_resumed_by_the_same_command(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    assert runs.test(strike="SIGTERM test 0.1") == 143
    assert "the same command resumes" in capfd.readouterr().err
    parts = (runs.folder / "root/results/result/ledger/parts").glob("*.csv")
    assert sum(len(list(csv.DictReader(part.open()))) for part in parts) == 8  # both batches that had begun
    assert runs.test() == 0
    (ledger,) = (runs.folder / "root/results/result/ledger").glob("*.csv")
    assert len(list(csv.DictReader(ledger.open()))) == 10


def test_sigint_before_the_first_step_has_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904  # as Lightning does

    monkeypatch.setattr("robustclip.cli.main._answer", interrupted)
    assert run(["fit"]) == 130


def test_a_second_signal_ends_at_once() -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    callback = Interruption()
    try:
        callback._listen()
        os.kill(os.getpid(), signal.SIGTERM)
        assert callback._signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.mark.slow
def test_another_batch_size_is_refused_inside_an_epoch_and_reported_at_its_end(
    runs: Runs, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    every = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1", "--model.schedule", "constant"]
    assert runs.fit(*every, place="first") == 0
    inside, end = (str(runs.folder / f"first/epoch=0-step={step}.ckpt") for step in (2, 5))
    changes = {
        "data.batch_size 4 (here 5)": ["--data.batch_size", "5"],
        "number of training samples 20 (here 6)": ["--data.shots", "2"],
        "trainer.accumulate_grad_batches 1 (here 2)": ["--trainer.accumulate_grad_batches", "2"],
        "seed_everything 0 (here 1)": ["--seed_everything", "1"],
    }
    for message, words in changes.items():
        assert runs.fit(*every, *words, "--ckpt_path", inside) == 2
        error = capfd.readouterr().err
        assert "after 8 of 20 samples" in error
        assert message in error
    other = ["--data.batch_size", "5", "--model.schedule", "constant"]
    assert runs.fit(*other, "--ckpt_path", end) == 0
    assert "data.batch_size 4 (here 5)" in caplog.text
    assert runs.weights("fit/last.ckpt")["global_step"] == 9  # the second epoch has four batches of five


def test_another_batch_size_may_come_before_the_validation_at_an_epochs_end(runs: Runs) -> None:
    held_out = ["--data.holdout", "0.5", "--model.schedule", "constant", "--evaluation.fit_attacks", "{}"]
    assert (
        runs.fit(*held_out, *STRIKING, place="first", strike="SIGTERM train 0.2") == 143
    )  # of three batches for ten images
    other = ["--data.batch_size", "5", "--ckpt_path", str(runs.folder / "first/last.ckpt")]
    assert runs.fit(*held_out, *other) == 0
    assert runs.weights("fit/last.ckpt")["global_step"] == 5


def test_a_fit_removes_the_halves_that_killed_writers_left(runs: Runs) -> None:
    folder = runs.folder / "fit"
    folder.mkdir()
    dead, alive, mine = (folder / f".{name}" for name in ("last.ckpt.999999999", f"last.ckpt.{os.getppid()}", "notes"))
    for path in (dead, alive, mine):
        path.touch()
    assert runs.fit("--trainer.max_steps", "1") == 0
    assert not dead.exists()
    assert alive.exists()
    assert mine.exists()
