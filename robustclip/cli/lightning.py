"""Extends Lightning's command line by our data module, evaluation, results and checkpoints."""

import errno
import logging
import pickle
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from torch.multiprocessing.spawn import ProcessRaisedException

from robustclip import __version__
from robustclip.attacks import Attack
from robustclip.cli.checks import CSV_LOGGER, SHARES, check_arguments, tree_of
from robustclip.cli.memory import keep_freed_memory
from robustclip.cli.run_parser import DESCRIPTIONS, Parser
from robustclip.cli.settings import get, joined, located, options
from robustclip.cli.values import check_value
from robustclip.data import DataSource
from robustclip.evaluation import ProgressLines, ResultsWriter, RobustEvaluation, TaskProgress
from robustclip.methods import RobustMethod
from robustclip.methods._shared.saved_state import read_checkpoint
from robustclip.training import ChanceLevelWarning, Checkpoints, ConnectedProcesses, Interruption
from robustclip.training.interruption import check_no_stray, check_same_run, preempted_checkpoint, run_identity
from robustclip.training.processes import check_processes, check_strategy, report_process

EXPECTED_ERRORS = (
    ArgumentError,
    ImportError,
    MisconfigurationException,
    OSError,
    pickle.UnpicklingError,
    ProcessRaisedException,
    ValueError,
)
# Type of an entry in mappings with free keys and in lists.
ENTRIES: dict[str, Any] = {
    "evaluation.attacks": Attack,
    "evaluation.fit_attacks": Attack,
    "results.averages": list[str],
}
SETS = list[DataSource | str]
ENTRIES |= {f"data.{role}": SETS for role in ("train", "val", "test", "unknown")}
ENTRIES |= {"trainer.callbacks": Callback, "trainer.callbacks+": Callback}
IN_ROOT = ""  # save_dir of a logger that follows trainer.default_root_dir
MOST_PROCESSES = 100_000
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Interface = TypeVar("Interface", bound="RobustCLI")


class RobustCLI(LightningCLI):
    """``fit``, ``validate`` and ``test`` of any `RobustMethod` on the shared data module."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Maps the commands that we take from Lightning to the arguments that they do not offer."""
        offered = LightningCLI.subcommands()
        return {name: offered[name] | {"weights_only"} for name in DESCRIPTIONS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the sections that every run has, and gives the data the model's image size."""
        parser.add_lightning_class_args(RobustEvaluation, "evaluation")
        parser.add_lightning_class_args(ResultsWriter, "results")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "data": {"class_path": "robustclip.data.CLIPDataModule"},
                "trainer.default_root_dir": "runs",
                "trainer.logger": {
                    "class_path": CSV_LOGGER,
                    "init_args": {"save_dir": IN_ROOT, "name": None},
                },
            }
        )
        parser.link_arguments("model.image_size", "data.init_args.image_size", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_data_seed)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Adds the options by which several machines share a test."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":
            for name, default, text in SHARES:
                parser.add_argument(f"--{name}", type=int, default=default, help=text)
                parser.link_arguments(name, f"results.{name}")
        return parser

    def _parse_ckpt_path(self) -> None:
        """Checks the checkpoint before anything is built, and takes no settings from it.

        Lightning 2.6 would silently replace config and command line, even the class of the model, by the
        hyper-parameters in the checkpoint.
        """
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in ("best", "last", "hpc") and "://" not in str(path):
            check_checkpoint(Path(path))

    def before_instantiate_classes(self) -> None:
        """Keeps the settings as parsed, and puts the logger's folder below ``default_root_dir``.

        Only a fit logs by default, since the numbered folder of a test would be empty.
        """
        text = self.parser.dump(self.config, skip_none=False)
        self.run_settings: dict[str, Any] = yaml.safe_load(text)[self.subcommand]
        trainer = self.config[self.subcommand].trainer
        place = trainer.get("logger.init_args.save_dir") if isinstance(trainer.logger, Namespace) else None
        if place == IN_ROOT and self.subcommand != "fit" and trainer.logger.class_path == CSV_LOGGER:
            trainer.logger = False
        elif place == IN_ROOT:
            trainer.logger.init_args.save_dir = trainer.default_root_dir or "."

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Removes our progress displays if progress bars are off, since Lightning would refuse the contradiction.

        Raises:
            ValueError: the trainer refuses its settings, or a launcher has started another number of processes.
        """
        settings = self._get(self.config_init, "trainer")
        check_strategy(settings["strategy"])
        devices, nodes = str(settings["devices"]), str(settings["num_nodes"])
        for name, number in (("devices", devices), ("num_nodes", nodes)):
            if number.isdecimal() and int(number) > MOST_PROCESSES:
                raise ValueError(f"trainer.{name} must be at most {MOST_PROCESSES:,}, got {number}")
        if devices.isdecimal() and nodes.isdecimal():
            # Before Lightning, which refuses some variables of SLURM with another reason.
            check_processes(int(devices), int(nodes))
        if settings["enable_progress_bar"] is False:
            defaults, bars = self.trainer_defaults, (ProgressBar, ProgressLines)
            defaults["callbacks"] = [call for call in defaults["callbacks"] if not isinstance(call, bars)]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (LookupError, MisconfigurationException, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"trainer: {error}") from error
        check_processes(trainer.num_devices, trainer.num_nodes)
        return trainer

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ValueError(f"seed_everything: {error}") from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Reads checkpoints as data, so that no code in them runs, whatever their source.

        An environment variable can turn torch's default off, and Lightning's default is off for URLs.
        """
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def before_fit(self) -> None:
        """Passes the settings to the checkpoints."""
        self.model.run_settings = self.run_settings

    def before_test(self) -> None:
        """Passes the settings to the result file."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ResultsWriter):
                callback.config = self.run_settings

    def after_fit(self) -> None:
        """Prints the path of the weights."""
        checkpoint = self.trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "") or getattr(checkpoint, "last_model_path", "")
        if path and self.trainer.is_global_zero:
            sys.stdout.write(f"checkpoint: {path}\n")

    def fit(self, **kwargs: Any) -> None:
        """Trains the model; a requeued SLURM job resumes from its preemption and removes that file at the end.

        Raises:
            OSError: a file cannot be written; if the system names none, the error names the folder of the logs.
        """
        preempted = preempted_checkpoint(self.trainer)
        is_requeued = preempted is not None and preempted.exists()
        if preempted is not None and is_requeued:
            check_same_run(preempted, run_identity(self.model, self.datamodule))
            kwargs["ckpt_path"] = str(preempted)
        self._check_start(kwargs)
        try:
            self.trainer.fit(**kwargs)
        except OSError as error:
            if error.filename is not None or error.errno not in NO_SPACE:
                raise
            raise OSError(error.errno, error.strerror, self.trainer.log_dir) from error
        if preempted is not None and is_requeued and self.trainer.is_global_zero:
            preempted.unlink(missing_ok=True)

    def validate(self, **kwargs: Any) -> None:
        """Evaluates the model; Lightning never chooses the checkpoint."""
        self._check_start(kwargs)
        self.trainer.validate(**kwargs)

    def _check_start(self, kwargs: dict[str, Any]) -> None:
        """Refuses checkpoints that Lightning would load unasked, and reports this process before it waits."""
        report_process(self.trainer)
        if kwargs.get("ckpt_path") is None:
            check_no_stray(Path(self.trainer.default_root_dir))

    def test(self, **kwargs: Any) -> None:
        """Tests the model; `ResultsWriter` prints the table."""
        self._check_start(kwargs)
        self.trainer.test(**{**kwargs, "verbose": False})


def main(args: ArgsType = None) -> RobustCLI:
    """Runs ``fit``, ``validate`` or ``test`` with arguments as on the command line, without the program's name."""
    return start(RobustCLI, args)


def start(interface: type[Interface], args: ArgsType = None) -> Interface:
    """Parses the arguments, builds the objects and runs the command.

    Args:
        interface: `RobustCLI`, or a subclass that does less with the objects.
        args: arguments as on the command line, without the program's name; None takes the program's own.

    Raises:
        ValueError: an unreadable configuration, or an error of the classes.
    """
    _quieten()
    keep_freed_memory()
    sys.path.insert(0, str(Path.cwd()))  # so that `--model my_module.MyMethod` finds a local file
    arguments = sys.argv[1:] if args is None else args
    if isinstance(arguments, list):
        args = joined(located(arguments))
        check_arguments(args)
        check_all_entries(args)
    callbacks = (ConnectedProcesses(), ChanceLevelWarning(), Interruption())
    return interface(
        RobustMethod,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,  # checkpoints and results hold the settings
        seed_everything_default=0,
        trainer_defaults={"callbacks": [TaskProgress(), ProgressLines(), *callbacks]},
        parser_kwargs={
            "prog": "robustclip",
            "version": __version__,
            **{name: {"exit_on_error": False, "description": text} for name, text in DESCRIPTIONS.items()},
            "exit_on_error": False,
            "allow_abbrev": False,  # a misspelt key could begin another one
        },
        parser_class=Parser,
        args=args,
    )


def check_all_entries(arguments: list[str]) -> None:
    """Checks the entries of mappings and lists, see `check_entries`.

    Args:
        arguments: arguments of the command line.
    """
    trees = (tree_of(key, value) for key, value in options(arguments))
    for tree in filter(None, trees):
        for name, kind in ENTRIES.items():
            check_entries(name, get(tree, name.split(".")), kind)


def check_entries(key: str, entries: Any, kind: Any) -> None:
    """Checks a mapping or a list entry by entry, since the parser does not report which entry it refuses.

    Args:
        key: dotted key of the mapping or the list.
        entries: mapping or list; other values are left to the parser.
        kind: type of an entry.

    Raises:
        ArgumentError: an entry has another type.
    """
    if kind is SETS:
        listed = entries if isinstance(entries, list) else [entries]
        named = [(key, [entry]) for entry in listed if isinstance(entry, Mapping) and "class_path" not in entry]
    else:
        listed = list(enumerate(entries)) if isinstance(entries, list) else []
        pairs = list(entries.items()) if isinstance(entries, Mapping) and "class_path" not in entries else listed
        named = [(f"{key}.{name}", entry) for name, entry in pairs]
    for name, value in named:
        check_value(name, value, kind)


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Opens a checkpoint as data, see `read_checkpoint`.

    Raises:
        ValueError: no such file, or as `read_checkpoint`.
    """
    if not path.is_file():
        raise ValueError(f"ckpt_path {str(path)!r} is no file; `robustclip fit` prints where it writes checkpoints")
    return read_checkpoint(path)


def _data_seed(seed: bool | int) -> int:
    """Gives the seed of the data for a value of ``seed_everything``; 0 where Lightning chooses one."""
    return 0 if isinstance(seed, bool) else seed


def _quieten() -> None:
    """Silences Lightning's notes, advertisements and deprecations; warnings and errors stay."""
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
