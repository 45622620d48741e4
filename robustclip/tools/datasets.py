"""``robustclip datasets`` lists the published data sets: origin, licence, and whether they are here."""

import csv
import io
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from robustclip import display
from robustclip.data.catalog import ALIASES, CATALOG, CatalogEntry, lookup

STREAM = "https://huggingface.co/datasets/clip-benchmark/wds_{}/resolve/main"  # copies by the authors of clip_benchmark


class Published(NamedTuple):
    """Facts about the publication of a data set.

    Attributes:
        licence: licence of the images in a word, as far as its page states one.
        page: address where it is published.
        stream: name among the public copies of clip_benchmark in the WebDataset layout; empty without a known copy.
    """

    licence: str
    page: str
    stream: str


def datasets(name: str = "", /, root: Path = Path()) -> None:
    """Lists the published data sets of the catalogue, or describes one: licence, origin, layouts and commands.

    Nothing is downloaded. The licences are a pointer, not advice: the page of a set has its terms.

    Args:
        name: name of a set; empty lists all.
        root: folder that holds data, as for ``--data.root``.

    Raises:
        ValueError: the catalogue has no such set.
    """
    if name:
        for key, value in _facts(lookup(name), root).items():
            sys.stdout.write(f"{key:<11} {value}\n")
        return
    table = Table(title=f"data sets of the catalogue; {root} was searched", box=SIMPLE_HEAD)
    for title in ("name", "title", "licence"):
        table.add_column(title, overflow="fold")
    for title in ("classes", "images"):
        table.add_column(title, justify="right")
    table.add_column("here")
    for entry in CATALOG.values():
        numbers = f"{entry.class_count:,}", f"{entry.images:,}"
        table.add_row(
            entry.name, entry.title, published(entry).licence, *numbers, "yes" if any(_places(entry, root)) else "-"
        )
    display.console().print(table)


def published(entry: CatalogEntry) -> Published:
    """Returns the facts about a set's publication; domains of one set share them."""
    facts = _read()
    return facts.get(entry.name) or facts[entry.words or ""]


def _read() -> Mapping[str, Published]:
    text = resources.files("robustclip.data").joinpath("assets", "published.csv").read_text(encoding="utf-8")
    return {name: Published(*facts) for name, *facts in list(csv.reader(io.StringIO(text)))[1:]}


def _facts(entry: CatalogEntry, root: Path) -> dict[str, str]:
    """Returns the lines about one set."""
    licence, page, stream = published(entry)
    kind, _, location = entry.source.partition(":")
    shards = f"WebDataset shards in DATA/{location if kind == 'wds' else entry.name}"
    own = f"torchvision's {location} below DATA, or " if kind == "torchvision" else ""
    here = ", ".join(map(str, _places(entry, root)))
    url = f"wds:{STREAM.format(stream)}"
    return {
        "name": f"{entry.name} ({entry.title})",
        "version": f"{entry.version}",
        "licence": f"{licence}; see its page for the terms",
        "page": page,
        "classes": f"{entry.class_count:,}",
        "images": f"{entry.images:,} in the tested split, {entry.split!r}",
        "prompt": entry.templates[0],
        "layouts": f"{own}{shards}; or folder:PATH with a folder per class",
        "here": here or f"not found below {root}",
        "local": f"robustclip test --config zero_shot --data.root DATA --data.test '[{entry.name}]'",
        "stream": (
            f"""robustclip test --config zero_shot --data.test '[{{source: "{url}", name: {entry.name}}}]'"""
            if stream
            else "no public copy in the WebDataset layout is known"
        ),
    }


def _places(entry: CatalogEntry, root: Path) -> Iterator[Path]:
    """Yields the folders below the root that have a name of the set."""
    _, _, location = entry.source.partition(":")
    others = [other for other, name in ALIASES.items() if name == entry.name]
    for name in dict.fromkeys([location, entry.name, *others]):
        if (root / name).is_dir():
            yield root / name
