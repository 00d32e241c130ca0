"""Object stores: S3 and Google Cloud Storage, accessed with fsspec.

One request writes a complete object. An object is never partly written, and cannot be renamed. A write can be
conditional: the object must not exist, or must have a certain tag. Ranges of an object are read by position. The
library (s3fs, gcsfs) finds credentials in the environment, in files, or from the role of the machine.
"""

from __future__ import annotations

import builtins
import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Self, cast

from natgrad.schema.errors import InputError
from natgrad.storage.base import Stat, Storage, StoredFile
from natgrad.storage.network import user_error

__all__ = ["ObjectStorage", "open_objects"]

_EXTRAS = {"s3": "s3", "gs": "gcs"}
"""Extra of this package that installs the library, by URL scheme."""

# Listings are not cached, so that writes of other processes are visible. With concurrent reads of one object, s3fs
# would first request its size.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"use_listings_cache": False, "max_concurrency": 1},
    "gs": {"use_listings_cache": False},
}

REPOSITORY = "stores.icechunk"
"""Name of the Icechunk repository in OUT. It is a separate prefix, so locks and pages are stored next to it."""

_STORES = ("trajectory.zarr", "steps.zarr", "ledger.zarr", "results.zarr")

_HEADER_BYTES = 64 << 10
_BLOCK_BYTES = 4 << 20
_BLOCKS = 4

_listed: dict[str, dict[str, Any]] = {}
"""Entries of the last listing of each URL."""


class ObjectStorage(Storage):
    """An object, or all objects below a prefix.

    Parameters
    ----------
    fs : fsspec.AbstractFileSystem
    scheme : str
        Scheme of the URL.
    key : str
        Bucket and key.
    """

    def __init__(self, fs: Any, scheme: str, key: str) -> None:
        self.fs, self.scheme, self.key = fs, scheme, key

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.fs == cast(ObjectStorage, other).fs

    __hash__ = Storage.__hash__

    def __truediv__(self, name: str) -> Self:
        return self._at(f"{self.key}/{name}")

    def _at(self, key: str) -> Self:
        return type(self)(self.fs, self.scheme, key)

    @property
    def name(self) -> str:
        """Last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Self:
        """Prefix that contains the object."""
        return self._at(self.key.rpartition("/")[0])

    # Reading

    def get_tagged(self) -> tuple[bytes, str]:
        """Return the content and the tag of an object; the tag is empty without conditional replacement (``gs://``)."""
        tag = str(self.fs.info(self.key)["ETag"]) if self.scheme == "s3" else ""
        return self.get(), tag

    def get(self) -> bytes:
        """Return the content of an object with one request."""
        return self.fs.cat_file(self.key)  # type: ignore[no-any-return]  # fsspec has no types

    def get_ranges(self, spans: Sequence[tuple[int, int]]) -> builtins.list[bytes]:
        """Return ranges of an object, requested concurrently."""
        starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
        found = self.fs.cat_ranges([self.key] * len(spans), starts, stops, on_error="return")
        return [self._content(content) or b"" for content in found]

    def _content(self, found: Any, missing: type[Exception] | tuple[()] = ()) -> bytes | None:
        """Return the content; None for a range beyond the end, or for an error of a type in ``missing``."""
        if not isinstance(found, BaseException):
            return cast(bytes, found)
        beyond = isinstance(found, OSError) and found.errno == errno.EINVAL
        if beyond or isinstance(found, missing):
            return None
        raise found

    def get_entries(self, names: Sequence[str]) -> builtins.list[bytes | None]:
        """Return the content of several objects, requested concurrently."""
        keys, none = [f"{self.key}/{name}" for name in names], [None] * len(names)
        found = self.fs.cat_ranges(keys, none, none, on_error="return")
        return [self._content(content, FileNotFoundError) for content in found]

    def open(self) -> StoredFile:
        """Open an object, which is fetched in blocks. The last few blocks are cached.

        Blocks are small until `StoredFile.widen` is called. If the object is replaced while it is open, the next
        read raises OSError, so all blocks come from the same object.
        """
        from fsspec.caching import BlockCache

        options = {"maxblocks": _BLOCKS}
        file: Any = self.fs.open(
            self.key, "rb", block_size=_HEADER_BYTES, cache_type="blockcache", cache_options=options
        )

        def widen() -> None:
            # The method is private, but a file of fsspec passes it to its own cache, and there is no other way to
            # change the size of blocks without another request for the size of the object.
            file.cache = BlockCache(_BLOCK_BYTES, file._fetch_range, file.size, maxblocks=_BLOCKS)

        return StoredFile(file, file.size, widen)

    def list(self) -> builtins.list[str]:
        """Return the names below a prefix."""
        found = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in self._entries()}
        _listed[str(self)] = found
        return sorted(found)

    def _entries(self) -> builtins.list[dict[str, Any]]:
        # Web consoles represent a folder by an object with the name of the prefix.
        return [entry for entry in self._listing() if entry["name"].rstrip("/") != self.key]

    def _listing(self) -> builtins.list[dict[str, Any]]:
        try:
            return self.fs.ls(self.key, detail=True)  # type: ignore[no-any-return]  # see `get`
        except FileNotFoundError:
            return []

    def walk(self) -> builtins.list[str]:
        """Return the names of all objects below a prefix."""
        return sorted(key.removeprefix(f"{self.key}/") for key in self.fs.find(self.key) if key != self.key)

    def files(self) -> builtins.list[Self]:
        """Return the objects below a prefix, or the object itself."""
        entries = [entry for entry in self._listing() if entry["type"] == "file"]
        if [entry["name"] for entry in entries] == [self.key]:
            return [self]
        names = (entry["name"] for entry in entries if entry["name"].rstrip("/") != self.key)
        return sorted(self / name.rpartition("/")[2] for name in names)

    def stat(self, *, fresh: bool = True) -> Stat:
        """Return the size, time and tag of an object."""
        listed = None if fresh else _listed.get(str(self.parent), {}).get(self.name)
        entry = self.fs.info(self.key) if listed is None else listed
        if entry["type"] != "file":
            raise FileNotFoundError(str(self))
        return _stat(entry)

    def is_folder(self) -> bool:
        """Return True if there are objects below this prefix."""
        return bool(self._entries())

    # Writing

    @contextmanager
    def _naming_errors(self, where: str) -> Iterator[None]:
        """Translate errors of a request into messages that name the object; see `user_error`."""
        try:
            yield
        except FileExistsError:  # the answer to a conditional request
            raise
        except Exception as error:
            translated = self.user_error(error, where)
            if translated is None:
                raise
            raise translated from error

    def put(self, content: bytes | memoryview) -> None:
        """Write an object."""
        # Multipart uploads would not be verified as a single request is; no chunk is large enough for one.
        with self._naming_errors(str(self)):
            self.fs.pipe_file(self.key, bytes(content))

    def put_new(self, content: bytes | memoryview) -> None:
        """Write a new object; raise FileExistsError if it exists."""
        self._put_conditionally(content, mode="create")

    def put_if(self, content: bytes | memoryview, tag: str) -> None:
        """Replace an object if it still has the tag; raise FileExistsError otherwise."""
        self._put_conditionally(content, IfMatch=tag)

    def _put_conditionally(self, content: bytes | memoryview, **condition: Any) -> None:
        with self._naming_errors(str(self)):
            try:
                self.fs.pipe_file(self.key, bytes(content), **condition)
            except OSError as error:
                if "precondition" in repr(error.__cause__ or error).lower().replace("-", ""):
                    raise FileExistsError(str(self)) from error
                raise

    def put_entries(self, contents: Mapping[str, bytes | memoryview], *, flush_names: bool = True) -> None:
        """Write several objects concurrently."""
        objects = {f"{self.key}/{name}": bytes(content) for name, content in contents.items()}
        # The error does not state which of the objects failed.
        where = (
            f"{self}/{min(contents, default='')}"
            if len(objects) < 2
            else f"one of {len(objects)} objects in {self}"
        )
        with self._naming_errors(where):
            self.fs.pipe(objects)

    def delete(self) -> None:
        """Remove an object."""
        self.fs.rm_file(self.key)

    def delete_entries(self, names: Sequence[str]) -> None:
        """Remove several objects concurrently."""
        keys = [f"{self.key}/{name}" for name in names]
        # The library interprets several names as patterns, but a single name literally.
        if any(mark in key for key in keys for mark in "*?["):
            for key in keys:
                self.fs.rm_file(key)
        elif keys:
            self.fs.rm(keys)

    # Stores, Zarr and errors

    def holds_versions(self, kind: str | None = None) -> bool:
        """Return True if OUT is an Icechunk repository, or if one is requested and OUT is new."""
        names = set(self.list())
        if kind == "plain" and REPOSITORY in names:
            raise InputError(
                "this is an Icechunk repository",
                where=str(self),
                why="it was created with --store icechunk",
                remedy="omit --store, or choose another OUT",
            )
        if kind == "icechunk" and REPOSITORY not in names and names.intersection(_STORES):
            raise InputError(
                "this is a plain store",
                where=str(self),
                why="it was created without --store icechunk",
                remedy="omit --store, or choose another OUT",
            )
        return REPOSITORY in names or kind == "icechunk"

    def zarr_store(self) -> Any:
        """Return a Zarr store with its own asynchronous file system."""
        from zarr.storage import FsspecStore

        return FsspecStore.from_url(
            self.fs.unstrip_protocol(self.key), storage_options=dict(self.fs.storage_options)
        )

    def user_error(self, error: Exception, where: str) -> InputError | None:
        """Return the message for an error of an object store; None for other errors."""
        return user_error(error, where)


def _stat(entry: Mapping[str, Any]) -> Stat:
    time = entry.get("LastModified") or entry.get("updated") or entry["mtime"]
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    tag = str(entry.get("ETag") or entry.get("etag") or "")
    # The time in a listing may be more precise than that of a request for one object.
    return Stat(int(entry["size"]), int(time.timestamp()) * 10**9, tag)


def open_objects(location: str) -> ObjectStorage:
    """Open a URL of an object store; see `natgrad.storage.open_storage`."""
    scheme, _, key = location.partition("://")
    try:
        import fsspec

        return ObjectStorage(fsspec.filesystem(scheme, **_OPTIONS[scheme]), scheme, key.rstrip("/"))
    except ImportError as error:
        raise InputError(
            f"the library for {scheme}:// is not installed: {error}",
            where=location,
            remedy=f"pip install 'natgrad-pipeline[{_EXTRAS[scheme]}]'",
        ) from error
