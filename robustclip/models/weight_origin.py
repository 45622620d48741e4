"""The file in an exported folder that states by which method, and with which training attack, its weights were made."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from robustclip.textfiles import read_text
from robustclip.types import TrainingImages

ORIGIN = "robustclip.json"


class Origin(NamedTuple):
    """The origin of a folder's weights.

    Attributes:
        method: name of the method.
        training_attack: attack of the training with its settings; None for training on clean images.
        base_fingerprint: fingerprint of the weights before training.
        trained_on: training images.
    """

    method: str
    training_attack: str | None
    base_fingerprint: str
    trained_on: TrainingImages = TrainingImages()


def write_origin(folder: Path, origin: Origin) -> None:
    """Writes the origin of a folder's weights.

    Args:
        folder: exported model.
        origin: content of the file.
    """
    (folder / ORIGIN).write_text(
        json.dumps(origin._asdict() | {"trained_on": origin.trained_on._asdict()}, indent=1) + "\n", encoding="utf-8"
    )


def read_origin(folder: Path | None) -> Origin | None:
    """Reads the origin of the weights of a model's folder; None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    if folder is None or not (file := folder / ORIGIN).is_file():
        return None
    try:
        facts: dict[str, Any] = json.loads(read_text(file))
        method, attack, base = (facts[key] for key in ("method", "training_attack", "base_fingerprint"))
        return Origin(method, attack, base, TrainingImages.read(facts.get("trained_on")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} must hold method, training_attack and base_fingerprint: {error}") from error
