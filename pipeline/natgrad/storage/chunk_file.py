"""A file of plain bytes, read anywhere into a buffer that is used again; the system is asked to read ahead."""

from __future__ import annotations

import os
from typing import Any

from numpy.typing import NDArray

__all__ = ["ChunkFile"]

_BYTE = (bytearray(1),)


class ChunkFile:
    """A file that is open for reading.

    Parameters
    ----------
    path : str

    Attributes
    ----------
    descriptor : int
    size : int
        Its bytes when it was opened.

    Raises
    ------
    OSError
        Where it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.descriptor).st_size

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def ask(self) -> bool:
        """Ask the system to read the file where its ends are not in the cache; whether it was asked."""
        asked = not (self._is_cached(0) and self._is_cached(self.size - 1))
        if asked:
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        return asked

    def _is_cached(self, offset: int) -> bool:
        try:
            return os.preadv(self.descriptor, _BYTE, offset, os.RWF_NOWAIT) == 1
        except OSError:
            return False

    def read(self, offset: int, out: NDArray[Any]) -> int:
        """Read from a place on until an array, which is contiguous, is full.

        Returns
        -------
        int
            Bytes that the file ends too early.

        Raises
        ------
        OSError
            Where it cannot be read.
        """
        count = os.preadv(self.descriptor, (out.data,), offset)
        if count == out.nbytes:
            return 0
        # A read of many bytes, or one that was interrupted, may come in parts.
        left = out.data.cast("B")[count:]
        while left:
            offset += count
            count = os.preadv(self.descriptor, (left,), offset)
            if not count:
                return len(left)
            left = left[count:]
        return 0
