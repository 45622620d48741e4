"""The functions of the package for Python programs: `load` a fine-tuned model, and `evaluate` any model."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from robustclip.attacks.recipes import Attacks
from robustclip.cli import build
from robustclip.data import CLIPDataModule
from robustclip.data.data_source import SetLike
from robustclip.evaluation import ResultsWriter, RobustEvaluation
from robustclip.evaluation.any_model import AnyModel
from robustclip.methods import RobustMethod
from robustclip.results.run import Run


def load(path: str | Path) -> RobustMethod:
    """Loads a fine-tuned model in eval mode.

    Args:
        path: checkpoint of ``robustclip fit``, or a folder that ``robustclip test`` wrote.

    Raises:
        ValueError: no such file or folder, or its weights belong to another model.

    Examples:
        >>> import robustclip
        >>> from robustclip.cli.main import run
        >>> short = "--data.test shapes:colours --evaluation.max_samples 4 --trainer.enable_progress_bar false"
        >>> run(["test", "--config", "zero_shot", "--results.name", "tested", *short.split()])
        ZeroShot: top-1 accuracy in percent...
        0
        >>> robustclip.load("runs/results/tested").training
        False
    """
    path = Path(path)
    if path.is_dir():
        return build.build(Run.open(path).result["config"])
    return build.build_for(path, ["--ckpt_path", str(path)])


def evaluate(
    model: RobustMethod | Callable[[Tensor], Tensor],
    data: LightningDataModule | SetLike | Sequence[SetLike],
    attacks: Attacks = "pgd10",
    *,
    image_size: int = 224,
    batch_size: int = 64,
    max_samples: int | None = None,
    seed: int = 0,
    folder: str | Path = "runs/results",
    name: str | None = None,
    is_undefended: bool = False,
) -> Run:
    """Tests any classifier of images, with the same engine, ledgers and audit as ``robustclip test``.

    A black-box attack, such as ``{"square": Square("1/255")}``, suits a model without gradients.

    Args:
        model: method of the package, or function or module from images ``(B, 3, H, W)`` in [0, 1] to logits ``(B, C)``
            of the classes of the data set, in their order.
        data: data module, or one or several test sets as in ``data.test``, such as ``folder:photos``.
        attacks: names of recipes, or attacks by their names.
        image_size: side in pixels of the images that the model receives; ignored for a data module.
        batch_size: images per batch; ignored for a data module.
        max_samples: number of fixed samples of each set; None for all.
        seed: seed of the attacks' random numbers.
        folder: folder of all results.
        name: name of the result's folder; needed for a function, whose content cannot be compared.
        is_undefended: whether the model has no defence, so that attacks must succeed.

    Returns:
        The finished test; ``result`` holds accuracies, intervals and audit.

    Raises:
        ValueError: outputs, data or attacks do not fit.

    Examples:
        >>> import robustclip
        >>> def red_or_blue(images):
        ...     return 9 * images[:, [0, 2]].mean((2, 3))  # logits of two classes
        >>> data = robustclip.DataSource("shapes:colours", classes="0,2", name="red_or_blue")
        >>> attacks = {"square": robustclip.Square("5/255", queries=20)}
        >>> run = robustclip.evaluate(red_or_blue, data, attacks, image_size=32, max_samples=8, name="mine")
        AnyModel: top-1 accuracy in percent...
        >>> sorted(run.result["mean"])
        ['clean', 'square']
    """
    method = model if isinstance(model, RobustMethod) else AnyModel(model, image_size, name)
    if not isinstance(data, LightningDataModule):
        data = CLIPDataModule(test=data, image_size=image_size, batch_size=batch_size, attack_resolution="model")
    writer = ResultsWriter(str(folder), name, is_undefended=is_undefended)
    evaluation = RobustEvaluation(attacks, max_samples, seed=seed)
    trainer = Trainer(
        callbacks=[evaluation, writer], devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.test(method, datamodule=data, verbose=False)
    return Run.open(writer.opened)
