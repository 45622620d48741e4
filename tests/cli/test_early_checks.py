"""Wrong keys, classes and plain values are refused before the slow libraries load, in the words of the parser."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from robustclip import methods
from robustclip.cli._chosen_classes import ChosenClasses
from robustclip.cli.checks import check_arguments, known_keys
from robustclip.cli.main import run
from robustclip.cli.messages import SETTINGS
from robustclip.data import CLIPDataModule
from robustclip.evaluation import RobustEvaluation
from robustclip.tools.configs import FOLDER

START = ["fit", "--config", "demo"]
# Options, and the key that the message names.
FAULTS = {
    "argument of the model": (["--model.epss", "3"], "model.epss; did you mean model.attack.eps?"),
    "argument of the attack": (["--model.attack.epz", "3"], "model.attack.epz; did you mean model.attack.eps?"),
    "argument of the default attack": (
        ["--config", "tecoa", "--model", "TeCoA", "--model.attack.epz", "1"],
        "model.attack.epz; did you mean model.attack.eps?",
    ),
    "argument of a new attack": (
        ["--model.attack", "APGD", "--model.attack.alpha", "1/255"],
        "there is no key model.attack.alpha",
    ),
    "argument of the optimiser": (["--model.optimizer.lrr", "3"], "did you mean model.optimizer.lr?"),
    "argument of another optimiser": (
        ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.betas", "[0, 1]"],
        "there is no key model.optimizer.betas",
    ),
    "argument of the data": (["--data.bath_size", "3"], "data.bath_size; did you mean data.batch_size?"),
    "argument of a logger": (["--trainer.logger.save_dirr", "x"], "did you mean trainer.logger.save_dir?"),
    "argument of a callback": (
        ['--trainer.callbacks=[{"class_path": "OODDetection", "init_args": {"knownn": 1}}]'],
        "trainer.callbacks.0.knownn; did you mean trainer.callbacks.0.known",
    ),
    "arguments as a mapping": (["--model.init_args", '{"warm_steps": 3}'], "did you mean model.warmup_steps?"),
    "a model as a mapping": (['--model={"class_path": "TeCoA", "init_args": {"etta": 1}}'], "no key model.etta"),
    "argument of an attack in a test": (
        ['--evaluation.attacks={"a": {"class_path": "PGD", "init_args": {"alpa": 1}}}'],
        "evaluation.attacks.a.alpa; did you mean evaluation.attacks.a.alpha?",
    ),
    "argument of a new model": (["--model", "FARE", "--model.beta", "3"], "there is no key model.beta"),
    "a method": (["--model", "TeCao"], "model: there is no class 'TeCao'; did you mean TeCoA?"),
    "an attack": (["--model.attack", "PGG"], "model.attack: there is no class 'PGG'; did you mean PGD?"),
    "a defence": (["--model.defence", "JPGE"], "model.defence: there is no class 'JPGE'; did you mean JPEG?"),
    "a number for a class": (["--model.optimizer", "0.1"], "model.optimizer: there is no class '0.1'; known are"),
    "a number for arguments": (
        ["--model.lora", "8"],
        "model.lora: expected arguments (model.lora.rank, model.lora.alp",
    ),
    "a name for arguments": (["--data.corruptions", "fog"], "expected arguments (data.corruptions.kinds, data.corrup"),
    "list of classes": (
        ["--model.attack", "[PGD]"],
        "model.attack: expected the name of one class, got ['PGD']; known",
    ),
    "list for arguments": (["--data.corruptions", "[fog]"], "data.corruptions: expected arguments (data.corruptions"),
    "key of the trainer": (["--trainer.max_epoch", "3"], "did you mean trainer.max_epochs"),
    "key of the evaluation": (["--evaluation.attack", "PGD"], "did you mean evaluation.attacks"),
    "number of the trainer": (["--trainer.max_epochs", "ten"], "trainer.max_epochs: expected int or null, got 'ten'"),
    "number of the model": (["--model.warmup_steps", "1.5"], "model.warmup_steps: expected int, got '1.5'"),
    "number of the attack": (["--model.attack.steps", "two"], "model.attack.steps: expected int, got 'two'"),
    "choice of the attack": (["--model.attack.norm", "l7"], "model.attack.norm: expected"),
    "number of the evaluation": (["--evaluation.save_examples", "few"], "save_examples: expected int, got 'few'"),
    "a number as a mapping": (['--model.init_args={"warmup_steps": "x"}'], "model.warmup_steps: expected int, got 'x'"),
    "no section": (["--epochs", "3"], "there is no key epochs; did you mean trainer.max_epochs"),
}
OF_CLASSES = [name for name in FAULTS if not name.startswith(("key", "list", "no section"))]
OWN = """
from robustclip.attacks import PGD
from robustclip.methods import TeCoA

class Mine(TeCoA):
    def __init__(self, beta: float = 1.0, **kwargs):
        super().__init__(**kwargs)

class Popping(TeCoA):
    def __init__(self, **kwargs):
        self.gamma = kwargs.pop("gamma", 1)
        super().__init__(**kwargs)

class MyAttack(PGD):
    pass
"""


def message(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The line on stderr of a command that is refused."""
    capfd.readouterr()
    assert run(words) == 2
    return capfd.readouterr().err.splitlines()[-1]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_early.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return "own_early"


def test_a_fault_is_refused_before_slow_libraries_load(tmp_path: Path) -> None:
    code = (
        "import sys; from robustclip.cli.main import run;"
        f"status = {{run([*{START}, *words]) for words, _ in {list(FAULTS.values())!r}}};"
        "slow = {'torch', 'lightning', 'open_clip'} & {*sys.modules};"
        "sys.exit(0 if status == {2} and not slow else f'{status} {slow}')"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.returncode == 0, finished.stderr
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    for line, (_, words) in zip(errors, FAULTS.values(), strict=True):
        assert words in line


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_CLASSES)
def test_the_words_are_those_of_the_parser(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*START, *FAULTS[name][0]]
    early = message(words, capfd)
    for method in ("read", "read_option"):
        monkeypatch.setattr(ChosenClasses, method, lambda *arguments: None)
    assert message(words, capfd) == early


def test_a_fault_in_a_file_is_refused_as_on_the_command_line(tmp_path: Path) -> None:
    attack = {"class_path": "PGD", "init_args": {"eps": "1/255", "epss": 1}}
    tree = {"class_path": "TeCoA", "init_args": {"attack": attack}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": tree}))
    with pytest.raises(ValueError, match=r"no key model\.attack\.epss; did you mean model\.attack\.eps\?"):
        check_arguments(["fit", "--config", str(tmp_path / "run.yaml")])


def test_a_fault_in_a_file_is_refused_early_by_tools_too(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {class_path: TeCoA, init_args: {epss: 1}}\n")
    code = (
        "import sys; from robustclip.cli.main import run; status = run(['doctor', '--config', 'run.yaml']);"
        "sys.exit(0 if status == 2 and 'torch' not in sys.modules else 1)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "error: there is no key model.epss; did you mean model.attack.eps?\n"


@pytest.mark.parametrize(
    ("option", "name", "remedy"),
    [
        ("--config", "ueo_photos", "did you mean ueo_photographs?"),
        ("--config", "runs/own.yaml", "robustclip list configs"),
        ("--data", "fifteeen", "did you mean fifteen?"),
        ("--evaluation", "cascad", "did you mean cascade?"),
        ("--trainer", "gpus", "did you mean gpu?"),
    ],
)
def test_a_misspelt_configuration_is_refused_with_a_similar_name(
    option: str, name: str, remedy: str, capfd: pytest.CaptureFixture[str]
) -> None:
    line = message([*START, option, name], capfd)
    assert option[2:] in line
    assert repr(name) in line
    assert remedy in line


def test_every_class_without_a_choice_is_known() -> None:
    owners = [*(getattr(methods, name) for name in methods.__all__), CLIPDataModule, RobustEvaluation]
    constructors = [cls.__init__ for owner in owners for cls in owner.__mro__ if "__init__" in vars(cls)]
    hints = {key: hint for init in constructors for key, hint in get_type_hints(init).items()}
    choices = {
        key: [kind for kind in get_args(hint) or (hint,) if kind is not type(None)] for key, hint in hints.items()
    }
    assert {
        key: f"{kinds[0].__module__}.{kinds[0].__qualname__}"
        for key, kinds in choices.items()
        if len(kinds) == 1 and dataclasses.is_dataclass(kinds[0])
    } == SETTINGS


@pytest.mark.parametrize(
    "option",
    [
        ["--results.averages", '{"attack": ["shapes"], "ways": ["shapes"]}'],
        ["--evaluation.attacks", '{"lora": {"class_path": "PGD"}, "attack": "PGD"}'],
        ["--evaluation.attacks.ways", "PGD"],
        ["--model", "mine.Mine", "--model.ways", "3", "--model.attack", "[1, 2]"],
    ],
)
def test_names_that_the_user_chooses_mean_nothing(option: list[str]) -> None:
    check_arguments(["test", *option])


def test_the_default_optimiser_is_read_from_the_source() -> None:
    with pytest.raises(ValueError, match=r"did you mean model\.optimizer\.nesterov\?"):
        check_arguments(["fit", "--model", "TeCoA", "--model.optimizer.nesterof", "true"])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_of_the_package_pass(path: Path) -> None:
    check_arguments(["fit", "--config", str(path)])


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "own_early.Mine", "--model.beta", "2", "--model.attack.eps", "1/255"],
        ["--model", "own_early.Popping", "--model.gamma", "2"],
        ["--model", "own_early.Mine", "--model.attack", "MyAttack", "--model.attack.steps", "3"],
        ["--model.attack", "null"],
        ["--model=null", "--model", "TeCoA", "--model.optimizer.nesterov", "true"],
        ["--model.attack=own_early.MyAttack", "--model.attack.norm=l2"],
        ["--model.optimizer", "SGD", "--model.optimizer.momentum", "0.9"],
        ["--data.test", "wds:/a/b.c", "--data.test+", "folder:x.y"],
        ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "x"],
        ["--evaluation.attacks.mine.class_path", "PGD", "--evaluation.attacks.mine.init_args.eps", "1/255"],
        ["--trainer.strategy.class_path", "lightning.pytorch.strategies.DDPStrategy"],
        ["--trainer.callbacks", '[{"class_path": "Interruption"}]'],
        ["--model.optimizer", "Lamb"],
        ["--evaluation.attacks", "cascade"],
        ["--model.help", "TeCao"],
        ["--print_config"],
    ],
    ids=" ".join,
)
def test_what_may_be_right_is_left_to_the_parser(words: list[str], own: str) -> None:
    check_arguments([*START[:2], str(FOLDER / "demo.yaml"), *words])


def test_an_own_class_takes_its_own_arguments_alone(own: str, capfd: pytest.CaptureFixture[str]) -> None:
    line = message([*START, "--model", f"{own}.Mine", "--model.betta", "2"], capfd)
    assert line == "error: there is no key model.betta; did you mean model.beta?"


def test_known_keys_are_the_arguments_of_the_sections() -> None:
    keys = known_keys()
    expected = {"trainer.max_epochs", "data.train", "model.attack.eps", "evaluation.attacks", "results.name", "shard"}
    assert expected <= {*keys}
    assert len(keys) == len({*keys}) > 140
