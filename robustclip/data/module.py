"""The one data module of all methods."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import Dataset, DistributedSampler, Sampler

from robustclip.data.anchors import Choice, anchored
from robustclip.data.captioned import CaptionedImages
from robustclip.data.images import Images, Loaded, StreamedImages
from robustclip.data.sampling import ExactSampler, ImageLoader
from robustclip.data.sources import DataSource, OpenedSource, open_source, open_tests
from robustclip.data.splits import choose, hold_out
from robustclip.data.streams import ShuffledShards, StreamedShards
from robustclip.data.transforms import Augmentation, ToPixels, training_pixels
from robustclip.types import Task


class CLIPDataModule(LightningDataModule):
    """Labelled images for training and for any number of zero-shot tasks.

    A data set is a string (``wds:PATH-or-URL``, ``torchvision:CLASS``, ``folder:PATH``, ``shapes:NAME``, or a name
    of the catalogue) or a `DataSource`. Nothing touches the network unless a source is a URL.

    Args:
        train: training set.
        val: validation sets; none holds out a part of the training set.
        test: zero-shot test sets.
        root: folder that relative paths start at.
        image_size: side in pixels of the crop that larger images are reduced to before an attack.
        attack_resolution: ``native`` leaves small-image sets (CIFAR, STL-10) at their own size and lets the model
            enlarge them, so that an attack has only their pixels; ``model`` enlarges them first.
        batch_size: images per process and training step.
        eval_batch_size: images per process and evaluation step; null for ``batch_size``.
        num_workers: loader processes per process; 0 decodes in the main process.
        holdout: share of the training set, per class, that is kept for validation if ``val`` is empty; 0 for none.
        bad_samples: what evaluation does with an image that does not decode: ``error`` or ``skip``, which counts
            them. Training always skips and counts.
        augmentation: random crops of training images; null for none.
        captions: table of ``robustclip caption``, or ``shards`` for ``.txt`` beside the training images; null for none.
        anchors: folder of image-text pairs, as ``robustclip retrieve`` writes it; null for none.
        anchor_choice: ``pool`` takes any pair, ``paired`` one of the image's neighbours.
        captioned: folder of images with captions, in whose ``test`` split `FeatureGeometry` looks for them.

    Raises:
        ValueError: anything about a data set that does not fit, when a stage is set up.
    """

    def __init__(
        self,
        train: DataSource | str = "shapes:source",
        val: Sequence[DataSource | str] = (),
        test: Sequence[DataSource | str] = (),
        root: str = ".",
        image_size: int = 224,
        attack_resolution: Literal["native", "model"] = "native",
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        holdout: float = 0.1,
        bad_samples: Literal["error", "skip"] = "error",
        augmentation: Augmentation | None = None,
        captions: str | None = None,
        anchors: str | None = None,
        anchor_choice: Choice = "pool",
        captioned: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout must be in [0, 1), got {holdout}")
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise ValueError(f"batch sizes must be at least 1, got {batch_size} and {eval_batch_size}")
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank's share of a tiny set may be empty
        self.wanted_train, self.wanted_val, self.wanted_test = train, tuple(val), tuple(test)
        self.root, self.image_size, self.attack_resolution = root, image_size, attack_resolution
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.holdout, self.bad_samples = num_workers, holdout, bad_samples
        self.augmentation, self.captions = augmentation, captions
        self.anchors, self.anchor_choice, self.captioned = anchors, anchor_choice, captioned
        self.max_samples: int | None = None
        # Samples that an interrupted test has behind it, by the name of the task; asked when loaders are made.
        self.done_samples: Callable[[str], frozenset[int]] = lambda task: frozenset()
        self._train: OpenedSource | None = None
        self.train_positions: list[int] | None = None
        self.val_positions: list[int] | None = None
        self._val: list[OpenedSource] = []
        self._test: list[OpenedSource] = []
        self._loaders: dict[str, ImageLoader] = {}
        self._train_loader: ImageLoader | None = None
        self._resume_at: dict[str, int] | None = None

    @property
    def train_task(self) -> Task:
        """Classes of the training set; opened by ``setup("fit")``."""
        return self._opened_train().task

    @property
    def val_tasks(self) -> list[Task]:
        """Tasks of the validation loaders, in their order."""
        return [source.task for source in self._val]

    @property
    def test_tasks(self) -> list[Task]:
        """Tasks of the test loaders, in their order."""
        return [source.task for source in self._test]

    def protocol(self, task: str) -> dict[str, Any]:
        """What a result must tell of a test set: split, images until the attack, and which samples."""
        source = next(source for source in self._test if source.task.name == task)
        size = None if source.dataset is None else len(source.dataset)  # type: ignore[arg-type]
        return {
            "split": f"{task}, {source.split}",
            "sample_ids": f"{self.max_samples or 'all'} of {'a stream' if size is None else size}",
            "preprocessing": self.transform(source).description,
            "attack_space": "native" if self._keeps_size(source) else f"{self.image_size} x {self.image_size}",
        }

    @property
    def bad_sample_counts(self) -> dict[str, int]:
        """Undecodable samples that this process left out of its latest evaluation, per task."""
        return {name: len(loader.bad_samples) for name, loader in self._loaders.items()}

    def setup(self, stage: str) -> None:
        """Opens the data sets that a stage needs."""
        if stage == "test":
            self._test = open_tests(self.wanted_test, root=self.root)
            if not self._test:
                raise ValueError("nothing to test on: `data.test` lists no data set")
            return
        self._val = open_tests(self.wanted_val, root=self.root)
        if stage == "fit" or not self._val:
            self._train = open_source(self.wanted_train, root=self.root, split="train")
            if self._train.task.groups is not None:
                raise ValueError(f"training set {self.train_task.name!r} has labels of several class names; test on it")
            if not self._val and self.holdout and self._train.dataset is not None:
                self.train_positions, self.val_positions = hold_out(self._train.dataset, self.holdout)
                self._val = [self._train]

    def train_dataloader(self) -> ImageLoader:
        """Shuffled anew each epoch; the order follows from seed and epoch alone."""
        source, seed = self._opened_train(), int(os.environ.get("PL_GLOBAL_SEED", "0"))
        rank, world_size = self._place()
        transform = training_pixels(self.transform(source).size, self.augmentation, seed)
        if source.dataset is None:
            if source.length is None:
                raise ValueError(f"training set {source.task.name!r} is remote: give its number of samples as `length`")
            if self.captions or self.anchors:
                raise ValueError(f"training set {source.task.name!r} is remote: captions and anchors must be null")
            shuffled = ShuffledShards(source.urls, length=source.length, seed=seed, rank=rank, world_size=world_size)
            return self._train_loader_of(StreamedImages(shuffled, transform, len(source.task.label_names)), None)
        images = Images(source.dataset, transform, self.train_positions)
        pixels = training_pixels(self.image_size, self.augmentation, seed)
        beside = (self.captions, self.anchors, self.anchor_choice, self.root)
        images = anchored(images, *beside, transform=pixels, seed=seed)
        sampler: DistributedSampler[Loaded] = DistributedSampler(images, world_size, rank, shuffle=True, seed=seed)
        return self._train_loader_of(images, sampler)

    def val_dataloader(self) -> list[ImageLoader]:
        """One loader per validation task."""
        return self._eval_loaders(self._val)

    def test_dataloader(self) -> list[ImageLoader]:
        """One loader per test task."""
        return self._eval_loaders(self._test)

    def captioned_images(self) -> CaptionedImages | None:
        """The set for retrieval."""
        if self.captioned is None:
            return None
        folder = Path(self.root).expanduser() / self.captioned
        return CaptionedImages(folder, ToPixels(self.image_size), batch_size=self.eval_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Where the training epoch stands."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues there.

        Lightning restores loaders too, but not one that exists before the checkpoint is read, as it does where the
        length of the schedule is asked for.
        """
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:  # a test has nothing to continue
            self._resume_at = state_dict

    def _train_loader_of(self, dataset: Dataset[Loaded], sampler: Sampler[Any] | None) -> ImageLoader:
        first_epoch = self.trainer.current_epoch if self.trainer else 0
        loader = self._loader(dataset, sampler, self.batch_size, skips_bad_samples=True, first_epoch=first_epoch)
        if self.trainer is not None:
            limit = self.trainer.limit_train_batches
            loader.cut_after = limit if isinstance(limit, int) else int(limit * len(loader))
        if self._resume_at is not None:
            loader.load_state_dict(self._resume_at)
            self._resume_at = None
        self._train_loader = loader
        return loader

    def _eval_loaders(self, sources: Sequence[OpenedSource]) -> list[ImageLoader]:
        is_test = sources is self._test
        done = {source.task.name: self.done_samples(source.task.name) if is_test else frozenset() for source in sources}
        self._loaders = {source.task.name: self._eval_loader(source, done[source.task.name]) for source in sources}
        return list(self._loaders.values())

    def _eval_loader(self, source: OpenedSource, done: frozenset[int]) -> ImageLoader:
        rank, world_size = self._place()
        skips = self.bad_samples == "skip"
        if source.dataset is None:
            limit = self.max_samples
            shards = StreamedShards(source.urls, max_samples=limit, rank=rank, world_size=world_size, done=done)
            stream = StreamedImages(shards, self.transform(source), len(source.task.label_names))
            return self._loader(stream, None, self.eval_batch_size, skips_bad_samples=skips)
        positions = self.val_positions if source is self._train else None
        chosen = choose(source.dataset, positions, self.max_samples)
        images = Images(source.dataset, self.transform(source), chosen)
        sampler = ExactSampler(images, rank=rank, world_size=world_size, done=done)
        return self._loader(images, sampler, self.eval_batch_size, skips_bad_samples=skips)

    def _loader(
        self, dataset: Dataset[Loaded], sampler: Sampler[Any] | None, batch_size: int, **options: Any
    ) -> ImageLoader:
        return ImageLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def _opened_train(self) -> OpenedSource:
        if self._train is None:
            raise ValueError("the training set is not open: call setup('fit') first")
        return self._train

    def transform(self, source: OpenedSource) -> ToPixels:
        """From a decoded image of a set to the pixels that an attack works on."""
        return ToPixels(None if self._keeps_size(source) else self.image_size, source.border)

    def _keeps_size(self, source: OpenedSource) -> bool:
        return source.native_size and self.attack_resolution == "native"

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
