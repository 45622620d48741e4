"""Captions through the real path of transformers, by a tiny BLIP with random weights."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from resume_cases import finish

from robustclip.cli.main import run
from robustclip.data.sources.shapes import ShapesDataset
from robustclip.tools.progress_log import ProgressLog

transformers = pytest.importorskip("transformers")
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "green",
    "circle",
    "star",
    "on",
    "the",
    "left",
    "of",
    "in",
]
WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub has them; wide weights, so that images differ in their captions."""
    folder = tmp_path_factory.mktemp("blip")
    text = {"vocab_size": len(WORDS), "encoder_hidden_size": 16, "bos_token_id": 2, "pad_token_id": 0}
    text |= {"eos_token_id": 3, "sep_token_id": 3, "max_position_embeddings": 32, "initializer_range": 1.0}
    config = transformers.BlipConfig(
        text_config=WIDTHS | text,
        vision_config=WIDTHS | {"image_size": 16, "patch_size": 8, "initializer_range": 1.0},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def words(blip: Path, out: Path, *options: str) -> list[str]:
    place = ["--data", "shapes:colours", "--split", "test", "--captioner", str(blip), "--out", str(out)]
    sizes = ["--batch_size", "50", "--max_new_tokens", "6", "--num_beams", "2", "--min_new_tokens", "2"]
    return ["caption", *place, *sizes, "--device", "cpu", *options]


@pytest.fixture(scope="module")
def table(blip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in one go."""
    out = tmp_path_factory.mktemp("table") / "captions.parquet"
    assert run(words(blip, out)) == 0
    return out


def test_captions_are_those_of_transformers(table: Path, blip: Path) -> None:
    model = transformers.BlipForConditionalGeneration.from_pretrained(blip).eval()
    processor = transformers.BlipProcessor.from_pretrained(blip)
    images = [ShapesDataset("colours")[number][0] for number in range(50)]
    inputs = processor(images=images, return_tensors="pt")
    tokens = model.generate(**inputs, num_beams=2, max_new_tokens=6, min_new_tokens=2, do_sample=False)
    expected = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    rows = parquet.read_table(table).to_pylist()
    assert [row["captions"] for row in rows[:50]] == [[text] if text else [] for text in expected]
    assert len(set(expected)) > 1
    assert [row["index"] for row in rows] == list(range(240))


def test_the_table_states_its_settings(table: Path, blip: Path) -> None:
    schema = parquet.read_schema(table)
    assert [(each.name, str(each.type)) for each in schema] == [
        ("index", "int64"),
        ("captions", "list<element: string>"),
    ]
    assert schema.metadata[b"captioner"] == str(blip).encode()
    assert schema.metadata[b"source"] == b"shapes:colours"
    decoding = json.loads(schema.metadata[b"decoding"])
    assert (decoding["num_beams"], decoding["max_new_tokens"], decoding["top_p"]) == (2, 6, None)


@pytest.mark.parametrize("torn", [False, True])
def test_killed_and_resumed_gives_the_same_table(torn: bool, table: Path, blip: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.parquet"
    child = os.fork()
    if not child:
        die_after(2)
        run(words(blip, out))
        os._exit(1)
    finish(child, expected=-signal.SIGKILL, patience=60)
    journal = tmp_path / "captions.parquet.journal" / "0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3  # settings and two of five batches
    if torn:
        os.truncate(journal, journal.stat().st_size - len(lines[-1]) // 2)
    assert run(words(blip, out)) == 0
    assert out.read_bytes() == table.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["captions.parquet"]


def die_after(batches: int) -> None:
    append, done = ProgressLog.append, []

    def struck(journal: ProgressLog, number: int, rows: Any) -> None:
        append(journal, number, rows)
        done.append(number)
        if len(done) == batches:
            os.kill(os.getpid(), signal.SIGKILL)

    ProgressLog.append = struck  # type: ignore[method-assign]


def test_two_shares_give_the_table_of_one_process(table: Path, blip: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.parquet"
    assert run(words(blip, out, "--shard", "1", "--shards", "2")) == 0
    assert not out.exists()
    assert run(words(blip, out, "--shard", "0", "--shards", "2", "--num_workers", "1")) == 0
    assert out.read_bytes() == table.read_bytes()


def test_draws_do_not_depend_on_the_shares(blip: Path, tmp_path: Path) -> None:
    draws = ["--top_p", "0.9", "--captions_per_image", "3"]
    assert run(words(blip, tmp_path / "one", *draws)) == 0
    for share in ("1", "0"):
        assert run(words(blip, tmp_path / "two", *draws, "--shard", share, "--shards", "2")) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    rows = parquet.read_table(tmp_path / "one").to_pylist()
    assert max(len(row["captions"]) for row in rows) == 3
    assert len({caption for row in rows for caption in row["captions"]}) > 20


def test_an_image_that_does_not_decode_gets_no_caption(blip: Path, write_shards: Any, tmp_path: Path) -> None:
    write_shards(tmp_path, "some", "test", [3], broken=[1])
    assert run([*words(blip, tmp_path / "out"), "--data", f"wds:{tmp_path / 'some'}"]) == 0
    rows = parquet.read_table(tmp_path / "out").to_pylist()
    assert rows[1] == {"index": 1, "captions": []}
    assert rows[0]["captions"]
    assert rows[2]["captions"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--num_beams", "3"], "num_beams 2, now it is 3"),
        (["--data", "shapes:shapes"], "source 'shapes:colours', now it is 'shapes:shapes'"),
        (["--captions_per_image", "4"], "raise num_beams or set top_p"),
        (["--top_p", "1.5"], "top_p must be in (0, 1] or null, got 1.5"),
        (["--min_new_tokens", "9"], "min_new_tokens must be in [0, 6], got 9"),
        (["--precision", "fp64"], "precision: expected 'fp32' or 'bf16', got 'fp64'"),
        (["--shard", "1"], "shard must be in [0, 1), got 1"),
        (["--captioner", "{empty}"], "does not load"),
        (["--out", "{empty}"], "exists and is never overwritten"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    options: list[str], told: str, blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    settings = {"captioner": str(blip), "decoding": {"captions_per_image": 1, "num_beams": 2}}
    if "now it is" in told:
        with ProgressLog(tmp_path / "out.journal", 0, begun(blip, settings)):
            pass
    arguments = [word.format(empty=tmp_path / "empty") for word in options]
    assert run([*words(blip, tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error


def begun(blip: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a journal of `words` begins with."""
    others = {"max_new_tokens": 6, "min_new_tokens": 2, "top_p": None, "precision": "fp32", "batch_size": 50, "seed": 0}
    settings["decoding"] |= others
    from robustclip.tools.captioner import Captioner, Decoding

    weights = Captioner(str(blip), Decoding(), "cpu").fingerprint
    return settings | {"weights": weights, "source": "shapes:colours", "split": "test", "images": 240}


def test_weights_that_may_hold_code_are_not_loaded(
    blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in blip.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save(
        transformers.BlipForConditionalGeneration.from_pretrained(blip).state_dict(), folder / "pytorch_model.bin"
    )
    assert run([*words(folder, tmp_path / "out")]) == 2
    assert "safetensors" in capsys.readouterr().err.splitlines()[-1]


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    with ProgressLog(tmp_path, 0, {}):
        child = os.fork()
        if not child:
            try:
                ProgressLog(tmp_path, 0, {}).__enter__()
            except ValueError as error:
                os._exit(7 if "give each its own --shard" in str(error) else 1)
            os._exit(0)
        finish(child, expected=7, patience=30)
