"""Locate the arrays of steps in the files of a log, so that they need not be copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from natgrad.schema.layout import storage_dtype
from natgrad.schema.names import replicate_of
from natgrad.sources.base import Ranged, StepContent, StepReader
from natgrad.sources.byte_ranges import Placement, part_of
from natgrad.sources.steps import LoggedStep, LoggedTensor, vanished
from natgrad.storage import Storage
from natgrad.store import Trajectory
from natgrad.store.references import Pieces, ReferencedFile, StateReference, merged

__all__ = ["Locator", "Relocated"]


class Relocated(NamedTuple):
    """A step whose files are not as recorded, although it has the contents of a committed state.

    Attributes
    ----------
    step : LoggedStep
    content : StepContent
    reference : StateReference or None
        Where its arrays are now; None if none of them consists of plain bytes.
    """

    step: LoggedStep
    content: StepContent
    reference: StateReference | None


@dataclass(frozen=True)
class _Located:
    """The pieces of a step.

    Attributes
    ----------
    placement : Placement
    logged : mapping
        Arrays and tensors of the step.
    arrays : mapping
        Pieces of each array that is plain bytes.
    files : tuple of int
        Index in ``placement.files`` of each file of the pieces.
    """

    placement: Placement
    logged: Mapping[str, Mapping[str, LoggedTensor]]
    arrays: Mapping[str, Pieces]
    files: tuple[int, ...]


class Locator:
    """Finds the arrays of steps in their files. Steps with the same placement share the pieces of the first one.

    Parameters
    ----------
    trajectory : Trajectory
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self._layout, self._dtypes = trajectory.layout, trajectory.dtypes
        self._last: _Located | None = None

    def reference_of(self, reader: StepReader, step: LoggedStep, content: StepContent) -> StateReference | None:
        """Return where the arrays of a step are in its files; None if none of them consists of plain bytes.

        An array is omitted if it is compressed, in another order or dtype than that of the trajectory, or
        incomplete.

        Raises
        ------
        ListingChanged
            If a file was removed since the step was opened.
        """
        if not isinstance(reader, Ranged):
            return None
        placement, last = reader.placement(content.arrays), self._last
        if placement is None or last is None or not _are_alike(placement, content, last):
            files, arrays = self._pieces(reader, content)
            starts: tuple[int, ...] = ()
            self._last = None
            if placement is not None:
                self._last = _Located(placement, content.arrays, arrays, tuple(map(placement.files.index, files)))
        else:
            files, arrays = [placement.files[index] for index in last.files], last.arrays
            starts = tuple(placement.starts[index] - last.placement.starts[index] for index in last.files)
        if not arrays:
            return None
        try:
            found = [(file.absolute(), file.stat()) for file in files]
        except OSError as error:
            raise vanished(f"the files of this step no longer exist: {error.strerror}", step) from error
        referenced = tuple(ReferencedFile(str(file), stat.size, stat.time) for file, stat in found)
        return StateReference(referenced, arrays, starts)

    def _pieces(self, reader: Ranged, content: StepContent) -> tuple[list[Storage], Mapping[str, Pieces]]:
        """Return the files of a step, and the pieces of each array in them."""
        files: dict[Storage, int] = {}
        arrays = {}
        for name, dtype in self._dtypes.items():
            array, replicate = replicate_of(name)
            logged, itemsize = content.arrays.get(array, {}), storage_dtype(dtype).itemsize
            parts: list[tuple[int, int, int]] = []
            for tensor in filter(lambda tensor: tensor.size, self._layout.tensors):
                is_same = tensor.name in logged and logged[tensor.name].dtype == dtype
                ranges = reader.ranges(array, tensor.name) if is_same else None
                if replicate is not None:
                    # The replicates of a tensor are stored one after another.
                    ranges = part_of(ranges, itemsize, replicate * tensor.size, tensor.size)
                if ranges is None:
                    break
                parts += [(each.elements, files.setdefault(each.file, len(files)), each.offset) for each in ranges]
            else:
                arrays[name] = merged(parts, itemsize)
        return list(files), arrays


def _are_alike(placement: Placement, content: StepContent, last: _Located) -> bool:
    """Return True if a step has the pieces of the last one, in its own files."""
    return (
        placement.table == last.placement.table
        and content.arrays == last.logged
        and _pattern(placement.files) == _pattern(last.placement.files)
    )


def _pattern(files: Sequence[Storage]) -> list[int]:
    """Return the position of the first file that is equal to each file."""
    return [0] if len(files) == 1 else list(map(files.index, files))
