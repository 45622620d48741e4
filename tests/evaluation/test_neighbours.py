"""The KNN score: against scikit-learn, of the images that a fit learns from, as the evaluated method sees them."""

from pathlib import Path
from typing import Any

import detection_cases as cases
import pytest
import torch
from helpers import ShardWriter, run_test
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks import PGD
from robustclip.cli.lightning import main
from robustclip.cli.main import run
from robustclip.data import DataSource
from robustclip.data.transforms import Augmentation
from robustclip.evaluation import OODDetection, ResultsWriter, RobustEvaluation, nearest_neighbours
from robustclip.evaluation.nearest_neighbours import Neighbours
from robustclip.methods import CRoFT
from robustclip.results.protocol import digest
from robustclip.results.run import Run

# Products of unit vectors of a few numbers in fp32: some units of 2^-24 each.
SINGLE = {"rtol": 0, "atol": 1e-6}
PAIR: dict[str, Any] = {"test": ["mixed"], "unknown": ["mixed"]}
RATIO = 0.5


def neighbours(bank: Tensor, curve: list[int]) -> Neighbours:
    score = Neighbours(curve)
    score.take(bank)
    return score


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def minus_squared_distances(bank: Tensor, features: Tensor) -> Tensor:
    """To all of the bank, the nearest first, by scikit-learn."""
    search = NearestNeighbors(n_neighbors=len(bank), algorithm="brute").fit(bank.double().numpy())
    return -torch.from_numpy(search.kneighbors(features.double().numpy())[0]).square()


def test_the_score_is_minus_the_squared_distance_to_the_kth_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, features, ks = unit(330, 8), unit(20, 8, seed=1), [1, 5, 330]
    expected, found = minus_squared_distances(bank, features), neighbours(bank, ks)
    torch.testing.assert_close(found.scores(features, ks), expected[:, [0, 4, 329]], **SINGLE)
    columns = found.columns(features, torch.tensor(100.0))
    torch.testing.assert_close(columns["knn"], expected[:, 2], **SINGLE)  # 1 % of 330 are 3
    torch.testing.assert_close(columns["knn/5"], expected[:, 4], **SINGLE)
    assert list(columns) == ["knn", "knn/1", "knn/5", "knn/330"]
    monkeypatch.setattr(nearest_neighbours, "PRODUCT", 3 * 330)  # three samples at once
    torch.testing.assert_close(found.scores(features, ks), expected[:, [0, 4, 329]], **SINGLE)


@pytest.mark.parametrize(("size", "k", "curve"), [(1, 1, [1]), (99, 1, [1, 99]), (250, 2, [1, 99, 100])])
def test_k_is_a_hundredth_of_the_bank_and_never_beyond_it(size: int, k: int, curve: list[int]) -> None:
    found = neighbours(unit(size, 4), [1, 99, 100, 500])
    assert (found.k, found.variants) == (k, [str(each) for each in curve])


def test_images_near_the_bank_score_higher_and_more_neighbours_never_raise_a_score() -> None:
    centre = unit(1, 16)
    near = [F.normalize(centre + 0.1 * unit(count, 16, seed=count), dim=-1) for count in (300, 40)]
    scores = neighbours(near[0], []).scores(torch.cat([near[1], unit(40, 16, seed=5)]), [1, 2, 3, 10, 300])
    assert (scores[:40].amin(0) > scores[40:].amax(0)).all()
    assert (scores.diff(dim=1) <= 0).all()


@pytest.fixture(scope="module")
def folder(write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.write_all(tmp_path_factory.mktemp("neighbours"), write_shards)


def method(folder: Path) -> CRoFT:
    """With adapters that are no identity."""
    found = CRoFT(pretrained=str(folder / "model"), ratio=RATIO)
    with torch.no_grad():
        found.image_adapter += 0.5 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    return found


def detect(folder: Path, out: Path | None = None, *, sets: dict[str, Any] = cases.TRAIN, **options: Any) -> Any:
    options = {"scores": ["mcm", Neighbours((1, 4, 8, 9))], "headline": "knn"} | options
    callbacks = [OODDetection(**options), RobustEvaluation()]
    writer = ResultsWriter(str(out), name="run") if out else None
    augmentation = Augmentation((0.2, 0.5), flip=True)
    data = cases.data(folder, **PAIR, augmentation=augmentation, **sets)
    trainer = run_test(method(folder), data, *callbacks, *([writer] if writer else []))
    return Run.open(out / "run").result["detection"] if out else trainer


def seen(loader: Any, method: CRoFT) -> tuple[list[int], Tensor, Tensor]:
    """Ids, labels, and features behind the adapter, written out, of decoded images."""
    batches = list(loader)
    images, labels, index = (torch.cat([batch[part] for batch in batches]) for part in range(3))
    with torch.no_grad():
        raw = F.normalize(method.clip.net.encode_image((images - 0.5) / 0.25), dim=-1)
        features = F.normalize(RATIO * raw @ method.image_adapter.T + (1 - RATIO) * raw, dim=-1)
    return index.tolist(), labels, features


def test_the_bank_is_the_training_images_of_known_classes_under_the_test_transform(
    folder: Path, tmp_path: Path
) -> None:
    found, model = detect(folder, tmp_path), method(folder)
    fit, test = (cases.data(folder, **PAIR, **cases.TRAIN) for _ in range(2))
    fit.setup("fit")
    test.setup("test")
    index, labels, bank = seen(fit.plain_train_dataloader(), model)
    assert len(bank) == 11
    samples = [number for number, label in zip(index, labels.tolist(), strict=True) if label >= 0]
    origin = {"class": "Neighbours", "curve": [1, 4, 8, 9], "k": 1, "bank": 8, "set": "mixed"}
    assert found["scores"]["knn"] == {**origin, "samples": digest(samples)}
    sides = [seen(loader, model)[2] for loader in (*test.test_dataloader(), *test.unknown_dataloaders().values())]
    scores = [minus_squared_distances(bank[labels >= 0], features) for features in sides]
    pair = found["tasks"]["mixed"]["unknown"]["mixed_unknown"]
    nearest = torch.cat([side[:, 0] for side in scores])
    assert pair["scores"]["knn"]["histogram"]["range"] == pytest.approx(
        [float(nearest.min()), float(nearest.max())], abs=SINGLE["atol"]
    )
    curve, truth = pair["variants"]["knn"], [1] * 9 + [0] * 6
    assert curve["names"] == ["1", "4", "8"]
    for place, k in enumerate([1, 4, 8]):
        known, unknown = (side[:, k - 1] for side in scores)
        expected = roc_auc_score(truth, torch.cat([known, unknown]))
        assert curve["auroc"][place] == pytest.approx(expected, abs=1e-6), k
        assert curve["fpr95"][place] == pytest.approx(float((unknown >= known.min()).float().mean()), abs=1e-6)
    assert len({*curve["auroc"]}) > 1, "nothing would tell the K apart"
    assert {name: pair["scores"]["knn"][name] for name in ("auroc", "fpr95")} == {
        name: curve[name][0] for name in ("auroc", "fpr95")
    }


@pytest.mark.slow
def test_an_attack_moves_features_away_from_the_bank_or_towards_it(folder: Path, tmp_path: Path) -> None:
    attack = PGD(eps="8/255", alpha="2/255", steps=5, keep="best")
    found = detect(folder, tmp_path, attack=attack)["tasks"]["mixed"]["unknown"]["mixed_unknown"]["scores"]["knn"]
    assert found["attacked"]["auroc"] < found["auroc"]
    assert found["attacked"]["fpr95"] >= found["fpr95"]
    still = detect(folder, tmp_path / "still", attack=PGD(eps=0, alpha=0, steps=1))["tasks"]["mixed"]["unknown"]
    counts = still["mixed_unknown"]["scores"]["knn"]["histogram"]
    assert counts["attacked"] == counts["clean"], "what is attacked is not what is reported"


@pytest.mark.slow
def test_cached_features_give_the_scores_of_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "wds:mixed, known: 3"
    options = [
        "--model", "CRoFT", "--model.pretrained", str(folder / "model"), "--data.root", str(folder),
        "--data.train", f"{{source: {name}, shift: closed}}", "--data.holdout", "0.25", "--data.image_size", "32",
        "--data.test", f"[{{source: {name}, shift: closed}}]", "--data.unknown", "[{source: wds:mixed, classes: 0-2}]",
        "--data.features", str(tmp_path / "cache"), "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1",
    ]  # fmt: skip
    score = "{class_path: Neighbours, init_args: {curve: [1, 4]}}"
    detection = f"{{class_path: OODDetection, init_args: {{scores: [{score}], headline: knn}}}}"
    assert run(["cache", *options, "--device", "cpu", "--with_test", "true"]) == 0
    results = []
    for has_features in ("false", "true"):
        main(
            ["test", *options, "--trainer.callbacks", f"[{detection}]", "--data.features_in_test", has_features,
             "--trainer.logger", "false", "--results.folder", str(tmp_path), "--results.name", has_features]
        )  # fmt: skip
        results.append(Run.open(tmp_path / has_features).result["detection"])
    images, features = results
    assert images["scores"] == features["scores"]
    assert images["scores"]["knn"]["bank"] == 8
    ours, theirs = (each["tasks"]["mixed"]["unknown"]["mixed_unknown"] for each in results)
    # The order of one of 9 x 6 pairs may change, where two scores are nearly the same.
    assert theirs["variants"]["knn"]["auroc"] == pytest.approx(ours["variants"]["knn"]["auroc"], abs=1.01 / 54)
    ends = [each["scores"]["knn"]["histogram"]["range"] for each in (ours, theirs)]
    for one, other in zip(*ends, strict=True):
        # fp16 moves a unit vector by at most 2^-11, a distance d of two by 2^-10, and its square by 2 d 2^-10.
        assert one != other
        assert other == pytest.approx(one, abs=2 * abs(one) ** 0.5 * 2**-10 + 2**-20)


def test_other_classes_than_the_banks_are_reported(folder: Path) -> None:
    sets = {"train": DataSource("wds:mixed"), "holdout": 0.25}
    words = "'knn' compares with images of data.train, 'mixed', whose classes are not those of mixed"
    with pytest.warns(UserWarning, match=words):
        detect(folder, sets=sets)


@pytest.mark.parametrize(
    ("options", "sets", "words"),
    [
        (
            {},
            {"train": []},
            "'knn' needs training images, and data.train lists none; set it, or leave it out of scores",
        ),
        ({}, {"train": "wds:file://{}/mixed"}, "training set 'mixed' is remote: a pass in order needs a local copy"),
        (
            {},
            {"train": DataSource("wds:mixed", classes="0-2", images="3-4"), "holdout": 0.0},
            "no image of data.train shows a known class, and 'knn' needs some; leave it out of scores",
        ),
    ],
)
def test_settings_without_a_bank_are_refused(
    folder: Path, options: dict[str, Any], sets: dict[str, Any], words: str
) -> None:
    sets = {key: value.format(folder) if isinstance(value, str) else value for key, value in sets.items()}
    with pytest.raises(ValueError, match=f"^{words}[^\n]*$"):
        detect(folder, sets=sets, **options)


def test_a_curve_over_no_neighbour_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Neighbours: curve must be .*at least 1, got \[5, 0\]"):
        Neighbours([5, 0])


def test_no_training_image_is_read_without_the_score(folder: Path) -> None:
    trainer = detect(folder, sets={"train": []}, scores=["mcm"], headline="mcm")
    assert not [name for name in trainer.callback_metrics if "knn" in name]
