"""A configuration with a fault is refused in one line that names the key, or is a valid one."""

import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from config_mutations import CONFIGS, Mutation, of_files, of_options, of_tree, spread, whole

from robustclip.cli.main import run

SEED = 20261128
FEW, MANY = 40, 500
# These need another model than the embedded one, so that their mutations say nothing.
OTHER_MODELS = ("apt", "coop", "fap", "tecoa_prompts")
SOUND = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in OTHER_MODELS)


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to start in; commands parse and build, and run nothing."""
    monkeypatch.setattr("robustclip.cli.lightning.RobustCLI._run_subcommand", lambda interface, subcommand: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["robustclip"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mutations(count: int, *, seed: int) -> list[Mutation]:
    chance = random.Random(seed)
    every = [each for name in SOUND for each in of_tree(name, whole(CONFIGS / f"{name}.yaml"), chance)]
    return spread(every, chance, count)


def faults(cases: list[Mutation], at: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[str]:
    """Runs each case; yields those that end in another way than the promised one."""
    for case in cases:
        (at / "run.yaml").write_bytes(case.content())
        capfd.readouterr()
        try:
            status = run([word.replace("{at}", str(at)) for word in case.words])
        except Exception as error:
            yield f"{case.name}: traceback, {type(error).__name__}: {error}"
            continue
        errors = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        is_one_line = len(errors) == 1 and errors[0].startswith("error: ")
        is_refused = (
            status == 2 and is_one_line and any(key in errors[0] for key in (case.key, "nonesuch", "source is missing"))
        )
        if not is_refused and not (status == 0 and case.may_pass):
            yield f"{case.name}: status {status}, {case.key!r} is not named in {errors}"


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_the_configurations_that_are_mutated_are_sound(name: str, at: Path) -> None:
    tree = whole(CONFIGS / f"{name}.yaml")
    (at / "run.yaml").write_text(yaml.safe_dump(tree))
    assert run(["test" if tree["model"]["class_path"] == "ZeroShot" else "fit", "--config", "run.yaml"]) == 0


@pytest.mark.slow
def test_a_few_mutated_configurations_name_the_key(at: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert not list(faults(mutations(FEW, seed=SEED), at, capfd))


@pytest.mark.slow
def test_mutated_configurations_name_the_key(at: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cases = mutations(MANY, seed=SEED + 1)
    assert len({case.name for case in cases}) == MANY
    kinds = Counter(case.kind.split()[0] for case in cases)
    assert kinds.keys() >= {"misspelt", "twice", "set", "moved", "left"}
    assert not list(faults(cases, at, capfd))


@pytest.mark.parametrize("case", of_files(), ids=lambda case: case.name)
def test_a_file_that_is_no_configuration_is_named(case: Mutation, at: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert not list(faults([case], at, capfd))


@pytest.mark.slow
def test_options_with_a_fault_are_named(at: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert not list(faults(list(of_options()), at, capfd))
