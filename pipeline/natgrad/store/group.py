"""A Zarr v3 group in a folder, made at once and durably.

A new group is written as the specification has it, and its attributes are read as JSON: Zarr's own functions take
milliseconds for an array, and a pass over a small run would wait longer for them than for its data. Everything else
is read and written through Zarr, but for what the pass reads and ingest writes: chunks that are plain bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from crc32c import crc32c
from numpy.typing import NDArray
from zarr.storage import FsspecStore, LocalStore, StorePath

from natgrad.schema.errors import InputError
from natgrad.schema.layout import LAYOUT_VERSION
from natgrad.storage import delete, delete_folder, is_url, put, read
from natgrad.storage.disk import flush, folder_aside, replace_file, replace_files, replace_folder

__all__ = [
    "SCALAR_CHUNK",
    "ArrayPlan",
    "add_array",
    "array_digest",
    "chunk_path",
    "damaged",
    "exists",
    "flush",
    "group_document",
    "is_plain",
    "make_group",
    "migrate_group",
    "open_array",
    "open_group",
    "read_complete_chunk",
    "remove_group",
    "require_complete_chunk",
    "resize_all",
    "rows_on_disk",
    "with_rows",
    "zarr_store",
]

SCALAR_CHUNK = 8192
"""Steps in a chunk of an array with one number a step."""

_ATTRIBUTE = "natgrad"
_DOCUMENT = "zarr.json"
_UNFINISHED = "unfinished"
_NOT_OURS = "choose another folder; what is not a store of natgrad is not overwritten"


def _digest(document: Any) -> str:
    """Checksum of what a document says, in whatever order and spacing."""
    return f"{crc32c(json.dumps(document, sort_keys=True).encode()):08x}"


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
        First data of an array of one dimension.
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
        """What was never written: missing, but of bfloat16 in uint16, where nothing means that."""
        return {"string": "", "float64": np.nan, "float32": np.nan, "float16": np.nan, "int64": -1}.get(
            self.dtype, 0
        )

    def document(self) -> dict[str, Any]:
        """Metadata of the array by version 3 of the Zarr specification."""
        numbers = {"name": "bytes", "configuration": {"endian": "little"}}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunks)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if self._fill_value != self._fill_value else self._fill_value,
            "codecs": [{"name": "vlen-utf8"} if self.dtype == "string" else numbers],
            "dimension_names": list(self.dimensions),
            "attributes": dict(self.attributes),
        }

    def make(self, folder: Path) -> None:
        """Make the array, with its first data."""
        if self.compressors is not None:
            zarr.create_array(
                folder,
                shape=self.shape,
                chunks=self.chunks,
                dtype=self.dtype,
                dimension_names=self.dimensions,
                fill_value=self._fill_value,
                compressors=self.compressors,
                attributes=dict(self.attributes),
            )
            return
        folder.mkdir()
        (folder / _DOCUMENT).write_text(json.dumps(self.document()))
        if self.values is not None:
            (folder / "c").mkdir()
            for index, start in enumerate(range(0, self.shape[0], self.chunks[0])):
                chunk_path(folder, index).write_bytes(self.encoded(self.values[start : start + self.chunks[0]]))

    def encoded(self, values: Any) -> bytes:
        """Return a chunk as bytes, whole: text after its length, and its number of texts first (vlen-utf8)."""
        missing = self.chunks[0] - len(values)
        if self.dtype == "string":
            texts = [text.encode() for text in (*values, *[""] * missing)]
            return struct.pack("<I", len(texts)) + b"".join(struct.pack("<I", len(t)) + t for t in texts)
        return (
            np.pad(values, (0, missing), constant_values=self._fill_value)
            .astype(np.dtype(self.dtype).newbyteorder("<"))
            .tobytes()
        )


def exists(path: Path) -> bool:
    """Whether there is a group, or something in its place.

    In an object store a group that is being made or removed, or was when its process ended, is none.
    """
    if not is_url(path):
        return path.exists()
    try:
        document: Any = json.loads(read(path / _DOCUMENT))
        return not document["attributes"][_ATTRIBUTE].get(_UNFINISHED, False)
    except FileNotFoundError:
        return False
    except (ValueError, LookupError, TypeError, AttributeError):
        return True


def make_group(path: Path, kind: str, attributes: Mapping[str, Any], arrays: Mapping[str, ArrayPlan]) -> None:
    """Make a group aside and rename it into place: a group that is there is whole.

    Parameters
    ----------
    path : Path
        A group of ours that is there is replaced.
    kind : str
    attributes : mapping
    arrays : mapping of str to ArrayPlan

    Raises
    ------
    InputError
        Where the path holds something else.
    """
    if path.exists():
        _attributes(path, kind, _NOT_OURS)
    with folder_aside(path) as aside:
        (aside / "commits").mkdir(parents=True)
        (aside / "commits" / _DOCUMENT).write_text(json.dumps(group_document({})))
        for name, plan in arrays.items():
            plan.make(aside / name)
        (aside / _DOCUMENT).write_text(json.dumps(group_document(_signed(aside, kind, attributes, arrays))))
        replace_folder(aside, path, _DOCUMENT, _unfinished(kind))


def _unfinished(kind: str) -> bytes:
    """Document that stands for a group in an object store while it is made or removed: it is ours, but none yet."""
    attributes = {"kind": kind, "version": LAYOUT_VERSION, _UNFINISHED: True}
    return json.dumps(group_document({_ATTRIBUTE: attributes})).encode()


def add_array(path: Path, name: str, plan: ArrayPlan) -> None:
    """Add an array to a group; it counts when the group is described anew (`migrate_group`)."""
    with folder_aside(path / name) as aside:
        plan.make(aside)
        replace_folder(aside, path / name, _DOCUMENT)


def group_document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a group by version 3 of the Zarr specification."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def _signed(path: Path, kind: str, attributes: Mapping[str, Any], arrays: Iterable[str]) -> dict[str, Any]:
    """Attributes of a group, with the checksums of what describes it: of the arrays, and of the attributes."""
    group = {"kind": kind, "version": LAYOUT_VERSION, **attributes}
    group["arrays"] = {name: array_digest(path / name) for name in arrays}
    return {_ATTRIBUTE: {**group, "crc32c": _digest(group)}}


def array_digest(folder: Path) -> str:
    """Checksum of the metadata of an array, but for its rows, which grow, and what Zarr adds to them.

    Raises
    ------
    OSError, ValueError, LookupError, TypeError, AttributeError
        Where they cannot be read.
    """
    document = json.loads(read(folder / _DOCUMENT))
    document.pop("storage_transformers", None)
    return _digest({**document, "shape": document["shape"][1:]})


def migrate_group(path: Path, kind: str, arrays: Iterable[str]) -> None:
    """Bring the description of a group of an older version up to this one: its records are so already."""
    attributes = open_group(path, kind, "")
    kept = {key: value for key, value in attributes.items() if key not in ("kind", "version", "arrays", "crc32c")}
    replace_file(path / _DOCUMENT, json.dumps(group_document(_signed(path, kind, kept, arrays))).encode())
    flush(path)


def open_group(path: Path, kind: str, remedy: str) -> dict[str, Any]:
    """Attributes of a group of ours.

    Raises
    ------
    InputError
        Where there is none, it is of another kind, a newer version wrote it, or it was changed.
    """
    attributes = _attributes(path, kind, remedy)
    if attributes.get(_UNFINISHED):
        raise InputError(f"no {kind} here", where=str(path), remedy=remedy)
    said = {key: value for key, value in attributes.items() if key != "crc32c"}
    if attributes["version"] > 1 and attributes.get("crc32c") != _digest(said):
        raise InputError(
            f"the description of the {kind} is not as it was written",
            where=str(path / _DOCUMENT),
            why="the file was changed or the disk failed: it has another checksum than it says",
            remedy="restore the file, or remove the store and make it anew",
        )
    return attributes


def _attributes(path: Path, kind: str, remedy: str) -> dict[str, Any]:
    try:
        attributes: Any = json.loads(read(path / _DOCUMENT))["attributes"][_ATTRIBUTE]
        found, version = attributes["kind"], int(attributes["version"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        if is_url(path) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # access is denied, say
        raise InputError(f"no {kind} here", where=str(path), remedy=remedy) from error
    if found != kind:
        raise InputError(f"this is a {found}, not a {kind}", where=str(path), remedy=remedy)
    if not 0 < version <= LAYOUT_VERSION:
        raise InputError(
            f"the {kind} has layout version {version}, this program knows {LAYOUT_VERSION}",
            where=str(path),
            why="it was written by a newer natgrad",
            remedy="upgrade natgrad-pipeline, or write to another folder",
        )
    return attributes  # type: ignore[no-any-return]


def remove_group(path: Path, kind: str) -> None:
    """Remove a group of ours, and nothing else (InputError)."""
    # Where the removal is interrupted, no half group may be left under the name.
    if is_url(path):
        if path.exists():
            _attributes(path, kind, _NOT_OURS)
            put(path / _DOCUMENT, _unfinished(kind))
            delete_folder(path, _DOCUMENT, keep=True)
            delete(path / _DOCUMENT)
        return
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        _attributes(path, kind, _NOT_OURS)
        path.rename(aside)
        shutil.rmtree(aside)


# Arrays ------------------------------------------------------------------------------------------------------


def zarr_store(folder: Path) -> Any:
    """Return what Zarr opens a folder by: its path, and of a URL a store."""
    if not is_url(folder):
        return folder
    url: Any = folder
    return FsspecStore.from_url(url.fs.unstrip_protocol(url.path), storage_options=dict(url.storage_options))


def open_array(folder: Path) -> zarr.Array[Any]:
    """Open an array of a group."""
    # This setting is not kept on disk, and without it a chunk of fill values (no learning rates, a diverged
    # run, a gradient of zeros in bfloat16) is not written, hence cannot be flushed or told from a lost one.
    if is_url(folder):
        array = zarr.open_array(zarr_store(folder), mode="r+", zarr_format=3)
    else:
        # The same without Zarr's loop of events, which takes ten times as long as a small file to be read.
        store = StorePath(LocalStore(folder))
        array = zarr.Array(zarr.AsyncArray(json.loads(read(folder / _DOCUMENT)), store))
    return array.with_config({"write_empty_chunks": True})


def is_plain(folder: Path) -> bool:
    """Whether the chunks of an array are its bytes and nothing else.

    Raises
    ------
    InputError
        Where there is no array.
    """
    try:
        codecs = json.loads(read(folder / _DOCUMENT))["codecs"]
        return [codec["name"] for codec in codecs] == ["bytes"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            "the metadata of an array cannot be read",
            where=str(folder / _DOCUMENT),
            why="the file was changed or the disk failed",
            remedy="ingest the run again with --overwrite",
        ) from error


def resize_all(folders: Iterable[Path], rows: int) -> None:
    """Set the rows of arrays on disk, and wait for the disk once."""
    changed = {}
    for folder in folders:
        document = json.loads(read(folder / _DOCUMENT))
        if document["shape"][0] != rows:
            document["shape"][0] = rows
            changed[folder / _DOCUMENT] = json.dumps(document).encode()
    replace_files(changed)


def rows_on_disk(folder: Path) -> int:
    """Rows of an array by its shape on disk, which is no evidence of data.

    Raises
    ------
    OSError, ValueError, LookupError, TypeError
        Where it cannot be read.
    """
    return int(json.loads(read(folder / _DOCUMENT))["shape"][0])


def with_rows(array: zarr.Array[Any], rows: int) -> zarr.Array[Any]:
    """Return an array as if it had so many rows: its shape on disk lags behind the record."""
    if array.shape[0] == rows:
        return array
    metadata = dataclasses.replace(array.metadata, shape=(rows, *array.shape[1:]))
    sized = zarr.AsyncArray(metadata, array.store_path, config=array.async_array.config)
    return zarr.Array(sized)


def chunk_path(folder: Path, *index: int) -> Path:
    """File of a chunk of an array."""
    return folder.joinpath("c", *map(str, index))


def damaged(path: Path, what: str, remedy: str) -> InputError:
    """Say that a recorded chunk is not as it was written."""
    return InputError(
        f"a chunk cannot be read: {what}",
        where=str(path),
        why="a recorded chunk was whole and on disk, so the file was changed, moved or the disk failed",
        remedy=remedy,
    )


def require_complete_chunk(path: Path, elements: Sequence[int], dtype: np.dtype[Any], remedy: str) -> None:
    """Refuse an uncompressed chunk of another size: Zarr takes one that is missing for fill values."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        size = 0
    _require_size(path, size, elements, dtype, remedy)


def read_complete_chunk(path: Path, elements: Sequence[int], dtype: np.dtype[Any], remedy: str) -> NDArray[Any]:
    """Read an uncompressed chunk of this machine; one that is missing or of another size is refused."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    _require_size(path, len(content), elements, dtype, remedy)
    return np.frombuffer(content, dtype.newbyteorder("<")).reshape(elements)


def _require_size(path: Path, size: int, elements: Sequence[int], dtype: np.dtype[Any], remedy: str) -> None:
    expected = math.prod(elements) * dtype.itemsize
    if size != expected:
        raise damaged(path, f"it has {size} bytes of {expected}", remedy)
