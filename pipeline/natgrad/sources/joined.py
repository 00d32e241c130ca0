"""Join several logs of one run by step: parameters from one log, gradients or scalars from others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.configuration import Scalar
from natgrad.schema.errors import InputError
from natgrad.schema.logs import logger
from natgrad.schema.names import REPLICATE_LOSS, REPLICATE_STATES, SKIPPED, STATES
from natgrad.sources.base import (
    Difference,
    ReaderByArray,
    Recorded,
    Source,
    StepContent,
    StepReader,
    Unshaped,
    before_restarts,
)
from natgrad.sources.configured import configuration_of
from natgrad.sources.names import STATE_QUANTITIES
from natgrad.sources.optimizers.state import OptimizerState
from natgrad.sources.scalars.scalar_log import ScalarLog
from natgrad.sources.steps import LoggedStep, LoggedTensor, NotYet, where

__all__ = ["JoinedSource"]

_log = logger(__name__)


@dataclass(frozen=True)
class _Part:
    """Some quantities of a source, all logged ``shift`` steps before the step that they belong to.

    The user declared the shifts of the quantities in ``declared``, which may be 0.
    """

    source: Source
    shift: int
    quantities: frozenset[str]
    declared: frozenset[str] = frozenset()

    @property
    def restricts(self) -> bool:
        """Return True if every step must be in this part. Logs of scalars may lack steps."""
        return not isinstance(self.source, ScalarLog) and bool(self.quantities & {*STATES, *REPLICATE_STATES})

    def numbered(self, steps: Sequence[LoggedStep] | Mapping[int, LoggedStep]) -> Mapping[int, LoggedStep]:
        """Return the logged steps, by the number of the state that they belong to."""
        if isinstance(steps, Mapping):  # those of a log of scalars, which shifts them itself
            return steps
        return {step.number + self.shift: step for step in steps}

    def select(self, content: StepContent) -> StepContent:
        """Return the part of a description that concerns these quantities."""
        return replace(
            content,
            arrays={name: tensors for name, tensors in content.arrays.items() if name in self.quantities},
            scalars={name: value for name, value in content.scalars.items() if name in self.quantities},
            optimizer=self._optimizer(content.optimizer),
            differences=tuple(entry for entry in content.differences if entry.quantity in self.quantities),
            alignment=content.alignment if "gradient" in self.quantities - self.declared else "",
            replicate_loss=content.replicate_loss if REPLICATE_LOSS in self.quantities else (),
            absent={name: error for name, error in content.absent.items() if name in self.quantities},
        )

    def _optimizer(self, optimizer: OptimizerState | None) -> OptimizerState | None:
        """Return the state of the optimizer, which belongs to the parameters, or its learning rates alone."""
        if optimizer is None or {STATES[0], "learning_rate"} <= self.quantities:
            return optimizer
        if STATES[0] in self.quantities:
            return optimizer.with_rates({}, ())
        return optimizer.hyperparameters() if "learning_rate" in self.quantities else None


class JoinedSource:
    """Sources of one run, each of which provides some of its quantities.

    Parameters
    ----------
    sources : sequence of Source
        Every source that contains tensors must have a step; other steps are omitted, with a warning. After the last
        of these steps, one more is included if the sources of parameters have it. Logs of scalars do not restrict
        the steps: a step that they lack has no value of the scalar.
    shifts : sequence of mapping, optional
        For each source, quantities to the number added to the step at which they are logged. The user declares
        with 0 that a quantity is logged with its step. A `ScalarLog` applies its shifts itself.
    """

    def __init__(self, sources: Sequence[Source], shifts: Sequence[Mapping[str, int]] | None = None) -> None:
        self.location = sources[0].location
        self._sources, self._shifts = sources, shifts or [{}] * len(sources)
        self._parts = [
            part for source, shift in zip(sources, self._shifts, strict=True) for part in _parts(source, shift)
        ]
        self._steps: dict[int, tuple[tuple[_Part, LoggedStep], ...]] = {}

    def steps(self) -> list[LoggedStep]:
        """List the steps that all sources have; see `natgrad.sources.base.Source`."""
        sources = {id(part.source): part.source for part in self._parts}
        steps_of_source = {
            key: source.numbered() if isinstance(source, ScalarLog) else source.steps()
            for key, source in sources.items()
        }
        listed = [(part, part.numbered(steps_of_source[id(part.source)])) for part in self._parts]
        tensors = [steps for part, steps in listed if part.restricts]
        common = {number for number in tensors[0] if number >= 0}.intersection(*tensors[1:])
        common |= self._last_state(common, [(part, steps) for part, steps in listed if part.restricts])
        for part, steps in listed:
            alone = sorted(set(steps) - common) if part.restricts else []
            if alone:
                _log.warning(
                    "%d steps of %s are omitted because %s; the first is %d",
                    len(alone),
                    part.source.location,
                    "another source lacks them"
                    if len({p.source.location for p in self._parts}) > 1
                    else "some of their shifted quantities are missing",
                    alone[0],
                )
        if not common:
            raise NotYet(
                "there is no step that all sources have",
                where=", ".join(str(part.source.location) for part in self._parts),
                why="the sources belong to different runs, count steps differently, or one is the folder of a "
                "restarted run",
                remedy="pass sources of one run; pass the folder of a restarted run separately, in a second "
                "call with the same OUT: it becomes another attempt of the run",
            )
        for part, steps in listed:
            if isinstance(part.source, ScalarLog):
                common -= _pending_steps(part.source, steps, common)
        if not common:
            raise NotYet(
                "the log of scalars has no steps yet",
                where=", ".join(str(part.source.location) for part in self._parts),
                why="it is still being written",
                remedy="run again later; natgrad process and ingest wait for it with --follow",
            )
        self._steps = {
            number: tuple((part, steps[number]) for part, steps in listed if number in steps)
            for number in sorted(common)
        }
        return [_joined(number, steps) for number, steps in self._steps.items()]

    def earlier(self) -> list[JoinedSource]:
        """Return the run as it was before each restart; see `natgrad.sources.base.Restarted`."""
        return [
            JoinedSource([*self._sources[:index], one, *self._sources[index + 1 :]], self._shifts)
            for index, source in enumerate(self._sources)
            for one in before_restarts(source)
        ]

    @staticmethod
    def _last_state(common: set[int], parts: Sequence[tuple[_Part, Mapping[int, LoggedStep]]]) -> set[int]:
        """Return the state to which the last update of the common steps leads, if only gradients lack it."""
        later = {number for _, steps in parts for number in steps if common and number > max(common)}
        if not later or all(later <= steps.keys() for _, steps in parts):
            return set()
        of_parameters = []
        for part, steps in parts:
            own = steps[max(common)]
            try:
                with part.source.open(own) as reader:
                    if STATES[0] in part.select(reader.content()).arrays:
                        of_parameters.append(steps)
            except InputError:  # the step is read again later, and then the error is reported
                return set()
        return {min(later)} if of_parameters and all(min(later) in steps for steps in of_parameters) else set()

    @contextmanager
    def open(self, step: LoggedStep) -> Iterator[StepReader]:
        """Open a step in all sources; see `natgrad.sources.base.Source`."""
        parts = self._steps[step.number]
        with ExitStack() as stack:
            readers = [stack.enter_context(part.source.open(own)) for part, own in parts]
            yield _JoinedStep(step, parts, readers)

    def configuration(self, step: LoggedStep, notes: list[str]) -> dict[str, Scalar]:
        """Return the configuration of a run from all sources; see `natgrad.sources.configured.Configured`."""
        found: dict[str, Scalar] = {}
        sources = {id(part.source): (part.source, own) for part, own in self._steps[step.number]}
        for source, own in sources.values():
            found = configuration_of(source, own, notes) | found
        return found


def _parts(source: Source, shift: Mapping[str, int]) -> list[_Part]:
    """Split a source into parts, one for each shift. The part without shift comes first."""
    shift = {} if isinstance(source, ScalarLog) else shift
    quantities = (*STATE_QUANTITIES, SKIPPED)
    return [
        _Part(source, by, frozenset(n for n in quantities if shift.get(n, 0) == by), frozenset(shift))
        for by in sorted({shift.get(name, 0) for name in quantities}, key=lambda by: (by != 0, by))
    ]


def _joined(number: int, parts: Sequence[tuple[_Part, LoggedStep]]) -> LoggedStep:
    """Combine the parts of a step. A log of many steps is identified by its values of this step."""
    files = [own for part, own in parts if not isinstance(part.source, ScalarLog)]
    return LoggedStep(
        number,
        files[0].storage,
        tuple(entry for own in files[1:] for entry in (own.storage, *own.others)) + files[0].others,
        values=" ".join(own.values for _, own in parts if own.values),
        content=" ".join(own.content for own in files) if all(own.content for own in files) else "",
        origin=files[0].origin,
        step_span=max(own.step_span for _, own in parts),
    )


def _pending_steps(log: ScalarLog, steps: Mapping[int, LoggedStep], common: set[int]) -> set[int]:
    """Return the steps that a log of scalars does not have yet. Warn if it has no step of the run.

    The step after the last one that it has is not pending: the last update leads to it.
    """
    last = max(steps, default=-1)
    pending = {number for number in common if number > last} if log.growing() else set()
    if pending and last in common:
        pending -= {min(pending)}
    if pending:
        _log.warning(
            "%d steps are left for the next pass because %s is still being written and does not have them yet; "
            "the first is %d",
            len(pending),
            log.location,
            min(pending),
        )
    if common - pending and not common & set(steps):
        _log.warning(
            "%s has no scalars for any step of the run: its steps are %s",
            log.location,
            ", ".join(map(str, sorted(steps)[:4])) + (", ..." if len(steps) > 4 else ""),
        )
    return pending


class _JoinedStep(ReaderByArray):
    """Reader of one step from several sources."""

    def __init__(
        self, step: LoggedStep, parts: Sequence[tuple[_Part, LoggedStep]], readers: Sequence[StepReader]
    ) -> None:
        self._step, self._parts, self._readers = step, parts, readers
        self._owners: dict[str, StepReader] | None = None

    def content(self) -> StepContent:
        """Describe the step. Each array must come from one source; a scalar comes from the first that has it."""
        arrays: dict[str, Mapping[str, LoggedTensor]] = {}
        origins: dict[str, LoggedStep] = {}
        owners: dict[str, StepReader] = {}
        optimizer: OptimizerState | None = None
        state_reader: StepReader | None = None
        contents = self._contents()
        notes = [note for content in contents for note in content.notes]
        for (_, own), reader, content in zip(self._parts, self._readers, contents, strict=True):
            for array, tensors in content.arrays.items():
                if array in arrays:
                    raise InputError(
                        f"two sources contain the {array}s: {origins[array].path} and {own.path}",
                        where=where(self._step, array),
                        why="one is the folder of a restarted run, or both contain more than is needed",
                        remedy="pass the folder of a restarted run separately, in a second call with the same OUT: "
                        "it becomes another attempt of the run; otherwise select keys of each source with map in a "
                        "run file",
                    )
                arrays[array], origins[array], owners[array] = tensors, own, reader
            state = content.optimizer
            if state is not None and state != state.hyperparameters() and state_reader is None:
                optimizer, state_reader = state, reader
        optimizer = self._with_rates(optimizer, contents)
        if optimizer is not None and state_reader is not None:
            owners.update(dict.fromkeys(optimizer.readable, state_reader))
        scalars, differences = self._scalars(contents, () if optimizer is None else optimizer.group_rates)
        self._owners = owners
        return StepContent(
            arrays,
            scalars,
            tuple(dict.fromkeys(key for content in contents for key in content.unused)),
            tuple(dict.fromkeys(notes)),
            {tensor: target for content in contents for tensor, target in content.ties.items()},
            any(content.untrained for content in contents),
            optimizer,
            next((content.replicate_loss for content in contents if content.replicate_loss), ()),
            next((content.no_gradient for content in contents if content.no_gradient), ""),
            differences,
            next((content.alignment for content in contents if content.alignment), ""),
            {alias: name for content in contents for alias, name in content.aliases.items()},
            {name: error for content in contents for name, error in content.absent.items()},
            next((content.recorded for content in contents if content.recorded), ()),
            next((content.evaluation for content in contents if content.evaluation != "unknown"), "unknown"),
        )

    def _with_rates(
        self, optimizer: OptimizerState | None, contents: Sequence[StepContent]
    ) -> OptimizerState | None:
        """Return the state of the optimizer, with the hyperparameters of the first source that has them."""
        states = [content.optimizer for content in contents if content.optimizer is not None]
        rated = next((state for state in states if state.group_rates), None)
        decayed = next((state for state in states if state.decays), None)
        if rated is not None:
            optimizer = (optimizer or OptimizerState()).with_rates(rated.rates, rated.group_rates)
        if decayed is not None:
            optimizer = (optimizer or OptimizerState()).with_decays(decayed.decays)
        return optimizer

    def _scalars(
        self, contents: Sequence[StepContent], group_rates: Sequence[float]
    ) -> tuple[dict[str, float], tuple[Difference, ...]]:
        """Return each scalar from the first source that has it, and the other values that differ.

        The learning rate is that of the optimizer, if one of the sources has its state.
        """
        scalars: dict[str, float] = {}
        origins: dict[str, str] = {}
        differences = [difference for content in contents for difference in content.differences]
        pairs = [
            (content, str(part.source.location)) for (part, _), content in zip(self._parts, contents, strict=True)
        ]
        optimizers = [pair for pair in pairs if pair[0].optimizer is not None and pair[0].optimizer.group_rates]
        for content, location in (*optimizers[:1], *pairs):
            for name, value in content.scalars.items():
                groups = name == "learning_rate" and optimizers and content is not optimizers[0][0]
                if groups and name not in scalars:  # the groups of the optimizer differ, so that there is no scalar
                    rate = value if value in group_rates else group_rates[0]
                    entry = Difference(name, f"the optimizer in {optimizers[0][1]}", rate, location, value)
                else:
                    used = scalars.setdefault(name, value)
                    entry = Difference(name, origins.setdefault(name, location), used, location, value)
                differences += [entry] if entry.matters else []
        return scalars, tuple(dict.fromkeys(differences))

    def _contents(self) -> list[StepContent]:
        """Describe the parts. Parts without shapes are described with the parameters of the others."""
        pairs = list(zip((part for part, _ in self._parts), self._readers, strict=True))
        contents = [part.select(reader.content()) for part, reader in pairs]
        parameters = next((c.arrays[STATES[0]] for c in contents if c.arrays.get(STATES[0])), None)
        if parameters is None:
            return contents
        return [
            part.select(reader.shaped(parameters)) if isinstance(reader, Unshaped) else content
            for (part, reader), content in zip(pairs, contents, strict=True)
        ]

    def products(self, tensors: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the ledger of the update from this step; see `natgrad.sources.base.Recorded`."""
        owner = self._owner(STATES[0])
        assert isinstance(owner, Recorded)
        return owner.products(tensors)

    def _owner(self, array: str) -> StepReader:
        if self._owners is None:
            self.content()
        assert self._owners is not None
        return self._owners[array]
