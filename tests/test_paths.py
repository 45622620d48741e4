"""URLs where a local path is expected: refused by name, never taken for a path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustclip.cli.main import run
from robustclip.data import CLIPDataModule
from robustclip.data.opened_source import open_source
from robustclip.data.sources.wds import REMOTE
from robustclip.evaluation.writer import ResultsWriter
from robustclip.paths import local_path, located
from robustclip.results.run import Run
from robustclip.tools.retrieval.pairs import pool_shards
from robustclip.tools.retrieve import Settings

SCHEMES = ["s3", "S3", "gs", "hf", "ftp", "az", "http", "https", "file", "memory", "git+ssh"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rest", ["://bucket/a", ":///a", ":/a"])  # pathlib makes the last of the first
def test_a_url_is_no_path(scheme: str, rest: str) -> None:
    for path in (f"{scheme}{rest}", Path(f"{scheme}{rest}")):
        with pytest.raises(
            ValueError, match=rf"data.root '{scheme}:/.*' has the URL scheme '{scheme}:'".replace("+", r"\+")
        ):
            local_path(path, "data.root")


@pytest.mark.parametrize("path", ["s3:bucket", "S3:bucket/a", "gs:x", "hf:user/set", "ftp:x"])
def test_a_store_is_known_without_slashes(path: str) -> None:
    with pytest.raises(ValueError, match="has the URL scheme"):
        local_path(path, "results.folder")


@pytest.mark.parametrize("path", ["a", "/a/b", "~/a", "run-12:30:01", "a b/c:d", "x:/y", "s3", "s3/x", "./s3:/x", "."])
def test_other_names_are_paths(path: str) -> None:
    assert local_path(path, "root") == Path(path)


@pytest.mark.parametrize("name", ["..", ".", "../a", "a/../../b", "/tmp/a"])
def test_a_test_stays_in_the_folder_of_all_results(name: str) -> None:
    with pytest.raises(ValueError, match=r"results\.name must be a folder below results\.folder, got "):
        ResultsWriter("results", name)


def test_a_path_starts_at_the_root_and_a_url_of_a_known_scheme_stays() -> None:
    assert located("a", "/b", "pool", REMOTE) == "/b/a"
    assert located("/a", "s", "pool", REMOTE) == "/a"
    assert located("a", "~", "pool") == str(Path.home() / "a")
    for url in ("https://h/a", "http://h/a", "file:///a"):
        assert located(url, "/b", "pool", REMOTE) == url
    with pytest.raises(ValueError, match=r"'s3:'; it must be a local path, http://, https://, file://"):
        located("s3://a", "/b", "pool", REMOTE)


URL = "s3://bucket/a"
PLACES: dict[str, tuple[Callable[[], Any], str]] = {
    "wds": (lambda: open_source(f"wds:{URL}", root=".", split="test"), "data source"),
    "folder": (lambda: open_source("folder:https://h/a", root=".", split="test"), "data source"),
    "list": (lambda: open_source("list:https://h/a.txt", root=".", split="test"), "data source"),
    "root": (lambda: open_source("torchvision:CIFAR10", root=URL, split="test"), "root"),
    "data.root": (lambda: CLIPDataModule(root=URL), "data.root"),
    "data.features": (lambda: CLIPDataModule(features=URL), "data.features"),
    "data.captions": (lambda: CLIPDataModule(captions=URL), "data.captions"),
    "data.anchors": (lambda: CLIPDataModule(anchors=URL), "data.anchors"),
    "data.captioned": (lambda: CLIPDataModule(captioned=URL), "data.captioned"),
    "results.folder": (lambda: ResultsWriter(folder=URL), "results.folder"),
    "results.baseline": (lambda: ResultsWriter(baseline=URL), "results.baseline"),
    "run": (lambda: Run.open(Path(URL)), "run"),
    "pool": (lambda: pool_shards([f"wds:{URL}"], "."), "pool"),
    "pool of shards": (lambda: pool_shards([f"wds:{URL}/{{0..3}}.tar"], "."), "pool"),
    "cache": (lambda: Settings(data="shapes:colours", pool=[], guard=[], cache=URL), "cache"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_url_is_refused_by_name_wherever_a_path_enters(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    use, name = PLACES[place]
    with pytest.raises(ValueError, match=rf"^{name} '.*' has the URL scheme '(s3|https):'"):
        use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        f"table {URL}",
        f"compare {URL} .",
        f"report {URL}",
        f"report . --out {URL}",
        f"verify {URL}",
        f"import {URL} --out x",
        f"import x --out {URL}",
        f"export {URL} --out x",
        f"retrieve --data shapes:colours --pool wds:x --out {URL}",
        f"caption --data shapes:colours --captioner x --out {URL}",
    ],
)
def test_commands_refuse_urls_in_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(command.split()) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "has the URL scheme 's3:'" in line
    assert not list(tmp_path.iterdir())
