"""The examples in the docstrings of public names run, offline and in an empty folder."""

import doctest
from pathlib import Path

import pytest

import robustclip

# Examples that run a whole test or fit.
LONG = ("FeatureGeometry", "HessianDifference", "OODDetection", "ResultsWriter", "UEO", "evaluate", "load")
NAMES = [name for name in robustclip.__all__ if name != "__version__"]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in NAMES])
def test_the_example_of_a_public_name_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "TorchAttack":
        pytest.importorskip("torchattacks")
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestFinder(recurse=False).find(getattr(robustclip, name), name, globs={})
    assert sum(len(example.examples) for example in examples) >= 2
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for example in examples:
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)
