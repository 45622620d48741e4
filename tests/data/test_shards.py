"""Local shards: random access, nothing unpacked, and every way a shard can be wrong."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from helpers import ShardWriter, add_member
from PIL import Image

from robustclip.data.samples import Images
from robustclip.data.sources.tar import parse_label
from robustclip.data.sources.wds import IndexedShards, list_shards
from robustclip.data.transforms import ToPixels, in_unit_range


def opened(base: Path, split: str = "test") -> IndexedShards:
    return IndexedShards([Path(url) for url in list_shards(str(base), split)])


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_random_access_equals_sequential_reading_by_webdataset(
    tmp_path: Path, write_shards: ShardWriter, kind: str
) -> None:
    base = write_shards(tmp_path, "set", "test", [4, 1, 3], kind=kind)
    urls = list_shards(str(base), "test")
    sequential = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    shards = opened(base)
    assert len(shards) == len(sequential) == 8
    for position in reversed(range(8)):
        image, label = shards[position]
        expected = Image.open(io.BytesIO(sequential[position][kind]))
        assert np.array_equal(np.asarray(image), np.asarray(expected))
        assert label == int(sequential[position]["cls"])
        assert repr(sequential[position]["__key__"]) in shards.where(position)


def test_real_photographs_equal_sequential_reading(photographs: Path) -> None:
    base = photographs / "cifar100_mini"
    sequential = list(webdataset.WebDataset(list_shards(str(base), "test"), shardshuffle=False))
    shards = opened(base)
    assert len(shards) == len(sequential)
    for position, sample in enumerate(sequential):
        data = next(value for key, value in sample.items() if key in ("png", "jpg", "webp"))
        assert np.array_equal(np.asarray(shards[position][0]), np.asarray(Image.open(io.BytesIO(data))))
        assert shards.labels[position] == int(sample["cls"])


def test_nothing_is_unpacked(tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "set", "test", [3, 2])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    shards = opened(base)
    for position in range(len(shards)):
        shards[position][0].load()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_ids_are_positions_over_all_shards(tmp_path: Path, write_shards: ShardWriter) -> None:
    images = Images(opened(write_shards(tmp_path, "set", "test", [2, 0, 3])), ToPixels(None))
    samples = [images[number] for number in range(len(images))]
    assert [sample[2] for sample in samples] == [0, 1, 2, 3, 4]
    assert [sample[1] for sample in samples] == [0, 1, 2, 0, 1]


def test_greyscale_becomes_three_equal_channels(tmp_path: Path, write_shards: ShardWriter) -> None:
    shards = opened(write_shards(tmp_path, "set", "test", [1], mode="L"))
    assert shards[0][0].mode == "L"
    pixels, _, _ = Images(shards, ToPixels(None))[0]
    image = in_unit_range(pixels)
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    assert torch.equal(image[0], torch.from_numpy(np.array(shards[0][0])).float() / 255)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_cut_shard_is_refused(tmp_path: Path, write_shards: ShardWriter, share: float) -> None:
    base = write_shards(tmp_path, "set", "test", [3])
    shard = base / "test" / "0.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[: int(share * len(data))])
    if any(data[int(share * len(data)) :]):  # otherwise only padding after the end-of-archive block is gone
        with pytest.raises(ValueError, match=r"0\.tar"):
            opened(base)


def test_a_shard_cut_between_two_members_is_refused(tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "set", "test", [3])
    shard = base / "test" / "0.tar"
    with tarfile.open(shard) as archive:
        last = archive.getmembers()[-2]  # up to here the samples before it are whole
    shard.write_bytes(shard.read_bytes()[: last.offset])
    with pytest.raises(ValueError, match=r"0\.tar is damaged at byte \d+: it is cut short"):
        opened(base)


def test_a_missing_shard_is_named(tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "set", "test", [2, 2])
    (base / "test" / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"test/1\.tar is missing"):
        opened(base)


def test_an_image_without_label_is_named(tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "set", "test", [1])
    with tarfile.open(base / "test" / "0.tar", "a") as archive:
        add_member(archive, "lonely.png", b"")
    with pytest.raises(ValueError, match=r"0\.tar key 'lonely' needs .* \.cls label, it has \['png'\]"):
        opened(base)


@pytest.mark.parametrize("text", ["", "-1", "1.0", "cat", "0x1", "\xff", "9" * 5000])
def test_a_label_that_is_no_class_number_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="shard 7 has the label"):
        parse_label(text.encode("latin-1"), "shard 7")


def test_a_label_may_have_blanks_around_it() -> None:
    assert parse_label(b" 12\n", "") == 12


def test_an_unknown_split_names_the_known_ones(tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "set", "test", [1])
    with pytest.raises(ValueError, match=r"its splits are \['test'\]"):
        list_shards(str(base), "val")


@pytest.mark.parametrize("count", ["", "0", "two", "-1", "9" * 12, "9" * 5000])
def test_a_malformed_count_of_shards_is_reported(tmp_path: Path, write_shards: ShardWriter, count: str) -> None:
    base = write_shards(tmp_path, "set", "test", [1])
    (base / "test" / "nshards.txt").write_text(count)
    with pytest.raises(ValueError, match=r"nshards\.txt must hold the number of shards"):
        list_shards(str(base), "test")


def test_a_shard_that_shrinks_while_it_is_open_is_named(tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "set", "test", [3])
    shards, path = opened(base), base / "test" / "0.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"0\.tar has changed since it was opened"):
        shards[2]
