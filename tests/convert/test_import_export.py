"""Checkpoints come in and go out with their logits, and what cannot is refused in one line."""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import yaml
from checkpoint_cases import (
    CONFIGS,
    DEMO,
    fitted,
    method_logits,
    one_tokenizer,
    plain_logits,
    random_net,
    register,
    trained_by_command,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from robustclip.cli.main import run
from robustclip.convert import open_clip_folder
from robustclip.convert.exporting import export
from robustclip.convert.importing import import_checkpoint
from robustclip.methods import TeCoA, ZeroShot
from robustclip.types import Task

TOLERANCE = 1e-5  # of cosines, relative to the logit scale: float32 in another order
QUICK = "tiny-vit-quickgelu"


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    register(tmp_path_factory.mktemp("architectures"))
    with one_tokenizer():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of QUICK with random weights: the model that others have fine-tuned."""
    place = tmp_path_factory.mktemp("base")
    torch.save(random_net(QUICK).state_dict(), place / "base.pt")
    import_checkpoint(place / "base.pt", place / "folder", arch=QUICK, activation="quickgelu")
    return place / "folder"


@pytest.fixture(scope="module")
def tuned(base: Path) -> TeCoA:
    return fitted(base, base.parent / "last.ckpt")


def assert_same(found: Tensor, expected: Tensor, scale: float) -> None:
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=TOLERANCE)


def loaded(folder: Path) -> Tensor:
    """Logits by plain open_clip of a folder."""
    return plain_logits(open_clip.create_model(f"local-dir:{folder}"), f"local-dir:{folder}")


def tower_of(net: Any, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in net.visual.state_dict().items()}


@pytest.mark.parametrize("arch", CONFIGS)
def test_a_model_comes_in_is_trained_and_goes_out_with_its_logits(arch: str, tmp_path: Path) -> None:
    net = random_net(arch)
    torch.save({"state_dict": {f"module.{name}": each for name, each in net.state_dict().items()}}, tmp_path / "a.pt")
    activation = {"tiny-vit": "gelu", QUICK: "quickgelu"}.get(arch)
    import_checkpoint(tmp_path / "a.pt", tmp_path / "in", arch=arch, activation=activation)
    assert torch.equal(loaded(tmp_path / "in"), plain_logits(net, arch))
    method = fitted(tmp_path / "in", tmp_path / "last.ckpt")
    expected = method_logits(method)
    scale = float(method.clip.logit_scale)
    assert (expected - loaded(tmp_path / "in")).abs().max() / scale > 100 * TOLERANCE, "training must show"
    export(method, tmp_path / "out")
    assert_same(loaded(tmp_path / "out"), expected, scale)
    assert_same(method_logits(ZeroShot(pretrained=str(tmp_path / "out"))), expected, scale)


@pytest.mark.parametrize("arch", ["tiny-vit", QUICK])
def test_a_hugging_face_folder_computes_the_methods_logits_and_comes_back(arch: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_file(random_net(arch).state_dict(), tmp_path / "a.safetensors")
    activation = "quickgelu" if arch == QUICK else "gelu"
    import_checkpoint(tmp_path / "a.safetensors", tmp_path / "in", arch=arch, activation=activation)
    method = fitted(tmp_path / "in", tmp_path / "last.ckpt")
    export(method, tmp_path / "hf", to="hf")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "hf")
    pixels = (torch.rand(3, 3, 32, 32) - method.clip.mean) / method.clip.std
    prompts = ["a photo of a cat", "two dogs, it's raining!", "x"]
    with torch.no_grad():
        theirs = model(**tokenizer(prompts, padding=True, return_tensors="pt"), pixel_values=pixels).logits_per_image
        ours, text, scale = method.clip.net(pixels, method.clip.tokenizer(prompts))
    assert_same(theirs, scale * ours @ text.T, float(scale))
    import_checkpoint(tmp_path / "hf", tmp_path / "again")
    before = method.clip.net.state_dict()
    after = load_file(tmp_path / "again" / "open_clip_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["TeCoA", "FARE", "FARE, whole"])
def test_an_authors_tower_gets_the_text_tower_of_the_base_model(kind: str, base: Path, tmp_path: Path) -> None:
    other = random_net(QUICK, seed=1)
    content: dict[str, Any] = {
        "TeCoA": {
            "epoch": 10,
            "state_dict": {},
            "add_prompter": {"token_embedding": torch.zeros(1, 0, 32)},
            "vision_encoder_state_dict": tower_of(other, "module."),
            "best_acc1": np.float64(38.2),
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-5}]},
        },
        "FARE": tower_of(other),
        "FARE, whole": tower_of(other, "module.visual."),
    }[kind]
    torch.save(content, tmp_path / "a.pth.tar")
    import_checkpoint(tmp_path / "a.pth.tar", tmp_path / "out", pretrained=str(base))
    expected = random_net(QUICK)
    expected.visual.load_state_dict(other.visual.state_dict())
    assert torch.equal(loaded(tmp_path / "out"), plain_logits(expected, QUICK))


def test_the_authors_towers_are_never_computed_with_gelu(base: Path, tmp_path: Path) -> None:
    torch.save({"vision_encoder_state_dict": tower_of(random_net(QUICK))}, tmp_path / "a.pth.tar")
    torch.save(random_net("tiny-vit").state_dict(), tmp_path / "base.pt")
    with pytest.raises(ValueError, match=f"QuickGELU, tiny-vit computes GELU; use --arch {QUICK}"):
        import_checkpoint(
            tmp_path / "a.pth.tar", tmp_path / "out", arch="tiny-vit", pretrained=str(tmp_path / "base.pt")
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth.tar", "base.pt"], "nothing is left behind"


@pytest.mark.parametrize(
    ("arch", "activation", "words"),
    [
        (QUICK, None, "--activation quickgelu or --activation gelu"),
        (QUICK, "gelu", "with GELU, tiny-vit-quickgelu computes QuickGELU; use --arch tiny-vit$"),
        ("tiny-vit", "quickgelu", f"use --arch {QUICK}"),
        (QUICK, "relu", "must be quickgelu or gelu"),
    ],
)
def test_an_activation_is_never_guessed(arch: str, activation: str | None, words: str, tmp_path: Path) -> None:
    torch.save(random_net(arch).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=words):
        import_checkpoint(tmp_path / "a.pt", tmp_path / "out", arch=arch, activation=activation)


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch exploited",)


@pytest.mark.parametrize("key", ["best_acc1", "vision_encoder_state_dict"])
def test_a_pickle_with_code_is_refused_and_not_run(
    key: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"vision_encoder_state_dict": tower_of(random_net(QUICK))} | {key: Exploit()}, "a.pth.tar")
    with pytest.raises(ValueError, match=r"calls for .*system, so it was not opened"):
        import_checkpoint(Path("a.pth.tar"), Path("out"), pretrained=str(base))
    assert not Path("exploited").exists()


def bad_content(name: str) -> Any:
    tower = tower_of(random_net(QUICK))
    contents: dict[str, Any] = {
        "other size": tower | {"proj": tower["proj"][:, :8]},
        "missing": {name: tensor for name, tensor in tower.items() if "ln_post" not in name},
        "unknown": tower | {"head.weight": torch.zeros(2)},
        "not finite": tower | {"proj": tower["proj"] * float("nan")},
        "prompts": {"vision_encoder_state_dict": tower, "add_prompter": {"tokens": torch.zeros(1, 5, 32)}},
        "prompts alone": {"state_dict": {}, "add_prompter": {}},
        "ours": {"base_model": {}, "state_dict": tower},
        "no tensors": {"a": 1, "b": "x", "c": None},
        "Hugging Face names": {"vision_model.x": torch.zeros(1)},
        "a list": [1],
    }
    return contents[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other size", "proj .* has size 32x8, the model takes 32x16"),
        ("missing", "lacks 'ln_post.bias', 'ln_post.weight'"),
        ("unknown", "has unknown 'head.weight'"),
        ("not finite", "proj of .*a.pt is not finite"),
        ("prompts", r"visual prompts \(add_prompter\) beside the tower"),
        ("prompts alone", "visual prompts alone"),
        ("ours", "robustclip export"),
        ("no tensors", "holds 'a', 'b' and 1 more, no state dict"),
        ("Hugging Face names", "give its folder"),
        ("a list", "must hold a mapping"),
    ],
)
def test_weights_of_another_tower_are_refused(name: str, words: str, base: Path, tmp_path: Path) -> None:
    torch.save(bad_content(name), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=words) as caught:
        import_checkpoint(tmp_path / "a.pt", tmp_path / "out", pretrained=str(base))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_was_cut_short_is_refused(suffix: str, share: float, base: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(tower_of(random_net(QUICK)), buffer)
    whole = buffer.getvalue() if suffix == ".pt" else safetensors.torch.save(tower_of(random_net(QUICK)))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=f"a{suffix} (is cut short|may contain code or is damaged)") as caught:
        import_checkpoint(path, tmp_path / "out", pretrained=str(base))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "holds an image tower; name the base model"),
        ({"arch": "tiny-vit-quickgelv", "pretrained": "a.pt"}, f"did you mean {QUICK}"),
        ({"arch": "tiny-resnet", "pretrained": "resnet.pt"}, "does not fit the image tower of tiny-resnet: it lacks"),
    ],
)
def test_a_wrong_base_model_is_reported(
    options: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(tower_of(random_net(QUICK)), "a.pt")
    torch.save(random_net("tiny-resnet").state_dict(), "resnet.pt")
    with pytest.raises(ValueError, match=words):
        import_checkpoint(Path("a.pt"), Path("out"), **options)


def test_nothing_is_overwritten(base: Path, tuned: TeCoA, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for write in (
        lambda: import_checkpoint(base.parent / "base.pt", tmp_path / "out", arch=QUICK, activation="quickgelu"),
        lambda: export(tuned, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="exists and is never overwritten"):
            write()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "blip"}, "model of type 'blip'; only clip and siglip"),
        ({"vision_config": {"hidden_act": "gelu"}}, "in both towers, got gelu, quick_gelu"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps must be 1e-5"),
        ({"vision_config": {"num_hidden_layers": 1}}, "do not fit its config.json: .*resblocks.1"),
        (None, "has no config.json"),
    ],
)
def test_other_hugging_face_folders_are_refused(
    change: dict[str, Any] | None, words: str, tuned: TeCoA, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    export(tuned, tmp_path / "hf", to="hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    for key, value in (change or {}).items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    if change is None:
        path.unlink()
    with pytest.raises(ValueError, match=words) as caught:
        import_checkpoint(tmp_path / "hf", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


class Adapted(TeCoA):
    """Has an adapter behind the image tower."""

    def image_features(self, images: Tensor) -> Tensor:
        return F.normalize(super().image_features(images) + 0.1, dim=-1)


class Prompted(TeCoA):
    """Has prompts of its own."""

    def class_features(self, task: Task) -> Tensor:
        return F.normalize(super().class_features(task) + 0.1, dim=-1)


@pytest.mark.parametrize(("cls", "part"), [(Adapted, "image"), (Prompted, "class")])
@pytest.mark.parametrize("to", ["open_clip", "hf"])
def test_an_export_refuses_parts_beside_the_towers(
    cls: type[TeCoA], part: str, to: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__} adds to the towers .* {part} features"):
        export(cls(pretrained=str(base)), tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arch", "words"), [("tiny-resnet", "ResNet"), ("tiny-convnext", "timm"), ("tiny-sigmoid", "custom_text")]
)
def test_other_architectures_have_no_place_in_a_hugging_face_clip(arch: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no .*{words}.*export --to open_clip"):
        export(ZeroShot(arch=arch, pretrained=None), tmp_path / "out", to="hf")


@pytest.mark.parametrize("to", ["open_clip", "hf"])
def test_another_image_size_goes_out_with_the_model(to: str, base: Path, tmp_path: Path) -> None:
    method = ZeroShot(pretrained=str(base), image_size=48)
    export(method, tmp_path / "out", to=to)
    if to == "hf":
        import_checkpoint(tmp_path / "out", tmp_path / "again")
    again = ZeroShot(pretrained=str(tmp_path / ("again" if to == "hf" else "out")))
    assert again.image_size == 48
    assert torch.equal(method_logits(again), method_logits(method))


def test_the_embedded_model_goes_out_with_its_tokenizer(tmp_path: Path) -> None:
    export(ZeroShot(pretrained="shapes"), tmp_path / "out")
    assert (tmp_path / "out" / "bpe_shapes.txt.gz").is_file()
    again = ZeroShot(pretrained=str(tmp_path / "out"))
    assert torch.equal(method_logits(again), method_logits(ZeroShot(pretrained="shapes")))


def test_a_damaged_copy_is_noticed_before_it_gets_its_name(
    tuned: TeCoA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check at export must see what a wrong conversion would do."""
    for to, name in (("open_clip", "write_config"), ("hf", "write_weights")):
        real = getattr(open_clip_folder, name)

        def damage(place: Any, *values: Any, real: Any = real, to: str = to) -> None:
            if to == "open_clip":
                real(place, {**values[0], "quick_gelu": False}, values[1])
            else:
                real(place, {**values[0], "logit_scale": values[0]["logit_scale"] + 1})

        with monkeypatch.context() as patched:
            patched.setattr(open_clip_folder, name, damage)
            with pytest.raises(ValueError, match="other logits"):
                export(tuned, tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return trained_by_command(tmp_path_factory.mktemp("trained"))


def test_a_checkpoint_and_its_test_go_out_by_command(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, test = trained
    for name, words in (("a", [str(checkpoint), "--results", str(test)]), ("b", [str(test), "--to=open_clip"])):
        assert run(["export", *words, "--out", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / name)
    weights = [load_file(tmp_path / name / "open_clip_model.safetensors") for name in "ab"]
    learned = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, tensor in learned.items():
        assert torch.equal(weights[0][name.removeprefix("clip.net.")], tensor)
        assert torch.equal(weights[1][name.removeprefix("clip.net.")], tensor)
    cards = [(tmp_path / name / "README.md").read_text() for name in "ab"]
    assert cards[0] == cards[1]


def test_the_model_card_states_training_and_results(trained: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, test = trained
    assert run(["export", str(checkpoint), "--results", str(test), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    result = json.loads((test / "result.json").read_text())
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["pipeline_tag"] == "zero-shot-image-classification"
    assert header["datasets"] == ["source"]
    assert "https://arxiv.org/abs/2212.07016" in card.split("## Citation")[1]
    assert "# TeCoA on shapes" in card
    assert "| training data | shapes:source |" in card
    assert "| training attack | PGD(eps=5/255, alpha=3.75/255, steps=2" in card
    assert "AdamW(lr=0.003" in card
    assert f"{100 * result['mean']['clean']['acc1']:.1f}" in card
    hashes = {task: {k: v["hash"] for k, v in attacks.items()} for task, attacks in result["protocol"].items()}
    text = json.dumps(hashes, sort_keys=True, separators=(",", ":"))
    assert f"Protocol {hashlib.sha256(text.encode()).hexdigest()[:16]}" in card


def test_results_of_other_weights_are_not_claimed(trained: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a test of other weights"):
        export(ZeroShot(pretrained="shapes"), tmp_path / "out", results=trained[1])


@pytest.mark.parametrize(("seed", "is_doubted"), [(0, False), (1, True)])
def test_a_base_model_unrelated_to_the_weights_is_reported(
    seed: int, is_doubted: bool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tower_of(random_net(QUICK))
    matrices = {name: each.double() for name, each in tower_of(random_net(QUICK, seed)).items() if each.ndim >= 2}
    a, b = (torch.cat([each[name].double().flatten() for name in matrices]) for each in (own, matrices))
    torch.save(tower_of(random_net(QUICK, seed)), tmp_path / "a.pt")
    import_checkpoint(tmp_path / "a.pt", tmp_path / "out", pretrained=str(base))
    told = capsys.readouterr().out
    assert f"--pretrained: {float(F.cosine_similarity(a, b, dim=0)):.3f}" in told
    assert ("hardly theirs" in told) == is_doubted


def test_import_by_command_answers_in_lines(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tower_of(random_net(QUICK, seed=1)), tmp_path / "a.pt")
    words = [str(tmp_path / "a.pt"), "--arch", QUICK, "--pretrained", str(base.parent / "base.pt")]
    assert run(["import", *words, "--activation", "quickgelu", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    assert run(["import", *words, "--activation", "gelu", "--out", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the weights were trained with GELU")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a.ckpt", "--out", "x"], "'a.ckpt' is no file"),
        (["a.ckpt", "--out", "x", "--config", str(DEMO)], "'a.ckpt' is no file"),
        (["a.ckpt"], "out is missing"),
        (["{run}", "--out", "x", "--model.arch", "y"], "has its own settings"),
        (["{checkpoint}", "--out", "x", "--to", "onnx"], "to must be one of open_clip, hf, got 'onnx'"),
        (["{checkpoint}", "--out", "x", "--to", "hf"], "no ResNet tower"),
        (["{checkpoint}", "--out", "x", "--model.last_blocks", "99"], "last_blocks must be in"),
    ],
)
def test_export_reports_bad_input_in_one_line(
    words: list[str], told: str, trained: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"checkpoint": str(trained[0]), "run": str(trained[1])}
    assert run(["export", *(word.format(**places) for word in words)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not Path("x").exists()
