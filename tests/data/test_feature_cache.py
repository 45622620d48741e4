"""Reading a cache of embeddings that was written by hand."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ShardWriter
from numpy.typing import NDArray

from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.feature_cache import FeatureCache, FeatureImages
from robustclip.data.loader import ImageLoader
from robustclip.data.transforms import Augmentation

COUNT, WIDTH, VIEWS = 11, 6, 3
AUGMENTATION = Augmentation((0.5, 1.0), flip=True)


@dataclass
class Written:
    """A data set and its cache: embeddings of the views ``(V, N, D)`` and of the plain view ``(N, D)``."""

    folder: Path
    views: NDArray[np.float16]
    plain: NDArray[np.float16]

    def data(self, **options: Any) -> CLIPDataModule:
        options = {"batch_size": 4, "holdout": 0.0, "augmentation": AUGMENTATION, "features": "cache"} | options
        return CLIPDataModule(train="wds:tiny", root=str(self.folder), image_size=32, **options)

    def loader(self, **options: Any) -> ImageLoader:
        data = self.data(**options)
        data.setup("fit")
        return data.train_dataloader()

    def change(self, *keys: str, to: Any) -> None:
        """Changes an entry of the manifest."""
        path = self.folder / "cache" / "manifest.json"
        manifest = entry = json.loads(path.read_text())
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = to
        path.write_text(json.dumps(manifest))


@pytest.fixture
def written(write_shards: ShardWriter, tmp_path: Path) -> Written:
    write_shards(tmp_path, "tiny", "train", [COUNT])
    noise = np.random.default_rng(0)
    views = noise.standard_normal((VIEWS, COUNT, WIDTH)).astype(np.float16)
    found = Written(tmp_path, views, noise.standard_normal((COUNT, WIDTH)).astype(np.float16))
    data = found.data(features=None)
    data.setup("fit")
    write(tmp_path / "cache", found, data.image_sets[0].identity)
    return found


def write(folder: Path, content: Written, identity: dict[str, Any]) -> None:
    (folder / "train").mkdir(parents=True)
    np.save(folder / "train" / "ids.npy", np.arange(COUNT))
    np.save(folder / "train" / "labels.npy", np.arange(COUNT) % 3)
    np.save(folder / "train" / "plain.npy", content.plain)
    for number, view in enumerate(content.views):
        np.save(folder / "train" / f"view-{number}.npy", view)
    manifest = {
        "model": {"fingerprint": "f", "image_size": 32},
        "augmentation": {"scale": [0.5, 1.0], "flip": True},
        "views": VIEWS,
        "sets": {"train": {**identity, "bad_samples": []}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_batches_hold_the_embeddings_of_the_samples_in_the_order_of_the_images(written: Written) -> None:
    loader, images = written.loader(), written.loader(features=None)
    for epoch in range(2):
        for read, decoded in zip(loader, images, strict=True):
            assert read.index.equal(decoded.index)
            assert read.labels.equal(decoded.labels)
            assert read.images.dtype == torch.float32
            assert np.array_equal(read.images.numpy(), written.views[epoch][read.index].astype(np.float32))


def test_epochs_go_round_the_views(written: Written) -> None:
    loader = written.loader()
    for epoch in range(2 * VIEWS):
        batch = next(iter(loader))
        assert np.array_equal(batch.images, written.views[epoch % VIEWS][batch.index]), epoch


def test_without_augmentation_every_epoch_reads_the_plain_view(written: Written) -> None:
    loader = written.loader(augmentation=None)
    for _ in range(2):
        for batch in loader:
            assert np.array_equal(batch.images, written.plain[batch.index])


def test_the_plain_pass_over_the_training_set_reads_the_plain_view(written: Written) -> None:
    data = written.data()
    data.setup("fit")
    batches = list(data.plain_train_dataloader())
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(COUNT))
    assert np.array_equal(torch.cat([batch.images for batch in batches]), written.plain)


def test_an_interrupted_epoch_continues_at_its_next_batch(written: Written) -> None:
    whole = list(written.loader())
    loader = written.loader()
    loader.load_state_dict({"epoch": 0, "batches": 1})
    rest = list(loader)
    assert [batch.index.tolist() for batch in rest] == [batch.index.tolist() for batch in whole[1:]]
    assert all(one.images.equal(other.images) for one, other in zip(rest, whole[1:], strict=True))


def test_one_sample_reads_like_a_batch(written: Written) -> None:
    images = written.loader().dataset
    assert isinstance(images, FeatureImages)
    feature, label, index = images[5]
    assert (label, index) == (2, 5)
    assert np.array_equal(feature, written.views[0][5])


def test_few_shots_read_a_part_of_a_cache_of_all(written: Written) -> None:
    batches = list(written.loader(shots=2))
    index = torch.cat([batch.index for batch in batches])
    assert len(index) == 6
    assert np.array_equal(torch.cat([batch.images for batch in batches]), written.views[0][index])


def test_undecodable_images_are_left_out_and_reported(written: Written) -> None:
    keep = np.delete(np.arange(COUNT), 4)
    for path in (written.folder / "cache" / "train").glob("*.npy"):
        np.save(path, np.load(path)[keep])
    written.change("sets", "train", "bad_samples", to=[4])
    loader = written.loader()
    seen = torch.cat([batch.index for batch in loader])
    assert sorted(seen.tolist()) == keep.tolist()
    assert len(loader.bad_samples) == 1
    assert "0.tar" in loader.bad_samples[0].where
    written.change("sets", "train", "bad_samples", to=[])
    with pytest.raises(ValueError, match="lack 1 of 11 samples, such as 4; make others with this run's choice"):
        written.loader()


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (
            ["sets", "train", "source"],
            [{"source": "wds:other"}],
            r"source \[\{'source': 'wds:other'\}\] of train, this",
        ),
        (["sets", "train", "split"], "val", "split 'val' of train, this run has 'train'"),
        (["sets", "train", "part"], "classes 0-1 of 3", "part 'classes 0-1 of 3' of train, this run has ''"),
        (["sets", "train", "size"], 12, "size 12 of train, this run has 11"),
        (["sets", "train", "labels"], "0", r"labels '0' of train, this run has '\w{16}'"),
        (["sets", "train", "preprocessing"], "RGB, own size", "preprocessing 'RGB, own size' of train"),
        (["augmentation", "flip"], False, "flip False of augmentation, this run has True"),
        (["augmentation"], None, "scale None of augmentation, this run has"),
        (["sets"], {}, "lack the set 'train'"),
    ],
)
def test_a_foreign_cache_is_refused_with_the_difference(
    keys: list[str], value: Any, told: str, written: Written
) -> None:
    written.change(*keys, to=value)
    with pytest.raises(ValueError, match=f"^features [^\n]*{told}[^\n]*$"):
        written.loader()


def test_words_of_a_source_do_not_make_its_cache_foreign(written: Written) -> None:
    data = written.data()
    data.train_sources = (DataSource("wds:tiny", name="renamed", templates=["a drawing of a {}"]),)
    data.setup("fit")
    assert next(iter(data.train_dataloader())).images.ndim == 2


def test_damaged_files_are_refused(written: Written) -> None:
    path = written.folder / "cache" / "train" / "view-0.npy"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"view-0\.npy is missing or damaged"):
        written.loader()
    np.save(path, written.views[0][:-1])
    with pytest.raises(ValueError, match="is damaged: it has 10 embeddings of 11 samples"):
        written.loader()
    np.save(path.with_name("ids.npy"), np.array([{"code": "may run"}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"ids\.npy is missing or damaged \(.*allow_pickle=False.*\)"):
        written.loader()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    for content in (None, "no JSON", "{}", "[]"):
        if content is not None:
            (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=r"have no manifest.json that can be read; `robustclip cache`"):
            FeatureCache(tmp_path)


def test_captions_cannot_stand_beside_embeddings(written: Written, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = {"index": pyarrow.array([0]), "captions": pyarrow.array([["a text"]])}
    parquet.write_table(pyarrow.table(table), tmp_path / "captions.parquet")
    with pytest.raises(ValueError, match="captions, anchors need null"):
        written.loader(captions="captions.parquet")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("plain.npy", lambda a: a.astype(np.float32), "float32"),
        ("plain.npy", lambda a: a[0], "1 dimensions"),
        ("plain.npy", lambda a: np.where(a == a[1, 1], np.nan, a), "not finite"),
        ("ids.npy", lambda a: a[::-1], "must rise"),
        ("ids.npy", lambda a: a.astype(np.float64), "float64"),
        ("labels.npy", lambda a: a[1:], "one label each"),
        ("labels.npy", lambda a: a[:, None], "2 dimensions"),
    ],
)
def test_files_of_another_type_or_content_are_refused(
    name: str, change: Callable[..., Any], message: str, written: Written, tmp_path: Path
) -> None:
    file = tmp_path / "cache" / "train" / name
    np.save(file, change(np.load(file)))
    with pytest.raises(ValueError, match=message):
        list(written.loader(augmentation=None))


def test_a_flipped_bit_in_any_file_is_refused(written: Written, tmp_path: Path) -> None:
    """A digest of every file is in the manifest, as `robustclip cache` writes it."""
    cache = tmp_path / "cache"
    paths = list(cache.rglob("*.npy"))
    written.change("files", to={str(p.relative_to(cache)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths})
    assert len(list(written.loader(augmentation=None))) > 0
    chance = random.Random(0)
    for _ in range(40):
        path = cache / "train" / chance.choice(["ids.npy", "labels.npy", "plain.npy"])
        whole = path.read_bytes()
        spoilt = bytearray(whole)
        spoilt[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match="missing or damaged"):
            list(written.loader(augmentation=None))
        path.write_bytes(whole)
