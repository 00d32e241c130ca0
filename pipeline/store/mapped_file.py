"""A file mapped into memory, whose errors are exceptions and whose pages are given back.

A mapped file is read where it lies in the page cache of the system, without a copy. It has two traps. A page that
cannot be read ends the process with a signal; here pages that are not in the cache yet are loaded by a call that
fails instead. And every page that was touched counts as memory of the process for as long as the mapping lives.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MappedFile"]

_MADV_POPULATE_READ = 22
"""Linux 5.14 and later; Python has no name for it."""

_BYTE = (bytearray(1),)


class MappedFile:
    """The first bytes of a file, mapped as an array.

    Parameters
    ----------
    path : Path
    shape : tuple of int
        Not more than the file has.
    dtype : dtype

    Attributes
    ----------
    path : Path
    words : array
        The bytes.

    Raises
    ------
    OSError
        Where the file cannot be mapped.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.path = path
        self._asked = False
        size = math.prod(shape) * dtype.itemsize
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            self._mapping = mmap.mmap(self._descriptor, size, access=mmap.ACCESS_READ)
        except OSError:
            os.close(self._descriptor)
            raise
        self.words: NDArray[Any] = np.frombuffer(self._mapping, dtype).reshape(shape)

    def close(self) -> None:
        """Close the file; it stays mapped for as long as an array of its words lives."""
        os.close(self._descriptor)

    def ask(self, begin: int, end: int) -> bool:
        """Ask the system to read the file, where the bytes are not in the cache; whether it was asked, ever."""
        if not self._asked and not (self._is_cached(begin) and self._is_cached(end - 1)):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            self._asked = True
        return self._asked

    def load(self, begin: int, end: int) -> None:
        """Make sure that bytes can be touched; what is in the cache already costs next to nothing.

        Raises
        ------
        OSError
            Where the file cannot be read.
        """
        # Of a file that is being read both ends may be in the cache, and what is between them not yet.
        if not self.ask(begin, end):
            return
        try:
            self._mapping.madvise(_MADV_POPULATE_READ, *_pages(begin, end))
        except OSError as error:
            if error.errno != errno.EINVAL:  # an older system loads pages as they are touched
                raise

    def _is_cached(self, offset: int) -> bool:
        try:
            return os.preadv(self._descriptor, _BYTE, offset, os.RWF_NOWAIT) == 1
        except OSError:
            return False

    def release(self, begin: int, end: int) -> None:
        """Give pages back: they stay in the cache, but no longer count as memory of this process."""
        self._mapping.madvise(mmap.MADV_DONTNEED, *_pages(begin, end))


def _pages(begin: int, end: int) -> tuple[int, int]:
    """Offset and length of the pages of some bytes."""
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    return first, end - first
