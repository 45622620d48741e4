"""The page itself: header, tables, pictures, audit and protocol."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from robustclip.protocol import AXES
from robustclip.tools.report import broken, detection, gallery, geometry, plots, tables, unlike
from robustclip.tools.report.html import LEVEL, disclosure, escape, tag
from robustclip.tools.report.view import MISSING, View, union

# Nothing but the page's own styles and images: no script runs and nothing is fetched, whatever the files hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STATUSES = {"fail": "✕ failed", "warn": "! warning", "not_measured": f"{MISSING} not measured", "pass": "✓ passed"}
OF_ATTACKS = ("Radius", "Clean and robust", "What broke it", "Images")  # left out where no run has one
SECTIONS = (
    "Accuracy",
    *OF_ATTACKS,
    "Interpolation",
    "Unknown classes",
    "Geometry",
    "Audit",
    "Protocol",
)


def page(views: Sequence[View]) -> str:
    """The whole page, the same bytes for the same runs."""
    title = f"Robustness of {', '.join(view.label for view in views)}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", escape(title)),
        tag("style", files(__package__).joinpath("report.css").read_text(encoding="utf-8")),
    )
    of_attacks, of_unknown, of_features = (_radius, _scatter, _broken, _images), detection.section, geometry.section
    contents = (_accuracy, *of_attacks, _interpolation, of_unknown, of_features, _audit, _protocol)
    writers = dict(zip(SECTIONS, contents, strict=True))
    if not any(view.attacks for view in views):
        writers = {name: write for name, write in writers.items() if name not in OF_ATTACKS}
    written = {name: content for name, write in writers.items() if (content := write(views))}
    links = tag("nav", *(tag("a", name, href=f"#{_anchor(name)}") for name in written), aria_label="Contents")
    body = tag("body", _header(views), links, tag("main", *(_section(*item) for item in written.items())))
    return "<!doctype html>\n" + tag("html", head, body, lang="en")


def _section(name: str, content: str) -> str:
    return tag("section", tag("h2", name, id=f"{_anchor(name)}-title"), content, id=_anchor(name))


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _header(views: Sequence[View]) -> str:
    cards = [_card(view) for view in views]
    return tag("header", tag("h1", "Robustness report"), tag("div", *cards, class_="runs"))


def _card(view: View) -> str:
    result = view.run.result
    model = result.get("model") or {}
    facts = {
        "method": result["method"],
        "model": model.get("arch") or model.get("pretrained"),
        "image size": model.get("image_size"),
        "weights": model.get("weights"),
        "checkpoint": model.get("checkpoint") or "none",
        "folder": view.run.name,
        "commit": result.get("commit") or "unknown",
        "device": result.get("device"),
        "finished": str(result.get("finished") or "").replace("T", " ").replace("+00:00", " UTC"),
        "versions": ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items()),
    }
    told = [tag("dt", name) + tag("dd", escape(value)) for name, value in facts.items() if value]
    sign = plots.swatch(view.number)
    return tag("article", _badge(view), tag("h2", sign, escape(view.label)), tag("dl", *told))


def _badge(view: View) -> str:
    grade = str((view.run.result.get("audit") or {}).get("grade") or MISSING)
    style = f"grade grade-{grade.lower()}" if grade in tuple("ABCDF") else "grade"
    return tag("a", "audit ", tag("b", escape(grade)), class_=style, href=f"#audit-{view.number}")


def _accuracy(views: Sequence[View]) -> str:
    rule = escape(tables.BEST_RULE) if len(views) > 1 else ""
    units = tag("p", tables.UNITS, " ", rule)
    shown = tag("div", *map(tables.html, tables.accuracy_tables(views)), class_="tables")
    owners: dict[str, list[str]] = {}
    for view in views:
        for note in view.run.result.get("notes") or []:
            owners.setdefault(str(note), []).append(view.label)
    notes = [
        tag("li", escape(note if len(labels) == len(views) else f"{', '.join(labels)}: {note}"))
        for note, labels in owners.items()
    ]
    said = tag("h3", "Notes of the test") + tag("ul", *notes) if notes else ""
    return unlike.warnings(views) + units + shown + said


def _radius(views: Sequence[View]) -> str:
    text = (
        f"Mean over the tasks; 0 is the clean image, bands are {LEVEL} intervals. "
        "A picture holds the attacks that differ in nothing but the radius."
    )
    return tag("p", text) + plots.legend(views) + plots.curves(views)


def _scatter(views: Sequence[View]) -> str:
    text = "A small mark per task, a large one for the mean. On the dashed line an attack would break nothing."
    return tag("p", text) + plots.legend(views) + plots.scatters(views)


def _interpolation(views: Sequence[View]) -> str:
    pictures = plots.interpolated(views)
    text = f"Means over the tasks of the models between the original and a fine-tuned one; bands are {LEVEL} intervals."
    return tag("p", text) + pictures if pictures else ""


def _broken(views: Sequence[View]) -> str:
    text = "Each sample counts once: for the first member of the attack that broke it, in the order of the legend."
    return tag("p", text) + broken.section(views)


def _images(views: Sequence[View]) -> str:
    text = (
        f"At most {gallery.PER_TASK} per task, shown at 8 bits. "
        "The difference is amplified by the factor below it, around grey."
    )
    return tag("p", text) + gallery.section(views)


def _audit(views: Sequence[View]) -> str:
    return "".join(_checks(view) for view in views)


def _checks(view: View) -> str:
    audit = view.run.result.get("audit") or {}
    checks = audit.get("checks") or []
    order = list(STATUSES)
    ranked = sorted(
        checks, key=lambda check: order.index(check.get("status", "")) if check.get("status", "") in order else 0
    )
    items = [
        tag(
            "li",
            _status(check.get("status", "")),
            tag("h4", escape(str(check.get("name", "")).replace("_", " "))),
            _found(check),
        )
        for check in ranked
    ]
    text = "" if items else tag("p", "This run has not been audited.", class_="aside")
    title = tag("h3", escape(view.label), " ", _badge(view), id=f"audit-{view.number}")
    return title + text + tag("ul", *items, class_="checks")


def _found(check: dict[str, Any]) -> str:
    return tag("p", escape(check.get("found") or "")) + tag("p", escape(check.get("why") or ""), class_="why")


def _status(status: str) -> str:
    return tag(
        "span", escape(STATUSES.get(status, status)), class_=f"status {status if status in STATUSES else 'fail'}"
    )


def _protocol(views: Sequence[View]) -> str:
    text = "What two numbers must share to be compared. An axis is shown once where all attacks and runs agree."
    return tag("p", text) + "".join(_task(views, task) for task in union(views, of="tasks"))


def _task(views: Sequence[View], task: str) -> str:
    having = [view for view in views if task in view.scores]
    lines, differing = [], []
    for axis, meaning in AXES.items():
        per_run = [
            {kind: view.axes(task, kind)[axis] for kind in view.kinds if axis in view.axes(task, kind)}
            for view in having
        ]
        shared = {kind for values in per_run for kind in values if all(kind in other for other in per_run)}
        is_unlike = any(values[kind] != per_run[0][kind] for values in per_run for kind in shared)
        differing += [axis] if is_unlike else []
        name = tag("th", escape(axis.replace("_", " ")), tag("small", escape(meaning)), scope="row")
        row = {"class_": "unlike"} if is_unlike else {}
        lines.append(tag("tr", name, tag("td", *_values(having, per_run)), **row))
    flag = tag("span", f"runs differ in {escape(', '.join(differing))}", class_="status fail") if differing else ""
    head = tag("thead", tag("tr", tag("th", "axis", scope="col"), tag("th", "value", scope="col")))
    body = tag("table", tag("caption", f"Protocol of {escape(task)}"), head, tag("tbody", *lines), class_="axes")
    return disclosure(f"{escape(task)} {flag}", body)


def _values(views: Sequence[View], per_run: Sequence[dict[str, Any]]) -> list[str]:
    """The distinct values of an axis, each with the attacks and runs that have it."""
    is_shared = all(values == per_run[0] for values in per_run)
    owners: dict[str, dict[str, list[str]]] = {}
    for view, values in list(zip(views, per_run, strict=True))[: 1 if is_shared else None]:
        for kind, value in values.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            owners.setdefault(text, {}).setdefault("" if is_shared else view.label, []).append(kind)
    if is_shared and len(owners) == 1:
        return [tag("p", tag("code", escape(text))) for text in owners]
    return [
        tag("p", escape(_owned(by_run, per_run)), " ", tag("code", escape(text))) for text, by_run in owners.items()
    ]


def _owned(by_run: dict[str, list[str]], per_run: Sequence[dict[str, Any]]) -> str:
    """Runs, each with its attacks unless it has the value for all of them."""
    most = max(len(values) for values in per_run)
    return "; ".join(
        label if label and len(kinds) == most else f"{label} {', '.join(kinds)}".strip()
        for label, kinds in by_run.items()
    )
