"""Read single arrays in npy files, as written by ``numpy.save``, and folders of them."""

from __future__ import annotations

import math
import os
from typing import Any

from numpy.lib import format as npy
from numpy.typing import NDArray

from natgrad.sources.bounds import Budget
from natgrad.sources.byte_ranges import ByteRange
from natgrad.sources.checkpoints.npz_file import array_header
from natgrad.sources.container import Container, Region, read_errors
from natgrad.sources.steps import LoggedStep
from natgrad.storage import Storage, open_regular

__all__ = ["NpyFile"]

_FORM = "an npy file"


class NpyFile(Container):
    """One npy file.

    Parameters
    ----------
    step : LoggedStep
        Used in messages.
    key : str
        Key of its array.
    file : Storage, optional
        The file, if the step has several.

    Raises
    ------
    InputError
        If the file is not a complete npy file, or contains pickled objects.
    """

    def __init__(self, step: LoggedStep, key: str, file: Storage | None = None) -> None:
        super().__init__(step)
        self._file, self._descriptor = file or step.storage, -1
        with read_errors(step, _FORM, key):
            path = self._file.local_path
            self._descriptor = open_regular(step.path if path is None else path)
            try:
                self._describe(key)
            except BaseException:
                self.close()
                raise

    def _describe(self, key: str) -> None:
        self._region = Region(self._descriptor)
        self.budget = Budget(self._region.length)
        shape, fortran, self._dtype = array_header(self._region)
        self._start = self._region.tell()
        size = math.prod(shape) * self._dtype.itemsize
        if self._dtype.hasobject:
            raise ValueError("it contains pickled objects, which are never loaded: save plain arrays of numbers")
        if self._start + size != self._region.length:
            raise ValueError(
                f"an array of shape {shape} and dtype {self._dtype} does not have the "
                f"{self._region.length - self._start} bytes of the file: it ends early, or its header is wrong"
            )
        self.add(key, shape, self._dtype.name)
        self._plain = self._dtype.isnative and not (fortran and len(shape) > 1)

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        with read_errors(self.step, _FORM, key):
            if self._plain:
                self._region.fill(self._start + start * out.itemsize, out)
                return
            # The order or the byte order differs from that of the store: load and convert the complete array.
            self._region.seek(0)
            values = npy.read_array(self._region, allow_pickle=False).ravel()
            out[:] = values[start : start + out.size]

    def ranges(self, key: str) -> list[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        return [ByteRange(self._file, self._start, math.prod(self.tensors[key].shape))] if self._plain else None

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
