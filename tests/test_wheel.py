"""Every command of README and docs runs as printed: from the wheel alone, in an empty folder, without network.

The tutorials have a test of their own, see test_docs.py. Words in capitals stand for files of the reader, which `wheel`
makes: finished tests, checkpoints, images. Commands that cannot run here are named by `RULES`, with what is checked of
them instead.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import build_wheel, tiny_clip
from PIL import Image
from test_docs import BLOCK, ROOT, lines
from torch.distributed.run import get_args_parser

from robustclip.cli.main import COMMANDS, TRAINER_COMMANDS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTION = """
from robustclip.report.blocks import Text
from robustclip.report.section import Section


class MySection(Section):
    title = "Mine"

    def blocks(self, views):
        return [Text("A section of the reader.")]
"""


class Rule(NamedTuple):
    """A reason for which a command cannot run as printed, and what is checked of it instead.

    A status of 0 stands for a command that is parsed with all of its files and options (``--print_config``). Others
    run, and must end with ``status`` and a text that has ``expected`` in it.
    """

    words: str
    reason: str
    status: int = 0
    expected: str = ""

    def fits(self, command: list[str]) -> bool:
        text = " ".join(command)
        return re.search(rf"(^|[ :]){re.escape(self.words)}([ :]|$)", text) is not None


RULES = [
    Rule("doctor --config tecoa --data.root DATA", "the sets of DATA", 1, "DATA"),
    Rule("cache --config croft --data.root DATA", "downloads weights", 2, "weights 'openai'"),
    Rule("--model.pretrained openai", "downloads weights"),
    Rule("--data.root DATA", "published sets and downloaded weights"),
    Rule("caption --data imagenet", "ImageNet and a captioner of Hugging Face", 2, "imagenet"),
    Rule("retrieve --data imagenet", "ImageNet and the pairs of CC3M", 2, "imagenet"),
    Rule("import FILE", "files of other authors", 2, "FILE"),
    Rule("import hf-hub", "repositories of the Hugging Face Hub", 2, "cannot be reached"),
    Rule("--trainer.logger TensorBoardLogger", "a package of others", 2, "tensorboard"),
    Rule("--trainer.logger WandbLogger", "a package of others", 2, "wandb"),
    Rule("--trainer.logger MLFlowLogger", "a package of others", 2, "mlflow"),
]
ALONE = ("claims", "configs", "datasets")  # commands that need no argument; others are named in prose
IN_PROSE = Rule("", "a sentence names the options of a run")
# Code that needs more than the page has, by a line of it: it must be Python, and its names must exist.
UNRUN_CODE = {'models.resnet50(weights="DEFAULT")': "downloads weights"}


class Step(NamedTuple):
    """A command or a Python block of a page, and the rule that it falls under."""

    kind: str
    content: Any
    rule: Rule | None = None


def steps(page: Path) -> Iterator[Step]:
    """Yields what a page asks its reader to run or to save, in its order."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        language, _, code = match.groups()
        if language == "bash" and code.startswith("#!"):
            yield Step("batch", code)
        elif language == "python":
            name = re.search(r"Save this as `(\w+\.py)`[^`]*(?:`[^`\n]*`[^`]*)*\Z", text[: match.start()][-400:])
            kind = "save" if name else "compile" if any(line in code for line in UNRUN_CODE) else "python"
            yield Step(kind, [name[1], code] if name else code)
        elif language == "bash":
            for words in lines(code):
                yield command(words)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for inline in dict.fromkeys(" ".join(text.split()) for text in re.findall(r"`(robustclip [^`]+)`", prose)):
        words = shlex.split(inline)
        is_sketch = (len(words) == 2 and words[1] not in ALONE) or "..." in words
        step = command(words)
        rule = step.rule or (IN_PROSE if words[1] in TRAINER_COMMANDS else None)
        yield Step("sketch", words[1:]) if is_sketch else step._replace(rule=rule)


def command(words: list[str]) -> Step:
    """Returns the step of a command: which program it calls, and whether it can run here."""
    if words[0] == "torchrun":  # torchrun's own options are parsed too
        parsed = get_args_parser().parse_args(words[1:])
        assert (parsed.module, parsed.training_script) == (True, "robustclip")
        words = ["robustclip", *parsed.training_script_args]
    if words[0] != "robustclip":
        return Step(words[0], words)
    words = [name for word in words[1:] for name in (("RUN_A", "RUN_B") if word == "RUN..." else (word,))]
    return Step("robustclip", words, next((rule for rule in RULES if rule.fits(words)), None))


class Wheel(NamedTuple):
    """The installed wheel, and the files that words in capitals stand for."""

    site: Path
    kit: Path

    @property
    def environment(self) -> dict[str, str]:
        """Makes Python find the wheel before the sources, and libraries stay offline."""
        path = f"{self.site / 'bin'}{os.pathsep}{os.environ['PATH']}"
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
        return {**os.environ, **offline, "PYTHONPATH": str(self.site), "PATH": path}

    def run(self, folder: Path, kinds: list[tuple[str, Any]]) -> list[dict[str, Any]]:
        """Runs steps in a folder in one process and returns their answers."""
        (folder / "steps.json").write_text(json.dumps(kinds))
        program = Path(__file__).with_name("wheel_cases.py")
        shell = [sys.executable, str(program), "steps.json", "answers.json"]
        ended = subprocess.run(shell, cwd=folder, env=self.environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-2000:]
        content = json.loads((folder / "answers.json").read_text())
        assert Path(content["package"]).is_relative_to(self.site), "the sources ran in place of the wheel"
        answers: list[dict[str, Any]] = content["answers"]
        return answers


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """Installs the wheel into a folder of its own, and makes the files of a reader by its commands."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-index", "--quiet", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(build_wheel(folder))], check=True)
    made = Wheel(folder / "site", folder / "kit")
    made.kit.mkdir()
    for colour in ("red", "blue"):
        (made.kit / "photos" / colour).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (32, 32), colour).save(made.kit / "photos" / colour / f"{number}.png")
    (made.kit / "my_module.py").write_text(SECTION)
    tiny_clip(made.kit / "tiny")
    short = "--trainer.max_steps 1 --trainer.enable_progress_bar false --evaluation.fit_attacks {}"
    short += " --evaluation.fit_max_samples 2 --checkpoint.monitor val/mean/clean/acc1 --checkpoint.mode max"
    test = "--data.test shapes:colours --evaluation.max_samples 8 --evaluation.probes 0 --evaluation.save_examples 2"
    setup = [
        f"fit --config demo {short} --model.arch null --model.pretrained tiny",
        *(f"fit --config demo {short} --seed_everything {n} --checkpoint.dirpath {n}" for n in range(3)),
        f"test --config zero_shot {test} --results.folder . --results.name RUN_A",
        f"test --config demo --ckpt_path 0/last.ckpt {test} --results.folder . --results.name RUN_B",
        "export RUN_A --out X",
        "export runs/version_0/checkpoints/last.ckpt --to hf --out HF_FOLDER",
    ]
    for line, end in zip(setup, made.run(made.kit, [("robustclip", line.split()) for line in setup]), strict=True):
        assert end["status"] == 0, f"{line}: {end['text'][-1000:]}"
    for name, origin in {"A": "0", "B": "1", "C": "2"}.items():
        (made.kit / origin / "last.ckpt").rename(made.kit / f"{name}.ckpt")
    for name in ("RUN", "UNDEFENDED_RUN"):
        shutil.copytree(made.kit / "RUN_A", made.kit / name)
    shutil.copy(made.kit / "A.ckpt", made.kit / "CHECKPOINT")
    return made


def prepared(step: Step) -> tuple[str, Any]:
    """Returns what runs of a step: a command that cannot run is parsed, if it is one of Lightning's."""
    if step.kind == "robustclip" and step.rule is not None and step.rule.status == 0:
        return "robustclip", [*step.content, "--print_config"]
    return step.kind, step.content


def check_elsewhere(step: Step, folder: Path, wheel: Wheel) -> None:
    """Checks the steps that are no command of the package: batch jobs, installation, code that cannot run here."""
    if step.kind == "batch":  # the fake `srun` reads the command that the job would start
        (folder / "bin").mkdir(exist_ok=True)
        srun = folder / "bin/srun"
        srun.write_text('#!/bin/bash\nexec "$@" --print_config\n')
        srun.chmod(0o755)
        path = f"{srun.parent}{os.pathsep}{wheel.environment['PATH']}"
        job = {**wheel.environment, "PATH": path, "SLURM_NNODES": "2", "SLURM_ARRAY_TASK_ID": "3"}
        ended = subprocess.run(["bash", "-c", step.content], cwd=folder, env=job, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-1000:]
        assert "robustclip.TeCoA" in ended.stdout or "class_path: TeCoA" in ended.stdout
    elif step.kind == "sketch":
        assert step.content[0] in COMMANDS
    elif step.kind == "pip":
        (metadata,) = wheel.site.glob("robustclip-*.dist-info/METADATA")
        (extra,) = re.findall(r"\[(\w+)\]", step.content[2])
        assert f"Provides-Extra: {extra}\n" in metadata.read_text()
    elif step.kind == "make":
        subprocess.run(["make", "--dry-run", step.content[1]], cwd=ROOT, check=True, capture_output=True)
    else:
        assert step.kind == "compile"
        compile(step.content, "page", "exec")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_from_the_wheel(page: Path, wheel: Wheel, tmp_path: Path) -> None:
    shutil.copytree(wheel.kit, tmp_path, dirs_exist_ok=True)
    queue = []
    for step in steps(page):
        if step.kind == "save":
            name, code = step.content
            (tmp_path / name).write_text(code)
        elif step.kind in ("python", "robustclip"):
            queue.append(step)
        else:
            check_elsewhere(step, tmp_path, wheel)
    for step, end in zip(queue, wheel.run(tmp_path, [prepared(step) for step in queue]) if queue else [], strict=True):
        rule, place = step.rule, f"{step.content}: {end}"
        assert end["status"] == (rule.status if rule else 0), place
        assert rule is None or rule.expected in end["text"], place


def outcome(step: Step) -> str:
    """Returns what the test does with a step."""
    if step.kind == "save":
        return "saved"
    if step.kind == "python" or (step.kind == "robustclip" and step.rule is None):
        return "ran"
    return "refused" if step.rule is not None and step.rule.status else "parsed"


def test_most_commands_run_and_every_rule_is_needed() -> None:
    listed = [step for page in PAGES for step in steps(page) if step.kind != "sketch"]
    counts = Counter(map(outcome, listed))
    print(dict(counts))  # noqa: T201
    assert counts["ran"] > counts["parsed"] > counts["refused"]
    assert {step.rule for step in listed if step.rule} == {*RULES, IN_PROSE}
    words = [word for step in listed if step.kind == "robustclip" for word in step.content]
    saved = [Path(step.content[0]).stem for step in listed if step.kind == "save"]
    assert all(any(word.startswith(f"{name}.") for word in words) for name in saved), "a command uses what was saved"
    code = [step.content for step in listed if step.kind == "compile"]
    assert all(any(line in text for text in code) for line in UNRUN_CODE)
