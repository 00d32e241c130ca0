"""Read a log whose files may be removed at any time, because the run keeps only its last checkpoints (rotation)."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from natgrad.schema.configuration import Scalar
from natgrad.schema.errors import InputError
from natgrad.sources.base import Source, StepReader
from natgrad.sources.changes import changed_lately, files_of, identity
from natgrad.sources.checkpoints.stacked_file import KeptOpen
from natgrad.sources.configured import configuration_of
from natgrad.sources.steps import ListingChanged, LoggedStep, vanished

__all__ = ["ListedLog", "OpenedOnce"]

_STEPS_EXAMINED = 10
"""Number of steps that stay open while a log is examined."""

_STEPS_HELD, _FILES_HELD = 32, 64
"""Maximum numbers of steps and files that are held open. macOS allows 256 open files per process, Linux 1024."""


@dataclass(frozen=True)
class _HeldStep:
    """An open step, with a descriptor of each of its files."""

    reader: StepReader
    descriptors: tuple[int, ...]
    states: tuple[tuple[int, int], ...]

    def is_unchanged(self) -> bool:
        """Return True if no file was written to since the step was opened, whether it still has a name or not."""
        return tuple(map(_state, self.descriptors)) == self.states


class ListedLog(KeptOpen):
    """A log with a listing of its steps that is consistent with its files.

    A step whose files were removed after they were listed is no longer a step. A step that is held can be read
    after its files were removed.

    Parameters
    ----------
    log : Source
    """

    def __init__(self, log: Source) -> None:
        super().__init__(log)
        self._identities: dict[LoggedStep, dict[str, Any]] = {}
        self._held: dict[LoggedStep, _HeldStep] = {}
        self._until_end = ExitStack()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._until_end.close()

    def steps(self) -> list[LoggedStep]:
        """List the steps, run by run and sorted by number, with those that are held; see `Source.steps`."""
        identities = {step: found for step, found in self._identities.items() if step in self._held}
        for step in self._log.steps():
            if step not in identities:
                with suppress(ListingChanged):
                    identities[step] = identity(step)
        self._identities = identities
        return sorted(identities, key=lambda step: (step.run, step.number))

    def configuration(self, step: LoggedStep, notes: list[str]) -> dict[str, Scalar]:
        """Return the configuration of a run; see `natgrad.sources.configured.Configured`."""
        return configuration_of(self._log, step, notes)

    def identity(self, step: LoggedStep) -> dict[str, Any]:
        """Return the identity of a step when it was listed; see `natgrad.sources.changes.identity`."""
        return self._identities[step]

    def renew(self, step: LoggedStep) -> None:
        """Determine the identity of a step again, before it is read: it may have been written since the listing."""
        if step not in self._held:
            self._identities[step] = identity(step, fresh=True)

    def hold(self, steps: Sequence[LoggedStep], is_new: Callable[[LoggedStep], bool]) -> list[LoggedStep]:
        """Open new steps that the run may remove soon, and keep them open until the context of the log ends.

        Only local steps that were written recently are opened, and only as many of them as a process can have open.
        The oldest ones are opened first, because they are removed first.

        Parameters
        ----------
        steps : sequence of LoggedStep
            From `steps`.
        is_new : callable
            Return True if a step will be read.

        Returns
        -------
        list of LoggedStep
            The steps that still exist.
        """
        if len({step.storage for step in steps}) < len(steps):  # a file that contains many steps grows
            return list(steps)
        remaining = []
        for step in steps:
            recent = changed_lately(self._identities[step]["time"])
            if step not in self._held and recent and len(self._held) < _STEPS_HELD and is_new(step):
                try:
                    self.renew(step)
                    self._hold(step)
                except ListingChanged:
                    continue
                except (InputError, OSError):  # the step is read again later, and then the error is reported
                    pass
            remaining.append(step)
        return remaining

    def _hold(self, step: LoggedStep) -> None:
        with ExitStack() as stack:
            files = files_of(step)
            paths = [file.local_path for file in files if file.local_path is not None]
            if len(paths) < len(files) or len(paths) + self._files_held() > _FILES_HELD:
                return
            descriptors = []
            for path in paths:
                # Opening a pipe would block until a process writes to it.
                descriptors.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
                stack.callback(os.close, descriptors[-1])
            if not all(stat.S_ISREG(os.fstat(descriptor).st_mode) for descriptor in descriptors):
                return
            states = tuple(map(_state, descriptors))
            reader = stack.enter_context(self._log.open(step))
            # The names still belong to the files that were opened first, so the reader has opened these files.
            if identity(step, fresh=True) != self._identities[step] or not _are_same(paths, descriptors):
                return
            self._held[step] = _HeldStep(reader, tuple(descriptors), states)
            self._until_end.push(stack.pop_all())

    def _files_held(self) -> int:
        return sum(len(held.descriptors) for held in self._held.values())

    @contextmanager
    def open(self, step: LoggedStep) -> Iterator[StepReader]:
        """Open a step.

        Raises
        ------
        ListingChanged
            If files of the step were removed since it was listed, regardless of the error that this caused.
        InputError
            See `Source.open`.
        """
        if step in self._held:
            yield self._held[step].reader
            return
        try:
            with super().open(step) as reader:
                yield reader
        except ListingChanged:
            raise
        except InputError as error:
            # A folder that is being removed lacks files, which may look like any error.
            if identity(step, fresh=True)["size"] < self._identities[step]["size"]:
                raise vanished("files of this step disappeared", step) from error
            raise

    def is_unchanged(self, step: LoggedStep) -> bool:
        """Return True if no file of a step was written to since it was listed.

        Raises
        ------
        ListingChanged
            If files were removed before they were opened.
        """
        try:
            return identity(step, fresh=True) == self._identities[step]
        except ListingChanged:
            if step not in self._held:
                raise
            return self._held[step].is_unchanged()


class OpenedOnce:
    """A log that is listed once, to examine it. In its context, the steps that are opened first stay open.

    Parameters
    ----------
    log : Source
    """

    def __init__(self, log: Source) -> None:
        self.location, self._log = log.location, log
        self._steps: Sequence[LoggedStep] | None = None
        self._open: dict[LoggedStep, StepReader] = {}
        self._files, self._stack = 0, ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.clear()
        self._files = 0
        self._stack.close()

    def steps(self) -> Sequence[LoggedStep]:
        """Return the steps as they were listed at first; see `Source.steps`."""
        if self._steps is None:
            self._steps = self._log.steps()
        return self._steps

    @contextmanager
    def open(self, step: LoggedStep) -> Iterator[StepReader]:
        """Open a step, unless it is open; see `Source.open`."""
        if step not in self._open:
            files = len(files_of(step)) if len(self._open) < _STEPS_EXAMINED else _FILES_HELD + 1
            if self._files + files > _FILES_HELD:
                with self._log.open(step) as reader:
                    yield reader
                return
            self._open[step] = self._stack.enter_context(self._log.open(step))
            self._files += files
        yield self._open[step]


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def _are_same(paths: Sequence[Path], descriptors: Sequence[int]) -> bool:
    return all(
        os.path.samestat(path.stat(), os.fstat(descriptor))
        for path, descriptor in zip(paths, descriptors, strict=True)
    )
