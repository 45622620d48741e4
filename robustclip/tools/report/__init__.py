"""``robustclip report``: tests as one page that needs no network."""

from pathlib import Path

from robustclip.ledger import write_aside


def report(runs: list[Path], *, out: Path = Path("report.html")) -> None:
    """Writes one HTML page about finished tests, and its tables as Markdown and CSV beside it.

    Args:
        runs: folders that ``robustclip test`` left.
        out: the page, ``.html``; ``.md`` and ``.csv`` get the same name.

    Raises:
        ValueError: no runs, one that is not finished, or another ending.
    """
    # Here, because the command line imports every tool and matplotlib takes a second.
    from robustclip.tools.report import detection, geometry, tables, view
    from robustclip.tools.report.page import page

    if not runs:
        raise ValueError("report needs at least one folder of `robustclip test`")
    if out.suffix != ".html":
        raise ValueError(f"out must end in .html, got {out}")
    views = view.views(runs)
    more = [*detection.detection_tables(views), *geometry.geometry_tables(views)]
    files = {
        out: page(views),
        out.with_suffix(".md"): tables.document(views, more),
        out.with_suffix(".csv"): tables.listing(views),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        write_aside(path, text)
