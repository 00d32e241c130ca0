"""Compute the missing part of the ledger of a trajectory.

`compute_ledger` plans the pass, finds the missing ledger chunks, and passes them to an executor
(`natgrad.compute.executors`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from natgrad.compute.executors import Executor, serial
from natgrad.compute.plan import PassPlan, PlanLimits, WorkItem, plan_shape
from natgrad.compute.tasks import Computed, Job
from natgrad.schema.errors import InputError
from natgrad.schema.layout import LedgerChunk, TrajectoryShape
from natgrad.schema.logs import logger
from natgrad.schema.names import STEP
from natgrad.schema.times import now, oldest
from natgrad.storage import Storage
from natgrad.store import Ledger, Trajectory
from natgrad.store.recorded import require_ledger
from natgrad.store.verify import verified_since

__all__ = ["PassSummary", "compute_ledger", "plan_ledger"]

_log = logger(__name__)


@dataclass(frozen=True)
class PassSummary:
    """Outcome of a pass.

    Attributes
    ----------
    n_updates : int
        Number of updates in the ledger.
    chunks, computed_chunks : int
        Number of ledger chunks, and number of chunks computed by this pass; the others were already complete.
    computed_updates : int
        Number of updates computed by this pass. In a chunk that was already partly complete, only new updates
        count.
    plan : PassPlan
    states_verified : str or None
        See `natgrad.store.verify.verified_since`.
    """

    n_updates: int
    chunks: int
    computed_chunks: int
    computed_updates: int
    plan: PassPlan
    states_verified: str | None = field(compare=False)


def compute_ledger(
    trajectory: Storage,
    ledger: Storage,
    *,
    executor: Executor | None = None,
    memory_limit: int | None = None,
    limits: PlanLimits = PlanLimits(),
    trust_states: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PassSummary:
    """Compute the missing part of the Gram ledger of a trajectory.

    Parameters
    ----------
    trajectory, ledger : Storage
    executor : callable, optional
        One of `natgrad.compute.executors`: `serial` (the default), ``threads(n)``, ``local(n)``,
        ``named_cluster(name, n)`` or ``existing_cluster(address)``.
    memory_limit : int, optional
        Bytes that a worker process may use.
    limits : PlanLimits, optional
        Limits by which the pass is divided into tasks and reads.
    trust_states : bool
        Do not compare the states that are read with their checksums.
    progress : callable, optional
        Called with the number of ledger chunks done and the total number to compute.

    Raises
    ------
    InputError
        If there are fewer than two states or no elements, the plan exceeds the memory limit, a state that is read
        is damaged, another process is writing this ledger, or the storage cannot be read or written.
    """
    states = Trajectory(trajectory)
    if states.n_states < 2:
        raise InputError(
            f"the trajectory has {states.n_states} logged step(s), but an update requires two",
            where=str(trajectory),
            why="the displacement of a step is the difference between it and the next logged state",
            remedy="ingest more steps",
        )
    if not states.layout.elements:
        raise InputError(
            "the model has no elements, so it has no updates",
            where=str(trajectory),
            why="all tensors are empty",
            remedy="log at least one element",
        )
    shape = states.shape
    plan = plan_ledger(shape, ledger, memory_limit=memory_limit, limits=limits)
    if states.recorded:
        found = require_ledger(states)
        chunks = -(-plan.n_updates // found.updates_per_chunk)
        return PassSummary(plan.n_updates, chunks, 0, 0, plan, verified_since(states, None))
    _log.info("%s", plan)
    job = Job.of(
        states.storage,
        ledger,
        plan,
        limits,
        compiled=shape.partial_reads and not states.replicates,
        verified=None if trust_states else now(),
    )
    items = list(plan.work_items())
    with ledger.lock("ledger") as ledger, ThreadPoolExecutor(1) as background:
        new = Ledger.find(ledger) is None
        # All chunks of a new ledger are missing, so their tiles need not wait until the ledger exists.
        preparing = background.submit(_prepare, ledger, states, shape.vectors, plan.updates_per_chunk, items)
        missing = items if new else preparing.result().missing
        known = None if new else preparing.result().ledger
        earlier = {} if known is None else known.verification(known.records())
        updates = sum(item.n_updates for item in missing)
        if updates < plan.n_updates:
            _log.info("%d of these updates are missing from the ledger", updates)
        # The checksums of states that are read in place are published together with the ledger.
        recorded = cache(lambda: Trajectory(states.storage.published_with(ledger)) if states.in_place else states)
        run = executor or serial
        try:
            for done, found in enumerate(run(job, missing, lambda: preparing.result().digests), start=1):
                prepared = preparing.result()
                chunk = found.chunk if isinstance(found, Computed) else found
                if isinstance(found, Computed):
                    found.write(prepared.ledger, recorded)
                fields = {
                    "run": job.run,
                    "first_step": int(prepared.steps[chunk.start]),
                    "last_step": int(prepared.steps[chunk.stop - 1]),
                }
                _log.debug("chunk %d of %d is in the ledger", done, len(missing), extra=fields)
                if progress is not None:
                    progress(done, len(missing))
        except BaseException:
            # The finished chunks and their times are kept, unless the storage fails as well.
            with suppress(InputError, OSError):
                _record_times(preparing.result(), earlier, job.verified)
            raise
        prepared = preparing.result()
        for chunk, shorter in prepared.settled.items():
            prepared.ledger.settle(chunk, recorded().digests([shorter])[shorter])
        if missing:
            _record_times(prepared, earlier, job.verified)
        verified = verified_since(recorded(), prepared.ledger)
        ledger.publish(f"ledger of {job.run}: {len(missing)} of {len(items)} chunks computed")
    return PassSummary(plan.n_updates, len(items), len(missing), updates, plan, verified)


class _Prepared(NamedTuple):
    """A ledger that is ready to be written, and the missing work items.

    ``digests`` maps the first update of each ledger chunk to the digest of its states, and ``steps`` is the step of
    the state before each update. ``settled`` maps the last ledger chunk to the same chunk without the update to a
    provisional state.
    """

    ledger: Ledger
    missing: list[WorkItem]
    digests: dict[int, str]
    steps: NDArray[np.int64]
    settled: dict[LedgerChunk, LedgerChunk]


def _prepare(
    storage: Storage, states: Trajectory, vectors: tuple[str, ...], updates_per_chunk: int, items: list[WorkItem]
) -> _Prepared:
    """Open or create the ledger, discard chunks computed from other states, and find the missing chunks."""
    steps, spans = states.scalar(STEP)[:-1], states.spans()
    ledger = Ledger.prepare(
        storage, states.layout, vectors, steps, spans, updates_per_chunk, states.replicate_vectors
    )
    if settled := ledger.settled():
        ledger.shorten(states.digests(settled))
    parts, last = ledger.partial_chunks(), items[-1].chunk
    # The update to a provisional state is computed again when this state is complete.
    shorter = LedgerChunk(last.start, last.stop - 1)
    unchanging = {last: shorter} if states.provisional and shorter.stop > shorter.start else {}
    digests = states.digests([*(item.chunk for item in items), *parts])
    # If the trajectory was replaced, an interrupted pass must not leave valid updates of the old trajectory.
    ledger.discard_others(digests)
    lacking = set(ledger.missing(digests))
    reached = {part.start: part.stop for part in parts if part not in lacking}
    missing = [
        item.after(reached.get(item.chunk.start, item.chunk.start)) for item in items if item.chunk in lacking
    ]
    of_items = {item.chunk.start: digests[item.chunk] for item in items}
    return _Prepared(ledger, missing, of_items, steps, unchanging)


def _record_times(prepared: _Prepared, earlier: Mapping[int, str | None], time: str | None) -> None:
    """Record when the states of finished ledger chunks were compared; `earlier` has the times before the pass."""
    records = prepared.ledger.records()
    finished = {(record["start"], record["stop"]) for record in records}
    times = dict(earlier)
    for item in prepared.missing:
        chunk = item.chunk
        before = times.pop(chunk.start, None)
        if (chunk.start, chunk.stop) in finished:
            # A chunk that continues an earlier one contains states that an earlier pass compared.
            continues = item.n_updates < chunk.stop - chunk.start
            times[chunk.start] = oldest([time, before]) if continues else time
    prepared.ledger.record_verification(times, records)


def plan_ledger(
    shape: TrajectoryShape,
    ledger: Storage,
    *,
    memory_limit: int | None = None,
    limits: PlanLimits = PlanLimits(),
) -> PassPlan:
    """Plan the pass over a trajectory that is stored, or will be stored.

    Parameters
    ----------
    shape : TrajectoryShape
    ledger : Storage
        An existing ledger of this trajectory keeps its chunks.
    memory_limit, limits
        See `compute_ledger`.

    Raises
    ------
    InputError
        If the projected memory exceeds the limit, or the location of the ledger contains something else.
    """
    updates_per_chunk = None
    found = Ledger.find(ledger)
    if found is not None:
        same = (shape.layout, shape.vectors, shape.replicate_vectors)
        if (found.layout, found.vectors, found.replicate_vectors) == same:
            updates_per_chunk = found.updates_per_chunk
    return plan_shape(shape, memory_limit=memory_limit, updates_per_chunk=updates_per_chunk, limits=limits)
