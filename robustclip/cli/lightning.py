"""Command line: Lightning's, with a data module, an evaluation section and results of our own."""

import errno
import inspect
import logging
import os
import pickle
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from torch.multiprocessing.spawn import ProcessRaisedException

from robustclip import __version__
from robustclip.attacks import Attack
from robustclip.cli.messages import AnsweringParser, parameters_below
from robustclip.cli.settings import (
    SECTIONS,
    SUFFIXES,
    check_keys,
    check_order,
    get,
    joined,
    options,
    parse,
    read_config,
)
from robustclip.data import CLIPDataModule, DataSource
from robustclip.evaluation import ResultsWriter, RobustEvaluation, TaskProgress
from robustclip.methods import RobustMethod
from robustclip.methods._shared.saved_state import read_checkpoint
from robustclip.training import ChanceLevelWarning, Checkpoints, Interruption
from robustclip.training.interruption import check_no_stray, check_same_run, preempted_checkpoint, run_identity

EXPECTED_ERRORS = (
    ArgumentError,
    ImportError,
    MisconfigurationException,
    OSError,
    pickle.UnpicklingError,
    ProcessRaisedException,
    ValueError,
)
# Mappings whose keys are the user's own, and lists of data sets: the type of an entry.
ENTRIES: dict[str, Any] = {
    "evaluation.attacks": Attack,
    "evaluation.fit_attacks": Attack,
    "results.averages": list[str],
}
SETS = list[DataSource | str]
ENTRIES |= {f"data.{role}": SETS for role in ("train", "val", "test", "unknown")}
ENTRIES |= {"trainer.callbacks": Callback, "trainer.callbacks+": Callback}
CSV_LOGGER = "lightning.pytorch.loggers.CSVLogger"
IN_ROOT = ""  # save_dir of a logger that follows trainer.default_root_dir
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Interface = TypeVar("Interface", bound="RobustCLI")


class Parser(AnsweringParser, LightningArgumentParser):
    """Lightning's, whose exits can be told from those of other code."""


class RobustCLI(LightningCLI):
    """``fit``, ``validate`` and ``test`` of any `RobustMethod` on the shared data module."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lists the commands of Lightning that exist here, each with the arguments that it does not offer."""
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
                "trainer.default_root_dir": "runs",
                "trainer.logger": {
                    "class_path": CSV_LOGGER,
                    "init_args": {"save_dir": IN_ROOT, "name": None},
                },
            }
        )
        parser.link_arguments("model.image_size", "data.init_args.image_size", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_data_seed)

    def _parse_ckpt_path(self) -> None:
        """Checks the checkpoint before anything is built; settings come from config and command line alone.

        Lightning 2.6 would let the hyper-parameters saved in the checkpoint replace both, silently, down to the class
        of the model.
        """
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in ("best", "last", "hpc") and "://" not in str(path):
            check_checkpoint(Path(path))

    def before_instantiate_classes(self) -> None:
        """Keeps the settings as they were given, and puts the logger's folder below ``default_root_dir``.

        Only a fit logs by default: a numbered folder for each test would be empty.
        """
        text = self.parser.dump(self.config, skip_none=False)
        self.given: dict[str, Any] = yaml.safe_load(text)[self.subcommand]
        trainer = self.config[self.subcommand].trainer
        place = trainer.get("logger.init_args.save_dir") if isinstance(trainer.logger, Namespace) else None
        if place == IN_ROOT and self.subcommand != "fit" and trainer.logger.class_path == CSV_LOGGER:
            trainer.logger = False
        elif place == IN_ROOT:
            trainer.logger.init_args.save_dir = trainer.default_root_dir or "."

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Leaves our progress bar out when no bar is wanted; Lightning would call that a contradiction.

        Raises:
            ValueError: settings that the trainer refuses, or a launcher that has started more processes than it uses.
        """
        settings = self._get(self.config_init, "trainer")
        if str(settings["devices"]) == str(settings["num_nodes"]) == "1":
            check_processes(1)  # before Lightning, which refuses some of SLURM's variables with another reason
        if self._get(self.config_init, "trainer")["enable_progress_bar"] is False:
            callbacks = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [each for each in callbacks if not isinstance(each, ProgressBar)]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (LookupError, MisconfigurationException, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"trainer: {error}") from error
        check_processes(trainer.world_size)
        return trainer

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ValueError(f"seed_everything: {error}") from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Checkpoints are data: no code in them runs, wherever they come from.

        torch's default can be turned off by a variable of the environment, and Lightning's is off for URLs.
        """
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def before_fit(self) -> None:
        """Hands the settings to the checkpoints."""
        self.model.run_settings = self.given

    def before_test(self) -> None:
        """Hands the settings to the result file."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ResultsWriter):
                callback.config = self.given

    def after_fit(self) -> None:
        """Says where the weights are."""
        checkpoint = self.trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "") or getattr(checkpoint, "last_model_path", "")
        if path and self.trainer.is_global_zero:
            sys.stdout.write(f"checkpoint: {path}\n")

    def fit(self, **kwargs: Any) -> None:
        """Trains; a requeued SLURM job starts from the checkpoint of its preemption, which is removed at the end.

        Raises:
            OSError: a file could not be written; a full disk names the folder of the logs where it names no file.
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
        args = joined(words)
        check_words(args)
    return interface(
        RobustMethod,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,  # the settings travel in checkpoints and results
        seed_everything_default=0,
        trainer_defaults={"callbacks": [TaskProgress(), ChanceLevelWarning(), Interruption()]},
        parser_kwargs={
            "prog": "robustclip",
            "version": __version__,
            **{name: {"exit_on_error": False} for name in ("fit", "validate", "test")},
            "exit_on_error": False,
            "allow_abbrev": False,  # a misspelt key could begin another one
        },
        parser_class=Parser,
        args=args,
    )


def check_words(words: list[str]) -> None:
    """Checks options and configurations before the parser does, whose messages leave out where a fault is.

    Args:
        words: of the command line.

    Raises:
        ValueError: a file that cannot be read, or a key, a class or an entry that is not valid.
    """
    check_order(words)
    keys = known_keys()
    for key, value in options(words):
        if key == "config" or (key in SECTIONS and value.endswith(SUFFIXES)):
            tree = read_config(Path(value))
        elif value.startswith(("{", "[")) or key.endswith(".init_args"):
            tree = parse(value, f"--{key}")
        else:
            continue
        for part in reversed(key.split(".") if key != "config" else []):
            tree = {part: tree}
        check_keys(tree, keys)
        for name, kind in ENTRIES.items():
            check_entries(name, get(tree, name.split(".")), kind)


def check_entries(key: str, entries: Any, kind: Any) -> None:
    """Checks a mapping or a list of mappings entry by entry, since the parser does not say which entry it refuses.

    Args:
        key: of the mapping or the list.
        entries: the mapping, or data sets; anything else is left to the parser.
        kind: type of an entry.

    Raises:
        ArgumentError: an entry of another type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--entry", type=kind, required=True)
    if kind is SETS:
        listed = entries if isinstance(entries, list) else [entries]
        named = [(key, [each]) for each in listed if isinstance(each, Mapping) and "class_path" not in each]
    else:
        listed = list(enumerate(entries)) if isinstance(entries, list) else []
        pairs = list(entries.items()) if isinstance(entries, Mapping) and "class_path" not in entries else listed
        named = [(f"{key}.{name}", each) for name, each in pairs]
    for name, value in named:
        try:
            parser.parse_object({"entry": value})
        except ArgumentError as error:
            text = str(error).replace('Parser key "entry"', f'Parser key "{name}"', 1)
            raise ArgumentError(None, text.replace("required: entry", f"required: {name}")) from error


def check_processes(world_size: int) -> None:
    """Refuses a run of one process that a launcher has started several times.

    Args:
        world_size: number of processes that the trainer uses.

    Raises:
        ValueError: each of the launcher's processes would train the same model alone, into one folder.
    """
    counts = {
        # All that follow torchrun's variables set RANK; Lightning's own launcher does not.
        "torchrun": os.environ.get("WORLD_SIZE", "") if "RANK" in os.environ else "",
        "srun": os.environ.get("SLURM_NTASKS", "") if SLURMEnvironment.detect() else "",
    }
    for launcher, count in counts.items():
        if count.isdecimal() and int(count) > 1 and world_size == 1:
            raise ValueError(
                f"{launcher} starts {count} processes, but trainer.devices and trainer.num_nodes make 1: each process"
                f" would run alone, all in one folder; set --trainer.devices {count} (per node, with"
                " --trainer.num_nodes), or start one process"
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
    below = [f"model.{name}" for name in parameters_below(("attack", "optimizer"))]
    return ["config", "ckpt_path", "seed_everything", "verbose", *sections, *wholes, *keys, *below]


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Opens a checkpoint as data; see `read_checkpoint`.

    Raises:
        ValueError: no such file, or as `read_checkpoint`.
    """
    if not path.is_file():
        raise ValueError(f"ckpt_path {str(path)!r} is no file; `robustclip fit` prints where it writes checkpoints")
    return read_checkpoint(path)


def _data_seed(seed: bool | int) -> int:
    """Seed of the data for a value of ``seed_everything``, which starts at 0 where Lightning chooses it."""
    return 0 if isinstance(seed, bool) else seed


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
