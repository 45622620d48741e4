"""Matches the labels of a data set with class names, by name and never by position."""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from robustclip.data.catalog import CatalogEntry, plain
from robustclip.names import excerpt
from robustclip.textfiles import check_printable

log = logging.getLogger(__name__)
WORDNET_ID = re.compile(r"n\d{8}")
Groups = tuple[tuple[int, ...], ...] | None


class Named(NamedTuple):
    """The class names of a data set, and how its own labels are renumbered to fit them.

    Attributes:
        names: the ``C`` class names.
        groups: positions of the names of each label; None if every name is a label.
        labels: new label by own label; a missing own label belongs to no class. None keeps the labels.
    """

    names: tuple[str, ...]
    groups: Groups = None
    labels: dict[int, int] | None = None


class NameLists(NamedTuple):
    """Lists of class names from three places, in the order of their precedence.

    Attributes:
        configured: names in the configuration, in label order or by folder.
        shipped: names in the ``classnames.txt`` that comes with the data, in label order.
        entry: data set of the catalogue that has the name of this one.
    """

    configured: Sequence[str] | Mapping[Any, str] | None
    shipped: Sequence[str] | None
    entry: CatalogEntry | None


def match(keys: Sequence[str], names: Sequence[str], cut: str = "") -> dict[int, int]:
    """Finds the position in ``names`` of every key that has the name of exactly one class.

    Args:
        keys: names of classes as they occur in the data.
        names: list of class names.
        cut: regular expression of the text that is removed from both before they are compared.
    """
    own, others = [plain(key, cut) for key in keys], [plain(name, cut) for name in names]
    if own == others:  # a name may occur twice, but the order is the same
        return {number: number for number in range(len(own))}
    counts = Counter(own), Counter(others)
    places = {name: number for number, name in enumerate(others) if counts[1][name] == 1}
    return {number: places[name] for number, name in enumerate(own) if name in places and counts[0][name] == 1}


def join(keys: Sequence[str], lists: NameLists, where: str) -> Named:
    """Names the classes of a data set that has a name for each of its own labels.

    The labels become positions in the first list that has all those names: the list of the configuration, of the data,
    or of the catalogue. The data set's own names serve if there is no list at all.

    Args:
        keys: names of the data set's own labels, such as its folders.
        lists: lists of class names.
        where: start of messages, which names the data set.

    Raises:
        ValueError: names that are in no list, or lists of different lengths.
    """
    titled, entry = _titled(lists), lists.entry
    cut = entry.cut if entry else ""
    matches = {title: match(keys, names, cut) for title, names in titled.items()}
    for title, labels in matches.items():
        if labels and len(labels) + len(_others(keys, labels, entry)) == len(keys):
            return _named(lists, len(titled[title]), where)._replace(labels=labels)
    count = len(next(iter(titled.values()), ()))
    numbers = {number: int(key) for number, key in enumerate(keys) if key.isdecimal() and int(key) < count}
    if not isinstance(lists.configured, Mapping) and len(set(numbers.values())) == len(keys):
        return _named(lists, count, where)._replace(labels=numbers)
    has_own_names = lists.configured is None and lists.shipped is None and not any(matches.values())
    if has_own_names and (entry is None or entry.class_count == len(keys)):
        if equal := [key for key, count in Counter(key.replace("_", " ") for key in keys).items() if count > 1]:
            raise ValueError(f"{where} has several classes that are named {equal[0]!r}; rename their folders")
        return Named(tuple(key.replace("_", " ") for key in keys))
    title = max(matches, key=lambda title: len(matches[title]))
    unknown = excerpt([key for number, key in enumerate(keys) if number not in matches[title]])
    raise ValueError(
        f"{where} has {len(keys)} classes, of which {unknown} are not among the {len(titled[title])} of {title}; "
        "give `class_names` as a mapping from these names to class names, or another `name`"
    )


def by_label(lists: NameLists, where: str, *, is_same_copy: bool) -> Named:
    """Names the classes of a data set whose labels are numbers, in their order.

    Args:
        lists: lists of class names.
        where: start of messages, which names the data set.
        is_same_copy: whether the label order in the catalogue is that of this copy.

    Raises:
        ValueError: no names, names by folder, or another number of classes than in the catalogue.
    """
    entry, count = lists.entry, len(lists.shipped or ())
    if isinstance(lists.configured, Mapping):
        raise ValueError(f"{where} has numbers for labels: `class_names` must be a list, in label order")
    if not lists.configured and not lists.shipped and not (entry and is_same_copy):
        raise ValueError(f"{where} brings no class names; give `class_names`")
    if entry and lists.shipped and not lists.configured and count not in (entry.class_count, *entry.exported):
        known = {plain(name) for name in entry.class_names}
        if unknown := [name for name in lists.shipped if plain(name) not in known]:
            raise ValueError(
                f"{where} has {count} class names in classnames.txt, of which {excerpt(unknown)} are not among the "
                f"{entry.class_count} of {entry.name!r} in the catalogue; give `class_names` or another `name`"
            )
    if lists.configured and lists.shipped and len(lists.configured) == count:
        _check_places(dict(enumerate(lists.shipped)), lists.configured, where)
    return _named(lists, count or None, where)


def _check_places(keys: Mapping[int, str], names: Sequence[str], where: str) -> None:
    """Refuses a list of class names that has the name of a label at the place of another label."""
    places = match(list(keys.values()), names)
    for number, (label, key) in enumerate(keys.items()):
        if (place := places.get(number, label)) != label:
            raise ValueError(
                f"{where} has {key!r} as label {label}, but at place {place} of the class names; "
                "put these in label order"
            )


def by_list(folders: Mapping[int, str], lists: NameLists, where: str) -> Named:
    """Names the classes of a list of images, which gives a number and a folder for each label.

    Args:
        folders: folder of the images of each label.
        lists: lists of class names; those of the configuration and of the data are in the order of the numbers.
        where: start of messages, which names the data set.

    Raises:
        ValueError: a folder has the name of another label; or, without a list of names, labels have gaps or two labels
            have one folder.
    """
    if (lists.configured and not isinstance(lists.configured, Mapping)) or (lists.shipped and not lists.configured):
        named = by_label(lists, where, is_same_copy=False)
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
    return join(keys, lists, where)


def check_names(names: Sequence[str], where: str) -> None:
    """Refuses class names that suit no prompt: WordNet ids, and names with control characters.

    Args:
        names: names of the labels.
        where: start of messages, which names the data set.

    Raises:
        ValueError: a name is one of these.
    """
    if ids := [name for name in names if WORDNET_ID.fullmatch(name)]:
        raise ValueError(
            f"{where} has WordNet ids for class names, {excerpt(ids)}; give `name: imagenet` or `name: tiny_imagenet`, "
            "or `class_names` as a mapping from ids to names"
        )
    for name in names:
        check_printable(name, f"{where}: class name {name!r}")


def warn_of_missing(labels: Sequence[int], names: Sequence[str], where: str) -> None:
    """Warns of classes without an image, which remain possible predictions.

    Args:
        labels: labels of all samples.
        names: names of all labels.
        where: start of the message, which names the data set.
    """
    present = set(labels)
    if missing := [name for label, name in enumerate(names) if label not in present]:
        log.warning("%s has no image of %d of its %d classes: %s", where, len(missing), len(names), excerpt(missing))


def _titled(lists: NameLists) -> dict[str, Sequence[str]]:
    """Returns every list that has one name for a label, by its title in messages."""
    entry, configured = lists.entry, lists.configured
    if isinstance(configured, Mapping):
        return {"the keys of `class_names`": list(configured)}
    titled = {"`class_names`": configured, "classnames.txt": lists.shipped}
    if entry:
        titled[f"the published folders of {entry.name!r}"] = entry.folders
        titled[f"{entry.name!r} in the catalogue"] = entry.class_names if entry.groups is None else None
    return {title: names for title, names in titled.items() if names}


def _others(keys: Sequence[str], labels: Mapping[int, int], entry: CatalogEntry | None) -> list[str]:
    """Lists folders that are published with a set, but whose classes do not belong to it."""
    if entry is None or not entry.others:
        return []
    return [key for number, key in enumerate(keys) if number not in labels and re.fullmatch(entry.others, plain(key))]


def _named(lists: NameLists, count: int | None, where: str) -> Named:
    """Returns the class names with the highest precedence, and their groups."""
    configured, shipped, entry = lists
    own = list(configured.values()) if isinstance(configured, Mapping) else configured
    if not own and shipped and not (entry and entry.groups and len(shipped) == entry.class_count):
        own = shipped
    names = tuple(own or (entry.class_names if entry else ()))
    groups = entry.groups if entry and len(names) == len(entry.class_names) else None
    labels = len(groups or names)
    if count not in (None, labels):
        raise ValueError(f"{where} has {labels} class names for its {count} labels; give one for each in `class_names`")
    return Named(names, groups)
