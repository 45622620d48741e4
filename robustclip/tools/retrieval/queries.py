"""What is asked of the pool, and the table of answers."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from robustclip import display
from robustclip.data.anchors import ListTable
from robustclip.data.data_sets import OpenedSource
from robustclip.data.sources.source import labels_of
from robustclip.tools.retrieval.encoder import Encoder, Part, Store, records
from robustclip.tools.retrieval.pairs import pool_shards

IMAGES_PER_PART = 4096
ROWS = 65_536  # of the table, written at a time


class Queries(NamedTuple):
    """Questions to the pool, and who asks.

    Attributes:
        features: ``(Q, D)`` unit.
        owner: ``(N,)`` number of each image's query; -1 for an image without one.
    """

    features: NDArray[np.float32]
    owner: NDArray[np.int64]


def make_queries(
    query: str, data: OpenedSource, name: str, root: str, captions: str | None, store: Store, encoder: Encoder
) -> Queries:
    """Queries of a data set.

    Args:
        query: ``image``, ``class_text`` or ``caption``.
        data: the set.
        name: as which it was given.
        root: where it starts, if it is relative.
        captions: table for queries by caption; None takes the ``.txt`` of the shards.
        store: keeps image features.
        encoder: gives features.

    Raises:
        ValueError: a remote set, or one without what the query needs.
    """
    size = _size(data, name)
    if query == "class_text":
        labels = labels_of(data.dataset) if data.dataset is not None else None
        if labels is None:
            raise ValueError(f"data source {name!r} does not tell its labels without decoding; query by image")
        with torch.inference_mode():
            features = encoder.clip.encode_classes(data.task).float().cpu().numpy()
        return Queries(features, np.array(labels, np.int64))
    if query == "image":
        found = np.concatenate([part["feature"] for part in image_parts(store, encoder, data, name)])
    else:
        found = encoder.texts(_captions(captions, name, root, data.split, size))
    has_query = found.any(1)
    if not has_query.any():
        raise ValueError(f"no image of {name!r} has {'a caption' if query == 'caption' else 'pixels that decode'}")
    owner = np.where(has_query, has_query.cumsum() - 1, -1)
    return Queries(found[has_query].astype(np.float32), owner.astype(np.int64))


def image_parts(store: Store, encoder: Encoder, source: OpenedSource, name: str) -> list[Part]:
    """Features of a labelled set's images.

    Raises:
        ValueError: a remote set.
    """
    size = _size(source, name)
    labels = labels_of(source.dataset) if source.dataset is not None else None
    told = f"{name} {source.split} {size} {labels}"
    stem = f"set-{source.task.name}-{hashlib.blake2b(told.encode(), digest_size=8).hexdigest()}"
    parts = []
    begins = range(0, size, IMAGES_PER_PART)
    for begin in display.progress(begins, f"{source.task.name}, images"):
        positions = range(begin, min(begin + IMAGES_PER_PART, size))
        parts.append(store.part(f"{stem}-{begin}", partial(_encode, encoder, source.dataset, positions)))
    return parts


def write_neighbours(path: Path, queries: Queries, best: NDArray[np.int64], anchors: NDArray[np.int64]) -> None:
    """Writes ``index`` (sample id) and ``neighbours`` (positions in the anchor set, best first) of every image.

    Args:
        path: parquet file.
        queries: who asked.
        best: ``(Q, k)`` candidates' ids; -1 for none.
        anchors: ids of the anchor set, rising.
    """
    import pyarrow as pa  # slow to load, like all that only some commands need
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
        raise ValueError(f"data source {name!r} is remote; only a pool can be, fetch its shards first")
    return len(source.dataset)  # type: ignore[arg-type]


def _captions(table: str | None, name: str, root: str, split: str, size: int) -> list[list[str]]:
    """Captions by sample id."""
    if table is None:
        if not name.startswith("wds:"):
            raise ValueError(f"data source {name!r} has no .txt captions; make some by `robustclip caption`")
        found: Iterable[list[str]] = (
            pair.captions for shard in pool_shards([name], root, split) for pair in shard.pairs()
        )
        return list(found)
    lists = ListTable(Path(table), "captions", size)
    return [list(lists(index)) for index in range(size)]
