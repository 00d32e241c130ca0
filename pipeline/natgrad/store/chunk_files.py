"""Open the local files of uncompressed chunks of states, and keep them open while a column is read block by block.

The compiled read loop needs descriptors and offsets. A small model, or a long run, has many chunks, and opening a
file takes as long as reading 100 kB that are cached. Paths are therefore texts, and not storage handles.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from natgrad.kernel.located import Located
from natgrad.schema.errors import InputError
from natgrad.schema.layout import missing_word, storage_dtype
from natgrad.schema.names import replicate_of
from natgrad.storage.local import ChunkFile

__all__ = ["ChunkFiles"]


class _MissingState:
    """A file that contains a state of a chunk column that was not logged."""

    def __init__(self, elements: int, dtype: str) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # `close` closes it
        self._file.write(np.full(elements, missing_word(dtype), storage_dtype(dtype)).tobytes())
        self._file.flush()
        self.descriptor, self.close = self._file.fileno(), self._file.close


class ChunkFiles:
    """The files of the chunks of some arrays.

    Parameters
    ----------
    folder : str
        Group that contains the arrays.
    chunk : (int, int)
        Steps and elements of a chunk.
    dtypes : mapping
        Logical dtype of each array (step, element).
    damaged : callable
        Takes the name of an array, the index and column of a chunk, and what is wrong, and returns an error.
    """

    def __init__(
        self,
        folder: str,
        chunk: tuple[int, int],
        dtypes: Mapping[str, str],
        damaged: Callable[[str, int, int, str], InputError],
    ) -> None:
        self._folder, self._chunk, self._dtypes, self._damaged = folder, chunk, dtypes, damaged
        self._state_bytes = {name: chunk[1] * storage_dtype(dtype).itemsize for name, dtype in dtypes.items()}
        self._open: dict[tuple[str, int, int], ChunkFile] = {}
        self._missing: dict[str, _MissingState] = {}
        self.columns = 0
        """Limit of the read-ahead: if a chunk is not cached, that of the next column is read ahead below it."""

    def close(self, column: int | None = None) -> None:
        """Close all files, or only those of a column and of the columns before it."""
        for key in [key for key in self._open if column is None or key[2] <= column]:
            self._open.pop(key).close()
        while self._missing:
            self._missing.popitem()[1].close()

    def locate(self, name: str, start: int, stop: int, column: int, elements: int) -> Located:
        """Locate the first elements of copied states of a chunk column in their files, which stay open.

        Raises
        ------
        InputError
            If a chunk is missing or too short.
        """
        steps = self._chunk[0]
        states = np.arange(start, stop)
        indices = range(start // steps, -(-stop // steps))
        files = np.array([self._opened(name, index, column).descriptor for index in indices], np.int32)
        return _in_one_piece(
            files[states // steps - indices.start], states % steps * self._state_bytes[name], elements
        )

    def locate_missing(self, name: str, states: int, elements: int) -> Located:
        """Locate states that were not logged, which all readers find as NaN."""
        if states and name not in self._missing:
            self._missing[name] = _MissingState(self._chunk[1], self._dtypes[name])
        descriptors = np.full(states, self._missing[name].descriptor if states else -1)
        return _in_one_piece(descriptors, np.zeros(states, np.int64), elements)

    def read(self, name: str, index: int, column: int, start: int, out: NDArray[Any]) -> None:
        """Read states of a chunk, with one read if they are contiguous in the buffer.

        Parameters
        ----------
        name : str
        index, column : int
        start : int
            The first of the states.
        out : array, shape (states, elements)

        Raises
        ------
        InputError
            If the chunk is missing or too short.
        """
        state_bytes = self._state_bytes[name]
        together = out.flags.c_contiguous and out.shape[1] == self._chunk[1]
        with closing(self._file(name, index, column)) as file:
            try:
                for position, words in enumerate([out] if together else out, start - index * self._chunk[0]):
                    if missing := file.read(position * state_bytes, words.data.cast("B")):
                        raise self._damaged(name, index, column, f"it is {missing} bytes too short")
            except OSError as error:
                raise self._damaged(name, index, column, str(error)) from error

    def _opened(self, name: str, index: int, column: int, ahead: bool = True) -> ChunkFile:
        key = name, index, column
        file = self._open.get(key)
        if file is None:
            file = self._open[key] = self._file(name, index, column)
            if file.read_ahead() and ahead and column + 1 < self.columns:
                self._opened(name, index, column + 1, ahead=False)
        return file

    def _file(self, name: str, index: int, column: int) -> ChunkFile:
        array, replicate = replicate_of(name)
        between = "" if replicate is None else f"{replicate}/"
        try:
            file = ChunkFile(f"{self._folder}/{array}/c/{index}/{between}{column}")
        except OSError as error:
            raise self._damaged(name, index, column, str(error)) from error
        missing = self._chunk[0] * self._state_bytes[name] - file.size
        if missing > 0:
            file.close()
            raise self._damaged(name, index, column, f"it is {missing} bytes too short")
        return file


def _in_one_piece(descriptors: ArrayLike, offsets: ArrayLike, elements: int) -> Located:
    return Located(
        np.asarray(descriptors, np.int32)[:, None],
        np.asarray(offsets, np.int64)[:, None],
        np.array([0, elements]),
    )
