"""Record the checksums of the files of results, and compare files with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from crc32c import crc32c

from natgrad.schema.errors import InputError
from natgrad.schema.layout import LAYOUT_VERSION
from natgrad.storage import Storage
from natgrad.store.group import document_of, require_version
from natgrad.store.journal import Journal

__all__ = [
    "Damaged",
    "compare",
    "read_record",
    "record_files",
    "recorded_files",
    "require_results_version",
    "verify_files",
]

_FILES = "checksums"
"""Name of the record, ``checksums.json``."""


class Damaged(InputError):
    """Error for a file of a store that is missing or does not have the recorded content."""


def record_files(storage: Storage, files: Mapping[str, int], described: Mapping[str, Any]) -> None:
    """Record the checksums of all files of a store.

    Parameters
    ----------
    storage : Storage
    files : mapping of str to int
        CRC-32C of each file.
    described : mapping
        Additional entries of the record.
    """
    Journal(storage).write(_FILES, {**described, "files": dict(sorted(files.items()))})


def recorded_files(storage: Storage, remedy: str) -> dict[str, Any]:
    """Return the record of results: ``files``, and the additional entries.

    Raises
    ------
    Damaged
        If the record cannot be read.
    OtherVersion
        If another version of natgrad wrote the results.
    """
    require_results_version(storage)
    return read_record(storage, _FILES, remedy)


def read_record(storage: Storage, name: str, remedy: str) -> dict[str, Any]:
    """Return a record of results, which contains its own checksum; raise Damaged if it cannot be read."""
    try:
        return Journal(storage, remedy).read(name)
    except InputError as error:
        raise Damaged(error.what, where=error.where, why=error.why, remedy=error.remedy) from error


def require_results_version(storage: Storage) -> None:
    """Raise OtherVersion if another version of natgrad wrote the results."""
    try:
        version = document_of(storage)["attributes"].get("layout_version")
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        version = LAYOUT_VERSION  # the document is damaged, which the comparison of its checksum will detect
    require_version(version, "results", str(storage))


def compare(path: Storage, content: bytes | None, expected: int, remedy: str) -> None:
    """Raise Damaged if a file is missing, or its content does not have the expected checksum."""
    what = "it is missing" if content is None else "checksum mismatch" if crc32c(content) != expected else ""
    if what:
        raise Damaged(
            f"cannot read a file: {what}",
            where=str(path),
            why="the file was changed or removed, the disk failed, or the store was replaced since it was opened",
            remedy=remedy,
        )


def verify_files(storage: Storage, remedy: str) -> Iterator[Damaged]:
    """Compare all files of a store with their checksums, and yield an error for each that is damaged."""
    try:
        files = recorded_files(storage, remedy)["files"]
    except Damaged as error:
        yield error
        return
    for name, expected in files.items():
        (content,) = storage.get_entries([name])
        try:
            compare(storage / name, content, expected, remedy)
        except Damaged as error:
            yield error
