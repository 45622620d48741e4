"""Several training sets of the same classes, and a few shots of each."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import SHARED
from helpers import ShardWriter
from jsonargparse import ArgumentParser

from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.sources.source import Joined, where_of
from robustclip.data.splits import Shots, few_shots
from robustclip.data.transforms import Augmentation

DOMAINS = ["wds:art", "wds:cartoon", "wds:photo"]
LEAVE_ONE_OUT = Path(__file__).parents[2] / "robustclip" / "configs" / "data" / "pacs_leave_one_out.yaml"


class Labelled(list[int]):
    """A data set of labels alone."""

    @property
    def labels(self) -> list[int]:
        return list(self)


@pytest.fixture
def root(tmp_path: Path, write_shards: ShardWriter) -> Path:
    for size, domain in enumerate(("art", "cartoon", "photo"), 2):
        write_shards(tmp_path, domain, "train", [3 * size, 3], seed=size)
    return tmp_path


def opened(root: Path, train: list[DataSource | str], **options: object) -> CLIPDataModule:
    data = CLIPDataModule(train, root=str(root), image_size=32, batch_size=4, **options)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def test_joined_sets_are_numbered_through(root: Path) -> None:
    data = opened(root, list(DOMAINS), holdout=0)
    assert data.train_task.name == "art_cartoon_photo"
    assert data.train_task.class_names == ("red", "green", "blue")
    ids = [index for batch in data.train_dataloader() for index in batch.index.tolist()]
    assert sorted(ids) == list(range(9 + 12 + 15))


def test_a_joined_sample_is_that_of_its_set(root: Path) -> None:
    parts = [opened(root, [domain], holdout=0) for domain in DOMAINS]
    alone = [batch for part in parts for batch in part.plain_train_dataloader()]
    joined = list(opened(root, list(DOMAINS), holdout=0).plain_train_dataloader())
    images = [list(itertools.chain(*(batch.images for batch in batches))) for batches in (alone, joined)]
    labels = [[label for batch in batches for label in batch.labels.tolist()] for batches in (alone, joined)]
    assert labels[0] == labels[1]
    assert all((one == other).all() for one, other in zip(*images, strict=True))


def test_a_sample_of_joined_sources_is_reported_by_its_file() -> None:
    class Placed(Labelled):
        def where(self, index: int) -> str:
            return f"{len(self)}/{index}"

    joined = Joined([Placed([0] * 2), Placed([1] * 3)])  # type: ignore[list-item]
    assert [where_of(joined, index) for index in range(5)] == ["2/0", "2/1", "3/0", "3/1", "3/2"]


def test_a_command_line_lists_sources() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(CLIPDataModule, "data")
    wanted = parser.instantiate(parser.parse_args(["--data.train", '["wds:a", {source: "wds:b", classes: 0-2}]']))
    assert wanted.data.train_sources == ("wds:a", DataSource("wds:b", classes="0-2"))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (DataSource("wds:photo", class_names=["a", "b", "c"]), "must have the same class names and templates"),
        (DataSource("wds:photo", templates=["{}"]), "must have the same class names and templates"),
        (DataSource("wds:photo", border=2), "must agree in `native_size`, `border` and `crop`"),
    ],
)
def test_sets_that_do_not_go_together_are_refused(root: Path, second: DataSource, words: str) -> None:
    with pytest.raises(ValueError, match=f"training sets 'art' and 'photo' {words}"):
        opened(root, ["wds:art", second])


def test_captions_of_joined_sets_are_refused(root: Path) -> None:
    data = opened(root, list(DOMAINS), captions="shards", holdout=0)
    with pytest.raises(ValueError, match="is joined from several: captions and anchors must be null"):
        data.train_dataloader()


def test_a_stream_is_not_joined(root: Path) -> None:
    with pytest.raises(ValueError, match=r"training set 'photo' is remote or gives no labels .*; train on it alone"):
        opened(root, ["wds:art", f"wds:file://{root}/photo"])


def three_domains() -> Joined:
    """Of 7 classes: 40, 30 and 20 samples each, as in PACS' leave-one-out with 16 shots."""
    return Joined([Labelled([label for label in range(7) for _ in range(size)]) for size in (40, 30, 20)])  # type: ignore[misc]


def test_balanced_shots_are_as_many_of_every_class_and_set() -> None:
    joined = three_domains()
    chosen = few_shots(joined, None, Shots(16))
    counts = Counter((joined.domains[position], joined.labels[position]) for position in chosen)
    assert counts == dict.fromkeys(itertools.product(range(3), range(7)), 5)  # 16 // 3
    assert len(set(chosen)) == 105


def test_official_shots_are_as_many_of_every_set_only() -> None:
    joined = three_domains()
    chosen = few_shots(joined, None, Shots(16, rule="official"))
    assert Counter(joined.domains[position] for position in chosen) == dict.fromkeys(range(3), 35)  # 7 times 5
    assert len(set(Counter(joined.labels[position] for position in chosen).values())) > 1
    assert len(set(chosen)) < 105


def test_shots_follow_their_seed_and_stay_within_what_is_offered() -> None:
    labels = Labelled([0, 1] * 20)
    offered = list(range(0, 30))
    runs = [few_shots(labels, offered, Shots(4, seed)) for seed in (1, 1, 2)]  # type: ignore[arg-type]
    assert runs[0] == runs[1] != runs[2]
    assert set(runs[0]) < set(offered)
    assert Counter(labels[position] for position in runs[2]) == {0: 4, 1: 4}


def test_a_class_of_fewer_samples_gives_them_all() -> None:
    labels = Labelled([0, 1, 0, 0])
    chosen = few_shots(labels, None, Shots(2))  # type: ignore[arg-type]
    assert Counter(labels[position] for position in chosen) == {0: 2, 1: 1}


@pytest.mark.parametrize(
    ("labels", "shots", "words"),
    [([0, -1], 1, "shots need the class of every training image"), ([0, 1], 0, "shots must be at least 1")],
)
def test_shots_that_cannot_be_are_refused(labels: list[int], shots: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        few_shots(Labelled(labels), None, Shots(shots))  # type: ignore[arg-type]


def test_shots_are_taken_beside_the_hold_out(root: Path) -> None:
    data = opened(root, list(DOMAINS), holdout=0.2, shots=3)
    assert data.train_positions is not None
    assert data.val_positions is not None
    assert len(data.train_positions) == 9  # one of each of three classes and sets
    assert not {*data.train_positions} & {*data.val_positions}


def test_the_domains_of_pacs_are_trained_on_but_for_one() -> None:
    if not (SHARED / "data" / "wds" / "pacs_photo").is_dir():
        pytest.skip("needs the photographs beside the project, which are not here")
    options = yaml.safe_load(LEAVE_ONE_OUT.read_text())["init_args"]
    options |= {kind: [DataSource(**each) for each in options[kind]] for kind in ("train", "test")}
    options["augmentation"] = Augmentation(**options["augmentation"])
    data = CLIPDataModule(**options | {"root": str(SHARED / "data" / "wds"), "unknown": [], "num_workers": 0})
    data.setup("fit")
    data.setup("test")
    assert data.train_positions is not None
    assert len(data.train_positions) == 7 * 3 * 5
    assert data.train_task.class_names == data.test_tasks[0].class_names
