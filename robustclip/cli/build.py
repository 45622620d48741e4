"""Builds the objects of a run without running it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from lightning.pytorch import Trainer

from robustclip.cli.lightning import EXPECTED_ERRORS, RobustCLI, check_checkpoint, main, start
from robustclip.cli.messages import in_one_line
from robustclip.data import CLIPDataModule
from robustclip.methods import RobustMethod
from robustclip.paths import local_path
from robustclip.tools.doctor import Plan

# Settings that determine the method of a run; the seed matters where there are no pre-trained weights.
METHOD_KEYS = ("seed_everything", "model", "ckpt_path")
VALIDATION_KEYS = ("seed_everything", "trainer", "data", "evaluation", "model")  # settings that ``validate`` takes
# Options of a model that replaces one that does not load, so that the data can still be checked.
STAND_IN = ("--model=ZeroShot", "--model.arch=null", "--model.pretrained=shapes", "--model.image_size=null")


class Assembled(RobustCLI):
    """Builds the objects of ``fit`` or ``test`` but for the trainer, since the run's machine may be another one."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Gives a CPU trainer that nothing is run with."""
        return Trainer(accelerator="cpu", devices=1, barebones=True)

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    @property
    def settings(self) -> Any:
        """The configuration as parsed."""
        return self.config[self.subcommand]


class _Examined(Assembled):
    """Keeps an error of the classes for a report instead of raising it."""

    failure: Exception | None = None

    def instantiate_classes(self) -> None:
        """Builds the objects as far as possible."""
        try:
            super().instantiate_classes()
        except EXPECTED_ERRORS as error:
            self.failure = error

    def _parse_ckpt_path(self) -> None:
        """Leaves the checkpoint to `plan`, which continues after a bad one."""


def build(config: Mapping[str, Any]) -> RobustMethod:
    """Builds the method of a finished run with its trained weights, in eval mode.

    Args:
        config: settings in the run's result.

    Raises:
        ValueError: the configuration does not build here, or its checkpoint is missing or of another model.
    """
    return rebuild(config, [], keys=METHOD_KEYS)


def rebuild(
    config: Mapping[str, Any], arguments: Sequence[str], *, keys: Sequence[str] = METHOD_KEYS[:-1]
) -> RobustMethod:
    """Builds the method of a finished run with other options, in eval mode.

    Args:
        config: settings in the run's result.
        arguments: options as on the command line, which override ``config``.
        keys: settings that are taken from ``config``, by default without the run's checkpoint.

    Raises:
        ValueError: as `build`.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump({key: config[key] for key in keys if key in config}), encoding="utf-8")
        assembled = start(Assembled, ["test", "--config", str(file), *arguments])
    model: RobustMethod = assembled.model
    if checkpoint := assembled.settings.get("ckpt_path"):
        load_checkpoint(model, str(checkpoint))
    return model.eval()


def build_for(checkpoint: Path, arguments: Sequence[str]) -> RobustMethod:
    """Builds the method of a checkpoint with the weights from which its training started.

    Args:
        checkpoint: file of ``robustclip fit``.
        arguments: options as on the command line; without ``--config``, the settings in the checkpoint hold.

    Raises:
        ValueError: no settings, or as `build`.
    """
    if any(argument.partition("=")[0] == "--config" for argument in arguments):
        return rebuild({}, arguments)
    settings = settings_of_fit(checkpoint)
    if settings is None:
        raise ValueError(
            f"checkpoint {checkpoint} holds no settings, since it was not written by the command `robustclip fit`;"
            " give the --config of its method, with model and seed_everything"
        )
    return rebuild(settings, arguments)


def held_out_accuracy(checkpoint: Path, arguments: Sequence[str], monitor: str | None) -> float:
    """Measures a checkpoint on the validation images of its fit.

    Args:
        checkpoint: file of ``robustclip fit`` or of a soup.
        arguments: options as on the command line; without ``--config``, the settings in the checkpoint hold.
        monitor: name of the accuracy; None takes the one that the fit has monitored.

    Raises:
        ValueError: there is no validation image, or no such accuracy.
    """
    settings = settings_of_fit(checkpoint) or {}
    has_config = any(argument.partition("=")[0] == "--config" for argument in arguments)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        kept = {key: settings[key] for key in VALIDATION_KEYS if key in settings}
        file.write_text(yaml.safe_dump(kept), encoding="utf-8")
        config = [] if has_config else ["--config", str(file)]
        finished = main(["validate", *config, *arguments, "--ckpt_path", str(checkpoint)])
    known = {name: float(value) for name, value in finished.trainer.callback_metrics.items() if name.endswith("/acc1")}
    name = monitor or (settings.get("checkpoint") or {}).get("monitor")
    if name not in known:
        names = ", ".join(known) or "none, after setting data.holdout or data.val"
        raise ValueError(f"monitor must be an accuracy of the validation, got {name!r}; give one of {names}")
    return known[name]


def build_fit(arguments: Sequence[str]) -> tuple[RobustMethod, CLIPDataModule, int | None]:
    """Builds method and data of a ``fit``, and gives its number of epochs.

    Args:
        arguments: options as on the command line.

    Raises:
        ValueError: unreadable settings, or an error of the classes.
    """
    assembled = start(Assembled, ["fit", *arguments])
    return assembled.model, assembled.datamodule, assembled.settings.trainer.max_epochs


def settings_of_fit(checkpoint: Path) -> dict[str, Any] | None:
    """Reads the settings of ``robustclip fit`` in a checkpoint; None if a Python program has written it.

    Raises:
        ValueError: the file is no checkpoint, or its settings are no mapping.
    """
    settings: Any = check_checkpoint(checkpoint).get("settings")
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"checkpoint {checkpoint}: settings must be a mapping, got {str(settings)[:40]!r}")
    return settings


def plan(arguments: Sequence[str]) -> Plan:
    """Builds the objects of ``robustclip test`` as far as possible, and keeps errors for the report of `doctor`."""
    assembled = start(_Examined, ["test", *arguments])
    settings, failure = assembled.settings, assembled.failure
    results = settings.results.folder or Path(settings.trainer.default_root_dir or ".") / "results"
    planned = Plan(results=local_path(results, "results.folder"), ckpt_path=settings.get("ckpt_path"))
    if failure is not None:
        assembled = start(_Examined, ["test", *arguments, *STAND_IN])
        planned.failures["model" if assembled.failure is None else "settings"] = in_one_line(failure)
    if assembled.failure is not None:
        return planned
    planned.data = assembled.datamodule
    planned.evaluation = assembled.config_init[assembled.subcommand].evaluation
    with _kept(planned.failures, "trainer"):
        planned.trainer = RobustCLI.instantiate_trainer(assembled)
    if failure is None:
        planned.model = assembled.model
        with _kept(planned.failures, "checkpoint"):
            if planned.ckpt_path is not None:
                load_checkpoint(assembled.model, str(planned.ckpt_path))
    return planned


def load_checkpoint(model: RobustMethod, path: str) -> None:
    """Loads the weights of a checkpoint into a model, with the checks of a test.

    Args:
        model: method of the checkpoint.
        path: file of ``robustclip fit``.

    Raises:
        ValueError: the file is no checkpoint, or belongs to another model.
    """
    content = check_checkpoint(Path(path))
    model.on_load_checkpoint(content)
    model.load_state_dict(content["state_dict"], strict=False)


@contextmanager
def _kept(failures: dict[str, str], part: str) -> Iterator[None]:
    """Keeps an expected error of a part instead of raising it."""
    try:
        yield
    except EXPECTED_ERRORS as error:
        failures[part] = in_one_line(error)
