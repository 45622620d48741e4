"""The protocol of an accuracy: fifteen axes that comparable numbers share, and a hash over exactly these."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

AXES = {
    "templates": "prompts of the zero-shot head",
    "class_names": "names of the classes, in the order of the labels",
    "split": "data set and split",
    "sample_ids": "ids and labels of the evaluated samples",
    "pixels": "the decoded images of these samples",
    "preprocessing": "transforms of an image before the attack",
    "corruption": "kind, severity and constants of a corrupted copy; absent: none",
    "attack_space": "resolution of the attacked image",
    "eps": "norm and radius of the perturbation set",
    "steps": "algorithm and effort of the attack",
    "loss": "loss that the attack maximises",
    "precision": "number formats of the attack and of the verdict",
    "stop_rule": "which attacked image counts: the worst or the last",
    "model_preprocessing": "resize and normalisation inside the model",
    "ways": "ways of attacking through a test-time defence; absent: all ways with the default settings",
}
CLEAN_AXES = tuple(axis for axis in AXES if axis not in ("eps", "steps", "loss", "precision", "stop_rule", "ways"))
SHOWN = 100  # characters of a value in a message
LISTED = 3  # longer lists are replaced by their length and digest

Axes = Mapping[str, Any]
Rows = Mapping[int, Mapping[str, str]]
"""Lines of a ledger by their sample ids."""


def digest(value: Any) -> str:
    """Computes a short hash of any JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def listing(values: Sequence[Any]) -> Any:
    """Returns a short list as it is, and the length and digest of a longer one."""
    return list(values) if len(values) <= LISTED else f"{len(values)}, digest {digest(list(values))}"


def attack_axes(members: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the axes ``eps``, ``steps`` and ``loss`` of an attack, from the settings of its members by name."""
    settings = {name: dict(given) for name, given in members.items()}
    radii = {name: f"{given.pop('norm', 'linf')} {given.pop('eps', None)}" for name, given in settings.items()}
    losses = {name: given.pop("loss", None) or "ce" for name, given in settings.items()}
    return {"eps": _alike(radii), "steps": settings, "loss": _alike(losses)}


def with_samples(protocol: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Adds the evaluated samples and hashes to the protocols of a task.

    Args:
        protocol: axes by attack.
        rows: ledger of the task.
    """
    samples = f"{len(rows)}, digest {digest([[int(row['id']), int(row['label'])] for row in rows])}"
    pixels = listing([row["pixels"] for row in rows]) if all(row["pixels"] for row in rows) else None
    axes = {attack: {**given, "sample_ids": samples, "pixels": pixels} for attack, given in protocol.items()}
    return {attack: {"hash": digest(given), "axes": given} for attack, given in axes.items()}


def differences(a: Axes, b: Axes) -> list[str]:
    """Describes how two protocols differ, in one line per axis with its name and both values.

    Args:
        a: axes of one protocol.
        b: axes of the other.
    """
    names = [name for name in AXES if a.get(name) != b.get(name) and (name != "pixels" or is_checked(a, b))]
    return [f"{name}: {_unlike(a.get(name), b.get(name))}" for name in names]


def is_checked(a: Axes, b: Axes) -> bool:
    """Checks whether both protocols have hashes of their images; older results and those of embeddings have none.

    Args:
        a: axes of one protocol.
        b: axes of the other.
    """
    return a.get("pixels") is not None and b.get("pixels") is not None


def with_counts(lines: Sequence[str], a: Rows, b: Rows) -> list[str]:
    """Replaces two hashes of images by the number of samples whose images differ.

    Args:
        lines: of `differences`, for two protocols of a task.
        a: the task's ledger in one run.
        b: the same in the other run.
    """
    shared = a.keys() & b.keys()
    count = sum(not shows_same(a[number], b[number]) for number in shared)
    others = [line for line in lines if not line.startswith("pixels:")]
    if len(others) == len(lines) or (not count and not any(line.startswith("sample_ids:") for line in lines)):
        return list(lines)
    return [*others, f"pixels: {count} of {len(shared)} samples show other images"] if count else others


def shows_same(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    """Checks whether two rows of ledgers have equal hashes of pixels, or one of them has none.

    Args:
        a: row of one run.
        b: row of another run.
    """
    hashes = a.get("pixels"), b.get("pixels")
    return hashes[0] == hashes[1] or not all(hashes)


def _alike(values: Mapping[str, Any]) -> Any:
    """Returns the value that all members share, or the value of each member."""
    distinct = {json.dumps(value) for value in values.values()}
    return next(iter(values.values())) if len(distinct) == 1 else dict(values)


def _unlike(a: Any, b: Any) -> str:
    """Formats both values; long ones are cut to the text around their first difference."""
    texts = [value if isinstance(value, str) else json.dumps(value) for value in (a, b)]
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
    start = shared - 30 if max(map(len, texts)) > SHOWN else 0
    return " against ".join(_short(text, max(start, 0)) for text in texts)


def _short(text: str, start: int) -> str:
    return f"{'...' if start else ''}{text[start : start + SHOWN]}{'...' if len(text) > start + SHOWN else ''}"
