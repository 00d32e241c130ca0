"""Read a log that is one folder with a file or folder per step."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from natgrad.schema.errors import InputError
from natgrad.schema.logs import logger
from natgrad.sources.base import StepReader
from natgrad.sources.bounds import read_limited
from natgrad.sources.changes import changed_lately, identity
from natgrad.sources.checkpoints.npz_file import NpzFile
from natgrad.sources.checkpoints.safetensors_file import SafetensorsFile
from natgrad.sources.container import Container
from natgrad.sources.names import NATIVE, NamedStep, Names, step_number
from natgrad.sources.steps import ListingChanged, LoggedStep, NotYet, vanished
from natgrad.storage import LocalStorage, Storage, network_errors

__all__ = ["NATIVE_KINDS", "Kind", "StepFolder", "native_number", "not_latest_yet"]

_log = logger(__name__)
_TRACKER_LIMIT = 1 << 12
_NATIVE = re.compile(r"step_(\d{1,18})")


@dataclass(frozen=True)
class Kind:
    """A kind of step in a folder.

    Attributes
    ----------
    layout : str
        Used in messages, such as ``step_<N>.npz``.
    number : callable
        Function of a path that returns the step in its name, or None if it is not of this kind.
    open : callable
        Function of a step and names that returns a `Container`.
    unfinished : callable
        Function of a path that returns why it cannot be read yet, empty if it can.
    names : Names
        Meaning of its keys.
    """

    layout: str
    number: Callable[[Path], int | None]
    open: Callable[[LoggedStep, Names], Container]
    names: Names = NATIVE
    unfinished: Callable[[Path], str] = lambda path: ""

    def holds(self, path: Path) -> bool:
        """Return True if a path is a step of this kind. A path that no longer exists is none."""
        try:
            return self.number(path) is not None
        except FileNotFoundError:  # the run removed the folder after it was listed
            return False


def not_latest_yet(path: Path, tracker: str) -> str:
    """Return why a step cannot be read yet, if a tracker file in the same folder names an earlier step as the last.

    Parameters
    ----------
    path : Path
        Path of the step.
    tracker : str
        Name of the tracker file.

    Returns
    -------
    str
        Empty if the step can be read, or if it has not changed recently: not every run writes a tracker file.
    """
    try:
        name = read_limited(path.parent / tracker, _TRACKER_LIMIT).decode(errors="replace").strip()
    except (OSError, ValueError):
        return ""
    last, number = step_number(name), step_number(path.name)
    if last is None or number is None or number <= last:
        return ""
    recent = changed_lately(identity(LoggedStep(number, LocalStorage(path)))["time"])
    return f"{tracker} still contains {name[:80]}: the step is being written" if recent else ""


def native_number(suffix: str) -> Callable[[PurePath], int | None]:
    """Return a function that returns N for files ``step_<N>`` with a suffix, and None for other files."""

    def number(path: PurePath) -> int | None:
        match = _NATIVE.fullmatch(path.stem) if path.suffix == suffix else None
        return int(match[1]) if match else None

    return number


NATIVE_KINDS = {
    "safetensors": Kind(
        "step_<N>.safetensors", native_number(".safetensors"), lambda step, names: SafetensorsFile(step)
    ),
    "npz": Kind("step_<N>.npz", native_number(".npz"), lambda step, names: NpzFile(step)),
}
"""The native format: ``step_<N>.safetensors`` and ``step_<N>.npz``."""


class StepFolder:
    """A run logged in one folder.

    Parameters
    ----------
    location : Storage
        The folder. In an object store, kinds detect their steps only by name.
    kinds : sequence of Kind
        Kinds of steps to look for.
    mapping : mapping, optional
        Quantity to its key. Takes precedence over the kinds and the mapping file of the folder.
    own_map_file : bool
        Do not read the mapping file here, because it has another meaning for these kinds.

    Raises
    ------
    InputError
        If the mapping or the mapping file is not valid.
    """

    def __init__(
        self,
        location: Storage,
        kinds: Sequence[Kind] = tuple(NATIVE_KINDS.values()),
        mapping: Mapping[str, str] | None = None,
        *,
        own_map_file: bool = False,
    ) -> None:
        self.location = location
        names = (kind.names if own_map_file else kind.names.of_folder(self.location) for kind in kinds)
        self._kinds = tuple(
            replace(kind, names=kind_names.mapped(mapping or {}))
            for kind, kind_names in zip(kinds, names, strict=True)
        )

    def steps(self) -> list[LoggedStep]:
        """List the steps; see `natgrad.sources.base.Source`.

        Files are opened only if the user specified the key of their step number.
        """
        found: dict[int, LoggedStep] = {}
        for entry in self._entries():
            try:
                number = self._number(entry)
            except ListingChanged:  # the run has removed this step
                continue
            if number is None:
                continue
            step = LoggedStep(number, entry)
            if step.number in found:
                raise InputError(
                    f"step {step.number} exists twice: {found[step.number].storage.name} and {entry.name}",
                    where=f"{entry}, step {step.number}",
                    why="the run was logged twice into one folder, in two formats or with padded numbers",
                    remedy="keep one of the files, or specify the key of the step number with --map step=KEY",
                )
            found[step.number] = step
        if not found:
            names = ", ".join(kind.layout for kind in self._kinds)
            raise NotYet(
                f"there are no step files ({names}) in this folder",
                where=str(self.location),
                why="it is empty, or the log has another format",
                remedy="pass the folder that contains the step files; see natgrad formats for the formats",
            )
        return sorted(found.values())

    def _entries(self) -> list[Storage]:
        try:
            with network_errors(self.location):
                names = self.location.list()
                if self.location.local_path is not None and not names:
                    self.location.stat()
        except OSError as error:
            raise InputError(
                f"cannot list the log folder: {error.strerror}",
                where=str(self.location),
                remedy="pass the folder that contains the step files",
            ) from error
        return [self.location / name for name in names]

    def _number(self, entry: Storage) -> int | None:
        kind = self._kind(entry)
        if kind is None or entry.name.startswith("."):
            return None
        reason = "" if entry.local_path is None else kind.unfinished(entry.local_path)
        if reason:
            self._require_writer(entry, reason)
            _log.warning("%s is left for the next pass: %s", entry, reason)
            return None
        if "step" not in kind.names.required:
            return kind.number(_path(entry))
        with NamedStep(kind.open(LoggedStep(-1, entry), kind.names), kind.names) as reader:
            number = reader.number("step")
        if number is None or number != int(number) or number < 0:
            raise InputError(
                f"{kind.names.keys['step'][0]!r} is {number}, which is not a step number",
                where=str(entry),
                remedy="specify the key of the step number with --map step=KEY",
            )
        return int(number)

    def _require_writer(self, entry: Storage, reason: str) -> None:
        """Refuse an incomplete step that is not being written any more."""
        if not changed_lately(identity(LoggedStep(-1, entry))["time"]):
            raise InputError(
                f"a step was never completed: {reason}",
                where=str(entry),
                why="the run was stopped while it wrote the step, or while it removed it (checkpoint rotation)",
                remedy="remove it, or write it again",
            )

    def _kind(self, entry: Storage) -> Kind | None:
        path = _path(entry)
        return next((kind for kind in self._kinds if kind.holds(path)), None)

    def open(self, step: LoggedStep) -> AbstractContextManager[StepReader]:
        """Open a step; see `natgrad.sources.base.Source`."""
        kind = self._kind(step.storage)
        if kind is None:
            raise vanished("cannot find the step any more", step)
        return NamedStep(kind.open(step, kind.names), kind.names)


def _path(entry: Storage) -> Path:
    """Return the path in which kinds look for the number of a step: the local path, or the name of an object."""
    return entry.local_path or Path(entry.name)
