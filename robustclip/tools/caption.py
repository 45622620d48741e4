"""``robustclip caption`` writes captions of a data set's images, by any Hugging Face image-to-text model."""

import io
import json
import logging
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robustclip import display
from robustclip.data.decoding import DECODING_ERRORS, decoded, in_eight_bits
from robustclip.data.opened_source import open_source
from robustclip.data.sources.source import where_of
from robustclip.persistence import atomic_write
from robustclip.tools.captioner import Captioner, Decoding
from robustclip.tools.progress_log import ProgressLog, Row, read_all

log = logging.getLogger(__name__)


def caption(
    data: str,
    captioner: str,
    out: Path,
    *,
    root: str = ".",
    split: str = "train",
    decoding: Decoding = Decoding(),
    num_workers: int = 0,
    device: str = "auto",
    shard: int = 0,
    shards: int = 1,
) -> bool:
    """Writes a table of captions of a data set's images; the same command resumes an interrupted run.

    Images are not augmented. The table does not depend on interruptions or on the number of processes.

    Args:
        data: source, as for ``--data.train``.
        captioner: folder, or id on the Hugging Face hub, of an image-to-text model with weights as safetensors.
        out: parquet file to write; finished batches are kept in ``OUT.journal`` until the file is complete.
        root: folder at which relative paths start.
        split: split of the data set.
        decoding: settings of the captions.
        num_workers: number of loader processes.
        device: device of the captioner; ``auto`` takes a GPU if there is one.
        shard: number of the share that this process captions, from 0.
        shards: number of shares.

    Returns:
        True if this process wrote the table; the process that ends last does.

    Raises:
        ValueError: a number is out of range, the source is remote, the captioner does not load, ``out`` exists, or the
            log belongs to another captioner, decoding or data set.
    """
    if not 0 <= shard < shards:
        raise ValueError(f"shard must be in [0, {shards}), got {shard}; shards are numbered from 0")
    if out.exists():
        raise ValueError(f"out {str(out)!r} exists and is never overwritten; choose another --out")
    dataset = open_source(data, root=root, split=split).dataset
    if dataset is None:
        raise ValueError(f"data source {data!r} is remote, but captioning needs local data; download its shards first")
    model = Captioner(captioner, decoding, device)
    size = len(dataset)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"captioner": captioner, "decoding": asdict(decoding), "weights": model.fingerprint}
    settings |= {"source": data, "split": split, "images": size}
    folder = out.with_name(f"{out.name}.journal")
    count = -(-size // decoding.batch_size)
    with ProgressLog(folder, shard, settings) as progress_log:
        done = read_all(folder, settings).keys()
        batches = Batches(dataset, model.processor, decoding.batch_size)
        todo = [number for number in range(count) if number % shards == shard and number not in done]
        loader: Any = DataLoader(batches, batch_size=None, sampler=todo, num_workers=num_workers)
        label = f"captions, shard {shard} of {shards}" if shards > 1 else "captions"
        for number, is_decoded, pixels in display.progress(loader, label, len(todo)):
            captions = iter([] if pixels is None else model(pixels, decoding.seed + number))
            rows = [(index, next(captions) if is_good else []) for index, is_good in is_decoded.items()]
            progress_log.append(number, rows)
    return _publish(folder, out, count, settings)


class Batches(Dataset[tuple[int, dict[int, bool], Tensor | None]]):
    """Batches of a data set's images, preprocessed for the captioner.

    A batch has its number, whether each sample id could be decoded, and the decoded images ``(B, 3, H, W)`` in the
    order of the ids, or None if there are none.

    Args:
        source: data set of pairs of image and label.
        processor: preprocessing of the captioner.
        batch_size: number of images per batch.
    """

    def __init__(self, source: Dataset[Any], processor: Any, batch_size: int) -> None:
        self.source, self.processor, self.batch_size = source, processor, batch_size

    def __getitem__(self, number: int) -> tuple[int, dict[int, bool], Tensor | None]:
        begin = number * self.batch_size
        index = range(begin, min(begin + self.batch_size, len(self.source)))  # type: ignore[arg-type]
        images: dict[int, Any] = {}
        for position in index:
            try:
                images[position] = in_eight_bits(decoded(self.source[position][0]))
            except DECODING_ERRORS as error:
                where = where_of(self.source, position)
                log.warning("%s cannot be decoded and gets no caption: %s", where, error)
        pixels = self.processor(images=[*images.values()], return_tensors="pt")["pixel_values"] if images else None
        return number, {position: position in images for position in index}, pixels


def _publish(folder: Path, out: Path, count: int, settings: Mapping[str, Any]) -> bool:
    """Joins the logs of all processes into the table, if every batch is finished."""
    batches = read_all(folder, settings)
    if len(batches) < count:
        sys.stdout.write(f"{len(batches)} of {count} batches are finished; the process that ends last writes {out}\n")
        return False
    rows = [row for number in range(count) for row in batches[number]]
    atomic_write(out, _table(rows, settings))
    shutil.rmtree(folder)
    empty = sum(not captions for _, captions in rows)
    sys.stdout.write(f"captions of {len(rows):,} images, {empty:,} of them without any\n{out}\n")
    return True


def _table(rows: list[Row], settings: Mapping[str, Any]) -> bytes:
    import pyarrow as pa  # imported here because it loads slowly and only some commands need it
    from pyarrow import parquet

    metadata = {name: str(settings[name]) for name in ("captioner", "weights", "source", "split")}
    metadata["decoding"] = json.dumps(settings["decoding"])
    schema = pa.schema([("index", pa.int64()), ("captions", pa.list_(pa.string()))], metadata=metadata)
    columns = [[index for index, _ in rows], [captions for _, captions in rows]]
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()
