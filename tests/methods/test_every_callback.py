"""Every exported callback runs on every method, in a fit and in a test of its checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ShardWriter, quick_trainer
from lightning.pytorch import Callback
from test_all import CASES

from robustclip import evaluation, methods, training
from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule, DataSource
from robustclip.methods import RobustMethod, ZeroShot
from robustclip.results.run import Run

SETS = ("wds:one", "wds:two")  # two domains of the same classes
ATTACK = PGD(steps=1)
IN_FIT: dict[str, Callable[[Path], Callback]] = {
    "RobustEvaluation": lambda _: evaluation.RobustEvaluation({"pgd": ATTACK}),
    "FeatureGeometry": lambda _: evaluation.FeatureGeometry(max_samples=3),
    "HessianDifference": lambda _: evaluation.HessianDifference(max_samples=2, iterations=1),
    "ChanceLevelWarning": lambda _: training.ChanceLevelWarning(),
    "Interruption": lambda _: training.Interruption(),
    "ConnectedProcesses": lambda _: training.ConnectedProcesses(),
    "Checkpoints": lambda folder: training.Checkpoints(folder, save_last=True),
}
IN_TEST: dict[str, Callable[[Path], Callback]] = {
    "RobustEvaluation": IN_FIT["RobustEvaluation"],
    "FeatureGeometry": IN_FIT["FeatureGeometry"],
    "OODDetection": lambda _: evaluation.OODDetection(attack=ATTACK),
    "ResultsWriter": lambda folder: evaluation.ResultsWriter(str(folder), name="run"),
    "TaskProgress": lambda _: evaluation.TaskProgress(),
    "ProgressLines": lambda _: evaluation.ProgressLines(),
}
FAST = (methods.TeCoA,)  # the others are slow
SLOW = pytest.mark.slow


def cases() -> list[Any]:
    """Every case of test_all.py; only the first of a few classes is fast."""
    found, seen = [], set()
    for cls, options in CASES:
        is_fast = cls in FAST and cls not in seen
        seen.add(cls)
        name = "-".join([cls.__name__, *map(str, options.values())])
        found.append(pytest.param(cls, options, id=name, marks=() if is_fast else SLOW))
    return found


@pytest.fixture(scope="module")
def root(write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("callbacks")
    for seed, name in enumerate(("one", "two")):
        for split in ("train", "test"):
            write_shards(folder, name, split, [6], seed=seed)
    write_shards(folder, "open", "test", [6], ("red", "green", "blue", "black"))
    return folder


def data(root: Path) -> CLIPDataModule:
    known = DataSource("wds:open", classes="0-2")
    return CLIPDataModule(
        train="wds:one", val=SETS, test=[*SETS, known], unknown=[known], root=str(root), image_size=32, batch_size=4
    )


def test_this_file_knows_every_exported_callback() -> None:
    assert IN_FIT.keys() | IN_TEST.keys() == {*evaluation.__all__, *training.__all__}


@pytest.mark.parametrize(("cls", "options"), cases())
@pytest.mark.filterwarnings("ignore")  # a model of random weights is at chance
def test_callbacks_run_on_a_method_that_learns(
    cls: type[RobustMethod], options: dict[str, Any], tiny_model: Path, root: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    callbacks = [make(tmp_path) for make in IN_FIT.values()]
    fit = quick_trainer(*callbacks, max_epochs=1, enable_checkpointing=True)
    fit.fit(cls(pretrained=str(tiny_model), **options), datamodule=data(root))
    names = fit.callback_metrics.keys()
    for part in ("one/pgd/acc1", "one/geometry/collapse", "one_two/hessian/difference"):
        assert f"val/{part}" in names
    check_test(cls(pretrained=str(tiny_model), **options), root, tmp_path, ckpt_path=str(tmp_path / "last.ckpt"))


def test_callbacks_run_on_a_method_that_learns_nothing(tiny_model: Path, root: Path, tmp_path: Path) -> None:
    check_test(ZeroShot(pretrained=str(tiny_model)), root, tmp_path)


def check_test(method: RobustMethod, root: Path, folder: Path, **options: Any) -> None:
    callbacks = [make(folder) for make in IN_TEST.values()]
    trainer = quick_trainer(*callbacks, enable_progress_bar=True)
    trainer.test(method, datamodule=data(root), verbose=False, weights_only=True, **options)
    result = Run.open(folder / "run").result
    assert result["method"] == type(method).__name__
    assert result["tasks"].keys() == {"one", "two", "open"}
    assert result["tasks"]["one"].keys() >= {"clean", "pgd"}
    assert result["detection"]["tasks"]["one"]["unknown"]["open_unknown"]["scores"]["mcm"]["attacked"]["auroc"] >= 0
