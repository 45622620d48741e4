"""Sentences about a class take the place of its prompts, from the file to the classifier and back from a result."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_shards
from torch.nn import functional as F

from robustclip.cli.main import run
from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.opened_source import open_source
from robustclip.data.task_parts import narrowed
from robustclip.methods import FLYP, ZeroShot
from robustclip.results.run import Run
from robustclip.types import Task

SENTENCES = {
    "Red_Thing": ["A thing that is red.", "Red like blood.", "It is red."],
    "green": ["It looks like grass."],
    "blue": ["The colour of the sky.", "Blue."],
    "mauve": ["Not in this set."],
}
CLASSES = ("red thing", "green", "blue")


def source(folder: Path, content: Any = SENTENCES, **options: Any) -> DataSource:
    write_shards(folder, "set", "test", [6], CLASSES)
    (folder / "cupl.json").write_text(json.dumps(content))
    return DataSource("wds:set", descriptions="cupl.json", **options)


def task_of(folder: Path, content: Any = SENTENCES, **options: Any) -> Task:
    return open_source(source(folder, content, **options), root=str(folder), split="test").task


def test_classes_are_the_means_of_their_own_sentences(tmp_path: Path, tiny_model: Path) -> None:
    task = task_of(tmp_path)
    assert task.prompts == [SENTENCES["Red_Thing"], SENTENCES["green"], SENTENCES["blue"]]
    clip = ZeroShot(pretrained=str(tiny_model)).clip
    with torch.no_grad():
        rows = [clip.encode_text(texts).mean(0) for texts in task.prompts]
        torch.testing.assert_close(clip.encode_classes(task), F.normalize(torch.stack(rows), dim=-1))


def test_part_of_a_set_keeps_the_sentences_of_its_classes(tmp_path: Path) -> None:
    assert task_of(tmp_path, classes="1-2").prompts == [SENTENCES["green"], SENTENCES["blue"]]
    groups = narrowed(Task("t", CLASSES, groups=((0, 2), (1,)), descriptions=(("a",), ("b",), ("c", "d"))), [0])
    assert groups.prompts == [["a"], ["c", "d"]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "mapping of class name"),
        ({"red thing": ["x"]}, "no sentences of 2 classes, such as 'green', 'blue'"),
        (SENTENCES | {"blue": []}, "class 'blue'.* one or more sentences"),
        (SENTENCES | {"blue": "sky"}, "class 'blue'.* list"),
        (SENTENCES | {"blue": [" "]}, "class 'blue'.* sentences"),
        (SENTENCES | {"blue": ["\x1b[2J"]}, "class 'blue'.* sentence"),
    ],
)
def test_files_with_other_content_are_refused(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"wds:set.*{words}"):
        task_of(tmp_path, content)


def test_templates_beside_descriptions_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give one of both"):
        task_of(tmp_path, templates="a {}")
    (tmp_path / "cupl.json").unlink()
    with pytest.raises(ValueError, match=r"cupl\.json.* cannot be read"):
        open_source(DataSource("wds:set", descriptions="cupl.json"), root=str(tmp_path), split="test")


def test_a_method_that_draws_templates_refuses_descriptions(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="FLYP draws a template"):
        FLYP(pretrained=str(tiny_model)).prepare_training(task_of(tmp_path))


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("descriptions")
    task = open_source("shapes:colours", root=str(folder), split="test").task
    for name, end in {"cupl": "", "other": " here"}.items():
        own = {prompts[0]: [f"{prompt}{end}" for prompt in prompts] for prompts in task.prompts}
        content = dict(zip(task.class_names, own.values(), strict=True))
        (folder / f"{name}.json").write_text(json.dumps(content))
    words = ["test", "--model", "ZeroShot", "--model.pretrained", "shapes", "--evaluation.save_examples", "2"]
    words += ["--evaluation.attacks", "{pgd: {class_path: PGD, init_args: {eps: 8/255, steps: 3}}}"]
    words += ["--evaluation.max_samples", "8", "--data.root", str(folder), "--results.folder", str(folder / "results")]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    for name in ("cupl", "other"):
        sets = f"[{{source: 'shapes:colours', descriptions: {name}.json}}]"
        assert run([*words, "--data.test", sets, "--results.name", name]) == 0
    return {name: folder / "results" / name for name in ("cupl", "other")}


@pytest.mark.slow
def test_unlike_descriptions_refuse_to_compare(tests: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(tests["cupl"]), str(tests["other"])]) != 0
    assert "templates: descriptions of 12 classes, digest" in capsys.readouterr().err
    assert run(["compare", str(tests["cupl"]), str(tests["cupl"])]) == 0


def test_a_result_is_verified_with_its_descriptions(tests: dict[str, Path]) -> None:
    stored = Run.open(tests["cupl"]).result["classes"]["colours"]["descriptions"]
    assert stored[0] == json.loads((tests["cupl"].parents[1] / "cupl.json").read_text())["red"]
    assert run(["verify", str(tests["cupl"])]) == 0


def test_training_sets_with_unlike_sentences_are_not_joined(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_shards(tmp_path, name, "train", [3], CLASSES)
    (tmp_path / "cupl.json").write_text(json.dumps(SENTENCES))
    data = CLIPDataModule([DataSource("wds:one", descriptions="cupl.json"), "wds:two"], root=str(tmp_path))
    with pytest.raises(ValueError, match="same class names and templates"):
        data.setup("fit")
