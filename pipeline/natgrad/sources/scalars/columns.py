"""Keep the values of a log of scalars in columns, one for each key."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.sources.scalars.series import Restarts

__all__ = [
    "LABELS_LIMIT",
    "LINE_KEY",
    "Batch",
    "Column",
    "Decoded",
    "Labels",
    "Table",
    "each_record",
    "label_text",
    "number_of",
]

LABELS_LIMIT = 1 << 16
"""Maximum number of different values of a label."""


LINE_KEY = "\0line"
"""Key for the number of the line of a record in a text file, for messages."""


@dataclass(frozen=True)
class Batch:
    """Consecutive records with the same keys, whose values are strings. Decoding many records together is faster.

    Attributes
    ----------
    size : int
        Number of records.
    columns : mapping
        Values by key.
    line : int
        Number of the line of the first record; each record is one line.
    """

    size: int
    columns: Mapping[str, Sequence[str]]
    line: int

    def records(self) -> Iterator[Mapping[str, Any]]:
        """Yield the records one by one."""
        for index in range(self.size):
            values = {key: column[index] for key, column in self.columns.items()}
            yield {LINE_KEY: self.line + index, **values}


Decoded = Iterator[Mapping[str, Any] | Batch]
"""Records, or batches of them."""


def each_record(records: Decoded) -> Iterator[Mapping[str, Any]]:
    """Yield records one by one."""
    for values in records:
        if isinstance(values, Batch):
            yield from values.records()
        else:
            yield values


@dataclass
class Column:
    """The values of one key (at most ``limit``), their record numbers, and the first value that is not a number."""

    limit: int
    records: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    invalid: tuple[str, str] | None = None

    def append(self, record: int, value: Any, line: int | None) -> None:
        """Add the value of a record, unless it is empty."""
        if value is None or (isinstance(value, str) and not value.strip()):
            return
        number = number_of(value)
        if number is None:
            position = f"record {record}" if line is None else f"line {line}"
            self.invalid = self.invalid or (position, str(value)[:40])
            return
        if len(self.records) >= self.limit:
            raise ValueError(f"it contains more than {self.limit} records")
        self.records.append(record)
        self.values.append(number)

    def extend(self, record: int, texts: Sequence[str], line: int) -> None:
        """Add the values of consecutive records and lines, as `append` does; ``record`` is the first one."""
        filled = list(map(str.strip, texts))
        records, numbers = range(record, record + len(texts)), list(filter(None, filled))
        try:
            # `number_of` refuses underscores, which Python accepts in numbers.
            values = None if "_" in "".join(numbers) else array("d", map(float, numbers))
        except ValueError:
            values = None
        if values is None or len(self.records) + len(values) > self.limit:
            for index, text in enumerate(texts):
                self.append(record + index, text, line + index)
            return
        self.records.extend(records if len(numbers) == len(texts) else compress(records, filled))
        self.values.extend(values)


@dataclass
class Labels:
    """The values of a key that tells records apart, as indices of a list of strings. The first string is empty."""

    records: array[int] = field(default_factory=lambda: array("q"))
    codes: array[int] = field(default_factory=lambda: array("q"))
    texts: dict[str, int] = field(default_factory=lambda: {"": 0})

    def append(self, record: int, value: Any) -> None:
        """Add the label of a record."""
        text = label_text(value)
        if len(self.texts) >= LABELS_LIMIT and text not in self.texts:
            raise ValueError(f"it has more than {LABELS_LIMIT} different labels of its records")
        self.records.append(record)
        self.codes.append(self.texts.setdefault(text, len(self.texts)))

    def extend(self, record: int, values: Sequence[str]) -> None:
        """Add the labels of consecutive records; ``record`` is the first one."""
        different = dict.fromkeys(values)
        for value in different:
            self.append(record, value)
        codes = dict(zip(different, self.codes[len(self.codes) - len(different) :], strict=True))
        del self.records[len(self.records) - len(different) :], self.codes[len(self.codes) - len(different) :]
        self.records.extend(range(record, record + len(values)))
        self.codes.extend(map(codes.__getitem__, values))

    def of(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index of the label of each record; 0 if it has none."""
        if not len(self.records):
            return np.zeros(len(records), np.int64)
        own, codes = np.frombuffer(self.records, np.int64), np.frombuffer(self.codes, np.int64)
        indices = np.minimum(np.searchsorted(own, records), len(own) - 1)
        return np.where(own[indices] == records, codes[indices], 0)


@dataclass
class Table:
    """The columns of a log, by key.

    Attributes
    ----------
    columns : dict
        Columns of the scalars, of the step and of the epoch.
    labels : dict
        Columns of the keys that tell records apart.
    restarts : Restarts
    of_key : dict
        Columns to which the values of each key are added, because finding them takes longer than adding a value.
    """

    columns: dict[str, Column] = field(default_factory=dict)
    labels: dict[str, Labels] = field(default_factory=dict)
    restarts: Restarts = field(default_factory=Restarts)
    of_key: dict[str, tuple[Labels | None, Column | None]] = field(default_factory=dict)


def number_of(value: Any) -> float | None:
    """Return the value of a number or numeric string, or None."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str | np.number):
        return None
    if isinstance(value, str) and "_" in value:
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def label_text(value: Any) -> str:
    """Return the text of a label, which is the same for equal numbers."""
    number = number_of(value)
    if number is not None:
        return f"{number:.15g}"
    return "" if value is None else str(value).strip()
