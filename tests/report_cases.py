"""Finished tests that are drawn from a seed, and a reader of pages, for test_report.py."""

import csv
import json
import random
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from robustclip.results.adversarial_examples import Example, save
from robustclip.results.ledger import columns
from robustclip.results.protocol import attack_axes, digest
from robustclip.results.run import EXAMPLES, LEDGERS, RESULT

EPS = {"pgd10_half": 0.5 / 255, "pgd10": 1 / 255, "autoattack": 1 / 255}
MEMBERS = {"pgd10_half": ["pgd"], "pgd10": ["pgd"], "autoattack": ["pgd", "apgd_ce", "apgd_t", "fab_t", "square"]}
CLASSES = ["circle", "<script>alert(1)</script>", "star & cross", "square"]
FEW = ("pgd10",)  # for speed, where the attacks do not matter
N = 20


def make_run(
    folder: Path,
    *,
    method: str = "TeCoA",
    tasks: tuple[str, ...] = ("cifar10", "pcam"),
    attacks: tuple[str, ...] = tuple(EPS),
    n: int = N,
    clean: float = 0.7,
    strength: float = 0.5,
    templates: tuple[str, ...] = ("a photo of a {}",),
    **changes: Any,
) -> Path:
    """A finished test whose every sample is drawn from a seed."""
    draw = random.Random(folder.name)
    (folder / LEDGERS).mkdir(parents=True)
    told: dict[str, Any] = {}
    for task in tasks:
        level = clean + draw.uniform(-0.2, 0.2)
        by = {attack: draw_verdicts(draw, attack, n, level, strength) for attack in attacks}
        write_ledger(folder / LEDGERS / f"{task}.csv", by, n)
        told[task] = {"n": n, "seconds": round(draw.uniform(1, 90), 3), "bad_samples": 0}
        first = by[attacks[0]] if attacks else draw_verdicts(draw, "pgd10", n, level, strength)
        told[task]["clean"] = score(["" if who != "clean" else who for who in first], [])
        told[task] |= {kind: score(values, MEMBERS[kind]) for kind, values in by.items()}
    kinds = ["clean", *attacks]
    mean = {kind: sum(told[task][kind]["acc1"] for task in tasks) / len(tasks) for kind in kinds}
    result = {
        "method": method,
        "finished": "2026-11-23T01:30:00+00:00",
        "versions": {"robustclip": "0.3.0", "torch": "2.9.1"},
        "commit": "07c0fa6",
        "device": "1 x cpu, precision 32-true",
        "config": {},
        "model": {
            "arch": "ViT-B-32",
            "pretrained": "openai",
            "image_size": 224,
            "weights": "0" * 16,
            "checkpoint": None,
        },
        "tasks": told,
        "mean": {
            kind: {"acc1": value, "interval": [max(value - 0.03, 0.0), value + 0.03]} for kind, value in mean.items()
        },
        "classes": {task: {"class_names": CLASSES, "templates": list(templates)} for task in tasks},
        "protocol": {task: {kind: axes(task, kind, templates) for kind in kinds} for task in tasks},
        "notes": ["pcam under autoattack: 2 classes: no targeted loss"],
        "audit": {"grade": "B", "checks": checks()},
        **changes,
    }
    (folder / RESULT).write_text(json.dumps(result))
    return folder


def draw_verdicts(draw: random.Random, attack: str, n: int, clean: float, strength: float) -> list[str]:
    scale = strength * EPS[attack] * 255 * (1.15 if attack == "autoattack" else 1.0)
    rest = [0.0] + [0.06] * (len(MEMBERS[attack]) - 1)
    weights = [max(scale - sum(rest), 0.05), *rest[1:], max(1 - scale, 0.01)]
    wrong = round((1 - clean) * n)  # the first ones, under every attack
    return ["clean"] * wrong + draw.choices([*MEMBERS[attack], ""], weights, k=n - wrong)


def score(by: list[str], members: list[str]) -> dict[str, Any]:
    right, counts = by.count(""), Counter(by)
    value = right / len(by)
    broken = {name: counts[name] for name in members}
    interval = [max(value - 0.07, 0.0), min(value + 0.07, 1.0)]
    return {"acc1": value, "correct": right, "interval": interval, "broken_by": broken}


def write_ledger(path: Path, by: dict[str, list[str]], n: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns(list(by)), restval="")
        writer.writeheader()
        for number in range(n):
            verdicts = {f"{attack}.by": who[number] for attack, who in by.items()}
            is_wrong = any(verdict == "clean" for verdict in verdicts.values())
            writer.writerow({"id": number, "label": 0, "clean": int(is_wrong), **verdicts})


def axes(task: str, kind: str, templates: tuple[str, ...]) -> dict[str, Any]:
    shared = {"templates": list(templates), "class_names": "10, digest 1", "split": f"{task} test"}
    shared |= {"sample_ids": "200, digest 2", "preprocessing": "Resize(224)", "attack_space": "224 x 224"}
    if kind != "clean":
        shared |= attack_axes({name: {"eps": EPS[kind], "steps": 10} for name in MEMBERS[kind]})
        shared |= {"precision": "32-true", "stop_rule": "worst"}
    shared["model_preprocessing"] = "resize 224, openai mean and std"
    return {"hash": digest(shared), "axes": shared}


def checks() -> list[dict[str, str]]:
    return [
        {"name": "zero_gradients", "status": "pass", "found": "0.0 % of 1,234 gradients", "why": "None hid a sample."},
        {"name": "larger_ball", "status": "warn", "found": "1 sample <b>held</b>", "why": "Use more steps."},
        {"name": "black_box", "status": "not_measured", "found": "no black-box attack", "why": "Add square."},
    ]


def keep_example(run: Path, number: int, *, task: str = "cifar10", attack: str = "pgd10") -> None:
    clean = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(number))
    attacked = (clean + EPS[attack] * torch.sign(clean - 0.5)).clamp(0, 1)
    save(Example(clean, attacked, task, attack, number, 0, 0, 1, "pgd", EPS[attack], "linf"), run / EXAMPLES)


class Reader(HTMLParser):
    """Checks the nesting; collects tables, attributes and the names of the elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.names: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "table":
            self._rows = []
        elif tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if "caption" in self.open:
            self._caption += data.strip()
        elif {"td", "th"} & set(self.open) and "table" in self.open:
            self._rows[-1][-1] += f" {data.strip()}"
