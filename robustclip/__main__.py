"""Entry of ``python -m robustclip``."""

import sys

from robustclip.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
