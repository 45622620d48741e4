"""Repositories of the Hub, served on the loopback interface: read at one commit, and refused in one line."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import NEW, OLD, Hub, connect, files_of, serving
from huggingface_hub import constants, utils

from robustclip.cli.main import run
from robustclip.models import hub
from robustclip.models.clip import SHAPES_MODEL, CLIPModel

SHAPES = files_of(SHAPES_MODEL)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with serving(tmp_path / "cache") as server:
        yield server


def test_a_repository_is_a_base_model(server: Hub) -> None:
    junk = {"README.md": b"x", "open_clip_pytorch_model.bin": b"x", "model.safetensors": b"x", "a.onnx": b"x"}
    server.publish("lab/shapes", {**SHAPES, **junk})
    model = CLIPModel(pretrained="hf-hub:lab/shapes")
    assert model.fingerprint == CLIPModel(pretrained="shapes").fingerprint
    assert model.source == {"repository": "lab/shapes", "commit": NEW}
    assert server.downloads() == SHAPES.keys() - {"README.md"}


def test_a_revision_is_read_and_its_commit_recorded(server: Hub) -> None:
    server.publish("lab/shapes", SHAPES, OLD, "v1.0")
    server.publish("lab/shapes", {}, NEW)
    for revision in ("v1.0", OLD):
        assert CLIPModel(pretrained=f"hf-hub:lab/shapes@{revision}").source["commit"] == OLD


def test_a_branch_that_moves_is_read_at_one_commit(server: Hub) -> None:
    server.publish("lab/shapes", SHAPES, OLD)
    CLIPModel(pretrained="hf-hub:lab/shapes")
    server.publish("lab/shapes", {}, NEW)
    assert CLIPModel(pretrained="hf-hub:lab/shapes").source["commit"] == OLD


@pytest.mark.parametrize("way", ["offline", "no server"])
def test_a_repository_in_the_cache_needs_no_network(way: str, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.publish("lab/shapes", SHAPES)
    CLIPModel(pretrained="hf-hub:lab/shapes")
    hub.fetch.cache_clear()
    disconnect(way, monkeypatch)
    assert CLIPModel(pretrained="hf-hub:lab/shapes").source["commit"] == NEW
    assert_refused("hf-hub:lab/other", "hf-hub:lab/other is not complete in the local cache, and .* cannot be reached")


def disconnect(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "offline":
        if hasattr(utils, "reset_sessions"):
            pytest.skip("sessions of huggingface_hub before 1.0 keep the setting that they began with")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        connect(free.getsockname()[1], monkeypatch)


def assert_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        CLIPModel(pretrained=name)
    assert "\n" not in str(caught.value)


def test_a_cache_without_the_weights_is_reported_as_such(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.publish("lab/shapes", SHAPES)
    hub.fetch("hf-hub:lab/shapes")
    disconnect("offline", monkeypatch)
    assert_refused("hf-hub:lab/shapes", "hf-hub:lab/shapes (is not complete in|has no weights)")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf-hub:lab/none", "has no repository 'lab/none', or it is private"),
        ("hf-hub:lab/shapes@v9", "'lab/shapes' at http://.* has no revision 'v9'"),
        ("hf-hub:shapes", "given as hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION, got 'hf-hub:shapes'"),
        ("hf-hub:lab/shapes@", "got 'hf-hub:lab/shapes@'"),
        ("hf-hub:lab/library", "is in the layout of .*`robustclip import hf-hub:lab/library --out DIR`"),
        ("hf-hub:lab/empty", "model folder hf-hub:lab/empty has no open_clip_config.json"),
        ("hf-hub:lab/bare", f"hf-hub:lab/bare has no weights that are read, at commit {NEW}; expected open_clip_"),
    ],
)
def test_repositories_that_cannot_be_read_are_refused_in_one_line(name: str, words: str, server: Hub) -> None:
    server.publish("lab/shapes", SHAPES)
    server.publish("lab/library", {"config.json": b'{"model_type": "clip"}', "model.safetensors": b"x"})
    server.publish("lab/empty", {"README.md": b"x"})
    server.publish("lab/bare", {"open_clip_config.json": SHAPES["open_clip_config.json"]})
    assert_refused(name, words)
    assert not {"model.safetensors"} & server.downloads()


def test_a_gated_repository_names_the_way_in(server: Hub) -> None:
    server.publish("lab/shapes", SHAPES)
    server.is_gated = True
    assert_refused("hf-hub:lab/shapes", "is gated: accept its terms at http://127.*/lab/shapes, then log in")


def test_the_architecture_is_the_repositorys_own() -> None:
    with pytest.raises(ValueError, match="arch must be null for the repository 'hf-hub:lab/shapes'"):
        CLIPModel(arch="ViT-B-32", pretrained="hf-hub:lab/shapes")


def test_weights_are_pickles_only_where_nothing_else_is_there(server: Hub) -> None:
    files = {name: data for name, data in SHAPES.items() if not name.endswith(".safetensors")}
    server.publish("lab/shapes", {**files, "open_clip_pytorch_model.bin": b"cos\nsystem\n(S'touch exploited'\ntR."})
    assert_refused("hf-hub:lab/shapes", "open_clip_pytorch_model.bin (calls for|may contain code)")


def test_the_command_line_answers_in_one_line(server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.publish("lab/shapes", SHAPES)
    for name, words in (
        ("hf-hub:lab/shapes", "can be used as it is: --model.pretrained hf-hub:lab/shapes"),
        ("hf-hub:lab/none", "has no repository 'lab/none'"),
    ):
        assert run(["import", name, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert words in error.splitlines()[-1]
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_result_states_the_commit(server: Hub, tmp_path: Path) -> None:
    server.publish("lab/shapes", SHAPES)
    options = ["--config", "demo", "--model", "ZeroShot", "--model.pretrained", "hf-hub:lab/shapes", "--data.test"]
    options += [
        "[shapes:colours]",
        "--evaluation.max_samples",
        "4",
        "--results.folder",
        str(tmp_path),
        "--results.name",
    ]
    assert run(["test", *options, "run", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]) == 0
    model = json.loads((tmp_path / "run" / "result.json").read_text())["model"]
    assert model["pretrained"] == "hf-hub:lab/shapes"
    assert model["source"] == {"repository": "lab/shapes", "commit": NEW}
