"""`robustclip claims`: every figure has its source, contradictions stand together, runs are compared with claims."""

import json
import statistics
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from robustclip.cli.main import run
from robustclip.tools.claims import Claim, Measured, comparisons, read

CLAIMS = read("claims.csv", Claim)
RESULTS = Path(__file__).parents[2] / "benchmarks/results"
PHOTOGRAPHS, OVERVIEW, SHAPES = (RESULTS / f"{name}.json" for name in ("photographs", "overview", "all_methods"))
CONTROLS = {"UCAT_constant", "TeCoA_as_AGFT", "AGFT_plain", "PMGAFT_code"}  # variants, which are no methods


def test_every_claim_has_a_source_and_a_protocol() -> None:
    assert len(CLAIMS) > 600
    for claim in CLAIMS:
        assert all(astuple(claim)), claim
        assert 0 <= float(claim.value) <= 100
        assert len(claim.source) < 100, "a reference, not a sentence of the source"


def test_contradicting_sources_stand_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["claims", "PMGAFT"]) == 0
    printed = capsys.readouterr().out
    assert "17.88" in printed
    assert "31.55" in printed
    assert "measured with this package" in printed


def test_a_method_without_claims_has_its_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["claims", "UEO"]) == 0
    printed = capsys.readouterr().out
    assert "no claims of papers about UEO" in printed
    assert "measured with this package" in printed


def test_measured_figures_are_those_of_the_benchmarks() -> None:
    recipe = {row["model"]: row for row in json.loads(OVERVIEW.read_text(encoding="utf-8"))["results"]}
    photographs = {row["method"]: row for row in json.loads(PHOTOGRAPHS.read_text(encoding="utf-8"))["results"]}
    shapes = {row["method"]: row for row in json.loads(SHAPES.read_text(encoding="utf-8"))["results"]}
    for row in read("measured.csv", Measured):
        if row.source == "All methods under one protocol" and row.metric == "cascade":
            values, commits = [recipe[row.method]["robust"]], [recipe[row.method]["commit"]]
        else:
            of = shapes if row.source == "All methods on drawn shapes" else photographs
            values, commits = of[row.method][row.metric], of[row.method]["commits"]
        assert row.value == f"{100 * statistics.mean(values):.1f}"
        assert row.commit.split() == commits


def test_every_method_of_the_benchmarks_is_listed() -> None:
    listed = {(row.source, row.method) for row in read("measured.csv", Measured)}
    for file, section in (
        (PHOTOGRAPHS, "All methods under one protocol"),
        (SHAPES, "All methods on drawn shapes"),
    ):
        methods = {row["method"] for row in json.loads(file.read_text(encoding="utf-8"))["results"]}
        assert {method for source, method in listed if source == section} == methods - CONTROLS


def result(acc1: float, *, arch: str = "ViT-B-32-quickgelu", n: int = 10_000, steps: int = 100) -> dict[str, Any]:
    """Makes the parts of a result that a comparison reads, with an interval of two points around the accuracy."""
    accuracy = {"acc1": acc1, "interval": [acc1 - 0.01, acc1 + 0.01]}
    pgd = {"eps": f"linf {1 / 255}", "steps": {"pgd": {"attack": "PGD", "steps": steps}}, "loss": "ce"}
    return {
        "model": {"arch": arch},
        "tasks": {"cifar10": {"n": n, "clean": accuracy, "pgd100": accuracy}},
        "protocol": {"cifar10": {"clean": {"axes": {}}, "pgd100": {"axes": pgd}}},
    }


TECOA = [claim for claim in CLAIMS if (claim.method, claim.set) == ("TeCoA", "CIFAR10")]
CLAIMED = float(next(claim.value for claim in TECOA if claim.metric == "PGD-100")) / 100


def verdict(made_up: dict[str, Any], metric: str = "PGD-100") -> list[str]:
    return [found.verdict for found in comparisons(TECOA, made_up) if found.claim.metric == metric]


def test_a_claim_within_the_interval_of_a_like_run_is_confirmed() -> None:
    assert verdict(result(CLAIMED + 0.009)) == ["confirmed"]
    assert verdict(result(CLAIMED + 0.011)) == ["not confirmed"]


def test_other_models_and_fewer_images_decide_nothing() -> None:
    assert verdict(result(CLAIMED, arch="RN50"))[0].startswith("not comparable: model RN50")
    assert verdict(result(CLAIMED, n=100)) == ["not comparable: 100 of 10,000 images"]


def test_other_attacks_are_not_compared() -> None:
    assert verdict(result(CLAIMED, steps=10)) == []


def test_unknown_methods_and_runs_without_a_claim_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["claims", "NoSuchMethod"]) == 2
    assert "TeCoA" in capsys.readouterr().err
    assert run(["claims", "--check", "."]) == 2
    assert "method" in capsys.readouterr().err
