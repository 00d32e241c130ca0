"""Compute the ledger of a trajectory: run the tiles of the pass serially, in threads or on a Dask cluster.

The serial executor is the reference: the same functions (`natgrad.compute.tasks`), one after the other. Workers
write the ledger and return only the address of a finished ledger chunk to the client. (For an Icechunk
repository they return the ledger chunk itself, because only one process may commit there.)
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from natgrad.compute.clusters import local_scheduler, named_scheduler
from natgrad.compute.tasks import Computed, Finished, Job, Segments, compute_chunk, tile_segments, write_chunk
from natgrad.schema.blocks import MEBIBYTE, RESERVED_BYTES, LedgerChunk, PassPlan, plan_pass
from natgrad.schema.errors import InputError, Unavailable
from natgrad.schema.layout import storage_dtype
from natgrad.schema.names import HVP, STEP, ledger_vectors
from natgrad.storage import Storage
from natgrad.store import Ledger, Trajectory

__all__ = [
    "Executor",
    "PassSummary",
    "compute_ledger",
    "existing_cluster",
    "local",
    "named_cluster",
    "serial",
    "threads",
]

_log = logging.getLogger(__name__)

_AHEAD = 3
"""Tasks in flight per worker: enough to keep it busy, few enough for the scheduler not to notice."""

_CLUSTER_BYTES = 2_000_000_000
"""A pass over less than this takes less time than processes take to start: a second or more, of every core."""

_MOST_THREADS = 8
"""Of one process. Each needs the interpreter for a twentieth of its time (to open files), so these wait little."""

_ICECHUNK_BYTES = 32 * MEBIBYTE
"""Memory of Icechunk in a worker, about: measured were 21 MiB, as it reads four ranges of 4 MiB."""

_CONNECT_SECONDS = 10
"""How long a scheduler may take to answer."""

Digests = Callable[[], Mapping[int, str]]
"""Waits until the ledger is ready to be written. Returns the digest of the states of each ledger chunk by its first
update."""

Executor = Callable[[Job, "list[LedgerChunk]", Digests], Iterator[Finished]]
"""Runs ledger chunks, and yields each when its ledger is on disk, or to be written here."""


@dataclass(frozen=True)
class PassSummary:
    """What a pass did.

    Attributes
    ----------
    n_updates : int
        Updates in the ledger.
    chunks, computed_chunks : int
        Chunks of the ledger, and those computed now; the others were complete.
    computed_updates : int
        Updates computed now: of a chunk that was begun when the trajectory was shorter, the new ones.
    plan : PassPlan
    """

    n_updates: int
    chunks: int
    computed_chunks: int
    computed_updates: int
    plan: PassPlan


def compute_ledger(
    trajectory: Storage,
    ledger: Storage,
    *,
    executor: Executor | None = None,
    memory_limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PassSummary:
    """Compute the Gram ledger of a trajectory, or what is missing of it.

    Parameters
    ----------
    trajectory, ledger : Storage
    executor : callable, optional
        `serial` (the default), `threads(n)`, `local(n)` or `existing_cluster(address)`.
    memory_limit : int, optional
        Bytes that a worker process may use.
    progress : callable, optional
        Called with ledger chunks done and ledger chunks to do.

    Raises
    ------
    InputError
        Where there are fewer than two states, or no elements, or the plan does not fit the memory limit, where
        another process writes this ledger, and where the disk refuses.
    """
    states = Trajectory(trajectory)
    if states.n_states < 2:
        raise InputError(
            f"{states.n_states} logged step(s), but an update needs two",
            where=str(trajectory),
            why="the displacement of a step is the difference to the next logged state",
            remedy="ingest more steps",
        )
    if not states.layout.elements:
        raise InputError(
            "a model without elements has no updates",
            where=str(trajectory),
            why="all its tensors are empty",
            remedy="log at least one element",
        )
    hvp, reads_parts = HVP in states.dtypes, all(map(states.reads_parts, states.logged))
    names, names_of_replicates = ledger_vectors(hvp), states.replicate_vectors
    arguments: dict[str, Any] = {
        "states": states.n_states,
        "elements": states.layout.elements,
        "chunk": states.chunk,
        "itemsizes": [storage_dtype(states.dtypes[name]).itemsize for name in states.logged],
        "tensors": len(states.layout.tensors),
        "vectors": len(names),
        "replicate_vectors": len(names_of_replicates),
        "memory_limit": memory_limit,
        "complete_chunks": not reads_parts,
        "library_bytes": _ICECHUNK_BYTES if states.storage.keeps_versions else 0,
    }
    plan = plan_pass(**arguments, updates_per_chunk=_updates_per_chunk(ledger, states, names, names_of_replicates))
    _log.info("%s", plan)
    job = Job.of(states.storage, ledger, plan, streamed=reads_parts and not states.replicates)
    chunks = list(plan.chunks())
    with ledger.lock("ledger") as ledger, ThreadPoolExecutor(1) as beside:
        new = not Ledger.is_current(ledger)

        def begin() -> _Begun:
            steps, spans = states.scalar(STEP)[:-1], states.spans()
            book = Ledger.prepare(
                ledger, states.layout, names, steps, spans, plan.updates_per_chunk, names_of_replicates
            )
            parts = book.partial_chunks()
            digests = states.digests([*chunks, *parts])
            # Where the trajectory is another one by now, an interrupted pass leaves no rows of the old one valid.
            book.discard_others(digests)
            lacking = set(book.missing(digests))
            reached = {part.start: part.stop for part in parts if part not in lacking}
            missing = [chunk.after(reached.get(chunk.start, chunk.start)) for chunk in chunks if chunk in lacking]
            return _Begun(book, missing, {chunk.start: digests[chunk] for chunk in chunks}, steps)

        # All ledger chunks of a new ledger are missing: their tiles need not wait until it is there.
        begun = beside.submit(begin)
        missing = chunks if new else begun.result().missing
        rows = sum(chunk.stop - chunk.tiles[0].start for chunk in missing)
        if rows < plan.n_updates:
            _log.info("%d of these updates are missing in the ledger", rows)
        run = executor or serial
        for done, found in enumerate(run(job, missing, lambda: begun.result().digests), start=1):
            book, _, _, steps = begun.result()
            chunk = found.chunk if isinstance(found, Computed) else found
            if isinstance(found, Computed):
                book.write(*found)
            fields = {
                "run": job.run,
                "first_step": int(steps[chunk.start]),
                "last_step": int(steps[chunk.stop - 1]),
            }
            _log.debug("chunk %d of %d is in the ledger", done, len(missing), extra=fields)
            if progress is not None:
                progress(done, len(missing))
        begun.result()
        ledger.publish(f"ledger of {job.run}: {len(missing)} of {len(chunks)} chunks computed")
    return PassSummary(plan.n_updates, len(chunks), len(missing), rows, plan)


class _Begun(NamedTuple):
    """What a pass knows when its ledger is ready to be written."""

    book: Ledger
    missing: list[LedgerChunk]
    digests: dict[int, str]
    steps: NDArray[np.int64]


def _updates_per_chunk(
    ledger: Storage, states: Trajectory, names: tuple[str, ...], names_of_replicates: tuple[str, ...]
) -> int | None:
    """Rows of a ledger chunk of the ledger that is there, if it is this trajectory's: then it grows."""
    if not Ledger.is_current(ledger):
        return None
    book = Ledger(ledger)
    same = (book.layout, book.vectors, book.replicate_vectors) == (states.layout, names, names_of_replicates)
    return book.updates_per_chunk if same else None


# Executors ---------------------------------------------------------------------------------------------------


def serial(job: Job, chunks: list[LedgerChunk], digests: Digests) -> Iterator[Finished]:
    """Run one ledger chunk after the other in this process, each written while the next one is computed."""
    written: Future[Finished] | None = None
    with ThreadPoolExecutor(1) as pool:
        for chunk in chunks:
            parts = [tile_segments(job, tile) for tile in chunk.tiles]
            if written is not None:
                yield written.result()
            written = pool.submit(write_chunk, job, chunk, digests()[chunk.start], parts)
        if written is not None:
            yield written.result()


def threads(workers: int) -> Executor:
    """Run tiles in threads of this process, and as many that write; the kernel releases the interpreter lock."""

    def run(job: Job, chunks: list[LedgerChunk], digests: Digests) -> Iterator[Finished]:
        pool, writers = ThreadPoolExecutor(workers), ThreadPoolExecutor(workers)
        ahead = _chunks_in_flight(2 * workers, chunks)
        pending: deque[tuple[LedgerChunk, list[Future[Segments]]]] = deque()
        written: deque[Future[Finished]] = deque()

        def write_oldest() -> None:
            chunk, parts = pending.popleft()
            found = [part.result() for part in parts]
            written.append(writers.submit(write_chunk, job, chunk, digests()[chunk.start], found))

        try:
            for chunk in chunks:
                pending.append((chunk, [pool.submit(tile_segments, job, tile) for tile in chunk.tiles]))
                if len(pending) >= ahead:
                    write_oldest()
                # What waits for the disk is in memory: there is room for a ledger chunk of each worker.
                if len(written) > workers:
                    yield written.popleft().result()
            while pending:
                write_oldest()
            while written:
                yield written.popleft().result()
        finally:
            # Where a ledger chunk failed, or no more are asked for, those not begun are left.
            for each in (pool, writers):
                each.shutdown(cancel_futures=True)

    return run


def local(workers: int, memory_limit: int | None = None) -> Executor:
    """Run ledger chunks on this machine: in threads of this process or in single-thread Dask worker processes.

    Processes take a second or more to start, of every core, and give the interpreter a lock each. So they are for
    long passes that need it: where chunks are compressed or objects, where there are replicates, where workers are
    many, and where they do not fit into the memory of one.

    Parameters
    ----------
    workers : int
        Threads or processes, at most.
    memory_limit : int, optional
        Bytes of each process.
    """

    def run(job: Job, chunks: list[LedgerChunk], digests: Digests) -> Iterator[Finished]:
        tasks = sum(len(chunk.tiles) for chunk in chunks)
        several = min(workers, tasks)
        room = several if memory_limit is None else (memory_limit - RESERVED_BYTES) // job.worker_bytes
        short = several < 2 or tasks * job.task_bytes < _CLUSTER_BYTES
        if short or (job.streamed and several <= min(room, _MOST_THREADS)):
            together = min(several, room)
            yield from (threads(together) if together > 1 else serial)(job, chunks, digests)
            return
        with local_scheduler(several, memory_limit) as address:
            yield from existing_cluster(address)(job, chunks, digests)

    return run


def named_cluster(name: str, workers: int) -> Executor:
    """Run ledger chunks on a cluster of a batch system or of Kubernetes that is there as long as the pass.

    Parameters
    ----------
    name : str
        One of `natgrad.compute.clusters.CLUSTERS`.
    workers : int
        Worker processes to ask for.
    """

    def run(job: Job, chunks: list[LedgerChunk], digests: Digests) -> Iterator[Finished]:
        if chunks:
            with named_scheduler(name, workers) as address:
                yield from existing_cluster(address)(job, chunks, digests)

    return run


def existing_cluster(address: str) -> Executor:
    """Run ledger chunks on the workers of a Dask scheduler that is there already.

    Parameters
    ----------
    address : str
        For example ``tcp://host:8786``. Its workers need this package, and the paths of the stores.

    Raises
    ------
    Unavailable
        When run, if the scheduler does not answer or is lost, or the workers of a task die again and again.
        Finished ledger chunks are kept.
    """

    def run(job: Job, chunks: list[LedgerChunk], digests: Digests) -> Iterator[Finished]:
        from distributed import CancelledError, Client, KilledWorker
        from distributed.comm.core import CommClosedError

        try:
            client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError, TypeError) as error:  # TypeError: TLS, and no certificates
            raise Unavailable(
                f"the Dask scheduler does not answer: {error}",
                where=address,
                why="it is not running, the address is wrong, or it wants TLS",
                remedy="start one (dask scheduler) and give its address, or leave --scheduler out",
            ) from error
        finished = 0

        def go_on() -> str:
            done = f"{finished} of {len(chunks)} chunks are done and kept"
            return f"go on with: natgrad analyze {job.ledger.parent} ({done})"

        try:
            with closing(client):
                for chunk in _run_on(client, job, chunks, digests):
                    finished += 1
                    yield chunk
        except (CancelledError, CommClosedError) as error:
            raise Unavailable(
                f"the Dask scheduler was lost: {error}",
                where=address,
                why="it ended, or the network to it was cut",
                remedy=f"see that it runs, and {go_on()}",
            ) from error
        except KilledWorker as error:
            raise Unavailable(
                f"the workers of one task died {error.allowed_failures + 1} times, {error.last_worker} the last",
                where=f"{address}, task {error.task}",
                why="they had less memory than the pass projects, or their jobs or hosts ended",
                remedy=f"look at the worker's log, give workers the memory of --memory-limit, and {go_on()}",
            ) from error

    return run


def _chunks_in_flight(tasks: int, chunks: list[LedgerChunk]) -> int:
    """Return the number of ledger chunks for so many tasks: at least two, so that workers do not wait for a sum."""
    return max(2, math.ceil(tasks / max((len(chunk.tiles) for chunk in chunks), default=1)))


def _run_on(client: Any, job: Job, chunks: list[LedgerChunk], digests: Digests) -> Iterator[Finished]:
    from distributed import as_completed

    known = client.scheduler_info(n_workers=-1)
    workers = len(known["workers"])
    if "dashboard" in known["services"]:
        _log.info("Dask dashboard: %s", client.dashboard_link)
    if not workers:
        _log.warning("the Dask scheduler has no worker yet: waiting for one")
    waiting, ahead = iter(chunks), _chunks_in_flight(_AHEAD * max(1, workers), chunks)
    first = [_submit(client, job, chunk, digests) for chunk in itertools.islice(waiting, ahead)]
    finishing = as_completed(first, loop=client.loop)
    del first  # a future that is held keeps its result on the cluster
    for future in finishing:
        yield future.result()
        for chunk in itertools.islice(waiting, 1):
            finishing.add(_submit(client, job, chunk, digests))


def _submit(client: Any, job: Job, chunk: LedgerChunk, digests: Digests) -> Any:
    name = f"{job.name}-{chunk.start}"
    if len(chunk.tiles) == 1:
        return client.submit(compute_chunk, job, chunk, digests()[chunk.start], key=f"ledger-{name}", pure=False)
    parts = [
        client.submit(tile_segments, job, tile, key=f"tile-{name}-{tile.first}", pure=False) for tile in chunk.tiles
    ]
    return client.submit(write_chunk, job, chunk, digests()[chunk.start], parts, key=f"ledger-{name}", pure=False)
