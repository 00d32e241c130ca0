"""Define the base of the summaries that public functions return, with JSON, text and HTML forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from natgrad.schema.text import printable, sparkline, table_lines

__all__ = ["Summary", "summary_html", "summary_lines", "summary_values"]

_LONGEST_INLINE = 60
"""Maximum length of an inline mapping entry, in characters. Longer entries get separate lines."""

_LONGEST_CELL = 60
"""Maximum length of a name in a table. The middle of a longer name is omitted."""


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
    if _is_table(value):
        header, *rows = _table_cells(value)
        lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
        lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    text = escape(_inline(name, value))
    # A notebook resolves a relative path against its own folder, as Python does.
    return f"<a href='{text}' target='_blank'>{text}</a>" if name == "report" else text


def summary_lines(values: Mapping[str, Any], label: Callable[[str], str] | None = None) -> Iterator[str]:
    """Yield one aligned line per value. Mappings with long entries get one line per entry, and lists a table.

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
        elif _is_table(value):
            yield f"{printable(label(name))}\n"
            yield from (f"  {line}" for line in table_lines(_table_cells(value)))
        else:
            yield f"{printable(label(name)):<{width}}  {printable(_inline(name, value))}\n"


def summary_values(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the label and the text of each value of a summary, as the command line prints them on one line."""
    return {_label(name): _inline(name, value) for name, value in values.items()}


def _label(name: str) -> str:
    return name.replace("_", " ")


def _is_table(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _table_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the cells of a table with a header, from rows with equal keys."""

    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        half = _LONGEST_CELL // 2
        return text if len(text) <= _LONGEST_CELL else f"{text[:half]}…{text[-half:]}"

    return [[_label(name) for name in rows[0]], *([cell(value) for value in row.values()] for row in rows)]


def _inline(name: str, value: Any) -> str:
    if name.endswith("_course") and value:
        finite = [item for item in value if item is not None]
        return f"{sparkline(value)}  {min(finite):.4g} to {max(finite):.4g} rad"
    if isinstance(value, list | tuple) and len(value) == 3 and all(isinstance(item, float) for item in value):
        unit = " rad" if name.startswith("angle") else ""
        return "min {:.6g}, median {:.6g}, max {:.6g}".format(*value) + unit
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_inline(key, item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
