"""Repeat a pass over a log that is still being written, until it is interrupted or the log ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from natgrad.sources.steps import NotYet

__all__ = [
    "follow",
]


def follow(
    once: Callable[[bool], dict[str, Any]], *, interval: float = 10.0, idle_timeout: float | None = None
) -> dict[str, Any]:
    """Repeat a pass over a log that is being written, until interrupted, or until nothing new came for so long.

    Parameters
    ----------
    once : callable
        The pass, which is told whether none found anything before; its answer says how many ``new_steps`` it found.
    interval : float
        Seconds between passes.
    idle_timeout : float, optional
        Seconds without a new step after which the log is taken to be at its end.

    Returns
    -------
    dict
        Answer of the last pass that found something, with the new steps of all.

    Raises
    ------
    InputError
        Of a pass; not that a step is not there yet, unless none came at all.
    """
    answer: dict[str, Any] = {}
    new_steps, last = 0, time.monotonic()
    waiting: NotYet | KeyboardInterrupt | None = None
    try:
        with _interrupts() as interrupted:
            while not interrupted.is_set():
                try:
                    found = once(not answer)
                    if found["new_steps"] or not answer:
                        answer, last = found, time.monotonic()
                        new_steps += found["new_steps"]
                except NotYet as error:
                    waiting = error
                if idle_timeout is not None and time.monotonic() - last >= idle_timeout:
                    break
                interrupted.wait(interval)
    except KeyboardInterrupt as interrupt:
        waiting = interrupt
    if not answer and waiting is not None:
        raise waiting
    return {**answer, "new_steps": new_steps}


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Keep in mind that the user interrupted, as libraries swallow the exception in their callbacks."""
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
