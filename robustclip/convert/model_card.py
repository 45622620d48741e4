"""The README.md of an exported model, with the header that the Hugging Face Hub reads."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustclip.methods import RobustMethod
from robustclip.models.clip import CLIPModel
from robustclip.names import markdown
from robustclip.results.protocol import digest
from robustclip.results.run import Run
from robustclip.results.tables import markdown_table
from robustclip.types import RESIZES, Crop

LIBRARIES = {"open_clip": "open_clip", "hf": "transformers"}  # by the format; names as the Hub spells them
LIBRARY_CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel"}  # by the library's ``model_type``
# Repositories of the Hub with OpenAI's weights by open_clip's architectures.
OPENAI = {
    "ViT-B-32": "openai/clip-vit-base-patch32",
    "ViT-B-16": "openai/clip-vit-base-patch16",
    "ViT-L-14": "openai/clip-vit-large-patch14",
    "ViT-L-14-336": "openai/clip-vit-large-patch14-336",
}


def model_card(
    method: RobustMethod, *, to: str, crop: Crop | None, training: Mapping[str, Any] | None, run: Run | None
) -> str:
    """Writes the model card: header, base model, training, measured accuracy and citation.

    Args:
        method: exported method.
        to: format of the folder, a key of `LIBRARIES`.
        crop: resize and crop of the test or training; None if it is not recorded.
        training: settings of ``robustclip fit``; None if they are not recorded.
        run: finished test of this model; None without one.
    """
    clip, name = method.clip, type(method).__name__
    base = str(clip.arch or Path(str(clip.pretrained)).name)
    base += f", {clip.pretrained}" if clip.arch and clip.pretrained else ""
    base = " at commit ".join(clip.source.values()) or base
    facts = {"method": name, "base model": base, **_facts(training, has_attacked=method.has_attacked)}
    table = "".join(f"| {key} | {markdown(value)} |\n" for key, value in facts.items())
    return f"""{_header(clip, to, training)}
# {markdown(name)} on {markdown(base)}

Fine-tuned and exported by robustclip.

| | |
| --- | --- |
{table}
```python
{_loading(clip, to)}
```

{_pixels(to, clip, crop)}

## Results

{_results(run)}
## Citation

{_citation(method)}
"""


def _loading(clip: CLIPModel, to: str) -> str:
    """Writes the line that loads the folder with its library."""
    if to == "hf":
        return (
            f'model = transformers.{LIBRARY_CLASSES["siglip" if clip.tower else "clip"]}.from_pretrained("THIS_FOLDER")'
        )
    if clip.tower:  # timm searches for the tower's definition in the working folder
        return 'model = open_clip.create_model("local-dir:.")  # in this folder'
    return 'model = open_clip.create_model("local-dir:THIS_FOLDER")'


def _header(clip: CLIPModel, to: str, training: Mapping[str, Any] | None) -> str:
    """Writes the YAML header of the Hub; the licence is that of the base model, which is not recorded."""
    data = {} if training is None else dict(training["data"].get("init_args") or training["data"])
    train = data.get("train")
    names = [train] if isinstance(train, str) else []
    lines = {
        "library_name": LIBRARIES[to],
        "pipeline_tag": "zero-shot-image-classification",
        "license": "unknown",
        "tags": ["robustclip", "clip", "adversarial-robustness"],
    }
    arch = str(clip.arch).removesuffix("-quickgelu")
    if clip.pretrained == "openai" and arch in OPENAI:
        lines["base_model"] = OPENAI[arch]
    if repository := clip.source.get("repository"):
        lines["base_model"] = repository
    if names:
        lines["datasets"] = [re.sub(r"^\w+:", "", name) for name in names]
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()) + "---\n"


def _citation(method: RobustMethod) -> str:
    """Names the paper of the method by its address, and this package."""
    paragraph = (type(method).__doc__ or "").split("\n\n")[0]
    addresses = re.findall(r"https?://[^\s,;)]+", paragraph)
    paper = f"The method is by others: {' '.join(addresses)}. " if addresses else ""
    return f"{paper}Please cite its paper, that of the base model, and robustclip (CITATION.cff)."


def _pixels(to: str, clip: CLIPModel, crop: Crop | None) -> str:
    """Describes in the model card how images are prepared, with code where the folder's configuration cannot."""
    rest = "Images of another size are resized by the model in robustclip (bicubic, without antialiasing)."
    if crop is None:
        return f"How images were prepared is not recorded. {rest}"
    size, resize = clip.image_size, RESIZES[crop]
    side = resize.short_side(size)
    how = f"short side {side} ({resize.interpolation}, antialiased), centre crop {size}"
    if resize.is_squashed:
        how = f"squashed to {size} x {size} ({resize.interpolation}, antialiased)"
    start = f"Images were prepared by `crop: {crop}`: {how}. {rest}"
    if to == "hf" or crop != "tecoa":
        return f"{start} The folder's own preprocessing does the same."
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


def _facts(training: Mapping[str, Any] | None, *, has_attacked: bool | None) -> dict[str, str]:
    if training is None:
        return {"training": "not recorded"}
    model = dict(training["model"].get("init_args") or {})
    data = dict(training["data"].get("init_args") or training["data"])
    trainer = training.get("trainer") or {}
    steps = trainer.get("max_steps")
    return {
        "training data": _flat(data.get("train")),
        "training attack": _flat(None if has_attacked is False else model.get("attack")),
        "optimiser": _flat(model.get("optimizer")),
        "epochs": "at most "
        + str(trainer.get("max_epochs"))
        + (f", or {steps} steps" if steps not in (None, -1) else ""),
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
