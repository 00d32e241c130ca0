"""Keep the values of a log of scalars in columns, one for each key."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, compress
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.sources.scalars.series import Restarts

__all__ = [
    "LABELS_LIMIT",
    "LINE_KEY",
    "RESTART_KEY",
    "RUN_KEY",
    "Batch",
    "Column",
    "Decoded",
    "Labels",
    "Table",
    "Values",
    "columns_by_name",
    "columns_of",
    "each_record",
    "in_batches",
    "label_text",
    "number_of",
    "spread",
    "with_column",
]

LABELS_LIMIT = 1 << 16
"""Maximum number of different values of a label."""


RUN_KEY = "run_name"
"""Key for the name of the run of a record, in logs that contain several runs."""

RESTART_KEY = "\0restart"
"""Key of a record in which a writer marks its start: at a step, before which earlier writers are valid, or at an
unknown step (None)."""

LINE_KEY = "\0line"
"""Key for the number of the line of a record in a text file, for messages."""


Values = Sequence[Any] | NDArray[np.float64]
"""Values of a key in consecutive records. None is missing."""


_NAMES_TOGETHER, _GROUP = 8, 512
"""Keys of a long table up to which its rows become one batch, and number of other records in a batch."""


@dataclass(frozen=True)
class Batch:
    """Consecutive records. Adding many values to a column together is faster.

    Attributes
    ----------
    size : int
        Number of records.
    columns : mapping
        Values by key.
    lines : sequence of int, optional
        Number of the line of each record, for a text file.
    """

    size: int
    columns: Mapping[str, Values]
    lines: Sequence[int] | None = None

    def records(self) -> Iterator[Mapping[str, Any]]:
        """Yield the records one by one, without missing values."""
        columns = {key: _listed(values) for key, values in self.columns.items()}
        for index in range(self.size):
            line = {} if self.lines is None else {LINE_KEY: self.lines[index]}
            yield line | {key: column[index] for key, column in columns.items() if column[index] is not None}


Decoded = Iterator[Mapping[str, Any] | Batch]
"""Records, or batches of them."""


def each_record(records: Decoded) -> Iterator[Mapping[str, Any]]:
    """Yield records one by one."""
    for values in records:
        if isinstance(values, Batch):
            yield from values.records()
        else:
            yield values


def columns_of(records: Sequence[Mapping[str, Any]], most: int) -> dict[str, list[Any]] | None:
    """Return the values of records by key; None if there are more than ``most``, with those that are missing."""
    keys = records[0].keys()
    if set(map(len, records)) == {len(keys)} and len(keys) * len(records) <= most:
        with suppress(KeyError):  # if no key is missing, there are no others
            return {key: list(map(itemgetter(key), records)) for key in keys}
    union = dict.fromkeys(chain.from_iterable(records))
    if len(union) * len(records) > most:
        return None
    return {key: [each.get(key) for each in records] for key in union}


def in_batches(records: Decoded) -> Decoded:
    """Yield records in batches, except those for which columns with missing values would be too large."""
    group: list[Mapping[str, Any]] = []
    for values in records:
        if isinstance(values, Batch) or RESTART_KEY in values:
            yield from _together(group)
            group = []
            yield values
            continue
        group.append(values)
        if len(group) == _GROUP:
            yield from _together(group)
            group = []
    yield from _together(group)


def _together(records: Sequence[Mapping[str, Any]]) -> Decoded:
    columns = columns_of(records, 2 * sum(map(len, records))) if len(records) > 1 else None
    if columns is None or not {str, type(None)}.issuperset(map(type, columns.get(RUN_KEY, ()))):
        yield from records
        return
    lines = columns.pop(LINE_KEY, None)
    yield Batch(len(records), columns, lines)


def columns_by_name(
    names: Sequence[str], values: Sequence[Any], wanted: Callable[[str], bool]
) -> dict[str, list[Any]] | None:
    """Return the columns of a long table, each row of which has the name of a key and its value.

    Returns None if the table has many keys, for which columns with missing values would be too large.
    """
    keys = [name for name in dict.fromkeys(names) if wanted(name)]
    if len(keys) > _NAMES_TOGETHER:
        return None
    pairs = list(zip(names, values, strict=True))
    return {key: [value if name == key else None for name, value in pairs] for key in keys}


def spread(values: Values, records: NDArray[np.int64], size: int) -> Values:
    """Return a column of a batch with values in some of its records.

    Raises
    ------
    ValueError
        If a record has two values. ``records`` are increasing.
    """
    if (np.diff(records) == 0).any():
        raise ValueError("a record has two values under one key")
    if len(records) == size:
        return values
    column: list[Any] = [None] * size
    for record, value in zip(records.tolist(), _listed(values), strict=True):
        column[record] = value
    return column


def with_column(records: Decoded, key: str, value: str) -> Decoded:
    """Yield records with a key that has the same value in all of them."""
    for values in records:
        if isinstance(values, Batch):
            yield replace(values, columns={**values.columns, key: [value] * values.size})
        else:
            yield {**values, key: value}


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

    def extend(self, record: int, values: Values, lines: Sequence[int] | None) -> None:
        """Add the values of consecutive records, as `append` does; ``record`` is the first one."""
        records, numbers = np.arange(record, record + len(values)), _numbers(values)
        if numbers is None:
            filled = [value is not None for value in values]
            numbers = _numbers(list(compress(values, filled)))
            if numbers is None:
                filled = [
                    present and bool(str(value).strip()) for value, present in zip(values, filled, strict=True)
                ]
                numbers = _numbers(list(compress(values, filled)))
            records = records[filled]
        if numbers is None or len(self.records) + len(numbers) > self.limit:
            for index, value in enumerate(_listed(values)):
                self.append(record + index, value, None if lines is None else lines[index])
            return
        self.records.frombytes(records.tobytes())
        self.values.extend(numbers)


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

    def extend(self, record: int, values: Values) -> None:
        """Add the labels of consecutive records; ``record`` is the first one."""
        kinds = set(map(type, values))
        if not (kinds <= {str, type(None)} or kinds == {int}):  # other equal values may have different texts
            for index, value in enumerate(_listed(values)):
                self.append(record + index, value)
            return
        different = dict.fromkeys(values)
        for value in different:
            self.append(record, value)
        codes = dict(zip(different, self.codes[len(self.codes) - len(different) :], strict=True))
        del self.records[len(self.records) - len(different) :], self.codes[len(self.codes) - len(different) :]
        self.records.frombytes(np.arange(record, record + len(values)).tobytes())
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


def _listed(values: Values) -> Sequence[Any]:
    return values.tolist() if isinstance(values, np.ndarray) else values


def _numbers(values: Values) -> array[float] | None:
    """Return the numbers of values as `number_of` does; None if one of them may not be a number."""
    if isinstance(values, np.ndarray):
        return array("d", values.tobytes())
    kinds = set(map(type, values))
    try:
        if kinds <= {float, int}:
            return array("d", values)
        if kinds == {str} and "_" not in "".join(values):
            return array("d", map(float, values))
    except (ValueError, OverflowError):
        pass
    return None


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
