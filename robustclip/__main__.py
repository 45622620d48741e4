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
Set ROBUSTCLIP_TRACEBACK=1 to see where an error comes from.
"""
TRAINER_COMMANDS = ("fit", "validate", "test")
TOOLS = (
    *("doctor", "table", "compare", "report", "verify", "replay", "import", "export", "interpolate"),
    *("caption", "retrieve", "cache"),
)
COMMANDS = (*TRAINER_COMMANDS, *TOOLS)


def run(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    That is 0, 1 where `doctor` or `verify` found something, 2 after a line on stderr that says what is wrong, or 130,
    138 and 143 where SIGINT, SLURM's SIGUSR1 or SIGTERM ended a run between two steps.
    """
    given, arguments = arguments, sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    if arguments[0] == "--version":
        sys.stdout.write(f"robustclip {__version__}\n")
        return 0
    if arguments[0] not in COMMANDS:
        sys.stderr.write(f"error: no command {arguments[0]!r}; the commands are {', '.join(COMMANDS)}\n")
        return 2
    try:
        return _dispatch(given, arguments)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # of the parser after `--help` and the like, or of a run that a signal ended
        if isinstance(stop.__context__, KeyboardInterrupt):  # before the first step; Lightning makes 1 of it
            return 130
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if os.environ.get("ROBUSTCLIP_TRACEBACK") or not isinstance(error, _expected()):
            raise
        from robustclip.errors import in_one_line

        sys.stderr.write(f"error: {in_one_line(error, _known_keys())}\n")
        return 2


def _dispatch(given: list[str] | None, arguments: list[str]) -> int:
    if arguments[0] in TOOLS:
        from robustclip.commands import run_tool

        return run_tool(arguments)
    from robustclip.cli import main  # slow: loads torch and lightning

    main(given)
    return 0


def _expected() -> tuple[type[BaseException], ...]:
    """Errors that the input explains; those of torch and lightning only where these are loaded."""
    if "robustclip.cli" not in sys.modules:
        return (ArgumentError, ImportError, OSError, ValueError)
    from robustclip.cli import EXPECTED_ERRORS

    return EXPECTED_ERRORS


def _known_keys() -> list[str]:
    if "robustclip.cli" not in sys.modules:
        return []
    from robustclip.cli import known_keys

    return known_keys()


if __name__ == "__main__":
    sys.exit(run())
