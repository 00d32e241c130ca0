"""Many runs of one model, as a hyper-parameter sweep logs them: a folder with the log of each."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

from natgrad.sources.base import Source, StepReader
from natgrad.sources.steps import LoggedStep
from natgrad.storage import Storage

__all__ = ["Sweep"]


class Sweep:
    """The runs of a sweep, one after the other.

    Parameters
    ----------
    location : Storage
        Folder of the sweep.
    runs : mapping of str to Source
        Log of each run.
    """

    def __init__(self, location: Storage, runs: Mapping[str, Source]) -> None:
        self.location, self._runs = location, dict(runs)

    def steps(self) -> list[LoggedStep]:
        """List the steps of all runs, run by run; see `natgrad.sources.base.Source`."""
        return [replace(step, run=name) for name, source in self._runs.items() for step in source.steps()]

    def open(self, step: LoggedStep) -> AbstractContextManager[StepReader]:
        """Open a step of its run; see `natgrad.sources.base.Source`."""
        return self._runs[step.run].open(step)
