"""Repeat a pass over a log that is still being written, until interrupted or until the log ends."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TypeVar

from natgrad.ingestion import IngestSummary, StepWait
from natgrad.schema.logs import logger
from natgrad.sources.steps import NotYet

__all__ = [
    "follow",
]

_log = logger(__name__)

T = TypeVar("T", bound=IngestSummary)


def follow(
    once: Callable[[bool], T | None],
    *,
    wait: StepWait,
    interval: float = 10.0,
    idle_timeout: float | None = None,
) -> T:
    """Repeat a pass over a log that is being written, until interrupted or until no new steps appear for some time.

    A message states what the passes are waiting for whenever it changes. If steps after a gap are still waiting
    when the log is considered complete, a last pass reads them.

    Parameters
    ----------
    once : callable
        The pass. Its argument is True until a pass has returned a summary. It returns None if the log has no new
        step.
    wait : StepWait
        Used by each pass to decide whether to wait for missing steps, and to count the new ones.
    interval : float
        Seconds between passes.
    idle_timeout : float, optional
        Seconds without a new step after which the log is considered complete. Default: no limit.

    Returns
    -------
    IngestSummary
        Summary of the last pass that found new steps, with the new steps of all passes, and warnings for the steps
        that were not stored.

    Raises
    ------
    InputError
        If a pass raises it. `NotYet` (a step is still missing) is raised only if no pass ever succeeded.
    """
    summary: T | None = None
    last = time.monotonic()
    waiting: NotYet | KeyboardInterrupt | None = None
    awaited, complete = "", False
    try:
        with _interrupts() as interrupted:
            while not interrupted.is_set():
                found = None
                try:
                    found = once(summary is None)
                    waiting = None
                    if found is not None:
                        summary, last = found, time.monotonic()
                except NotYet as error:
                    waiting = error
                if idle_timeout is not None and time.monotonic() - last >= idle_timeout:
                    if complete or not wait.is_waiting:
                        break
                    complete = True
                    wait.end()
                    continue
                before, awaited = awaited, _awaited(summary, found, wait, waiting)
                if awaited not in ("", before):
                    _log.log(logging.WARNING if wait.is_waiting else logging.INFO, "waiting for %s", awaited)
                interrupted.wait(interval)
    except KeyboardInterrupt as interrupt:
        waiting = waiting or interrupt
    if summary is None:
        raise waiting or KeyboardInterrupt
    warnings = [*summary.warnings, *wait.warnings()]
    if isinstance(waiting, NotYet):
        warnings.append(f"the last pass read nothing: {waiting.what} ({waiting.where})")
    return replace(summary, new_steps=wait.new_steps, warnings=warnings)


def _awaited(
    summary: IngestSummary | None, found: IngestSummary | None, wait: StepWait, error: BaseException | None
) -> str:
    """Describe what the next pass waits for; empty if the last one found new steps and no steps are missing."""
    if wait.is_waiting:
        return f"{wait.awaited}; after {wait.seconds:g} s (--gap-timeout) later steps are read without them"
    if isinstance(error, NotYet):
        return f"the log: {error.what} ({error.where})"
    return "" if summary is None or found is not None else f"the step after step {summary.last_step}"


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
