"""Record the checksums of the files of a store that another library writes, and verify each file that is read.

xarray writes ``results.zarr``, and Zarr reads it. Zarr would read a lost chunk as missing values, and a changed
chunk as wrong numbers. `CheckedStore` wraps the Zarr store, and compares each file with its recorded checksum.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crc32c import crc32c
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store
from zarr.storage import StorePath, WrapperStore

from natgrad.schema.errors import InputError
from natgrad.schema.layout import LAYOUT_VERSION
from natgrad.storage import LocalStorage, Storage
from natgrad.store.group import document_of, require_version
from natgrad.store.journal import Journal

__all__ = ["CheckedStore", "Damaged", "record_files", "recorded_files", "verify_files"]

_FILES = "checksums"
"""Name of the record, ``checksums.json``."""


class Damaged(InputError):
    """A file of a store is missing, or its content is not the recorded one."""


def record_files(folder: Path, described: Mapping[str, Any]) -> None:
    """Record the checksums of all files of a new store.

    Parameters
    ----------
    folder : Path
    described : mapping
        Additional entries of the record.
    """
    files = {
        path.relative_to(folder).as_posix(): crc32c(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    Journal(LocalStorage(folder)).write(_FILES, {**described, "files": files})


def recorded_files(storage: Storage, remedy: str) -> dict[str, Any]:
    """Return the record of results: ``files``, and the additional entries.

    Raises
    ------
    Damaged
        If the record cannot be read.
    OtherVersion
        If another version of natgrad wrote the results.
    """
    try:
        version = document_of(storage)["attributes"].get("layout_version")
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        version = LAYOUT_VERSION  # the document is damaged, which its checksum will show
    require_version(version, "results", str(storage))
    try:
        return Journal(storage, remedy).read(_FILES)
    except InputError as error:
        raise Damaged(error.what, where=error.where, why=error.why, remedy=error.remedy) from error


def _compare(path: Storage, content: bytes | None, expected: int, remedy: str) -> None:
    what = "it is missing" if content is None else "checksum mismatch" if crc32c(content) != expected else ""
    if what:
        raise Damaged(
            f"cannot read a file: {what}",
            where=str(path),
            why="the file was changed or removed, the disk failed, or the store was replaced since it was opened",
            remedy=remedy,
        )


def verify_files(storage: Storage, remedy: str) -> Iterator[Damaged]:
    """Compare all files of a store with their checksums, and yield an error for each that is damaged."""
    try:
        files = recorded_files(storage, remedy)["files"]
    except Damaged as error:
        yield error
        return
    for name, expected in files.items():
        (content,) = storage.get_entries([name])
        try:
            _compare(storage / name, content, expected, remedy)
        except Damaged as error:
            yield error


def _slice(byte_range: ByteRequest, size: int) -> slice:
    if isinstance(byte_range, RangeByteRequest):
        return slice(byte_range.start, byte_range.end)
    if isinstance(byte_range, OffsetByteRequest):
        return slice(byte_range.offset, size)
    return slice(max(size - byte_range.suffix, 0), size)


class CheckedStore(WrapperStore[Store]):
    """A read-only Zarr store that raises an error if a file is missing or does not match its checksum.

    Parameters
    ----------
    store : zarr.abc.store.Store
    storage : Storage
        Location of the store, for messages.
    files : mapping of str to int
        Checksum of each file.
    remedy : str
        Advice for the error message.
    path : str, optional
        Path of the files in the Zarr store. Default: its root.
    """

    def __init__(
        self, store: Store, storage: Storage, files: Mapping[str, int], remedy: str, path: str = ""
    ) -> None:
        super().__init__(store)
        self._storage, self._files, self._remedy, self._path = storage, files, remedy, path

    @classmethod
    def of(cls, storage: Storage, files: Mapping[str, int], remedy: str) -> CheckedStore | StorePath:
        """Return the store of a location, or a path in it if `Storage.zarr_store` returns a path."""
        found = storage.zarr_store()
        if isinstance(found, StorePath):
            return StorePath(cls(found.store, storage, files, remedy, found.path), found.path)
        return cls(found, storage, files, remedy)

    def _with_store(self, store: Store) -> CheckedStore:
        return type(self)(store, self._storage, self._files, self._remedy, self._path)

    @property
    def read_only(self) -> bool:
        """Return True."""
        return True

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the content of a file. A range is taken from the verified content."""
        name = key.removeprefix(f"{self._path}/")
        if name not in self._files:
            return None
        found = await self._store.get(key, prototype)
        content = None if found is None else found.to_bytes()
        _compare(self._storage / name, content, self._files[name], self._remedy)
        return found if found is None or byte_range is None else found[_slice(byte_range, len(found))]

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return ranges of files."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)
