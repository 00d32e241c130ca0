"""Escape control characters in texts that are shown to users.

The names of tensors, files and runs come from a log. Printed unchanged, an escape sequence in a name could change
the contents of a terminal, a line break could imitate another line, and a mark for the direction of text could
reorder a line. The messages of `natgrad.schema.errors`, the summaries of `natgrad.schema.summary`, the loggers of
`natgrad.schema.logs` and the command line use `printable`. The template of the pages escapes names itself.
"""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    r"""Return a text in which all characters that are not printable are replaced by their escape sequences.

    Examples
    --------
    >>> print(printable("weight\x1b[31m\nlayer é"))
    weight\x1b[31m\nlayer é
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
