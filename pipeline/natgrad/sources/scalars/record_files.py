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
from io import TextIOWrapper
from itertools import islice
from operator import itemgetter
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from natgrad.schema.errors import InputError
from natgrad.sources.bounds import Budget, parse_json, shown
from natgrad.sources.changes import change_time, changed_lately
from natgrad.sources.scalars.columns import LINE_KEY, Batch, Decoded
from natgrad.sources.scalars.scalar_log import RESTART_KEY, RUN_KEY
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


def complete_lines(
    log: Storage, notes: list[str], is_record: Callable[[str], bool], limit: int = LINE_LIMIT
) -> Iterator[str]:
    """Yield the lines of a text file.

    A last line without a newline is omitted, unless it is a record and the file has not changed recently.
    """
    with TextIOWrapper(open_text(log), encoding="utf-8-sig", newline="") as file:
        while block := file.read(min(limit, _BLOCK)):
            # The block ends within a line, or between the two characters of a line break.
            block += file.readline(limit) if not block.endswith("\n") else ""
            ends = block.endswith(("\n", "\r"))
            *_, last = lines = list(io.StringIO(block, newline=""))
            if len(last) > limit or (not ends and len(last) == limit):
                raise ValueError(f"it has a line of more than {limit} characters")
            yield from lines if ends else lines[:-1]
            if ends:
                continue
            if changed_lately(change_time(log)) or not is_record(last):
                notes.append(
                    f"the last line of {log.name} has no newline and is omitted: it is being written or truncated"
                )
                return
            notes.append(
                f"the last line of {log.name} has no newline; it is read, as the file is no longer written"
            )
            yield last


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

    lines = complete_lines(log, notes, is_record)
    first = next(lines, "")
    delimiter = max(",;\t", key=first.count)
    if first.count(delimiter) > COLUMNS_LIMIT:
        raise ValueError(f"its header has more than {COLUMNS_LIMIT} columns")
    header = next(csv.reader([first], delimiter=delimiter), [])
    positions = [(position, name.strip()) for position, name in enumerate(header) if wanted(name.strip())]
    if len({name for _, name in positions}) != len(positions):
        raise _same_name([name for _, name in positions])
    long = _long_columns([name.strip().lower() for name in header])
    columns = {name: itemgetter(position) for position, name in positions}
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = rows.line_num + 2  # the reader does not count the header
        try:
            batch = list(islice(rows, _ROWS))
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num + 1}: {error}") from error
        if not batch:
            return
        are_lines = rows.line_num + 2 - line == len(batch)
        plain = are_lines and long is None and RUN_KEY not in columns
        if plain and {*map(len, batch)} == {len(header)} and header not in batch:
            yield Batch(len(batch), {name: list(map(of, batch)) for name, of in columns.items()}, line)
            continue
        for row in batch:
            line += 1 + sum(len(_LINE_BREAK.findall(value)) for value in row)
            if row == header:  # a restarted run may write its header again
                yield {RESTART_KEY: None}
            elif row:
                yield {LINE_KEY: line - 1, **_values(row, len(header), line - 1, columns, long, wanted)}


def _values(
    row: list[str],
    width: int,
    line: int,
    columns: Mapping[str, Callable[[list[str]], str]],
    long: tuple[int, int] | None,
    wanted: Wanted,
) -> dict[str, str]:
    """Return the wanted values of a row of a CSV file."""
    if len(row) != width:
        raise ValueError(f"line {line} has {len(row)} values, but the header has {width}")
    values = {name: of(row) for name, of in columns.items()}
    if long is not None:
        metric = row[long[0]].strip()
        if metric in values:
            raise ValueError(f"line {line} has a metric named {shown(metric)}, like a column")
        values |= {metric: row[long[1]]} if wanted(metric) else {}
    return values


def _long_columns(header: Sequence[str]) -> tuple[int, int] | None:
    """Return the positions of metric and value in the header of a long table; None for other tables."""
    metrics = [position for position, name in enumerate(header) if name in _METRICS]
    values = [position for position, name in enumerate(header) if name == _VALUE]
    return (metrics[0], values[0]) if len(metrics) == len(values) == 1 else None


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


def read_json_lines(log: Storage, wanted: Wanted, notes: list[str], *, line_limit: int = LINE_LIMIT) -> Records:
    """Yield the records of a file with a JSON object on each line. Nested keys are joined by slashes."""
    for number, line in enumerate(complete_lines(log, notes, _is_json, line_limit), 1):
        if line.strip():
            yield {LINE_KEY: number, **_json_object(line, wanted, f"line {number}")}


def _is_json(line: str) -> bool:
    try:
        parse_json(line, "the last line")
    except ValueError:
        return False
    return True


def _json_object(text: str, wanted: Wanted, position: str) -> dict[str, Any]:
    values = parse_json(text, position)
    if not isinstance(values, dict):
        raise ValueError(f"{position} is not a JSON object")
    if not any(isinstance(value, dict) for value in values.values()):
        return {key: value for key, value in values.items() if wanted(key)}
    found: dict[str, Any] = {}
    for key, value in _flat(values, Budget(len(text))):
        if wanted(key):
            if key in found:
                raise ValueError(f"{position} contains {shown(key)} twice")
            found[key] = value
    return found


def _flat(values: Mapping[str, Any], budget: Budget) -> Iterator[tuple[str, Any]]:
    stack = [("", values)]
    while stack:
        prefix, level = stack.pop()
        budget.spend(characters=len(prefix) * len(level))
        for key, value in level.items():
            if isinstance(value, dict):
                stack.append((f"{prefix}{key}/", value))
            else:
                yield prefix + key, value


def read_parquet(log: Storage, wanted: Wanted, notes: list[str], *, group_limit: int = GROUP_LIMIT) -> Records:
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
            yield from batch.to_pylist()


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
        limit -= sum(len(value) for value in row if isinstance(value, str | bytes))
        if limit < 0:
            raise ValueError("its rows are longer than the database: its pages refer to each other")
        yield row


def read_sqlite(log: Storage, wanted: Wanted, notes: list[str]) -> Records:
    """Yield the records of the trackio database: table ``metrics`` with a JSON object of metrics in each row."""
    query = "SELECT run_name, step, metrics FROM metrics ORDER BY rowid"
    with table_rows(log, TRACKIO_COLUMNS, query) as rows:
        for number, (run, step, metrics) in enumerate(rows, 1):
            text = metrics.decode() if isinstance(metrics, bytes) else str(metrics)
            yield {"run_name": run, **_json_object(text, wanted, f"row {number}"), "step": step}
