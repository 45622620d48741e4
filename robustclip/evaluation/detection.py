"""Detects images of unknown classes during a test, without and under attack."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from robustclip.arguments import checked
from robustclip.attacks import PGD
from robustclip.attacks.attack import Forward
from robustclip.evaluation.detection_summary import ATTACKED, CLEAN, NAMES, column, detected, scalars, table_name
from robustclip.evaluation.journal import Journal, labelled_rows
from robustclip.evaluation.nearest_neighbours import Neighbours
from robustclip.evaluation.task_callback import announce, check_has_images, log_outputs, method_of, stage_of
from robustclip.evaluation.writer import Section, share_of, writer_of
from robustclip.methods import RobustMethod
from robustclip.models.layers import frozen
from robustclip.objectives.gl_mcm import GLMCM
from robustclip.objectives.neg_label import CSP, NegLabel
from robustclip.objectives.scores import SCORES, Score, confidence, score_of
from robustclip.objectives.word_lists import normalised
from robustclip.persistence import atomic_write
from robustclip.results.tables import DETECTION
from robustclip.types import Batch, data_of

FURTHER: Mapping[str, type[Score]] = {score.name: score for score in (Neighbours, NegLabel, CSP, GLMCM)}  # they prepare


@checked
class OODDetection(Callback):
    """Scores how sure a model is that an image shows one of a test task's classes, on these and on unknown ones.

    For every known task and every set of ``data.unknown``, known samples being the positives, a test logs
    ``test/<known>/detection/<unknown>/<score>/...``:

    - ``auroc``, ``aupr``: areas under the curves of the ranking by the score;
    - ``fpr95``: the share of unknown samples at or above the highest threshold that 95 % of the known ones reach;
    - ``aupr_out``, ``fpr95_out``: the same with unknown samples as the positives, the convention of OpenOOD and
      pytorch-ood; these and the known ones' may differ much, and must not be compared with each other;
    - ``autc``: area under the threshold curve, see `separation`; lower is better;
    - ``h``: harmonic mean of ``auroc`` and ``class_accuracy``;
    - ``attacked/auroc`` and so on: numbers under attack, which lowers the reported score of known images and raises
      that of unknown ones. The worse of the clean and the attacked image counts.

    and per known task ``class_accuracy``, the mean over the classes that are present, and ``ece``, the calibration
    error of the softmax in 15 bins. Beside a `ResultsWriter`, scores, histograms and ROC curves are kept too.

    Args:
        known: names of the known test tasks; null for all.
        unknown: known task to the names of its unknown sets; null, or no entry for a task, for all.
        scores: names, class paths or objects of `Score`; ``mcm`` is the softmax of the cosines, ``msp`` that of the
            scaled logits, ``logit_gap`` and ``gen`` are `LogitGap` and `GEN`, ``knn`` is the nearness of the training
            images, see `Neighbours`.
        headline: score of the tables.
        attack: null for clean images alone; ``keep: best`` returns the best iterate by the attacked score.
        attacked: scores to attack, each at the attack's cost; null for the headline.
        is_correct_only: leave out known samples that are misclassified without attack, as CRoFT's code does; this
            raises the numbers.
        seed: seed of the attack's random starts.

    Raises:
        ValueError: a headline or attacked score that is not among the scores, an attack with a loss of its own;
            when a test is set up, no unknown set, a name that the data do not have, embeddings to attack, or data that
            a score cannot use.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from robustclip import CLIPDataModule, DataSource, OODDetection, ZeroShot
        >>> half = DataSource("shapes:colours", classes="0-5")  # the images of the other six colours are unknown
        >>> data = CLIPDataModule(test=half, unknown=half, image_size=32)
        >>> callbacks = [OODDetection(scores=["mcm"], headline="mcm")]
        >>> trainer = Trainer(accelerator="cpu", callbacks=callbacks, logger=False, enable_progress_bar=False)
        >>> (metrics,) = trainer.test(ZeroShot(), data, verbose=False)
        >>> metrics["test/colours/detection/colours_unknown/mcm/auroc"] > 0.9
        True
    """

    def __init__(
        self,
        known: list[str] | None = None,
        unknown: dict[str, list[str]] | None = None,
        scores: Sequence[str | Score] = ("mcm", "msp", "max_logit", "energy", "entropy"),
        headline: str = "mcm",
        attack: PGD | None = None,
        attacked: list[str] | None = None,
        is_correct_only: bool = False,
        seed: int = 0,
    ) -> None:
        self.known, self.unknown, self.headline = known, unknown or {}, headline
        chosen = [score_of(score, FURTHER) for score in scores]
        self.scores = [score.name for score in chosen]
        self._score_by_name = {score.name: score for score in chosen}
        if len(set(self.scores)) < len(self.scores):
            raise ValueError(f"scores must differ in their names, got {self.scores}")
        self.attack, self.is_correct_only, self.seed = attack, is_correct_only, seed
        self.attacked = [] if attack is None else [headline] if attacked is None else attacked
        for name in (headline, *self.attacked):
            if name not in self.scores:
                raise ValueError(
                    f"scores must hold the headline and the attacked scores, got {self.scores}; add {name!r}"
                )
        if attack is not None and attack.loss is not None:
            raise ValueError(
                f"attack.loss must be null, got {attack.loss!r}; the attack maximises or minimises the score"
            )
        self._pairs: dict[str, list[str]] = {}
        self._section = Section(detected)
        self._journal: Journal | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Pairs known tasks with unknown sets."""
        if stage != "test":
            return
        if getattr(pl_module, "defence", None) is not None:
            raise ValueError("OODDetection measures a method without its defence; set model.defence to null")
        data = data_of(trainer)
        tasks, names = [task.name for task in data.test_tasks], list(data.unknown_names)
        if self.attacked:
            check_has_images(trainer, "OODDetection's attacks")
        if not names:
            raise ValueError("OODDetection needs a data set of unknown classes; list one in `data.unknown`")
        _check_names("known", self.known or [], tasks)
        _check_names("unknown", self.unknown, tasks)
        for task, sets in self.unknown.items():
            _check_names(f"unknown.{task}", sets, names)
        self._pairs = {task: self.unknown.get(task, names) for task in (tasks if self.known is None else self.known)}
        for score in self._score_by_name.values():
            score.setup(data, [task for task in data.test_tasks if task.name in self._pairs])
        columns = ["id", "label", "pixels", *self._columns]
        tables = {table_name(task, name): columns for task, sets in self._pairs.items() for name in (task, *sets)}
        self._section, self._journal = Section(detected, tables, self._settings()), None
        if (writer := writer_of(trainer)) is not None:
            writer.sections[DETECTION] = self._section

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares the scores, and takes the ledgers of the test."""
        method, data, self._journal = method_of(pl_module), data_of(trainer), self._section.open(trainer)
        # Outside inference mode, whose tensors could not take part in an attack's graph.
        with torch.inference_mode(False), torch.no_grad(), frozen(method):
            for known in data.test_tasks:
                for score in self._score_by_name.values() if known.name in self._pairs else ():
                    score.prepare(method, known)
        self._section.facts |= {
            "own_scores": self._own_scores,  # `prepare` may have changed their settings
            NAMES: self._keep_names(trainer),
            "variants": {score.name: list(score.variants) for score in self._score_by_name.values() if score.variants},
            "has_pixels": data.feature_model is None,
            "data": {name: data.protocol(name) for name in data.unknown_names},
        }

    # At the start of the batch, since a `RobustEvaluation` that follows measures the time from its own start hook on.
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Scores a batch of a known task."""
        task = stage_of(trainer)[1][dataloader_idx].name
        if task in self._pairs:
            self._add(method_of(pl_module), task, task, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores the unknown sets, and logs the numbers of the section; a shard has none."""
        method = method_of(pl_module)
        for name, loader in data_of(trainer).unknown_dataloaders().items():
            tasks = [task for task, sets in self._pairs.items() if name in sets]
            for batch in loader if tasks else ():
                moved = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                for task in tasks:
                    announce(trainer, f"{name}, unknown to {task}")
                    self._add(method, task, name, moved)
        if share_of(trainer) is not None:
            return
        numbers = {
            f"test/{task}/{DETECTION}/{name}": value
            for task, summary in self._section.summary(DETECTION, self._ledgers)["tasks"].items()
            for name, value in scalars(summary).items()
        }
        log_outputs(trainer, method, numbers)

    def _keep_names(self, trainer: Trainer) -> dict[str, dict[str, Any]]:
        """Writes the names beside the classes of all scores into the result's folder.

        Returns:
            Known task to score to the number of names, and to those of each unknown set that are among them; None for a
            set whose class names are not known.
        """
        data, writer, kept = data_of(trainer), writer_of(trainer), dict[str, dict[str, Any]]()
        known = {task.name: {*map(normalised, task.class_names)} for task in data.test_tasks}
        for task, sets in self._pairs.items():
            for score in self._score_by_name.values():
                if names := list(score.further_names(task)):
                    classes = {name: {*map(normalised, data.unknown_class_names(name))} for name in sets}
                    shared = {name: sorted((classes[name] - known[task]) & {*map(normalised, names)}) for name in sets}
                    of_unknown = {name: shared[name] if classes[name] else None for name in sets}
                    kept.setdefault(task, {})[score.name] = {"count": len(names), "of_unknown": of_unknown}
                    if writer is not None and trainer.is_global_zero:
                        (writer.opened / NAMES).mkdir(exist_ok=True)
                        text = "".join(f"{name}\n" for name in names)
                        atomic_write(writer.opened / NAMES / f"{table_name(task, score.name)}.txt", text)
        return kept

    @property
    def _ledgers(self) -> Journal:
        if self._journal is None:
            raise RuntimeError("no test is running")
        return self._journal

    def _add(self, method: RobustMethod, task: str, name: str, batch: Batch) -> None:
        table, is_known = table_name(task, name), task == name
        if self._ledgers.is_finished(table, batch):
            return
        with torch.autocast(method.device.type, enabled=False), frozen(method):
            logits, outputs = self._outputs(method, batch.images, task)
            scale = method.clip.logit_scale.double()
            columns: dict[str, Tensor] = {
                "is_right": logits.argmax(-1) == batch.labels,
                "confidence": confidence(logits),
            }
            for score in self._score_by_name.values():
                columns |= _per_sample(score, outputs.get(score.name, logits).double(), scale)
            if self.attack is not None:
                for key in self.attacked:
                    score = self._score_by_name[key]
                    forward = partial(score.forward, method, task=task)
                    values = attacked_score(
                        self.attack, method, forward, score, batch, is_known=is_known, seed=self.seed
                    )
                    worse = torch.minimum if is_known else torch.maximum
                    columns[column(key, ATTACKED)] = worse(columns[column(key, CLEAN)], values)
        cells = {key: [repr(value) for value in column.double().tolist()] for key, column in columns.items()}
        self._ledgers.append(table, labelled_rows(batch, cells))

    def _outputs(self, method: RobustMethod, images: Tensor, task: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the logits in fp64, and the outputs of scores that need others; one pass of the tower serves all."""
        own = [score for score in self._score_by_name.values() if type(score).forward is not Score.forward]
        with method.clip.remembering():
            ordered = sorted(own, key=lambda score: not score.reads_positions)
            outputs = {score.name: score.forward(method, images, task) for score in ordered}
            return method.logits(images, task).double(), outputs

    @property
    def _columns(self) -> list[str]:
        attacked = [column(name, ATTACKED) for name in self.attacked]
        variants = [column(score.name, name) for score in self._score_by_name.values() for name in score.variants]
        return ["is_right", "confidence", *self.scores, *attacked, *variants]

    @property
    def _own_scores(self) -> dict[str, dict[str, Any]]:
        own = {name: score for name, score in self._score_by_name.items() if name not in SCORES or score.settings}
        return {name: {"class": type(score).__name__, **score.settings} for name, score in own.items()}

    def _settings(self) -> dict[str, Any]:
        """Returns the settings that change rows or numbers of the section."""
        attack = None if self.attack is None else {"class": type(self.attack).__name__, **self.attack.settings}
        return {
            "pairs": self._pairs,
            "scores": self.scores,
            "own_scores": self._own_scores,
            "headline": self.headline,
            "is_correct_only": self.is_correct_only,
            "attack": attack,
            "attacked": self.attacked,
            "seed": self.seed,
        }


def attacked_score(
    attack: PGD, method: RobustMethod, forward: Forward, score: Score, batch: Batch, *, is_known: bool, seed: int
) -> Tensor:
    """Computes a score ``(B,)`` under an attack that lowers it for known samples and raises it for unknown ones.

    Args:
        attack: attack without a loss of its own.
        method: frozen method.
        forward: function from images to the input of the score.
        score: attacked score.
        batch: clean images.
        is_known: whether the images show known classes.
        seed: seed of the random starts.
    """
    sign = torch.full((len(batch.index),), -1.0 if is_known else 1.0, dtype=torch.float64, device=method.device)

    def push(outputs: Tensor, sign: Tensor) -> Tensor:
        return sign * score.evidence(outputs.double(), method.clip.logit_scale.double())

    attacked = attack(batch.images, forward, sign, push, index=batch.index, seed=seed)
    return score.value(forward(attacked).double(), method.clip.logit_scale.double())


def _per_sample(score: Score, outputs: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Computes the columns of a score, and refuses values that are not one per sample."""
    columns = score.columns(outputs, scale)
    for values in columns.values():
        if values.shape != outputs.shape[:1]:
            shape = tuple(values.shape)
            raise ValueError(f"{type(score).__name__}.value must return one number per sample, shape (B,), got {shape}")
    return columns


def _check_names(option: str, names: Iterable[str], offered: Sequence[str]) -> None:
    for name in names:
        if name not in offered:
            raise ValueError(f"{option} of OODDetection names {name!r}; the data have {', '.join(offered)}")
