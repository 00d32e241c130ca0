"""Check on each Dask worker, before its first task, that it can run the tasks of a pass.

A worker must have the same version of this package, and be able to read and write OUT at the same location. Workers
may join at any time, and may lack the package. Therefore each task is sent as `run_checked`, whose code is part of
the task and needs only the standard library and distributed. Everything else is pickled, and a worker unpickles it
after it has passed the check.
"""

from __future__ import annotations

import pickle
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from natgrad.compute.work import Work
from natgrad.schema.layout import LAYOUT_VERSION
from natgrad.schema.version import RESULTS_VERSION, __version__

__all__ = ["Problem", "WorkerCheck", "worker_check"]


@dataclass(frozen=True)
class Problem:
    """Reason why a worker cannot take tasks.

    Attributes
    ----------
    worker : str
        Address of the worker.
    host : str
        Name of its host.
    what, remedy : str
    """

    worker: str
    host: str
    what: str
    remedy: str

    @classmethod
    def of(cls, result: Any) -> Problem | None:
        """Return the problem in the result of a task; None if there is no problem."""
        return cls(**result) if isinstance(result, dict) else None

    def __str__(self) -> str:
        return f"worker {self.worker} on host {self.host}: {self.what}; {self.remedy}"


@dataclass(frozen=True)
class WorkerCheck:
    """The requirements of a pass on its workers.

    Attributes
    ----------
    requirements : dict
        Argument of `run_checked`.
    """

    requirements: dict[str, Any]

    @property
    def function(self) -> Callable[..., Any]:
        """`run_checked`, in a form whose code is sent to the workers."""
        # Functions of the module __main__ are sent by value.
        function = types.FunctionType(run_checked.__code__, {"__builtins__": __builtins__}, run_checked.__name__)
        function.__module__ = "__main__"
        return function

    def arguments(self, function: Callable[..., Any] | None = None, *arguments: Any) -> tuple[Any, ...]:
        """Return the arguments with which `function` checks a worker and then, optionally, calls a function."""
        from distributed.protocol.pickle import dumps

        return self.requirements, None if function is None else dumps((function, arguments))


@contextmanager
def worker_check(job: Work) -> Iterator[WorkerCheck]:
    """Write a file to OUT by which workers recognize the storage. It is removed when the context ends."""
    out = job.out.unversioned()
    marker = out / f".check-{job.name}.tmp"
    marker.put(job.name.encode())
    try:
        yield WorkerCheck(
            {
                "name": job.name,
                "versions": {"natgrad": __version__, "results": RESULTS_VERSION, "layout": LAYOUT_VERSION},
                "marker": pickle.dumps(marker),
                # The client writes the ledger of a storage with versions.
                "writes": job.writes,
            }
        )
    finally:
        # A worker that is killed during its check leaves a file.
        for name in out.list():
            if name.startswith(marker.name):
                with suppress(FileNotFoundError):
                    (out / name).delete()


def run_checked(requirements: dict[str, Any], call: bytes | None, *parts: Any) -> Any:
    """Check this worker once per pass, and call a function.

    This function must not use anything else from this module, because the worker may not have it.

    Parameters
    ----------
    requirements : dict
        See `worker_check`.
    call : bytes, optional
        Pickled function and arguments.
    *parts : object
        Results of other tasks: the last argument of the function, as a list.

    Returns
    -------
    object
        Result of the function. If a check failed, here or in one of the parts, the attributes of a `Problem`.
    """
    import os
    import pickle
    import socket
    import sys

    from distributed import get_worker

    for part in parts:
        if isinstance(part, dict):
            return part

    def problem(what: str, remedy: str) -> dict[str, str]:
        return {"worker": get_worker().address, "host": socket.gethostname(), "what": what, "remedy": remedy}

    # A module of this process remembers which passes it has been checked for.
    checked = sys.modules.setdefault("_natgrad_checked", type(sys)("_natgrad_checked")).__dict__
    if requirements["name"] not in checked:
        expected = requirements["versions"]
        install = (
            f"install natgrad-pipeline {expected['natgrad']}, as on the client, for {sys.executable} on that host, "
            "and restart the worker"
        )
        try:
            from natgrad.schema.layout import LAYOUT_VERSION
            from natgrad.schema.version import RESULTS_VERSION, __version__
        except ImportError as error:
            return problem(f"natgrad {expected['natgrad']} cannot be imported: {error}", install)
        versions = {"natgrad": __version__, "results": RESULTS_VERSION, "layout": LAYOUT_VERSION}
        if versions != expected:
            found, wanted = (", ".join(f"{k} {v}" for k, v in each.items()) for each in (versions, expected))
            return problem(f"its versions are {found}, but those of the client are {wanted}", install)
        marker = pickle.loads(requirements["marker"])
        out = marker.parent
        mount = f"make the storage of OUT available at {out} on that host"
        try:
            content = marker.get()
        except FileNotFoundError:
            return problem(f"{out} does not exist there, or is not the OUT of the client", mount)
        except Exception as error:
            return problem(f"{out} cannot be read: {type(error).__name__}: {error}", mount)
        if content != requirements["name"].encode():
            return problem(f"{out} is not the OUT of the client", mount)
        if requirements["writes"]:
            own = out / f"{marker.name}.{socket.gethostname()}.{os.getpid()}"
            try:
                own.put(b"")
                own.delete()
            except Exception as error:
                return problem(
                    f"{out} cannot be written: {type(error).__name__}: {error}",
                    f"make {out} writable for the user of the worker on that host",
                )
        checked[requirements["name"]] = True
    if call is None:
        return None
    function, arguments = pickle.loads(call)
    return function(*arguments, *([list(parts)] if parts else []))
