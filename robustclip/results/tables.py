"""Tables of a result for a terminal, for Markdown and for a spreadsheet."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from robustclip.names import TASK_NAME, csv_cell, markdown
from robustclip.results.corruption_error import CORRUPTIONS, TASKS, UNLIKE
from robustclip.results.run import method_of

NOT_A_TASK = "mean"
CLEAN = "clean"
# Columns of an attack on a method with a test-time defence; see `summary.add_undefended`.
UNDEFENDED, STATIC, ADAPTIVE = "undefended", "static", "adaptive"
COLUMNS = (UNDEFENDED, STATIC, ADAPTIVE)
SUCCESS = "success"  # of an attack with a target class; see `summary.accuracies`
DETECTION = "detection"
DETECTION_TITLE = "Known against unknown classes, percent"
TEXT_COLUMNS = 3  # columns of the table of detection before the numbers
SEPARATION = {
    "auroc": "AUROC", "aupr": "AUPR", "fpr95": "FPR95",  # known samples are the positives
    "aupr_out": "AUPR-OUT", "fpr95_out": "FPR95-OUT", "autc": "AUTC",  # unknown samples are, as in OpenOOD
}  # fmt: skip


def check_averages(averages: Mapping[str, Sequence[str]], tasks: Sequence[str]) -> None:
    """Checks that named averages are taken over tasks of the test.

    Args:
        averages: name to the names of tasks.
        tasks: names of the tasks of the test.

    Raises:
        ValueError: a name is in use or malformed, or a list is empty or has a repeated or unknown task.
    """
    for name, chosen in averages.items():
        if not TASK_NAME.fullmatch(name) or name in (*tasks, NOT_A_TASK):
            raise ValueError(
                f"average {name!r} must match [a-z0-9_]+ and be neither a task nor {NOT_A_TASK!r}; rename it"
            )
        unknown = [task for task in chosen if task not in tasks]
        if unknown or not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"average {name!r} must list tasks of the test ({', '.join(tasks)}) once each, got {chosen}"
            )


def means_of(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the averages over some tasks and, last, the mean over all tasks, by their names."""
    return {**result.get("averages", {}), NOT_A_TASK: result["mean"]}


def markdown_table(result: Mapping[str, Any]) -> str:
    """Renders accuracies, the audit's grade, errors under corruption and the detection of unknown classes."""
    tables = [_markdown(readable_rows(result)), f"{audit_line(result)}\n"]
    for title, rows in corruption_tables(result).items():
        tables += [f"{title}\n", _markdown(rows)]
    if detected := detection_rows(result):
        tables += [f"{DETECTION_TITLE}\n", _markdown(detected)]
    return "\n".join(tables)


def csv_table(result: Mapping[str, Any]) -> str:
    """Renders accuracies in [0, 1] as CSV, with columns for the limits of the intervals."""
    names = [csv_cell(heading.replace(" ", "_")) for heading in parts_of(result["mean"])]
    limits = [name for part in names for name in (part, f"{part}_low", f"{part}_high")]
    rows: list[list[Any]] = [["task", "n", *limits, "seconds"]]
    for name, values in [*result["tasks"].items(), *means_of(result).items()]:
        parts = parts_of({kind: values[kind] for kind in result["mean"]}).values()
        numbers = [number for part in parts for number in (part["acc1"], *part["interval"])]
        rows.append(
            [csv_cell(name), values.get("n", ""), *(f"{number:.6f}" for number in numbers), values.get("seconds", "")]
        )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def is_bold(heading: str) -> bool:
    """Returns whether a column holds the accuracies that count for a method with a test-time defence."""
    return heading.endswith(f" {ADAPTIVE}")


def parts_of(accuracies: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Lists the accuracies of a row by the headings of their columns, such as ``pgd10 static`` for defended methods.

    An attack with a target class has a second column, the share of images of other classes that it moves there; with
    a defence, one such column per column of other attacks.

    Args:
        accuracies: ``clean`` and attacks of a task, an average or the mean.
    """
    parts: dict[str, Mapping[str, Any]] = {}
    for kind, accuracy in accuracies.items():
        columns = [column for column in COLUMNS if column in accuracy]
        parts |= {} if ADAPTIVE in columns else {kind: accuracy}
        parts |= {f"{kind} {column}": accuracy[column] for column in columns}
        if SUCCESS in accuracy:
            success = accuracy[SUCCESS]
            shares = {f" {name}": success[name] for name in (UNDEFENDED, STATIC) if name in success}
            shares[f" {ADAPTIVE}" if shares else ""] = success
            parts |= {
                f"{kind} {SUCCESS}{name}": {"acc1": _number(part["rate"]), "interval": part["interval"]}
                for name, part in shares.items()
            }
    return parts


def _number(rate: float | None) -> float:
    """Returns a success rate, nan where there is none."""
    return math.nan if rate is None else rate


def rich_table(result: Mapping[str, Any]) -> Table:
    """Renders accuracies for a terminal, with intervals in whole percent on a second line."""
    rows = readable_rows(result, in_two_lines=True)
    title = f"{method_of(result)}: top-1 accuracy in percent, with 95 % intervals"
    table = Table(title=title, caption=audit_line(result), show_footer=True, box=SIMPLE_HEAD)
    for number, name in enumerate(rows[0]):
        title = name.replace("_", "_\n")
        style = "bold" if is_bold(name) else ""
        justify: Any = "right" if number else "left"
        table.add_column(title, justify=justify, footer=_dimmed(rows[-1][number]), no_wrap=number == 0, style=style)
    for row in rows[1:-1]:
        table.add_row(*map(_dimmed, row))
    return table


def rich_detection(result: Mapping[str, Any]) -> Table | None:
    """Renders the detection of unknown classes for a terminal; None if it was not measured."""
    rows = detection_rows(result)
    if not rows:
        return None
    has_attack = result[DETECTION]["attack"] is not None
    measures = len(_measures(result[DETECTION]))
    clean = len(rows[0]) - (measures if has_attack else 0)
    table = Table(title=DETECTION_TITLE + ("; under attack below" if has_attack else ""), box=SIMPLE_HEAD)
    for number, name in enumerate(rows[0][:clean]):
        is_text = number < TEXT_COLUMNS
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in rows[1:]:
        table.add_row(*row[:clean])
        if has_attack:
            table.add_row(*[""] * (clean - measures), *row[clean:], style="dim")
    return table


def _measures(section: Mapping[str, Any]) -> dict[str, str]:
    """Returns the titles of the measures that every score has; results of old versions lack some."""
    sets = [unknown for summary in section["tasks"].values() for unknown in summary["unknown"].values()]
    scores = [values for unknown in sets for values in unknown["scores"].values()]
    return {key: title for key, title in SEPARATION.items() if all(key in values for values in scores)}


def detection_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Lists a header, and a row per known task, unknown set and score; empty if detection was not measured.

    The scores are the headline and the attacked ones.
    """
    section = result.get(DETECTION)
    if not section or not section["tasks"]:
        return []
    measures = _measures(section)
    rows = [["known", "unknown", "score", "class acc", "H", *measures.values()]]
    rows[0] += [f"attacked {title}" for title in measures.values()] if section["attack"] else []
    for task, summary in section["tasks"].items():
        for name, unknown in summary["unknown"].items():
            for score in dict.fromkeys([section["headline"], *section.get("attacked", [])]):
                values = unknown["scores"][score]
                numbers = [summary["class_accuracy"], values["h"], *(values[key] for key in measures)]
                numbers += [values.get("attacked", {}).get(key) for key in measures] if section["attack"] else []
                rows.append([task, name, score, *map(_percent, numbers)])
    return rows


def corruption_tables(result: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Returns, per test set with corrupted copies and per attack, a table of errors by its title.

    Each table has a header, a row per kind with the errors by severity and their mean, the means by category and over
    all kinds, the error without corruption, and mean corruption errors. `readable_rows` leaves out the copies.
    """
    sections = result.get(CORRUPTIONS, {})
    return {
        f"Errors on corrupted copies of {name}{'' if kind == CLEAN else f' under {kind}'}, percent": _corruption_rows(
            summary
        )
        for name, section in sections.items()
        for kind, summary in section.items()
        if kind != TASKS
    }


def _corruption_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    severities = list(next(iter(summary["kinds"].values()))["errors"])
    means = dict(summary["categories"]) | {"all kinds": summary["error"], "without corruption": summary["uncorrupted"]}
    unlike = {reference: values for reference, values in summary["relative_to"].items() if UNLIKE in values}
    for reference, values in summary["relative_to"].items():
        if reference in unlike:
            continue
        means |= {f"mCE, relative to {reference}": values["mce"]}
        means |= {f"relative mCE, relative to {reference}": values["relative_mce"]}
    interval = summary["interval"]
    rows = [["kind", *(f"severity {severity}" for severity in severities), "mean"]]
    for kind, values in summary["kinds"].items():
        rows.append([kind, *map(_percent, values["errors"].values()), _percent(values["error"])])
    for name, value in means.items():
        limits = f" ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})" if name == "all kinds" and interval else ""
        rows.append([name, *[""] * len(severities), f"{_percent(value)}{limits}"])
    for reference, values in unlike.items():
        rows.append(
            [f"mCE, relative to {reference}", *[""] * len(severities), f"none: {reference} has {values[UNLIKE]}"]
        )
    return rows


def rich_corruptions(result: Mapping[str, Any]) -> list[Table]:
    """Renders errors under corruption for a terminal, one table per test set and attack."""
    tables = []
    for title, (head, *rows) in corruption_tables(result).items():
        table = Table(title=title, box=SIMPLE_HEAD)
        for number, name in enumerate(head):
            table.add_column(name.removeprefix("severity "), justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def readable_rows(result: Mapping[str, Any], *, in_two_lines: bool = False) -> list[list[str]]:
    """Lists the rows of the table of accuracies: header, tasks without corrupted copies, and means over all tasks.

    Args:
        result: content of ``result.json``.
        in_two_lines: whether intervals are on a second line.
    """
    percent = percent_in_two_lines if in_two_lines else percent_in_one_line
    kinds, headings = list(result["mean"]), list(parts_of(result["mean"]))
    has_bad = any(values.get("bad_samples") for values in result["tasks"].values())
    rows = [["task", "n", *headings, "seconds", *(["left out"] if has_bad else [])]]
    copies = {task for section in result.get(CORRUPTIONS, {}).values() for task in section[TASKS]}
    for name, values in result["tasks"].items():
        if name in copies:
            continue
        bad = [str(values.get("bad_samples", 0))] if has_bad else []
        cells = [percent(part) for part in parts_of({kind: values[kind] for kind in kinds}).values()]
        rows.append([name, str(values["n"]), *cells, f"{values.get('seconds', 0):.1f}", *bad])
    total = sum(values.get("seconds", 0) for values in result["tasks"].values())
    for name, values in means_of(result).items():
        seconds = f"{total:.1f}" if name == NOT_A_TASK else ""
        name = f"mean of all {len(result['tasks'])}" if copies and name == NOT_A_TASK else name
        cells = [percent(part) for part in parts_of({kind: values[kind] for kind in kinds}).values()]
        rows.append([name, "", *cells, seconds, *([""] if has_bad else [])])
    return rows


def percent_in_one_line(accuracy: Mapping[str, Any]) -> str:
    """Formats accuracy and interval in percent, as in ``12.3 (10.1-14.8)``."""
    low, high = accuracy["interval"]
    return f"{100 * accuracy['acc1']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def percent_in_two_lines(accuracy: Mapping[str, Any]) -> str:
    """Formats accuracy and, on a second line for narrow columns, the interval in whole percent."""
    low, high = accuracy["interval"]
    return f"{100 * accuracy['acc1']:.1f}\n{100 * low:.0f}-{100 * high:.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _dimmed(cell: str) -> Text:
    """Dims the second line of a cell, since it is less important."""
    first, newline, rest = cell.partition("\n")
    return Text.assemble(first, newline, (rest, "dim"))


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [
        [
            f"**{markdown(cell)}**" if is_bold(title) else markdown(cell)
            for title, cell in zip(rows[0], row, strict=True)
        ]
        for row in rows
    ]
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def audit_line(result: Mapping[str, Any]) -> str:
    """Formats the grade and the checks that did not pass, as in ``Audit: B; not measured: baseline``."""
    by_status: dict[str, list[str]] = {}
    for check in open_checks(result):
        by_status.setdefault(check["status"].replace("_", " "), []).append(check["name"])
    rest = [f"{status}: {', '.join(names)}" for status, names in by_status.items()]
    rest += [] if has_attack(result) else ["no attack ran, and the checks of attacks were not measured"]
    return "; ".join([f"Audit: {result['audit']['grade']}", *rest])


def open_checks(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Lists the checks that did not pass; in a test without attacks, those that were not measured are left out."""
    hidden = {"pass"} if has_attack(result) else {"pass", "not_measured"}
    return [check for check in result["audit"]["checks"] if check["status"] not in hidden]


def has_attack(result: Mapping[str, Any]) -> bool:
    """Returns whether the test measured any accuracy under attack."""
    return bool(set(result["mean"]) - {CLEAN})
