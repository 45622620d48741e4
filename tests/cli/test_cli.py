"""The command line."""

import copy
import functools
import importlib
import inspect
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from robustclip.cli.build import build, rebuild
from robustclip.cli.lightning import main
from robustclip.cli.main import COMMANDS, HELP, TOOLS, run
from robustclip.evaluation import ResultsWriter
from robustclip.methods import TeCoA, ZeroShot

CONFIGS = Path(__file__).parents[2] / "robustclip" / "configs"
QUICK = [
    "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--data.batch_size", "4", "--data.test", "[shapes:colours]",
    "--evaluation.max_samples", "4",
]  # fmt: skip
SECONDS = 1.5


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, "usage"),
        (["--version"], 0, "robustclip 0"),
        (["fitt"], 2, "no command 'fitt'"),
        ([], 0, "usage"),
    ],
)
def test_commands_without_libraries_start_at_once(arguments: list[str], status: int, words: str) -> None:
    best = float("inf")
    for _ in range(3):  # the machine may be busy; the best of three is the program's own time
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "robustclip", *arguments], capture_output=True, text=True)
        best = min(best, time.perf_counter() - start)
    assert done.returncode == status
    assert words in done.stdout + done.stderr
    assert best < SECONDS


def test_the_entry_point_loads_nothing_heavy() -> None:
    code = "import sys; import robustclip.cli.main; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_checkpoint_never_replaces_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning 2.6 would take model class and hyper-parameters from the checkpoint."""
    monkeypatch.chdir(tmp_path)
    weights = ["--checkpoint.dirpath", str(tmp_path)]
    fit = main(["fit", "--config", str(CONFIGS / "demo.yaml"), *QUICK, "--trainer.max_steps", "1", *weights])
    checkpoint = ["--ckpt_path", str(tmp_path / "last.ckpt")]
    test = main(["test", "--config", str(CONFIGS / "demo.yaml"), *QUICK, *checkpoint, "--model.warmup_steps", "7"])
    assert isinstance(test.model, TeCoA)
    assert test.model.warmup_steps == 7
    trained = fit.model.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in test.model.state_dict().items())
    with pytest.raises(ValueError, match="'TeCoA', this run has 'ZeroShot'; give --model TeCoA"):
        main(["test", "--config", str(CONFIGS / "zero_shot.yaml"), *QUICK, *checkpoint])


def test_a_result_is_complete_new_and_named_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["test", "--config", str(CONFIGS / "zero_shot.yaml"), *QUICK, "--results.folder", str(tmp_path / "r")]
    paths = []
    for _ in range(2):
        assert run(arguments) == 0
        paths.append(Path(capsys.readouterr().out.split()[-1]))
    assert paths[0] != paths[1]
    result, again = (json.loads((path / "result.json").read_text()) for path in paths)
    assert result["method"] == "ZeroShot"
    assert result["config"]["model"]["init_args"]["pretrained"] == "shapes"
    assert {"robustclip", "torch", "lightning"} <= result["versions"].keys()
    task = result["tasks"]["colours"]
    assert task["n"] == 4
    for kind in ("clean", "pgd10"):
        assert task[kind]["acc1"] == pytest.approx(task[kind]["correct"] / 4)
        assert result["mean"][kind]["acc1"] == pytest.approx(task[kind]["acc1"])
    assert task["seconds"] > 0
    assert without_seconds(again["tasks"]["colours"]) == without_seconds(task)
    assert (paths[0] / "table.csv").read_text().startswith("task,n,clean,")
    assert "| colours | 4 |" in (paths[0] / "table.md").read_text()
    for given in (paths, [path / "result.json" for path in paths]):
        assert run(["table", *map(str, given)]) == 0
        assert "colours" in capsys.readouterr().out


def without_seconds(task: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in task.items() if key != "seconds"}


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown == HELP
    for command in COMMANDS:
        assert f"\n  {command}" in shown


def test_tools_that_need_no_model_load_none() -> None:
    code = (
        "import sys; from robustclip.cli.main import run; status = run(['table', 'none.json']);"
        "print(status, [m for m in ('torch', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2 []"
    assert done.stderr.startswith("error: none.json")


@pytest.mark.parametrize("command", TOOLS)
def test_tools_answer_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert f"usage: robustclip {command}" in capsys.readouterr().out


def test_tools_receive_the_arguments_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def instead_of(function: Any) -> Any:
        @functools.wraps(function)
        def called(*values: Any, **options: Any) -> None:
            calls.append(inspect.signature(function).bind(*values, **options).arguments)

        return called

    for name in ("table", "compare", "report"):
        module = importlib.import_module("robustclip.report" if name == "report" else f"robustclip.tools.{name}")
        monkeypatch.setattr(module, name, instead_of(getattr(module, name)))
    a, b = Path("a"), Path("b/result.json")
    assert run(["table", "a", "b/result.json"]) == 0
    assert run(["compare", "a", "b/result.json"]) == 0
    assert run(["compare", "a", "b/result.json", "--shared_samples", "true"]) == 0
    assert run(["report", "a", "b/result.json", "--out", "x.html"]) == 0
    assert run(["report", "--runs", "a", "--sections", "x.Y", "--sections", "x.Z"]) == 0
    page = {"runs": [a, b], "out": Path("x.html"), "images": None, "sections": []}
    assert calls == [
        {"results": [a, b]},
        {"a": a, "b": b, "shared_samples": False},
        {"a": a, "b": b, "shared_samples": True},
        page,
        {**page, "runs": [a], "out": Path("report.html"), "sections": ["x.Y", "x.Z"]},
    ]


TOOL = """
from pathlib import Path

def shout(word: str, times: int = 1, *, into: Path | None = None) -> int:
    '''Write a word several times.

    Args:
        word: to write.
        times: number of repetitions.
        into: file; null prints.
    '''
    into.write_text(word * times) if into else print(word * times)
    return times - 1
"""


def test_a_tool_of_the_user_is_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_tools.py").write_text(TOOL)
    assert run(["own_tools.shout", "ab"]) == 0
    assert run(["own_tools.shout", "--word", "cd", "--times=2", "--into", "file"]) == 1, "a number is that of faults"
    assert (capsys.readouterr().out, (tmp_path / "file").read_text()) == ("ab\n", "cdcd")
    assert run(["own_tools.shout", "--help"]) == 0
    shown = capsys.readouterr().out
    for words in ("Write a word several times.", "number of repetitions", "--into"):
        assert words in shown
    for bad in (["own_tools.shut", "x"], ["no_tools.shout", "x"], ["own_tools.shout", "x", "--times", "many"]):
        assert run(bad) == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(("disagreements", "status"), [(0, 0), (3, 1)])
def test_verify_fails_where_something_disagrees(
    disagreements: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustclip.results.run.Run.open", lambda path: None)
    monkeypatch.setattr("robustclip.tools.verify.verify", lambda run, build: disagreements)
    assert run(["verify", "somewhere"]) == status


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a test of trained weights as its result has them, the weights, and settings without them."""
    folder = tmp_path_factory.mktemp("trained")
    common = ["--config", str(CONFIGS / "demo.yaml"), *QUICK, "--trainer.default_root_dir", str(folder)]
    fit = main(["fit", *common, "--trainer.max_steps", "2", "--model.warmup_steps", "0", *_in(folder)])
    test = main(["test", *common, "--ckpt_path", str(folder / "last.ckpt"), "--model.last_blocks", "null"])
    writer = next(each for each in test.trainer.callbacks if isinstance(each, ResultsWriter))
    return {"config": json.loads(json.dumps(writer.config)), "weights": fit.model.state_dict(), "folder": folder}


def _in(folder: Path) -> list[str]:
    return ["--checkpoint.dirpath", str(folder)]


def test_a_finished_run_is_rebuilt_from_its_settings(trained: dict[str, Any]) -> None:
    model = build(trained["config"])
    assert type(model) is TeCoA
    assert not model.training
    assert all(torch.equal(tensor, trained["weights"][name]) for name, tensor in model.state_dict().items())


def test_a_finished_run_is_rebuilt_with_other_options(trained: dict[str, Any]) -> None:
    untrained = ZeroShot(pretrained="shapes").state_dict()
    for words, method in (([], TeCoA), (["--model", "ZeroShot", "--model.pretrained", "shapes"], ZeroShot)):
        model = rebuild(trained["config"], words)
        assert type(model) is method
        assert all(torch.equal(tensor, untrained[name]) for name, tensor in model.state_dict().items()), words
    again = rebuild(trained["config"], ["--ckpt_path", str(trained["folder"] / "last.ckpt"), "--model.last_blocks=1"])
    assert again.last_blocks == 1
    name = next(iter(trained["weights"]))
    assert torch.equal(again.state_dict()[name], trained["weights"][name])


def test_a_run_of_another_machine_is_rebuilt(trained: dict[str, Any]) -> None:
    """Its trainer need not exist here."""
    config = copy.deepcopy(trained["config"])
    config["trainer"] |= {"accelerator": "gpu", "devices": 8, "strategy": "ddp", "precision": "bf16-mixed"}
    assert type(build(config)) is TeCoA


def test_replay_takes_options_of_the_other_model(trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[Any] = []
    monkeypatch.setattr("robustclip.tools.verify.replay", lambda run, model: models.append((run, model)))
    run_folder = trained["folder"] / "run"
    run_folder.mkdir()
    result = {"method": "TeCoA", "tasks": {}, "mean": {}, "protocol": {}, "config": trained["config"]}
    (run_folder / "result.json").write_text(json.dumps(result))
    assert run(["replay", str(run_folder), "--config", str(CONFIGS / "zero_shot.yaml")]) == 0
    assert models[0][0] == run_folder
    assert type(models[0][1]) is ZeroShot


def test_stored_examples_are_verified_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = ["--results.folder", str(tmp_path), "--results.name", "run", "--evaluation.save_examples", "1"]
    strong = ["--evaluation.attacks", '{"pgd":{"class_path":"PGD","init_args":{"eps":0.1,"alpha":0.05}}}']
    assert run(["test", "--config", str(CONFIGS / "zero_shot.yaml"), *QUICK, *strong, *folder]) == 0
    assert list((tmp_path / "run" / "examples").rglob("*.safetensors"))
    assert run(["verify", "run"]) == 0
    capsys.readouterr()
    assert run(["replay", "run", "--model", "TeCoA", "--model.last_blocks", "1"]) == 0
    assert "TeCoA" in capsys.readouterr().out


def test_the_help_of_a_run_begins_with_the_most_used_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: robustclip fit --config NAME")
    places = [
        text.index(word) for word in ("most used options", "--model.help", "--data.help", "--trainer.accelerator")
    ]
    assert places == sorted(places)


def test_a_number_of_devices_beyond_all_machines_is_refused_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["test", "--config", "zero_shot", "--trainer.devices", str(10**30)]) == 2
    assert "trainer.devices must be at most 100,000" in capsys.readouterr().err
