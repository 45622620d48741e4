"""A tiny pool of drawn images with captions, with duplicates planted in it, and what a retrieval leaves."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from helpers import add_member
from PIL import Image
from pyarrow import parquet

from robustclip.data.sources.shapes import ShapesDataset

OWN = 40  # images of the training set that lie in the pool
DUPLICATES = 5  # of images of the guarded test set
OTHERS = 30
POOL = OWN + DUPLICATES + OTHERS + 4
CAPTION = "training image {}"


def make_pool(folder: Path) -> Path:
    """Two shards: training images, test images that are also nearest to them, others, and four bad ones."""
    training, guarded, others = ShapesDataset("colours"), ShapesDataset("shapes"), ShapesDataset("outlines")
    pairs = [(encode(training[number][0]), CAPTION.format(number)) for number in range(OWN)]
    pairs += [(encode(guarded[number][0], quality=100), f"test image {number}") for number in range(DUPLICATES)]
    texts = ["a red circle", "a line drawing of a star"]
    pairs += [(encode(others[n][0]), texts[n] if n < 2 else others.caption(n) + " indeed") for n in range(OTHERS)]
    pairs += [pairs[0], pairs[0], (b"no image", "a text"), (encode(others[99][0]), " \n")]
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "nshards.txt").write_text("2")
    for shard, own in enumerate((pairs[:50], pairs[50:])):
        with tarfile.open(folder / "train" / f"{shard}.tar", "w") as archive:
            for number, (image, text) in enumerate(own):
                key = f"../up{number}" if number == 7 else f"p{number}"
                add_member(archive, f"{key}.png", image)
                add_member(archive, f"{key}.txt", text.encode())
    return folder


def encode(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png", **options)
    return buffer.getvalue()


def words(pool: Path) -> list[str]:
    """A command that retrieves by the embedded model."""
    place = ["--data", "shapes:colours", "--split", "test", "--pool", f"wds:{pool}"]
    return ["retrieve", *place, "--k", "3", "--device", "cpu"]


def parts_of(features: np.ndarray[Any, Any], first: int) -> list[np.ndarray[Any, Any]]:
    """Two parts as they lie on the disk."""
    records = np.zeros(len(features), [("digest", "<u8"), ("feature", "<f2", (features.shape[1],))])
    records["feature"] = features
    return [part for part in (records[:first], records[first:]) if len(part)]


def read_anchors(folder: Path) -> list[tuple[bytes, str]]:
    """Image and text of each pair, in their order, by tarfile alone."""
    found: list[tuple[bytes, str]] = []
    for shard in range(int((folder / "train" / "nshards.txt").read_text())):
        with tarfile.open(folder / "train" / f"{shard}.tar") as archive:
            contents = [archive.extractfile(member).read() for member in archive]  # type: ignore[union-attr]
        found += [(image, text.decode()) for image, text in zip(contents[::2], contents[1::2], strict=True)]
    return found


def neighbours(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(folder / "neighbours.parquet").to_pylist()
    return rows
