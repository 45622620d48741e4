"""The description of one data set in a configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch.utils.data import Dataset

from robustclip.arguments import Count, CountOrZero, checked
from robustclip.data.sources.source import Source
from robustclip.data.task_parts import Shift
from robustclip.types import Crop


@checked
@dataclass(frozen=True)
class DataSource:
    """One data set of a configuration; a text or an object alone is short for its ``source``.

    Args:
        source: ``wds:PATH-or-URL``, ``torchvision:CLASS``, ``folder:PATH``, ``list:PATH`` of a text or CSV file,
            perhaps with ``{split}`` in its name, ``npy:FILE`` of CIFAR-10-C with a severity as split, ``shapes:NAME``,
            a name of the catalogue, which brings the papers' class names and prompts, or an own class: its path such as
            ``my_module.MySet``, an object, or a mapping of ``class_path`` and ``init_args``. The class is a `Source` or
            a ``torch.utils.data.Dataset``.
        name: name of the task in metrics and results, ``[a-z0-9_]+``; null derives it from the source.
        split: name of the split; null for ``train`` in training and ``test`` in evaluation.
        class_names: names in label order, or a mapping from folders to names; null takes the names that come with the
            data, else the catalogue's; ``openai`` for OpenAI's names of the classes of ImageNet.
        templates: one or several prompts with ``{}``, such as ``a photo of {}``; null takes the templates that come
            with the data, else the catalogue's; ``openai`` for OpenAI's 80 templates, ``clip_benchmark`` for those
            of clip_benchmark for this set.
        descriptions: JSON file of class name to list of sentences, as CuPL publishes them; it replaces the templates.
        native_size: attack images at their own size instead of a crop of the model's size; null uses the catalogue.
        crop: resize before the centre crop, ``tecoa`` or ``clip``, or ``squash``; null uses ``data.crop``.
        border: number of pixels that are cut off on every side of an image first; null uses the catalogue.
        length: number of samples; only needed to train from a remote source.
        classes: labels of the classes that are kept and renumbered, such as ``0-14,25-27``; null for all.
        images: old labels of the images that are kept; a label outside of `classes` becomes unknown. Null for those of
            `classes`, or, in a set of unknown classes, for all others.
        shift: training classes of a benchmark, in place of `classes` and `images`: ``closed``, ``partial``, ``open`` or
            ``open_partial``.
        known: number of known classes, the first of the list; null uses the benchmark whose name begins the `name`.
        known_seed: seed that draws the known classes from all names at random; null takes the first ones.

    Examples:
        >>> from robustclip import CLIPDataModule, DataSource
        >>> primary = DataSource("shapes:colours", name="primary", classes="0-2", templates="a {} thing")
        >>> data = CLIPDataModule(test=primary, image_size=32)
        >>> data.setup("test")
        >>> data.test_tasks[0].class_names
        ('red', 'green', 'blue')
    """

    source: str | Dataset | Source  # type: ignore[type-arg]  # the parser of the command line cannot read Dataset[Any]
    name: str | None = None
    split: str | None = None
    class_names: list[str] | dict[str | int, str] | Literal["openai"] | None = None
    templates: str | Sequence[str] | None = None
    descriptions: str | None = None
    native_size: bool | None = None
    crop: Crop | None = None
    border: CountOrZero | None = None
    length: Count | None = None
    classes: str | None = None
    images: str | None = None
    shift: Shift | None = None
    known: Count | None = None
    known_seed: int | None = None

    @property
    def title(self) -> str:
        """The source as it is written in a configuration; the name of the class for an object."""
        return self.source if isinstance(self.source, str) else type(self.source).__name__

    @property
    def where(self) -> str:
        """The start of a message about this data set."""
        return f"data source {self.title!r}"


SetLike = DataSource | str | Dataset | Source  # type: ignore[type-arg]


def listed(setting: SetLike | Sequence[SetLike]) -> tuple[DataSource | str, ...]:
    """Lists the data sets of a setting, which may be a single data set."""
    sources = setting if isinstance(setting, list | tuple) else (setting,)
    return tuple(source if isinstance(source, DataSource | str) else DataSource(source) for source in sources)
