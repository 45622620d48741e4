"""The command ``robustclip cache``, apart from the others since the type of its settings needs torch."""

from robustclip.cli.build import build_fit
from robustclip.tools.cache import Settings
from robustclip.tools.cache import cache as write_cache


def cache(settings: Settings, *options: str) -> None:
    """Write embeddings of a run's images to the folder ``--data.features``, from which training then reads.

    Further options are those of `robustclip fit`.

    Args:
        settings: settings of the cache.
        options: options of ``robustclip fit``.
    """
    method, data, epochs = build_fit(options)
    write_cache(method.clip, data, settings, epochs=epochs, seed=data.seed)
