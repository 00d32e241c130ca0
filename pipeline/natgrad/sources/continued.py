"""Read a run whose steps are in several folders, one after another: its attempts, or its epochs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from natgrad.schema.errors import InputError
from natgrad.schema.logs import logger
from natgrad.sources.base import Source, StepReader
from natgrad.sources.recognition import ATTEMPT_WORDS
from natgrad.sources.step_names import words
from natgrad.sources.steps import LoggedStep, NotYet
from natgrad.storage import Storage

__all__ = ["Continued"]

_log = logger(__name__)


class Continued:
    """The steps of several logs of one run, in the order of the logs.

    From the first step of an attempt on, the steps of earlier attempts are abandoned. Epochs have no common step.

    Parameters
    ----------
    location : Storage
        Folder that contains the logs.
    parts : sequence of Source
        The logs, the oldest one first.
    """

    def __init__(self, location: Storage, parts: Sequence[Source]) -> None:
        self.location, self._parts = location, parts
        self._owners: dict[LoggedStep, Source] = {}

    def steps(self) -> list[LoggedStep]:
        """List the steps; see `natgrad.sources.base.Source`."""
        listed: list[tuple[Source, Sequence[LoggedStep]]] = []
        for part in self._parts:
            try:
                listed.append((part, part.steps()))
            except NotYet as error:  # an attempt that has just begun
                if part is self._parts[-1] and not listed:
                    raise
                _log.info("%s is skipped: %s", part.location, error.what)
        kept: dict[int, LoggedStep] = {}
        owners: dict[LoggedStep, Source] = {}
        for part, steps in listed:
            abandoned = [number for number in kept if number >= steps[0].number]
            if abandoned:
                self._abandon(abandoned, kept, owners, part)
            for number in abandoned:
                del kept[number]
            kept |= {step.number: step for step in steps}
            owners |= dict.fromkeys(steps, part)
        self._owners = owners
        return [kept[number] for number in sorted(kept)]

    def _abandon(
        self, abandoned: Sequence[int], kept: dict[int, LoggedStep], owners: dict[LoggedStep, Source], part: Source
    ) -> None:
        """Report steps that were logged before an attempt; refuse them if the folders are epochs."""
        before = owners[kept[abandoned[0]]].location
        if words(part.location.name) & ATTEMPT_WORDS:
            _log.warning(
                "%d steps from step %d on are skipped because %s continues at this step; the first is in %s",
                len(abandoned),
                abandoned[0],
                part.location,
                before,
            )
            return
        raise InputError(
            f"step {abandoned[0]} is in {before.name}, but the steps of {part.location.name} begin at or before it",
            where=str(part.location),
            why="the number in the names starts again in each epoch",
            remedy="use the number of updates of the run in the names, or specify its key in the files with "
            "--map step=KEY",
        )

    def open(self, step: LoggedStep) -> AbstractContextManager[StepReader]:
        """Open a step with the log that contains it; see `natgrad.sources.base.Source`."""
        if step not in self._owners:
            self.steps()
        return self._owners[step].open(step)
