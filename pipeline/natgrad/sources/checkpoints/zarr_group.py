"""Read Zarr arrays in folders or key-value stores with TensorStore (an extra of the package).

TensorStore is used because the Zarr library returns the fill value for chunks that were lost. TensorStore also
reads into a buffer, supports bfloat16, and reads the key-value store of Orbax.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import storage_dtype
from natgrad.sources.bounds import JSON_LIMIT, Budget, parse_json, read_limited, surveyed
from natgrad.sources.byte_ranges import ByteRange, of_boxes
from natgrad.sources.container import Container, boxes, read_errors
from natgrad.sources.steps import LoggedStep, LoggedTensor, where
from natgrad.storage import LocalStorage

__all__ = ["ZarrArrays", "ZarrGroup", "holds_zarr", "read_object"]

_FORM = "a Zarr group"
_CHUNK_LIMIT = 1 << 29
_ARRAYS_LIMIT = 1 << 16
_FILES_LIMIT = 1 << 10
"""Most chunks of an array that are read from their files. With more, it is faster to copy the array."""

_VERSION_2, _VERSION_3 = ".zarray", "zarr.json"


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises
    ------
    ValueError, OSError
        If the file cannot be read or does not contain an object.
    """
    found = parse_json(read_limited(path, JSON_LIMIT), path.name)
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} does not contain a JSON object")
    return found


@contextmanager
def _short_errors() -> Iterator[None]:
    # TensorStore appends the specification of the array to its messages.
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).partition(" [")[0]) from error


class ZarrArrays(Container):
    """Arrays by their keys. `open_arrays` adds arrays.

    Parameters
    ----------
    step : LoggedStep
    form : str
        Used in messages, such as "a Zarr group".
    stacked : bool
        The first dimension is the step; one step is read at a time.

    Raises
    ------
    InputError
        If TensorStore is not installed.
    """

    def __init__(self, step: LoggedStep, form: str, *, stacked: bool = False) -> None:
        super().__init__(step)
        try:
            import tensorstore
        except ImportError as error:
            raise InputError(
                f"reading {form} needs tensorstore", where=where(step), remedy="pip install natgrad-pipeline[orbax]"
            ) from error
        self._tensorstore, self._form, self._stacked = tensorstore, form, stacked
        self._specs: dict[str, Mapping[str, Any]] = {}
        self._caches: dict[str, int] = {}
        self._open: tuple[str, Any] = ("", None)

    def open_arrays(self, specs: Mapping[str, Mapping[str, Any]], *, required: bool = True) -> None:
        """Open arrays and add their descriptions.

        Parameters
        ----------
        specs : mapping
            TensorStore specification by key.
        required : bool
            Raise an error for arrays that cannot be opened. If False, list them in ``unread``.

        Raises
        ------
        ValueError
            If an array cannot be opened, or if its chunks are too large to decompress.
        """
        pending = {key: self._tensorstore.open(spec, open=True, read=True) for key, spec in specs.items()}
        self._specs |= specs
        for key, future in pending.items():
            try:
                with _short_errors():
                    store = future.result()
            except ValueError as error:
                if required:
                    raise
                self.unread[key] = str(error)
                continue
            self._add(key, store)

    def _add(self, key: str, store: Any) -> None:
        shape, itemsize = tuple(store.shape), store.dtype.numpy_dtype.itemsize
        chunk = tuple(store.chunk_layout.read_chunk.shape or ())
        if math.prod(chunk) * itemsize > _CHUNK_LIMIT:
            raise ValueError(
                f"{key!r} has chunks of shape {chunk}, more than {_CHUNK_LIMIT} bytes each: use smaller chunks"
            )
        self.add(key, shape, store.dtype.name)
        row = _row(shape, chunk) if not self._stacked else chunk[0] * _row(shape[1:], chunk[1:]) if shape else 1
        self._caches[key] = row * itemsize if row * itemsize <= _CHUNK_LIMIT else 0

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        with read_errors(self.step, self._form, key), _short_errors():
            store = self._store(key)
            words = out.view(store.dtype.numpy_dtype)
            done = 0
            for box in boxes(tuple(store.shape), start, start + out.size):
                shape = tuple(part.stop - part.start for part in box)
                size = math.prod(shape)
                target = self._tensorstore.array(words[done : done + size].reshape(shape))
                target.write(store[box]).result()
                done += size

    def _store(self, key: str) -> Any:
        opened, store = self._open
        if opened != key:
            context = self._tensorstore.Context({"cache_pool": {"total_bytes_limit": self._caches[key]}})
            store = self._tensorstore.open(self._specs[key], open=True, read=True, context=context).result()
            self._open = key, store
        return store

    def close(self) -> None:
        """Release the cached chunks."""
        self._open = "", None


def _row(shape: Sequence[int], chunk: Sequence[int]) -> int:
    """Return the number of elements in a row of chunks, which is decompressed once for all slices that it contains.

    Examples
    --------
    >>> [_row((40, 30), (10, 10)), _row((40, 30), (1, 10)), _row((), ())]
    [300, 10, 1]
    """
    first = next((axis for axis, length in enumerate(chunk) if length > 1), len(chunk))
    return math.prod(chunk[: first + 1]) * math.prod(shape[first + 1 :])


def holds_zarr(path: Path) -> bool:
    """Return True if a folder is a Zarr group of version 2 or 3."""
    if (path / ".zgroup").is_file():
        return True
    try:
        return read_object(path / _VERSION_3).get("node_type") == "group"
    except (OSError, ValueError):
        return path.suffix == ".zarr" and (path / _VERSION_3).is_file()


class ZarrGroup(ZarrArrays):
    """A Zarr group, with its arrays, and the attributes of its groups that are numbers, by path.

    Parameters
    ----------
    step : LoggedStep
    stacked : bool
        See `ZarrArrays`.

    uint16 with the attribute ``ml_dtype`` = ``bfloat16`` is interpreted as bfloat16. Links to folders are not
    followed.

    Raises
    ------
    InputError
        If metadata are corrupt, an array has chunks that are too large to decompress, or TensorStore is not
        installed.
    """

    def __init__(self, step: LoggedStep, *, stacked: bool = False) -> None:
        super().__init__(step, _FORM, stacked=stacked)
        self._ranges: dict[str, list[ByteRange] | None] = {}
        with read_errors(step, _FORM):
            size, links = surveyed(step.path)
            self.budget = Budget(size)
            arrays = self._found()
            self.numbers = {key: value for key, value in self.numbers.items() if key not in arrays}
            for link in links:
                if any((step.path / key) in link.parents for key in arrays):
                    raise ValueError(f"{link} is a link to a folder: copy the folder itself")
            self.open_arrays(arrays, required=False)
            for key, logged in self.tensors.items():
                if logged.dtype == "uint16" and self._attributes(key).get("ml_dtype") == "bfloat16":
                    self.tensors[key] = LoggedTensor(logged.shape, "bfloat16")

    def _found(self) -> dict[str, dict[str, Any]]:
        specs: dict[str, dict[str, Any]] = {}
        root = self.step.path
        for folder, folders, files in os.walk(root):
            path = Path(folder)
            is_version_2 = _VERSION_2 in files
            if is_version_2 or (_VERSION_3 in files and read_object(path / _VERSION_3).get("node_type") == "array"):
                # The content of the folder is the chunks of this array.
                folders.clear()
                store = {"driver": "file", "path": f"{path.absolute()}/"}
                specs[path.relative_to(root).as_posix()] = {
                    "driver": "zarr" if is_version_2 else "zarr3",
                    "kvstore": store,
                    "fill_missing_data_reads": False,
                }
            elif _VERSION_3 in files or ".zgroup" in files:
                name = path.relative_to(root).as_posix()
                attributes = self._attributes(name)
                self.budget.spend(len(attributes))
                self.numbers |= {
                    key if path == root else f"{name}/{key}": float(value)
                    for key, value in attributes.items()
                    if isinstance(value, int | float)
                }
            if len(specs) > _ARRAYS_LIMIT:
                raise ValueError(f"it contains more than {_ARRAYS_LIMIT} arrays")
        return specs

    def ranges(self, key: str) -> list[ByteRange] | None:
        """Return where the elements of an array are; see `natgrad.sources.base.Ranged`."""
        if key not in self._ranges:
            with read_errors(self.step, _FORM, key):
                self._ranges[key] = self._located(key)
        return self._ranges[key]

    def _located(self, key: str) -> list[ByteRange] | None:
        folder, shape = self.step.path / key, self.tensors[key].shape
        grid = _plain_chunks(folder)
        counts = () if grid is None else [-(-n // size) for n, size in zip(shape, grid[0], strict=True)]
        if grid is None or math.prod(counts) > _FILES_LIMIT:
            return None
        chunk, name_of = grid
        itemsize = storage_dtype(self.tensors[key].dtype).itemsize
        found = []
        for index in itertools.product(*map(range, counts)):
            offsets = tuple(i * size for i, size in zip(index, chunk, strict=True))
            sizes = tuple(min(size, n - i) for size, n, i in zip(chunk, shape, offsets, strict=True))
            file = LocalStorage(folder / name_of(index))
            # A chunk at the end of an axis is padded. A chunk that was never written has no file.
            if sizes[1:] != chunk[1:] or not file.exists() or file.stat().size != math.prod(chunk) * itemsize:
                return None
            found.append((offsets, sizes, ByteRange(file, 0, math.prod(sizes))))
        return of_boxes(found, shape, itemsize)

    def _attributes(self, key: str) -> dict[str, Any]:
        folder = self.step.path / key
        if (folder / ".zattrs").is_file():
            return read_object(folder / ".zattrs")
        found = read_object(folder / _VERSION_3).get("attributes") if (folder / _VERSION_3).is_file() else None
        return found if isinstance(found, dict) else {}


def _plain_chunks(folder: Path) -> tuple[tuple[int, ...], Callable[[tuple[int, ...]], str]] | None:
    """Return the shape of the chunks of an array, and the function that names their files.

    Returns None if the chunks are not little-endian numbers in C order.
    """
    if (folder / _VERSION_2).is_file():
        found = read_object(folder / _VERSION_2)
        plain = (found.get("order"), found.get("filters"), found.get("compressor")) == ("C", None, None)
        separator, prefix = found.get("dimension_separator", "."), ""
        if not plain or str(found["dtype"])[:1] not in ("<", "|"):
            return None
        chunk = tuple(found["chunks"])
    else:
        found = read_object(folder / _VERSION_3)
        keys, grid = found["chunk_key_encoding"], found["chunk_grid"]
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if (found["codecs"], keys["name"], grid["name"]) != (codecs, "default", "regular"):
            return None
        separator, prefix = keys.get("configuration", {}).get("separator", "/"), "c"
        chunk = tuple(grid["configuration"]["chunk_shape"])

    def name_of(index: tuple[int, ...]) -> str:
        parts = [*([prefix] if prefix else []), *map(str, index)]
        return separator.join(parts) or "0"

    return chunk, name_of
