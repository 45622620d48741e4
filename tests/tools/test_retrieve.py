"""Anchor sets from a pool: the search, the guard, the files, and the messages for bad input."""

import json
import os
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_cases import die_in_write
from pyarrow import parquet
from resume_cases import finish
from retrieval_cases import CAPTION, DUPLICATES, POOL, make_pool, neighbours, parts_of, read_anchors, words

from robustclip.cli.main import run
from robustclip.data.sources.shapes import ShapesDataset
from robustclip.tools.retrieval import search
from robustclip.tools.retrieval.search import Candidates, flat, ivf_pq, nearest

faiss = pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def anchors(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Retrieved by images, with a guard."""
    out = tmp_path_factory.mktemp("anchors") / "out"
    assert run([*words(pool), "--guard", "shapes:shapes", "--guard_threshold", "0.9999", "--out", str(out)]) == 0
    return out


def brute_force(queries: np.ndarray[Any, Any], features: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
    """By falling score, then by rising id."""
    scores = queries.astype(np.float64) @ features.astype(np.float64).T
    ids = np.broadcast_to(np.arange(len(features)), scores.shape)
    return np.lexsort((ids, -scores), axis=-1)[:, :k]


def test_flat_search_is_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal((1500, 24)).astype(np.float16)
    queries = random.standard_normal((70, 24)).astype(np.float32)
    monkeypatch.setattr(search, "CHUNK", 400)  # several chunks and blocks
    monkeypatch.setattr(search, "QUERIES", 32)
    for k in (1, 5, 20):  # further down, single precision no longer tells neighbours apart
        found = flat(Candidates(parts_of(features, 900), np.ones(1500, bool)))(queries, k)
        assert np.array_equal(found, brute_force(queries, features, k))


def test_ties_go_to_the_smaller_id(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    features = random.integers(-1, 2, (600, 6)).astype(np.float16)  # whole numbers, so that equal scores are equal
    queries = random.integers(-1, 2, (20, 6)).astype(np.float32)
    monkeypatch.setattr(search, "CHUNK", 128)
    for k in (1, 7, 600):
        found = flat(Candidates(parts_of(features, 250), np.ones(600, bool)))(queries, k)
        assert np.array_equal(found, brute_force(queries, features, k))


def test_pairs_that_are_no_candidates_are_not_retrieved() -> None:
    random = np.random.default_rng(2)
    features, queries = random.standard_normal((200, 8)), random.standard_normal((9, 8)).astype(np.float32)
    is_candidate = random.random(200) < 0.5
    ids = np.flatnonzero(is_candidate)
    found = flat(Candidates(parts_of(features.astype(np.float16), 90), is_candidate))(queries, 4)
    assert np.array_equal(found, ids[brute_force(queries, features.astype(np.float16)[ids], 4)])


def test_refused_candidates_are_replaced_by_the_next() -> None:
    random = np.random.default_rng(3)
    features = random.standard_normal((300, 8)).astype(np.float16)
    queries = random.standard_normal((12, 8)).astype(np.float32)
    is_refused = random.random(300) < 0.7
    candidates = Candidates(parts_of(features, 300), np.ones(300, bool))
    best, refused = nearest(flat(candidates), queries, 5, 300, lambda ids: is_refused[ids])
    order, expected, met = brute_force(queries, features, 300), [], set()
    for row in order:
        allowed = [number for number in row if not is_refused[number]][:5]
        expected.append(allowed)
        met |= {number for number in row[: list(row).index(allowed[-1])] if is_refused[number]}
    assert best.tolist() == expected
    assert set(refused.tolist()) == met


def test_a_pool_that_is_all_refused_gives_nothing() -> None:
    candidates = Candidates(parts_of(np.eye(6, dtype=np.float16), 6), np.ones(6, bool))
    best, refused = nearest(flat(candidates), np.eye(6, dtype=np.float32), 2, 6, lambda ids: np.ones(len(ids), bool))
    assert (best == -1).all()
    assert len(refused) == 6


def test_ivf_pq_finds_nearly_all_in_clusters() -> None:
    random = np.random.default_rng(4)
    centres = random.standard_normal((64, 32))
    features = (centres[random.integers(0, 64, 4000)] + 0.3 * random.standard_normal((4000, 32))).astype(np.float16)
    queries = features[:50].astype(np.float32)
    found = ivf_pq(Candidates(parts_of(features, 1500), np.ones(4000, bool)), seed=0)(queries, 5)
    exact = brute_force(queries, features, 5)
    recall = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found, exact, strict=True)])
    assert recall > 0.8  # an unordered shortlist of 100, of some 62 to a cluster, would hold them all or none


def test_planted_duplicates_of_a_test_image_are_dropped(anchors: Path) -> None:
    counts = json.loads((anchors / "retrieval.json").read_text())["counts"]
    assert counts["pool"] == POOL
    assert counts["duplicates"] == 2  # same bytes: the first of three stays
    assert counts["unusable"] == 2  # one does not decode, one has no caption
    assert counts["guarded"] == counts["guarded_by"]["shapes"] == DUPLICATES


def test_an_anchor_keeps_bytes_and_captions(anchors: Path, pool: Path) -> None:
    original = read_anchors(pool)
    found = read_anchors(anchors)
    counts = json.loads((anchors / "retrieval.json").read_text())["counts"]
    assert len(found) == counts["retrieved"]
    assert {(each[0], each[1]) for each in found} <= {(each[0], each[1]) for each in original}
    with tarfile.open(anchors / "train" / "0.tar") as archive:
        names = archive.getnames()
    assert not [name for name in names if "/" in name or ".." in name]  # one key of the pool leads upwards


def test_neighbours_point_at_the_nearest_anchors(anchors: Path) -> None:
    """The pool holds the training images themselves, so that an image's own copy comes first."""
    texts = [text for _, text in read_anchors(anchors)]
    data = ShapesDataset("colours")
    rows = neighbours(anchors)
    assert [row["index"] for row in rows] == list(range(len(data)))
    assert all(len(set(row["neighbours"])) == 3 for row in rows)
    own = [texts[row["neighbours"][0]] == CAPTION.format(row["index"]) for row in rows[:40]]
    assert all(own)


def test_a_killed_retrieval_resumes(pool: Path, anchors: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*words(pool), "--guard", "shapes:shapes", "--guard_threshold", "0.9999", "--out", str(out)]
    child = os.fork()
    if not child:
        die_in_write(3)
        run(arguments)
        os._exit(1)
    finish(child, expected=-signal.SIGKILL, patience=60)
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.work").glob("*.npy")}
    assert left
    assert not out.exists()
    assert run(arguments) == 0
    for name in ("neighbours.parquet", "train/0.tar"):
        assert (out / name).read_bytes() == (anchors / name).read_bytes()
    assert not (tmp_path / "out.work").exists()


def test_shares_are_encoded_apart(pool: Path, anchors: Path, tmp_path: Path) -> None:
    cache = ["--cache", str(tmp_path / "cache")]
    for share in ("0", "1"):
        place = [*cache, "--shard", share, "--shards", "2", "--out", str(tmp_path / "none")]
        assert run([*words(pool), *place]) == 0
    assert not (tmp_path / "none").exists()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("image-*.npy")}
    assert len(made) == 2
    assert run([*words(pool), *cache, "--out", str(tmp_path / "out")]) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert neighbours(tmp_path / "out")[0].keys() == neighbours(anchors)[0].keys()


def test_queries_by_class_are_shared_by_its_images(pool: Path, tmp_path: Path) -> None:
    assert run([*words(pool), "--query", "class_text", "--out", str(tmp_path / "out")]) == 0
    labels, rows = ShapesDataset("colours").labels, neighbours(tmp_path / "out")
    by_class = {label: row["neighbours"] for label, row in zip(labels, rows, strict=True)}
    assert all(row["neighbours"] == by_class[label] for label, row in zip(labels, rows, strict=True))
    assert json.loads((tmp_path / "out" / "retrieval.json").read_text())["queries"] == len(set(labels))


def test_queries_by_caption_find_the_same_text(pool: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    texts: list[list[str]] = [["a red circle"], [], ["a line drawing of a star"]]
    table = pa.table({"index": pa.array([0, 1, 2], pa.int64()), "captions": pa.array(texts, pa.list_(pa.string()))})
    parquet.write_table(table, tmp_path / "captions.parquet")
    options = ["--query", "caption", "--captions", str(tmp_path / "captions.parquet")]
    assert run([*words(pool), *options, "--out", str(tmp_path / "out")]) == 0
    found = [text for _, text in read_anchors(tmp_path / "out")]
    rows = neighbours(tmp_path / "out")
    assert found[rows[0]["neighbours"][0]] == "a red circle"
    assert found[rows[2]["neighbours"][0]] == "a line drawing of a star"
    assert all(row["neighbours"] == [] for row in rows[3:] + rows[1:2])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--k", "9999"], "k must be at most"),
        (["--k", "0"], "k must be an integer at least 1, got 0"),
        (["--query", "sound"], "query: expected 'image' or 'class_text' or 'caption', got 'sound'"),
        (["--query", "caption"], "has no .txt captions"),
        (["--pool", "folder:x"], "pool 'folder:x' must be wds:"),
        (["--pool", "wds:none"], "no such data set"),
        (["--guard", "shapes:none"], "name must be one of source"),
        (["--shard", "2", "--shards", "2"], "shard must be in [0, 2), got 2"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    options: list[str], told: str, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words(pool), *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert told in error
    assert not (tmp_path / "out").exists()


def test_a_pool_without_captions_or_pairs_is_refused(
    write_shards: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, "labelled", "train", [3])
    assert run([*words(tmp_path / "labelled"), "--out", str(tmp_path / "out")]) == 2
    assert "a .txt caption, it has ['cls', 'png']" in capsys.readouterr().err
    write_shards(tmp_path, "empty", "train", [0])
    assert run([*words(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "holds no image-text pair" in capsys.readouterr().err


def test_a_cache_of_another_model_is_refused(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ["--cache", str(tmp_path / "cache"), "--shards", "9", "--shard", "8", "--out", str(tmp_path / "out")]
    assert run([*words(pool), *cache]) == 0
    assert run([*words(pool), *cache, "--precision", "bf16"]) == 2
    assert "was started with precision 'fp32', now it is 'bf16'" in capsys.readouterr().err


def test_a_missing_library_names_its_extra(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert run([*words(pool), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'robustclip[retrieval]'" in capsys.readouterr().err
