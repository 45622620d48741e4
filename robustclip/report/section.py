"""Defines the contract of a report section."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from robustclip.report.blocks import Block
from robustclip.report.view import View


class Section(ABC):
    """One section of the report; a subclass of a user is accepted by its class path.

    ``title`` is the heading. ``blocks`` receives the runs in the order of the command line and returns the content, as
    blocks of `robustclip.report.blocks`. A section without blocks is left out of the page. Tables that are not
    folded away are written to the Markdown file too.
    """

    title: str

    @abstractmethod
    def blocks(self, views: Sequence[View]) -> Sequence[Block]:
        """Returns the content of the section for these runs, from top to bottom."""
