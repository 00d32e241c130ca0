"""Several logs of one run, joined by step: parameters from one, gradients from another, scalars from a third."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.names import REPLICATE_LOSS, REPLICATE_STATES, STATES
from natgrad.sources.base import Source, StepContent, StepReader, Unshaped
from natgrad.sources.names import OF_A_STATE
from natgrad.sources.optimizers.state import OptimizerState
from natgrad.sources.scalars.scalar_log import ScalarLog
from natgrad.sources.steps import LoggedStep, LoggedTensor, NotYet, where

__all__ = ["JoinedSource"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """Some quantities of a source, all logged at steps that are ``shift`` before those that they belong to."""

    source: Source
    shift: int
    quantities: frozenset[str]

    @property
    def restricts(self) -> bool:
        """Whether a step must be in it: what has scalars alone may lack some."""
        return not isinstance(self.source, ScalarLog) and bool(self.quantities & {*STATES, *REPLICATE_STATES})

    def numbered(self, steps: Sequence[LoggedStep]) -> dict[int, LoggedStep]:
        """Return steps as logged, by the state that they belong to."""
        return {step.number + self.shift: step for step in steps}

    def of(self, content: StepContent) -> StepContent:
        """Return what a description says of these quantities."""
        return replace(
            content,
            arrays={name: tensors for name, tensors in content.arrays.items() if name in self.quantities},
            scalars={name: value for name, value in content.scalars.items() if name in self.quantities},
            # What an optimizer keeps goes with the parameters that it was saved with.
            optimizer=content.optimizer if STATES[0] in self.quantities else None,
            replicate_loss=content.replicate_loss if REPLICATE_LOSS in self.quantities else (),
        )


class JoinedSource:
    """Sources of one run, each of which gives some of its quantities.

    Parameters
    ----------
    sources : sequence of Source
        A step must be in all that hold tensors; what only some have is left out, with a warning. Logs of scalars
        do not restrict the steps: where they lack one it has no such scalar.
    shifts : sequence of mapping, optional
        Of each source, quantities to what is added to the step that they are logged at. A `ScalarLog` has shifted
        its own already.
    """

    def __init__(self, sources: Sequence[Source], shifts: Sequence[Mapping[str, int]] | None = None) -> None:
        self.location = sources[0].location
        self._parts = [
            part
            for source, shift in zip(sources, shifts or [{}] * len(sources), strict=True)
            for part in _parts(source, shift)
        ]
        self._steps: dict[int, tuple[tuple[_Part, LoggedStep], ...]] = {}

    def steps(self) -> list[LoggedStep]:
        """List the steps that all sources have; see `natgrad.sources.base.Source`."""
        sources = {id(part.source): part.source for part in self._parts}
        of_source = {key: source.steps() for key, source in sources.items()}
        listed = [(part, part.numbered(of_source[id(part.source)])) for part in self._parts]
        tensors = [steps for part, steps in listed if part.restricts]
        common = {number for number in tensors[0] if number >= 0}.intersection(*tensors[1:])
        for part, steps in listed:
            alone = sorted(set(steps) - common) if part.restricts else []
            if alone:
                _log.warning(
                    "%d steps of %s are left out, as %s: %d the first",
                    len(alone),
                    part.source.location,
                    "another source lacks them"
                    if len({p.source.location for p in self._parts}) > 1
                    else "shifted by other quantities they are not whole",
                    alone[0],
                )
        if not common:
            raise NotYet(
                "no step is in all of the sources",
                where=", ".join(str(part.source.location) for part in self._parts),
                why="they are of different runs, or count their steps differently, or one is the folder in which a "
                "restarted run went on",
                remedy="give sources of one run; the folder of a restarted run alone, in a second call with the "
                "same OUT: it becomes an attempt of the run",
            )
        for part, steps in listed:
            if isinstance(part.source, ScalarLog):
                common -= _to_come(part.source, steps, common)
        if not common:
            raise NotYet(
                "the log of scalars has no step yet",
                where=", ".join(str(part.source.location) for part in self._parts),
                why="it is still being written",
                remedy="run again later, or with --follow",
            )
        self._steps = {
            number: tuple((part, steps[number]) for part, steps in listed if number in steps)
            for number in sorted(common)
        }
        return [_joined(number, steps) for number, steps in self._steps.items()]

    @contextmanager
    def open(self, step: LoggedStep) -> Iterator[StepReader]:
        """Open a step in all sources; see `natgrad.sources.base.Source`."""
        parts = self._steps[step.number]
        with ExitStack() as stack:
            readers = [stack.enter_context(part.source.open(own)) for part, own in parts]
            yield _JoinedStep(step, parts, readers)


def _parts(source: Source, shift: Mapping[str, int]) -> list[_Part]:
    """Parts of a source, one for each shift: that which is not shifted first."""
    shift = {} if isinstance(source, ScalarLog) else shift
    return [
        _Part(source, by, frozenset(name for name in OF_A_STATE if shift.get(name, 0) == by))
        for by in sorted({shift.get(name, 0) for name in OF_A_STATE}, key=lambda by: (by != 0, by))
    ]


def _joined(number: int, parts: Sequence[tuple[_Part, LoggedStep]]) -> LoggedStep:
    """One step of several parts; logs of many steps count by the values of this one."""
    files = [own for part, own in parts if not isinstance(part.source, ScalarLog)]
    return LoggedStep(
        number,
        files[0].storage,
        tuple(entry for own in files[1:] for entry in (own.storage, *own.others)) + files[0].others,
        values=" ".join(own.values for _, own in parts if own.values),
    )


def _to_come(log: ScalarLog, steps: Mapping[int, LoggedStep], common: set[int]) -> set[int]:
    """Find the steps that a log of scalars does not have yet, and warn of a log that has none of the run's."""
    last = max(steps, default=-1)
    to_come = {number for number in common if number > last} if log.growing() else set()
    if to_come:
        _log.warning(
            "%d steps are left for the next pass, as %s is still being written and does not have them yet: "
            "%d the first",
            len(to_come),
            log.location,
            min(to_come),
        )
    if common - to_come and not common & set(steps):
        _log.warning(
            "%s has scalars of no step of the run: its steps are %s",
            log.location,
            ", ".join(map(str, sorted(steps)[:4])) + (", ..." if len(steps) > 4 else ""),
        )
    return to_come


class _JoinedStep:
    """Reader of one step of several sources."""

    def __init__(
        self, step: LoggedStep, parts: Sequence[tuple[_Part, LoggedStep]], readers: Sequence[StepReader]
    ) -> None:
        self._step, self._parts, self._readers = step, parts, readers
        self._owners: dict[str, StepReader] | None = None

    def content(self) -> StepContent:
        """Describe the step; no array may come from two sources, a scalar comes from the first that has it."""
        arrays: dict[str, Mapping[str, LoggedTensor]] = {}
        scalars: dict[str, float] = {}
        givers: dict[str, LoggedStep] = {}
        owners: dict[str, StepReader] = {}
        optimizer: OptimizerState | None = None
        contents = self._contents()
        notes = [note for content in contents for note in content.notes]
        for (part, own), reader, content in zip(self._parts, self._readers, contents, strict=True):
            for array, tensors in content.arrays.items():
                if array in arrays:
                    raise InputError(
                        f"two sources give the {array}s: {givers[array].path} and {own.path}",
                        where=where(self._step, array),
                        why="one is the folder in which a restarted run went on, or both hold more than is meant",
                        remedy="give the folder of a restarted run alone, in a second call with the same OUT: it "
                        "becomes an attempt of the run; else say in a run file which keys of each are meant (map)",
                    )
                arrays[array], givers[array], owners[array] = tensors, own, reader
            for name, value in content.scalars.items():
                if scalars.setdefault(name, value) != value:
                    notes.append(f"{name} is that of the first source that has it; {part.source.location} differs")
            if content.optimizer is not None and optimizer is None:
                optimizer = content.optimizer
                owners.update(dict.fromkeys(optimizer.readable, reader))
        self._owners = owners
        return StepContent(
            arrays,
            scalars,
            tuple(dict.fromkeys(key for content in contents for key in content.unused)),
            tuple(dict.fromkeys(notes)),
            {tensor: kept for content in contents for tensor, kept in content.ties.items()},
            any(content.untrained for content in contents),
            optimizer,
            next((content.replicate_loss for content in contents if content.replicate_loss), ()),
            next((content.no_gradient for content in contents if content.no_gradient), ""),
        )

    def _contents(self) -> list[StepContent]:
        """Describe the parts; those whose files have no shapes, by the parameters of the others."""
        pairs = list(zip((part for part, _ in self._parts), self._readers, strict=True))
        contents = [part.of(reader.content()) for part, reader in pairs]
        parameters = next((c.arrays[STATES[0]] for c in contents if c.arrays.get(STATES[0])), None)
        if parameters is None:
            return contents
        return [
            part.of(reader.shaped(parameters)) if isinstance(reader, Unshaped) else content
            for (part, reader), content in zip(pairs, contents, strict=True)
        ]

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        if self._owners is None:
            self.content()
        assert self._owners is not None
        self._owners[array].read(array, tensor, start, out)
