"""Shows the adversarial examples that the tests kept: on the page and as PNG files."""

import base64
import io
from collections.abc import Iterable, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from robustclip.persistence import atomic_write
from robustclip.report.blocks import Block, Card, Cards, Fold, Shot, Text
from robustclip.report.section import Section
from robustclip.report.view import View
from robustclip.results import adversarial_examples
from robustclip.results.adversarial_examples import Example
from robustclip.results.run import EXAMPLES

PER_TASK = 3
LARGEST_GREY = 255


class Images(Section):
    """Clean images, perturbations and attacked images."""

    title = "Images"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        """Returns some adversarial examples of each run, or nothing if no run kept any."""
        folds: list[Block] = []
        for view in views:
            kept = list(adversarial_examples.load_all(view.run.folder / EXAMPLES))
            chosen = _chosen(kept)
            tasks = dict.fromkeys(example.task for example in chosen)
            cards = [Cards(task, [_card(view, item) for item in chosen if item.task == task]) for task in tasks]
            note = f"{len(chosen)} of {len(kept)} images kept"
            folds += [Fold(view.label, cards, note=note, is_open=not folds)] if kept else []
        text = (
            f"At most {PER_TASK} per task, shown at 8 bits. The perturbation is amplified by the factor below it, "
            "around grey."
        )
        return [Text(text), *folds] if folds else []


def export(views: Sequence[View], folder: Path) -> None:
    """Writes every kept adversarial example as PNG files.

    Args:
        views: runs of the report.
        folder: folder that receives ``RUN/TASK/ATTACK/SAMPLE_(clean|perturbation|attacked).png``.
    """
    for view in views:
        for example in adversarial_examples.load_all(view.run.folder / EXAMPLES):
            place = folder / view.run.name / example.task / example.attack
            place.mkdir(parents=True, exist_ok=True)
            images = {"clean": example.clean, "perturbation": _amplified(example)[0], "attacked": example.attacked}
            for name, image in images.items():
                atomic_write(place / f"{example.number}_{name}.png", _png(image))


def _chosen(kept: Iterable[Example]) -> list[Example]:
    """Selects the first examples of each task, in turn from its attacks."""
    turns: dict[str, dict[str, list[Example]]] = {}
    for example in kept:
        turns.setdefault(example.task, {}).setdefault(example.attack, []).append(example)
    chosen: list[Example] = []
    for by_attack in turns.values():
        in_turn = chain.from_iterable(zip_longest(*by_attack.values()))
        chosen += islice((example for example in in_turn if example is not None), PER_TASK)
    return chosen


def _card(view: View, example: Example) -> Card:
    perturbation, factor = _amplified(example)
    shots = [
        _shot(view, example, example.clean, "clean", example.clean_prediction),
        Shot(_url(perturbation), f"perturbation \N{MULTIPLICATION SIGN}{factor:.3g}"),
        _shot(view, example, example.attacked, "attacked", example.prediction),
    ]
    by = {"clean": "misclassified without attack", "": "robust"}.get(example.by, f"misclassified by {example.by}")
    radius = f"{LARGEST_GREY * example.eps:.3g}/255" if example.norm == "linf" else f"{example.eps:.3g}"
    facts = [example.attack, f"{example.norm} {radius}", by, f"sample {example.number}"]
    return Card(shots, _name(view, example.task, example.label), " · ".join(facts))


def _shot(view: View, example: Example, image: Tensor, title: str, prediction: int) -> Shot:
    return Shot(_url(image), title, _name(view, example.task, prediction), prediction == example.label)


def _url(image: Tensor) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(image)).decode()


def _amplified(example: Example) -> tuple[Tensor, float]:
    """Returns the perturbation around grey, amplified until its largest value just fits, and the factor."""
    difference = torch.nan_to_num(example.attacked - example.clean, nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(difference.abs().max())
    factor = 0.5 / largest if largest else 1.0
    return 0.5 + factor * difference, factor


def _png(image: Tensor) -> bytes:
    levels = torch.nan_to_num(image).clamp(0, 1).mul(LARGEST_GREY).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy()).save(file, format="PNG", optimize=True)
    return file.getvalue()


def _name(view: View, task: str, number: int) -> str:
    names = view.run.result.get("classes", {}).get(task, {})
    names = names.get("label_names", names.get("class_names"))
    return str(names[number]) if isinstance(names, list) and number < len(names) else f"class {number}"
