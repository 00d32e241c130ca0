"""Execute the tiles of a pass serially, in threads, in processes or on a Dask cluster.

The serial executor is the reference: the others run the same functions (`natgrad.compute.tasks`). Workers write the
ledger and return only the address of a finished ledger chunk to the client. For an Icechunk repository they return
the ledger chunk itself, because only one process may commit there.
"""

from __future__ import annotations

import itertools
import math
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

from natgrad.compute.clusters import local_scheduler, named_scheduler
from natgrad.compute.plan import WorkItem
from natgrad.compute.tasks import Finished, Job, Segments, compute_chunk, tile_segments, write_chunk
from natgrad.schema.errors import Unavailable
from natgrad.schema.layout import LedgerChunk
from natgrad.schema.logs import logger

__all__ = [
    "Digests",
    "Executor",
    "existing_cluster",
    "local",
    "named_cluster",
    "require_scheduler",
    "serial",
    "threads",
]

_log = logger(__name__)

Digests = Callable[[], Mapping[int, str]]
"""Function that waits until the ledger is ready to be written, and returns the digest of the states of each ledger
chunk, by its first update. An executor calls it once for each ledger chunk, when it schedules the write."""

Executor = Callable[[Job, "list[WorkItem]", Digests], Iterator[Finished]]
"""Function that computes ledger chunks. It yields each when it is on disk, or when the client must write it."""


_RETRY_SECONDS = 0.1
"""Seconds between two attempts to connect."""


def serial(job: Job, items: list[WorkItem], digests: Digests) -> Iterator[Finished]:
    """Compute ledger chunks one after the other in this process, and write each while the next is computed."""
    written: Future[Finished] | None = None
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            parts = [tile_segments(job, tile) for tile in item.tiles]
            if written is not None:
                yield written.result()
            written = pool.submit(write_chunk, job, item.chunk, digests()[item.chunk.start], parts)
        if written is not None:
            yield written.result()


def threads(workers: int) -> Executor:
    """Compute tiles in threads of this process, with as many threads for writing. The kernel releases the GIL."""

    def run(job: Job, items: list[WorkItem], digests: Digests) -> Iterator[Finished]:
        pool, writers = ThreadPoolExecutor(workers), ThreadPoolExecutor(workers)
        ahead = _chunks_in_flight(2 * workers, items)
        pending: deque[tuple[LedgerChunk, list[Future[Segments]]]] = deque()
        written: deque[Future[Finished]] = deque()

        def write_oldest() -> None:
            chunk, tiles = pending.popleft()
            parts = [tile.result() for tile in tiles]
            written.append(writers.submit(write_chunk, job, chunk, digests()[chunk.start], parts))

        try:
            for item in items:
                pending.append((item.chunk, [pool.submit(tile_segments, job, tile) for tile in item.tiles]))
                if len(pending) >= ahead:
                    write_oldest()
                # Ledger chunks that wait for the disk take memory, which is planned for one ledger chunk of each
                # worker.
                if len(written) > workers:
                    yield written.popleft().result()
            while pending:
                write_oldest()
            while written:
                yield written.popleft().result()
        finally:
            # If a ledger chunk failed or the caller stops, tasks that have not started are cancelled.
            for each in (pool, writers):
                each.shutdown(cancel_futures=True)

    return run


def local(workers: int, memory_limit: int | None = None) -> Executor:
    """Compute ledger chunks on this machine, in threads of this process or in single-thread Dask worker processes.

    Processes take a second or more to start, on every core, but each has its own interpreter lock. They are used
    only for long passes (`PlanLimits.least_cluster_bytes`) that benefit from them: if chunks are compressed or in
    an object store, if there are replicates, if there are many workers (`PlanLimits.most_threads`), or if the
    workers do not fit into the memory limit of one process.

    Parameters
    ----------
    workers : int
        Largest number of threads or processes.
    memory_limit : int, optional
        Bytes of each process.
    """

    def run(job: Job, items: list[WorkItem], digests: Digests) -> Iterator[Finished]:
        tasks = sum(len(item.tiles) for item in items)
        several = min(workers, tasks)
        room = several if memory_limit is None else (memory_limit - job.limits.reserved_bytes) // job.worker_bytes
        short = several < 2 or tasks * job.task_bytes < job.limits.least_cluster_bytes
        if short or (job.compiled and several <= min(room, job.limits.most_threads)):
            together = min(several, room)
            yield from (threads(together) if together > 1 else serial)(job, items, digests)
            return
        with local_scheduler(several, memory_limit) as address:
            yield from existing_cluster(address)(job, items, digests)

    return run


def named_cluster(name: str, workers: int) -> Executor:
    """Compute ledger chunks on a cluster of a batch system or of Kubernetes that exists during the pass.

    Parameters
    ----------
    name : str
        One of `natgrad.compute.clusters.CLUSTERS`.
    workers : int
        Worker processes to request.
    """

    def run(job: Job, items: list[WorkItem], digests: Digests) -> Iterator[Finished]:
        if items:
            with named_scheduler(name, workers) as address:
                yield from existing_cluster(address)(job, items, digests)

    return run


def existing_cluster(address: str, *, connect_seconds: float = 10.0) -> Executor:
    """Compute ledger chunks on the workers of a running Dask scheduler.

    Parameters
    ----------
    address : str
        For example ``tcp://host:8786``. The workers need this package and access to the paths of the stores.
    connect_seconds : float
        Seconds within which the scheduler must answer.

    Raises
    ------
    Unavailable
        If the scheduler does not answer or is lost during the pass, or if the workers of a task die repeatedly.
        Finished ledger chunks are kept.
    """

    def run(job: Job, items: list[WorkItem], digests: Digests) -> Iterator[Finished]:
        if not items:  # there is no need to wait for a scheduler
            return
        from distributed import CancelledError, KilledWorker
        from distributed.comm.core import CommClosedError

        client = _connected(address, connect_seconds)
        finished = 0

        def resuming() -> str:
            done = f"{finished} of {len(items)} chunks are done and kept"
            return f"continue with: natgrad analyze {job.ledger.parent} ({done})"

        try:
            with closing(client):
                for chunk in _run_on(client, job, items, digests):
                    finished += 1
                    yield chunk
        except (CancelledError, CommClosedError) as error:
            raise Unavailable(
                f"the Dask scheduler was lost: {error}",
                where=address,
                why="the scheduler ended, or the network connection was lost",
                remedy=f"check that it is running, and {resuming()}",
            ) from error
        except KilledWorker as error:
            raise Unavailable(
                f"the workers of one task died {error.allowed_failures + 1} times, last {error.last_worker}",
                where=f"{address}, task {error.task}",
                why="they had less memory than projected for the pass, or their jobs or hosts ended",
                remedy=f"check the log of the worker, give workers at least --memory-limit, and {resuming()}",
            ) from error

    return run


def require_scheduler(address: str, *, connect_seconds: float = 10.0) -> None:
    """Check that a Dask scheduler answers (Unavailable if it does not); see `existing_cluster`."""
    _connected(address, connect_seconds).close()


def _connected(address: str, connect_seconds: float) -> Any:
    """Return a client of the scheduler at an address."""
    from distributed import Client
    from distributed.comm.addressing import get_address_host_port

    try:
        _wait_for_port(*get_address_host_port(address), connect_seconds)
        return Client(address, timeout=connect_seconds, set_as_default=False)
    except (OSError, TimeoutError, ValueError, TypeError) as error:  # TypeError: TLS without certificates
        raise Unavailable(
            f"the Dask scheduler does not answer: {getattr(error, 'strerror', None) or error}",
            where=address,
            why="it is not running, the address is wrong, or it requires TLS",
            remedy="start a scheduler (dask scheduler) and pass its address, or omit --scheduler",
        ) from error


def _wait_for_port(host: str, port: int, seconds: float) -> None:
    """Wait until a port accepts connections (OSError if it does not in time).

    A client of Dask that cannot connect keeps trying until the interpreter ends, and prints a traceback then.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), max(end - time.monotonic(), _RETRY_SECONDS)):
                return
        except OSError:
            if time.monotonic() >= end:
                raise
            time.sleep(_RETRY_SECONDS)


def _chunks_in_flight(tasks: int, items: list[WorkItem]) -> int:
    """Return the number of ledger chunks for a number of tasks: at least two, so that workers need not wait."""
    return max(2, math.ceil(tasks / max((len(item.tiles) for item in items), default=1)))


def _run_on(client: Any, job: Job, items: list[WorkItem], digests: Digests) -> Iterator[Finished]:
    from distributed import as_completed

    known = client.scheduler_info(n_workers=-1)
    workers = len(known["workers"])
    if "dashboard" in known["services"]:
        _log.info("Dask dashboard: %s", client.dashboard_link)
    if not workers:
        _log.warning("the Dask scheduler has no workers yet; waiting for the first one")
    ahead = _chunks_in_flight(job.limits.tasks_per_worker * max(1, workers), items)
    waiting = iter(items)
    first = [_submit(client, job, item, digests) for item in itertools.islice(waiting, ahead)]
    finishing = as_completed(first, loop=client.loop)
    del first  # a future that is referenced keeps its result on the cluster
    for future in finishing:
        yield future.result()
        for item in itertools.islice(waiting, 1):
            finishing.add(_submit(client, job, item, digests))


def _submit(client: Any, job: Job, item: WorkItem, digests: Digests) -> Any:
    start = item.chunk.start
    name = f"{job.name}-{start}"
    if len(item.tiles) == 1:
        return client.submit(compute_chunk, job, item, digests()[start], key=f"ledger-{name}", pure=False)
    parts = [
        client.submit(tile_segments, job, tile, key=f"tile-{name}-{tile.first}", pure=False) for tile in item.tiles
    ]
    return client.submit(write_chunk, job, item.chunk, digests()[start], parts, key=f"ledger-{name}", pure=False)
