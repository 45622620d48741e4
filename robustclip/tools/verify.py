"""``robustclip verify`` and ``replay`` test stored adversarial examples again."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Column, Table
from torch import Tensor

from robustclip import display
from robustclip.attacks import pixels
from robustclip.attacks.perturbation_set import ORDERS
from robustclip.evaluation.defended_model import answers_of, judged
from robustclip.evaluation.ways import Ways
from robustclip.intervals import wilson
from robustclip.methods import RobustMethod
from robustclip.models.layers import frozen
from robustclip.models.tf32 import tf32
from robustclip.results.adversarial_examples import Example, load_all
from robustclip.results.run import EXAMPLES, Run
from robustclip.types import Task

TOLERANCE = 1e-6  # allows for the rounding of a projection in float32
BATCH = 64  # number of samples per forward pass; bounds the memory

Key = tuple[str, str]
"""Task and attack."""


class Transfer(NamedTuple):
    """Counts of another model's predictions on the examples of one task and attack.

    Attributes:
        n: number of examples.
        clean: number of clean images that the model classifies correctly.
        attacked: number of attacked images that the model classifies correctly.
        misclassified: number of samples that it classifies correctly without attack but not with it.
    """

    n: int = 0
    clean: int = 0
    attacked: int = 0
    misclassified: int = 0


def verify(run: Path, build: Callable[[dict[str, Any]], RobustMethod]) -> int:
    """Rebuilds the model of a test and checks its stored adversarial examples again, in float32.

    Each example must lie in the perturbation set and the valid pixel range. The predictions of its clean and its
    attacked image must equal the stored ones and the ledger, and the attacked image must be misclassified.

    Args:
        run: folder of a finished test, or its result.json.
        build: makes the method with its weights from the configuration in the result.

    Returns:
        Number of examples that fail a check.

    Raises:
        ValueError: the test kept no examples, or a file is damaged.
    """
    opened = Run.open(run)
    folder = _examples(opened)
    failures = check(opened, _prepared(build(_section(opened, "config")), opened), folder)
    display.console().print(_verified(failures))
    return sum(bool(reasons) for examples in failures.values() for reasons in examples.values())


def replay(run: Path, method: RobustMethod) -> None:
    """Prints the accuracy of another model on the stored adversarial examples of a test, in float32.

    Args:
        run: folder of a finished test, or its result.json.
        method: the other model; its weights are converted to float32.

    Raises:
        ValueError: the test kept no examples, or a file is damaged.
    """
    opened = Run.open(run)
    headings = ("n", "correct\nclean", "correct\nattacked", "misclassified\nof correct clean")
    title = f"examples of {opened.result['method']} on {type(method).__name__}, percent, 95 % interval"
    table = Table("task", "attack", *(Column(name, justify="right") for name in headings), title=title)
    for (task, attack), total in transfers(opened, method).items():
        counts = ((total.clean, total.n), (total.attacked, total.n), (total.misclassified, total.clean))
        table.add_row(task, attack, str(total.n), *(_rate(*count) for count in counts))
    display.console().print(table)


def check(run: Run, method: RobustMethod, folder: Path) -> dict[Key, dict[int, list[str]]]:
    """Checks every stored example of a test.

    Args:
        run: finished test.
        method: its model, prepared for the tasks.
        folder: folder of the examples.

    Returns:
        Failed checks per task and attack and sample id; the list of an example without failures is empty.
    """
    failures: dict[Key, dict[int, list[str]]] = defaultdict(dict)
    ledgers: dict[str, dict[str, dict[str, str]]] = {}
    for batch in _batches(folder):
        task, attack = batch[0].task, batch[0].attack
        if task not in ledgers:
            ledgers = {task: {row.get("id", ""): row for row in run.rows(task)}}
        axes = run.result["protocol"].get(task, {}).get(attack, {}).get("axes", {})
        clean, attacked = _predictions(method, batch, _draws(run))
        for example, on_clean, on_attacked in zip(batch, clean, attacked, strict=True):
            row = ledgers[task].get(str(example.number), {})
            reasons = [*_outside(example, axes), *_unlike(example, on_clean, on_attacked, row)]
            failures[task, attack][example.number] = reasons
    return dict(failures)


def transfers(run: Run, method: RobustMethod) -> dict[Key, Transfer]:
    """Counts the predictions of another model on the stored examples, per task and attack.

    Args:
        run: finished test.
        method: the other model; its weights are converted to float32.

    Raises:
        ValueError: the test kept no examples, or a file is damaged.
    """
    folder, method = _examples(run), _prepared(method, run)
    totals: dict[Key, Transfer] = {}
    for batch in _batches(folder):
        labels = [example.label for example in batch]
        predictions = _predictions(method, batch, _draws(run))
        clean, attacked = ([x == y for x, y in zip(classes, labels, strict=True)] for classes in predictions)
        misclassified = sum(before and not after for before, after in zip(clean, attacked, strict=True))
        counts = len(batch), sum(clean), sum(attacked), misclassified
        key = batch[0].task, batch[0].attack
        totals[key] = Transfer(*map(sum, zip(totals.get(key, Transfer()), counts, strict=True)))
    return totals


def _outside(example: Example, axes: Mapping[str, Any]) -> Iterator[str]:
    """Yields the checks of the pixels that fail; `not ... <=` makes nan fail each of them."""
    delta = (example.attacked.double() - example.clean.double()).flatten()
    distance = float(torch.linalg.vector_norm(delta, ord=ORDERS[example.norm]))
    if not distance <= example.eps + TOLERANCE:
        yield "outside the radius"
    for image, name in ((example.clean, "clean"), (example.attacked, "attacked")):
        if not (float(image.min()) >= -TOLERANCE and float(image.max()) <= 1 + TOLERANCE):
            yield f"{name} image outside [0, 1]"
    limits = _limits(axes.get("eps"), example.by)
    if limits and not any(
        norm == example.norm and math.isclose(eps, example.eps, rel_tol=1e-6) for norm, eps in limits
    ):
        yield "another radius than in the protocol"


def _unlike(example: Example, clean: int, attacked: int, row: Mapping[str, str]) -> Iterator[str]:
    if clean != example.clean_prediction:
        yield "another prediction of the clean image"
    if attacked != example.prediction:
        yield "another prediction of the attacked image"
    if attacked == example.label:
        yield "the attacked image is classified correctly"
    stored = (example.label, example.clean_prediction, example.by, example.prediction)
    columns = ("label", "clean", f"{example.attack}.by", f"{example.attack}.prediction")
    if not row:
        yield "not in the ledger"
    elif any(row.get(name) != str(value) for name, value in zip(columns, stored, strict=True)):
        yield "the ledger differs"


def _limits(axis: Any, by: str) -> list[tuple[str, float]]:
    """Reads norm and radius of one member, or of all members, from the protocol; empty without a radius."""
    texts = [axis] if isinstance(axis, str) else [axis[by]] if by in (axis or {}) else list((axis or {}).values())
    parts = [str(text).split(maxsplit=1) for text in texts]
    return [(norm, pixels(eps, name="eps", limit=None)) for norm, eps in parts if eps != "None"]


def _predictions(method: RobustMethod, batch: Sequence[Example], draws: range) -> tuple[list[int], list[int]]:
    """Predicts the classes of the clean and of the attacked images, in several draws of a random defence."""

    index = torch.tensor([example.number for example in batch], device=method.device)

    def predicted(images: list[Tensor]) -> list[int]:
        stacked, task = torch.stack(images).to(method.device), batch[0].task
        classes: list[int] = judged(answers_of(method, stacked, task, index=index, draws=draws)).argmax(-1).tolist()
        return classes

    if batch[0].task not in method.heads:
        raise ValueError(
            f"result.json has no classes of {batch[0].task}, although there are examples of it; test again"
        )
    with torch.no_grad(), frozen(method), tf32(is_allowed=False):
        return predicted([example.clean for example in batch]), predicted([example.attacked for example in batch])


def _draws(run: Run) -> range:
    """Returns the draws that decided in a test, or the default ones if its method had no defence."""
    return range((run.result.get("model") or {}).get("ways", {}).get("judges", Ways().judges))


def _batches(folder: Path) -> Iterator[list[Example]]:
    """Yields batches of examples with equal task, attack and image size."""
    for _, group in groupby(load_all(folder), key=lambda item: (item.task, item.attack, item.clean.shape)):
        while batch := list(islice(group, BATCH)):
            yield batch


def _prepared(method: RobustMethod, run: Run) -> RobustMethod:
    classes = _section(run, "classes").items()
    keys = ("class_names", "templates", "groups", "descriptions")
    tasks = [Task(name, *map(texts.get, keys)) for name, texts in classes]
    method.float().prepare(tasks)
    return method


def _section(run: Run, name: str) -> dict[str, Any]:
    section = run.result.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"{run.folder}/result.json has no {name}, which its examples need; test again")
    return section


def _examples(run: Run) -> Path:
    folder = run.folder / EXAMPLES
    if not any(folder.glob("*/*/*.safetensors")):
        raise ValueError(f"{run.folder} holds no adversarial examples; test again with `--evaluation.save_examples N`")
    return folder


def _verified(failures: Mapping[Key, Mapping[int, Sequence[str]]]) -> Table:
    numbers = (Column(name, justify="right") for name in ("n", "agree", "disagree"))
    table = Table("task", "attack", *numbers, "because (ids)", title="stored adversarial examples, tested again")
    for (task, attack), examples in failures.items():
        wrong = {number: reasons for number, reasons in examples.items() if reasons}
        counts = (len(examples), len(examples) - len(wrong), len(wrong))
        because = []
        for reason, count in Counter(reason for reasons in wrong.values() for reason in reasons).most_common():
            ids = [str(number) for number, reasons in wrong.items() if reason in reasons]
            because.append(f"{reason}: {count} ({', '.join(ids[:3])}{', ...' if count > 3 else ''})")
        table.add_row(task, attack, *map(str, counts), "\n".join(because))
    return table


def _rate(count: int, n: int) -> str:
    low, high = (100 * limit for limit in wilson(count, n))
    return f"{100 * count / n:.1f}\n{low:.1f} to {high:.1f}" if n else "of none"
