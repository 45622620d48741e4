"""Metrics and scores of detection against pytorch-ood's, which benchmarks/detection_metrics.py has recorded."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.metrics import auc, precision_recall_curve

from robustclip.metrics import separation
from robustclip.objectives.scores import SCORES

RECORD = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "detection_metrics.json").read_text())


@pytest.mark.parametrize("score", ["mcm", "msp", "energy"])
def test_metrics_are_those_of_pytorch_ood(score: str) -> None:
    record = RECORD["scores"][score]
    known, unknown = (torch.tensor(record[side], dtype=torch.float64) for side in ("known", "unknown"))
    assert len(known) == len(unknown) == 100
    ours, theirs = separation(known, unknown), record["pytorch_ood"]
    for name in ("auroc", "fpr95", "fpr95_out", "autc"):
        assert float(ours[name]) == pytest.approx(theirs[name], abs=1e-6), name
    assert abs(theirs["fpr95"] - theirs["fpr95_out"]) > 0.1, "the directions would not be told apart"
    truth, scores = torch.tensor([1] * 100 + [0] * 100), torch.cat([known, unknown])
    for name, labels, values in (("aupr", truth, scores), ("aupr_out", 1 - truth, -scores)):
        # Ours is the average precision; theirs joins the points of the curve by straight lines.
        precision, recall, _ = precision_recall_curve(labels, values)
        assert auc(recall, precision) == pytest.approx(theirs[name], abs=1e-6)
        assert float(ours[name]) == pytest.approx(theirs[name], abs=2e-3)


@pytest.mark.parametrize("name", ["msp", "max_logit", "energy", "entropy", "gen"])
def test_scores_are_those_of_pytorch_ood(name: str) -> None:
    record = RECORD["of_logits"]
    logits = torch.tensor(record["logits"], dtype=torch.float64)
    outliers = torch.tensor(record[name], dtype=torch.float64) * (logits.shape[1] if name == "gen" else 1)
    torch.testing.assert_close(SCORES[name].value(logits, torch.tensor(1.0)), -outliers, rtol=1e-9, atol=1e-9)
