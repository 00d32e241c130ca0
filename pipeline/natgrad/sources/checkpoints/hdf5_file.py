"""Read HDF5 files with h5py (an extra of the package: ``pip install natgrad-pipeline[hdf5]``)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.sources.bounds import Budget
from natgrad.sources.byte_ranges import ByteRange
from natgrad.sources.container import Container, boxes, read_errors
from natgrad.sources.steps import LoggedStep, where
from natgrad.storage import require_regular

__all__ = ["Hdf5File"]

_FORM = "an HDF5 file"
_CHUNK_LIMIT = 1 << 28
_DATASET_OPERATIONS, _ATTRIBUTE_OPERATIONS, _LEVEL_OPERATIONS = 250, 50, 4


class Hdf5File(Container):
    """One HDF5 file, with its datasets, and the attributes of its groups that are numbers, by path.

    HDF5 has no bfloat16: uint16 with the attribute ``ml_dtype`` = ``bfloat16`` is interpreted as bfloat16. Links
    are not followed. Datasets stored in other files are refused.

    Raises
    ------
    InputError
        If the file cannot be read or is not an HDF5 file, if a dataset is stored in another file or in chunks that
        are too large to decompress, or if h5py is not installed.
    """

    def __init__(self, step: LoggedStep) -> None:
        super().__init__(step)
        try:
            import h5py
        except ImportError as error:
            raise InputError(
                "reading HDF5 needs h5py", where=where(step), remedy="pip install natgrad-pipeline[hdf5]"
            ) from error
        self._datasets: dict[str, Any] = {}
        with read_errors(step, _FORM):
            self.budget = Budget(require_regular(step.path))
            self._file = h5py.File(step.path, "r")
            try:
                self._read_attributes("", self._file)
                self._file.visititems(self._describe)
                self.numbers = {key: value for key, value in self.numbers.items() if key not in self.tensors}
                self._require_distinct_data()
            except BaseException:
                self._file.close()
                raise

    def _describe(self, key: str, item: Any) -> None:
        if not isinstance(key, str):
            raise ValueError(f"the name {key!r} is not text")
        self.budget.spend(_LEVEL_OPERATIONS * key.count("/"))
        if not hasattr(item, "read_direct"):
            self._read_attributes(key, item)
            return
        self.budget.spend(_DATASET_OPERATIONS)
        if item.external or item.is_virtual:
            raise ValueError(f"the data of {key!r} are in other files: copy them into this one (h5repack)")
        if item.chunks and math.prod(item.chunks) * item.dtype.itemsize > _CHUNK_LIMIT:
            raise ValueError(f"{key!r} has chunks of shape {item.chunks}, more than {_CHUNK_LIMIT} bytes each")
        if item.shape is None:
            return
        if (lost := _missing_bytes(item)) > 0:
            self.unread[key] = (
                f"{lost} of its bytes were never written, or are lost: HDF5 would return a fill value"
            )
            return
        bits = item.dtype == np.uint16 and item.attrs.get("ml_dtype") == "bfloat16"
        self.add(key, item.shape, "bfloat16" if bits else item.dtype.name)
        self._datasets[key] = item

    def _read_attributes(self, key: str, group: Any) -> None:
        """Add the attributes of a group that are single numbers."""
        for name in group.attrs:
            self.budget.spend(_ATTRIBUTE_OPERATIONS)
            identifier = group.attrs.get_id(name)
            if identifier.dtype.kind in "biuf" and math.prod(identifier.shape or ()) == 1:
                value = np.asarray(group.attrs[name]).reshape(-1)[0]
                self.numbers[f"{key}/{name}" if key else name] = float(value)

    def _require_distinct_data(self) -> None:
        """Refuse contiguous datasets that overlap or exceed the file: the library would read other data."""
        sizes = {key: dataset.id.get_storage_size() for key, dataset in self._datasets.items()}
        ranges = sorted(
            (offset, offset + sizes[key])
            for key, dataset in self._datasets.items()
            if sizes[key] and (offset := dataset.id.get_offset()) is not None
        )
        if any(start < stop for (_, stop), (start, _) in pairwise(ranges)) or (
            ranges and ranges[-1][1] > self.budget.size
        ):
            raise ValueError("the data of its datasets overlap or exceed the file")

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        with read_errors(self.step, _FORM, key):
            dataset = self._datasets[key]
            done = 0
            for box in boxes(dataset.shape, start, start + out.size):
                shape = tuple(part.stop - part.start for part in box)
                size = math.prod(shape)
                dataset.read_direct(out[done : done + size].reshape(shape), box)
                done += size

    def ranges(self, key: str) -> list[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        dataset = self._datasets[key]
        # The offset is None for a dataset that is chunked, or so small that its header contains the data.
        offset = None if dataset.chunks else dataset.id.get_offset()
        if offset is None or dataset.dtype != dataset.dtype.newbyteorder("<"):
            return None
        return [ByteRange(self.step.storage, offset, math.prod(dataset.shape))]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _missing_bytes(dataset: Any) -> int:
    """Return the number of bytes of a dataset that the file does not contain."""
    if not dataset.chunks:
        written: int = dataset.id.get_storage_size()
        expected: int = math.prod(dataset.shape) * dataset.dtype.itemsize
        return expected - written
    counts = (-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    missing: int = math.prod(counts) - dataset.id.get_num_chunks()
    lost: int = missing * math.prod(dataset.chunks) * dataset.dtype.itemsize
    return lost
