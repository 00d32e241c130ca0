"""Local files: durable, atomic writes with actionable errors, and reads by position.

Zarr, pathlib and fsspec do not flush the files that they write, so a power failure may leave file names without
data. This module writes a temporary file, flushes it, renames it, and flushes the folder. Several files are flushed
together, because the system then writes its journal only once. Linux-only system calls are used where available.
Without them the same data are read and written, only more slowly.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import itertools
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

from natgrad.schema.errors import InputError, Unavailable
from natgrad.storage.base import Stat, Storage, StoredFile, Writes

__all__ = [
    "ChunkFile",
    "LocalStorage",
    "NotRegularError",
    "disk_errors",
    "open_local",
    "open_regular",
    "read_at",
    "require_regular",
]

_FAILURES = {
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
    errno.EACCES: ("permission denied", "it belongs to another user", "request access, or choose another OUT"),
    errno.EPERM: ("permission denied", "it is protected", "choose another OUT"),
    errno.EIO: ("the disk failed", "it is damaged or disconnected", "check the disk (dmesg)"),
    errno.ENOENT: (
        "a file no longer exists",
        "the store was removed or moved while natgrad ran",
        "do not move or remove it",
    ),
}
"""Failure, probable cause and remedy for each error code."""

_OTHER_FAILURE = ("the system cannot access a file", "see the system's message", "correct the cause")

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Error codes of file systems without hard links."""

_FLUSHES = 8
"""Number of threads for concurrent flushes."""

_SEGMENT_BYTES = 1 << 19
"""Bytes per write. The disk writes them while the next ones are copied."""

_BYTE = (bytearray(1),)


@contextmanager
def _naming_errors(path: Path) -> Iterator[None]:
    """Add the name of a local file to errors of the system that have none, as those of calls with a descriptor."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


# Flushing ----------------------------------------------------------------------------------------------------


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    with _naming_errors(path):
        _flush_descriptor(os.open(path, os.O_RDONLY))


def _flush_descriptor(descriptor: int) -> None:
    try:
        # On macOS, fsync leaves the data in the cache of the disk. F_FULLFSYNC flushes this cache.
        full = getattr(fcntl, "F_FULLFSYNC", None)
        if full is None:
            os.fsync(descriptor)
        else:
            fcntl.fcntl(descriptor, full)
    finally:
        os.close(descriptor)


@cache
def _flush_threads() -> ThreadPoolExecutor:
    """Return the pool of threads that wait for the disk. It is reused: starting threads is slower than a flush."""
    return ThreadPoolExecutor(_FLUSHES, "flush")


os.register_at_fork(after_in_child=_flush_threads.cache_clear)  # threads do not survive a fork


def _flush_all(paths: Iterable[Path]) -> None:
    """Flush files and folders concurrently, so that the system writes its journal once."""
    several = list(paths)
    if len(several) == 1:
        _flush(several[0])
        return
    flushes = [_flush_threads().submit(_flush, path) for path in several]
    wait(flushes)
    for flushed in flushes:
        flushed.result()


def _start_flush(descriptor: int) -> None:
    """Start writing a file to the disk without waiting (Linux)."""
    system = ctypes.CDLL(None)
    if hasattr(system, "sync_file_range"):
        everything, write = ctypes.c_int64(0), 2  # SYNC_FILE_RANGE_WRITE
        # The later flush reports errors.
        system.sync_file_range(descriptor, everything, everything, write)


def _write_temporary(path: Path, content: bytes | memoryview) -> Path:
    """Write a temporary file in the folder of a path, without waiting for the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    try:
        with _naming_errors(path), temporary.open("wb", buffering=0) as file:
            for start in range(0, len(content), _SEGMENT_BYTES):
                left = memoryview(content)[start : start + _SEGMENT_BYTES]
                while left:
                    left = left[file.write(left) :]
                _start_flush(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically (Linux). Return True on success."""
    system = ctypes.CDLL(None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    arguments = (here, os.fsencode(first), here, os.fsencode(second), exchange)
    return hasattr(system, "renameat2") and system.renameat2(*arguments) == 0


@contextmanager
def disk_errors(path: Path | None) -> Iterator[None]:
    """Translate errors of a disk into messages for users.

    Parameters
    ----------
    path : Path, optional
        Location of the writes. The message contains it if the error does not contain a file name. Default: errors
        without a file name are not translated.

    Raises
    ------
    Unavailable
        Instead of an OSError. Recorded data are complete, because records are written after the data.
    """
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None and (path is None or error.errno not in _FAILURES)
        if error.errno is None or unnamed:
            raise  # an error of a network, for example
        what, why, remedy = _FAILURES.get(error.errno, _OTHER_FAILURE)
        raise Unavailable(
            f"{what}: {error.strerror}",
            where=str(error.filename or path),
            why=why,
            remedy=f"{remedy}; then run again: committed data are kept",
        ) from error


# The storage -------------------------------------------------------------------------------------------------


def _stat_of(status: os.stat_result) -> Stat:
    return Stat(status.st_size, status.st_mtime_ns, f"{status.st_ino}:{status.st_ctime_ns}")


class LocalStorage(Storage):
    """A file or folder on this machine.

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
        """Folder that contains this file or folder."""
        return type(self)(self._path.parent)

    @property
    def local_path(self) -> Path:
        """The path."""
        return self._path

    def absolute(self) -> Self:
        """Return this location, independent of the current directory."""
        return type(self)(self._path.absolute())

    # Reading

    def get_tagged(self) -> tuple[bytes, str]:
        """Return the content of a file, and an empty tag, because files have no conditional writes."""
        descriptor = open_regular(self._path)
        with _naming_errors(self._path), os.fdopen(descriptor, "rb") as file:
            return file.read(), ""

    def get_ranges(self, spans: Sequence[tuple[int, int]]) -> builtins.list[bytes]:
        """Return ranges of the content of a file."""
        descriptor = open_regular(self._path)
        try:
            with _naming_errors(self._path):
                # pread allocates all requested bytes, even those beyond the end of the file.
                size = os.fstat(descriptor).st_size
                return [os.pread(descriptor, max(min(stop, size) - start, 0), start) for start, stop in spans]
        finally:
            os.close(descriptor)

    def open(self) -> StoredFile:
        """Open a file."""
        file = os.fdopen(open_regular(self._path), "rb")
        return StoredFile(file, os.fstat(file.fileno()).st_size)

    def list(self) -> builtins.list[str]:
        """Return the names in a folder."""
        return sorted(entry.name for entry in self._path.iterdir()) if self._path.is_dir() else []

    def stat(self, *, fresh: bool = True) -> Stat:
        """Return the size and time of a file or folder; the tag is its inode and its status change time."""
        return _stat_of(self._path.stat())

    def is_folder(self) -> bool:
        """Return True if the path is a folder."""
        return self._path.is_dir()

    def exists(self) -> bool:
        """Return True if the path exists."""
        return self._path.exists()

    # Writing

    def put(self, content: bytes | memoryview) -> None:
        """Write a file atomically and durably."""
        self.parent.put_entries({self.name: content})

    def put_new(self, content: bytes | memoryview) -> None:
        """Write a new file; raise FileExistsError if it exists."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _write_temporary(self._path, content)
        try:
            _flush(temporary)
            try:
                # Unlike a rename, a hard link fails if the name exists.
                os.link(temporary, self._path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if self._path.exists():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self._path)) from error
                temporary.replace(self._path)
        finally:
            temporary.unlink(missing_ok=True)
        _flush(self._path.parent)

    def put_entries(self, contents: Mapping[str, bytes | memoryview], *, flush_names: bool = True) -> None:
        """Write several temporary files, flush them together, and rename them."""
        written: dict[Path, Path] = {}
        folders: dict[Path, None] = {}
        try:
            for name, content in contents.items():
                path = self._path / name
                folders |= dict.fromkeys(self._folders(path))
                path.parent.mkdir(parents=True, exist_ok=True)
                written[_write_temporary(path, content)] = path
            _flush_all(written)
            for temporary, path in written.items():
                temporary.replace(path)
        except BaseException:
            for temporary in written:
                temporary.unlink(missing_ok=True)
            raise
        if flush_names:
            _flush_all(folders)

    def _folders(self, path: Path) -> builtins.list[Path]:
        """Return the folders of an entry that may have a new name in them."""
        below = list(itertools.takewhile(lambda folder: folder != self._path, path.parents))
        return [*below, self._path] if not below or not below[-1].exists() else below

    def flush(self, entries: Iterable[Storage]) -> None:
        """Wait until files below this folder, and their names, are on disk."""
        self.flush_paths(Path(str(entry)) for entry in entries)

    def flush_paths(self, paths: Iterable[Path], flushed: Iterable[Path] = ()) -> None:
        """Wait until files below this folder, their names and the names of flushed files are on disk."""
        files = sorted(set(paths))
        _flush_all(files)
        _flush_all(
            sorted(
                {folder for path in (*files, *flushed) for folder in path.parents if self._path in folder.parents}
            )
        )

    def writes(self) -> Writes:
        """Return an object that manages the writes of one writer below this folder."""
        return _LocalWrites(self)

    def delete(self) -> None:
        """Remove a file."""
        self._path.unlink()
        _flush(self._path.parent)

    def clear_leftovers(self) -> None:
        """Remove the unfinished files of a killed writer from this folder."""
        for temporary in self._path.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)

    # Trees

    @contextmanager
    def replace_tree(self, document: str, placeholder: bytes | None = None) -> Iterator[Path]:
        """Replace the folder.

        Readers always find the old or the new folder, except on systems that cannot exchange two names (macOS, some
        network file systems): there, the folder is missing for an instant.
        """
        path = self._path
        staged, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
        for leftover in (staged, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            yield staged
            _flush_all((*staged.rglob("*"), staged))
        except BaseException as error:
            shutil.rmtree(staged, ignore_errors=True)  # it may fill the disk
            self._rename_in(error, staged)
            raise
        self._install(staged)

    def _rename_in(self, error: BaseException, staged: Path) -> None:
        """Let an error name the file in this folder instead of the new one."""
        if isinstance(error, OSError) and error.filename is not None:
            named = Path(os.fsdecode(error.filename))
            if named.is_relative_to(staged):
                error.filename = str(self._path / named.relative_to(staged))

    @contextmanager
    def staging(self) -> Iterator[Storage]:
        """Prepare the folder that will replace this one. It is removed if the disk is full."""
        with super().staging() as staged:
            folder = Path(str(staged))
            try:
                yield staged
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    shutil.rmtree(folder, ignore_errors=True)
                self._rename_in(error, folder)
                raise

    def _install(self, staged: Path) -> None:
        """Rename a folder that is on disk to this one, and remove the old folder."""
        path, old = self._path, self._path.with_name(f".{self._path.name}.old")
        if not path.exists():
            staged.rename(path)
        elif not _exchange(staged, path):
            path.rename(old)
            staged.rename(path)
            old.rename(staged)
        _flush(path.parent)
        shutil.rmtree(staged, ignore_errors=True)

    def adopt(self, source: Storage, names: Iterable[str]) -> None:
        """Take over files as hard links, or as copies if there are no links or the source is elsewhere."""
        if source.local_path is None:
            super().adopt(source, names)
            return
        copied, folders = [], {self._path: None}
        for name in names:
            path, other = self._path / name, source.local_path / name
            folders |= dict.fromkeys(self._folders(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            try:
                os.link(other, path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                shutil.copyfile(other, path)
                copied.append(path)
        _flush_all((*copied, *folders))

    def replace_with(self, staged: Storage, document: str) -> None:
        """Exchange the folders, see `replace_tree`."""
        shutil.rmtree(self._path.with_name(f".{self._path.name}.old"), ignore_errors=True)
        if staged.local_path is None:
            raise ValueError(f"the new tree of {self} must be a folder, got {staged}")
        self._install(staged.local_path)

    def remove_tree(self, document: str, placeholder: bytes) -> None:
        """Remove a folder. It is renamed first, so that no incomplete folder keeps the name."""
        renamed = self._path.with_name(f".{self._path.name}.old")
        shutil.rmtree(renamed, ignore_errors=True)
        if self._path.exists():
            self._path.rename(renamed)
            shutil.rmtree(renamed)

    # Stores and locks

    def holds_versions(self, kind: str | None = None) -> bool:
        """Return False; a folder is refused if an Icechunk repository is requested."""
        if kind == "icechunk":
            raise InputError(
                "a folder cannot be an Icechunk repository",
                where=str(self),
                why="Icechunk commits are only safe in object stores: in a folder, successful commits are lost if "
                "two processes commit (issues 804 and 1494 of earth-mover/icechunk)",
                remedy="use a URL (s3://, gs://), or omit --store: a folder also keeps the attempts",
            )
        return False

    @contextmanager
    def lock(self, kind: str) -> Iterator[Self]:
        """Hold the lock of this location; see `natgrad.storage.locks`."""
        from natgrad.storage.locks import lock_by_file

        with disk_errors(self._path), lock_by_file(self._path, kind):
            yield self

    def zarr_store(self) -> Any:
        """Return a Zarr store."""
        from natgrad.storage.named_files import NamedFiles

        return NamedFiles(self._path)


class _LocalWrites(Writes):
    """Writes in place. Bytes that readers use are never changed, and a file is flushed as soon as it is full."""

    def __init__(self, storage: LocalStorage) -> None:
        super().__init__()
        self._storage = storage
        self._unflushed: set[Path] = set()
        self._flushed: set[Path] = set()

    def write_segment(self, entry: Storage, offset: int, content: memoryview, size: int) -> None:
        """Write a segment of a file of fixed size; the bytes before the segment are preserved."""
        path = Path(str(entry))
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file that has lost the bytes before the segment must not be filled up with zeros.
        descriptor = os.open(path, os.O_WRONLY | (0 if offset else os.O_CREAT), 0o666)
        try:
            if missing := max(0, offset - os.fstat(descriptor).st_size):
                raise EOFError(f"it is {missing} bytes too short")
            stop = offset + len(content)
            with _naming_errors(path):
                os.truncate(descriptor, size)
                while content:
                    count = os.pwrite(descriptor, content, offset)
                    content, offset = content[count:], offset + count
        finally:
            os.close(descriptor)
        if stop == size:
            # The file is full, so it is flushed while the next ones are read and written.
            self._flushed.add(path)
            self.start(_flush, path)
        else:
            self._unflushed.add(path)

    def settle(self, entries: Iterable[Storage] = ()) -> None:
        """Wait until all writes, and the given entries written by another library, are on disk."""
        self._unflushed.update(Path(str(entry)) for entry in entries)
        self.wait()
        self._storage.flush_paths(self._unflushed, self._flushed)
        self._unflushed.clear()
        self._flushed.clear()


def open_local(location: str) -> LocalStorage:
    """Open a URL ``file:///path``; see `natgrad.storage.open_storage`."""
    return LocalStorage(unquote(location.removeprefix("file://")))


# Opening -----------------------------------------------------------------------------------------------------

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NotRegularError(OSError):
    """Error for a name that refers to a pipe, a socket, a device or a folder instead of a file."""


def require_regular(path: str | Path) -> int:
    """Check that a path is a regular file or a link to one, and return its size in bytes.

    This is for libraries that open files by their path; other code calls `open_regular`.

    Raises
    ------
    NotRegularError
        If it is anything else.
    OSError
        If it does not exist or is not accessible.
    """
    status = os.stat(path)  # noqa: PTH116  # a Path takes five times as long as the call
    _require_regular(status, path)
    return status.st_size


def _require_regular(status: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        found = _SPECIAL.get(stat.S_IFMT(status.st_mode), "something else")
        raise NotRegularError(errno.EINVAL, f"not a regular file: it is {found}", str(path))


def open_regular(path: str | Path) -> int:
    """Open a regular file for reading and return its descriptor. Every reader opens local files here.

    Opening a pipe waits for its writer, and a device has no end. The type is checked before the file is opened, and
    again afterwards, because the name may refer to another file by then.

    Raises
    ------
    NotRegularError
        If the path is not a regular file.
    OSError
        If it does not exist or is not accessible.
    """
    return _opened_regular(path)[0]


def _opened_regular(path: str | Path) -> tuple[int, os.stat_result]:
    """Open a regular file for reading and return its descriptor and status; see `open_regular`."""
    require_regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        _require_regular(status, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status


# Reading by position -----------------------------------------------------------------------------------------


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read bytes of an open file into a buffer. Return the number of bytes read, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, (buffer,), offset)
    content = os.pread(descriptor, len(buffer), offset)
    buffer[: len(content)] = content
    return len(content)


class ChunkFile:
    """A file of uncompressed values, read at any position into a caller's buffer.

    Parameters
    ----------
    path : str

    Attributes
    ----------
    descriptor : int
    size : int
        Size in bytes when the file was opened.

    Raises
    ------
    OSError
        If the file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.descriptor, status = _opened_regular(path)
        self.size = status.st_size

    def stat(self) -> Stat:
        """Return the size, time and tag of the open file, which may have another name by now."""
        return _stat_of(os.fstat(self.descriptor))

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def read_ahead(self) -> bool:
        """Request kernel read-ahead unless the file is already cached (Linux). Return True if requested."""
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
        """Fill a buffer with bytes, starting at an offset.

        Returns
        -------
        int
            Number of missing bytes if the file ends early, otherwise 0.

        Raises
        ------
        OSError
            If the file cannot be read.
        """
        # A large or interrupted read may return fewer bytes than requested.
        while out:
            count = read_at(self.descriptor, out, offset)
            if not count:
                return len(out)
            out, offset = out[count:], offset + count
        return 0
