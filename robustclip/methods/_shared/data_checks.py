"""Checks that a method accepts the data of a stage."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustclip.methods.base import RobustMethod


def check_data(method: "RobustMethod", data: Any, stage: str) -> None:
    """Refuses data of a stage that the method does not accept.

    Args:
        method: method with its model.
        data: data module, after its setup.
        stage: ``fit``, ``validate`` or ``test``.

    Raises:
        ValueError: the method accepts no images of unknown classes, or no features, or not those of another tower.
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
