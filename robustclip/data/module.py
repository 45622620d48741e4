"""The one data module of all methods."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from robustclip.arguments import Count, CountOrZero, Interval, checked
from robustclip.data._resume import ResumableDataModule
from robustclip.data.anchors import CaptionedImages, Choice
from robustclip.data.data_sets import (
    OpenedSource,
    SetLike,
    listed,
    open_tests,
    open_training,
    open_unknown,
    split_training,
)
from robustclip.data.feature_cache import FeatureCache, ImageSet
from robustclip.data.loader import Beside, ImageLoader, Place, Preprocessing, Samples, exact_samples, shuffled_samples
from robustclip.data.splits import Shots, ShotsRule
from robustclip.data.transforms import Augmentation, ToPixels, training_pixels
from robustclip.paths import local_path
from robustclip.types import Done, Task


@checked
class CLIPDataModule(ResumableDataModule):
    """Labelled images for training and for any number of zero-shot tasks.

    A data set is a string (``wds:PATH-or-URL``, ``torchvision:CLASS``, ``folder:PATH``, ``list:PATH``, ``shapes:NAME``,
    a name of the catalogue, or the path of a class of yours), a `DataSource`, or an object: a ``Dataset`` or a
    `Source`. Nothing touches the network unless a source is a URL.

    Args:
        train: training set, or several of the same classes.
        val: validation sets, one or a list; none holds out a part of the training set.
        test: zero-shot test sets, one or a list, such as ``folder:/my/photos``.
        unknown: sets of images whose classes no test set knows, one or a list.
        root: folder that relative paths start at.
        image_size: side in pixels of the crop that larger images are reduced to before an attack.
        attack_resolution: ``native`` leaves small-image sets (CIFAR, STL-10) at their own size and lets the model
            enlarge them, so that an attack has only their pixels; ``model`` enlarges them first.
        batch_size: images per process and training step.
        eval_batch_size: images per process and evaluation step; null for ``batch_size``.
        num_workers: loader processes per process; 0 decodes in the main process.
        holdout: share of the training set, per class, that is kept for validation if ``val`` is empty; 0 for none.
        shots: training images per class, of several sets as many from each; null for all. The hold-out is taken first.
        shots_seed: of their choice.
        shots_rule: ``balanced``, or ``official`` for that of CRoFT's code; see `few_shots`.
        bad_samples: what evaluation does with an image that does not decode: ``error`` or ``skip``, which counts
            them. Training always skips and counts.
        augmentation: random crops of training images; null for none.
        captions: table of ``robustclip caption``, or ``shards`` for ``.txt`` beside the training images; null for none.
        anchors: folder of image-text pairs, as ``robustclip retrieve`` writes it; null for none.
        anchor_choice: ``pool`` takes any pair, ``paired`` one of the image's neighbours.
        captioned: folder of images with captions, in whose ``test`` split `FeatureGeometry` looks for them.
        features: folder of ``robustclip cache`` with embeddings that stand in place of images, but for ``test``.
        features_in_test: take them in ``test`` too, where there can be no attacks then.
        seed: of the order, the random crops and the drawn captions of training; the commands set ``seed_everything``.

    Raises:
        ValueError: anything about a data set that does not fit, when a stage is set up.
    """

    def __init__(
        self,
        train: SetLike | list[SetLike] = "shapes:source",
        val: SetLike | Sequence[SetLike] = (),
        test: SetLike | Sequence[SetLike] = (),
        unknown: SetLike | Sequence[SetLike] = (),
        root: str = ".",
        image_size: Count = 224,
        attack_resolution: Literal["native", "model"] = "native",
        batch_size: Count = 64,
        eval_batch_size: Count | None = None,
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
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        paths = {"root": root, "features": features, "captions": captions, "anchors": anchors, "captioned": captioned}
        for key, path in paths.items():
            local_path(path or ".", f"data.{key}")
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank's share of a tiny set may be empty
        self.wanted_train, self.wanted_val, self.wanted_test, self.wanted_unknown = map(
            listed, (train, val, test, unknown)
        )
        self.root, self.image_size, self.transform = root, image_size, Preprocessing(image_size, attack_resolution)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.holdout, self.bad_samples = num_workers, holdout, bad_samples
        self.shots = None if shots is None else Shots(shots, shots_seed, shots_rule)
        self.augmentation, self.captioned, self.features_in_test = augmentation, captioned, features_in_test
        self.features = None if features is None else Path(root).expanduser() / features
        self.beside = Beside(captions, anchors, anchor_choice, root)
        self.connect()
        self._train: OpenedSource | None = None
        self.val_positions: list[int] | None = None
        self._val: list[OpenedSource] = []
        self._test: list[OpenedSource] = []
        self._unknown: list[OpenedSource] = []
        self._loaders: dict[str, ImageLoader] = {}
        self._cache: FeatureCache | None = None

    def connect(self, *, limit: int | None = None, done: Done | None = None) -> None:
        """Takes the settings of an evaluation, before loaders are made.

        Args:
            limit: evaluate a fixed choice of this many samples of each task; None for all.
            done: returns the sample ids that an earlier start of the test has finished, by task; the loaders of
                ``test`` call it and leave these samples out. None for no ids.
        """
        self.max_samples = limit
        self.done_samples: Done = (lambda task: frozenset()) if done is None else done

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
        """Names of the sets of unknown classes, in their order; none is a test task's."""
        return [source.task.name for source in self._unknown]

    @property
    def train_has_unknown(self) -> bool:
        """Whether training images are labelled `UNKNOWN`."""
        return self._opened_train().has_unknown

    def protocol(self, task: str) -> dict[str, Any]:
        """Split, preprocessing, attack space and samples of a test or unknown set, for the protocol of a result."""
        source = next(source for source in (*self._test, *self._unknown) if source.task.name == task)
        return self.transform.protocol(source, self.max_samples)

    @property
    def feature_model(self) -> dict[str, Any] | None:
        """Whose embeddings stand in place of this stage's images, its ``fingerprint`` for one; None for images."""
        return None if self._cache is None else self._cache.model

    @property
    def image_sets(self) -> list[ImageSet]:
        """The opened sets, as ``robustclip cache`` keeps them."""
        sets: list[ImageSet] = []
        if self._train is not None:
            train = (self.wanted_train, self._train, self.transform(self._train))
            sets.append(ImageSet("train", *train, self.train_positions))
            if self.val_positions is not None:
                sets.append(ImageSet("holdout", *train, self.val_positions))
        evaluated = {"val": (self.wanted_val, self._val), "test": (self.wanted_test, self._test)}
        evaluated |= {"unknown": (self.wanted_unknown, self._unknown)}
        for kind, (wanted, sources) in evaluated.items():
            for one, source in zip(wanted, sources, strict=False):  # a hold-out was not wanted as a source
                sets.append(ImageSet(f"{kind}/{source.task.name}", [one], source, self.transform(source)))
        return sets

    @property
    def bad_sample_counts(self) -> dict[str, int]:
        """Undecodable samples that this process left out of its latest evaluation, per task."""
        return {name: len(loader.bad_samples) for name, loader in self._loaders.items()}

    def setup(self, stage: str) -> None:
        """Opens the data sets that a stage needs."""
        takes_features = self.features is not None and (stage != "test" or self.features_in_test)
        self._cache = FeatureCache(self.features) if self.features and takes_features else None
        if stage == "test":
            self._test = open_tests(self.wanted_test, root=self.root)
            if not self._test:
                raise ValueError("nothing to test on: `data.test` lists no data set")
            self._unknown = open_unknown(self.wanted_unknown, root=self.root, taken=[t.name for t in self.test_tasks])
            return
        self._val = open_tests(self.wanted_val, root=self.root)
        if stage == "fit" or not self._val:
            train = self._opened_train()
            if self.val_positions is not None:
                self._val = [train]

    def train_dataloader(self) -> ImageLoader:
        """Shuffled anew each epoch; the order follows from seed and epoch alone."""
        source, seed = self._opened_train(), self.seed
        own, model = (
            training_pixels(size, self.augmentation, seed) for size in (self.transform(source).size, self.image_size)
        )
        options: dict[str, Any] = {"positions": self.train_positions, "beside": self.beside, "seed": seed}
        samples = shuffled_samples(source, (own, model), self._place(), **options)
        epoch = self.trainer.current_epoch if self.trainer else 0
        options = {"skips_bad_samples": True, "first_epoch": epoch, "name": source.task.name}
        return self.continued(self._loader(samples, self.batch_size, **options))

    def plain_train_dataloader(self) -> ImageLoader:
        """The training images once and in order, each in one process, with the test transform; in any stage.

        Raises:
            ValueError: the training set is remote, or as `setup`.
        """
        source = self._opened_train()
        if source.dataset is None:
            raise ValueError(f"training set {source.task.name!r} is remote: a pass in order needs a local copy")
        positions = None if self.train_positions is None else sorted(set(self.train_positions))
        samples = exact_samples(source, self.transform(source), self._place(), positions=positions)
        return self._loader(samples, self.eval_batch_size, skips_bad_samples=True, name=source.task.name)

    def unknown_dataloaders(self) -> dict[str, ImageLoader]:
        """By its name one loader for every set of unknown classes; all labels are `UNKNOWN`."""
        loaders = {source.task.name: self._eval_loader(source, frozenset()) for source in self._unknown}
        self._loaders |= loaders
        return loaders

    def val_dataloader(self) -> list[ImageLoader]:
        """One loader per validation task."""
        return self._eval_loaders(self._val)

    def test_dataloader(self) -> list[ImageLoader]:
        """One loader per test task."""
        return self._eval_loaders(self._test)

    def done_dataloader(self, task: str) -> ImageLoader | None:
        """The samples of a test task that `done_samples` has listed, in order and with digests; None for no sample."""
        source = next(source for source in self._test if source.task.name == task)
        done = self.done_samples(task)
        return self._eval_loader(source, frozenset(), only=done, skips_bad_samples=True) if done else None

    def captioned_images(self) -> CaptionedImages | None:
        """The set for retrieval."""
        if self.captioned is None:
            return None
        folder = Path(self.root).expanduser() / self.captioned
        return CaptionedImages(folder, ToPixels(self.image_size), batch_size=self.eval_batch_size)

    def _eval_loaders(self, sources: Sequence[OpenedSource]) -> list[ImageLoader]:
        is_test = sources is self._test
        done = {source.task.name: self.done_samples(source.task.name) if is_test else frozenset() for source in sources}
        self._loaders = {source.task.name: self._eval_loader(source, done[source.task.name]) for source in sources}
        return list(self._loaders.values())

    def _eval_loader(
        self,
        source: OpenedSource,
        done: frozenset[int],
        only: frozenset[int] | None = None,
        skips_bad_samples: bool | None = None,
    ) -> ImageLoader:
        positions = self.val_positions if source is self._train else None
        limits: dict[str, Any] = {"positions": positions, "max_samples": self.max_samples, "done": done, "only": only}
        samples = exact_samples(source, self.transform(source), self._place(), **limits)
        skips = self.bad_samples == "skip" if skips_bad_samples is None else skips_bad_samples
        options = {
            "skips_bad_samples": skips,
            "has_digests": not any(source is each for each in self._val),
            "name": source.task.name,
        }
        return self._loader(samples, self.eval_batch_size, **options)

    def _loader(self, samples: Samples, batch_size: int, **options: Any) -> ImageLoader:
        dataset, sampler = samples
        if self._cache is not None:
            dataset = self._cache.instead_of(dataset, self.image_sets)
        options |= {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}
        return ImageLoader(dataset, batch_size=batch_size, sampler=sampler, **options)

    def _opened_train(self) -> OpenedSource:
        if self._train is None:  # a test opens it where it is asked for
            self._train = open_training(self.wanted_train, root=self.root)
            holdout = 0 if self.wanted_val else self.holdout
            self.train_positions, self.val_positions = split_training(self._train, holdout, self.shots)
        return self._train

    def _place(self) -> Place:
        return Place(self.trainer.global_rank, self.trainer.world_size) if self.trainer else Place(0, 1)
