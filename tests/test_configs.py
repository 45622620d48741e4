"""Every YAML in configs/ is run, with the models and data of the machine at hand."""

from pathlib import Path

import pytest
import yaml
from anchor_cases import shapes_anchors
from helpers import tiny_clip

from robustclip.cli.lightning import main
from robustclip.results.run import Run

CONFIGS = Path(__file__).parents[1] / "robustclip" / "configs"
RUNS = sorted(path.name for path in CONFIGS.glob("*.yaml"))
PARTS = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.yaml"))
SMALL = [
    "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "32", "--trainer.logger", "false",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--trainer.max_epochs", "1",
    "--trainer.limit_train_batches", "2", "--evaluation.max_samples", "2", "--evaluation.fit_max_samples", "2",
    "--model.arch", "null", "--model.pretrained", "shapes", "--model.image_size", "null",
    "--data.global_batch_size", "2", "--data.num_workers", "0", "--data.holdout", "0.1", "--results.averages", "null",
    "--data.train", "shapes:source", "--data.test", "[shapes:colours,shapes:counts]",
]  # fmt: skip
UNKNOWN = [
    "--data.train", "{source: 'shapes:source', name: null, classes: 0-4, images: 2-6, shift: null, known: null}",
    "--data.unknown", "[{source: 'shapes:colours', name: null, classes: 0-5, shift: null, known: null}]",
    "--data.eval_batch_size", "32",
]  # fmt: skip
SHAPES_UNKNOWN = ["--data.unknown", "[shapes:colours]", "--data.eval_batch_size", "64"]
FEW = [*SHAPES_UNKNOWN, "--data.shots", "1"]
EVERY_TASK = "[{class_path: robustclip.evaluation.OODDetection, init_args: {known: null}}]"
OVERVIEW = [
    *SHAPES_UNKNOWN, "--evaluation.attacks.cascade.budget", "0.02", "--trainer.callbacks", EVERY_TASK,
]  # fmt: skip
OWN = {
    **dict.fromkeys(("croft.yaml", "croft_photographs.yaml", "croft_rn50.yaml", "croft_vlcs.yaml"), FEW),
    **dict.fromkeys(("clip_adapter.yaml", "tip_adapter.yaml"), FEW),
    "apt.yaml": ["--data.shots", "1", "--model.tokens", "4"],
    "corruptions.yaml": ["--data.corruptions.severities", "[5]"],
    "coop.yaml": [*FEW, "--model.tokens", "4"],  # a text tower of 18 tokens
    "croft_imagenet.yaml": [*SHAPES_UNKNOWN, "--data.shots", "1", "--trainer.callbacks", EVERY_TASK],
    "fare.yaml": ["--evaluation.attacks.apgd_ce.steps", "5", "--evaluation.attacks.apgd_t.steps", "5"],
    "overview.yaml": OVERVIEW,
    "tecoa_prompts.yaml": ["--model.prompt_size", "4", "--model.prompt_tokens", "0"],  # a small convolutional tower
    **dict.fromkeys(("ueo.yaml", "ueo_domainnet.yaml", "ueo_visda.yaml", "ueo_photographs.yaml"), UNKNOWN),
}


FAST = ("demo.yaml", "arf.yaml", "ueo.yaml", "croft.yaml", "zero_shot.yaml")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in RUNS])
def test_a_run_fits_and_tests(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", str(CONFIGS / name), *SMALL, *OWN.get(name, [])]
    if name in ("arf.yaml", "dive.yaml"):
        arguments += shapes_anchors(tmp_path)
    if name == "fap.yaml":  # its prompts are in the blocks of transformers
        arguments += ["--model.pretrained", str(tiny_clip(tmp_path / "transformers")), "--model.depth", "1"]
    checkpoint = []
    if yaml.safe_load((CONFIGS / name).read_text())["model"]["class_path"] != "ZeroShot":
        main(["fit", *arguments, "--checkpoint.dirpath", str(tmp_path / "weights")])
        checkpoint = ["--ckpt_path", str(tmp_path / "weights" / "last.ckpt")]
    finished = main(["test", *arguments, *checkpoint])
    metrics = finished.trainer.callback_metrics
    attacks = yaml.safe_load((CONFIGS / "evaluation" / _evaluation(name)).read_text())["attacks"]
    for attack in ("clean", *attacks):
        assert 0 <= metrics[f"test/mean/{attack}/acc1"] <= 1
        assert metrics["test/colours/n"] == 2


def _evaluation(name: str) -> str:
    return Path(yaml.safe_load((CONFIGS / name).read_text())["evaluation"]).name


@pytest.mark.parametrize("name", RUNS)
def test_averages_are_over_sets_that_the_run_tests(name: str) -> None:
    run = yaml.safe_load((CONFIGS / name).read_text())
    data = yaml.safe_load((CONFIGS / run["data"]).read_text()) if isinstance(run["data"], str) else run["data"]
    sets = data.get("init_args", data).get("test", [])
    sources = [each if isinstance(each, str) else each.get("name", each["source"]) for each in sets]
    names = {each.rpartition(":")[2] for each in sources}
    for tasks in run.get("results", {}).get("averages", {}).values():
        assert set(tasks) <= names


def test_every_part_belongs_to_a_run_or_to_an_option_in_the_docs() -> None:
    root = CONFIGS.parents[1]
    pages = [root / "README.md", *(root / "docs").glob("*.md"), *CONFIGS.rglob("*.yaml")]
    text = "".join(page.read_text() for page in pages)
    options = {part: f"--{part.removesuffix('.yaml').replace('/', ' ')}" for part in PARTS}
    assert [part for part in PARTS if part not in text and options[part] not in text] == []


@pytest.mark.slow
def test_the_full_recipe_runs_and_is_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", str(CONFIGS / "zero_shot.yaml"), "--evaluation", str(CONFIGS / "evaluation" / "full.yaml")]
    finished = main(["test", *arguments, *SMALL, "--evaluation.attacks.cascade.budget", "0.02"])
    run = Run.open(next((tmp_path / "runs" / "results").iterdir()))
    assert run.attacks == ["pgd10_half", "pgd10", "pgd10_double", "cascade"]
    members = ["pgd_ce", "pgd_margin", "apgd_ce", "apgd_t", "square"]
    assert list(run.result["tasks"]["colours"]["cascade"]["broken_by"]) == members
    assert run.result["audit"]["grade"] in "ABCF"
    correct = [finished.trainer.callback_metrics[f"test/counts/{name}/correct"] for name in ("pgd10", "cascade")]
    assert correct[1] <= correct[0]


@pytest.mark.parametrize("part", [part for part in PARTS if part.startswith("evaluation/")])
def test_an_evaluation_by_its_name_keeps_no_limit_of_another(part: str) -> None:
    """`--config overview --evaluation clean` tests all images, although overview tests a part of them."""
    assert {"attacks", "max_samples"} <= yaml.safe_load((CONFIGS / part).read_text()).keys()
