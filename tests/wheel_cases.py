"""Run by test_wheel.py: the steps of a page in one process, with the installed wheel and without network.

usage: python wheel_cases.py STEPS.json ANSWERS.json, in the folder of the reader; a step is ["robustclip", WORDS] or
["python", CODE].
"""

import contextlib
import glob
import io
import json
import runpy
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import robustclip
from robustclip.cli.main import run

# What the README's example calls `my_model`: any function from images to logits.
GIVEN = {"my_model": lambda images: 9 * images.mean((2, 3))[:, [2, 0]]}  # blue before red, as folders are sorted


def refuse(*address: Any, **options: Any) -> Any:
    """Stands for every way to another machine."""
    raise OSError(101, f"the test has no network, and something asks for {address}")


def answer(kind: str, content: Any) -> int:
    """Runs one step and returns its status."""
    if kind == "robustclip":
        words = [name for word in content for name in (sorted(glob.glob(word)) if "*" in word else [word])]  # noqa: PTH207
        return run(words)
    Path("block.py").write_text(content)
    runpy.run_path("block.py", init_globals=GIVEN)
    return 0


def main() -> None:
    socket.socket.connect = socket.getaddrinfo = refuse  # type: ignore[method-assign,assignment]
    sys.path.insert(0, str(Path.cwd()))
    steps, target = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    answers = []
    for kind, content in steps:
        start, text = time.monotonic(), io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                status = answer(kind, content)
            except BaseException:
                status = -1
                text.write(traceback.format_exc())
        answers.append({"status": status, "text": text.getvalue()[-20_000:], "seconds": time.monotonic() - start})
    target.write_text(json.dumps({"package": str(Path(robustclip.__file__).parent), "answers": answers}))


if __name__ == "__main__":
    main()
