"""Mean corruption error: the errors of one test on corrupted copies, relative to those of another."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

from robustclip.names import excerpt
from robustclip.results.protocol import differences

CORRUPTIONS, TASKS = "corruptions", "tasks"  # section of errors on corrupted copies, and its key of their names
UNLIKE = "unlike"  # reason why there is no mean corruption error relative to a reference
Summary = Mapping[str, Any]
"""Errors of one test set under one attack or without; see `corrupted`."""

CATEGORIES: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
        "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        "weather": ("snow", "frost", "fog", "brightness"),
        "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    }
)
_OF_ALEXNET = (
    *(0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816),
    *(0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500),
)
ALEXNET: Summary = MappingProxyType(
    {
        "uncorrupted": 0.435,
        "kinds": {
            kind: {"error": error}
            for kind, error in zip((kind for kinds in CATEGORIES.values() for kind in kinds), _OF_ALEXNET, strict=True)
        },
    }
)
"""Errors of AlexNet on the published ImageNet-C (https://github.com/hendrycks/robustness), the paper's reference."""


def mean_corruption_error(errors: Summary, reference: Summary) -> dict[str, float | None]:
    """Computes ``mce`` and ``relative_mce`` of Hendrycks and Dietterich (https://arxiv.org/abs/1903.12261).

    With the errors ``E`` by kind, summed over severities, and ``E'`` of the reference, ``mce`` is the mean over kinds
    of ``E / E'``; ``relative_mce`` is that of ``(E - E_0) / (E' - E'_0)``, ``E_0`` being the error without corruption.
    None where a denominator is not positive or an error without corruption is missing.

    Args:
        errors: errors of a test, with means over severities by kind.
        reference: errors of the reference on the same kinds and severities.
    """
    pairs = [(errors["kinds"][kind]["error"], reference["kinds"][kind]["error"]) for kind in errors["kinds"]]
    start, of_reference = errors["uncorrupted"], reference["uncorrupted"]
    has_starts = start is not None and of_reference is not None
    return {
        "mce": _mean_ratio(pairs),
        "relative_mce": _mean_ratio([(a - start, b - of_reference) for a, b in pairs]) if has_starts else None,
    }


def _mean_ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    return fmean(a / b for a, b in pairs) if all(b > 0 for _, b in pairs) else None


def errors_of(result: Mapping[str, Any], like: Mapping[str, Any], name: str, attack: str) -> Summary | str:
    """Returns the errors of a result on the corrupted copies of a set, or how it did not measure them as another did.

    Args:
        result: content of ``result.json`` of the reference.
        like: the other result, or a mapping of its section and protocol.
        name: name of the test set.
        attack: name of the attack, or ``clean``.
    """
    theirs, ours = ((one.get(CORRUPTIONS) or {}).get(name, {}) for one in (result, like))
    if attack not in theirs or attack not in ours:
        return f"no errors on corrupted copies of {name} under {attack}"
    if unlike := sorted({*theirs[TASKS]} ^ {*ours[TASKS]}):
        return f"other kinds or severities, {excerpt(unlike)}"
    if theirs[attack].get("kinds", {}).keys() != ours[attack]["kinds"].keys():
        return "a damaged section of errors; test again"
    for task in [*ours[TASKS], *([name] if ours[attack]["uncorrupted"] is not None else [])]:
        axes = [one["protocol"].get(task, {}).get(attack, {}).get("axes") for one in (result, like)]
        if None in axes:
            return f"no protocol of {task} under {attack}"
        if lines := differences(*axes):
            return f"another protocol of {task} under {attack}: {lines[0]}"
    summary: Summary = theirs[attack]
    return summary
