"""Template ensembles of clip_benchmark for sets of the catalogue.

They are those of `clip_benchmark/datasets/en_zeroshot_classification_templates.json`
(https://github.com/LAION-AI/CLIP_benchmark, MIT licence), which follow OpenAI's `data/prompts.md`, with two spellings
kept. ImageNet and its shifted copies have OpenAI's 80 templates.
"""

from open_clip import OPENAI_IMAGENET_TEMPLATES

from robustclip.data.catalog import SHIFTS_OF_IMAGENET, CatalogEntry

OPENAI = tuple(fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES)


def _with_both_articles(*patterns: str) -> tuple[str, ...]:
    """Repeats patterns with ``<a>``, first all with the indefinite article and then all with the definite one."""
    return tuple(pattern.replace("<a>", article) for article in ("a", "the") for pattern in patterns)


_CIFAR = _with_both_articles(
    *("a photo of <a> {}.", "a blurry photo of <a> {}.", "a black and white photo of <a> {}."),
    *("a low contrast photo of <a> {}.", "a high contrast photo of <a> {}.", "a bad photo of <a> {}."),
    *("a good photo of <a> {}.", "a photo of <a> small {}.", "a photo of <a> big {}."),
)
_CALTECH = _with_both_articles(
    *("a photo of <a> {}.", "a painting of <a> {}.", "<a> plastic {}.", "a sculpture of <a> {}."),
    *("a sketch of <a> {}.", "a tattoo of <a> {}.", "<a> toy {}.", "a rendition of <a> {}.", "<a> embroidered {}."),
    *("<a> cartoon {}.", "<a> {} in a video game.", "<a> plushie {}.", "<a> origami {}.", "art of <a> {}."),
    *("graffiti of <a> {}.", "a drawing of <a> {}.", "a doodle of <a> {}."),
)
_PHOTO = _with_both_articles("a photo of <a> {}.")

CLIP_BENCHMARK: dict[str, tuple[str, ...]] = {
    "imagenet": OPENAI,
    **dict.fromkeys(SHIFTS_OF_IMAGENET, OPENAI),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "stl10": _PHOTO,
    "caltech101": _CALTECH,
    "oxford_pets": ("a photo of a {}, a type of pet.",),
    "stanford_cars": (
        *("a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "i love my {}!", "a photo of my dirty {}."),
        *("a photo of my clean {}.", "a photo of my new {}.", "a photo of my old {}."),
    ),
    "food101": ("a photo of {}, a type of food.",),
    "flowers102": ("a photo of a {}, a type of flower.",),
    "fgvc_aircraft": _with_both_articles("a photo of <a> {}, a type of aircraft."),
    "sun397": _PHOTO,
    "dtd": _with_both_articles(
        "a photo of <a> {} texture.",
        "a photo of <a> {} pattern.",
        "a photo of <a> {} thing.",
        "a photo of <a> {} object.",
    ),
    "eurosat": tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
    "pcam": ("a histopathology slide showing {}", "histopathology image of {}"),
}
"""Templates by name in the catalogue."""

OWN_PHRASES = ("eurosat", "pcam")
"""Sets whose class names in the catalogue are phrases or sentences, which do not fit these templates."""


def clip_benchmark_templates(entry: CatalogEntry | None, class_names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Returns clip_benchmark's templates of a data set.

    Args:
        entry: data set of the catalogue; None for another one.
        class_names: class names that are put into the templates.
        where: start of messages, which names the data set.

    Raises:
        ValueError: clip_benchmark has no templates for the set, or they do not fit the class names.
    """
    if entry is None or entry.name not in CLIP_BENCHMARK:
        known = ", ".join(CLIP_BENCHMARK)
        raise ValueError(
            f"{where} has `templates: clip_benchmark`, which is known for {known}; give one of these as `name`, or"
            " a list of templates"
        )
    if entry.name in OWN_PHRASES and class_names == entry.class_names:
        raise ValueError(
            f"{where} has `templates: clip_benchmark`, which does not fit class names such as {class_names[0]!r}; give"
            " clip_benchmark's `class_names`"
        )
    return CLIP_BENCHMARK[entry.name]
