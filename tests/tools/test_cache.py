"""Embeddings of a run's images: like those of the decoded images, however they are made, and read by a run."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_cases import content, die_in_write, options
from checkpoint_cases import one_tokenizer
from helpers import ShardWriter
from resume_cases import finish

from robustclip.cli.lightning import main
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule
from robustclip.data.transforms import Augmentation
from robustclip.models.clip import CLIPModel
from robustclip.tools import cache

# fp16 has 11 binary digits: rounding moves a number by at most 2^-11 of itself, and tiny ones by 2^-25.
HALF = {"rtol": 2**-11, "atol": 2**-24}
COUNTS = [9, 8]
PARTS = 3 * 3 + 1 + 2  # of at most six: 14 training images in three views, 3 held out, 7 to test on
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


@pytest.fixture(scope="module")
def folder(write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set, one image of which does not decode and another of its hold-out, and a test set."""
    base = tmp_path_factory.mktemp("data")
    write_shards(base, "tiny", "train", COUNTS, broken=[3, 10])
    write_shards(base, "tried", "test", [7], seed=1)
    return base


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> Iterator[None]:
    """Several parts of each set, none of whole batches."""
    with pytest.MonkeyPatch.context() as patched, one_tokenizer():
        patched.setattr(cache, "IMAGES_PER_PART", 6)
        yield


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def build(folder: Path, model: Path, out: Path, *more: str) -> int:
    return run(["cache", *options(folder, model, out), "--device", "cpu", *more])


@pytest.fixture(scope="module")
def made(folder: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In one go, with the test set."""
    out = tmp_path_factory.mktemp("made") / "cache"
    assert build(folder, tiny_model, out, "--with_test", "true") == 0
    return out


@pytest.fixture
def settings(folder: Path, tiny_model: Path, made: Path) -> list[str]:
    """Of a run on the cache."""
    return options(folder, tiny_model, made)


@pytest.fixture(scope="module")
def begun(folder: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings without a part."""
    out = tmp_path_factory.mktemp("begun") / "cache"
    assert build(folder, tiny_model, out, "--shards", "99", "--shard", "98") == 0
    return out


def data(folder: Path, **more: Any) -> CLIPDataModule:
    augmentation = Augmentation((0.5, 1.0), flip=True)
    given: dict[str, Any] = {"train": "wds:tiny", "test": ["wds:tried"], "root": str(folder), "image_size": 32}
    given |= {"batch_size": 4, "holdout": 0.2, "augmentation": augmentation, "bad_samples": "skip"}
    found = CLIPDataModule(**given | more)
    found.setup("fit")
    return found


def test_cached_embeddings_are_those_of_the_decoded_images(folder: Path, tiny_model: Path, made: Path) -> None:
    clip = CLIPModel(pretrained=str(tiny_model)).eval()
    direct, cached = data(folder), data(folder, features=str(made))
    loaders = [(direct.train_dataloader(), cached.train_dataloader())] * 2  # each of two epochs has its own view
    loaders += [(direct.val_dataloader()[0], cached.val_dataloader()[0])]
    loaders += [(direct.plain_train_dataloader(), cached.plain_train_dataloader())]
    seen = []
    for images, embeddings in loaders:
        for image, embedding in zip(images, embeddings, strict=True):
            assert image.index.equal(embedding.index)
            assert image.labels.equal(embedding.labels)
            with torch.no_grad():
                torch.testing.assert_close(embedding.images, clip.embed_image(image.images), **HALF)
            seen += embedding.index.tolist()
    assert direct.val_positions == [5, 6, 10]
    assert len(seen) == 3 * (sum(COUNTS) - 3 - 1) + (3 - 1)
    views = [np.load(made / "train" / f"view-{view}.npy") for view in range(2)]
    assert np.abs(views[0] - views[1]).max() > 0.01  # or the augmentation would do nothing


def test_the_cache_is_small_and_states_its_settings(made: Path, tiny_model: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["model"]["fingerprint"] == CLIPModel(pretrained=str(tiny_model)).fingerprint
    assert (manifest["dtype"], manifest["views"], manifest["augmentation_seed"]) == ("float16", 2, 0)
    assert manifest["augmentation"] == {"scale": [0.5, 1.0], "flip": True}
    assert list(manifest["sets"]) == ["train", "holdout", "test/tried"]
    assert [manifest["sets"][name]["bad_samples"] for name in ("train", "holdout")] == [[3], [10]]
    samples = manifest["sets"]["train"]["samples"]
    assert np.load(made / "train" / "view-1.npy", allow_pickle=False).nbytes == samples * 16 * 2
    assert [path.name for path in made.parent.iterdir()] == ["cache"]


def test_killed_and_resumed_gives_the_same_files(
    folder: Path, tiny_model: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, arguments = tmp_path / "cache", ("--with_test", "true")
    child = os.fork()
    if not child:
        die_in_write(4)  # settings, and three parts
        build(folder, tiny_model, out, *arguments)
        os._exit(1)
    finish(child, expected=-signal.SIGKILL, patience=60)
    assert len(list((tmp_path / "cache.work").glob("*.npy"))) == 3
    assert not out.exists()
    encode, encoded = cache._encode, []
    monkeypatch.setattr(cache, "_encode", lambda *given: encoded.append(given) or encode(*given))
    assert build(folder, tiny_model, out, *arguments) == 0
    assert len(encoded) == PARTS - 3
    assert content(out) == content(made)


def test_two_processes_give_the_files_of_one(folder: Path, tiny_model: Path, made: Path, tmp_path: Path) -> None:
    arguments = ("--with_test", "true")
    for share in ("1", "0"):
        assert build(folder, tiny_model, tmp_path / "cache", *arguments, "--shard", share, "--shards", "2") == 0
        assert not (tmp_path / "cache").exists()
    assert len(list((tmp_path / "cache.work").glob("*.npy"))) == PARTS
    assert build(folder, tiny_model, tmp_path / "cache", *arguments) == 0
    assert content(tmp_path / "cache") == content(made)


def test_a_fit_on_features_equals_a_fit_on_images(settings: list[str]) -> None:
    weights = []
    for more in ([], ["--data.features", "null"]):
        finished = main(["fit", *settings, *QUIET, *more])
        assert 0 <= finished.trainer.callback_metrics["val/tiny/clean/acc1"] <= 1
        weights.append(finished.model.linear.weight.detach())
    moved = (weights[1] - torch.eye(16)).abs().max()
    assert moved > 1e-4
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-2 * float(moved))  # 2^-11, over six steps


def test_a_test_on_features_counts_as_a_test_on_images(settings: list[str]) -> None:
    counts = []
    for is_read in ("true", "false"):
        finished = main(["test", *settings, *QUIET, "--data.features_in_test", is_read, "--results.folder", is_read])
        counts.append(float(finished.trainer.callback_metrics["test/tried/clean/acc1"]))
    assert counts[0] == counts[1]


PGD = ["--evaluation.attacks", "{{pgd: {{class_path: PGD}}}}"]


@pytest.mark.parametrize(
    ("command", "more", "told"),
    [
        ("fit", ["--model", "TeCoA"], "TeCoA needs images, data.features gives embeddings"),
        ("fit", ["--model.pretrained", "shapes"], "of a tower with fingerprint"),
        ("fit", PGD, "attacks, pgd, need images"),
        ("test", [*PGD, "--data.features_in_test", "true"], "attacks, pgd, need images"),
        ("fit", ["--data.augmentation.flip", "false"], "flip True of augmentation, this run has False"),
        ("fit", ["--data.holdout", "0"], "samples, such as"),
        ("cache", [], "exists and is never overwritten"),
        ("cache", ["--data.features", "null"], "data.features must name the folder to write, got null"),
        ("cache", ["--data.features", "other", "--trainer.max_epochs", "null"], "views must be set"),
        ("cache", ["--data.features", "other", "--views", "0"], "views must be an integer at least 1 or null, got 0"),
        ("cache", ["--data.features", "other", "--shard", "2"], "shard must be in [0, 1), got 2"),
        (
            "cache",
            ["--data.features", "other", "--precision", "fp8"],
            "precision: expected 'fp32' or 'bf16'",
        ),
        ("cache", ["--data.features", "other", "--data.train", "wds:file://{}/tiny"], "'tiny' is remote; features are"),
    ],
)
def test_impossible_settings_are_reported_in_one_line(
    command: str, more: list[str], told: str, settings: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, *settings, *QUIET, *(word.format(folder) for word in more)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--precision", "bf16"], "precision 'fp32', now it is 'bf16'"),
        (["--views", "3"], "views 2, now it is 3"),
        (["--data.shots", "2"], "choice of samples of train"),
        (["--seed_everything", "7"], "augmentation_seed 0, now it is 7"),
        (["--data.augmentation.flip", "false"], "flip True, now it is False"),
        (
            ["--data.train.split", "test", "--data.train.source", "wds:tried"],
            "source of train [{'source': 'wds:tiny'}]",
        ),
    ],
)
def test_work_that_was_begun_otherwise_is_refused(
    more: list[str], told: str, folder: Path, tiny_model: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(folder, tiny_model, begun, *more) == 2
    assert f"was started with {told}" in capsys.readouterr().err.splitlines()[-1]
