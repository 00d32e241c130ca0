"""Append the ledgers of updates to a file, with NumPy and the standard library alone."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from natgrad.recording.background import BackgroundWriter
from natgrad.schema.errors import InputError
from natgrad.schema.ledger_log import LedgerHeader, ledger_names, sealed

__all__ = ["SYNC_SECONDS", "LedgerWriter", "require_folder", "require_no_ledgers"]

SYNC_SECONDS = 5.0
"""Time after which records are flushed to the disk. A process that is killed loses none of them, because they are
passed to the operating system immediately; a computer that fails loses at most those of this time."""

_CONTINUE = "continue the run with first_step=N, the number of updates before"


def _files(folder: Path) -> dict[int, str]:
    """Return the names of the files of the log in a folder by number."""
    return ledger_names(entry.name for entry in folder.iterdir()) if folder.is_dir() else {}


def require_folder(folder: Path, *, resume: bool, remedy: str = _CONTINUE) -> None:
    """Create the folder of a log, or check that it can contain one.

    Parameters
    ----------
    folder : Path
    resume : bool
        The folder may contain a log.
    remedy : str
        How to continue the run in the folder, for the error.

    Raises
    ------
    InputError
        If it contains a log of states, or if it contains a log and ``resume`` is False.
    """
    if any(folder.glob("step_*")):
        raise InputError(
            "the folder already contains states (step_*)",
            where=str(folder),
            why="a folder contains either states or ledgers",
            remedy='use an empty folder, or record states (mode="full")',
        )
    if _files(folder) and not resume:
        raise InputError(
            "the folder already contains ledgers (ledger_*.log)",
            where=str(folder),
            why="two runs in one folder would be read as one run",
            remedy=f"use an empty folder, or {remedy}",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"the folder cannot be created: {error.strerror}", where=str(folder), remedy="use another folder"
        ) from error


def require_no_ledgers(folder: Path) -> None:
    """Raise InputError if the folder of a log of states contains ledgers."""
    if _files(folder):
        raise InputError(
            "the folder already contains ledgers (ledger_*.log)",
            where=str(folder),
            why="a folder contains either states or ledgers",
            remedy='use an empty folder, or record ledgers (mode="ledger")',
        )


class LedgerWriter:
    """A new file of a log of ledgers, after those that the folder already contains.

    A record is passed to the operating system by `append`, and flushed to the disk in a thread.

    Parameters
    ----------
    folder : Path
    header : LedgerHeader

    Attributes
    ----------
    header : LedgerHeader
    path : Path
    """

    def __init__(self, folder: Path, header: LedgerHeader) -> None:
        self.header = header
        number = max(_files(folder), default=-1) + 1
        self.path = folder / f"ledger_{number}.log"
        # Two processes that continue the same run do not write into one file.
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
        self._write(header.to_bytes())
        os.fsync(self._file)
        with suppress(OSError):  # a file system that cannot flush a folder
            entry = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(entry)
            finally:
                os.close(entry)
        self._synced = time.monotonic()
        self._flusher = BackgroundWriter(os.fsync, 1)

    def append(self, record: NDArray[Any]) -> None:
        """Append a record.

        Parameters
        ----------
        record : array without dimensions, of the dtype of the header
            Its checksum is filled in.

        Raises
        ------
        OSError
            If the file cannot be written, or could not be flushed before.
        """
        self._write(sealed(record))
        now = time.monotonic()
        if now - self._synced >= SYNC_SECONDS:
            self._synced = now
            self._flusher.put(self._file, 0)
        if self._flusher.error is not None:
            raise self._flusher.error

    def _write(self, data: bytes) -> None:
        written = os.write(self._file, data)
        while written < len(data):  # the disk is nearly full: the next call raises the error
            written += os.write(self._file, data[written:])

    def close(self) -> None:
        """Flush all records to the disk and close the file."""
        self._flusher.close()
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)
        if self._flusher.error is not None:
            raise self._flusher.error
