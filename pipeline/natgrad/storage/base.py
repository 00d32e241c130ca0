"""Define the storage protocol: a handle of one location.

A `Storage` is a handle bound to one location: a file, a folder, an object, or all objects below a prefix.
``storage / name`` is the handle of an entry. The methods are named as in obspec (get, put, list, delete). Each
implementation gives these guarantees:

- `Storage.put` is atomic and durable: a reader finds the old content or the new content, and on return the new
  content survives a power failure.
- `Storage.put_new` and `Storage.put_if` fail if another writer was faster.
- `Storage.lock` admits one writer, and reports the holder of the lock to other writers.
"""

from __future__ import annotations

import builtins
import io
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

from natgrad.schema.errors import InputError

__all__ = [
    "FileRange",
    "Stat",
    "Storage",
    "StoredFile",
    "Writes",
    "no_versions",
]


class Stat(NamedTuple):
    """Size of a file or object in bytes, time of its last change in ns, and tag of its version.

    The tag changes with every change of the content, even if size and time stay the same: the ETag of an object,
    or the inode and the status change time (ctime) of a local file, which no program can set. It is empty if the
    storage has no such tag.
    """

    size: int
    time: int
    tag: str


class FileRange(NamedTuple):
    """Range of a file or object that another location refers to; see `Storage.refer`.

    Attributes
    ----------
    location : str
        Absolute path, or URL.
    offset, size : int
        First byte, and number of bytes.
    time : int
        Time of the last change, in ns. Readers refuse a file that was changed later.
    """

    location: str
    offset: int
    size: int
    time: int


class StoredFile(io.RawIOBase):
    """A file or object that is open for random-access reading.

    Parameters
    ----------
    file : binary file
    size : int
        Size in bytes when the file was opened.
    widen : callable, optional
        Called by `widen`.
    """

    def __init__(self, file: Any, size: int, widen: Callable[[], None] | None = None) -> None:
        self._file, self.size, self._widen = file, size, widen

    def widen(self) -> None:
        """Switch to large blocks. Call this after the header has been read, because the data follow."""
        if self._widen is not None:
            self._widen()

    def read(self, size: int = -1, /) -> bytes:
        """Read up to ``size`` bytes at the current position."""
        return cast(bytes, self._file.read(size))

    def readinto(self, buffer: Any, /) -> int:
        """Read bytes at the current position into a buffer, and return the number of bytes read."""
        return cast(int, self._file.readinto(buffer))

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Set the position."""
        return cast(int, self._file.seek(offset, whence))

    def tell(self) -> int:
        """Return the position."""
        return cast(int, self._file.tell())

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


class Writes:
    """Writes of one writer that become durable together.

    Disk and network are slower than memory, and concurrent requests are faster than sequential ones. Therefore
    writes run in threads while the caller prepares the next one.

    Attributes
    ----------
    MAX_CONCURRENT : int
        Maximum number of concurrent writes. Each may keep an object in memory.
    """

    MAX_CONCURRENT = 4

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._running: deque[Future[None]] = deque()

    def start(self, write: Callable[..., None], *arguments: Any) -> None:
        """Start a write in a thread. `settle` waits for it to finish.

        Raises
        ------
        Exception
            If an earlier write failed.
        """
        while len(self._running) >= self.MAX_CONCURRENT:
            self._running.popleft().result()
        self._pool = self._pool or ThreadPoolExecutor(self.MAX_CONCURRENT)
        self._running.append(self._pool.submit(write, *arguments))

    def wait(self) -> None:
        """Wait for all started writes to finish.

        Raises
        ------
        Exception
            If a write failed.
        """
        while self._running:
            self._running.popleft().result()

    def write_segment(self, entry: Storage, offset: int, content: memoryview, size: int) -> None:
        """Write a segment of an entry of fixed size; the bytes before the segment are preserved.

        An object can only be written completely, so the preceding bytes are read first.

        Parameters
        ----------
        entry : Storage
        offset : int
            Position of the segment.
        content : memoryview of bytes
        size : int
            Size of the entry in bytes; the content after the segment is undefined.

        Raises
        ------
        EOFError
            If the entry has fewer than ``offset`` bytes.
        FileNotFoundError
            If ``offset`` is not 0 and there is no entry.
        """
        before = b""
        if offset:
            self.wait()
            (before,) = entry.get_ranges([(0, offset)])
            if len(before) != offset:
                raise EOFError(f"it is {offset - len(before)} bytes too short")
        self.start(entry.put, b"".join((before, content, bytes(size - offset - len(content)))))

    def settle(self, entries: Iterable[Storage] = ()) -> None:
        """Wait until all writes, and the given entries written by another library, are durable."""
        self.wait()

    def abandon(self) -> None:
        """Cancel pending writes, and wait for the running ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._running.clear()


class Storage(ABC):
    """Handle of a location in a storage. The module docstring states the guarantees.

    Handles compare and sort by their `str`. They can be pickled, because Dask tasks contain them.
    """

    # Location

    @abstractmethod
    def __str__(self) -> str:
        """Return the path or URL as a user would type it."""

    @abstractmethod
    def __truediv__(self, name: str) -> Self:
        """Return the handle of an entry. Slashes in the name separate folders."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Last part of the location."""

    @property
    @abstractmethod
    def parent(self) -> Self:
        """Location that contains this one."""

    @property
    def local_path(self) -> Path | None:
        """Path on this machine, for code that needs files; None for other storages."""
        return None

    @property
    def stem(self) -> str:
        """Name without its suffix."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """Suffix of the name, with its dot."""
        return Path(self.name).suffix

    def absolute(self) -> Self:
        """Return this location, independent of the current directory."""
        return self

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and str(self) == str(other)

    def __lt__(self, other: Storage) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    # Reading

    @abstractmethod
    def get_tagged(self) -> tuple[bytes, str]:
        """Return the content, and the tag for `put_if`; the tag is empty if `put_if` is not supported.

        Raises
        ------
        FileNotFoundError
            If there is no file or object.
        """

    def get(self) -> bytes:
        """Return the content of a file or object; raise FileNotFoundError if there is none."""
        return self.get_tagged()[0]

    def get_ranges(self, spans: Sequence[tuple[int, int]]) -> builtins.list[bytes]:
        """Return ranges (start, stop) of the content; a range beyond the end is cut short.

        Raises
        ------
        FileNotFoundError
            If there is no file or object.
        """
        content = self.get()
        return [content[start:stop] for start, stop in spans]

    def get_entries(self, names: Sequence[str]) -> builtins.list[bytes | None]:
        """Return the content of several entries; None for entries that do not exist."""
        found: list[bytes | None] = []
        for name in names:
            try:
                found.append((self / name).get())
            except FileNotFoundError:
                found.append(None)
        return found

    def open(self) -> StoredFile:
        """Open a file or object for random-access reading.

        Raises
        ------
        FileNotFoundError
            If there is no file or object.
        """
        content = self.get()
        return StoredFile(io.BytesIO(content), len(content))

    @abstractmethod
    def list(self) -> builtins.list[str]:
        """Return the sorted names of the entries; empty if the folder does not exist."""

    def walk(self) -> builtins.list[str]:
        """Return the sorted names of all files or objects below this location, relative to it."""
        found: list[str] = []
        for name in self.list():
            entry = self / name
            found += [f"{name}/{below}" for below in entry.walk()] if entry.is_folder() else [name]
        return sorted(found)

    def files(self) -> builtins.list[Self]:
        """Return the files in a folder, sorted by name, or the file itself; empty if nothing exists here."""
        if self.is_folder():
            return [entry for entry in (self / name for name in self.list()) if not entry.is_folder()]
        return [self] if self.exists() else []

    @abstractmethod
    def stat(self, *, fresh: bool = True) -> Stat:
        """Return size, time and tag of a file or object.

        Parameters
        ----------
        fresh : bool
            Query the storage; otherwise the result of the last `list` of the folder may be used.

        Raises
        ------
        FileNotFoundError
            If there is no file or object.
        """

    @abstractmethod
    def is_folder(self) -> bool:
        """Return True if there are entries below this location."""

    def exists(self) -> bool:
        """Return True if a file, an object or a folder exists at this location."""
        try:
            self.stat()
        except FileNotFoundError:
            return self.is_folder()
        return True

    # Writing

    @abstractmethod
    def put(self, content: bytes | memoryview) -> None:
        """Write a file or object atomically and durably. Missing parent folders are created."""

    @abstractmethod
    def put_new(self, content: bytes | memoryview) -> None:
        """Write a new file or object; raise FileExistsError if it exists."""

    def put_if(self, content: bytes | memoryview, tag: str) -> None:
        """Replace a file or object if it still has a tag from `get_tagged`, which must not be empty.

        Raises
        ------
        FileExistsError
            If the tag has changed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no conditional replacement")

    def put_once(self, content: bytes) -> None:
        """Write a new file or object; an existing one with the same content is accepted.

        A library may repeat a request whose response was lost, and then find its own object.

        Raises
        ------
        FileExistsError
            If it exists with different content.
        """
        try:
            self.put_new(content)
        except FileExistsError:
            if self.get() != content:
                raise

    def put_entries(self, contents: Mapping[str, bytes | memoryview], *, flush_names: bool = True) -> None:
        """Write several entries. Each write is atomic, and all are durable on return. A disk is flushed only once.

        Parameters
        ----------
        contents : mapping of str to bytes
            Contents by name.
        flush_names : bool
            If False, a power failure may leave the old content of an entry.
        """
        for name, content in contents.items():
            (self / name).put(content)

    def flush(self, entries: Iterable[Storage]) -> None:  # noqa: B027  (a written object is durable)
        """Wait until files below this location that another library wrote are durable."""

    def writes(self) -> Writes:
        """Return an object that manages the writes of one writer below this location."""
        return Writes()

    @abstractmethod
    def delete(self) -> None:
        """Remove a file or object; raise FileNotFoundError if there is none."""

    def delete_entries(self, names: Sequence[str]) -> None:
        """Remove several files or objects below this location."""
        for name in names:
            (self / name).delete()

    def clear_leftovers(self) -> None:  # noqa: B027  (an object is never unfinished)
        """Remove incomplete files that a killed writer left in this folder."""

    # Trees

    @contextmanager
    def replace_tree(self, document: str, placeholder: bytes | None = None) -> Iterator[Path]:
        """Replace everything below this location with a new tree of files.

        A reader finds the old tree or the new tree. If the storage cannot exchange them atomically, a reader may
        also find an incomplete tree without a valid document: the document is removed, or replaced with the
        placeholder, before all other changes, and written after them.

        Parameters
        ----------
        document : str
            Name of the file that makes the tree valid.
        placeholder : bytes, optional
            Content of the document while the tree is incomplete.

        Yields
        ------
        Path
            Local folder, which the caller creates and fills. On an error, nothing is replaced.
        """
        with tempfile.TemporaryDirectory(prefix="natgrad-") as folder:
            staged = Path(folder) / self.name
            yield staged
            self._put_tree(staged, document, placeholder)

    @contextmanager
    def staging(self) -> Iterator[Storage]:
        """Prepare the tree that will replace this one, see `replace_with`.

        Yields
        ------
        Storage
            Location of the new tree. It outlives a killed process, and an error unless the disk is full.
        """
        plain = self.unversioned()
        yield plain.parent / f".{plain.name}.new"

    def adopt(self, source: Storage, names: Iterable[str]) -> None:
        """Take over entries of another location, which also keeps them. They are durable on return."""
        for batch in _batches(list(names)):
            found = zip(batch, source.get_entries(batch), strict=True)
            self.put_entries({name: content for name, content in found if content is not None})

    def replace_with(self, staged: Storage, document: str) -> None:
        """Replace everything below this location with the tree of `staging`, and remove the latter.

        Readers find the old tree or the new tree, as with `replace_tree`.

        Parameters
        ----------
        staged : Storage
            All its entries are durable.
        document : str
            Name of the file that makes the tree valid.
        """
        names = staged.walk()
        if not (self.keeps_versions and self._equals(staged, names)):  # an identical tree does not create a version
            self._clear_tree(document, None)
            # The documents of folders within the tree come first: Icechunk requires metadata before chunks.
            inner = [name for name in names if name.endswith(f"/{document}")]
            self.adopt(staged, inner)
            self.adopt(staged, sorted({*names} - {*inner, document}))
            self.adopt(staged, [document])
        staged.delete_entries(names)

    def _equals(self, other: Storage, names: builtins.list[str]) -> bool:
        return sorted(names) == sorted(self.walk()) and all(
            self.get_entries(batch) == other.get_entries(batch) for batch in _batches(names)
        )

    def _put_tree(self, folder: Path, document: str, placeholder: bytes | None) -> None:
        self._clear_tree(document, placeholder)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / document]
        self.put_entries({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})
        (self / document).put((folder / document).read_bytes())

    def _clear_tree(self, document: str, placeholder: bytes | None) -> None:
        if placeholder is not None:
            (self / document).put(placeholder)
        names = self.walk()
        if document in names:
            names.remove(document)
            if placeholder is None:
                (self / document).delete()
        self.delete_entries(names)

    def remove_tree(self, document: str, placeholder: bytes) -> None:
        """Remove everything below this location. Until the end, the document contains the placeholder."""
        self._clear_tree(document, placeholder)
        (self / document).delete()

    # One writer

    @contextmanager
    def lock(self, kind: str) -> Iterator[Self]:
        """Hold the write lock of this location. One process holds it at a time; readers never wait for it.

        Parameters
        ----------
        kind : str
            Kind of store, for messages, such as ``trajectory``.

        Yields
        ------
        Storage
            Handle for writing. In a storage with versions, other processes see the changes only after `publish`.

        Raises
        ------
        InputError
            If another process holds the lock (the message names it and its start time), if a process on another
            machine may hold it, or on a disk error.
        """
        from natgrad.storage.locks import lock_by_object

        with lock_by_object(self.unversioned(), kind):
            yield self

    # Zarr

    @abstractmethod
    def zarr_store(self) -> Any:
        """Return a Zarr store, or a path in one, that opens this location."""

    @property
    def chunk_separator(self) -> str:
        """Separator of the numbers in names of chunks. A dot needs no folders, and takes less time and space."""
        return "."

    # Versions

    @property
    def keeps_versions(self) -> bool:
        """True if each `publish` creates a version."""
        return False

    def holds_versions(self, kind: str | None = None) -> bool:
        """Return True if the stores of this OUT are, or will be, in a repository that keeps versions.

        Parameters
        ----------
        kind : str, optional
            Requested kind of storage of a new OUT, one of `natgrad.storage.KINDS`.

        Raises
        ------
        InputError
            If OUT cannot be of this kind, or is of another kind.
        """
        if kind == "icechunk":
            raise InputError(
                "OUT cannot be an Icechunk repository",
                where=str(self),
                why="Icechunk commits safely in object stores only",
                remedy="use a URL (s3://, gs://), or omit --store",
            )
        return False

    def latest(self) -> Self:
        """Return the latest version, or the pinned version if one was requested."""
        return self

    def publish(self, message: str) -> None:  # noqa: B027  (most storages keep no versions)
        """Create a version from the writes made under `lock`. Without versions, writes are visible immediately.

        Raises
        ------
        Unavailable
            If another process has published changes to the same entries.
        """

    def versions(self, last: int | None = None) -> builtins.list[dict[str, Any]]:
        """List the versions, newest first, with the keys ``version``, ``time``, ``message`` and ``tags``.

        Parameters
        ----------
        last : int, optional
            Number of versions to list; all by default. Each version takes one request.

        Raises
        ------
        InputError
            If this storage does not keep versions.
        """
        raise no_versions(str(self))

    def unversioned(self) -> Storage:
        """Return the location for files that are not versioned: locks, pages and outcomes of scans."""
        return self

    def published_with(self, other: Storage) -> Storage:
        """Return this location for writes that the other location, which is locked, publishes with its own."""
        return self

    # References

    @property
    def refers(self) -> bool:
        """True if chunks of arrays can be ranges of other files, for all readers; see `refer`."""
        return False

    def refer(self, ranges: Mapping[str, FileRange], folders: Iterable[str]) -> None:
        """Set entries below this location, which are chunks of arrays, to ranges of other files.

        Parameters
        ----------
        ranges : mapping
            Range by name of the entry.
        folders : iterable of str
            Folders that contain the files. Readers must be allowed to read a folder.
        """
        if ranges:
            raise NotImplementedError(f"{self} cannot refer to other files")

    # Errors

    def user_error(self, error: Exception, where: str) -> InputError | None:
        """Return the error for users; None if the error does not come from this storage."""
        return None


def _batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """Divide names, so that few entries are in memory at a time."""
    for start in range(0, len(names), 16):
        yield names[start : start + 16]


def no_versions(where: str) -> InputError:
    """Return the error for requesting a version from a storage without versions."""
    return InputError(
        "a plain store has no versions",
        where=where,
        why="it keeps the attempts of a run (--attempt), but not the data that a commit replaces",
        remedy="to keep every commit as a version, process into a new OUT in an object store with --store icechunk",
    )
