"""Run by test_interruption.py: tests that SIGKILL ends again and again, each started anew until it is finished.

usage: python interruption_cases.py FOLDER, which holds `cases.json` and the data; leaves one folder per case there.

Every process is forked after the slow imports. Some run the command line as `python -m robustclip` would; most build
what it would build, since reading the command line takes longer than the test.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from helpers import run_test
from ranks import meeting_place
from resume_cases import finish
from torch import Tensor

import robustclip.cli.lightning  # noqa: F401  # loaded once, before the forks
from robustclip.attacks import APGD, PGD
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule, DataSource
from robustclip.evaluation import FeatureGeometry, OODDetection, ResultsWriter, RobustEvaluation, probes
from robustclip.methods import TeCoA
from robustclip.results.ledger import Ledger

PATIENCE_SECONDS = 120
PROBED_SHARE = 1 / 4  # so that tiny sets have probed samples
EPS, STEPS = 12 / 255, 2
BATCH, KEPT = 2, 3
TASKS = ("first", "second", "third")
SEED = torch.Generator()


class Counted(PGD):
    """Writes down whom it attacks, one line per batch; not in probes, which have another radius or more steps."""

    def perturb(self, images: Tensor, *args: Any, index: Tensor | None, **kwargs: Any) -> Tensor:
        if index is not None and (self.eps, self.steps) == (EPS, STEPS) and "ATTACKED" in os.environ:
            with Path(os.environ["ATTACKED"]).open("a") as file:
                file.write(f"{index.tolist()}\n")
        return super().perturb(images, *args, index=index, **kwargs)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def strike(when: str, what: str, name: str) -> None:
    """Lets this process die before, in or after a step: `in append 2`, `before replace result.json`."""
    count = iter(range(1, 1000))
    owner, name_of = {
        "append": (Ledger, lambda *_: str(next(count))),
        "replace": (Path, lambda _, target: Path(target).name),
        "rename": (Path, lambda _, target: Path(target).name),
        "unlink": (Path, lambda path, **_: path.name),
        "rmtree": (shutil, lambda path: Path(path).name),
    }[what]
    original: Callable[..., Any] = getattr(owner, what)

    def struck(*args: Any, **kwargs: Any) -> Any:
        is_here = fnmatch(name_of(*args, **kwargs), name)
        written = args[0].path if what == "append" else Path(args[-1])
        before = written.stat().st_size if what == "append" else 0
        if is_here and when == "before":
            die()
        result = original(*args, **kwargs)
        if is_here and when == "in":  # two thirds of it are on the disk
            os.truncate(written, before + (written.stat().st_size - before) * 2 // 3)
        if is_here:
            die()
        return result

    setattr(owner, what, struck)


def test(root: str, location: str, workers: int) -> int:
    """What the command line of test_interruption.py asks for."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    attacks = {"pgd": Counted("12/255", "6/255", STEPS), "apgd": APGD("8/255", 3)}
    callbacks = [RobustEvaluation(attacks, save_examples=KEPT), ResultsWriter("results")]
    data = CLIPDataModule(
        test=[DataSource(f"wds:{location}{name}", name=name) for name in TASKS],
        root=root,
        image_size=32,
        batch_size=BATCH,
        num_workers=workers,
        bad_samples="skip",
    )
    run_test(TeCoA(pretrained=f"{root}/model"), data, *callbacks, processes=processes)
    return 0


def test_all(root: str) -> int:
    """A test with detection and geometry, one image per batch, so that no number depends on the processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    callbacks = [
        OODDetection(scores=["mcm", "energy"], attack=PGD("8/255", "4/255", 2)),
        FeatureGeometry(max_samples=6),
        RobustEvaluation({"pgd": Counted("12/255", "6/255", STEPS)}, save_examples=KEPT),
        ResultsWriter("results"),
    ]
    known = [DataSource(f"wds:{name}", name=name, classes="0-1") for name in TASKS[:2]]
    unknown = [DataSource("wds:first", classes="0-1")]
    data = CLIPDataModule(test=known, unknown=unknown, root=root, image_size=32, batch_size=1)
    method = TeCoA(pretrained=f"{root}/model")
    with torch.no_grad():  # else geometry compares the pre-trained model with itself
        method.clip.net.visual.proj += 0.05 * torch.randn(
            method.clip.net.visual.proj.shape, generator=SEED.manual_seed(0)
        )
    run_test(method, data, *callbacks, processes=processes)
    return 0


def start(case: dict[str, Any], folder: Path, moment: str = "", environment: dict[str, str] | None = None) -> int:
    """Forks a process that tests in a folder; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        with Path("log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ.update({"ATTACKED": str(folder / "attacked"), **(environment or {})})
        probes.PROBED_SHARE = PROBED_SHARE
        if moment:
            strike(*moment.split())
        sys.argv = ["robustclip", *case.get("words", [])]
        status = run() if "words" in case else test(**case["test"]) if "test" in case else test_all(**case["test_all"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start_all(case: dict[str, Any], folder: Path, moment: str, processes: int) -> list[int]:
    """Starts one process, or all ranks of a group as Lightning's launcher would."""
    if processes == 1:
        return [start(case, folder, moment)]
    place = meeting_place()
    ranks = [place | {"LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [start(case, folder, moment, rank) for rank in ranks]


def is_running(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def written(folder: Path) -> int:
    """Bytes in the ledgers of a test that is not finished."""
    total = 0
    with contextlib.suppress(FileNotFoundError):  # published meanwhile
        for part in folder.glob("results/*/ledger/parts/*.csv"):
            total += part.stat().st_size
    return total


def wait_for_rows(child: int, folder: Path) -> None:
    """Until the ledgers grow; a new ledger's header counts as growth."""
    before = written(folder)
    while is_running(child) and written(folder) <= before:
        time.sleep(0.002)


def kill_outside(children: list[int], folder: Path, seconds: float) -> None:
    """Kills the processes some time after the first ledger write, but not their loader workers."""
    wait_for_rows(children[0], folder)
    end = time.monotonic() + seconds
    while is_running(children[0]) and time.monotonic() < end:
        time.sleep(0.002)
    for child in children:
        os.kill(child, signal.SIGKILL)


def is_finished(folder: Path) -> bool:
    found = list((folder / "results").iterdir()) if (folder / "results").is_dir() else []
    published = [each for each in found if not each.name.startswith("unfinished")]
    return any((each / "facts.json").exists() and not (each / "protocol.json").exists() for each in published)


def run_case(case: dict[str, Any], folder: Path, seconds: dict[int, float]) -> tuple[int, float]:
    """Starts a test until it is finished.

    Args:
        case: what to start, and when to kill it.
        folder: of the case.
        seconds: by number of processes, that a whole test takes from its first ledger write to its end.

    Returns:
        Number of kills that struck, and the seconds of the last start.
    """
    folder.mkdir()
    began, struck = 0.0, 0
    for moment, processes in [*case["kills"], ["", case["processes"]]]:
        is_share = moment.replace(".", "").isdigit()
        children = start_all(case, folder, "" if is_share else moment, processes)
        if case.get("is_challenged") and moment == case["kills"][0][0]:
            wait_for_rows(children[0], folder)
            os.kill(children[0], signal.SIGSTOP)
            finish(start(case, folder), expected=2, patience=PATIENCE_SECONDS)
            os.kill(children[0], signal.SIGCONT)
        if is_share:
            kill_outside(children, folder, float(moment) * seconds[processes])
            for child in children:
                os.waitpid(child, 0)
            if is_finished(folder):  # before the signal came
                return struck, 0.0
            struck += 1
        elif moment:
            finish(children[0], expected=-signal.SIGKILL, patience=PATIENCE_SECONDS)
            struck += 1
        else:
            wait_for_rows(children[0], folder)
            began = time.monotonic()
            for child in children:
                finish(child, expected=0, patience=PATIENCE_SECONDS)
    return struck, time.monotonic() - began


def main(folder: Path) -> None:
    seconds: dict[int, float] = {}
    told: dict[str, dict[str, float]] = {}
    (folder / "warm_up").mkdir()
    os.chdir(folder / "warm_up")
    test(str(folder), "", 0)  # imports what is imported late, once for all forks
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        begin = time.monotonic()
        struck, took = run_case(case, folder / name, seconds)
        if not case["kills"]:
            seconds[case["processes"]] = took if "streamed" not in name else seconds[1]
        told[name] = {"kills": struck, "seconds": time.monotonic() - begin}
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]).resolve())
