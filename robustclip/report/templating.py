"""Sets up jinja2 for the templates of the report."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustclip.names import plain


def environment() -> Environment:
    """Makes the environment of the templates, which escapes all values and refuses undefined ones."""
    made = Environment(
        loader=PackageLoader("robustclip.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else plain(value, keep="\n"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["kind"] = lambda block: type(block).__name__.lower()
    return made
