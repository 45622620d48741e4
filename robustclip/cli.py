"""Command line: Lightning's, with a data module, an evaluation section and results of our own."""

import inspect
import logging
import pickle
import sys
import warnings
from argparse import ArgumentError
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from torch.multiprocessing.spawn import ProcessRaisedException

from robustclip import __version__
from robustclip.callbacks import (
    ChanceLevelWarning,
    Checkpoints,
    Interruption,
    ResultsWriter,
    RobustEvaluation,
    TaskProgress,
)
from robustclip.callbacks.interruption import check_no_stray, check_same_run, preempted_checkpoint, run_identity
from robustclip.data import CLIPDataModule
from robustclip.methods import RobustMethod

EXPECTED_ERRORS = (
    ArgumentError,
    ImportError,
    MisconfigurationException,
    OSError,
    pickle.UnpicklingError,
    ProcessRaisedException,
    ValueError,
)
Interface = TypeVar("Interface", bound="RobustCLI")


class RobustCLI(LightningCLI):
    """``fit``, ``validate`` and ``test`` of any `RobustMethod` on the shared data module."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What Lightning offers, less what makes no sense here; `weights_only` is not for choice."""
        offered = LightningCLI.subcommands()
        return {name: offered[name] | {"weights_only"} for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the sections that every run has, and gives the data the model's image size."""
        parser.add_lightning_class_args(RobustEvaluation, "evaluation")
        parser.add_lightning_class_args(ResultsWriter, "results")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "data": {"class_path": "robustclip.data.CLIPDataModule"},
                "trainer.logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": "runs", "name": None},
                },
            }
        )
        parser.link_arguments("model.image_size", "data.init_args.image_size", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Checks the checkpoint before anything is built; settings come from config and command line alone.

        Lightning 2.6 would let the hyper-parameters saved in the checkpoint replace both, silently, down to the class
        of the model.
        """
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in ("best", "last", "hpc") and "://" not in str(path):
            check_checkpoint(Path(path))

    def before_instantiate_classes(self) -> None:
        """Keeps the settings of ``fit`` and ``test`` in files of their own."""
        self.save_config_kwargs = {"config_filename": f"{self.subcommand}.yaml", "overwrite": True}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Leaves our progress bar out when no bar is wanted; Lightning would call that a contradiction."""
        if self._get(self.config_init, "trainer")["enable_progress_bar"] is False:
            callbacks = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [each for each in callbacks if not isinstance(each, ProgressBar)]
        return super().instantiate_trainer(**kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Checkpoints are data: no code in them runs, wherever they come from.

        torch's default can be turned off by a variable of the environment, and Lightning's is off for URLs.
        """
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def before_test(self) -> None:
        """Hands the settings to the result file."""
        text = self.parser.dump(self.config, skip_none=False)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ResultsWriter):
                callback.config = yaml.safe_load(text)[self.subcommand]

    def after_fit(self) -> None:
        """Says where the weights are."""
        checkpoint = self.trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "") or getattr(checkpoint, "last_model_path", "")
        if path and self.trainer.is_global_zero:
            sys.stdout.write(f"checkpoint: {path}\n")

    def fit(self, **kwargs: Any) -> None:
        """Starts a requeued SLURM job from the checkpoint of its preemption, which is removed at the end."""
        preempted = preempted_checkpoint(self.trainer)
        is_requeued = preempted is not None and preempted.exists()
        if preempted is not None and is_requeued:
            check_same_run(preempted, run_identity(self.model, self.datamodule))
            kwargs["ckpt_path"] = str(preempted)
        self._check_start(kwargs)
        self.trainer.fit(**kwargs)
        if preempted is not None and is_requeued and self.trainer.is_global_zero:
            preempted.unlink(missing_ok=True)

    def validate(self, **kwargs: Any) -> None:
        """Leaves no choice of a checkpoint to Lightning."""
        self._check_start(kwargs)
        self.trainer.validate(**kwargs)

    def _check_start(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("ckpt_path") is None:
            check_no_stray(Path(self.trainer.default_root_dir))

    def test(self, **kwargs: Any) -> None:
        """Leaves the table to `ResultsWriter`."""
        self._check_start(kwargs)
        self.trainer.test(**{**kwargs, "verbose": False})


def main(args: ArgsType = None) -> RobustCLI:
    """Runs ``fit``, ``validate`` or ``test``; ``args`` as on the command line, without the program's name."""
    return start(RobustCLI, args)


def start(interface: type[Interface], args: ArgsType = None) -> Interface:
    """Parses, builds and runs.

    Args:
        interface: may do less than a `RobustCLI` with what was built.
        args: as on the command line, without the program's name; None takes the program's own.

    Raises:
        ValueError: a configuration that cannot be read, and whatever the classes refuse.
    """
    _quieten()
    sys.path.insert(0, str(Path.cwd()))  # so that `--model my_module.MyMethod` finds a local file
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list):
        for word, following in pairwise([*words, ""]):
            if word == "--config" or word.startswith("--config="):
                check_config(Path(word.removeprefix("--config=") if "=" in word else following))
    return interface(
        RobustMethod,
        CLIPDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        trainer_defaults={"callbacks": [TaskProgress(), ChanceLevelWarning(), Interruption()]},
        parser_kwargs={
            "prog": "robustclip",
            "version": __version__,
            **{name: {"exit_on_error": False} for name in ("fit", "validate", "test")},
            "exit_on_error": False,
        },
        args=args,
    )


def known_keys() -> list[str]:
    """Dotted keys that a configuration may have, but for the options of the chosen classes."""
    sections = {
        "trainer": Trainer,
        "data": CLIPDataModule,
        "model": RobustMethod,
        "evaluation": RobustEvaluation,
        "results": ResultsWriter,
        "checkpoint": Checkpoints,
    }
    names = {section: list(inspect.signature(cls).parameters) for section, cls in sections.items()}
    keys = [f"{section}.{name}" for section in names for name in names[section]]
    wholes = [f"{section}{part}" for section in ("model", "data") for part in (".class_path", ".init_args")]
    return ["config", "ckpt_path", "seed_everything", *sections, *wholes, *keys]


def check_config(path: Path) -> None:
    """Tells which of several files is broken; the parser does not.

    Raises:
        ValueError: no such file, or no mapping in YAML.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:
        mark = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"config {path} is no YAML: {error.problem}{mark}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config {str(path)!r} cannot be read: {error}; --config takes a YAML file") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {path} must hold `key: value` lines in YAML, got {str(content)[:40]!r}")


def check_checkpoint(path: Path) -> None:
    """Opens a checkpoint as data, which runs no code that may be in it.

    Raises:
        ValueError: no such file, not complete, more in it than tensors and plain values, or of another program.
    """
    if not path.is_file():
        raise ValueError(f"ckpt_path {str(path)!r} is no file; `robustclip fit` prints where it writes checkpoints")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path} may hold code, so it was not opened; only tensors and plain values load,"
            " which is all that `robustclip fit` writes"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:  # torch's for files that end early or are no zip
        raise ValueError(f"checkpoint {path} is cut short or no checkpoint at all; copy it again") from error
    if not isinstance(content, dict) or not {"state_dict", "base_model"} <= content.keys():
        raise ValueError(f"checkpoint {path} was not written by robustclip: it names no base model")


def _quieten() -> None:
    """Leaves warnings and errors of Lightning's log, less advertisements and deprecations of its own."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")
    for message in (
        "litlogger",
        "LightningCLI's args parameter",
        "does not have many workers",
        "smaller than the logging",
        "eval mode at the start",
        "dirpath has changed",
        "across ranks is zero",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
