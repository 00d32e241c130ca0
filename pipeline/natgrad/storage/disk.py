"""What is written is on disk whole, under its name, or it is told why not."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from natgrad.schema.errors import InputError
from natgrad.storage import is_url, put, put_folder

__all__ = [
    "Writes",
    "disk_errors",
    "flush",
    "flush_all",
    "folder_aside",
    "replace_file",
    "replace_files",
    "replace_folder",
]

_REFUSALS = {
    errno.ENOSPC: ("no space is left", "the disk is full", "free some space, or choose another OUT"),
    errno.EDQUOT: (
        "the quota is exceeded",
        "the user may not store more here",
        "free some space, or have it raised",
    ),
    errno.EFBIG: ("a file becomes too large", "a limit on the size of files is set", "raise it (ulimit -f)"),
    errno.EROFS: ("the disk is read-only", "it is mounted so, or was after a failure", "choose another OUT"),
    errno.EACCES: ("writing is not permitted", "the folder belongs to another user", "choose another OUT"),
    errno.EPERM: ("writing is not permitted", "the folder is protected", "choose another OUT"),
    errno.EIO: ("the disk fails", "it is damaged, or no longer connected", "check the disk (dmesg)"),
    errno.ENOENT: ("the store is gone", "it was removed or moved while it was written", "leave it in its place"),
}


_FLUSHES = 8
"""Flushes at a time, in threads."""

_PIECE_BYTES = 1 << 19
"""Bytes of a file after which the disk begins to write them: it works while the next ones are copied."""


class Writes:
    """What disk or network do while more is made: both are slower than memory, and bear several at a time.

    Attributes
    ----------
    AT_ONCE : int
        Under way at most, each perhaps with an object held in memory.
    """

    AT_ONCE = 4

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: deque[Future[None]] = deque()

    def begin(self, write: Callable[..., None], *arguments: Any) -> None:
        """Have something written some time before `wait` returns.

        Raises
        ------
        Exception
            Where what began before failed.
        """
        while len(self._under_way) >= self.AT_ONCE:
            self._under_way.popleft().result()
        self._pool = self._pool or ThreadPoolExecutor(self.AT_ONCE)
        self._under_way.append(self._pool.submit(write, *arguments))

    def wait(self) -> None:
        """Return when all is written.

        Raises
        ------
        Exception
            Where something was not.
        """
        while self._under_way:
            self._under_way.popleft().result()

    def abandon(self) -> None:
        """Return when nothing is under way any more, whatever came of it."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None
        self._under_way.clear()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk; an object that was put is there."""
    if is_url(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@cache
def _flushing() -> ThreadPoolExecutor:
    """Threads that wait for the disk. They stay: to start them takes longer than a fast disk takes."""
    return ThreadPoolExecutor(_FLUSHES, "flush")


os.register_at_fork(after_in_child=_flushing.cache_clear)  # where those threads are not


def flush_all(paths: Iterable[Path]) -> None:
    """Wait until files and folders are on disk, some at a time: the system writes its journal for them together."""
    several = list(paths)
    if len(several) == 1:
        flush(several[0])
        return
    under_way = [_flushing().submit(flush, path) for path in several]
    wait(under_way)
    for flushed in under_way:
        flushed.result()


def _begin_to_flush(descriptor: int) -> None:
    """Have the system send a file to the disk, where it can be asked to (Linux); nothing is waited for."""
    system = ctypes.CDLL(None)
    if hasattr(system, "sync_file_range"):
        whole, write = ctypes.c_int64(0), 2  # SYNC_FILE_RANGE_WRITE
        # What fails here is told by the flush that follows.
        system.sync_file_range(descriptor, whole, whole, write)


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file aside, flush and rename it: under its name it is the old one or the new one, whole."""
    replace_files({path: content})


def replace_files(contents: Mapping[Path, bytes | memoryview]) -> None:
    """Write files aside, flush them together and rename them: under each name is the old one or the new one, whole.

    Parameters
    ----------
    contents : mapping of Path to bytes
    """
    asides: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            if is_url(path):
                put(path, bytes(content))
                continue
            aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            asides[aside] = path
            with aside.open("wb", buffering=0) as file:
                for begin in range(0, len(content), _PIECE_BYTES):
                    left = memoryview(content)[begin : begin + _PIECE_BYTES]
                    while left:
                        left = left[file.write(left) :]
                    _begin_to_flush(file.fileno())
        flush_all(asides)
        for aside, path in asides.items():
            aside.replace(path)
    except BaseException:
        for aside in asides:
            aside.unlink(missing_ok=True)
        raise


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Give the place of a folder that is written aside: beside it, or for an object store on this machine."""
    if is_url(path):
        with tempfile.TemporaryDirectory(prefix="natgrad-") as folder:
            yield Path(folder) / path.name
        return
    aside = path.with_name(f".{path.name}.new")
    for left in (aside, path.with_name(f".{path.name}.old")):
        shutil.rmtree(left, ignore_errors=True)
    yield aside


def replace_folder(aside: Path, path: Path, last: str, mark: bytes | None = None) -> None:
    """Flush a folder that was written aside, and put it in place of one that may be there.

    Under its name there is the old one or the new one at any moment. Where the system cannot exchange two names
    (not Linux, some network file systems) there is none for an instant, and in an object store none while the
    objects are written: ``last`` and ``mark`` are those of `natgrad.storage.put_folder`.
    """
    if is_url(path):
        put_folder(aside, path, last, mark)
        return
    flush_all((*aside.rglob("*"), aside))
    if not path.exists():
        aside.rename(path)
    elif not _exchange(aside, path):
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        aside.rename(path)
        old.rename(aside)
    flush(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; whether that was possible."""
    system = ctypes.CDLL(None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    arguments = (here, os.fsencode(one), here, os.fsencode(other), exchange)
    return hasattr(system, "renameat2") and system.renameat2(*arguments) == 0


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a message.

    Parameters
    ----------
    path : Path
        What is written; the file at fault is told where it is known.

    Raises
    ------
    InputError
        In place of an OSError. What is recorded is whole all the same, as records follow the data.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:  # of a network, say
            raise
        what, why, remedy = _REFUSALS[error.errno]
        raise InputError(
            f"{what}: {error.strerror}",
            where=str(error.filename or path),
            why=why,
            remedy=f"{remedy}; then run again: what is committed is kept",
        ) from error
