"""The storage protocol: a handle of one location, and the table of schemes that opens it.

A `Storage` is bound to a location: a file, a folder, an object, or all objects below a prefix. ``storage / name``
is the handle of an entry. The verbs are those of obspec (get, put, list, delete), and each implementation keeps
these guarantees:

- `Storage.put` is atomic and durable: a reader finds the old content or the new one, and on return the new one
  survives a loss of power.
- `Storage.put_new` and `Storage.put_if` fail where another writer was faster.
- `Storage.lock` admits one writer, and names the holder to the others.

A location is opened once, at the edge of the program (`open_storage`, and `open_out` for OUT), and the handle is
passed down. Another kind of storage is one subclass of `Storage` and one entry point of the group
``natgrad.storage`` whose name is the scheme of its URLs.
"""

from __future__ import annotations

import builtins
import io
import re
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

from natgrad.schema.errors import InputError

__all__ = [
    "KINDS",
    "Location",
    "Stat",
    "Storage",
    "StoredFile",
    "Writes",
    "no_versions",
    "open_all",
    "open_out",
    "open_storage",
    "require_local",
]

KINDS = ("plain", "icechunk")
"""Kinds of storage that ``--store`` chooses from: an Icechunk repository keeps every commit as a version."""


class Stat(NamedTuple):
    """Size in bytes of a file or object, the time of its last change in ns, and the tag of its content."""

    size: int
    time: int
    tag: str


class StoredFile(io.RawIOBase):
    """A file or object that is open for reading, at any position.

    Parameters
    ----------
    file : binary file
    size : int
        Its bytes when it was opened.
    widen : callable, optional
        Called by `widen`.
    """

    def __init__(self, file: Any, size: int, widen: Callable[[], None] | None = None) -> None:
        self._file, self.size, self._widen = file, size, widen

    def widen(self) -> None:
        """Fetch large blocks from now on: the description of the data has been read, and the data follow."""
        if self._widen is not None:
            self._widen()

    def read(self, size: int = -1, /) -> bytes:
        """Read up to so many bytes at the position."""
        return cast(bytes, self._file.read(size))

    def readinto(self, buffer: Any, /) -> int:
        """Read bytes at the position into a buffer, and return their number."""
        return cast(int, self._file.readinto(buffer))

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a position."""
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

    Disk and network are slower than memory, and several requests at a time are faster than one: writes run in
    threads while the caller prepares the next one.

    Attributes
    ----------
    AT_ONCE : int
        Largest number of writes under way, each perhaps with an object in memory.
    """

    AT_ONCE = 4

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: deque[Future[None]] = deque()

    def start(self, write: Callable[..., None], *arguments: Any) -> None:
        """Run a write in a thread; it has ended when `settle` returns.

        Raises
        ------
        Exception
            If an earlier write failed.
        """
        while len(self._under_way) >= self.AT_ONCE:
            self._under_way.popleft().result()
        self._pool = self._pool or ThreadPoolExecutor(self.AT_ONCE)
        self._under_way.append(self._pool.submit(write, *arguments))

    def wait(self) -> None:
        """Wait until every write that was started has ended.

        Raises
        ------
        Exception
            If one of them failed.
        """
        while self._under_way:
            self._under_way.popleft().result()

    def write_segment(self, entry: Storage, offset: int, content: memoryview, size: int) -> None:
        """Write a segment of an entry of a fixed size; the bytes before the segment stay as they are.

        An object is put as a whole, so the bytes before are read first.

        Parameters
        ----------
        entry : Storage
        offset : int
            Position of the segment.
        content : memoryview of bytes
        size : int
            Bytes of the entry; those after the segment are not used.

        Raises
        ------
        EOFError
            If the entry has fewer than ``offset`` bytes.
        """
        before = b""
        if offset:
            self.wait()
            (before,) = entry.get_ranges([(0, offset)])
            if len(before) != offset:
                raise EOFError(f"it is {offset - len(before)} bytes too short")
        self.start(entry.put, b"".join((before, content, bytes(size - offset - len(content)))))

    def settle(self, entries: Iterable[Storage] = ()) -> None:
        """Wait until everything that was written is durable, and entries that another library wrote, too."""
        self.wait()

    def abandon(self) -> None:
        """Cancel what has not started, and return when nothing is under way any more."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._under_way.clear()


class Storage(ABC):
    """A location in a storage; see the module's documentation for the guarantees.

    Handles compare and sort by what `str` returns, and can be pickled: Dask tasks carry them.
    """

    # Location

    @abstractmethod
    def __str__(self) -> str:
        """Return the path or URL that a user would type."""

    @abstractmethod
    def __truediv__(self, name: str) -> Self:
        """Return the entry of a name; levels of the name are separated by slashes."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Last part of the location."""

    @property
    @abstractmethod
    def parent(self) -> Self:
        """Location that this one is an entry of."""

    @property
    def local_path(self) -> Path | None:
        """Path on this machine, for code that needs files; None where there is none."""
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
        """Return this location independently of the current directory."""
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
        """Return the content and the tag that `put_if` compares; the tag is empty where there is no such condition.

        Raises
        ------
        FileNotFoundError
            If there is no file or object.
        """

    def get(self) -> bytes:
        """Return the content of a file or object (FileNotFoundError)."""
        return self.get_tagged()[0]

    def get_ranges(self, spans: Sequence[tuple[int, int]]) -> builtins.list[bytes]:
        """Return ranges of the content, (start, stop) each; one beyond the end is short (FileNotFoundError)."""
        content = self.get()
        return [content[start:stop] for start, stop in spans]

    def get_entries(self, names: Sequence[str]) -> builtins.list[bytes | None]:
        """Return the content of several entries; None where there is none."""
        found: list[bytes | None] = []
        for name in names:
            try:
                found.append((self / name).get())
            except FileNotFoundError:
                found.append(None)
        return found

    def open(self) -> StoredFile:
        """Open a file or object for reading at any position; see `StoredFile.widen` (FileNotFoundError)."""
        content = self.get()
        return StoredFile(io.BytesIO(content), len(content))

    @abstractmethod
    def list(self) -> builtins.list[str]:
        """Return the names of the entries, sorted; none where there is no folder."""

    def walk(self) -> builtins.list[str]:
        """Return the names of all files or objects below this location, levels separated by slashes, sorted."""
        found: list[str] = []
        for name in self.list():
            entry = self / name
            found += [f"{name}/{below}" for below in entry.walk()] if entry.is_folder() else [name]
        return sorted(found)

    def files(self) -> builtins.list[Self]:
        """Return the files in a folder, sorted by name; of a file, itself; none where there is nothing."""
        if self.is_folder():
            return [entry for entry in (self / name for name in self.list()) if not entry.is_folder()]
        return [self] if self.exists() else []

    @abstractmethod
    def stat(self, *, fresh: bool = True) -> Stat:
        """Return size, time and tag of a file or object.

        Parameters
        ----------
        fresh : bool
            Ask the storage; otherwise what the last `list` of the folder returned may be used.

        Raises
        ------
        FileNotFoundError
            If there is none.
        """

    @abstractmethod
    def is_folder(self) -> bool:
        """Return whether entries are below this location."""

    def exists(self) -> bool:
        """Return whether a file, an object or a folder is at this location."""
        try:
            self.stat()
        except FileNotFoundError:
            return self.is_folder()
        return True

    # Writing

    @abstractmethod
    def put(self, content: bytes | memoryview) -> None:
        """Write a file or object: atomic, and durable on return. Folders above it are made."""

    @abstractmethod
    def put_new(self, content: bytes | memoryview) -> None:
        """Write a file or object where there is none (FileExistsError)."""

    def put_if(self, content: bytes | memoryview, tag: str) -> None:
        """Replace a file or object that still has the tag of `get_tagged`, not an empty one (FileExistsError)."""
        raise NotImplementedError(f"{type(self).__name__} has no conditional replacement")

    def put_once(self, content: bytes) -> None:
        """Write a new file or object; one with the same content is accepted (FileExistsError).

        A library that repeats a request whose answer was lost finds its own object.
        """
        try:
            self.put_new(content)
        except FileExistsError:
            if self.get() != content:
                raise

    def put_entries(self, contents: Mapping[str, bytes | memoryview], *, flush_names: bool = True) -> None:
        """Write several entries: each is atomic, and all are durable on return; a disk is waited for once.

        Parameters
        ----------
        contents : mapping of str to bytes
            Name to content.
        flush_names : bool
            Where it is False, a loss of power may leave the old content of an entry.
        """
        for name, content in contents.items():
            (self / name).put(content)

    def flush(self, entries: Iterable[Storage]) -> None:  # noqa: B027  (an object is durable once it is put)
        """Wait until files that another library wrote below this location are durable."""

    def writes(self) -> Writes:
        """Return the writes of one writer below this location."""
        return Writes()

    @abstractmethod
    def delete(self) -> None:
        """Remove a file or object (FileNotFoundError)."""

    def delete_entries(self, names: Sequence[str]) -> None:
        """Remove several files or objects below this location."""
        for name in names:
            (self / name).delete()

    def clear_leftovers(self) -> None:  # noqa: B027  (an object is never unfinished)
        """Remove the unfinished files of a killed writer from this folder."""

    # Trees

    @contextmanager
    def replace_tree(self, document: str, placeholder: bytes | None = None) -> Iterator[Path]:
        """Replace everything below this location by a tree of files.

        A reader finds the old tree or the new one. Where a storage cannot exchange them at once, a reader finds
        the old entries, none, or the new ones: the document is removed first, or replaced by the placeholder, and
        written last.

        Parameters
        ----------
        document : str
            Name of the file that makes the tree valid.
        placeholder : bytes, optional
            Content of the document while the tree is incomplete.

        Yields
        ------
        Path
            Folder on this machine, to be made and filled by the caller. After an error nothing is replaced.
        """
        with tempfile.TemporaryDirectory(prefix="natgrad-") as folder:
            aside = Path(folder) / self.name
            yield aside
            self._put_tree(aside, document, placeholder)

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
        """Remove everything below this location; while it is incomplete, the document is the placeholder."""
        self._clear_tree(document, placeholder)
        (self / document).delete()

    # One writer

    @contextmanager
    def lock(self, kind: str) -> Iterator[Self]:
        """Hold the lock of this location, which one process has at a time; readers never wait for it.

        Parameters
        ----------
        kind : str
            What is locked, for messages: ``trajectory``.

        Yields
        ------
        Storage
            Where to write. Of a storage with versions, nobody else sees what is written before `publish`.

        Raises
        ------
        InputError
            If another process holds the lock (the message names it, and the time since when), or one of another
            machine may hold it, or if the disk refuses a write.
        """
        from natgrad.storage.locks import lock_by_object

        with lock_by_object(self.unversioned(), kind):
            yield self

    # Zarr

    @abstractmethod
    def zarr_store(self) -> Any:
        """Return what Zarr opens this location by: a store, or a path in one."""

    # Versions

    @property
    def keeps_versions(self) -> bool:
        """True where every `publish` makes a version."""
        return False

    def stores(self, kind: str | None = None, version: str | None = None) -> Storage:
        """Return the storage of the stores in this folder OUT, which may keep versions; see `open_out`."""
        if kind == "icechunk":
            raise InputError(
                "OUT cannot be an Icechunk repository",
                where=str(self),
                why="Icechunk commits are only safe in object stores",
                remedy="give a URL (s3://, gs://), or omit --store",
            )
        if version is not None:
            raise no_versions(str(self))
        return self

    def latest(self) -> Self:
        """Return the latest version, or the pinned version if one was requested."""
        return self

    def publish(self, message: str) -> None:  # noqa: B027  (most storages keep no versions)
        """Make a version of what was written under `lock`; without versions it is visible already.

        Raises
        ------
        Unavailable
            If another process has published the same entries.
        """

    def versions(self, last: int | None = None) -> builtins.list[dict[str, Any]]:
        """List the versions, the newest first: ``version``, ``time``, ``message``, ``tags``.

        Parameters
        ----------
        last : int, optional
            Number of versions to list; each is a request.

        Raises
        ------
        InputError
            If this storage keeps no versions.
        """
        raise no_versions(str(self))

    def unversioned(self) -> Storage:
        """Return the location for what is not part of a version: locks, pages, and the outcome of a scan."""
        return self

    # Errors

    def refusal(self, error: Exception, where: str) -> InputError | None:
        """Translate an error of this storage for its user; None where it is not of this storage."""
        return None


def no_versions(where: str) -> InputError:
    """Return the refusal of a version of a storage that keeps none."""
    return InputError(
        "a plain store has no versions",
        where=where,
        why="it keeps the attempts of a run (--attempt), but not the data that a commit replaces",
        remedy="to keep every commit as a version, process into a new OUT in an object store with --store icechunk",
    )


# Opening -----------------------------------------------------------------------------------------------------

Location = str | Path | Storage
"""Location as a user gives it: a path or a URL, or an open handle."""

Opener = Callable[[str], Storage]
"""Opens a URL; an entry point of the group ``natgrad.storage`` is one."""

_GROUP = "natgrad.storage"
_BUILT_IN = {
    "file": "natgrad.storage.local:open_local",
    "s3": "natgrad.storage.objects:open_objects",
    "gs": "natgrad.storage.objects:open_objects",
}
"""Schemes of URLs, and what opens them; entry points of the group add others."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(/+)")


def open_storage(location: Location) -> Storage:
    """Open a location: the one place where paths and URLs are parsed. No request is made.

    Parameters
    ----------
    location : str, Path or Storage
        A path, or a URL: ``s3://bucket/key``, ``gs://bucket/key``, ``file:///folder``. Slashes that `pathlib`
        collapsed are restored. A handle is returned as it is.

    Returns
    -------
    Storage

    Raises
    ------
    InputError
        If the scheme is unknown, or its library is not installed.
    """
    if isinstance(location, Storage):
        return location
    text = str(location)
    found = _SCHEME.match(text)
    opener = None if found is None else _opener(found[1])
    if found is None or opener is None:
        if found is not None and found[2] == "//":
            raise InputError(
                f"unknown URL scheme {found[1]}://",
                where=text,
                remedy=f"give a path, or a URL with one of the schemes {', '.join(_schemes())}",
            )
        from natgrad.storage.local import LocalStorage

        return LocalStorage(text)
    slashes = "///" if found[1] == "file" else "//"
    return opener(f"{found[1]}:{slashes}{text[found.end() :]}")


def open_out(out: Location, *, kind: str | None = None, version: str | None = None) -> Storage:
    """Open the folder OUT of a run, and find out whether it is an Icechunk repository.

    Parameters
    ----------
    out : str, Path or Storage
        As for `open_storage`.
    kind : str, optional
        One of `KINDS`: the kind of storage of a new OUT. An existing one is recognized by its content.
    version : str, optional
        Identifier, tag or time (ISO 8601) of a version to read; the latest by default.

    Returns
    -------
    Storage
        Of the stores in OUT.

    Raises
    ------
    InputError
        If the location cannot be opened, OUT is of another kind, or there is no such version.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(
            f"unknown storage kind {kind!r}", where="--store", remedy=f"choose one of: {', '.join(KINDS)}"
        )
    return open_storage(out).stores(kind, version)


def _schemes() -> list[str]:
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=_GROUP))})


def _opener(scheme: str) -> Opener | None:
    if scheme in _BUILT_IN:
        module, _, name = _BUILT_IN[scheme].partition(":")
        return cast(Opener, getattr(import_module(module), name))
    for point in entry_points(group=_GROUP, name=scheme):
        return cast(Opener, point.load())
    return None


def open_all(locations: Location | Sequence[Location]) -> list[Storage]:
    """Open one location, or several; see `open_storage`."""
    if isinstance(locations, str | Path | Storage):
        return [open_storage(locations)]
    return [open_storage(location) for location in locations]


def require_local(location: Location, what: str) -> Path:
    """Return the path of a location on this machine.

    Parameters
    ----------
    location : str, Path or Storage
    what : str
        Name of the option, for the message.

    Raises
    ------
    InputError
        If the location is not on this machine.
    """
    storage = open_storage(location)
    if storage.local_path is None:
        raise InputError(
            f"{what} must be a folder on this machine",
            where=str(storage),
            why="finding and locking many runs needs features that object stores do not have",
            remedy="give a folder, or process each run separately: natgrad process SOURCE OUT, which accepts URLs",
        )
    return storage.local_path
