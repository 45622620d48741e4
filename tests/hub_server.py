"""A server on the loopback interface that speaks as much of the Hub's API as `snapshot_download` needs."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download

from robustclip.models import hub

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


class Hub(http.server.ThreadingHTTPServer):
    """Serves the files of each commit of each repository, as far as ``snapshot_download`` asks the Hub for them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.is_gated = False
        self.requests: list[str] = []

    def publish(self, repository: str, files: dict[str, bytes], commit: str = NEW, branch: str = "main") -> None:
        self.commits[repository, commit] = files
        self.branches |= {(repository, branch): commit, (repository, commit): commit}

    def downloads(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {path.rpartition("/")[2] for path in self.requests if path.startswith("GET") and "/resolve/" in path}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if not any(known == repository for known, _ in self.server.branches):
            self.answer(404, error="RepoNotFound")
        elif self.server.is_gated and parts[0] != "api":
            self.answer(403, error="GatedRepo")
        elif (repository, parts[5 if parts[0] == "api" else 3]) not in self.server.branches:
            self.answer(404, error="RevisionNotFound")
        elif parts[0] == "api":
            commit = self.server.branches[repository, parts[5]]
            files = self.server.commits[repository, commit]
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self.answer(200, json.dumps(tree if parts[4] == "tree" else {"id": repository, "sha": commit}).encode())
        else:
            data = self.server.commits[repository, parts[3]].get(parts[4])
            self.answer(404, error="EntryNotFound") if data is None else self.answer(200, data, commit=parts[3])

    def answer(self, status: int, body: bytes = b"", *, error: str = "", commit: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json", "X-Error-Code": error}
        headers |= {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit} if commit else {}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def files_of(folder: Path) -> dict[str, bytes]:
    """Reads the files of a folder, to be published."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def connect(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what HF_ENDPOINT would do, which is read when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    template = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, file_download):  # releases before 1.0 import the template by its name
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@contextmanager
def serving(cache: Path) -> Iterator[Hub]:
    """Starts a server and makes it, and an empty cache, those of huggingface_hub."""
    with pytest.MonkeyPatch.context() as monkeypatch, Hub() as server:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        connect(server.server_address[1], monkeypatch)
        hub.fetch.cache_clear()
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        hub.fetch.cache_clear()
