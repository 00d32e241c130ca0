"""Write records in a thread, so that a training loop waits only if the disk is slower than the training."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["BackgroundWriter"]

T = TypeVar("T")


class BackgroundWriter(Generic[T]):
    """Call a function for one item after the other, in a thread.

    The thread is a daemon and ends with `close`. In a forked process there is no such thread, and all methods do
    nothing.

    Parameters
    ----------
    write : callable
        Function of an item. After an exception, it is not called again.
    limit : int
        Maximum size of the items that wait, in bytes. One item is always accepted.

    Attributes
    ----------
    seconds_waited : float
        Time that `put` has waited in total.
    error : BaseException or None
        The exception that ended the thread.
    """

    def __init__(self, write: Callable[[T], object], limit: int) -> None:
        self._write, self._limit = write, limit
        self._items: deque[tuple[T, int]] = deque()
        self._size = 0
        self._closed = False
        self._changed = threading.Condition()
        self._process = os.getpid()
        self.error: BaseException | None = None
        self.seconds_waited = 0.0
        # The interpreter joins other threads before it calls `atexit`, which could end them.
        self._thread = threading.Thread(target=self._run, name="natgrad-writer", daemon=True)
        self._thread.start()

    def put(self, item: T, size: int) -> None:
        """Add an item, and wait until there is space for it.

        Parameters
        ----------
        item : object
        size : int
            Its size in bytes.

        Raises
        ------
        Exception
            The exception of an earlier item; this item is dropped.
        """
        if self._process != os.getpid():
            return
        with self._changed:
            begin = time.perf_counter()
            self._changed.wait_for(lambda: self.error or not self._size or self._size + size <= self._limit)
            self.seconds_waited += time.perf_counter() - begin
            if self.error is not None:
                raise self.error
            if not self._closed:
                self._items.append((item, size))
                self._size += size
                self._changed.notify_all()

    def close(self) -> None:
        """Wait until all items are written, or until one has failed, and end the thread."""
        if self._process != os.getpid():
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closed)
                if not self._items:
                    return
                item, size = self._items[0]
            try:
                self._write(item)
            except BaseException as error:
                with self._changed:
                    self.error = error
                    self._items.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                # The item counts until it is written.
                self._items.popleft()
                self._size -= size
                self._changed.notify_all()
