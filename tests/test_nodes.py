"""Two nodes on this machine, which torchrun starts: equal to one process, also after one of them was lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import ROUNDED, ShardWriter, tiny_clip
from test_resume import SLURM

from robustclip.cli.main import run
from robustclip.results.run import Run

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("node_cases.py")
PATIENCE_SECONDS = 200
STEPS = 8
GLOBAL_BATCH = 4


class End(NamedTuple):
    """How a start of both nodes ended."""

    statuses: list[int]
    texts: list[str]


def commands(root: Path, place: str, nodes: int, checkpoint: Path | None = None) -> list[list[str]]:
    """The command lines of a fit and of a test of its weights."""
    last = root / place / "checkpoints" / "last.ckpt"
    common = ["--model", "TeCoA", "--model.pretrained", str(root / "model"), "--data.root", str(root)]
    common += ["--data.train", "wds:train", "--data.test", "[wds:odd,wds:single]", "--data.image_size", "32"]
    common += ["--data.batch_size", str(GLOBAL_BATCH // nodes), "--data.val", "wds:single"]
    common += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", str(nodes)]
    common += ["--trainer.default_root_dir", str(root / place), "--trainer.logger", "false"]
    common += ["--trainer.enable_model_summary", "false", "--trainer.log_every_n_steps", "2"]
    common += ["--trainer.callbacks", "node_cases.Strike", "--evaluation.attacks", '{"pgd": {"class_path": "PGD"}}']
    fit = ["fit", *common, "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.05"]
    fit += ["--trainer.max_steps", str(STEPS), "--checkpoint.dirpath", str(last.parent)]
    fit += ["--checkpoint.every_n_train_steps", "2", *([] if checkpoint is None else ["--ckpt_path", str(checkpoint)])]
    return [fit, ["test", *common, "--ckpt_path", str(last), "--results.name", "tested"]]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def on_two_nodes(root: Path, name: str, lines: list[list[str]], strike: str = "") -> End:
    """Starts an agent of torchrun per node; if one is lost, the other ends by itself or as the queue would end it."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", name]
    return started(root, name, lines, words, [{"STRIKE": strike}, {"STRIKE": strike}])


def on_two_tasks(root: Path, name: str, lines: list[list[str]], strike: str = "") -> End:
    """Starts two tasks with the variables of `srun`, and an `scontrol` that writes down its arguments."""
    (root / "bin").mkdir(exist_ok=True)
    (root / "bin/scontrol").write_text(f'#!/bin/sh\necho "$@" >> {root}/requeued_jobs\n')
    (root / "bin/scontrol").chmod(0o755)
    shared = SLURM | {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "PATH": f"{root}/bin{os.pathsep}{os.environ['PATH']}"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "STRIKE": strike}
    places = [{"SLURM_PROCID": node, "SLURM_NODEID": node, "SLURM_LOCALID": "0"} for node in ("0", "1")]
    return started(root, name, lines, [sys.executable], [shared | place for place in places])


def started(root: Path, name: str, lines: list[list[str]], words: list[str], environments: list[dict[str, str]]) -> End:
    """Starts a process per node, and waits for the end of all."""
    (root / f"{name}.json").write_text(json.dumps(lines))
    common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    logs = [root / f"{name}.{node}.log" for node in range(len(environments))]
    nodes = []
    for log, environment in zip(logs, environments, strict=True):
        with log.open("w") as file:
            nodes.append(
                subprocess.Popen(
                    [*words, str(SCRIPT), str(root / f"{name}.json")],
                    env=os.environ | common | environment,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            )
    try:
        end = time.monotonic() + PATIENCE_SECONDS
        while any(node.poll() is None for node in nodes) and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    return End([node.wait() for node in nodes], [log.read_text() for log in logs])


@pytest.fixture(scope="module")
def root(write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    tiny_clip(folder / "model")
    write_shards(folder, "train", "train", [16])  # four steps an epoch
    write_shards(folder, "odd", "test", [4, 3])
    write_shards(folder, "single", "test", [1])
    return folder


@pytest.fixture(scope="module")
def ends(root: Path) -> dict[str, End]:
    """Ends of all starts: uninterrupted, lost in the fit, requeued and lost in the test, and requeued again."""
    whole = on_two_nodes(root, "whole", commands(root, "two", 2))
    last = root / "requeued" / "checkpoints" / "last.ckpt"
    lost = on_two_nodes(root, "lost", commands(root, "requeued", 2)[:1], strike="fit 7")
    resumed = on_two_nodes(root, "resumed", commands(root, "requeued", 2, last), strike="test 0.1")
    again = on_two_nodes(root, "again", commands(root, "requeued", 2)[1:])
    return {"whole": whole, "lost": lost, "resumed": resumed, "again": again}


def weights(root: Path, place: str) -> dict[str, Any]:
    checkpoint = torch.load(root / place / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    state: dict[str, Any] = checkpoint["state_dict"]
    return state


def rows(run: Run, task: str) -> list[dict[str, str]]:
    """The ledger without times and without numbers whose last digits depend on the batch."""
    inexact = ("seconds", *ROUNDED)
    return [{name: cell for name, cell in row.items() if not name.endswith(inexact)} for row in run.rows(task)]


def test_both_nodes_end_well_and_each_reports_itself(ends: dict[str, End]) -> None:
    whole = ends["whole"]
    assert whole.statuses == [0, 0], whole.texts[0][-3000:]
    reports = [re.findall(r"process (\d) of 2: node (\d) of 2 \(host .*\), local rank 0", text) for text in whole.texts]
    assert sorted(report[0] for report in reports) == [("0", "0"), ("1", "1")]
    assert all(re.search(r"process \d of 2 waits for the others at .+:\d+", text) for text in whole.texts)
    assert sum("all 2 processes are connected" in text for text in whole.texts) == 1
    assert sum(text.count("step 8 of 8, loss") for text in whole.texts) == 1  # the first process alone


def test_two_nodes_train_and_count_as_one_process_does(
    ends: dict[str, End], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(SCRIPT.parent), *sys.path])
    for words in commands(root, "one", 1):
        assert run(words) == 0
    one, two = weights(root, "one"), weights(root, "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
    runs = [Run.open(root / place / "results" / "tested") for place in ("one", "two")]
    for task, count in (("odd", 7), ("single", 1)):
        assert len(rows(runs[0], task)) == count
        assert rows(runs[1], task) == rows(runs[0], task)


def test_a_lost_node_ends_the_other_and_both_requeued_are_as_the_uninterrupted(
    ends: dict[str, End], root: Path
) -> None:
    for name in ("lost", "resumed"):
        assert -signal.SIGKILL in ends[name].statuses
        (other,) = (status for status in ends[name].statuses if status != -signal.SIGKILL)
        assert other > 0, ends[name].texts
    assert ends["again"].statuses == [0, 0], ends["again"].texts[0][-3000:]
    assert any("starts from" in text and "(step 6)" in text for text in ends["resumed"].texts)
    whole, requeued = weights(root, "two"), weights(root, "requeued")
    assert all(torch.equal(whole[name], requeued[name]) for name in whole)
    runs = [Run.open(root / place / "results" / "tested") for place in ("two", "requeued")]
    for task in ("odd", "single"):
        assert rows(runs[1], task) == rows(runs[0], task)
    results = [
        {name: {k: v for k, v in values.items() if k != "seconds"} for name, values in each.result["tasks"].items()}
        for each in runs
    ]
    assert results[0] == results[1]


def test_a_preempted_job_of_two_tasks_is_requeued_once_and_resumes(root: Path, ends: dict[str, End]) -> None:
    fit = commands(root, "job", 2)[:1]
    preempted = on_two_tasks(root, "preempted", fit, strike="signal 5")
    assert preempted.statuses == [138, 138], preempted.texts[0][-3000:]
    assert (root / "requeued_jobs").read_text() == "requeue 9\n"
    resumed = on_two_tasks(root, "job_again", fit)
    assert resumed.statuses == [0, 0], resumed.texts[0][-3000:]
    assert "hpc_ckpt_9.ckpt (step 6)" in resumed.texts[0]
    whole, requeued = weights(root, "two"), weights(root, "job")
    assert all(torch.equal(whole[name], requeued[name]) for name in whole)
