"""Run by test_sharded_tests.py: random schedules of shards, kills and numbers of processes, each joined to one result.

usage: python shard_cases.py FOLDER, which holds `schedules.json` and the data; leaves one folder per schedule there.

Every process is forked after the slow imports.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import interruption_cases
import torch
from helpers import run_test
from interruption_cases import KEPT, SEED, STEPS, TASKS, Counted, run_case

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule, DataSource
from robustclip.evaluation import FeatureGeometry, OODDetection, ResultsWriter, RobustEvaluation
from robustclip.methods import TeCoA
from robustclip.tools.merge import merge


def test_part(root: str, location: str, workers: int, shard: int, shards: int) -> int:
    """Tests a shard with detection and geometry, one image per batch, so that no number depends on the processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    callbacks = [
        OODDetection(scores=["mcm", "energy"], attack=PGD("8/255", "4/255", 2)),
        FeatureGeometry(max_samples=6),
        RobustEvaluation({"pgd": Counted("12/255", "6/255", STEPS)}, save_examples=KEPT),
        ResultsWriter("results", name="part", shard=shard, shards=shards),
    ]
    data = CLIPDataModule(
        test=[DataSource(f"wds:{location}{name}", name=name) for name in TASKS],
        unknown=[DataSource(f"wds:{location}second", name="others")],
        root=root,
        image_size=32,
        batch_size=1,
        num_workers=workers,
        bad_samples="skip",
    )
    method = TeCoA(pretrained=f"{root}/model")
    with torch.no_grad():  # else geometry compares the pre-trained model with itself
        method.clip.net.visual.proj += 0.2 * torch.randn(
            method.clip.net.visual.proj.shape, generator=SEED.manual_seed(0)
        )
    run_test(method, data, *callbacks, processes=processes)
    return 0


def run_schedule(schedule: dict[str, Any], folder: Path, seconds: dict[int, float]) -> int:
    """Tests all shards of a schedule, each killed and started again as it says, and joins them.

    Args:
        schedule: arguments of `test_part`, and a list of kills and a number of processes for every shard.
        folder: of the schedule.
        seconds: by number of processes, that a test takes from its first ledger write to its end.

    Returns:
        Number of kills that struck.
    """
    folder.mkdir()
    struck, count = 0, len(schedule["parts"])
    for number, part in enumerate(schedule["parts"]):
        case = part | {"test_all": schedule["options"] | {"shard": number, "shards": count}}
        kills, took = run_case(case, folder / str(number), seconds)
        struck += kills
        if not part["kills"] and count == 1:
            seconds.setdefault(part["processes"], took)
    if count > 1:
        parts = [folder / str(number) / "results" / f"part-shard-{number}-of-{count}" for number in range(count)]
        (folder / "joined" / "results").mkdir(parents=True)
        merge(parts, folder / "joined" / "results" / "part")
    return struck


def main(folder: Path) -> None:
    schedules = json.loads((folder / "schedules.json").read_text())
    interruption_cases.test_all = test_part  # what `start` calls after its fork
    (folder / "warm_up").mkdir()
    os.chdir(folder / "warm_up")
    test_part(**schedules["whole"]["options"], shard=0, shards=1)  # imports what is imported late, once for all forks
    seconds: dict[int, float] = {}
    struck = {name: run_schedule(schedule, folder / name, seconds) for name, schedule in schedules.items()}
    (folder / "struck.json").write_text(json.dumps(struck))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]).resolve())
