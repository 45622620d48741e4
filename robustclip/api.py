"""The functions of the package for Python programs: `load` a fine-tuned model, and `evaluate` any model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn

from robustclip.attacks.recipes import Attacks
from robustclip.cli import build
from robustclip.data import CLIPDataModule
from robustclip.data.data_source import SetLike
from robustclip.evaluation import ResultsWriter, RobustEvaluation
from robustclip.evaluation.any_model import AnyModel
from robustclip.methods import RobustMethod
from robustclip.results.run import Run

DEFAULT_SIZE = 224  # of models that do not state the size of their images


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
    image_size: int | None = None,
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
            of the classes of the data set, in their order. A module runs in eval mode and is left as it was.
        data: data module, or one or several test sets as in ``data.test``, such as ``folder:photos``.
        attacks: names of recipes, or attacks by their names.
        image_size: side in pixels of the images that the model receives; None for that of a method, or 224 for other
            models. Ignored for a data module.
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
    if isinstance(data, LightningDataModule):
        image_size = getattr(data, "image_size", image_size)
    elif image_size is None and isinstance(model, RobustMethod):
        image_size = model.image_size
    image_size = DEFAULT_SIZE if image_size is None else image_size
    with _kept_as_it_was(model):
        method = model if isinstance(model, RobustMethod) else AnyModel(model, image_size, name)
        if not isinstance(data, LightningDataModule):
            data = CLIPDataModule(test=data, image_size=image_size, batch_size=batch_size, attack_resolution="model")
        writer = ResultsWriter(str(folder), name, is_undefended=is_undefended)
        evaluation = RobustEvaluation(attacks, max_samples, seed=seed)
        options: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        Trainer(callbacks=[evaluation, writer], devices=1, **options).test(method, datamodule=data, verbose=False)
    return Run.open(writer.opened)


@contextmanager
def _kept_as_it_was(model: Any) -> Iterator[None]:
    """Gives the modules and parameters of a model their modes back, which a test sets to those of an evaluation."""
    is_foreign = isinstance(model, nn.Module) and not isinstance(model, RobustMethod)
    modules = [(module, module.training) for module in model.modules()] if is_foreign else []
    parameters = [(tensor, tensor.requires_grad) for tensor in model.parameters()] if is_foreign else []
    try:
        yield
    finally:
        for module, is_training in modules:
            module.training = is_training
        for tensor, requires_grad in parameters:
            tensor.requires_grad_(requires_grad)
