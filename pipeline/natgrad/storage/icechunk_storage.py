"""Keep the stores of an OUT in an Icechunk repository, which stores every commit as a version.

A handle reads one version, by default the latest. A writer uses a transaction, whose changes become visible to
others when they are published. Locks, pages and outcomes of scans are objects next to the repository.

Icechunk stores Zarr arrays and groups, and rejects all other keys. Therefore the other documents of a store, its
commit records, are stored as chunks of arrays: ``commits/00000007.json`` is chunk 7 of the array
``commits/documents-8.json``, whose name contains the number of digits and the rest of the file name. Icechunk also
rejects a chunk beyond the shape of its array, so the array is extended before a chunk is written.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import struct
import threading
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, TypeVar, cast

import icechunk
from fsspec import AbstractFileSystem, register_implementation
from fsspec.asyn import get_loop, sync
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.buffer import cpu

from natgrad.schema.errors import InputError, Unavailable
from natgrad.storage.base import FileRange, Stat, Storage
from natgrad.storage.icechunk_repositories import (
    BRANCH,
    create_repository,
    find_repository,
    find_version,
    history,
    newest_version,
    reason,
    require_containers,
    virtual_chunk,
)
from natgrad.storage.locks import lock_by_object
from natgrad.storage.objects import REPOSITORY, ObjectStorage, open_objects

__all__ = ["IcechunkStorage", "RepositoryFiles", "open_repository"]

_T = TypeVar("_T")

_Store = icechunk.IcechunkStore | None
"""Store for reading keys; None if there is no repository."""

_CHUNK = re.compile(r"(?P<array>.+)/c(?P<index>(/\d+)*)")
_DOCUMENTS = re.compile(r"documents-(?P<digits>\d+)(?P<rest>.*)")
_DOCUMENT = "zarr.json"

_FRAME = struct.Struct("<II")
"""Header of a document in the codecs ``vlen-utf8`` and ``vlen-bytes``: the number of values (one) and its bytes."""

_AS_BYTES: Any = SimpleNamespace(buffer=SimpleNamespace(from_bytes=bytes))
"""Buffer prototype that returns the bytes of Icechunk without the copy of a Zarr buffer."""

_MAX_CONCURRENT = 16
"""Maximum number of concurrent requests of one call."""

_SESSIONS = 8
"""Maximum number of versions that stay open for reading."""


# Transactions ------------------------------------------------------------------------------------------------

_guard = threading.Lock()
_readers: OrderedDict[tuple[str, str], icechunk.IcechunkStore] = OrderedDict()
_transactions: dict[str, _Transaction] = {}


class _Transaction:
    """Changes of one writer, invisible to others until they are committed.

    Attributes
    ----------
    growing : asyncio.Lock
        Lock for reading and changing the shape of an array.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: icechunk.Session | None = None
        self._opening = threading.Lock()
        self.growing = asyncio.Lock()

    def readable(self) -> _Store:
        """Return the store for reading; None if there is no repository yet."""
        return None if self._session is None and find_repository(self._url) is None else self.store()

    def store(self) -> icechunk.IcechunkStore:
        """Return the store for writing. The repository is created if it does not exist."""
        with self._opening:
            if self._session is None:
                repository = find_repository(self._url) or create_repository(self._url)
                self._session = repository.writable_session(BRANCH)
            return self._session.store

    def commit(self, message: str) -> None:
        """Create a version from the changes, if there are any.

        Other processes may have committed changes to other arrays in the meantime (the ledger, for example, during
        a commit of the trajectory).

        Raises
        ------
        Unavailable
            If another process has committed changes to the same arrays.
        """
        if self._session is None or not self._session.has_uncommitted_changes:
            return
        try:
            self._session.commit(message, rebase_with=icechunk.ConflictDetector())
        except (icechunk.ConflictError, icechunk.RebaseFailedError) as error:
            raise Unavailable(
                f"another process has committed in the meantime: {reason(error)}",
                where=self._url,
                why="the lock of this process was removed while it was writing",
                remedy="ensure that only one process writes, then run again: committed data are kept",
            ) from error
        self._session = None


# Keys --------------------------------------------------------------------------------------------------------


def _stored_key(key: str) -> tuple[str, int]:
    """Return the key under which a file is stored, and the number of bytes before its content."""
    folder, _, name = key.rpartition("/")
    if name == _DOCUMENT or _CHUNK.fullmatch(key):
        return key, 0
    digits = re.match(r"\d*", name)[0]  # type: ignore[index]  # it always matches
    return f"{folder}/documents-{len(digits)}{name[len(digits) :]}/c/{int(digits or 0)}", _FRAME.size


def _file_of(key: str) -> str | None:
    """Return the name of the file stored under a key; None for the metadata of an array of documents."""
    folder, _, name = key.rpartition("/")
    chunk = _CHUNK.fullmatch(key)
    array = chunk["array"] if chunk else folder
    above, _, last = array.rpartition("/")
    documents = _DOCUMENTS.fullmatch(last)
    if not documents:
        return key
    return f"{above}/{_document_name(documents, int(name))}" if chunk else None


def _document_name(documents: re.Match[str], index: int) -> str:
    digits = int(documents["digits"])
    return (f"{index:0{digits}d}" if digits else "") + documents["rest"]


def _documents_metadata(name: str) -> dict[str, Any]:
    """Return the metadata of an array of documents (text or bytes), one per chunk."""
    text = name.endswith(".json")
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [0],
        "data_type": "string" if text else "variable_length_bytes",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "",
        "codecs": [{"name": "vlen-utf8" if text else "vlen-bytes"}],
        "attributes": {},
    }


# Files -------------------------------------------------------------------------------------------------------


class RepositoryFiles(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """File system of a version of a repository, or of a transaction. Its paths are below OUT.

    Parameters
    ----------
    repository : str
        URL.
    version : str
        Identifier of the version; empty for a transaction, or if there is no repository yet.
    transaction : str, optional
        Name of a transaction of this process.
    pinned : bool
        Keep reading this version when newer ones appear.
    """

    protocol = "icechunk"
    cachable = False

    def __init__(
        self, repository: str, version: str = "", transaction: str = "", pinned: bool = False, **options: Any
    ) -> None:
        super().__init__(repository=repository, version=version, transaction=transaction, pinned=pinned, **options)
        self.repository, self.version, self.pinned = repository, version, pinned
        self.writer = transaction
        self._root = repository.partition("://")[2].rpartition("/")[0]

    @property
    def _writer(self) -> _Transaction:
        if self.writer not in _transactions:
            raise PermissionError(f"versions of {self.repository} are read-only")
        return _transactions[self.writer]

    def _store(self) -> _Store:
        if self.writer:
            return self._writer.readable()
        if not self.version:
            return None
        key = self.repository, self.version
        with _guard:
            found = _readers.get(key)
        if found is None:
            repository = find_repository(self.repository)
            if repository is None:
                return None
            found = repository.readonly_session(snapshot_id=self.version).store
            with _guard:
                _readers[key] = found
                while len(_readers) > _SESSIONS:
                    _readers.popitem(last=False)
        return found

    def _key(self, path: str) -> str:
        return str(self._strip_protocol(path)).removeprefix(self._root).strip("/")

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def commit(self, message: str) -> None:
        """Create a version from the changes of the transaction; raise Unavailable on a conflict."""
        self._writer.commit(message)

    # Reading

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """Return the content of a file, or a range of it."""
        return _wait(self._get(self._store(), path, start, end))

    def cat_ranges(
        self,
        paths: Sequence[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **options: Any,
    ) -> list[Any]:
        """Return ranges of files, requested concurrently."""
        store = self._store()
        several = [self._get(store, *each) for each in zip(paths, starts, ends, strict=True)]
        return _wait(_gather(several, return_exceptions=on_error == "return"))

    async def _get(self, store: _Store, path: str, start: int | None, end: int | None) -> bytes:
        key, before = _stored_key(self._key(path))
        window = None if before else _byte_request(start, end)
        found: bytes | None = None
        if store is not None:
            async with _missing_is_none():
                found = cast(bytes | None, await store.get(key, _AS_BYTES, window))
        if found is None:
            raise FileNotFoundError(path)
        return found[before:][start:end] if before else found

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Return the size and type of a file or folder."""
        return _wait(self._info(self._store(), path))

    async def _info(self, store: _Store, path: str) -> dict[str, Any]:
        key = self._key(path)
        if store is not None:
            stored, before = _stored_key(key) if key else ("", 0)
            async with _missing_is_none():
                if key and await store.exists(stored):
                    size = await store.getsize(stored) - before
                    return {"name": self._path(key), "size": size, "type": "file"}
            async with _missing_is_none():
                async for _ in store.list_dir(key):
                    return {"name": self._path(key), "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        """List a folder."""
        found = _wait(self._ls(self._store(), path))
        return found if detail else [entry["name"] for entry in found]

    async def _ls(self, store: _Store, path: str) -> list[dict[str, Any]]:
        key = self._key(path)
        files: list[str] = []
        folders: list[str] = []
        if store is not None:
            async for name in store.list_dir(key):
                below = f"{key}/{name}" if key else name
                documents = _DOCUMENTS.fullmatch(name)
                if documents:
                    async for (index,) in store.session.chunk_coordinates(f"/{below}"):
                        files.append(_document_name(documents, index))
                elif name == _DOCUMENT or (_CHUNK.fullmatch(below) and name != "c" and await store.exists(below)):
                    files.append(name)
                else:
                    folders.append(name)
        if not files and not folders:
            raise FileNotFoundError(path)
        # The path may end with a slash.
        folder = self._path(key).rstrip("/")
        entries = [await self._info(store, f"{folder}/{name}") for name in sorted(files)]
        return entries + [{"name": f"{folder}/{name}", "size": 0, "type": "directory"} for name in sorted(folders)]

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **options: Any
    ) -> Any:
        """Return all files below a folder."""
        found = _wait(self._find(self._store(), path))
        return {name: self.info(name) for name in found} if detail else found

    async def _find(self, store: _Store, path: str) -> list[str]:
        key = self._key(path)
        if store is None:
            return []
        try:
            below = store.list_prefix(key)
        except icechunk.IcechunkError as error:
            if "bad key prefix" not in str(error):
                raise
            below = store.list()  # neither an array nor a group, but possibly a folder of chunks
        files = {_file_of(stored) async for stored in below}
        return sorted(
            self._path(file)
            for file in files
            if file is not None and f"/{file}/".startswith(f"/{key}/".replace("//", "/"))
        )

    # Writing

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        """Write a file; with mode ``create``, raise FileExistsError if it exists."""
        _wait(self._set(self._writer.store(), path, value, new=mode == "create"))

    def pipe(self, path: str | Mapping[str, bytes], value: bytes | None = None, **options: Any) -> None:
        """Write files concurrently, but the metadata of arrays before their chunks."""
        several = {path: value or b""} if isinstance(path, str) else path
        store = self._writer.store()
        for metadata in (True, False):
            chosen = {key: value for key, value in several.items() if key.endswith(f"/{_DOCUMENT}") == metadata}
            _wait(_gather(self._set(store, key, value) for key, value in chosen.items()))

    async def _set(self, store: icechunk.IcechunkStore, path: str, value: bytes, new: bool = False) -> None:
        stored, before = _stored_key(self._key(path))
        chunk = _CHUNK.fullmatch(stored)
        if chunk:
            async with self._writer.growing:
                if new and before and await _has(store, stored):
                    raise FileExistsError(path)
                await _grow(store, chunk["array"], int(chunk["index"].partition("/")[2].partition("/")[0] or 0))
        content = _FRAME.pack(1, len(value)) + bytes(value) if before else bytes(value)
        await store.set(stored, cpu.Buffer.from_bytes(content))

    def refer(self, folder: str, ranges: Mapping[str, FileRange], folders: Iterable[str]) -> None:
        """Set chunks below a folder to ranges of other files; see `natgrad.storage.Storage.refer`."""
        store = self._writer.store()
        require_containers(self.repository, folders)
        of_arrays: dict[str, list[icechunk.VirtualChunkSpec]] = {}
        for name, found in ranges.items():
            key = _CHUNK.fullmatch(self._key(f"{folder}/{name}"))
            if key is None:
                raise ValueError(f"{name} is not a chunk of an array")
            index = [int(part) for part in key["index"].split("/")[1:]]
            of_arrays.setdefault(key["array"], []).append(virtual_chunk(index, found))
        for array, chunks in of_arrays.items():
            _wait(_grow(store, array, max(chunk.index[0] for chunk in chunks)))
            # Icechunk would compare the prefixes with escaped URLs.
            store.set_virtual_refs(f"/{array}", chunks, validate_containers=False)

    def rm_file(self, path: str) -> None:
        """Remove a file."""
        _wait(self._remove(self._writer.store(), path))

    def rm(self, path: str | Sequence[str], recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove files. The metadata are removed last, because removing a group removes everything in it."""
        several = [path] if isinstance(path, str) else path
        store = self._writer.store()
        for metadata in (False, True):
            chosen = [name for name in several if name.endswith(f"/{_DOCUMENT}") == metadata]
            _wait(_gather(self._remove(store, name) for name in chosen))

    async def _remove(self, store: icechunk.IcechunkStore, path: str) -> None:
        async with _missing_is_none():
            await store.delete(_stored_key(self._key(path))[0])


class IcechunkStorage(ObjectStorage):
    """A location in an Icechunk repository. `str` returns its URL in OUT, although there is no such object.

    Parameters
    ----------
    fs : RepositoryFiles
    scheme, key : str
    """

    fs: RepositoryFiles

    @property
    def keeps_versions(self) -> bool:
        """Return True."""
        return True

    @property
    def chunk_separator(self) -> str:
        """Return the only separator that Icechunk accepts."""
        return "/"

    def get_tagged(self) -> tuple[bytes, str]:
        """Return the content of a file, and an empty tag, because transactions have no conditional writes."""
        return self.get(), ""

    def stat(self, *, fresh: bool = True) -> Stat:
        """Return the size of a file; its time is unknown."""
        entry = self.fs.info(self.key)
        if entry["type"] != "file":
            raise FileNotFoundError(str(self))
        return Stat(entry["size"], 0, "")

    def latest(self) -> Self:
        """Return the latest version, or the pinned version if one was requested."""
        if self.fs.pinned or self.fs.writer:
            return self
        repository = self.fs.repository
        files = RepositoryFiles(repository=repository, version=newest_version(repository))
        return type(self)(files, self.scheme, self.key)

    @contextmanager
    def lock(self, kind: str) -> Iterator[Self]:
        """Hold the lock of this location, and start a transaction; unpublished changes are discarded."""
        if self.fs.pinned:
            raise InputError(
                "an old version is read-only",
                where=str(self),
                why="a version never changes after its commit",
                remedy="omit the version: a write then creates a new version",
            )
        transaction = uuid.uuid4().hex
        _transactions[transaction] = _Transaction(self.fs.repository)
        try:
            # The transaction is opened on first use, which happens under the lock.
            with lock_by_object(self.unversioned(), kind):
                files = RepositoryFiles(repository=self.fs.repository, transaction=transaction)
                yield type(self)(files, self.scheme, self.key)
        finally:
            del _transactions[transaction]

    def publish(self, message: str) -> None:
        """Create a version from the changes of the transaction."""
        self.fs.commit(message)

    def versions(self, last: int | None = None) -> list[dict[str, Any]]:
        """List the versions, newest first."""
        return history(self.fs.repository, last)

    def unversioned(self) -> Storage:
        """Return the same location in the underlying object store."""
        return open_objects(str(self))

    def published_with(self, other: Storage) -> Storage:
        """Return this location in the transaction of the other one, if that is in the same repository."""
        together = isinstance(other, IcechunkStorage) and other.fs.repository == self.fs.repository
        return type(self)(cast(IcechunkStorage, other).fs, self.scheme, self.key) if together else self

    @property
    def refers(self) -> bool:
        """Return True: Icechunk has virtual chunks."""
        return True

    def refer(self, ranges: Mapping[str, FileRange], folders: Iterable[str]) -> None:
        """Store virtual chunks, and let readers authorize access to the folders."""
        if ranges:
            self.fs.refer(self.key, ranges, folders)

    def _put_tree(self, folder: Path, document: str, placeholder: bytes | None) -> None:
        # An identical tree does not create a version.
        if not self._contains(folder):
            super()._put_tree(folder, document, placeholder)

    def _contains(self, folder: Path) -> bool:
        """Return True if the tree below this location is identical to a local folder."""
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        names = self.walk()
        return sorted(files) == names and all(
            content == files[name].read_bytes()
            for name, content in zip(names, self.get_entries(names), strict=True)
        )


def open_repository(plain: Storage, version: str | None) -> IcechunkStorage:
    """Open the repository in OUT at a version, by default the latest. The repository need not exist yet."""
    repository = str(plain / REPOSITORY)
    if version is None:
        files = RepositoryFiles(repository=repository, version=newest_version(repository))
    else:
        files = RepositoryFiles(repository=repository, version=find_version(repository, version), pinned=True)
    objects = cast(ObjectStorage, plain)  # Icechunk commits safely in object stores only
    return IcechunkStorage(files, objects.scheme, objects.key)


# Icechunk prints warnings to standard output, which is reserved for results. Relevant errors are raised anyway.
if "ICECHUNK_LOG" not in os.environ:
    icechunk.set_logs_filter("off")
register_implementation(RepositoryFiles.protocol, RepositoryFiles, clobber=True)


def _wait(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine on the event loop of fsspec, from any thread."""

    async def run() -> _T:
        return await coroutine

    return sync(get_loop(), run)  # type: ignore[no-any-return]  # fsspec has no types


async def _gather(coroutines: Iterable[Coroutine[Any, Any, _T]], return_exceptions: bool = False) -> list[Any]:
    limit = asyncio.Semaphore(_MAX_CONCURRENT)

    async def run(coroutine: Coroutine[Any, Any, _T]) -> _T:
        async with limit:
            return await coroutine

    return await asyncio.gather(*map(run, coroutines), return_exceptions=return_exceptions)


@asynccontextmanager
async def _missing_is_none() -> AsyncIterator[None]:
    """Ignore Icechunk's error for a missing array or object, which can only be identified by its message."""
    try:
        yield
    except KeyError:
        pass
    except icechunk.IcechunkError as error:
        if not any(words in str(error) for words in ("node not found", "NoSuchKey", "object not found")):
            raise


async def _has(store: icechunk.IcechunkStore, key: str) -> bool:
    exists = False
    async with _missing_is_none():
        exists = await store.exists(key)
    return exists


def _byte_request(start: int | None, end: int | None) -> Any:
    if end is not None:
        return RangeByteRequest(start or 0, end)
    if start is None:
        return None
    return OffsetByteRequest(start) if start >= 0 else SuffixByteRequest(-start)


async def _grow(store: icechunk.IcechunkStore, array: str, index: int) -> None:
    """Extend an array to include a chunk. An array of documents is created if it does not exist."""
    described = cast(bytes | None, await store.get(f"{array}/{_DOCUMENT}", _AS_BYTES))
    name = array.rpartition("/")[2]
    if described is not None:
        document = json.loads(described)
    elif _DOCUMENTS.fullmatch(name):
        document = _documents_metadata(name)
    else:
        return  # the error of Icechunk names the missing array
    length = document["chunk_grid"]["configuration"]["chunk_shape"][:1]
    if length and document["shape"][0] <= index * length[0]:
        document["shape"][0] = (index + 1) * length[0]
        await store.set(f"{array}/{_DOCUMENT}", cpu.Buffer.from_bytes(json.dumps(document).encode()))
