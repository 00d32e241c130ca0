"""Read the record files that scalar loggers write: CSV, JSON lines, Parquet and SQLite.

A truncated last record is assumed to be in progress. It is left out, with a note.
"""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from io import TextIOWrapper
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from natgrad.schema.errors import InputError
from natgrad.sources.steps import local_file
from natgrad.storage import Storage

__all__ = ["holds_metrics", "read_csv", "read_json_lines", "read_parquet", "read_sqlite"]

LINE_LIMIT = 1 << 24
"""Default limit on the number of characters per line, to bound the memory."""

_BATCH = 1 << 16
COLUMN_LIMIT = 1 << 30
"""Default limit on the uncompressed size in bytes of a column in a row group."""

_SQLITE = b"SQLite format 3\0"

Records = Iterator[Mapping[str, Any]]
Wanted = Callable[[str], bool]


def _complete_lines(log: Storage, notes: list[str], limit: int = LINE_LIMIT) -> Iterator[str]:
    """Yield the lines of a text file that end with a newline."""
    content = log.open()
    content.widen()
    with TextIOWrapper(cast(BinaryIO, content), encoding="utf-8-sig", newline="") as file:
        while line := file.readline(limit):
            if not line.endswith(("\n", "\r")):
                if len(line) >= limit:
                    raise ValueError(f"it has a line of more than {limit} characters")
                notes.append(
                    f"the last line of {log.name} has no newline and is left out: it is being written or truncated"
                )
                return
            yield line


def read_csv(log: Storage, wanted: Wanted, notes: list[str]) -> Records:
    """Yield the records of a file with a header and commas, semicolons or tabs. Empty values are missing."""
    lines = _complete_lines(log, notes)
    first = next(lines, "")
    delimiter = max(",;\t", key=first.count)
    header = next(csv.reader([first], delimiter=delimiter), [])
    positions = [(position, name.strip()) for position, name in enumerate(header) if wanted(name.strip())]
    if len({name for _, name in positions}) != len(positions):
        raise ValueError(f"two columns have the same name: {', '.join(name for _, name in positions)}")
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num + 1}: {error}") from error
        if row is None:
            return
        # A restarted run may write its header again.
        if not row or row == header:
            continue
        if len(row) != len(header):
            raise ValueError(f"line {rows.line_num + 1} has {len(row)} values, but the header has {len(header)}")
        yield {name: row[position] for position, name in positions}


def read_json_lines(log: Storage, wanted: Wanted, notes: list[str], *, line_limit: int = LINE_LIMIT) -> Records:
    """Yield the records of a file with a JSON object on each line. Nested keys are joined by slashes."""
    for number, line in enumerate(_complete_lines(log, notes, line_limit), 1):
        if line.strip():
            yield _json_object(line, wanted, f"line {number}")


def _json_object(text: str, wanted: Wanted, position: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{position}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{position} is not a JSON object")
    return {key: value for key, value in _flat(values) if wanted(key)}


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    stack = [("", values)]
    while stack:
        prefix, level = stack.pop()
        for key, value in level.items():
            if isinstance(value, dict):
                stack.append((f"{prefix}{key}/", value))
            else:
                yield prefix + key, value


def read_parquet(log: Storage, wanted: Wanted, notes: list[str], *, column_limit: int = COLUMN_LIMIT) -> Records:
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
            raise ValueError(f"two columns have the same name: {', '.join(names)}")
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
            for column in columns:
                if column.path_in_schema in names and column.total_uncompressed_size > column_limit:
                    raise ValueError(
                        f"the uncompressed size of column {column.path_in_schema} exceeds {column_limit} bytes"
                    )
        for batch in file.iter_batches(_BATCH, columns=names) if names else ():
            yield from batch.to_pylist()


def holds_metrics(log: Storage) -> bool:
    """Return True if a file is a SQLite database with the metrics table that trackio writes."""
    with log.open() as file:
        if file.read(len(_SQLITE)) != _SQLITE:
            return False
    try:
        with closing(_connect(log)) as database:
            return _columns(database) >= {"run_name", "step", "metrics"}
    except sqlite3.Error:
        return False


def _connect(log: Storage) -> sqlite3.Connection:
    path = local_file(log).absolute()
    database = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)
    # Views and functions in the schema are not trusted: do not run them.
    database.execute("PRAGMA trusted_schema=OFF")
    database.execute("PRAGMA cell_size_check=ON")
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LINE_LIMIT)
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


def read_sqlite(log: Storage, wanted: Wanted, notes: list[str]) -> Records:
    """Yield the records of the trackio database: table ``metrics`` with a JSON object of metrics in each row."""
    try:
        with closing(_connect(log)) as database:
            if not _columns(database) >= {"run_name", "step", "metrics"}:
                raise ValueError("it has no table metrics with the columns run_name, step and metrics")
            rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY rowid")
            for number, (run, step, metrics) in enumerate(rows, 1):
                if isinstance(metrics, bytes):
                    metrics = metrics.decode()
                values = _json_object(str(metrics), wanted, f"row {number}")
                yield {"run_name": run, **values, "step": step}
    except sqlite3.Error as error:
        raise ValueError(f"{error} (SQLite)") from error
