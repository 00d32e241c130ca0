"""Read HDF5 files with h5py (an extra of the package: ``pip install natgrad-pipeline[hdf5]``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.sources.container import Container, boxes, read_errors
from natgrad.sources.steps import LoggedStep, LoggedTensor, where

__all__ = ["Hdf5File"]

_FORM = "an HDF5 file"
_CHUNK_LIMIT = 1 << 28
_DATASETS_LIMIT = 1 << 20


class Hdf5File(Container):
    """One HDF5 file, with its datasets by path.

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
        with read_errors(step, _FORM), _damaged():
            self._file = h5py.File(step.path, "r")
            try:
                self._file.visititems(self._describe)
            except BaseException:
                self._file.close()
                raise

    def _describe(self, key: str, item: Any) -> None:
        if not hasattr(item, "read_direct"):
            return
        if not isinstance(key, str):
            raise ValueError(f"the dataset name {key!r} is not text")
        if len(self._datasets) >= _DATASETS_LIMIT:
            raise ValueError(f"it contains more than {_DATASETS_LIMIT} datasets")
        if item.external or item.is_virtual:
            raise ValueError(f"the data of {key!r} are in other files: copy them into this one (h5repack)")
        if item.chunks and math.prod(item.chunks) * item.dtype.itemsize > _CHUNK_LIMIT:
            raise ValueError(f"{key!r} has chunks of shape {item.chunks}, more than {_CHUNK_LIMIT} bytes each")
        if item.shape is None:
            return
        bits = item.dtype == np.uint16 and item.attrs.get("ml_dtype") == "bfloat16"
        self.tensors[key] = LoggedTensor(item.shape, "bfloat16" if bits else item.dtype.name)
        self._datasets[key] = item

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        with read_errors(self.step, _FORM, key), _damaged():
            dataset = self._datasets[key]
            done = 0
            for box in boxes(dataset.shape, start, start + out.size):
                shape = tuple(part.stop - part.start for part in box)
                size = math.prod(shape)
                dataset.read_direct(out[done : done + size].reshape(shape), box)
                done += size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextmanager
def _damaged() -> Iterator[None]:
    # For corrupt files, h5py converts errors of the HDF5 library to several Python exceptions.
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
