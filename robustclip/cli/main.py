"""Entry of the command line: answers what needs no library at once, and tells errors in one line."""

import os
import sys
from argparse import ArgumentError

from robustclip import __version__

HELP = f"""robustclip {__version__}: fine-tune CLIP-like models so that they stay robust, and measure whether they did.

usage: robustclip COMMAND --config FILE [--KEY VALUE ...]

commands:
  fit       fine-tune a model              robustclip fit --config configs/tecoa.yaml
  validate  evaluate on the hold-out       robustclip validate --config ... --ckpt_path FILE
  test      zero-shot sets, clean and under attack
                                           robustclip test --config configs/tecoa.yaml --ckpt_path FILE
  doctor    check a configuration before a long run; takes what `test` takes
                                           robustclip doctor --config configs/tecoa.yaml
  table     one table of several results   robustclip table RUN...
  compare   two results, with intervals    robustclip compare RUN_A RUN_B
  report    several results as a page      robustclip report RUN... --out report.html
  score     a result again from its ledgers, without a model
                                           robustclip score RUN
  verify    do a result's attacked images fool the model that they were made for?
                                           robustclip verify RUN
  replay    its attacked images on another model
                                           robustclip replay RUN --model.pretrained FOLDER
  import    another project's checkpoint as a folder for --model.pretrained
                                           robustclip import FILE --arch ... --pretrained ... --out FOLDER
  export    a fine-tuned model as a folder for open_clip or transformers
                                           robustclip export FILE-OR-RUN --to hf --out FOLDER
  interpolate  checkpoints between the original model and the fine-tuned one
                                           robustclip interpolate FILE --alphas 0,0.5,1 --out FOLDER
  caption   captions of a training set's images, by an image-to-text model
                                           robustclip caption --data ... --captioner ID-OR-FOLDER --out FILE
  retrieve  the image-text pairs of a pool that are nearest to a training set
                                           robustclip retrieve --data ... --pool wds:... --out FOLDER
  cache     embeddings of a run's images by the frozen model, to train without decoding
                                           robustclip cache --config ... --data.features FOLDER

--config comes first: later options override it. `robustclip COMMAND --help` lists every option (takes a while).
Any key of a config is an option: --model.attack.eps 2/255 --data.batch_size 64 --trainer.max_epochs 3.
A method of your own needs no registration: --model my_module.MyMethod finds my_module.py in the current folder.
So does a tool, which is a function with type hints: robustclip my_module.my_tool --x 3.
Set ROBUSTCLIP_TRACEBACK=1 to see where an error comes from.
"""
TRAINER_COMMANDS = ("fit", "validate", "test")
REBUILDING = "robustclip.cli."  # so begin the functions that take --config
# A command's function is imported when it is called. Its signature is the command line, its docstring the help.
TOOLS = {
    "doctor": "robustclip.cli.commands:doctor",
    "table": "robustclip.tools.table:table",
    "compare": "robustclip.tools.compare:compare",
    "report": "robustclip.report:report",
    "score": "robustclip.tools.score:score",
    "verify": "robustclip.cli.commands:verify",
    "replay": "robustclip.cli.commands:replay",
    "import": "robustclip.convert.importing:import_checkpoint",
    "export": "robustclip.cli.commands:export",
    "interpolate": "robustclip.cli.commands:interpolate",
    "caption": "robustclip.tools.caption:caption",
    "retrieve": "robustclip.tools.retrieve:retrieve",
    "cache": "robustclip.cli.caching:cache",
}
INTERRUPTED, UNREAD, TERMINATED = (128 + number for number in (2, 13, 15))  # SIGINT, SIGPIPE, SIGTERM, as in a shell
COMMANDS = (*TRAINER_COMMANDS, *TOOLS)


def run(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    The status is 0 after success, 1 where `doctor` or `verify` found something, 2 after a line on stderr that names
    what is wrong with the input, 130, 138 and 143 where Ctrl-C, SLURM's SIGUSR1 or SIGTERM ended a run, and 141
    where the reader of the output is gone. An exit with another number than 0 keeps it. An error of the program itself
    is raised; Python then ends with 1.

    Args:
        arguments: as on the command line, without the program's name; None takes the program's own.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        status = _answer(words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _interrupted("Ctrl-C", INTERRUPTED)
    except BrokenPipeError:  # as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again when it ends
        return UNREAD
    except SystemExit as stop:
        return _status(stop)
    except Exception as error:
        if os.environ.get("ROBUSTCLIP_TRACEBACK") or not isinstance(error, _expected()):
            raise
        from robustclip.cli.messages import in_one_line

        sys.stderr.write(f"error: {in_one_line(error, _known_keys())}\n")
        return 2


def _answer(words: list[str]) -> int:
    command = words[0] if words else "help"
    if command in ("-h", "--help", "help", "--version"):
        sys.stdout.write(f"robustclip {__version__}\n" if command == "--version" else HELP)
        return 0
    is_own = "." in command
    if command not in COMMANDS and not is_own:
        sys.stderr.write(f"error: no command {command!r}; the commands are {', '.join(COMMANDS)}\n")
        return 2
    if command in TRAINER_COMMANDS or TOOLS.get(command, "").startswith(REBUILDING):
        from robustclip.cli.settings import check_files

        check_files(words[1:], needs_results=command in TRAINER_COMMANDS)
    if command in TOOLS or is_own:
        from robustclip.cli.functions import call, find

        function = find(command, ".") if is_own else find(TOOLS[command])
        return call(function, words[1:], command)
    from robustclip.cli.lightning import main  # slow: loads torch and lightning

    main(words)
    return 0


def _status(stop: SystemExit) -> int:
    """Exit status of an exit; only the parser's may be 0, since others say nothing of whether the command is done."""
    from robustclip.cli.messages import Answered

    if isinstance(stop, Answered):
        return int(stop.code or 0)
    if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns it into an exit with 1
        return _interrupted("Ctrl-C", INTERRUPTED)
    if isinstance(stop.code, int) and stop.code:
        return int(stop.code)
    if type(stop).__name__ == "SIGTERMException":  # Lightning's
        return _interrupted("SIGTERM", TERMINATED)
    reason = stop.code or "sys.exit() was called before the command was done"
    sys.stderr.write(f"error: {reason}\n")
    return 1


def _interrupted(by: str, status: int) -> int:
    sys.stderr.write(f"error: interrupted by {by}\n")
    return status


def _expected() -> tuple[type[BaseException], ...]:
    """Errors that the input explains; those of torch and lightning only where these are loaded."""
    if "robustclip.cli.lightning" not in sys.modules:
        return (ArgumentError, ImportError, OSError, ValueError)
    from robustclip.cli.lightning import EXPECTED_ERRORS

    return EXPECTED_ERRORS


def _known_keys() -> list[str]:
    if "robustclip.cli.lightning" not in sys.modules:
        return []
    from robustclip.cli.lightning import known_keys

    return known_keys()
