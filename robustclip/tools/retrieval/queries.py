"""Builds the queries to the pool, and writes the table of nearest pairs."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from robustclip import display
from robustclip.data.anchors import ListTable
from robustclip.data.opened_source import OpenedSource
from robustclip.data.sources.source import labels_of
from robustclip.tools.retrieval.encoder import Encoder, Part, Store, records
from robustclip.tools.retrieval.pairs import pool_shards

IMAGES_PER_PART = 4096
ROWS = 65_536  # number of table rows that are written at a time


class Queries(NamedTuple):
    """Query features, and the query of each image of the data set.

    Attributes:
        features: ``(Q, D)`` unit features.
        owner: ``(N,)`` number of each image's query; -1 for an image without one.
    """

    features: NDArray[np.float32]
    owner: NDArray[np.int64]


def make_queries(
    query: str, data: OpenedSource, name: str, root: str, captions: str | None, store: Store, encoder: Encoder
) -> Queries:
    """Builds the queries of a data set.

    Args:
        query: ``image``, ``class_text`` or ``caption``.
        data: opened data set.
        name: source of the data set, as the user gave it.
        root: folder at which relative paths start.
        captions: table for queries by caption; None takes the ``.txt`` of the shards.
        store: store of image features.
        encoder: computes features.

    Raises:
        ValueError: the data set is remote, or lacks the labels, captions or images that the query needs.
    """
    size = _size(data, name)
    if query == "class_text":
        labels = labels_of(data.dataset)
        if labels is None:
            raise ValueError(f"data source {name!r} gives labels only with decoded images; use --query image")
        with torch.inference_mode():
            features = encoder.clip.encode_classes(data.task).float().cpu().numpy()
        return Queries(features, np.array(labels, np.int64))
    if query == "image":
        features = np.concatenate([part["feature"] for part in image_parts(store, encoder, data, name)])
    else:
        features = encoder.texts(_captions(captions, name, root, data.split, size))
    has_query = features.any(1)
    if not has_query.any():
        raise ValueError(f"no image of {name!r} {'has a caption' if query == 'caption' else 'can be decoded'}")
    owner = np.where(has_query, has_query.cumsum() - 1, -1)
    return Queries(features[has_query].astype(np.float32), owner.astype(np.int64))


def image_parts(store: Store, encoder: Encoder, source: OpenedSource, name: str) -> list[Part]:
    """Computes the image features of a labelled set, or reads them from the store.

    Args:
        store: store of the features.
        encoder: computes features.
        source: opened data set.
        name: source of the data set, as the user gave it.

    Raises:
        ValueError: the data set is remote.
    """
    size = _size(source, name)
    labels = labels_of(source.dataset)
    identity = f"{name} {source.split} {size} {labels}"
    stem = f"set-{source.task.name}-{hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()}"
    parts = []
    begins = range(0, size, IMAGES_PER_PART)
    for begin in display.progress(begins, f"{source.task.name}, images"):
        positions = range(begin, min(begin + IMAGES_PER_PART, size))
        parts.append(store.part(f"{stem}-{begin}", partial(_encode, encoder, source.dataset, positions)))
    return parts


def write_neighbours(path: Path, queries: Queries, best: NDArray[np.int64], anchors: NDArray[np.int64]) -> None:
    """Writes ``index`` (sample id) and ``neighbours`` (positions in the anchor set, best first) of every image.

    Args:
        path: parquet file to write.
        queries: queries of the data set.
        best: ``(Q, k)`` ids of the nearest candidates; -1 where there are too few.
        anchors: ids of the anchor set in ascending order.
    """
    import pyarrow as pa  # imported here because it loads slowly and only some commands need it
    from pyarrow import parquet

    positions = np.where(best >= 0, np.searchsorted(anchors, best), -1).astype(np.int32)
    schema = pa.schema([("index", pa.int64()), ("neighbours", pa.list_(pa.int32()))])
    with parquet.ParquetWriter(path, schema) as writer:
        for begin in range(0, len(queries.owner), ROWS):
            owner = queries.owner[begin : begin + ROWS]
            rows = np.where(owner[:, None] >= 0, positions[owner], -1)
            offsets = np.concatenate([[0], (rows >= 0).sum(1).cumsum()]).astype(np.int32)
            lists = pa.ListArray.from_arrays(offsets, rows[rows >= 0])
            index = np.arange(begin, begin + len(owner), dtype=np.int64)
            writer.write_table(pa.table([pa.array(index), lists.cast(schema.field(1).type)], schema))


def _encode(encoder: Encoder, dataset: Any, positions: Sequence[int]) -> Part:
    loads = (lambda position=position: dataset[position][0] for position in positions)
    return records([1] * len(positions), encoder.images(loads))


def _size(source: OpenedSource, name: str) -> int:
    if source.dataset is None:
        raise ValueError(f"data source {name!r} is remote, but only a pool may be; download its shards first")
    return len(source.dataset)  # type: ignore[arg-type]


def _captions(table: str | None, name: str, root: str, split: str, size: int) -> list[list[str]]:
    """Reads the captions of every sample, in the order of the ids."""
    if table is None:
        if not name.startswith("wds:"):
            raise ValueError(f"data source {name!r} has no .txt captions; create them with `robustclip caption`")
        return [pair.captions for shard in pool_shards([name], root, split) for pair in shard.pairs()]
    lists = ListTable(Path(table), "captions", size)
    return [list(lists(index)) for index in range(size)]
