"""Joins the labels of a data set to class names, by name and never by position."""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from robustclip.data.catalog import CatalogEntry, plain
from robustclip.textfiles import check_printable

log = logging.getLogger(__name__)
WORDNET_ID = re.compile(r"n\d{8}")
SHOWN = 3  # names in a message
Groups = tuple[tuple[int, ...], ...] | None


class Named(NamedTuple):
    """Class names of a data set.

    Attributes:
        names: the C class names.
        groups: of each label the positions of its names; None if every name is a label.
        labels: new label by own label; own labels that are missing belong to no class. None keeps the labels.
    """

    names: tuple[str, ...]
    groups: Groups = None
    labels: dict[int, int] | None = None


class Words(NamedTuple):
    """Class names from every place that may give them, first things first.

    Attributes:
        given: of the configuration, in label order, or by folder.
        beside: of the ``classnames.txt`` beside the data, in label order.
        entry: data set of the catalogue that has this name.
    """

    given: Sequence[str] | Mapping[Any, str] | None
    beside: Sequence[str] | None
    entry: CatalogEntry | None


def shown(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def match(keys: Sequence[str], names: Sequence[str], cut: str = "") -> dict[int, int]:
    """Positions in `names` of those keys that have the name of exactly one class.

    Args:
        keys: names of classes as the data have them.
        names: a list of class names.
        cut: pattern that is removed from both before they are compared.
    """
    own, others = ([plain(name, cut) for name in each] for each in (keys, names))
    if own == others:  # equal names at several places, but in one order
        return {number: number for number in range(len(own))}
    counts = Counter(own), Counter(others)
    places = {name: number for number, name in enumerate(others) if counts[1][name] == 1}
    return {number: places[name] for number, name in enumerate(own) if name in places and counts[0][name] == 1}


def join(keys: Sequence[str], words: Words, where: str) -> Named:
    """Names the classes of a data set that has a name for each of its own labels.

    The labels become positions in the first list that has all those names: the configuration's, the one beside the
    data, the catalogue's. If there is no list at all, the data's own names are taken.

    Args:
        keys: names of the data set's own labels, such as its folders.
        words: lists of class names.
        where: data set, for messages.

    Raises:
        ValueError: names that are in no list, or lists of different lengths.
    """
    lists, entry = _lists(words), words.entry
    cut = entry.cut if entry else ""
    matches = {title: match(keys, names, cut) for title, names in lists.items()}
    for title, labels in matches.items():
        if labels and len(labels) + len(_others(keys, labels, entry)) == len(keys):
            return _named(words, len(lists[title]), where)._replace(labels=labels)
    count = len(next(iter(lists.values()), ()))
    numbers = {number: int(key) for number, key in enumerate(keys) if key.isdecimal() and int(key) < count}
    if not isinstance(words.given, Mapping) and len(set(numbers.values())) == len(keys):
        return _named(words, count, where)._replace(labels=numbers)
    has_own_names = words.given is None and words.beside is None and not any(matches.values())
    if has_own_names and (entry is None or entry.class_count == len(keys)):
        if equal := [key for key, count in Counter(key.replace("_", " ") for key in keys).items() if count > 1]:
            raise ValueError(f"{where} has several classes that are named {equal[0]!r}; rename their folders")
        return Named(tuple(key.replace("_", " ") for key in keys))
    title = max(matches, key=lambda each: len(matches[each]))
    unknown = [key for number, key in enumerate(keys) if number not in matches[title]]
    raise ValueError(
        f"{where} has {len(keys)} classes, of which {shown(unknown)} are not among the {len(lists[title])} of {title}; "
        "give `class_names` as a mapping from these names to class names, or another `name`"
    )


def by_label(words: Words, where: str, *, is_same_copy: bool) -> Named:
    """Names the classes of a data set whose labels are numbers, in their order.

    Args:
        words: lists of class names.
        where: data set, for messages.
        is_same_copy: whether the catalogue describes the label order of this very copy.

    Raises:
        ValueError: no names, names by folder, or a number of classes that is not the catalogue's.
    """
    entry, count = words.entry, len(words.beside or ())
    if isinstance(words.given, Mapping):
        raise ValueError(f"{where} has numbers for labels: `class_names` must be a list, in label order")
    if not words.given and not words.beside and not (entry and is_same_copy):
        raise ValueError(f"{where} brings no class names; give `class_names`")
    if entry and words.beside and not words.given and count not in (entry.class_count, *entry.exported):
        known = {plain(name) for name in entry.class_names}
        if unknown := [name for name in words.beside if plain(name) not in known]:
            raise ValueError(
                f"{where} has {count} class names in classnames.txt, of which {shown(unknown)} are not among the "
                f"{entry.class_count} of {entry.name!r} in the catalogue; give `class_names` or another `name`"
            )
    if words.given and words.beside and len(words.given) == count:
        _check_places(dict(enumerate(words.beside)), words.given, where)
    return _named(words, count or None, where)


def _check_places(keys: Mapping[int, str], names: Sequence[str], where: str) -> None:
    """Refuses a list of class names that has the name of a label at the place of another."""
    for (label, key), place in zip(keys.items(), _places(list(keys.values()), names), strict=True):
        if place not in (None, label):
            raise ValueError(
                f"{where} has {key!r} as label {label}, but at place {place} of the class names; "
                "put these in label order"
            )


def _places(keys: Sequence[str], names: Sequence[str]) -> list[int | None]:
    labels = match(keys, names)
    return [labels.get(number) for number in range(len(keys))]


def by_list(folders: Mapping[int, str], words: Words, where: str) -> Named:
    """Names the classes of a list of images, which has numbers for labels, and folders with the names of classes.

    Args:
        folders: by label.
        words: lists of class names; a list of the configuration or beside the data goes by number.
        where: data set, for messages.

    Raises:
        ValueError: a folder whose name belongs to another label, or, without a list of names, labels with gaps or one
            folder for two labels.
    """
    if (words.given and not isinstance(words.given, Mapping)) or (words.beside and not words.given):
        named = by_label(words, where, is_same_copy=False)
        if named.groups is None:
            _check_places(folders, named.names, where)
        return named
    if sorted(folders) != list(range(len(folders))):
        absent = next(label for label in range(len(folders) + 1) if label not in folders)
        raise ValueError(
            f"{where} has {len(folders)} labels up to {max(folders, default=0)}, and none is {absent}: labels must be "
            "0 to C-1 without gaps; give the names of all C classes as `class_names` or in classnames.txt"
        )
    keys = [folders[label] for label in range(len(folders))]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(
            f"{where} has several labels for the folder {repeated[0]!r}; give `class_names`, in label order"
        )
    return join(keys, words, where)


def check_names(names: Sequence[str], where: str) -> None:
    """Refuses names that no prompt can use: WordNet ids, and names with control characters.

    Args:
        names: of the labels.
        where: data set, for messages.

    Raises:
        ValueError: one of these.
    """
    if ids := [name for name in names if WORDNET_ID.fullmatch(name)]:
        raise ValueError(
            f"{where} has WordNet ids for class names, {shown(ids)}; give `name: imagenet` or `name: tiny_imagenet`, "
            "or `class_names` as a mapping from ids to names"
        )
    for name in names:
        check_printable(name, f"{where}: class name {name!r}")


def warn_of_missing(labels: Sequence[int], names: Sequence[str], where: str) -> None:
    """Reports classes without an image, which stay among the answers.

    Args:
        labels: of all samples.
        names: of all labels.
        where: data set, for the message.
    """
    present = set(labels)
    if missing := [name for label, name in enumerate(names) if label not in present]:
        log.warning("%s has no image of %d of its %d classes: %s", where, len(missing), len(names), shown(missing))


def _lists(words: Words) -> dict[str, Sequence[str]]:
    """Every list that has one name for a label, by its title."""
    entry, given = words.entry, words.given
    if isinstance(given, Mapping):
        return {"the keys of `class_names`": list(given)}
    found = {"`class_names`": given, "classnames.txt": words.beside}
    if entry:
        found[f"the published folders of {entry.name!r}"] = entry.folders
        found[f"{entry.name!r} in the catalogue"] = entry.class_names if entry.groups is None else None
    return {title: names for title, names in found.items() if names}


def _others(keys: Sequence[str], labels: Mapping[int, int], entry: CatalogEntry | None) -> list[str]:
    """Folders whose classes do not belong to the set that they are published with."""
    if entry is None or not entry.others:
        return []
    return [key for number, key in enumerate(keys) if number not in labels and re.fullmatch(entry.others, plain(key))]


def _named(words: Words, count: int | None, where: str) -> Named:
    """Class names and groups of a number of labels."""
    given, entry = words.given, words.entry
    own = list(given.values()) if isinstance(given, Mapping) else given
    if not own and words.beside and not (entry and entry.groups and len(words.beside) == entry.class_count):
        own = words.beside
    names = tuple(own or (entry.class_names if entry else ()))
    groups = entry.groups if entry and len(names) == len(entry.class_names) else None
    labels = len(groups or names)
    if count not in (None, labels):
        raise ValueError(f"{where} has {labels} class names for its {count} labels; give one for each in `class_names`")
    return Named(names, groups)
