"""Local paths and URLs in settings: a URL that cannot be read is refused instead of being used as a path."""

import re
from collections.abc import Sequence
from pathlib import Path

# `x:/` is a URL for any x, since pathlib joins slashes; `x:` alone only if x names a store or a protocol. A single
# letter is a drive of Windows.
SCHEME = re.compile(
    r"([a-z][a-z0-9+.-]+):/|(s3[an]?|gs|gcs|hf|az|adl|abfss?|wasbs?|oss|oci|hdfs|webhdfs|ftps?|sftp|ssh|https?|file):",
    re.IGNORECASE,
)


def local_path(path: str | Path, name: str) -> Path:
    """Converts a setting to a path of the local file system.

    Args:
        path: path as the user gave it.
        name: name of the setting, for the message.

    Raises:
        ValueError: the path is a URL.
    """
    return Path(located(path, "", name))


def located(path: str | Path, root: str, name: str, schemes: Sequence[str] = ()) -> str:
    """Resolves a path below a root folder; readable URLs are returned unchanged.

    Args:
        path: path as the user gave it; relative paths start at the root.
        root: local folder; ``~`` stands for the home folder.
        name: name of the setting, for the message.
        schemes: beginnings of the URLs that can be read, such as ``https://``.

    Raises:
        ValueError: the path, or the root that it needs, is a URL of another scheme.
    """
    if schemes and str(path).startswith(tuple(schemes)):
        return str(path)
    for text, setting in ((str(path), name), (str(root), "root")):
        if match := SCHEME.match(text):
            known = ", ".join(["a local path", *schemes])
            raise ValueError(f"{setting} {text!r} has the URL scheme {match[0].strip('/')!r}; it must be {known}")
    return str(Path(root).expanduser() / path)
