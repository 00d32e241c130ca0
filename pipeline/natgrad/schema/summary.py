"""Define the base of the summaries that public functions return, with JSON, text and HTML forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from html import escape
from typing import Any

from natgrad.schema.text import printable

__all__ = ["Summary", "summary_html", "summary_lines"]

_LONGEST_INLINE = 60
"""Maximum length of an inline mapping entry, in characters. Longer entries get separate lines."""


class Summary:
    """Base of frozen dataclasses that summarize an operation."""

    def to_json(self) -> dict[str, Any]:
        """Return the plain values that the command line prints with ``--json``."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # every subclass is a dataclass

    def __str__(self) -> str:
        return "".join(summary_lines(self.to_json()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}\n{self}".rstrip("\n")

    def _repr_html_(self) -> str:
        """Return the HTML table for notebooks."""
        return summary_html(type(self).__name__, self.to_json())


def summary_html(title: str, values: Mapping[str, Any]) -> str:
    """Return an HTML table with one row per value. All text is escaped, because it may come from a log."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(_label(name))}</th>"
        f"<td style='text-align:left;white-space:pre-wrap'>{_cell(name, value)}</td></tr>"
        for name, value in values.items()
    )
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"


def _cell(name: str, value: Any) -> str:
    text = escape(_inline(name, value))
    # A notebook resolves a relative path against its own folder, as Python does.
    return f"<a href='{text}' target='_blank'>{text}</a>" if name == "report" else text


def summary_lines(values: Mapping[str, Any], label: Callable[[str], str] | None = None) -> Iterator[str]:
    """Yield one aligned line per value. Mappings with long entries get one line per entry.

    Parameters
    ----------
    values : mapping
    label : callable, optional
        Returns the label of a name. Default: underscores are replaced by spaces.

    Examples
    --------
    >>> print(*summary_lines({"new_steps": 3, "warnings": []}), sep="", end="")
    new steps  3
    warnings   none
    """
    label = label or _label
    width = max(map(len, values), default=0)
    for name, value in values.items():
        if isinstance(value, Mapping) and any(len(str(item)) > _LONGEST_INLINE for item in value.values()):
            yield f"{printable(label(name))}\n"
            # The keys of a mapping are names from a log or from results. They are shown unchanged.
            yield from (f"  {line}" for line in summary_lines(value, str))
        else:
            yield f"{printable(label(name)):<{width}}  {printable(_inline(name, value))}\n"


def _label(name: str) -> str:
    return name.replace("_", " ")


def _inline(name: str, value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(item, float) for item in value):
        unit = " rad" if name.startswith("angle") else ""
        return "min {:.6g}, median {:.6g}, max {:.6g}".format(*value) + unit
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value)) or "none"
    return str(value)
