"""One line of a report on a planned run."""

from typing import NamedTuple

OK, INFO, WARNING, PROBLEM = "ok", "info", "warning", "problem"


class Finding(NamedTuple):
    """What was looked at, how it is, and what a person should know of it."""

    check: str
    mark: str
    detail: str
