"""Checks that a method accepts the data of a stage."""

from typing import TYPE_CHECKING, Any

from robustclip.types import Batch, Pairs

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


def anchors_of(batch: Batch, weight: str) -> Pairs:
    """Returns the retrieved pairs of a batch; their images must have the size of the training images.

    Args:
        batch: batch of the training set.
        weight: name of the weight that is above 0, for the message.

    Raises:
        ValueError: there are no pairs, or their images have another size.
    """
    if batch.anchors is None:
        raise ValueError(f"{weight} is above 0, but the data have no anchors; set data.anchors, or the weight to 0")
    sizes = [tuple(images.shape[-2:]) for images in (batch.anchors.images, batch.images)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"anchors are of {sizes[0]} pixels, training images of {sizes[1]}; set data.attack_resolution to model"
        )
    return batch.anchors
