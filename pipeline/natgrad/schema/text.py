"""Escape control characters in text that is shown to users, and draw tables and lines with characters.

The names of tensors, files and runs come from a log. Printed unchanged, an escape sequence in a name could change
the contents of a terminal, a line break could imitate another line, and a mark for the direction of text could
reorder a line. The messages of `natgrad.schema.errors`, the summaries of `natgrad.schema.summary`, the loggers of
`natgrad.schema.logs` and the command line use `printable`. The template of the pages escapes names itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

__all__ = ["encodable", "printable", "sparkline", "table_lines"]

_LEVELS = "▁▂▃▄▅▆▇█"


def printable(text: str) -> str:
    r"""Return a text in which all unprintable characters are replaced by their escape sequences.

    Examples
    --------
    >>> print(printable("weight\x1b[31m\nlayer é"))
    weight\x1b[31m\nlayer é
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def encodable(text: str, encoding: str) -> str:
    """Return a text that an encoding can represent: blocks become digits, other characters escape sequences.

    Parameters
    ----------
    text : str
    encoding : str
        Name of the encoding, for example that of standard output.

    Examples
    --------
    >>> encodable("▁█ é", "ascii")
    X
    """
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        digits = text.translate({ord(block): str(level) for level, block in enumerate(_LEVELS, start=1)})
        return digits.encode(encoding, "backslashreplace").decode(encoding)
    return text


def table_lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table with aligned columns.

    Parameters
    ----------
    rows : sequence of sequence of str
        Cells; the first row is the header.

    Examples
    --------
    >>> print(*table_lines([["tensor", "updates"], ["weight", "12"]]), sep="", end="")
    tensor  updates
    weight  12
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(map(str.ljust, row, widths)).rstrip() + "\n"


def sparkline(values: Sequence[float | None]) -> str:
    """Return a line of blocks whose heights show finite values, from the smallest to the largest.

    Parameters
    ----------
    values : sequence of float
        A missing or not finite value is a space.

    Examples
    --------
    >>> sparkline([0.0, 1.0, None, 2.0])
    '▁▅ █'
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    # Divided before they are subtracted, because the difference may overflow.
    scale = (high / 2 - low / 2) or 1.0
    return "".join(
        _LEVELS[min(int((value / 2 - low / 2) / scale * len(_LEVELS)), len(_LEVELS) - 1)]
        if value is not None and math.isfinite(value)
        else " "
        for value in values
    )
