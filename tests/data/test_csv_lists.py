"""CSV lists of images: labels, class names and captions are those of the file, and anything else is refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.opened_source import OpenedSource, open_source
from robustclip.data.sources.source import labels_of, where_of

IMAGES = {"a/1.png": "cat", "a/2.png": "grün, 猫", "b/3.PNG": "cat", "b/4.png": "dog"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for path in IMAGES:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    return tmp_path


def opened(base: Path, content: str | bytes, name: str = "list.csv", **options: object) -> OpenedSource:
    (base / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_source(DataSource(f"list:{base}/{name}", **options), root=".", split="test")  # type: ignore[arg-type]


def classes(source: OpenedSource, base: Path) -> Mapping[str, str]:
    assert source.dataset is not None
    paths = [where_of(source.dataset, number) for number in range(len(source.dataset))]  # type: ignore[arg-type]
    labels = labels_of(source.dataset) or ()
    return {str(Path(p).relative_to(base)): source.task.label_names[n] for p, n in zip(paths, labels, strict=True)}


def lines(header: Sequence[str], *, separator: str = ",", end: str = "\n", start: str = "") -> str:
    rows = [header, *([start + path, f'"{name}"'] for path, name in IMAGES.items())]
    return end.join(separator.join(row) for row in rows) + end


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (lines(["path", "class"]), "list.csv"),
        ("\ufeff" + lines(["path", "class"], separator=";", end="\r\n"), "list.csv"),
        (lines(["Path", " Class"], separator="\t"), "list.tsv"),
        (lines(["path", "class"]) + "\n  \n", "LIST.CSV"),
    ],
    ids=["commas", "a spreadsheet's semicolons, mark and line ends", "tabs", "blank lines"],
)
def test_class_names_come_from_the_file(base: Path, content: str, name: str) -> None:
    source = opened(base, content, name)
    assert classes(source, base) == IMAGES
    assert source.task.class_names == ("cat", "dog", "grün, 猫")
    assert classes(opened(base, lines(["path", "class"], start=f"{base}/")), base) == IMAGES
    two = "path,class\na/1.png,cat\nb/4.png,dog\n"
    assert opened(base, two, class_names={"dog": "hound", "cat": "tom"}).task.label_names == ("hound", "tom")


def test_numbers_need_names_and_keep_them(base: Path) -> None:
    numbers = "label,path\n1,a/1.png\n0,b/4.png\n"
    with pytest.raises(ValueError, match="give `class_names`"):
        opened(base, numbers)
    assert classes(opened(base, numbers, class_names=["dog", "cat"]), base) == {"a/1.png": "cat", "b/4.png": "dog"}
    both = "path,label,class\na/1.png,1,cat\nb/4.png,0,dog\n"
    assert opened(base, both).task.class_names == ("dog", "cat")
    with pytest.raises(ValueError, match="'dog' as label 0, but at place 1"):
        opened(base, both, class_names=["cat", "dog"])


def test_a_class_that_only_the_list_of_another_split_has_keeps_its_place(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (base / "my_train.csv").write_text("path,class\na/1.png,cat\na/2.png,bird\nb/4.png,dog\n")
    (base / "my_test.csv").write_text("path,class\nb/3.PNG,cat\nb/4.png,dog\n")
    source = open_source(f"list:{base}/my_{{split}}.csv", root=".", split="test")
    assert source.task.class_names == ("bird", "cat", "dog")
    assert "no image of 1 of its 3 classes: 'bird'" in caplog.text
    (base / "my_val.csv").write_text("path,class,caption\na/1.png,cat,x\n")
    with pytest.raises(ValueError, match=r"my_test.csv and .*my_val.csv must have the same columns"):
        open_source(f"list:{base}/my_{{split}}.csv", root=".", split="test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a/1.png,0\n", r"must begin with a line of column names: `path`, .* found 'a/1.png', '0'"),
        ("", r"must begin with a line of column names: .* found an empty file"),
        ("path,class\n\n", r"has a line of column names and no image"),
        ("path,class\na/1.png,grey, cat\n", r"line 2 of list .* has 3 values for 2 columns; .* in quotes"),
        ("path,class\na/1.png,\n", r"line 2 of list .* has no class"),
        ("path,label\na/1.png,cat\n", r"must have a number from 0 as `label`, found 'cat'; names are a `class`"),
        ("path,class\na/1.png,cat\na/1.png,dog\n", r"has .*a/1.png in two classes"),
        (
            "path,class\na/1.png,cat\nb/4.png,dog\n./a/1.png,cat\n",
            r"names 1 images more than once, the first .*a/1.png",
        ),
        ("path,class,caption\na/1.png,cat,x\na/1.png,cat,x\n", r"names 1 images more than once"),
        ("path,class\na/9.png,cat\nb/4.png,dog\n", r"names 1 images that do not exist, the first .*a/9.png$"),
        ("path,class\na\\1.png,cat\nb/4.png,dog\n", r"do not exist, .*; paths have / and no \\"),
        ("path,label,class\na/1.png,0,cat\nb/4.png,0,dog\n", r"has label 0 for 'cat' and for 'dog'"),
        ('path,class\na/1.png,"cat\n', r"is no CSV file: .* in line 2"),
        ("path,class\na/1.png,grün\n".encode("latin-1"), r"is not UTF-8"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line(base: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        opened(base, content)
    assert "\n" not in str(error.value)


def test_columns_that_are_not_read_are_reported(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(base, "path,class,split\na/1.png,cat,train\nb/4.png,dog,test\n")
    assert "has columns that are not read: 'split'" in caplog.text


@pytest.mark.parametrize("order", [None, ["dog", "cat"]])
def test_captions_are_read_beside_the_images(base: Path, order: list[str] | None) -> None:
    text = 'path,class,caption\na/1.png,cat,"grey, small"\nb/4.png,dog,big\na/1.png,cat,asleep\nb/3.PNG,cat,\n'
    (base / "list.csv").write_text(text)
    source = DataSource(f"list:{base}/list.csv", class_names=order)
    data = CLIPDataModule(train=source, test=source, captions="list", holdout=0, image_size=8, batch_size=1)
    data.setup("fit")
    found = {}
    for batch in data.train_dataloader():
        (found[Path(where_of(data._train.dataset, int(batch.index[0]))).name],) = batch.captions
    assert found.pop("1.png") in ("grey, small", "asleep")
    assert found == {"4.png": "big", "3.PNG": ""}


def test_captions_of_a_list_without_them_are_refused(base: Path) -> None:
    (base / "list.csv").write_text("path,class\na/1.png,cat\nb/4.png,dog\n")
    data = CLIPDataModule(train=f"list:{base}/list.csv", captions="list", holdout=0, image_size=8, batch_size=1)
    data.setup("fit")
    with pytest.raises(ValueError, match="a column `caption` in their list"):
        data.train_dataloader()
