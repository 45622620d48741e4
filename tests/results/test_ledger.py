"""A ledger survives being killed at any byte."""

import os
from pathlib import Path

import pytest

from robustclip.results.ledger import ATTACK_COLUMNS, SAMPLE_COLUMNS, Ledger, columns, merge, read

ATTACKS = ["pgd", "fgsm"]


def row(number: int, **others: object) -> dict[str, object]:
    return {"id": number, "label": number % 3, "clean": 1, "pgd.by": "pgd", **others}


def test_the_header_names_every_column_of_every_attack() -> None:
    header = columns(ATTACKS)
    assert header == [*SAMPLE_COLUMNS, *(f"{name}.{each}" for name in ATTACKS for each in ATTACK_COLUMNS), "seconds"]
    assert len(set(header)) == len(header)


def test_rows_are_read_as_text_with_empty_values_for_missing_ones(tmp_path: Path) -> None:
    started = Ledger(tmp_path / "a.csv", columns(ATTACKS))
    assert started.rows == []
    started.append([row(7, clean_loss=0.1 + 0.2), row(8, **{"fgsm.by": 'a,"b"'})])
    first, second = read(tmp_path / "a.csv", columns(ATTACKS))
    assert (first["id"], first["label"], first["pgd.by"], first["fgsm.by"]) == ("7", "1", "pgd", "")
    assert float(first["clean_loss"]) == 0.1 + 0.2
    assert second["fgsm.by"] == 'a,"b"'
    assert Ledger(tmp_path / "a.csv", columns(ATTACKS)).rows == [first, second]


def test_a_ledger_cut_at_any_byte_resumes_with_its_whole_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda number: None)  # a thousand of them take seconds
    path = tmp_path / "a.csv"
    started = Ledger(path, columns(ATTACKS))
    for number in range(3):
        started.append([row(2 * number), row(2 * number + 1)])
    content = path.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        again = Ledger(path, columns(ATTACKS))
        whole = content[:size].count(b"\n\n")  # a batch that is cut off is evaluated again as a whole
        assert [each["id"] for each in again.rows] == [str(number) for number in range(2 * whole)]
        for number in range(whole, 3):
            again.append([row(2 * number), row(2 * number + 1)])
        assert path.read_bytes() == content


def test_an_append_is_whole_and_on_the_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = Ledger(tmp_path / "a.csv", columns(ATTACKS))
    before = (tmp_path / "a.csv").stat().st_size
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
    started.append([row(1), row(2)])
    assert sizes == [(tmp_path / "a.csv").stat().st_size]
    assert sizes[0] > before


def test_another_header_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    Ledger(path, columns(["pgd"])).append([row(1)])
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"a\.csv has the columns id,label.*another version"):
        Ledger(path, columns(ATTACKS))
    with pytest.raises(ValueError, match="another version"):
        read(path, columns(ATTACKS))
    assert path.read_bytes() == content
    assert len(read(path)) == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n"])
def test_files_other_than_ledgers_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.csv is no ledger"):
        read(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"b\.csv is no ledger"):
        read(tmp_path / "b.csv")


def test_a_row_of_another_length_is_refused_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,label\n1,2\n3\n")
    with pytest.raises(ValueError, match=r"a\.csv line 3: expected 2 values, found 1"):
        read(tmp_path / "a.csv")


def test_parts_merge_in_the_order_of_ids_and_count_a_sample_once(tmp_path: Path) -> None:
    parts = [tmp_path / name for name in ("part0.csv", "part1.csv")]
    Ledger(parts[0], columns(ATTACKS)).append([row(10), row(2), row(4)])
    Ledger(parts[1], columns(ATTACKS)).append([row(9), row(4), row(1)])
    merged = merge(parts, tmp_path / "all.csv", columns(ATTACKS))
    assert [each["id"] for each in merged] == ["1", "2", "4", "9", "10"]
    assert read(tmp_path / "all.csv", columns(ATTACKS)) == merged


def test_parts_of_unlike_tests_do_not_merge(tmp_path: Path) -> None:
    Ledger(tmp_path / "a.csv", columns(["pgd"])).append([row(1)])
    with pytest.raises(ValueError, match="another version"):
        merge([tmp_path / "a.csv"], tmp_path / "all.csv", columns(ATTACKS))
    assert not (tmp_path / "all.csv").exists()
