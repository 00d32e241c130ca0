"""Read several runs of one model, such as a hyperparameter sweep, from a folder that contains a log per run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

from natgrad.schema.configuration import Scalar
from natgrad.sources.base import Source, StepReader, before_restarts
from natgrad.sources.configured import configuration_of
from natgrad.sources.steps import LoggedStep
from natgrad.storage import Storage

__all__ = ["Sweep"]


class Sweep:
    """The runs of a sweep, one after another.

    Parameters
    ----------
    location : Storage
        Folder that contains the runs.
    runs : mapping of str to Source
        Log of each run, by its name.
    """

    def __init__(self, location: Storage, runs: Mapping[str, Source]) -> None:
        self.location, self._runs = location, dict(runs)

    def steps(self) -> list[LoggedStep]:
        """List the steps of all runs, grouped by run; see `natgrad.sources.base.Source`."""
        return [replace(step, run=name) for name, source in self._runs.items() for step in source.steps()]

    def earlier(self) -> list[Sweep]:
        """Return each run as it was before each restart; see `natgrad.sources.base.Restarted`."""
        return [
            Sweep(self.location, {name: one})
            for name, source in self._runs.items()
            for one in before_restarts(source)
        ]

    def open(self, step: LoggedStep) -> AbstractContextManager[StepReader]:
        """Open a step with the log of its run; see `natgrad.sources.base.Source`."""
        return self._runs[step.run].open(step)

    def configuration(self, step: LoggedStep, notes: list[str]) -> dict[str, Scalar]:
        """Return the configuration of the run of a step; see `natgrad.sources.configured.Configured`."""
        return configuration_of(self._runs[step.run], step, notes)
