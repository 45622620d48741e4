"""Hook of mkdocs that generates pages from the sources: start, methods, reference, catalogue, measurements, changes."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from robustclip.data.catalog import CATALOG
from robustclip.tools.claims import Claim, Measured, is_same, read
from robustclip.tools.configs import FOLDER
from robustclip.tools.datasets import published
from robustclip.tools.listing import classes

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/tutorials/first_steps.ipynb"
# Page to its source; links between the sources become links between the pages.
COPIES = {
    "index.md": "README.md",
    "measurements.md": "benchmarks/README.md",
    "contributing.md": ".github/CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
}
MOVED = {
    "robustclip/methods/base.py": "reference/methods.md",
    "robustclip/attacks/attack.py": "reference/attacks.md",
    "robustclip/objectives/scores.py": "reference/scores.md",
    "robustclip/types.py": "reference/types.md",
    "docs/tutorials/first_steps.ipynb": "tutorials/first_steps.md",
    **{source: page for page, source in COPIES.items()},
    **{
        f"docs/{page.relative_to(ROOT / 'docs')}": str(page.relative_to(ROOT / "docs"))
        for kind in ("md", "svg")
        for page in (ROOT / "docs").rglob(f"*.{kind}")
    },
}
ROOMS = {
    "methods": "The base class, and every method",
    "attacks": "Attacks in pixel space",
    "defences": "Test-time defences",
    "data": "The data module and data sources",
    "evaluation": "Callbacks that evaluate a model",
}
MODULES = {
    "python": ("The Python interface", ["robustclip.api"]),
    "scores": ("Scores of unknown classes", ["robustclip.objectives.scores"]),
    "types": ("Batches, tasks and data", ["robustclip.types"]),
    "results": ("Finished tests", ["robustclip.results.run"]),
    "report": ("Sections of the report", ["robustclip.report.section", "robustclip.report.blocks"]),
    "audit": ("Checks of the audit", ["robustclip.evaluation.audit", "robustclip.evaluation.evidence"]),
}
Config = Any  # mkdocs' configuration; the sources of this project do not depend on mkdocs


def on_config(config: Config) -> Config:
    """Adds the generated pages to the navigation."""
    made = pages()
    children = {
        section: [path for path in made if path.startswith(f"{section.lower()}/") and not path.endswith("index.md")]
        for section in ("Methods", "Reference")
    }
    config.nav = [
        {title: [page, *sorted(children[title], key=str.lower)]} if title in children else {title: page}
        for entry in config.nav
        for title, page in entry.items()
    ]
    return config


def on_files(files: Any, config: Config) -> Any:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def pages() -> dict[str, str]:
    """Returns the generated pages by their paths."""
    made = {page: _relinked((ROOT / source).read_text(encoding="utf-8"), source) for page, source in COPIES.items()}
    made |= {f"methods/{name}.md": _method(name, sentence) for name, sentence in classes("methods").items()}
    made["methods_index.md"] = _index_of_methods()
    made |= {f"reference/{room}.md": _room(room, title) for room, title in ROOMS.items()}
    made |= {f"reference/{name}.md": _modules(title, paths) for name, (title, paths) in MODULES.items()}
    titles = {**ROOMS, **{name: title for name, (title, _) in MODULES.items()}}
    lines = [f"- [{title}]({name}.md)" for name, title in titles.items()]
    made["reference/index.md"] = "# Reference\n\nEvery public name, from its docstring.\n\n" + "\n".join(lines) + "\n"
    made["catalogue.md"] = _catalogue()
    made["tutorials/first_steps.md"] = _notebook(NOTEBOOK)
    return made


def on_page_markdown(markdown: str, page: Any, config: Config, files: Any) -> str:
    """Replaces links to files outside of the documentation."""
    return markdown if page.file.src_uri in COPIES else _relinked(markdown, f"docs/{page.file.src_uri}")


def _relinked(text: str, source: str) -> str:
    """Turns links between files of the repository into links between pages; other files become plain text."""

    def replace(match: re.Match[str]) -> str:
        title, target, anchor = match.groups()
        if target.startswith(("http", "#", "mailto")) or not target:
            return match[0]
        path = ((ROOT / source).parent / target).resolve()
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else target
        page = MOVED.get(name) or (
            name.removeprefix("docs/") if name.startswith("docs/") and not path.exists() else None
        )
        if page is None:
            return f"{title} (`{name}`)" if title.strip("`") != name else title
        here = next((copy for copy, origin in COPIES.items() if origin == source), source.removeprefix("docs/"))
        up = "../" * here.count("/")
        return f"[{title}]({up}{page}{anchor or ''})"

    return re.sub(r"\[([^\]]+)\]\(([^)#\s]*)(#[^)\s]*)?\)", replace, text)


def _public(room: str) -> list[str]:
    """Returns the names in ``__all__`` of a folder of the package."""
    for node in ast.parse((ROOT / "robustclip" / room / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def _room(room: str, title: str) -> str:
    """Makes the reference of one folder: every public name."""
    names = _public(room)
    if room == "methods":  # each has a page of its own
        names = ["RobustMethod"]
    return f"# {title}\n\n" + "\n".join(_entry(f"robustclip.{room}.{name}") for name in names)


def _modules(title: str, paths: list[str]) -> str:
    """Makes the reference of some modules."""
    return f"# {title}\n\n" + "\n".join(f"::: {path}\n    options:\n      show_root_heading: false\n" for path in paths)


def _entry(path: str) -> str:
    return f"::: {path}\n    options:\n      heading_level: 2\n"


def _notebook(path: Path) -> str:
    """Makes a page of the cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"] == "code", "".join(cell["source"])) for cell in cells]
    title, *rest = [f"```python\n{text}\n```" if is_code else text for is_code, text in texts]
    link = f'This page is a notebook: <a href="../{path.name}" download>{path.name}</a>.'  # mkdocs copies the file
    return "\n\n".join([title, link, *rest]) + "\n"


def _index_of_methods() -> str:
    rows = [f"| [{name}](methods/{name}.md) | {sentence} |" for name, sentence in classes("methods").items()]
    return "# Methods\n\n| method | in one sentence |\n| --- | --- |\n" + "\n".join(sorted(rows, key=str.lower)) + "\n"


def _method(name: str, sentence: str) -> str:
    """Makes the page of a method: docstring, configurations, recipe, claims and measurements."""
    parts = [
        f"# {name}\n",
        f"::: robustclip.methods.{name}\n    options:\n      show_root_heading: false\n      members: false\n",
    ]
    for path, text in _configurations(name).items():
        parts.append(f"## Configuration `{path}`\n\n```yaml\n{text.strip()}\n```\n")
        parts += [f"### Recipe of the paper\n\n{table}\n" for table in _recipe(path)]
    measured = [row for row in read("measured.csv", Measured) if is_same(row.method, name)]
    if measured:
        rows = [
            f"| {row.metric} | {row.eps} | {row.set} | {row.value} | {row.backbone} | {row.trained} | {row.images}"
            f" | {row.seed} |"
            for row in measured
        ]
        head = _head("attack", "eps", "sets", "accuracy", "backbone", "trained on", "images", "seed")
        note = "\n\nSee [Measurements](../measurements.md).\n"
        parts.append("## Measured with this package\n\n" + head + "\n".join(rows) + note)
    claims = list(_claims(name))
    if claims:
        head = _head("attack", "eps", "sets", "mean", "backbone", "trained on", "source")
        parts.append(
            "## Claims of papers\n\nFigures of others under their protocols, not measured here.\n\n"
            + head
            + "\n".join(claims)
            + "\n"
        )
    return "\n".join(parts)


def _configurations(name: str) -> Mapping[str, str]:
    """Returns the texts of the configurations of a method by their names."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.yaml"))}
    models = {stem: (yaml.safe_load(text).get("model") or {}).get("class_path", "") for stem, text in texts.items()}
    return {
        stem: texts[stem] for stem, path in models.items() if path.rpartition(".")[2] == name and stem != "defences"
    }


def _recipe(configuration: str) -> Iterator[str]:
    """Yields the table of the paper's recipe of a configuration from the page of measurements."""
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        if f"configs/{configuration}.yaml" in section.splitlines()[0]:
            yield "\n".join(line for line in section.splitlines()[1:] if line.startswith("|"))


def _claims(name: str) -> Iterator[str]:
    """Yields table rows with the mean of every source."""
    groups: dict[tuple[str, ...], list[Claim]] = {}
    for claim in read("claims.csv", Claim):
        if is_same(claim.method, name):
            mean = claim.set if claim.set.startswith("mean of ") else ""
            groups.setdefault((claim.metric, claim.eps, claim.backbone, claim.trained, claim.source, mean), []).append(
                claim
            )
    for (metric, eps, backbone, trained, source, mean), rows in groups.items():
        value = sum(float(row.value) for row in rows) / len(rows)
        sets = mean or (rows[0].set if len(rows) == 1 else f"{len(rows)} sets")
        yield f"| {metric} | {eps} | {sets} | {value:.2f} | {backbone} | {trained} | {source} |"


def _head(*titles: str) -> str:
    """Makes the head of a table; columns of numbers are aligned to the right."""
    numbers = ("accuracy", "mean", "images", "seed", "classes")
    rule = " | ".join("--:" if title in numbers else "---" for title in titles)
    return f"| {' | '.join(titles)} |\n| {rule} |\n"


def _catalogue() -> str:
    """Makes the table of all published data sets."""
    head = _head("name", "title", "classes", "tested split", "images", "licence", "page")
    rows = [
        f"| `{entry.name}` | {entry.title} | {entry.class_count:,} | {entry.split} | {entry.images:,} |"
        f" {published(entry).licence} | <{published(entry).page}> |"
        for entry in CATALOG.values()
    ]
    text = (
        "# Catalogue of data sets\n\n`robustclip datasets NAME` prints prompts, layouts and the command to stream it."
        " Licences are a pointer: the page of a set has its terms.\n\n"
    )
    return text + head + "\n".join(rows) + "\n"
