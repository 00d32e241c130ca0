"""Steps and tensors as listed by a log, and the errors that readers raise."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from natgrad.schema.errors import InputError, Unavailable
from natgrad.storage import Storage

__all__ = [
    "ListingChanged",
    "LoggedStep",
    "LoggedTensor",
    "NotYet",
    "Unreadable",
    "is_running_statistic",
    "local_file",
    "vanished",
    "where",
]


@dataclass(frozen=True, order=True)
class LoggedStep:
    """A step of a log: its number and its files.

    Attributes
    ----------
    number : int
        Number of updates before this state.
    storage : Storage
        File or folder of the step.
    others : tuple of Storage
        Additional files or folders of the step.
    run : str
        Run in a sweep.
    values : str
        Scalars of the step, if they come from a log of many steps, whose size and time do not identify one step.
    content : str
        Checksum of the content of the step, if its file contains many steps and a checksum of each. It identifies
        the step instead of the size and the time of the file, which grows.
    origin : str
        Where the number was taken from, for messages. It does not distinguish steps.
    step_span : int
        If not 0, an update leads from a state only to the state that is this many steps later. Other states are not
        connected.
    """

    number: int
    storage: Storage
    others: tuple[Storage, ...] = ()
    run: str = ""
    values: str = ""
    content: str = ""
    origin: str = field(default="", compare=False)
    step_span: int = field(default=0, compare=False)

    @property
    def path(self) -> Path:
        """Local path, for formats that need local files. Raises InputError if there is none."""
        return local_file(self.storage)


def is_running_statistic(tensor: str) -> bool:
    """Return True if a name is that of a running statistic of a normalization layer, which is not trained.

    Examples
    --------
    >>> is_running_statistic("layer1.0.bn1.running_mean")
    True
    """
    return tensor.rpartition(".")[2] in ("running_mean", "running_var")


def local_file(storage: Storage) -> Path:
    """Return the path of a local file or folder, for libraries that cannot read from object stores.

    Raises
    ------
    InputError
        If the storage is not local.
    """
    path = storage.local_path
    if path is None:
        raise InputError(
            "this format can be read only from local files",
            where=str(storage),
            why="the library that reads this format does not support object stores",
            remedy="copy the log to a local folder first (aws s3 sync URL FOLDER), and pass that folder",
        )
    return path


@dataclass(frozen=True)
class LoggedTensor:
    """Shape and dtype of a logged tensor that is not loaded."""

    shape: tuple[int, ...]
    dtype: str


class Unreadable(InputError):
    """Error for a file that is not valid in its format: it is truncated, still being written, or corrupt."""


class NotYet(Unavailable):
    """Error for a log that is valid but not complete yet. A later run can succeed."""


class ListingChanged(NotYet):
    """Error for files of a step that were removed after they were listed. A new listing of the log can be read."""


def where(step: LoggedStep, array: str = "", tensor: str = "") -> str:
    """Return the location of an error: file, step and, if given, array and tensor."""
    tensor_part = f", {array} of tensor {tensor!r}" if array and tensor else f", {array}" if array else ""
    return f"{step.storage}, step {step.number}{tensor_part}"


def vanished(what: str, step: LoggedStep, array: str = "", tensor: str = "") -> ListingChanged:
    """Return the error for a step whose files were removed after they were listed."""
    return ListingChanged(
        what,
        where=where(step, array, tensor),
        why="the training run removed them while they were read (checkpoint rotation), or they were moved",
        remedy="run again; committed results are kept",
    )
