"""The writer of a test's folder, which stays marked as unfinished until it is complete and is never overwritten."""

import itertools
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from robustclip import persistence
from robustclip.arguments import Count, CountOrZero, checked
from robustclip.evaluation.grading import checks_at
from robustclip.evaluation.identity import unlike, words
from robustclip.evaluation.journal import Journal, Members, keep_examples
from robustclip.evaluation.progress import TaskProgress
from robustclip.evaluation.result_display import print_result
from robustclip.evaluation.sections import audited, stored_members
from robustclip.evaluation.shards import check_sections
from robustclip.methods import RobustMethod
from robustclip.models.clip import fingerprint
from robustclip.paths import local_path
from robustclip.results import ledger
from robustclip.results.corruption_error import CORRUPTIONS
from robustclip.results.corruption_summary import copies, corrupted
from robustclip.results.ledger import Tidy
from robustclip.results.protocol import digest
from robustclip.results.provenance import commit, versions
from robustclip.results.run import EXAMPLES, FACTS, LEDGERS, PARTS, PROTOCOL, RESULT, SHARD, Run
from robustclip.results.summary import Record, Summarise, finite, summarise, write_result
from robustclip.results.tables import check_averages
from robustclip.textfiles import read_text
from robustclip.types import Share, data_of

LOCK = "lock"


@dataclass
class Section:
    """A part of a result; a callback adds it to ``sections`` of the writer in its ``setup``.

    Attributes:
        summarise: function from the record of the test to the value of the section in ``result.json``.
        tables: ledgers of the section: name to columns, of which the first is ``id``.
        settings: settings that change the rows; a test with other settings does not resume.
        facts: further input of the function, in JSON's types; it may be set until the test ends.
        tidy: function from the rows of a finished ledger to the rows to keep; None keeps all.
    """

    summarise: Summarise
    tables: Mapping[str, Sequence[str]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    tidy: Tidy | None = None

    def open(self, trainer: Trainer) -> Journal:
        """Returns the ledgers of the running test, or new ones in memory if no result is written."""
        writer = writer_of(trainer) if trainer.testing else None
        journal = Journal(trainer, self.tables) if writer is None else writer.journal
        if journal is None:
            raise ValueError("ResultsWriter needs a RobustEvaluation beside it, whose settings identify the test")
        return journal

    def summary(self, name: str, journal: Journal) -> Any:
        """Computes the section from the rows so far; all processes call it.

        Args:
            name: name of the section.
            journal: ledgers with the tables of the section.
        """
        facts = {"sections": {name: {**self.settings, **self.facts}}}
        return self.summarise(Record(facts, {table: journal.rows(table) for table in self.tables}))


@checked
class ResultsWriter(Callback):
    """Writes the results of a test into a folder, and prints a table and the folder's path.

    The folder holds ``result.json``, the table as CSV and Markdown, the ledgers, and adversarial examples. A test that
    was killed resumes in its folder when it is started again.

    Args:
        folder: parent of the folders of all tests; null for ``results`` in the trainer's ``default_root_dir``.
        name: name of this test's folder; null takes method and time, and resumes an unfinished start of the same test.
        baseline: folder of a test of the base model before training, under the same protocol; by it the audit checks
            that the attacks are strong enough.
        is_undefended: whether the tested model has no defence and so is its own baseline.
        averages: name to the tasks of a further unweighted mean.
        config: settings of the run, stored with the result.
        checks: class paths of your own audit checks, see `AuditCheck`.
        shard: number of the part of the samples that this test evaluates, from 0.
        shards: number of parts; `robustclip merge` joins their folders to one result.

    Raises:
        ValueError: before the test starts, if an average has no task, an unknown task or a name in use, or if the
            baseline has other weights.

    Examples:
        >>> from pathlib import Path
        >>> from lightning.pytorch import Trainer
        >>> from robustclip import CLIPDataModule, ResultsWriter, RobustEvaluation, ZeroShot
        >>> callbacks = [RobustEvaluation({}, max_samples=8), ResultsWriter("results", "clean")]
        >>> trainer = Trainer(accelerator="cpu", callbacks=callbacks, logger=False, enable_progress_bar=False)
        >>> _ = trainer.test(ZeroShot(), CLIPDataModule(test="shapes:colours", image_size=32), verbose=False)
        ZeroShot: top-1 accuracy in percent...
        >>> Path("results/clean/result.json").is_file()
        True
    """

    def __init__(
        self,
        folder: str | None = None,
        name: str | None = None,
        baseline: str | None = None,
        is_undefended: bool = False,
        averages: dict[str, list[str]] | None = None,
        config: dict[str, Any] | None = None,
        checks: list[str] | None = None,
        shard: CountOrZero = 0,
        shards: Count = 1,
    ) -> None:
        self.folder, self.name, self.averages, self.config = folder, name, averages or {}, config
        if folder is not None:
            local_path(folder, "results.folder")
        if name and (Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts):
            raise ValueError(f"results.name must be a folder below results.folder, got {name!r}; write a name like 'a'")
        self.is_undefended = is_undefended
        self.baseline = None if baseline is None else Run.open(local_path(baseline, "results.baseline"))
        self.checks = list(checks or ())
        checks_at(self.checks)  # refuses class paths that are no checks
        if shard >= shards:
            raise ValueError(f"shard must be in [0, {shards}), got {shard}; shards are numbered from 0")
        self.share = None if shards == 1 else Share(shard, shards)
        self.path: Path | None = None
        self.sections: dict[str, Section] = {}  # added by other callbacks, by their names in the result
        self.outputs: set[str] = set()  # names of logged metrics that are computed from the ledgers
        self.bad_samples: dict[str, int] = {}  # number of images that did not decode, by task
        self.journal: Journal | None = None
        self._result: dict[str, Any] = {}
        self._identity: dict[str, Any] = {}
        self._members: Members = {}
        self._lock: IO[str] | None = None
        self._is_published = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses averages over unknown tasks, and a baseline of another model."""
        if stage == "test":
            self.path, self.journal, self.outputs, self.bad_samples = None, None, set(), {}
            self._is_published = False
            tasks = [task.name for task in data_of(trainer).test_tasks]
            check_averages(self.averages, tasks)
            if self.is_undefended and getattr(pl_module, "defence", None) is not None:
                raise ValueError("results.is_undefended must be false for a method with model.defence")
            if self.baseline is not None and isinstance(pl_module, RobustMethod):
                _check_baseline(self.baseline, _base_of(pl_module))

    @property
    def opened(self) -> Path:
        """Returns the folder of the running test.

        Raises:
            ValueError: no callback has opened it.
        """
        if self.path is None:
            raise ValueError("ResultsWriter needs a RobustEvaluation beside it, whose settings identify the test")
        return self.path

    def begin(self, trainer: Trainer, identity: dict[str, Any], members: Members) -> Journal:
        """Opens the folder of a test, new or of an earlier start; all processes must call it.

        Args:
            trainer: trainer of the test.
            identity: values that are equal for all starts of one test, and differ for different tests.
            members: task and attack to the members of the attack.

        Raises:
            ValueError: a finished test, or an unfinished one of another protocol, has this name.
        """
        identity |= {"sections": {name: section.settings for name, section in self.sections.items()}}
        if self.share is not None:
            check_sections(self.sections)
            identity[SHARD] = {"number": self.share.number, "count": self.share.count}
        root = Path(self.folder or local_path(trainer.default_root_dir, "trainer.default_root_dir") / "results")
        unfinished = f"unfinished-{identity['method'].lower()}-{digest(identity)[:8]}"
        name = f"{self.name}{self._suffix}" if self.name else unfinished
        self.path, self._identity, self._members = root / name, identity, members
        if trainer.is_global_zero:
            self._check_unfinished(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            refusal = f"{self.path} is being written by another process; wait for it, or stop it"
            self._lock = persistence.lock(self.path / LOCK, refusal)
            self._check_unfinished(self.path)  # again, since the other process may just have finished it
            self._check_protocol(self.path / PROTOCOL, identity)
            (self.path / PARTS).mkdir(parents=True, exist_ok=True)
            for place in (self.path, self.path / LEDGERS, self.path / PARTS, *self.path.glob(f"{EXAMPLES}/*/*")):
                persistence.sweep(place)
            persistence.atomic_write(self.path / PROTOCOL, json.dumps(identity, indent=1))
        trainer.strategy.barrier("the folder exists")
        attacks = list(dict.fromkeys(attack for _, attack in members))
        header = ledger.columns(attacks, is_defended="defence" in identity)
        headers = dict.fromkeys(dict.fromkeys(identity["protocol"]), header) | self._tables
        if trainer.is_global_zero:
            for name, columns in headers.items():
                for part in (self.path / PARTS).glob(f"{name}.*.csv"):
                    ledger.Ledger(part, columns)  # removes a half-written batch, also from parts of further processes
        trainer.strategy.barrier("ledgers are whole")
        self.journal = Journal(trainer, headers, self.path)
        return self.journal

    @property
    def _suffix(self) -> str:
        """End of the folder's name that distinguishes the shards of a test."""
        return "" if self.share is None else f"-shard-{self.share.number}-of-{self.share.count}"

    @property
    def _tables(self) -> dict[str, Sequence[str]]:
        return {name: columns for section in self.sections.values() for name, columns in section.tables.items()}

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Joins the ledgers, computes the result from them unless they are of a shard, and publishes the folder."""
        trainer.strategy.barrier("ledgers are complete")
        path, journal = self.opened, self.journal
        if not trainer.is_global_zero or not isinstance(pl_module, RobustMethod) or journal is None:
            return
        tidy = {name: section.tidy for section in self.sections.values() if section.tidy for name in section.tables}
        rows, facts = journal.merge(tidy), self._facts(trainer, pl_module)
        persistence.atomic_write(path / FACTS, json.dumps(facts, indent=1) + "\n")
        functions = {name: section.summarise for name, section in self.sections.items()} | {"audit": audited}
        functions |= {CORRUPTIONS: corrupted} if CORRUPTIONS in facts["sections"] else {}
        self._result = summarise(Record(facts, rows), functions) if self.share is None else {}
        for task, attack in self._members:
            keep_examples(path / EXAMPLES / task / attack, rows[task], attack, facts["save_examples"])
        self._publish(path)

    def _facts(self, trainer: Trainer, method: RobustMethod) -> dict[str, Any]:
        """Collects the content of ``facts.json``: the values that the result needs beside the ledgers."""
        metrics = {name: finite(float(value)) for name, value in trainer.callback_metrics.items()}
        tasks = data_of(trainer).test_tasks
        further: dict[str, Any] = {CORRUPTIONS: {}} if copies(self._identity["protocol"]) else {}
        of_sections = {name: {**section.settings, **section.facts} for name, section in self.sections.items()}
        return {
            **self._identity,
            "is_undefended": self.is_undefended,
            "is_robust": method.is_robust,
            "trained_on": method.trained_on._asdict(),
            "baseline": None if self.baseline is None else str(self.baseline.folder.resolve()),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "commit": commit(),
            "device": f"{trainer.world_size} x {trainer.strategy.root_device}, precision {trainer.precision}",
            "config": self.config,
            "model": self._model(method, trainer),
            "averages": self.averages,
            "checks": self.checks,
            "tasks": {task.name: {"classes": words(task), "class_count": len(task.label_names)} for task in tasks},
            "members": stored_members(self._members, [task.name for task in tasks]),
            "tables": list(self._tables),
            "sections": of_sections | {"audit": {}} | further,
            "bad_samples": self.bad_samples,
            "other_metrics": {name: value for name, value in metrics.items() if name not in self.outputs},
        }

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Releases the lock of the folder."""
        self._unlock()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the table and, last, its folder.

        Raises:
            ValueError: the test ended without a result.
        """
        self._unlock()
        if stage != "test" or not trainer.is_global_zero:
            return
        if not self._is_published:
            raise ValueError("the test ended without a result: no sample was evaluated; check the trainer's limits")
        if isinstance(trainer.progress_bar_callback, TaskProgress):
            trainer.progress_bar_callback.close()
        if self.share is None:
            print_result(self._result, self.opened)
        else:
            place = f"shard {self.share.number} of {self.share.count}, numbered from 0"
            sys.stdout.write(f"Ledgers of {place}, are in\n{self.opened}\n")
        self._result, self._is_published = {}, False

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check_unfinished(self, path: Path) -> None:
        is_finished = (path / RESULT).exists() or (path / FACTS).exists()
        if self.name and is_finished and not (path / PROTOCOL).exists():
            raise ValueError(f"{path} is a finished test; choose another results.name")

    def _check_protocol(self, path: Path, identity: dict[str, Any]) -> None:
        if path.is_file() and (lines := unlike(json.loads(read_text(path)), json.loads(json.dumps(identity)))):
            more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
            raise ValueError(
                f"{path.parent} holds an unfinished test of another protocol ({'; '.join(lines[:3])}{more});"
                " choose another results.name"
            )

    def _model(self, method: RobustMethod, trainer: Trainer) -> dict[str, Any]:
        clip, checkpoint = method.clip, getattr(trainer, "ckpt_path", None)
        return {
            "arch": clip.arch,
            "pretrained": clip.pretrained,
            **({"source": dict(clip.source)} if clip.source else {}),
            "image_size": clip.image_size,
            "fingerprint": clip.fingerprint,
            "is_pretrained": _is_pretrained(method),
            "weights": self._identity["weights"],
            "settings": self._identity["settings"],
            "checkpoint": str(checkpoint) if checkpoint else None,
            "interpolation": method.interpolation,
            **{name: self._identity[name] for name in ("defence", "ways") if name in self._identity},
        }

    def _publish(self, folder: Path) -> None:
        """Writes the result, then renames the folder; after a kill, the next start repeats the remaining steps."""
        if self.share is None:
            write_result(folder, self._result)
        shutil.rmtree(folder / PARTS)
        (folder / PROTOCOL).unlink()
        if not self.name:
            stem = f"{self._identity['method'].lower()}{self._suffix}"
            folder = _rename_new(folder, f"{stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}")
        (folder / LOCK).unlink()  # last, since it keeps other starts out
        self.path, self._is_published = folder, True


def _is_pretrained(method: RobustMethod) -> bool:
    """Returns whether the tested weights equal those of the base model, without any others."""
    return len(method.state_dict()) == len(method.clip.net.state_dict()) and (
        fingerprint(method.clip.net) == method.clip.fingerprint
    )


def _base_of(method: RobustMethod) -> str | None:
    """Returns the fingerprint of the undefended model of a run; None for foreign robust weights, whose base is unknown.

    The base of an exported robust model is the model that its training began with.
    """
    if not method.is_robust:
        return method.clip.fingerprint
    return None if method.origin is None else method.origin.base_fingerprint


def _check_baseline(baseline: Run, weights: str | None) -> None:
    """Refuses a baseline that did not test the base model of this run.

    Args:
        baseline: a finished test.
        weights: fingerprint of this run's base model; None accepts any model.

    Raises:
        ValueError: the baseline has trained weights or another base model, or its result does not name its weights.
    """
    model = baseline.result.get("model") or {}
    remedy = "test this run's base model, as by `--model ZeroShot` with its model.pretrained"
    if not model.get("is_pretrained"):
        raise ValueError(
            f"results.baseline {baseline.folder} must be a test of a base model as it is, found trained weights of"
            f" {baseline.result['method']}, or a result of an older version; {remedy}"
        )
    if weights is not None and model.get("fingerprint") != weights:
        raise ValueError(
            f"results.baseline {baseline.folder} tested weights {model.get('fingerprint')}, but the base model here has"
            f" {weights}; {remedy}"
        )


def _rename_new(folder: Path, stem: str) -> Path:
    """Renames a folder to a new name."""
    for number in itertools.count():
        target = folder.with_name(f"{stem}-{number}" if number else stem)
        if not target.exists():
            try:
                return folder.rename(target)
            except OSError:
                if not target.exists():  # else another test of the same second was faster
                    raise
    raise AssertionError


def writer_of(trainer: Trainer) -> ResultsWriter | None:
    """Returns the writer among the callbacks of a trainer, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, ResultsWriter)), None)  # type: ignore[attr-defined]


def share_of(trainer: Trainer) -> Share | None:
    """Returns the part of the samples that a test evaluates; None for a test of all."""
    writer = writer_of(trainer)
    return None if writer is None else writer.share
