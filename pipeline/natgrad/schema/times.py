"""Write times as text, in one form for all records and summaries."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

__all__ = ["now", "oldest"]


def now() -> str:
    """Return the current time in UTC and ISO 8601, to the second. Strings in this form sort chronologically."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def oldest(times: Iterable[str | None]) -> str | None:
    """Return the earliest of several times; None if one of them is None, or if there are none.

    Examples
    --------
    >>> oldest(["2026-01-02T00:00:00+00:00", "2026-01-01T00:00:00+00:00"])
    '2026-01-01T00:00:00+00:00'
    >>> oldest(["2026-01-02T00:00:00+00:00", None])
    """
    known = []
    for time in times:
        if time is None:
            return None
        known.append(time)
    return min(known, default=None)
