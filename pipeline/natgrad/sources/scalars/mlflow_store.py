"""Read the metrics of MLflow: its file store, and its SQLite database.

The file store has a folder ``<experiment>/<run>/metrics`` with a file for each metric. Names of metrics may
contain slashes. Each line of a file is a time, a value and a step.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

from natgrad.sources.bounds import read_limited
from natgrad.sources.scalars.columns import RUN_KEY, Batch, Decoded, columns_by_name
from natgrad.sources.scalars.record_files import Wanted, complete_blocks, table_rows
from natgrad.storage import Storage

__all__ = [
    "DATABASE_COLUMNS",
    "metric_files",
    "read_database",
    "read_database_parameters",
    "read_metric_file",
    "read_parameters",
]

DATABASE_COLUMNS = frozenset({"key", "value", "run_uuid", "step", "is_nan"})
"""Columns of the table ``metrics`` that are read."""

_METRICS, _PARAMETERS, _RUN_FILE = "metrics", "params", "meta.yaml"
_TEXT_LIMIT = 1 << 16
_ROWS = 1 << 9
"""Rows of a database that are decoded together."""
_LARGEST = 1.7976931348623157e308
"""Number that MLflow writes into its database for infinity."""


def metric_files(location: Storage) -> list[Storage]:
    """Return the files of all metrics at a location: the store, an experiment, a run or the metrics of a run."""
    if not location.is_folder():
        return []
    level = [location.parent] if location.name == _METRICS else [location]
    for _ in range(3):
        runs = [entry for entry in level if (entry / _RUN_FILE).exists() and (entry / _METRICS).is_folder()]
        if runs:
            return [run / _METRICS / name for run in runs for name in (run / _METRICS).walk()]
        level = [folder for entry in level for name in entry.list() if (folder := entry / name).is_folder()]
    return []


def read_metric_file(log: Storage, wanted: Wanted, notes: list[str]) -> Decoded:
    """Yield the values of a metric: the name of its run, ``step``, and the value under the name of the metric."""
    names, folder = [log.name], log.parent
    while folder.name != _METRICS or not (folder.parent / _RUN_FILE).exists():
        names.append(folder.name)
        folder = folder.parent
    key = "/".join(reversed(names))
    if not wanted(key):
        return
    number = 1
    for block in complete_blocks(log, notes, lambda line: False):
        rows = [line.split() for line in block[:-1].split("\n")]
        for line, row in enumerate(rows, number):
            if len(row) < 2:
                raise ValueError(f"line {line} does not consist of a time, a value and a step")
        # Files of the first versions have no steps, which MLflow reads as 0.
        steps, values = [row[2] if len(row) > 2 else "0" for row in rows], [row[1] for row in rows]
        columns = {RUN_KEY: [folder.parent.name] * len(rows), "step": steps, key: values}
        yield Batch(len(rows), columns, range(number, number + len(rows)))
        number += len(rows)


def read_parameters(log: Storage) -> dict[str, dict[str, Any]]:
    """Return the parameters of the run of a metric, each of which is a file."""
    folder = log.parent
    while folder.name != _METRICS or not (folder.parent / _RUN_FILE).exists():
        folder = folder.parent
    parameters = folder.parent / _PARAMETERS
    names = parameters.walk() if parameters.is_folder() else []
    return {folder.parent.name: {name: read_limited(parameters / name, _TEXT_LIMIT).decode() for name in names}}


def read_database_parameters(log: Storage) -> dict[str, dict[str, Any]]:
    """Return the rows of the table ``params``, by run."""
    found: dict[str, dict[str, Any]] = {}
    with table_rows(log, DATABASE_COLUMNS, "SELECT run_uuid, key, value FROM params ORDER BY rowid") as rows:
        for run, key, value in rows:
            found.setdefault(str(run), {})[str(key)] = value
    return found


def read_database(log: Storage, wanted: Wanted, notes: list[str]) -> Decoded:
    """Yield the rows of the table ``metrics``: the name of the run, ``step``, and the value of a metric."""
    query = "SELECT run_uuid, step, key, value, is_nan FROM metrics ORDER BY rowid"
    with table_rows(log, DATABASE_COLUMNS, query) as rows:
        while batch := list(islice(rows, _ROWS)):
            chosen = [row for row in batch if isinstance(row[2], str) and wanted(row[2])]
            if not chosen:
                continue
            runs, steps, keys, stored, are_nan = map(list, zip(*chosen, strict=True))
            runs = list(map(str, runs))
            values = [
                math.nan if is_nan else _value_of(value) for value, is_nan in zip(stored, are_nan, strict=True)
            ]
            columns = columns_by_name(keys, values, wanted)
            if columns is not None and not columns.keys() & {RUN_KEY, "step"}:
                yield Batch(len(chosen), {RUN_KEY: runs, "step": steps} | columns)
                continue
            for run, step, key, value in zip(runs, steps, keys, values, strict=True):
                yield {RUN_KEY: run, "step": step, key: value}


def _value_of(stored: Any) -> Any:
    if isinstance(stored, float) and abs(stored) >= _LARGEST:
        return math.copysign(math.inf, stored)
    return stored
