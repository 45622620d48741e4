"""Versions and commit of the code behind a result."""

import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

PACKAGES = ("robustclip", "torch", "torchvision", "lightning", "open_clip_torch", "torchmetrics", "torchattacks")


def versions() -> dict[str, str]:
    """Returns the versions of this package and of the installed packages that numbers depend on."""
    installed = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # torchattacks is an extra
            installed[name] = metadata.version(name)
    return installed


def commit() -> str | None:
    """Returns the commit of the code that runs; None outside of a git checkout."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None
