"""Read steps in npz files, as written by ``numpy.savez`` or ``numpy.savez_compressed``."""

from __future__ import annotations

import io
import math
import os
import tokenize
import zipfile
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from natgrad.sources.bounds import Budget, integer, shape_of, shown
from natgrad.sources.checkpoints.zip_members import open_archive, stored_start
from natgrad.sources.container import Container, Region, read_errors
from natgrad.sources.steps import LoggedStep
from natgrad.storage import open_regular

__all__ = ["NpzFile", "NpzStack"]

_SKIP = 1 << 20
_FORM, _SUFFIX = "an npz file", ".npy"
_HEADER_LIMIT = 1 << 14
_MEMBER_OPERATIONS = 100


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
                self.budget = Budget(self._file.size)
                self._archive = open_archive(self._file, self._file.size)
            except BaseException:
                self._file.close()
                raise
        try:
            with read_errors(step, _FORM):
                self._describe()
        except BaseException:
            self._close_archive()
            raise
        self._file.widen()

    def _close_archive(self) -> None:
        self._archive.close()
        self._file.close()

    def _describe(self) -> None:
        for member in self._archive.infolist():
            key = member.filename.removesuffix(_SUFFIX)
            self.budget.spend(_MEMBER_OPERATIONS)
            if key == member.filename:
                # numpy.load returns such a member as bytes.
                if not member.is_dir():
                    self.unread[key] = f"it is not an array: its name in the archive does not end with {_SUFFIX}"
                continue
            with read_errors(self.step, _FORM, key), self._archive.open(member) as file:
                shape, _, dtype = self._header(file)
                self.add(key, shape, dtype.name)
                # The sizes of pickled objects are not recorded; their dtype is refused where it is used.
                if not dtype.hasobject and file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                    raise ValueError(
                        f"an array of shape {shape} and dtype {dtype} does not have the {member.file_size} bytes "
                        f"of {shown(member.filename)}: it ends early, or its header is wrong"
                    )

    def close(self) -> None:
        """Close the file."""
        self._close_member()
        self._close_archive()

    def _close_member(self) -> None:
        if self._member is not None:
            self._member[1].close()
            self._member = None

    def _header(self, file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        """Read the header of an array. Its length is checked first, because NumPy reads it completely."""
        magic = file.read(npy.MAGIC_LEN)
        version = npy.read_magic(io.BytesIO(magic))
        width = 2 if version == (1, 0) else 4
        length = file.read(width)
        size = integer(int.from_bytes(length, "little"), "the length of a header", most=_HEADER_LIMIT)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        try:
            shape, fortran, dtype = read(io.BytesIO(length + file.read(size)))
        except (tokenize.TokenError, SyntaxError) as error:
            raise ValueError(f"the header of an array is not valid: {error}") from error
        return shape_of(shape, "an array"), fortran, dtype

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        with read_errors(self.step, _FORM, key):
            self._read(key + _SUFFIX, start, out)

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
        self._descriptor = open_regular(self.step.path)
        try:
            self._region = Region(self._descriptor)
            super()._describe()
            for key in self.tensors:
                member = self._archive.getinfo(key + _SUFFIX)
                with read_errors(self.step, _FORM, key):
                    with self._archive.open(member) as file:
                        shape, fortran, dtype = self._header(file)
                        header = file.tell()
                    stored = member.compress_type == zipfile.ZIP_STORED
                    if (fortran and len(shape) > 1) or not dtype.isnative or not stored:
                        raise ValueError("one file with all steps must be written by numpy.savez, in C order")
                    self._starts[key] = stored_start(self._region, member) + header
        except BaseException:
            os.close(self._descriptor)
            raise

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        with read_errors(self.step, _FORM, key):
            self._region.fill(self._starts[key] + start * out.itemsize, out)

    def close(self) -> None:
        """Close the file."""
        super().close()
        os.close(self._descriptor)
