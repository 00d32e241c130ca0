"""Many runs below one folder: which there are, which have news, and what came of each.

What was done with a run is remembered in its OUT, beside the identity of the log as it was then: a run of which
nothing changed is passed over after one look at the names, sizes and times of its files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from natgrad.app.folder import RunFolder
from natgrad.schema.errors import InputError, Unavailable
from natgrad.schema.version import __version__
from natgrad.sources.changes import changed_lately
from natgrad.sources.opening import holds_run, open_sources
from natgrad.sources.run_file import RUN_FILE
from natgrad.storage import Location, Storage, network_errors, open_storage, require_local
from natgrad.store import Trajectory

__all__ = [
    "FoundRun",
    "Held",
    "Outcome",
    "error_parts",
    "find_runs",
    "listing",
    "only_processor",
    "remember_root",
    "status",
]

_OUTCOME, _LOCK, _ROOT = ".outcome.json", ".processing.lock", ".watched.json"

_PLACES = ("workers", "scheduler", "cluster")
"""Options that say where a run is processed: they do not change what comes of it."""


# Runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundRun:
    """A run below a root: its log, and the folder of what is made of it.

    Attributes
    ----------
    name : str
        Path of the log below the root.
    source, out : Path
    """

    name: str
    source: Path
    out: Path


def find_runs(root: Path, out: Path) -> list[FoundRun]:
    """Find the runs below a folder, by content, in the order of their names.

    A folder that holds a log of any of `natgrad.sources.formats.FORMATS` is a run, and what is in it belongs to
    it. OUT, hidden folders and Zarr stores are not entered; links are, once.

    Parameters
    ----------
    root : Path
        Folder of logs.
    out : Path
        Folder of what is made of them: the run ``root/a/b`` is processed into ``out/a/b``. It may be in the root.

    Raises
    ------
    InputError
        Where the root is no folder that can be listed.
    """
    root, out = require_local(root, "ROOT"), require_local(out, "OUT")
    if not root.is_dir():
        raise InputError(
            "no such folder", where=str(root), remedy="give the folder below which the runs are logged"
        )
    seen = {_inode(out)} if out.is_dir() else set()
    return [FoundRun(name, root / name, out / name) for name in sorted(_names(root, out, ".", seen))]


def _inode(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _names(root: Path, out: Path, name: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Names of the runs in a folder below the root."""
    folder = root / name
    try:
        if _inode(folder) in seen or (folder / "zarr.json").exists():
            return
        seen.add(_inode(folder))
        # A run that was met before is one, whatever is left of its log: then it is told what is missing.
        if (out / name / _OUTCOME).exists() or holds_run(folder):
            yield name
            return
        with os.scandir(folder) as entries:
            below = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        # What cannot be looked into may be a run: one that fails, alone and by its name.
        yield name
        return
    empty = True
    for entry in below:
        for found in _names(root, out, entry if name == "." else f"{name}/{entry}", seen):
            empty = False
            yield found
    # One file of all steps, where there is nothing else that it could belong to.
    if empty and holds_run(folder, in_one_file=True):
        yield name


def listing(source: Location) -> str:
    """Return the identity of a log: a digest of the name, size, time of change and of status of every file in it.

    That of a run file also depends on whether something changed lately: steps that a log of scalars did not have
    then are read when it has settled.
    """
    digest, newest = hashlib.sha256(), 0
    storage = open_storage(source)
    path = storage.local_path
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
            # What is gone by now is told by the next look at the folder.
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(entry.path, f"{below}{entry.name}/")
                else:
                    status = entry.stat()
                    # The time of status tells of what was made readable, or copied with its times.
                    yield below + entry.name, (status.st_size, status.st_mtime_ns, status.st_ctime_ns)


# What came of them -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came of the last processing of a run.

    Attributes
    ----------
    source : str
        The log.
    listing : str
        Identity of the log before it was read.
    options : dict
        What was asked for.
    summary : dict
        What was done; empty where it failed.
    error : dict
        Why it failed: ``what``, ``where``, ``why``, ``do``, and whether it ``heals``; empty where it did not.
    version : str
        Of natgrad.
    time : str
        When it ended, ISO 8601 in UTC.
    others : list of str
        Further logs of the run.
    """

    source: str
    listing: str
    options: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    version: str = __version__
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    others: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, out: Location) -> Outcome | None:
        """Outcome remembered in OUT; None where there is none that can be read."""
        try:
            return cls(**json.loads((open_storage(out) / _OUTCOME).get()))
        except (OSError, ValueError, TypeError):
            return None

    def remember(self, out: Location) -> None:
        """Keep it in OUT."""
        (open_storage(out) / _OUTCOME).put(_json(asdict(self)))

    def stands(self, listing: str, options: Mapping[str, Any], out: Location) -> bool:
        """Whether processing again comes to the same: log, options and version are, and the results are there.

        Bad input that was refused stays refused until the log or any option changes; what may heal does not stand.
        """
        if (self.listing, self.version, _what(self.options)) != (listing, __version__, _what(options)):
            return False
        if self.error:
            return not self.error["heals"]
        folder = RunFolder.of(out)
        return folder.results.exists() and folder.report.exists()


def _what(options: Mapping[str, Any]) -> Any:
    """Return the options that matter, as they are read back from a file."""
    return json.loads(json.dumps({n: v for n, v in options.items() if n not in _PLACES}, default=str))


def error_parts(error: BaseException) -> dict[str, Any]:
    """Parts of an error, for an `Outcome`: what, where, why, do, and whether trying again may heal it."""
    heals = not isinstance(error, InputError) or isinstance(error, Unavailable)
    if isinstance(error, InputError):
        return {"what": error.what, "where": error.where, "why": error.why, "do": error.remedy, "heals": heals}
    again = "run again: what is finished is kept"
    return {"what": f"{type(error).__name__}: {error}", "where": "", "why": "", "do": again, "heals": heals}


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, default=str).encode()


class Held(Unavailable):
    """Another process is working on the run."""


@contextmanager
def only_processor(out: Location) -> Iterator[None]:
    """Hold OUT: one processing at a time, of any process on any host that locks files on this file system.

    The lock ends with the process that holds it, however it ends.

    Raises
    ------
    Held
        Where another one holds it.
    """
    storage = open_storage(out)
    if storage.local_path is None:
        with _only_processor_of_objects(storage):
            yield
        return
    path = storage.local_path / _LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        # `status` holds a lock for an instant, to see whether another one does.
        lock.acquire(timeout=0.2)
    except Timeout as error:
        raise Held(
            "another process is working on this run",
            where=str(out),
            why="two watchers found it, or it was started by hand too",
            remedy="nothing: that one goes on, and the next scan takes what is new then",
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
            raise Held(error.what, where=str(out), why=error.why, remedy=error.remedy) from error
        yield


# Status ------------------------------------------------------------------------------------------------------


def remember_root(root: Path, out: Path) -> None:
    """Keep in OUT which folder it is made from, for `status`."""
    (open_storage(out) / _ROOT).put(_json({"root": str(Path(root).absolute())}))


def status(out: Path) -> list[dict[str, Any]]:
    """Say of every run below OUT how far it is.

    Parameters
    ----------
    out : Path
        Folder of the OUT of many runs, of `natgrad watch` or made by hand.

    Returns
    -------
    list of dict
        ``run``; ``state`` (``done``, ``behind``, ``failed``, ``working``, ``waiting``); ``last_step`` and ``steps``
        in its trajectory; ``lag``, steps logged since (None where the log cannot be listed); ``processed``, when;
        ``error``, what failed the last time, and ``do``, what to do about it.

    Raises
    ------
    InputError
        Where there is no run.
    """
    out = require_local(out, "ROOT")
    runs: dict[str, Path | None] = dict.fromkeys(_outs(out))
    with suppress(OSError, ValueError, KeyError, InputError):
        root = Path(json.loads((out / _ROOT).read_bytes())["root"])
        runs |= {found.name: found.source for found in find_runs(root, out)}
    if not runs:
        raise InputError(
            "no run below this folder", where=str(out), remedy="give the OUT that natgrad watch or serve was given"
        )
    return [{"run": name, **_status(out / name, source)} for name, source in sorted(runs.items())]


def _outs(out: Path) -> Iterator[str]:
    for folder, below, files in os.walk(out):
        if RunFolder.of(folder).trajectory.exists() or _OUTCOME in files:
            below.clear()
            yield Path(folder).relative_to(out).as_posix()


def _status(out: Path, source: Path | None) -> dict[str, Any]:
    outcome, steps, last = Outcome.of(out), 0, None
    logs = [] if source is None else [open_storage(source)]
    with suppress(InputError):
        states = Trajectory(RunFolder.of(out).trajectory)
        logs = logs or [open_storage(states.source)]
        steps, last = states.n_states, int(states.scalar("step")[-1]) if states.n_states else None
    if outcome:
        logs = [open_storage(log) for log in (outcome.source, *outcome.others)]
    lag = _lag(logs, last, outcome.options if outcome else {}) if logs else None
    error = outcome.error if outcome else {}
    changed = False
    if outcome is not None and logs[0].local_path is not None and logs[0].is_folder():
        changed = listing(logs[0]) != outcome.listing
    if _is_held(out):
        state = "working"
    elif error:
        state = "failed"
    elif last is None:
        state = "waiting"
    else:
        state = "behind" if lag or changed else "done"
    return {
        "state": state,
        "steps": steps,
        "last_step": last,
        "lag": lag,
        "processed": outcome.time if outcome else None,
        "error": error.get("what"),
        "do": error.get("do"),
    }


def _lag(sources: Sequence[Storage], last: int | None, options: Mapping[str, Any]) -> int | None:
    try:
        with network_errors(*sources):
            steps = open_sources(sources, *(options.get(name) for name in ("format", "mapping", "shift"))).steps()
    except InputError:
        return None
    return sum(last is None or step.number > last for step in steps)


def _is_held(out: Path) -> bool:
    if not (out / _LOCK).exists():
        return False
    try:
        with only_processor(out):
            return False
    except Held:
        return True
    except OSError:  # it may be another user's
        return False
