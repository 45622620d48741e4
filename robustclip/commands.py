"""Commands beside fit, validate and test: what each takes on the command line.

A command's own imports stand in its branch, so that the light ones answer without loading torch.
"""

import os
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser


def run_tool(words: list[str]) -> int:
    """Runs one of the commands and returns the exit status.

    Args:
        words: the command and its arguments.
    """
    commands: dict[str, Callable[[list[str]], int]] = {
        "table": _table,
        "compare": _compare,
        "report": _report,
        "verify": _verify,
        "replay": _replay,
        "doctor": _doctor,
    }
    return commands[words[0]](words[1:])


def _parser(command: str, description: str) -> ArgumentParser:
    return ArgumentParser(prog=f"robustclip {command}", description=description, exit_on_error=False)


# Paths are taken as strings: the parser would take what a path points to for a configuration.


def _table(words: list[str]) -> int:
    parser = _parser("table", "Prints the accuracies of several results side by side, in percent.")
    parser.add_argument("results", nargs="+", type=str, help="folder that `robustclip test` left")
    given = parser.parse_args(words)
    from robustclip.tools.table import table

    table([Path(name) for name in given.results])
    return 0


def _compare(words: list[str]) -> int:
    parser = _parser("compare", "Compares two runs, with intervals of the differences.")
    parser.add_argument("a", type=str, help="folder that `robustclip test` left")
    parser.add_argument("b", type=str, help="the folder of the test to compare with it")
    parser.add_argument(
        "--shared_samples", type=bool, default=False, help="compare on the samples that both have, if sets differ"
    )
    given = parser.parse_args(words)
    from robustclip.tools.compare import compare

    compare(Path(given.a), Path(given.b), shared_samples=given.shared_samples)
    return 0


def _report(words: list[str]) -> int:
    parser = _parser("report", "Writes one page about several runs.")
    parser.add_argument("runs", nargs="+", type=str, help="folder that `robustclip test` left")
    parser.add_argument("--out", type=str, default="report.html", help="file to write")
    given = parser.parse_args(words)
    from robustclip.tools.report import report

    report([Path(name) for name in given.runs], out=Path(given.out))
    return 0


def _verify(words: list[str]) -> int:
    parser = _parser("verify", "Rebuilds a run's model and checks its stored images; status 1 if something disagrees.")
    parser.add_argument("run", type=str, help="folder that `robustclip test` left")
    given = parser.parse_args(words)
    from robustclip.assembly import build
    from robustclip.tools.evidence import verify

    return 1 if verify(Path(given.run), build) else 0


def _replay(words: list[str]) -> int:
    parser = _parser(
        "replay",
        "Shows a run's stored images to another model. The run's settings hold but for the options that follow it,"
        " any of `robustclip test --help`; its checkpoint is loaded only if --ckpt_path is given anew.",
    )
    parser.add_argument("run", type=str, help="folder that `robustclip test` left; comes before the options")
    given = parser.parse_args([word for word in words[:1] if word in ("-h", "--help") or not word.startswith("-")])
    from robustclip.assembly import rebuild
    from robustclip.runs import Run
    from robustclip.tools.evidence import replay

    run = Run.open(Path(given.run))
    config = run.result.get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{run.folder} has no settings that its model could be built from")
    replay(run.folder, rebuild(config, words[1:]))
    return 0


def _doctor(words: list[str]) -> int:
    parser = _parser("doctor", "Checks a configuration before a long run: the options are those of `robustclip test`.")
    if words[:1] in (["-h"], ["--help"]):
        parser.parse_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # weights that are not here are a finding, not to be fetched
    from robustclip.assembly import plan
    from robustclip.tools.doctor import doctor

    return 1 if doctor(plan(words)) else 0
