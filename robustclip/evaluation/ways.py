"""Ways of attacking a method through its test-time defence, and the worst case over all of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from robustclip.arguments import Count, CountOrZero, checked
from robustclip.attacks import Attack, Member, Square
from robustclip.attacks.attack import Forward, Loss
from robustclip.defences import Defence
from robustclip.evaluation.defended_model import Judge, Way, defence_of
from robustclip.evaluation.engine import ROBUST, WRONG, Rung, StopRule, Verdict, attack_rows, examine
from robustclip.methods import RobustMethod
from robustclip.models.tensor_files import digest
from robustclip.types import Batch

WayName = Literal["replay", "own", "identity", "surrogate", "bare", "black_box"]
WAYS: tuple[WayName, ...] = ("replay", "own", "identity", "surrogate", "bare", "black_box")


@checked
@dataclass(frozen=True)
class Ways:
    """How a test attacks a method with a `Defence`; it changes nothing for methods without one.

    The value that an attack sees is always the defence's answer. The ways differ in the gradient:

    - ``replay``: images of the attack on the undefended model, run to its end, without any gradient of the defence;
    - ``own``: the gradient as autograd gives it;
    - ``identity``: the gradient of the undefended model at the purified image (BPDA, arXiv:1802.00420);
    - ``surrogate``: the gradient of the defence's own `Defence.surrogate`;
    - ``bare``: the gradient of the undefended model at the attacked image;
    - ``black_box``: none; the attack's own black-box members, or else Square.

    A way that a defence does not have is left out.

    Args:
        names: ways to try, in this order; ``replay`` is first.
        draws: number of draws of a random defence over which an attack averages its logits (EOT, arXiv:1707.07397).
        judges: number of other draws whose mean prediction decides whether an image is misclassified.
        queries: queries of Square in ``black_box`` if the attack has no black-box member.

    Raises:
        ValueError: a way occurs twice, or ``replay`` is not the first.
    """

    names: tuple[WayName, ...] = WAYS
    draws: Count = 20
    judges: Count = 8
    queries: CountOrZero = 1000

    def __post_init__(self) -> None:
        if self.names[:1] != ("replay",) or len(set(self.names)) < len(self.names):
            raise ValueError(f"names: give replay first and every way once, got {list(self.names)}")

    @property
    def axis(self) -> dict[str, Any] | None:
        """The protocol's axis ``ways``: all settings, or None for the defaults, under which results need no axis."""
        return None if self == Ways() else self.settings

    @property
    def settings(self) -> dict[str, Any]:
        """All settings in JSON's types."""
        return {**asdict(self), "names": list(self.names)}


class Defended(NamedTuple):
    """Verdicts of one attack on a defended method, for ``B`` samples.

    Attributes:
        undefended: verdict on the method without its defence.
        static: ``(B,)`` number of the member whose replayed images succeed, `ROBUST`, or `WRONG`.
        adaptive: verdict over all ways; its numbers are places in `members_through`.
        share: ``(B,)`` share of the judging draws that classify the attacked image correctly.
    """

    undefended: Verdict
    static: Tensor
    adaptive: Verdict
    share: Tensor


def members_through(defence: Defence, members: Sequence[Member], ways: Ways) -> list[Member]:
    """Lists the members of an attack once per way, under names such as ``bare.apgd``, in the order in which they run.

    Args:
        defence: defence of the method.
        members: members of the attack.
        ways: ways to try.

    Raises:
        ValueError: a member may choose samples itself, and the defence is random.
    """
    for member in members:
        if defence.is_random and not member.attack.is_anytime:
            raise ValueError(
                f"evaluation.attacks: {member.name} may choose samples itself, so that random numbers of"
                f" {type(defence).__name__} have no sample ids; take PGD, APGD, Square or the recipe cascade"
            )
    return [
        member._replace(name=f"{name}.{member.name}")
        for name in ways.names
        for member in _of_way(name, members, ways)
        if name not in ("identity", "surrogate") or _NEEDS[name] in defence.overrides
    ]


_NEEDS = {"identity": "purify", "surrogate": "surrogate"}  # function that a defence overrides if it has the way


def _of_way(name: str, members: Sequence[Member], ways: Ways) -> list[Member]:
    """Lists the members that a way runs; those without gradients would do the same in every way."""
    blind = [member for member in members if member.attack.is_black_box]
    if name == "replay":
        return list(members)
    if name != "black_box":
        return [member for member in members if member not in blind]
    first = members[0].attack
    if blind or not first.eps or first.norm not in ("linf", "l2") or not ways.queries:
        return blind
    square = Square(first.eps, ways.queries, "l2" if first.norm == "l2" else "linf")
    return [Member("square", square.aimed_as(first))]


def examine_defended(
    method: RobustMethod,
    task: str,
    images: Tensor,
    labels: Tensor,
    members: Sequence[Member],
    ways: Ways,
    *,
    index: Tensor,
    seed: int = 0,
    stop: StopRule = "worst",
    check_every: int = 1,
    clean_logits: Tensor | None = None,
) -> Defended:
    """Attacks ``B`` samples on the undefended method, then on the defended one in one way after another.

    A sample counts as robust only if every way with every member leaves it correct. For random defences only the images
    that members return are judged, by draws that no attack sees.

    Args:
        method: method with a defence.
        task: name of the task.
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        members: members of the attack, from cheap to expensive.
        ways: ways to try.
        index: ``(B,)`` sample ids.
        seed: see `Attack`.
        stop: ``worst`` or ``last``.
        check_every: see `examine`.
        clean_logits: answer of the `Judge` to the clean images if it is known.
    """
    defence = defence_of(method)
    with torch.inference_mode(False):
        images, labels, index = (tensor.detach().clone() for tensor in (images, labels, index))
        bare: Forward = partial(method.logits, task=task)
        options: dict[str, Any] = {"index": index, "seed": seed, "check_every": check_every}
        undefended = examine(images, labels, bare, members, stop=stop, **options)
        judge = Judge(method, task, ways.judges, labels=labels, index=index)
        logits = judge(images, index) if clean_logits is None else clean_logits
        verdict = Verdict.before(images, labels, logits, members[0].attack.aim)
        static = verdict.by
        # Every look of a random verdict could succeed by luck, so only the returned images are judged.
        options["stop"] = "last" if defence.is_random else stop
        for number, (name, member) in enumerate(_split(members_through(defence, members, ways))):
            before, model = (verdict.steps.clone(), verdict.dead.clone()), _model(name, method, task, ways)
            for rows, attack in _searches(name, member, members, bare, undefended, verdict):
                rung = Rung(model, is_fp32=True)
                attack_rows(verdict, rows, images, labels, rung, judge, attack, number=number, **options)
            if name == "own" and defence.backward == "none":  # these gradients are declared to be cut
                verdict.steps, verdict.dead = before
            static = verdict.by.clone() if name == "replay" else static
        return Defended(undefended, static, verdict, judge.share(verdict.attacked))


def falls_to_own(
    method: RobustMethod,
    task: str,
    images: Tensor,
    labels: Tensor,
    members: Sequence[Member],
    ways: Ways,
    *,
    index: Tensor,
    seed: int,
    stop: StopRule,
) -> list[int]:
    """Returns 1 for each sample that the defence's own gradient misclassifies, else 0.

    Args:
        method: method with a defence.
        task: name of the task.
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        members: result of `members_through`.
        ways: ways to try.
        index: ``(B,)`` sample ids.
        seed: see `Attack`.
        stop: ``worst`` or ``last``.
    """
    with torch.inference_mode(False):
        images, labels, index = (tensor.detach().clone() for tensor in (images, labels, index))
        judge = Judge(method, task, ways.judges, labels=labels, index=index)
        verdict = Verdict.before(images, labels, judge(images, index), members[0].attack.aim)
        rung = Rung(_model("own", method, task, ways), is_fp32=True)
        options: dict[str, Any] = {"index": index, "seed": seed, "check_every": 1}
        options["stop"] = "last" if defence_of(method).is_random else stop
        for number, (name, member) in enumerate(_split(members)):
            rows = (verdict.by == ROBUST).nonzero()[:, 0]
            if name == "own" and len(rows):
                attack_rows(verdict, rows, images, labels, rung, judge, member.attack, number=number, **options)
        return [int(number >= 0) for number in verdict.by.tolist()]


def _split(members: Sequence[Member]) -> list[tuple[str, Member]]:
    """Splits names such as ``bare.apgd`` into the way and the member under its own name."""
    parts = [(member.name.split(".", 1), member) for member in members]
    return [(way, member._replace(name=name)) for (way, name), member in parts]


class _Replayed(Attack):
    """Returns images that attack the undefended model, whatever model it receives."""

    def __init__(self, attack: Attack, forward: Forward, images: Tensor | None = None) -> None:
        self.eps, self.norm, self.target, self._aim = attack.eps, attack.norm, attack.target, attack.aim
        self._attack, self._forward, self._images = attack, forward, images

    def perturb(
        self, images: Tensor, forward: Forward, targets: Tensor, loss: Loss, *, index: Tensor | None, seed: int
    ) -> Tensor:
        """Returns the given images, or runs the attack on the undefended model to its end."""
        if self._images is not None:
            return self._images
        return self._attack(images, self._forward, targets, loss, index=index, seed=seed)


def _searches(
    way: str, member: Member, members: Sequence[Member], bare: Forward, undefended: Verdict, verdict: Verdict
) -> Iterator[tuple[Tensor, Attack]]:
    """Yields the samples that are still correct, with the attack that a member runs on them.

    For ``replay`` these are the images on which the test of the undefended model has ended, each by its own member, and
    then those at the end of the attack, which are further beyond the boundary.
    """
    number = [part.name for part in members].index(member.name) if way == "replay" else 0
    if way == "replay":
        is_own = undefended.by.clamp(min=0) == number
        rows = ((verdict.by == ROBUST) & is_own).nonzero()[:, 0]
        if len(rows):
            yield rows, _Replayed(member.attack, bare, undefended.attacked[rows])
    rows = (verdict.by == ROBUST).nonzero()[:, 0]
    if len(rows) and not (way == "replay" and member.attack.is_black_box):
        yield rows, _Replayed(member.attack, bare) if way == "replay" else member.attack


def _model(name: str, method: RobustMethod, task: str, ways: Ways) -> Forward:
    """Makes the model that the attacks of a way receive."""
    draws = range(ways.judges, ways.judges + ways.draws) if defence_of(method).is_random else range(1)
    return Way(method, task, name, draws)


class Clean(NamedTuple):
    """Answers of a defended method to clean images.

    Attributes:
        judge: model that decides.
        logits: ``(B, C)`` of the judge.
        columns: columns of the ledger about the samples, see `ledger.DEFENDED_SAMPLE_COLUMNS`.
    """

    judge: Judge
    logits: Tensor
    columns: dict[str, list[object]]


def clean_answers(method: RobustMethod, task: str, batch: Batch, ways: Ways) -> Clean:
    """Answers clean images with and without the defence, and measures the seconds of both.

    Args:
        method: method with a defence.
        task: name of the task.
        batch: clean images.
        ways: settings with the number of judging draws.
    """
    images, index = batch.images.clone(), batch.index.clone()
    judge = Judge(method, task, ways.judges, labels=batch.labels.clone(), index=index)
    times = [perf_counter()]
    bare = method.logits(images, task).argmax(-1).tolist()
    times.append(perf_counter())
    logits = judge(images, index)
    times.append(perf_counter())
    of_bare, of_defended = ((end - start) / len(images) for start, end in pairwise(times))
    seconds = {"bare_seconds": of_bare, "defended_seconds": of_defended / len(judge.draws)}
    return Clean(judge, logits, {"bare": bare, **{name: [value] * len(images) for name, value in seconds.items()}})


def columns_of(defended: Defended, members: Sequence[Member], through: Sequence[Member]) -> dict[str, list[object]]:
    """Returns the ledger's columns beside those of the adaptive verdict, see `ledger.DEFENDED_COLUMNS`.

    Args:
        defended: verdicts of one attack.
        members: members of the attack.
        through: result of `members_through`.
    """
    names, ways = ({ROBUST: "", WRONG: "clean"} | dict(enumerate(m.name for m in of)) for of in (members, through))
    return {
        "undefended": [names[number] for number in defended.undefended.by.tolist()],
        "static": [ways[number] for number in defended.static.tolist()],
        "replayed": [digest(image)[:16] for image in defended.undefended.attacked.cpu()],
        "share": defended.share.tolist(),
    }


def add_columns(rows: Sequence[dict[str, object]], columns: Mapping[str, Sequence[object]]) -> None:
    """Adds columns to the rows of a batch; fractions get five digits.

    Args:
        rows: one row per sample.
        columns: one value per sample, by the name of the column.
    """
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = f"{value:.5g}" if isinstance(value, float) else value
