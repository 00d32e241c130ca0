"""Refuse a limit on memory that is too low for a command, and translate errors of memory for users."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from natgrad.compute.processors import usable_processors
from natgrad.schema.errors import Unavailable
from natgrad.schema.layout import MEBIBYTE

__all__ = ["ADDRESS_BYTES", "PROCESSOR_BYTES", "OutOfMemory", "memory_errors"]

ADDRESS_BYTES, PROCESSOR_BYTES = 3 << 30, 128 << 20
"""Address space of a process and for each processor: libraries, stacks and heaps of threads, most of it never used.

2.7 GiB were measured with two processors, at 0.3 GiB of memory. OpenBLAS and LLVM end the process if an allocation
fails, so this cannot be left to an error.
"""

_NO_THREAD = "can't start new thread"


class OutOfMemory(Unavailable):
    """Memory could not be allocated."""


@contextmanager
def memory_errors(planned: Callable[[], int]) -> Iterator[None]:
    """Check the limit on the address space, and translate errors of memory into messages for users.

    Parameters
    ----------
    planned : callable
        Return the bytes of memory that are planned. It is called only for an error message.

    Raises
    ------
    Unavailable
        If the limit is too low.
    OutOfMemory
        If memory cannot be allocated.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    needed = ADDRESS_BYTES + PROCESSOR_BYTES * usable_processors()
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise Unavailable(
            f"the address space of this process is limited to {limit / MEBIBYTE:.0f} MiB",
            where="the limit of the shell (ulimit -v) or of the batch system",
            why=f"{planned() / MEBIBYTE:.0f} MiB of memory are planned, but libraries and threads reserve "
            f"{needed / MEBIBYTE:.0f} MiB of addresses, most of which they never use",
            remedy=f"set it to at least {needed // 1024} (ulimit -v, in KiB); to limit memory instead, use "
            "--memory-limit or a control group",
        )
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _NO_THREAD not in str(error):
            raise
        available = psutil.virtual_memory().available
        limited = "" if limit == resource.RLIM_INFINITY else f", and {limit / MEBIBYTE:.0f} MiB of addresses"
        raise OutOfMemory(
            f"not enough memory: {str(error) or 'an allocation failed'}",
            where=f"this machine, which has {available / MEBIBYTE:.0f} MiB available{limited}",
            why=f"{planned() / MEBIBYTE:.0f} MiB are planned; other processes, or a limit, leave less than that",
            remedy="end other processes or raise the limit (ulimit -a shows it), then run again: committed data "
            "are kept",
        ) from error
