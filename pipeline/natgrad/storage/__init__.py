"""Where logs are and stores go: on this machine, in an object store, or in an Icechunk repository there.

`natgrad.storage.objects` has paths and URLs, `natgrad.storage.repository` what of OUT is kept as versions.
"""

from natgrad.storage.objects import (
    Status,
    delete,
    delete_folder,
    each,
    files,
    is_url,
    names,
    network_errors,
    open_object,
    open_to_read,
    place,
    put,
    put_folder,
    ranges,
    read,
    require_local,
    seen,
    status,
    widen,
)

__all__ = [
    "Status",
    "delete",
    "delete_folder",
    "each",
    "files",
    "is_url",
    "names",
    "network_errors",
    "open_object",
    "open_to_read",
    "place",
    "put",
    "put_folder",
    "ranges",
    "read",
    "require_local",
    "seen",
    "status",
    "widen",
]
