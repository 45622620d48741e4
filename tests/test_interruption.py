"""A test that SIGKILL ends at any point resumes when it is started again, with the files of an uninterrupted one."""

import csv
import errno
import io
import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
from helpers import ShardWriter, tiny_clip
from interruption_cases import BATCH, KEPT, Counted
from safetensors.torch import load_file, save_file
from torch import Tensor

from robustclip.cli.main import run
from robustclip.data import CLIPDataModule, DataSource
from robustclip.evaluation import ResultsWriter, RobustEvaluation
from robustclip.methods import TeCoA
from robustclip.results.run import Run
from robustclip.tools.compare import pair

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("interruption_cases.py")
TIMEOUT_SECONDS = 400
SIZES = {"first": 12, "second": 8, "third": 5}  # of which the third has one batch that does not decode
UNDECODABLE = (2, 3)
ATTACKS = {
    "pgd": {
        "class_path": "interruption_cases.Counted",
        "init_args": {"eps": "12/255", "alpha": "6/255", "steps": 2},
    },
    "apgd": {"class_path": "APGD", "init_args": {"eps": "8/255", "steps": 3}},
}

# A number is a share of the uninterrupted test's time from its first ledger write on, when SIGKILL comes from outside;
# words name the step that the process kills itself before, in or after. All kills of a line strike one test.
chance = random.Random(0)
RANDOM = [[f"{chance.uniform(0, 0.12):.3f}" for _ in range(5)] for _ in range(2)]
OFTEN = [f"{chance.uniform(0, 0.05):.3f}" for _ in range(12)]
KILLS: dict[str, list[str]] = {
    "random_0": RANDOM[0],
    "random_1": RANDOM[1],
    "writing": [
        "in replace first.0.csv",  # the header is cut
        "before replace protocol.json",
        "before replace *.safetensors",  # an example is written but has no name
        "in append 2",  # a batch is cut
        "before append 2",  # examples stand without their rows
    ],
    "publishing": [
        "before replace second.csv",  # in the midst of the merge
        "before replace result.json",
        "after replace result.json",
        "before rmtree parts",
        "before unlink protocol.json",
        "before rename *",
    ],
    "named": ["after replace result.json", "before unlink protocol.json"],
    "streamed": ["0.2", "0.3"],
}
PROCESSES = {"two": [2, 2], "one_then_two": [1, 2], "two_then_one": [2, 1]}  # the last is not killed
WHOLE = {"streamed": "streamed_whole", "two": "two_whole"}


@pytest.fixture(scope="module")
def folder(write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds what all cases left."""
    folder = tmp_path_factory.mktemp("interruption")
    make_inputs(folder, write_shards)
    one = {"root": str(folder), "location": "", "workers": 0}
    streamed = {"root": str(folder), "location": f"file://{folder}/", "workers": 2}
    cases: dict[str, dict[str, Any]] = {
        "whole": {"words": command(folder), "kills": [], "processes": 1},
        "rehearsal": {"test": one, "kills": [], "processes": 1},
        "two_whole": {"test": one, "kills": [], "processes": 2},
        "streamed_whole": {"test": streamed, "kills": [], "processes": 1},
    }
    for name, moments in KILLS.items():
        kills = [[moment, 1] for moment in moments]
        cases[name] = {"test": streamed if name == "streamed" else one, "kills": kills, "processes": 1}
    cases["named"] |= {"words": [*command(folder), "--results.name", "mine"], "is_challenged": True}
    for name, processes in PROCESSES.items():
        kills = [["0.3", number] for number in processes[:-1]]
        cases[name] = {"test": one, "kills": kills, "processes": processes[-1]}
    everything = {"test_all": {"root": str(folder)}}
    cases["all_whole"] = {**everything, "kills": [], "processes": 1}
    cases["all_killed"] = {**everything, "kills": [[moment, 1] for moment in OFTEN], "processes": 1}
    cases["all_changing"] = {**everything, "kills": [["0.2", 1], ["0.2", 2]], "processes": 2}
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path]),
            "OMP_NUM_THREADS": "1",
            "ROBUSTCLIP_TRACEBACK": "",
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    logs = "".join(f"\n{log.parent.name}: {log.read_text()[-1500:]}" for log in sorted(folder.glob("*/log"))[-3:])
    assert done.returncode == 0, done.stderr[-3000:] + logs
    return folder


def make_inputs(folder: Path, write_shards: ShardWriter) -> None:
    (folder / "model").mkdir()
    tiny_clip(folder / "model")
    write_shards(folder, "first", "test", [12])
    write_shards(folder, "second", "test", [5, 3], seed=1)
    write_shards(folder, "third", "test", [5], seed=2, broken=UNDECODABLE)


def command(folder: Path) -> list[str]:
    """The command line of a test, to be started in the folder of its case."""
    sets = [{"source": f"wds:{name}", "name": name} for name in SIZES]
    words = ["test", "--model", "TeCoA", "--model.pretrained", str(folder / "model"), "--data.root", str(folder)]
    words += ["--data.test", json.dumps(sets), "--data.batch_size", str(BATCH), "--data.bad_samples", "skip"]
    words += ["--evaluation.attacks", json.dumps(ATTACKS), "--evaluation.save_examples", str(KEPT)]
    words += ["--results.folder", "results", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    return words


def without_seconds(table: list[list[str]]) -> list[list[str]]:
    place = next((number for number, name in enumerate(table[0]) if name.strip() == "seconds"), None)
    return [[cell for number, cell in enumerate(line) if number != place] for line in table]


def contents(case: Path) -> dict[str, Any]:
    """Every file of the only folder that a case has left, hidden ones too, without the times."""
    (left,) = (case / "results").iterdir()
    found: dict[str, Any] = {}
    for path in sorted(each for each in left.rglob("*") if not each.is_dir() or not any(each.iterdir())):
        name = str(path.relative_to(left))
        if path.suffix == ".csv":
            found[name] = without_seconds(list(csv.reader(io.StringIO(path.read_text()))))
        elif path.suffix == ".md":
            found[name] = without_seconds([line.split("|") for line in path.read_text().splitlines()])
        elif path.suffix == ".json":
            found[name] = stored = json.loads(path.read_text())
            for values in stored["tasks"].values() if name == "result.json" else ():
                del values["seconds"]
            for key in ("finished", "commit", "config"):  # some cases run without a command line
                del stored[key]
        else:
            found[name] = path.read_bytes() if path.is_file() else "an empty folder"
    return found


def attacked(case: Path) -> list[int]:
    """Ids of all samples that all starts of a case attacked, over all tasks."""
    return [number for line in (case / "attacked").read_text().splitlines() for number in json.loads(line)]


def test_a_whole_test_has_all_compared_parts(folder: Path) -> None:
    found = contents(folder / "whole")
    assert {name for name in found if "/" not in name} == {"result.json", "facts.json", "table.csv", "table.md"}
    tasks = found["result.json"]["tasks"]
    assert {name: values["n"] for name, values in tasks.items()} == SIZES | {"third": SIZES["third"] - 2}
    examples = Counter(str(Path(name).parent) for name in found if name.startswith("examples"))
    assert KEPT in examples.values(), "too few samples break for a choice of examples"
    ledger = found["ledger/second.csv"]
    assert {line[ledger[0].index("pgd.by")] for line in ledger[1:]} == {"", "clean", "pgd"}
    assert any(line[ledger[0].index("repeat")] for line in ledger[1:]), "nothing was probed"


def test_most_kills_strike_before_the_end(folder: Path) -> None:
    told = json.loads((folder / "told.json").read_text())
    assert sum(told[f"random_{number}"]["kills"] for number in range(len(RANDOM))) >= 6  # of 10, on a restless machine
    assert all(told[name]["kills"] for name in [*KILLS, *PROCESSES])
    assert all(told[name]["kills"] == len(KILLS[name]) for name in ("writing", "publishing", "named"))


@pytest.mark.parametrize("name", [*KILLS, "two"])
def test_a_killed_and_continued_test_leaves_the_files_of_a_whole_one(folder: Path, name: str) -> None:
    ours, theirs = contents(folder / name), contents(folder / WHOLE.get(name, "whole"))
    assert ours.keys() == theirs.keys()
    for path in theirs:
        assert ours[path] == theirs[path], path


@pytest.mark.parametrize("name", ["one_then_two", "two_then_one"])
def test_another_number_of_processes_resumes_with_the_same_verdicts(folder: Path, name: str) -> None:
    ours, theirs = contents(folder / name), contents(folder / "whole")
    assert ours.keys() == theirs.keys()
    for task in SIZES:
        header, *rows = theirs[f"ledger/{task}.csv"]
        found = ours[f"ledger/{task}.csv"]
        assert found[0] == header
        for line, expected in zip(found[1:], rows, strict=True):
            for column, our, their in zip(header, line, expected, strict=True):
                # Batches differ, and with them the last digits of what is not counted.
                if column.endswith(helpers.ROUNDED):
                    assert float(our or 0) == pytest.approx(float(their or 0), rel=1e-3, abs=1e-4), column
                else:
                    assert our == their, column
    assert ours["result.json"]["tasks"] == theirs["result.json"]["tasks"]


@pytest.mark.parametrize("name", ["all_killed", "all_changing"])
def test_detection_and_geometry_are_those_of_an_uninterrupted_test(folder: Path, name: str) -> None:
    """The first test is killed ten times at least; the second changes the number of its processes twice."""
    assert json.loads((folder / "told.json").read_text())[name]["kills"] >= {"all_killed": 10, "all_changing": 2}[name]
    ours, theirs = contents(folder / name), contents(folder / "all_whole")
    assert ours.keys() == theirs.keys()
    assert {"ledger/first@first.csv", "ledger/first@first_unknown.csv"} <= ours.keys()
    for path in theirs:
        for each in (ours, theirs) if path.endswith(".json") else ():
            del each[path]["device"]
        assert ours[path] == theirs[path], path
    assert ours["result.json"]["detection"]["tasks"]["first"]["unknown"]["first_unknown"]["n"] == 4
    assert ours["result.json"]["geometry"]["second"]["pearson"] < 1


@pytest.mark.parametrize("name", ["all_killed", "all_changing"])
def test_score_gives_the_result_of_a_killed_test(folder: Path, name: str) -> None:
    (left,) = (folder / name / "results").iterdir()
    before = (left / "result.json").read_bytes()
    (left / "result.json").unlink()
    assert run(["score", str(left)]) == 0
    assert (left / "result.json").read_bytes() == before


@pytest.mark.parametrize("name", [*KILLS, *PROCESSES])
def test_finished_samples_are_not_attacked_again(folder: Path, name: str) -> None:
    whole, found = (Counter(attacked(folder / each)) for each in (WHOLE.get(name, "whole"), name))
    assert found.keys() == whole.keys()
    again = (found - whole).total()
    if name == "publishing":  # all kills come when everything is done
        assert again == 0
    else:
        kills = [*KILLS.get(name, []), *PROCESSES.get(name, [])[:-1] * 2]
        assert again <= BATCH * len(kills)


@pytest.mark.parametrize("name", ["whole", *KILLS, *PROCESSES])
def test_undecodable_images_are_counted_once(folder: Path, name: str) -> None:
    tasks = contents(folder / name)["result.json"]["tasks"]
    assert {task: values["bad_samples"] for task, values in tasks.items()} == {"first": 0, "second": 0, "third": 2}


def test_a_second_start_is_refused_while_the_first_is_alive(folder: Path) -> None:
    lines = [line for line in (folder / "named" / "log").read_text().splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert lines[0].endswith("mine is being written by another process; wait for it, or stop it")


# Tests in this process, ended by an error where another would be killed


class PowerCut(Exception):  # noqa: N818  # not ours to catch
    """Ends a test."""


class Cut(Counted):
    """Ends the test at its second batch, if asked to."""

    calls: "itertools.count[int] | None" = None

    def perturb(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if Cut.calls is not None and next(Cut.calls) == 1:
            raise PowerCut
        return super().perturb(images, *args, **kwargs)


def run_test(folder: Path, *, name: str | None, model: str = "model", **changes: Any) -> Path:
    """Tests one set; returns the folder."""
    attack = Cut(eps=changes.pop("eps", "12/255"), alpha="6/255")
    source = DataSource(changes.pop("location", "wds:first"), name="first", **changes.pop("source", {}))
    evaluation = RobustEvaluation({"pgd": attack}, **{"probes": 0, **changes})
    writer = ResultsWriter(str(folder / "results"), name=name)
    data = CLIPDataModule(test=[source], root=str(folder), image_size=32, batch_size=BATCH)
    helpers.run_test(TeCoA(pretrained=str(folder / model)), data, evaluation, writer)
    assert writer.path is not None
    return writer.path


@pytest.fixture(scope="module")
def cut_short(write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a named and an unnamed test that did not finish."""
    folder = tmp_path_factory.mktemp("cut_short")
    make_inputs(folder, write_shards)
    (folder / "other").mkdir()
    for file in (folder / "model").iterdir():
        (folder / "other" / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "other" / "open_clip_model.safetensors")
    weights["logit_scale"] = weights["logit_scale"] + 1
    save_file(weights, folder / "other" / "open_clip_model.safetensors")
    for name in ("mine", None):
        Cut.calls = itertools.count()
        with pytest.raises(PowerCut):
            run_test(folder, name=name)
    Cut.calls = None
    return folder


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "eps": ({"eps": "11/255"}, "first under pgd, eps: "),
    "templates": ({"source": {"templates": ["a {}"]}}, "first under clean, templates: "),
    "class_names": ({"source": {"class_names": ["r", "g", "b"]}}, "first under clean, class_names: "),
    "max_samples": ({"max_samples": 5}, "first under clean, sample_ids: all of 12 against 5 of 12"),
    "seed": ({"seed": 1}, r"seed: 0 against 1\)"),
    "stop": ({"stop": "last"}, r"first under pgd, stop_rule: worst against last\)"),
    "weights": ({"model": "other"}, r"weights: \w{16} against \w{16}\)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_name_does_not_continue_under_another_protocol(cut_short: Path, change: str) -> None:
    before = {path: path.read_bytes() for path in (cut_short / "results" / "mine").rglob("*") if path.is_file()}
    options, told = CHANGES[change]
    with pytest.raises(ValueError, match=rf"mine holds an unfinished test of another protocol \({told}") as refused:
        run_test(cut_short, name="mine", **options)
    assert str(refused.value).endswith("choose another results.name")
    assert {path: path.read_bytes() for path in before} == before


def test_without_a_name_another_protocol_leaves_the_unfinished_test_for_later(cut_short: Path) -> None:
    (unfinished,) = (cut_short / "results").glob("unfinished-*")
    before = {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()}
    other = run_test(cut_short, name=None, seed=7)
    assert not other.name.startswith("unfinished")
    assert {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()} == before
    run_test(cut_short, name=None)
    assert not list((cut_short / "results").glob("unfinished-*"))


def test_the_name_of_a_finished_test_is_refused_and_its_folder_stays(cut_short: Path, tmp_path: Path) -> None:
    finished = run_test(cut_short, name="finished")
    before = sorted(finished.rglob("*"))
    with pytest.raises(ValueError, match=r"finished is a finished test; choose another results\.name"):
        run_test(cut_short, name="finished")
    assert sorted(finished.rglob("*")) == before


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_test_does_not_resume_over_other_images(
    tmp_path: Path, write_shards: ShardWriter, tiny_model: Path, is_streamed: bool
) -> None:
    """Some of seven samples are finished; over the original images, the test resumes."""
    (tmp_path / "model").symlink_to(tiny_model)
    location = f"wds:file://{tmp_path}/first" if is_streamed else "wds:first"
    write_shards(tmp_path, "first", "test", [7], seed=1)
    shard = tmp_path / "first" / "test" / "0.tar"
    original = shard.read_bytes()
    Cut.calls = itertools.count()
    with pytest.raises(PowerCut):
        run_test(tmp_path, name="mine", location=location)
    Cut.calls = None
    write_shards(tmp_path, "first", "test", [7], seed=2)
    with pytest.raises(ValueError, match=r"(\d) of \1 samples of first that .*mine has tested now have other images"):
        run_test(tmp_path, name="mine", location=location)
    write_shards(tmp_path, "first", "test", [7], seed=1, broken=[3])
    with pytest.raises(ValueError, match="1 of 4 samples of first"):
        run_test(tmp_path, name="mine", location=location)
    shard.write_bytes(original)
    finished = Run.open(run_test(tmp_path, name="mine", location=location))
    assert [row["id"] for row in finished.rows("first")] == [str(number) for number in range(7)]
    hashes = [row["pixels"] for row in finished.rows("first")]
    assert len(set(hashes)) == 7


def test_finished_tests_of_other_images_under_equal_names_are_not_compared(
    tmp_path: Path, write_shards: ShardWriter, tiny_model: Path
) -> None:
    (tmp_path / "model").symlink_to(tiny_model)
    runs = []
    for name, seed in (("a", 1), ("b", 2)):
        write_shards(tmp_path, "first", "test", [7], seed=seed)
        runs.append(Run.open(run_test(tmp_path, name=name)))
    assert [row["label"] for row in runs[0].rows("first")] == [row["label"] for row in runs[1].rows("first")]
    with pytest.raises(ValueError, match="first under clean differs in pixels: 7 of 7 samples show other images"):
        pair(*runs)


def full_after(count: int) -> Callable[[int], None]:
    """A disk that takes so many more writes."""
    calls = itertools.count()

    def fsync(number: int) -> None:
        if next(calls) >= count:
            os.ftruncate(number, os.fstat(number).st_size * 2 // 3)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


@pytest.mark.parametrize("count", [0, 6, 24])
def test_a_full_disk_ends_in_one_line_and_the_next_start_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    monkeypatch.chdir(tmp_path)
    words = command(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after(count))
        assert run(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "results/" in lines[0]
    assert lines[0].endswith("cannot be written: No space left on device")
    assert run(words) == 0
    ours, theirs = contents(tmp_path), contents(folder / "whole")
    assert {name: ours[name] for name in ours if not name.endswith(".json")} == {
        name: theirs[name] for name in theirs if not name.endswith(".json")
    }
    assert ours["result.json"]["tasks"] == theirs["result.json"]["tasks"]
