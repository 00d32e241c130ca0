"""Read steps in npz files, as written by ``numpy.savez`` or ``numpy.savez_compressed``."""

from __future__ import annotations

import io
import math
import os
import tokenize
import zipfile
from collections import OrderedDict
from contextlib import ExitStack
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.sources.bounds import Budget, integer, shape_of, shown
from natgrad.sources.byte_ranges import ByteRange
from natgrad.sources.checkpoints.zip_members import open_archive, stored_start
from natgrad.sources.container import Container, Region, read_errors
from natgrad.sources.steps import LoggedStep, where
from natgrad.storage import open_regular

__all__ = ["NpzFile", "NpzStack", "array_header"]

_SKIP = 1 << 20
_FORM, _SUFFIX = "an npz file", ".npy"
_HEADER_LIMIT = 1 << 14
_MEMBER_OPERATIONS = 100
_OPEN_STREAMS = 256


def array_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an array: its shape, whether it is in Fortran order, and its dtype.

    The length of the header is checked first, because NumPy reads it completely.

    Raises
    ------
    ValueError
        If the header is not valid.
    """
    magic = file.read(npy.MAGIC_LEN)
    version = npy.read_magic(io.BytesIO(magic))
    width = 2 if version == (1, 0) else 4
    length = file.read(width)
    size = integer(int.from_bytes(length, "little"), "the length of a header", most=_HEADER_LIMIT)
    return _parsed_header(version == (1, 0), length + file.read(size))


@lru_cache(maxsize=1 << 10)
def _parsed_header(short: bool, header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Parse a header. Many arrays of a log have the same one, and an archive may have thousands."""
    read = npy.read_array_header_1_0 if short else npy.read_array_header_2_0
    try:
        shape, fortran, dtype = read(io.BytesIO(header))
    except (tokenize.TokenError, SyntaxError) as error:
        raise ValueError(f"the header of an array is not valid: {error}") from error
    return shape_of(shape, "an array"), fortran, dtype


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
        self._headers: dict[str, tuple[bool, int]] = {}
        self._stack = ExitStack()
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
        self._stack.close()
        self._archive.close()
        self._file.close()

    @cached_property
    def _region(self) -> Region:
        """The bytes of a local file."""
        descriptor = open_regular(self.step.path)
        self._stack.callback(os.close, descriptor)
        return Region(descriptor)

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
                shape, fortran, dtype = array_header(file)
                self.add(key, shape, dtype.name)
                self._headers[key] = dtype.isnative and not (fortran and len(shape) > 1), file.tell()
                # The sizes of pickled objects are not recorded; their dtype is refused where it is used.
                if not dtype.hasobject and file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                    raise ValueError(
                        f"an array of shape {shape} and dtype {dtype} does not have the {member.file_size} bytes "
                        f"of {shown(member.filename)}: it ends early, or its header is wrong"
                    )

    def ranges(self, key: str) -> list[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        member = self._archive.getinfo(key + _SUFFIX)
        if member.compress_type != zipfile.ZIP_STORED or self.step.storage.local_path is None:
            return None
        is_plain, header = self._headers[key]
        if not is_plain:
            return None
        with read_errors(self.step, _FORM, key):
            start = stored_start(self._region, member) + header
        return [ByteRange(self.step.storage, start, math.prod(self.tensors[key].shape))]

    def close(self) -> None:
        """Close the file."""
        self._close_member()
        self._close_archive()

    def _close_member(self) -> None:
        if self._member is not None:
            self._member[1].close()
            self._member = None

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        with read_errors(self.step, _FORM, key):
            self._read(key + _SUFFIX, start, out)

    def _read(self, name: str, start: int, out: NDArray[Any]) -> None:
        if self._member is None or self._member[0] != name or self._member[2] > start:
            self._close_member()
            file: Any = self._archive.open(name)
            self._member = (name, file, 0)
            shape, fortran, dtype = array_header(file)
            if (fortran and len(shape) > 1) or not dtype.isnative:
                # The order or the byte order differs from that of the store: load and convert the complete tensor.
                file.close()
                self._member = None
                with self._archive.open(name) as member:
                    values = npy.read_array(member, allow_pickle=False).ravel()
                out[:] = values[start : start + out.size]
                return
        _, file, position = self._member
        _fill(file, (start - position) * out.itemsize, out)
        self._member = (name, file, start + out.size)


class NpzStack(NpzFile):
    """An npz file with the steps of a run, in C order and native byte order.

    Arrays of ``numpy.savez`` have random access; the checksums of the archive cannot be verified with it. Arrays of
    ``numpy.savez_compressed`` are decompressed as a stream, which stays open for each array: reading the steps in
    order decompresses each array once.
    """

    def _describe(self) -> None:
        self._starts: dict[str, int] = {}
        self._streams: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        super()._describe()
        for key in self.tensors:
            member = self._archive.getinfo(key + _SUFFIX)
            is_plain, header = self._headers[key]
            if not is_plain:
                raise self._other_order(key)
            if member.compress_type == zipfile.ZIP_STORED:
                with read_errors(self.step, _FORM, key):
                    self._starts[key] = stored_start(self._region, member) + header

    def _other_order(self, key: str) -> InputError:
        array, _, tensor = key.partition("/")
        with self._archive.open(key + _SUFFIX) as file:
            _, fortran, _ = array_header(file)
        return InputError(
            f"this array is in {'Fortran order' if fortran else 'another byte order'}, in which no single step can "
            "be read",
            where=where(self.step, array, tensor),
            why="this file contains all steps of the run",
            remedy="write it again with numpy.savez, of arrays from numpy.ascontiguousarray in native byte order; "
            "or write one file for each step",
        )

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        with read_errors(self.step, _FORM, key):
            if key in self._starts:
                self._region.fill(self._starts[key] + start * out.itemsize, out)
            else:
                self._read_stream(key, start, out)

    def ranges(self, key: str) -> list[ByteRange] | None:
        """Return where the elements of an array are; see `natgrad.sources.base.Ranged`."""
        if key not in self._starts:
            return None
        return [ByteRange(self.step.storage, self._starts[key], math.prod(self.tensors[key].shape))]

    def _read_stream(self, key: str, start: int, out: NDArray[Any]) -> None:
        file, position = self._streams.pop(key, (None, 0))
        if file is not None and position > start:
            file.close()
            file = None
        if file is None:
            while len(self._streams) >= _OPEN_STREAMS:
                self._streams.popitem(last=False)[1][0].close()
            file, position = self._archive.open(key + _SUFFIX), 0
            array_header(file)
        _fill(file, (start - position) * out.itemsize, out)
        self._streams[key] = file, start + out.size

    def close(self) -> None:
        """Close the file."""
        for file, _ in self._streams.values():
            file.close()
        self._streams.clear()
        super().close()


def _fill(file: Any, skip: int, out: NDArray[Any]) -> None:
    """Fill a buffer from a member of an archive, after skipping bytes."""
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
