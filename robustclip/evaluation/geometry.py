"""Geometry of the image features after fine-tuning: class scatter, similarity to the original, retrieval."""

import math
from functools import partial
from itertools import chain
from typing import Annotated, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Interval, checked
from robustclip.evaluation.geometry_summary import (
    CAPTIONED,
    COLUMNS,
    GEOMETRY,
    ORIGINAL,
    TUNED,
    draws_of,
    encoded,
    features_table,
    measured,
    smallest,
    without_spare_features,
)
from robustclip.evaluation.journal import Journal, labelled_rows
from robustclip.evaluation.task_callback import TaskCallback, check_has_images, log_outputs, method_of, stage_of
from robustclip.evaluation.writer import Section, share_of, writer_of
from robustclip.methods import RobustMethod
from robustclip.metrics import recalls
from robustclip.models.clip import CLIPModel
from robustclip.models.teacher import ImageTeacher
from robustclip.results.summary import finite
from robustclip.types import Batch, Task, data_of


@checked
class FeatureGeometry(TaskCallback):
    """Measures the unit image features of every validation and test task, and compares them with the pre-trained ones.

    Logs per task, as ``<stage>/<task>/geometry/...``:

    - ``collapse``: ``tr(S_within) / tr(S_between)``, the scatter around the class means against the scatter of these
      around the mean of all; 0 where every class is a point;
    - ``pearson``, ``spearman``: correlation of the cosines of all pairs of samples with those that the pre-trained
      tower gives (representational similarity, https://doi.org/10.3389/neuro.06.004.2008);

    and of the data module's set ``captioned`` ``image_to_text_r1``, ``_r5``, ``_r10`` and ``text_to_image_...``: how
    often a correct one is among the first, by both towers as they stand. Every task is encoded once more, apart from
    any attack. A `ResultsWriter` keeps the features, so that a test that resumes encodes no finished sample again.

    Args:
        max_samples: samples of a task whose pairs are compared, a fixed choice whatever the number of processes.

    Raises:
        ValueError: fewer than three samples, or random weights in the place of pre-trained ones.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from robustclip import CLIPDataModule, FeatureGeometry, ZeroShot
        >>> trainer = Trainer(accelerator="cpu", callbacks=[FeatureGeometry()], logger=False, enable_progress_bar=False)
        >>> (metrics,) = trainer.test(ZeroShot(), CLIPDataModule(test="shapes:colours", image_size=32), verbose=False)
        >>> round(metrics["test/colours/geometry/pearson"], 3)  # nothing was trained
        1.0
    """

    def __init__(self, max_samples: Annotated[int, Interval(3)] = 500) -> None:
        self.max_samples = max_samples
        self._original: ImageTeacher | None = None
        self._draws: dict[str, Tensor] = {}  # smallest draws so far, by task
        self._section = Section(measured)
        self._journal: Journal | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Loads the pre-trained tower, since the method's own may have learnt already."""
        check_has_images(trainer, "geometry's two towers")
        if self._original is None:
            clip = method_of(pl_module).clip
            self._original = ImageTeacher(CLIPModel(clip.arch, clip.pretrained, clip.image_size))
        tasks = data_of(trainer).test_tasks if stage == "test" else data_of(trainer).val_tasks
        self._section = Section(
            measured,
            tables={features_table(task.name): COLUMNS for task in tasks},
            settings={"max_samples": self.max_samples},
            facts={CAPTIONED: {}},
            tidy=partial(without_spare_features, count=self.max_samples),
        )
        if stage == "test" and (writer := writer_of(trainer)) is not None:
            writer.sections[GEOMETRY] = self._section

    def begin(self, trainer: Trainer, method: RobustMethod) -> None:
        """Opens the ledgers, which hold the samples that an earlier start of the test has finished."""
        self._journal, self._draws = self._section.open(trainer), {}
        for task in stage_of(trainer)[1]:
            rows = self._journal.earlier[features_table(task.name)]
            index = torch.tensor([int(row["id"]) for row in rows], dtype=torch.long)
            self._draws[task.name] = smallest(draws_of(index), self.max_samples)

    def see(self, trainer: Trainer, method: RobustMethod, task: Task, batch: Batch, logits: Any) -> None:
        """Stores the features of a batch."""
        table = features_table(task.name)
        if self._journal is None or self._original is None or self._journal.is_finished(table, batch):
            return
        places = self._new_places(task, batch)
        with torch.autocast(method.device.type, enabled=False):
            tuned, original = encoded(method.image_features(batch.images)), [""] * len(batch.labels)
            if places:
                features = F.normalize(self._original.to(method.device)(batch.images[places]), dim=-1)
                for place, cell in zip(places, encoded(features), strict=True):
                    original[place] = cell
        self._journal.append(table, labelled_rows(batch, {TUNED: tuned, ORIGINAL: original}))

    def end(self, trainer: Trainer, method: RobustMethod) -> None:
        """Computes the section from the ledgers, and logs it; of several shards, the first measures retrieval."""
        share = share_of(trainer) if trainer.testing else None
        captioned = data_of(trainer).captioned_images() if share is None or share.number == 0 else None
        if captioned is not None and not trainer.sanity_checking:
            numbers = {name: finite(float(value)) for name, value in retrieval(method, captioned).items()}
            self._section.facts[CAPTIONED][captioned.name] = numbers
        if self._journal is not None and share is None:
            values = {
                f"{stage_of(trainer)[0]}/{name}/{GEOMETRY}/{key}": math.nan if value is None else value
                for name, numbers in self._section.summary(GEOMETRY, self._journal).items()
                for key, value in numbers.items()
            }
            log_outputs(trainer, method, values)

    def _new_places(self, task: Task, batch: Batch) -> list[int]:
        """Lists the samples of a batch with the smallest draws so far; the original model encodes no others."""
        draws, earlier = draws_of(batch.index), self._draws[task.name]
        limit = earlier[-1] if len(earlier) == self.max_samples else torch.inf
        places: list[int] = (draws <= limit).nonzero()[:, 0].tolist()
        self._draws[task.name] = smallest(torch.cat([earlier, draws[places]]), self.max_samples)
        return places


def retrieval(method: RobustMethod, captioned: Any) -> dict[str, Tensor]:
    """Recalls of a set of captioned images, which every process computes whole; see `recalls`.

    Args:
        method: whose two towers encode.
        captioned: batches of images with their captions.
    """
    images, texts, counts = [], [], []
    with torch.no_grad(), torch.autocast(method.device.type, enabled=False):
        for batch, captions in captioned:
            images.append(method.image_features(batch.to(method.device)))
            texts.append(method.clip.encode_text(list(chain.from_iterable(captions))))
            counts += [len(lines) for lines in captions]
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(method.device)
    return recalls(torch.cat(images) @ torch.cat(texts).T, owner)
