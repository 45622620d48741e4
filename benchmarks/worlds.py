"""Two worlds in which `all_methods.py` compares methods: drawn shapes, and photographs.

A world says how each method is trained and how all are tested. Options are those of robustclip's commands.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from anchors import Anchored
from cells import PGDS
from tour import COLOURS, drawn_pairs
from tour import anchors as drawn_anchors

Options = tuple[str, ...]


class Method(NamedTuple):
    """One row of the table.

    Attributes:
        options: of fit and test.
        rates: learning rates to choose from; none stands for the rate of `options` or the method's default.
        rate_of: method whose rate is used.
        training: options of the fit alone.
        needs_anchors: whether the fit needs captions and anchors.
        base: method over whose model of the same seed this one trains.
    """

    options: Options
    rates: Options = ()
    rate_of: str | None = None
    training: Options = ()
    needs_anchors: bool = False
    base: str | None = None


class World(NamedTuple):
    """Training and test of every method.

    Attributes:
        methods: methods by name.
        test: options of every test.
        clean: options of the test of all images without attack.
        attacked: options of the tests under attack.
        recipe: attacks of the tests under the full recipe.
        pgds: attacks of the other tests, the first members of the recipe.
        selection: attack on the held-out training images by which rates are chosen.
        known: test set whose classes are known.
        averages: average of the test without attack, by column.
        contrasts: pairs of methods that are compared beside the comparisons with TeCoA.
        anchors: function from the folder of all that is made to the options for captions and anchors.
    """

    methods: Mapping[str, Method]
    test: Options
    clean: Options
    attacked: Options
    recipe: Mapping[str, Any]
    pgds: Mapping[str, Any]
    selection: Mapping[str, Any]
    known: str
    averages: Mapping[str, str]
    contrasts: tuple[tuple[str, str], ...]
    anchors: Callable[[Path], list[str]]


def _pgd(eps: str, alpha: str, steps: int, **settings: str) -> dict[str, Any]:
    return {"class_path": "PGD", "init_args": {"eps": eps, "alpha": alpha, "steps": steps, **settings}}


def _pgds(eps: str, alpha: str) -> dict[str, Any]:
    return {name: _pgd(eps, alpha, 10, loss=name.removeprefix("pgd_")) for name in PGDS}


def _cascade(eps: str) -> dict[str, Any]:
    return {"cascade": {"class_path": "Recipe", "init_args": {"name": "cascade", "eps": eps}}}


def _detection(known: str, attack: Mapping[str, Any] | None) -> str:
    settings = {"known": [known], "headline": "mcm", "attack": attack}
    return f"--trainer.callbacks={json.dumps([{'class_path': 'OODDetection', 'init_args': settings}])}"


def _model(name: str, *options: str) -> Options:
    return ("--model", name, *options)


def _tower(name: str, attack: Mapping[str, Any] | None, decay: str, *options: str) -> Options:
    """Returns the options of a method that trains the image tower, attacked or not, with one optimiser for all."""
    attacked = ("--model.attack", json.dumps(attack)) if attack else ()
    adamw = ("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.weight_decay", decay)
    return _model(name, *attacked, *adamw, "--model.warmup_steps", "20", *options)


ATTACKED = ("TeCoA", "PMGAFT", "AGFT", "UCAT", "CAW", "FARE")


def _shapes() -> World:
    """Defines the world of `robustclip test --config tour`: a model that was trained on drawings, radius 5/255."""
    radius, rates, pair_rates = "5/255", ("1e-3", "3e-3", "1e-2"), ("1e-4", "3e-4", "1e-3")
    attack, scale = _pgd(radius, "3.75/255", 2), 25.9926  # the scale of the shapes model

    def tower(name: str, *options: str) -> Options:
        return _tower(name, attack, "1e-4", *options)

    methods = {name: Method(tower(name), rates) for name in ATTACKED}
    prompts = _model("APT", "--model.attack", json.dumps(attack), "--model.tokens", "4")
    methods |= {
        "APT": Method(prompts, ("2e-3", "2e-2", "2e-1"), base="TeCoA"),
        "ARF": Method(_model("ARF"), pair_rates, needs_anchors=True),
        "DiVE": Method(_model("DiVE"), pair_rates, needs_anchors=True),
        "CleanFineTuning": Method(_model("CleanFineTuning"), pair_rates),
        "FLYP": Method(_model("FLYP"), pair_rates),
        "UEO": Method(
            _model("UEO", "--model.phrase", "a picture of a"), training=("--data.train", COLOURS % ", images: 0-11")
        ),
        "CRoFT": Method(_model("CRoFT"), training=("--data.train", COLOURS % "", "--data.shots", "16")),
        # Controls: TeCoA at AGFT's rate and scale (PMG-AFT without its terms), plain soft labels, a constant level.
        "TeCoA_as_AGFT": Method(
            tower("PMGAFT", "--model.alpha=0", "--model.beta=0", f"--model.logit_scale={1.8 * scale}"), rate_of="AGFT"
        ),
        "AGFT_plain": Method(tower("AGFT", "--model.gamma=1", f"--model.scale={scale}"), rate_of="AGFT"),
        "UCAT_constant": Method(tower("UCAT", "--model.level=10.5"), rate_of="UCAT"),
        # Logits without scale and sums over the batch, as in PMG-AFT's released code.
        "PMGAFT_code": Method(tower("PMGAFT", "--model.logit_scale=1", "--model.reduction=sum"), rates),
    }
    config = ("--config", "tour")
    return World(
        {name: method._replace(training=(*config, *method.training)) for name, method in methods.items()},
        test=config,
        clean=("--evaluation.attacks={}", _detection("colours", _pgd(radius, "1.25/255", 10, keep="best"))),
        attacked=("--trainer.callbacks=[]",),
        recipe=_cascade(radius),
        pgds=_pgds(radius, "1.25/255"),
        selection={"pgd2": attack},
        known="colours",
        averages={"shifts": "shifts", "elsewhere": "same_style"},
        contrasts=(
            *(("AGFT", "TeCoA_as_AGFT"), ("AGFT", "AGFT_plain"), ("UCAT", "UCAT_constant")),
            *(("PMGAFT", "PMGAFT_code"), ("DiVE", "ARF"), ("ARF", "FLYP"), ("FARE", "PMGAFT")),
        ),
        anchors=lambda work: drawn_anchors(work, drawn_pairs()),
    )


def _photographs(data: str, model: str) -> World:
    """Defines the world of `robustclip test --config overview`: a small pre-trained model, radius 0.5/255.

    Methods that train the image tower see one epoch of Tiny-ImageNet, those with captions six of PACS's photographs,
    UEO and CRoFT those that their own configurations for photographs give, of PACS's photographs too.
    """
    radius, rates = "0.5/255", ("1e-4", "3e-4", "1e-3")
    attack = _pgd(radius, radius, 2)
    place = ("--data.root", data, "--model.pretrained", model)
    tiny = ("--config", "tecoa_photographs", *place, "--trainer.max_epochs", "1", "--data.batch_size", "16")
    pacs: Options = ("--config", "fine_tuning_pacs", *place, "--data.test=[]", "--results.averages", "null")
    pacs += ("--trainer.callbacks=[]", "--data.batch_size", "32")

    def tower(name: str, *options: str, attack: Mapping[str, Any] | None = attack) -> Method:
        return Method(_tower(name, attack, "0.0", *options), rates, training=tiny)

    def pairs(name: str, *, needs_anchors: bool = False) -> Method:
        return Method(_model(name), ("3e-5", "1e-4", "3e-4"), training=pacs, needs_anchors=needs_anchors)

    prompts = _model("APT", "--model.attack", json.dumps(attack), "--model.tokens", "4")
    known = {"source": "wds:pacs_photo", "shift": "open", "known": 5, "templates": ["a photo of a {}."]}
    ueo = ("--config", "ueo_photographs", *place, f"--data.train={json.dumps(known)}", "--data.test=[]")
    croft = ("--config", "croft_photographs", *place, "--data.train", '["wds:pacs_photo"]', "--data.test=[]")
    alone = ("--data.unknown=[]", "--trainer.callbacks=[]")
    rate = ("--model.context_lr", "1e-1", "--model.optimizer.lr", "1e-1")  # the best on CIFAR-10, see universal.py
    methods = {name: tower(name) for name in ATTACKED} | {
        "APT": Method(prompts, ("2e-3", "2e-2", "2e-1"), training=(*tiny, "--model.warmup_steps", "0"), base="TeCoA"),
        "CleanFineTuning": tower("CleanFineTuning", attack=None),
        "FLYP": pairs("FLYP"),
        "ARF": pairs("ARF", needs_anchors=True),
        "DiVE": pairs("DiVE", needs_anchors=True),
        "UEO": Method(_model("UEO", *rate), training=(*ueo, *alone)),
        "CRoFT": Method(_model("CRoFT"), training=(*croft, *alone)),
        "PMGAFT_code": tower("PMGAFT", "--model.logit_scale=1", "--model.reduction=sum"),
    }
    return World(
        methods,
        test=("--config", "overview", *place),
        clean=("--evaluation", "clean", _detection("pacs_photo", None)),
        attacked=(_detection("pacs_photo", _pgd(radius, "0.125/255", 10, keep="best")),),
        recipe=_cascade(radius),
        pgds=_pgds(radius, "0.125/255"),
        selection={"pgd2": attack},
        known="pacs_photo",
        averages={"shifts": "shifts", "elsewhere": "zero_shot"},
        contrasts=(("PMGAFT", "PMGAFT_code"), ("ARF", "FLYP"), ("DiVE", "ARF")),
        anchors=lambda work: Anchored(
            "pacs_photo", data=Path(data).resolve(), model=model, work=work.resolve(), options=()
        ).anchors(),
    )


def world(data: str | None, model: str | None) -> World:
    """Returns the world of photographs if their folder and that of a model are given, else that of the shapes."""
    if (data is None) != (model is None):
        raise SystemExit("--data and --model: give both for the photographs, or none for the shapes")
    return _shapes() if data is None or model is None else _photographs(data, model)
