"""Copy states that are in the files of a log, and remove copies that are no longer needed.

Both keep the ledger, the results and all checksums. A process that is killed leaves a valid trajectory: copies are
recorded after they are written, and removals before the files are removed. Call the function again to continue.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from natgrad.schema.errors import InputError
from natgrad.schema.layout import LedgerChunk, storage_dtype
from natgrad.schema.names import RUN
from natgrad.storage import Storage
from natgrad.store.ledger import Ledger
from natgrad.store.trajectory import Trajectory

__all__ = ["Moved", "materialize", "slim"]


class Moved(NamedTuple):
    """Number of states that were copied or removed, and their bytes."""

    states: int
    bytes: int


def materialize(storage: Storage, progress: Callable[[int, int], None] | None = None) -> Moved:
    """Copy the states of a trajectory that are in the files of its log. The ledger stays valid, bit for bit.

    Parameters
    ----------
    storage : Storage
        The trajectory.
    progress : callable, optional
        Called with the number of chunks done and their total number.

    Raises
    ------
    InputError
        If a file of the log is missing, or not as recorded. States of older attempts whose files a restarted run
        has overwritten are omitted.
    """
    with storage.lock("trajectory") as storage:
        trajectory = Trajectory(storage)
        trajectory.require_states()
        trajectory.recover()
        states, size, work = set[int](), 0, []
        for name, column in itertools.product(trajectory.dtypes, range(trajectory.columns)):
            own = set(_states(trajectory, name, column, in_place=True)) - trajectory.gone - trajectory.dropped
            states |= own
            size += len(own) * _column_bytes(trajectory, name, column)
            work += [(name, index, column) for index in sorted({state // trajectory.chunk[0] for state in own})]
        checksums: dict[str, dict[tuple[int, int], int]] = {name: {} for name in trajectory.dtypes}
        try:
            for done, (name, index, column) in enumerate(work, 1):
                found = trajectory.copy_chunk(name, index, column)
                checksums[name] |= {(state, column): value for state, value in found.items()}
                if progress is not None:
                    progress(done, len(work))
            if work:
                trajectory.forget_references(checksums)
        finally:
            trajectory.abandon()
        storage.publish(f"trajectory of {storage.parent.name}: {len(states)} states copied")
    return Moved(len(states), size)


def slim(storage: Storage, ledger: Storage) -> Moved:
    """Remove the copied states of a trajectory, except the chunks with the last state of each run.

    New steps of the log can still be ingested, because an update leads from the last state to the next one.

    Parameters
    ----------
    storage, ledger : Storage
        The trajectory, and its ledger.

    Raises
    ------
    InputError
        If the ledger lacks updates of these states.
    """
    with storage.lock("trajectory") as storage:
        trajectory = Trajectory(storage)
        trajectory.require_states()
        trajectory.recover()
        _require_ledger(trajectory, ledger)
        steps, runs = trajectory.chunk[0], trajectory.scalar(RUN)
        last = {int(np.flatnonzero(runs == run)[-1]) for run in np.unique(runs)}
        kept = {state // steps for state in (*last, max(trajectory.n_fixed - 1, 0), trajectory.n_states - 1)}
        dropped, size = set[int](), 0
        for name, column in itertools.product(trajectory.dtypes, range(trajectory.columns)):
            copied = _states(trajectory, name, column, in_place=False)
            own = {state for state in copied if state // steps not in kept}
            size += len(own - trajectory.dropped) * _column_bytes(trajectory, name, column)
            dropped |= own
        new_states = len(dropped - trajectory.dropped)
        if dropped:
            trajectory.journal.write_dropped(_ranges(sorted(dropped)))
        for index, name, column in itertools.product(
            sorted({state // steps for state in dropped}), trajectory.dtypes, range(trajectory.columns)
        ):
            entry = trajectory.chunk_entry(name, index, column)
            if entry.exists():
                entry.delete()
        storage.publish(f"trajectory of {storage.parent.name}: {new_states} states removed")
    return Moved(new_states, size)


def _states(trajectory: Trajectory, name: str, column: int, *, in_place: bool) -> Iterator[int]:
    """Yield the states whose chunk column is in the files of the log, or those whose chunk column is copied."""
    for start, stop, found in trajectory.divided(name, 0, trajectory.n_states, column):
        if found == in_place:
            yield from range(start, stop)


def _column_bytes(trajectory: Trajectory, name: str, column: int) -> int:
    """Return the bytes of a state in a chunk column."""
    first, last = trajectory.column(column)
    return (last - first) * storage_dtype(trajectory.dtypes[name]).itemsize


def _require_ledger(trajectory: Trajectory, storage: Storage) -> None:
    """Raise an error unless the ledger has all updates of the trajectory."""
    ledger = Ledger.find(storage)
    missing = max(trajectory.n_states - 1, 0)
    if ledger is not None:
        chunks = [LedgerChunk(record["start"], record["stop"]) for record in ledger.records()]
        valid = ledger.records(trajectory.digests(chunks))
        missing -= sum(record["stop"] - record["start"] for record in valid)
    if missing:
        raise InputError(
            f"the ledger lacks {missing} updates, which need the states",
            where=str(storage),
            why="the states have not been analyzed yet, or the analysis was interrupted",
            remedy="run natgrad analyze OUT first",
        )


def _ranges(states: list[int]) -> list[tuple[int, int]]:
    """Return the contiguous ranges of sorted numbers.

    Examples
    --------
    >>> _ranges([3, 4, 5, 9])
    [(3, 6), (9, 10)]
    """
    edges = np.flatnonzero(np.diff(states) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(np.array(states), edges)]
