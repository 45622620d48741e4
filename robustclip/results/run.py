"""Layout and reading of the folder that a test leaves."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from robustclip.paths import local_path
from robustclip.results import ledger
from robustclip.textfiles import read_text

RESULT, LEDGERS, EXAMPLES = "result.json", "ledger", "examples"
FACTS = "facts.json"  # all that a result is computed from beside the ledgers
PARTS = "ledger/parts"  # of each process, until the test is finished
PROTOCOL = "protocol.json"  # of a run that is not finished
SHARD = "shard"  # key of the facts of a test of a part of the samples


@dataclass(frozen=True)
class Run:
    """A finished test.

    Args:
        folder: holds ``result.json``, ``ledger/<task>.csv`` and perhaps ``examples/``.

    Raises:
        ValueError: the folder is no finished test.
    """

    folder: Path

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Opens a run by its folder or by the ``result.json`` in it."""
        path = local_path(path, "run")
        run = cls(path.parent if path.name == RESULT else path)
        run.result  # noqa: B018  # raises an error if the test is not finished
        return run

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def method(self) -> str:
        """Name of the method, and of its test-time defence if it has one, as in ``TeCoA + JPEG``."""
        return method_of(self.result)

    @cached_property
    def result(self) -> dict[str, Any]:
        """Content of ``result.json``."""
        path = self.folder / RESULT
        if (self.folder / PROTOCOL).is_file() and not path.is_file():
            raise ValueError(f"{self.folder} is a test that has not finished; start the same command again")
        if (self.folder / FACTS).is_file() and not path.is_file():
            check_is_whole(self.folder, read_facts(self.folder))
        try:
            result = json.loads(read_text(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder} is no result of `robustclip test`: {error}") from error
        if not isinstance(result, dict) or not {"method", "tasks", "mean", "protocol"} <= result.keys():
            raise ValueError(f"{path} is no result of `robustclip test`: it lacks method, tasks, mean or protocol")
        return result

    @property
    def attacks(self) -> list[str]:
        """Names of the attacks, without ``clean``."""
        return [name for name in self.result["mean"] if name != "clean"]

    def rows(self, task: str) -> list[dict[str, str]]:
        """Reads the rows of a task's ledger, in the order of the sample ids."""
        return ledger.read(self.folder / LEDGERS / f"{task}.csv")


def baseline_of(facts: Mapping[str, Any]) -> Run | None:
    """Opens the baseline of a test; None for a test without one.

    Args:
        facts: content of the test's ``facts.json``.

    Raises:
        ValueError: the baseline is gone or damaged since the test.
    """
    if facts["baseline"] is None:
        return None
    try:
        return Run.open(Path(facts["baseline"]))
    except ValueError as error:
        raise ValueError(f"results.baseline of this test must be where it was: {error}; put it back") from error


def read_facts(folder: Path) -> dict[str, Any]:
    """Reads ``facts.json`` of a finished test, or of a shard of one.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        facts = json.loads(read_text(folder / FACTS))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no {FACTS} of `robustclip test`: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{folder / FACTS} is no {FACTS} of `robustclip test`: expected a mapping")
    return facts


def check_is_whole(folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuses a shard in the place of a whole test.

    Args:
        folder: folder of the test.
        facts: content of its ``facts.json``.

    Raises:
        ValueError: the test is a shard.
    """
    if shard := facts.get(SHARD):
        place = f"shard {shard['number']} of {shard['count']}, numbered from 0"
        raise ValueError(f"{folder} is {place}, and no whole test; join all with `robustclip merge SHARD... --out RUN`")


def method_of(result: Mapping[str, Any]) -> str:
    """Returns the name of the method of a result, and of its test-time defence if it has one."""
    defence = (result.get("model") or {}).get("defence")
    return str(result["method"]) + (f" + {defence['class']}" if defence else "")
