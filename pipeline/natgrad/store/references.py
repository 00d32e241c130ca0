"""Locate states in the files of their log, instead of copying their elements.

The record of a commit lists the files of its states with their sizes and times, and the pieces of each array in
them. States whose files have equal headers share one table of pieces: their offsets differ by the position of the
first byte, if at all. ``references`` of a record is::

    {"files": [[path or URL, size, time in ns], ...],
     "layouts": [{array: [[first element of each piece..., elements], [file of each piece], [offset]], ...}, ...],
     "states": [[layout, [file, ...], [position of the first byte in each file, ...]] or null, ...]}

An array of a state that its layout does not contain is copied into the chunks of the trajectory.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.kernel.located import Located, joined
from natgrad.schema.errors import InputError
from natgrad.storage import FileRange, Stat, Storage, open_storage
from natgrad.storage.local import ChunkFile

__all__ = ["OpenFiles", "Pieces", "ReferencedFile", "References", "StateReference", "encode", "merged"]

_OPEN_FILES, _LOCATED = 96, 1 << 20
"""Maximum number of files that are open together, and of pieces of states that are located together. A process may
have 1024 open files on Linux."""

CHANGED_FILE = (
    "restore the file as it was; if only its time has changed or the log was moved, run natgrad ingest SOURCE OUT: "
    "it compares the contents and records the new files; to process the log as it is now, start from scratch with "
    "--overwrite"
)
"""Remedy for a file of a log that is not as recorded."""


@dataclass(frozen=True, order=True)
class ReferencedFile:
    """A file of a log, as it was when its states were committed.

    Attributes
    ----------
    location : str
        Absolute path, or URL.
    size : int
        Bytes.
    time : int
        Time of the last change, in ns.
    """

    location: str
    size: int
    time: int

    @cached_property
    def storage(self) -> Storage:
        """Handle of the file."""
        return open_storage(self.location)

    def require_unchanged(self, part: str = "") -> None:
        """Raise an error if the file is missing, or has another size or time.

        Raises
        ------
        InputError
            The message names the file, and ``part``.
        """
        try:
            found = self.storage.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self.error("it is missing", part) from error
        self.require(found, part)

    def require(self, found: Stat, part: str = "") -> None:
        """Raise an error if the file was found with another size or time; see `require_unchanged`."""
        if found.size != self.size:
            raise self.error(f"it has {found.size} instead of {self.size} bytes", part)
        if found.time != self.time:
            raise self.error("it was changed after it was recorded", part)

    def is_unchanged(self) -> bool:
        """Return True if the file has the recorded size and time."""
        try:
            self.require_unchanged()
        except (InputError, OSError):
            return False
        return True

    def error(self, what: str, part: str = "") -> InputError:
        """Return the error for a file that is not as recorded; ``part`` names arrays and steps."""
        return InputError(
            f"cannot read a file of the log{f' for {part}' if part else ''}: {what}",
            where=self.location,
            why="its states are not copied (--in-place), and it was changed, truncated, moved or removed, or the "
            "disk failed",
            remedy=CHANGED_FILE,
        )


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of an array of a state: consecutive ranges of elements, each contiguous in one file.

    Attributes
    ----------
    starts : int64 array, shape (pieces + 1,)
        First element of each piece on the element axis, and the number of elements.
    files : int64 array, shape (pieces,)
        Index of the file of each piece.
    offsets : int64 array, shape (pieces,)
        Offset of its first byte in the file.
    """

    starts: NDArray[np.int64]
    files: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def from_json(cls, parts: Sequence[Sequence[int]]) -> Pieces:
        """Return the pieces that `to_json` describes."""
        return cls(*(np.asarray(part, np.int64) for part in parts))

    def range_of(self, first: int, last: int, itemsize: int) -> tuple[int, int] | None:
        """Return the file and the offset of a range of elements, None if it is in several pieces."""
        index = int(np.searchsorted(self.starts, first, "right")) - 1
        if last > self.starts[index + 1]:
            return None
        return int(self.files[index]), int(self.offsets[index] + (first - self.starts[index]) * itemsize)

    def to_json(self) -> list[list[int]]:
        """Return the starts, files and offsets."""
        return [part.tolist() for part in (self.starts, self.files, self.offsets)]


@dataclass(frozen=True, eq=False)
class StateReference:
    """Files of a state, and the pieces of each array that they contain as plain bytes.

    Attributes
    ----------
    files : tuple of ReferencedFile
    arrays : mapping
        Pieces by array. States may share this object.
    starts : tuple of int
        For each file, a number of bytes to be added to the offsets of its pieces; empty if all are 0.
    """

    files: tuple[ReferencedFile, ...]
    arrays: Mapping[str, Pieces]
    starts: tuple[int, ...] = ()

    def chunk_range(self, name: str, first: int, last: int, chunk: tuple[int, int]) -> FileRange | None:
        """Return the range of a file that a Zarr reader can use as a chunk with these elements of an array.

        The bytes after the last element fill the chunk. No reader uses them, but the file must contain them.

        Parameters
        ----------
        name : str
        first, last : int
            First and stop element.
        chunk : (int, int)
            Elements of the chunk, and bytes of an element.

        Returns
        -------
        FileRange or None
            None if the elements are in several pieces, or the file ends within the chunk.
        """
        elements, itemsize = chunk
        found = self.arrays[name].range_of(first, last, itemsize) if name in self.arrays else None
        if found is None:
            return None
        index, offset = found
        file, offset = self.files[index], offset + (self.starts[index] if self.starts else 0)
        size = elements * itemsize
        return FileRange(file.location, offset, size, file.time) if offset + size <= file.size else None


def merged(parts: Sequence[tuple[int, int, int]], itemsize: int) -> Pieces:
    """Return pieces, merging those that are adjacent in a file.

    Parameters
    ----------
    parts : sequence of (int, int, int)
        Number of elements, file and offset of each part of an array, in the order of the element axis.
    itemsize : int
        Bytes of an element.

    Examples
    --------
    >>> merged([(3, 0, 100), (2, 0, 112), (5, 0, 300)], itemsize=4).starts.tolist()
    [0, 5, 10]
    """
    elements, files, offsets = np.array([part for part in parts if part[0]], np.int64).reshape(-1, 3).T
    starts = np.concatenate([[0], np.cumsum(elements)])
    begins = np.ones(len(elements), bool)
    begins[1:] = (files[1:] != files[:-1]) | (offsets[1:] != offsets[:-1] + elements[:-1] * itemsize)
    return Pieces(np.append(starts[:-1][begins], starts[-1]), files[begins], offsets[begins])


# Records ------------------------------------------------------------------------------------------------------


def encode(states: Sequence[StateReference | None]) -> str:
    """Return the text of a record that lists the references of its states."""
    files: dict[ReferencedFile, int] = {}
    layouts: dict[bytes, int] = {}
    known: dict[int, tuple[int, list[int]]] = {}
    tables: list[dict[str, list[list[int]]]] = []
    rows: list[Any] = []
    for state in states:
        if state is None:
            rows.append(None)
            continue
        if id(state.arrays) not in known:
            layout, bases = _relative(state)
            parts = [part for pieces in layout.values() for part in (pieces.starts, pieces.files, pieces.offsets)]
            key = b"".join(part.tobytes() for part in parts) + "/".join(layout).encode()
            if key not in layouts:
                layouts[key] = len(tables)
                tables.append({name: pieces.to_json() for name, pieces in layout.items()})
            known[id(state.arrays)] = layouts[key], bases
        number, bases = known[id(state.arrays)]
        starts = state.starts or (0,) * len(state.files)
        own = [base + start for base, start in zip(bases, starts, strict=True)]
        rows.append([number, [files.setdefault(file, len(files)) for file in state.files], own])
    table = {
        "files": [[file.location, file.size, file.time] for file in files],
        "layouts": tables,
        "states": rows,
    }
    return base64.b64encode(zlib.compress(json.dumps(table, separators=(",", ":")).encode())).decode()


def _relative(state: StateReference) -> tuple[dict[str, Pieces], list[int]]:
    """Return pieces with offsets from the first byte in each file, and the offset of this byte."""
    none = np.iinfo(np.int64).max
    bases = np.full(len(state.files), none)
    for pieces in state.arrays.values():
        np.minimum.at(bases, pieces.files, pieces.offsets)
    bases[bases == none] = 0
    relative = {
        name: Pieces(pieces.starts, pieces.files, pieces.offsets - bases[pieces.files])
        for name, pieces in state.arrays.items()
    }
    return relative, bases.tolist()


# Reading ------------------------------------------------------------------------------------------------------


class _Layout:
    """The pieces of each array, cut at the boundaries of chunk columns."""

    def __init__(self, arrays: Mapping[str, Sequence[Sequence[int]]]) -> None:
        self.pieces = {name: Pieces.from_json(parts) for name, parts in arrays.items()}
        self._columns: dict[tuple[str, int, int, int], tuple[NDArray[np.int64], ...]] = {}
        self._needed: dict[tuple[int, int], tuple[NDArray[np.int64], int]] = {}

    def column(self, name: str, first: int, last: int, itemsize: int) -> tuple[NDArray[np.int64], ...]:
        """Return the starts, files and offsets of the pieces of a range of elements, relative to its first."""
        key = name, first, last, itemsize
        if key not in self._columns:
            found = self.pieces[name]
            starts, files, offsets = found.starts, found.files, found.offsets
            low, high = np.searchsorted(starts, first, "right") - 1, np.searchsorted(starts, last)
            cut = np.clip(starts[low : high + 1], first, last)
            shifted = offsets[low:high] + (cut[:-1] - starts[low:high]) * itemsize
            self._columns[key] = cut - first, files[low:high], shifted
        return self._columns[key]

    def needs(self, itemsizes: Mapping[str, int], first: int, last: int) -> tuple[NDArray[np.int64], int]:
        """Return the files that contain a range of elements of any of the arrays, and the number of its pieces."""
        key = first, last
        if key not in self._needed:
            names = [name for name in itemsizes if name in self.pieces]
            files = [self.column(name, first, last, itemsizes[name])[1] for name in names]
            self._needed[key] = (
                np.unique(np.concatenate([np.empty(0, np.int64), *files])),
                max(1, sum(map(len, files))),
            )
        return self._needed[key]


class OpenFiles:
    """Files of a log that are open, a limited number of them together.

    Parameters
    ----------
    files : sequence of ReferencedFile
    """

    def __init__(self, files: Sequence[ReferencedFile]) -> None:
        self._recorded = files
        # The most recently used file is the last one.
        self._open: dict[int, ChunkFile] = {}

    def descriptor(self, index: int) -> int:
        """Return the descriptor of a file, which is opened and compared with its record unless it is open."""
        if index in self._open:
            file = self._open.pop(index)
        else:
            recorded = self._recorded[index]
            try:
                file = ChunkFile(str(recorded.storage))
            except OSError as error:
                raise recorded.error(error.strerror or str(error)) from error
            try:
                recorded.require(file.stat())
            except BaseException:
                file.close()
                raise
        self._open[index] = file
        return file.descriptor

    def keep(self, files: Set[int]) -> None:
        """Close files that are not needed next, if too many are open, starting with the least recently used.

        Raises
        ------
        InputError
            If one of them was changed while it was open.
        """
        others = [index for index in self._open if index not in files]
        for index in others[: max(0, len(files) + len(others) - _OPEN_FILES)]:
            self._recorded[index].require(self._open[index].stat())
            self._open.pop(index).close()

    def require_unchanged(self) -> None:
        """Raise an InputError if a file was changed while it was open."""
        for index, file in self._open.items():
            self._recorded[index].require(file.stat())

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()


class References:
    """The files that contain the states of a trajectory, and the pieces of their arrays.

    Parameters
    ----------
    records : iterable of (int, str)
        First state, and the text of `encode`, of each record.
    """

    def __init__(self, records: Iterable[tuple[int, str]]) -> None:
        self.files: list[ReferencedFile] = []
        self._layouts: list[_Layout] = []
        known: dict[str, int] = {}
        indices: dict[ReferencedFile, int] = {}
        self._states: dict[int, tuple[int, NDArray[np.int64], NDArray[np.int64]]] = {}
        for start, text in records:
            table = json.loads(zlib.decompress(base64.b64decode(text)))
            files = [ReferencedFile(*file) for file in table["files"]]
            numbers = np.array([indices.setdefault(file, len(indices)) for file in files], np.int64)
            layouts = []
            for layout in table["layouts"]:
                key = json.dumps(layout)
                if key not in known:
                    known[key] = len(self._layouts)
                    self._layouts.append(_Layout(layout))
                layouts.append(known[key])
            for state, row in enumerate(table["states"], start):
                if row is not None:
                    layout, own, bases = row
                    self._states[state] = layouts[layout], numbers[own], np.array(bases, np.int64)
        self.files = list(indices)

    @property
    def is_local(self) -> bool:
        """True if all files are on this machine, or on a mounted file system."""
        return all(file.storage.local_path is not None for file in self.files)

    def has(self, name: str, state: int) -> bool:
        """Return True if an array of a state is in the files of its log, not in chunks of the trajectory."""
        row = self._states.get(state)
        return row is not None and name in self._layouts[row[0]].pieces

    def state(self, state: int) -> StateReference | None:
        """Return the reference of a state; None if all of its arrays are copied."""
        row = self._states.get(state)
        if row is None:
            return None
        layout, own, bases = row
        files = tuple(self.files[file] for file in own.tolist())
        return StateReference(files, self._layouts[layout].pieces, tuple(bases.tolist()))

    def files_of(self, state: int) -> list[int]:
        """Return the indices of the files of a state."""
        files: list[int] = self._states[state][1].tolist() if state in self._states else []
        return files

    def first_file(self, state: int, name: str = "", column: tuple[int, int] = (0, 0)) -> ReferencedFile:
        """Return the first file of a state, or of a chunk column of one of its arrays."""
        layout, own, _ = self._states[state]
        files = self._layouts[layout].column(name, *column, 1)[1] if name else [0]
        return self.files[int(own[files[0]])]

    def ranges(
        self, itemsizes: Mapping[str, int], start: int, stop: int, column: tuple[int, int]
    ) -> Iterator[tuple[int, int, frozenset[int]]]:
        """Divide updates into ranges whose states are in a limited number of files and pieces.

        Parameters
        ----------
        itemsizes : mapping
            Bytes of an element by array.
        start, stop : int
            Updates; the states of a range include the one after its last update.
        column : (int, int)
            First and stop element.

        Yields
        ------
        (int, int, frozenset of int)
            First and stop update, and the indices of the files of their states.
        """
        if start >= stop:
            return
        low, (files, pieces) = start, self._needs(itemsizes, start, column)
        before = files
        for state in range(start + 1, stop + 1):
            here, number = self._needs(itemsizes, state, column)
            both, most = files | here, max(pieces, number)
            if low < state - 1 and (len(both) > _OPEN_FILES or (state + 1 - low) * most > _LOCATED):
                yield low, state - 1, files
                low, both = state - 1, before | here
            files, pieces, before = both, most, here
        yield low, stop, files

    def _needs(
        self, itemsizes: Mapping[str, int], state: int, column: tuple[int, int]
    ) -> tuple[frozenset[int], int]:
        """Return the files with a chunk column of a state, and the number of its pieces."""
        if state not in self._states:
            return frozenset(), 1
        layout, own, _ = self._states[state]
        ordinals, pieces = self._layouts[layout].needs(itemsizes, *column)
        return frozenset(own[ordinals].tolist()), pieces

    def read(self, name: str, state: int, column: tuple[int, int], out: NDArray[Any], part: str = "") -> None:
        """Read a chunk column of an array of a state; ``part`` names it in messages.

        Raises
        ------
        InputError
            If a file is missing, too short or not as recorded.
        """
        files, offsets, starts = self.locate(name, range(state, state + 1), column, out.itemsize)
        begins, sizes = offsets[0], np.diff(starts) * out.itemsize
        for index in np.unique(files).tolist():
            file, own = self.files[index], np.flatnonzero(files[0] == index).tolist()
            file.require_unchanged(part)
            try:
                spans = [(int(begins[piece]), int(begins[piece] + sizes[piece])) for piece in own]
                contents = file.storage.get_ranges(spans)
            except OSError as error:
                raise file.error(error.strerror or str(error), part) from error
            for piece, content in zip(own, contents, strict=True):
                if missing := int(sizes[piece]) - len(content):
                    raise file.error(f"it is {missing} bytes too short", part)
                out[starts[piece] : starts[piece + 1]] = np.frombuffer(content, out.dtype)
            file.require_unchanged(part)

    def locate(self, name: str, states: range, column: tuple[int, int], itemsize: int) -> Located:
        """Locate states of a chunk column, with the indices of `files` instead of descriptors.

        Parameters
        ----------
        name : str
        states : range
            Consecutive states; the log contains this array of each.
        column : (int, int)
            First and stop element.
        itemsize : int
        """
        parts: list[Located] = []
        first = states.start
        while first < states.stop:
            layout = self._states[first][0]
            stop = first + 1
            while stop < states.stop and self._states[stop][0] == layout:
                stop += 1
            starts, files, offsets = self._layouts[layout].column(name, *column, itemsize)
            rows = [self._states[state] for state in range(first, stop)]
            numbers = np.stack([own for _, own, _ in rows])[:, files].astype(np.int32)
            bases = np.stack([base for _, _, base in rows])[:, files]
            parts.append(Located(numbers, bases + offsets, starts))
            first = stop
        return joined(parts, itemsize)
