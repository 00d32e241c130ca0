"""Encode labelled arrays as Zarr groups that xarray opens, with consolidated metadata.

Zarr and xarray take 4 ms of processor time for each array, however small it is: 0.3 s for the results of a small
run, more than all computations. Here, Zarr writes the metadata of one array of each data type, and those of all
other arrays differ in shape, dimensions and attributes only. `tests/store/test_labelled.py` compares the documents
and chunks with those that xarray writes.

Texts have the data type ``fixed_length_utf32``, which the registry of the Zarr v3 specification defines
(zarr-developers/zarr-extensions), as it defines ``string``. xarray decodes ``string`` to NumPy's StringDType, on
which its ``idxmax``, ``astype(str)`` and plots fail, and ``bytes`` to objects, which it does not plot. It decodes
``fixed_length_utf32`` to NumPy's ``str``. Texts are padded to the longest one of their array; compression removes
the padding. Zarr 3.1 warns when it writes this type, because the registry lists it only since 2026, but not when
it reads it. Here, the metadata are those of 32-bit integers, which are stored in the same way.

An array is encoded completely (`contents_of`), or chunk by chunk by several processes (`encoded_chunk`). Arrays of
the second kind have many chunks, whose names contain dots instead of slashes: folders for the parts of a name would
take as much time and disk space as the chunk.
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
from typing import Any

import numpy as np
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from natgrad.storage import Storage

__all__ = [
    "CHUNK_BYTES",
    "CHUNK_ENCODING",
    "ChunkedArray",
    "LabelledArray",
    "LabelledGroup",
    "contents_of",
    "encoded_chunk",
    "read_arrays",
    "read_parts",
]

CHUNK_BYTES = 4 << 20
"""Size of a chunk in bytes before compression, at most. Larger arrays are divided along their first dimension."""

CHUNK_ENCODING = 2
"""Version of the names and the compression of `encoded_chunk`."""

_DOCUMENT = "zarr.json"
_BLOCK_BYTES = 1 << 20
"""Bytes that Blosc shuffles together."""


@dataclass(frozen=True)
class LabelledArray:
    """An array with named dimensions.

    Attributes
    ----------
    dimensions : tuple of str
    values : array
        Numbers, bools or strings (dtype ``str``).
    attributes : mapping
    """

    dimensions: tuple[str, ...]
    values: NDArray[Any]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return self.values.shape

    @property
    def kind(self) -> str:
        """Name of the dtype; its short form for strings, whose name NumPy does not parse."""
        dtype = self.values.dtype
        return dtype.str if dtype.kind == "U" else dtype.name

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of a chunk."""
        return _chunk_shape(self.values)


@dataclass(frozen=True)
class ChunkedArray:
    """An array of numbers whose chunks are written separately, see `encoded_chunk`.

    Attributes
    ----------
    dimensions : tuple of str
    shape, chunks : tuple of int
    kind : str
        Name of the dtype.
    attributes : mapping
    separator : str
        See `natgrad.storage.Storage.chunk_separator`.
    """

    dimensions: tuple[str, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    kind: str
    attributes: Mapping[str, Any]
    separator: str


@dataclass(frozen=True)
class LabelledGroup:
    """Arrays of one group.

    Attributes
    ----------
    arrays : mapping of str to LabelledArray or ChunkedArray
    coordinates : mapping of str to LabelledArray
    attributes : mapping
    """

    arrays: Mapping[str, LabelledArray | ChunkedArray] = field(default_factory=dict)
    coordinates: Mapping[str, LabelledArray] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


def contents_of(groups: Mapping[str, LabelledGroup]) -> dict[str, bytes]:
    """Return the files of a hierarchy of groups: the metadata of all arrays, and the chunks of labelled arrays.

    Parameters
    ----------
    groups : mapping of str to LabelledGroup
        Path of each group, separated by slashes. The root has the empty path. Parent groups without an entry are
        created.
    """
    contents: dict[str, bytes] = {}
    parents = {"/".join(path.split("/")[:depth]) for path in groups for depth in range(path.count("/") + 1)}
    documents: dict[str, dict[str, Any]] = {}
    for path in sorted({"", *parents, *groups}):
        group = groups.get(path, LabelledGroup())
        documents[path] = {"attributes": dict(group.attributes), "zarr_format": 3, "node_type": "group"}
        for name, array in {**group.coordinates, **group.arrays}.items():
            location = f"{path}/{name}" if path else name
            documents[location] = _array_document(name, array, group.coordinates)
            if isinstance(array, LabelledArray):
                contents |= {f"{location}/{key}": chunk for key, chunk in _chunks(array.values, array.chunks)}
    members = {path: document for path, document in documents.items() if path}
    contents |= {f"{path}/{_DOCUMENT}": _json(document) for path, document in members.items()}
    # Within consolidated metadata, the metadata of a group state that those of its members follow.
    listed = {
        path: document | {"consolidated_metadata": _consolidated({})} if "shape" not in document else document
        for path, document in members.items()
    }
    contents[_DOCUMENT] = _json(documents[""] | {"consolidated_metadata": _consolidated(listed)})
    return contents


def encoded_chunk(
    values: NDArray[Any], chunks: Sequence[int], index: Sequence[int], separator: str
) -> tuple[str, bytes] | None:
    """Return the key and the content of a chunk of a `ChunkedArray`; None if it contains fill values only.

    The bytes of all numbers are grouped by their significance before compression. This takes less time and space,
    unless half of the values are missing.

    Parameters
    ----------
    values : array
        Values of the chunk. The last chunk of an array may have fewer.
    chunks, index : sequence of int
        Shape of a chunk, and its position among the chunks.
    separator : str
        See `ChunkedArray`.
    """
    full = _full_chunk(values, chunks)
    if full is None:
        return None
    return _key(index, separator), Blosc("zstd", 1, Blosc.SHUFFLE, _BLOCK_BYTES).encode(full)


def _full_chunk(values: NDArray[Any], chunks: Sequence[int]) -> NDArray[Any] | None:
    """Return the values of a chunk in the order in which they are stored; None if all are fill values."""
    if not values.size or (np.isnan(values).all() if values.dtype.kind == "f" else not values.any()):
        return None
    if values.shape != tuple(chunks):
        full = np.full(chunks, _fill_value(values.dtype), values.dtype)
        full[tuple(map(slice, values.shape))] = values
        values = full
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<"))


def read_arrays(storage: Storage, path: str, names: Sequence[str]) -> dict[str, LabelledArray]:
    """Read some arrays of a group, without xarray, which takes 1 ms to open each array of a hierarchy.

    Parameters
    ----------
    storage : Storage
        Location of the hierarchy.
    path : str
        Path of the group.
    names : sequence of str
        Names of arrays; those that do not exist are omitted.
    """
    import zarr

    group: Any = zarr.open_group(storage.zarr_store(), mode="r")[path]
    found: dict[str, LabelledArray] = {}
    for name in names:
        if name in group:
            array = group[name]
            found[name] = LabelledArray(array.metadata.dimension_names or (), np.asarray(array[...]))
    return found


def read_parts(
    storage: Storage, path: str, names: Sequence[str], at: Mapping[str, int], along: str, most_bytes: int
) -> Iterator[list[NDArray[Any]]]:
    """Yield the values of some arrays of a group, for consecutive parts along one dimension.

    Parameters
    ----------
    storage : Storage
        Location of the hierarchy.
    path : str
        Path of the group.
    names : sequence of str
        Arrays with the same dimensions.
    at : mapping of str to int
        Index along other dimensions, which the values do not have.
    along : str
        Dimension of the parts.
    most_bytes : int
        Size of the values of an array in a part, at most, unless a single index has more.
    """
    import zarr

    group: Any = zarr.open_group(storage.zarr_store(), mode="r")[path]
    arrays = [group[name] for name in names]
    dimensions, shape = arrays[0].metadata.dimension_names, arrays[0].shape
    sizes = {name: size for name, size in zip(dimensions, shape, strict=True) if name not in at}
    row = max(array.dtype.itemsize for array in arrays) * math.prod(sizes.values()) // max(sizes[along], 1)
    length = max(most_bytes // max(row, 1), 1)
    for start in range(0, sizes[along], length):
        part = {**at, along: slice(start, start + length)}
        index = tuple(part.get(name, slice(None)) for name in dimensions)
        yield [np.asarray(array[index]) for array in arrays]


def _key(index: Sequence[int], separator: str) -> str:
    return separator.join(("c", *map(str, index)))


def _consolidated(documents: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "inline", "must_understand": False, "metadata": documents}


def _json(document: Mapping[str, Any]) -> bytes:
    # Attributes may be numbers and arrays of NumPy.
    return json.dumps(document, default=lambda value: value.tolist()).encode()


def _array_document(
    name: str, array: LabelledArray | ChunkedArray, coordinates: Mapping[str, LabelledArray]
) -> dict[str, Any]:
    """Return the metadata of an array, with the attributes that xarray adds."""
    document = deepcopy(_template(array.kind, array.separator if isinstance(array, ChunkedArray) else None))
    attributes = dict(array.attributes)
    if name not in coordinates:
        labels = (label for label, of in coordinates.items() if label not in of.dimensions)
        found = [label for label in labels if set(coordinates[label].dimensions) <= set(array.dimensions)]
        if found:
            attributes["coordinates"] = " ".join(found)
    if array.kind.startswith("float"):
        missing = np.array(np.nan, array.kind).astype("<f8")
        attributes["_FillValue"] = base64.b64encode(missing.tobytes()).decode()
    document |= {"shape": list(array.shape), "attributes": attributes}
    document["chunk_grid"]["configuration"]["chunk_shape"] = list(array.chunks)
    if array.dimensions:
        document["dimension_names"] = list(array.dimensions)
    return document


@cache
def _template(kind: str, separator: str | None) -> dict[str, Any]:
    """Return the metadata of an array of a data type, as Zarr writes them; ``separator`` of a `ChunkedArray`."""
    import zarr
    from zarr.codecs import BloscCodec

    codec: Any = "auto"
    if separator is not None:
        codec = BloscCodec(
            typesize=np.dtype(kind).itemsize, cname="zstd", clevel=1, shuffle="shuffle", blocksize=_BLOCK_BYTES
        )

    store: dict[str, Any] = {}
    dtype = np.dtype(kind)
    stored = np.dtype(np.uint32) if dtype.kind == "U" else dtype
    array = zarr.create_array(
        zarr.storage.MemoryStore(store),
        shape=(),
        dtype=stored,
        fill_value=_fill_value(stored),
        compressors=codec,
        chunk_key_encoding={"name": "default", "separator": separator or "/"},
        config={"write_empty_chunks": False},
    )
    document: dict[str, Any] = array.metadata.to_dict()
    document.pop("dimension_names", None)
    if dtype.kind == "U":
        length = {"length_bytes": dtype.itemsize}
        document |= {
            "data_type": {"name": "fixed_length_utf32", "configuration": length},
            "fill_value": _fill_value(dtype),
        }
    return json.loads(json.dumps(document))  # type: ignore[no-any-return]  # JSON


def _fill_value(dtype: np.dtype[Any]) -> Any:
    return {"f": np.nan, "U": ""}.get(dtype.kind, 0)


def _chunk_shape(values: NDArray[Any]) -> tuple[int, ...]:
    if not values.ndim or values.nbytes <= CHUNK_BYTES:
        return tuple(max(size, 1) for size in values.shape)
    row = values.nbytes // values.shape[0]
    return max(CHUNK_BYTES // row, 1), *(max(size, 1) for size in values.shape[1:])


def _chunks(values: NDArray[Any], shape: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    """Yield the key and the content of each chunk. A chunk of fill values only is not stored."""
    counts = [math.ceil(size / chunk) for size, chunk in zip(values.shape, shape, strict=True)]
    for index in itertools.product(*map(range, counts)):
        part = values[tuple(slice(at * chunk, (at + 1) * chunk) for at, chunk in zip(index, shape, strict=True))]
        if (full := _full_chunk(part, shape)) is not None:
            yield _key(index, "/"), Zstd(level=0).encode(full.tobytes())  # as Zarr does by default
