"""A Zarr v3 group in a folder, made at once and durably, and the journal of what in it is valid.

A new group is written as the specification has it, and its attributes are read as JSON: Zarr's own functions take
milliseconds for an array, and a pass over a small run would wait longer for them than for its data. Everything else
is read and written through Zarr, but for what the pass reads and ingest writes: chunks that are plain bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from pipeline.schema import LAYOUT_VERSION, InputError

__all__ = [
    "SCALAR_CHUNK",
    "ArrayPlan",
    "Journal",
    "add_array",
    "chunk_path",
    "damaged",
    "flush",
    "is_plain",
    "make_group",
    "open_array",
    "open_group",
    "remove_group",
    "require_whole",
    "with_rows",
]

SCALAR_CHUNK = 8192
"""Steps in a chunk of an array with one number a step."""

_ATTRIBUTE = "natgrad"
_DOCUMENT = "zarr.json"


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """Records that make data visible: one small JSON file each, written aside, flushed and renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Names of the records, in order."""
        return sorted(path.stem for path in self.folder.glob("[0-9]*.json"))

    def read(self, name: str) -> dict[str, Any]:
        """Read a record.

        Raises
        ------
        InputError
            Where it cannot be read.
        """
        path = self.folder / f"{name}.json"
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot read a commit record: {error}",
                where=str(path),
                why="records are renamed into place whole, so the file was changed or the disk failed",
                remedy="ingest again with --overwrite",
            ) from error
        return record

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a record, or replace it: on return it is on disk."""
        aside = self.folder / f".{name}.{os.getpid()}.tmp"
        with aside.open("w") as file:
            json.dump(record, file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.folder / f"{name}.json")
        flush(self.folder)

    def remove(self, name: str) -> None:
        """Forget a record."""
        (self.folder / f"{name}.json").unlink()
        flush(self.folder)


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
                chunk_path(folder, index).write_bytes(self._encoded(self.values[start : start + self.chunks[0]]))

    def _encoded(self, values: Any) -> bytes:
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
    aside = path.with_name(f".{path.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "commits").mkdir(parents=True)
    group = {"kind": kind, "version": LAYOUT_VERSION, **attributes}
    document = {"zarr_format": 3, "node_type": "group", "attributes": {_ATTRIBUTE: group}}
    (aside / _DOCUMENT).write_text(json.dumps(document))
    commits = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    (aside / "commits" / _DOCUMENT).write_text(json.dumps(commits))
    for name, plan in arrays.items():
        plan.make(aside / name)
    for entry in (*aside.rglob("*"), aside):
        flush(entry)
    remove_group(path, kind)
    aside.rename(path)
    flush(path.parent)


def add_array(path: Path, name: str, plan: ArrayPlan) -> None:
    """Add an array to a group of an older version, which by that becomes one of this version."""
    shutil.rmtree(path / name, ignore_errors=True)
    plan.make(path / name)
    for entry in (*(path / name).rglob("*"), path / name):
        flush(entry)
    document = json.loads((path / _DOCUMENT).read_bytes())
    document["attributes"][_ATTRIBUTE]["version"] = LAYOUT_VERSION
    aside = path / f".{_DOCUMENT}.new"
    aside.write_text(json.dumps(document))
    flush(aside)
    aside.replace(path / _DOCUMENT)
    flush(path)


def open_group(path: Path, kind: str, remedy: str) -> dict[str, Any]:
    """Attributes of a group of ours.

    Raises
    ------
    InputError
        Where there is none, it is of another kind, or a newer version wrote it.
    """
    try:
        attributes: Any = json.loads((path / _DOCUMENT).read_bytes())["attributes"][_ATTRIBUTE]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"no {kind} here", where=str(path), remedy=remedy) from error
    if attributes["kind"] != kind:
        raise InputError(f"this is a {attributes['kind']}, not a {kind}", where=str(path), remedy=remedy)
    if attributes["version"] > LAYOUT_VERSION:
        raise InputError(
            f"the {kind} has layout version {attributes['version']}, this program knows {LAYOUT_VERSION}",
            where=str(path),
            why="it was written by a newer natgrad",
            remedy="upgrade natgrad-pipeline, or write to another folder",
        )
    return attributes  # type: ignore[no-any-return]


def remove_group(path: Path, kind: str) -> None:
    """Remove a group of ours, and nothing else (InputError)."""
    # Renamed first: where the removal is interrupted, no half group is left under the name.
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        open_group(path, kind, "choose another folder; what is not a store of natgrad is not overwritten")
        path.rename(aside)
        shutil.rmtree(aside)


# Arrays ------------------------------------------------------------------------------------------------------


def open_array(folder: Path) -> zarr.Array[Any]:
    """Open an array of a group."""
    # This setting is not kept on disk, and without it a chunk of fill values (no learning rates, a diverged
    # run, a gradient of zeros in bfloat16) is not written, hence cannot be flushed or told from a lost one.
    return zarr.open_array(folder, mode="r+").with_config({"write_empty_chunks": True})


def is_plain(folder: Path) -> bool:
    """Whether the chunks of an array are its bytes and nothing else.

    Raises
    ------
    InputError
        Where there is no array.
    """
    try:
        codecs = json.loads((folder / _DOCUMENT).read_bytes())["codecs"]
        return [codec["name"] for codec in codecs] == ["bytes"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            "the metadata of an array cannot be read",
            where=str(folder / _DOCUMENT),
            why="the file was changed or the disk failed",
            remedy="ingest the run again with --overwrite",
        ) from error


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


def require_whole(path: Path, elements: Sequence[int], dtype: np.dtype[Any], remedy: str) -> None:
    """Refuse an uncompressed chunk of another size: Zarr takes one that is missing for fill values."""
    expected = math.prod(elements) * dtype.itemsize
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise damaged(path, f"it has {size} bytes of {expected}", remedy)
