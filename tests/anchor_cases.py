"""Captions and anchor sets in the layout of the commands that make them."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from helpers import add_member
from PIL import Image
from pyarrow import parquet

from robustclip.data.sources.shapes import ShapesDataset


def write_table(path: Path, column: str, lists: Mapping[int, Sequence[str | int]]) -> Path:
    """A parquet file of lists by sample id."""
    kind = pa.string() if column == "captions" else pa.int32()
    columns = [pa.array(list(lists), pa.int64()), pa.array([list(each) for each in lists.values()], pa.list_(kind))]
    parquet.write_table(pa.table(columns, ["index", column]), path)
    return path


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def write_pairs(folder: Path, pairs: Sequence[tuple[bytes, str]], *, per_shard: int = 100) -> Path:
    """Encoded images with their captions, one a line, in ``folder/train``."""
    base = folder / "train"
    base.mkdir(parents=True)
    starts = range(0, len(pairs), per_shard)
    (base / "nshards.txt").write_text(str(len(starts)))
    for shard, start in enumerate(starts):
        with tarfile.open(base / f"{shard}.tar", "w") as archive:
            for number, (image, text) in enumerate(pairs[start : start + per_shard]):
                add_member(archive, f"s{start + number:07d}.png", image)
                add_member(archive, f"s{start + number:07d}.txt", text.encode())
    return folder


def shapes_pairs(name: str, indices: Sequence[int]) -> list[tuple[bytes, str]]:
    """Images of the shapes world with every word that they show."""
    shapes = ShapesDataset(name, "train" if name == "source" else "test")
    return [(encoded(shapes[index][0]), shapes.caption(index)) for index in indices]


def shapes_anchors(folder: Path, count: int = 8) -> list[str]:
    """Options that give a run on ``shapes:source`` captions, and anchors of another shapes set."""
    source = ShapesDataset("source", "train")
    captions = write_table(
        folder / "captions.parquet", "captions", {i: [source.caption(i)] for i in range(len(source))}
    )
    anchors = write_pairs(folder / "anchors", shapes_pairs("counts", range(count)))
    write_table(anchors / "neighbours.parquet", "neighbours", {i: [i % count] for i in range(len(source))})
    return ["--data.captions", str(captions), "--data.anchors", json.dumps(str(anchors))[1:-1]]
