"""The identity of a test before it starts: weights, and the protocol of every task under every attack."""

from collections.abc import Mapping
from typing import Any

from robustclip.attacks import Attack, Member
from robustclip.methods import RobustMethod
from robustclip.models.clip import INTERPOLATION, fingerprint
from robustclip.results.protocol import CLEAN_AXES, attack_axes, differences, digest, listing
from robustclip.types import Task


def members_of(tasks: list[Task], attacks: Mapping[str, Attack]) -> dict[tuple[str, str], list[Member]]:
    """Members of every attack on every task, which may depend on the number of classes.

    Args:
        tasks: of the evaluation.
        attacks: by name.
    """
    return {(task.name, name): attacks[name].members(len(task.label_names)) for task in tasks for name in attacks}


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
) -> dict[str, Any]:
    """Identity of a test, in JSON's types: two starts of the same test have the same.

    Args:
        method: to be tested.
        data: its data module.
        tasks: of the test.
        members: task and attack to the members of the attack.
        precision: ``fp32`` or ``bf16``, of the attacks.
        stop: rule of the evaluation.
        seed: of the attacks.
        save_examples: number of attacked images to keep per task and attack.
    """
    return {
        "method": type(method).__name__,
        "weights": fingerprint(method),
        "settings": method.inference_settings,
        "seed": seed,
        "save_examples": save_examples,
        "protocol": {
            task.name: _protocols(
                {
                    "templates": listing(task.templates),
                    "class_names": _labels(task),
                    "precision": f"attack {precision}, verdict fp32",
                    "stop_rule": stop,
                    "model_preprocessing": _preprocessing(method),
                    **data.protocol(task.name),
                },
                {attack: found for (name, attack), found in members.items() if name == task.name},
            )
            for task in tasks
        },
    }


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Describe how two tests differ, in one line per difference.

    Args:
        a: identity of one test.
        b: identity of the other.
    """
    found = [
        f"{key}: {a[key]} against {b[key]}"
        for key in ("method", "weights", "seed", "save_examples")
        if a[key] != b[key]
    ]
    found += _different(a.get("settings", {}), b.get("settings", {}))
    found += _different(a.get("sections", {}), b.get("sections", {}))
    ours, theirs = a["protocol"], b["protocol"]
    if ours.keys() != theirs.keys():
        return [*found, f"tasks: {', '.join(ours)} against {', '.join(theirs)}"]
    for task in ours:
        if ours[task].keys() != theirs[task].keys():
            return [*found, f"attacks: {', '.join(ours[task])} against {', '.join(theirs[task])}"]
        for attack in ours[task]:
            found += [
                f"{task} under {attack}, {line}" for line in differences(ours[task][attack], theirs[task][attack])
            ]
    return found


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [f"{key}: {a.get(key)} against {b.get(key)}" for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def _protocols(shared: dict[str, Any], attacks: Mapping[str, list[Member]]) -> dict[str, Any]:
    clean = {axis: shared[axis] for axis in CLEAN_AXES if axis in shared}
    settings = {
        name: {each.name: {"attack": type(each.attack).__name__, **each.attack.settings} for each in found}
        for name, found in attacks.items()
    }
    return {"clean": clean} | {name: {**shared, **attack_axes(given)} for name, given in settings.items()}


def words(task: Task) -> dict[str, Any]:
    """Class names and templates of a task, in JSON's types; enough to make the task again."""
    found: dict[str, Any] = {"class_names": task.class_names, "templates": task.templates}
    return found if task.groups is None else {**found, "groups": task.groups, "label_names": task.label_names}


def _labels(task: Task) -> Any:
    """Names of the classes of a task and, where there are groups, a digest of these."""
    names = listing(task.class_names)
    return names if task.groups is None else f"{names}, in {len(task.groups)} groups, digest {digest(task.groups)}"


def _preprocessing(method: RobustMethod) -> dict[str, Any]:
    mean, std = (
        [round(value, 6) for value in tensor.flatten().tolist()] for tensor in (method.clip.mean, method.clip.std)
    )
    return {"image_size": method.image_size, "interpolation": INTERPOLATION, "mean": mean, "std": std}
