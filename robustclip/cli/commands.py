"""Commands beside fit, validate and test: what each takes on the command line.

A command's own imports stand in its branch, so that the light ones answer without loading torch.
"""

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser

from robustclip.cli.messages import AnsweringParser
from robustclip.paths import local_path
from robustclip.results.run import Run


def run_tool(words: list[str]) -> int:
    """Runs one of the commands and returns the exit status.

    Args:
        words: the command and its arguments.
    """
    commands: dict[str, Callable[[list[str]], int]] = {
        "table": _table,
        "compare": _compare,
        "report": _report,
        "score": _score,
        "verify": _verify,
        "replay": _replay,
        "doctor": _doctor,
        "import": _import,
        "export": _export,
        "interpolate": _interpolate,
        "caption": _caption,
        "retrieve": _retrieve,
        "cache": _cache,
    }
    return commands[words[0]](words[1:])


class Parser(AnsweringParser, ArgumentParser):
    """Parses the arguments of one command."""


def _parser(command: str, description: str) -> Parser:
    return Parser(prog=f"robustclip {command}", description=description, exit_on_error=False)


# Paths are taken as strings: the parser would take what a path points to for a configuration.


def _table(words: list[str]) -> int:
    parser = _parser("table", "Prints the accuracies of several results side by side, in percent.")
    parser.add_argument("results", nargs="+", type=str, help="folder that `robustclip test` left")
    given = parser.parse_args(words)
    from robustclip.tools.table import table

    table([Path(name) for name in given.results])
    return 0


def _compare(words: list[str]) -> int:
    parser = _parser("compare", "Compares two runs, with intervals of the differences.")
    parser.add_argument("a", type=str, help="folder that `robustclip test` left")
    parser.add_argument("b", type=str, help="the folder of the test to compare with it")
    parser.add_argument(
        "--shared_samples", type=bool, default=False, help="compare on the samples that both have, if sets differ"
    )
    given = parser.parse_args(words)
    from robustclip.tools.compare import compare

    compare(Path(given.a), Path(given.b), shared_samples=given.shared_samples)
    return 0


def _score(words: list[str]) -> int:
    parser = _parser("score", "Computes a result again from the ledgers of its test, without a model.")
    parser.add_argument("run", type=str, help="folder that `robustclip test` left")
    given = parser.parse_args(words)
    from robustclip.tools.score import score

    score(Path(given.run))
    return 0


def _report(words: list[str]) -> int:
    parser = _parser("report", "Writes one page about several runs.")
    parser.add_argument("runs", nargs="+", type=str, help="folder that `robustclip test` left")
    parser.add_argument("--out", type=str, default="report.html", help="file to write")
    parser.add_argument("--images", type=str | None, help="folder for the kept adversarial examples as PNG files")
    parser.add_argument("--sections", type=list[str], default=[], help="class paths of report sections of your own")
    given = parser.parse_args(words)
    from robustclip.report import report

    images = local_path(given.images, "images") if given.images else None
    out = local_path(given.out, "out")
    report([Path(name) for name in given.runs], out=out, images=images, sections=given.sections)
    return 0


def _verify(words: list[str]) -> int:
    parser = _parser("verify", "Rebuilds a run's model and checks its stored images; status 1 if something disagrees.")
    parser.add_argument("run", type=str, help="folder that `robustclip test` left")
    given = parser.parse_args(words)
    Run.open(Path(given.run))
    from robustclip.cli.build import build
    from robustclip.tools.verify import verify

    return 1 if verify(Path(given.run), build) else 0


def _replay(words: list[str]) -> int:
    parser = _parser(
        "replay",
        "Shows a run's stored images to another model. The run's settings hold but for the options that follow it,"
        " any of `robustclip test --help`; its checkpoint is loaded only if --ckpt_path is given anew.",
    )
    parser.add_argument("run", type=str, help="folder that `robustclip test` left; comes before the options")
    given = parser.parse_args([word for word in words[:1] if word in ("-h", "--help") or not word.startswith("-")])
    run = Run.open(Path(given.run))
    config = run.result.get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{run.folder} has no settings that its model could be built from")
    from robustclip.cli.build import rebuild
    from robustclip.tools.verify import replay

    replay(run.folder, rebuild(config, words[1:]))
    return 0


def _doctor(words: list[str]) -> int:
    parser = _parser("doctor", "Checks a configuration before a long run: the options are those of `robustclip test`.")
    if words[:1] in (["-h"], ["--help"]):
        parser.parse_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # weights that are not here are a finding, not to be fetched
    from robustclip.cli.build import plan
    from robustclip.tools.doctor import doctor

    return 1 if doctor(plan(words)) else 0


def _import(words: list[str]) -> int:
    parser = _parser("import", "Turns another project's checkpoint into a folder for --model.pretrained.")
    parser.add_argument("source", type=str, help="file of TeCoA, PMG-AFT, FARE or open_clip, or Hugging Face folder")
    parser.add_argument("--out", type=str, required=True, help="folder to write")
    parser.add_argument("--arch", type=str | None, help="open_clip architecture of the checkpoint")
    parser.add_argument("--pretrained", type=str | None, help="base model, which gives what the checkpoint lacks")
    parser.add_argument("--activation", type=str | None, help="quickgelu or gelu, where nothing else tells")
    given = parser.parse_args(words)
    from robustclip.convert.importing import import_checkpoint

    options = {"arch": given.arch, "pretrained": given.pretrained, "activation": given.activation}
    import_checkpoint(local_path(given.source, "source"), local_path(given.out, "out"), **options)
    return 0


def _export(words: list[str]) -> int:
    parser = _parser(
        "export",
        "Turns a test's model, or a checkpoint, into a folder for open_clip or the Hugging Face library. Further"
        " options are those of `robustclip test`; a checkpoint without --config takes its own settings.",
    )
    parser.add_argument("source", type=str, help="folder that `robustclip test` left, or checkpoint")
    parser.add_argument("--to", type=str, default="open_clip", help="open_clip or hf")
    parser.add_argument("--out", type=str, required=True, help="folder to write")
    parser.add_argument("--results", type=str | None, help="test of a checkpoint, for the model card")
    own, others = _own_options(words, ("--to", "--out", "--results"))
    given = parser.parse_args(own)
    from robustclip.cli.build import build, build_for, settings_of_fit
    from robustclip.convert.exporting import export
    from robustclip.results.run import Run

    source = local_path(given.source, "source")
    if source.is_dir():
        if others or given.results:
            raise ValueError(f"{source} has its own settings and results; leave out further options")
        config = Run.open(source).result["config"]
        method, checkpoint, results = build(config), config.get("ckpt_path"), given.source
    else:
        method, checkpoint, results = build_for(source, [*others, "--ckpt_path", str(source)]), source, given.results
    training = settings_of_fit(Path(checkpoint)) if checkpoint else None
    export(
        method,
        local_path(given.out, "out"),
        to=given.to,
        training=training,
        results=local_path(results, "results") if results else None,
    )
    return 0


def _interpolate(words: list[str]) -> int:
    parser = _parser(
        "interpolate",
        "Writes checkpoints between the original model and the fine-tuned one. Further options are those of"
        " `robustclip test`; without --config, the settings in the checkpoint are taken.",
    )
    parser.add_argument("checkpoint", type=str, help="of `robustclip fit`")
    parser.add_argument("--alphas", type=str, default="0,0.25,0.5,0.75,1", help="0: original, 1: fine-tuned")
    parser.add_argument("--out", type=str, required=True, help="folder to write")
    own, others = _own_options(words, ("--alphas", "--out"))
    given = parser.parse_args(own)
    from robustclip.cli.build import build_for
    from robustclip.cli.lightning import check_checkpoint
    from robustclip.tools.interpolate import interpolate, parse_alphas

    checkpoint = local_path(given.checkpoint, "checkpoint")
    check_checkpoint(checkpoint)
    method = build_for(checkpoint, others)
    interpolate(method, checkpoint, local_path(given.out, "out"), alphas=parse_alphas(given.alphas))
    return 0


def _caption(words: list[str]) -> int:
    from robustclip.tools.caption import caption
    from robustclip.tools.captioner import Decoding

    parser = _parser(
        "caption",
        "Writes a table of captions of a data set's images. Captions that lie in the shards already, as .txt, need no"
        " captioner: training takes them as they are.",
    )
    parser.add_function_arguments(caption, skip={"decoding", "out"})
    parser.add_class_arguments(Decoding)
    parser.add_argument("--out", type=str, required=True, help="parquet file to write")
    given = parser.parse_args(words).as_dict()
    decoding = Decoding(**{each.name: given.pop(each.name) for each in fields(Decoding)})
    caption(out=local_path(given.pop("out"), "out"), decoding=decoding, **given)
    return 0


def _retrieve(words: list[str]) -> int:
    from robustclip.tools.retrieve import Settings, retrieve

    parser = _parser("retrieve", "Writes the image-text pairs of a pool that are nearest to a data set, as shards.")
    parser.add_class_arguments(Settings, skip={"pool", "guard"})
    parser.add_argument(
        "--pool",
        type=str,
        action="append",
        required=True,
        help="wds:FOLDER, wds:URL or wds:{00000..00331}.tar of images with .txt captions; may be repeated",
    )
    parser.add_argument("--guard", type=str, action="append", default=[], help="test set to keep out; may be repeated")
    parser.add_argument("--out", type=str, required=True, help="folder to write")
    given = parser.parse_args(words).as_dict()
    retrieve(out=local_path(given.pop("out"), "out"), settings=Settings(**given))
    return 0


def _cache(words: list[str]) -> int:
    from robustclip.tools.cache import Settings, cache

    what = "Writes embeddings of a run's images to the folder that --data.features names, which training then reads."
    parser = _parser("cache", f"{what} Further options are those of `robustclip fit`.")
    parser.add_class_arguments(Settings)
    names = ("-h", "--help", *(f"--{each.name}" for each in fields(Settings)))
    own, others = _own_options(["cache", *words], names)
    settings = Settings(**parser.parse_args(own[1:]).as_dict())
    from robustclip.cli.build import build_fit

    method, data, epochs = build_fit(others)
    cache(method.clip, data, settings, epochs=epochs, seed=int(os.environ.get("PL_GLOBAL_SEED", "0")))
    return 0


def _own_options(words: list[str], names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Splits a command line into what is the command's own, its first word included, and options of ``test``."""
    own, others = words[:1], list(words[1:])
    for name in names:
        for position, word in enumerate(others):
            if word.partition("=")[0] == name:
                length = 1 if "=" in word else 2
                own += others[position : position + length]
                del others[position : position + length]
                break
    return own, others
