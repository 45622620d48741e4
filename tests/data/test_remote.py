"""Files on a web server that misbehaves: read whole after a failure that passes, refused in one line otherwise."""

import functools
import http.server
import io
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ShardWriter, add_member

from robustclip.data.opened_source import open_source
from robustclip.data.sources import _remote as remote
from robustclip.data.sources._remote import CHUNK, HttpFile
from robustclip.data.sources.streams import StreamedShards, read_shard
from robustclip.data.sources.tar import MAX_TEXT_BYTES
from robustclip.data.sources.wds import IndexedShards, list_shards, read_lines, read_text
from robustclip.tools.retrieval.pairs import pool_shards

TRIES = 4
CONTENT = bytes(range(256)) * 1024  # 256 KiB, so that an offset by one is seen


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` by path; ``script`` says what befalls one request after the other, then nothing does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.script: list[str] = []
        self.requests: list[tuple[str, str | None]] = []
        self.has_ranges = self.has_tags = True
        self.cut_for_good: int | None = None
        self.stalled = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        server, asked = self.server, self.headers["Range"]
        server.requests.append((self.path, asked))
        event, _, number = (server.script.pop(0) if server.script else "").partition(" ")
        content = server.files.get(self.path)
        if event == "status" or content is None:
            self.send_error(int(number or 404))
            return
        if event == "close":
            self.connection.close()
            return
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.has_ranges else 0
        body = content[begin:]
        self.send_response(206 if asked and server.has_ranges else 200)
        if asked and server.has_ranges:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        if server.has_tags:
            self.send_header("ETag", f'"{hash(content)}"' if event != "changed" else '"another"')
        self.send_header("Content-Length", str(int(number) if event == "length" else len(body)))
        self.end_headers()
        end = int(number) if event in ("drop", "stall") else len(body)
        if server.cut_for_good is not None:
            end = min(end, max(0, server.cut_for_good - begin))
        self.wfile.write(body[:end])
        if event == "stall":
            server.stalled.wait(5)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on the loopback interface, which a reader asks again at once."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "RETRY_DELAYS", (0.0,) * (TRIES - 1))
    with Server() as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01), daemon=True)
        thread.start()
        server.files["/a"] = CONTENT
        yield server
        server.shutdown()
        thread.join()


def content(server: Server, path: str = "/a") -> bytes:
    with HttpFile(f"{server.url}{path}") as file:
        parts = []
        while part := file.read(10_001):
            parts.append(part)
    return b"".join(parts)


PASSING = {
    "one 503": ["status 503"],
    "too many requests": ["status 429", "status 429"],
    "timeout at the gateway": ["status 504", "status 408"],
    "closed at once": ["close", "close"],
    "dropped in the body": ["drop 70001", "drop 3"],
    "dropped after the headers": ["drop 0", "status 500", "drop 100000"],
}


@pytest.mark.parametrize("script", PASSING.values(), ids=PASSING)
@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_failure_that_passes_loses_and_repeats_nothing(server: Server, script: list[str], has_ranges: bool) -> None:
    server.script, server.has_ranges = [*script], has_ranges
    assert content(server) == CONTENT
    assert len(server.requests) == len(script) + 1
    assert not server.script


def test_failures_with_progress_between_them_are_counted_separately(server: Server) -> None:
    server.script = ["drop 66000", "close"] * 3
    assert len(server.script) > TRIES
    assert content(server) == CONTENT


def test_only_the_missing_bytes_are_requested_again(server: Server) -> None:
    server.script = ["drop 70001"]
    content(server)
    assert [asked for _, asked in server.requests] == [None, "bytes=70001-"]


def test_a_server_that_stops_sending_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 0.3)
    server.script = ["stall 70001", "stall 0"]
    assert content(server) == CONTENT
    server.stalled.set()


def test_a_length_that_is_too_large_is_refused(server: Server) -> None:
    server.script = ["length 300000"]
    assert_refused(server, "/a", "has changed")


def assert_refused(server: Server, path: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        content(server, path)
    assert f"{server.url}{path}" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("length", [0, 1, CHUNK + 1, len(CONTENT) - 1])
def test_a_file_that_is_cut_for_good_is_refused_after_bounded_tries(
    server: Server, length: int, has_ranges: bool
) -> None:
    server.cut_for_good, server.has_ranges = length, has_ranges
    assert_refused(server, "/a", f"at byte {length}, after {TRIES} tries")
    assert len(server.requests) == TRIES


def test_a_server_that_always_fails_is_asked_a_bounded_number_of_times(server: Server) -> None:
    server.script = ["status 503"] * 99
    assert_refused(server, "/a", f"after {TRIES} tries: HTTP Error 503")
    assert len(server.requests) == TRIES


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416])
def test_a_refusal_is_not_asked_again(server: Server, status: int) -> None:
    server.script = [f"status {status}"]
    assert_refused(server, "/a", f"HTTP Error {status}")
    assert len(server.requests) == 1


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_file_that_changes_between_two_requests_is_refused(server: Server, has_ranges: bool) -> None:
    server.script, server.has_ranges = ["drop 70001", "changed"], has_ranges
    assert_refused(server, "/a", "has changed")


def test_a_file_of_another_size_is_refused_without_tags(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script, server.has_tags = ["drop 70001"], False
    with HttpFile(f"{server.url}/a") as file:
        file.read(70_001)
        server.files["/a"] = CONTENT[:-1]
        with pytest.raises(ValueError, match="has changed"):
            file.read(10)


def test_a_length_that_is_too_small_leaves_a_cut_archive(server: Server) -> None:
    server.files["/0.tar"] = shard(3)
    server.script = ["length 2000"]
    with pytest.raises(ValueError, match=f"shard {server.url}/0.tar is damaged at byte"):
        list(read_shard(f"{server.url}/0.tar", 0))


def test_a_refused_connection_is_an_error_at_first_and_may_pass_later(server: Server) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a"
    with pytest.raises(ValueError, match=f"cannot read {url}: .*refused"):
        read_text(url)
    with pytest.raises(ValueError, match=f"cannot read {url} at byte 0, after {TRIES} tries: .*refused"):
        HttpFile(url).read(1)


@pytest.mark.parametrize("url", ["http://", "http://[", "http://127.0.0.1:x/a", "http://none.invalid/a"])
def test_an_address_that_is_none_is_refused(server: Server, url: str) -> None:
    with pytest.raises(ValueError, match=r"http://"):
        read_text(url)


def test_a_text_file_is_bounded(server: Server) -> None:
    server.files["/classnames.txt"] = b"x" * (MAX_TEXT_BYTES + 2)
    with pytest.raises(ValueError, match=f"{server.url}/classnames.txt has more than {MAX_TEXT_BYTES} bytes"):
        read_lines(server.url, "classnames.txt")
    assert read_lines(server.url, "none.txt") is None


def shard(count: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for number in range(count):
            add_member(file, f"s{number}.png", CONTENT[number : number + 90_000])
            add_member(file, f"s{number}.cls", str(number % 2).encode())
    return buffer.getvalue()


@pytest.fixture
def set_url(server: Server) -> str:
    """A set of two shards behind an address with a blank and a letter that is not ASCII."""
    for number in (0, 1):
        server.files[f"/a%20set/%C3%A9/test/{number}.tar"] = shard(4)
    server.files["/a%20set/%C3%A9/test/nshards.txt"] = b"2\n"
    server.files["/a%20set/%C3%A9/classnames.txt"] = b"red\ngreen\n"
    return f"{server.url}/a set/é"


def test_a_stream_resumes_within_a_shard(server: Server, set_url: str) -> None:
    urls = list_shards(set_url, "test")
    expected = [*StreamedShards(urls)]
    assert [sample.label for sample in expected] == [0, 1, 0, 1] * 2
    server.script = ["drop 100000", "status 503", "drop 150000", "", "close", "drop 91000"]
    assert [*StreamedShards(urls)] == expected
    assert not server.script


def test_a_set_is_opened_over_a_server_that_fails_now_and_then(server: Server, set_url: str) -> None:
    server.script = ["status 503", "", "close"]
    opened = open_source(f"wds:{set_url}", root=".", split="test")
    assert opened.task.class_names == ("red", "green")
    assert len(opened.urls) == 2


def test_a_shard_that_is_not_there_is_refused_by_its_url(server: Server, set_url: str) -> None:
    del server.files["/a%20set/%C3%A9/test/1.tar"]
    with pytest.raises(ValueError, match=r"a set/é/test/1\.tar: HTTP Error 404"):
        list(StreamedShards(list_shards(set_url, "test")))


def test_local_and_remote_readers_agree_on_a_damaged_shard(server: Server, tmp_path: Path) -> None:
    content = bytearray(shard(4))
    content[content.index(b"s2.png")] ^= 1
    server.files["/0.tar"] = bytes(content)
    (tmp_path / "0.tar").write_bytes(content)
    lines = []
    readers: list[Callable[[], Any]] = [
        lambda: IndexedShards([tmp_path / "0.tar"]),
        lambda: list(read_shard(f"{server.url}/0.tar", 0)),
        lambda: list(pool_shards([f"wds:{server.url}/0.tar"], ".")[0].pairs()),
    ]
    for read, place in zip(readers[:2], (tmp_path, server.url), strict=True):
        with pytest.raises(ValueError, match="is damaged at byte") as refused:
            read()
        lines.append(str(refused.value).replace(str(place), ""))
    assert lines[0] == lines[1]
    with pytest.raises(ValueError, match=f"{server.url}/0.tar key 's0' needs .* .txt caption"):
        readers[2]()


def test_images_are_the_same_over_http(server: Server, tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "set", "test", [5])
    server.files["/test/0.tar"] = (base / "test" / "0.tar").read_bytes()
    local = IndexedShards([base / "test" / "0.tar"])
    found = [*read_shard(f"{server.url}/test/0.tar", 0)]
    assert [sample.label for sample in found] == local.labels
    assert [sample.index for sample in found] == [*range(5)]
    assert [sample.data for sample in found] == [local.encoded(number) for number in range(5)]
