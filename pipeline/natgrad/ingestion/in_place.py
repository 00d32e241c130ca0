"""Locate the arrays of steps in the files of a log, so that they need not be copied."""

from __future__ import annotations

from natgrad.schema.layout import storage_dtype
from natgrad.schema.names import replicate_of
from natgrad.sources.base import Ranged, StepContent, StepReader
from natgrad.sources.byte_ranges import part_of
from natgrad.sources.steps import LoggedStep, vanished
from natgrad.storage import Storage
from natgrad.store import Trajectory
from natgrad.store.references import ReferencedFile, StateReference, merged

__all__ = ["reference_of"]


def reference_of(
    reader: StepReader, step: LoggedStep, content: StepContent, trajectory: Trajectory
) -> StateReference | None:
    """Return where the arrays of a step are in its files; None if none of them consists of plain bytes.

    An array is omitted if it is compressed, in another order or dtype than that of the trajectory, or incomplete.

    Raises
    ------
    ListingChanged
        If a file was removed since the step was opened.
    """
    if not isinstance(reader, Ranged):
        return None
    files: dict[Storage, int] = {}
    arrays = {}
    for name, dtype in trajectory.dtypes.items():
        array, replicate = replicate_of(name)
        logged, itemsize = content.arrays.get(array, {}), storage_dtype(dtype).itemsize
        parts: list[tuple[int, int, int]] = []
        for tensor in filter(lambda tensor: tensor.size, trajectory.layout.tensors):
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
    if not arrays:
        return None
    try:
        found = [(file.absolute(), file.stat()) for file in files]
    except OSError as error:
        raise vanished(f"cannot find the files of this step any more: {error.strerror}", step) from error
    return StateReference(tuple(ReferencedFile(str(file), stat.size, stat.time) for file, stat in found), arrays)
