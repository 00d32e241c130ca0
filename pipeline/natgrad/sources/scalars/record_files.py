"""Read the record files that scalar loggers write: CSV, JSON lines, Parquet and SQLite.

A truncated last record is assumed to be in progress. It is omitted, with a note.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from io import TextIOWrapper
from itertools import chain, islice
from operator import itemgetter
from typing import Any, BinaryIO, cast
from urllib.parse import quote

import numpy as np
import orjson
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.sources.bounds import Budget, parse_json, shown
from natgrad.sources.changes import change_time, changed_lately
from natgrad.sources.scalars.columns import LINE_KEY, RESTART_KEY, RUN_KEY, Batch, Decoded, Values, columns_by_name
from natgrad.sources.scalars.json_records import NUMBER_CHARACTERS, json_records
from natgrad.sources.steps import local_file
from natgrad.storage import NotRegularError, Storage, StoredFile, require_regular

__all__ = [
    "COMPRESSED",
    "TRACKIO_COLUMNS",
    "complete_lines",
    "holds_json_lines",
    "holds_metrics",
    "open_text",
    "read_csv",
    "read_json_lines",
    "read_parquet",
    "read_sqlite",
    "table_rows",
]

LINE_LIMIT = 1 << 24
"""Default limit on the number of characters per line, to bound the memory."""

COMPRESSED = ".gz"
"""Suffix of text files compressed with gzip."""

_FIRST_LINE, _BLOCK = 1 << 20, 1 << 18
_ROWS = 1 << 9
"""Rows of a CSV file that are decoded together."""
_BATCH = 1 << 16
GROUP_LIMIT = 1 << 32
"""Default limit on the uncompressed size in bytes of a row group of a Parquet file."""

COLUMNS_LIMIT = 1 << 16
"""Maximum number of columns of a CSV file."""

ROWS, ROWS_PER_BYTE = 1 << 20, 8
"""Rows of any Parquet file, and for each of its bytes."""

SQLITE_STEPS, SQLITE_STEPS_PER_BYTE = 10_000_000, 10
"""Steps of the virtual machine of SQLite for any database, and for each of its bytes."""

TRACKIO_COLUMNS = frozenset({"run_name", "step", "metrics"})
"""Columns of the table ``metrics`` of trackio that are read."""

_METRICS, _VALUE = ("metric", "key", "name", "tag"), "value"
"""Headers of a long table, which has a row for each value: the name of its metric, and the value."""

_STEPS_AT_ONCE = 10_000
_SQLITE = b"SQLite format 3\0"
_SQLITE_FILES = ("-journal", "-wal", "-shm")

_LINE_BREAK = re.compile(r"\r\n|\r|\n")

Records = Iterator[Mapping[str, Any]]
Wanted = Callable[[str], bool]


class _Expanded(io.RawIOBase):
    """The content of a gzip file, which is refused if it expands more than any real log would."""

    def __init__(self, content: StoredFile) -> None:
        self._file = gzip.GzipFile(fileobj=cast(BinaryIO, content))
        self._content, self._budget = content, Budget(content.size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._file.read(len(memoryview(buffer)))
        self._budget.spend(expanded=len(part))
        memoryview(buffer)[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._file.close()
        self._content.close()
        super().close()


def open_text(log: Storage) -> BinaryIO:
    """Open a text file, and expand it if its name ends with ``.gz``."""
    content = log.open()
    if log.suffix != COMPRESSED:
        content.widen()
        return cast(BinaryIO, content)
    return io.BufferedReader(_Expanded(content))


def complete_blocks(
    log: Storage, notes: list[str], is_record: Callable[[str], bool], limit: int = LINE_LIMIT
) -> Iterator[str]:
    """Yield the lines of a text file in blocks; each line ends with a newline character.

    A last line without a newline is omitted, unless it is a record and the file has not changed recently.
    """
    with TextIOWrapper(open_text(log), encoding="utf-8-sig") as file:
        while block := file.read(min(limit, _BLOCK)):
            block += file.readline(limit) if not block.endswith("\n") else ""
            start = block.rfind("\n", 0, len(block) - 1) + 1
            ends = block.endswith("\n")
            if len(block) - start > limit or (not ends and len(block) - start == limit):
                raise ValueError(f"it has a line of more than {limit} characters")
            if ends:
                yield block
                continue
            if start:
                yield block[:start]
            last = block[start:]
            if changed_lately(change_time(log)) or not is_record(last):
                notes.append(
                    f"the last line of {log.name} has no newline and is omitted: it is being written or truncated"
                )
                return
            notes.append(
                f"the last line of {log.name} has no newline; it is read, as the file is no longer written"
            )
            yield f"{last}\n"


def complete_lines(
    log: Storage, notes: list[str], is_record: Callable[[str], bool], limit: int = LINE_LIMIT
) -> Iterator[str]:
    """Yield the lines of a text file, each with a newline character; see `complete_blocks`."""
    for block in complete_blocks(log, notes, is_record, limit):
        yield from _lines(block)


def _lines(block: str) -> Iterator[str]:
    return io.StringIO(block)


def read_csv(log: Storage, wanted: Wanted, notes: list[str]) -> Decoded:
    """Yield the records of a file with a header and commas, semicolons or tabs. Empty values are missing."""
    header: list[str] = []
    delimiter = ","

    def is_record(line: str) -> bool:
        try:
            row = next(csv.reader([line], delimiter=delimiter, strict=True), [])
        except csv.Error:
            return False
        return bool(header) and len(row) == len(header)

    blocks = complete_blocks(log, notes, is_record)
    first, newline, rest = next(blocks, "").partition("\n")
    delimiter = max(",;\t", key=first.count)
    if first.count(delimiter) > COLUMNS_LIMIT:
        raise ValueError(f"its header has more than {COLUMNS_LIMIT} columns")
    header = next(csv.reader([first + newline], delimiter=delimiter), [])
    positions = {name.strip(): position for position, name in enumerate(header) if wanted(name.strip())}
    names = [name.strip() for name in header if wanted(name.strip())]
    if len(positions) != len(names):
        raise _same_name(names)
    table = _CSV(header, delimiter, positions, wanted)
    line = 2
    for block in filter(None, chain([rest], blocks)):
        if '"' in block:  # a value may contain line breaks, and continue in the next block
            yield from table.records(chain(_lines(block), chain.from_iterable(map(_lines, blocks))), line)
            return
        numbers = table.numbers(block)
        if numbers is None:
            yield from table.records(_lines(block), line)
        else:
            yield Batch(len(numbers), table.columns_of(numbers), range(line, line + len(numbers)))
        line += block.count("\n")


@dataclass(frozen=True)
class _CSV:
    """The table in a CSV file.

    Attributes
    ----------
    header : list of str
    delimiter : str
    positions : mapping
        Positions of the wanted columns, by name.
    wanted : callable
    """

    header: list[str]
    delimiter: str
    positions: Mapping[str, int]
    wanted: Wanted

    @cached_property
    def _long(self) -> tuple[int, int] | None:
        """Positions of metric and value in the header of a long table; None for other tables."""
        header = [name.strip().lower() for name in self.header]
        metrics = [position for position, name in enumerate(header) if name in _METRICS]
        values = [position for position, name in enumerate(header) if name == _VALUE]
        return (metrics[0], values[0]) if len(metrics) == len(values) == 1 else None

    def numbers(self, block: str) -> NDArray[np.float64] | None:
        """Return the values of lines that contain only plain numbers, shape (lines, columns); None for others."""
        if self._long is not None or RUN_KEY in self.positions:
            return None
        content = block.encode()
        ends = np.frombuffer(content.translate(None, NUMBER_CHARACTERS + b" "), np.uint8)
        width = len(self.header)
        expected = np.array([ord(self.delimiter)] * (width - 1) + [ord("\n")], np.uint8)
        if len(ends) % width or (ends.reshape(-1, width) != expected).any():
            return None
        listed = b",%b," % content[:-1].replace(b"\n", b",").replace(self.delimiter.encode(), b",")
        if b",," in listed:
            listed = listed.replace(b",,", b",null,").replace(b",,", b",null,")
        try:
            # JSON numbers are a subset of Python's. Only -0 has another value: it is an integer.
            values = None if b"-0," in listed else np.array(orjson.loads(b"[%b]" % listed[1:-1]), np.float64)
        except orjson.JSONDecodeError:
            return None
        return None if values is None else values.reshape(-1, width)

    def columns_of(self, numbers: NDArray[np.float64]) -> dict[str, Values]:
        """Return the wanted columns of the numbers of lines, in which NaN is a missing value."""
        columns: dict[str, Values] = {}
        for name, position in self.positions.items():
            column = numbers[:, position]
            columns[name] = column
            if np.isnan(column).any():
                columns[name] = [None if value != value else value for value in column.tolist()]
        return columns

    def records(self, lines: Iterator[str], line: int) -> Decoded:
        """Yield the records of lines; ``line`` is the number of the first one."""
        rows, before = csv.reader(lines, delimiter=self.delimiter, strict=True), line
        columns = {name: itemgetter(position) for name, position in self.positions.items()}
        while True:
            line = before + rows.line_num
            try:
                batch = list(islice(rows, _ROWS))
            except csv.Error as error:
                raise ValueError(f"line {before + rows.line_num - 1}: {error}") from error
            if not batch:
                return
            are_lines = before + rows.line_num - line == len(batch)
            if are_lines and {*map(len, batch)} == {len(self.header)} and self.header not in batch:
                metrics = self._metrics(batch)
                if metrics is not None and not metrics.keys() & columns.keys():
                    values = {name: list(map(of, batch)) for name, of in columns.items()} | metrics
                    yield Batch(len(batch), values, range(line, line + len(batch)))
                    continue
            for row in batch:
                line += 1 + sum(len(_LINE_BREAK.findall(value)) for value in row)
                if row == self.header:  # a restarted run may write its header again
                    yield {RESTART_KEY: None}
                elif row:
                    yield {LINE_KEY: line - 1, **self._values(row, line - 1, columns)}

    def _metrics(self, rows: Sequence[list[str]]) -> dict[str, list[Any]] | None:
        """Return the values of each metric of a long table by row; None if there are many metrics."""
        if self._long is None:
            return {}
        name, value = map(itemgetter, self._long)
        return columns_by_name([text.strip() for text in map(name, rows)], list(map(value, rows)), self.wanted)

    def _values(
        self, row: list[str], line: int, columns: Mapping[str, Callable[[list[str]], str]]
    ) -> dict[str, str]:
        """Return the wanted values of a row."""
        if len(row) != len(self.header):
            raise ValueError(f"line {line} has {len(row)} values, but the header has {len(self.header)}")
        values = {name: of(row) for name, of in columns.items()}
        if self._long is not None:
            metric = row[self._long[0]].strip()
            if metric in values:
                raise ValueError(f"line {line} has a metric named {shown(metric)}, like a column")
            values |= {metric: row[self._long[1]]} if self.wanted(metric) else {}
        return values


def holds_json_lines(log: Storage) -> bool:
    """Return True if the first two lines of a file start like JSON objects and the first one is complete."""
    with open_text(log) as file:
        first = file.readline(_FIRST_LINE)
        second = file.read(1)
    if not first.startswith(b"{") or not first.endswith(b"\n") or second != b"{":
        return False
    try:
        return isinstance(parse_json(first, log.name), dict)
    except ValueError:
        return False


def read_json_lines(log: Storage, wanted: Wanted, notes: list[str], *, line_limit: int = LINE_LIMIT) -> Decoded:
    """Yield the records of a file with a JSON object on each line. Nested keys are joined by slashes."""
    number = 1
    for block in complete_blocks(log, notes, _is_json, line_limit):
        lines = block[:-1].split("\n")
        numbers: Sequence[int] = range(number, number + len(lines))
        number += len(lines)
        if not all(map(str.strip, lines)):
            filled = [line for line in zip(lines, numbers, strict=True) if line[0].strip()]
            lines, numbers = [line for line, _ in filled], [own for _, own in filled]
        if lines:
            yield from json_records(lines, wanted, "line", numbers, are_lines=True)


def _is_json(line: str) -> bool:
    try:
        parse_json(line, "the last line")
    except ValueError:
        return False
    return True


def read_parquet(log: Storage, wanted: Wanted, notes: list[str], *, group_limit: int = GROUP_LIMIT) -> Decoded:
    """Yield the records of a Parquet file, read with pyarrow (needs the extra ``parquet``)."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            "reading Parquet needs pyarrow", where=str(log), remedy="pip install natgrad-pipeline[parquet]"
        ) from error
    with log.open() as stream, closing(parquet.ParquetFile(stream)) as file:
        schema, metadata = file.schema_arrow, file.metadata
        names = [name for name in schema.names if wanted(name)]
        if len(set(names)) != len(names):
            raise _same_name(names)
        if not 0 <= metadata.num_rows <= ROWS + log.stat().size * ROWS_PER_BYTE:
            raise ValueError(f"it would have {metadata.num_rows} rows, which is more than its size permits")
        for group in range(metadata.num_row_groups):
            # For damaged statistics of a column, pyarrow 26 ends the process: ask only for those of the group.
            if not 0 <= metadata.row_group(group).total_byte_size <= group_limit:
                raise ValueError(f"the uncompressed size of a row group exceeds {group_limit} bytes")
        for batch in file.iter_batches(_BATCH, columns=names) if names else ():
            columns = zip(batch.schema.names, batch.columns, strict=True)
            yield Batch(batch.num_rows, {name: _column_values(column, name) for name, column in columns})


def _column_values(column: Any, name: str) -> Values:
    from pyarrow import types

    is_number = types.is_floating(column.type) or types.is_integer(column.type)
    if is_number and not column.null_count and name != RUN_KEY:
        return column.to_numpy(zero_copy_only=False).astype(np.float64)  # type: ignore[no-any-return]
    return column.to_pylist()  # type: ignore[no-any-return]


def _same_name(names: Sequence[str]) -> ValueError:
    return ValueError(f"two columns have the same name: {', '.join(map(shown, names[:8]))}")


def holds_metrics(log: Storage, columns: Set[str]) -> bool:
    """Return True if a file is a SQLite database whose table ``metrics`` has some columns."""
    with log.open() as file:
        if file.read(len(_SQLITE)) != _SQLITE:
            return False
    try:
        with closing(_connect(log)) as database:
            return _columns(database) >= columns
    except NotRegularError:
        return True  # reading it is refused, with the reason
    except sqlite3.Error:
        return False


def _connect(log: Storage) -> sqlite3.Connection:
    path = local_file(log).absolute()
    # SQLite also opens the files of a transaction that was interrupted.
    size = sum(
        require_regular(file)
        for file in (path, *(path.with_name(path.name + suffix) for suffix in _SQLITE_FILES))
        if file == path or file.exists()
    )
    database = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)
    try:
        # Views and functions in the schema are not trusted: do not run them.
        database.execute("PRAGMA trusted_schema=OFF")
        database.execute("PRAGMA cell_size_check=ON")
    except sqlite3.Error:
        # Connections of a process share a memory map of the database. If one stays open and the file is truncated,
        # the next one ends the process.
        database.close()
        raise
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LINE_LIMIT)
    # The pages of a corrupt database may refer to each other, so that it seems to have an astronomical number of
    # rows.
    blocks = iter(range((SQLITE_STEPS + size * SQLITE_STEPS_PER_BYTE) // _STEPS_AT_ONCE))
    database.set_progress_handler(lambda: next(blocks, None) is None, _STEPS_AT_ONCE)
    return database


def _columns(database: sqlite3.Connection) -> set[str]:
    """Return the columns of the metrics table; empty if it is a view, a virtual table or has computed columns."""
    (tables,) = database.execute(
        "SELECT count(*) FROM sqlite_master WHERE name='metrics' AND type='table' AND rootpage > 0"
    ).fetchone()
    columns = database.execute("PRAGMA table_xinfo(metrics)").fetchall()
    if not tables or any(column[6] for column in columns):
        return set()
    return {column[1] for column in columns}


@contextmanager
def table_rows(log: Storage, columns: Set[str], query: str) -> Iterator[Iterator[tuple[Any, ...]]]:
    """Open the rows of a query of the table ``metrics``, which must have some columns.

    The traceback of an error would keep a suspended generator and its database open.
    """
    try:
        with closing(_connect(log)) as database:
            if not _columns(database) >= columns:
                raise ValueError(f"it has no table metrics with the columns {', '.join(sorted(columns))}")
            # SQLite keeps a closed database open as long as a cursor.
            with closing(database.execute(query)) as found:
                yield _bounded(found, LINE_LIMIT + log.stat().size)
    except sqlite3.Error as error:
        interrupted = "the database is corrupt: it has more rows than its size permits; " * (
            str(error) == "interrupted"
        )
        raise ValueError(f"{interrupted}{error} (SQLite)") from error


def _bounded(rows: Iterator[tuple[Any, ...]], limit: int) -> Iterator[tuple[Any, ...]]:
    for row in rows:
        for value in row:
            if type(value) is str or type(value) is bytes:
                limit -= len(value)
        if limit < 0:
            raise ValueError("its rows are longer than the database: its pages refer to each other")
        yield row


def read_sqlite(log: Storage, wanted: Wanted, notes: list[str]) -> Decoded:
    """Yield the records of the trackio database: table ``metrics`` with a JSON object of metrics in each row."""
    query = "SELECT run_name, step, metrics FROM metrics ORDER BY rowid"
    number = 1
    with table_rows(log, TRACKIO_COLUMNS, query) as rows:
        while batch := list(islice(rows, _ROWS)):
            runs, steps, metrics = map(list, zip(*batch, strict=True))
            texts = [text.decode() if isinstance(text, bytes) else str(text) for text in metrics]
            numbers = range(number, number + len(batch))
            for index, found in enumerate(json_records(texts, wanted, "row", numbers, are_lines=False)):
                if isinstance(found, Batch):
                    yield replace(found, columns={RUN_KEY: runs} | dict(found.columns) | {"step": steps})
                else:
                    yield {RUN_KEY: runs[index], **found, "step": steps[index]}
            number += len(batch)
