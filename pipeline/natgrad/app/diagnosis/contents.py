"""Describe the entries of a folder, or a file, by kind: numbers, first and last names."""

from __future__ import annotations

import os
import re
import stat
from itertools import islice
from pathlib import Path, PurePath

from natgrad.schema.errors import InputError
from natgrad.sources.search import skeleton
from natgrad.storage import Storage, network_errors, open_regular

__all__ = ["contents_of"]

_ENTRIES_LIMIT = 100_000
_KINDS = 12
_COMPRESSED = (".gz", ".tar", ".bz2", ".xz", ".zip")
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive, such as .npz and files of torch.save",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
    b"SQLite format 3\x00": "a SQLite database",
    b"PAR1": "a Parquet file",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"%PDF": "a PDF file",
    b"\x80": "a pickle file",
    b"{": "a JSON file",
}
_SPECIAL = {
    stat.S_ISFIFO: "named pipe",
    stat.S_ISSOCK: "socket",
    stat.S_ISCHR: "device",
    stat.S_ISBLK: "device",
}


def contents_of(location: Storage) -> dict[str, str]:
    """Return a description of each kind of entries, the most frequent ones first. No file in a folder is opened."""
    path = location.local_path
    if path is not None and not path.is_dir():
        return {"file": _file(path)}
    groups: dict[str, list[str]] = {}
    if path is None:
        with network_errors(location):
            names = list(islice(location.list(), _ENTRIES_LIMIT))
        for name in names:
            groups.setdefault(_ending(name), []).append(name)
    else:
        try:
            with os.scandir(path) as entries:
                for entry in islice(entries, _ENTRIES_LIMIT):
                    groups.setdefault(_kind(entry), []).append(entry.name)
        except OSError as error:
            raise InputError(
                f"cannot list the folder: {error.strerror}", where=str(path), remedy="make the folder readable"
            ) from error
    if not groups:
        return {"nothing": "the folder is empty"}
    ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    shown = {kind: _range(names) for kind, names in ordered[:_KINDS]}
    others = sum(len(names) for _, names in ordered[_KINDS:])
    return shown | ({"others": f"{others} entries of {len(ordered) - _KINDS} kinds"} if others else {})


def _kind(entry: os.DirEntry[str]) -> str:
    """Return the kind of an entry, by its type and the form or the ending of its name."""
    try:
        mode = entry.stat().st_mode
    except OSError:
        return "broken links"
    special = next((name for is_kind, name in _SPECIAL.items() if is_kind(mode)), "")
    if special:
        return f"{special}s"
    if stat.S_ISDIR(mode):
        form = skeleton(entry.name)
        return f"folders {form.replace('#', '<N>')}" if "#" in form else "folders"
    return _ending(entry.name)


def _ending(name: str) -> str:
    path = PurePath(name)
    suffix = path.suffix
    if suffix in _COMPRESSED:
        suffix = PurePath(path.stem).suffix + suffix
    return f"files {suffix}" if suffix and not suffix[1:].isdecimal() else "files without ending"


def _range(names: list[str]) -> str:
    """Return the number of names, and the first and last of them; numbers are compared by value."""
    names = sorted(names, key=_by_number)
    return f"{len(names)}, {names[0]}" + (f" to {names[-1]}" if names[1:] else "")


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]{1,18})", name)]


def _file(path: Path) -> str:
    """Describe a file by its size and its first bytes, if it is a regular file."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(
            f"cannot examine the file: {error.strerror}", where=str(path), remedy="pass an existing file or folder"
        ) from error
    special = next((name for is_kind, name in _SPECIAL.items() if is_kind(status.st_mode)), "")
    if special:
        return f"a {special}, which is not opened"
    try:
        descriptor = open_regular(path)
    except OSError as error:
        return f"{status.st_size} bytes, not readable: {error.strerror}"
    try:
        start = os.read(descriptor, 16)
    finally:
        os.close(descriptor)
    kind = next((kind for signature, kind in _SIGNATURES.items() if start.startswith(signature)), "")
    return f"{status.st_size} bytes" + (f", {kind}" if kind else "")
