"""The file in an exported folder that states by which method, and with which training attack, its weights were made."""

import json
from pathlib import Path
from typing import Any

from robustclip.textfiles import read_text

ORIGIN = "robustclip.json"


def write_origin(folder: Path, *, method: str, training_attack: str | None, base: str) -> None:
    """Writes the origin of a folder's weights.

    Args:
        folder: exported model.
        method: name of the method.
        training_attack: attack of the training with its settings; None for training on clean images.
        base: fingerprint of the weights before training.
    """
    facts = {"method": method, "training_attack": training_attack, "base_fingerprint": base}
    (folder / ORIGIN).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_origin(folder: Path | None) -> dict[str, Any] | None:
    """Reads the origin of the weights of a model's folder; None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    if folder is None or not (file := folder / ORIGIN).is_file():
        return None
    try:
        facts = json.loads(read_text(file))
        return {key: facts[key] for key in ("method", "training_attack", "base_fingerprint")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} must hold method, training_attack and base_fingerprint: {error}") from error
