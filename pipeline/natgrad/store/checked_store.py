"""Read-only Zarr stores, and one that compares each file with its recorded checksum when it is read.

Zarr would read a lost chunk of results as missing values, and a changed chunk as wrong numbers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store
from zarr.storage import StorePath, WrapperStore

from natgrad.storage import Storage
from natgrad.store.checked import compare

__all__ = ["CheckedStore", "ReadOnlyStore"]


class ReadOnlyStore(WrapperStore[Store]):
    """A read-only Zarr store that provides the content of some files itself.

    Parameters
    ----------
    store : zarr.abc.store.Store
    path : str
        Path of the files in the Zarr store; empty for its root.
    """

    def __init__(self, store: Store, path: str) -> None:
        super().__init__(store)
        self._path = path

    @property
    def read_only(self) -> bool:
        """Return True."""
        return True

    def _name(self, key: str) -> str:
        """Return the name of a file relative to the path."""
        return key.removeprefix(f"{self._path}/")

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

    @staticmethod
    def _part(content: Buffer, byte_range: ByteRequest | None) -> Buffer:
        """Return the part of a complete content that a request describes."""
        if byte_range is None:
            return content
        if isinstance(byte_range, RangeByteRequest):
            return content[byte_range.start : byte_range.end]
        if isinstance(byte_range, OffsetByteRequest):
            return content[byte_range.offset : len(content)]
        return content[max(len(content) - byte_range.suffix, 0) : len(content)]


class CheckedStore(ReadOnlyStore):
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
        super().__init__(store, path)
        self._storage, self._files, self._remedy = storage, files, remedy

    @classmethod
    def of(cls, storage: Storage, files: Mapping[str, int], remedy: str) -> CheckedStore | StorePath:
        """Return the store of a location, or a path in it if `Storage.zarr_store` returns a path."""
        found = storage.zarr_store()
        if isinstance(found, StorePath):
            return StorePath(cls(found.store, storage, files, remedy, found.path), found.path)
        return cls(found, storage, files, remedy)

    def _with_store(self, store: Store) -> CheckedStore:
        return type(self)(store, self._storage, self._files, self._remedy, self._path)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the content of a file. A range is taken from the verified content."""
        name = self._name(key)
        if name not in self._files:
            return None
        found = await self._store.get(key, prototype)
        content = None if found is None else found.to_bytes()
        compare(self._storage / name, content, self._files[name], self._remedy)
        return None if found is None else self._part(found, byte_range)
