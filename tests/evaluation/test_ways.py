"""A method with a test-time defence is attacked in several ways, and the worst of them counts."""

import math
import shutil
import weakref
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import masked
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks import APGD, PGD, Member, Recipe, Square, TorchAttack, cross_entropy
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule
from robustclip.defences import DBD, ET3, JPEG, MAC, RTPT, TTC, CLIPure, Defence, GaussianNoise, ResizeAndPad
from robustclip.evaluation import OODDetection, ResultsWriter, RobustEvaluation
from robustclip.evaluation.defended_model import Carried, Judge, Way, judged
from robustclip.evaluation.engine import ROBUST
from robustclip.evaluation.ways import Ways, examine_defended, members_through
from robustclip.methods import TeCoA, ZeroShot
from robustclip.methods._shared import saved_state
from robustclip.models.clip import fingerprint
from robustclip.models.layers import frozen
from robustclip.results.run import Run
from robustclip.tools.compare import pair
from robustclip.types import Batch

EPS, COUNT = 5 / 255, 24
PGD5 = PGD(EPS, 1.25 / 255, 5)
FEW = Ways(draws=2, judges=3, queries=30)
LONG = {"pgd": PGD(EPS, 1.25 / 255, 10)}  # leaves few samples for a thousand queries
REFERENCES = [
    *(GaussianNoise(0.1, 2), ResizeAndPad(), JPEG(), TTC(), ET3(), MAC(), DBD(7, 4), CLIPure(), RTPT(4, kept=0.5)),
]
MEMBERS = [Member("pgd", PGD(EPS, 1.25 / 255, 10))]


class Shift(Defence):
    """Moves the image by one pixel to the right."""

    def purify(self, method: Any, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        return images.roll(1, -1)


class Cut(Defence):
    """Leaves the image as it is, but cuts the gradient."""

    backward = "none"

    def purify(self, method: Any, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        return images.detach()


class Climber(Defence):
    """Takes a gradient step, as authors write it, and returns a constant."""

    needs_gradients = True
    backward = "none"

    def purify(self, method: Any, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        x = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(method.logits(x, task).logsumexp(-1).sum(), x)
        return (x + 1e-4 * gradient.sign()).clamp(0, 1).detach()


class Coin(Defence):
    """Adds noise whose numbers are the draw and the sample id alone, and notes both."""

    is_random = True
    seen: set[tuple[int, int]] = set()

    def purify(self, method: Any, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        assert index is not None
        self.seen |= {(int(number), draw) for number in index}
        return images + 0.05 * self.normal(index, tuple(images.shape[1:]), draw=draw)


class Plain(ZeroShot):
    """A method whose author computes gradients inside the forward pass, without a declared defence."""

    def image_features(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            x = images.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(super().image_features(x).square().sum(), x)
        return super().image_features(images - 1e-6 * gradient)


def outcome(folder: Path, name: str, method: ZeroShot, *, size: int = 12, **options: Any) -> Run:
    settings = {"attacks": {"pgd": PGD5}, "max_samples": COUNT, "ways": FEW, **options}
    evaluation = RobustEvaluation(**settings)
    data = CLIPDataModule(test=["shapes:colours"], image_size=32, eval_batch_size=size)
    writer = ResultsWriter(str(folder), name)
    helpers.run_test(method, data, evaluation, writer)
    assert writer.path is not None
    return Run.open(writer.path)


@pytest.fixture(scope="module")
def batch() -> Batch:
    data = CLIPDataModule(test=["shapes:colours"], image_size=32, eval_batch_size=COUNT)
    data.connect(limit=COUNT, done=None)
    data.setup("test")
    return next(iter(data.test_dataloader()[0]))


@pytest.fixture(scope="module")
def task() -> Any:
    data = CLIPDataModule(test=["shapes:colours"], image_size=32)
    data.setup("test")
    return data.test_tasks[0]


def defended(defence: Defence, task: Any) -> ZeroShot:
    method = ZeroShot(defence=defence)
    method.eval().prepare([task])
    return method


def attacked(method: ZeroShot, task: Any, batch: Batch, ways: Ways = FEW, members: Any = MEMBERS, **more: Any) -> Any:
    with frozen(method):
        return examine_defended(method, task.name, batch.images, batch.labels, members, ways, index=batch.index, **more)


def share(by: Tensor) -> float:
    return float((by == ROBUST).float().mean())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "none": outcome(folder, "none", ZeroShot(), ways=Ways(), attacks=LONG),
        "identity": outcome(folder, "identity", ZeroShot(defence=Defence()), ways=Ways(), attacks=LONG),
        "few": outcome(folder, "few", ZeroShot(defence=Shift()), attacks=LONG),
        "cut": outcome(folder, "cut", ZeroShot(defence=Cut()), attacks=LONG, probes=0),
    }


def test_the_identity_defence_equals_no_defence(runs: dict[str, Run]) -> None:
    without, with_identity = runs["none"], runs["identity"]
    columns = ("id", "label", "pixels", "clean", "clean_loss", "largest_logit", "pgd.prediction", "pgd.loss")
    for one, other in zip(without.rows("colours"), with_identity.rows("colours"), strict=True):
        assert {name: one[name] for name in columns} == {name: other[name] for name in columns}
        assert one["pgd.by"] == other["pgd.undefended"] == other["pgd.by"].removeprefix("replay.")
        assert other["pgd.static"] == other["pgd.by"]
    plain, columned = (run.result["tasks"]["colours"]["pgd"] for run in (without, with_identity))
    for name in ("undefended", "static", "adaptive"):
        assert columned[name] == {key: plain[key] for key in ("acc1", "correct", "interval")}
    names = ("none", "identity", "few")
    hashes = [{kind: part["hash"] for kind, part in runs[n].result["protocol"]["colours"].items()} for n in names]
    assert hashes[0] == hashes[1]
    assert hashes[0]["clean"] == hashes[2]["clean"]
    assert hashes[0]["pgd"] != hashes[2]["pgd"]


def alarms(run: Run) -> dict[str, str]:
    """Status by check, of those that warn or fail."""
    checks = run.result["audit"]["checks"]
    return {check["name"]: check["status"] for check in checks if check["status"] in ("warn", "fail")}


def test_the_identity_defence_raises_no_alarm(runs: dict[str, Run]) -> None:
    assert alarms(runs["identity"]) == {}
    statuses = {check["name"]: check["status"] for check in runs["identity"].result["audit"]["checks"]}
    assert statuses["ways"] == "pass"
    assert {row["pgd.own"] for row in runs["identity"].rows("colours")} <= {"", "1"}


class Turned(Defence):
    """Leaves the image as it is, and turns the gradient round."""

    def purify(self, method: Any, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        return masked.through(images, masked.same, lambda g, x: -g)


class Secretive(Defence):
    """Computes a gradient and depends on the draw without saying so."""

    def purify(self, method: Any, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        with torch.enable_grad():
            x = images.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(method.logits(x, task).sum(), x)
        return images + 1e-9 * gradient + 0.01 * draw


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defence", "ways", "noticed"),
    [
        (Turned(), FEW, {"declared", "gradient_fidelity", "ways"}),
        (Secretive(), FEW, {"declared", "autograd_inside"}),
        (Cut(), replace(FEW, names=("replay", "own")), {"ways"}),
        (GaussianNoise(0.1, 1), replace(FEW, draws=1), {"ways"}),
        (Shift(), replace(FEW, queries=0), {"ways"}),
    ],
    ids=["backward turned round", "not declared", "a missing way", "one draw", "no queries"],
)
def test_sabotage_of_an_adaptive_part_lowers_the_grade(
    defence: Defence, ways: Ways, noticed: set[str], tmp_path: Path
) -> None:
    run = outcome(tmp_path, "run", ZeroShot(defence=defence), ways=ways, attacks=LONG)
    assert set(alarms(run)) >= noticed, run.result["audit"]
    assert run.result["audit"]["grade"] in ("C", "F")
    if ways == FEW:
        assert run.result["audit"]["grade"] == "C"  # all ways were tried


@pytest.mark.slow
@pytest.mark.parametrize("defence", REFERENCES, ids=lambda defence: type(defence).__name__)
def test_reference_defences_have_the_properties_that_they_declare(defence: Defence, tmp_path: Path) -> None:
    few = replace(FEW, names=("replay", "own", "identity", "surrogate", "bare"))
    run = outcome(
        tmp_path, "run", ZeroShot(defence=defence), max_samples=8, attacks={"pgd": PGD(EPS, EPS, 1)}, ways=few
    )
    (declared,) = [check for check in run.result["audit"]["checks"] if check["name"] == "declared"]
    assert declared["status"] == "pass", declared
    assert not {"stateful", "random_state", "repeatable", "label_leak", "autograd_inside"} & set(alarms(run))


def test_one_column_is_printed_without_a_defence_and_three_with_one(runs: dict[str, Run]) -> None:
    heads = {name: (run.folder / "table.md").read_text().splitlines()[0] for name, run in runs.items()}
    assert heads["none"] == "| task | n | clean | pgd | seconds |"
    assert "| pgd undefended | pgd static | **pgd adaptive** |" in heads["identity"]
    assert "defence" not in runs["none"].result["model"]
    assert runs["identity"].result["model"]["defence"]["class"] == "Defence"
    assert runs["few"].result["model"]["ways"]["draws"] == 2
    head = (runs["few"].folder / "table.csv").read_text().splitlines()[0]
    assert "pgd_static,pgd_static_low,pgd_static_high,pgd_adaptive" in head


def test_defended_and_undefended_compare_under_one_protocol_alone(runs: dict[str, Run]) -> None:
    assert pair(runs["none"], runs["identity"]).rows
    with pytest.raises(ValueError, match="ways"):
        pair(runs["none"], runs["few"])
    share = f"{100 * runs['few'].result['tasks']['colours']['pgd']['static']['acc1']:.1f}"
    assert run(["report", str(runs["few"].folder), "--out", str(runs["few"].folder / "page.html")]) == 0
    page = (runs["few"].folder / "page.html").read_text()
    assert "Test-time defences" in page
    assert f"{share} static" in page


def test_two_defences_on_the_same_weights_are_checked_to_replay_the_same_images(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    few, cut = runs["few"], runs["cut"]
    hashes = [run.result["tasks"]["colours"]["pgd"]["replayed"] for run in (few, cut, runs["identity"])]
    assert len(set(hashes)) == 1
    assert not [note for note in pair(few, cut).notes if "attacked images" in note]
    folder = Path(shutil.copytree(cut.folder, tmp_path / "other"))
    ledger = folder / "ledger" / "colours.csv"
    replayed = [row["pgd.replayed"] for row in cut.rows("colours")]
    assert len(set(replayed)) == COUNT
    ledger.write_text(ledger.read_text().replace(replayed[3], "0" * 16))
    (note,) = [note for note in pair(few, Run.open(folder)).notes if "attacked images" in note]
    assert note.startswith("colours under pgd: undefended and static rest on other attacked images for 1 of 24 samples")


@pytest.mark.parametrize("changed", [{"draws": 3}, {"judges": 4}, {"queries": 31}, {"names": ("replay", "own")}])
def test_every_setting_of_the_ways_is_in_the_protocol(changed: dict[str, Any]) -> None:
    assert replace(FEW, **changed).axis != FEW.axis
    assert Ways().axis is None


def test_adaptive_is_at_most_static_and_static_at_most_clean(task: Any, batch: Batch) -> None:
    for defence in (Shift(), GaussianNoise(0.1, 1)):
        method = defended(defence, task)
        verdicts = attacked(method, task, batch)
        clean = Judge(method, task.name, FEW.judges, labels=batch.labels, index=batch.index)(batch.images, batch.index)
        is_right = clean.argmax(-1) == batch.labels
        static, adaptive = verdicts.static == ROBUST, verdicts.adaptive.by == ROBUST
        assert not (adaptive & ~static).any()
        assert not (static & ~is_right).any()
        assert share(verdicts.adaptive.by) < share(verdicts.static)


def gradient(model: Any, batch: Batch) -> Tensor:
    images = batch.images.clone().requires_grad_()
    F.cross_entropy(model(images, batch.index), batch.labels, reduction="sum").backward()
    assert images.grad is not None
    return images.grad


def test_every_way_through_the_identity_has_the_same_gradient(task: Any, batch: Batch) -> None:
    class Stand(Defence):
        def surrogate(self, method: Any, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
            return method.logits(images, task)

    method = defended(Stand(), task)
    bare = gradient(lambda images, index: method.logits(images, task.name), batch)
    for name in ("own", "identity", "bare", "surrogate"):
        way = gradient(Way(method, task.name, name, range(1)), batch)
        assert torch.allclose(way, bare, atol=1e-6 * float(bare.abs().max())), name


def test_the_gradients_of_a_shift_are_those_by_hand(task: Any, batch: Batch) -> None:
    method = defended(Shift(), task)
    shifted = batch._replace(images=batch.images.roll(1, -1))
    bare = lambda images, index: method.logits(images, task.name)  # noqa: E731
    at_purified = gradient(bare, shifted)
    tolerance = 1e-5 * float(at_purified.abs().max())
    assert torch.allclose(gradient(Way(method, task.name, "identity", range(1)), batch), at_purified, atol=tolerance)
    own = gradient(Way(method, task.name, "own", range(1)), batch)
    assert torch.allclose(own, at_purified.roll(-1, -1), atol=tolerance)
    # The bare way has the defence's value, so that the derivative of the loss is taken there.
    images = batch.images.clone().requires_grad_()
    value, carrier = bare(shifted.images, None).detach(), bare(images, None)
    slope = value.softmax(-1) - F.one_hot(batch.labels, value.shape[1])
    (by_hand,) = torch.autograd.grad((slope * carrier).sum(), images)
    assert torch.allclose(gradient(Way(method, task.name, "bare", range(1)), batch), by_hand, atol=tolerance)


def test_the_value_of_every_way_is_exactly_the_defences(task: Any, batch: Batch) -> None:
    method = defended(Shift(), task)
    exact = method.answers(batch.images, task.name)
    for name in ("own", "identity", "bare", "black_box"):
        assert torch.equal(Way(method, task.name, name, range(1))(batch.images, batch.index), exact), name
    carried = Carried.apply(torch.ones(2), torch.zeros(2, requires_grad=True))
    assert torch.equal(carried, torch.ones(2))


class _Marked(torch.autograd.Function):
    """A copy whose graph holds a mark."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, marks: "weakref.WeakSet[_Mark]") -> Tensor:
        ctx.mark = _Mark()
        marks.add(ctx.mark)
        return images.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class _Mark:
    """Exists as long as the graph that holds it."""


class MarkedNoise(GaussianNoise):
    """Notes how many draws have their graphs in memory."""

    def __init__(self) -> None:
        super().__init__(0.1, 1)
        self._marks: weakref.WeakSet[_Mark] = weakref.WeakSet()
        self._most = 0

    def forward(self, method: Any, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        logits = super().forward(method, _Marked.apply(images, self._marks), task, index=index, draw=draw)
        self._most = max(self._most, len(self._marks))
        return logits


def test_the_gradient_is_the_mean_over_draws_of_which_one_is_in_memory(task: Any, batch: Batch) -> None:
    defence = MarkedNoise()
    method, images, draws = defended(defence, task), batch.images[:4].clone().requires_grad_(), range(8, 13)
    with frozen(method):
        answers = [method.answers(images, task.name, index=batch.index[:4], draw=draw) for draw in draws]
        mean = torch.stack(answers).mean(0)
        (expected,) = torch.autograd.grad(cross_entropy(mean, batch.labels[:4]).sum(), images)
        assert defence._most == len(draws)
        del answers, mean
        defence._most = 0
        logits = Way(method, task.name, "own", draws)(images, batch.index[:4])
        (gradient,) = torch.autograd.grad(cross_entropy(logits, batch.labels[:4]).sum(), images)
    assert defence._most == 1
    torch.testing.assert_close(gradient, expected, atol=1e-6 * float(expected.abs().max()), rtol=1e-4)
    assert float(gradient.abs().sum()) > 0


def test_a_cut_gradient_is_no_robustness(task: Any, batch: Batch) -> None:
    for defence in (Cut(), Climber()):
        method = defended(defence, task)
        own = attacked(method, task, batch, replace(FEW, names=("replay", "own")))
        way = Way(method, task.name, "own", range(1))
        with frozen(method):
            assert not way(batch.images.clone().requires_grad_(), batch.index).requires_grad
        assert share(own.static) <= 0.1
        # Each gradient that stands in for the cut one succeeds by itself, on images that replay does not reach.
        for name in ("identity", "bare"):
            verdict = attacked(method, task, batch, replace(FEW, names=("replay", name)))
            assert share(verdict.adaptive.by) <= 0.1
        steps = attacked(method, task, batch, replace(FEW, names=("replay", "own"))).adaptive
        assert int(steps.dead.sum()) == 0  # declared, so that its dead gradients are no fault of the attack


def test_replay_runs_the_attack_to_its_end(task: Any, batch: Batch) -> None:
    """Images at the boundary of the bare model fail against noise; those of the attack's end succeed more often."""
    method = defended(GaussianNoise(0.1, 2), task)
    static = share(attacked(method, task, batch, replace(FEW, names=("replay",))).static)
    judge = Judge(method, task.name, FEW.judges, labels=batch.labels, index=batch.index)
    undefended = attacked(method, task, batch, replace(FEW, names=("replay",))).undefended
    at_boundary = (judge(undefended.attacked, batch.index).argmax(-1) == batch.labels).float().mean()
    assert static <= float(at_boundary) - 0.1, (static, float(at_boundary))


def test_replayed_images_belong_to_their_samples(task: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustclip.evaluation import ways

    method, honest = defended(Cut(), task), replace(FEW, names=("replay",))
    before = attacked(method, task, batch, honest)
    original = ways._searches

    def swapped(*args: Any) -> Any:
        for rows, attack in original(*args):
            yield rows.flip(0), attack

    monkeypatch.setattr(ways, "_searches", swapped)
    after = attacked(method, task, batch, honest)
    assert float(before.adaptive.excess.max()) < 1e-6
    assert float(after.adaptive.excess.max()) > EPS  # images of other samples are outside the perturbation set


def test_attack_and_judging_draws_are_disjoint(task: Any, batch: Batch) -> None:
    coin = Coin()
    method = defended(coin, task)
    Coin.seen.clear()
    judge = Judge(method, task.name, FEW.judges, labels=batch.labels, index=batch.index)
    judge(batch.images, batch.index)
    judging = {draw for _, draw in Coin.seen}
    Coin.seen.clear()
    through = [member for member in members_through(coin, MEMBERS, FEW) if member.name.startswith("own")]
    assert through
    attacked(method, task, batch)
    assert judging == {0, 1, 2}
    assert {draw for _, draw in Coin.seen} == {0, 1, 2, 3, 4}  # 3 and 4 are the attack's
    assert {number for number, _ in Coin.seen} == set(batch.index.tolist())


def test_the_mean_over_draws_has_the_mean_gradient(task: Any, batch: Batch) -> None:
    method = defended(GaussianNoise(0.1, 1), task)
    draws, weights = range(8, 12), torch.rand(COUNT, len(task.label_names))

    def slope(model: Any) -> Tensor:
        images = batch.images.clone().requires_grad_()
        (part,) = torch.autograd.grad((weights * model(images, batch.index)).sum(), images)
        return part

    mean = slope(Way(method, task.name, "own", draws))
    alone = [slope(lambda images, index, k=k: method.answers(images, task.name, index=index, draw=k)) for k in draws]
    assert torch.allclose(mean, torch.stack(alone).mean(0), atol=1e-5 * float(mean.abs().max()))
    assert not torch.allclose(alone[0], alone[1], atol=1e-2 * float(mean.abs().max()))


def test_one_draw_without_noise_equals_no_defence(task: Any, batch: Batch) -> None:
    method = defended(GaussianNoise(0.0, 1), task)
    bare = method.logits(batch.images, task.name)
    judge = Judge(method, task.name, 1, labels=batch.labels, index=batch.index)
    assert torch.equal(judge(batch.images, batch.index), bare)
    assert torch.equal(Way(method, task.name, "own", range(1, 2))(batch.images, batch.index), bare)


def test_a_tie_counts_as_misclassified(task: Any, batch: Batch) -> None:
    class Tied(Defence):
        is_random = True

        def forward(self, method: Any, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
            logits = torch.full((len(images), len(method.heads[task])), -9.0)
            logits[:, :2] = 1.0
            return logits

    method = defended(Tied(), task)
    labels = torch.zeros_like(batch.labels)
    judge = Judge(method, task.name, FEW.judges, labels=labels, index=batch.index)
    assert judge(batch.images, batch.index).argmax(-1).eq(1).all()


@pytest.mark.slow
def test_a_random_defence_has_one_verdict_for_any_batch(tmp_path: Path) -> None:
    ledgers = []
    for number, size in enumerate((5, 12)):
        method = ZeroShot(defence=GaussianNoise(0.1, 1))
        rows = outcome(tmp_path, str(number), method, size=size, max_samples=12).rows("colours")
        ledgers.append([(row["id"], row["clean"], row["pgd.static"], row["pgd.by"], row["pgd.share"]) for row in rows])
    assert ledgers[0] == ledgers[1]
    assert {share for *_, share in ledgers[0]} > {"0", "1"}


def test_attacks_that_choose_samples_are_refused_for_random_defences() -> None:
    members = [Member("fab_t", TorchAttack("FAB", EPS))]
    with pytest.raises(ValueError, match="fab_t may choose samples itself"):
        members_through(GaussianNoise(), members, FEW)
    assert members_through(JPEG(), members, FEW)


def test_square_is_the_black_box_of_attacks_without_one() -> None:
    names = [member.name for member in members_through(JPEG(), MEMBERS, FEW)]
    assert names == ["replay.pgd", "own.pgd", "identity.pgd", "bare.pgd", "black_box.square"]
    both = [*MEMBERS, Member("square", Square(EPS, 7))]
    through = members_through(Defence(), both, FEW)
    assert [member.name for member in through] == [
        *("replay.pgd", "replay.square", "own.pgd", "bare.pgd", "black_box.square")
    ]
    assert through[-1].attack.settings["queries"] == 7
    assert "black_box.square" not in [m.name for m in members_through(JPEG(), MEMBERS, replace(FEW, queries=0))]


def test_gradients_inside_a_forward_pass_need_no_declaration(tmp_path: Path) -> None:
    result = outcome(tmp_path, "plain", Plain()).result
    assert result["tasks"]["colours"]["clean"]["acc1"] > 0.9
    assert result["tasks"]["colours"]["pgd"]["acc1"] <= 0.125  # as of the undefended model


def test_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attack_precision must be fp32"):
        outcome(tmp_path, "bf16", ZeroShot(defence=JPEG()), attack_precision="bf16")
    with pytest.raises(ValueError, match="replay first"):
        Ways(names=("own",))
    data = CLIPDataModule(test=["shapes:colours"], image_size=32)
    writer = ResultsWriter(str(tmp_path), "claims", is_undefended=True)
    with pytest.raises(ValueError, match="is_undefended must be false"):
        helpers.run_test(ZeroShot(defence=JPEG()), data, RobustEvaluation({}, max_samples=4), writer)


def test_an_unfinished_test_of_another_defence_is_refused(tmp_path: Path) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    class Halt(ResultsWriter):
        def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
            raise Stop

    data = CLIPDataModule(test=["shapes:colours"], image_size=32, eval_batch_size=12)
    evaluation = RobustEvaluation({}, max_samples=COUNT)
    with pytest.raises(Stop):
        helpers.run_test(ZeroShot(defence=JPEG(60)), data, evaluation, Halt(str(tmp_path), "run"))
    with pytest.raises(ValueError, match=r"defence: .*60.* against .*75"):
        outcome(tmp_path, "run", ZeroShot(defence=JPEG(75)))


def test_detection_is_refused_beside_a_defence(tmp_path: Path) -> None:
    data = CLIPDataModule(test=["shapes:colours"], image_size=32)
    callbacks = [OODDetection(), RobustEvaluation({}, max_samples=4), ResultsWriter(str(tmp_path), "run")]
    with pytest.raises(ValueError, match=r"set model\.defence to null"):
        helpers.run_test(ZeroShot(defence=JPEG()), data, *callbacks)


@pytest.mark.slow
def test_the_command_line_takes_a_defence_and_verify_tests_its_images_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = Path(__file__).parents[2] / "robustclip" / "configs"
    options = ["test", "--config", str(configs / "zero_shot.yaml"), "--data.test", "[shapes:colours]"]
    options += ["--evaluation.max_samples", "6", "--evaluation.save_examples", "3", "--evaluation.ways.draws", "2"]
    options += ["--evaluation.attacks", "{pgd: {class_path: PGD, init_args: {eps: 5/255, alpha: 2/255, steps: 3}}}"]
    options += ["--trainer.enable_progress_bar", "false", "--results.folder", str(tmp_path)]
    defended = [*options, "--model.defence", "GaussianNoise", "--model.defence.copies", "1"]
    assert run([*defended, "--evaluation.ways.queries", "5", "--results.name", "a"]) == 0
    result = Run.open(tmp_path / "a")
    assert result.method == "ZeroShot + GaussianNoise"
    assert result.result["model"]["defence"]["copies"] == 1
    assert result.result["model"]["ways"]["draws"] == 2
    assert list((tmp_path / "a" / "examples" / "colours" / "pgd").iterdir())
    assert run(["verify", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    for wrong, message in (
        (["--model.defence", "GaussianNois"], "there is no class 'GaussianNois'; did you mean GaussianNoise?"),
        (["--model.defence", "JPEG", "--model.defence.qualty", "9"], "did you mean model.defence.quality?"),
        (["--model.defence", "JPEG", "--evaluation.ways.draws", "0"], "draws must be an integer at least 1, got 0"),
    ):
        assert run([*options, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_defence_of_the_documentation_works(task: Any, batch: Batch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "defences.md").read_text()
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    defence = names["Brighter"]()
    changed = defence.purified(None, batch.images, task.name, index=batch.index, draw=0)
    added = (changed - batch.images).amax((1, 2, 3))
    assert torch.allclose(added, 0.1 * defence.uniform(batch.index, (1,), draw=0)[:, 0], atol=1e-6)
    assert share(attacked(defended(defence, task), task, batch).adaptive.by) <= 0.1


def test_checkpoints_without_a_defence_load_into_a_method_with_one() -> None:
    plain, method = TeCoA(), TeCoA(defence=TTC())
    assert plain.inference_settings == method.inference_settings
    assert fingerprint(plain) == fingerprint(method)
    names = [name for name, _ in plain.named_parameters() if name in plain.trained_names]
    state = {name: plain.state_dict()[name] for name in names}
    content = {"state_dict": state, "base_model": saved_state.identity(plain.clip)}
    method.on_load_checkpoint(content | {saved_state.SETTINGS: plain.inference_settings})
    assert method.load_state_dict(state, strict=False).unexpected_keys == []


def test_probabilities_that_vanish_leave_finite_logits() -> None:
    answers = torch.tensor([[[500.0, 0.0]], [[400.0, 0.0]]])
    assert torch.allclose(judged(answers), torch.tensor([[0.0, -400.0 - math.log(2)]]))


class Halt(RobustEvaluation):
    """Ends the test after its first batch, as a kill would."""

    def see(self, *args: Any) -> None:
        super().see(*args)
        raise KeyboardInterrupt


@pytest.mark.slow
def test_a_killed_test_of_a_random_defence_resumes_with_the_same_ledger(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_samples": 8, "ways": FEW}
    runs = []
    for name, kinds in (("whole", [RobustEvaluation]), ("killed", [Halt, RobustEvaluation])):
        for kind in kinds:
            data = CLIPDataModule(test=["shapes:colours"], image_size=32, eval_batch_size=4)
            writer = ResultsWriter(str(tmp_path), name)
            with suppress(KeyboardInterrupt, SystemExit):
                helpers.run_test(ZeroShot(defence=GaussianNoise(0.1, 1)), data, kind({"pgd": PGD5}, **options), writer)
        runs.append(Run.open(tmp_path / name).rows("colours"))
    times = ("seconds", "bare_seconds", "defended_seconds")
    whole, killed = ([{k: v for k, v in row.items() if k not in times} for row in rows] for rows in runs)
    assert len(whole) == 8
    assert whole == killed


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("cascade", 7), ("cascade", 24), ("autoattack", 24)])
def test_the_identity_defence_equals_no_defence_under_recipes(name: Any, size: int, tmp_path: Path) -> None:
    attacks = {"attack": Recipe(name, EPS, budget=0.05)}
    rows = []
    for folder, defence in (("none", None), ("identity", Defence())):
        evaluation = RobustEvaluation(attacks, max_samples=24)
        data = CLIPDataModule(test=["shapes:colours"], image_size=32, eval_batch_size=size)
        helpers.run_test(ZeroShot(defence=defence), data, evaluation, ResultsWriter(str(tmp_path), folder))
        rows.append(Run.open(tmp_path / folder).rows("colours"))
    for one, other in zip(*rows, strict=True):
        assert one["attack.by"] == other["attack.undefended"] == other["attack.by"].removeprefix("replay.")
        assert one["attack.prediction"] == other["attack.prediction"]


@pytest.fixture(scope="module")
def many() -> Batch:
    data = CLIPDataModule(test=["shapes:colours"], image_size=32, eval_batch_size=48)
    data.connect(limit=48, done=None)
    data.setup("test")
    return next(iter(data.test_dataloader()[0]))


APGDS = [Member("ce", APGD(EPS, 20, loss="ce")), Member("margin", APGD(EPS, 20, loss="margin"))]


@pytest.mark.slow
@pytest.mark.parametrize("defence", [TTC(), ET3()], ids=lambda defence: type(defence).__name__)
def test_defences_without_a_gradient_look_strong_to_their_own_and_are_not(
    defence: Defence, task: Any, many: Batch
) -> None:
    method, ways = defended(defence, task), Ways(draws=2, judges=4, queries=0)
    verdicts = attacked(method, task, many, ways, APGDS[1:])
    assert share(verdicts.adaptive.by) <= 0.2
    judge = Judge(method, task.name, 4, labels=many.labels, index=many.index)
    with frozen(method):
        model = partial(Way(method, task.name, "own", range(4, 5)), index=many.index)
        own = PGD(EPS, 1.25 / 255, 10)(many.images, model, many.labels, index=many.index)
    assert float((judge(own, many.index).argmax(-1) == many.labels).float().mean()) >= 0.8


@pytest.mark.slow
def test_mac_falls_to_its_surrogate(task: Any, batch: Batch) -> None:
    method, ways = defended(MAC(), task), Ways(("replay", "surrogate"), draws=1, judges=3)
    verdicts = attacked(method, task, batch, ways)
    assert share(verdicts.static) >= share(verdicts.adaptive.by) + 0.1


@pytest.mark.slow
def test_noise_falls_to_its_own_gradient(task: Any, many: Batch) -> None:
    verdicts = attacked(defended(GaussianNoise(), task), task, many, Ways(draws=4, queries=0), APGDS[1:])
    assert share(verdicts.adaptive.by) <= 0.15
    assert share(verdicts.static) >= share(verdicts.adaptive.by) + 0.1


def test_clipure_that_turns_features_back_is_as_robust_as_no_defence(task: Any, batch: Batch) -> None:
    """Features at 72 to 81 degrees from the blank text return to their places after ten steps."""
    defence = CLIPure()
    method = defended(defence, task)
    with torch.no_grad():
        features = method.image_features(batch.images)
        blank = torch.linalg.pinv(features) @ torch.full((COUNT,), 0.2)
        assert blank.norm() < 1
        other = torch.randn_like(blank)
        other -= torch.linalg.pinv(features) @ (features @ other)
        blank += (1 - blank.norm() ** 2).sqrt() * F.normalize(other, dim=0)
    defence._blank = method.heads[task.name], blank
    assert torch.allclose(features @ blank, torch.full((COUNT,), 0.2), atol=1e-3)
    bare = method.logits(batch.images, task.name).detach()
    assert torch.allclose(method.answers(batch.images, task.name), bare, atol=1e-3 * float(bare.abs().max()))
    verdicts = attacked(method, task, batch)
    assert share(verdicts.adaptive.by) <= share(verdicts.undefended.by)


@pytest.mark.parametrize("defence", [GaussianNoise(0.1, 1), Cut()], ids=lambda defence: type(defence).__name__)
def test_probed_samples_repeat_their_answers_and_fall_to_stronger_attacks(defence: Defence, tmp_path: Path) -> None:
    ways = replace(FEW, names=("replay", "own", "bare"))
    run = outcome(tmp_path, "probed", ZeroShot(defence=defence), max_samples=8, attacks=LONG, ways=ways)
    statuses = {check["name"]: check["status"] for check in run.result["audit"]["checks"]}
    rows = run.rows("colours")
    assert all(float(row["repeat"]) < 1e-3 * max(1, float(row["largest_logit"])) for row in rows)
    assert {row["pgd.wider"] for row in rows if row["pgd.by"].startswith("replay")} == {"1"}
    assert statuses["pixel_gradients"] in ("pass", "not_measured")
