"""Provide common parts of file readers: flat keys, byte ranges, boxes of arrays, and errors for corrupt files."""

from __future__ import annotations

import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.configuration import Scalar
from natgrad.schema.errors import InputError
from natgrad.schema.layout import widened
from natgrad.sources.bounds import TENSOR_OPERATIONS, Budget, shape_of, shown
from natgrad.sources.byte_ranges import ByteRange, Placement
from natgrad.sources.steps import LoggedStep, LoggedTensor, Unreadable, vanished, where
from natgrad.storage import NotRegularError, Storage, network_errors, open_regular
from natgrad.storage.local import read_at

__all__ = [
    "READ_ERRORS",
    "Container",
    "ObjectRegion",
    "Region",
    "UnreadObject",
    "boxes",
    "first_bytes",
    "not_regular",
    "read_errors",
    "reason_of",
]

# RuntimeError: an encrypted archive member, or (NotImplementedError) one with an unknown compression method.
_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError)
# Contents of an unexpected type, in a pickle or an index for example.
_MALFORMED = (TypeError, AttributeError, LookupError, ArithmeticError, struct.error)
READ_ERRORS = (*_ERRORS, *_MALFORMED)
"""Exceptions that corrupt or malicious files raise in readers and in the libraries that they use."""

_MESSAGE_LIMIT = 500


@dataclass(frozen=True)
class UnreadObject:
    """An object in a pickle that is not read, because its class is neither a tensor nor a plain container.

    Attributes
    ----------
    kind : str
        Its class, or the function that rebuilds it.
    array : bool
        It is a tensor or an array.
    known : bool
        Trainers often store objects of this class.
    """

    kind: str
    array: bool = False
    known: bool = False


class Container:
    """The open files of a step: tensors and numbers under flat keys, which `natgrad.sources.names` interprets.

    Attributes
    ----------
    step : LoggedStep
        Used in messages.
    tensors : dict
        Key to `LoggedTensor`. Nested levels of a file are joined by slashes.
    numbers : dict
        Key to value of plain numbers that are known without reading a tensor.
    ties : dict
        Keys of tensors to the key of another tensor that shares its memory.
    aliases : dict
        Other names of tensors, which the file does not contain under these names, to their keys.
    texts : dict
        Key to value of the strings and Booleans ("True", "False") among the options of an optimizer, such as
        parameter names.
    ordered : bool
        True if the tensors are in the order in which they were saved.
    remarks : tuple of str
        Remarks for the user about its values.
    unread : dict
        Keys of entries that were not read, to the reason.
    objects : dict
        Keys of objects that were not read because of their class.
    budget : Budget
        Budget that remains for the description of the step. A reader replaces it when it knows the size of the
        files.
    """

    ordered = False
    remarks: tuple[str, ...] = ()

    def __init__(self, step: LoggedStep) -> None:
        self.step = step
        self.budget = Budget(0)
        self.unread: dict[str, str] = {}
        self.objects: dict[str, UnreadObject] = {}
        self.tensors: dict[str, LoggedTensor] = {}
        self.numbers: dict[str, float] = {}
        self.texts: dict[str, str] = {}
        self.ties: dict[str, str] = {}
        self.aliases: dict[str, str] = {}

    def add(self, key: str, shape: Any, dtype: str) -> None:
        """Add a tensor. Every description that a file contains passes these checks.

        Parameters
        ----------
        key : str
        shape : tuple or list of int
        dtype : str

        Raises
        ------
        ValueError
            If the key exists, the shape is not valid, or the step describes more than its files can contain.
        """
        if key in self.tensors:
            raise ValueError(f"it contains {shown(key)} twice")
        shape = shape_of(shape, shown(key))
        self.budget.spend(TENSOR_OPERATIONS, len(key), math.prod(shape) * _bits(dtype) // 8)
        self.tensors[key] = LoggedTensor(shape, dtype)

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `StepReader.read`."""
        raise NotImplementedError

    def ranges(self, key: str) -> Sequence[ByteRange] | None:
        """Return where the elements of a tensor are in its files; see `natgrad.sources.base.Ranged`."""
        return None

    def placement(self) -> Placement | None:
        """Return where the ranges of all tensors begin; see `natgrad.sources.base.Ranged`."""
        return None

    def number(self, key: str) -> float | None:
        """Return the value of a plain number or of a tensor with one element; None for anything else."""
        if key in self.numbers:
            return self.numbers[key]
        values = self.vector(key) if math.prod(self.tensors[key].shape) == 1 else ()
        return values[0] if values else None

    def vector(self, key: str) -> tuple[float, ...]:
        """Return all values of a numeric tensor; an empty tuple for anything else."""
        logged = self.tensors[key]
        if not re.fullmatch(r"u?int\d+|b?float16|float(32|64)", logged.dtype):
            return ()
        words = np.zeros(math.prod(logged.shape), np.uint16 if logged.dtype == "bfloat16" else logged.dtype)
        self.read(key, 0, words)
        return tuple(map(float, widened(words, logged.dtype)))

    def configuration(self) -> dict[str, Scalar]:
        """Return the plain values of the configuration of the run by key, if the files contain it."""
        return {}

    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@lru_cache(maxsize=64)
def _bits(dtype: str) -> int:
    """Return the bits of an element, from the name of a dtype; 8 if it contains no number."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) if bits else 8


@contextmanager
def read_errors(step: LoggedStep, form: str, key: str = "") -> Iterator[None]:
    """Convert the exceptions that corrupt, malicious or missing files raise to InputError.

    Parameters
    ----------
    step : LoggedStep
    form : str
        Expected kind of file, such as "an npz file".
    key : str, optional
        Key that is being read.
    """
    array, _, tensor = key.partition("/")
    try:
        with network_errors(step.storage):
            yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise vanished(f"cannot read {form}: {error}", step, array, tensor) from error
    except NotRegularError as error:
        raise not_regular(error, form, where(step, array, tensor)) from error
    except READ_ERRORS as error:
        raise Unreadable(
            f"cannot read {form}: {reason_of(error)}",
            where=where(step, array, tensor),
            why=f"the file is truncated, still being written, corrupt, not {form}, or not readable",
            remedy="write the step again (under another name, then rename it), or remove the file",
        ) from error


def reason_of(error: Exception) -> str:
    """Return the text of one of `READ_ERRORS` for a message."""
    reason = (str(error) or type(error).__name__)[:_MESSAGE_LIMIT]
    return (
        f"its contents are malformed ({type(error).__name__}: {reason})"
        if isinstance(error, _MALFORMED)
        else reason
    )


def not_regular(error: NotRegularError, form: str, location: str) -> InputError:
    """Return the error for a pipe, device or folder that was found instead of a file."""
    return InputError(
        f"cannot read {form}: {error.strerror}",
        where=location if str(error.filename) in location else f"{location} ({error.filename})",
        why="only regular files are opened: reading a pipe or a device may never end",
        remedy="remove it, or replace it with the file itself",
    )


class Region(io.RawIOBase):
    """A byte range of an open file, read by position.

    Parameters
    ----------
    descriptor : int
        File descriptor. The region does not close it.
    start, length : int
        Range in bytes. By default, it extends to the end of the file.
    """

    def __init__(self, descriptor: int, start: int = 0, length: int | None = None) -> None:
        size = os.fstat(descriptor).st_size
        length = size - start if length is None else length
        if not 0 <= start <= start + length <= size:
            raise ValueError(f"bytes {start} to {start + length} are out of range: the file has {size} bytes")
        self.descriptor, self.start, self.length = descriptor, start, length
        self._position = 0

    def fill(self, offset: int, out: NDArray[Any]) -> None:
        """Fill an array with the bytes that start at an offset.

        Raises
        ------
        EOFError
            If the range or the file ends early.
        """
        if not 0 <= offset <= self.length - out.nbytes:
            raise EOFError(f"the data end {offset + out.nbytes - self.length} bytes early")
        view, position = out.data.cast("B"), self.start + offset
        while view:
            count = read_at(self.descriptor, view, position)
            if not count:
                raise EOFError(f"the file ends {len(view)} bytes early: it was truncated after it was opened")
            view, position = view[count:], position + count

    def readable(self) -> bool:
        """Return True: the region can be read."""
        return True

    def seekable(self) -> bool:
        """Return True: the region supports random access."""
        return True

    def tell(self) -> int:
        """Return the position relative to the start of the range."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError("cannot seek to a position before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read bytes from the current position and return their number."""
        view = memoryview(buffer).cast("B")[: max(0, self.length - self._position)]
        count = read_at(self.descriptor, view, self.start + self._position) if view else 0
        self._position += count
        return count


class ObjectRegion:
    """The bytes of an object in an object store, read by position.

    Parameters
    ----------
    storage : Storage
    """

    def __init__(self, storage: Storage) -> None:
        self._file = storage.open()
        self.length = self._file.size

    def fill(self, offset: int, out: NDArray[Any]) -> None:
        """Fill an array with the bytes that start at an offset; see `Region.fill`."""
        if not 0 <= offset <= self.length - out.nbytes:
            raise EOFError(f"the data end {offset + out.nbytes - self.length} bytes early")
        self._file.seek(offset)
        view = out.data.cast("B")
        while view:
            count = self._file.readinto(view)
            if not count:
                raise EOFError(f"the object ends {len(view)} bytes early")
            view = view[count:]

    def widen(self) -> None:
        """Fetch larger blocks from now on. Call this after the metadata have been read."""
        self._file.widen()

    def close(self) -> None:
        """Close the object and release its cached blocks."""
        self._file.close()


def first_bytes(path: Path, size: int) -> bytes:
    """Return the first bytes of a file; none if it is not a regular file or cannot be read."""
    try:
        descriptor = open_regular(path)
    except OSError:
        return b""
    try:
        return os.pread(descriptor, size, 0)
    finally:
        os.close(descriptor)


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    """Yield boxes of an array that together contain elements ``start`` to ``stop`` in C order.

    Examples
    --------
    >>> [[(part.start, part.stop) for part in box] for box in boxes((4, 5), 3, 12)]
    [[(0, 1), (3, 5)], [(1, 2), (0, 5)], [(2, 3), (0, 2)]]
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    inner = shape[1:]
    if first > last:
        # The range is inside one row.
        for box in boxes(inner, start - last * row, stop - last * row):
            yield (slice(last, last + 1), *box)
        return
    for box in boxes(inner, start - (first - 1) * row, row) if start < first * row else ():
        yield (slice(first - 1, first), *box)
    if first < last:
        yield (slice(first, last), *(slice(0, length) for length in inner))
    for box in boxes(inner, 0, stop - last * row):
        yield (slice(last, last + 1), *box)
