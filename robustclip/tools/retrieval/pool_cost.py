"""Estimates the time and memory to encode and search a pool, before the work starts."""

import time
from collections.abc import Sequence
from itertools import islice

import numpy as np

from robustclip.tools.retrieval.encoder import Encoder
from robustclip.tools.retrieval.pairs import Shard
from robustclip.tools.retrieval.search import CHUNK

GIGA = 1e9


def estimate(pool: Sequence[Shard], encoder: Encoder, *, is_exact: bool, processes: int) -> str:
    """Estimates disk space, memory and hours from the pool's first pairs.

    Args:
        pool: shards of the pool.
        encoder: encoder, which is timed on one batch.
        is_exact: whether the search is exact.
        processes: number of processes that encode.

    Returns:
        The estimate in one line.

    Raises:
        ValueError: the first shard is empty.
    """
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
    searched = min(CHUNK, count) * encoder.width * 4 if is_exact else count * (encoder.width // 8 + 8)
    return (
        f"pool: {len(pool)} shards, about {count:,} pairs of {encoder.width} dimensions:"
        f" {count * (encoder.width * 2 + 8) / GIGA:.3f} GB of features on the disk,"
        f" {searched / GIGA:.3f} GB of memory to search in, about {count / rate / 3600 / processes:.2f} hours"
        f" to encode at {rate:.0f} images a second"
    )
