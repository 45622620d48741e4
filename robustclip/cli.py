"""Command line: Lightning's, with a data module, an evaluation section and results of our own."""

import logging
import pickle
import sys
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from torch.multiprocessing.spawn import ProcessRaisedException

from robustclip import __version__
from robustclip.callbacks import ChanceLevelWarning, ResultsWriter, RobustEvaluation, TaskProgress
from robustclip.data import CLIPDataModule
from robustclip.methods import RobustMethod
from robustclip.tools.table import table

TOOLS = {"table": table}
EXPECTED_ERRORS = (
    ArgumentError,
    ImportError,
    MisconfigurationException,
    OSError,
    pickle.UnpicklingError,
    ProcessRaisedException,
    ValueError,
)


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
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
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
        """Weights come from the checkpoint, settings from config and command line.

        Lightning 2.6 would let the hyper-parameters saved in the checkpoint replace both, silently, down to the class
        of the model.
        """

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

    def test(self, **kwargs: Any) -> None:
        """Leaves the table to `ResultsWriter`."""
        self.trainer.test(**{**kwargs, "verbose": False})


def main(args: ArgsType = None) -> Any:
    """Runs a command; ``args`` as on the command line, without the program's name."""
    _quieten()
    sys.path.insert(0, str(Path.cwd()))  # so that `--model my_module.MyMethod` finds a local file
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list) and words and words[0] in TOOLS:
        return auto_cli(TOOLS[words[0]], args=words[1:], prog=f"robustclip {words[0]}", exit_on_error=False)
    return RobustCLI(
        RobustMethod,
        CLIPDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        trainer_defaults={"callbacks": [TaskProgress(), ChanceLevelWarning()]},
        parser_kwargs={
            "prog": "robustclip",
            "version": __version__,
            **{name: {"exit_on_error": False} for name in ("fit", "validate", "test")},
            "exit_on_error": False,
        },
        args=args,
    )


def _quieten() -> None:
    """Drops Lightning's advertisements and its own deprecations, which no user can act on."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch\.utilities\._pytree")
    for message in ("litlogger", "does not have many workers", "smaller than the logging", "eval mode at the start"):
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def in_one_line(error: BaseException) -> str:
    """What a person needs of an exception's message."""
    lines = [line.strip(" \t-") for line in str(error).splitlines()]
    lines = [line for line in lines if line]
    return " ".join(lines) or type(error).__name__
