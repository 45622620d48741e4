"""The command ``robustclip export``, which converts a fine-tuned model to a folder for other programs."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from robustclip.convert import hugging_face, open_clip_folder
from robustclip.methods import RobustMethod
from robustclip.models.clip import CLIPModel, fingerprint
from robustclip.models.layers import frozen
from robustclip.models.lora import merged_state
from robustclip.models.weight_origin import write_origin
from robustclip.names import markdown
from robustclip.persistence import atomic_folder
from robustclip.results.protocol import digest
from robustclip.results.run import Run
from robustclip.results.tables import markdown_table
from robustclip.types import RESIZES, Crop

DATA_MODULE = "CLIPDataModule"

LOADING = {
    "open_clip": 'model = open_clip.create_model("local-dir:THIS_FOLDER")',
    "hf": 'model = transformers.CLIPModel.from_pretrained("THIS_FOLDER")',
}


def export(
    method: RobustMethod,
    out: Path,
    *,
    to: str = "open_clip",
    training: Mapping[str, Any] | None = None,
    results: Path | None = None,
) -> None:
    """Writes weights, configuration, tokenizer and a model card, and checks that they give the method's logits.

    Args:
        method: method with its trained weights.
        out: folder to write; it must not exist.
        to: ``open_clip`` for its local-dir layout, ``hf`` for a Hugging Face ``CLIPModel``.
        training: settings of ``robustclip fit``, for the model card.
        results: folder of a finished test of this model, for the model card.

    Raises:
        ValueError: the method adds something to the towers at inference, the format does not support the architecture,
            the folder gives other logits, the results are of other weights, or ``out`` exists.
    """
    if to not in LOADING:
        raise ValueError(f"to must be one of {', '.join(LOADING)}, got {to!r}")
    run = None if results is None else Run.open(results)
    clip = method.eval().clip.float()
    if run is not None and run.result.get("model", {}).get("weights") != fingerprint(method):
        raise ValueError(f"{results} is a test of other weights, which the model card must not claim; test this model")
    _check_is_towers_alone(method)
    crop = _crop(training, run)
    with atomic_folder(out) as aside:
        difference = (_write_open_clip if to == "open_clip" else _write_hugging_face)(clip, aside, crop)
        base = str(clip.arch or Path(str(clip.pretrained)).name)
        source = f", {clip.pretrained}" if clip.arch and clip.pretrained else ""
        pixels = _pixels(to, clip, crop)
        name = type(method).__name__
        card = _model_card(name, to=to, base=f"{base}{source}", pixels=pixels, training=training, run=run)
        (aside / open_clip_folder.README).write_text(card, encoding="utf-8")
        attack = None if method.attack is None else repr(method.attack)
        write_origin(aside, method=type(method).__name__, training_attack=attack, base=clip.fingerprint)
    sys.stdout.write(f"the logits are the method's (cosines within {difference:.0e})\n{out}\n")


def _check_is_towers_alone(method: RobustMethod) -> None:
    """Refuses a method that computes more than its two towers, which exported formats cannot represent."""
    clip = method.clip
    with torch.no_grad(), frozen(method):
        own = open_clip_folder.similarities(clip)
        for part, logits in (
            ("image", open_clip_folder.similarities(clip, image_features=method.image_features)),
            ("class", open_clip_folder.similarities(clip, class_features=method.class_features)),
        ):
            difference = float((logits.cosines - own.cosines).abs().max())
            if not difference <= open_clip_folder.TOLERANCE:  # nan is refused too
                raise ValueError(
                    f"{type(method).__name__} adds to the towers at inference (cosines of its {part} features differ by"
                    f" {difference:.1e}), as prompts, adapters and heads do; neither format supports this"
                )
    if added := [name for name in method.state_dict() if not name.startswith("clip.")]:
        raise ValueError(f"{type(method).__name__} has {added[0]!r} beside the towers; neither format supports it")


def _crop(training: Mapping[str, Any] | None, run: Run | None) -> Crop | None:
    """Returns the crop of the test, or else of the training; None if an own data module prepared the images."""
    config = (None if run is None else run.result.get("config")) or training
    data = dict((config or {}).get("data") or {})
    if not data or not str(data.get("class_path", DATA_MODULE)).endswith(DATA_MODULE):
        return None
    crop = (data.get("init_args") or data).get("crop", "tecoa")  # older settings lack the key, and had this crop
    return "clip" if crop == "clip" else "tecoa"


def _pixels(to: str, clip: CLIPModel, crop: Crop | None) -> str:
    """Describes in the model card how images are prepared, with code where the folder's configuration cannot."""
    rest = "Images of another size are resized by the model in robustclip (bicubic, without antialiasing)."
    if crop is None:
        return f"How images were prepared is not recorded. {rest}"
    size, resize = clip.image_size, RESIZES[crop]
    side = resize.short_side(size)
    how = f"short side {side} ({resize.interpolation}, antialiased), centre crop {size}"
    start = f"Images were prepared by `crop: {crop}`: {how}. {rest}"
    if to == "hf" or crop == "clip":
        return f"{start} The folder's own preprocessing does the same crop."
    mean, std = (tuple(round(value, 8) for value in tensor.flatten().tolist()) for tensor in (clip.mean, clip.std))
    return f"""{start} open_clip's configuration cannot state this short side, so use this transform instead of
open_clip's:

```python
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

preprocess = Compose([
    Resize({side}, InterpolationMode.{resize.interpolation.upper()}), CenterCrop({size}), ToTensor(),
    Normalize({mean}, {std}),
])
```"""


def _write_open_clip(clip: CLIPModel, folder: Path, crop: Crop | None) -> float:
    open_clip_folder.write(clip, folder, crop)
    return open_clip_folder.check_folder(folder, clip)


def _write_hugging_face(clip: CLIPModel, folder: Path, crop: Crop | None) -> float:
    settings = hugging_face.clip_config(open_clip_folder.config_of(clip))
    settings.architectures = ["CLIPModel"]
    settings.save_pretrained(folder)
    open_clip_folder.write_weights(folder / "model.safetensors", hugging_face.from_open_clip(merged_state(clip.net)))
    hugging_face.write_tokenizer(clip, folder, crop or "clip")
    return open_clip_folder.check_parity(
        open_clip_folder.similarities(clip), hugging_face.library_similarities(folder, clip)
    )


def _model_card(
    method: str, *, to: str, base: str, pixels: str, training: Mapping[str, Any] | None = None, run: Run | None = None
) -> str:
    """Writes the README.md of an exported model: its method, training and measured accuracy."""
    facts = {"method": method, "base model": base, **_facts(training)}
    table = "".join(f"| {name} | {markdown(value)} |\n" for name, value in facts.items())
    return f"""# {markdown(method)} on {markdown(base)}

Fine-tuned and exported by robustclip.

| | |
| --- | --- |
{table}
```python
{LOADING[to]}
```

{pixels}

## Results

{_results(run)}"""


def _facts(training: Mapping[str, Any] | None) -> dict[str, str]:
    if training is None:
        return {"training": "not recorded"}
    model = dict(training["model"].get("init_args") or {})
    data = dict(training["data"].get("init_args") or training["data"])
    return {
        "training data": _flat(data.get("train")),
        "training attack": _flat(model.get("attack")),
        "optimiser": _flat(model.get("optimizer")),
        "epochs": str(training.get("trainer", {}).get("max_epochs")),
        "seed": str(training.get("seed_everything")),
    }


def _flat(value: Any) -> str:
    """Formats settings for one cell of a table: ``PGD(eps=1/255, steps=2)``."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = (value.get("init_args") or {}).items()
        listed = ", ".join(f"{name}={_flat(argument)}" for name, argument in arguments if argument is not None)
        return f"{value['class_path'].rpartition('.')[2]}({listed})"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_flat(entry)}" for name, entry in value.items() if entry is not None)
    return "none" if value is None else str(value)


def _results(run: Run | None) -> str:
    if run is None:
        return "None were given.\n"
    protocols = {
        task: {attack: protocol["hash"] for attack, protocol in attacks.items()}
        for task, attacks in run.result["protocol"].items()
    }
    tasks: dict[str, list[str]] = {}
    for task, attacks in run.result["protocol"].items():
        tasks.setdefault(str(attacks["clean"]["axes"].get("preprocessing")), []).append(markdown(task))
    lines = "".join(f"- {markdown(text)}: {', '.join(names)}\n" for text, names in tasks.items())
    return (
        f"Top-1 accuracy in percent with 95 % intervals. Protocol {digest(protocols)}: numbers of another protocol must"
        f" not be compared with these.\n\n{markdown_table(run.result)}\nPreprocessing of the test:\n\n{lines}"
    )
