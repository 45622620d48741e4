"""Logs the finished batches of a command, one JSON line each, so that an interrupted command can resume."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustclip import persistence

Row = tuple[int, list[str]]
"""Sample id and captions."""


class ProgressLog:
    """Writes the log of one process: settings in the first line, then one line per batch, synced to the disk.

    Args:
        folder: folder of the logs of all processes.
        shard: number of this process, from 0.
        settings: settings that determine the rows.

    Raises:
        ValueError: another process writes this log; raised on entering the context.
    """

    def __init__(self, folder: Path, shard: int, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = folder / f"{shard}.jsonl", settings

    def __enter__(self) -> "ProgressLog":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        refusal = f"another process already works on this shard of {self.path.parent}; give each its own --shard"
        self._lock = persistence.lock(self.path.with_suffix(".lock"), refusal)
        self._log = persistence.AppendLog(self.path, _line(self.settings))
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def append(self, number: int, rows: Sequence[Row]) -> None:
        """Adds a batch.

        Args:
            number: position of the batch, from 0.
            rows: sample ids and captions of the batch.
        """
        self._log.append(_line({"batch": number, "rows": rows}))


def read_all(folder: Path, settings: Mapping[str, Any]) -> dict[int, list[Row]]:
    """Reads the rows of all processes, by the number of their batch.

    Lines that a running process has not finished are left out.

    Args:
        folder: folder of the logs.
        settings: the settings that every log must have.

    Raises:
        ValueError: a log has other settings.
    """
    batches = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")[:-1]
        if lines:
            check_same(path, json.loads(lines[0]), settings)
        for line in map(json.loads, lines[1:]):
            batches[int(line["batch"])] = [(index, captions) for index, captions in line["rows"]]
    return batches


def check_same(path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuses to continue work that was started with other settings.

    Args:
        path: file or folder of the earlier work, for the message.
        stored: settings of the earlier work.
        settings: settings of this run.

    Raises:
        ValueError: a setting differs; the message names the first one and both values.
    """
    earlier, now = _flat(stored), _flat(json.loads(json.dumps(settings)))
    for name in [*now, *earlier]:
        if earlier.get(name) != now.get(name):
            difference = f"{name} {earlier.get(name)!r}, now it is {now.get(name)!r}"
            raise ValueError(f"{path} was started with {difference}; delete it or choose another path")


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens nested settings; names are unique."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat
