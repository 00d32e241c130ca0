"""A step in an npz file, as written by ``numpy.savez`` or ``numpy.savez_compressed``."""

from __future__ import annotations

import math
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pipeline.schema import InputError
from pipeline.sources.base import SCALAR_KEYS, LoggedStep, LoggedTensor, StepContent, sort_content, where

__all__ = ["NpzFile"]

_SKIP = 1 << 20
# RuntimeError: a member that says it is encrypted, or (NotImplementedError) packed in a way not known.
_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError)


class NpzFile:
    """Reader of one step; a context manager that holds the file open.

    A pickled array is refused, never loaded. The member read last stays open, so that reading a tensor from
    its start to its end reads (and unpacks) it once.
    """

    def __init__(self, step: LoggedStep) -> None:
        """Open the archive.

        Raises
        ------
        InputError
            Where the file cannot be read, or is not a whole npz file.
        """
        self._step = step
        self._member: tuple[str, Any, int] | None = None
        try:
            self._archive = zipfile.ZipFile(step.path)
        except _ERRORS as error:
            raise self._refusal(error) from error

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close_member()
        self._archive.close()

    def _refusal(self, error: Exception, array: str = "", tensor: str = "") -> InputError:
        return InputError(
            f"cannot read an npz file: {error}",
            where=where(self._step, array, tensor),
            why="it is truncated or still being written, damaged, not an npz file, or not readable",
            remedy="write the step again (to another name, then rename), or remove the file",
        )

    def _close_member(self) -> None:
        if self._member is not None:
            self._member[1].close()
            self._member = None

    def _header(self, file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
        return shape, fortran, dtype

    def content(self) -> StepContent:
        """Describe the step; see `pipeline.sources.base.sort_content` for what is refused."""
        tensors, scalars = {}, {}
        for name in self._archive.namelist():
            key = name.removesuffix(".npy")
            try:
                with self._archive.open(name) as file:
                    shape, _, dtype = self._header(file)
                    if key in SCALAR_KEYS and math.prod(shape) == 1 and dtype.kind in "fiu":
                        scalars[key] = float(np.frombuffer(file.read(), dtype)[0])
            except _ERRORS as error:
                array, _, tensor = key.partition("/")
                raise self._refusal(error, array, tensor) from error
            tensors[key] = LoggedTensor(shape, dtype.name)
        return sort_content(self._step, tensors, scalars)

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `pipeline.sources.base.StepReader`."""
        name = f"{array}/{tensor}.npy"
        try:
            self._read(name, start, out)
        except _ERRORS as error:
            raise self._refusal(error, array, tensor) from error

    def _read(self, name: str, start: int, out: NDArray[Any]) -> None:
        if self._member is None or self._member[0] != name or self._member[2] > start:
            self._close_member()
            file: Any = self._archive.open(name)
            self._member = (name, file, 0)
            shape, fortran, dtype = self._header(file)
            if (fortran and len(shape) > 1) or not dtype.isnative:
                # Not the order or the bytes of the store: the whole tensor is loaded and rearranged.
                file.close()
                self._member = None
                with self._archive.open(name) as whole:
                    values = npy.read_array(whole, allow_pickle=False).ravel()
                out[:] = values[start : start + out.size]
                return
        _, file, position = self._member
        skip = (start - position) * out.itemsize
        while skip:
            skipped = len(file.read(min(skip, _SKIP)))
            if not skipped:
                raise EOFError("the array ends early")
            skip -= skipped
        view = out.data.cast("B")
        while view:
            count = file.readinto(view)
            if not count:
                raise EOFError("the array ends early")
            view = view[count:]
        # The archive checks a member's CRC when it meets its end: let it meet it.
        file.peek(1)
        self._member = (name, file, start + out.size)
