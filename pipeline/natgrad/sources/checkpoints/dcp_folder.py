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
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.sources.bounds import Budget, integer, read_limited, shape_of, shown
from natgrad.sources.byte_ranges import ByteRange, of_boxes, runs_of
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
    unread_objects,
)
from natgrad.sources.container import Container, Region, read_errors
from natgrad.sources.names import CHECKPOINT
from natgrad.sources.step_names import is_step
from natgrad.sources.steps import LoggedStep
from natgrad.storage import LocalStorage, open_regular

__all__ = ["DCP_KIND", "DcpFolder", "copy_box", "holds_dcp"]

_METADATA = ".metadata"
_EXTRAS = ("meta.pt", "common.pt")
_FORM = "a torch.distributed.checkpoint folder"
_GATHER_LIMIT = 1 << 16
_OPEN_FILES = 32
_CHUNK_OPERATIONS = 8

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


def holds_dcp(path: Path) -> bool:
    """Return True if a folder is a checkpoint with committed metadata, or contains the parts of one."""
    return bool(_folders(path))


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


DCP_KIND = Kind(
    "step-<N>/.metadata",
    lambda path: path.is_dir() and bool(_state(path)),
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
        self._describing: Budget | None = None
        self._chunks: dict[str, tuple[Path, list[_Chunk]]] = {}
        self._files: OrderedDict[Path, tuple[int, dict[_Blob, TorchArchive]]] = OrderedDict()
        try:
            with read_errors(step, _FORM):
                folders = _folders(step.path)
                if not folders:
                    raise FileNotFoundError(f"there is no {_METADATA} in {step.path.name}")
                self.budget = self._describing = Budget(
                    sum(file.stat().st_size for folder in {step.path, *folders} for file in folder.iterdir())
                )
                for folder in folders:
                    self._describe(folder)
                for extra in _EXTRAS:
                    if (step.path / extra).is_file():
                        archive = self._archive(step.path, _Blob(extra, 0, (step.path / extra).stat().st_size))
                        self.numbers |= flat_numbers(archive.leaves(), self.numbers)
                self._describing = None
        except BaseException:
            self.close()
            raise

    # Metadata

    def _describe(self, folder: Path) -> None:
        metadata = pickle_data.load(
            read_limited(folder / _METADATA, pickle_data.PICKLE_LIMIT),
            functions=_FUNCTIONS,
            values=METADATA_VALUES,
            inert=self._inert,
            budget=self.budget,
        )
        if not isinstance(metadata, Record) or not metadata.name.endswith(".Metadata"):
            raise ValueError(f"{_METADATA} does not describe a checkpoint")
        blobs = _blobs(metadata.get("storage_data"))
        paths = metadata.get("planner_data")
        paths = paths if isinstance(paths, dict) else {}
        self.objects |= unread_objects(paths.items())
        for name, entry in _dict(metadata.get("state_dict_metadata")).items():
            if not isinstance(name, str):
                raise ValueError(f"{_METADATA} has {shown(name)} as the name of an entry")
            key = self._key(name, paths.get(name))
            if key in self._chunks or key in self.numbers:
                raise ValueError(f"it contains {shown(key)} twice")
            if not isinstance(entry, Record):
                raise ValueError(f"the description of {shown(key)} has an unknown type")
            if entry.name.endswith(".BytesStorageMetadata"):
                blob = blobs.get((name, None))
                if blob is None:
                    raise ValueError(f"no file contains {shown(key)}")
                self._add_numbers(folder, key, blob)
            else:
                self._add_tensor(folder, key, name, entry, blobs)

    def _key(self, name: str, levels: Any) -> str:
        """Return the key of an entry: its levels in the saved dict joined by slashes, or its name."""
        if not isinstance(levels, tuple) or not levels:
            return name
        if not all(isinstance(level, str) or type(level) is int for level in levels):
            raise ValueError(f"{_METADATA} has levels of {shown(name)} that are neither names nor numbers")
        self.budget.spend(len(levels), sum(len(level) for level in levels if isinstance(level, str)))
        return "/".join(map(str, levels))

    def _add_numbers(self, folder: Path, key: str, blob: _Blob) -> None:
        try:
            leaves = self._archive(folder, blob).leaves()
        except ValueError as error:
            # An object of a user-defined class, such as a data loader, is not a tensor.
            self.unread[key] = str(error)
            return
        self.objects |= {name.rstrip("/"): item for name, item in unread_objects(leaves, f"{key}/").items()}
        self.numbers |= {f"{key}/{inner}".rstrip("/"): n for inner, n in flat_numbers(leaves).items()}
        self.texts |= {name.rstrip("/"): text for name, text in group_texts(leaves, f"{key}/").items()}

    def _add_tensor(
        self, folder: Path, key: str, name: str, entry: Record, blobs: dict[tuple[str, Any], _Blob]
    ) -> None:
        shape = shape_of(entry.get("size"), shown(key))
        properties = entry.get("properties")
        first = properties.state[0] if isinstance(properties, Record) else None
        dtype = next((name for value, name in _DTYPES.items() if first is value), None)
        if dtype is None:
            raise ValueError(f"{shown(key)} has no dtype")
        itemsize = TORCH_DTYPES[dtype][1]
        chunks = []
        for chunk in entry.get("chunks"):
            offsets, sizes = (shape_of(chunk.get(name), shown(key)) for name in ("offsets", "sizes"))
            self.budget.spend(_CHUNK_OPERATIONS)
            blob = blobs.get((name, offsets))
            if not len(offsets) == len(sizes) == len(shape) or any(
                first + size > length for first, size, length in zip(offsets, sizes, shape, strict=True)
            ):
                raise ValueError(f"a chunk of {shown(key)} is outside of its shape {shape}")
            if not math.prod(sizes):
                continue
            if blob is None:
                raise ValueError(f"no file contains the chunk of {shown(key)} at {offsets}")
            if math.prod(sizes) * itemsize > blob.length:
                raise ValueError(f"the chunk of {shown(key)} at {offsets} exceeds its {blob.length} bytes")
            chunks.append(_Chunk(offsets, sizes, blob))
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise ValueError(f"the chunks of {shown(key)} do not add up to its shape {shape}")
        self.add(key, shape, dtype)
        self._chunks[key] = folder, chunks

    # Reading

    def _archive(self, folder: Path, blob: _Blob) -> TorchArchive:
        path = folder / blob.file
        if path not in self._files:
            while len(self._files) >= _OPEN_FILES:
                _, (descriptor, _) = self._files.popitem(last=False)
                os.close(descriptor)
            self._files[path] = open_regular(path), {}
        self._files.move_to_end(path)
        descriptor, archives = self._files[path]
        if blob not in archives:
            # While a step is described, all archives share its budget: a range of bytes may be listed many times.
            region = Region(descriptor, blob.offset, blob.length)
            archives[blob] = TorchArchive(region, self._inert, self._describing)
        return archives[blob]

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        folder, chunks = self._chunks[key]
        logged = self.tensors[key]
        with read_errors(self.step, _FORM, key):
            missing = np.ones(out.size, np.bool_)
            for chunk in chunks:

                def fetch(first: int, buffer: NDArray[Any], chunk: _Chunk = chunk) -> None:
                    archive, tensor = self._tensor(folder, chunk, logged.dtype)
                    archive.read(tensor, first, buffer)

                copy_box(chunk.offsets, chunk.sizes, logged.shape, fetch, start, out, missing)
            if missing.any():
                raise ValueError("its chunks overlap and do not contain all elements")

    def _tensor(self, folder: Path, chunk: _Chunk, dtype: str) -> tuple[TorchArchive, TorchTensor]:
        """Return the archive of a chunk, and the tensor in it."""
        archive = self._archive(folder, chunk.blob)
        tensor = archive.tree
        if not isinstance(tensor, TorchTensor) or tensor.shape != chunk.sizes or tensor.dtype != dtype:
            raise ValueError(f"the chunk at {chunk.offsets} does not match the metadata")
        return archive, tensor

    def ranges(self, key: str) -> list[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        folder, chunks = self._chunks[key]
        logged = self.tensors[key]
        boxes = []
        with read_errors(self.step, _FORM, key):
            for chunk in chunks:
                archive, tensor = self._tensor(folder, chunk, logged.dtype)
                offset = archive.offset(tensor)
                if offset is None:
                    return None
                file = LocalStorage(folder / chunk.blob.file)
                boxes.append((chunk.offsets, chunk.sizes, ByteRange(file, offset, math.prod(chunk.sizes))))
        return of_boxes(boxes, logged.shape, TORCH_DTYPES[logged.dtype][1])

    def close(self) -> None:
        """Close the files."""
        while self._files:
            _, (descriptor, _) = self._files.popitem()
            os.close(descriptor)


_DTYPES = {value: name.removeprefix("torch.") for name, value in METADATA_VALUES.items()}


def copy_box(
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    shape: tuple[int, ...],
    fetch: Callable[[int, NDArray[Any]], None],
    start: int,
    out: NDArray[Any],
    missing: NDArray[np.bool_],
) -> None:
    """Copy the elements of a box that are among the elements ``start`` and following of the tensor, in C order."""
    runs, length, position = runs_of(offsets, sizes, shape)
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
        raise ValueError(f"{_METADATA} contains {shown(value)} instead of a dict")
    return value


def _blobs(storage: Any) -> dict[tuple[str, Any], _Blob]:
    """Return positions in files, by name and offsets of the chunk."""
    blobs: dict[tuple[str, Any], _Blob] = {}
    for index, info in _dict(storage).items():
        if not isinstance(index, Record) or not isinstance(info, Record):
            raise ValueError(f"{_METADATA} describes the location of data in an unknown way")
        file = info.get("relative_path")
        if not isinstance(file, str) or not file or Path(file).name != file or file == "..":
            raise ValueError(f"{_METADATA} refers to {shown(file)}, which is outside of the folder")
        if info.get("transform_descriptors"):
            raise ValueError(f"{file} is encoded by an extension: save the checkpoint without it")
        name, position = index.get("fqn"), index.get("offset")
        if not isinstance(name, str):
            raise ValueError(f"{_METADATA} has {shown(name)} as the name of an entry")
        position = position if position is None else shape_of(position, shown(name))
        if (name, position) in blobs:
            raise ValueError(f"{_METADATA} lists the data of {shown(name)} twice")
        offset, length = (integer(info.get(key), f"the {key} of {shown(name)}") for key in ("offset", "length"))
        blobs[name, position] = _Blob(file, offset, length)
    ordered = sorted(blobs.values(), key=lambda blob: (blob.file, blob.offset, blob.length))
    if any(one.file == other.file and other.offset < one.offset + one.length for one, other in pairwise(ordered)):
        raise ValueError(f"{_METADATA} stores two entries at the same position of a file")
    return blobs
