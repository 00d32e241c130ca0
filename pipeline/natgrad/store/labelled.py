"""Write labelled arrays as Zarr groups that xarray opens, with consolidated metadata.

Zarr and xarray take 4 ms of processor time for each array, however small it is: 0.3 s for the results of a small
run, more than all computations. Here, Zarr writes the metadata of one array of each data type, and those of all
other arrays differ in shape, dimensions and attributes only. `tests/store/test_labelled.py` compares the documents
and chunks with those that xarray writes.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from natgrad.store.group import encode_texts

__all__ = ["CHUNK_BYTES", "LabelledArray", "LabelledGroup", "write_groups"]

CHUNK_BYTES = 4 << 20
"""Size of a chunk in bytes before compression, at most. Larger arrays are divided along their first dimension."""

_DOCUMENT = "zarr.json"
_TEXT, _TEXTS = "string", "OTU"
"""Name of Zarr's data type of texts, and the kinds of NumPy's dtypes of texts."""


@dataclass(frozen=True)
class LabelledArray:
    """An array with named dimensions.

    Attributes
    ----------
    dimensions : tuple of str
    values : array
        Numbers, bools or texts.
    attributes : mapping
    """

    dimensions: tuple[str, ...]
    values: NDArray[Any]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledGroup:
    """Arrays of one group.

    Attributes
    ----------
    arrays : mapping of str to LabelledArray
    coordinates : mapping of str to LabelledArray
    attributes : mapping
    """

    arrays: Mapping[str, LabelledArray] = field(default_factory=dict)
    coordinates: Mapping[str, LabelledArray] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


def write_groups(folder: Path, groups: Mapping[str, LabelledGroup]) -> None:
    """Write a hierarchy of groups to a new folder.

    Parameters
    ----------
    folder : Path
    groups : mapping of str to LabelledGroup
        Path of each group, separated by slashes. The root has the empty path. Groups without an entry that others
        are in are created.
    """
    parents = {"/".join(path.split("/")[:depth]) for path in groups for depth in range(path.count("/") + 1)}
    documents: dict[str, dict[str, Any]] = {}
    for path in sorted({"", *parents, *groups}):
        group = groups.get(path, LabelledGroup())
        documents[path] = {"attributes": dict(group.attributes), "zarr_format": 3, "node_type": "group"}
        for name, array in {**group.coordinates, **group.arrays}.items():
            document = _array_document(name, array, group.coordinates)
            location = f"{path}/{name}" if path else name
            documents[location] = document
            for key, chunk in _chunks(array.values, document):
                _write(folder / location / key, chunk)
    members = {path: document for path, document in documents.items() if path}
    for path, document in members.items():
        _write(folder / path / _DOCUMENT, _json(document))
    # The metadata of a group within the consolidated ones state that its members follow.
    listed = {
        path: document | {"consolidated_metadata": _consolidated({})} if "shape" not in document else document
        for path, document in members.items()
    }
    root = documents[""] | {"consolidated_metadata": _consolidated(listed)}
    _write(folder / _DOCUMENT, _json(root))


def _consolidated(documents: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "inline", "must_understand": False, "metadata": documents}


def _json(document: Mapping[str, Any]) -> bytes:
    # Attributes may be numbers and arrays of NumPy.
    return json.dumps(document, default=lambda value: value.tolist()).encode()


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        # Errors of calls with a descriptor, for example if the disk is full, do not name the file.
        error.filename = str(path)
        raise


def _array_document(name: str, array: LabelledArray, coordinates: Mapping[str, LabelledArray]) -> dict[str, Any]:
    """Return the metadata of an array, with the attributes that xarray adds."""
    values = array.values
    document = deepcopy(_template(_TEXT if values.dtype.kind in _TEXTS else values.dtype.name))
    attributes = dict(array.attributes)
    if name not in coordinates:
        labels = (label for label, of in coordinates.items() if label not in of.dimensions)
        found = [label for label in labels if set(coordinates[label].dimensions) <= set(array.dimensions)]
        if found:
            attributes["coordinates"] = " ".join(found)
    if values.dtype.kind == "f":
        missing = np.array(np.nan, values.dtype.newbyteorder("<")).astype("<f8")
        attributes["_FillValue"] = base64.b64encode(missing.tobytes()).decode()
    document |= {"shape": list(values.shape), "attributes": attributes}
    document["chunk_grid"]["configuration"]["chunk_shape"] = _chunk_shape(values)
    if array.dimensions:
        document["dimension_names"] = list(array.dimensions)
    return document


@cache
def _template(kind: str) -> dict[str, Any]:
    """Return the metadata of an array of a data type, as Zarr writes them."""
    import zarr

    store: dict[str, Any] = {}
    array = zarr.create_array(
        zarr.storage.MemoryStore(store),
        shape=(),
        dtype=kind,
        fill_value="" if kind == _TEXT else _fill_value(np.dtype(kind)),
        config={"write_empty_chunks": False},
    )
    document: dict[str, Any] = array.metadata.to_dict()
    document.pop("dimension_names", None)
    return json.loads(json.dumps(document))  # type: ignore[no-any-return]  # JSON


def _fill_value(dtype: np.dtype[Any]) -> Any:
    return np.nan if dtype.kind == "f" else 0


def _chunk_shape(values: NDArray[Any]) -> list[int]:
    if not values.ndim or values.nbytes <= CHUNK_BYTES:
        return [max(size, 1) for size in values.shape]
    row = values.nbytes // values.shape[0]
    return [max(CHUNK_BYTES // row, 1), *(max(size, 1) for size in values.shape[1:])]


def _chunks(values: NDArray[Any], document: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield the key and the content of each chunk. A chunk of fill values only is not stored."""
    shape: Sequence[int] = document["chunk_grid"]["configuration"]["chunk_shape"]
    counts = [math.ceil(size / chunk) for size, chunk in zip(values.shape, shape, strict=True)]
    texts = values.dtype.kind in _TEXTS
    fill = "" if texts else _fill_value(values.dtype)
    for index in itertools.product(*map(range, counts)):
        part = values[tuple(slice(at * chunk, (at + 1) * chunk) for at, chunk in zip(index, shape, strict=True))]
        if not texts and (np.isnan(part).all() if part.dtype.kind == "f" else not part.any()):
            continue
        if list(part.shape) != list(shape):
            full = np.full(shape, fill, part.dtype)
            full[tuple(map(slice, part.shape))] = part
            part = full
        if texts:
            content = encode_texts([str(text) for text in part.ravel()])
        else:
            content = np.ascontiguousarray(part, part.dtype.newbyteorder("<")).tobytes()
        yield "/".join(("c", *map(str, index))), Zstd(level=0).encode(content)
