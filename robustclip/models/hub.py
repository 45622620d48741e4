"""Repositories of the Hugging Face Hub as sources of models: ``hf-hub:ORG/NAME``, or ``hf-hub:ORG/NAME@REVISION``.

The network is used only for names of this form. Files are downloaded to the cache of ``huggingface_hub``, which obeys
``HF_ENDPOINT``, ``HF_HUB_CACHE``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE``.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from robustclip.models.tensor_files import one_line

PREFIX = "hf-hub:"
NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
SETTINGS = ("*.json", "*.txt", "*.txt.gz", "*.model")  # configurations and tokenizers, without weights


class Snapshot(NamedTuple):
    """The files of one commit of a repository in the local cache.

    Args:
        name: name as the user gave it.
        repository: ``ORG/NAME``.
        commit: hash of the commit.
        folder: folder with the files that have been downloaded.
    """

    name: str
    repository: str
    commit: str
    folder: Path


def is_hub_name(source: object) -> bool:
    """Checks whether a source of a model names a repository of the Hub."""
    return str(source).startswith(PREFIX)


@cache  # so that a branch that moves meanwhile is not read at two commits by one process
def fetch(name: str) -> Snapshot:
    """Downloads the small files of a repository: configurations and tokenizers, but no weights.

    Raises:
        ValueError: the name is malformed, or the repository cannot be read.
    """
    match = NAME.fullmatch(name.removeprefix(PREFIX))
    if match is None:
        raise ValueError(f"a repository is given as {PREFIX}ORG/NAME or {PREFIX}ORG/NAME@REVISION, got {name!r}")
    folder = _download(name, match[1], match[2], SETTINGS)
    return Snapshot(name, match[1], folder.name, folder)


def fetch_weights(snapshot: Snapshot, *choices: Sequence[str]) -> None:
    """Downloads the weights of a repository, of the first choice that it has.

    Args:
        snapshot: repository at a commit.
        choices: patterns of file names, as of safetensors before those of other formats.

    Raises:
        ValueError: the repository has none of these files, or cannot be read.
    """
    for patterns in choices:
        _download(snapshot.name, snapshot.repository, snapshot.commit, patterns)
        if any(path for pattern in patterns for path in snapshot.folder.glob(pattern)):
            return
    names = ", ".join(pattern for patterns in choices for pattern in patterns)
    raise ValueError(f"{snapshot.name} has no weights that are read, at commit {snapshot.commit}; expected {names}")


def _download(name: str, repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Downloads the files that match and are not in the cache, and returns the folder of the commit."""
    from huggingface_hub import constants, errors, snapshot_download
    from huggingface_hub.utils import logging

    set_verbosity: Any = logging.set_verbosity_error
    set_verbosity()  # else it warns where no file matches, which is no fault here
    hub = constants.ENDPOINT
    # The bases of this error are those of all errors of the HTTP client, which depends on the version.
    failures: tuple[Any, ...] = (OSError, ValueError, *errors.HfHubHTTPError.__bases__)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{name} is gated: accept its terms at {hub}/{repository}, then log in by `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{hub} has no repository {repository!r}, or it is private; check the name, or log in by `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"{repository!r} at {hub} has no revision {revision!r}; give a branch, tag or commit"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name} is not complete in the local cache, and {hub} cannot be reached; check the network and"
            " HF_HUB_OFFLINE, or download the repository elsewhere and give its folder"
        ) from error
    except failures as error:
        raise ValueError(f"{name} cannot be read from {hub}: {one_line(error)}") from error
