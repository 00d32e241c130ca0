"""Read folders of ``torch.distributed.checkpoint`` in one process without torch, chunk by chunk.

``.metadata`` is a pickle (read as data, `natgrad.sources.checkpoints.pickle_data`) that lists the chunks of each
tensor and their positions. Each chunk is a small torch archive in a ``.distcp`` file. The checkpoint may have been
written by any number of ranks.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.sources.checkpoints import pickle_data
from natgrad.sources.checkpoints.pickle_data import Record, Skipped
from natgrad.sources.checkpoints.step_folder import Kind
from natgrad.sources.checkpoints.torch_archive import (
    METADATA_FUNCTIONS,
    METADATA_VALUES,
    TORCH_DTYPES,
    TorchArchive,
    TorchTensor,
    flat_numbers,
    group_texts,
)
from natgrad.sources.container import Container, Region, read_errors
from natgrad.sources.names import CHECKPOINT, is_step, step_number
from natgrad.sources.steps import LoggedStep, LoggedTensor

__all__ = ["DCP_KIND", "DcpFolder"]

_METADATA = ".metadata"
_EXTRAS = ("meta.pt", "common.pt")
_FORM = "a torch.distributed.checkpoint folder"
_GATHER_LIMIT = 1 << 16
_OPEN_FILES = 32

_CLASSES = [
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "MetadataIndex", "StorageMeta"),
        )
    ),
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
]
# Megatron-LM stores the save plans of its ranks in the metadata, to reuse them for the next save.
_PLANS = ("torch.distributed.checkpoint.planner.*", "megatron.*")
_ENCODINGS = (
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
)


def _record(name: str) -> Callable[..., Record]:
    return lambda *_: Record(name)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **METADATA_FUNCTIONS,
    **{name: _record(name) for name in _CLASSES},
    **{name: lambda *_: Skipped("memory format") for name in _ENCODINGS},
}


@dataclass(frozen=True)
class _Blob:
    """Byte range of a file that contains a torch archive."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor, and its position in the files."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    blob: _Blob


def _folders(path: Path) -> list[Path]:
    """Return the folders with committed metadata: the folder itself, or those in it that are not steps of a run."""
    try:
        if (path / _METADATA).is_file():
            return [path]
        return sorted(
            inner for inner in path.iterdir() if (inner / _METADATA).is_file() and not is_step(inner.name)
        )
    except OSError:
        return []


def _state(path: Path) -> str:
    """Return "finished" or "unfinished" if a folder is a checkpoint, otherwise ""."""
    if _folders(path):
        return "finished"
    try:
        written = any(path.glob("*.distcp")) or any(
            not is_step(file.parent.name) for file in path.glob("*/*.distcp")
        )
    except OSError:
        return ""
    return "unfinished" if written else ""


def _number(path: Path) -> int | None:
    number = step_number(path.name)
    return number if number is not None and path.is_dir() and _state(path) else None


DCP_KIND = Kind(
    "step-<N>/.metadata",
    _number,
    lambda step, names: DcpFolder(step, names.inert),
    CHECKPOINT,
    lambda path: "" if _state(path) == "finished" else "it has no .metadata: it is still being written",
)


class DcpFolder(Container):
    """One checkpoint: one folder, or several folders (model, optimizer), and an optional additional file.

    This file is ``meta.pt`` of Lightning or ``common.pt`` of Megatron-LM.

    Raises
    ------
    InputError
        If metadata are corrupt, contain objects that are not data, or do not match the files.
    """

    def __init__(self, step: LoggedStep, inert: Collection[str] = ()) -> None:
        super().__init__(step)
        self._inert = (*_PLANS, *inert)
        self._chunks: dict[str, tuple[Path, list[_Chunk]]] = {}
        self._files: OrderedDict[Path, tuple[int, dict[_Blob, TorchArchive]]] = OrderedDict()
        try:
            with read_errors(step, _FORM):
                folders = _folders(step.path)
                if not folders:
                    raise FileNotFoundError(f"there is no {_METADATA} in {step.path.name}")
                for folder in folders:
                    try:
                        self._describe(folder)
                    except (TypeError, AttributeError, LookupError) as error:
                        raise ValueError(f"{_METADATA} is malformed ({type(error).__name__}: {error})") from error
                for extra in _EXTRAS:
                    if (step.path / extra).is_file():
                        archive = self._archive(step.path, _Blob(extra, 0, (step.path / extra).stat().st_size))
                        self.numbers |= flat_numbers(archive.tree, self.numbers)
        except BaseException:
            self.close()
            raise

    # Metadata

    def _describe(self, folder: Path) -> None:
        path = folder / _METADATA
        if path.stat().st_size > pickle_data.PICKLE_LIMIT:
            raise ValueError(f"{_METADATA} has more than {pickle_data.PICKLE_LIMIT} bytes")
        metadata = pickle_data.load(
            path.read_bytes(), functions=_FUNCTIONS, values=METADATA_VALUES, inert=self._inert
        )
        if not isinstance(metadata, Record) or not metadata.name.endswith(".Metadata"):
            raise ValueError(f"{_METADATA} does not describe a checkpoint")
        blobs = _blobs(metadata.get("storage_data"))
        paths = metadata.get("planner_data")
        paths = paths if isinstance(paths, dict) else {}
        for name, entry in _dict(metadata.get("state_dict_metadata")).items():
            levels = paths.get(name)
            key = "/".join(map(str, levels)) if isinstance(levels, tuple) and levels else str(name)
            if key in self._chunks or key in self.numbers:
                raise ValueError(f"it contains {key!r} twice")
            if not isinstance(entry, Record):
                raise ValueError(f"the description of {key!r} has an unknown type")
            if entry.name.endswith(".BytesStorageMetadata"):
                blob = blobs.get((name, None))
                if blob is None:
                    raise ValueError(f"no file contains {key!r}")
                self._add_numbers(folder, key, blob)
            else:
                self._add_tensor(folder, key, name, entry, blobs)

    def _add_numbers(self, folder: Path, key: str, blob: _Blob) -> None:
        try:
            tree = self._archive(folder, blob).tree
        except ValueError as error:
            # An object of a user-defined class, such as a data loader, is not a tensor.
            self.unread[key] = str(error)
            return
        self.numbers |= {f"{key}/{inner}".rstrip("/"): n for inner, n in flat_numbers(tree).items()}
        self.texts |= {name.rstrip("/"): text for name, text in group_texts(tree, f"{key}/").items()}

    def _add_tensor(
        self, folder: Path, key: str, name: str, entry: Record, blobs: dict[tuple[str, Any], _Blob]
    ) -> None:
        shape = _integers(entry.get("size"))
        properties = entry.get("properties")
        dtype = properties.state[0] if isinstance(properties, Record) else None
        dtype = _DTYPES.get(dtype)
        if dtype is None:
            raise ValueError(f"{key!r} has no dtype")
        itemsize = TORCH_DTYPES[dtype][1]
        chunks = []
        for chunk in entry.get("chunks"):
            offsets, sizes = _integers(chunk.get("offsets")), _integers(chunk.get("sizes"))
            blob = blobs.get((name, offsets))
            if not len(offsets) == len(sizes) == len(shape) or any(
                first + size > length for first, size, length in zip(offsets, sizes, shape, strict=True)
            ):
                raise ValueError(f"a chunk of {key!r} is outside of its shape {shape}")
            if not math.prod(sizes):
                continue
            if blob is None:
                raise ValueError(f"no file contains the chunk of {key!r} at {offsets}")
            if math.prod(sizes) * itemsize > blob.length:
                raise ValueError(f"the chunk of {key!r} at {offsets} exceeds the {blob.length} bytes stored for it")
            chunks.append(_Chunk(offsets, sizes, blob))
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise ValueError(f"the chunks of {key!r} do not add up to its shape {shape}")
        self.tensors[key] = LoggedTensor(shape, dtype)
        self._chunks[key] = folder, chunks

    # Reading

    def _archive(self, folder: Path, blob: _Blob) -> TorchArchive:
        path = folder / blob.file
        if path not in self._files:
            while len(self._files) >= _OPEN_FILES:
                _, (descriptor, _) = self._files.popitem(last=False)
                os.close(descriptor)
            self._files[path] = os.open(path, os.O_RDONLY), {}
        self._files.move_to_end(path)
        descriptor, archives = self._files[path]
        if blob not in archives:
            archives[blob] = TorchArchive(Region(descriptor, blob.offset, blob.length), self._inert)
        return archives[blob]

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        folder, chunks = self._chunks[key]
        logged = self.tensors[key]
        with read_errors(self.step, _FORM, key):
            missing = np.ones(out.size, np.bool_)
            for chunk in chunks:

                def fetch(first: int, buffer: NDArray[Any], chunk: _Chunk = chunk) -> None:
                    archive = self._archive(folder, chunk.blob)
                    tensor = archive.tree
                    if (
                        not isinstance(tensor, TorchTensor)
                        or tensor.shape != chunk.sizes
                        or tensor.dtype != logged.dtype
                    ):
                        raise ValueError(f"the chunk at {chunk.offsets} does not match the metadata")
                    archive.read(tensor, first, buffer)

                _copy_box(chunk.offsets, chunk.sizes, logged.shape, fetch, start, out, missing)
            if missing.any():
                raise ValueError("its chunks overlap and do not contain all elements")

    def close(self) -> None:
        """Close the files."""
        while self._files:
            _, (descriptor, _) = self._files.popitem()
            os.close(descriptor)


_DTYPES = {value: name.removeprefix("torch.") for name, value in METADATA_VALUES.items()}


def _copy_box(
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    shape: tuple[int, ...],
    fetch: Callable[[int, NDArray[Any]], None],
    start: int,
    out: NDArray[Any],
    missing: NDArray[np.bool_],
) -> None:
    """Copy the elements of a box that are among the elements ``start`` and following of the tensor, in C order.

    In C order, a box is a sequence of runs of equal length, each contiguous in the tensor, in ascending order.
    """
    # A run consists of the last dimension that the box does not fill, and the following ones.
    level = next((i for i in range(len(shape) - 1, -1, -1) if sizes[i] != shape[i]), 0)
    length = math.prod(sizes[level:])
    runs = math.prod(sizes[:level])
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))

    def position(run: Any) -> Any:
        index = np.unravel_index(run, sizes[:level]) if level else ()
        return base + sum(i * stride for i, stride in zip(index, strides, strict=False))

    stop = start + out.size
    first = bisect_right(range(runs), start - length, key=position)
    last = bisect_left(range(runs), stop, key=position)
    runs_per_read = max(1, _GATHER_LIMIT // length)
    for low in range(first, last, runs_per_read):
        high = min(low + runs_per_read, last)
        if high - low == 1:
            run_start = int(position(low))
            first_element, last_element = max(run_start, start), min(run_start + length, stop)
            fetch(low * length + first_element - run_start, out[first_element - start : last_element - start])
            missing[first_element - start : last_element - start] = False
        else:
            words = np.empty((high - low) * length, out.dtype)
            fetch(low * length, words)
            positions = (position(np.arange(low, high))[:, None] + np.arange(length)).ravel() - start
            inside = (positions >= 0) & (positions < out.size)
            out[positions[inside]] = words[inside]
            missing[positions[inside]] = False


def _dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{_METADATA} contains a {type(value).__name__} instead of a dict")
    return value


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and 0 <= n < 1 << 60 for n in value):
        raise ValueError(f"{_METADATA} describes an impossible tensor")
    return value


def _blobs(storage: Any) -> dict[tuple[str, Any], _Blob]:
    """Return positions in files, by name and offsets of the chunk."""
    blobs = {}
    for index, info in _dict(storage).items():
        if not isinstance(index, Record) or not isinstance(info, Record):
            raise ValueError(f"{_METADATA} describes the location of data in an unknown way")
        file = info.get("relative_path")
        if not isinstance(file, str) or not file or Path(file).name != file or file == "..":
            raise ValueError(f"{_METADATA} refers to {str(file)[:80]!r}, which is outside of the folder")
        if info.get("transform_descriptors"):
            raise ValueError(f"{file} is encoded by an extension: save the checkpoint without it")
        offset, length = _integers((info.get("offset"), info.get("length")))
        blobs[str(index.get("fqn")), index.get("offset")] = _Blob(file, offset, length)
    return blobs
