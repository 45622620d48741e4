"""Stored adversarial examples pass their checks, and fail them after a change of any value."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustclip.attacks import PGD
from robustclip.data.sources.shapes import ShapesDataset
from robustclip.intervals import wilson
from robustclip.methods import RobustMethod, ZeroShot
from robustclip.results.adversarial_examples import Example, load_all, save
from robustclip.results.ledger import Ledger, columns
from robustclip.results.protocol import attack_axes
from robustclip.results.run import EXAMPLES, LEDGERS, RESULT, Run
from robustclip.tools.verify import TOLERANCE, Transfer, replay, transfers, verify
from robustclip.types import Task

TASK, EPS, SAMPLES = "colours", 2 / 255, 40


def build(config: dict[str, Any]) -> RobustMethod:
    return ZeroShot(**config["model"])


def images_and_labels() -> tuple[Tensor, Tensor]:
    shapes = ShapesDataset(TASK)
    images = [torch.from_numpy(np.array(shapes[number][0])).permute(2, 0, 1) / 255 for number in range(SAMPLES)]
    return torch.stack(images), torch.tensor(shapes.labels[:SAMPLES])


def measure(norm: str, eps: float) -> tuple[dict[str, Any], list[dict[str, object]], list[Example]]:
    """Result, ledger rows and examples of a test written out here."""
    shapes, method = ShapesDataset(TASK), build({"model": {"pretrained": "shapes"}}).eval()
    method.prepare([Task(TASK, shapes.class_names, shapes.templates)])
    images, labels = images_and_labels()
    attack = PGD(eps=eps, alpha=eps / 2, steps=5, norm=norm)
    attacked = attack(images, lambda x: method.logits(x, TASK), labels, index=torch.arange(SAMPLES))
    with torch.no_grad():
        clean, found = (method.logits(each, TASK).argmax(-1) for each in (images, attacked))
    by = ["clean" if x != y else "pgd" if z != y else "" for x, z, y in zip(clean, found, labels, strict=True)]
    rows = [
        {"id": i, "label": labels[i].item(), "clean": clean[i].item(), "pgd.by": by[i], "pgd.prediction": int(found[i])}
        for i in range(SAMPLES)
    ]
    examples = [
        Example(images[i], attacked[i], TASK, "pgd", i, *map(int, (labels[i], clean[i], found[i])), by[i], eps, norm)
        for i in range(SAMPLES)
        if by[i] == "pgd"
    ]
    axes = attack_axes({"pgd": {"norm": norm, "eps": eps, "steps": 5}})
    classes = {"class_names": list(shapes.class_names), "templates": list(shapes.templates)}
    result = {
        "method": "ZeroShot",
        "tasks": {},
        "mean": {"clean": {}, "pgd": {}},
        "protocol": {TASK: {"pgd": {"axes": axes}}},
        "config": {"model": {"pretrained": "shapes"}},
        "classes": {TASK: classes},
    }
    return result, rows, examples


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], list[dict[str, object]], list[Example]]:
    return measure("linf", EPS)


@pytest.fixture
def run(tmp_path: Path, measured: tuple[dict[str, Any], list[dict[str, object]], list[Example]]) -> Path:
    return write_run(tmp_path / "run", *measured)


def write_run(folder: Path, result: dict[str, Any], rows: list[dict[str, object]], examples: list[Example]) -> Path:
    (folder / LEDGERS).mkdir(parents=True)
    (folder / RESULT).write_text(json.dumps(result))
    Ledger(folder / LEDGERS / f"{TASK}.csv", columns(["pgd"])).append(rows)
    for example in examples:
        save(example, folder / EXAMPLES)
    return folder


def first(run: Path) -> Example:
    return next(load_all(run / EXAMPLES))


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 0.5)])
def test_an_intact_run_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str], norm: str, eps: float) -> None:
    result, rows, examples = measure(norm, eps)
    assert len(examples) >= 5
    run = write_run(tmp_path / "run", result, rows, examples)
    assert verify(run, build) == 0
    assert verify(run / RESULT, build) == 0
    words = capsys.readouterr().out.replace("│", " ").split()
    place = words.index(TASK)
    assert words[place : place + 5] == [TASK, "pgd", str(len(examples)), str(len(examples)), "0"]


def outside_ball(given: Example) -> Example:
    sign = (given.attacked - given.clean).sign()
    return given._replace(attacked=(given.clean + sign * (EPS + 3 * TOLERANCE)).clamp(0, 1))


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (
            lambda it: it._replace(label=it.prediction),
            ["the attacked image is classified correctly", "the ledger differs"],
        ),
        (lambda it: it._replace(label=(it.label + 1) % 3 + 3), ["the ledger differs"]),
        (outside_ball, ["outside the radius"]),
        (lambda it: it._replace(attacked=it.attacked - 2), ["outside the radius", "attacked image outside [0, 1]"]),
        (lambda it: it._replace(attacked=it.attacked * torch.nan), ["outside the radius"]),
        (
            lambda it: it._replace(attacked=outside_ball(it).attacked, eps=2 * EPS),
            ["another radius than in the protocol"],
        ),
        (lambda it: it._replace(eps=float("inf")), ["another radius than in the protocol"]),
        (lambda it: it._replace(norm="l2", eps=5.0), ["another radius than in the protocol"]),
        (lambda it: it._replace(prediction=it.prediction + 20), ["another prediction of the attacked image"]),
        (lambda it: it._replace(clean_prediction=it.prediction), ["another prediction of the clean image"]),
        (
            lambda it: it._replace(attacked=it.clean),
            ["another prediction of the attacked", "the attacked image is classified correctly"],
        ),
        (lambda it: it._replace(by="fgsm"), ["the ledger differs"]),
    ],
)
def test_a_changed_example_is_reported(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Example], Example],
    reasons: list[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    given = first(run)
    save(change(given), run / EXAMPLES)
    assert verify(run, build) == 1
    output = capsys.readouterr().out
    for reason in reasons:
        assert reason in output
    assert f"1 ({given.number})" in output


def test_a_changed_ledger_is_reported(run: Path) -> None:
    path = run / LEDGERS / f"{TASK}.csv"
    numbers = [each.number for each in load_all(run / EXAMPLES)]
    lines = [line for line in path.read_text().splitlines() if line.split(",")[0] != str(numbers[0])]
    path.write_text("\n".join(lines).replace(",pgd,", ",,") + "\n")
    assert verify(run, build) == len(numbers)


def test_other_weights_are_reported(run: Path) -> None:
    def forgetful(config: dict[str, Any]) -> RobustMethod:
        method = build(config)
        torch.nn.init.normal_(method.clip.net.visual.conv1.weight, generator=torch.Generator().manual_seed(0))
        return method

    assert verify(run, forgetful) > 0


def test_the_method_is_judged_in_evaluation_mode_and_float32(run: Path) -> None:
    seen = []

    def spied(config: dict[str, Any]) -> RobustMethod:
        method = build(config).double().train()
        visual = method.clip.net.visual
        visual.register_forward_hook(
            lambda module, inputs, output: seen.append((module.training, output.dtype, output.requires_grad))
        )
        return method

    assert verify(run, spied) == 0
    assert set(seen) == {(False, torch.float32, False)}


def test_replay_equals_a_direct_count(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ZeroShot(pretrained="shapes")
    weight = other.clip.net.visual.conv1.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    weight.data += 0.5 * weight.abs().mean() * noise
    found = transfers(Run.open(run), other)
    examples = list(load_all(run / EXAMPLES))
    labels = torch.tensor([each.label for each in examples])
    with torch.no_grad():
        clean, attacked = (
            other.logits(torch.stack([getattr(each, name) for each in examples]), TASK).argmax(-1) == labels
            for name in ("clean", "attacked")
        )
    counts = [len(examples), *(int(each.sum()) for each in (clean, attacked, clean & ~attacked))]
    assert found == {(TASK, "pgd"): Transfer(*counts)}
    assert 0 < counts[3] < counts[1] <= counts[0]
    replay(run, other)
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    low, high = wilson(counts[3], counts[1])
    assert f"{100 * counts[3] / counts[1]:.1f}" in output
    assert f"{100 * low:.1f} to {100 * high:.1f}" in output


def test_a_run_without_examples_is_refused_with_the_option_that_keeps_them(tmp_path: Path, measured: Any) -> None:
    run = write_run(tmp_path / "run", measured[0], measured[1], [])
    for start in (lambda: verify(run, build), lambda: replay(run, ZeroShot())):
        with pytest.raises(
            ValueError, match=r"no adversarial examples; test again with `--evaluation.save_examples N`"
        ):
            start()


@pytest.mark.parametrize("missing", ["config", "classes"])
def test_a_result_without_a_needed_part_is_refused(tmp_path: Path, measured: Any, missing: str) -> None:
    result = {name: value for name, value in measured[0].items() if name != missing}
    run = write_run(tmp_path / "run", result, measured[1], measured[2][:1])
    with pytest.raises(ValueError, match=f"has no {missing}"):
        verify(run, build)


def test_examples_of_an_unknown_task_are_refused(run: Path) -> None:
    save(first(run)._replace(task="letters"), run / EXAMPLES)
    Ledger(run / LEDGERS / "letters.csv", columns(["pgd"]))
    with pytest.raises(ValueError, match=r"result\.json has no classes of letters"):
        verify(run, build)
