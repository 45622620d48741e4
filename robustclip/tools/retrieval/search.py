"""Searches the nearest candidates by inner product: exactly, or by an index for large pools."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustclip.tools.retrieval.encoder import Part

CHUNK = 65_536  # number of candidates in single precision at a time: 128 MiB at 512 dimensions
QUERIES = 4096
SHORTLIST = 20  # IVF-PQ proposes this many candidates per result; their exact inner products decide
TRAINED_PER_CELL = 64  # number of candidates that fit one cell of IVF-PQ; faiss requires at least 39
UNSEEN, FREE, REFUSED = 0, 1, 2  # states of a candidate in `Guard`
PROBED_SHARE = 1 / 16  # share of the cells that a query searches

Ids = NDArray[np.int64]
Features = NDArray[np.float32]
Search = Callable[[Features, int], Ids]
"""Function of queries ``(Q, D)`` and k; returns ids ``(Q, k)``, best first, -1 where there are too few."""


class Candidates:
    """Features of a pool, on disk in half precision; a candidate's id is its position in the pool.

    Args:
        parts: parts of the pool, in its order.
        is_candidate: mask ``(N,)`` of the items that a search may return.
    """

    def __init__(self, parts: Sequence[Part], is_candidate: NDArray[np.bool_]) -> None:
        self.parts, self.is_candidate = parts, is_candidate
        self.begins = np.cumsum([0, *(len(part) for part in parts)])
        self.width: int = parts[0]["feature"].shape[1]

    def __len__(self) -> int:
        return int(self.is_candidate.sum())

    def chunks(self) -> Iterator[tuple[Ids, Features]]:
        """Yields ids and features of all candidates, in the order of the ids."""
        for part, begin in zip(self.parts, self.begins[:-1], strict=True):
            for first in range(0, len(part), CHUNK):
                is_candidate = self.is_candidate[begin + first : begin + min(first + CHUNK, len(part))]
                if is_candidate.any():
                    rows = np.flatnonzero(is_candidate) + first
                    yield rows + begin, np.asarray(part["feature"][rows], np.float32, order="C")

    def take(self, ids: Ids) -> Features:
        """Returns the features ``(M, D)`` of ids ``(M,)``."""
        features = np.empty((len(ids), self.width), np.float32)
        owners = np.searchsorted(self.begins, ids, side="right") - 1
        for number in np.unique(owners):
            is_here = owners == number
            features[is_here] = self.parts[number]["feature"][ids[is_here] - self.begins[number]]
        return features


class Guard:
    """Detects candidates that are near-duplicates of a test image. The ARF paper has no such check.

    Args:
        sets: image features of the test sets, by name.
        pool: image features of the pool; may be empty if there are no sets.
        threshold: cosine in [-1, 1] above which two images count as equal.
    """

    def __init__(self, sets: Mapping[str, Sequence[Part]], pool: Sequence[Part], threshold: float) -> None:
        self.sets, self.threshold = sets, threshold
        if sets:
            count = sum(len(part) for part in pool)
            self._pool = Candidates(pool, np.ones(count, bool))
            self._state = np.zeros(count, np.int8)
        self._matches: dict[str, set[int]] = {name: set() for name in sets}

    def __call__(self, ids: Ids) -> NDArray[np.bool_]:
        """Returns a mask ``(M,)`` of the candidates that are refused; every candidate is compared only once."""
        if not self.sets:
            return np.zeros(len(ids), bool)
        unseen = np.unique(ids[self._state[ids] == UNSEEN])
        for begin in range(0, len(unseen), CHUNK):
            self._compare(unseen[begin : begin + CHUNK])
        is_refused: NDArray[np.bool_] = self._state[ids] == REFUSED
        return is_refused

    def counts(self, refused: Ids) -> dict[str, int]:
        """Counts the refused candidates that are near-duplicates of an image, per set."""
        return {name: len(matches & set(refused.tolist())) for name, matches in self._matches.items()}

    def _compare(self, ids: Ids) -> None:
        faiss, features = load_faiss(), self._pool.take(ids)
        self._state[ids] = FREE
        for name, parts in self.sets.items():
            for part in parts:
                images = np.asarray(part["feature"], np.float32, order="C")
                cosines, _ = faiss.knn(features, images, 1, metric=faiss.METRIC_INNER_PRODUCT)
                matches = ids[cosines[:, 0] > self.threshold]
                self._state[matches] = REFUSED
                self._matches[name].update(matches.tolist())


def load_faiss() -> Any:
    """Imports faiss, which the extra ``retrieval`` installs.

    Raises:
        ValueError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ValueError("retrieval needs faiss: pip install 'robustclip[retrieval]'") from error
    return faiss


def flat(candidates: Candidates) -> Search:
    """Returns an exact search; ties go to the smaller id.

    It computes the results of faiss's ``IndexFlatIP`` chunk by chunk, so that the pool is never in memory as a whole.
    """

    def search(queries: Features, k: int) -> Ids:
        scores = np.full((len(queries), k), -np.inf, np.float32)
        ids = np.full((len(queries), k), -1, np.int64)
        for chunk_ids, features in candidates.chunks():
            for block in range(0, len(queries), QUERIES):
                rows = slice(block, block + QUERIES)
                top_scores, top = _top(queries[rows], features, min(k, len(features)))
                merged = _best(np.hstack([scores[rows], top_scores]), np.hstack([ids[rows], chunk_ids[top]]), k)
                scores[rows], ids[rows] = merged
        return ids

    return search


def ivf_pq(candidates: Candidates, *, seed: int) -> Search:
    """Returns an approximate search: an IVF-PQ index proposes a shortlist, exact inner products order it.

    Jegou et al., Product quantization for nearest neighbor search, TPAMI 2011. A candidate takes one byte per eight
    dimensions, and eight bytes for its id.

    Args:
        candidates: candidates of the pool.
        seed: seed of the sample that the index is fitted to.
    """
    faiss = load_faiss()
    cells = 2 ** max(0, round(np.log2(max(1, len(candidates)) ** 0.5)))
    sub = next(sub for sub in (8, 4, 2, 1) if candidates.width % sub == 0)
    bits = 8 if len(candidates) >= 39 * 256 else 4
    quantiser = f"PQ{candidates.width // sub}x{bits}"
    index = faiss.index_factory(candidates.width, f"IVF{cells},{quantiser}", faiss.METRIC_INNER_PRODUCT)
    ids = np.flatnonzero(candidates.is_candidate)
    random = np.random.default_rng(seed)
    sample = random.choice(ids, min(len(ids), max(TRAINED_PER_CELL * cells, 256 * TRAINED_PER_CELL)), replace=False)
    index.train(candidates.take(np.sort(sample)))
    for chunk_ids, features in candidates.chunks():
        index.add_with_ids(features, chunk_ids)
    faiss.extract_index_ivf(index).nprobe = max(1, round(cells * PROBED_SHARE))

    def search(queries: Features, k: int) -> Ids:
        best = np.full((len(queries), k), -1, np.int64)
        block = max(1, CHUNK // (k * SHORTLIST))
        for begin in range(0, len(queries), block):
            part = queries[begin : begin + block]
            _, shortlist = index.search(part, min(k * SHORTLIST, max(k, len(candidates))))
            features = candidates.take(shortlist.clip(0).ravel()).reshape(*shortlist.shape, -1)
            scores = np.where(shortlist < 0, -np.inf, np.einsum("qd,qsd->qs", part, features))
            _, best[begin : begin + block] = _best(scores.astype(np.float32), shortlist, k)
        return best

    return search


def nearest(
    search: Search, queries: Features, k: int, count: int, refuse: Callable[[Ids], NDArray[np.bool_]]
) -> tuple[Ids, Ids]:
    """Finds the k nearest candidates of each query that are not refused.

    Args:
        search: search function.
        queries: ``(Q, D)`` features.
        k: number of results per query.
        count: number of all candidates.
        refuse: returns a mask of the ids ``(M,)`` that must not be taken; called only for ids that a search returned.

    Returns:
        Ids ``(Q, k)``, -1 where there are too few, and the refused ids that ranked above the last result.
    """
    best = np.full((len(queries), k), -1, np.int64)
    refused: set[int] = set()
    pending, width = np.arange(len(queries)), k
    while len(pending):
        ids = search(queries[pending], width)
        is_refused = np.zeros(ids.shape, bool)
        is_refused[ids >= 0] = refuse(ids[ids >= 0])
        is_taken = (ids >= 0) & ~is_refused
        rank = is_taken.cumsum(1)
        refused |= set(ids[is_refused & (rank < k)].tolist())
        is_taken &= rank <= k
        rows, columns = is_taken.nonzero()
        best[pending[rows], rank[rows, columns] - 1] = ids[rows, columns]
        is_short = (rank[:, -1] < k) & (ids[:, -1] >= 0) & (width < count)
        pending, width = pending[is_short], min(2 * width, count)
    return best, np.array(sorted(refused), np.int64)


def _top(queries: Features, features: Features, k: int) -> tuple[Features, Ids]:
    """Returns scores and rows of the k largest inner products; ties go to the smaller row.

    faiss orders ties arbitrarily. The search is therefore widened until the last score differs from the k-th one.
    """
    faiss, width = load_faiss(), min(k + 1, len(features))
    while True:
        scores, rows = faiss.knn(queries, features, width, metric=faiss.METRIC_INNER_PRODUCT)
        if width == len(features) or (scores[:, -1] < scores[:, k - 1]).all():
            return _best(scores, rows, k)
        width = min(2 * width, len(features))


def _best(scores: Features, ids: Ids, k: int) -> tuple[Features, Ids]:
    """Returns the first k of each row, by descending score and then by ascending id."""
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
