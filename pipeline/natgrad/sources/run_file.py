"""Read run files: TOML files that list the logs of one run and their options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natgrad.schema.errors import InputError
from natgrad.sources.bounds import parse_toml
from natgrad.sources.names import MAPPED, checked_shift
from natgrad.sources.step_names import checked_pattern
from natgrad.storage import LocalStorage, Storage, open_storage

__all__ = ["RUN_FILE", "ListedLog", "find_run_file", "listed_logs", "run_file_options"]

RUN_FILE = "run.toml"
"""Name of a run file that a folder can contain; opening the folder then opens the run file."""


@dataclass(frozen=True)
class ListedLog:
    """A log that a run file lists, with its options.

    Attributes
    ----------
    path : str
        Path as written in the run file.
    location : Storage
        The same path, resolved relative to the folder of the run file.
    format : str, optional
        Value of ``--format``.
    map, shift : mapping
        Values of ``--map`` and ``--shift``.
    pattern : str
        Value of ``--pattern``; empty if there is none.
    """

    path: str
    location: Storage
    format: str | None
    map: Mapping[str, Any]
    shift: Mapping[str, int]
    pattern: str = ""


def find_run_file(location: Storage) -> Storage | None:
    """Return the run file at a location, or the ``run.toml`` in a local folder; None if there is none."""
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
        If the file cannot be read, or if the entry of a log is invalid.
    """
    return [
        ListedLog(
            entry["path"],
            _located(file, entry["path"]),
            entry.get("format"),
            entry.get("map", {}),
            checked_shift(entry.get("shift", {}), f"{file}, shift of {entry['path']!r}"),
            _pattern(entry, file),
        )
        for entry in _entries(file)
    ]


def _pattern(entry: Mapping[str, Any], file: Storage) -> str:
    pattern = str(entry.get("pattern", ""))
    return checked_pattern(pattern, f"{file}, pattern of {entry['path']!r}") if "pattern" in entry else ""


def _located(file: Storage, path: str) -> Storage:
    """Return the location of a listed log: a URL, or a path relative to the folder of the run file."""
    listed = open_storage(path)
    if listed.local_path is None:
        return listed
    if file.local_path is None:
        return file.parent if path in ("", ".") else file.parent / path.removeprefix("./")
    return LocalStorage(file.local_path.parent / listed.local_path)


def _entries(file: Storage) -> list[dict[str, Any]]:
    """Return the ``[[source]]`` tables of a run file, with ``map`` and ``shift`` checked to be tables."""

    def refuse(what: str) -> InputError:
        return InputError(
            what,
            where=str(file),
            remedy='write a table [[source]] for each log, with path = "FOLDER" and, if needed, format = "NAME", '
            'map = { QUANTITY = "KEY" }, shift = { QUANTITY = -1 } and pattern = "NAME{step}"',
        )

    try:
        table = parse_toml(file)
    except (OSError, ValueError) as error:
        raise refuse(f"cannot read the run file: {error}") from error
    entries = table.pop("source", None)
    if table or not isinstance(entries, list) or not entries:
        raise refuse(f"the run file has {'unknown keys: ' + ', '.join(table) if table else 'no [[source]]'}")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise refuse("a [[source]] has no path")
        unknown = set(entry) - {"path", "format", "map", "shift", "pattern"}
        tables = [entry.get(name, {}) for name in ("map", "shift")]
        if unknown or not all(isinstance(table, dict) for table in tables):
            raise refuse(
                f"source {entry['path']!r} has {', '.join(sorted(unknown)) or 'a map or shift that is not a table'}"
            )
        for quantity, key in entry.get("map", {}).items():
            if quantity not in MAPPED or not isinstance(key, str) or not key:
                raise refuse(
                    f"source {entry['path']!r} maps {quantity!r}, which is not a quantity, or not to a key"
                )
        if not isinstance(entry.get("format", ""), str):
            raise refuse(f"the format of source {entry['path']!r} is not a string")
        if Path(entry["path"]).suffix == ".toml":
            raise refuse(f"source {entry['path']!r} is itself a run file")
    return entries


def run_file_options(location: Storage) -> dict[str, list[dict[str, Any]]] | None:
    """Return the maps, shifts and patterns of the logs in a run file, by path; None if it is not a run file.

    Raises
    ------
    InputError
        If the run file cannot be read.
    """
    run_file = find_run_file(location)
    if run_file is None:
        return None
    options: dict[str, list[dict[str, Any]]] = {}
    for log in listed_logs(run_file):
        named = {"pattern": log.pattern} if log.pattern else {}
        options.setdefault(log.path, []).append({"map": log.map, "shift": log.shift, **named})
    return options
