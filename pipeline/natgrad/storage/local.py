"""Files of this machine: durable, atomic writes with actionable errors, and reads by position.

Zarr, pathlib and fsspec write files without a flush, so a loss of power leaves names without data. Therefore this
module writes a file aside, flushes it, renames it, and flushes the folder; several files are flushed together,
because the system then writes its journal once for all of them. Linux-only calls are requested where the system
has them: without them the same data are read and written, only later.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

from natgrad.schema.errors import InputError
from natgrad.storage.base import Stat, Storage, StoredFile, Writes

__all__ = ["ChunkFile", "LocalStorage", "disk_errors", "open_local", "read_at"]

_REFUSALS = {
    errno.ENOSPC: ("no space left", "the disk is full", "free some space, or choose another OUT"),
    errno.EDQUOT: (
        "the disk quota is exceeded",
        "the user has reached the quota of this file system",
        "free some space, or request a higher quota",
    ),
    errno.EFBIG: ("a file would become too large", "a limit on the size of files is set", "raise it (ulimit -f)"),
    errno.EROFS: (
        "the file system is read-only",
        "it was mounted read-only, or became read-only after a failure",
        "choose another OUT",
    ),
    errno.EACCES: ("write permission denied", "the folder belongs to another user", "choose another OUT"),
    errno.EPERM: ("write permission denied", "the folder is protected", "choose another OUT"),
    errno.EIO: ("the disk failed", "it is damaged, or no longer connected", "check the disk (dmesg)"),
    errno.ENOENT: (
        "the store no longer exists",
        "it was removed or moved during a write",
        "do not move or remove it while natgrad runs",
    ),
}

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors by which a file system refuses hard links."""

_FLUSHES = 8
"""Number of flushes at a time, in threads."""

_SEGMENT_BYTES = 1 << 19
"""Bytes of a file after which the disk starts to write them, while the next ones are copied."""

_BYTE = (bytearray(1),)


# Flushing ----------------------------------------------------------------------------------------------------


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # On macOS fsync leaves the data in the cache of the disk, and another call flushes that.
        full = getattr(fcntl, "F_FULLFSYNC", None)
        if full is None:
            os.fsync(descriptor)
        else:
            fcntl.fcntl(descriptor, full)
    finally:
        os.close(descriptor)


@cache
def _flushing() -> ThreadPoolExecutor:
    """Return the threads that wait for the disk. They stay: their start takes longer than a fast disk."""
    return ThreadPoolExecutor(_FLUSHES, "flush")


os.register_at_fork(after_in_child=_flushing.cache_clear)  # a forked process has no threads


def _flush_all(paths: Iterable[Path]) -> None:
    """Wait until files and folders are on disk, several at a time: the system writes its journal once."""
    several = list(paths)
    if len(several) == 1:
        _flush(several[0])
        return
    under_way = [_flushing().submit(_flush, path) for path in several]
    wait(under_way)
    for flushed in under_way:
        flushed.result()


def _start_flush(descriptor: int) -> None:
    """Ask the system to send a file to the disk (Linux), without waiting."""
    system = ctypes.CDLL(None)
    if hasattr(system, "sync_file_range"):
        everything, write = ctypes.c_int64(0), 2  # SYNC_FILE_RANGE_WRITE
        # The flush that follows reports an error.
        system.sync_file_range(descriptor, everything, everything, write)


def _write_aside(path: Path, content: bytes | memoryview) -> Path:
    """Write a file beside another one, without waiting for the disk."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    try:
        with aside.open("wb", buffering=0) as file:
            for start in range(0, len(content), _SEGMENT_BYTES):
                left = memoryview(content)[start : start + _SEGMENT_BYTES]
                while left:
                    left = left[file.write(left) :]
                _start_flush(file.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return aside


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once (Linux), and return whether that was possible."""
    system = ctypes.CDLL(None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    arguments = (here, os.fsencode(one), here, os.fsencode(other), exchange)
    return hasattr(system, "renameat2") and system.renameat2(*arguments) == 0


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Translate what a disk refuses.

    Parameters
    ----------
    path : Path
        Where is written; the message names the file at fault where it is known.

    Raises
    ------
    InputError
        In place of an OSError. What is recorded is complete, because records follow the data.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:  # an error of a network, for example
            raise
        what, why, remedy = _REFUSALS[error.errno]
        raise InputError(
            f"{what}: {error.strerror}",
            where=str(error.filename or path),
            why=why,
            remedy=f"{remedy}; then run again: committed data are kept",
        ) from error


# The storage -------------------------------------------------------------------------------------------------


class LocalStorage(Storage):
    """A file or folder of this machine.

    Parameters
    ----------
    path : str or Path
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def __str__(self) -> str:
        return str(self._path)

    def __truediv__(self, name: str) -> Self:
        return type(self)(self._path / name)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self._path.name

    @property
    def parent(self) -> Self:
        """Folder of the file or folder."""
        return type(self)(self._path.parent)

    @property
    def local_path(self) -> Path:
        """The path."""
        return self._path

    def absolute(self) -> Self:
        """Return this location independently of the current directory."""
        return type(self)(self._path.absolute())

    # Reading

    def get_tagged(self) -> tuple[bytes, str]:
        """Return the content of a file, and no tag: a file is not replaced on a condition."""
        return self._path.read_bytes(), ""

    def get_ranges(self, spans: Sequence[tuple[int, int]]) -> builtins.list[bytes]:
        """Return ranges of the content of a file."""
        with self._path.open("rb", buffering=0) as file:
            return [os.pread(file.fileno(), stop - start, start) for start, stop in spans]

    def open(self) -> StoredFile:
        """Open a file."""
        file = self._path.open("rb")
        return StoredFile(file, os.fstat(file.fileno()).st_size)

    def list(self) -> builtins.list[str]:
        """Return the names in a folder."""
        return sorted(entry.name for entry in self._path.iterdir()) if self._path.is_dir() else []

    def stat(self, *, fresh: bool = True) -> Stat:
        """Return size and time of a file or folder."""
        found = self._path.stat()
        return Stat(found.st_size, found.st_mtime_ns, "")

    def is_folder(self) -> bool:
        """Return whether the path is a folder."""
        return self._path.is_dir()

    def exists(self) -> bool:
        """Return whether anything is at the path."""
        return self._path.exists()

    # Writing

    def put(self, content: bytes | memoryview) -> None:
        """Write a file: atomic, and durable on return."""
        self.parent.put_entries({self.name: content})

    def put_new(self, content: bytes | memoryview) -> None:
        """Write a file where there is none."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = _write_aside(self._path, content)
        try:
            _flush(aside)
            try:
                # A second name of the file: other than a rename, it is refused where the name exists.
                os.link(aside, self._path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if self._path.exists():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self._path)) from error
                aside.replace(self._path)
        finally:
            aside.unlink(missing_ok=True)
        _flush(self._path.parent)

    def put_entries(self, contents: Mapping[str, bytes | memoryview], *, flush_names: bool = True) -> None:
        """Write several files aside, flush them together, and rename them."""
        asides: dict[Path, Path] = {}
        folders: dict[Path, None] = {}
        try:
            for name, content in contents.items():
                path = self._path / name
                folders |= dict.fromkeys(self._folders(path))
                path.parent.mkdir(parents=True, exist_ok=True)
                asides[_write_aside(path, content)] = path
            _flush_all(asides)
            for aside, path in asides.items():
                aside.replace(path)
        except BaseException:
            for aside in asides:
                aside.unlink(missing_ok=True)
            raise
        if flush_names:
            _flush_all(folders)

    def _folders(self, path: Path) -> builtins.list[Path]:
        """Return the folders of an entry in which a name may be new."""
        below = [folder for folder in path.parents if self._path in folder.parents]
        return [*below, self._path] if not below or not below[-1].exists() else below

    def flush(self, entries: Iterable[Storage]) -> None:
        """Wait until files below this folder are on disk, and their names."""
        self.flush_paths(Path(str(entry)) for entry in entries)

    def flush_paths(self, paths: Iterable[Path], flushed: Iterable[Path] = ()) -> None:
        """Wait until files below this folder are on disk, and their names and those of files that are flushed."""
        files = sorted(set(paths))
        _flush_all(files)
        _flush_all(
            sorted(
                {folder for path in (*files, *flushed) for folder in path.parents if self._path in folder.parents}
            )
        )

    def writes(self) -> Writes:
        """Return the writes of one writer below this folder."""
        return _LocalWrites(self)

    def delete(self) -> None:
        """Remove a file."""
        self._path.unlink()
        _flush(self._path.parent)

    def clear_leftovers(self) -> None:
        """Remove the unfinished files of a killed writer from this folder."""
        for aside in self._path.glob(".*.tmp"):
            aside.unlink(missing_ok=True)

    # Trees

    @contextmanager
    def replace_tree(self, document: str, placeholder: bytes | None = None) -> Iterator[Path]:
        """Replace a folder.

        A reader finds the old folder or the new one at any moment. Where the system cannot exchange two names
        (macOS, some network file systems) it finds none for an instant.
        """
        path = self._path
        aside, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)
        yield aside
        _flush_all((*aside.rglob("*"), aside))
        if not path.exists():
            aside.rename(path)
        elif not _exchange(aside, path):
            path.rename(old)
            aside.rename(path)
            old.rename(aside)
        _flush(path.parent)
        shutil.rmtree(aside, ignore_errors=True)

    def remove_tree(self, document: str, placeholder: bytes) -> None:
        """Remove a folder: it is renamed first, so no incomplete one is left under the name."""
        aside = self._path.with_name(f".{self._path.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        if self._path.exists():
            self._path.rename(aside)
            shutil.rmtree(aside)

    # The rest

    def stores(self, kind: str | None = None, version: str | None = None) -> Storage:
        """Return the storage of the stores in this folder OUT; see `natgrad.storage.open_out`."""
        if kind == "icechunk":
            raise InputError(
                "a folder cannot be an Icechunk repository",
                where=str(self),
                why="Icechunk commits are only safe in object stores: in a folder, successful commits are lost if "
                "two processes commit (issues 804 and 1494 of earth-mover/icechunk)",
                remedy="give a URL (s3://, gs://), or omit --store: a folder keeps the attempts, too",
            )
        return super().stores(kind, version)

    @contextmanager
    def lock(self, kind: str) -> Iterator[Self]:
        """Hold the lock of this location; see `natgrad.storage.locks`."""
        from natgrad.storage.locks import lock_by_file

        with disk_errors(self._path), lock_by_file(self._path, kind):
            yield self

    def zarr_store(self) -> Any:
        """Return a store of Zarr."""
        from zarr.storage import LocalStore

        return LocalStore(self._path)


class _LocalWrites(Writes):
    """Writes into files in place: the bytes that a reader uses stay, and complete files are flushed at once."""

    def __init__(self, storage: LocalStorage) -> None:
        super().__init__()
        self._storage = storage
        self._unflushed: set[Path] = set()
        self._flushed: set[Path] = set()

    def write_segment(self, entry: Storage, offset: int, content: memoryview, size: int) -> None:
        """Write a segment of a file of a fixed size; the bytes before it stay as they are."""
        path = Path(str(entry))
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.truncate(descriptor, size)
            stop = offset + len(content)
            while content:
                count = os.pwrite(descriptor, content, offset)
                content, offset = content[count:], offset + count
        finally:
            os.close(descriptor)
        if stop == size:
            # Nothing is added to this file: it is flushed while the next ones are read and written.
            self._flushed.add(path)
            self.start(_flush, path)
        else:
            self._unflushed.add(path)

    def settle(self, entries: Iterable[Storage] = ()) -> None:
        """Wait until everything that was written is on disk, and entries that another library wrote, too."""
        self._unflushed.update(Path(str(entry)) for entry in entries)
        self.wait()
        self._storage.flush_paths(self._unflushed, self._flushed)
        self._unflushed.clear()
        self._flushed.clear()


def open_local(location: str) -> LocalStorage:
    """Open a URL ``file:///path``; see `natgrad.storage.open_storage`."""
    return LocalStorage(unquote(location.removeprefix("file://")))


# Reading by position -----------------------------------------------------------------------------------------


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read bytes of an open file into a buffer, and return their number; 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, (buffer,), offset)
    content = os.pread(descriptor, len(buffer), offset)
    buffer[: len(content)] = content
    return len(content)


class ChunkFile:
    """A file of plain bytes, read at any position into a buffer that is used again.

    Parameters
    ----------
    path : str

    Attributes
    ----------
    descriptor : int
    size : int
        Its bytes when it was opened.

    Raises
    ------
    OSError
        If it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.descriptor).st_size

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def read_ahead(self) -> bool:
        """Request kernel read-ahead unless the file is cached already (Linux). Return True if requested."""
        if not hasattr(os, "posix_fadvise") or (self._is_cached(0) and self._is_cached(self.size - 1)):
            return False
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        return True

    def _is_cached(self, offset: int) -> bool:
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        try:
            return os.preadv(self.descriptor, _BYTE, offset, os.RWF_NOWAIT) == 1
        except OSError:
            return False

    def read(self, offset: int, out: memoryview) -> int:
        """Read bytes from an offset on until a buffer is full.

        Returns
        -------
        int
            Number of bytes that are missing because the file ends early.

        Raises
        ------
        OSError
            If it cannot be read.
        """
        # A read of many bytes, or an interrupted one, may return a part.
        while out:
            count = read_at(self.descriptor, out, offset)
            if not count:
                return len(out)
            out, offset = out[count:], offset + count
        return 0
