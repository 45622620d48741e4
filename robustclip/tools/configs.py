"""``robustclip configs`` lists or copies the configurations that come with the package, which options take by name."""

import difflib
import sys
from itertools import takewhile
from pathlib import Path

from robustclip.persistence import atomic_folder
from robustclip.textfiles import read_text

FOLDER = Path(__file__).parents[1] / "configs"
PARTS = ("data", "evaluation", "trainer")  # sections whose configurations have a folder of their own
SUFFIX = ".yaml"


def packaged(option: str, value: str) -> Path | None:
    """Finds the packaged configuration that an option names; None if it names none, or a file of the user.

    Args:
        option: ``config``, or a section in `PARTS`.
        value: name of a configuration, such as ``arf``, ``arf.yaml`` or ``configs/arf.yaml``.
    """
    if Path(value).is_file() or option not in ("config", *PARTS):
        return None
    folder = FOLDER if option == "config" else FOLDER / option
    name = value.removeprefix("configs/").removeprefix("" if option == "config" else f"{option}/")
    path = folder / (name if name.endswith(SUFFIX) else f"{name}{SUFFIX}")
    return path if path.is_file() and ".." not in path.relative_to(FOLDER).parts else None


def remedy(option: str, value: str) -> str:
    """Advises on a name that `packaged` does not find.

    Args:
        option: see `packaged`.
        value: name as given.
    """
    close = close_name(option, value)
    return f"did you mean {close}?" if close else "`robustclip list configs` lists those of the package"


def close_name(option: str, value: str) -> str | None:
    """Finds the packaged configuration with the most similar name; None if no name is similar.

    Args:
        option: see `packaged`.
        value: name as given.
    """
    folder = FOLDER if option == "config" else FOLDER / option
    names = sorted(path.stem for path in folder.glob(f"*{SUFFIX}"))
    return next(iter(difflib.get_close_matches(Path(value).stem, names, n=1)), None)


def configs(copy: Path | None = None) -> None:
    """Lists the configurations of the package with one line each, or copies them.

    Options take them by name: ``--config arf``, and their parts ``--data fifteen``, ``--evaluation cascade`` and
    ``--trainer gpu``. A file of that name in the current folder has precedence.

    Args:
        copy: new folder for a copy of all configurations; null lists them.

    Raises:
        ValueError: the folder exists.
    """
    if copy is not None:
        if copy.exists():
            raise ValueError(f"copy {str(copy)!r} exists and is never overwritten; choose another folder")
        with atomic_folder(copy) as aside:
            for path in _files():
                target = aside / path.relative_to(FOLDER)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(path.read_bytes())
        sys.stdout.write(f"{copy}\n")
        return
    names = {str(path.relative_to(FOLDER).with_suffix("")): path for path in _files()}
    width = max(map(len, names))
    for name, path in names.items():
        comment = takewhile(lambda line: line.startswith("# "), read_text(path).split("\n"))
        sentence, _, _ = " ".join(line[2:].strip() for line in comment).partition(". ")
        sys.stdout.write(f"{name:<{width}}  {sentence.removesuffix('.')}\n")


def _files() -> list[Path]:
    return [*sorted(FOLDER.glob(f"*{SUFFIX}")), *sorted(FOLDER.glob(f"*/*{SUFFIX}"))]
