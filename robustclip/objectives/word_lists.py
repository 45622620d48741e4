"""Lists of words from files, and the choice of those that are far from a task's classes."""

import re
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from robustclip.paths import local_path
from robustclip.textfiles import check_printable, read_text

WORDNET = ("data.noun", "data.adj")  # names of files in WordNet's own format
# Lexicographer files of nouns and adjectives by their numbers, see WordNet's manual, lexnames(5WN).
LEXICOGRAPHERS = {0: "adj.all", 1: "adj.pert", 44: "adj.ppl"} | dict(
    enumerate(
        (
            *("noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute", "noun.body", "noun.cognition"),
            *("noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group", "noun.location"),
            *("noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession"),
            *("noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance"),
            "noun.time",
        ),
        start=3,
    )
)
MARKER = re.compile(r"\((a|p|ip)\)$")  # place of an adjective, which WordNet appends to the word
COSINES_PER_PIECE = 2**23  # torch.quantile takes at most 2^24 numbers


def read_words(paths: Sequence[str], option: str, left_out: Collection[str] = ()) -> list[str]:
    """Reads words from files with one word a line, or in WordNet's format, sorted and without duplicates.

    Empty lines are skipped, and underscores become spaces.

    Args:
        paths: local files; those named ``data.noun`` and ``data.adj`` are read as WordNet's.
        option: name of the setting, for messages.
        left_out: lexicographer files of WordNet whose words are left out, such as ``noun.person``.

    Raises:
        ValueError: a file cannot be read or has no word, or a lexicographer file is unknown.
    """
    for name in left_out:
        if name not in LEXICOGRAPHERS.values():
            known = ", ".join(LEXICOGRAPHERS.values())
            raise ValueError(f"left_out names {name!r}; WordNet has {known}")
    words: set[str] = set()
    for given in paths:
        path = local_path(given, option)
        try:
            lines = read_text(path).split("\n")
        except OSError as error:
            raise ValueError(f"{option}: {given} cannot be read ({error.strerror}); give a file of words") from error
        read = set(_lemmas(lines, given, left_out) if path.name in WORDNET else map(str.strip, lines))
        for word in read:
            check_printable(word, given)
        if not read - {""}:
            raise ValueError(f"{option}: {given} has no word; write one word a line")
        words |= {word.replace("_", " ") for word in read if word}
    return sorted(words)


def _lemmas(lines: Sequence[str], path: str, left_out: Collection[str]) -> Iterator[str]:
    """Lists the words of all synsets of a WordNet file; its licence is in lines that begin with spaces."""
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("  "):
            continue
        try:
            _, file_number, _, count, *rest = line.split(" ")
            words = rest[: 2 * int(count, 16) : 2]
            is_kept = LEXICOGRAPHERS[int(file_number)] not in left_out
        except (KeyError, ValueError):
            raise ValueError(f"{path} line {number} is no synset of WordNet: {line[:60]!r}") from None
        yield from (MARKER.sub("", word) for word in words if is_kept)


def mined(cosines: Tensor, quantile: float, share: float, *, limit: float | None = None) -> tuple[list[int], Tensor]:
    """Chooses the candidates that are far from nearly all classes, as NegLabel does.

    A candidate's nearness is a quantile, with linear interpolation, of its cosines with all classes. The share of all
    candidates with the lowest nearness is kept, rounded down; of equal ones the first.

    Args:
        cosines: ``(N, C)`` of candidates and classes.
        quantile: quantile in [0, 1]; 1 is the highest cosine.
        share: share of candidates to keep.
        limit: candidates with a higher cosine are never kept; null for no such limit.

    Returns:
        Positions of the kept candidates, the farthest first, and the nearness ``(N,)`` of all; 1 above the limit.
    """
    pieces = torch.split(cosines.double(), max(1, COSINES_PER_PIECE // cosines.shape[1]))
    nearness = torch.cat([piece.quantile(quantile, dim=1) for piece in pieces])
    is_near = torch.zeros_like(nearness, dtype=torch.bool) if limit is None else cosines.amax(1) > limit
    nearness = nearness.masked_fill(is_near, 1.0)
    order = nearness.argsort(stable=True)[: int(share * len(cosines) + 1e-9)].tolist()
    return [position for position in order if not is_near[position]], nearness


def normalised(name: str) -> str:
    """Returns a name in lower case and with spaces for underscores, for comparisons of names."""
    return " ".join(name.replace("_", " ").casefold().split())
