"""Translate errors of storages into messages for users."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from natgrad.schema.errors import InputError, Unavailable
from natgrad.storage.base import Storage
from natgrad.storage.local import disk_errors

__all__ = ["network_errors", "storage_errors", "user_error"]

_LIBRARIES = ("aiobotocore", "aiohttp", "asyncio", "botocore", "fsspec", "gcsfs", "google", "icechunk", "s3fs")
"""Libraries that access object stores."""


@contextmanager
def network_errors(*storages: Storage) -> Iterator[None]:
    """Translate errors of remote storages into messages for users; errors of local files are not changed.

    Parameters
    ----------
    *storages : Storage
        The storages in use.

    Raises
    ------
    InputError
        If a bucket or an object is missing, or access is denied.
    Unavailable
        If the storage fails or does not respond. A later run may succeed.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        remote = [storage for storage in storages if storage.local_path is None]
        where = ", ".join(map(str, remote))
        for storage in remote:
            translated = storage.user_error(error, where)
            if translated is not None:
                raise translated from error
        raise


@contextmanager
def storage_errors(*storages: Storage) -> Iterator[None]:
    """Translate errors of the remote and local storages of a command into messages for users.

    Parameters
    ----------
    *storages : Storage
        The storages in use. The first local one is the location of an error without a file name.

    Raises
    ------
    InputError
        See `network_errors`.
    Unavailable
        If a file cannot be read or written, for example because the disk failed.
    """
    local = [storage.local_path for storage in storages if storage.local_path is not None]
    # Objects are staged in temporary files, so local files may fail even if no storage is local.
    with network_errors(*storages), disk_errors(local[0] if local else None):
        yield


def user_error(error: Exception, where: str) -> InputError | None:
    """Return the message for an error of an object store; None for other errors."""
    names = {kind.__name__ for kind in type(error).__mro__}
    library = type(error).__module__.partition(".")[0]
    if library not in _LIBRARIES and not isinstance(error, OSError):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        # The error is about a local file: only one of SOURCE and OUT is remote.
        return None
    if "FileExpired" in names:
        return Unavailable(
            f"the object changed while it was being read: {error}",
            where=where,
            why="another process replaced it",
            remedy="run again: committed data are kept",
        )
    # The message of an Icechunk error lists code locations, one per line, and the cause on the last line.
    reason = str(error).strip().rpartition("-> ")[2] if library == "icechunk" else str(error)
    denied = library == "icechunk" and any(word in reason for word in ("AccessDenied", "Forbidden"))
    if denied or isinstance(error, PermissionError) or any("Credential" in name for name in names):
        return InputError(
            f"the object store denies access: {reason}",
            where=where,
            why="no credentials were found, or they do not permit this operation",
            remedy="set the credentials of the library (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile; "
            "see docs/howto/storages.md), or request access",
        )
    if isinstance(error, FileNotFoundError):
        return InputError(
            f"not found in the object store: {error}",
            where=where,
            why="the bucket does not exist, its name is misspelled, or the object was removed in the meantime",
            remedy="create the bucket, or correct the URL",
        )
    return Unavailable(
        f"the object store does not respond: {type(error).__name__}: {reason}",
        where=where,
        why="the network or the store failed, or the address of the store is wrong (AWS_ENDPOINT_URL)",
        remedy="run again: committed data are kept",
    )
