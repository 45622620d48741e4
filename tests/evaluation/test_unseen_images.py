"""A test on images that the checkpoint was trained on is told from one on new images by the pixels."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quick_trainer, run_test, write_shards

from robustclip.convert.exporting import export
from robustclip.data import CLIPDataModule
from robustclip.evaluation import ResultsWriter, RobustEvaluation
from robustclip.methods import UEO, CleanFineTuning, RobustMethod, ZeroShot
from robustclip.methods._shared.saved_state import TRAINED_ON, with_digest
from robustclip.tools.soup import soup

TRAINED, SEED = 24, 0


def shards(root: Path, name: str, split: str, count: int = TRAINED, seed: int = SEED) -> None:
    write_shards(root, name, split, [count], seed=seed)


def fitted(
    method: type[RobustMethod], model: Path, root: Path, path: Path, *, count: int = TRAINED, **data: Any
) -> Path:
    """Trains for a step on the set ``trained``, and saves a checkpoint."""
    shards(root, "trained", "train", count)
    settings = {"root": str(root), "image_size": 32, "batch_size": 4, "holdout": 0} | data
    trainer = quick_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(method(pretrained=str(model)), CLIPDataModule(train="wds:trained", **settings))
    trainer.save_checkpoint(path)
    return path


def unseen(method: type[RobustMethod], model: Path, root: Path, checkpoint: Path, **evaluation: Any) -> tuple[str, str]:
    """Tests the checkpoint on the set ``tested``, and returns status and measurement of the check."""
    writer = ResultsWriter(str(root / "results"), "run")
    loaded = method.load_from_checkpoint(checkpoint, pretrained=str(model), weights_only=True)
    data = CLIPDataModule(test=["wds:tested"], root=str(root), image_size=32, eval_batch_size=5)
    run_test(loaded, data, RobustEvaluation({}, probes=0, **evaluation), writer)
    result = json.loads((root / "results/run/result.json").read_text())
    (check,) = [check for check in result["audit"]["checks"] if check["name"] == "unseen_images"]
    return check["status"], check["found"]


@pytest.mark.parametrize(("holdout", "probed", "share"), [(0, 24, "86%"), (0.5, 12, "38%")])
def test_a_copy_of_the_training_images_is_told_whatever_its_name(
    holdout: float, probed: int, share: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The test set holds all images; those that were held out are not counted."""
    checkpoint = fitted(CleanFineTuning, tiny_model, tmp_path, tmp_path / "a.ckpt", holdout=holdout)
    shards(tmp_path, "tested", "test")
    status, measurement = unseen(CleanFineTuning, tiny_model, tmp_path, checkpoint)
    matches = f"{probed} of {probed} probed training images are among the test images of tested"
    assert (status, measurement) == ("warn", f"{matches}: it was trained on at least {share} of these")


def test_exported_and_mixed_weights_keep_the_digests(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = fitted(CleanFineTuning, tiny_model, tmp_path, tmp_path / "a.ckpt")
    method = CleanFineTuning.load_from_checkpoint(checkpoint, pretrained=str(tiny_model), weights_only=True)
    export(method, tmp_path / "exported")
    assert ZeroShot(pretrained=str(tmp_path / "exported")).trained_on == method.trained_on
    content = torch.load(checkpoint, weights_only=True)
    other = with_digest(content | {TRAINED_ON: {"total": 5, "digests": ["another", *method.trained_on.digests[:3]]}})
    torch.save(other, tmp_path / "b.ckpt")
    build = partial(CleanFineTuning, pretrained=str(tiny_model))
    (mixed,) = soup(lambda *_: build(), [checkpoint, tmp_path / "b.ckpt"], tmp_path / "soup")
    expected = {"total": TRAINED + 5, "digests": (*method.trained_on.digests, "another")}
    assert torch.load(mixed, weights_only=True)[TRAINED_ON] == expected


@pytest.mark.parametrize("content", [{"total": 5}, {"total": "x", "digests": []}, {"total": 5, "digests": 5}])
def test_a_damaged_record_is_refused(content: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = fitted(CleanFineTuning, tiny_model, tmp_path, tmp_path / "a.ckpt")
    torch.save(with_digest(torch.load(checkpoint, weights_only=True) | {TRAINED_ON: content}), checkpoint)
    with pytest.raises(ValueError, match="trained_on must hold `total` and `digests`"):
        CleanFineTuning.load_from_checkpoint(checkpoint, pretrained=str(tiny_model), weights_only=True)


def test_new_images_are_new(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = fitted(CleanFineTuning, tiny_model, tmp_path, tmp_path / "a.ckpt")
    shards(tmp_path, "tested", "test", seed=SEED + 1)
    status, measurement = unseen(CleanFineTuning, tiny_model, tmp_path, checkpoint)
    assert (status, measurement) == ("pass", "24 probed training images, of which no two are among the test images")


def test_few_of_many_images_are_told_from_chance(tiny_model: Path, tmp_path: Path) -> None:
    """Of 1,000 training images, 128 are probed, and 40 are tested, so that some five of both are the same."""
    shards(tmp_path, "tested", "test", 1000)
    checkpoint = fitted(CleanFineTuning, tiny_model, tmp_path, tmp_path / "a.ckpt", count=1000)
    status, measurement = unseen(CleanFineTuning, tiny_model, tmp_path, checkpoint, max_samples=40)
    assert status == "warn", measurement


def test_a_method_without_labels_may_be_tested_on_its_training_images(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = fitted(UEO, tiny_model, tmp_path, tmp_path / "a.ckpt")
    shards(tmp_path, "tested", "test")
    assert unseen(UEO, tiny_model, tmp_path, checkpoint) == ("pass", "no training images on record")


@pytest.mark.parametrize(("count", "probed"), [(24, 24), (200, 128)])
def test_probes_are_a_fixed_choice_with_the_test_transform(count: int, probed: int, tmp_path: Path) -> None:
    shards(tmp_path, "trained", "train", count)
    shards(tmp_path, "tested", "test", count)
    settings: dict[str, Any] = {"root": str(tmp_path), "image_size": 16, "holdout": 0}
    data = CLIPDataModule(train="wds:trained", test=["wds:tested"], **settings)
    total, digests = data.training_images(128)
    assert (total, digests) == CLIPDataModule(train="wds:trained", **settings).training_images(128)
    assert total == count
    assert len(set(digests)) == probed
    data.setup("test")
    assert set(digests) <= {digest for batch in data.test_dataloader()[0] for digest in batch.digests}
