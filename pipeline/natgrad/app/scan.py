"""Scan a folder for runs: find them, and process those that changed.

The outcome of processing a run is recorded in its OUT, with the identity of the log at that time. For an unchanged
run, only the names, sizes and times of its files are listed.

Each run is processed in another process (`natgrad.app.worker`), so that a run that hangs, crashes or exhausts
memory fails alone. Folders are searched for runs there as well, because that may call readers of other packages.

The Prefect flows use the same functions: `scan_root` processes a run through a callback.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Unpack

import psutil
from filelock import FileLock, Timeout

from natgrad.app import declarations, options
from natgrad.app.folder import RunFolder
from natgrad.app.progress import StageProgress
from natgrad.app.run import Analysis
from natgrad.app.stages import process_stages
from natgrad.app.summaries import ScannedRun, ScanSummary
from natgrad.app.worker import Worker
from natgrad.compute.clusters import named_scheduler
from natgrad.schema.errors import InputError, Unavailable
from natgrad.schema.logs import logger
from natgrad.schema.times import now
from natgrad.schema.version import RESULTS_VERSION, __version__
from natgrad.sources.changes import changed_lately
from natgrad.sources.opening import holds_run
from natgrad.sources.run_file import RUN_FILE
from natgrad.storage import Location, Storage, network_errors, open_all, open_out, open_storage, require_local
from natgrad.store.journal import Journal

__all__ = [
    "LOCK_FILE",
    "OUTCOME_FILE",
    "Busy",
    "FoundRun",
    "Outcome",
    "check_folders",
    "error_parts",
    "find_runs",
    "listing",
    "only_processor",
    "process_in",
    "process_once",
    "recorded_options",
    "scan",
    "scan_root",
    "scanned_runs",
]

_OUTCOME, _ROOT = ".outcome", ".scan"
"""Names of records, which are files with the suffix ``.json``."""

OUTCOME_FILE, LOCK_FILE = f"{_OUTCOME}.json", ".processing.lock"
"""Files in OUT of a run: its outcome, and the lock of the process that works on it."""

_log = logger(__name__)

_EXECUTION = ("workers", "scheduler", "cluster", "worker_timeout", "memory_limit")
"""Options of the machines that process a run: they do not change the results."""

_SEARCH_SECONDS = 60.0
"""Seconds after which the search of one folder for a run is stopped."""

HoldsRun = Callable[..., bool]
"""Function that returns whether a folder is a run; see `natgrad.sources.opening.holds_run`."""


# Runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundRun:
    """A run below a root: its log and the folder of its results.

    Attributes
    ----------
    name : str
        Path of the log below the root.
    source, out : Path
    """

    name: str
    source: Path
    out: Path


def find_runs(
    root: str | Path,
    out: str | Path,
    *,
    sweep: bool = False,
    store: str | None = None,
    holds: HoldsRun = holds_run,
) -> list[FoundRun]:
    """Find the runs below a folder by their contents, and return them in the order of their names.

    A folder that contains a log in any of `natgrad.sources.formats.FORMATS` is a run, including its subfolders.
    OUT, hidden folders and Zarr stores are not searched, and linked folders are searched once.

    Parameters
    ----------
    root : path
        Folder of logs.
    out : path
        Folder for the results: the run ``root/a/b`` is processed into ``out/a/b``. It may be below the root.
    sweep : bool
        Return the folders that contain runs; each is a sweep.
    store : str, optional
        Requested kind of storage of a new OUT.
    holds : callable
        Returns whether a folder is a run. A folder for which it fails is a run, which then fails for that reason.

    Raises
    ------
    InputError
        See `check_folders`.
    """
    root, out = check_folders(root, out, store)
    seen = {_inode(out)} if out.is_dir() else set()
    found = set(_names(root, out, ".", seen, sweep, holds))
    return [FoundRun(name, root / name, out / name) for name in sorted(found)]


def check_folders(root: Location, out: Location, store: str | None = None) -> tuple[Path, Path]:
    """Check the folders of a scan without reading or writing anything in them.

    Parameters
    ----------
    root, out : path
        See `find_runs`.
    store : str, optional
        Requested kind of storage of a new OUT.

    Returns
    -------
    root, out : Path

    Raises
    ------
    InputError
        If one of them is not on this machine, ROOT is not a folder, or OUT cannot be of this kind.
    """
    found, local_out = require_local(root, "ROOT"), require_local(out, "OUT")
    if not found.is_dir():
        raise InputError(
            "no such folder", where=str(found), remedy="pass the folder below which the runs are logged"
        )
    open_out(local_out, kind=store)
    return found, local_out


def _inode(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _names(
    root: Path, out: Path, name: str, seen: set[tuple[int, int]], sweep: bool, holds: HoldsRun
) -> Iterator[str]:
    """Yield the names of the runs in a folder below the root."""
    folder = root / name
    try:
        if _inode(folder) in seen or (folder / "zarr.json").exists():
            return
        seen.add(_inode(folder))
        # A run with an outcome remains a run even if its log is gone. Its error then states what is missing.
        outcome = Outcome.of(out / name)
        recorded = outcome is not None and outcome.options.get("sweep", False) == sweep
        if recorded and outcome is not None and not outcome.error:
            yield name
            return
        if holds(folder):
            yield Path(name).parent.as_posix() if sweep else name
            return
        with os.scandir(folder) as entries:
            below = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except Exception:
        # A folder that cannot be searched may be a run. It then fails under its own name, without affecting others.
        yield name
        return
    empty = True
    for entry in below:
        for found in _names(root, out, entry if name == "." else f"{name}/{entry}", seen, sweep, holds):
            empty = False
            yield found
    if not empty:
        return
    # The error of a failed run states what is missing, unless runs were found below its folder.
    if recorded:
        yield name
    # One file of all steps, if there is nothing else that it could belong to.
    elif holds(folder, in_one_file=True):
        yield Path(name).parent.as_posix() if sweep else name


def listing(source: Location) -> str:
    """Compute the identity of a log: a digest of its location and of name, size, times and inode of every file.

    The identity of a run file changes once more when its logs stop changing. Steps that a log of scalars did not
    contain before are then ingested.
    """
    storage = open_storage(source)
    path = storage.local_path
    location = str(storage) if path is None else os.path.abspath(path)  # noqa: PTH100  (one spelling, with its links)
    digest, newest = hashlib.sha256(f"{location}\n".encode("utf-8", "surrogateescape")), 0
    for name, status in sorted(_objects(storage) if path is None else _files(path)):
        digest.update(f"{name}\0{status}\n".encode("utf-8", "surrogateescape"))
        newest = max(newest, status[1])
    if path is not None and (path / RUN_FILE).is_file() and changed_lately(newest):
        digest.update(b"growing")
    return digest.hexdigest()


def _objects(folder: Storage) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name in folder.list():
        with suppress(FileNotFoundError):  # a folder
            yield name, (folder / name).stat(fresh=False)


def _files(folder: Path | str, below: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            # The next listing shows that the file was deleted.
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(entry.path, f"{below}{entry.name}/")
                else:
                    status = entry.stat()
                    # The status time and the inode reveal files that became readable, or that were copied with
                    # their modification times.
                    identity = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
                    yield below + entry.name, identity


# Outcomes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Outcome of the last processing of a run.

    Attributes
    ----------
    source : str
        The log.
    listing : str
        Identity of the log before it was read.
    options : dict
        Options of the run; see `recorded_options`.
    summary : dict
        Summary; empty if processing failed.
    error : dict
        Error: ``what``, ``where``, ``why``, ``do``, and ``heals`` (a retry may succeed); empty if processing
        succeeded.
    version : str
        Version of natgrad, for information.
    results_version : int
        Version of the results. A run with another version is processed again.
    time : str
        Time at which processing ended, ISO 8601 in UTC.
    others : list of str
        Additional logs of the run.
    """

    source: str
    listing: str
    options: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    version: str = __version__
    results_version: int = RESULTS_VERSION
    time: str = field(default_factory=now)
    others: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, out: Location) -> Outcome | None:
        """Read the outcome recorded in OUT; return None if there is none that can be read."""
        try:
            record = Journal(open_storage(out)).read(_OUTCOME)
            return cls(**{name: value for name, value in record.items() if name != "crc32c"})
        except (OSError, InputError, TypeError):
            return None

    def record(self, out: Location) -> None:
        """Record the outcome in OUT."""
        Journal(open_storage(out)).write(_OUTCOME, _plain(asdict(self)))

    def is_current(self, listing: str, values: Mapping[str, Any], out: Location) -> bool:
        """Return True if the log, the options, the results version and the stores are unchanged.

        Processing the run again would then change nothing. After an error in the input, this is True until the log
        or an option changes. After an error that may heal by itself, it is False.
        """
        here = (listing, RESULTS_VERSION, _comparable(values))
        if (self.listing, self.results_version, _comparable(self.options)) != here:
            return False
        if self.error:
            return not self.error["heals"]
        folder = RunFolder.of(out)
        return folder.results.exists() and folder.report.exists()


def recorded_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that an outcome records: those of a run, except the storage kind of a new OUT."""
    selected = declarations.selected(options.RunOptions, values)
    return {name: value for name, value in selected.items() if name != "store"}


def _comparable(values: Mapping[str, Any]) -> Any:
    """Return the options that affect the results, in the form in which they are read from a file."""
    return _plain({name: value for name, value in values.items() if name not in _EXECUTION})


def error_parts(error: BaseException) -> dict[str, Any]:
    """Return the parts of an error for an `Outcome`: what, where, why, do, and heals."""
    heals = not isinstance(error, InputError) or isinstance(error, Unavailable)
    if isinstance(error, InputError):
        return {"what": error.what, "where": error.where, "why": error.why, "do": error.remedy, "heals": heals}
    again = "run it again; finished work is kept"
    return {"what": f"{type(error).__name__}: {error}", "where": "", "why": "", "do": again, "heals": heals}


def _plain(values: Mapping[str, Any]) -> Any:
    """Return values in the form in which they are read from a file."""
    return json.loads(json.dumps(values, default=str))


class Busy(Unavailable):
    """Another process is working on the run."""


@contextmanager
def only_processor(out: Location) -> Iterator[None]:
    """Lock OUT, so that one process works on a run at a time, on any host that supports locks on this file system.

    The lock is released when the process that holds it ends, even if it is killed.

    Raises
    ------
    Busy
        If another process holds the lock.
    """
    storage = open_storage(out)
    if storage.local_path is None:
        with _only_processor_of_objects(storage):
            yield
        return
    path = storage.local_path / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        # `status` acquires the lock for an instant to test it.
        lock.acquire(timeout=0.2)
    except Timeout as error:
        raise Busy(
            "another process is working on this run",
            where=str(out),
            why="two scans found the run, or it was also started manually",
            remedy="no action is needed: the other process continues, and the next scan processes later steps",
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _only_processor_of_objects(out: Storage) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(network_errors(out))
            stack.enter_context((out / "processing").lock("run"))
        except Unavailable as error:
            raise Busy(error.what, where=str(out), why=error.why, remedy=error.remedy) from error
        yield


# Processing ---------------------------------------------------------------------------------------------------


def process_once(
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    values: Mapping[str, Any],
    work: Callable[[], dict[str, Any]],
    *,
    known: Outcome | None,
    on_failure: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Process a run and record the outcome in OUT, which the caller has locked with `only_processor`.

    Parameters
    ----------
    source, out : path
    values : mapping
        Validated options.
    work : callable
        Processes the run, and returns the summary in its JSON form.
    known : Outcome, optional
        Outcome seen before scheduling. If it changed since, another process has already processed the run.
    on_failure : callable, optional
        Called with the parts of an error before it is raised.

    Raises
    ------
    Busy
        If another process has already processed the run.
    """
    log, *others = open_all(source)
    with network_errors(log):
        identity = listing(log) if log.local_path is None or log.is_folder() else ""
    recorded = recorded_options(values)
    outcome = Outcome.of(out)
    if outcome is not None and outcome != known and outcome.is_current(identity, recorded, out):
        raise Busy(
            "another process has already processed this run",
            where=str(out),
            why="two scans found the run",
            remedy="no action is needed: the next scan processes later steps",
        )
    common: dict[str, Any] = {"options": recorded, "others": list(map(str, others))}
    try:
        summary = work()
    except Exception as error:
        parts = error_parts(error)
        Outcome(str(log), identity, error=parts, **common).record(out)
        if on_failure is not None:
            on_failure(parts)
        raise
    Outcome(str(log), identity, summary=summary, **common).record(out)
    return summary


def scanned_runs(out: Path, holds: HoldsRun) -> list[FoundRun]:
    """Find the runs of the last scan into a folder, as `find_runs`; return none if it was not scanned into."""
    with suppress(OSError, KeyError, InputError):
        scanned = Journal(open_storage(out)).read(_ROOT)
        return find_runs(Path(scanned["root"]), out, sweep=scanned["sweep"], holds=holds)
    return []


RunProcessor = Callable[[FoundRun, "Outcome | None", dict[str, Any], Worker], dict[str, Any]]
"""Function that processes a changed run: takes the run, its known outcome, the options and a worker; returns the
summary."""


def scan_root(root: str | Path, out: str | Path, values: Mapping[str, Any], process: RunProcessor) -> ScanSummary:
    """Find the runs below a folder and process those that changed since the last scan.

    Parameters
    ----------
    root, out : path
        See `find_runs`.
    values : mapping
        Validated options of `natgrad.app.options.ScanOptions`.
    process : callable
        Processes one run with a worker; see `process_in`. It is called from ``at_once`` threads, each with the
        context variables of the caller.

    Raises
    ------
    InputError
        If an option or a folder is not valid.
    Unavailable
        If a run changed, and the scheduler does not respond.
    """
    analysis = Analysis.of(values)
    of_run = declarations.selected(options.RunOptions, values) | {"cluster": None}
    memory = values["process_memory"] or psutil.virtual_memory().total // values["at_once"]
    workers = [Worker(values["stall_timeout"], memory) for _ in range(values["at_once"])]
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(workers)))
        for worker in workers:
            stack.callback(worker.close)
        # If the scan is interrupted, no further run is started.
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        search = partial(
            find_runs, sweep=values["sweep"], store=values["store"], holds=partial(_holds_run, workers[0])
        )
        found = search(root, out)
        # Workers of a cluster are needed only if a run changed.
        remote = (values["cluster"], values["scheduler"]) != (None, None)
        if remote and not all(_is_current(one, Outcome.of(one.out), of_run) for one in found):
            analysis.require_workers()
            if values["cluster"] is not None:
                scheduler = named_scheduler(values["cluster"], values["workers"] or 1)
                of_run["scheduler"] = stack.enter_context(scheduler)
        Journal(open_storage(out)).write(_ROOT, {"root": str(Path(root).absolute()), "sweep": values["sweep"]})
        idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in workers:
            idle.put(worker)
        started = {
            one.name: pool.submit(copy_context().run, _scan_run, one, of_run, process, idle)
            for one in sorted(found, key=_failed_before)
        }
        return ScanSummary.of(tuple(started[one.name].result() for one in found))


def _failed_before(found: FoundRun) -> bool:
    """Return True if a run failed in the last scan. Such runs come last, because they may take until a timeout."""
    outcome = Outcome.of(found.out)
    return outcome is not None and bool(outcome.error)


def _holds_run(worker: Worker, folder: Path, *, in_one_file: bool = False) -> bool:
    found = worker.call(_search, folder, in_one_file, where=str(folder), timeout=_SEARCH_SECONDS)
    return bool(found)


def _search(folder: Path, in_one_file: bool, progress: StageProgress) -> bool:
    """Search a folder for a run, in a worker."""
    return holds_run(folder, in_one_file=in_one_file)


def _is_current(found: FoundRun, outcome: Outcome | None, values: Mapping[str, Any]) -> bool:
    """Return True if a run has not changed since this outcome."""
    try:
        return outcome is not None and outcome.is_current(
            listing(found.source), recorded_options(values), found.out
        )
    except OSError:  # processing the run reports the problem
        return False


def _scan_run(
    found: FoundRun, values: dict[str, Any], process: RunProcessor, idle: SimpleQueue[Worker]
) -> ScannedRun:
    """Process a run if it changed."""
    outcome = Outcome.of(found.out)
    if outcome is not None and _is_current(found, outcome, values):
        if outcome.error:
            return ScannedRun(run=found.name, state="failed", what=outcome.error["what"], do=outcome.error["do"])
        return ScannedRun(run=found.name, state="unchanged")
    worker = idle.get()
    try:
        summary = process(found, outcome, values, worker)
    except Busy as busy:
        return ScannedRun(run=found.name, state="skipped", what=busy.what)
    except Exception as error:
        parts = error_parts(error)
        _log.error("%s failed: %s", found.name, error)
        return ScannedRun(run=found.name, state="failed", what=parts["what"], do=parts["do"])
    finally:
        idle.put(worker)
    return ScannedRun(run=found.name, state="processed", what=f"{summary['new_steps']} new steps")


@declarations.with_options(options.ScanOptions)
def scan(root: options.Root, out: options.RunsFolder, **values: Unpack[options.ScanOptions]) -> ScanSummary:
    """Process the runs below a folder that changed since the last scan.

    A run that fails, hangs, crashes or exhausts memory does not stop the others. It is processed again if its log
    or an option changes, or at every scan if the error may heal by itself. A run that another process is working on
    is skipped.

    Parameters
    ----------
    **options

    Returns
    -------
    ScanSummary

    Raises
    ------
    InputError
        If an option is not valid, or ROOT is not a folder.
    Unavailable
        If a run changed, and the scheduler does not respond.
    """
    return scan_root(root, out, values, _process_run)


def _process_run(found: FoundRun, known: Outcome | None, values: dict[str, Any], worker: Worker) -> dict[str, Any]:
    with only_processor(found.out):
        work = partial(process_in, worker, found, values)
        return process_once(found.source, found.out, values, work, known=known)


def process_in(worker: Worker, found: FoundRun, values: Mapping[str, Any]) -> dict[str, Any]:
    """Process a run in a worker; return the summary in its JSON form."""
    summary: dict[str, Any] = worker.call(
        process_stages, found.source, found.out, dict(values), where=str(found.source)
    )
    return summary
