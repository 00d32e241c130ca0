"""Read the metrics of MLflow: its file store, and its SQLite database.

The file store has a folder ``<experiment>/<run>/metrics`` with a file for each metric. Names of metrics may
contain slashes. Each line of a file is a time, a value and a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from natgrad.sources.scalars.record_files import Wanted, complete_lines, table_rows
from natgrad.sources.scalars.scalar_log import LINE_KEY, RUN_KEY
from natgrad.storage import Storage

__all__ = ["DATABASE_COLUMNS", "metric_files", "read_database", "read_metric_file"]

DATABASE_COLUMNS = frozenset({"key", "value", "run_uuid", "step", "is_nan"})
"""Columns of the table ``metrics`` that are read."""

_METRICS, _RUN_FILE = "metrics", "meta.yaml"
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


def read_metric_file(log: Storage, wanted: Wanted, notes: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the values of a metric: the name of its run, ``step``, and the value under the name of the metric."""
    names, folder = [log.name], log.parent
    while folder.name != _METRICS or not (folder.parent / _RUN_FILE).exists():
        names.append(folder.name)
        folder = folder.parent
    key = "/".join(reversed(names))
    if not wanted(key):
        return
    for number, line in enumerate(complete_lines(log, notes, lambda line: False), 1):
        parts = line.split()
        if len(parts) < 2:
            raise ValueError(f"line {number} does not consist of a time, a value and a step")
        step = parts[2] if len(parts) > 2 else 0  # as MLflow reads files of its first versions
        yield {LINE_KEY: number, RUN_KEY: folder.parent.name, "step": step, key: parts[1]}


def read_database(log: Storage, wanted: Wanted, notes: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of the table ``metrics``: the name of the run, ``step``, and the value of a metric."""
    query = "SELECT run_uuid, step, key, value, is_nan FROM metrics ORDER BY rowid"
    with table_rows(log, DATABASE_COLUMNS, query) as rows:
        for run, step, key, value, is_nan in rows:
            if not isinstance(key, str) or not wanted(key):
                continue
            if is_nan:
                value = math.nan
            elif isinstance(value, float) and abs(value) >= _LARGEST:
                value = math.copysign(math.inf, value)
            yield {RUN_KEY: str(run), "step": step, key: value}
