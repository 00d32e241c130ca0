"""A checkpoint of Orbax, read with TensorStore (an extra: ``pip install natgrad-pipeline[orbax]``).

``_METADATA`` of an item lists the leaves of a tree of arrays. Each is a Zarr array: in a folder of its own, or all
in the key-value store OCDBT, whose files any number of processes wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pipeline.schema import InputError
from pipeline.sources.base import Container, LoggedStep, LoggedTensor, boxes, refused, where
from pipeline.sources.names import step_number

__all__ = ["OrbaxFolder", "orbax_number", "orbax_unfinished"]

_FORM = "an Orbax checkpoint"
_METADATA, _CHECKPOINT, _COMMIT = "_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt"
_TEMPORARY = ".orbax-checkpoint-tmp"
_JSON_LIMIT, _DEPTH_LIMIT = 1 << 27, 16
_CHUNK_LIMIT, _ARRAY_LIMIT = 1 << 29, 1 << 48
# Leaves that are no arrays.
_NO_ARRAYS = ("None", "Dict", "List", "Tuple", "NamedTuple", "string")


def orbax_number(path: Path) -> int | None:
    """Step of a checkpoint folder, also of one that is being written; None where it is none."""
    name, temporary, _ = path.name.partition(_TEMPORARY)
    number = step_number(name)
    if number is None or not path.is_dir():
        return None
    return number if temporary or (path / _CHECKPOINT).is_file() or _items(path) else None


def orbax_unfinished(path: Path) -> str:
    """Why a checkpoint cannot be read yet: it is renamed, or has a file put into it, when it is whole."""
    if _TEMPORARY in path.name:
        return "its name says that it is being written"
    if (path / _COMMIT).is_file() or not (path / _CHECKPOINT).is_file():
        return ""
    try:
        written = _json(path / _CHECKPOINT).get("commit_timestamp_nsecs", 0)
    except (OSError, ValueError):
        written = None
    return "" if written is not None else f"{_CHECKPOINT} has no time of its commit: it is being written"


def _items(path: Path) -> list[Path]:
    """Folders of the trees of a checkpoint: those in it, or itself."""
    try:
        if (path / _METADATA).is_file():
            return [path]
        return sorted(item for item in path.iterdir() if (item / _METADATA).is_file())
    except OSError:
        return []


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _JSON_LIMIT:
        raise ValueError(f"{path.name} has more than {_JSON_LIMIT} bytes")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


@contextmanager
def _short() -> Iterator[None]:
    # TensorStore repeats the specification of the array behind what went wrong.
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).partition(" [")[0]) from error


class OrbaxFolder(Container):
    """One checkpoint: its trees of arrays, and the numbers of its JSON items.

    Levels of a tree are joined by a slash. Where there are several trees, the name of the item stands before.

    Raises
    ------
    InputError
        Where metadata are damaged or lead out of the folder, an array is not there or in chunks that are too large
        to unpack, or TensorStore is not installed.
    """

    def __init__(self, step: LoggedStep) -> None:
        super().__init__(step)
        try:
            import tensorstore
        except ImportError as error:
            raise InputError(
                "reading Orbax needs tensorstore", where=where(step), remedy="pip install natgrad-pipeline[orbax]"
            ) from error
        self._tensorstore = tensorstore
        self._specs: dict[str, dict[str, Any]] = {}
        self._caches: dict[str, int] = {}
        self._open: tuple[str, Any] = ("", None)
        with refused(step, _FORM), _short():
            try:
                self._describe()
            except (TypeError, AttributeError, LookupError) as error:
                raise ValueError(f"its metadata are malformed ({type(error).__name__}: {error})") from error

    # Metadata

    def _describe(self) -> None:
        items = _items(self.step.path)
        if not items:
            raise ValueError(f"it holds no item with {_METADATA}")
        for item in items:
            self._add_tree(item, f"{item.name}/" if len(items) > 1 else "")
        for path in sorted(self.step.path.glob("*/metadata")) + sorted(self.step.path.glob("*/metrics")):
            if path.is_file() and path.parent not in items:
                self._add_numbers(path)
        pending = {key: self._tensorstore.open(spec, open=True, read=True) for key, spec in self._specs.items()}
        for key, future in pending.items():
            self._add(key, future.result())

    def _add_tree(self, item: Path, prefix: str) -> None:
        tree = _json(item / _METADATA)
        driver = "zarr3" if tree.get("use_zarr3") else "zarr"
        packed = (item / "manifest.ocdbt").is_file()
        for entry in tree["tree_metadata"].values():
            value = entry["value_metadata"]
            if value.get("skip_deserialize") or value.get("value_type") in _NO_ARRAYS:
                continue
            levels = [str(level["key"]) for level in entry["key_metadata"]]
            if not levels or len(levels) > _DEPTH_LIMIT:
                raise ValueError(f"{_METADATA} has a leaf of {len(levels)} levels")
            key, name = prefix + "/".join(levels), ".".join(levels)
            if key in self._specs:
                raise ValueError(f"{key!r} is there twice")
            if any(part in ("", ".", "..") for part in name.split("/")):
                raise ValueError(f"{_METADATA} leads to {name[:80]!r}, which is outside of the folder")
            if packed:
                base = {"driver": "file", "path": f"{item.absolute()}/"}
                store: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            else:
                store = {"driver": "file", "path": f"{item.absolute()}/{name}/"}
            # Where chunks of zeros are stored too, one that is not there was lost.
            lost = bool(tree.get("store_array_data_equal_to_fill_value"))
            self._specs[key] = {"driver": driver, "kvstore": store, "fill_missing_data_reads": not lost}

    def _add_numbers(self, path: Path) -> None:
        try:
            found = _json(path)
        except ValueError as error:
            self.unread[path.parent.name] = str(error)
            return
        self.numbers |= {
            f"{path.parent.name}/{key}": float(value)
            for key, value in found.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    def _add(self, key: str, store: Any) -> None:
        shape, itemsize = tuple(store.shape), store.dtype.numpy_dtype.itemsize
        if math.prod(shape) * itemsize > _ARRAY_LIMIT:
            raise ValueError(f"{key!r} claims to be of shape {shape}")
        chunk = tuple(store.chunk_layout.read_chunk.shape or ())
        if math.prod(map(min, chunk, shape)) * itemsize > _CHUNK_LIMIT:
            raise ValueError(
                f"{key!r} lies in chunks of {chunk}, more than {_CHUNK_LIMIT} bytes each: save with chunk_byte_size"
            )
        self.tensors[key] = LoggedTensor(shape, store.dtype.name)
        # A row of chunks is unpacked once for all slices that it is cut into.
        row = chunk[0] * math.prod(shape[1:]) * itemsize if shape else 0
        self._caches[key] = row if row <= _CHUNK_LIMIT else 0

    # Reading

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `pipeline.sources.base.StepReader`."""
        with refused(self.step, _FORM, key), _short():
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
        if self._open[0] != key:
            context = self._tensorstore.Context({"cache_pool": {"total_bytes_limit": self._caches[key]}})
            future = self._tensorstore.open(self._specs[key], open=True, read=True, context=context)
            self._open = key, future.result()
        return self._open[1]

    def close(self) -> None:
        """Let go of what was unpacked."""
        self._open = "", None
