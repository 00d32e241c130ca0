"""Call functions in another process, so that a call that hangs, crashes or exhausts memory cannot stop the caller.

A `Worker` starts one process and reuses it, because its imports take longer than a small run. Only after a failure
is the process replaced. The process ends with its caller, even if the caller is killed: see `end_with_parent`.

The process is started as ``python -P -c``, and not with `multiprocessing`, which would import the user's main
module in it: a script without a guard would call `natgrad.scan` again.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from natgrad.app.memory import OutOfMemory
from natgrad.app.progress import StageProgress
from natgrad.schema.errors import InputError, Unavailable

__all__ = ["ProcessLost", "Worker", "end_with_parent", "serve"]

STALLED = (
    "check that the log can be read; raise --stall-timeout if its steps take long. Finished work is kept, and the "
    "next scan tries again"
)
AGAIN = "the next scan tries again"
"""Remedies of a scan."""

_REPORT_SECONDS = 0.2
"""Seconds between two messages about progress."""

_LOGGER = "natgrad"


class ProcessLost(Unavailable):
    """The process of a call was stopped or died."""


class Worker:
    """Call functions in a separate process, one at a time.

    Parameters
    ----------
    stall_timeout : float
        Seconds without progress after which a call is stopped.
    memory : int
        Bytes that the process may allocate. Only Linux enforces this limit.
    stalled : str
        Remedy for a call that was stopped.
    again : str
        What happens next after a failure, for messages.
    """

    def __init__(self, stall_timeout: float, memory: int, *, stalled: str = STALLED, again: str = AGAIN) -> None:
        self.stall_timeout, self.memory, self.stalled, self.again = stall_timeout, memory, stalled, again
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection | None = None
        self._lifeline = -1
        self._calling = threading.Lock()
        self._closed = False

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        where: str,
        progress: StageProgress | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Call a function of a module in the process, and return its result.

        Parameters
        ----------
        function : callable
            Takes the arguments, and the keyword argument ``progress``.
        *arguments
            Small values that can be pickled.
        where : str
            What the call works on, for errors.
        progress : callable, optional
            Called with the stage, the items done and the total number of items.
        timeout : float, optional
            Seconds without progress after which the call is stopped. Default: that of the worker.

        Raises
        ------
        ProcessLost
            If the call makes no progress in time, its process dies, or memory is exhausted.
        Exception
            The exception of the function.
        """
        seconds = self.stall_timeout if timeout is None else timeout
        with self._calling:
            try:
                kind, value = self._exchange((function, arguments), seconds, where, progress)
            except BaseException as error:
                status = self._stop()
                if isinstance(error, EOFError | ConnectionError):
                    raise _died(status, where, self.again) from error
                raise
            if kind == "memory":
                self._stop()
                raise _out_of_memory(self.memory, where, self.again)
        if kind == "error":
            raise value
        return value

    def close(self) -> None:
        """End the process. A call in another thread then ends with `ProcessLost`, and so do later calls."""
        self._closed = True
        process = self._process
        if process is not None:
            _kill(process)
        with self._calling:
            self._stop()

    def _exchange(
        self, request: Any, seconds: float, where: str, progress: StageProgress | None
    ) -> tuple[str, Any]:
        """Send a request; return the kind and the value of the answer."""
        process, channel = self._started()
        channel.send(request)
        deadline = time.monotonic() + seconds
        while True:
            while not channel.poll(max(0.0, min(1.0, deadline - time.monotonic()))):
                # A descendant of a dead process may hold the other end of the channel.
                if process.poll() is not None:
                    raise EOFError
                if time.monotonic() >= deadline:
                    raise _stalled(seconds, where, self.stalled)
            kind, value = channel.recv()
            if kind == "progress":
                deadline = time.monotonic() + seconds
                if progress is not None:
                    progress(*value)
            elif kind == "log":
                logging.getLogger(value.name).handle(value)
            else:
                return kind, value

    def _started(self) -> tuple[subprocess.Popen[bytes], Connection]:
        if self._closed:
            raise EOFError
        if self._process is None or self._channel is None:
            ours, theirs = socket.socketpair()
            alive, self._lifeline = os.pipe()
            level = logging.getLogger(_LOGGER).getEffectiveLevel()
            numbers = (theirs.fileno(), alive, self.memory, level)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()", *map(str, numbers)],
                    pass_fds=(theirs.fileno(), alive),
                    stdin=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    # The children of the process are killed with it.
                    process_group=0,
                )
            finally:
                theirs.close()
                os.close(alive)
            self._channel = Connection(ours.detach())
        return self._process, self._channel

    def _stop(self) -> int:
        """Kill the process with its children; return its status."""
        process, channel = self._process, self._channel
        self._process = self._channel = None
        if process is None or channel is None:
            return -signal.SIGKILL
        # A process that is ending still has its own status.
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
        _kill(process)
        channel.close()
        os.close(self._lifeline)
        return process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    # The children of the process belong to its group, which may outlive it.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _stalled(seconds: float, where: str, remedy: str) -> ProcessLost:
    return ProcessLost(
        f"timeout: no progress for {seconds:g} s",
        where=where,
        why="a file system or a reader does not respond, or a single step takes longer than this",
        remedy=remedy,
    )


def _out_of_memory(memory: int, where: str, again: str) -> ProcessLost:
    return ProcessLost(
        "out of memory",
        where=where,
        why=f"the process of the run may use {memory} bytes",
        remedy=f"raise --process-memory, or lower --memory-limit and --workers. Finished work is kept, and {again}",
    )


def _died(status: int, where: str, again: str) -> ProcessLost:
    if status >= 0:
        what, why = f"the process of the run ended with status {status}", "a library ended it"
    else:
        try:
            name = f" ({signal.Signals(-status).name})"
        except ValueError:  # a real-time signal
            name = ""
        what = f"the process of the run was killed by signal {-status}{name}"
        why = "a library crashed"
        if status == -signal.SIGKILL:
            why = "the machine may be out of memory, or someone killed the process"
    return ProcessLost(
        what,
        where=where,
        why=why,
        remedy=f"natgrad inspect shows whether the log can be read. Finished work is kept, and {again}",
    )


# The other process -------------------------------------------------------------------------------------------


def end_with_parent(alive: int) -> None:
    """Kill the group of this process when its parent ends.

    A shell waits for that, because a thread of this process would not run while other code blocks the interpreter.

    Parameters
    ----------
    alive : int
        Read end of a pipe whose other end only the parent has. Nothing is written to it.
    """
    subprocess.Popen(["/bin/sh", "-c", "read _; kill -9 0"], stdin=alive)
    os.close(alive)


def serve() -> None:
    """Answer the calls of a `Worker` until it closes the channel."""
    descriptor, alive, memory, level = map(int, sys.argv[1:])
    os.set_inheritable(descriptor, False)
    end_with_parent(alive)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory(memory)
    channel, sending = Connection(descriptor), threading.Lock()

    def send(kind: str, value: Any) -> None:
        with sending:
            channel.send((kind, value))

    logger = logging.getLogger(_LOGGER)
    logger.handlers, logger.propagate = [_Forwarding(send)], False
    logger.setLevel(level)
    while True:
        try:
            function, arguments = channel.recv()
        except EOFError:
            return
        try:
            answer = ("result", function(*arguments, progress=_reports(send)))
        except (MemoryError, OutOfMemory):
            answer = ("memory", None)
        except Exception as error:
            answer = ("error", _portable(error))
        send(*answer)


def _limit_memory(memory: int) -> None:
    # If the machine runs out of memory, Linux kills this process before any other.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    with suppress(ValueError, OSError):  # a system without this limit
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _reports(send: Callable[[str, Any], None]) -> StageProgress:
    """Return a callback that reports progress, but not more often than is useful."""
    sent = 0.0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal sent
        now = time.monotonic()
        if done == total or now - sent >= _REPORT_SECONDS:
            sent = now
            send("progress", (stage, done, total))

    return report


class _Forwarding(logging.handlers.QueueHandler):
    """Handler that sends records to the caller."""

    def __init__(self, send: Callable[[str, Any], None]) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # `enqueue` uses no queue
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        self._send("log", record)


def _portable(error: Exception) -> Exception:
    """Return the error with its traceback as a note, or its text if it cannot be sent."""
    text = "".join(traceback.format_exception(error))
    error.__cause__ = error.__context__ = None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, InputError):
        error.add_note(text)
    return error
