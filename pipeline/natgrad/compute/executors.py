"""Execute the tasks of a work (`natgrad.compute.work`) serially, in threads, in processes or on a Dask cluster.

The serial executor is the reference: the others call the same functions. Workers write the ledger and the results,
and return only what the client needs to continue. For an Icechunk repository they return ledger chunks themselves,
because only one process may commit there.
"""

from __future__ import annotations

import itertools
import math
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from natgrad.compute.clusters import local_scheduler, named_scheduler
from natgrad.compute.work import Work, WorkItem
from natgrad.compute.worker_checks import Problem, WorkerCheck, worker_check
from natgrad.schema.errors import Unavailable
from natgrad.schema.logs import logger

__all__ = [
    "WORKER_SECONDS",
    "Digests",
    "Executor",
    "existing_cluster",
    "local",
    "named_cluster",
    "processes",
    "require_scheduler",
    "serial",
    "threads",
]

_log = logger(__name__)

Digests = Callable[[], Mapping[int, str]]
"""Function that waits until the ledger is ready to be written, and returns the digest of the states of each ledger
chunk, by its first update; empty if a pass has to read the states first. An executor calls it once for each ledger
chunk, when it schedules the write."""

Executor = Callable[[Work, "Sequence[WorkItem]", Digests], Iterator[Any]]
"""Function that computes the items of a work. It yields the result of each (`Work.finish`) when it is complete."""


_RETRY_SECONDS = 0.1
"""Seconds between two attempts to connect."""

WORKER_SECONDS = 600.0
"""Seconds after which a pass fails if a cluster has no worker for it."""

_CHECK_SECONDS, _CHECK_POLL_SECONDS = 5.0, 0.01
"""Seconds for which a pass waits for the checks of its first workers. Workers that are busy are checked later."""

_QUERY_SECONDS, _RECHECK_SECONDS = 1.0, 5.0
"""Time between two queries of the workers of a cluster, and time until a worker that failed its check is checked
again."""

_RESULT_SECONDS, _LOST = 2.0, object()
"""Seconds to wait for the result of a finished task, and the value that represents a lost result."""

_LOSSES = 3
"""Maximum number of times that a task is resubmitted after all workers that it could run on were lost."""


def serial(job: Work, items: Sequence[WorkItem], digests: Digests) -> Iterator[Any]:
    """Compute ledger chunks sequentially in this process, and write each while the next is computed."""
    written: Future[Any] | None = None
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            parts = [job.compute(tile) for tile in item.tiles]
            if written is not None:
                yield written.result()
            written = pool.submit(job.finish, item.chunk, digests()[item.chunk.start], parts)
        if written is not None:
            yield written.result()


def threads(workers: int) -> Executor:
    """Compute tiles in threads of this process, with as many threads for writing. The kernel releases the GIL."""

    def run(job: Work, items: Sequence[WorkItem], digests: Digests) -> Iterator[Any]:
        pool, writers = ThreadPoolExecutor(workers), ThreadPoolExecutor(workers)
        ahead = _chunks_in_flight(2 * workers, items)
        pending: deque[tuple[WorkItem, list[Future[Any]]]] = deque()
        written: deque[Future[Any]] = deque()

        def write_oldest() -> None:
            item, tiles = pending.popleft()
            parts = [tile.result() for tile in tiles]
            written.append(writers.submit(job.finish, item.chunk, digests()[item.chunk.start], parts))

        try:
            for item in items:
                pending.append((item, [pool.submit(job.compute, tile) for tile in item.tiles]))
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
        Maximum number of threads or processes.
    memory_limit : int, optional
        Bytes of each process.
    """

    def run(job: Work, items: Sequence[WorkItem], digests: Digests) -> Iterator[Any]:
        tasks = sum(len(item.tiles) for item in items)
        several = min(workers, tasks)
        fitting = (
            several if memory_limit is None else (memory_limit - job.limits.reserved_bytes) // job.worker_bytes
        )
        short = several < 2 or tasks * job.task_bytes < job.limits.least_cluster_bytes
        if short or (job.threaded and several <= min(fitting, job.limits.most_threads)):
            together = min(several, fitting)
            yield from (threads(together) if together > 1 else serial)(job, items, digests)
            return
        with local_scheduler(several, memory_limit) as address:
            yield from existing_cluster(address)(job, items, digests)

    return run


def processes(workers: int, threads: int) -> Executor:
    """Compute tasks in Dask worker processes on this machine, without a limit of their memory.

    Parameters
    ----------
    workers, threads : int
        Maximum number of processes, and number of threads that libraries may use in each.
    """

    def run(job: Work, items: Sequence[WorkItem], digests: Digests) -> Iterator[Any]:
        with local_scheduler(min(workers, len(items)), 0, threads) as address:
            yield from existing_cluster(address)(job, items, digests)

    return run


def named_cluster(
    name: str, workers: int, *, worker_seconds: float = WORKER_SECONDS, stack: ExitStack | None = None
) -> Executor:
    """Compute ledger chunks on a cluster of a batch system or of Kubernetes that exists during the pass.

    Parameters
    ----------
    name : str
        One of `natgrad.compute.clusters.CLUSTERS`.
    workers : int
        Worker processes to request.
    worker_seconds : float
        See `existing_cluster`. There is no limit on the time until the first worker starts.
    stack : ExitStack, optional
        The first work starts the cluster, and it exists until the stack is closed. Default: each work has its own.
    """
    addresses: list[str] = []

    def run(job: Work, items: Sequence[WorkItem], digests: Digests) -> Iterator[Any]:
        if not items:
            return
        with ExitStack() as own:
            if not addresses or stack is None:
                addresses[:] = [(stack or own).enter_context(named_scheduler(name, workers))]
            yield from existing_cluster(addresses[0], worker_seconds=worker_seconds)(job, items, digests)

    return run


def existing_cluster(
    address: str, *, connect_seconds: float = 10.0, worker_seconds: float = WORKER_SECONDS
) -> Executor:
    """Compute ledger chunks on the workers of a running Dask scheduler.

    Each worker is checked first, even if it joins later (`natgrad.compute.worker_checks`). Tasks go to the workers
    that pass the check. The others cause a warning.

    Parameters
    ----------
    address : str
        For example ``tcp://host:8786``. The workers need this package and access to the paths of the stores.
    connect_seconds : float
        Seconds within which the scheduler must respond.
    worker_seconds : float
        Seconds after which the pass fails if no worker is connected, or none passes the check.

    Raises
    ------
    Unavailable
        If the scheduler does not respond or is lost during the pass, if there is no worker for the tasks, or if the
        workers of a task die repeatedly. Finished ledger chunks are kept.
    """

    def run(job: Work, items: Sequence[WorkItem], digests: Digests) -> Iterator[Any]:
        if not items:  # there is no need to wait for a scheduler
            return
        from distributed import CancelledError, KilledWorker
        from distributed.client import ClosedClientError
        from distributed.comm.core import CommClosedError

        client = _connected(address, connect_seconds)
        finished = 0

        def resuming() -> str:
            done = f"{finished} of {len(items)} chunks are done and kept"
            return f"{job.again} ({done})"

        try:
            with closing(client), worker_check(job) as check:
                for chunk in _Dispatch(client, job, items, digests, check, worker_seconds).run():
                    finished += 1
                    yield chunk
        except (CancelledError, ClosedClientError, CommClosedError) as error:
            raise Unavailable(
                f"the Dask scheduler was lost: {error}",
                where=address,
                why="the scheduler ended, or the network connection was lost",
                remedy=f"check that it is running, and {resuming()}",
            ) from error
        except (KilledWorker, _LostTask) as error:
            lost = error if isinstance(error, _LostTask) else _LostTask(str(error.task), error.allowed_failures + 1)
            raise Unavailable(
                f"the workers of one task died {lost.count} times",
                where=f"{address}, task {lost.task}",
                why="they had less memory than projected for the pass, or their jobs or hosts ended",
                remedy=f"check the log of the worker, start workers with at least --memory-limit, and {resuming()}",
            ) from error
        except _NoWorkers as error:
            start = "correct these workers" if error.problems else "start workers (dask worker)"
            raise Unavailable(
                f"no worker could take the tasks of this pass for {worker_seconds:g} s",
                where=address,
                why="; ".join(map(str, error.problems)) or "no worker is connected to the scheduler",
                remedy=f"{start}, or wait longer with --worker-timeout, and {resuming()}",
            ) from error

    return run


def require_scheduler(address: str, *, connect_seconds: float = 10.0) -> None:
    """Check that a Dask scheduler responds (Unavailable if it does not); see `existing_cluster`."""
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
            f"the Dask scheduler does not respond: {getattr(error, 'strerror', None) or error}",
            where=address,
            why="it is not running, the address is wrong, or it requires TLS",
            remedy="start a scheduler (dask scheduler) and pass its address, or omit --scheduler",
        ) from error


def _wait_for_port(host: str, port: int, seconds: float) -> None:
    """Wait until a port accepts connections; raise OSError on a timeout.

    A Dask client that cannot connect would retry until the interpreter exits, and then print a traceback.
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


def _chunks_in_flight(tasks: int, items: Sequence[WorkItem]) -> int:
    """Return the number of ledger chunks with this many tasks: at least two, so that workers are not idle."""
    return max(2, math.ceil(tasks / max((len(item.tiles) for item in items), default=1)))


def _result(future: Any) -> Any:
    """Return the result of a finished task, or _LOST if it does not arrive.

    If the worker that stores the result is lost, the task must run again, but there may be no worker for it.
    """
    try:
        return future.result(timeout=_RESULT_SECONDS)
    except TimeoutError:
        if future.status == "error":  # the task raised it
            raise
        return _LOST


def _key(stage: str, name: str) -> str:
    """Return the name of a task. Dask's dashboard shows the words before the identifier: natgrad and the stage."""
    return f"natgrad-{stage}-{name}"


class _LostTask(Exception):
    """Error for a task whose workers were all lost several times."""

    def __init__(self, task: str, count: int) -> None:
        super().__init__(task)
        self.task, self.count = task, count


class _NoWorkers(Exception):
    """Error that no worker can take tasks, with the problems of the connected workers."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems


@dataclass
class _Running:
    """A ledger chunk whose tasks are on the scheduler.

    Attributes
    ----------
    item : WorkItem
    losses : int
        Number of times that all of its workers were lost.
    workers : frozenset of str
        Workers to which its tasks are restricted; empty if they can run on any.
    future : Future
    """

    item: WorkItem
    losses: int
    workers: frozenset[str]
    future: Any


class _Dispatch:
    """Tasks of a pass on the workers of a scheduler that pass the check.

    Dask chooses the workers until a worker fails the check. From then on, tasks are restricted to the others. A new
    worker checks itself before its first task, and reports a problem as the result of that task.
    """

    def __init__(
        self,
        client: Any,
        job: Work,
        items: Sequence[WorkItem],
        digests: Digests,
        check: WorkerCheck,
        seconds: float,
    ) -> None:
        from distributed import as_completed

        self._client, self._job, self._items, self._digests = client, job, items, digests
        self._check, self._function, self._seconds = check, check.function, seconds
        self._waiting = deque((item, 0) for item in items)
        self._running: dict[str, _Running] = {}
        self._finishing = as_completed(loop=client.loop, with_results=True, raise_errors=False)
        self._names = itertools.count()
        # By address: the connected workers, the task that checks each, and the problems found.
        self._workers: frozenset[str] = frozenset()
        self._checks: dict[str, Any] = {}
        self._problems: dict[str, Problem] = {}
        self._queried = self._checked = -math.inf
        self._without_since: float | None = None

    @property
    def _fit(self) -> frozenset[str]:
        return self._workers - self._problems.keys()

    def run(self) -> Iterator[Any]:
        """Compute all ledger chunks; yield each when it is finished."""
        if "dashboard" in self._client.scheduler_info(n_workers=-1)["services"]:
            _log.info("Dask dashboard: %s", self._client.dashboard_link)
        self._query()
        end = time.monotonic() + _CHECK_SECONDS
        while time.monotonic() < end and not all(check.done() for check in self._checks.values()):
            time.sleep(_CHECK_POLL_SECONDS)
        self._queried = -math.inf
        while self._waiting or self._running:
            if time.monotonic() - self._queried >= _QUERY_SECONDS:
                self._query()
            self._fill()
            with self._finishing.thread_condition:
                if not self._finishing.has_ready():
                    self._finishing.thread_condition.wait(_QUERY_SECONDS)
            while self._finishing.has_ready():
                # The result of a task whose worker was lost arrives when the task has run again.
                future, found = next(self._finishing)
                running, status = self._running.pop(future.key, None), future.status
                del future  # a future that is referenced keeps its result on the cluster
                if running is None:  # it was submitted again
                    continue
                if status == "error":
                    raise found[1].with_traceback(found[2])
                if isinstance(found, BaseException):  # CancelledError
                    raise found
                problem = Problem.of(found)
                if problem is None:
                    del running
                    yield found
                    self._fill()
                else:
                    self._report(problem)
                    self._waiting.appendleft((running.item, running.losses))

    def _fill(self) -> None:
        """Submit ledger chunks until the workers have enough tasks."""
        if not self._fit and self._problems:
            return
        ahead = _chunks_in_flight(self._job.limits.tasks_per_worker * max(1, len(self._fit)), self._items)
        while self._waiting and len(self._running) < ahead:
            item, losses = self._waiting.popleft()
            workers = self._fit if self._problems else frozenset()
            future = self._submit(item, workers)
            self._running[future.key] = _Running(item, losses, workers, future)
            self._finishing.add(future)

    def _submit(self, item: WorkItem, workers: frozenset[str]) -> Any:
        job, start = self._job, item.chunk.start
        name = f"{job.name}-{start}-{next(self._names)}"
        options = {"pure": False, "workers": sorted(workers) or None}

        def submit(key: str, parts: list[Any], function: Callable[..., Any], *arguments: Any) -> Any:
            sent = self._check.arguments(function, *arguments)
            return self._client.submit(self._function, *sent, *parts, key=key, **options)

        if len(item.tiles) == 1:
            return submit(_key(job.kind, name), [], job.compute_item, item, self._digests()[start])
        tiles = enumerate(item.tiles)
        parts = [submit(_key("tile", f"{name}-{index}"), [], job.compute, tile) for index, tile in tiles]
        return submit(_key(job.kind, name), parts, job.finish, item.chunk, self._digests()[start])

    def _query(self) -> None:
        """Determine which workers are connected and pass the check, and which tasks have lost their workers."""
        from distributed.client import ClosedClientError

        self._queried = time.monotonic()
        scheduler = self._client.scheduler_info(n_workers=-1)
        if "workers" not in scheduler:
            raise ClosedClientError("the client could not connect again")
        self._workers = frozenset(scheduler["workers"])
        for address in [one for one in self._problems if one not in self._workers]:
            del self._problems[address]
        for address in [one for one in self._checks if one not in self._workers]:
            self._checks.pop(address).cancel()
        again = self._queried - self._checked >= _RECHECK_SECONDS
        for address in self._workers:
            check = self._checks.get(address)
            if check is not None and check.status == "finished" and (found := _result(check)) is not _LOST:
                problem = Problem.of(found)
                if problem is None:
                    self._problems.pop(address, None)
                else:
                    self._report(problem)
            if check is None or (again and address in self._problems and check.done()):
                self._checked = self._queried
                name = _key("check", f"{self._job.name}-{next(self._names)}")
                self._checks[address] = self._client.submit(
                    self._function, *self._check.arguments(), key=name, pure=False, workers=[address], priority=1
                )
        self._submit_lost_again()
        self._require_workers()

    def _report(self, problem: Problem) -> None:
        if self._problems.get(problem.worker) != problem:
            _log.warning("%s", problem)
        self._problems[problem.worker] = problem

    def _submit_lost_again(self) -> None:
        """Resubmit tasks that are restricted to workers that no longer exist."""
        for key, running in list(self._running.items()):
            if not running.workers or running.workers & self._fit:
                continue
            if running.losses == _LOSSES:
                raise _LostTask(key, _LOSSES + 1)
            del self._running[key]
            running.future.cancel()
            self._waiting.appendleft((running.item, running.losses + 1))

    def _require_workers(self) -> None:
        """Warn if no worker can take tasks, and raise _NoWorkers if this lasts too long."""
        if self._fit:
            self._without_since = None
            return
        now = time.monotonic()
        if self._without_since is None:
            self._without_since = now
            have = "no worker that passes the check" if self._workers else "no workers"
            _log.warning("the Dask scheduler has %s; waiting for one for %g s", have, self._seconds)
        if now - self._without_since >= self._seconds:
            raise _NoWorkers(list(self._problems.values()))
