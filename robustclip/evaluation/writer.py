"""The folder of a test: unfinished while it runs, published whole, never overwritten."""

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from robustclip import display
from robustclip.arguments import checked
from robustclip.attacks import Member
from robustclip.evaluation.audit import audit, checks_at
from robustclip.evaluation.identity import unlike, with_samples, words
from robustclip.evaluation.journal import keep_examples
from robustclip.evaluation.probes import Evidence, attack_columns, sample_columns
from robustclip.evaluation.progress import TaskProgress
from robustclip.methods import RobustMethod
from robustclip.models.clip import fingerprint
from robustclip.paths import local_path
from robustclip.results import ledger
from robustclip.results.protocol import digest
from robustclip.results.provenance import commit, versions
from robustclip.results.run import EXAMPLES, LEDGERS, PARTS, PROTOCOL, RESULT, Run
from robustclip.results.tables import (
    check_averages,
    csv_table,
    markdown_table,
    rich_detection,
    rich_table,
    tabulate,
    with_averages,
    with_intervals,
)
from robustclip.textfiles import read_text
from robustclip.types import Task, data_of

LOCK = "lock"

Members = Mapping[tuple[str, str], Sequence[Member]]
Rows = list[dict[str, str]]


@checked
class ResultsWriter(Callback):
    """Leaves what a test measured as a folder, prints a table, and prints the folder's path last.

    The folder holds ``result.json``, the table as CSV and Markdown, the ledgers, and the examples. A test that is
    started again after it was killed finds its folder and goes on there.

    Args:
        folder: where the folders of tests go; null for ``results`` below the trainer's ``default_root_dir``.
        name: of this test's folder; null takes method and time, and finds an unfinished start of the same test.
        baseline: folder of the test of this run's base model, as it is before training, under the same protocol; the
            audit checks with it that the attacks are strong enough.
        is_undefended: the tested model has no defence, so that it is its own baseline.
        averages: name to the tasks of an unweighted mean, beside the mean over all tasks.
        config: what the run was started with, kept in the file.
        checks: class paths of your own audit checks, see `AuditCheck`.

    Raises:
        ValueError: before the test starts, an average of no task or one that the test has not, or whose name is taken;
            a baseline of other weights.
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
    ) -> None:
        self.folder, self.name, self.averages, self.config = folder, name, averages or {}, config
        if folder is not None:
            local_path(folder, "results.folder")
        self.is_undefended = is_undefended
        self.baseline = None if baseline is None else Run.open(local_path(baseline, "results.baseline"))
        self.checks = checks_at(checks or ())
        self.path: Path | None = None
        self.sections: dict[str, Any] = {}  # what other callbacks add to the result of the running test
        self._result: dict[str, Any] = {}
        self._identity: dict[str, Any] = {}
        self._members: Members = {}
        self._lock: IO[str] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses averages that could not be taken, and a baseline of another model."""
        if stage == "test":
            tasks = [task.name for task in data_of(trainer).test_tasks]
            check_averages(self.averages, tasks)
            if self.baseline is not None and isinstance(pl_module, RobustMethod):
                _check_baseline(self.baseline, pl_module.clip.fingerprint)

    def begin(self, trainer: Trainer, identity: dict[str, Any], members: Members) -> Path:
        """The folder of a test, new or as an earlier start has left it; all processes must come here.

        Raises:
            ValueError: the name is taken, by a finished test or by an unfinished one of another protocol.
        """
        root = Path(self.folder or local_path(trainer.default_root_dir, "trainer.default_root_dir") / "results")
        unfinished = f"unfinished-{identity['method'].lower()}-{digest(identity)[:8]}"
        self.path, self._identity, self._members = root / (self.name or unfinished), identity, members
        if trainer.is_global_zero:
            self._check_unfinished(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            refusal = f"{self.path} is being written by another process; wait for it, or stop it"
            self._lock = ledger.lock(self.path / LOCK, refusal)
            self._check_unfinished(self.path)  # again, for it may just have been finished
            self._check_protocol(self.path / PROTOCOL, identity)
            (self.path / PARTS).mkdir(parents=True, exist_ok=True)
            for place in (self.path, self.path / LEDGERS, self.path / PARTS, *self.path.glob(f"{EXAMPLES}/*/*")):
                ledger.sweep(place)
            ledger.write_aside(self.path / PROTOCOL, json.dumps(identity, indent=1))
            attacks = list(dict.fromkeys(attack for _, attack in members))
            for part in (self.path / PARTS).glob("*.csv"):
                ledger.Ledger(part, attacks)  # cuts off what was being written
        trainer.strategy.barrier("the folder is there")
        return self.path

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Joins the ledgers, adds what was logged, and gives the folder its name."""
        trainer.strategy.barrier("ledgers are complete")
        if not trainer.is_global_zero or not isinstance(pl_module, RobustMethod) or self.path is None:
            return
        tasks = data_of(trainer).test_tasks
        rows = self._merge(self.path, tasks)
        self._result = self._summary(trainer, pl_module, tasks, rows)
        for task, attack in self._members:
            keep_examples(self.path / EXAMPLES / task / attack, rows[task], attack, self._identity["save_examples"])
        self._publish(self.path)

    def _merge(self, path: Path, tasks: Sequence[Task]) -> dict[str, Rows]:
        header = ledger.columns(list(dict.fromkeys(attack for _, attack in self._members)))
        targets = {task.name: path / LEDGERS / f"{task.name}.csv" for task in tasks}
        return {
            name: ledger.merge((path / PARTS).glob(f"{name}.*.csv"), target, header) for name, target in targets.items()
        }

    def _summary(
        self, trainer: Trainer, method: RobustMethod, tasks: Sequence[Task], rows: dict[str, Rows]
    ) -> dict[str, Any]:
        """What ``result.json`` holds."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        protocol = {task.name: with_samples(self._identity["protocol"][task.name], rows[task.name]) for task in tasks}
        evidence = Evidence(
            {task.name: sample_columns(rows[task.name]) for task in tasks},
            {key: attack_columns(rows[key[0]], key[1]) for key in self._members},
            self._members,
            {task.name: len(task.label_names) for task in tasks},
            protocol,
            is_undefended=self.is_undefended,
            baseline=self.baseline,
        )
        return {
            "method": type(method).__name__,
            "is_undefended": self.is_undefended,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "commit": commit(),
            "device": f"{trainer.world_size} x {trainer.strategy.root_device}, precision {trainer.precision}",
            "config": self.config,
            "model": self._model(method, trainer),
            **with_averages(with_intervals(tabulate(metrics, stage="test"), rows, self._members), self.averages),
            **self.sections,
            "audit": audit(evidence, self.checks),
            "notes": _notes(self._members),
            "classes": {task.name: words(task) for task in tasks},
            "protocol": protocol,
        }

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets another start have the folder."""
        self._unlock()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the table and, last, where it lies."""
        self._unlock()
        if self._result:
            if isinstance(trainer.progress_bar_callback, TaskProgress):
                trainer.progress_bar_callback.close()
            console = display.console()
            console.print(rich_table(self._result))
            if (detected := rich_detection(self._result)) is not None:
                console.print(detected)
            for check in self._result["audit"]["checks"]:
                if check["status"] != "pass":
                    console.print(f"{check['status']:>12}  {check['name']}: {check['found']}")
            console.print(f"The table, the ledgers and the protocol lie in\n{self.path}", soft_wrap=True)
            self._result = {}

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check_unfinished(self, path: Path) -> None:
        if self.name and (path / RESULT).exists() and not (path / PROTOCOL).exists():
            raise ValueError(f"{path} is a finished test; choose another results.name")

    def _check_protocol(self, path: Path, identity: dict[str, Any]) -> None:
        if path.is_file() and (found := unlike(json.loads(read_text(path)), json.loads(json.dumps(identity)))):
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ValueError(
                f"{path.parent} holds an unfinished test of another protocol ({'; '.join(found[:3])}{more});"
                " choose another results.name"
            )

    def _model(self, method: RobustMethod, trainer: Trainer) -> dict[str, Any]:
        clip, checkpoint = method.clip, getattr(trainer, "ckpt_path", None)
        return {
            "arch": clip.arch,
            "pretrained": clip.pretrained,
            "image_size": clip.image_size,
            "fingerprint": clip.fingerprint,
            "is_pretrained": _is_pretrained(method),
            "weights": self._identity["weights"],
            "settings": self._identity["settings"],
            "checkpoint": str(checkpoint) if checkpoint else None,
            "interpolation": method.interpolation,
        }

    def _publish(self, folder: Path) -> None:
        """Writes the result, then gives the folder its final name; a start after any of the steps repeats the rest."""
        ledger.write_aside(folder / "table.csv", csv_table(self._result))
        ledger.write_aside(folder / "table.md", markdown_table(self._result))
        ledger.write_aside(folder / RESULT, json.dumps(self._result, indent=1) + "\n")
        shutil.rmtree(folder / PARTS)
        (folder / PROTOCOL).unlink()
        if not self.name:
            folder = _rename_new(folder, f"{self._result['method'].lower()}-{datetime.now(UTC):%Y%m%d-%H%M%S}")
        (folder / LOCK).unlink()  # last: until then no other start gets in
        self.path = folder


def _is_pretrained(method: RobustMethod) -> bool:
    """Whether the tested weights are those of the base model and nothing else, as after no training."""
    return len(method.state_dict()) == len(method.clip.net.state_dict()) and (
        fingerprint(method.clip.net) == method.clip.fingerprint
    )


def _check_baseline(baseline: Run, weights: str) -> None:
    """Refuses a baseline that did not test the base model of this run.

    Args:
        baseline: the finished test.
        weights: fingerprint of this run's base model.

    Raises:
        ValueError: trained weights, another base model, or a result that does not name its weights.
    """
    model = baseline.result.get("model") or {}
    remedy = "test this run's base model, as by `--model ZeroShot` with its model.pretrained"
    if not model.get("is_pretrained"):
        raise ValueError(
            f"results.baseline {baseline.folder} must be a test of a base model as it is, found trained weights of"
            f" {baseline.result['method']}, or a result of an older version; {remedy}"
        )
    if model.get("fingerprint") != weights:
        raise ValueError(
            f"results.baseline {baseline.folder} tested weights {model.get('fingerprint')}, but the base model here has"
            f" {weights}; {remedy}"
        )


def _rename_new(folder: Path, stem: str) -> Path:
    """Renames a folder to a name that did not exist."""
    for number in itertools.count():
        target = folder.with_name(f"{stem}-{number}" if number else stem)
        if not target.exists():
            try:
                return folder.rename(target)
            except OSError:
                if not target.exists():  # else another test of the same second was faster
                    raise
    raise AssertionError


def _notes(members: Members) -> list[str]:
    return [
        f"{task} under {attack}: {each.note}"
        for (task, attack), found in members.items()
        for each in found
        if each.note
    ]
