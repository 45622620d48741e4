"""A fit that SIGKILL ends, continued from its last checkpoint, ends where the uninterrupted fit ends, bit for bit."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inputs import ShardWriter

from robustclip.methods import checkpoints
from robustclip.methods.checkpoints import RenamedCheckpointIO, random_state, set_random_state

SCRIPT = Path(__file__).with_name("resume_cases.py")
TIMEOUT_SECONDS = 400
EPOCH = 5  # steps: 20 samples to train on, in batches of 4
EPOCHS = 3

# name: (training set, loader workers, when checkpoints are written, method, where SIGKILL strikes)
# "train N" is inside the step after the Nth; steps 5 to 9 are the second epoch.
EVERY_3_STEPS = ["--checkpoint.every_n_train_steps", "3"]
EVERY_EPOCH: list[str] = []  # after the validation
AT_THE_LAST_STEP = ["--checkpoint.every_n_train_steps", str(EPOCH)]  # of an epoch, before its validation
RESTLESS, TECOA = "resume_cases.Restless", "TeCoA"
CASES = {
    "map": ("indexed", 0, EVERY_3_STEPS, RESTLESS, ["train 8", "validation 10"]),
    "map_workers": ("indexed", 2, EVERY_3_STEPS, RESTLESS, ["train 8"]),
    "map_epochs": ("indexed", 0, EVERY_EPOCH, RESTLESS, ["train 5"]),
    "map_last_step": ("indexed", 0, AT_THE_LAST_STEP, RESTLESS, ["validation 10"]),
    "stream": ("streamed", 0, EVERY_3_STEPS, RESTLESS, ["train 8"]),
    "stream_epochs": ("streamed", 0, EVERY_EPOCH, RESTLESS, ["train 10"]),
    "stream_workers": ("streamed", 2, EVERY_3_STEPS, RESTLESS, ["train 11"]),  # 6 steps, as each worker fills batches
    "tecoa": ("indexed", 0, EVERY_3_STEPS, TECOA, ["outside"]),
}
# Neither checkpoints nor workers that read a map change the weights, so these share one uninterrupted fit.
WHOLE = {"map_workers": "map", "map_epochs": "map", "map_last_step": "map", "stream_epochs": "stream"}


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
        fit += ["--trainer.enable_progress_bar", "false", *when]
        fit += ["--trainer.enable_model_summary", "false"]
        fit += ["--evaluation.attacks", '{"pgd2": {"class_path": "PGD"}}']
        cases[name] = {"fit": fit, "die_at": moments, "whole": name not in WHOLE}
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
    assert ends[f"{name} {moment}"] == ends[f"{WHOLE.get(name, name)} whole"]
    assert ends[f"{name} {moment}"]["step"] >= EPOCH * EPOCHS


def test_a_checkpoint_that_is_not_written_to_its_end_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "last.ckpt"
    RenamedCheckpointIO().save_checkpoint({"step": 1}, place)

    def stop_halfway(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        assert torch.load(place)["step"] == 1  # what a kill at this moment would leave
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", stop_halfway)
    with pytest.raises(OSError, match="no space left"):
        RenamedCheckpointIO().save_checkpoint({"step": 2}, place)
    assert torch.load(place)["step"] == 1
    assert list(tmp_path.iterdir()) == [place]


def test_random_states_survive_a_safe_file(tmp_path: Path) -> None:
    def draws() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.randn())

    place, cpu = tmp_path / "state.pt", torch.device("cpu")
    draws()
    torch.save(random_state(cpu), place)
    expected = draws()
    set_random_state(torch.load(place, weights_only=True), cpu)
    assert draws() == expected
