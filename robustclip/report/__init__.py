"""``robustclip report`` writes one page about finished tests, which needs no network."""

from collections.abc import Sequence
from pathlib import Path

from robustclip.persistence import atomic_write


def report(
    runs: list[Path], *, out: Path = Path("report.html"), images: Path | None = None, sections: Sequence[str] = ()
) -> None:
    """Write one HTML page about finished tests, and its tables as Markdown and CSV beside it.

    Args:
        runs: folders that ``robustclip test`` wrote.
        out: the page, ``.html``; ``.md`` and ``.csv`` get the same name.
        images: folder for the kept adversarial examples as PNG files; null writes none.
        sections: class paths of further sections, subclasses of `Section`.

    Raises:
        ValueError: there is no run, a test is unfinished, ``out`` does not end in .html, or a class path names no
            section.
    """
    # Imported here because the command line imports every tool and matplotlib takes a second.
    from robustclip.report import accuracy, gallery, page, view

    if not runs:
        raise ValueError("report needs at least one folder of `robustclip test`")
    if out.suffix != ".html":
        raise ValueError(f"out must end in .html, got {out}")
    views = view.views(runs)
    content = page.content(views, sections)
    files = {
        out: page.html(views, content),
        out.with_suffix(".md"): page.markdown(views, content),
        out.with_suffix(".csv"): accuracy.csv_of(views),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        atomic_write(path, text)
    if images is not None:
        gallery.export(views, images)
