"""A changed definition of a data set needs a new version: classes, prompts, split and label order are recorded."""

import json
from pathlib import Path

from robustclip.data.catalog import CATALOG, CatalogEntry
from robustclip.results.protocol import digest

RECORD = Path(__file__).with_name("catalogue_versions.json")  # name to version and digest, one line for every set


def definition(entry: CatalogEntry) -> str:
    parts = (entry.class_names, entry.templates, entry.split, entry.folders, entry.groups, entry.border)
    return digest(json.loads(json.dumps(parts)))


def test_every_definition_is_the_recorded_one_of_its_version() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record == {name: [entry.version, definition(entry)] for name, entry in CATALOG.items()}, (
        "raise `version` of the changed sets, and record their digests"
    )
