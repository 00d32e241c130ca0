"""Read steps in npz files, as written by ``numpy.savez`` or ``numpy.savez_compressed``."""

from __future__ import annotations

import math
import os
import zipfile
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from natgrad.sources.container import Container, Region, read_errors
from natgrad.sources.steps import LoggedStep, LoggedTensor

__all__ = ["NpzFile", "NpzStack"]

_SKIP = 1 << 20
_FORM = "an npz file"


class NpzFile(Container):
    """One npz file.

    Pickled arrays are refused and never loaded. The member that was read last stays open, so that reading a tensor
    from start to end reads and decompresses it once.
    """

    def __init__(self, step: LoggedStep) -> None:
        """Open the archive.

        Raises
        ------
        InputError
            If the file cannot be read, or is not a complete npz file.
        """
        super().__init__(step)
        self._member: tuple[str, Any, int] | None = None
        with read_errors(step, _FORM):
            self._file = step.storage.open()
            try:
                self._archive = zipfile.ZipFile(self._file)
            except BaseException:
                self._file.close()
                raise
        try:
            self._describe()
        except BaseException:
            self._close_archive()
            raise
        self._file.widen()

    def _close_archive(self) -> None:
        self._archive.close()
        self._file.close()

    def _describe(self) -> None:
        for name in self._archive.namelist():
            key = name.removesuffix(".npy")
            with read_errors(self.step, _FORM, key), self._archive.open(name) as file:
                shape, _, dtype = self._header(file)
            self.tensors[key] = LoggedTensor(shape, dtype.name)

    def close(self) -> None:
        """Close the file."""
        self._close_member()
        self._close_archive()

    def _close_member(self) -> None:
        if self._member is not None:
            self._member[1].close()
            self._member = None

    def _header(self, file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
        return shape, fortran, dtype

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        with read_errors(self.step, _FORM, key):
            self._read(f"{key}.npy", start, out)

    def _read(self, name: str, start: int, out: NDArray[Any]) -> None:
        if self._member is None or self._member[0] != name or self._member[2] > start:
            self._close_member()
            file: Any = self._archive.open(name)
            self._member = (name, file, 0)
            shape, fortran, dtype = self._header(file)
            if (fortran and len(shape) > 1) or not dtype.isnative:
                # The order or the byte order differs from that of the store: load and convert the complete tensor.
                file.close()
                self._member = None
                with self._archive.open(name) as member:
                    values = npy.read_array(member, allow_pickle=False).ravel()
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
        # The archive checks the CRC of a member when it reaches its end: make sure that it does.
        file.peek(1)
        self._member = (name, file, start + out.size)


class NpzStack(NpzFile):
    """An npz file with random access: uncompressed, in C order, in native byte order.

    The checksums of the archive cannot be verified with random access.
    """

    def _describe(self) -> None:
        self._starts: dict[str, int] = {}
        self._descriptor = os.open(self.step.path, os.O_RDONLY)
        region = Region(self._descriptor)
        super()._describe()
        for member in self._archive.infolist():
            key = member.filename.removesuffix(".npy")
            with read_errors(self.step, _FORM, key):
                with self._archive.open(member) as file:
                    shape, fortran, dtype = self._header(file)
                    header = file.tell()
                if (fortran and len(shape) > 1) or not dtype.isnative or member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("one file with all steps must be written by numpy.savez, in C order")
                local = np.zeros(30, np.uint8)
                region.fill(member.header_offset, local)
                names = int(local[26:28].view("<u2")[0]) + int(local[28:30].view("<u2")[0])
                start = member.header_offset + 30 + names
                if header + math.prod(shape) * dtype.itemsize > member.file_size or (
                    start + member.file_size > region.length
                ):
                    raise ValueError("the array ends early")
                self._starts[key] = start + header
        self._region = region

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        with read_errors(self.step, _FORM, key):
            self._region.fill(self._starts[key] + start * out.itemsize, out)

    def close(self) -> None:
        """Close the file."""
        super().close()
        os.close(self._descriptor)
