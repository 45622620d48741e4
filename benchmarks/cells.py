"""What one model of a method measured, small enough for a results file, and comparisons of methods from it.

A cell holds which images are classified correctly, one bit for each. Means, intervals and paired differences follow
from it, so that another machine goes on where a script ended, without checkpoints or ledgers.
"""

import hashlib
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from robustclip.intervals import mean_difference, mean_interval
from robustclip.results.run import Run

PGDS = ("pgd_ce", "pgd_margin")  # PGD-10 with two losses, also the first members of the recipe `cascade`
ZERO_SHOT = "ZeroShot"


@dataclass(frozen=True)
class Answers:
    """Answers of one model for one set.

    Attributes:
        images: digest of the images' identities.
        n: number of images.
        correct: bits in the order of the identities, as hexadecimal digits; 1 for a correctly classified image.
    """

    images: str
    n: int
    correct: str

    @classmethod
    def of(cls, correct: Mapping[str, bool]) -> "Answers":
        """Collects the answers, given by the identity of the image."""
        images = sorted(correct)
        bits = "".join(str(int(correct[image])) for image in images)
        digest = hashlib.sha256("\n".join(images).encode()).hexdigest()
        return cls(digest[:12], len(images), f"{int(bits, 2):x}")

    @property
    def bits(self) -> int:
        """Bits as one number."""
        return int(self.correct, 16)

    @property
    def count(self) -> int:
        """Number of images that are classified correctly."""
        return self.bits.bit_count()


@dataclass(frozen=True)
class Cell:
    """Tests of one model, or of one model without attack and under attack.

    Attributes:
        method: name in the table.
        seed: seed of the fit.
        rate: learning rate; none for the method's default.
        held_out: accuracy on held-out training images by learning rate, for the seed that chose the rate.
        answers: answers by kind of accuracy and set. Kinds are `clean`, `pgd` and perhaps `cascade`.
        averages: sets over which further means of the clean accuracy are taken, by column.
        detection: measures of unknown classes, in [0, 1].
        audit: grade of the test under attack.
        commit: commit of the test under attack.
    """

    method: str
    seed: int
    rate: str | None
    held_out: dict[str, float]
    answers: dict[str, dict[str, Answers]]
    averages: dict[str, list[str]]
    detection: dict[str, float] = field(default_factory=dict)
    audit: str = ""
    commit: str = ""

    def of(self, kind: str) -> dict[str, Answers] | None:
        """Returns the answers of a kind or of a further mean, by set; none if they were not measured."""
        if kind in self.averages:
            return {task: self.answers["clean"][task] for task in self.averages[kind]}
        return self.answers.get(kind)

    def mean(self, kind: str) -> float:
        """Returns the mean over the sets, in [0, 1]."""
        return statistics.mean(answers.count / answers.n for answers in (self.of(kind) or {}).values())


class Cells:
    """All cells of a table, one line of JSON each, in a file to which new ones are appended.

    A later line about the same method and seed replaces the earlier one. A method whose update changed is measured
    again once its lines are deleted.

    Args:
        path: file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self._cells = {(cell.method, cell.seed): cell for cell in map(_parse, lines)}

    def get(self, method: str, seed: int) -> Cell | None:
        """Returns the cell of a method and seed, or none."""
        return self._cells.get((method, seed))

    def add(self, cell: Cell) -> None:
        """Keeps a cell in the file."""
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(cell)) + "\n")
        self._cells[cell.method, cell.seed] = cell


def _parse(line: str) -> Cell:
    values = json.loads(line)
    answers = {kind: {task: Answers(**of) for task, of in sets.items()} for kind, sets in values["answers"].items()}
    return Cell(**{**values, "answers": answers})


def answers(run: Run, kind: str) -> dict[str, Answers]:
    """Reads which images a model classifies correctly, without attack or whatever the attacks do, by set."""
    return {task: Answers.of(_correct(run, task, kind)) for task in run.result["tasks"]}


def _correct(run: Run, task: str, kind: str) -> dict[str, bool]:
    """Maps the identity of each image to whether it is classified correctly: without attack, or by the attacks.

    ``pgd`` is PGD-10 with both losses, which the recipe `cascade` runs first.
    """
    successes = {"clean": set[str](), "pgd": set(PGDS), "cascade": None}[kind]
    return {row["id"]: row["clean"] == row["label"] and not _falls(row, successes) for row in run.rows(task)}


def _falls(row: Mapping[str, Any], members: set[str] | None) -> bool:
    """Returns whether one of the members, or any if None, misclassifies the image of a row."""
    if "cascade.by" in row:
        return bool(row["cascade.by"]) if members is None else row["cascade.by"] in members
    return any(row[f"{name}.by"] for name in members or ())


def interval(cells: Iterable[Cell], kind: str) -> list[float]:
    """Computes the mean over sets and seeds and its 95 % interval; seeds share the images of a set."""
    sets = [(task, answers) for cell in cells for task, answers in (cell.of(kind) or {}).items()]
    return list(mean_interval([(each.count, each.n) for _, each in sets], images=[task for task, _ in sets]))


def difference(pairs: Sequence[tuple[Cell, Cell]], kind: str) -> list[float] | None:
    """Computes the accuracy of the first models minus that of the second ones on the same images.

    Args:
        pairs: models that are compared, one pair for each seed. Seeds share the images of a set.
        kind: kind of accuracy.

    Returns:
        The difference and its 95 % interval; none if no pair has this kind.
    """
    sets = [counts for a, b in pairs for counts in _discordant(a.of(kind), b.of(kind))]
    return list(mean_difference([counts for _, counts in sets], images=[task for task, _ in sets])) if sets else None


def _discordant(
    ours: Mapping[str, Answers] | None, theirs: Mapping[str, Answers] | None
) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Yields by set the number of images that one model alone classifies correctly, that the other does, and of all."""
    if ours is None or theirs is None:
        return
    for task, a in ours.items():
        b = theirs[task]
        if a.images != b.images:
            raise SystemExit(f"{task}: the tests used different images; delete the lines of one of the methods")
        yield task, ((a.bits & ~b.bits).bit_count(), (b.bits & ~a.bits).bit_count(), a.n)
