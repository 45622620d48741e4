"""Checks that a test can be evaluated in parts on several machines, which `robustclip merge` joins."""

import inspect
from collections.abc import Iterable

from lightning.pytorch import Trainer

from robustclip.evaluation.sections import SECTIONS
from robustclip.types import Share, data_of


def check_share(trainer: Trainer, share: Share) -> Share:
    """Returns the part of the samples that a test evaluates, after checks of the data and the trainer.

    Args:
        trainer: trainer of the test.
        share: part of the samples.

    Raises:
        ValueError: the data module yields no parts, or the trainer leaves out batches.
    """
    data = data_of(trainer)
    if "share" not in inspect.signature(data.connect).parameters:
        raise ValueError(
            f"{type(data).__name__}.connect takes no `share`, so that shards must be 1, got {share.count};"
            " add the argument, see robustclip.types.Data"
        )
    limit = trainer.limit_test_batches
    if limit is not None and not (isinstance(limit, float) and limit == 1):  # the integer 1 is one batch
        raise ValueError(
            f"trainer.limit_test_batches must be null in a test of several shards, got {limit}; limit the samples by"
            " evaluation.max_samples"
        )
    return share


def check_sections(names: Iterable[str]) -> None:
    """Refuses sections that `robustclip merge` cannot compute.

    Args:
        names: names of the sections that callbacks have added to the result.

    Raises:
        ValueError: a callback of the user has added a section.
    """
    own = [name for name in names if name not in SECTIONS]
    if own:
        raise ValueError(
            f"section {own[0]!r} of a callback of your own cannot be joined from several shards; leave the callback"
            " out, or set shards to 1"
        )
