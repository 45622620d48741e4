"""Commands that rebuild a run from its settings.

The functions import torch only after a wrong path would have been reported.
"""

import os
from pathlib import Path

from robustclip.results.run import Run


def verify(run: Path) -> int:
    """Rebuild a run's model and check its adversarial examples; status 1 if the model classifies one differently.

    Args:
        run: folder that `robustclip test` wrote.

    Returns:
        Number of adversarial examples that the model classifies differently.
    """
    Run.open(run)
    from robustclip.cli.build import build
    from robustclip.tools.verify import verify

    return verify(run, build)


def replay(run: Path, *options: str) -> None:
    """Evaluate another model on a run's adversarial examples.

    Further options, any of `robustclip test --help`, override the run's settings. Its checkpoint is loaded only if
    --ckpt_path is given again.

    Args:
        run: folder that `robustclip test` wrote; comes before the options.
        options: options of ``robustclip test``.

    Raises:
        ValueError: the run has no settings, or as `rebuild`.
    """
    opened = Run.open(run)
    config = opened.result.get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{opened.folder} has no settings that its model could be built from")
    from robustclip.cli.build import rebuild
    from robustclip.tools.verify import replay

    replay(opened.folder, rebuild(config, options))


def doctor(*options: str) -> int:
    """Check a configuration before a long run; status 1 if a problem would stop the run.

    The options are those of `robustclip test`. Nothing is downloaded and nothing is written.

    Returns:
        Number of problems.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # missing weights are reported, not downloaded
    from robustclip.cli.build import plan
    from robustclip.tools.doctor import doctor

    return doctor(plan(options))


def export(source: Path, out: Path, *options: str, to: str = "open_clip", results: Path | None = None) -> None:
    """Convert a test's model or a checkpoint to a folder for open_clip or the Hugging Face library.

    Further options are those of `robustclip test`; a checkpoint without --config takes its own settings.

    Args:
        source: folder that `robustclip test` wrote, or a checkpoint.
        out: folder to write; it must not exist.
        options: options of ``robustclip test``.
        to: library of the folder, open_clip or hf.
        results: folder of the checkpoint's test, for the model card.

    Raises:
        ValueError: options are given beside a run, which has its own, or as `build`.
    """
    from robustclip.cli.build import build, build_for, settings_of_fit
    from robustclip.convert.exporting import export

    if source.is_dir():
        if options or results:
            raise ValueError(f"{source} has its own settings and results; leave out further options")
        config = Run.open(source).result["config"]
        method, checkpoint, results = build(config), config.get("ckpt_path"), source
    else:
        method, checkpoint = build_for(source, [*options, "--ckpt_path", str(source)]), source
    training = settings_of_fit(Path(checkpoint)) if checkpoint else None
    export(method, out, to=to, training=training, results=results)


def interpolate(checkpoint: Path, out: Path, *options: str, alphas: str = "0,0.25,0.5,0.75,1") -> None:
    """Write checkpoints between the original model and the fine-tuned one.

    Further options are those of `robustclip test`; without --config, the settings in the checkpoint hold.

    Args:
        checkpoint: file of `robustclip fit`.
        out: folder to write; it must not exist.
        options: options of ``robustclip test``.
        alphas: weights of the fine-tuned model, separated by commas; 0 is the original, 1 the fine-tuned model.
    """
    from robustclip.cli.build import build_for
    from robustclip.cli.lightning import check_checkpoint
    from robustclip.tools.interpolate import interpolate, parse_numbers

    check_checkpoint(checkpoint)
    interpolate(build_for(checkpoint, options), checkpoint, out, alphas=parse_numbers(alphas, "alphas"))


def soup(
    checkpoints: list[Path],
    out: Path,
    *options: str,
    scales: str = "",
    held_out: bool = False,
    monitor: str | None = None,
) -> None:
    """Write mixtures of several fine-tuned models of one base model: their mean, or the original plus all changes.

    Further options are those of `robustclip validate`; without --config, the settings in the checkpoints hold. The
    validation images of these settings, held-out training images by default, can decide: then members that lower the
    mean's accuracy are left out (a greedy soup), and of several scales the best alone is written.

    Args:
        checkpoints: files of `robustclip fit`, two at least.
        out: folder to write; it must not exist.
        options: options of ``robustclip validate``.
        scales: factors of the sum of all changes, separated by commas (task arithmetic); empty for the mean.
        held_out: choose by the accuracy on the validation images.
        monitor: accuracy that decides, such as val/mean/clean/acc1; null for the one that the fit has monitored.
    """
    from robustclip.cli.build import build_for, held_out_accuracy
    from robustclip.cli.lightning import check_checkpoint
    from robustclip.tools.interpolate import parse_numbers
    from robustclip.tools.soup import soup

    for checkpoint in checkpoints:
        check_checkpoint(checkpoint)
    soup(
        lambda checkpoint, *further: build_for(checkpoint, [*options, *further]),
        checkpoints,
        out,
        scales=parse_numbers(scales, "scales") if scales else (),
        measure=(lambda checkpoint: held_out_accuracy(checkpoint, options, monitor)) if held_out else None,
    )
