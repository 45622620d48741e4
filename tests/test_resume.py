"""A fit that signals end again and again ends where the uninterrupted fit ends, bit for bit."""

import itertools
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
from anchor_cases import write_pairs, write_table
from helpers import ShardWriter, picture

from robustclip.methods._shared import saved_state
from robustclip.methods._shared.saved_state import RenamedCheckpointIO, random_state, set_random_state

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("resume_cases.py")
TIMEOUT_SECONDS = 900
EPOCH, EPOCHS = 5, 3  # batches of an epoch: 20 samples to train on, 4 at a time
METHODS = ("TeCoA", "PMGAFT", "ARF", "UEO", "CRoFT")
TRAIN = {"indexed": {"train": "wds:indexed"}, "workers": {"train": "wds:indexed", "num_workers": 2}}

# Saves: after every step, of an epoch's last before its validation; or where batches 2 and 4 are validated.
STEPS: dict[str, Any] = {"saves": {"every_n_train_steps": 1}, "trainer": {}}
CHECKS: dict[str, Any] = {"saves": {}, "trainer": {"val_check_interval": 2}}
ENDS: dict[str, Any] = {"saves": {}, "trainer": {}}
CHAINS: list[tuple[dict[str, Any], tuple[str, str]]] = [  # each is resumed twice
    (STEPS, ("SIGKILL train 0.3", "SIGTERM train 1.2")),
    (STEPS, ("SIGKILL validation 0.5", "SIGKILL validation 1.5")),
    (STEPS, ("SIGTERM train 0.4", "SIGTERM train 1.4")),
    (CHECKS, ("SIGTERM train 1.0", "SIGKILL train 2.3")),
    (CHECKS, ("SIGKILL validation 1.4", "SIGTERM validation 2.2")),
    (ENDS, ("SIGTERM validation 0.5", "SIGKILL train 2.1")),
    (CHECKS, ("SIGUSR1 train 0.2", "SIGUSR1 train 1.4")),
    (ENDS, ("SIGUSR1 train 1.3", "SIGTERM validation 2.5")),
    (STEPS, ("SIGUSR1 validation 1.5", "SIGKILL train 2.2")),
]
LIMITED = {"max_steps": 13}  # by which Lightning resumes in another way
UNSEEN = {"limit_val_batches": 0}
LIMITS: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({"saves": {}, "trainer": LIMITED}, ("SIGKILL train 1.0", "SIGTERM train 1.4")),
    ({"saves": {"every_n_train_steps": 1}, "trainer": LIMITED}, ("SIGKILL train 1.0", "SIGKILL validation 1.5")),
    ({"saves": {}, "trainer": LIMITED | UNSEEN}, ("SIGTERM train 0.4", "SIGKILL train 2.1")),
    ({"saves": {"every_n_train_steps": 5}, "trainer": UNSEEN}, ("SIGKILL train 1.0", "SIGKILL train 2.0")),
]
CHAINS += LIMITS


def case_of(
    method: str, chain: int, *, accumulate: int = 1, precision: str = "32-true", ranks: int = 1, train: str = "indexed"
) -> dict[str, Any]:
    when, blows = CHAINS[chain]
    options = {"accumulate_grad_batches": accumulate, "precision": precision, **when["trainer"]}
    return {
        "method": method,
        "train": train,
        "ranks": ranks,
        "saves": when["saves"],
        "trainer": options,
        "blows": blows,
    }


QUICK = {
    "noise": case_of("Restless", 0, train="workers"),
    "stream": case_of("Restless", 1, train="streamed"),
    "tecoa_in_windows": case_of("TeCoA", 6, accumulate=3, precision="bf16-mixed"),
    "pmg_aft_on_two_ranks": case_of("PMGAFT", 3, accumulate=3, ranks=2),
}
# Whole runs under SIGUSR1 need the variables of SLURM, which allow one rank per task of it.
GRID = [
    setting
    for setting in itertools.product(METHODS, (1, 3), ("32-true", "bf16-mixed"), (1, 2))
    if setting[:2] != ("CRoFT", 3)  # whose own optimisation accumulates nothing
]
MATRIX = {
    "-".join(map(str, setting)): case_of(
        setting[0],
        number % (6 if setting[3] == 2 else 9),
        accumulate=setting[1],
        precision=setting[2],
        ranks=setting[3],
    )
    for number, setting in enumerate(GRID)
} | {
    f"Restless-{train}-{chain}": case_of("Restless", chain, train=train)
    for chain in range(len(CHAINS))
    for train in ("indexed", "workers", "streamed", "streamed_workers")
    if train in ("indexed", "streamed") or chain in (0, 4)
}  # fmt: skip


def run_cases(
    cases: dict[str, dict[str, Any]], folder: Path, model: Path, write_shards: ShardWriter
) -> dict[str, dict[str, Any]]:
    (folder / "model").symlink_to(model)
    write_shards(folder, "indexed", "train", [13, 12])
    remote = write_shards(folder, "remote", "train", [9, 11])
    write_shards(folder, "val", "test", [5])
    write_table(folder / "captions.parquet", "captions", {i: [f"thing number {i}"] for i in range(25)})
    noise = np.random.default_rng(1)
    pairs = [(picture(noise, i, kind="png", mode="RGB", size=32), f"a pair {i}") for i in range(4)]
    anchors = write_pairs(folder / "anchors", pairs)
    write_table(anchors / "neighbours.parquet", "neighbours", {i: [i % 4] for i in range(25)})
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued\n')
    (folder / "scontrol").chmod(0o755)
    streamed = {"train": {"source": f"wds:file://{remote}", "length": 20, "name": "streamed"}, "val": ["wds:val"]}
    train = TRAIN | {"streamed": streamed, "streamed_workers": streamed | {"num_workers": 2}}
    for case in cases.values():
        data = dict(train[case["train"]])
        if case["method"] == "ARF":
            data |= {"captions": "captions.parquet", "anchors": "anchors"}
        has_preemption = any(blow.startswith("SIGUSR1") for blow in case["blows"])
        case |= {"data": data, "environment": SLURM if has_preemption else {}}
    (folder / "cases.json").write_text(json.dumps(cases))
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ROBUSTCLIP_TRACEBACK": "1", "PATH": path}
    environment |= {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    logs = "".join(f"\n{log.name}: {log.read_text()[-2500:]}" for log in folder.glob("*.log"))
    assert run.returncode == 0, run.stderr[-3000:] + logs[-8000:]
    ends: dict[str, dict[str, Any]] = json.loads((folder / "ends.json").read_text())
    return ends


SLURM = {
    **{"SLURM_JOB_NAME": "fit", "SLURM_JOB_ID": "9", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"},
    **{"SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1"},
    **{"SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
}


@pytest.fixture(scope="module")
def quick(tiny_model: Path, write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_cases(QUICK, tmp_path_factory.mktemp("quick"), tiny_model, write_shards)


@pytest.mark.parametrize("name", QUICK)
def test_a_fit_that_is_resumed_twice_ends_as_the_uninterrupted_one(quick: Any, name: str) -> None:
    assert quick[name]["resumed"] == quick[name]["whole"]


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
@pytest.mark.parametrize("method", [*METHODS, "Restless"])
def test_any_fit_that_is_resumed_twice_ends_as_the_uninterrupted_one(
    tiny_model: Path, write_shards: ShardWriter, tmp_path: Path, method: str
) -> None:
    ends = run_cases(
        {name: case for name, case in MATRIX.items() if case["method"] == method}, tmp_path, tiny_model, write_shards
    )
    assert ends
    assert [name for name, end in ends.items() if end["resumed"] != end["whole"]] == []


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_thirty_of_thirty_killed_fits_end_as_the_uninterrupted_one(
    tiny_model: Path, write_shards: ShardWriter, tmp_path: Path
) -> None:
    delays = random.Random(0)
    cases = {}
    for trial in range(10):
        cases[str(trial)] = case_of(("Restless", "TeCoA")[trial % 2], 0, accumulate=1 + trial % 3, ranks=1 + trial // 5)
        cases[str(trial)]["blows"] = [f"SIGKILL after {delays.uniform(0, 0.1)}" for _ in range(3)]
    ends = run_cases(cases, tmp_path, tiny_model, write_shards)
    assert [name for name, end in ends.items() if end["resumed"] != end["whole"]] == []


def test_a_checkpoint_that_is_not_written_to_its_end_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "last.ckpt"
    RenamedCheckpointIO().save_checkpoint({"step": 1}, place)

    def stop_halfway(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        assert torch.load(place)["step"] == 1  # what a kill at this moment would leave
        raise OSError("no space left on device")

    monkeypatch.setattr(saved_state.torch, "save", stop_halfway)
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
