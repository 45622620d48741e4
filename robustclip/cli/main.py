"""Entry of the command line, which imports libraries only where a command needs them and prints errors in one line."""

import os
import sys
from argparse import ArgumentError

from robustclip import __version__

HELP = f"""robustclip {__version__}: fine-tune CLIP-like models so that they stay robust, and measure whether they did.

usage: robustclip COMMAND --config FILE [--KEY VALUE ...]

commands:
  fit --config FILE                                fine-tune a model
  validate --config FILE --ckpt_path FILE          evaluate a model on the validation data
  test --config FILE --ckpt_path FILE              evaluate a model on test data sets, clean and under attack
  doctor --config FILE                             check a configuration before a long run; options as for test
  table RUN...                                     print one table of several results
  compare RUN RUN                                  compare two results, with confidence intervals
  report RUN... --images DIR --sections CLASS      write an HTML page about several results
  leaderboard RUN... --out DIR                     write a static page that ranks results of equal protocols
  merge RUN... --out RUN                           join the shards of a test, of --shard I --shards N, to one result
  score RUN                                        compute a result again from its ledgers, without a model
  verify RUN                                       check that a result's adversarial examples still fool its model
  replay RUN --model.pretrained DIR                evaluate another model on a result's adversarial examples
  import FILE --arch A --pretrained P --out DIR    convert a foreign checkpoint to a folder for --model.pretrained
  import FOLDER|hf-hub:ORG/NAME --out DIR          convert a Hugging Face CLIP or SigLIP
  export FILE|RUN --to hf --out DIR                convert a fine-tuned model for open_clip or transformers
  interpolate FILE --alphas 0,0.5,1 --out DIR      write checkpoints between the original and the fine-tuned model
  soup FILE... --held_out true --out DIR           mix several fine-tuned models: their mean, or --scales of the changes
  caption --data D --captioner MODEL --out FILE    caption the images of a training set by an image-to-text model
  retrieve --data D --pool wds:URL --out DIR       find the image-text pairs of a pool nearest to a training set
  cache --config FILE --data.features DIR          store embeddings by the frozen model, to train without decoding
  configs --copy DIR                               list or copy the configurations of the package
  list methods|attacks|defences|scores|callbacks   list the names that options take; also list configs|datasets
  datasets [NAME] --root DATA                      list the published data sets, their licences and origins
  claims [METHOD] --check RUN                      print what papers claim beside what was measured here
  completion bash                                  print a script that completes commands and options by the tab key

FILE is a configuration, one of the package by its name, or a checkpoint; RUN is a folder that `robustclip test` wrote.
`robustclip COMMAND --help` lists all options; for fit, validate and test this takes some seconds.
Any key of a config is an option: --model.attack.eps 2/255 --data.batch_size 64 --trainer.max_epochs 3.
Give --config first: later options override it.
A class lists its own options: `robustclip test --model.help TeCoA`, `robustclip test --data.help CLIPDataModule`.
An own method needs no registration: --model my_module.MyMethod finds my_module.py in the current folder.
An own tool is a function with type hints: robustclip my_module.my_tool --x 3.
Set ROBUSTCLIP_TRACEBACK=1 to see where an error comes from.
"""
TRAINER_COMMANDS = ("fit", "validate", "test")
REBUILDING = "robustclip.cli."  # prefix of the functions that take --config
# A command's function is imported when it is called. Its signature is the command line, its docstring the help.
TOOLS = {
    "doctor": "robustclip.cli.commands:doctor",
    "table": "robustclip.tools.table:table",
    "compare": "robustclip.tools.compare:compare",
    "report": "robustclip.report:report",
    "leaderboard": "robustclip.report.leaderboard:leaderboard",
    "merge": "robustclip.tools.merge:merge",
    "score": "robustclip.tools.score:score",
    "verify": "robustclip.cli.commands:verify",
    "replay": "robustclip.cli.commands:replay",
    "import": "robustclip.convert.importing:import_checkpoint",
    "export": "robustclip.cli.commands:export",
    "interpolate": "robustclip.cli.commands:interpolate",
    "soup": "robustclip.cli.commands:soup",
    "caption": "robustclip.tools.caption:caption",
    "retrieve": "robustclip.tools.retrieve:retrieve",
    "cache": "robustclip.cli.caching:cache",
    "configs": "robustclip.tools.configs:configs",
    "list": "robustclip.tools.listing:listing",
    "datasets": "robustclip.tools.datasets:datasets",
    "claims": "robustclip.tools.claims:claims",
    "completion": "robustclip.cli.completion:completion",
}
INTERRUPTED, UNREAD, TERMINATED = (128 + number for number in (2, 13, 15))  # SIGINT, SIGPIPE, SIGTERM, as in a shell
COMMANDS = (*TRAINER_COMMANDS, *TOOLS)


def run(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    The status is 0 after success, 1 where `doctor` or `verify` found a fault, and 2 after invalid input, with a line on
    stderr that names the fault. It is 130, 138 or 143 where Ctrl-C, SLURM's SIGUSR1 or SIGTERM ended a run, and 141
    where the reader of the output is gone. An exit with another number than 0 keeps it. An error of the program itself
    is raised; Python then ends with 1.

    Args:
        arguments: as on the command line, without the program's name; None takes the program's own.
    """
    try:
        status = _answer(sys.argv[1:] if arguments is None else arguments)
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
        lightning = sys.modules.get("robustclip.cli.lightning")  # its errors matter only if it is loaded
        expected = lightning.EXPECTED_ERRORS if lightning else (ArgumentError, ImportError, OSError, ValueError)
        if os.environ.get("ROBUSTCLIP_TRACEBACK") or not isinstance(error, expected):
            raise
        from robustclip.cli.checks import known_keys
        from robustclip.cli.messages import in_one_line

        line = in_one_line(error, known_keys() if lightning else ())
        command = (sys.argv[1:] if arguments is None else arguments)[0]
        sys.stderr.write(f"error: {line.replace('robustclip COMMAND', f'robustclip {command}')}\n")
        return 2


def _answer(arguments: list[str]) -> int:
    command, *rest = arguments or ["help"]
    if command in ("-h", "--help", "help", "--version"):
        sys.stdout.write(f"robustclip {__version__}\n" if command == "--version" else HELP)
        return 0
    is_own = "." in command
    if command not in COMMANDS and not is_own:
        sys.stderr.write(f"error: no command {command!r}; the commands are {', '.join(COMMANDS)}\n")
        return 2
    if command in TRAINER_COMMANDS or TOOLS.get(command, "").startswith(REBUILDING):
        from robustclip.cli.checks import check_arguments, check_files
        from robustclip.cli.settings import configurations, located

        rest = located(rest)
        check_files(rest, needs_results=command in TRAINER_COMMANDS)
        # Other options of a tool may be its own ones.
        checked = [command, *rest] if command in TRAINER_COMMANDS else ["test", *configurations(rest)]
        check_arguments(checked)
    if command not in TRAINER_COMMANDS:
        from robustclip.cli.functions import call, find

        return call(find(command, ".") if is_own else find(TOOLS[command]), rest, command)
    from robustclip.cli.lightning import main  # slow: loads torch and lightning

    main([command, *rest])
    return 0


def _status(stop: SystemExit) -> int:
    """Gives the exit status of an exit; only a parser may exit with 0, since other code may exit before the end."""
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
