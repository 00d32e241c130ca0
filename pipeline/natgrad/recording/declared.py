"""Store what a user declares about a run in files next to its log."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from natgrad.schema.configuration import CONFIGURATION_FILE
from natgrad.schema.errors import InputError

__all__ = ["declare", "store_configuration"]


def declare(folder: Path, name: str, value: Any, *, argument: str) -> None:
    """Write a value into ``natgrad.toml`` of a new log, or check that an existing log has the value.

    Parameters
    ----------
    folder : Path
    name : str
        Top-level key of the file.
    value : object
        None for the absence of the key.
    argument : str
        The argument of the user, for the error.

    Raises
    ------
    InputError
        If the file cannot be read, or if the log has another value.
    """
    path = folder / "natgrad.toml"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    try:
        found = tomllib.loads(text).get(name)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"cannot read the mapping file: {error}", where=str(path), remedy="correct it") from error
    if found == value:
        return
    if found is None and not any(folder.glob("step_*")):
        # Keys must precede tables.
        path.write_text(f"{name} = {json.dumps(value)}\n{text}", encoding="utf-8")
        return
    states = f"no {name}" if found is None else f"{name} = {json.dumps(found)}"
    raise InputError(
        f"{argument} does not fit the log in the folder",
        where=str(path),
        why=f"the log has {states}, and its states are read accordingly",
        remedy="use another folder, or the value of the existing log",
    )


def store_configuration(folder: Path, configuration: Mapping[str, Any] | None) -> None:
    """Write the configuration of a run into the folder of its log. That of a resumed run replaces the previous one.

    Parameters
    ----------
    folder : Path
    configuration : mapping, optional
        From `natgrad.schema.configuration.declared_configuration`.
    """
    if configuration is not None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(configuration, indent=1, ensure_ascii=False)
        (folder / CONFIGURATION_FILE).write_text(text, encoding="utf-8")
