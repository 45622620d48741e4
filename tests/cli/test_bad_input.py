"""Every fault of the input is reported in one line with its place and a remedy."""

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import add_member, tiny_clip
from PIL import Image
from safetensors.torch import load_file, save_file

from robustclip.cli.main import run
from robustclip.cli.messages import in_one_line
from robustclip.methods._shared.saved_state import with_digest

SIDE = 32
CLASSES = ("red", "green", "blue")
TEST = (
    "test --model ZeroShot --model.pretrained {model} --data.test [wds:set] --data.root {at} --data.batch_size 4"
    " --trainer.accelerator cpu --trainer.logger false --trainer.enable_progress_bar false"
    " --trainer.default_root_dir {at}"
)
FIT = TEST.replace("test --model ZeroShot", "fit --model TeCoA").replace(
    "--data.test [wds:set]", "--data.train wds:set"
)
FIT += " --trainer.max_epochs 1 --data.holdout 0 --trainer.enable_model_summary false"


def words_of(command: str, model: Path, at: Path) -> list[str]:
    return [word.replace("{model}", str(model)).replace("{at}", str(at)) for word in command.split()]


class Touch:
    """Creates a file when it is unpickled: what an attacker's code would be."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    colour = tuple(torch.randint(256, (3,), generator=torch.Generator().manual_seed(number)).tolist())
    Image.new("RGB", (SIDE, SIDE), colour).save(file, "png")
    return file.getvalue()


def write_set(folder: Path, members: dict[str, bytes] | None = None) -> Path:
    """Eight samples in clip_benchmark's layout, for both splits; ``members`` replaces or adds files of the tar."""
    files = {}
    for number in range(8):
        files[f"s{number:07}.png"] = picture(number)
        files[f"s{number:07}.cls"] = str(number % len(CLASSES)).encode()
    files |= members or {}
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / "nshards.txt").write_text("1\n")
        with tarfile.open(folder / split / "0.tar", "w") as archive:
            for name, data in files.items():
                add_member(archive, name, data)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} picture\n")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `robustclip fit` wrote."""
    at = tmp_path_factory.mktemp("fit")
    write_set(at / "set")
    assert run(words_of(FIT, model, at)) == 0
    return at / "checkpoints" / "last.ckpt"


@pytest.fixture
def at(tmp_path: Path, model: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a good data set, model and checkpoint for `prepare` to spoil."""
    write_set(tmp_path / "set")
    shutil.copytree(model, tmp_path / "tiny")
    shutil.copyfile(checkpoint, tmp_path / "fit.ckpt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds the working folder
    monkeypatch.setattr(sys, "argv", ["robustclip"])
    return tmp_path


def nothing(at: Path) -> None:
    """The arguments alone are wrong."""


def text(name: str, content: str) -> Callable[[Path], None]:
    def prepare(at: Path) -> None:
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_text(content)

    return prepare


def member(**members: bytes) -> Callable[[Path], None]:
    """A set with a bad file in its tar; ``s0000003_png`` stands for ``s0000003.png``."""

    def prepare(at: Path) -> None:
        shutil.rmtree(at / "set")
        write_set(at / "set", {name.replace("_", "."): data for name, data in members.items()})

    return prepare


def broken_part(at: Path) -> None:
    (at / "run.yaml").write_text("data: part.yaml")
    (at / "part.yaml").write_text("a: [1")


def cut(name: str, share: float) -> Callable[[Path], None]:
    def prepare(at: Path) -> None:
        data = (at / name).read_bytes()
        (at / name).write_bytes(data[: int(len(data) * share)])

    return prepare


def missing(name: str) -> Callable[[Path], None]:
    return lambda at: (at / name).unlink()


def other_model(at: Path) -> None:
    tiny_clip(at / "other", embed_dim=24)


def weights_without_a_key(at: Path) -> None:
    weights = load_file(at / "tiny" / "open_clip_model.safetensors")
    del weights["visual.proj"]
    save_file(weights, at / "tiny" / "open_clip_model.safetensors")


def weights_of_another_size(at: Path) -> None:
    other_model(at)
    shutil.copyfile(at / "other/open_clip_model.safetensors", at / "tiny/open_clip_model.safetensors")


def tiny_weights(at: Path) -> None:
    shutil.copyfile(at / "tiny/open_clip_model.safetensors", at / "tiny.safetensors")


def checkpoint_without_a_parameter(at: Path) -> None:
    content = torch.load(at / "fit.ckpt", weights_only=True)
    del content["state_dict"]["clip.net.visual.proj"]
    torch.save(with_digest(content), at / "fit.ckpt")


def foreign_checkpoint(at: Path) -> None:
    torch.save({"state_dict": {}, "epoch": 1}, at / "fit.ckpt")


def code(name: str) -> Callable[[Path], None]:
    return lambda at: torch.save({"state_dict": Touch(at / "ran"), "x": torch.zeros(1)}, at / name)


def pickled_folder(at: Path) -> None:
    (at / "tiny" / "open_clip_model.safetensors").unlink()
    code("tiny/open_clip_pytorch_model.bin")(at)


# Arguments, what is spoilt, and the words that the line must hold: where, what was expected, what was found, remedy.
ROWS: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "command": ("tset", nothing, ("'tset'", "test")),
    "key": (f"{FIT} --model.last_blcks 1", nothing, ("model.last_blcks", "last_blocks")),
    "key of a key": (f"{FIT} --model.atack.eps 1/255", nothing, ("model.atack.eps", "model.attack")),
    "key of the optimizer": (f"{FIT} --model.optimizer.lrr 1", nothing, ("model.optimizer.lrr", "model.optimizer.lr?")),
    "key of no model": ("fit --model.image_size 32", nothing, ("model.image_size", "--model CLASS", "TeCoA")),
    "unknown key of no model": ("fit --model.eps 1", nothing, ("model.eps", "--model CLASS", "TeCoA")),
    "key of the trainer": (f"{TEST} --trainer.acelerator cpu", nothing, ("trainer.acelerator", "trainer.accelerator")),
    "key without section": (f"{TEST} --batch_size 4", nothing, ("batch_size", "data.batch_size")),
    "key in a file": (
        f"{TEST} --config run.yaml",
        text("run.yaml", "modl: {class_path: TeCoA}\n"),
        ("modl", "model"),
    ),
    "key of a data set": (
        TEST.replace("[wds:set]", '[{"source":"wds:set","nme":"x"}]'),
        nothing,
        ("data.test", "nme", "name"),
    ),
    "class": (f"{TEST} --model TeCoAA", nothing, ("model", "TeCoAA", "TeCoA")),
    "class of another kind": (f"{TEST} --model torch.nn.Linear", nothing, ("model", "RobustMethod", "torch.nn.Linear")),
    "class in no module": (f"{TEST} --model mine.Mine", nothing, ("model", "mine.Mine")),
    "no model": ("test --data.test [wds:set]", nothing, ("model",)),
    "type": (f"{TEST} --data.batch_size many", nothing, ("data.batch_size", "int", "many")),
    "type in a file": (
        f"{TEST} --config run.yaml",
        text("run.yaml", "trainer: {max_epochs: soon}\n"),
        ("trainer.max_epochs", "int", "soon"),
    ),
    "choice": (f"{TEST} --data.bad_samples ignore", nothing, ("data.bad_samples", "error", "skip", "ignore")),
    "missing config": (f"{TEST} --config none.yaml", nothing, ("config", "none.yaml")),
    "config that is no YAML": (f"{TEST} --config run.yaml", text("run.yaml", "a: [1\nb: {"), ("run.yaml", "YAML")),
    "config without keys": (f"{TEST} --config run.yaml", text("run.yaml", "just words"), ("run.yaml", "words")),
    "missing part of a config": (f"{TEST} --config run.yaml", text("run.yaml", "data: no.yaml"), ("data", "no.yaml")),
    "missing trainer of a config": (
        f"{TEST} --config run.yaml",
        text("run.yaml", "trainer: no.yaml"),
        ("trainer", "'no.yaml'", "start at that config"),
    ),
    "part of a config that is no YAML": (
        f"{TEST} --config run.yaml",
        broken_part,
        ("part.yaml",),
    ),
    "class that its module lacks": (f"{TEST} --model mine.Mine", text("mine.py", ""), ("model", "mine.Mine")),
    "module that fails": (f"{TEST} --model broken.Mine", text("broken.py", "import nonesuch"), ("model", "nonesuch")),
    "optimizer": (f"{FIT} --model.optimizer Adamm", nothing, ("model.optimizer", "Adamm", "Adam?")),
    "learning rate": (f"{FIT} --model.optimizer.lr -1", nothing, ("learning rate", "-1")),
    "monitor without validation": (
        f"{FIT} --checkpoint.monitor val/mean/clean/acc1",
        nothing,
        ("checkpoint.monitor", "val/mean/clean/acc1", "data.holdout"),
    ),
    "monitor": (
        f"{FIT} --data.holdout 0.5 --checkpoint.monitor val/mean/pgd/acc1",
        nothing,
        ("checkpoint.monitor", "val/mean/pgd/acc1", "val/mean/clean/acc1"),
    ),
    "accelerator": (f"{TEST} --trainer.accelerator tpuu", nothing, ("tpuu",)),
    "attack": (
        TEST + ' --evaluation.attacks {"x":{"class_path":"PGDD"}}',
        nothing,
        ("evaluation.attacks", "PGDD", "PGD"),
    ),
    "training attack": (f"{FIT} --model.attack PGDD", nothing, ("model.attack", "PGDD", "PGD")),
    "attack of torchattacks": (
        f"{FIT} --model.attack TorchAttack --model.attack.name PGDLL",
        nothing,
        ("torchattacks", "PGDLL", "PGDL2"),
    ),
    "radius in grey levels": (f"{FIT} --model.attack.eps 4", nothing, ("eps", "[0, 1]", "4/255")),
    "radius over zero": (f"{FIT} --model.attack.eps 1/0", nothing, ("eps", "4/255", "'1/0'")),
    "key of an attack": (f"{FIT} --model.attack.epz 1/255", nothing, ("epz", "eps")),
    "negative radius": (f"{FIT} --model.attack.eps=-1/255", nothing, ("eps", "[0, 1]", "'-1/255'")),
    "negative radius behind a space": (f"{FIT} --model.attack.eps -1/255", nothing, ("eps", "[0, 1]", "'-1/255'")),
    "all devices of a CPU": (f"{TEST} --trainer.devices -1", nothing, ("trainer", "devices", "CPU")),
    "option without a value": (f"{FIT} --model.attack.eps --data.shots 1", nothing, ("model.attack.eps", "missing")),
    "last option without a value": (f"{FIT} --model.attack.eps", nothing, ("model.attack.eps", "missing")),
    "value without an option": (f"{TEST} stray", nothing, ("'stray'", "--KEY")),
    "option with one dash": (f"{TEST} -trainer.max_epochs 3", nothing, ("'-trainer.max_epochs'", "--KEY")),
    "shortened key": (f"{FIT} --trainer.max_epoch 3", nothing, ("trainer.max_epoch;", "trainer.max_epochs")),
    "key of the optimizer without it": (f"{FIT} --model.lr 1e-4", nothing, ("model.lr;", "mean model.optimizer.lr?")),
    "option before the config": (
        f"fit --trainer.max_epochs 3 {FIT[4:]} --config run.yaml".replace("--trainer.max_epochs 1 ", ""),
        text("run.yaml", "trainer: {max_epochs: 2}\n"),
        ("trainer.max_epochs", "run.yaml", "first"),
    ),
    "key of the trainer in the only file": (
        "test --config run.yaml",
        text("run.yaml", "model: ZeroShot\ntrainer: {max_epoch: 3}\n"),
        ("trainer.max_epoch;", "trainer.max_epochs"),
    ),
    "section in a file": (
        f"{TEST} --config run.yaml",
        text("run.yaml", "trainr: {}\n"),
        ("trainr", "trainer?"),
    ),
    "section without keys": (f"{TEST} --config run.yaml", text("run.yaml", "trainer:\n"), ("trainer", "null")),
    "arguments that are text": (
        f"{FIT} --config run.yaml",
        text("run.yaml", "model: {init_args: {attack: {class_path: PGD, init_args: text}}}\n"),
        ("model.init_args.attack.init_args", "'text'"),
    ),
    "key that stands twice": (
        f"{TEST} --config run.yaml",
        text("run.yaml", "evaluation:\n  seed: 1\n  max_samples: 4\n  seed: 2\n"),
        ("run.yaml", "'seed'", "line 2", "line 4"),
    ),
    "key that stands twice in a part": (
        f"{TEST} --config run.yaml",
        lambda at: (text("run.yaml", "evaluation: part.yaml\n")(at), text("part.yaml", "seed: 1\nseed: 2\n")(at))[0],
        ("part.yaml", "'seed'", "line 1", "line 2"),
    ),
    "key that stands twice in an option": (
        TEST + ' --evaluation.attacks {"x":{"class_path":"PGD"},"x":{"class_path":"APGD"}}',
        nothing,
        ("evaluation.attacks", "'x'", "twice"),
    ),
    "average that is no list": (
        TEST + ' --results.averages {"shifts":"set"}',
        nothing,
        ("results.averages.shifts", "list", "'set'"),
    ),
    "attack that is no class": (TEST + ' --evaluation.attacks {"x":3}', nothing, ("evaluation.attacks.x", "Attack")),
    "alias that contains itself": (
        f"{TEST} --config run.yaml",
        text("run.yaml", "data: &d {init_args: *d}\n"),
        ("run.yaml", "alias"),
    ),
    "config in another encoding": (
        f"{TEST} --config run.yaml",
        lambda at: (at / "run.yaml").write_bytes("data: {root: \xe9}\n".encode("latin-1")) and None,
        ("run.yaml", "UTF-8"),
    ),
    "missing baseline": (f"{TEST} --results.baseline nowhere", nothing, ("results.baseline", "nowhere")),
    "missing section on the command line": (f"{TEST} --trainer no.yaml", nothing, ("no.yaml",)),
    "seed out of range": (f"{TEST} --seed_everything {10**30}", nothing, ("seed_everything", str(10**30))),
    "number of steps": (f"{FIT} --model.attack.steps -1", nothing, ("steps", "at least 0", "-1")),
    "attack named clean": (
        TEST + ' --evaluation.attacks {"clean":{"class_path":"PGD"}}',
        nothing,
        ("attack name", "'clean'"),
    ),
    "max_samples": (f"{TEST} --evaluation.max_samples 0", nothing, ("max_samples", "at least 1", "0", "null")),
    "last_blocks": (f"{FIT} --model.last_blocks 99", nothing, ("last_blocks", "[1, 2]", "99", "null")),
    "zero-shot fit": (f"{FIT} --model ZeroShot", nothing, ("ZeroShot", "robustclip test", "TeCoA")),
    "data set": (TEST.replace("wds:set", "cifar_10"), nothing, ("'cifar_10'", "cifar10")),
    "kind of data set": (TEST.replace("wds:set", "wsd:set"), nothing, ("'wsd:set'", "wds:")),
    "shapes set": (TEST.replace("wds:set", "shapes:cats"), nothing, ("'cats'", "source")),
    "folder of data": (TEST.replace("wds:set", "wds:sett"), nothing, ("sett/test", "root")),
    "split": (
        TEST.replace("[wds:set]", '[{"source":"wds:set","split":"val"}]'),
        nothing,
        ("set/val", "['test', 'train']"),
    ),
    "nothing to test": (TEST.replace("[wds:set]", "[]"), nothing, ("data.test",)),
    "two sets of one name": (TEST.replace("wds:set", "wds:set,wds:set"), nothing, ("'set'", "`name`")),
    "set of a reserved name": (
        TEST.replace("wds:set", "wds:mean"),
        lambda at: (at / "set").rename(at / "mean"),
        ("'mean'", "`name`"),
    ),
    "template": (
        TEST,
        text("set/zeroshot_classification_templates.txt", "a picture\n"),
        ("'set'", "{}", "'a picture'"),
    ),
    "missing shard": (TEST, missing("set/test/0.tar"), ("set/test/0.tar", "nshards.txt")),
    "number of shards": (TEST, text("set/test/nshards.txt", "two"), ("set/test/nshards.txt", "number", "'two'")),
    "truncated tar": (TEST, cut("set/test/0.tar", 0.3), ("set/test/0.tar", "cut short", "fetch it again")),
    "tar that is none": (TEST, text("set/test/0.tar", "x" * 2000), ("set/test/0.tar", "tar", "fetch it again")),
    "undecodable image": (
        TEST,
        member(s0000003_png=picture(0)[:60]),
        ("set/test/0.tar", "'s0000003'", "decode", "bad_samples: skip"),
    ),
    "label out of range": (
        TEST,
        member(s0000003_cls=b"7"),
        ("set/test/0.tar", "'s0000003'", "label 7", "3 class names"),
    ),
    "label out of range in a loader's worker": (
        TEST.replace("wds:set", "wds:file://{at}/set") + " --data.num_workers 1",
        member(s0000003_cls=b"7"),
        ("file://{at}/set/test/0.tar", "'s0000003'", "label 7", "3 classes"),
    ),
    "negative label": (TEST, member(s0000003_cls=b"-1"), ("set/test/0.tar", "'s0000003'", "'-1'", "class number")),
    "image without label": (TEST, member(s0000009_png=picture(9)), ("set/test/0.tar", "'s0000009'", ".cls")),
    "class count": (
        TEST.replace("[wds:set]", '[{"source":"wds:set","class_names":["a","b"]}]'),
        nothing,
        ("wds:set", "2 class", "3"),
    ),
    "remote training set": (FIT.replace("wds:set", "wds:file://{at}/set"), nothing, ("set", "`length`")),
    "unreachable host": (
        TEST.replace("wds:set", "wds:http://127.0.0.1:9/set"),
        nothing,
        ("http://127.0.0.1:9/set", "refused"),
    ),
    "missing remote set": (
        TEST.replace("wds:set", "wds:file:///none/set"),
        nothing,
        ("file:///none/set", "nshards.txt"),
    ),
    "missing remote shard": (
        TEST.replace("wds:set", "wds:file://{at}/set"),
        missing("set/test/0.tar"),
        ("file:///", "set/test/0.tar"),
    ),
    "truncated remote tar": (
        TEST.replace("wds:set", "wds:file://{at}/set"),
        cut("set/test/0.tar", 0.3),
        ("file:///", "set/test/0.tar"),
    ),
    "holdout": (f"{FIT} --data.holdout 2", nothing, ("holdout", "[0, 1)", "2")),
    "architecture": (f"{TEST} --model.arch ViT-B-33 --model.pretrained openai", nothing, ("'ViT-B-33'", "ViT-B-32")),
    "architecture for a folder": (f"{TEST} --model.arch ViT-B-32", nothing, ("arch", "null", "ViT-B-32")),
    "no architecture": (f"{TEST} --model.pretrained openai", nothing, ("arch", "'openai'")),
    "tag": (f"{TEST} --model.arch ViT-B-32 --model.pretrained opnai", nothing, ("'opnai'", "ViT-B-32", "openai")),
    "tag of another activation": (
        f"{TEST} --model.arch ViT-B-32 --model.pretrained openai",
        nothing,
        ("QuickGELU", "ViT-B-32-quickgelu"),
    ),
    "weights of another architecture": (
        f"{TEST} --model.arch ViT-S-32-alt --model.pretrained {{at}}/tiny.safetensors",
        tiny_weights,
        ("tiny.safetensors", "ViT-S-32-alt"),
    ),
    "weights of another size": (
        f"{TEST} --model.pretrained {{at}}/tiny",
        weights_of_another_size,
        ("{at}/tiny", "[16, 24]", "[16, 16]"),
    ),
    "weights without a key": (
        f"{TEST} --model.pretrained {{at}}/tiny",
        weights_without_a_key,
        ("{at}/tiny", "visual.proj"),
    ),
    "truncated weights": (
        f"{TEST} --model.pretrained {{at}}/tiny",
        cut("tiny/open_clip_model.safetensors", 0.5),
        ("{at}/tiny",),
    ),
    "folder without config": (
        f"{TEST} --model.pretrained {{at}}/tiny",
        missing("tiny/open_clip_config.json"),
        ("open_clip_config.json",),
    ),
    "folder without weights": (
        f"{TEST} --model.pretrained {{at}}/tiny",
        missing("tiny/open_clip_model.safetensors"),
        ("{at}/tiny", "open_clip_model.safetensors"),
    ),
    "config of a model": (
        f"{TEST} --model.pretrained {{at}}/tiny",
        text("tiny/open_clip_config.json", "{"),
        ("open_clip_config.json",),
    ),
    "code in weights": (
        f"{TEST} --model.arch ViT-S-32-alt --model.pretrained {{at}}/bad.pt",
        code("bad.pt"),
        ("bad.pt", "safetensors"),
    ),
    "code in a model folder": (f"{TEST} --model.pretrained {{at}}/tiny", pickled_folder, ("{at}/tiny", "safetensors")),
    "code in a checkpoint": (f"{TEST} --ckpt_path {{at}}/bad.ckpt", code("bad.ckpt"), ("bad.ckpt", "not opened")),
    "code in a checkpoint to continue": (
        f"{FIT} --ckpt_path {{at}}/bad.ckpt",
        code("bad.ckpt"),
        ("bad.ckpt", "not opened"),
    ),
    "missing checkpoint": (f"{TEST} --ckpt_path {{at}}/no.ckpt", nothing, ("{at}/no.ckpt",)),
    "truncated checkpoint": (f"{TEST} --ckpt_path {{at}}/fit.ckpt", cut("fit.ckpt", 0.5), ("{at}/fit.ckpt",)),
    "foreign checkpoint": (f"{TEST} --ckpt_path {{at}}/fit.ckpt", foreign_checkpoint, ("robustclip", "base_model")),
    "checkpoint of another architecture": (
        f"{TEST} --model TeCoA --model.pretrained {{at}}/other --ckpt_path {{at}}/fit.ckpt",
        other_model,
        ("checkpoint", "parameters"),
    ),
    "checkpoint without a parameter": (
        f"{TEST} --model TeCoA --ckpt_path {{at}}/fit.ckpt",
        checkpoint_without_a_parameter,
        ("lacks", "'clip.net.visual.proj'", "TeCoA"),
    ),
    "missing result": ("table none.json", nothing, ("none.json",)),
    "result that is none": ("table x.json", text("x.json", "[]"), ("x.json", "robustclip test")),
    "no result": ("table", nothing, ("results",)),
    "one run to compare": ("compare x", nothing, ("b", "missing")),
    "missing run to compare": ("compare none nowhere", nothing, ("none",)),
    "missing run to report": ("report none", nothing, ("none",)),
    "option of a tool": ("report x --outt y", nothing, ("outt",)),
    "missing run to verify": ("verify none", nothing, ("none",)),
    "missing run to replay": ("replay none --model ZeroShot", nothing, ("none",)),
    "no run to replay": ("replay --model ZeroShot", nothing, ("run",)),
    "folder without its kind": (
        TEST.replace("wds:set", "{at}/set"),
        nothing,
        ("catalogue, got '{at}/set'", "did you mean folder:{at}/set?"),
    ),
    "data set in place of the data module": (
        TEST.replace("--data.test [wds:set]", "--data folder:set"),
        nothing,
        ("data: there is no class 'folder:set'", "--data.test folder:/my/photos"),
    ),
    "file of the wrong content": (
        TEST.replace("wds:set", "folder:photos"),
        lambda at: [text(f"photos/{name}/1.jpg", "no image")(at) for name in ("cat", "dog")],
        ("photos/cat/1.jpg does not decode: 8 bytes are no image of a known format", "skip"),
    ),
    "photographs of a telephone": (
        TEST.replace("wds:set", "folder:photos"),
        lambda at: [text(f"photos/cat/1.{kind}", "no image")(at) for kind in ("jpg", "HEIC")],
        ("photos/cat/1.HEIC is of an image type that is not read", "convert"),
    ),
    "method without a loss": (
        FIT.replace("TeCoA", "own_faults.NoLoss"),
        nothing,
        ("model: own_faults.NoLoss must define training_loss",),
    ),
    "method that forgets its base": (
        "fit --model own_faults.Forgetful --data.train shapes:source --trainer.accelerator cpu --trainer.logger false",
        nothing,
        ("Forgetful.__init__ must call super().__init__(**kwargs) first",),
    ),
    "missing run of compare": ("compare one", nothing, ("b is missing", "`robustclip compare --help`")),
    "key of the doctor": (f"{TEST} --model.pretraned x".replace("test", "doctor", 1), nothing, ("model.pretraned",)),
    "missing config of the doctor": ("doctor --config none.yaml", nothing, ("config", "none.yaml")),
}


OWN_FAULTS = """
from robustclip.methods import RobustMethod
class NoLoss(RobustMethod):
    pass
class Forgetful(RobustMethod):
    def __init__(self, beta: float = 1.0):
        self.beta = beta
    def training_loss(self, batch):
        return {}
class Clean(RobustMethod):
    def training_loss(self, batch):
        return {"mean": self.logits(batch.images).mean()}
"""


@pytest.fixture(autouse=True, scope="module")
def own_faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Modules of a user beside the working folder."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_faults.py").write_text(OWN_FAULTS)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.mark.parametrize("attack", ["PGD", "null"])
def test_a_method_that_never_attacks_is_reported(
    attack: str, at: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(words_of(FIT.replace("TeCoA", f"own_faults.Clean --model.attack {attack}"), model, at)) == 0
    assert ("Clean has trained without its attack" in caplog.text) == (attack == "PGD")
    assert run(["export", str(next(at.rglob("last.ckpt"))), str(at / "exported")]) == 0
    assert json.loads((at / "exported" / "robustclip.json").read_text())["training_attack"] is None
    assert "| training attack | none |" in (at / "exported" / "README.md").read_text()


@pytest.mark.parametrize("name", ROWS)
def test_bad_input_gives_one_clear_line(name: str, at: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, prepare, words = ROWS[name]
    prepare(at)
    capfd.readouterr()
    status = run(words_of(arguments, model, at))
    output = capfd.readouterr()
    lines = [line for line in output.err.splitlines() if line.strip()]
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "Traceback" not in output.out + output.err
    for word in words:
        assert word.replace("{at}", str(at)) in lines[0]
    assert not (at / "ran").exists()  # no code of a file ran


def test_a_configuration_for_gpus_names_the_option_for_a_machine_without() -> None:
    assert in_one_line(ValueError("No supported gpu backend found!")).endswith("give --trainer.accelerator cpu")


def test_the_code_in_these_files_would_run_if_they_were_trusted(at: Path) -> None:
    code("bad.ckpt")(at)
    torch.load(at / "bad.ckpt", weights_only=False)
    assert (at / "ran").exists()


def test_bad_samples_are_left_out_and_counted_on_request(
    at: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    member(s0000003_png=picture(0)[:60])(at)
    assert run(words_of(f"{TEST} --data.bad_samples skip", model, at)) == 0
    output = capfd.readouterr()
    assert "left out" in output.out  # a column of the table
    results = json.loads((Path(output.out.split()[-1]) / "result.json").read_text())
    assert results["tasks"]["set"]["n"] == 7
    assert results["tasks"]["set"]["bad_samples"] == 1


def test_fit_leaves_bad_samples_out_and_counts_them(at: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    member(s0000003_png=picture(0)[:60])(at)
    assert run(words_of(FIT, model, at)) == 0
    assert "1 samples did not decode" in caplog.text
    assert "key 's0000003'" in caplog.text


def test_own_checkpoints_load_as_data_in_any_environment(
    at: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    arguments = f"{FIT} --trainer.max_epochs 2 --ckpt_path {{at}}"
    assert run(words_of(f"{arguments}/fit.ckpt", model, at)) == 0
    code("bad.ckpt")(at)
    assert run(words_of(f"{arguments}/bad.ckpt", model, at)) == 2
    assert "not opened" in capfd.readouterr().err
    assert not (at / "ran").exists()


def test_traceback_comes_on_request(at: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTCLIP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="lists no data set"):
        run(words_of(ROWS["nothing to test"][0], model, at))


def test_table_takes_one_result_or_several(at: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        scores = {"clean": {"acc1": 0.5}}
        result = {"method": f"M{number}", "tasks": {"x": scores}, "mean": scores, "protocol": {}}
        text(f"{number}/result.json", json.dumps(result))(at)
    for count in (1, 2):
        assert run(["table", *map(str, range(count))]) == 0
        shown = capfd.readouterr().out
        assert [f"M{number}" in shown for number in range(2)] == [True, count == 2]
