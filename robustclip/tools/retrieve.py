"""``robustclip retrieve`` writes the image-text pairs of a pool that are nearest to a data set, as an anchor set."""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from robustclip import display
from robustclip.arguments import Count, CountOrZero, Interval, checked
from robustclip.data.opened_source import OpenedSource, open_source
from robustclip.models.clip import CLIPModel
from robustclip.paths import local_path
from robustclip.persistence import atomic_folder
from robustclip.tools.retrieval.encoder import Encoder, Part, Store, records
from robustclip.tools.retrieval.pairs import Pair, Shard, pool_shards, read_chosen, write_pairs
from robustclip.tools.retrieval.queries import Queries, image_parts, make_queries, write_neighbours
from robustclip.tools.retrieval.search import CHUNK, Candidates, Guard, flat, ivf_pq, load_faiss, nearest

GIGA = 1e9


@checked
@dataclass(frozen=True)
class Settings:
    """Settings of the retrieval. The model is the one that will be fine-tuned, before fine-tuning.

    Args:
        data: training set, as for ``--data.train``.
        pool: ``wds:FOLDER-or-URL`` of images with ``.txt`` captions, or ``wds:`` and shards, ``{00000..00331}.tar``;
            may be given several times.
        guard: test set whose images must not be retrieved, as for ``--data.test``; may be given several times.
        root: folder at which relative paths start.
        split: split of the data set.
        arch: open_clip architecture; null if ``pretrained`` is a folder.
        pretrained: open_clip tag, file or folder.
        image_size: side of the model's images in pixels; null takes the model's default.
        query: ``image`` compares the data set's images with pool images, ``class_text`` its classes with pool images,
            ``caption`` its captions with pool captions.
        captions: table of ``robustclip caption``, for queries by caption; null takes the ``.txt`` of the data's shards.
        k: number of pairs per query.
        guard_threshold: two images count as equal if the cosine of their features exceeds this value.
        index: ``flat``, which is exact, or ``ivfpq``, an approximation for pools of tens of millions.
        batch_size: number of images per batch.
        num_workers: number of threads that decode images.
        device: device of the model; ``auto`` takes a GPU if there is one.
        precision: precision of the model, ``fp32`` or ``bf16``.
        cache: folder that keeps the features; null takes ``OUT.work``, which is removed at the end.
        shard: number of the share of the pool that this process encodes, from 0.
        shards: number of shares. Processes with shares only encode; the command without shares then searches.
        seed: seed of the sample that ``ivfpq`` is fitted to.

    Raises:
        ValueError: a value is out of range.
    """

    data: str
    pool: list[str]
    guard: Sequence[str] = ()
    root: str = "."
    split: str = "train"
    arch: str | None = None
    pretrained: str | None = "shapes"
    image_size: Count | None = None
    query: Literal["image", "class_text", "caption"] = "image"
    captions: str | None = None
    k: Count = 5
    guard_threshold: Annotated[float, Interval(-1, 1)] = 0.95
    index: Literal["flat", "ivfpq"] = "flat"
    batch_size: Count = 64
    num_workers: CountOrZero = 2
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    cache: str | None = None
    shard: CountOrZero = 0
    shards: Count = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("captions", "cache"):
            local_path(getattr(self, name) or ".", name)
        if self.shard >= self.shards:
            raise ValueError(f"shard must be in [0, {self.shards}), got {self.shard}; shards are numbered from 0")


def retrieve(settings: Settings, out: Path) -> None:
    """Writes the anchor set ``out``; the same command resumes an interrupted run.

    ``out/train`` holds the pairs in the order of the pool. ``out/neighbours.parquet`` holds the positions of the
    nearest pairs for each image of the data set, best first. ``out/retrieval.json`` holds settings and counts.

    Args:
        settings: settings of the retrieval.
        out: folder to write; it must not exist.

    Raises:
        ValueError: the settings, the data or the pool are not valid, the cache belongs to another model, or ``out``
            exists.
    """
    load_faiss()
    if out.exists():
        raise ValueError(f"out {str(out)!r} exists and is never overwritten; choose another --out")
    data = open_source(settings.data, root=settings.root, split=settings.split)
    guards = _open_guards(settings)
    pool = pool_shards(settings.pool, settings.root)
    encoder = Encoder(
        CLIPModel(settings.arch, settings.pretrained, settings.image_size),
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        device=settings.device,
        precision=settings.precision,
    )
    work = Path(settings.cache) if settings.cache else out.with_name(f"{out.name}.work")
    store = Store(work, encoder.settings)
    if settings.shard == 0:
        sys.stderr.write(f"{_estimate(pool, encoder, settings)}\n")
    modalities = {"caption": ["text", "image"] if guards else ["text"]}.get(settings.query, ["image"])
    if settings.shards > 1:
        for kind in modalities:
            _pool_parts(store, encoder, pool, kind, settings)
        sys.stdout.write(f"features of share {settings.shard} of {settings.shards} are in {work}\n")
        return
    queries = make_queries(settings.query, data, settings.data, settings.root, settings.captions, store, encoder)
    parts = {kind: _pool_parts(store, encoder, pool, kind, settings) for kind in modalities}
    sets = {name: image_parts(store, encoder, *guard) for name, guard in guards.items()}
    best, counts = _search(settings, queries, parts, sets)
    report = {"settings": asdict(settings), "features": encoder.settings, "queries": len(queries.features)}
    with atomic_folder(out) as aside:
        _write_anchors(aside, pool, [part["digest"] for part in parts[modalities[0]]], queries, best)
        _write_report(aside / "retrieval.json", report | {"counts": counts})
    if settings.cache is None:
        shutil.rmtree(work)
    sys.stdout.write("".join(f"{name}: {count}\n" for name, count in counts.items()) + f"{out}\n")


def _write_anchors(
    folder: Path,
    pool: Sequence[Shard],
    digests: Sequence[NDArray[np.uint64]],
    queries: Queries,
    best: NDArray[np.int64],
) -> None:
    """Writes the retrieved pairs and the table of every image's nearest pairs."""
    anchors = np.unique(best[best >= 0])
    write_pairs(folder / "train", read_chosen(pool, digests, anchors))
    write_neighbours(folder / "neighbours.parquet", queries, best, anchors)


def _write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes settings and counts of the retrieval, with the versions of the packages."""
    versions = {name: version(name) for name in ("torch", "open_clip_torch", "faiss-cpu", "numpy")}
    path.write_text(json.dumps({**report, "versions": versions}, indent=2) + "\n", encoding="utf-8")


def _estimate(pool: Sequence[Shard], encoder: Encoder, settings: Settings) -> str:
    """Estimates disk space, memory and hours from the pool's first pairs, in one line."""
    probe = list(islice(pool[0].pairs(), encoder.batch_size))
    if not probe:
        raise ValueError(f"shard {pool[0].url} of the pool holds no image-text pair")
    sizes = [shard.size for shard in pool if shard.size is not None]
    if len(sizes) < len(pool):
        return f"pool: {len(pool)} shards, some of them remote, of unknown size"
    begin = time.perf_counter()
    encoder.images(pair.open for pair in probe)
    rate = len(probe) / (time.perf_counter() - begin)
    count = round(sum(sizes) / np.mean([pair.stored_bytes for pair in probe]))
    is_exact = settings.index == "flat"
    searched = min(CHUNK, count) * encoder.width * 4 if is_exact else count * (encoder.width // 8 + 8)
    return (
        f"pool: {len(pool)} shards, about {count:,} pairs of {encoder.width} dimensions:"
        f" {count * (encoder.width * 2 + 8) / GIGA:.3f} GB of features on the disk,"
        f" {searched / GIGA:.3f} GB of memory to search in, about {count / rate / 3600 / settings.shards:.2f} hours"
        f" to encode at {rate:.0f} images a second"
    )


def _search(
    settings: Settings, queries: Queries, parts: Mapping[str, list[Part]], sets: Mapping[str, list[Part]]
) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """Returns ids of the nearest candidates ``(Q, k)``, -1 where there are too few, and counts."""
    is_candidate, counts = _candidates(parts)
    candidates = Candidates(next(iter(parts.values())), is_candidate)
    if settings.k > len(candidates):
        usable = f"{len(candidates)}, the number of usable pairs in the pool"
        raise ValueError(f"k must be at most {usable}; got {settings.k}")
    guard = Guard(sets, parts.get("image", []), settings.guard_threshold)
    search = flat(candidates) if settings.index == "flat" else ivf_pq(candidates, seed=settings.seed)
    best, refused = nearest(search, queries.features, settings.k, len(candidates), guard)
    retrieved = len(np.unique(best[best >= 0]))
    return best, counts | {"retrieved": retrieved, "guarded": len(refused), "guarded_by": guard.counts(refused)}


def _pool_parts(store: Store, encoder: Encoder, pool: list[Shard], kind: str, settings: Settings) -> list[Part]:
    """Returns features of the pool's images or texts, for the share of this process."""
    shards = display.progress(pool[settings.shard :: settings.shards], f"pool, {kind}s")
    return [store.part(f"{kind}-{shard.stem}", partial(_encode, encoder, shard, kind)) for shard in shards]


def _encode(encoder: Encoder, shard: Shard, kind: str) -> Part:
    digests: list[int] = []

    def recorded() -> Iterator[Pair]:
        for pair in shard.pairs():
            digests.append(pair.digest if pair.captions else 0)
            yield pair

    if kind == "image":
        features = encoder.images(pair.open for pair in recorded())
    else:
        features = encoder.texts([pair.captions for pair in recorded()])
    return records(digests, features)


def _candidates(parts: Mapping[str, list[Part]]) -> tuple[NDArray[np.bool_], dict[str, Any]]:
    """Selects the pairs that can be retrieved: with caption and image, and only the first of equal images."""
    digests = [np.concatenate([part["digest"] for part in of_kind]) for of_kind in parts.values()]
    is_usable = np.all([values != 0 for values in digests], axis=0)
    is_candidate = np.zeros(len(is_usable), bool)
    usable = np.flatnonzero(is_usable)
    is_candidate[usable[np.unique(digests[0][usable], return_index=True)[1]]] = True
    count, candidates = len(is_usable), int(is_candidate.sum())
    counts = {"pool": count, "unusable": count - len(usable), "duplicates": len(usable) - candidates}
    return is_candidate, counts | {"candidates": candidates}


def _open_guards(settings: Settings) -> dict[str, tuple[OpenedSource, str]]:
    opened: dict[str, tuple[OpenedSource, str]] = {}
    for name in settings.guard:
        source = open_source(name, root=settings.root, split="test")
        if source.task.name in opened:
            raise ValueError(f"two guards are named {source.task.name!r}; give each set once")
        opened[source.task.name] = source, name
    return opened
