"""Identifies a test before it starts, by its weights and the protocol of every task under every attack."""

from collections.abc import Mapping
from typing import Any

from robustclip.attacks import Attack, Member
from robustclip.evaluation.ways import Ways
from robustclip.methods import RobustMethod
from robustclip.models.clip import INTERPOLATION, fingerprint
from robustclip.results.protocol import CLEAN_AXES, attack_axes, differences, digest, listing
from robustclip.results.run import SHARD
from robustclip.types import Task

GENERAL = ("method", "defence", "weights", "seed", "save_examples", SHARD)


def members_of(tasks: list[Task], attacks: Mapping[str, Attack]) -> dict[tuple[str, str], list[Member]]:
    """Returns the members of every attack on every task, which may depend on the number of classes.

    Args:
        tasks: tasks of the evaluation.
        attacks: attacks by name.
    """
    return {
        (task.name, name): attacks[name].aimed_at(task.name, task.label_names).members(len(task.label_names))
        for task in tasks
        for name in attacks
    }


def aims_of(members: Mapping[tuple[str, str], list[Member]]) -> dict[str, dict[str, int]]:
    """Returns the number of the class that each attack with a target moves images to, by task and attack.

    Args:
        members: task and attack to the members of the attack.
    """
    aims: dict[str, dict[str, int]] = {}
    for (task, name), several in members.items():
        for aim in (member.attack.aim for member in several[:1]):
            aims |= {} if aim is None else {task: {**aims.get(task, {}), name: aim}}
    return aims


def describe(
    method: RobustMethod,
    data: Any,
    tasks: list[Task],
    members: Mapping[tuple[str, str], list[Member]],
    *,
    precision: str,
    stop: str,
    seed: int,
    save_examples: int,
    ways: Ways,
) -> dict[str, Any]:
    """Returns the identity of a test in JSON's types; two starts of a test have equal identities.

    Args:
        method: tested method.
        data: data module of the test.
        tasks: tasks of the test.
        members: task and attack to the members of the attack.
        precision: description of the precisions of attack and verdict.
        stop: stop rule of the evaluation.
        seed: seed of the attacks.
        save_examples: number of attacked images to keep per task and attack.
        ways: ways through a test-time defence.
    """
    defence = method.defence
    return {
        "method": type(method).__name__,
        **({} if defence is None else {"defence": defence.description, "ways": ways.settings}),
        "weights": fingerprint(method),
        "settings": method.inference_settings,
        "seed": seed,
        "save_examples": save_examples,
        "protocol": {
            task.name: _protocol(
                {
                    "templates": _prompts(task),
                    "class_names": _labels(task),
                    "precision": precision,
                    "stop_rule": stop,
                    "model_preprocessing": _preprocessing(method),
                    **data.protocol(task.name),
                    **({} if ways.axis is None else {"ways": ways.axis}),
                },
                {attack: parts for (name, attack), parts in members.items() if name == task.name},
            )
            for task in tasks
        },
    }


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Lists how two tests differ, in one line per difference.

    Args:
        a: identity of one test.
        b: identity of the other.
    """
    general = [{key: test.get(key) for key in GENERAL} for test in (a, b)]
    lines = _different(*general)
    for part in ("settings", "sections"):
        lines += _different(a.get(part, {}), b.get(part, {}))
    ours, theirs = a["protocol"], b["protocol"]
    if ours.keys() != theirs.keys():
        return [*lines, f"tasks: {', '.join(ours)} against {', '.join(theirs)}"]
    for task in ours:
        if ours[task].keys() != theirs[task].keys():
            return [*lines, f"attacks: {', '.join(ours[task])} against {', '.join(theirs[task])}"]
        for attack in ours[task]:
            lines += [
                f"{task} under {attack}, {line}" for line in differences(ours[task][attack], theirs[task][attack])
            ]
    return lines


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [f"{key}: {a.get(key)} against {b.get(key)}" for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def _protocol(shared: dict[str, Any], attacks: Mapping[str, list[Member]]) -> dict[str, Any]:
    clean = {axis: shared[axis] for axis in CLEAN_AXES if axis in shared}
    settings = {
        name: {part.name: {"attack": type(part.attack).__name__, **part.attack.settings} for part in members}
        for name, members in attacks.items()
    }
    return {"clean": clean} | {name: {**shared, **attack_axes(values)} for name, values in settings.items()}


def words(task: Task) -> dict[str, Any]:
    """Returns class names and templates of a task in JSON's types, from which the task can be made again."""
    names: dict[str, Any] = {"class_names": task.class_names, "templates": task.templates}
    if task.descriptions is not None:
        names["descriptions"] = task.descriptions
    return names if task.groups is None else {**names, "groups": task.groups, "label_names": task.label_names}


def _prompts(task: Task) -> Any:
    """Lists the templates of a task, or describes its descriptions by their digest."""
    if task.descriptions is None:
        return listing(task.templates)
    return f"descriptions of {len(task.descriptions)} classes, digest {digest(task.descriptions)}"


def _labels(task: Task) -> Any:
    """Lists the class names of a task and, where there are groups, a digest of these."""
    names = listing(task.class_names)
    return names if task.groups is None else f"{names}, in {len(task.groups)} groups, digest {digest(task.groups)}"


def _preprocessing(method: RobustMethod) -> dict[str, Any]:
    mean, std = (
        [round(value, 6) for value in tensor.flatten().tolist()] for tensor in (method.clip.mean, method.clip.std)
    )
    return {"image_size": method.image_size, "interpolation": INTERPOLATION, "mean": mean, "std": std}
