"""Find the chunks of states that are one range of a file of the log, so that every reader can read them there."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from natgrad.schema.layout import storage_dtype
from natgrad.storage import FileRange
from natgrad.store.references import StateReference

if TYPE_CHECKING:
    from natgrad.store.states import States

__all__ = ["chunk_range", "virtual_chunks"]


def chunk_range(run: States, reference: StateReference, name: str, column: int) -> FileRange | None:
    """Return the range of a file that is a chunk of a state; None if it has several pieces or several states."""
    if run.chunk[0] > 1:
        return None
    itemsize = storage_dtype(run.dtypes[name]).itemsize
    return reference.chunk_range(name, *run.column(column), (run.chunk[1], itemsize))


def virtual_chunks(
    run: States, references: Mapping[int, StateReference | None], sources: Mapping[int, Mapping[str, Any]]
) -> tuple[dict[str, FileRange], set[str]]:
    """Return the arguments of `Storage.refer` for states: no ranges if the storage does not refer to files.

    Parameters
    ----------
    run : States
    references : mapping
        Location by state. Dropped states are omitted.
    sources : mapping
        Identity of the source by state.
    """
    ranges, folders = {}, set[str]()
    for state, reference in references.items():
        if reference is None or state in run.dropped or not run.storage.refers:
            continue
        own = str(sources[state]["folder"])
        for name, column in itertools.product(run.dtypes, range(run.columns)):
            found = chunk_range(run, reference, name, column)
            if found is not None:
                ranges[run.chunk_name(name, state, column)] = found
                inside = found.location.startswith(f"{own}/")
                folders.add(own if inside else found.location.rpartition("/")[0])
    return ranges, folders
