"""A Zarr v3 group in a storage, made at once and durably.

Zarr writes the metadata of new groups and arrays, and reads them: for the sixteen arrays of a small run this takes
12 ms (4 ms without Zarr), and 4 ms to open them (1 ms). Two things are done without it:

- The shapes of arrays that grow are replaced together, atomically, with one wait for the disk. Zarr would write
  them one after the other, without a flush.
- Chunks of plain bytes are written and read by the store itself, because it flushes them before the commit record.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from crc32c import crc32c
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import LAYOUT_VERSION
from natgrad.storage import Location, Storage, open_storage

__all__ = [
    "SCALAR_CHUNK",
    "ArrayPlan",
    "array_digest",
    "chunk_entry",
    "damaged",
    "document_of",
    "exists",
    "is_current",
    "is_plain",
    "make_group",
    "open_array",
    "open_group",
    "open_store",
    "read_complete_chunks",
    "remove_group",
    "require_complete_chunk",
    "require_version",
    "resize_all",
    "stored_rows",
    "with_rows",
]

SCALAR_CHUNK = 8192
"""Steps in a chunk of an array with one number a step."""

_ATTRIBUTE = "natgrad"
_DOCUMENT = "zarr.json"
_UNFINISHED = "unfinished"
_NOT_OURS = "choose another folder; natgrad overwrites only its own stores"


def _digest(document: Any) -> str:
    """Return the checksum of the values in a document, in whatever order and spacing."""
    return f"{crc32c(json.dumps(document, sort_keys=True).encode()):08x}"


def open_store(location: Location, version: str | None = None) -> Storage:
    """Open the location of a store in OUT, such as ``OUT/trajectory.zarr``.

    Parameters
    ----------
    location : str, Path or Storage
        A handle is returned as it is, unless a version is given.
    version : str, optional
        Identifier, tag or time of a version, where OUT is an Icechunk repository.

    Raises
    ------
    InputError
        See `natgrad.storage.open_out`.
    """
    if isinstance(location, Storage) and version is None:
        return location
    store = open_storage(location)
    return store.parent.beside().stores(None, version) / store.name


# Groups ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArrayPlan:
    """An array to be made.

    Attributes
    ----------
    dimensions : tuple of str
    shape, chunks : tuple of int
    dtype : str
        NumPy's name of a number's dtype, or ``string``.
    attributes : mapping
    compressors : Zarr codecs, optional
    values : array or sequence of str, optional
        First data of the array.
    """

    dimensions: tuple[str, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    compressors: Any = None
    values: Any = None

    @property
    def _fill_value(self) -> Any:
        """Value of what was never written: missing, except for bfloat16 in uint16, which has none for that."""
        return {"string": "", "float64": np.nan, "float32": np.nan, "float16": np.nan, "int64": -1}.get(
            self.dtype, 0
        )

    def make(self, group: zarr.Group, name: str) -> None:
        """Make the array in a group, with its first data."""
        array = group.create_array(
            name,
            shape=self.shape,
            chunks=self.chunks,
            dtype=self.dtype,
            dimension_names=self.dimensions,
            fill_value=self._fill_value,
            compressors=self.compressors,
            attributes=dict(self.attributes),
            config=_CONFIG,
        )
        if self.values is not None:
            array[:] = np.asarray(self.values, object if self.dtype == "string" else self.dtype)


# This setting is not stored. Without it a chunk of fill values (no learning rates, a diverged run, a gradient of
# zeros in bfloat16) is not written, so it cannot be flushed, or told from a lost one.
_CONFIG: Any = {"write_empty_chunks": True}


def exists(store: Storage) -> bool:
    """Return whether a group is there, or something in its place.

    In an object store a group that is being made or removed, or was when its process ended, does not count.
    """
    try:
        document: Any = json.loads((store / _DOCUMENT).get())
        return not document["attributes"][_ATTRIBUTE].get(_UNFINISHED, False)
    except (FileNotFoundError, NotADirectoryError):
        return store.exists()
    except (ValueError, LookupError, TypeError, AttributeError):
        return True


def is_current(store: Storage, kind: str) -> bool:
    """Return whether a group of this layout version is there; a group of an older one is replaced.

    Raises
    ------
    InputError
        If the location holds something else, or a newer natgrad wrote it.
    """
    return exists(store) and _attributes(store, kind, _NOT_OURS, replaced=True).get("version") == LAYOUT_VERSION


def make_group(store: Storage, kind: str, attributes: Mapping[str, Any], arrays: Mapping[str, ArrayPlan]) -> None:
    """Make a group, in place of one that is there; a group that is there is complete.

    Parameters
    ----------
    store : Storage
        A group of natgrad that is there is replaced, also one of an older layout version.
    kind : str
    attributes : mapping
    arrays : mapping of str to ArrayPlan

    Raises
    ------
    InputError
        If the location holds something else, or a newer natgrad wrote it.
    """
    if store.exists():
        _attributes(store, kind, _NOT_OURS, replaced=True)
    with store.replace_tree(_DOCUMENT, _placeholder(kind)) as folder:
        group = zarr.create_group(folder, zarr_format=3)
        group.create_group("commits")
        for name, plan in arrays.items():
            plan.make(group, name)
        described = {"kind": kind, "version": LAYOUT_VERSION, **attributes}
        made = open_storage(folder)
        described["arrays"] = {name: array_digest(made / name) for name in arrays}
        group.update_attributes({_ATTRIBUTE: {**described, "crc32c": _digest(described)}})


def _placeholder(kind: str) -> bytes:
    """Return the document of a group in an object store while it is made or removed: it is ours, and incomplete."""
    attributes = {_ATTRIBUTE: {"kind": kind, "version": LAYOUT_VERSION, _UNFINISHED: True}}
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


def document_of(store: Storage) -> dict[str, Any]:
    """Return the metadata document of a group or an array.

    Raises
    ------
    OSError, ValueError
        If it cannot be read.
    """
    document = json.loads((store / _DOCUMENT).get())
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def array_digest(array: Storage) -> str:
    """Return the checksum of the metadata of an array, without its length, which grows.

    Raises
    ------
    OSError, ValueError, LookupError, TypeError
        If they cannot be read.
    """
    document = document_of(array)
    return _digest({**document, "shape": document["shape"][1:]})


def open_group(store: Storage, kind: str, remedy: str) -> dict[str, Any]:
    """Return the attributes of a group of natgrad.

    Parameters
    ----------
    store : Storage
    kind : str
    remedy : str
        How a missing group is made.

    Raises
    ------
    InputError
        If there is none, it is of another kind or layout version, or it was changed.
    """
    attributes = _attributes(store, kind, remedy)
    if attributes.get(_UNFINISHED):
        raise InputError(f"no {kind} here", where=str(store), remedy=remedy)
    described = {key: value for key, value in attributes.items() if key != "crc32c"}
    if attributes.get("crc32c") != _digest(described):
        raise InputError(
            f"the metadata of the {kind} does not match its checksum",
            where=str(store / _DOCUMENT),
            why="the file was changed, or the disk failed",
            remedy="restore the file, or remove the store and create it again",
        )
    return attributes


def _attributes(store: Storage, kind: str, remedy: str, replaced: bool = False) -> dict[str, Any]:
    """Return the attributes of a group; one of an older layout version is accepted where it is to be replaced."""
    missing = InputError(f"no {kind} here", where=str(store), remedy=remedy)
    try:
        attributes: Any = json.loads((store / _DOCUMENT).get())["attributes"][_ATTRIBUTE]
        found = attributes["kind"]
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError) as error:
        raise missing from error
    except OSError as error:
        if store.local_path is None:
            raise  # an object store denies access, for example
        raise missing from error
    if found != kind:
        raise InputError(f"this is a {found}, not a {kind}", where=str(store), remedy=remedy)
    require_version(attributes.get("version"), kind, str(store), replaced=replaced)
    return attributes  # type: ignore[no-any-return]  # it comes from JSON


_MADE_BY = {
    "trajectory": "process the log again into a new OUT, or into this one with --overwrite",
    "ledger": "compute it again: natgrad analyze OUT",
    "results": "compute them again: natgrad analyze OUT",
}
"""Remedy that creates each kind of store again."""


def require_version(version: Any, kind: str, where: str, *, replaced: bool = False) -> None:
    """Refuse a store of another layout version.

    Parameters
    ----------
    version : int, or anything else that is no version
    kind : str
    where : str
    replaced : bool
        Accept an older version, because the store is replaced.

    Raises
    ------
    InputError
    """
    have = "have" if kind == "results" else "has"
    known = isinstance(version, int) and not isinstance(version, bool) and version > 0
    if known and version > LAYOUT_VERSION:
        raise InputError(
            f"the {kind} {have} layout version {version}, but this natgrad reads version {LAYOUT_VERSION}",
            where=where,
            why="it was written by a newer natgrad",
            remedy="upgrade natgrad-pipeline, or write to another folder",
        )
    if version != LAYOUT_VERSION and not replaced:
        found = "no layout version" if version is None else f"layout version {version!r}"
        raise InputError(
            f"the {kind} {have} {found}, but this natgrad reads version {LAYOUT_VERSION}",
            where=where,
            why="it was written by an older natgrad" if known or version is None else "the version was changed",
            remedy=_MADE_BY[kind],
        )


def remove_group(store: Storage, kind: str) -> None:
    """Remove a group of natgrad, and nothing else (InputError)."""
    if store.exists():
        _attributes(store, kind, _NOT_OURS, replaced=True)
        store.remove_tree(_DOCUMENT, _placeholder(kind))


# Arrays ------------------------------------------------------------------------------------------------------


def open_array(array: Storage) -> zarr.Array[Any]:
    """Open an array of a group."""
    return zarr.open_array(array.zarr_store(), mode="r+", zarr_format=3).with_config(_CONFIG)


def is_plain(array: Storage) -> bool:
    """Return whether the chunks of an array are its bytes and nothing else.

    Raises
    ------
    InputError
        If there is no array.
    """
    try:
        return [codec["name"] for codec in document_of(array)["codecs"]] == ["bytes"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            "cannot read the metadata of an array",
            where=str(array / _DOCUMENT),
            why="the file was changed, or the disk failed",
            remedy="ingest the run again with --overwrite",
        ) from error


def resize_all(store: Storage, names: Iterable[str], rows: int) -> None:
    """Set the length of arrays: each document is replaced atomically, and the disk is waited for once."""
    changed: dict[str, bytes] = {}
    documents = [f"{name}/{_DOCUMENT}" for name in names]
    for name, content in zip(documents, store.get_entries(documents), strict=True):
        if content is None:
            raise FileNotFoundError(f"{store / name} is missing")
        document = json.loads(content)
        if document["shape"][0] != rows:
            document["shape"][0] = rows
            changed[name] = json.dumps(document).encode()
    # A lost name leaves the length of the commit before, which the next writer sets again.
    store.put_entries(changed, flush_names=False)


def stored_rows(array: Storage) -> int:
    """Return the length of an array by its metadata, which is no evidence of data.

    Raises
    ------
    OSError, ValueError, LookupError, TypeError
        If they cannot be read.
    """
    return int(document_of(array)["shape"][0])


def with_rows(array: zarr.Array[Any], rows: int) -> zarr.Array[Any]:
    """Return an array as if it had another length: the stored one lags behind the record."""
    if array.shape[0] == rows:
        return array
    metadata = dataclasses.replace(array.metadata, shape=(rows, *array.shape[1:]))
    sized = zarr.AsyncArray(metadata, array.store_path, config=array.async_array.config)
    return zarr.Array(sized)


def chunk_entry(array: Storage, *index: int) -> Storage:
    """Return the file or object of a chunk of an array."""
    return array / "/".join(("c", *map(str, index)))


def damaged(chunk: Storage, what: str, remedy: str) -> InputError:
    """Return the refusal of a recorded chunk that has changed."""
    return InputError(
        f"cannot read a chunk: {what}",
        where=str(chunk),
        why="a recorded chunk was complete and durable, so the file was changed or moved, or the disk failed",
        remedy=remedy,
    )


def require_complete_chunk(chunk: Storage, elements: Sequence[int], dtype: np.dtype[Any], remedy: str) -> None:
    """Refuse an uncompressed chunk of another size: Zarr takes one that is missing for fill values."""
    try:
        size = chunk.stat().size
    except FileNotFoundError:
        size = 0
    _require_size(chunk, size, elements, dtype, remedy)


def read_complete_chunks(
    array: Storage, indices: Iterable[Sequence[int]], elements: Sequence[int], dtype: np.dtype[Any], remedy: str
) -> list[NDArray[Any]]:
    """Read uncompressed chunks, several at a time; one that is missing or of another size is refused.

    Zarr takes longer for each chunk of a local array than the disk.
    """
    names = ["/".join(("c", *map(str, index))) for index in indices]
    chunks = []
    for name, content in zip(names, array.get_entries(names), strict=True):
        _require_size(array / name, len(content or b""), elements, dtype, remedy)
        chunks.append(np.frombuffer(content or b"", dtype.newbyteorder("<")).reshape(elements))
    return chunks


def _require_size(chunk: Storage, size: int, elements: Sequence[int], dtype: np.dtype[Any], remedy: str) -> None:
    expected = math.prod(elements) * dtype.itemsize
    if size != expected:
        raise damaged(chunk, f"it has {size} of {expected} bytes", remedy)
