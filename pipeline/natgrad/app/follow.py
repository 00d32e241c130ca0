"""Repeat a pass over a log that is still being written, until interrupted or until the log ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TypeVar

from natgrad.ingestion import IngestSummary
from natgrad.sources.steps import NotYet

__all__ = [
    "follow",
]

T = TypeVar("T", bound=IngestSummary)


def follow(once: Callable[[bool], T | None], *, interval: float = 10.0, idle_timeout: float | None = None) -> T:
    """Repeat a pass over a log that is being written, until interrupted or until no new step appears for a while.

    Parameters
    ----------
    once : callable
        The pass. Its argument is True until a pass has returned a summary. It returns None if the log has no new
        step.
    interval : float
        Seconds between passes.
    idle_timeout : float, optional
        Seconds without a new step after which the log is considered complete. Default: no limit.

    Returns
    -------
    IngestSummary
        Summary of the last pass that found new steps, with the new steps of all passes.

    Raises
    ------
    InputError
        If a pass raises it. `NotYet` (a step is still missing) is raised only if no pass ever succeeded.
    """
    summary: T | None = None
    new_steps, last = 0, time.monotonic()
    waiting: NotYet | KeyboardInterrupt | None = None
    try:
        with _interrupts() as interrupted:
            while not interrupted.is_set():
                try:
                    found = once(summary is None)
                    if found is not None:
                        summary, last = found, time.monotonic()
                        new_steps += found.new_steps
                except NotYet as error:
                    waiting = error
                if idle_timeout is not None and time.monotonic() - last >= idle_timeout:
                    break
                interrupted.wait(interval)
    except KeyboardInterrupt as interrupt:
        waiting = interrupt
    if summary is None:
        raise waiting or KeyboardInterrupt
    return replace(summary, new_steps=new_steps)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Record an interrupt by the user, because some libraries swallow the exception in their callbacks."""
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.default_int_handler(number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
