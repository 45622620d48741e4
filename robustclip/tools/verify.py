"""``robustclip verify`` and ``replay``: the stored examples of a test, judged anew."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from robustclip import display
from robustclip.attacks import pixels
from robustclip.intervals import wilson
from robustclip.methods import RobustMethod
from robustclip.models.layers import frozen
from robustclip.results.adversarial_examples import Example, load_all
from robustclip.results.run import EXAMPLES, Run
from robustclip.types import Task

TOLERANCE = 1e-6  # rounding of a projection in float32
BATCH = 64  # samples at once; bounds the memory

Key = tuple[str, str]
"""Task and attack."""


@dataclass(frozen=True)
class Transfer:
    """How the examples of one task and attack fare on another model.

    Args:
        n: examples.
        clean: clean images that it gets right.
        attacked: attacked images that it gets right.
        broken: of those that it gets right clean, wrong when attacked.
    """

    n: int = 0
    clean: int = 0
    attacked: int = 0
    broken: int = 0

    def plus(self, other: "Transfer") -> "Transfer":
        """Both together."""
        return Transfer(
            self.n + other.n, self.clean + other.clean, self.attacked + other.attacked, self.broken + other.broken
        )


def verify(run: Path, build: Callable[[dict[str, Any]], RobustMethod]) -> int:
    """Rebuilds the method of a test and judges its stored examples anew, in float32.

    Each must lie inside ball and box, be predicted as stored, clean and attacked, be wrong, and stand so in the ledger.

    Args:
        run: folder of a finished test, or its result.json.
        build: makes the method, weights included, from the result's configuration.

    Returns:
        Number of examples that disagree.

    Raises:
        ValueError: no examples, or a file that is none.
    """
    opened = Run.open(run)
    folder = _examples(opened)
    found = check(opened, _prepared(build(_of(opened, "config")), opened), folder)
    display.console().print(_verified(found))
    return sum(bool(reasons) for examples in found.values() for reasons in examples.values())


def replay(run: Path, method: RobustMethod) -> None:
    """Prints how the stored examples of a test fare on another model, in float32.

    Args:
        run: folder of a finished test, or its result.json.
        method: the other model; its weights become float32.

    Raises:
        ValueError: no examples, or a file that is none.
    """
    opened = Run.open(run)
    table = Table(title=f"examples of {opened.result['method']} on {type(method).__name__}, percent, 95 % interval")
    for name in ("task", "attack"):
        table.add_column(name)
    for name in ("n", "right\nclean", "right\nattacked", "transfer: broken\nof right clean"):
        table.add_column(name, justify="right")
    for (task, attack), found in transfers(opened, method).items():
        counts = ((found.clean, found.n), (found.attacked, found.n), (found.broken, found.clean))
        table.add_row(task, attack, str(found.n), *(_rate(*count) for count in counts))
    display.console().print(table)


def check(run: Run, method: RobustMethod, folder: Path) -> dict[Key, dict[int, list[str]]]:
    """Per task and attack, the reasons why each example, by its id, disagrees; none if it agrees."""
    found: dict[Key, dict[int, list[str]]] = defaultdict(dict)
    ledgers: dict[str, dict[str, dict[str, str]]] = {}
    for batch in _batches(folder):
        task, attack = batch[0].task, batch[0].attack
        if task not in ledgers:
            ledgers = {task: {row.get("id", ""): row for row in run.rows(task)}}
        axes = run.result["protocol"].get(task, {}).get(attack, {}).get("axes", {})
        clean, attacked = _predictions(method, batch)
        for example, seen_clean, seen_attacked in zip(batch, clean, attacked, strict=True):
            row = ledgers[task].get(str(example.number), {})
            reasons = [*_outside(example, axes), *_unlike(example, seen_clean, seen_attacked, row)]
            found[task, attack][example.number] = reasons
    return dict(found)


def transfers(run: Run, method: RobustMethod) -> dict[Key, Transfer]:
    """Counts per task and attack; arguments as in `replay`."""
    folder, method = _examples(run), _prepared(method, run)
    found: dict[Key, Transfer] = {}
    for batch in _batches(folder):
        labels = [example.label for example in batch]
        clean, attacked = ([x == y for x, y in zip(each, labels, strict=True)] for each in _predictions(method, batch))
        broken = sum(was and not still for was, still in zip(clean, attacked, strict=True))
        key = batch[0].task, batch[0].attack
        found[key] = found.get(key, Transfer()).plus(Transfer(len(batch), sum(clean), sum(attacked), broken))
    return found


def _outside(example: Example, axes: Mapping[str, Any]) -> Iterator[str]:
    """Written so that nan fails every check."""
    delta = (example.attacked.double() - example.clean.double()).flatten()
    distance = float(delta.abs().max() if example.norm == "linf" else torch.linalg.vector_norm(delta))
    if not distance <= example.eps + TOLERANCE:
        yield "outside the ball"
    for image, name in ((example.clean, "clean"), (example.attacked, "attacked")):
        if not (float(image.min()) >= -TOLERANCE and float(image.max()) <= 1 + TOLERANCE):
            yield f"{name} image outside [0, 1]"
    balls = _balls(axes.get("eps"), example.by)
    if balls and not any(norm == example.norm and math.isclose(eps, example.eps, rel_tol=1e-6) for norm, eps in balls):
        yield "not the protocol's ball"


def _unlike(example: Example, clean: int, attacked: int, row: Mapping[str, str]) -> Iterator[str]:
    if clean != example.clean_prediction:
        yield "other prediction of the clean image"
    if attacked != example.prediction:
        yield "other prediction of the attacked image"
    if attacked == example.label:
        yield "the attacked image is right"
    stored = (example.label, example.clean_prediction, example.by, example.prediction)
    columns = ("label", "clean", f"{example.attack}.by", f"{example.attack}.prediction")
    if not row:
        yield "not in the ledger"
    elif any(row.get(name) != str(value) for name, value in zip(columns, stored, strict=True)):
        yield "the ledger differs"


def _balls(axis: Any, by: str) -> list[tuple[str, float]]:
    """Norm and radius that the protocol gives the member, or each member; none for attacks without a radius."""
    texts = [axis] if isinstance(axis, str) else [axis[by]] if by in (axis or {}) else list((axis or {}).values())
    parts = [str(text).split(maxsplit=1) for text in texts]
    return [(norm, pixels(eps, name="eps", limit=None)) for norm, eps in parts if eps != "None"]


def _predictions(method: RobustMethod, batch: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Classes of the clean and of the attacked images."""

    def predicted(images: list[Tensor]) -> list[int]:
        classes: list[int] = method.logits(torch.stack(images).to(method.device), batch[0].task).argmax(-1).tolist()
        return classes

    if batch[0].task not in method.heads:
        raise ValueError(f"there are examples of {batch[0].task}, but result.json has no classes of it; test again")
    with torch.no_grad(), frozen(method):
        return predicted([example.clean for example in batch]), predicted([example.attacked for example in batch])


def _batches(folder: Path) -> Iterator[list[Example]]:
    """Examples of one task, attack and size at a time."""
    for _, group in groupby(load_all(folder), key=lambda each: (each.task, each.attack, each.clean.shape)):
        while batch := list(islice(group, BATCH)):
            yield batch


def _prepared(method: RobustMethod, run: Run) -> RobustMethod:
    method = method.float()
    classes = _of(run, "classes")
    method.prepare([_task(name, given) for name, given in classes.items()])
    return method


def _task(name: str, given: Mapping[str, Any]) -> Task:
    groups = given.get("groups")
    in_tuples = None if groups is None else tuple(map(tuple, groups))
    return Task(name, tuple(given["class_names"]), tuple(given["templates"]), in_tuples)


def _of(run: Run, name: str) -> dict[str, Any]:
    found = run.result.get(name)
    if not isinstance(found, dict):
        raise ValueError(f"{run.folder}/result.json has no {name}, which its examples need; test again")
    return found


def _examples(run: Run) -> Path:
    folder = run.folder / EXAMPLES
    if not any(folder.glob("*/*/*.safetensors")):
        raise ValueError(f"{run.folder} has no examples; test again with `--evaluation.save_examples N`")
    return folder


def _verified(found: Mapping[Key, Mapping[int, Sequence[str]]]) -> Table:
    table = Table(title="stored examples, judged anew")
    for name in ("task", "attack", "n", "agree", "disagree", "because (ids)"):
        table.add_column(name, justify="right" if name in ("n", "agree", "disagree") else "left")
    for (task, attack), examples in found.items():
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
