"""Where logs are and stores go: a path on this machine, or the URL of an object store.

A URL is a `upath.UPath`, which has the methods of a path, so most code need not know. What an object store has
otherwise is here. An object is written whole or not at all, by one request, and cannot be renamed; a request can
ask that an object be new, or be as it was seen; parts of an object are read by position. Credentials are those of
the library (s3fs, gcsfs): environment, files, or the role of the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import unquote

from natgrad.schema.errors import InputError, Unavailable

__all__ = [
    "Status",
    "delete",
    "delete_folder",
    "each",
    "files",
    "is_url",
    "names",
    "network_errors",
    "open_object",
    "open_to_read",
    "place",
    "put",
    "put_folder",
    "ranges",
    "read",
    "require_local",
    "seen",
    "status",
    "widen",
]

_EXTRAS = {"s3": "s3", "gs": "gcs"}
"""Schemes of object stores, and the extra of this package that each needs."""

# What another process wrote meanwhile must be seen: no listing is kept. With more than one request at a time s3fs
# asks for the size of each object first.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"use_listings_cache": False, "max_concurrency": 1},
    "gs": {"use_listings_cache": False},
}

_COLLAPSED = re.compile(rf"({'|'.join(_EXTRAS)}|file):/+")
"""A URL whose slashes pathlib made one, as command line and flows do."""

_HEADER_BYTES = 64 << 10
_BLOCK_BYTES = 4 << 20
_BLOCKS = 4

_listed: dict[str, dict[str, Any]] = {}
"""What the last listing of a URL said of the objects in it."""


class Status(NamedTuple):
    """An object as it is: its size in bytes, when it was put (ns), and the tag of its content."""

    size: int
    time: int
    tag: str


def place(path: str | Path) -> Path:
    """Path of a file or folder, on this machine or in an object store.

    Parameters
    ----------
    path : str or Path
        A path, or a URL: ``s3://bucket/key``, ``gs://bucket/key``, ``file:///folder``.

    Returns
    -------
    Path
        Of a URL, a `upath.UPath`, which has the same methods.

    Raises
    ------
    InputError
        Where the scheme is not known, or its library is not installed.
    """
    if is_url(path):
        return cast(Path, path)
    text = str(path)
    scheme, separator, _ = text.partition("://")
    found = _COLLAPSED.match(text)
    if found is None:
        if separator and re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
            raise InputError(
                f"URLs of {scheme}:// cannot be used",
                where=text,
                remedy=f"give a path, or a URL of {', '.join(f'{known}://' for known in (*_EXTRAS, 'file'))}",
            )
        return Path(path)
    scheme, rest = found[1], text[found.end() :]
    if scheme == "file":
        return Path("/" + unquote(rest))
    try:
        from upath import UPath

        made = UPath(f"{scheme}://{rest}".rstrip("/"), **_OPTIONS[scheme])
        made.fs  # noqa: B018  (imports the library of the scheme)
    except ImportError as error:
        extra = _EXTRAS[scheme]
        raise InputError(
            f"the library for {scheme}:// is not installed: {error}",
            where=text,
            remedy=f"pip install 'natgrad-pipeline[{extra}]'",
        ) from error
    return cast(Path, made)


def each(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Places of a path, or of several; see `place`."""
    if isinstance(paths, Sequence) and not isinstance(paths, str):
        return [place(path) for path in paths]
    return [place(paths)]


def is_url(path: object) -> bool:
    """Whether a place is in an object store."""
    return hasattr(path, "fs") and hasattr(path, "storage_options")


def require_local(path: str | Path, what: str) -> Path:
    """Return a path on this machine.

    Raises
    ------
    InputError
        Where it is in an object store.
    """
    found = place(path)
    if is_url(found):
        raise InputError(
            f"{what} must be a folder of this machine",
            where=str(found),
            why="it is searched, and locked, by means that object stores do not have",
            remedy="give a folder, or process each run by itself: natgrad process SOURCE OUT, which may be URLs",
        )
    return found


# Objects -----------------------------------------------------------------------------------------------------


def _system(path: Path) -> tuple[Any, str]:
    """Return the file system of a URL, and its path there."""
    url: Any = path
    return url.fs, url.path


def read(path: Path) -> bytes:
    """Content of a small file or object, by one request."""
    if not is_url(path):
        return path.read_bytes()
    system, key = _system(path)
    return system.cat_file(key)  # type: ignore[no-any-return]


def put(path: Path, content: bytes, *, new: bool = False, seen: str | None = None) -> None:
    """Write an object by one request: under its name it is the old one or the new one, whole.

    Parameters
    ----------
    path : Path
        A URL.
    content : bytes
    new : bool
        Only where there is none.
    seen : str, optional
        Only where it still has this tag (of `seen`).

    Raises
    ------
    FileExistsError
        Where there is one, or it has another tag by now.
    """
    system, key = _system(path)
    condition: dict[str, Any] = {"mode": "create"} if new else {}
    if seen is not None:
        condition["IfMatch"] = seen
    try:
        # Multipart uploads begin beyond any chunk: such an object would not be checked as it is made.
        system.pipe_file(key, content, **condition)
    except OSError as error:
        if condition and "precondition" in repr(error.__cause__ or error).lower().replace("-", ""):
            raise FileExistsError(str(path)) from error
        raise


def seen(path: Path) -> tuple[bytes, str] | None:
    """Content and tag of an object, None where there is none.

    The tag says whether it has changed; it is empty where nothing can be put on that condition (``gs://``).
    """
    system, key = _system(path)
    try:
        tag = str(system.info(key)["ETag"]) if "s3" in system.protocol else ""
        return system.cat_file(key), tag
    except FileNotFoundError:
        return None


def names(path: Path) -> list[str]:
    """Names of the files in a folder, or of the objects below a URL, in order; none where there is none."""
    if not is_url(path):
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    system, key = _system(path)
    try:
        found = {entry["name"].rpartition("/")[2]: entry for entry in system.ls(key, detail=True)}
    except FileNotFoundError:
        found = {}
    _listed[str(path)] = found
    return sorted(found)


def files(path: Path) -> list[Path]:
    """Files that a path is, or that are in the folder, in the order of their names; the same of objects."""
    if not is_url(path):
        if path.is_dir():
            return [entry for entry in sorted(path.iterdir()) if entry.is_file()]
        return [path] if path.is_file() else []
    system, key = _system(path)
    try:
        entries = [entry for entry in system.ls(key, detail=True) if entry["type"] == "file"]
    except FileNotFoundError:
        return []
    if [entry["name"] for entry in entries] == [key]:
        return [path]
    # What is below a key may hold an object of the name of the key itself, as consoles make it for a folder.
    return sorted(path / entry["name"].rpartition("/")[2] for entry in entries if entry["name"].rstrip("/") != key)


def status(path: Path, *, fresh: bool = True) -> Status:
    """Say which object is there now.

    Parameters
    ----------
    path : Path
        A URL.
    fresh : bool
        Ask for it; else, what the last listing of its folder (`names`) said of it is enough.

    Raises
    ------
    FileNotFoundError
        Where there is none.
    """
    system, key = _system(path)
    listed = None if fresh else _listed.get(str(path.parent), {}).get(path.name)
    return _status(system.info(key) if listed is None else listed)


def _status(entry: Mapping[str, Any]) -> Status:
    time = entry.get("LastModified") or entry.get("updated") or entry["mtime"]
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    tag = str(entry.get("ETag") or entry.get("etag") or "")
    # A listing may tell time more finely than a look at one object.
    return Status(int(entry["size"]), int(time.timestamp()) * 10**9, tag)


def delete(path: Path) -> None:
    """Remove an object."""
    system, key = _system(path)
    system.rm_file(key)


def delete_folder(path: Path, name: str, keep: bool = False) -> None:
    """Remove all objects below a URL; that of a name first, or not at all. That there are none is no error."""
    system, key = _system(path)
    found = system.find(key)
    if f"{key}/{name}" in found:
        found.remove(f"{key}/{name}")
        if not keep:
            system.rm_file(f"{key}/{name}")
    # Names of several are taken for patterns, and of one object for its name.
    if any(mark in name for name in found for mark in "*?["):
        for name in found:
            system.rm_file(name)
    elif found:
        system.rm(found)


def put_folder(folder: Path, path: Path, last: str, mark: bytes | None = None) -> None:
    """Write a folder of this machine in place of what is below a URL.

    Parameters
    ----------
    folder, path : Path
    last : str
        Name of the file that makes the others valid: the old one is removed first, the new one comes last. So who
        opens meanwhile finds the old objects, none, or the new ones.
    mark : bytes, optional
        What stands under that name meanwhile, to say whose the objects are.
    """
    if mark is not None:
        put(path / last, mark)
    delete_folder(path, last, keep=mark is not None)
    files = [entry for entry in sorted(folder.rglob("*")) if entry.is_file() and entry != folder / last]
    system, key = _system(path)
    system.pipe({f"{key}/{file.relative_to(folder).as_posix()}": file.read_bytes() for file in files})
    put(path / last, (folder / last).read_bytes())


def ranges(path: Path, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read ranges of bytes of an object, at the same time.

    Raises
    ------
    FileNotFoundError
        Where there is no object.
    """
    system, key = _system(path)
    starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
    return system.cat_ranges([key] * len(spans), starts, stops, on_error="raise")  # type: ignore[no-any-return]


def open_object(path: Path) -> Any:
    """Open an object for reading anywhere: it is fetched in blocks, of which the last few are kept.

    Blocks are small, for what describes the data, until `widen` says that the data come. All are of the object that
    was opened: one that is put in its place meanwhile is an error (OSError).
    """
    system, key = _system(path)
    kept = {"maxblocks": _BLOCKS}
    return system.open(key, "rb", block_size=_HEADER_BYTES, cache_type="blockcache", cache_options=kept)


def open_to_read(path: Path) -> BinaryIO:
    """Open a file, or an object, that is read from its begin to its end; it closes with its context."""
    if not is_url(path):
        return path.open("rb")
    file = open_object(path)
    widen(file)
    return cast(BinaryIO, file)


def widen(file: Any) -> None:
    """Fetch an open object in large blocks from now on."""
    from fsspec.caching import BlockCache

    file.cache = BlockCache(_BLOCK_BYTES, file._fetch_range, file.size, maxblocks=_BLOCKS)


# Errors ------------------------------------------------------------------------------------------------------

_NETWORK = ("aiobotocore", "aiohttp", "asyncio", "botocore", "fsspec", "gcsfs", "google", "icechunk", "s3fs")
"""Libraries whose errors are those of an object store."""


@contextmanager
def network_errors(*paths: Path) -> Iterator[None]:
    """Turn what an object store refuses, or does not answer, into a message; on this machine, do nothing.

    Raises
    ------
    InputError
        Where a bucket or an object is missing, or access is denied. Of it, `Unavailable` where the store does not
        answer, or fails: this may pass.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        urls = [path for path in paths if is_url(path)]
        refusal = _refusal(error, ", ".join(map(str, urls))) if urls else None
        if refusal is None:
            raise
        raise refusal from error


def _refusal(error: Exception, where: str) -> InputError | None:
    names = {kind.__name__ for kind in type(error).__mro__}
    library = type(error).__module__.partition(".")[0]
    if library not in _NETWORK and not isinstance(error, OSError):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        # Of this machine, where the other end of a run is.
        return None
    if "FileExpired" in names:
        return Unavailable(
            f"the object changed while it was read: {error}",
            where=where,
            why="another one was put in its place",
            remedy="run again: what is committed is kept",
        )
    # Icechunk tells in one text where it was, line by line, and why at the end.
    said = str(error).strip().rpartition("-> ")[2] if library == "icechunk" else str(error)
    denied = library == "icechunk" and any(word in said for word in ("AccessDenied", "Forbidden"))
    if denied or isinstance(error, PermissionError) or any("Credential" in name for name in names):
        return InputError(
            f"the object store denies access: {said}",
            where=where,
            why="no credentials were found, or they do not allow this",
            remedy="set the credentials of the library (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile; "
            "docs/objects.md), or have access granted",
        )
    if isinstance(error, FileNotFoundError):
        return InputError(
            f"it is not in the object store: {error}",
            where=where,
            why="the bucket was never made, its name is misspelt, or the object was removed meanwhile",
            remedy="make the bucket, or give another URL",
        )
    return Unavailable(
        f"the object store does not answer: {type(error).__name__}: {said}",
        where=where,
        why="the network or the store failed, or the address of the store is wrong (AWS_ENDPOINT_URL)",
        remedy="run again: what is committed is kept",
    )
