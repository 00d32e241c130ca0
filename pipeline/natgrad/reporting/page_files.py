"""Provide what every page consists of: its template, and its style and scripts, which become part of the page."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import jinja2

from natgrad.schema.errors import InputError

__all__ = ["asset", "library", "page_environment"]


def page_environment() -> jinja2.Environment:
    """Return the environment of the templates, which escapes all values."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("natgrad.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def library() -> tuple[str, ...]:
    """Return the scripts of BokehJS, without importing bokeh."""
    found = find_spec("bokeh")
    folder = Path(str(found.origin)).parent / "server" / "static" / "js" if found is not None else None
    if folder is None or not (folder / "bokeh.min.js").is_file():
        raise InputError(
            "the package bokeh, which draws the figures of the page, is not installed",
            where="report",
            remedy="install it: pip install bokeh",
        )
    return tuple((folder / name).read_text(encoding="utf-8") for name in ("bokeh.min.js", "bokeh-api.min.js"))


@cache
def asset(name: str) -> str:
    """Return the text of a file of the pages."""
    return (files("natgrad.reporting") / "assets" / name).read_text(encoding="utf-8")
