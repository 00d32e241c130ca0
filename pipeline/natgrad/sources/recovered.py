"""Read a log without gradients as one whose gradients are recovered from consecutive states of the optimizer.

The gradient of the update from one state to the next belongs to the first of the two. The last state of a run has
none. States that no update connects, and updates that the optimizer skipped, have a gradient of NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.configuration import Scalar
from natgrad.schema.errors import InputError
from natgrad.schema.names import RECOVERY, STATES
from natgrad.sources.base import Ranged, Source, StepContent, StepReader
from natgrad.sources.byte_ranges import ByteRange, Placement
from natgrad.sources.configured import configuration_of
from natgrad.sources.optimizers.recovery import GRADES, RULE_NAMES, NotInvertible, TensorUpdate, keeps_state
from natgrad.sources.optimizers.state import OptimizerState
from natgrad.sources.steps import LoggedStep, LoggedTensor, Unreadable, where

__all__ = ["LARGEST_SPAN", "Recovered", "RecoveredGradients"]

LARGEST_SPAN = 20
"""Maximum number of updates between two states, unless the user requests more."""

_PARAMETER, _GRADIENT = STATES[:2]

_BATCH = (
    "gradients are recovered from the states of the optimizer: each is that of the mini-batch of its update, after "
    "clipping, if there was any"
)
_MEANS = (
    "states are several updates apart: each gradient is a mean over them, in which the last updates have the "
    "largest weights"
)
_SKIPPED = (
    "the optimizer skipped updates of tensors, as its counters show: their gradients are unknown, and are NaN"
)
_UNCONNECTED = "states to which no next state is connected have gradients of NaN"


@runtime_checkable
class RecoveredGradients(Protocol):
    """A step whose gradients are recovered."""

    def recovery(self) -> Mapping[str, Mapping[str, float]]:
        """Return the numbers in `natgrad.schema.names.RECOVERY` by tensor; empty if the step has no gradient.

        Raises
        ------
        InputError
            If the recovered gradients do not explain the logged displacement.
        """
        ...


class Recovered:
    """A log with gradients from its optimizer states.

    Parameters
    ----------
    source : Source
        A log without gradients.
    largest_span : int
        Maximum number of updates between two states.
    """

    def __init__(self, source: Source, largest_span: int = LARGEST_SPAN) -> None:
        self._source, self._largest_span = source, largest_span
        self._next: dict[LoggedStep, LoggedStep] = {}

    @property
    def location(self) -> Any:
        """Location of the log, for messages."""
        return self._source.location

    def steps(self) -> list[LoggedStep]:
        """List the steps; see `natgrad.sources.base.Source`."""
        steps = list(self._source.steps())
        self._next = {one: other for one, other in itertools.pairwise(steps) if one.run == other.run}
        return steps

    @contextmanager
    def open(self, step: LoggedStep) -> Iterator[StepReader]:
        """Open a step and the one after it; see `natgrad.sources.base.Source`."""
        following = self._next.get(step)
        with ExitStack() as stack:
            reader = stack.enter_context(self._source.open(step))
            after = None
            if following is not None:
                # If it is still being written, this is the last state at present.
                with suppress(Unreadable):
                    opened = stack.enter_context(self._source.open(following))
                    after = _Next(following, opened, opened.content())
            yield _RecoveredStep(step, reader, after, self._largest_span)

    def configuration(self, step: LoggedStep, notes: list[str]) -> dict[str, Scalar]:
        """Return the configuration of a run; see `natgrad.sources.configured.Configured`."""
        return configuration_of(self._source, step, notes)


@dataclass(frozen=True)
class _Next:
    """The state after an update."""

    step: LoggedStep
    reader: StepReader
    content: StepContent


@dataclass(frozen=True)
class _Pair:
    """A state and the next one, and the updates of the tensors between them.

    Attributes
    ----------
    updates : mapping
        Update of each tensor, by its name. The update is skipped if its span is 0.
    notes : tuple of str
    connected : bool
        False if no update leads from the first state to the second.
    """

    updates: Mapping[str, TensorUpdate]
    notes: tuple[str, ...] = ()
    connected: bool = True


class _RecoveredStep:
    """Reader of a step with the gradient of the update that follows it."""

    def __init__(self, step: LoggedStep, reader: StepReader, after: _Next | None, largest_span: int) -> None:
        self._step, self._reader, self._after = step, reader, after
        self._largest_span = largest_span
        self._pair: _Pair | None = None

    def content(self) -> StepContent:
        """Describe the step; see `natgrad.sources.base.StepReader`."""
        content = self._reader.content()
        if content.arrays.get(_GRADIENT):
            tensor = next(iter(content.arrays[_GRADIENT]))
            raise InputError(
                "the log already contains gradients, but their recovery from optimizer states was requested",
                where=where(self._step, _GRADIENT, tensor),
                remedy="omit --gradient from-optimizer",
            )
        if self._after is None:
            return content
        pair = self._matched(content)
        gradients = {
            name: LoggedTensor(content.arrays[_PARAMETER][name].shape, update.dtype)
            for name, update in pair.updates.items()
        }
        return replace(
            content,
            arrays={**content.arrays, _GRADIENT: gradients},
            notes=(*content.notes, _BATCH, *pair.notes),
            no_gradient="the optimizer has no state for them" if content.untrained else content.no_gradient,
        )

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        if array != _GRADIENT:
            self._reader.read(array, tensor, start, out)
            return
        pair = self._matched()
        update = pair.updates[tensor]
        if not pair.connected or update.is_skipped:
            out[:] = np.nan
            return
        position = 0
        with self._refused(tensor):
            for values in update.gradient(start, start + len(out)):
                with np.errstate(over="ignore"):
                    out[position : position + len(values)] = values
                position += len(values)

    def ranges(self, array: str, tensor: str) -> Sequence[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        if array == _GRADIENT:
            return None
        return self._reader.ranges(array, tensor) if isinstance(self._reader, Ranged) else None

    def placement(self, arrays: Collection[str]) -> Placement | None:
        """Return where the ranges of some arrays begin; see `natgrad.sources.base.Ranged`."""
        logged = [array for array in arrays if array != _GRADIENT]
        return self._reader.placement(logged) if isinstance(self._reader, Ranged) else None

    def recovery(self) -> Mapping[str, Mapping[str, float]]:
        """Check the recovered gradients; see `RecoveredGradients`."""
        numbers: dict[str, dict[str, float]] = {name: {} for name in RECOVERY}
        if self._after is None:
            return {}
        pair = self._matched()
        for tensor, update in pair.updates.items() if pair.connected else ():
            if update.is_skipped:
                continue
            with self._refused(tensor):
                check = update.check()
            if not check.holds:
                raise InputError(
                    f"the gradient recovered by inverting {update.rule_name} does not explain the update: "
                    f"{check.difference}",
                    where=where(self._step, _GRADIENT, tensor),
                    why="the learning rate or another option changed after the state was saved, something other "
                    "than the optimizer changed the parameters (averaging, clipping of weights), or the rule is a "
                    "different one with the same names",
                    remedy="log gradients, or record them in the training loop; without --gradient from-optimizer, "
                    "the log is processed without gradients",
                )
            values = (check.error_bound, check.residual, check.rounding, GRADES.index(check.grade))
            of_tensor = (*values, RULE_NAMES.index(update.rule_name), update.span)
            for name, value in zip(RECOVERY, of_tensor, strict=True):
                numbers[name][tensor] = float(value)
        return numbers

    @contextmanager
    def _refused(self, tensor: str) -> Iterator[None]:
        try:
            yield
        except NotInvertible as error:
            raise self._not_invertible(str(error), tensor) from error

    def _not_invertible(self, why: str, tensor: str = "") -> InputError:
        return InputError(
            f"cannot recover the gradient from the states of the optimizer: {why}",
            where=where(self._step, _GRADIENT, tensor),
            why=f"the next state is step {self._after.step.number}" if self._after is not None else "",
            remedy="log gradients, or record them in the training loop; without --gradient from-optimizer, the log "
            "is processed without gradients",
        )

    def _matched(self, content: StepContent | None = None) -> _Pair:
        """Match the states of both steps by tensor."""
        if self._pair is None:
            assert self._after is not None, "the last state has no gradient"
            self._pair = self._match(content or self._reader.content(), self._after)
        return self._pair

    def _match(self, content: StepContent, following: _Next) -> _Pair:
        before = self._state(self._step, content.optimizer)
        after = self._state(following.step, following.content.optimizer)
        parameters = tuple(part.arrays.get(_PARAMETER, {}) for part in (content, following.content))
        distance = following.step.number - self._step.number
        connected = not self._step.step_span or distance == self._step.step_span
        updates: dict[str, TensorUpdate] = {}
        skipped, started = False, any(state.arrays for state in after.rules.values())
        for tensor, state in after.rules.items():
            if tensor not in before.rules or not all(tensor in named for named in parameters):
                continue
            if started and keeps_state(state) and not state.arrays and not state.numbers:
                continue  # it has never had a gradient
            try:
                update = TensorUpdate(
                    tensor,
                    (self._reader, following.reader),
                    (parameters[0][tensor], parameters[1][tensor]),
                    (before.rules[tensor], state),
                    distance,
                )
            except NotInvertible as error:
                raise self._not_invertible(str(error), tensor) from error
            if update.span < 0:
                raise self._not_invertible(
                    f"the optimizer counts {-update.span} fewer updates at the next state, so it was restarted",
                    tensor,
                )
            if connected and update.span > self._largest_span:
                raise self._too_far(update.span, tensor)
            skipped |= not update.span
            updates[tensor] = update
        if not updates:
            raise self._not_invertible("it has no state for any parameter")
        means = connected and any(update.span > 1 for update in updates.values())
        notes = (
            *((_MEANS,) if means else ()),
            *((_SKIPPED,) if skipped and connected else ()),
            *(() if connected else (_UNCONNECTED,)),
        )
        return _Pair(updates, notes, connected)

    def _state(self, step: LoggedStep, state: OptimizerState | None) -> OptimizerState:
        """Return the state of the optimizer at a step, or raise an error if it cannot be used."""
        why = "" if state is None else state.unread or state.problem
        if state is None or why or not state.rules:
            what = why or "it contains none"
            raise InputError(
                f"cannot recover the gradient from the states of the optimizer: {what}",
                where=where(step),
                why="both states of an update need the state of the optimizer",
                remedy="save the optimizer with every state"
                + (
                    '; if its tensors cannot be assigned, write order = ["tensor", ...] into natgrad.toml in the '
                    "folder of the log"
                    if why
                    else ""
                )
                + "; without --gradient from-optimizer, the log is processed without gradients",
            )
        return state

    def _too_far(self, span: int, tensor: str) -> InputError:
        return InputError(
            f"the states are {span} updates apart, and the largest distance is {self._largest_span}",
            where=where(self._step, _GRADIENT, tensor),
            why="only a weighted mean of the gradients in between can be recovered, which represents the updates "
            "less well the more there are",
            remedy=f"save more states, or accept it with --largest-span {span}",
        )
