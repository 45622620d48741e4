"""What a command has behind it, a batch a line in JSON, so that a killed one goes on where it was."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustclip import persistence

Row = tuple[int, list[str]]
"""Sample id and captions."""


class Journal:
    """The batches of one process, each on the disk before the next begins; the first line holds the settings.

    Args:
        folder: of all processes' journals.
        shard: of this process.
        settings: what the rows depend on.

    Raises:
        ValueError: on entering: another process writes this journal.
    """

    def __init__(self, folder: Path, shard: int, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = folder / f"{shard}.jsonl", settings

    def __enter__(self) -> "Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        refusal = f"another process does this share of {self.path.parent}; give each its own --shard"
        self._lock = persistence.lock(self.path.with_suffix(".lock"), refusal)
        self._log = persistence.AppendLog(self.path, _line(self.settings))
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def append(self, number: int, rows: Sequence[Row]) -> None:
        """Adds a batch."""
        self._log.append(_line({"batch": number, "rows": rows}))


def read_all(folder: Path, settings: Mapping[str, Any]) -> dict[int, list[Row]]:
    """Rows by the number of their batch, of all processes; of one that still writes, the whole lines.

    Raises:
        ValueError: a journal has other settings.
    """
    batches = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")[:-1]
        if lines:
            check_same(path, json.loads(lines[0]), settings)
        for line in map(json.loads, lines[1:]):
            batches[int(line["batch"])] = [(index, captions) for index, captions in line["rows"]]
    return batches


def check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses earlier work that was done otherwise.

    Raises:
        ValueError: with the first setting that differs.
    """
    earlier, now = _flat(found), _flat(json.loads(json.dumps(wanted)))
    for name in [*now, *earlier]:
        if earlier.get(name) != now.get(name):
            difference = f"{name} {earlier.get(name)!r}, now it is {now.get(name)!r}"
            raise ValueError(f"{path} was begun with {difference}; delete it, or choose another place")


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by their own names, which are unique."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat
