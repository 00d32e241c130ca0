"""Access local files, object stores and Icechunk repositories through one protocol.

`natgrad.storage.base` documents the protocol. Code outside this package does not depend on the implementation.
"""

from natgrad.storage.base import FileRange, Stat, Storage, StoredFile, Writes
from natgrad.storage.local import LocalStorage, NotRegularError, open_regular, require_regular
from natgrad.storage.network import network_errors, storage_errors
from natgrad.storage.opening import KINDS, Location, open_all, open_out, open_storage, require_local

__all__ = [
    "KINDS",
    "FileRange",
    "LocalStorage",
    "Location",
    "NotRegularError",
    "Stat",
    "Storage",
    "StoredFile",
    "Writes",
    "network_errors",
    "open_all",
    "open_out",
    "open_regular",
    "open_storage",
    "require_local",
    "require_regular",
    "storage_errors",
]
