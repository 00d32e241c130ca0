"""A Zarr store of local files whose errors name the file.

Zarr writes and reads files through descriptors. If that fails, for example because the disk is full, the error of
the system does not name the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest
from zarr.storage import LocalStore

from natgrad.storage.local import require_regular

__all__ = ["NamedFiles"]


class NamedFiles(LocalStore):
    """A Zarr store of local files; see `zarr.storage.LocalStore`."""

    @contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Zarr writes temporary files with random names.
            error.filename, error.filename2 = str(self.root / key), None
            raise

    def _require_file(self, key: str) -> None:
        """Refuse a pipe, for which Zarr would wait forever, and other special files."""
        path = self.root / key
        if path.exists() and not path.is_dir():
            require_regular(path)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the content of a file, or a range of it."""
        with self._naming(key):
            self._require_file(key)
            return await super().get(key, prototype, byte_range)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the content of a file, or a range of it."""
        with self._naming(key):
            self._require_file(key)
            return super().get_sync(key, prototype=prototype, byte_range=byte_range)

    async def set(self, key: str, value: Buffer) -> None:
        """Write a file."""
        with self._naming(key):
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write a new file."""
        with self._naming(key):
            await super().set_if_not_exists(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write a file."""
        with self._naming(key):
            super().set_sync(key, value)
