"""Geometry of the image features after fine-tuning: class scatter, similarity to the original, retrieval."""

from collections.abc import Callable
from itertools import chain
from typing import Annotated, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Interval, checked
from robustclip.attacks import noise
from robustclip.evaluation.robust import check_has_images, finished_batches, method_of, stage_of
from robustclip.evaluation.sections import GEOMETRY, measured
from robustclip.evaluation.writer import Section, writer_of
from robustclip.methods import RobustMethod
from robustclip.metrics import class_sums, collapse, recalls, similarity
from robustclip.models.clip import CLIPModel
from robustclip.models.teacher import ImageTeacher
from robustclip.results.summary import finite
from robustclip.types import Batch, Task, data_of

CHOICE_SEED = 0x9E0  # of the project, not of the run: every run compares the same samples


@checked
class FeatureGeometry(Callback):
    """Measures the unit image features of every validation and test task, and compares them with the pre-trained ones.

    Logs per task, as ``<stage>/<task>/geometry/...``:

    - ``collapse``: ``tr(S_within) / tr(S_between)``, the scatter around the class means against the scatter of these
      around the mean of all; 0 where every class is a point;
    - ``pearson``, ``spearman``: correlation of the cosines of all pairs of samples with those that the pre-trained
      tower gives (representational similarity, https://doi.org/10.3389/neuro.06.004.2008);

    and of the data module's set ``captioned`` ``image_to_text_r1``, ``_r5``, ``_r10`` and ``text_to_image_...``: how
    often a right one is among the first, by both towers as they stand. Every task is encoded once more, apart from any
    attack. A test that resumes encodes the finished samples again.

    Args:
        max_samples: samples of a task whose pairs are compared, a fixed choice whatever the number of processes.

    Raises:
        ValueError: fewer than three samples, or random weights in the place of pre-trained ones.
    """

    def __init__(self, max_samples: Annotated[int, Interval(3)] = 500) -> None:
        self.max_samples = max_samples
        self._original: ImageTeacher | None = None
        self._sums: dict[str, Tensor] = {}
        self._twins: dict[str, Twins] = {}
        self._section = Section(measured)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the pre-trained tower, since the method's own may have learnt already."""
        check_has_images(trainer, "geometry's two towers")
        if self._original is None:
            clip = method_of(pl_module).clip
            self._original = ImageTeacher(CLIPModel(clip.arch, clip.pretrained, clip.image_size))
        self._section = Section(measured, settings={"max_samples": self.max_samples}, facts={"values": {}})
        if stage == "test" and (writer := writer_of(trainer)) is not None:
            writer.sections[GEOMETRY] = self._section

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts each task, with the samples that an earlier start of the test has finished."""
        tasks = stage_of(trainer)[1]
        self._sums, self._twins = {}, {task.name: Twins(self.max_samples) for task in tasks}
        for task in tasks if trainer.testing else ():
            for batch in finished_batches(trainer, task.name):
                self._add(method_of(pl_module), task, batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds a batch."""
        self._add(method_of(pl_module), stage_of(trainer)[1][dataloader_idx], batch)

    def _add(self, method: RobustMethod, task: Task, batch: Batch) -> None:
        with torch.autocast(method.device.type, enabled=False):
            features = method.image_features(batch.images)
            sums = class_sums(features, batch.labels, classes=len(task.label_names))
            self._sums[task.name] = sums + self._sums.get(task.name, 0)
            self._twins[task.name].add(batch, features, self._original_features)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Joins the processes and logs."""
        method = method_of(pl_module)
        for task in stage_of(trainer)[1]:
            width = method.heads[task.name].shape[-1]
            nothing = torch.zeros(len(task.label_names), width + 2, dtype=torch.float64, device=method.device)
            sums = trainer.strategy.reduce(self._sums.get(task.name, nothing), reduce_op="sum")
            tuned, original = self._twins[task.name].joined(method, width)
            self._log(trainer, task.name, {"collapse": collapse(sums), **similarity(tuned, original)})
        captioned = data_of(trainer).captioned_images()
        if captioned is not None and not trainer.sanity_checking:
            self._log(trainer, captioned.name, retrieval(method, captioned))

    # Validation is the same on other tasks.
    on_validation_epoch_start = on_test_epoch_start
    on_validation_batch_end = on_test_batch_end
    on_validation_epoch_end = on_test_epoch_end

    def _log(self, trainer: Trainer, name: str, values: dict[str, Tensor]) -> None:
        logged = {f"{stage_of(trainer)[0]}/{name}/{GEOMETRY}/{key}": value for key, value in values.items()}
        method_of(trainer.lightning_module).log_dict(logged)
        self._section.facts["values"][name] = {key: finite(float(value)) for key, value in values.items()}
        if (writer := writer_of(trainer)) is not None:
            writer.outputs |= logged.keys()

    def _original_features(self, images: Tensor) -> Tensor:
        if self._original is None:
            raise RuntimeError("setup has not run")
        return F.normalize(self._original.to(images.device)(images), dim=-1)


class Twins:
    """Unit features of a fixed random choice of samples in two models.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, batch: Batch, features: Tensor, original: Callable[[Tensor], Tensor]) -> None:
        """Keep the samples of a batch with the smallest draws so far; the original model encodes no others.

        Args:
            batch: with sample ids, of which a draw is a function.
            features: ``(B, D)``.
            original: images to features ``(B, D)``.
        """
        draws = noise.uniform(batch.index, (), seed=CHOICE_SEED)
        limit = self._kept[0].max() if self._kept is not None and len(self._kept[0]) == self.count else torch.inf
        places = (draws < limit).nonzero()[:, 0]
        if len(places) > 0:
            added = draws[places], features[places], original(batch.images[places])
            self._kept = self._smallest(*added) if self._kept is None else self._smallest(*_stacked(self._kept, added))

    def joined(self, method: RobustMethod, width: int) -> tuple[Tensor, Tensor]:
        """Both features ``(N, D)``, chosen from those of all processes, which must all come here.

        Args:
            method: gathers.
            width: ``D``, for a process that had no sample.
        """
        none = torch.zeros(0, device=method.device)
        kept = self._kept or (none, none.view(0, width), none.view(0, width))
        missing = self.count - len(kept[0])  # what is gathered must have one shape
        padding = none.new_full((missing,), torch.inf), *(none.new_zeros(missing, width) for _ in range(2))
        rows = torch.cat([part.view(self.count, -1) for part in _stacked(kept, padding)], dim=1)
        gathered = cast(Tensor, method.all_gather(rows)).view(-1, 1 + 2 * width)
        draws, tuned, original = self._smallest(gathered[:, 0], gathered[:, 1 : 1 + width], gathered[:, 1 + width :])
        return tuned[draws.isfinite()], original[draws.isfinite()]

    def _smallest(self, draws: Tensor, tuned: Tensor, original: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = draws.argsort()[: self.count]
        return draws[first], tuned[first], original[first]


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
            counts += [len(each) for each in captions]
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(method.device)
    return recalls(torch.cat(images) @ torch.cat(texts).T, owner)


def _stacked(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(first, second, strict=True))
