"""Clean and attacked images of each run."""

import base64
import io
from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor

from robustclip import examples
from robustclip.examples import Example
from robustclip.runs import EXAMPLES
from robustclip.tools.report.html import disclosure, escape, tag
from robustclip.tools.report.view import View

PER_TASK = 3
LARGEST_GREY = 255
HOW = "No images: the test kept none. Run it with --evaluation.save_examples N to keep N per task and attack."


def section(views: Sequence[View]) -> str:
    """Per run, what `examples` finds; the first run's are open."""
    parts = []
    for view in views:
        found = list(examples.load_all(view.run.folder / EXAMPLES))
        shown = _chosen(found)
        if not found:
            parts.append(tag("h3", escape(view.label)) + tag("p", escape(HOW), class_="aside"))
            continue
        summary = f"{escape(view.label)} <small>{len(shown)} of {len(found)} images kept</small>"
        tasks = dict.fromkeys(example.task for example in shown)
        groups = [_group(view, task, [each for each in shown if each.task == task]) for task in tasks]
        parts.append(disclosure(summary, *groups, is_open=view.number == 0))
    return "".join(parts)


def _chosen(found: Iterable[Example]) -> list[Example]:
    """The first of each task, its attacks in turn."""
    turns: dict[str, dict[str, list[Example]]] = {}
    for example in found:
        turns.setdefault(example.task, {}).setdefault(example.attack, []).append(example)
    chosen = []
    for by_attack in turns.values():
        ranked = [
            (turn, place, each) for place, kept in enumerate(by_attack.values()) for turn, each in enumerate(kept)
        ]
        chosen += [each for _, _, each in sorted(ranked, key=lambda item: item[:2])[:PER_TASK]]
    return chosen


def _group(view: View, task: str, shown: Sequence[Example]) -> str:
    return tag("h4", escape(task)) + tag("div", *(_card(view, each) for each in shown), class_="cards")


def _card(view: View, example: Example) -> str:
    perturbation, factor = _amplified(example)
    pictures = [
        _picture(example.clean, "clean", _predicted(view, example, example.clean_prediction)),
        _picture(perturbation, f"difference \N{MULTIPLICATION SIGN}{factor:.3g}", ""),
        _picture(example.attacked, "attacked", _predicted(view, example, example.prediction)),
    ]
    by = "wrong without an attack" if example.by == "clean" else f"broken by {example.by}" if example.by else "robust"
    facts = [example.attack, f"{example.norm} {_radius(example)}", by, f"sample {example.number}"]
    label = tag("b", escape(_name(view, example.task, example.label)))
    caption = tag("figcaption", f"label {label} ", tag("small", escape(" · ".join(facts))))
    return tag("figure", tag("div", *pictures, class_="triple"), caption, class_="card")


def _picture(image: Tensor, what: str, prediction: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(_png(image)).decode()
    text = tag("span", escape(what)) + prediction
    return tag("div", tag("img", src=source, alt=f"{what} image"), text)


def _predicted(view: View, example: Example, prediction: int) -> str:
    sign, said = ("✓", "right") if prediction == example.label else ("✕", "wrong")
    mark = tag("abbr", sign, title=said, class_=said)
    return tag("span", f"{mark} {escape(_name(view, example.task, prediction))}", class_="prediction")


def _amplified(example: Example) -> tuple[Tensor, float]:
    """The difference around grey, so large that its largest value just fits."""
    difference = torch.nan_to_num(example.attacked - example.clean, nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(difference.abs().max())
    factor = 0.5 / largest if largest else 1.0
    return 0.5 + factor * difference, factor


def _png(image: Tensor) -> bytes:
    levels = torch.nan_to_num(image).clamp(0, 1).mul(LARGEST_GREY).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy()).save(file, format="PNG", optimize=True)
    return file.getvalue()


def _radius(example: Example) -> str:
    return f"{LARGEST_GREY * example.eps:.3g}/255" if example.norm == "linf" else f"{example.eps:.3g}"


def _name(view: View, task: str, number: int) -> str:
    names = view.run.result.get("classes", {}).get(task, {})
    names = names.get("label_names", names.get("class_names"))
    return str(names[number]) if isinstance(names, list) and number < len(names) else f"class {number}"
