"""Locks that admit one writer at a time, and report the holder of the lock to other writers.

Local stores are locked with flock. The system releases the lock when the process ends for any reason, so stale
locks need not be detected. This is not true on a file system that several machines share: if a machine loses its
connection, its lock may become free while it continues to write. Therefore the lock of another machine is never
taken over on such a file system, or if a lock file replaces flock.

An object store has no locks, so an object represents the lock. A conditional write creates it if it does not exist.
The lock of a dead process on this machine is replaced unless another process has already replaced it.
"""

from __future__ import annotations

import errno
import getpass
import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import psutil
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from natgrad.schema.errors import InputError, Unavailable
from natgrad.schema.times import now

__all__ = ["Lockable", "lock_by_file", "lock_by_object"]


class Lockable(Protocol):
    """The methods of `natgrad.storage.Storage` that a lock needs."""

    @property
    def name(self) -> str:
        """Last part of the location."""
        ...

    @property
    def parent(self) -> Lockable:
        """Location that contains this one."""
        ...

    def __truediv__(self, name: str) -> Lockable: ...

    def get(self) -> bytes:
        """Return the content."""
        ...

    def get_tagged(self) -> tuple[bytes, str]:
        """Return the content and its tag."""
        ...

    def put_new(self, content: bytes) -> None:
        """Write an object that does not exist yet."""
        ...

    def put_if(self, content: bytes, tag: str) -> None:
        """Replace an object that has the tag."""
        ...

    def delete(self) -> None:
        """Remove an object."""
        ...


_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
"""Errors of file systems that do not support flock."""

_NO_HOLDER = "the holder is not recorded yet"
_HOLDER = "process {process} on {host} of user {user}, since {since}"

_LOCAL = {
    *("apfs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs", "jfs", "ntfs3", "overlay"),
    *("ramfs", "tmpfs", "ufs", "vfat", "xfs", "zfs"),
}
"""File systems that belong to one machine; others may be shared."""


_NAMESPACE, _FIRST_NAMESPACE = Path("/proc/self/ns/pid"), "pid:[4026531836]"
"""Namespace of process numbers (Linux), and that of processes which are not in a container."""


def _lock_name(name: str) -> str:
    return f".{name}.lock"


# Files -------------------------------------------------------------------------------------------------------


@contextmanager
def lock_by_file(store: Path, kind: str) -> Iterator[None]:
    """Hold the lock of a file or folder; see `natgrad.storage.Storage.lock`.

    Parameters
    ----------
    store : Path
        Store to lock. The lock is the file ``.NAME.lock`` next to it.
    kind : str
        Kind of store, for messages.
    """
    new_folders = [folder for folder in (store.parent, *store.parent.parents) if not folder.exists()]
    store.parent.mkdir(parents=True, exist_ok=True)
    path = store.with_name(_lock_name(store.name))
    try:
        lock = _acquire(path)
    except Timeout as error:
        raise _locked(str(store), kind, _holder(path)[0] or _NO_HOLDER) from error
    with ExitStack() as stack:
        stack.callback(lock.release)
        stack.callback(_remove_unused, store, path, new_folders)
        # For a SoftFileLock, filelock itself records the holder, and removes the file on release.
        if not isinstance(lock, SoftFileLock):
            _require_free(path, store, kind)
            _record_holder(path)
            stack.callback(os.truncate, path, 0)
        yield


def _locked(store: str, kind: str, holder: str) -> Unavailable:
    return Unavailable(
        f"another process is writing this {kind}: {holder}",
        where=store,
        why="two commands were started for one OUT",
        remedy="wait until the other process ends, then run again: its commits are kept",
    )


def _remove_unused(store: Path, path: Path, new_folders: list[Path]) -> None:
    """Remove the lock and the new folders if no store was created, for example because the input was rejected."""
    if new_folders and not store.exists():
        path.unlink(missing_ok=True)
        with suppress(OSError):  # another process may use them by now
            for folder in new_folders:
                folder.rmdir()


def _acquire(path: Path) -> BaseFileLock:
    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        # Filelock only takes over the lock file of a dead process on this machine.
        lock = SoftFileLock(_soft_lock_path(path))
        lock.acquire(timeout=1)
    return lock


def _soft_lock_path(path: Path) -> Path:
    return path.with_suffix(".softlock")


def _record_holder(path: Path) -> None:
    """Write the holder into the lock file. If the process is killed, the entry remains."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        # The file is written before it is truncated, so that other processes never read an empty file.
        text = json.dumps(_signature()).encode()
        os.pwrite(descriptor, text, 0)
        os.truncate(descriptor, len(text))
    finally:
        os.close(descriptor)


def _signature() -> dict[str, Any]:
    since = now()
    return {"process": os.getpid(), "host": socket.gethostname(), "user": _user(), "since": since}


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # an account without a name, as in containers
        return str(os.getuid())


def _holder(path: Path) -> tuple[str, str]:
    """Return a description of the recorded holder of a lock, and its host; both are empty if none is recorded."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        name = json.loads(path.read_text())
        return _HOLDER.format(**name), name["host"]
    with suppress(OSError, ValueError):
        soft = _soft_lock_path(path)
        process, host, *_ = soft.read_text().split()
        since = datetime.fromtimestamp(soft.stat().st_mtime, UTC)
        return f"process {process} on {host}, since {since.isoformat(timespec='seconds')}", host
    return "", ""


def _require_free(path: Path, store: Path, kind: str) -> None:
    """Raise an error if a lock is free but was never released by a process on another machine.

    That process may still be writing.
    """
    holder, host = _holder(path)
    file_system = _file_system(path)
    if not holder or host == socket.gethostname() or file_system in _LOCAL:
        return
    raise InputError(
        f"another process may be writing this {kind}: {holder}",
        where=str(store),
        why="it never released the lock: its machine stopped, or lost its connection and continues to run. These "
        f"cases cannot be distinguished on a file system that may be shared ({file_system or 'unknown'})",
        remedy=f"ensure that it is no longer running, remove {path}, and run again",
    )


def _file_system(path: Path) -> str:
    """Return the file system type of a path; empty if unknown."""
    path = path.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[folder] for folder in path.parents if folder in mounts), "")


# Objects -----------------------------------------------------------------------------------------------------


@contextmanager
def lock_by_object(store: Lockable, kind: str) -> Iterator[None]:
    """Hold the lock of a location in a storage without system locks; see `natgrad.storage.Storage.lock`.

    Parameters
    ----------
    store : Storage
        Store to lock. The lock is the object ``.NAME.lock`` next to it.
    kind : str
        Kind of store, for messages.
    """
    lock = store.parent / _lock_name(store.name)
    started = _start_of(os.getpid())
    own = {"started": started, "machine": _machine(), "key": uuid.uuid4().hex}
    signed = json.dumps({**_signature(), **own}).encode()
    try:
        _put_lock(lock, signed, store, kind)
        _require_conditions(lock, signed)
        yield
    finally:
        _release(lock, signed)


def _put_lock(lock: Lockable, signed: bytes, store: Lockable, kind: str) -> None:
    with suppress(FileExistsError):
        lock.put_new(signed)
        return
    try:
        content, tag = lock.get_tagged()
    except FileNotFoundError as error:
        raise _locked(str(store), kind, "it has just ended") from error
    if content == signed:  # the library repeated a request whose response was lost
        return
    try:
        name = json.loads(content)
        holder, dead = _HOLDER.format(**name), _is_dead(name)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _locked(str(store), kind, f"{lock} does not identify it") from error
    same = name["host"] == socket.gethostname() and _numbering(name["started"]) == _numbering(
        _start_of(os.getpid())
    )
    if not dead and same:
        raise _locked(str(store), kind, holder)
    if not dead or not tag:
        raise Unavailable(
            f"another process is writing this {kind}: {holder}",
            where=str(store),
            why="it has ended, but without conditional writes in this object store its lock cannot be taken over"
            if dead
            else "it runs on another machine or in another container, so it is unknown whether it has ended",
            remedy=f"wait until it ends; if it is no longer running, remove {lock}, and run again",
        )
    try:
        lock.put_if(signed, tag)
    except FileExistsError as error:
        raise _locked(str(store), kind, "it has just taken over the lock") from error


def _is_dead(name: Mapping[str, Any]) -> bool:
    """Return True if a process on this machine has ended, even if its process number has been reused.

    Containers and machines may share a host name. The number of a process in another container or on another
    machine has no meaning here, so such a process is not considered dead, unless this machine has been restarted
    since.
    """
    if name["host"] != socket.gethostname():
        return False
    if _numbering(name["started"]) != _numbering(_start_of(os.getpid())):
        return bool(name.get("machine")) and name["machine"] == _machine()
    try:
        return bool(_start_of(name["process"]) != name["started"])
    except psutil.NoSuchProcess:
        return True


def _start_of(process: int) -> str:
    """Return the start of a process, in a form that does not change if the clock of the machine is set.

    On Linux, psutil computes the time of the start from the current clock, so another process would seem to have
    the number of the holder after the clock was set. There, the parts are the start of the machine, the namespace
    of process numbers, and the start of the process.

    Raises
    ------
    psutil.NoSuchProcess
        If there is no such process.
    """
    boot, status = Path("/proc/sys/kernel/random/boot_id"), Path(f"/proc/{process}/stat")
    if not boot.exists():
        return str(psutil.Process(process).create_time())
    try:
        # The name of the program, in parentheses, may contain spaces. The start is the 22nd field.
        start = status.read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError) as error:
        raise psutil.NoSuchProcess(process) from error
    return f"{boot.read_text().strip()} {_NAMESPACE.readlink()} {start}"


def _numbering(started: str) -> str:
    """Return the part of a start that identifies the namespace of process numbers; empty if unknown."""
    return started.rpartition(" ")[0]


def _machine() -> str:
    """Return the identity of this machine, which does not change at a restart; empty in a container."""
    with suppress(OSError):
        if str(_NAMESPACE.readlink()) == _FIRST_NAMESPACE:
            return Path("/etc/machine-id").read_text().strip()
    return ""


def _require_conditions(lock: Lockable, signed: bytes) -> None:
    """Raise an error if an object store ignores conditions, which would let two writers hold the lock."""
    try:
        lock.put_new(signed)
    except FileExistsError:
        return
    raise InputError(
        "this object store ignores conditional writes",
        where=str(lock),
        why="it does not support the header If-None-Match, so two writers could overwrite each other",
        remedy="process into a folder and copy it, or use a store that supports conditional writes",
    )


def _release(lock: Lockable, signed: bytes) -> None:
    # If the store does not respond, the lock remains, and the next process on this machine takes it over.
    with suppress(Exception):
        if lock.get() == signed:
            lock.delete()
