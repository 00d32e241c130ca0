"""What readers of files share: flat keys of a step, ranges of bytes, boxes of arrays, how damage is refused."""

from __future__ import annotations

import io
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import widened
from natgrad.sources.steps import LoggedStep, LoggedTensor, Unreadable, vanished, where
from natgrad.storage import Storage, network_errors
from natgrad.storage.local import read_at

__all__ = ["Container", "ObjectRegion", "Region", "boxes", "refused"]

# RuntimeError: an archive member that says it is encrypted, or (NotImplementedError) packed in a way not known.
_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError)


class Container:
    """Open files of a step: tensors and numbers under flat keys, whatever these mean (`natgrad.sources.names`).

    Attributes
    ----------
    step : LoggedStep
        For messages.
    tensors : dict
        Key to `LoggedTensor`. Nested levels of a file are joined by a slash.
    numbers : dict
        Key to value of the plain numbers that are known without reading a tensor.
    ties : dict
        Keys of tensors that lie in the memory of another one, to the key of that one.
    texts : dict
        Key to value of the strings and truth values ("True", "False") among the options of an optimizer: names of
        parameters, for example.
    ordered : bool
        Whether tensors come in the order in which they were saved.
    unread : dict
        Keys of objects that were not read, to the reason.
    """

    ordered = False

    def __init__(self, step: LoggedStep) -> None:
        self.step = step
        self.unread: dict[str, str] = {}
        self.tensors: dict[str, LoggedTensor] = {}
        self.numbers: dict[str, float] = {}
        self.texts: dict[str, str] = {}
        self.ties: dict[str, str] = {}

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `StepReader.read`."""
        raise NotImplementedError

    def number(self, key: str) -> float | None:
        """Value of a plain number, or of a tensor of one element; None where it is neither."""
        if key in self.numbers:
            return self.numbers[key]
        values = self.vector(key) if math.prod(self.tensors[key].shape) == 1 else ()
        return values[0] if values else None

    def vector(self, key: str) -> tuple[float, ...]:
        """All values of a tensor of numbers; none where it holds something else."""
        logged = self.tensors[key]
        if not re.fullmatch(r"u?int\d+|b?float16|float(32|64)", logged.dtype):
            return ()
        words = np.zeros(math.prod(logged.shape), np.uint16 if logged.dtype == "bfloat16" else logged.dtype)
        self.read(key, 0, words)
        return tuple(map(float, widened(words, logged.dtype)))

    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def refused(step: LoggedStep, form: str, key: str = "") -> Iterator[None]:
    """Turn what a damaged, hostile or vanished file raises into a refusal.

    Parameters
    ----------
    step : LoggedStep
    form : str
        What the file should have been: "an npz file".
    key : str, optional
        Key that is read.
    """
    array, _, tensor = key.partition("/")
    try:
        with network_errors(step.storage):
            yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise vanished(f"cannot read {form}: {error}", step, array, tensor) from error
    except _ERRORS as error:
        raise Unreadable(
            f"cannot read {form}: {error}",
            where=where(step, array, tensor),
            why=f"it is truncated or still being written, damaged, not {form}, or not readable",
            remedy="write the step again (to another name, then rename), or remove the file",
        ) from error


class Region(io.RawIOBase):
    """A range of bytes of an open file, read by position.

    Parameters
    ----------
    descriptor : int
        Of the open file; not closed here.
    start, length : int
        Range, in bytes; up to the end of the file where no length is given.
    """

    def __init__(self, descriptor: int, start: int = 0, length: int | None = None) -> None:
        size = os.fstat(descriptor).st_size
        length = size - start if length is None else length
        if not 0 <= start <= start + length <= size:
            raise ValueError(f"bytes {start} to {start + length} are claimed, the file has {size}")
        self.descriptor, self.start, self.length = descriptor, start, length
        self._position = 0

    def fill(self, offset: int, out: NDArray[Any]) -> None:
        """Fill an array with the bytes from an offset on.

        Raises
        ------
        EOFError
            Where the range or the file ends early.
        """
        if not 0 <= offset <= self.length - out.nbytes:
            raise EOFError(f"the data end {offset + out.nbytes - self.length} bytes early")
        view, position = out.data.cast("B"), self.start + offset
        while view:
            count = read_at(self.descriptor, view, position)
            if not count:
                raise EOFError(f"the file ends {len(view)} bytes early: it was truncated after it had been opened")
            view, position = view[count:], position + count

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that it can be read anywhere."""
        return True

    def tell(self) -> int:
        """Position, from the start of the range."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read bytes at the position."""
        view = memoryview(buffer).cast("B")[: max(0, self.length - self._position)]
        count = read_at(self.descriptor, view, self.start + self._position) if view else 0
        self._position += count
        return count


class ObjectRegion:
    """The bytes of an object, read by position.

    Parameters
    ----------
    storage : Storage
    """

    def __init__(self, storage: Storage) -> None:
        self._file = storage.open()
        self.length = self._file.size

    def fill(self, offset: int, out: NDArray[Any]) -> None:
        """Fill an array with the bytes from an offset on; see `Region.fill`."""
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
        """Fetch large blocks from now on: the description of the data has been read."""
        self._file.widen()

    def close(self) -> None:
        """Release its blocks."""
        self._file.close()


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    """Boxes of an array that together are its elements ``start`` to ``stop`` in C order, in that order.

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
        # Within one row.
        for box in boxes(inner, start - last * row, stop - last * row):
            yield (slice(last, last + 1), *box)
        return
    for box in boxes(inner, start - (first - 1) * row, row) if start < first * row else ():
        yield (slice(first - 1, first), *box)
    if first < last:
        yield (slice(first, last), *(slice(0, length) for length in inner))
    for box in boxes(inner, 0, stop - last * row):
        yield (slice(last, last + 1), *box)
