"""Keeps near-duplicates of test images out of the retrieved pairs."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from robustclip.tools.retrieval.encoder import Part
from robustclip.tools.retrieval.search import CHUNK, Candidates, Ids, load_faiss

UNSEEN, FREE, REFUSED = 0, 1, 2


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
