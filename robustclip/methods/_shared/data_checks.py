"""What a method may be given by the data module."""

from typing import Any, Protocol

from robustclip.models.clip import CLIPModel


class Taker(Protocol):
    """A method, as far as its intake goes."""

    clip: CLIPModel
    takes_unknown: bool
    takes_features: bool


def check_intake(method: Taker, data: Any, stage: str) -> None:
    """Compares the data of a stage with what a method takes.

    Args:
        method: with its model.
        data: the data module, set up.
        stage: ``fit``, ``validate`` or ``test``.

    Raises:
        ValueError: images of unknown classes, or features, for a method that takes none, or another tower's features.
    """
    name = type(method).__name__
    if stage == "fit" and data.train_has_unknown and not method.takes_unknown:
        raise ValueError(f"{name} needs images of known classes; set `images` of data.train to null")
    if data.feature_model is None:
        return
    if not method.takes_features:
        raise ValueError(f"{name} needs images, data.features gives embeddings; set data.features to null")
    for key, own in (("fingerprint", method.clip.fingerprint), ("image_size", method.clip.image_size)):
        if data.feature_model[key] != own:
            raise ValueError(
                f"data.features has embeddings of a tower with {key} {data.feature_model[key]!r}, this run has {own!r};"
                " give the model settings that the cache was made with"
            )
