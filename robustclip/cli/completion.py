"""``robustclip completion`` prints a script by which the tab key completes commands, options and names in bash.

The script is text without a call of Python, since loading the parser of a run takes seconds. jsonargparse's generator
(``--print_completion``, with shtab) is not used: it follows every class that an option takes, and needs minutes and
gigabytes for the options of Lightning's trainer.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from robustclip.cli.checks import known_keys
from robustclip.cli.functions import find, options_of
from robustclip.cli.main import COMMANDS, TOOLS, TRAINER_COMMANDS
from robustclip.data.catalog import CATALOG
from robustclip.tools.configs import FOLDER, PARTS
from robustclip.tools.listing import Kind, Listed, classes

Shell = Literal["bash"]
NO_OPTIONS = (".class_path", ".init_args")  # ends of keys that only a file has
SCRIPT = """\
# Completion of robustclip in bash: source <(robustclip completion bash)
_robustclip() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" names="" options=""
    case "${{COMP_WORDS[1]}}" in
{options}
    esac
    case "$previous" in
{values}
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then
        names="{commands}"
    elif [[ "$word" == -* ]]; then
        names="$options --help"
    elif [ -z "$names" ] && [ "$COMP_CWORD" -eq 2 ]; then
        case "${{COMP_WORDS[1]}}" in
{operands}
        esac
    fi
    COMPREPLY=($(compgen -W "$names" -- "$word"))
    if [[ "$COMP_CWORD" -gt 1 && "$word" != -* ]]; then COMPREPLY+=($(compgen -f -- "$word")); fi
}}
complete -o filenames -F _robustclip robustclip
"""


def completion(shell: Shell) -> None:
    """Prints a script that completes commands, options, classes and configurations by the tab key.

    Load it by ``source <(robustclip completion bash)``, or write it to a file that the shell reads at its start.

    Args:
        shell: name of the shell, bash.
    """
    run = [f"--{key}" for key in known_keys() if not key.endswith(NO_OPTIONS)]
    options = {name: [*run, "--print_config"] for name in TRAINER_COMMANDS}
    for name, target in TOOLS.items():
        own, takes_run_options = options_of(find(target))
        options[name] = [f"--{option}" for option in own] + (run if takes_run_options else [])
    operands = {"completion": get_args(Shell), "list": get_args(Listed), "datasets": CATALOG}
    operands["claims"] = classes("methods")
    text = SCRIPT.format(
        commands=" ".join([*COMMANDS, "--help", "--version"]),
        options=_cases(options.items(), "options"),
        values=_cases(_values().items(), "names"),
        operands=_cases(operands.items(), "names", indent=8),
    )
    sys.stdout.write(text)


def _values() -> dict[str, list[str]]:
    """Returns the names that options take: configurations of the package and public classes."""
    names = {"--config|-c": _stems(FOLDER), **{f"--{part}": _stems(FOLDER / part) for part in PARTS}}
    kinds: dict[str, Kind] = {"--model": "methods", "--model.attack": "attacks", "--model.defence": "defences"}
    return names | {option: list(classes(kind)) for option, kind in kinds.items()}


def _stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _cases(words: Iterable[tuple[str, Iterable[str]]], variable: str, indent: int = 4) -> str:
    """Writes the branches of a ``case`` that set a variable to words."""
    return "\n".join(f'{" " * indent}{key}) {variable}="{" ".join(dict.fromkeys(values))}" ;;' for key, values in words)
