"""Store runs without states, whose inner products were recorded, or computed outside of a pass.

The folder of such a run has the ledger, and ``steps.zarr`` instead of ``trajectory.zarr``: a `Trajectory` with the
numbers of each step, and no arrays of elements. The ledger cannot be computed again, so only the functions of
this module write it.

**Commit rule.** The updates are written to the ledger first. Then the record of the steps makes them visible. The
update from a step is known only with the next one, so the last step is always provisional: it lacks its gradient,
and `append_updates` starts with it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import MEBIBYTE, Layout, LedgerChunk, chunk_capacity
from natgrad.schema.names import ATTEMPT, PRODUCTS, RUN, STEP
from natgrad.storage import Storage
from natgrad.store.attempts import spans_between
from natgrad.store.checksums import digest_of
from natgrad.store.group import RECORD_AGAIN, exists
from natgrad.store.ledger import Ledger
from natgrad.store.trajectory import Trajectory

__all__ = ["append_updates", "create_run", "located", "products_checksum", "require_ledger"]

_CHUNK_BYTES, _CHUNK_UPDATES = 16 * MEBIBYTE, 1024
"""Approximate maximum size, and minimum capacity, of a ledger chunk. Each call rewrites the last chunk."""


def _steps_of(trajectory: Storage) -> Storage:
    """Return the location of the steps of a run without states, from that of a trajectory in the same folder."""
    return trajectory.parent / "steps.zarr"


def _ledger_of(run: Trajectory) -> Storage:
    """Return the location of the ledger of a run without states."""
    return run.storage.parent / "ledger.zarr"


def located(trajectory: Storage) -> Storage:
    """Return where the steps of a run are: in its trajectory or, if it has no states, in ``steps.zarr``."""
    steps = _steps_of(trajectory)
    return steps if exists(steps) else trajectory


def create_run(
    trajectory: Storage,
    layout: Layout,
    dtypes: Mapping[str, str],
    vectors: Sequence[str],
    *,
    updates: int,
    updates_per_chunk: int | None = None,
    **described: Any,
) -> Trajectory:
    """Create an empty run without states, and its ledger. They replace any other run in the folder.

    Parameters
    ----------
    trajectory : Storage
        Location of the trajectory, if the run had one.
    layout : Layout
    dtypes : mapping
        Dtypes of ``parameter`` and ``gradient`` in the training loop, which determine the rounding of the results.
    vectors : sequence of str
        Vectors of the inner products.
    updates : int
        Number of updates so far, for the size of the chunks.
    updates_per_chunk : int, optional
        Updates of a ledger chunk, instead of a suitable number.
    **described
        See `Trajectory.create`: ``source``, ``scalars``, ``tables``, ``sweep``, ``read_options``,
        ``gradient_source`` and ``evaluation``.
    """
    row = 8 * len(layout.tensors) * (len(vectors) ** 2 + 1)
    fitting = max(1, _CHUNK_BYTES // max(row, 1))
    chunk = (1, max(layout.elements, 1))
    run = Trajectory.create(_steps_of(trajectory), layout, dtypes, chunk, recorded=vectors, **described)
    size = updates_per_chunk or min(fitting, chunk_capacity(updates, _CHUNK_UPDATES))
    Ledger.create(_ledger_of(run), layout, vectors, size)
    if exists(trajectory):
        Trajectory.remove(trajectory)
    return run


def products_checksum(gram: NDArray[np.float64], ratio: NDArray[np.float64]) -> int:
    """Return the checksum of the inner products of an update.

    Parameters
    ----------
    gram : float64 array, shape (tensors, vectors, vectors)
    ratio : float64 array, shape (tensors,)
    """
    values = (np.ascontiguousarray(each, "<f8").reshape(-1).data.cast("B") for each in (gram, ratio))
    found = 0
    for value in values:
        found = int(crc32c(value, found))
    return found


def append_updates(
    run: Trajectory,
    *,
    steps: Sequence[int],
    gram: NDArray[np.float64],
    ratio: NDArray[np.float64],
    scalars: Mapping[str, Sequence[Any]],
    sources: Sequence[Mapping[str, Any]],
    lacking: Sequence[Sequence[str]],
    attempts: Sequence[int] | None = None,
    runs: Sequence[str] = (),
) -> None:
    """Append the updates between steps. The last step is provisional: the next call must start with it.

    If the next call starts with another step, because the run was restarted, the provisional step is lost, and with
    it the update to it.

    Parameters
    ----------
    run : Trajectory
        From `create_run`. The caller holds its lock.
    steps : sequence of int, length n
        Numbers of the steps before the updates, and of that after the last one.
    gram : float64 array, shape (n - 1, tensors, vectors, vectors)
        Inner products of the update from each step to the next. They are ignored, and NaN is stored, between steps
        that do not follow each other.
    ratio : float64 array, shape (n - 1, tensors)
        Ratio c of the residual, gradient - c displacement.
    scalars, sources, attempts, runs
        See `Trajectory.commit`.
    lacking : sequence of sequence of str, length n
        See `Trajectory.commit`. The last step must lack something.

    Raises
    ------
    InputError
        If the ledger is missing or damaged.
    """
    if len(steps) < 1 or not lacking[-1] or len(gram) != len(steps) - 1:
        raise ValueError("the last step must lack its gradient, and each other one must have an update")
    start, count = run.n_fixed, len(steps)
    names = [*run.runs]
    names += [name for name in dict.fromkeys(runs) if name not in names]
    fixed = (run.scalar(name)[:start] for name in (STEP, ATTEMPT, RUN))
    new = (steps, attempts or [0] * count, [names.index(name) for name in runs] or [0] * count)
    numbers = [np.append(old, np.asarray(own, np.int64)) for old, own in zip(fixed, new, strict=True)]
    spans = spans_between(numbers, run.step_span)
    connected = spans[start:] > 0
    gram = np.where(connected[:, None, None, None], gram, np.nan)
    ratio = np.where(connected[:, None], ratio, np.nan)
    sums = [products_checksum(*products) for products in zip(gram, ratio, strict=True)]
    ledger = _opened(run)
    low = start // ledger.updates_per_chunk * ledger.updates_per_chunk
    earlier, _ = run.checksums.of(PRODUCTS, low, start) if low < start else (np.empty((0, 1), np.uint32), None)
    of_updates = np.append(earlier[:, 0], np.asarray(sums, np.uint32))
    begins = np.append(False, spans == 0)

    def digest(chunk: LedgerChunk) -> str:
        own = of_updates[chunk.start - low : chunk.stop - low]
        return digest_of(own, begins[chunk.start : chunk.stop + 1])

    ledger.append(start, numbers[0][:-1], spans, gram, ratio, digest)
    checksums = {PRODUCTS: [[value] for value in (*sums, 0)]}
    run.commit(steps, scalars, sources, checksums, attempts, runs, lacking, provisional=True)


def _opened(run: Trajectory) -> Ledger:
    """Open the ledger of a run.

    Raises
    ------
    InputError
        If it is missing, damaged, or that of another run.
    """
    storage = _ledger_of(run)
    if not exists(storage):
        raise InputError(
            "the ledger of the run is missing",
            where=str(storage),
            why="it was removed; the run has no states to compute it from",
            remedy=RECORD_AGAIN,
        )
    ledger = Ledger(storage)
    if (ledger.layout, ledger.vectors, ledger.recorded) != (run.layout, run.recorded, True):
        raise InputError(
            "the ledger is that of another run",
            where=str(storage),
            why="it has other tensors or vectors than the steps of the run",
            remedy=RECORD_AGAIN,
        )
    return ledger


def require_ledger(run: Trajectory) -> Ledger:
    """Return the complete ledger of a run.

    Raises
    ------
    InputError
        If it is missing, damaged, incomplete or that of another run.
    """
    ledger = _opened(run)
    updates = max(run.n_states - 1, 0)
    steps, spans = (values[:updates] for values in ledger.steps())
    same = np.array_equal(steps, run.scalar(STEP)[:updates]) and np.array_equal(spans, run.spans())
    size = ledger.updates_per_chunk
    chunks = [LedgerChunk(low, min(low + size, updates)) for low in range(0, updates, size)]
    digests = run.digests(chunks)
    found = {record["start"]: (record["stop"], record["digest"]) for record in ledger.records()}
    # A writer that was killed may have extended the last chunk.
    complete = [
        found.get(chunk.start) == (chunk.stop, digests[chunk])
        or (chunk.stop == updates and found.get(chunk.start, (0, ""))[0] > updates)
        for chunk in chunks
    ]
    if not same or not all(complete):
        raise InputError(
            "the ledger does not belong to the steps of the run",
            where=str(ledger.storage),
            why="it was replaced by that of another run, or is damaged",
            remedy=RECORD_AGAIN,
        )
    return ledger
