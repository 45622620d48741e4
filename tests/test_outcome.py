"""A fit ends with finite weights and their settings, or with one line that states the reason."""

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import quick_trainer, tiny_clip
from lightning.pytorch import LightningModule, Trainer
from ranks import in_background
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.cli.lightning import main
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule
from robustclip.methods import CRoFT, FineTuning, RobustMethod, TeCoA
from robustclip.methods._shared import step_checks
from robustclip.methods._shared.step_checks import DivergenceWatch
from robustclip.types import Batch

DEMO = str(Path(__file__).parents[1] / "robustclip" / "configs" / "demo.yaml")
COMMON = [
    "--config", DEMO, "--data.batch_size", "4", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.limit_val_batches", "0",
    "--evaluation.fit_attacks", "{}",
]  # fmt: skip
FIT = ["fit", *COMMON, "--trainer.max_steps", "2"]
TEST = ["test", *COMMON, "--data.test", "[shapes:colours]", "--evaluation.max_samples", "4"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line on stderr of a command that must end with status 2."""
    assert run(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line]
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def is_finite(checkpoint: Path) -> bool:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return all(bool(tensor.isfinite().all()) for tensor in state.values() if tensor.is_floating_point())


# A diverged fit


def test_a_fit_whose_loss_is_not_finite_names_step_term_and_the_last_good_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*FIT, "--trainer.max_steps", "6", "--model.optimizer.lr", "1e12", "--model.warmup_steps", "2"]
    line = refused([*words, "--checkpoint.every_n_train_steps", "1"], capsys)
    assert "adversarial_ce is not finite in training step" in line
    last = folder / "runs" / "version_0" / "checkpoints" / "last.ckpt"
    assert str(last.relative_to(folder)) in line or "-step=" in line
    assert all(is_finite(path) for path in last.parent.glob("*.ckpt"))
    line = refused([*words, "--checkpoint.dirpath", "without"], capsys)
    assert "no checkpoint was written" in line
    assert not list((folder / "without").glob("*.ckpt"))


@pytest.mark.parametrize("rate", [1e12, torch.inf], ids=["loss", "weights"])
def test_a_value_that_nobody_has_read_yet_is_read_before_a_checkpoint_is_written(
    rate: float, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most steps of an accelerator read nothing; at an infinite rate, the loss is finite and the weights are not."""
    note = DivergenceWatch.note
    monkeypatch.setattr(DivergenceWatch, "note", lambda *values: note(*values) and False)
    steps = 3 if rate < torch.inf else 1
    method = tiny(Clean, tiny_model, optimizer=lambda params: torch.optim.SGD(params, lr=rate))
    with pytest.raises(
        ValueError, match="clean_ce is not finite in training step [123]" if steps > 1 else "not finite"
    ):
        fit(method, tmp_path, max_steps=steps, enable_checkpointing=True)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_last_step_is_checked_without_checkpoints(tiny_model: Path, tmp_path: Path) -> None:
    method = tiny(Clean, tiny_model, optimizer=lambda params: torch.optim.SGD(params, lr=torch.inf))
    with pytest.raises(ValueError, match="parameters are not finite after training step 1"):
        fit(method, tmp_path, max_steps=1)


def test_the_first_of_several_bad_steps_is_named() -> None:
    watch, trainer = DivergenceWatch(), quick_trainer()
    for step, values in enumerate(([1.0, 2.0], [3.0, torch.inf], [torch.nan, torch.nan])):
        watch.note(("a", "b"), torch.tensor(values), step)
    with pytest.raises(ValueError, match="b is not finite in training step 2"):
        watch.check(trainer)


def test_an_accelerator_is_not_asked_in_every_step() -> None:
    watch = DivergenceWatch()
    looks = [
        watch.note(("a",), torch.ones(1, device="meta"), step) for step in range(2 * step_checks.CHECK_EVERY_STEPS)
    ]
    assert sum(looks) == 2


def test_skipped_steps_with_gradients_that_are_not_finite_are_no_divergence(tiny_model: Path, tmp_path: Path) -> None:
    """A gradient scaler leaves out steps whose gradients overflow; the loss is finite."""
    method = tiny(Overflows, tiny_model)
    fit(method, tmp_path, max_steps=3)
    assert method.overflows == 1


# The contract of a method


class Clean(TeCoA):
    """A fast method to spoil."""

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        return {"clean_ce": F.cross_entropy(self.logits(batch.images).float(), batch.labels)}


class Overflows(Clean):
    overflows = 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.global_step == 1 and not self.overflows:
            self.overflows += 1
            for parameter in self.parameters():
                parameter.grad = None if parameter.grad is None else torch.full_like(parameter, torch.inf)
            optimizer.zero_grad()


class Manual(Clean):
    """Manual optimisation; ``act`` is what its training step does with the loss."""

    act: Callable[["Manual", Tensor], Any] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.act is not None:
            self.act(loss)
        return loss.detach()


class WithSpare(Clean):
    """A head that takes no part in the loss."""

    idle = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spare = nn.Linear(2, 2)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [*super().parameter_groups(), {"params": list(self.spare.parameters())}]

    def idle_parameters(self) -> list[nn.Parameter]:
        return list(self.spare.parameters()) if self.idle else []


def tiny(cls: type[Any], model: Path, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    kwargs.setdefault("optimizer", lambda params: torch.optim.SGD(params, lr=0.01))
    return cls(pretrained=str(model), **kwargs)


def fit(method: LightningModule, folder: Path, **options: Any) -> Trainer:
    trainer = quick_trainer(limit_val_batches=0, default_root_dir=folder, **options)
    trainer.fit(method, datamodule=CLIPDataModule(train="shapes:source", batch_size=4, image_size=32))
    return trainer


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (lambda loss: loss, ["dict of scalar tensors", "a tensor of torch.float32"]),
        (lambda loss: {"ce": 0.3}, ["'ce'", "float 0.3"]),
        (lambda loss: {"ce": loss, "pull": 1}, ["'pull'", "int 1"]),
        (lambda loss: {"ce": loss, "pull": None}, ["'pull'", "NoneType"]),
        (lambda loss: {}, ["dict of scalar tensors", "{}"]),
        (lambda loss: None, ["dict of scalar tensors", "None"]),
        (lambda loss: [loss], ["dict of scalar tensors", "list"]),
        (lambda loss: {"ce": loss.expand(4)}, ["'ce'", "(4,)"]),
        (lambda loss: {"ce": loss[None]}, ["'ce'", "(1,)"]),
        (lambda loss: {"ce": loss, "n": torch.tensor(3)}, ["'n'", "int64"]),
        (lambda loss: {0: loss}, ["term 0"]),
        (lambda loss: {"ce": loss, "far": loss.to("meta")}, ["'far'", "cpu", "meta"]),
        (lambda loss: {"ce": loss.detach()}, ["no term has a gradient", "ce"]),
    ],
)
def test_a_loss_that_is_no_dict_of_scalars_is_refused_in_the_first_step(
    terms: Callable[[Tensor], Any], words: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Clean.training_loss
    monkeypatch.setattr(Clean, "training_loss", lambda self, batch: terms(loss(self, batch)["clean_ce"]))
    with pytest.raises(ValueError, match=r"Clean\.training_loss") as error:
        fit(tiny(Clean, tiny_model), tmp_path, max_steps=1)
    assert all(word in str(error.value) for word in words)


def backward_alone(self: Manual, loss: Tensor) -> None:
    self.manual_backward(loss)


def step_alone(self: Manual, loss: Tensor) -> None:
    self.manual_backward(loss)
    self.optimizers().step()  # type: ignore[union-attr]


@pytest.mark.parametrize(("act", "limit"), [(None, 1.0), (backward_alone, 3)])
def test_manual_optimisation_without_a_step_is_refused(
    act: Any, limit: float, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Manual, "act", act)
    with pytest.raises(ValueError, match=r"Manual sets automatic_optimization to False.*no optimiser step"):
        fit(tiny(Manual, tiny_model), tmp_path, max_steps=2, limit_train_batches=limit)


def test_manual_optimisation_that_steps_is_not(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Manual, "act", step_alone)
    assert fit(tiny(Manual, tiny_model), tmp_path, max_steps=2).global_step == 2


def test_a_parameter_that_gets_no_gradient_is_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"WithSpare: parameter 'spare\.weight' and 1 more"):
        fit(tiny(WithSpare, tiny_model), tmp_path, max_steps=1)


def test_a_parameter_that_learns_later_may_be_declared(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WithSpare, "idle", True)
    assert fit(tiny(WithSpare, tiny_model), tmp_path, max_steps=1).global_step == 1
    assert fit(tiny(FineTuning, tiny_model, probe_epochs=1, warmup_steps=0), tmp_path, max_steps=1).global_step == 1


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (lambda self: list(self.spare.parameters()), "list of dicts"),
        (lambda self: {"params": list(self.spare.parameters())}, "list of dicts"),
        (lambda self: [{"params": [self.spare.weight, self.spare.weight]}], "'spare.weight' twice"),
        (lambda self: [{"params": [self.spare.weight]}, {"params": [self.spare.weight]}], "'spare.weight' twice"),
        (lambda self: [{"params": [nn.Parameter(torch.zeros(1))]}], "no parameter of the module"),
        (lambda self: [{"params": []}], "nothing to fit"),
        (lambda self: [], "nothing to fit"),
    ],
)
def test_groups_that_are_no_groups_are_refused(
    groups: Any, words: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WithSpare, "parameter_groups", groups)
    with pytest.raises(ValueError, match=words) as error:
        fit(tiny(WithSpare, tiny_model), tmp_path, max_steps=1)
    assert "WithSpare.parameter_groups()" in str(error.value)


# Length of a fit


@pytest.mark.parametrize("method", [Clean, CRoFT])
def test_a_cosine_over_a_run_of_unknown_length_is_refused(
    method: type[RobustMethod], tiny_model: Path, tmp_path: Path
) -> None:
    endless = {"max_epochs": -1, "max_time": "00:00:00:01"}
    with pytest.raises(ValueError, match=r"model\.schedule.*trainer\.max_epochs.*constant"):
        fit(tiny(method, tiny_model), tmp_path, **endless)
    trainer = fit(tiny(method, tiny_model, schedule="constant"), tmp_path, **endless)
    assert trainer.global_step > 0


@pytest.mark.slow
def test_a_fit_for_a_time_is_one_line_or_works(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", *COMMON, "--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:01"]
    assert "model.schedule" in refused(words, capsys)
    assert run([*words, "--model.schedule", "constant"]) == 0
    assert is_finite(folder / "runs" / "version_1" / "checkpoints" / "last.ckpt")


# Where everything lands


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("root", ["runs", pytest.param("elsewhere", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_everything_lands_below_the_root_and_a_test_takes_no_version(
    root: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = [] if root == "runs" else ["--trainer.default_root_dir", root]
    assert run([*FIT, *place]) == 0
    checkpoint = f"{root}/version_0/checkpoints/last.ckpt"
    assert f"checkpoint: {root}/version_0/" in capsys.readouterr().out
    assert run([*TEST, *place, "--ckpt_path", checkpoint, "--results.name", "tested"]) == 0
    assert {name.split("/")[0] for name in files(folder / root)} == {"version_0", "results"}
    assert (folder / root / "results" / "tested" / "result.json").is_file()
    assert run([*FIT, *place]) == 0
    assert (folder / root / "version_1" / "checkpoints" / "fit.yaml").is_file()
    assert [path.name for path in folder.iterdir()] == [root]


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.logger", "false"],
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in (
                ["--checkpoint.dirpath", "kept"],
                ["--checkpoint.dirpath", "kept", "--checkpoint.save_weights_only", "true"],
                ["--trainer.logger", "TensorBoardLogger"],
                ["--trainer.logger.save_dir", "logs"],
            )
        ),
    ],
)
@pytest.mark.slow
def test_a_checkpoint_is_exported_and_interpolated_with_its_own_settings(
    options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"fit.yaml": "mine: 1\n", "kept/fit.yaml": "mine: 2\n", "runs/fit.yaml": "mine: 3\n"}
    for name, text in own.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    if "TensorBoardLogger" in options:
        pytest.importorskip("tensorboard")
    assert run([*FIT, *options, "--model.last_blocks", "1"]) == 0
    assert all((folder / name).read_text() == text for name, text in own.items())
    (checkpoint,) = folder.rglob("last.ckpt")
    moved = checkpoint.rename(folder / "moved.ckpt")
    settings = torch.load(moved, weights_only=True)["settings"]
    assert settings["model"]["init_args"]["last_blocks"] == 1
    assert settings["trainer"]["max_steps"] == 2
    assert run(["export", str(moved), "--out", "exported"]) == 0
    assert "TeCoA" in (folder / "exported" / "README.md").read_text()
    assert run(["interpolate", str(moved), "--alphas", "0.5", "--out", "between"]) == 0
    assert run(["export", "between/alpha-0.5.ckpt", "--out", "exported-0.5"]) == 0


@pytest.mark.slow
def test_settings_beside_the_checkpoints_are_run_again_and_none_is_overwritten(folder: Path) -> None:
    words = [*FIT, "--checkpoint.dirpath", "kept", "--trainer.logger", "false"]
    for more in ([], [], ["--seed_everything", "7"]):
        assert run([*words, *more]) == 0
    texts = [(folder / "kept" / name).read_text() for name in ("fit.yaml", "fit-1.yaml")]
    assert [yaml.safe_load(text)["seed_everything"] for text in texts] == [0, 7]
    assert not (folder / "kept" / "fit-2.yaml").exists()
    again = main(["fit", "--config", "kept/fit-1.yaml", "--trainer.max_steps", "1"])
    assert again.run_settings["seed_everything"] == 7
    assert again.trainer.global_step == 1


def test_a_checkpoint_of_a_python_program_asks_for_a_config(
    folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tiny(TeCoA, tiny_model, last_blocks=1), folder, max_steps=1).save_checkpoint("own.ckpt")
    for command in ("export", "interpolate"):
        line = refused([command, "own.ckpt", "--out", "x"], capsys)
        assert "own.ckpt holds no settings" in line
        assert "--config" in line
    config = {"model": {"class_path": "TeCoA", "init_args": {"pretrained": str(tiny_model), "last_blocks": 1}}}
    (folder / "own.yaml").write_text(yaml.safe_dump(config))
    assert run(["interpolate", "own.ckpt", "--config", "own.yaml", "--out", "x"]) == 0


# Several processes


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "torchrun"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_NAME": "fit"}, "srun"),
        ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "fit"}, "srun"),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "fit"}, None),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "interactive"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, None),  # Lightning's own launcher leaves these behind
    ],
)
def test_a_launcher_of_several_processes_needs_as_many_devices(
    environment: dict[str, str], launcher: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = [*FIT, "--trainer.max_steps", "1"]
    if launcher is None:
        assert run(words) == 0
        return
    line = refused(words, capsys)
    assert f"{launcher} starts 2 processes" in line
    assert "--trainer.devices 2" in line
    assert files(folder) == []


# Files that cannot be written


@pytest.mark.parametrize("option", ["--trainer.default_root_dir", "--checkpoint.dirpath", "--trainer.logger.save_dir"])
def test_a_folder_that_is_a_file_is_named(option: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "taken").write_text("mine")
    assert "taken" in refused([*FIT, option, "taken"], capsys)
    assert (folder / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    ("limit", "name"), [(100_000, "step=2.ckpt cannot be written: File too large"), (1000, "fit.yaml")]
)
@pytest.mark.slow
def test_a_limit_of_file_sizes_is_one_line_with_the_name(
    limit: int, name: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stands for a full disk too, which fails at the same places."""
    child = os.fork()
    if not child:
        status = 99
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            status = run(FIT)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert name in error


@pytest.mark.slow
def test_logs_that_cannot_be_written_are_one_line_with_their_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*values: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lightning.pytorch.loggers.CSVLogger.save", fail)
    assert "version_0" in refused(FIT, capsys)


@pytest.mark.slow
def test_all_ranks_stop_where_one_diverges(tmp_path: Path) -> None:
    tiny_clip(tmp_path)
    with in_background(Path(__file__).with_name("diverging_processes.py"), tmp_path):
        pass
    messages = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "ce is not finite in training step 3" in messages[0]
    assert not list(tmp_path.rglob("*.ckpt"))
