"""Captions, anchors and augmentation: what is drawn follows from seed, epoch and image alone."""

import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anchor_cases import encoded, write_pairs, write_table
from helpers import ShardWriter, add_member
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from torch.utils.data import DistributedSampler

from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.loader import ImageLoader
from robustclip.data.samples import BadSample
from robustclip.data.transforms import Augmentation, AugmentedPixels, ToPixels
from robustclip.types import Batch

SIZE, PAIRS = 12, 5


@pytest.fixture(scope="module")
def folder(write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, captions of all but one of them, and five pairs, one of which does not decode in ``holed``."""
    folder = tmp_path_factory.mktemp("anchored")
    write_shards(folder, "set", "train", [7, SIZE - 7])
    rows = {number: [f"{number} first", f"{number} second"] for number in reversed(range(SIZE)) if number != 3}
    write_table(folder / "captions.parquet", "captions", rows)
    pictures = [encoded(Image.new("RGB", (32, 32), (50 * number, 0, 0))) for number in range(PAIRS)]
    pairs = [(picture, f"pair {number}\n\nalso {number}\n") for number, picture in enumerate(pictures)]
    near = {number: [number % PAIRS, (number + 2) % PAIRS] for number in range(SIZE)} | {4: []}
    for name, content in {"pairs": pairs, "holed": [pairs[0], (b"no image", "x"), *pairs[2:]]}.items():
        write_table(write_pairs(folder / name, content, per_shard=3) / "neighbours.parquet", "neighbours", near)
    return folder


def loader(folder: Path, **options: Any) -> ImageLoader:
    options = {"captions": "captions.parquet", "anchors": "pairs"} | options
    data = CLIPDataModule("wds:set", root=str(folder), image_size=32, batch_size=5, holdout=0, **options)
    data.setup("fit")
    return data.train_dataloader()


def epoch(source: ImageLoader) -> list[Batch]:
    if isinstance(source.sampler, DistributedSampler):  # as Lightning does
        source.sampler.set_epoch(source.state_dict()["epoch"])
    return list(source)


def rows(batches: list[Batch]) -> dict[int, tuple[str, int, str]]:
    """Caption, position of the pair and its caption by sample id."""
    found = {}
    for batch in batches:
        assert batch.captions is not None
        assert batch.anchors is not None
        parts = (batch.captions, batch.anchors.index.tolist(), batch.anchors.captions)
        found |= dict(zip(batch.index.tolist(), zip(*parts, strict=True), strict=True))
    return found


def test_every_image_has_its_caption_and_a_pair(folder: Path) -> None:
    source = loader(folder)
    seen = [rows(epoch(source)) for _ in range(6)]
    for found in seen:
        assert found.keys() == set(range(SIZE))
        for index, (caption, position, text) in found.items():
            assert caption in ((f"{index} first", f"{index} second") if index != 3 else ("",))
            assert text in (f"pair {position}", f"also {position}")
        # Round and round the pool: 12 draws from 5 pairs.
        assert sorted(Counter(position for _, position, _ in found.values()).values()) == [2, 2, 2, 3, 3]
    assert all(len({found[index] for found in seen}) > 2 for index in range(SIZE)), "epochs differ"
    assert {found[0][0] for found in seen} == {"0 first", "0 second"}


def test_images_of_pairs_are_those_of_their_captions(folder: Path) -> None:
    for batch in epoch(loader(folder)):
        assert batch.anchors is not None
        reds = (batch.anchors.images[:, 0, 0, 0] * 255 / 50).round().long()
        assert torch.equal(reds, batch.anchors.index)


def test_paired_images_take_a_neighbour_or_any_pair_where_they_have_none(folder: Path) -> None:
    source = loader(folder, anchor_choice="paired")
    seen = [rows(epoch(source)) for _ in range(8)]
    for index in set(range(SIZE)) - {4}:
        assert {found[index][1] for found in seen} == {index % PAIRS, (index + 2) % PAIRS}
    assert len({found[4][1] for found in seen}) > 2


@pytest.mark.parametrize(("done", "workers"), [(1, 0), (4, 0), (4, 2)])
def test_a_resumed_run_draws_the_pairs_of_the_uninterrupted_run(folder: Path, done: int, workers: int) -> None:
    options = {"augmentation": Augmentation(flip=True), "num_workers": workers}
    source = loader(folder, **options)
    whole = [batch for _ in range(3) for batch in epoch(source)]
    again = loader(folder, **options)
    again.load_state_dict({"epoch": done // 3, "batches": done % 3})
    rest = [batch for _ in range(3 - done // 3) for batch in epoch(again)]
    assert len(rest) == len(whole) - done == 9 - done
    for one, other in zip(rest, whole[done:], strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.anchors.images, other.anchors.images)  # type: ignore[union-attr]
    assert rows(rest[-3:]) == rows(whole[-3:])


def test_captions_and_pairs_leave_the_images_unchanged(folder: Path) -> None:
    states = torch.get_rng_state(), random.getstate()
    one, other = loader(folder), loader(folder, captions=None, anchors=None)
    for with_pairs, without in zip(epoch(one), epoch(other), strict=True):
        assert without.captions is without.anchors is None
        assert all(torch.equal(a, b) for a, b in zip(with_pairs[:3], without[:3], strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_a_pair_that_does_not_decode_leaves_its_place_to_the_next_and_is_counted(folder: Path) -> None:
    source = loader(folder, anchors="holed")
    positions = [position for _, position, _ in rows(epoch(source)).values()]
    assert set(positions) == {0, 2, 3, 4}
    assert len(positions) == SIZE
    assert len(source.bad_samples) in (2, 3)  # 12 draws from 5 pairs
    assert "key 's0000001'" in source.bad_samples[0].where


def test_an_image_whose_pairs_all_fail_to_decode_is_left_out(folder: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "broken", [(b"no image", "a"), (b"nor this", "b")])
    data = loader(folder, anchors=str(tmp_path / "broken")).dataset
    assert isinstance(data[0], BadSample)  # type: ignore[index]


def test_captions_in_shards_are_read_beside_the_images(folder: Path, write_shards: ShardWriter, tmp_path: Path) -> None:
    base = write_shards(tmp_path, "set", "train", [2, 1])
    with tarfile.open(base / "train" / "0.tar", "a") as archive:
        add_member(archive, "s0000001.txt", b" one \n\n")
    found = [batch.captions for batch in epoch(loader(tmp_path, captions="shards", anchors=str(folder / "pairs")))]
    assert sorted(text for captions in found for text in captions or ()) == ["", "", "one"]


def test_batches_can_be_moved_and_pinned(folder: Path) -> None:
    batch = epoch(loader(folder))[0]
    moved = move_data_to_device(batch, torch.device("meta"))
    assert type(moved) is Batch
    assert moved.captions == batch.captions
    assert moved.anchors.captions == batch.anchors.captions  # type: ignore[union-attr]
    assert moved.anchors.images.device.type == "meta"
    if torch.cuda.is_available():
        pinned = torch.utils.data._utils.pin_memory.pin_memory(batch)
        assert pinned.captions == batch.captions
        assert pinned.anchors.images.is_pinned()


def test_augmented_crops_are_close_to_the_image_and_a_function_of_the_key() -> None:
    ramp = Image.fromarray(np.linspace(0, 255, 96 * 96 * 3).reshape(96, 96, 3).astype(np.uint8))
    state = torch.get_rng_state()
    crop = AugmentedPixels(48, Augmentation(), seed=1)
    first = crop(ramp, (0, 7))
    assert first.shape == (3, 48, 48)
    assert torch.equal(first, crop(ramp, (0, 7)))
    others = [crop(ramp, (1, 7)), crop(ramp, (0, 8)), AugmentedPixels(48, Augmentation(), seed=2)(ramp, (0, 7))]
    assert not any(torch.equal(first, other) for other in others)
    # Nine tenths of the area at least: the middle of a ramp stays within a tenth of its range.
    assert all(abs(float(crop(ramp, (0, key)).mean()) - 0.5) < 0.1 for key in range(50))
    assert torch.equal(torch.get_rng_state(), state)


def test_flips_come_every_other_time_and_small_images_keep_their_size() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8))
    crop = AugmentedPixels(None, Augmentation(scale=(1.0, 1.0), flip=True), seed=0)
    plain = ToPixels(None)(picture)
    kinds = Counter(
        "same" if torch.equal(found, plain) else "flipped" if torch.equal(found, plain.flip(2)) else "cropped"
        for found in (crop(picture, (0, key)) for key in range(200))
    )
    assert kinds["cropped"] + kinds["flipped"] + kinds["same"] == 200
    assert kinds["flipped"] > 0
    assert crop(picture, (0, 0)).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"captions": "none.parquet"}, "none.parquet is no file"),
        ({"captions": "shards"}, r".txt files in their shards or a column `caption`"),
        ({"captions": "pairs/neighbours.parquet"}, "must have the columns index and captions"),
        ({"captions": "set/classnames.txt"}, "must be a parquet file"),
        ({"anchors": "set"}, r"needs an image .* and a .txt caption"),
        ({"anchors": "none"}, "no such data set"),
    ],
)
def test_missing_anchors_are_reported(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loader(folder, **options)


def test_tables_of_other_sets_and_streams_are_refused(folder: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "far.parquet", "captions", {SIZE: ["one too far"]})
    with pytest.raises(ValueError, match=rf"another data set: its ids must be in \[0, {SIZE - 1}\]"):
        loader(folder, captions=str(table))
    few = write_pairs(tmp_path / "few", [(b"", "a")])
    write_table(few / "neighbours.parquet", "neighbours", {0: [0, 3]})
    with pytest.raises(ValueError, match="names pair 3, but only 1"):
        loader(folder, anchors=str(few), anchor_choice="paired")
    remote = DataSource(f"wds:file://{folder}/set", length=12)
    data = CLIPDataModule(remote, anchors="pairs", root=str(folder), val=["shapes:colours"])
    data.setup("fit")
    with pytest.raises(ValueError, match="is remote: captions and anchors must be null"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"must rise within \(0, 1\]"):
        Augmentation(scale=(0.9, 0.5))
