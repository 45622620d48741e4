"""Builds what a run would build, and runs nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from lightning.pytorch import Trainer

from robustclip.cli.lightning import EXPECTED_ERRORS, RobustCLI, check_checkpoint, start
from robustclip.cli.messages import in_one_line
from robustclip.data import CLIPDataModule
from robustclip.methods import RobustMethod
from robustclip.paths import local_path
from robustclip.tools.doctor import Plan

# Settings of a run that make its method; the seed decides where there are no pre-trained weights.
OF_THE_METHOD = ("seed_everything", "model", "ckpt_path")
# What stands in for a model that does not load, so that the data can still be looked at.
STAND_IN = ("--model=ZeroShot", "--model.arch=null", "--model.pretrained=shapes", "--model.image_size=null")


class Assembled(RobustCLI):
    """What ``fit`` or ``test`` would build, but for the trainer: the run's machine may be another one."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that nothing is run with."""
        return Trainer(accelerator="cpu", devices=1, barebones=True)

    def wanted_trainer(self) -> Trainer:
        """The trainer of the configuration."""
        return super().instantiate_trainer()

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    @property
    def settings(self) -> Any:
        """The configuration as parsed."""
        return self.config[self.subcommand]


class _Examined(Assembled):
    """Keeps what the classes refuse for a report."""

    failure: Exception | None = None

    def instantiate_classes(self) -> None:
        """Builds what can be built."""
        try:
            super().instantiate_classes()
        except EXPECTED_ERRORS as error:
            self.failure = error

    def _parse_ckpt_path(self) -> None:
        """Leaves the checkpoint to `plan`, which goes on where it is bad."""


def build(config: Mapping[str, Any]) -> RobustMethod:
    """The method of a finished run, with its trained weights, in eval mode.

    Args:
        config: of the run's result.

    Raises:
        ValueError: the configuration does not build here, or its checkpoint is not there or does not belong to it.
    """
    return _method(config, [])


def rebuild(config: Mapping[str, Any], words: Sequence[str]) -> RobustMethod:
    """The same with other options, and without the run's checkpoint.

    Args:
        config: of the run's result.
        words: options as on the command line, which go before ``config``.

    Raises:
        ValueError: as `build`.
    """
    return _method({key: value for key, value in config.items() if key != "ckpt_path"}, words)


def build_for(checkpoint: Path, words: Sequence[str]) -> RobustMethod:
    """The method that a checkpoint belongs to, with the weights that it started from.

    Args:
        checkpoint: of ``robustclip fit``.
        words: options as on the command line; without ``--config``, the settings in the checkpoint hold.

    Raises:
        ValueError: no settings, or as `build`.
    """
    if any(word.partition("=")[0] == "--config" for word in words):
        return rebuild({}, words)
    settings = settings_of_fit(checkpoint)
    if settings is None:
        raise ValueError(
            f"checkpoint {checkpoint} holds no settings, since it was not written by the command `robustclip fit`;"
            " give the --config of its method, with model and seed_everything"
        )
    return rebuild(settings, words)


def build_fit(words: Sequence[str]) -> tuple[RobustMethod, CLIPDataModule, int | None]:
    """Method, data and number of epochs of a ``fit``.

    Args:
        words: options as on the command line.

    Raises:
        ValueError: settings that cannot be read, and whatever the classes refuse.
    """
    assembled = start(Assembled, ["fit", *words])
    return assembled.model, assembled.datamodule, assembled.settings.trainer.max_epochs


def settings_of_fit(checkpoint: Path) -> dict[str, Any] | None:
    """Settings of ``robustclip fit`` in a checkpoint; None in one that a Python program has written.

    Raises:
        ValueError: it is no checkpoint, or its settings are no mapping.
    """
    settings: Any = check_checkpoint(checkpoint).get("settings")
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"checkpoint {checkpoint}: settings must be a mapping, got {str(settings)[:40]!r}")
    return settings


def plan(words: Sequence[str]) -> Plan:
    """Builds what ``robustclip test`` with these options would, as far as it goes; refusals are kept, not raised."""
    assembled = start(_Examined, ["test", *words])
    settings = assembled.settings
    results = settings.results.folder or Path(settings.trainer.default_root_dir or ".") / "results"
    found = Plan(results=local_path(results, "results.folder"), ckpt_path=settings.get("ckpt_path"))
    is_stand_in = assembled.failure is not None
    if assembled.failure is not None:
        why = in_one_line(assembled.failure)
        assembled = start(_Examined, ["test", *words, *STAND_IN])
        found.failures["model" if assembled.failure is None else "settings"] = why
    if assembled.failure is not None:
        return found
    found.data = assembled.datamodule
    found.evaluation = assembled.config_init[assembled.subcommand].evaluation
    try:
        found.trainer = assembled.wanted_trainer()
    except EXPECTED_ERRORS as error:
        found.failures["trainer"] = in_one_line(error)
    if is_stand_in:
        return found
    found.model = assembled.model
    try:
        if found.ckpt_path is not None:
            load_checkpoint(assembled.model, str(found.ckpt_path))
    except EXPECTED_ERRORS as error:
        found.failures["checkpoint"] = in_one_line(error)
    return found


def load_checkpoint(model: RobustMethod, path: str) -> None:
    """Puts a checkpoint's weights into a model, with the checks of a test.

    Raises:
        ValueError: not a file of ``robustclip fit``, or of another model.
    """
    content = check_checkpoint(Path(path))
    model.on_load_checkpoint(content)
    model.load_state_dict(content["state_dict"], strict=False)


def _method(config: Mapping[str, Any], words: Sequence[str]) -> RobustMethod:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump({key: config[key] for key in OF_THE_METHOD if key in config}), encoding="utf-8")
        assembled = start(Assembled, ["test", "--config", str(file), *words])
    model: RobustMethod = assembled.model
    if assembled.settings.get("ckpt_path"):
        load_checkpoint(model, str(assembled.settings.ckpt_path))
    return model.eval()
