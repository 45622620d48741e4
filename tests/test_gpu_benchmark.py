"""`benchmarks/gpu.py` in miniature, on the CPU: all of its parts run, and what it counts is what was computed."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", "--miniature"])
    import gpu

    gpu.main(["--miniature", "--out", str(tmp_path / "gpu.json")])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["equality"] == {"samples": 24, "device": 0, "bfloat16 first": 0}
    rows = report["two-layer-clip"]
    assert list(rows) == ["TeCoA", "PMG-AFT", "TeCoA's loop", "RobustVLM's loop", "PGD-10"]
    assert all(row["images_per_second"] > 0 for row in rows.values())
    # PGD-2 takes two forward passes with input gradients (2 each) and one training pass (3): 7 passes; a test under
    # PGD-10 takes 10 attack steps (2 each), the clean pass and the verdict: 22.
    passes = rows["PGD-10"]["operations_per_image"] / 22
    assert rows["TeCoA"]["operations_per_image"] / passes == pytest.approx(7, rel=0.05)
    assert rows["PMG-AFT"]["operations_per_image"] / passes == pytest.approx(11, rel=0.05)
