"""A fit that SIGKILL ends, continued from its last checkpoint, ends where the uninterrupted fit ends, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ShardWriter

SCRIPT = Path(__file__).with_name("resume_cases.py")
TIMEOUT_SECONDS = 200
EPOCH = 5  # steps: 20 samples to train on, in batches of 4
EPOCHS = 3

# name: (training set, loader workers, when checkpoints are written, method, where SIGKILL strikes)
# "train N" is inside the step after the Nth; steps 5 to 9 are the second epoch.
EVERY_3_STEPS = ["--checkpoint.every_n_train_steps", "3"]
EVERY_EPOCH: list[str] = []  # after the validation
AT_THE_LAST_STEP = ["--checkpoint.every_n_train_steps", str(EPOCH)]  # of an epoch, before its validation
RESTLESS, TECOA = "resume_cases.Restless", "TeCoA"
CASES = {
    "map": ("indexed", 0, EVERY_3_STEPS, RESTLESS, ["train 8", "train 14", "validation 10"]),
    "map_workers": ("indexed", 2, EVERY_3_STEPS, RESTLESS, ["train 8"]),
    "map_epochs": ("indexed", 0, EVERY_EPOCH, RESTLESS, ["train 5", "train 12"]),
    "map_last_step": ("indexed", 0, AT_THE_LAST_STEP, RESTLESS, ["validation 10", "train 10"]),
    "stream": ("streamed", 0, EVERY_3_STEPS, RESTLESS, ["train 8"]),
    "stream_workers": ("streamed", 2, EVERY_3_STEPS, RESTLESS, ["train 8"]),
    "stream_epochs": ("streamed", 0, EVERY_EPOCH, RESTLESS, ["train 10"]),
    "tecoa": ("indexed", 0, EVERY_3_STEPS, TECOA, ["outside"]),
}


@pytest.fixture(scope="module")
def ends(
    tiny_model: Path, write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("resume")
    write_shards(folder, "indexed", "train", [13, 12])
    remote = write_shards(folder, "remote", "train", [9, 11])
    write_shards(folder, "val", "test", [5])
    cases = {}
    for name, (kind, workers, when, method, moments) in CASES.items():
        streamed = {"source": f"wds:file://{remote}", "length": 20, "name": "streamed"}
        train = {"indexed": "wds:indexed", "streamed": json.dumps(streamed)}[kind]
        val = {"indexed": [], "streamed": ["--data.val", '["wds:val"]']}[kind]  # without any, a part is held out
        fit = ["fit", "--model", method, "--model.pretrained", str(tiny_model), "--model.warmup_steps", "4"]
        fit += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.01"]
        fit += ["--model.optimizer.momentum", "0.9", "--data.train", train, *val, "--data.root", str(folder)]
        fit += ["--data.image_size", "32", "--data.batch_size", "4", "--data.holdout", "0.2"]
        fit += ["--data.num_workers", str(workers), "--trainer.max_epochs", str(EPOCHS), "--trainer.accelerator", "cpu"]
        fit += ["--trainer.default_root_dir", str(folder / name), "--trainer.logger", "false"]
        fit += ["--trainer.enable_progress_bar", "false", "--evaluation.attacks.pgd2.class_path", "PGD", *when]
        cases[name] = {"fit": fit, "die_at": moments}
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1", "ROBUSTCLIP_TRACEBACK": "1"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    logs = "".join(f"\n{log.name}: {log.read_text()[-1500:]}" for log in sorted(folder.glob("*.log")))
    assert run.returncode == 0, run.stderr[-3000:] + logs
    result: dict[str, dict[str, Any]] = json.loads((folder / "ends.json").read_text())
    return result


@pytest.mark.parametrize(("name", "moment"), [(name, moment) for name, case in CASES.items() for moment in case[-1]])
def test_a_killed_and_resumed_fit_ends_as_the_uninterrupted_one(
    ends: dict[str, dict[str, Any]], name: str, moment: str
) -> None:
    assert ends[f"{name} whole"]["step"] == EPOCH * EPOCHS
    assert ends[f"{name} {moment}"] == ends[f"{name} whole"]
