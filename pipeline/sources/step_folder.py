"""The native format: a folder with one file per step, ``step_<N>.safetensors`` or ``step_<N>.npz``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from pipeline.schema import InputError
from pipeline.sources.base import LoggedStep, StepReader
from pipeline.sources.npz_file import NpzFile
from pipeline.sources.safetensors_file import SafetensorsFile

__all__ = ["READERS", "StepFolder"]

READERS: dict[str, Callable[[LoggedStep], AbstractContextManager[StepReader]]] = {
    "safetensors": SafetensorsFile,
    "npz": NpzFile,
}

_STEP_FILE = re.compile(r"step_(\d+)\.(\w+)")


class StepFolder:
    """A run logged in one folder.

    Parameters
    ----------
    location : Path
        The folder.
    readers : sequence of str
        Containers to look for, of `READERS`.
    """

    def __init__(self, location: Path, readers: Sequence[str] = tuple(READERS)) -> None:
        self.location = Path(location)
        self._readers = tuple(readers)

    def steps(self) -> list[LoggedStep]:
        """List the steps; see `pipeline.sources.base.Source`."""
        found: dict[int, LoggedStep] = {}
        try:
            paths = sorted(self.location.iterdir())
        except OSError as error:
            raise InputError(
                f"cannot list the log folder: {error.strerror}",
                where=str(self.location),
                remedy="give the folder that holds the step files",
            ) from error
        for path in paths:
            match = _STEP_FILE.fullmatch(path.name)
            if not match or match[2] not in self._readers:
                continue
            step = LoggedStep(int(match[1]), path)
            if step.number in found:
                raise InputError(
                    f"step {step.number} is there twice: {found[step.number].path.name} and {path.name}",
                    where=f"{path}, step {step.number}",
                    why="the run was logged into one folder twice, in two formats or with padded numbers",
                    remedy="keep one of the files",
                )
            found[step.number] = step
        if not found:
            names = ", ".join(f"step_<N>.{reader}" for reader in self._readers)
            raise InputError(
                f"no step files ({names}) in this folder",
                where=str(self.location),
                why="it is empty, or the log is of another format",
                remedy="give the folder that holds the step files; natgrad formats lists what can be read",
            )
        return sorted(found.values())

    def open(self, step: LoggedStep) -> AbstractContextManager[StepReader]:
        """Open a step; see `pipeline.sources.base.Source`."""
        return READERS[step.path.suffix.removeprefix(".")](step)
