"""Several logs of one run, joined by step: parameters from one, gradients from another, scalars from a third."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pipeline.schema import InputError
from pipeline.sources.base import LoggedStep, NotYet, OptimizerState, Source, StepContent, StepReader, where

__all__ = ["JoinedSource"]

_log = logging.getLogger(__name__)


class JoinedSource:
    """Sources of one run, each of which gives some of its arrays.

    Parameters
    ----------
    sources : sequence of Source
        A step must be in all of them; what only some have is left out, with a warning.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        self.location: Path = self._sources[0].location
        self._parts: dict[int, tuple[LoggedStep, ...]] = {}

    def steps(self) -> list[LoggedStep]:
        """List the steps that all sources have; see `pipeline.sources.base.Source`."""
        listed = [{step.number: step for step in source.steps()} for source in self._sources]
        common = set(listed[0]).intersection(*listed[1:])
        for source, steps in zip(self._sources, listed, strict=True):
            alone = sorted(set(steps) - common)
            if alone:
                _log.warning(
                    "%d steps of %s are left out, as another source lacks them: %d the first",
                    len(alone),
                    source.location,
                    alone[0],
                )
        if not common:
            raise NotYet(
                "no step is in all of the sources",
                where=", ".join(str(source.location) for source in self._sources),
                why="they are of different runs, or count their steps differently",
                remedy="give sources of one run",
            )
        self._parts = {number: tuple(steps[number] for steps in listed) for number in sorted(common)}
        return [
            replace(parts[0], others=tuple(path for part in parts[1:] for path in (part.path, *part.others)))
            for parts in self._parts.values()
        ]

    @contextmanager
    def open(self, step: LoggedStep) -> Iterator[StepReader]:
        """Open a step in all sources; see `pipeline.sources.base.Source`."""
        with ExitStack() as stack:
            readers = [
                stack.enter_context(_opened(source, part))
                for source, part in zip(self._sources, self._parts[step.number], strict=True)
            ]
            yield _JoinedStep(step, self._parts[step.number], readers)


def _opened(source: Source, step: LoggedStep) -> AbstractContextManager[StepReader]:
    return source.open(step)


class _JoinedStep:
    """Reader of one step of several sources."""

    def __init__(self, step: LoggedStep, parts: Sequence[LoggedStep], readers: Sequence[StepReader]) -> None:
        self._step, self._parts, self._readers = step, parts, readers
        self._owners: dict[str, StepReader] | None = None

    def content(self) -> StepContent:
        """Describe the step; no array may come from two sources, a scalar comes from the first that has it."""
        arrays: dict[str, Any] = {}
        scalars: dict[str, float] = {}
        givers: dict[str, LoggedStep] = {}
        owners: dict[str, StepReader] = {}
        optimizer: OptimizerState | None = None
        contents = [reader.content() for reader in self._readers]
        notes = [note for content in contents for note in content.notes]
        for part, reader, content in zip(self._parts, self._readers, contents, strict=True):
            for array, tensors in content.arrays.items():
                if array in arrays:
                    raise InputError(
                        f"two sources give the {array}s: {givers[array].path} and {part.path}",
                        where=where(self._step, array),
                        remedy="say in a run file which keys of each source are meant (map)",
                    )
                arrays[array], givers[array], owners[array] = tensors, part, reader
            for name, value in content.scalars.items():
                if scalars.setdefault(name, value) != value:
                    notes.append(f"{name} is taken from the first source that has it; {part.path} says otherwise")
            if content.optimizer is not None and optimizer is None:
                optimizer = content.optimizer
                owners.update(dict.fromkeys(optimizer.arrays, reader))
        self._owners = owners
        return StepContent(
            arrays,
            scalars,
            tuple(key for content in contents for key in content.unused),
            tuple(notes),
            {tensor: kept for content in contents for tensor, kept in content.ties.items()},
            any(content.untrained for content in contents),
            optimizer,
            next((content.replicate_loss for content in contents if content.replicate_loss), ()),
        )

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `pipeline.sources.base.StepReader`."""
        if self._owners is None:
            self.content()
        assert self._owners is not None
        self._owners[array].read(array, tensor, start, out)
