"""Configurations with one fault each, made from the project's own: which key is at fault is known."""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[1] / "robustclip" / "configs"
# Values that no scalar key takes, and values that some keys take.
NEVER: tuple[Any, ...] = ({"nonesuch": 1}, [[{"nonesuch": 1}]])
PERHAPS: tuple[Any, ...] = ("many", None, True, -1, 10**30, float("nan"), float("inf"), 0.5, "", [], {}, ["x"], "-")


@dataclass(frozen=True)
class Mutation:
    """One command line, its configuration, and the key that a refusal must name.

    Args:
        name: of the case.
        words: command line; ``{at}`` stands for the folder of the files.
        key: last part of the dotted key that is at fault.
        content: makes ``run.yaml``, since most mutations of a long list are not drawn.
        may_pass: whether the value may be a valid one.
        kind: of the fault.
    """

    name: str
    words: tuple[str, ...]
    key: str
    content: Callable[[], bytes]
    may_pass: bool = False
    kind: str = ""


def whole(path: Path) -> dict[str, Any]:
    """A configuration in one piece, of a model and a machine that are always there."""
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    for section in ("trainer", "data", "evaluation"):
        if isinstance(tree.get(section), str):
            tree[section] = yaml.safe_load((path.parent / tree[section]).read_text())
    tree["trainer"] |= {"accelerator": "cpu", "devices": 1, "precision": "32-true", "logger": False}
    arguments = tree["model"].setdefault("init_args", {})
    for name in ("arch", "image_size"):
        arguments.pop(name, None)
    arguments["pretrained"] = "shapes"
    return tree


def paths(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and item of a tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield (*at, key)
        yield from paths(value, (*at, key))


def get(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    get(tree, path[:-1])[path[-1]] = value
    return tree


def renamed(tree: Any, path: tuple[Any, ...], name: str) -> Any:
    tree = copy.deepcopy(tree)
    parent = get(tree, path[:-1])
    parent[name] = parent.pop(path[-1])
    return tree


def named(path: tuple[Any, ...]) -> str:
    """Last part of a dotted key: items of lists and the frames of classes have no name of their own."""
    return next(key for key in reversed(path) if isinstance(key, str) and key not in ("class_path", "init_args"))


def without(tree: Any, path: tuple[Any, ...]) -> Any:
    tree = copy.deepcopy(tree)
    del get(tree, path[:-1])[path[-1]]
    return tree


def moved(tree: Any, path: tuple[Any, ...], to: tuple[Any, ...]) -> Any:
    found = without(tree, path)
    for key in to[:-1]:
        found.setdefault(key, {})
    get(found, to[:-1])[to[-1]] = get(tree, path)
    return found


def dumped(change: Callable[..., Any], tree: Any, *values: Any) -> bytes:
    content = change(tree, *values)
    return content if isinstance(content, bytes) else yaml.safe_dump(content, sort_keys=False).encode()


FREE = ("attacks", "fit_attacks", "averages")  # mappings whose keys are the user's own


def misspelt(name: str, chance: random.Random) -> str:
    place = chance.randrange(1, len(name))
    return name[:place] + chance.choice(("", name[place] * 2, "z" + name[place])) + name[place + 1 :]


def of_tree(config: str, tree: dict[str, Any], chance: random.Random) -> Iterator[Mutation]:
    command = "test" if "class_path: ZeroShot" in yaml.safe_dump(tree) else "fit"

    def case(
        kind: str, path: tuple[Any, ...], change: Callable[..., Any], *values: Any, key: str, may_pass: bool = False
    ) -> Mutation:
        content = partial(dumped, change, tree, path, *values)
        name = f"{config} {kind} {'.'.join(map(str, path))}"
        return Mutation(name, (command, "--config", "{at}/run.yaml"), key, content, may_pass, kind.partition(" as ")[0])

    for path in paths(tree):
        last = path[-1]
        is_free = len(path) > 1 and path[-2] in FREE
        if isinstance(last, str) and last not in ("class_path", "init_args") and not is_free:
            name = misspelt(last, chance)
            if name != last:
                yield case(f"misspelt as {name}", path, renamed, name, key=name)
        if isinstance(last, str):
            yield case("twice", path, twice, key=last)
        if last == "class_path":
            for other in ("TeCoAA", "torch.nn.Linear", "nonesuch.Nonesuch", "torch.nonesuch", 3, None, ["PGD"], ""):
                yield case(f"set to {other!r}", path, changed, other, key=named(path))
            has_default = isinstance(path[-2], str) and path[-3:-2] not in [(name,) for name in FREE]
            yield case("left out", path, without, key=named(path), may_pass=has_default)
        elif last == "init_args":
            for other in ("text", ["a", "b"], 3, True):
                yield case(f"set to {other!r}", path, changed, other, key=named(path))
        else:
            for other in NEVER:
                yield case(f"set to {other!r}", path, changed, other, key=named(path), may_pass=is_free)
            for other in PERHAPS:
                # The parser takes null for every argument; what the class makes of it is for the class to say.
                key = "" if other is None and "init_args" in path else named(path)
                yield case(f"set to {other!r}", path, changed, other, key=key, may_pass=True)
        if len(path) == 2 and path[0] in ("trainer", "checkpoint", "results") and last not in ("class_path",):
            yield case("moved to the top", path, moved, (last,), key=str(last))
            other = "trainer" if path[0] != "trainer" else "checkpoint"
            yield case(f"moved to {other}", path, moved, (other, last), key=str(last))


def twice(tree: Any, path: tuple[Any, ...]) -> bytes:
    """The same key in two lines of one mapping."""
    marked = changed(tree, path, get(tree, path))
    parent = get(marked, path[:-1])
    parent["TWICE"] = parent[path[-1]]
    return yaml.safe_dump(marked, sort_keys=False).replace("TWICE:", f"{path[-1]}:").encode()


def spread(mutations: list[Mutation], chance: random.Random, count: int) -> list[Mutation]:
    """Draws as many of each kind, since values of a wrong type would outnumber all others."""
    kinds: dict[str, list[Mutation]] = {}
    for mutation in mutations:
        kinds.setdefault(mutation.kind, []).append(mutation)
    for members in kinds.values():
        chance.shuffle(members)
    chosen: list[Mutation] = []
    while len(chosen) < count:
        chosen += [members.pop() for members in kinds.values() if members]
    return chosen[:count]


# Whole files: what they hold, and what the line names.
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "run.yaml"),
    "comment alone": (b"# nothing\n", "run.yaml"),
    "number": (b"3\n", "run.yaml"),
    "list": (b"- a\n- b\n", "run.yaml"),
    "tab": (b"trainer:\n\tmax_epochs: 3\n", "run.yaml"),
    "Latin-1": ("data: {root: \xe9}\n".encode("latin-1"), "run.yaml"),
    "UTF-16": ("data: {root: x}\n".encode("utf-16"), "run.yaml"),
    "binary": (bytes(range(256)), "run.yaml"),
    "open bracket": (b"data: [1\n", "run.yaml"),
    "open quote": (b"data: 'x\n", "run.yaml"),
    "two documents": (b"seed_everything: 1\n---\nseed_everything: 2\n", "run.yaml"),
    "unknown alias": (b"data: *nothing\n", "run.yaml"),
    "alias of itself": (b"trainer: &t\n  logger: *t\n", "run.yaml"),
    "aliases by the million": (
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (n + 1, n + 1, b",".join([b"*%c" % n] * 9)) for n in range(97, 106)),
        "run.yaml",
    ),
    "deep": (b"data: " + b"[" * 5000 + b"]" * 5000 + b"\n", "run.yaml"),
    "object of Python": (b"data: !!python/object/apply:os.getcwd []\n", "run.yaml"),
    "key that is a list": (b"? [a, b]\n: 3\n", "run.yaml"),
    "key that is a number": (b"3: x\n", "3"),
    "key that is null": (b"null: x\n", "None"),
    "day that is none": (b"data: {root: 2026-13-45}\n", "run.yaml"),
    "indented too far": (b"trainer:\n  max_epochs: 3\n    max_steps: 4\n", "run.yaml"),
    "indented too little": (b"trainer:\nmax_epochs: 3\n", "trainer"),
    "no space behind the colon": (b"trainer: {max_epochs:3}\n", "max_epochs:3"),
    "section twice": (b"trainer: {max_epochs: 3}\ntrainer: {max_steps: 3}\n", "trainer"),
    "dotted unknown key": (b"trainer.max_epoch: 3\n", "max_epoch"),
    "part that is missing": (b"trainer: nowhere.yaml\n", "nowhere.yaml"),
    "part that is a folder": (b"trainer: .yaml\n", "trainer"),
    "section of another command": (b"fit: {trainer: {max_epochs: 3}}\n", "fit"),
}

# Options behind a good configuration, and what the line names.
OPTIONS: dict[str, str] = {
    "--trainer.max_epoch 3": "trainer.max_epoch",
    "--trainer.max 3": "trainer.max",
    "--trainr.max_epochs 3": "trainr.max_epochs",
    "--max_epochs 3": "max_epochs",
    "--lr 1e-4": "lr",
    "--model.lr 1e-4": "model.optimizer.lr",
    "--model.eps 1/255": "model.attack.eps",
    "--model.attack.epz 1/255": "model.attack.epz",
    "--model.attack.eps": "model.attack.eps",
    "--model.attack.eps --data.shots 1": "model.attack.eps",
    "--model.attack.steps 1.5": "steps",
    "--model.attack 3": "model.attack",
    "--model.attack {a: 1}": "attack",
    "--model 3": "model",
    "--model=": "model",
    "--model TeCoAA": "TeCoA",
    "--model torch.nn.Linear": "model",
    "--model.class_path TeCoAA": "model",
    "--model.init_args text": "init_args",
    "--model.optimizer.lr many": "lr",
    "--model.optimizer Adm": "model.optimizer",
    "--data.batch_size many": "data.batch_size",
    "--data.batchsize 3": "data.batchsize",
    "--data.init_args.batchsize 3": "batchsize",
    "--data nowhere.yaml": "nowhere.yaml",
    "--trainer nowhere.yaml": "nowhere.yaml",
    "--trainer 3": "trainer",
    "--trainer.devices -1": "devices",
    "--trainer.devices=-1": "devices",
    "--trainer.devices 0": "devices",
    "--trainer.precision 8": "trainer.precision",
    "--trainer.accelerator tpuu": "trainer",
    "--trainer.callbacks Nonesuch": "trainer.callbacks",
    "--trainer.callbacks [3]": "trainer.callbacks",
    "--trainer.max_epochs -5": "max_epochs",
    "--trainer.max_epochs 1.5": "trainer.max_epochs",
    "--trainer.limit_train_batches -1": "limit_train_batches",
    "--trainer.limit_train_batches 1.5": "limit_train_batches",
    "--trainer.val_check_interval 7.5": "val_check_interval",
    "--trainer.accumulate_grad_batches many": "accumulate_grad_batches",
    "--evaluation.attacks PGD": "evaluation.attacks",
    "--evaluation.attacks {x:3}": "evaluation.attacks",
    '--evaluation.attacks {"x":3}': "evaluation.attacks.x",
    '--evaluation.attacks {"x":{"class_path":"PGDD"}}': "evaluation.attacks.x",
    '--evaluation.attacks {"x":{"class_path":"PGD","init_args":"text"}}': "evaluation.attacks.x.init_args",
    '--evaluation.attacks {"x":{"class_path":"PGD"},"x":{"class_path":"PGD"}}': "evaluation.attacks",
    '--evaluation.attacks {"x":{"class_path":"PGD"': "evaluation.attacks",
    "--evaluation.max_sampels 3": "evaluation.max_sampels",
    "--results.averages {a:b}": "results.averages",
    '--results.averages {"a":"b"}': "results.averages.a",
    '--results.averages {"a":[1]}': "results.averages.a",
    "--results.averages [a]": "results.averages",
    "--results.baseline nowhere": "results.baseline",
    "--results.fodler x": "results.fodler",
    "--checkpoint.monitr x": "checkpoint.monitr",
    "--checkpoint.save_top_k many": "checkpoint.save_top_k",
    "--ckpt_path nowhere.ckpt": "ckpt_path",
    "--seed_everything -1": "seed_everything",
    "--seed_everything many": "seed_everything",
    "--config nowhere.yaml": "nowhere.yaml",
    "--config": "config",
    "--config=": "config",
    "-c nowhere.yaml": "nowhere.yaml",
    "stray": "stray",
    "-trainer.max_epochs 3": "trainer.max_epochs",
    "--": "--",
    "--trainer.=3": "trainer.",
    "--nonesuch": "nonesuch",
    "--trainer.max_epochs": "trainer.max_epochs",
}


def of_files() -> Iterator[Mutation]:
    for name, (content, key) in FILES.items():
        words = ("fit", "--model", "TeCoA", "--model.pretrained", "shapes", "--config", "{at}/run.yaml")
        yield Mutation(f"file: {name}", words, key, partial(bytes, content))


def of_options() -> Iterator[Mutation]:
    base = yaml.safe_dump(whole(CONFIGS / "demo.yaml")).encode()
    for option, key in OPTIONS.items():
        words = ("fit", "--config", "{at}/run.yaml", *option.split(" ", 1 if "{" in option else -1))
        yield Mutation(f"option: {option}", words, key, partial(bytes, base), option.endswith("val_check_interval 7.5"))
