"""``robustclip soup`` mixes the weights of several fine-tuned models: weight soups and task arithmetic."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from robustclip.methods import RobustMethod
from robustclip.methods._shared.saved_state import SETTINGS, TRAINED_ON, read_checkpoint, with_digest
from robustclip.models.lora import merged_state, plain_name
from robustclip.models.tensor_files import DIGEST
from robustclip.persistence import atomic_folder
from robustclip.tools.interpolate import TRAINING_STATE, check_has_original
from robustclip.types import TrainingImages

CLASSES = ("head_classes", "cache_classes")  # names of the classes of trained classifiers
Measure = Callable[[Path], float]
"""Function from a checkpoint to its accuracy on held-out images."""


@dataclass(frozen=True)
class Member:
    """The weights of one checkpoint under the names of a model without LoRA.

    Args:
        path: the checkpoint.
        content: all of the checkpoint but its weights.
        weights: trained tensors and buffers, the changes of LoRA merged into its matrices.
    """

    path: Path
    content: Mapping[str, Any]
    weights: Mapping[str, Tensor]


class Mixer:
    """Mixes the checkpoints of one base model.

    Args:
        plain: method of the checkpoints with the original weights and without LoRA.
        members: the checkpoints.

    Raises:
        ValueError: the checkpoints are of unlike base models, settings, classes or trained parameters.
    """

    def __init__(self, plain: RobustMethod, members: Sequence[Member]) -> None:
        first, *others = members
        for other in others:
            _check_alike(first, other)
        self.plain, self.members = plain, members
        self.original = {name: value.clone() for name, value in plain.state_dict().items()}
        self.parameters = {name for name, _ in plain.named_parameters()}

    def mixed(self, places: Sequence[int], scale: float) -> dict[str, Any]:
        """Returns the checkpoint ``original + scale * sum(member - original)``.

        Buffers, such as the statistics of BatchNorm, are means over the members.

        Args:
            places: places of the members to add.
            scale: factor of their changes; 1 / number gives their mean.

        Raises:
            ValueError: it is not their mean, and they have parameters that the original model lacks.
        """
        chosen = [self.members[place] for place in places]
        if abs(scale * len(chosen) - 1) > 1e-6:
            check_has_original(self.plain, chosen[0].weights)
        state = {
            name: self._mixed(name, torch.stack([member.weights[name].double() for member in chosen]), scale).to(tensor)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in chosen[0].weights.items()
        }
        digests = [str(member.content.get(DIGEST, "unknown")) for member in chosen]
        kept = {key: value for key, value in chosen[0].content.items() if key not in TRAINING_STATE}
        trainings = [TrainingImages.read(member.content.get(TRAINED_ON)) for member in chosen]
        return with_digest(
            kept
            | {
                "state_dict": state,
                SETTINGS: self.plain.inference_settings,
                TRAINED_ON: reduce(TrainingImages.joined, trainings)._asdict(),
                "interpolation": {"alpha": scale, "fine_tuned": "+".join(digest[:8] for digest in digests)},
                **_settings_without_lora(kept),
            }
        )

    def _mixed(self, name: str, values: Tensor, scale: float) -> Tensor:
        """Mixes a tensor of all members; one that the original lacks is only ever averaged."""
        if name not in self.parameters or abs(scale * len(values) - 1) <= 1e-6:
            mean: Tensor = values.mean(0)
            return mean
        start = self.original[name].double()
        changed: Tensor = start + scale * (values - start).sum(0)
        return changed


def soup(
    build: Callable[..., RobustMethod],
    checkpoints: Sequence[Path],
    out: Path,
    *,
    scales: Sequence[float] = (),
    measure: Measure | None = None,
) -> list[Path]:
    """Writes a soup of checkpoints of one base model, for ``--ckpt_path``; LoRA's changes are merged.

    - Model soups (Wortsman et al., ICML 2022, https://arxiv.org/abs/2203.05482): ``mean.ckpt``, the mean of all
      weights; with ``measure``, ``greedy.ckpt``: members are taken in the order of their accuracy, and kept if the
      mean's accuracy does not fall.
    - Task arithmetic (Ilharco et al., ICLR 2023, https://arxiv.org/abs/2212.04089), with ``scales``: the original
      weights plus a scale times the sum of all changes, one ``scale-S.ckpt`` per scale; with ``measure``, the best.

    Args:
        build: builds the method of a checkpoint; further arguments are options.
        checkpoints: files of ``robustclip fit``, two at least.
        out: folder to write; it must not exist.
        scales: factors of the changes; empty for a mean.
        measure: accuracy on held-out images, which chooses among mixtures; None writes all of them.

    Returns:
        Paths of the written checkpoints.

    Raises:
        ValueError: fewer than two checkpoints, one is given twice, scales are repeated, as for `Mixer`, or ``out``
            exists.
    """
    if len(set(checkpoints)) < max(2, len(checkpoints)):
        raise ValueError(f"a soup needs two checkpoints or more, each given once, got {len(checkpoints)}")
    if len({f"{scale:g}" for scale in scales}) < len(scales):
        raise ValueError(f"scales must be given once each, got {list(scales)}")
    plain = build(checkpoints[0], "--model.lora=null")
    mixer = Mixer(plain, [_member(build(path), path, plain) for path in checkpoints])
    everyone = list(range(len(checkpoints)))
    mixtures = {f"scale-{scale:g}.ckpt": (everyone, scale) for scale in scales}
    mixtures = mixtures or {"mean.ckpt": (everyone, 1 / len(checkpoints))}
    with atomic_folder(out) as aside:  # refuses an existing folder before anything is measured
        if measure is not None:
            with TemporaryDirectory() as folder:
                accuracy_of = _MeasuredAccuracy(mixer, measure, Path(folder) / "soup.ckpt")
                if scales:
                    best = max(mixtures, key=lambda name: accuracy_of(*mixtures[name]))
                    mixtures = {best: mixtures[best]}
                else:
                    kept = greedy(len(checkpoints), lambda places: accuracy_of(places, 1 / len(places)))
                    mixtures = {"greedy.ckpt": (kept, 1 / len(kept))}
        for name, mixture in mixtures.items():
            torch.save(mixer.mixed(*mixture), aside / name)
    files = [out / name for name in mixtures]
    sys.stdout.write("".join(f"{file}\n" for file in files))
    return files


def greedy(count: int, accuracy: Callable[[list[int]], float]) -> list[int]:
    """Chooses the members of a greedy soup.

    Args:
        count: number of members.
        accuracy: accuracy of the mean of some members, by their numbers.

    Returns:
        Numbers of the chosen members, the best first.
    """
    alone = [accuracy([number]) for number in range(count)]
    first, *others = sorted(range(count), key=lambda number: -alone[number])
    kept, best = [first], alone[first]
    for number in others:
        if (reached := accuracy([*kept, number])) >= best:
            kept, best = [*kept, number], reached
    return kept


class _MeasuredAccuracy:
    """Function that measures the accuracy of a mixture on held-out images, and prints it."""

    def __init__(self, mixer: Mixer, measure: Measure, path: Path) -> None:
        self.mixer, self.measure, self.path = mixer, measure, path

    def __call__(self, places: Sequence[int], scale: float) -> float:
        torch.save(self.mixer.mixed(places, scale), self.path)
        accuracy = self.measure(self.path)
        names = ", ".join(str(self.mixer.members[place].path) for place in places)
        sys.stderr.write(f"{100 * accuracy:.2f} % on held-out images: scale {scale:g} of {names}\n")
        return accuracy


def _member(method: RobustMethod, path: Path, plain: RobustMethod) -> Member:
    """Reads a checkpoint, and merges the changes of LoRA into the matrices."""
    content = read_checkpoint(path)
    method.on_load_checkpoint(content)
    method.load_state_dict(content["state_dict"], strict=False)
    if method.lora is None:
        return Member(path, _without_weights(content), dict(content["state_dict"]))
    state, known = merged_state(method), plain.state_dict()
    trained = {plain_name(name) for name in content["state_dict"]} | (plain.trained_names & state.keys())
    weights = {name: state[name].clone() for name in known if name in trained}
    added = {name: state[name].clone() for name in sorted(trained - weights.keys())}  # such as a classifier
    return Member(path, _without_weights(content), weights | added)


def _without_weights(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "state_dict"}


def _check_alike(first: Member, other: Member) -> None:
    """Refuses checkpoints whose weights cannot be added.

    Raises:
        ValueError: the base model, inference settings but for LoRA, classes or names of the weights differ.
    """
    pair, remedy = f"{first.path} and {other.path}", "mix checkpoints of one base model and method"
    settings = [{**member.content.get(SETTINGS, {}), "lora": None} for member in (first, other)]
    compared: dict[str, tuple[Any, Any]] = {
        f"base_model.{key}": (value, other.content["base_model"].get(key))
        for key, value in first.content["base_model"].items()
    }
    compared |= {key: (settings[0][key], settings[1][key]) for key in settings[0] if key in settings[1]}
    for key, (a, b) in compared.items():
        if a != b:
            raise ValueError(f"{pair} differ in {key}, {a!r} against {b!r}; {remedy}")
    for key in CLASSES:
        if first.content.get(key) != other.content.get(key):
            raise ValueError(f"{pair} have classifiers of unlike classes ({key}); {remedy}")
    if different := sorted(first.weights.keys() ^ other.weights.keys()):
        raise ValueError(f"{pair} have trained unlike parameters, such as {different[0]!r}; {remedy}")


def _settings_without_lora(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the fit, by which the soup's model is built again, without LoRA."""
    settings = content.get("settings")
    if not settings or not isinstance(settings.get("model"), dict):
        return {}
    model = settings["model"]
    arguments = {**model.get("init_args", {}), "lora": None}
    return {"settings": {**settings, "model": {**model, "init_args": arguments}}}
