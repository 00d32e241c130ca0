"""Who writes a store: one process at a time.

The lock is the system's (flock), so it ends with its process, however that ends, and there is nothing to guess. It
is otherwise on a file system that machines share: the lock of a machine that was cut off may be free while that
goes on writing. There, and where a file has to stand for the lock, what another machine left is not guessed.

An object store has no locks. There an object stands for one, which is put on the condition that there is none, and
taken over, from a process of this machine that is dead, on the condition that nobody else has.
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
from typing import Any

import psutil
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from natgrad.schema.errors import InputError, Unavailable
from natgrad.storage import delete, is_url, put, seen
from natgrad.storage.disk import disk_errors
from natgrad.storage.repository import outside, written

__all__ = ["only_writer"]

_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
"""How a file system says that it has no flock."""

_HOLDER = "process {process} on {host} of user {user}, since {since}"

_LOCAL = {
    *("apfs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs", "jfs", "ntfs3", "overlay"),
    *("ramfs", "tmpfs", "ufs", "vfat", "xfs", "zfs"),
}
"""File systems of one machine; what is not among them may be shared."""


@contextmanager
def only_writer(store: Path, kind: str) -> Iterator[Path]:
    """Keep other writers from a store; readers never ask.

    Parameters
    ----------
    store : Path
        The lock is a file beside it, of the same name with a dot before and ``.lock`` behind.
    kind : str
        For messages: ``trajectory``.

    Yields
    ------
    Path
        Where to write: the store, and of an Icechunk repository what is not visible before it is published.

    Raises
    ------
    InputError
        Where another process is writing (the message says which, and since when), or one of another machine may be,
        and where the disk refuses what is written meanwhile.
    """
    if is_url(store):
        # First of all, as an old version is refused. It opens nothing before it is used, under the lock.
        with written(store) as place, _only_writer_of_objects(outside(store), kind):
            yield place
        return
    with disk_errors(store):
        new_folders = [folder for folder in (store.parent, *store.parent.parents) if not folder.exists()]
        store.parent.mkdir(parents=True, exist_ok=True)
        path = store.with_name(f".{store.name}.lock")
        try:
            lock = _acquired(path)
        except Timeout as error:
            raise _held(store, kind, _holder(path)[0] or "it has not said yet which") from error
        with ExitStack() as held:
            held.callback(lock.release)
            held.callback(_leave_nothing, store, path, new_folders)
            # A file that stands for the lock is signed by filelock, and gone when the lock is.
            if not isinstance(lock, SoftFileLock):
                _require_free(path, store, kind)
                _sign(path)
                held.callback(os.truncate, path, 0)
            yield store


def _held(store: Path, kind: str, holder: str) -> Unavailable:
    return Unavailable(
        f"another process is writing this {kind}: {holder}",
        where=str(store),
        why="two commands were started for one OUT",
        remedy="wait until the other one is done, then run again: what it committed is kept",
    )


def _leave_nothing(store: Path, path: Path, new_folders: list[Path]) -> None:
    """Remove lock and folders that were made for a store that is not there, as its input was refused."""
    if new_folders and not store.exists():
        path.unlink(missing_ok=True)
        with suppress(OSError):  # another process may have come to use them
            for folder in new_folders:
                folder.rmdir()


def _acquired(path: Path) -> BaseFileLock:
    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        # Filelock takes over what a dead process of this machine left, and nothing else.
        lock = SoftFileLock(_soft(path))
        lock.acquire(timeout=1)
    return lock


def _soft(path: Path) -> Path:
    return path.with_suffix(".softlock")


def _sign(path: Path) -> None:
    """Say in the lock file who holds it: gone when the lock is given back, left there by who could not."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        # Bytes first: who looks meanwhile reads the old name or the new one, not none.
        text = json.dumps(_signature()).encode()
        os.pwrite(descriptor, text, 0)
        os.truncate(descriptor, len(text))
    finally:
        os.close(descriptor)


def _signature() -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"process": os.getpid(), "host": socket.gethostname(), "user": _user(), "since": since}


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # an account without a name, as in containers
        return str(os.getuid())


def _holder(path: Path) -> tuple[str, str]:
    """Who signed a lock, and on which host; empty where nobody did."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        name = json.loads(path.read_text())
        return _HOLDER.format(**name), name["host"]
    with suppress(OSError, ValueError):
        soft = _soft(path)
        process, host, *_ = soft.read_text().split()
        since = datetime.fromtimestamp(soft.stat().st_mtime, UTC)
        return f"process {process} on {host}, since {since.isoformat(timespec='seconds')}", host
    return "", ""


def _require_free(path: Path, store: Path, kind: str) -> None:
    """Refuse a free lock that a process of another machine has not given back, where its machine may live on."""
    holder, host = _holder(path)
    file_system = _file_system(path)
    if not holder or host == socket.gethostname() or file_system in _LOCAL:
        return
    raise InputError(
        f"another process may be writing this {kind}: {holder}",
        where=str(store),
        why="it did not say that it was done, and a free lock is no proof on a file system that machines share "
        f"({file_system or 'unknown'}): its machine stopped, or is cut off and goes on",
        remedy=f"make sure that it does not run any more, remove {path}, and run again",
    )


def _file_system(path: Path) -> str:
    """Type of the file system of a path, empty where it is not known."""
    path = path.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[folder] for folder in path.parents if folder in mounts), "")


# In an object store ------------------------------------------------------------------------------------------


@contextmanager
def _only_writer_of_objects(store: Path, kind: str) -> Iterator[None]:
    path = store.with_name(f".{store.name}.lock")
    begun = psutil.Process().create_time()
    signed = json.dumps({**_signature(), "begun": begun, "key": uuid.uuid4().hex}).encode()
    try:
        _put_lock(path, signed, store, kind)
        _require_conditions(path, signed)
        yield
    finally:
        _give_back(path, signed)


def _put_lock(path: Path, signed: bytes, store: Path, kind: str) -> None:
    with suppress(FileExistsError):
        put(path, signed, new=True)
        return
    found = seen(path)
    if found is None:  # given back since
        raise _held(store, kind, "it ended just now")
    content, tag = found
    if content == signed:  # of a request whose answer was lost, and that the library has sent again
        return
    try:
        name = json.loads(content)
        holder, dead = _HOLDER.format(**name), _is_dead(name)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _held(store, kind, f"{path} does not say which") from error
    if not dead and name["host"] == socket.gethostname():
        raise _held(store, kind, holder)
    if not dead or not tag:
        raise Unavailable(
            f"another process is writing this {kind}: {holder}",
            where=str(store),
            why="it is dead, but by this object store nothing can be taken over safely"
            if dead
            else "it is of another machine, which may have stopped: nothing in an object store tells",
            remedy=f"wait until it is done; if it does not run any more, remove {path}, and run again",
        )
    try:
        put(path, signed, seen=tag)
    except FileExistsError as error:
        raise _held(store, kind, "it took over just now") from error


def _is_dead(name: Mapping[str, Any]) -> bool:
    """Whether a process of this machine is no more; its number may be another's by now."""
    if name["host"] != socket.gethostname():
        return False
    try:
        return bool(psutil.Process(name["process"]).create_time() != name["begun"])
    except psutil.NoSuchProcess:
        return True


def _require_conditions(path: Path, signed: bytes) -> None:
    """Refuse an object store that puts an object whatever the condition: there two writers could not be told."""
    try:
        put(path, signed, new=True)
    except FileExistsError:
        return
    raise InputError(
        "this object store does not keep the condition that an object is new",
        where=str(path),
        why="it does not know the header If-None-Match, so it cannot keep two writers apart",
        remedy="process into a folder, and copy that; or use a store that knows conditional writes",
    )


def _give_back(path: Path, signed: bytes) -> None:
    # Where the store does not answer, the lock is left, and taken over by the next process of this machine.
    with suppress(Exception):
        found = seen(path)
        if found is not None and found[0] == signed:
            delete(path)
