"""An exported folder states how its weights were trained, and the audit takes robust weights for no baseline."""

import json
from pathlib import Path

import helpers
import pytest
import torch

from robustclip.attacks import PGD
from robustclip.convert.exporting import export
from robustclip.data import CLIPDataModule
from robustclip.evaluation import ResultsWriter, RobustEvaluation
from robustclip.methods import CleanFineTuning, RobustMethod, TeCoA, ZeroShot
from robustclip.models.weight_origin import ORIGIN
from robustclip.results.run import Run


def exported(method: RobustMethod, folder: Path) -> Path:
    """Changes the weights a little, as a training does, and exports them."""
    with torch.no_grad():
        next(method.clip.net.parameters()).add_(1e-3)
    export(method, folder)
    return folder


def baseline_of(method: RobustMethod, folder: Path, baseline: Path | None = None) -> tuple[str, str, Path]:
    """Status and measurement of the check `baseline`, with the folder of the test."""
    data = CLIPDataModule(train="shapes:source", test=["shapes:outlines"], batch_size=16)
    attack = RobustEvaluation({"pgd": PGD("5/255", "1.25/255", 5)}, max_samples=16, probes=0)
    writer = ResultsWriter(str(folder), is_undefended=True, baseline=None if baseline is None else str(baseline))
    helpers.run_test(method, data, attack, writer)
    assert writer.path is not None
    checks = Run.open(writer.path).result["audit"]["checks"]
    (check,) = [check for check in checks if check["name"] == "baseline"]
    return check["status"], check["found"], writer.path


def test_export_writes_method_attack_and_base_model(tmp_path: Path) -> None:
    method = TeCoA()
    base = method.clip.fingerprint
    facts = json.loads((exported(method, tmp_path / "tecoa") / ORIGIN).read_text())
    unknown = {"total": 0, "digests": []}  # the method was not trained
    expected = {"method": "TeCoA", "training_attack": repr(method.attack), "base_fingerprint": base}
    assert facts == expected | {"trained_on": unknown}
    assert ZeroShot(pretrained=str(tmp_path / "tecoa")).is_robust is True
    assert ZeroShot(pretrained=str(tmp_path / "tecoa"), is_robust=False).is_robust is False
    assert ZeroShot(pretrained=str(exported(CleanFineTuning(), tmp_path / "clean"))).is_robust is False
    assert ZeroShot().is_robust is None


def test_robust_weights_are_no_baseline_of_themselves(tmp_path: Path) -> None:
    """The baseline of an exported model is a test of the model that its training began with."""
    folder = exported(TeCoA(), tmp_path / "tecoa")
    status, found, _ = baseline_of(ZeroShot(pretrained=str(folder)), tmp_path / "a")
    assert status == "not_measured"
    assert "robust" in found
    assert "results.baseline" in found
    original = baseline_of(ZeroShot(), tmp_path / "b")
    status, found, _ = baseline_of(ZeroShot(pretrained=str(folder)), tmp_path / "c", original[2])
    assert (status, found) == original[:2]
    assert baseline_of(ZeroShot(is_robust=True), tmp_path / "d")[0] == "not_measured"


def test_a_damaged_statement_is_refused(tmp_path: Path) -> None:
    folder = exported(TeCoA(), tmp_path / "tecoa")
    (folder / ORIGIN).write_text('{"method": "TeCoA"}')
    with pytest.raises(ValueError, match=r"robustclip\.json must hold method, training_attack and base_fingerprint"):
        ZeroShot(pretrained=str(folder))
