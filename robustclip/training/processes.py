"""The processes of a run: a check against the launcher that has started them, and a line about each."""

import os
import socket
import sys
from typing import NamedTuple

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

SHARDING = ("fsdp", "deepspeed", "modelparallel", "model_parallel")  # parts of the names of strategies and classes


class Launch(NamedTuple):
    """The processes that a launcher has started.

    Attributes:
        launcher: name of the launcher.
        processes: number of processes on all nodes.
        per_node: number of processes on this node; None if it is not known.
        is_external: whether Lightning leaves the start of processes to the launcher.
    """

    launcher: str
    processes: int
    per_node: int | None
    is_external: bool


class ConnectedProcesses(Callback):
    """Reports that all processes of a run are connected."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the line once; Lightning connects the processes just before."""
        if trainer.world_size > 1 and trainer.is_global_zero:
            sys.stderr.write(f"all {trainer.world_size} processes are connected\n")
            sys.stderr.flush()


def report_process(trainer: Trainer) -> None:
    """Prints which of several processes this one is, and where it waits for the others; prints nothing for one process.

    Args:
        trainer: trainer that has not started yet.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size == 1 or environment is None:
        return
    process = f"process {trainer.global_rank} of {trainer.world_size}"
    place = f"node {trainer.node_rank} of {trainer.num_nodes} (host {socket.gethostname()})"
    device = f"local rank {trainer.local_rank}, device {trainer.strategy.root_device}"
    sys.stderr.write(f"{process}: {place}, {device}, process id {os.getpid()}\n")
    address = f"{environment.main_address}:{environment.main_port}"
    sys.stderr.write(f"{process} waits for the others at {address}\n")
    sys.stderr.flush()


def check_processes(devices: int, nodes: int) -> None:
    """Refuses a run whose trainer uses another number of processes than a launcher has started.

    Lightning would train with a wrong number of samples per step, wait for processes that nobody starts, or run the
    whole work in every process.

    Args:
        devices: number of devices that the trainer uses on every node.
        nodes: number of nodes that the trainer uses.

    Raises:
        ValueError: the numbers differ.
    """
    launch = _launch()
    if launch is None or (devices * nodes > 1 and not launch.is_external):
        return
    if devices * nodes != launch.processes or launch.per_node not in (None, devices):
        per_node = launch.per_node or launch.processes
        remedy = f"--trainer.devices {per_node} --trainer.num_nodes {max(1, launch.processes // per_node)}"
        here = "" if launch.per_node is None else f", {per_node} on this node"
        plural = "" if launch.processes == 1 else "es"
        raise ValueError(
            f"{launch.launcher} starts {launch.processes} process{plural}{here}, but trainer.devices and"
            f" trainer.num_nodes make {devices} x {nodes}: processes would run alone or wait for ever; set {remedy},"
            " or start as many processes"
        )


def check_strategy(strategy: object) -> None:
    """Refuses strategies that divide the weights among the processes.

    Args:
        strategy: name of a strategy, or an object or settings whose text names its class.

    Raises:
        ValueError: the strategy is one of FSDP, DeepSpeed or model parallelism.
    """
    text = str(strategy)
    if any(name in text.lower() for name in SHARDING):
        raise ValueError(
            f"trainer.strategy {text[:60]!r} is not supported: checkpoints and digests of weights need whole weights"
            " in every process; use ddp, and save memory by model.has_activation_checkpointing"
        )


def _launch() -> Launch | None:
    """Reads the launcher from the environment; None if Lightning itself starts the processes."""
    variables = os.environ
    # Launchers with torchrun's variables set RANK; Lightning's own launcher does not. Where several pods each start
    # Lightning, RANK counts pods, and LOCAL_RANK is not set.
    if "RANK" in variables and (count := _number("WORLD_SIZE")):
        return Launch("torchrun", count, _number("LOCAL_WORLD_SIZE"), "LOCAL_RANK" in variables)
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        return None
    if SLURMEnvironment.detect() and (count := _number("SLURM_NTASKS")):
        return Launch("srun", count, _number("SLURM_NTASKS_PER_NODE"), True)
    return None


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else None
