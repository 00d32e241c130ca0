"""Create, open and replace a Zarr v3 group in a storage, atomically and durably.

Zarr writes and reads the metadata of groups and arrays. For the sixteen arrays of a small run, creating them takes
12 ms (4 ms without Zarr), and opening them takes 4 ms (1 ms without Zarr). Two operations bypass Zarr:

- The shapes of growing arrays are each replaced atomically, with a single disk flush for all of them. Zarr would
  write them one by one, without a flush.
- The store itself writes and reads uncompressed chunks, because it must flush them before the commit record.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import LAYOUT_VERSION
from natgrad.storage import Location, Storage, open_out, open_storage
from natgrad.store.journal import Journal

if TYPE_CHECKING:
    import zarr

__all__ = [
    "ANALYZE_AGAIN",
    "INGEST_AGAIN",
    "RECORD_AGAIN",
    "SCALAR_CHUNK",
    "ArrayPlan",
    "OtherVersion",
    "StoredArray",
    "array_digest",
    "chunk_entry",
    "chunk_name",
    "create_group",
    "damage_error",
    "document_of",
    "encode_texts",
    "exists",
    "is_current",
    "is_plain",
    "number_chunks",
    "open_array",
    "open_group",
    "open_store",
    "read_complete_chunks",
    "read_documents",
    "remove_group",
    "require_version",
    "resize_all",
    "stored_length",
    "with_length",
]

SCALAR_CHUNK = 8192
"""Steps in a chunk of an array with one number per step."""

INGEST_AGAIN = "restore the file, or ingest the run again with --overwrite"
"""Remedy for damaged data of a trajectory."""

ANALYZE_AGAIN = "run natgrad analyze OUT: it computes damaged ledger chunks again from the states"
"""Remedy for damaged data of a ledger."""

RECORD_AGAIN = "restore the file, or process the log again with --overwrite: there are no states to compute it from"
"""Remedy for damaged data of the ledger of a run without states."""

_ATTRIBUTE = "natgrad"
_DOCUMENT = "zarr.json"
_UNFINISHED = "unfinished"
_NOT_OURS = "choose another folder; natgrad overwrites only its own stores"


def _digest(document: Any) -> str:
    """Return the checksum of the values in a document, independent of key order and spacing."""
    return f"{crc32c(json.dumps(document, sort_keys=True).encode()):08x}"


def open_store(location: Location, version: str | None = None) -> Storage:
    """Open the location of a store in OUT, such as ``OUT/trajectory.zarr``.

    Parameters
    ----------
    location : str, Path or Storage
        A handle is returned unchanged, unless a version is requested.
    version : str, optional
        Identifier, tag or time of a version, if OUT is an Icechunk repository.

    Raises
    ------
    InputError
        See `natgrad.storage.open_out`.
    """
    if isinstance(location, Storage) and version is None:
        return location
    store = open_storage(location)
    return open_out(store.parent, version=version) / store.name


# Groups ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArrayPlan:
    """Description of an array to create.

    Attributes
    ----------
    dimensions : tuple of str
    shape, chunks : tuple of int
    dtype : str
        NumPy name of a numeric dtype, or ``string``.
    attributes : mapping
    compressors : Zarr codecs, optional
    values : array or sequence of str, optional
        Initial data of the array.
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
        """Value of elements that were never written: a missing value, or 0 for dtypes without one."""
        return {"string": "", "float64": np.nan, "float32": np.nan, "float16": np.nan, "int64": -1}.get(
            self.dtype, 0
        )

    def create(self, group: zarr.Group, name: str) -> None:
        """Create the array in a group, with its initial data."""
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


# This setting is not stored. Without it, Zarr does not write a chunk of fill values (no learning rates, a diverged
# run, a gradient of zeros in bfloat16). Such a chunk could not be flushed, or distinguished from a lost chunk.
_CONFIG: Any = {"write_empty_chunks": True}


def exists(store: Storage) -> bool:
    """Return True if a group, or anything else, exists at the location.

    A group in an object store does not count while it is being created or removed, or if the process that did so
    was interrupted.
    """
    try:
        document: Any = json.loads((store / _DOCUMENT).get())
        return not document["attributes"][_ATTRIBUTE].get(_UNFINISHED, False)
    except (FileNotFoundError, NotADirectoryError):
        return store.exists()
    except (ValueError, LookupError, TypeError, AttributeError):
        return True


def is_current(store: Storage, kind: str) -> bool:
    """Return True if a group of the current layout version exists. A group of an older version must be replaced.

    Raises
    ------
    InputError
        If the location contains something else, or a newer natgrad wrote the group.
    """
    return exists(store) and _attributes(store, kind, _NOT_OURS, replaced=True).get("version") == LAYOUT_VERSION


def create_group(
    store: Storage,
    kind: str,
    attributes: Mapping[str, Any],
    arrays: Mapping[str, ArrayPlan],
    records: Mapping[str, Mapping[str, Any]] | None = None,
    folders: Sequence[str] = ("commits",),
) -> None:
    """Create a group, replacing an existing one. Readers only ever find a complete group.

    Parameters
    ----------
    store : Storage
        An existing natgrad group of this kind is replaced, even if it has an older layout version.
    kind : str
    attributes : mapping
    arrays : mapping of str to ArrayPlan
    records : mapping of str to mapping, optional
        Records of the new group; see `natgrad.store.journal.Journal`.
    folders : sequence of str
        Folders of records. They are groups, because Icechunk lists no others.

    Raises
    ------
    InputError
        If the location contains something else, or a newer natgrad wrote the group.
    """
    if store.exists():
        _attributes(store, kind, _NOT_OURS, replaced=True)
    import zarr

    with store.replace_tree(_DOCUMENT, _placeholder(kind)) as tree:
        created = open_storage(tree)
        group = zarr.create_group(created.zarr_store(), zarr_format=3)
        for folder in folders:
            group.create_group(folder)
        for name, plan in arrays.items():
            plan.create(group, name)
        described = {"kind": kind, "version": LAYOUT_VERSION, **attributes}
        described["arrays"] = {name: array_digest(document_of(created / name)) for name in arrays}
        group.update_attributes({_ATTRIBUTE: {**described, "crc32c": _digest(described)}})
        for name, record in (records or {}).items():
            Journal(created / "commits").write(name, record)


def _placeholder(kind: str) -> bytes:
    """Return the document that marks a group in an object store as incomplete during creation or removal."""
    attributes = {_ATTRIBUTE: {"kind": kind, "version": LAYOUT_VERSION, _UNFINISHED: True}}
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


def document_of(store: Storage) -> dict[str, Any]:
    """Return the metadata document of a group or array.

    Raises
    ------
    OSError, ValueError
        If the document cannot be read.
    """
    document = json.loads((store / _DOCUMENT).get())
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def array_digest(document: Mapping[str, Any]) -> str:
    """Return the checksum of the metadata document of an array, excluding its length, which grows.

    Raises
    ------
    LookupError, TypeError
        If the document is not that of an array.
    """
    return _digest({**document, "shape": document["shape"][1:]})


def read_documents(
    store: Storage, kind: str, names: Iterable[str], digests: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Read the metadata documents of arrays of a group, and compare them with their checksums.

    Parameters
    ----------
    store : Storage
    kind : str
    names : iterable of str
    digests : mapping
        The attribute ``arrays`` of the group.

    Raises
    ------
    InputError
        If a document is missing or was changed.
    """
    names = list(names)
    documents = {}
    for name, content in zip(names, store.get_entries([f"{name}/{_DOCUMENT}" for name in names]), strict=True):
        where = store / name / _DOCUMENT
        if content is None:
            raise _damaged_metadata(kind, where, "the metadata of an array are missing")
        try:
            documents[name] = json.loads(content)
            intact = array_digest(documents[name]) == digests[name] and int(documents[name]["shape"][0]) >= 0
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _damaged_metadata(kind, where, f"cannot read the metadata of an array: {error}") from error
        if not intact:
            raise _damaged_metadata(kind, where, "checksum mismatch in the metadata of an array")
    return documents


def _damaged_metadata(kind: str, where: Storage, what: str) -> InputError:
    remedies = {"trajectory": INGEST_AGAIN, "ledger": ANALYZE_AGAIN}
    return InputError(what, where=str(where), why=_CHANGED, remedy=remedies[kind])


def open_group(store: Storage, kind: str, remedy: str) -> dict[str, Any]:
    """Return the attributes of a natgrad group.

    Parameters
    ----------
    store : Storage
    kind : str
    remedy : str
        Advice for creating a missing group, for the error message.

    Raises
    ------
    InputError
        If the group does not exist, has another kind or layout version, or was changed.
    """
    attributes = _attributes(store, kind, remedy)
    if attributes.get(_UNFINISHED):
        raise InputError(f"no {kind} here", where=str(store), remedy=remedy)
    described = {key: value for key, value in attributes.items() if key != "crc32c"}
    if attributes.get("crc32c") != _digest(described):
        raise InputError(
            f"the metadata of the {kind} does not match its checksum",
            where=str(store / _DOCUMENT),
            why=_CHANGED,
            remedy=INGEST_AGAIN if kind == "trajectory" else ANALYZE_AGAIN,
        )
    return attributes


def _attributes(store: Storage, kind: str, remedy: str, replaced: bool = False) -> dict[str, Any]:
    """Return the attributes of a group. An older layout version is accepted if the group is to be replaced."""
    missing = InputError(f"no {kind} here", where=str(store), remedy=remedy)
    if store.exists():
        missing = InputError(
            f"no {kind} here: its metadata cannot be read",
            where=str(store / _DOCUMENT),
            why="the file was changed or removed, the disk failed, or this folder is not a natgrad store",
            remedy=f"restore the file; if the folder is a damaged {kind}, remove the folder and "
            + ("process the log again" if kind == "trajectory" else "run natgrad analyze OUT")
            + "; otherwise choose another folder",
        )
    try:
        attributes: Any = json.loads((store / _DOCUMENT).get())["attributes"][_ATTRIBUTE]
        found = attributes["kind"]
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError) as error:
        raise missing from error
    except OSError as error:
        if store.local_path is None:
            raise  # an object store denies access, for example
        raise missing from error
    if found not in tuple(_MADE_BY):
        raise missing
    if found != kind:
        raise InputError(f"this is a {found}, not a {kind}", where=str(store), remedy=remedy)
    require_version(attributes.get("version"), kind, str(store), replaced=replaced)
    return attributes  # type: ignore[no-any-return]  # it comes from JSON


_CHANGED = "the file was changed, or the disk failed"

_MADE_BY = {
    "trajectory": "process the log again into a new OUT, or into this one with --overwrite",
    "ledger": "compute it again: natgrad analyze OUT",
    "results": "compute them again: natgrad analyze OUT",
}
"""Remedy that creates each kind of store again."""


class OtherVersion(InputError):
    """Error for a store with a layout version that this version of natgrad does not read."""


def require_version(version: Any, kind: str, where: str, *, replaced: bool = False) -> None:
    """Raise an error if a store has a different layout version.

    Parameters
    ----------
    version : object
        Layout version as read from the store; anything but a positive int is invalid.
    kind : str
    where : str
    replaced : bool
        Accept an older version, because the store will be replaced.

    Raises
    ------
    InputError
        If the layout version is another one.
    """
    have = "have" if kind == "results" else "has"
    known = isinstance(version, int) and not isinstance(version, bool) and version > 0
    if known and version > LAYOUT_VERSION:
        raise OtherVersion(
            f"the {kind} {have} layout version {version}, but this version of natgrad reads {LAYOUT_VERSION}",
            where=where,
            why="it was written by a newer version of natgrad",
            remedy="upgrade natgrad-pipeline, or write to another folder",
        )
    if version != LAYOUT_VERSION and not replaced:
        found = "no layout version" if version is None else f"layout version {version!r}"
        raise OtherVersion(
            f"the {kind} {have} {found}, but this version of natgrad reads {LAYOUT_VERSION}",
            where=where,
            why="it was written by an older version of natgrad"
            if known or version is None
            else "the version was changed",
            remedy=_MADE_BY[kind],
        )


def remove_group(store: Storage, kind: str) -> None:
    """Remove a natgrad group of this kind; raise InputError if the location contains anything else."""
    if store.exists():
        _attributes(store, kind, _NOT_OURS, replaced=True)
        store.remove_tree(_DOCUMENT, _placeholder(kind))


# Arrays ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredArray:
    """Metadata of an uncompressed array of numbers, which is read without Zarr.

    Importing Zarr takes 0.15 s of processor time, which a command that only describes a run would not need.

    Attributes
    ----------
    shape : tuple of int
        Its first number may be that of an earlier commit.
    chunks : tuple of int
    dtype : numpy.dtype
    fill_value : object
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    fill_value: Any

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> StoredArray:
        """Return the metadata in a document, which the caller has compared with its checksum."""
        dtype = np.dtype(document["data_type"])
        # JSON has no number for NaN, which Zarr writes as a string.
        fill_value = np.asarray(document["fill_value"]).astype(dtype)[()]
        chunks = document["chunk_grid"]["configuration"]["chunk_shape"]
        return cls(tuple(document["shape"]), tuple(chunks), dtype, fill_value)


def open_array(array: Storage) -> zarr.Array[Any]:
    """Open an array of a group with Zarr, which decodes compressed chunks."""
    import zarr

    return zarr.open_array(array.zarr_store(), mode="r+", zarr_format=3).with_config(_CONFIG)


def is_plain(document: Mapping[str, Any]) -> bool:
    """Return True if the chunks of an array with this metadata document are uncompressed bytes."""
    return [codec["name"] for codec in document["codecs"]] == ["bytes"]


def resize_all(store: Storage, names: Iterable[str], length: int) -> None:
    """Set the length of arrays. Each metadata document is replaced atomically, with one disk flush for all."""
    changed: dict[str, bytes] = {}
    documents = [f"{name}/{_DOCUMENT}" for name in names]
    for name, content in zip(documents, store.get_entries(documents), strict=True):
        document = json.loads(content or b"")
        if document["shape"][0] != length:
            document["shape"][0] = length
            changed[name] = json.dumps(document).encode()
    # If a rename is lost, the length of the previous commit remains, and the next writer corrects it.
    store.put_entries(changed, flush_names=False)


def stored_length(array: Storage) -> int:
    """Return the length of an array according to its metadata. This does not imply that the data exist.

    Raises
    ------
    OSError, ValueError, LookupError, TypeError
        If the metadata cannot be read.
    """
    return int(document_of(array)["shape"][0])


def with_length(array: zarr.Array[Any], length: int) -> zarr.Array[Any]:
    """Return an array with another length in memory, because the stored length lags behind the record."""
    import zarr

    if array.shape[0] == length:
        return array
    metadata = dataclasses.replace(array.metadata, shape=(length, *array.shape[1:]))
    sized = zarr.AsyncArray(metadata, array.store_path, config=array.async_array.config)
    return zarr.Array(sized)


def chunk_name(*index: int) -> str:
    """Return the name of a chunk below its array."""
    return "/".join(("c", *map(str, index)))


def chunk_entry(array: Storage, *index: int) -> Storage:
    """Return the file or object of a chunk of an array."""
    return array / chunk_name(*index)


def damage_error(chunk: Storage, what: str, remedy: str, part: str = "") -> InputError:
    """Return the error for a recorded chunk that is damaged; ``part`` names its array and steps."""
    return InputError(
        f"cannot read a chunk{f' of {part}' if part else ''}: {what}",
        where=str(chunk),
        why="a recorded chunk was complete and durable, so the file was changed or moved, or the disk failed",
        remedy=remedy,
    )


def read_complete_chunks(
    array: Storage, indices: Iterable[Sequence[int]], elements: Sequence[int], dtype: np.dtype[Any], remedy: str
) -> list[NDArray[Any]]:
    """Read uncompressed chunks, several at a time; raise an error if one is missing or has the wrong size.

    Zarr is not used, because its overhead per chunk of a local array exceeds the time of the disk.
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
        raise damage_error(chunk, f"it has {size} of {expected} bytes", remedy)


def number_chunks(
    array: StoredArray, name: str, before: NDArray[Any], new: NDArray[Any]
) -> dict[str, bytes | memoryview]:
    """Return the complete chunks that contain the new numbers of an array with one number, or row, per step.

    The numbers of a step are few, so a chunk is not changed in place, and not read from the disk to be changed.

    Parameters
    ----------
    array : StoredArray
        An array that is chunked along its first axis only.
    name : str
    before, new : array
        All stored numbers, which the caller has verified, and the numbers that follow them.

    Returns
    -------
    mapping of str to bytes
        Entries of the group, for `natgrad.storage.Storage.put_entries`.
    """
    rows = array.chunks[0]
    first = len(before) // rows
    values = np.concatenate([before[first * rows :], new]).astype(array.dtype.newbyteorder("<"))
    contents: dict[str, bytes | memoryview] = {}
    for index, start in enumerate(range(0, len(values), rows), first):
        part = values[start : start + rows]
        chunk = np.full(array.chunks, array.fill_value, values.dtype)
        chunk[: len(part)] = part
        contents["/".join((name, "c", str(index), *("0" for _ in array.shape[1:])))] = chunk.data.cast("B")
    return contents


def encode_texts(texts: Sequence[str]) -> bytes:
    """Encode strings as the codec vlen-utf8 does: the number of strings, then the length and bytes of each."""
    encoded = [text.encode() for text in texts]
    return struct.pack("<I", len(encoded)) + b"".join(struct.pack("<I", len(text)) + text for text in encoded)
