"""Checkpoint content that lets a killed run resume exactly, and the checks of a checkpoint that is loaded."""

import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from robustclip.models.clip import CLIPModel
from robustclip.models.lora import is_factor
from robustclip.models.tensor_files import DIGEST, check_fits, checked_state, digest, one_line, read_file
from robustclip.persistence import atomic_write

SETTINGS = "inference_settings"  # checkpoint key of the values beside the tensors that define the evaluated function
BASE = "base."  # key prefix of the settings that the base model's files define
ATTACKED = "has_attacked"  # checkpoint key of whether the training attack has run
TRAINED_ON = "trained_on"  # checkpoint key of the images of a training with labels
RANDOM, PENDING = "random_states", "pending_gradients"  # checkpoint keys of the state of every process
TYPES: dict[str, Any] = {  # of a checkpoint's entries: the model's, those of single methods, the run's, and Lightning's
    "base_model": dict,
    SETTINGS: dict,
    ATTACKED: (bool, type(None)),
    TRAINED_ON: dict,
    "interpolation": (dict, type(None)),
    "head_classes": list,
    "cache_classes": list,
    "bank": Tensor,
    "shift": Tensor,
    RANDOM: list,
    PENDING: list,
    "run": dict,
    "settings": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
}
RESUMED = (RANDOM, PENDING)
COUNTS = ("ready", "started", "processed", "completed")  # Lightning's counters of batches and epochs
log = logging.getLogger(__name__)


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts values to JSON's types, and leaves out values without such a form, such as objects."""
    plain = {}
    for name, value in values.items():
        try:
            plain[name] = json.loads(json.dumps(value, default=_plain))
        except TypeError:
            continue
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError


def inference_settings(method: Any) -> dict[str, Any]:
    """Collects the values beside the tensors that define the function that a method evaluates."""
    listed = {name for cls in type(method).__mro__ for name in vars(cls).get("training_arguments", ())}
    names = [name for name in method.hparams if name not in listed and not name.startswith("_")]
    passed = plain_values({name: method.hparams[name] for name in names})
    assigned = plain_values({name: vars(method)[name] for name in names if name in vars(method)})
    lora = None if method.lora is None else plain_values(asdict(method.lora))
    return {"method": type(method).__name__, "lora": lora, **passed, **assigned, **method.clip.settings}


def with_digest(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the digest of a checkpoint's content, which `read_checkpoint` compares."""
    content = {key: value for key, value in checkpoint.items() if key != DIGEST}
    return content | {DIGEST: digest(content)}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint as data, without running any code in it, and compares it with its digest.

    Raises:
        ValueError: the file is damaged, may contain code, or was written by another program.
    """
    return _checked(read_file(path), path)


def _checked(content: Any, path: str | Path) -> dict[str, Any]:
    if not isinstance(content, dict) or not {"state_dict", "base_model"} <= content.keys():
        raise ValueError(f"checkpoint {path} was not written by robustclip: it has no base_model or no state_dict")
    if DIGEST not in content:
        log.warning("checkpoint %s is of an old version: without a digest, changed values are not detected", path)
    elif with_digest(content)[DIGEST] != content[DIGEST]:
        raise ValueError(
            f"checkpoint {path} was changed after it was written: its {DIGEST} differs; copy it again, or delete its"
            f" key {DIGEST!r} if you changed it on purpose"
        )
    for key, kind in TYPES.items():
        if key in content and not isinstance(content[key], kind):
            raise ValueError(f"{key} of checkpoint {path} must not be of type {type(content[key]).__name__}")
    for key in ("base_model", SETTINGS, "interpolation"):
        if (value := content.get(key)) is not None and plain_values({key: value}) == {}:
            raise ValueError(f"{key} of checkpoint {path} must hold plain values, without tensors or bytes")
    if content["state_dict"] != {}:
        checked_state(content["state_dict"], f"checkpoint {path}")
    return content


def add_run_state(checkpoint: dict[str, Any], method: Any, before_validation: Mapping[str, Any]) -> None:
    """Adds to Lightning's checkpoint all that an exact resume needs, and removes frozen weights.

    Args:
        checkpoint: content so far.
        method: method with its trainer; all processes must call this.
        before_validation: random state when the present validation began.
    """
    trainer = method.trainer
    if method.run_settings is not None:
        checkpoint["settings"] = method.run_settings
    if method.clip.pretrained is not None:
        frozen = {name for name, _ in method.named_parameters()} - method.trained_names
        weights = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name: tensor for name, tensor in weights if name not in frozen}
    checkpoint["base_model"] = identity(method.clip)
    checkpoint[SETTINGS] = method.inference_settings
    checkpoint[ATTACKED], checkpoint[TRAINED_ON] = method.has_attacked, method.trained_on._asdict()
    is_inside = trainer.validating and is_validation_due(trainer)
    state = before_validation if is_inside else random_state(method.device)
    checkpoint[RANDOM] = gather_on_rank_zero(state, trainer.world_size)
    if trainer.state.fn == TrainerFn.FITTING:
        correct_progress(checkpoint["loops"]["fit_loop"], trainer)
        checkpoint[PENDING] = gather_on_rank_zero(pending_gradients(method, trainer), trainer.world_size)


def restore_run_state(method: Any, resumed: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Restores the random states, pending gradients and epoch position of an interrupted run.

    Args:
        method: method with its trainer.
        resumed: entries of the checkpoint by the keys in `RESUMED`, one per process; empty for a new run.
    """
    rank = method.global_rank
    if rank < len(states := resumed.get(RANDOM, [])):
        set_random_state(states[rank], method.device)
    if rank < len(gradients := resumed.get(PENDING, [])):
        for name, gradient in gradients[rank].items():
            method.get_parameter(name).grad = gradient.to(method.device)
    correct_resumed_loop(method.trainer.fit_loop)


class RenamedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name beside its path and renames it, so that a kill leaves no half file.

    Lightning writes into the system's folder for temporary files and moves the result. If that is another file system,
    such as /tmp in memory, it copies onto the previous checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves to a local path, with a digest; Lightning writes URLs.

        Raises:
            OSError: the file cannot be written; the message names it.
        """
        checkpoint = with_digest(checkpoint)
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(place, lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """Reads and checks a local path, without running code in it; Lightning reads URLs."""
        if "://" in str(path):
            return _checked(super().load_checkpoint(path, weights_only=True), path)
        return read_checkpoint(Path(path))


def identity(clip: CLIPModel) -> dict[str, str]:
    """Identifies the base model of a checkpoint by architecture, size and weights."""
    sizes = [parameter.numel() for name, parameter in clip.named_parameters() if not is_factor(name)]
    return {
        "arch": clip.arch or type(clip.net).__name__,
        "size": f"{len(sizes)} tensors, {sum(sizes)} parameters",
        "weights": clip.fingerprint,
    }


def check_belongs(
    checkpoint: dict[str, Any], module: nn.Module, clip: CLIPModel, *, settings: Mapping[str, Any], trained: set[str]
) -> None:
    """Refuses a checkpoint that does not belong to the module that loads it.

    Args:
        checkpoint: loaded checkpoint.
        module: module that loads it.
        clip: base model of the module.
        settings: inference settings of the module.
        trained: names of the module's trained parameters, which must all be in the checkpoint.

    Raises:
        ValueError: the architecture, the pre-trained weights, the settings or the shapes differ, or parameters are
            missing or unknown.
    """
    saved = checkpoint.get("base_model")
    if not isinstance(saved, dict):
        raise ValueError("the checkpoint was not written by robustclip: it has no base_model")
    theirs, base = checkpoint.get(SETTINGS, {}), identity(clip)
    theirs = theirs and {"lora": None, **theirs}  # older checkpoints have none
    if clip.pretrained is None:
        del base["weights"]
    of_base = {key for key in {*settings, *theirs} if key.startswith(BASE)}
    _compare(theirs, {key: value for key, value in settings.items() if key not in of_base})
    _compare(dict.fromkeys(base) | saved, base)
    _compare(theirs, {key: settings.get(key) for key in sorted(of_base)})
    state = module.state_dict()
    known, given = set(state), set(checkpoint["state_dict"])
    for problem, names in (("lacks", trained - given), ("has the unknown", given - known)):
        if names:
            raise ValueError(
                f"the checkpoint {problem} parameter {min(names)!r} of {type(module).__name__}; same method?"
            )
    check_fits(checkpoint["state_dict"], state, "the checkpoint")


def _compare(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuses the first value that differs; the message has both values and the option that sets it."""
    for key, value in own.items():
        is_comparable = key in saved or (saved and key.startswith(BASE))  # a base model's file omits default values
        if is_comparable and (other := saved.get(key)) != value:
            option = {"method": "--model", "arch": "--model.arch"}.get(key, f"--model.{key}")
            is_of_base = key in ("size", "weights") or key.startswith(BASE)
            text = "null" if other is None else other
            remedy = "give the base model that it was trained with" if is_of_base else f"give {option} {text}"
            raise ValueError(f"the checkpoint was trained with {key} {other!r}, this run has {value!r}; {remedy}")
    if missing := [key for key in own if key not in saved and not (saved and key.startswith(BASE))]:
        names = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
        log.warning("the checkpoint is of another version and lacks settings that could not be compared: %s", names)


def saved_classes(checkpoint: dict[str, Any], part: str, expected: tuple[str, ...] | None) -> tuple[str, ...]:
    """Reads the class names of a part of the checkpoint, such as a classifier, from its entry `<part>_classes`.

    Args:
        checkpoint: loaded checkpoint.
        part: name of the part, such as "head".
        expected: class names of this run's part; None if it has none yet.

    Returns:
        The names; `()` if the checkpoint has no such part.

    Raises:
        ValueError: the classes differ from the expected ones.
    """
    classes = tuple(checkpoint.get(f"{part}_classes", ()))
    if expected is not None and classes != expected:
        raise ValueError(
            f"the checkpoint has a {part} of {len(classes)} classes, this run trains {len(expected)}"
            " that are not the same; give the data.train that it was trained with"
        )
    return classes


def gather_on_rank_zero(value: Any, world_size: int) -> list[Any]:
    """Gathers a value of every process, in the order of their ranks; the list is valid on rank 0 alone.

    Args:
        value: value of this process, which can be pickled.
        world_size: number of processes.
    """
    values = [value] * world_size
    if world_size > 1:
        torch.distributed.gather_object(value, values if torch.distributed.get_rank() == 0 else None)
    return values


def pending_gradients(module: nn.Module, trainer: Trainer) -> dict[str, Tensor]:
    """Returns the gradients of an unfinished accumulation window; other gradients are used up.

    Args:
        module: module with the parameters.
        trainer: trainer of the fit.
    """
    if not trainer.fit_loop.epoch_loop._should_accumulate():
        return {}
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: gradient.cpu() for name, gradient in gradients.items() if gradient is not None}


def correct_progress(progress: dict[str, Any], trainer: Trainer) -> None:
    """Corrects a checkpoint's record of progress, so that Lightning resumes from it exactly and repeatedly.

    Lightning 2.6 resumes from an epoch's last step without the validation that is due then. It also does not count the
    next epoch as begun, so that a second resume trains an epoch too many.

    Args:
        progress: state of the trainer's fit loop, changed in place.
        trainer: trainer of the fit.
    """
    epoch, batch = progress["epoch_progress"], progress["epoch_loop.batch_progress"]
    if is_validation_due(trainer):
        parts, final = [batch["total"], batch["current"]], "processed"
        # Lightning repeats a validation that has begun, and skips one that has not; so it is marked as begun.
        counts = dict.fromkeys(COUNTS, 0)
        begun = {"total": {**counts, "ready": 1, "started": 1}, "current": counts, "is_last_batch": False}
        progress["epoch_loop.val_loop.batch_progress"] = begun
    elif trainer.fit_loop.epoch_loop._num_ready_batches_reached():
        if epoch["current"]["processed"] < epoch["current"]["ready"]:  # Lightning counts this step only after saving
            progress["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        parts, final = [batch["total"], batch["current"], epoch["total"], epoch["current"]], "ready"
    else:
        return
    for part in parts:
        part.update(dict.fromkeys(COUNTS, part[final]))


def is_validation_due(trainer: Trainer) -> bool:
    """Checks whether a fit must validate before its next step, also during that validation."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    progress = loop.val_loop.batch_progress if trainer.validating else loop.batch_progress
    is_inside = bool(progress.current.completed < progress.current.processed)  # type: ignore[attr-defined]
    if trainer.validating or not is_inside:
        return is_inside
    return fetcher is not None and not loop.val_loop.skip and loop._should_check_val_fx(fetcher)


def correct_resumed_loop(fit_loop: _FitLoop) -> None:
    """Corrects Lightning's position when it resumes between two epochs, or before the validation at an epoch's end."""
    loop, fetcher = fit_loop.epoch_loop, fit_loop._data_fetcher
    if fit_loop.epoch_progress.current.ready == fit_loop.epoch_progress.current.completed:
        loop.restarting = False  # with `max_steps`, Lightning takes a new epoch for a resumed one
    elif loop.batch_progress.is_last_batch and fetcher is not None:  # that epoch may have had another number of batches
        batches = int(loop.trainer.num_training_batches)
        vars(loop.batch_progress.current).update(dict.fromkeys(COUNTS, batches))
        loop.val_loop._has_run = not loop._should_check_val_fx(fetcher)


def random_state(device: torch.device) -> dict[str, Any]:
    """Collects the state of every global random generator of this process, in types that safe loading accepts."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),  # type: ignore[union-attr]  # legacy: a tuple
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores the state of every global random generator.

    Args:
        state: state of this process, from `random_state`.
        device: device whose generator is restored too.

    Raises:
        ValueError: the state is malformed.
    """
    try:
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], device)
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(state["numpy"])
    except (TypeError, LookupError, RuntimeError, ValueError) as error:
        raise ValueError(f"random_states of the checkpoint cannot be set: {one_line(error)}") from error
