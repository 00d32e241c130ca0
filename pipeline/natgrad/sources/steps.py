"""Steps and tensors as a log lists them, and the errors that readers raise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from natgrad.schema.errors import InputError, Unavailable
from natgrad.storage import Storage

__all__ = [
    "LoggedStep",
    "LoggedTensor",
    "NotYet",
    "Unreadable",
    "local_file",
    "vanished",
    "where",
]


@dataclass(frozen=True, order=True)
class LoggedStep:
    """A step as listed: its number and the files that hold it.

    Attributes
    ----------
    number : int
        Number of updates done before this state.
    storage : Storage
        File or folder.
    others : tuple of Storage
        Further files or folders of the step.
    run : str
        Run of a sweep.
    values : str
        Scalars of the step from logs of many steps, whose sizes and times do not identify one step.
    """

    number: int
    storage: Storage
    others: tuple[Storage, ...] = ()
    run: str = ""
    values: str = ""

    @property
    def path(self) -> Path:
        """Path on this machine, for formats that need files (InputError where there is none)."""
        return local_file(self.storage)


def local_file(storage: Storage) -> Path:
    """Return the path of a file or folder of this machine, for libraries that read no other (InputError)."""
    path = storage.local_path
    if path is None:
        raise InputError(
            "this format needs files of this machine",
            where=str(storage),
            why="its library reads no object store",
            remedy="copy the log to a folder first (aws s3 sync URL FOLDER), and give that",
        )
    return path


@dataclass(frozen=True)
class LoggedTensor:
    """A tensor as logged, not loaded."""

    shape: tuple[int, ...]
    dtype: str


class Unreadable(InputError):
    """A file that is not of its format, or not yet: truncated, still being written, damaged."""


class NotYet(Unavailable):
    """Nothing is wrong with what is there, but it is not all there yet: run again later."""


def where(step: LoggedStep, array: str = "", tensor: str = "") -> str:
    """Return the location of an error: file, step, and tensor where one is meant."""
    tensor_part = f", {array} of tensor {tensor!r}" if array and tensor else f", {array}" if array else ""
    return f"{step.storage}, step {step.number}{tensor_part}"


def vanished(what: str, step: LoggedStep, array: str = "", tensor: str = "") -> InputError:
    """Return the refusal of a step whose files are gone since they were listed."""
    return InputError(
        what,
        where=where(step, array, tensor),
        why="the training run removed it while it was read (checkpoint rotation), or it was moved",
        remedy="run again; what was committed is kept",
    )
