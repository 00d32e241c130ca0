"""Where logs are and stores go: local files, object stores, and Icechunk repositories behind one protocol.

`natgrad.storage.base` documents the protocol; nothing outside this package knows which implementation it uses.
"""

from natgrad.storage.base import (
    KINDS,
    Location,
    Stat,
    Storage,
    StoredFile,
    Writes,
    open_all,
    open_out,
    open_storage,
    require_local,
)
from natgrad.storage.local import LocalStorage
from natgrad.storage.network import network_errors

__all__ = [
    "KINDS",
    "LocalStorage",
    "Location",
    "Stat",
    "Storage",
    "StoredFile",
    "Writes",
    "network_errors",
    "open_all",
    "open_out",
    "open_storage",
    "require_local",
]
