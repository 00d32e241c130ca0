"""Open a location: the one place where paths and URLs are parsed, and the table of URL schemes.

A location is opened once, at the edge of the program (`open_storage`, and `open_out` for OUT), and the handle is
passed down. To add a kind of storage, write a subclass of `natgrad.storage.Storage` and an entry point of the group
``natgrad.storage`` whose name is the URL scheme.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

from natgrad.schema.errors import InputError
from natgrad.storage.base import Storage, no_versions
from natgrad.storage.local import LocalStorage
from natgrad.storage.network import network_errors

__all__ = ["KINDS", "Location", "open_all", "open_out", "open_storage", "require_local"]

KINDS = ("plain", "icechunk")
"""Choices for ``--store``. An Icechunk repository keeps every commit as a version."""

Location = str | Path | Storage
"""A location from a user: a path, a URL or an open handle."""

Opener = Callable[[str], Storage]
"""Function that opens a URL; the entry points of the group ``natgrad.storage`` are such functions."""

_GROUP = "natgrad.storage"
_BUILT_IN = {
    "file": "natgrad.storage.local:open_local",
    "s3": "natgrad.storage.objects:open_objects",
    "gs": "natgrad.storage.objects:open_objects",
}
"""URL schemes and the functions that open them. Entry points of the group ``natgrad.storage`` add more."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(/+)")


def open_storage(location: Location) -> Storage:
    """Open a path or URL. No request is made. This is the only function that parses locations.

    Parameters
    ----------
    location : str, Path or Storage
        A path or a URL (``s3://bucket/key``, ``gs://bucket/key``, ``file:///folder``). Slashes that `pathlib`
        collapsed are restored. A handle is returned unchanged.

    Returns
    -------
    Storage

    Raises
    ------
    InputError
        If the scheme is unknown, or the library for it is not installed.
    """
    if isinstance(location, Storage):
        return location
    if not isinstance(location, str | Path) or not str(location).strip():
        raise InputError(
            f"{location!r} is not a path or URL",
            where="location",
            remedy="use the path of a file or folder, or a URL",
        )
    text = str(location)
    found = _SCHEME.match(text)
    opener = None if found is None else _opener(found[1])
    if found is None or opener is None:
        if found is not None and found[2] == "//":
            raise InputError(
                f"unknown URL scheme {found[1]}://",
                where=text,
                remedy=f"use a path, or a URL with one of the schemes {', '.join(_schemes())}",
            )
        return LocalStorage(text)
    slashes = "///" if found[1] == "file" else "//"
    return opener(f"{found[1]}:{slashes}{text[found.end() :]}")


def open_out(out: Location, *, kind: str | None = None, version: str | None = None) -> Storage:
    """Open the folder OUT of a run, which may be an Icechunk repository.

    Parameters
    ----------
    out : str, Path or Storage
        See `open_storage`.
    kind : str, optional
        Kind of storage for a new OUT, one of `KINDS`. The kind of an existing OUT is detected.
    version : str, optional
        Identifier, tag or time (ISO 8601) of a version to read; the latest by default.

    Returns
    -------
    Storage
        Location of the stores in OUT.

    Raises
    ------
    InputError
        If the location cannot be opened, OUT is a file or has another kind, or the version does not exist.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(
            f"unknown storage kind {kind!r}", where="--store", remedy=f"choose one of: {', '.join(KINDS)}"
        )
    storage = open_storage(out)
    if storage.keeps_versions and version is None:
        return storage
    plain = storage.unversioned()
    with network_errors(plain):
        if plain.local_path is not None:
            _require_folder(plain.local_path, "OUT")
        if plain.holds_versions(kind):
            return _open_repository(plain, version)
    if version is not None:
        raise no_versions(str(plain))
    return plain


def _open_repository(plain: Storage, version: str | None) -> Storage:
    try:
        from natgrad.storage.icechunk_storage import open_repository
    except ImportError as error:
        raise InputError(
            f"the library for Icechunk is not installed: {error}",
            where=str(plain),
            why="OUT is an Icechunk repository, or --store icechunk requests one",
            remedy="pip install 'natgrad-pipeline[icechunk]'",
        ) from error
    return open_repository(plain, version)


def _schemes() -> list[str]:
    names = {*_BUILT_IN, *(point.name for point in entry_points(group=_GROUP))}
    return [f"{name}://" for name in sorted(names)]


def _opener(scheme: str) -> Opener | None:
    if scheme in _BUILT_IN:
        module, _, name = _BUILT_IN[scheme].partition(":")
        return cast(Opener, getattr(import_module(module), name))
    for point in entry_points(group=_GROUP, name=scheme):
        try:
            return cast(Opener, point.load())
        except Exception as error:  # code of another distribution may raise any exception
            owner = "an unknown distribution" if point.dist is None else point.dist.name
            raise InputError(
                f"the storage for {scheme}:// cannot be loaded: {type(error).__name__}: {error}",
                where=f"entry point {point.value!r} of {owner}",
                why="the distribution is broken, or one of its requirements is missing",
                remedy=f"install {owner} again, or copy the data to a folder",
            ) from error
    return None


def open_all(locations: Location | Sequence[Location]) -> list[Storage]:
    """Open one or several locations; see `open_storage`."""
    if isinstance(locations, str | Path | Storage):
        return [open_storage(locations)]
    return [open_storage(location) for location in locations]


def require_local(location: Location, what: str) -> Path:
    """Return the path of a folder on this machine, which may not exist yet.

    Parameters
    ----------
    location : str, Path or Storage
    what : str
        Name of the option, for the message.

    Raises
    ------
    InputError
        If the location is not on this machine, or is a file.
    """
    storage = open_storage(location)
    if storage.local_path is None:
        raise InputError(
            f"{what} must be a folder on this machine",
            where=str(storage),
            why="finding and locking many runs needs features that object stores lack",
            remedy="use a folder, or process each run separately: natgrad process SOURCE OUT, which accepts URLs",
        )
    _require_folder(storage.local_path, what)
    return storage.local_path


def _require_folder(path: Path, what: str) -> None:
    """Raise InputError if the path, or the nearest of its parents that exists, is not a folder."""
    found = next((one for one in (path, *path.parents) if os.path.lexists(one)), None)
    if found is not None and not found.is_dir():
        raise InputError(
            f"{what} must be a folder, but {'it' if found == path else found} is not one",
            where=str(path),
            why="a file or a broken link has this name",
            remedy="choose another folder, or remove the file or link",
        )
