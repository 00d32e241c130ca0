"""A run file: the logs of one run in a TOML file, and how each of them is read."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natgrad.schema.errors import InputError
from natgrad.sources.names import checked_shift
from natgrad.storage import LocalStorage, Storage, open_storage

__all__ = ["RUN_FILE", "ListedLog", "find_run_file", "listed_logs", "run_file_options"]

RUN_FILE = "run.toml"
"""Run file that stands for the folder it is in."""


@dataclass(frozen=True)
class ListedLog:
    """A log that a run file lists, and how it is read.

    Attributes
    ----------
    path : str
        As written.
    location : Storage
        The same, relative to the folder of the run file.
    format : str, optional
        As of ``--format``.
    map, shift : mapping
        As of ``--map`` and ``--shift``.
    """

    path: str
    location: Storage
    format: str | None
    map: Mapping[str, Any]
    shift: Mapping[str, int]


def find_run_file(location: Storage) -> Storage | None:
    """Return the run file at a location, or in the folder that it stands for (in a folder of this machine only)."""
    path = location.local_path
    if path is None:
        return location if location.suffix == ".toml" else None
    path = path / RUN_FILE if path.is_dir() else path
    return LocalStorage(path) if path.suffix == ".toml" and path.is_file() else None


def listed_logs(file: Storage) -> list[ListedLog]:
    """Return the logs that a run file lists.

    Raises
    ------
    InputError
        Where it cannot be read, or does not say of each log how it is read.
    """
    return [
        ListedLog(
            entry["path"],
            _located(file, entry["path"]),
            entry.get("format"),
            entry.get("map", {}),
            checked_shift(entry.get("shift", {}), f"{file}, shift of {entry['path']!r}"),
        )
        for entry in _entries(file)
    ]


def _located(file: Storage, path: str) -> Storage:
    """Return the location of a listed log: a URL, or a path from the folder of the run file."""
    listed = open_storage(path)
    if listed.local_path is None:
        return listed
    if file.local_path is None:
        return file.parent if path in ("", ".") else file.parent / path.removeprefix("./")
    return LocalStorage(file.local_path.parent / listed.local_path)


def _entries(file: Storage) -> list[dict[str, Any]]:
    """Return the tables ``[[source]]`` of a run file, their ``map`` and ``shift`` checked to be tables."""

    def refuse(what: str) -> InputError:
        return InputError(
            what,
            where=str(file),
            remedy='write a table [[source]] for each, with path = "FOLDER", and format = "NAME", '
            'map = { QUANTITY = "KEY" } and shift = { QUANTITY = -1 } where needed',
        )

    try:
        table = tomllib.loads(file.get().decode())
    except (OSError, ValueError) as error:
        raise refuse(f"cannot read the run file: {error}") from error
    entries = table.pop("source", None)
    if table or not isinstance(entries, list) or not entries:
        raise refuse(f"the run file has {', '.join(table) or 'no [[source]]'}")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise refuse("a source has no path")
        unknown = set(entry) - {"path", "format", "map", "shift"}
        tables = [entry.get(name, {}) for name in ("map", "shift")]
        if unknown or not all(isinstance(table, dict) for table in tables):
            raise refuse(
                f"source {entry['path']!r} has {', '.join(sorted(unknown)) or 'a map or shift that is no table'}"
            )
        if not isinstance(entry.get("format", ""), str):
            raise refuse(f"the format of source {entry['path']!r} is no name")
        if Path(entry["path"]).suffix == ".toml":
            raise refuse(f"source {entry['path']!r} is a run file itself")
    return entries


def run_file_options(location: Storage) -> dict[str, list[dict[str, Any]]] | None:
    """Return maps and shifts of the logs of a run file, by their paths; None where the location is no run file.

    Raises
    ------
    InputError
        Where it cannot be read.
    """
    run_file = find_run_file(location)
    if run_file is None:
        return None
    options: dict[str, list[dict[str, Any]]] = {}
    for log in listed_logs(run_file):
        options.setdefault(log.path, []).append({"map": log.map, "shift": log.shift})
    return options
