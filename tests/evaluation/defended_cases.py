"""Run by test_defended_processes.py: tests a random defence on two processes, in one go and with a kill in the middle.

usage: python defended_cases.py FOLDER; leaves FOLDER/two and FOLDER/killed, and the same without the defence under
names that begin with ``plain_``.
"""

import os
import sys
from pathlib import Path
from typing import Any

import helpers
import torch
from ranks import on_all

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule
from robustclip.defences import GaussianNoise
from robustclip.evaluation import ResultsWriter, RobustEvaluation
from robustclip.evaluation.ways import Ways
from robustclip.methods import ZeroShot

SAMPLES, KILLED = 14, 9


class Killed(RobustEvaluation):
    """Ends the process after its first batch."""

    def see(self, *args: Any) -> None:
        super().see(*args)
        os._exit(KILLED)


def run(
    folder: Path,
    name: str,
    *,
    processes: int = 1,
    size: int = 4,
    kind: type = RobustEvaluation,
    is_defended: bool = True,
) -> None:
    """Tests the defence by an attack on any wrong class and by one with a target class.

    Args:
        folder: folder of the result.
        name: name of the result.
        processes: number of processes.
        size: size of a batch.
        kind: class of the evaluation.
        is_defended: whether the method has its defence.
    """
    attacks = {"pgd": PGD("5/255", "1.25/255", 5), "to_pink": PGD("8/255", "2/255", 5, target="pink")}
    evaluation = kind(attacks, max_samples=SAMPLES, probes=12, ways=Ways(draws=2, judges=3, queries=20))
    data = CLIPDataModule(test=["shapes:colours"], image_size=32, eval_batch_size=size)
    method = ZeroShot(defence=GaussianNoise(0.1, 1) if is_defended else None)
    helpers.run_test(method, data, evaluation, ResultsWriter(str(folder), name), processes=processes)


def forked(*args: Any, **options: Any) -> int:
    """Runs a test on two processes that share the imports made so far; returns the first status that is not 0."""
    child = os.fork()
    if not child:
        on_all(lambda: run(*args, **options, processes=2))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    for prefix, is_defended in (("", True), ("plain_", False)):
        assert forked(place, f"{prefix}two", is_defended=is_defended) == 0
        assert forked(place, f"{prefix}killed", kind=Killed, is_defended=is_defended) == KILLED
        assert forked(place, f"{prefix}killed", size=3, is_defended=is_defended) == 0
