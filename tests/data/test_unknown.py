"""Sets with images of unknown classes: labels, loaders, names, hold-out, and what refuses them."""

import itertools
from pathlib import Path

import pytest
from helpers import ShardWriter, quick_trainer
from PIL import Image

from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.catalog import CATALOG
from robustclip.data.loader import ImageLoader
from robustclip.data.opened_source import open_source
from robustclip.data.samples import Images
from robustclip.data.sources.source import labels_of, where_of
from robustclip.data.splits import draw_known
from robustclip.data.task_parts import Role
from robustclip.data.transforms import ToPixels
from robustclip.methods import TeCoA
from robustclip.tools.first_batches import examine
from robustclip.types import UNKNOWN

COLOURS = ("red", "green", "blue", "pink", "grey", "teal")  # of the six classes the first three are known
SET = DataSource("wds:set", known=3)
ROLES: tuple[Role, ...] = ("test", "unknown")


@pytest.fixture
def root(tmp_path: Path, write_shards: ShardWriter) -> Path:
    for split in ("train", "test"):
        write_shards(tmp_path, "set", split, [30, 30], COLOURS, broken=(2, 11) if split == "train" else ())
    return tmp_path


def opened(stage: str, root: Path, **options: object) -> CLIPDataModule:
    data = CLIPDataModule(root=str(root), image_size=32, batch_size=8, **options)  # type: ignore[arg-type]
    data.setup(stage)
    return data


def read(loader: ImageLoader) -> dict[int, int]:
    """Labels by sample id."""
    batches = list(loader)
    ids, labels = (itertools.chain(*(batch[part].tolist() for batch in batches)) for part in (2, 1))  # type: ignore[union-attr]
    return dict(zip(ids, labels, strict=True))


def test_a_part_renumbers_labels_and_reports_the_files_of_its_samples(root: Path) -> None:
    source = open_source(DataSource("wds:set", classes="1,4", images="3-4"), root=str(root), split="test")
    assert source.task.class_names == ("green", "grey")
    assert source.dataset is not None
    assert labels_of(source.dataset) == [UNKNOWN, 1] * 10  # the labels of the images go 3, 4, 3, 4, ...
    assert where_of(source.dataset, 11).endswith("1.tar key 's0000034'")
    assert source.dataset[1][1] == 1


def test_a_part_decodes_nothing_until_it_is_asked(root: Path) -> None:
    source = open_source(DataSource("wds:set", classes="1-2"), root=str(root), split="train")  # 2 is no image
    assert source.dataset is not None
    bad, good = (Images(source.dataset, ToPixels(None))[number] for number in (1, 3))
    assert bad.where.endswith("key 's0000002'")  # type: ignore[union-attr]
    assert good[1:] == (1, 3)


def test_known_and_unknown_images_are_read_apart(root: Path) -> None:
    data = opened("test", root, test=[SET], unknown=[SET])
    assert data.test_tasks[0].class_names == COLOURS[:3]
    assert data.unknown_names == ["set_unknown"]
    (test,) = data.test_dataloader()
    assert read(test) == {index: index % 3 for index in range(30)}
    assert read(data.unknown_dataloaders()["set_unknown"]) == dict.fromkeys(range(30), UNKNOWN)


def test_a_whole_set_is_unknown_by_its_own_name(root: Path, write_shards: ShardWriter) -> None:
    write_shards(root, "textures", "test", [5])
    data = opened("test", root, test=[SET], unknown=["wds:textures"])
    assert data.unknown_names == ["textures"]
    assert set(read(data.unknown_dataloaders()["textures"]).values()) == {UNKNOWN}


def test_a_stream_of_unknown_images_is_unknown(root: Path) -> None:
    data = opened("test", root, test=[SET], unknown=[f"wds:file://{root}/set"])
    labels = read(data.unknown_dataloaders()["set_unknown"])
    assert len(labels) == 60
    assert set(labels.values()) == {UNKNOWN}


def test_unknown_images_are_shared_and_limited_like_tests(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened("test", root, test=[SET], unknown=[SET])
    data.connect(limit=5)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(data, "_process", lambda rank=rank: (rank, 2))
        shares.append(set(read(data.unknown_dataloaders()["set_unknown"])))
    assert sorted(map(len, shares)) == [2, 3]
    assert len(shares[0] | shares[1]) == 5


def test_undecodable_unknown_images_are_counted(root: Path) -> None:
    broken = DataSource("wds:set", split="train", classes="0-1")  # 2 and 11 are among the others
    data = opened("test", root, test=[SET], unknown=[broken], bad_samples="skip")
    assert len(read(data.unknown_dataloaders()["set_unknown"])) == 38
    assert data.bad_sample_counts == {"set_unknown": 2}


def test_training_shows_unknown_images_and_the_hold_out_does_not(root: Path) -> None:
    train = DataSource("wds:set", known=3, shift="open")
    data = opened("fit", root, train=train, holdout=0.2, bad_samples="skip")
    assert data.train_has_unknown
    assert data.train_task.class_names == COLOURS[:3]
    (val,) = data.val_dataloader()
    assert set(read(val).values()) == {0, 1, 2}
    assert set(read(data.train_dataloader()).values()) == {0, 1, 2, UNKNOWN}


def test_a_plain_pass_shows_every_training_image_once_and_in_order(root: Path) -> None:
    data = opened("fit", root, train=DataSource("wds:set", known=3, shift="open"), holdout=0.2)
    plain = read(data.plain_train_dataloader())
    assert list(plain) == sorted(plain)
    assert plain == read(data.train_dataloader())


def test_a_plain_pass_over_a_stream_is_refused(root: Path) -> None:
    data = opened("fit", root, train=f"wds:file://{root}/set")
    with pytest.raises(ValueError, match="training set 'set' is remote: a pass in order needs a local copy"):
        data.plain_train_dataloader()


def test_other_classes_are_another_protocol(root: Path) -> None:
    data = opened("test", root, test=[SET, DataSource("wds:set", "other", classes="0-3")], unknown=[SET])
    assert data.protocol("set")["split"] == "set, test, classes 0-2 of 6"
    assert data.protocol("other")["split"] == "other, test, classes 0-3 of 6"
    assert data.protocol("set_unknown")["split"] == "set_unknown, test, images of classes 3-5 of 6 as unknown"


def test_drawn_classes_of_imagenet_are_those_of_its_shifts(tmp_path: Path) -> None:
    ids, parts = CATALOG["imagenet"].keys, CATALOG["imagenet_r"].folders
    for wnid in parts:
        (tmp_path / "r" / wnid).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "r" / wnid / "a.png")
    source = DataSource("folder:r", name="imagenet_r", known=400, known_seed=1)
    known, unknown = (open_source(source, root=str(tmp_path), split="test", role=role) for role in ROLES)
    drawn = [ids[label] for label in draw_known(ids, 400, seed=1)]
    assert known.task.class_names == tuple(CATALOG["imagenet"].class_names[ids.index(wnid)] for wnid in drawn)
    assert known.task.groups is None
    assert labels_of(known.dataset) == [drawn.index(wnid) for wnid in parts if wnid in drawn]  # type: ignore[arg-type]
    assert len(known.dataset) + len(unknown.dataset) == 200  # type: ignore[arg-type]
    assert known.part == "the known of 1000 classes, of which seed 1 drew 400 as known"


def test_the_doctor_checks_unknown_and_joined_sets(root: Path) -> None:
    data = CLIPDataModule(["wds:set", "wds:set"], test=[SET], unknown=[SET], root=str(root), image_size=32)
    for stage, title in (("test", "unknown: set_unknown"), ("fit", "training: set"), ("fit", "hold-out: set")):
        assert title in [finding.check for finding in examine(data, stage, None)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (DataSource("wds:set", classes="0-2", images="0-3"), "has images of unknown classes; list these in"),
        (DataSource("wds:set", classes="0-2", known=3), "has classes or images beside shift or known; give one"),
        (DataSource("wds:set", known=3, known_seed=1, shift="open"), "give `known`, and no shift but `closed`"),
        (DataSource("wds:set", classes="0-7"), "label ranges must rise within 0-5"),
        (DataSource("wds:set", "few", classes="5", split="few"), "has no sample of the selected part, classes 5 of 6"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    root: Path, write_shards: ShardWriter, source: DataSource, words: str
) -> None:
    write_shards(root, "set", "few", [5], COLOURS)
    with pytest.raises(ValueError, match=words):
        opened("test", root, test=[source])


def test_a_part_of_a_stream_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="is remote: classes, images, shift and known must be null"):
        opened("test", root, test=[DataSource(f"wds:file://{root}/set", classes="0-2")])


def test_unknown_sets_of_one_name_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="2 data sets are named 'set_unknown'; give each its own `name`"):
        opened("test", root, test=[SET], unknown=[SET, SET])


def test_a_method_that_needs_labels_refuses_unknown_images(root: Path, tiny_model: Path) -> None:
    data = opened("fit", root, train=DataSource("wds:set", known=3, shift="open"))
    with pytest.raises(ValueError, match=r"TeCoA needs images of known classes; set `images` of data.train to null"):
        quick_trainer(max_epochs=1).fit(TeCoA(pretrained=str(tiny_model)), datamodule=data)
