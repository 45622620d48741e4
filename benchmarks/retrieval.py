"""Times the search of `robustclip retrieve` in vectors that are stored on disk in half precision, like its cache.

The exact search runs first. Recall of IVF-PQ is measured on random vectors and on vectors in clusters. Random vectors
are the worst case, since all cells are equally near; clusters resemble features of photographs.
"""

import argparse
import json
import resource
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from robustclip.results.provenance import commit
from robustclip.tools.retrieval.encoder import Part
from robustclip.tools.retrieval.search import Candidates, Search, flat, ivf_pq

ROWS = 10_000  # number of vectors in a part, as in a shard
CENTRES, SPREAD = 5000, 0.7  # number of clusters, and norm of the offset from a unit centre


def draw(
    count: int, width: int, random: np.random.Generator, centres: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Draws unit vectors (count, width), around random centres if centres are given."""
    vectors = random.standard_normal((count, width), np.float32)
    if centres is not None:
        vectors = centres[random.integers(0, len(centres), count)] + SPREAD * vectors / width**0.5
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def write(
    folder: Path, count: int, width: int, random: np.random.Generator, centres: NDArray[Any] | None
) -> list[Part]:
    """Writes parts to disk, and maps them into memory."""
    parts = []
    for begin in range(0, count, ROWS):
        rows = min(ROWS, count - begin)
        records = np.zeros(rows, [("digest", "<u8"), ("feature", "<f2", (width,))])
        records["feature"] = draw(rows, width, random, centres)
        np.save(folder / f"{begin}.npy", records)
        parts.append(np.load(folder / f"{begin}.npy", mmap_mode="r"))
    return parts


def peak() -> float:
    """Returns the largest resident memory of this process so far, in GB; pages of mapped files count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def timed(search: Search, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], float]:
    begin = time.perf_counter()
    ids = search(queries, k)
    return ids, time.perf_counter() - begin


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times both searches in one pool."""
    random = np.random.default_rng(options.seed)
    centres = draw(CENTRES, options.width, random, None) if kind == "clusters" else None
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        parts = write(Path(folder), options.vectors, options.width, random, centres)
        queries = draw(options.queries, options.width, random, centres).astype(np.float32)
        candidates = Candidates(parts, np.ones(options.vectors, bool))
        before = peak()
        exact, seconds = timed(flat(candidates), queries, options.k)
        measures = {"flat_seconds": seconds, "peak_gb_before": before, "flat_peak_gb": peak()}
        begin = time.perf_counter()
        search = ivf_pq(candidates, seed=options.seed)
        measures["ivf_pq_build_seconds"] = time.perf_counter() - begin
        approximate, measures["ivf_pq_seconds"] = timed(search, queries, options.k)
        measures["ivf_pq_peak_gb"] = peak()
    shared = [len(set(a) & set(b)) / options.k for a, b in zip(exact.tolist(), approximate.tolist(), strict=True)]
    return {name: round(value, 3) for name, value in (measures | {"ivf_pq_recall": float(np.mean(shared))}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the search of `robustclip retrieve`.")
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=("random", "clusters"), default=["random", "clusters"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="temporary folder of the vectors; 1 GB per million")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    faiss.omp_set_num_threads(options.threads)
    result: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "commit": commit(), "seed": options.seed}
    result |= {"threads": options.threads, "vectors": options.vectors, "width": options.width}
    result |= {"queries": options.queries, "k": options.k}
    result["versions"] = {name: version(name) for name in ("faiss-cpu", "numpy")}
    result["pools"] = {kind: measure(kind, options) for kind in options.kinds}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["pools"], indent=2))


if __name__ == "__main__":
    main()
