"""The geometry of features against formulas, scipy and torchmetrics, and what the callback makes of a test."""

import tarfile
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import ShardWriter, add_member, picture, quick_trainer, run_test
from lightning.pytorch import Callback
from numpy.random import default_rng
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional.retrieval import retrieval_hit_rate

from robustclip.cli.main import run
from robustclip.data import CLIPDataModule
from robustclip.evaluation import FeatureGeometry, ResultsWriter, RobustEvaluation
from robustclip.methods import TeCoA, ZeroShot
from robustclip.metrics import class_scatter, class_sums, recalls, similarity
from robustclip.results.run import Run
from robustclip.types import Batch


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def scatter_by_hand(features: Tensor, labels: Tensor) -> float:
    """``tr(S_within) / tr(S_between)`` from both matrices, summed sample by sample."""
    wide, d = features.double(), features.shape[1]
    mean = wide.mean(0)
    within, between = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for feature, label in zip(wide, labels, strict=True):
        own = wide[labels == label].mean(0)
        within += torch.outer(feature - own, feature - own)
        between += torch.outer(own - mean, own - mean)
    return float(within.trace() / between.trace())


def test_class_scatter_is_the_ratio_of_traces_however_samples_are_batched() -> None:
    features, labels = unit(30, 6), torch.arange(30) % 4 * 2  # classes 1, 3, 5, 7 have no sample
    parts = [
        class_sums(features[part], labels[part], classes=8) for part in (slice(0, 11), slice(11, 12), slice(12, 30))
    ]
    assert float(class_scatter(torch.stack(parts).sum(0))) == pytest.approx(scatter_by_hand(features, labels), rel=1e-6)


def test_classes_that_are_points_are_collapsed_and_one_class_has_no_ratio() -> None:
    labels = torch.arange(12) % 3
    assert float(class_scatter(class_sums(unit(3, 5)[labels], labels, classes=3))) == pytest.approx(0, abs=1e-12)
    assert not class_scatter(class_sums(unit(9, 5), torch.zeros(9, dtype=torch.long), classes=2)).isfinite()


def test_similarity_is_scipys_correlation_of_the_pairs() -> None:
    tuned = unit(20, 4)
    original = normalize(tuned + 0.5 * unit(20, 4, seed=1), dim=-1)
    pairs = [(i, j) for i in range(20) for j in range(i)]
    ours, theirs = ([float(each[i] @ each[j]) for i, j in pairs] for each in (tuned, original))
    found = similarity(tuned, original)
    assert float(found["pearson"]) == pytest.approx(scipy.stats.pearsonr(ours, theirs).statistic, abs=1e-5)
    assert float(found["spearman"]) == pytest.approx(scipy.stats.spearmanr(ours, theirs)[0], abs=1e-5)
    assert similarity(tuned[:2], original[:2])["pearson"].isnan()


@pytest.mark.parametrize("captions", [[2] * 30, [1, 3] * 15], ids=["even", "uneven"])
def test_recalls_are_torchmetrics_hit_rates(captions: list[int]) -> None:
    owner = torch.arange(30).repeat_interleave(torch.tensor(captions))
    cosines = unit(30, 4) @ normalize(unit(30, 4)[owner] + unit(len(owner), 4, seed=1), dim=-1).T
    found = recalls(cosines, owner)
    for k in (1, 5, 10):
        by_image = [retrieval_hit_rate(row, owner == image, top_k=k) for image, row in enumerate(cosines)]
        by_text = [
            retrieval_hit_rate(row, torch.arange(30) == image, top_k=k)
            for image, row in zip(owner, cosines.T, strict=True)
        ]
        assert float(found[f"image_to_text_r{k}"]) == pytest.approx(float(torch.stack(by_image).mean()))
        assert float(found[f"text_to_image_r{k}"]) == pytest.approx(float(torch.stack(by_text).mean()))
    assert 0 < found["image_to_text_r1"] < found["image_to_text_r10"] < 1


def test_ties_and_nan_count_against_the_model() -> None:
    owner = torch.tensor([0, 0, 1, 2])
    cosines = torch.tensor([[0.5, 0.1, 0.5, 0.2], [0.4, 0.3, 0.6, 0.1], [0.2, 0.2, 0.2, 0.2]])
    found = {name: float(value) for name, value in recalls(cosines, owner).items()}
    # Image 0 ties with the text of image 1, and image 2 with all; of the texts, 1 and 3 are behind image 1 and tied.
    assert found["image_to_text_r1"] == pytest.approx(1 / 3)
    assert found["image_to_text_r5"] == 1
    assert found["text_to_image_r1"] == pytest.approx(2 / 4)
    everything = recalls(torch.ones(12, 12), torch.arange(12))
    assert {name: float(value) for name, value in everything.items()} == dict.fromkeys(everything, 0)
    broken = recalls(torch.full((12, 12), torch.nan), torch.arange(12))
    assert {name: float(value) for name, value in broken.items()} == dict.fromkeys(broken, 0)


def write_captioned(folder: Path, captions: list[str]) -> None:
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    random = default_rng(0)
    with tarfile.open(folder / "test" / "0.tar", "w") as archive:
        for number, text in enumerate(captions):
            add_member(archive, f"s{number}.png", picture(random, number, kind="png", mode="RGB", size=40))
            add_member(archive, f"s{number}.txt", text.encode())


def measured(method: Any, data: CLIPDataModule, **options: Any) -> dict[str, float]:
    trainer = run_test(method, data, RobustEvaluation(), FeatureGeometry(**options))
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "/geometry/" in name}


@pytest.fixture
def data(tmp_path: Path, write_shards: ShardWriter) -> CLIPDataModule:
    write_shards(tmp_path, "tints", "test", [7, 5])
    write_captioned(tmp_path / "Pairs", ["a red circle\na circle", "a green star", "a blue square\nblue", "a dot"])
    return CLIPDataModule(
        test=["wds:tints"], root=str(tmp_path), image_size=32, batch_size=5, captioned="Pairs", num_workers=0
    )


def moved(model: Path) -> TeCoA:
    torch.manual_seed(0)
    method = TeCoA(pretrained=str(model))
    with torch.no_grad():
        for parameter in method.clip.net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return method


def test_a_test_measures_tuned_against_pretrained_features(data: CLIPDataModule, tiny_model: Path) -> None:
    method = moved(tiny_model)
    found = measured(method, data)
    (loader,) = data.test_dataloader()
    images, labels = (torch.cat([getattr(batch, of) for batch in loader]) for of in ("images", "labels"))
    original = ZeroShot(pretrained=str(tiny_model))
    with torch.no_grad():
        features, first = method.eval().image_features(images), original.eval().image_features(images)
        pairs = list(data.captioned_images())
        seen = method.image_features(torch.cat([batch for batch, _ in pairs]))
        texts = [[*lines] for _, batch in pairs for lines in batch]
        told = method.clip.encode_text([line for lines in texts for line in lines])
    assert texts == [["a red circle", "a circle"], ["a green star"], ["a blue square", "blue"], ["a dot"]]
    assert found["test/tints/geometry/collapse"] == pytest.approx(scatter_by_hand(features, labels), rel=1e-4)
    above = torch.ones(12, 12).triu(1).bool()
    ours, theirs = ((each @ each.T)[above] for each in (features, first))
    assert found["test/tints/geometry/pearson"] == pytest.approx(scipy.stats.pearsonr(ours, theirs).statistic, abs=1e-4)
    owner = torch.tensor([0, 0, 1, 2, 2, 3])
    is_own = owner[(seen @ told.T).argmax(1)] == torch.arange(4)
    assert found["test/pairs/geometry/image_to_text_r1"] == pytest.approx(float(is_own.float().mean()))
    assert found["test/pairs/geometry/text_to_image_r5"] == 1  # of four images
    assert len(found) == 3 + 6


def test_the_pretrained_model_is_like_itself_also_where_few_samples_are_compared(
    data: CLIPDataModule, tiny_model: Path
) -> None:
    found = measured(ZeroShot(pretrained=str(tiny_model)), data, max_samples=4)
    assert found["test/tints/geometry/pearson"] == pytest.approx(1, abs=1e-6)
    few, all_of_them = (measured(moved(tiny_model), data, max_samples=n) for n in (4, 12))
    assert few["test/tints/geometry/pearson"] != all_of_them["test/tints/geometry/pearson"]
    assert few["test/tints/geometry/collapse"] == all_of_them["test/tints/geometry/collapse"]
    data.batch_size = data.eval_batch_size = 1
    again = measured(moved(tiny_model), data, max_samples=4)
    assert again == pytest.approx(few, rel=1e-4)  # the choice does not depend on the batches


def test_validations_of_a_fit_measure_it_too(tiny_model: Path) -> None:
    module = CLIPDataModule(train="shapes:source", val=["shapes:colours"], image_size=32, batch_size=16)
    callbacks = [RobustEvaluation(max_samples=20), FeatureGeometry()]
    trainer = quick_trainer(*callbacks, max_epochs=1, limit_train_batches=1)
    trainer.fit(TeCoA(pretrained=str(tiny_model), warmup_steps=0), datamodule=module)
    assert trainer.callback_metrics["val/colours/geometry/pearson"] > 0.9


class PowerCut(Exception):  # noqa: N818  # not ours to catch
    """Ends a test."""


class Cut(Callback):
    """Ends the test before one of its batches."""

    def __init__(self, batch: int | None) -> None:
        self.batch = batch

    def on_test_batch_start(self, trainer: Any, module: Any, batch: Batch, number: int, task: int = 0) -> None:
        if number == self.batch:
            raise PowerCut


def stored(folder: Path, method: TeCoA, data: CLIPDataModule, cut: int | None = None) -> Path:
    """Tests with geometry into a folder; returns the folder of the run."""
    callbacks = [
        Cut(cut),
        FeatureGeometry(max_samples=4),
        RobustEvaluation(probes=0),
        ResultsWriter(str(folder), name="run"),
    ]
    run_test(method, data, *callbacks)
    return folder / "run"


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_resumed_test_has_the_geometry_of_an_uninterrupted_one(
    data: CLIPDataModule, tiny_model: Path, tmp_path: Path, cut: int
) -> None:
    whole = stored(tmp_path / "whole", moved(tiny_model), data)
    with pytest.raises(PowerCut):
        stored(tmp_path / "cut", moved(tiny_model), data, cut)
    method, encoded = moved(tiny_model), []
    image_features = method.image_features
    method.image_features = lambda images: encoded.append(len(images)) or image_features(images)  # type: ignore
    resumed = stored(tmp_path / "cut", method, data)
    # Batches of 5 of 12 images, for the accuracy and for the geometry, and four captioned images.
    assert sum(encoded) == 2 * (12 - 5 * cut) + 4
    assert Run.open(resumed).result["geometry"] == Run.open(whole).result["geometry"]
    name = "ledger/unit-features@tints.csv"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_score_computes_the_geometry_from_the_stored_features(
    data: CLIPDataModule, tiny_model: Path, tmp_path: Path
) -> None:
    folder = stored(tmp_path, moved(tiny_model), data)
    before, ledger = Run.open(folder).result["geometry"], folder / "ledger" / "unit-features@tints.csv"
    header, *lines = ledger.read_text().splitlines()
    rows = [line.split(",") for line in lines if line]
    assert sum(row[-1] != "" for row in rows) == 4, "the original features of the compared samples alone"
    few = [row for row in rows if int(row[0]) < 7]
    ledger.write_text("\n".join([header, *map(",".join, few)]) + "\n")
    assert run(["score", str(folder)]) == 0
    after = Run.open(folder).result["geometry"]
    features = torch.tensor(np.array([np.frombuffer(b64decode(row[3]), "<f4") for row in few]))
    labels = torch.tensor([int(row[1]) for row in few])
    assert after["tints"]["collapse"] == pytest.approx(scatter_by_hand(features, labels), rel=1e-4)
    assert after["tints"]["collapse"] != before["tints"]["collapse"]
    assert after["pairs"] == before["pairs"]


def test_sets_that_cannot_be_compared_are_refused(data: CLIPDataModule, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"max_samples must be .*at least 3, got 2"):
        FeatureGeometry(max_samples=2)
    data.captioned = "tints"
    with pytest.raises(ValueError, match=r"needs an image .* and a \.txt caption"):
        measured(ZeroShot(pretrained=str(tiny_model)), data)
