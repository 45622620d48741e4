"""The shards of a test, joined, are the test of all samples; anything else is refused in one line."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ShardWriter, add_member, picture, run_test
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from robustclip.attacks import PGD
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule, DataSource
from robustclip.evaluation import FeatureGeometry, HessianDifference, OODDetection, ResultsWriter, RobustEvaluation
from robustclip.evaluation.writer import Section, writer_of
from robustclip.methods import TeCoA
from robustclip.results.run import Run
from robustclip.tools.merge import merge
from robustclip.types import Batch, Data, Share, Task

SIZES = {"first": 11, "second": 6}
SHARDS = 3
CAPTIONS = ["a red circle", "a green star", "a blue square"]
OF_MACHINE = ("finished", "device", "commit", "config")


def write_captioned(folder: Path) -> None:
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    random = np.random.default_rng(0)
    with tarfile.open(folder / "test" / "0.tar", "w") as archive:
        for number, text in enumerate(CAPTIONS):
            add_member(archive, f"s{number}.png", picture(random, number, kind="png", mode="RGB", size=32))
            add_member(archive, f"s{number}.txt", text.encode())


def method(root: Path) -> TeCoA:
    """A model that differs from its pre-trained weights, which geometry compares it with."""
    tuned = TeCoA(pretrained=str(root / "model"))
    with torch.no_grad():
        tuned.clip.net.visual.proj += 0.2 * torch.randn(
            tuned.clip.net.visual.proj.shape, generator=torch.Generator().manual_seed(0)
        )
    return tuned


def evaluated(root: Path, name: str, *further: Callback, shard: int = 0, shards: int = 1, **changes: Any) -> Path:
    """Tests all samples or a shard, one image per batch, and returns the folder."""
    options = {"eps": "12/255", "seed": 0, "unknown": ["wds:others"], "test": ["wds:first", "wds:second"]} | changes
    writer = ResultsWriter(str(root / "results"), name=name, averages={"both": [*SIZES]}, shard=shard, shards=shards)
    callbacks = [
        *further,
        RobustEvaluation({"pgd": PGD(options["eps"], "6/255", 2)}, seed=options["seed"], save_examples=2),
        writer,
    ]
    sets = {role: options[role] for role in ("test", "unknown")}
    data = CLIPDataModule(**sets, root=str(root), image_size=32, batch_size=1, bad_samples="skip", captioned="pairs")
    run_test(method(root), data, *callbacks)
    return writer.opened


def sections() -> list[Callback]:
    scores = OODDetection(scores=["mcm", "energy"], attack=PGD("8/255", "4/255", 2))
    return [scores, FeatureGeometry(max_samples=4)]


@pytest.fixture(scope="module")
def root(write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Holds the data, a whole test and its three shards."""
    folder = tmp_path_factory.mktemp("merge")
    (folder / "model").symlink_to(tiny_model)
    write_shards(folder, "first", "test", [7, 4], broken=[5])
    write_shards(folder, "second", "test", [6], seed=1)
    write_shards(folder, "others", "test", [5], seed=2)
    write_captioned(folder / "pairs")
    evaluated(folder, "whole", *sections())
    for shard in range(SHARDS):
        evaluated(folder, "parts", *sections(), shard=shard, shards=SHARDS)
    return folder


def shards_of(root: Path) -> list[Path]:
    return [root / "results" / f"parts-shard-{number}-of-{SHARDS}" for number in range(SHARDS)]


def comparable(folder: Path) -> dict[str, Any]:
    """The files of a test without times and machines."""
    found: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("examples/*/*/*")}
    for path in folder.glob("ledger/*.csv"):
        lines = [line.split(",") for line in path.read_text().splitlines()]
        places = [place for place, name in enumerate(lines[0]) if name != "seconds"]
        found[path.name] = [[line[place] for place in places] for line in lines]
    for name in ("result.json", "facts.json"):
        content = json.loads((folder / name).read_text())
        for values in content["tasks"].values():
            values.pop("seconds", None)
        found[name] = {key: value for key, value in content.items() if key not in OF_MACHINE}
    return found


def test_joined_shards_are_the_whole_test(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", *map(str, reversed(shards_of(root))), "--out", str(tmp_path / "joined")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "joined")
    ours, theirs = comparable(tmp_path / "joined"), comparable(root / "results" / "whole")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name] == theirs[name], name
    result = ours["result.json"]
    assert {task: values["n"] for task, values in result["tasks"].items()} == SIZES | {"first": 10}
    assert result["tasks"]["first"]["bad_samples"] == 1
    assert result["detection"]["tasks"]["second"]["unknown"]["others"]["n"] == 5
    assert result["geometry"]["pairs"]["image_to_text_r10"] == 1.0
    assert len([name for name in ours if name.startswith("examples/first")]) == 2
    before = (tmp_path / "joined" / "result.json").read_bytes()
    assert run(["score", str(tmp_path / "joined")]) == 0
    assert (tmp_path / "joined" / "result.json").read_bytes() == before


class PowerCut(Exception):  # noqa: N818  # not ours to catch
    """Ends a test."""


class Cut(Callback):
    """Ends a test in its n-th batch, before the rows of this batch are written."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_test_batch_start(self, *_: Any) -> None:
        self.batches -= 1
        if self.batches == 0:
            raise PowerCut


@pytest.mark.parametrize("cuts", [[[4], []], pytest.param([[1], [], [3, 1, 2], [2]], marks=pytest.mark.slow)], ids=str)
@pytest.mark.slow
def test_a_split_with_interrupted_shards_is_the_whole_test(cuts: list[list[int]], root: Path, tmp_path: Path) -> None:
    """The random schedules of test_sharded_tests.py kill processes; here errors end tests in this process."""
    name = f"cut_{len(cuts)}"
    for shard, batches in enumerate(cuts):
        place = {"shard": shard, "shards": len(cuts)}
        for number in batches:
            with pytest.raises(PowerCut):
                evaluated(root, name, Cut(number), *sections(), **place)
        evaluated(root, name, *sections(), **place)
    shards = [root / "results" / f"{name}-shard-{number}-of-{len(cuts)}" for number in range(len(cuts))]
    merge(shards, tmp_path / "joined")
    ours, theirs = comparable(tmp_path / "joined"), comparable(root / "results" / "whole")
    assert ours.keys() == theirs.keys()
    for each in theirs:
        assert ours[each] == theirs[each], each


def test_every_sample_is_in_one_shard(root: Path) -> None:
    for task, size in (SIZES | {"first": 10, "first@others": 5}).items():
        texts = [(shard / "ledger" / f"{task}.csv").read_text().splitlines()[1:] for shard in shards_of(root)]
        assert max(map(len, texts)) - min(map(len, texts)) <= 2  # one is undecodable
        assert len({line.split(",")[0] for lines in texts for line in lines}) == sum(map(len, texts)) == size


def test_a_shard_is_no_result(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard, whole = str(shards_of(root)[1]), str(root / "results" / "whole")
    assert not (shards_of(root)[1] / "result.json").exists()
    for words in (
        ["compare", shard, whole],
        ["compare", whole, shard],
        ["report", shard, "--out", str(tmp_path / "page.html")],
        ["table", whole, shard],
        ["score", shard],
        ["verify", shard],
    ):
        assert run(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert f"{shard} is shard 1 of 3, numbered from 0, and no whole test" in lines[0]
        assert "robustclip merge" in lines[0]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ([0, 2], ["1 of 3 shards", "are missing: 1;"]),
        ([0], ["2 of 3 shards", "are missing: 1, 2;"]),
        ([0, 1, 1, 2], ["both shard 1", "leave one out"]),
    ],
)
def test_every_shard_must_be_there_once(chosen: list[int], words: list[str], root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words[0]) as refused:
        merge([shards_of(root)[number] for number in chosen], tmp_path / "joined")
    assert all(word in str(refused.value) for word in words)
    assert not list(tmp_path.iterdir())


def changed(root: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> list[Path]:
    """Copies the shards, and changes the facts of the last one."""
    copies = [Path(shutil.copytree(shard, tmp_path / shard.name)) for shard in shards_of(root)]
    facts = json.loads((copies[-1] / "facts.json").read_text())
    change(facts)
    (copies[-1] / "facts.json").write_text(json.dumps(facts))
    return copies


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts: facts.update(weights="0" * 16), "weights: "),
        (lambda facts: facts.update(seed=1), "seed: 0 against 1"),
        (lambda facts: facts["settings"].update(temperature=2), "temperature: None against 2"),
        (lambda facts: facts["protocol"]["first"]["pgd"].update(eps="linf 1"), "first under pgd, eps: "),
        (lambda facts: facts["protocol"]["first"]["clean"].update(sample_ids="5 of 11"), "first under clean, sample_"),
        (lambda facts: facts["sections"]["detection"].update(headline="energy"), "detection: "),
        (lambda facts: facts["sections"]["geometry"].update(max_samples=9), "geometry: "),
        (lambda facts: facts["sections"].pop("geometry"), "geometry: "),
        (lambda facts: facts["model"].update(fingerprint="1" * 16), "model.fingerprint: "),
        (lambda facts: facts.update(averages={}), "averages: "),
        (lambda facts: facts.update(is_undefended=True), "is_undefended: false against true"),
        (lambda facts: facts["tasks"]["first"]["classes"].update(templates=["{}"]), "tasks: "),
    ],
)
def test_shards_of_different_tests_are_refused(
    change: Callable[[dict[str, Any]], object], words: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"are shards of different tests \(") as refused:
        merge(changed(root, tmp_path, change), tmp_path / "joined")
    assert words in str(refused.value)
    assert not (tmp_path / "joined").exists()


def test_other_machines_are_listed_and_their_paths_do_not_matter(root: Path, tmp_path: Path) -> None:
    def change(facts: dict[str, Any]) -> None:
        facts["device"], facts["model"]["checkpoint"] = "2 x cuda:0, precision 32-true", "/elsewhere/last.ckpt"
        facts["versions"]["torch"] = "9.9"

    merge(changed(root, tmp_path, change), tmp_path / "joined")
    result = Run.open(tmp_path / "joined").result
    assert result["device"].split("; ")[-1] == "2 x cuda:0, precision 32-true"
    assert result["versions"]["torch"].endswith("; 9.9")


def test_a_metric_that_differs_between_shards_is_left_out_aloud(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = changed(root, tmp_path, lambda facts: facts.update(other_metrics={"test/mine": 1.0}))
    merge(shards, tmp_path / "joined")
    assert "other_metrics" not in Run.open(tmp_path / "joined").result
    assert "test/mine" in capsys.readouterr().err


def test_a_sample_in_two_shards_is_refused(root: Path, tmp_path: Path) -> None:
    shards = changed(root, tmp_path, lambda facts: None)
    lines = (shards[0] / "ledger" / "second.csv").read_text().splitlines()
    with (shards[1] / "ledger" / "second.csv").open("a") as file:
        file.write(f"{lines[1]}\n")
    with pytest.raises(ValueError, match="sample 0 of second is in two shards"):
        merge(shards, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_folders_other_than_finished_shards_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole is a whole test"):
        merge([root / "results" / "whole"], tmp_path / "joined")
    with pytest.raises(ValueError, match=r"has no facts\.json"):
        merge([tmp_path], tmp_path / "joined")
    shards = changed(root, tmp_path, lambda facts: None)
    (shards[1] / "protocol.json").write_text("{}")
    with pytest.raises(ValueError, match="has not finished"):
        merge(shards, tmp_path / "joined")
    (shards[1] / "protocol.json").unlink()
    with pytest.raises(ValueError, match="never overwritten"):
        merge(shards, shards[0])
    for shard in shards:
        shutil.rmtree(shard / "examples", ignore_errors=True)
    with pytest.raises(ValueError, match="no shard has the adversarial example first/pgd/"):
        merge(shards, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_a_finished_shard_is_not_tested_again_under_its_name(root: Path) -> None:
    with pytest.raises(ValueError, match=r"parts-shard-0-of-3 is a finished test; choose another results\.name"):
        evaluated(root, "parts", *sections(), shard=0, shards=SHARDS)


# Tests that cannot be split


@pytest.mark.parametrize("is_file", [False, True])
def test_only_a_test_has_shards(is_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("shards: 2\n")
    words = ["--config", str(tmp_path / "run.yaml")] if is_file else ["--shards", "2"]
    for command in ("fit", "validate"):
        assert run([command, *words]) == 2
        assert capsys.readouterr().err == "error: shards is an option of `robustclip test` alone; leave it out\n"


class Stubborn(Data, LightningDataModule):
    """Data of a user that know nothing of shares."""

    test_tasks = [Task("shades", ("black", "white"))]

    def test_dataloader(self) -> DataLoader[Batch]:
        batch = Batch(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), torch.tensor([0, 1]), digests=("a", "b"))
        return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]


class Connected(Stubborn):
    def connect(self, *, limit: int | None = None, done: Any = None) -> None:  # type: ignore[override]
        pass


class Mine(Callback):
    """A callback of a user with a section of its own."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        writer = writer_of(trainer)
        assert writer is not None
        writer.sections["mine"] = Section(lambda record: 1)


@pytest.mark.parametrize("data", [Stubborn(), Connected()], ids=["no connect", "connect without a share"])
def test_own_data_without_shares_are_refused(data: LightningDataModule, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{type(data).__name__}.*shards must be 1, got 2"):
        run_test(method(root), data, RobustEvaluation(), ResultsWriter(str(tmp_path), shards=2))


def test_shards_refuse_parts_that_need_all_samples(root: Path, tmp_path: Path) -> None:
    data = CLIPDataModule(test=["wds:first", "wds:second"], root=str(root), image_size=32)
    for further, options, words in (
        (HessianDifference(), {}, "HessianDifference"),
        (Mine(), {}, "section 'mine'"),
        (Callback(), {"limit_test_batches": 1}, r"limit_test_batches must be null .*, got 1"),
    ):
        writer = ResultsWriter(str(tmp_path), shards=2)
        with pytest.raises(ValueError, match=words):
            run_test(method(root), data, further, RobustEvaluation(), writer, **options)
    with pytest.raises(ValueError, match=r"shard must be in \[0, 2\), got 2"):
        ResultsWriter(shard=2, shards=2)


def test_shards_of_a_stream_take_every_sample_once(root: Path, tmp_path: Path) -> None:
    """Two parts take whole tar files, three take single samples; a limit keeps its samples."""
    source = DataSource(f"wds:file://{root}/first", name="first")
    data = CLIPDataModule(test=[source], root=str(root), image_size=32, batch_size=4, bad_samples="skip")
    data.setup("test")

    def ids(**options: Any) -> list[int]:
        data.connect(**options)
        return [number for loader in data.test_dataloader() for batch in loader for number in batch.index.tolist()]

    for limit in (None, 5):
        every = ids(limit=limit)
        for count in (2, 3, 4):
            parts = [ids(limit=limit, share=Share(number, count)) for number in range(count)]
            assert sorted(number for part in parts for number in part) == sorted(every)
            assert sum(bool(part) for part in parts) >= 2
