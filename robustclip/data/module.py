"""The data module that all methods share."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from robustclip.arguments import Count, CountOrZero, Interval, checked
from robustclip.data._resume import ResumableDataModule
from robustclip.data.anchors import AuxiliaryData, CaptionedImages, Choice
from robustclip.data.batch_sizes import BatchSizes, Pieces
from robustclip.data.corrupted_sets import Corruptions
from robustclip.data.data_sets import open_tests, open_training, open_unknown, split_training
from robustclip.data.data_source import SetLike, listed
from robustclip.data.decoding import Decoder
from robustclip.data.feature_cache import FeatureCache, ImageSet
from robustclip.data.loader import ImageLoader
from robustclip.data.opened_source import OpenedSource
from robustclip.data.process_share import Process, Samples, exact_samples, shuffled_samples
from robustclip.data.splits import Shots, ShotsRule
from robustclip.data.transforms import Augmentation, CorruptedPixels, ToPixels, training_pixels
from robustclip.paths import local_path
from robustclip.types import Crop, Done, Share, Task, TrainingImages


@checked
class CLIPDataModule(ResumableDataModule):
    """Labelled images for training and for any number of zero-shot tasks.

    A data set is a text (``wds:PATH-or-URL``, ``torchvision:CLASS``, ``folder:PATH``, ``list:PATH``, ``shapes:NAME``,
    a name of the catalogue, or the path of an own class), a `DataSource`, or an object: a ``Dataset`` or a `Source`.
    Only sources that are URLs use the network.

    Args:
        train: training set, or several of the same classes.
        val: one or several validation sets; none holds out a part of the training set.
        test: one or several zero-shot test sets, such as ``folder:/my/photos``.
        unknown: one or several sets of images whose classes belong to no test set.
        root: folder that relative paths start at.
        image_size: side in pixels of the crop to which larger images are reduced before an attack.
        crop: resize before the centre crop of larger images: ``tecoa`` (short side 256/224 of ``image_size``, bilinear)
            or ``clip``, which is open_clip's own (short side ``image_size``, bicubic); ``squash`` resizes to a square
            (bicubic), as SigLIP does.
        decoder: library that decodes and resizes: ``pillow``, as in the papers, or ``torchvision``, which is faster and
            rounds resized pixels differently.
        attack_resolution: ``native`` leaves sets of small images (CIFAR, STL-10) at their own size, so that an attack
            changes only these pixels and the model enlarges them; ``model`` enlarges them first.
        batch_size: images per process and training step; null for 64, or for the share of ``global_batch_size``.
        global_batch_size: images per optimiser step, over all devices, nodes and accumulated batches
            (``trainer.accumulate_grad_batches``), which must divide it; null to give ``batch_size`` instead. If the
            number of training images is not divisible by that of processes, the last step of an epoch repeats some.
        eval_batch_size: images per process and evaluation step; null for the size in training.
        drop_last: leave out the last batch of a training epoch if it is smaller than the others.
        num_workers: loader processes per process; 0 decodes in the main process.
        holdout: share of the training set, per class, that is kept for validation if ``val`` is empty; 0 for none.
        shots: training images per class, taken equally from several sets after the hold-out; null for all.
        shots_seed: seed of the choice of these images.
        shots_rule: ``balanced``, or ``official`` for the rule of CRoFT's code; see `few_shots`.
        bad_samples: ``error`` stops an evaluation at an undecodable image, ``skip`` counts it. Training always skips
            and counts.
        augmentation: random crops of training images; null for none.
        captions: table of ``robustclip caption``, ``shards`` for the ``.txt`` files of the training images, or ``list``
            for the column ``caption`` of their CSV file; null for none.
        anchors: folder of image-text pairs that ``robustclip retrieve`` has written; null for none.
        anchor_choice: ``pool`` draws any pair, ``paired`` a neighbour of the image.
        captioned: folder of images with captions, whose ``test`` split `FeatureGeometry` uses for retrieval.
        features: folder of ``robustclip cache`` with embeddings that replace the images, except in ``test``.
        features_in_test: replace the images in ``test`` too, which excludes attacks.
        corruptions: corrupted copies of every test set, which are tested beside it; null for none.
        seed: seed of the order, the random crops and the drawn captions of training; the commands pass
            ``seed_everything``.

    Raises:
        ValueError: a data set does not fit, at the setup of a stage.

    Examples:
        >>> from robustclip import CLIPDataModule
        >>> data = CLIPDataModule(test="shapes:colours", image_size=32, batch_size=8)
        >>> data.setup("test")
        >>> data.test_tasks[0].class_names[:3]
        ('red', 'green', 'blue')
        >>> next(iter(data.test_dataloader()[0])).images.shape
        torch.Size([8, 3, 32, 32])
    """

    max_samples: int | None = None
    val_positions: list[int] | None = None
    _done: Done | None = None
    _planned: Pieces | None = None
    _share: Share | None = None
    _train: OpenedSource | None = None
    _val: Sequence[OpenedSource] = ()
    _test: Sequence[OpenedSource] = ()
    _unknown: Sequence[OpenedSource] = ()
    _loaders: Mapping[str, ImageLoader] = MappingProxyType({})  # of the latest evaluation
    _cache: FeatureCache | None = None

    def __init__(
        self,
        train: SetLike | list[SetLike] = "shapes:source",
        val: SetLike | Sequence[SetLike] = (),
        test: SetLike | Sequence[SetLike] = (),
        unknown: SetLike | Sequence[SetLike] = (),
        root: str = ".",
        image_size: Count = 224,
        crop: Crop = "tecoa",
        decoder: Decoder = "pillow",
        attack_resolution: Literal["native", "model"] = "native",
        batch_size: Count | None = None,
        global_batch_size: Count | None = None,
        eval_batch_size: Count | None = None,
        drop_last: bool = False,
        num_workers: CountOrZero = 0,
        holdout: Annotated[float, Interval(0, 1, excludes=(1,))] = 0.1,
        shots: Count | None = None,
        shots_seed: int = 0,
        shots_rule: ShotsRule = "balanced",
        bad_samples: Literal["error", "skip"] = "error",
        augmentation: Augmentation | None = None,
        captions: str | None = None,
        anchors: str | None = None,
        anchor_choice: Choice = "pool",
        captioned: str | None = None,
        features: str | None = None,
        features_in_test: bool = False,
        corruptions: Corruptions | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        _check_local(root=root, features=features, captions=captions, anchors=anchors, captioned=captioned)
        self.allow_zero_length_dataloader_with_multiple_devices = True  # the share of a tiny set may be empty
        self.train_sources, self.val_sources = listed(train), listed(val)
        self.test_sources, self.unknown_sources = listed(test), listed(unknown)
        if features_in_test and corruptions is not None:
            raise ValueError("data.features_in_test must be false where data.corruptions changes the images")
        self.corruptions = corruptions
        self.root, self.image_size, self.attack_resolution = root, image_size, attack_resolution
        self.crop, self.decoder = crop, decoder
        self.batch_sizes, self.drop_last = BatchSizes(batch_size, global_batch_size, eval_batch_size), drop_last
        self.num_workers, self.holdout, self.bad_samples = num_workers, holdout, bad_samples
        self.shots = None if shots is None else Shots(shots, shots_seed, shots_rule)
        self.augmentation, self.captioned, self.features_in_test = augmentation, captioned, features_in_test
        self.features = None if features is None else Path(root).expanduser() / features
        self.auxiliary = AuxiliaryData(captions, anchors, anchor_choice, root)

    def connect(self, *, limit: int | None = None, done: Done | None = None, share: Share | None = None) -> None:
        """Takes the settings of an evaluation, before loaders are made.

        Args:
            limit: number of samples of each task that are evaluated, a fixed choice; None for all.
            done: returns the sample ids that an earlier start of the test has finished, by task; the loaders of
                ``test`` call it and leave these samples out. None for no ids.
            share: part of every test and unknown set that a test evaluates; None for all samples.
        """
        self.max_samples, self._done, self._share = limit, done, share

    def done_samples(self, task: str) -> frozenset[int]:
        """Returns the ids of the samples of a task that an earlier start of the test has finished."""
        return frozenset() if self._done is None else self._done(task)

    def share_out(self, pieces: Pieces) -> None:
        """Takes the pieces of an optimiser step in a planned run, in place of those of the attached trainer."""
        self._planned = pieces

    @property
    def pieces(self) -> Pieces:
        """Pieces of an optimiser step: processes and accumulated batches of the trainer."""
        if self._planned is not None or self.trainer is None:
            return self._planned or Pieces()
        return Pieces(self.trainer.world_size, self.trainer.accumulate_grad_batches)

    @property
    def batch_size(self) -> int:
        """Images per process and training step.

        Raises:
            ValueError: ``global_batch_size`` is not divisible by the number of processes and accumulated batches.
        """
        return self.batch_sizes.training(self.pieces)

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.batch_sizes = replace(self.batch_sizes, per_process=size, per_step=None)

    @property
    def eval_batch_size(self) -> int:
        """Images per process and evaluation step."""
        return self.batch_sizes.evaluation(self.pieces)

    @eval_batch_size.setter
    def eval_batch_size(self, size: int) -> None:
        self.batch_sizes = replace(self.batch_sizes, evaluated=size)

    @property
    def train_task(self) -> Task:
        """Classes of the training set."""
        return self._opened_train().task

    @property
    def val_tasks(self) -> list[Task]:
        """Tasks of the validation loaders, in their order."""
        return [source.task for source in self._val]

    @property
    def test_tasks(self) -> list[Task]:
        """Tasks of the test loaders, in their order."""
        return [source.task for source in self._test]

    @property
    def unknown_names(self) -> list[str]:
        """Names of the sets of unknown classes, in their order; they differ from those of all test tasks."""
        return [source.task.name for source in self._unknown]

    @property
    def train_has_unknown(self) -> bool:
        """Whether training images are labelled `UNKNOWN`."""
        return self._opened_train().has_unknown

    def protocol(self, task: str) -> dict[str, Any]:
        """Returns split, samples, preprocessing and attack space of a test or unknown set, for a result's protocol."""
        source = self._evaluated(task)
        pixels, size = self._pixels(source), None if source.dataset is None else len(source.dataset)  # type: ignore[arg-type]
        return {
            "split": ", ".join(filter(None, (source.task.name, source.split, source.part))),
            "sample_ids": f"{self.max_samples or 'all'} of {'a stream' if size is None else size}",
            "preprocessing": pixels.description,
            **({} if source.copy is None else {"corruption": source.copy.axis}),
            "attack_space": "native" if pixels.size is None else f"{self.image_size} x {self.image_size}",
        }

    def test_size(self, task: str) -> int | None:
        """Returns the number of samples of a test task that are evaluated; None for a stream of unknown length."""
        source = self._evaluated(task)
        size = source.length if source.dataset is None else len(source.dataset)  # type: ignore[arg-type]
        return size if size is None or self.max_samples is None else min(size, self.max_samples)

    @property
    def feature_model(self) -> dict[str, Any] | None:
        """Model whose embeddings replace the images of this stage, with its ``fingerprint``; None for images."""
        return None if self._cache is None else self._cache.model

    @property
    def image_sets(self) -> list[ImageSet]:
        """Opened sets, named as in the folder of ``robustclip cache``."""
        sets = []
        if self._train is not None:
            train = self._train, self._pixels(self._train)
            sets.append(ImageSet("train", *train, self.train_positions))
            if self.val_positions is not None:
                sets.append(ImageSet("holdout", *train, self.val_positions))
        for kind, sources in {"val": self._val, "test": self._test, "unknown": self._unknown}.items():
            others = [source for source in sources if source is not self._train and source.copy is None]
            sets += [ImageSet(f"{kind}/{source.task.name}", source, self._pixels(source)) for source in others]
        return sets

    @property
    def bad_sample_counts(self) -> dict[str, int]:
        """Number of undecodable samples of this process in its latest evaluation, by task."""
        return {name: len(loader.bad_samples) for name, loader in self._loaders.items()}

    def setup(self, stage: str) -> None:
        """Opens the data sets of a stage."""
        uses_features = self.features is not None and (stage != "test" or self.features_in_test)
        self._cache = FeatureCache(self.features) if self.features and uses_features else None
        if stage == "test":
            self._test = open_tests(self.test_sources, root=self.root, corruptions=self.corruptions)
            if not self._test:
                raise ValueError("nothing to test on: `data.test` lists no data set")
            self._unknown = open_unknown(self.unknown_sources, root=self.root, taken=[t.name for t in self.test_tasks])
            return
        self._val = open_tests(self.val_sources, root=self.root)
        if stage == "fit":
            self._check_batch_size()
        if stage == "fit" or not self._val:
            train = self._opened_train()
            if stage == "fit" and self.drop_last:
                self._check_last_batch(train)
            if self.val_positions is not None:
                self._val = [train]

    def train_dataloader(self) -> ImageLoader:
        """Loads the training images, shuffled anew each epoch; seed and epoch determine the order."""
        source = self._opened_train()
        plain = self._pixels(source), ToPixels(self.image_size, crop=self.crop, decoder=self.decoder)
        own, anchors = (training_pixels(view, self.augmentation, self.seed) for view in plain)
        options: dict[str, Any] = {"positions": self.train_positions, "auxiliary": self.auxiliary, "seed": self.seed}
        options["drop_last"] = self.drop_last
        samples = shuffled_samples(source, (own, anchors), self._process(), **options)
        epoch = self.trainer.current_epoch if self.trainer else 0
        options = {"skips_bad_samples": True, "first_epoch": epoch, "name": source.task.name}
        options["drop_last"] = self.drop_last
        return self.resumed(self._loader(samples, self.batch_size, **options))

    def plain_train_dataloader(self) -> ImageLoader:
        """Loads the training images once and in order, over all processes, with the test transform; in any stage.

        Raises:
            ValueError: the training set is remote, or as `setup`.
        """
        source = self._opened_train()
        if source.dataset is None:
            raise ValueError(f"training set {source.task.name!r} is remote: a pass in order needs a local copy")
        positions = None if self.train_positions is None else sorted(set(self.train_positions))
        samples = exact_samples(source, self._pixels(source), self._process(), positions=positions)
        return self._loader(samples, self.eval_batch_size, skips_bad_samples=True, name=source.task.name)

    def training_images(self, limit: int) -> TrainingImages:
        """Returns the number of training images, and digests of a fixed choice of them, with the test transform.

        Args:
            limit: largest number of digests; images that do not decode have none.

        Returns:
            None are known of a remote training set or of embeddings.
        """
        source = self._opened_train()
        if source.dataset is None or self._cache is not None:
            return TrainingImages()
        chosen = None if self.train_positions is None else sorted(set(self.train_positions))
        options: dict[str, Any] = {"positions": chosen, "max_samples": limit}
        dataset, _ = exact_samples(source, self._pixels(source), Process(0, 1), **options)
        options = {"skips_bad_samples": True, "has_digests": True, "name": source.task.name}
        loader = ImageLoader(dataset, batch_size=self.eval_batch_size, **options)
        digests = tuple(digest for batch in loader for digest in batch.digests or ())
        return TrainingImages(len(source.dataset if chosen is None else chosen), digests)  # type: ignore[arg-type]

    def unknown_class_names(self, name: str) -> tuple[str, ...]:
        """Returns the class names of the data set of a set of unknown classes, known ones among them."""
        return self._evaluated(name).task.class_names

    def unknown_dataloaders(self) -> dict[str, ImageLoader]:
        """Returns one loader for every set of unknown classes, by its name; all labels are `UNKNOWN`."""
        loaders = {source.task.name: self._eval_loader(source) for source in self._unknown}
        self._loaders = {**self._loaders, **loaders}
        return loaders

    def val_dataloader(self) -> list[ImageLoader]:
        """Returns one loader per validation task."""
        self._loaders = {source.task.name: self._eval_loader(source) for source in self._val}
        return list(self._loaders.values())

    def test_dataloader(self) -> list[ImageLoader]:
        """Returns one loader per test task."""
        done = [(source, self.done_samples(source.task.name)) for source in self._test]
        self._loaders = {source.task.name: self._eval_loader(source, done=ids) for source, ids in done}
        return list(self._loaders.values())

    def done_dataloader(self, task: str) -> ImageLoader | None:
        """Loads the samples in `done_samples` of a test task, in order and with digests; None for no sample."""
        done = self.done_samples(task)
        return self._eval_loader(self._evaluated(task), only=done) if done else None

    def captioned_images(self) -> CaptionedImages | None:
        """Returns the images with captions for retrieval; None without such a set."""
        if self.captioned is None:
            return None
        folder = Path(self.root).expanduser() / self.captioned
        pixels = ToPixels(self.image_size, crop=self.crop, decoder=self.decoder)
        return CaptionedImages(folder, pixels, batch_size=self.eval_batch_size)

    def _eval_loader(
        self, source: OpenedSource, *, done: frozenset[int] = frozenset(), only: frozenset[int] | None = None
    ) -> ImageLoader:
        positions = self.val_positions if source is self._train else None
        limits: dict[str, Any] = {"positions": positions, "max_samples": self.max_samples, "done": done, "only": only}
        return self._loader(
            exact_samples(source, self._pixels(source), self._process(), share=self._share, **limits),
            self.eval_batch_size,
            skips_bad_samples=only is not None or self.bad_samples == "skip",
            has_digests=all(source is not other for other in self._val),
            name=source.task.name,
        )

    def _loader(self, samples: Samples, batch_size: int, **options: Any) -> ImageLoader:
        dataset, sampler = samples
        if self._cache is not None:
            dataset = self._cache.instead_of(dataset, self.image_sets)
        options |= {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}
        return ImageLoader(dataset, batch_size=batch_size, sampler=sampler, **options)

    def _check_batch_size(self) -> None:
        """Refuses, before anything is read, batch sizes that do not fit the trainer."""
        callbacks = getattr(self.trainer, "callbacks", [])
        is_scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
        if is_scheduled and self.batch_sizes.per_step is not None:
            raise ValueError(
                "data.global_batch_size is one number for the whole run, which GradientAccumulationScheduler changes;"
                " give data.batch_size instead"
            )
        self.batch_sizes.training(self.pieces)

    def _check_last_batch(self, train: OpenedSource) -> None:
        """Refuses to drop the last batch of an epoch if it is the only one."""
        chosen = train.dataset if self.train_positions is None else self.train_positions
        count = (train.length or 0) if chosen is None else len(chosen)  # type: ignore[arg-type]
        readers = self.pieces.processes * (max(1, self.num_workers) if train.dataset is None else 1)
        if count // readers < self.batch_size:
            raise ValueError(
                f"training set {train.task.name!r} has {count} samples, of which {readers} readers make no batch of"
                f" {self.batch_size}, and data.drop_last leaves out smaller ones; set it to false, or reduce"
                " data.batch_size or data.global_batch_size"
            )

    def _opened_train(self) -> OpenedSource:
        if self._train is None:  # a test opens the training set at its first use
            self._train = open_training(self.train_sources, root=self.root)
            holdout = 0 if self.val_sources else self.holdout
            self.train_positions, self.val_positions = split_training(self._train, holdout, self.shots)
        return self._train

    def _evaluated(self, task: str) -> OpenedSource:
        return next(source for source in (*self._test, *self._unknown) if source.task.name == task)

    def _pixels(self, source: OpenedSource) -> ToPixels:
        """Returns the transform of a set without augmentation."""
        keeps_size = source.native_size and self.attack_resolution == "native"
        size = None if keeps_size else self.image_size
        options = size, source.border, source.crop or self.crop, self.decoder
        corruption = None if source.copy is None else source.copy.corruption
        return ToPixels(*options) if corruption is None else CorruptedPixels(*options, corruption=corruption)

    def _process(self) -> Process:
        return Process(self.trainer.global_rank, self.trainer.world_size) if self.trainer else Process(0, 1)


def _check_local(**paths: str | None) -> None:
    """Refuses settings that are URLs."""
    for key, path in paths.items():
        local_path(path or ".", f"data.{key}")
