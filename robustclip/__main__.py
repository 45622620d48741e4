"""Entry of the command line: answers what needs no library at once, and tells errors in one line."""

import os
import sys

from robustclip import __version__

HELP = f"""robustclip {__version__}: fine-tune CLIP-like models so that they stay robust, and measure whether they did.

usage: robustclip COMMAND --config FILE [--KEY VALUE ...]

commands:
  fit       fine-tune a model              robustclip fit --config configs/tecoa.yaml
  validate  evaluate on the hold-out       robustclip validate --config ... --ckpt_path FILE
  test      zero-shot sets, clean and under attack
                                           robustclip test --config configs/tecoa.yaml --ckpt_path FILE
  table     one table of several results   robustclip table results/*.json

--config comes first: later options override it. `robustclip COMMAND --help` lists every option (takes a while).
Any key of a config is an option: --model.attack.eps 2/255 --data.batch_size 64 --trainer.max_epochs 3.
A method of your own needs no registration: --model my_module.MyMethod finds my_module.py in the current folder.
Set ROBUSTCLIP_TRACEBACK=1 to see where an error comes from.
"""
TRAINER_COMMANDS = ("fit", "validate", "test")
COMMANDS = (*TRAINER_COMMANDS, "table")


def run(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, or 2 after a line on stderr that says what is wrong."""
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
    from robustclip.cli import EXPECTED_ERRORS, known_keys, main  # slow: loads torch and lightning
    from robustclip.errors import in_one_line

    try:
        main(given)
    except EXPECTED_ERRORS as error:
        if os.environ.get("ROBUSTCLIP_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {in_one_line(error, known_keys())}\n")
        return 2
    except SystemExit as stop:  # of the parser, after `--help`, `--print_config` and the like
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(run())
