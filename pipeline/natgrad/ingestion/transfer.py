"""Copy steps into a trajectory, slice by slice and one row of chunks at a time, and commit them.

If the trajectory is in place, arrays that are plain bytes in the files of the log are located instead of copied.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.ingestion.description import scalar_of
from natgrad.ingestion.in_place import Locator, Relocated
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits, Layout, TrajectoryShape, missing_word, storage_dtype, widened
from natgrad.schema.logs import logger
from natgrad.schema.names import (
    ATTEMPT,
    METRIC_EIGENVALUES,
    OPTIMIZER_STATES,
    RECOVERY,
    REPLICATE_STATES,
    RUN,
    STEP,
    replicate_of,
)
from natgrad.sources.base import Source, StepContent, StepReader
from natgrad.sources.listed import ListedLog
from natgrad.sources.optimizers.logged_metric import extremes
from natgrad.sources.optimizers.state import OptimizerState, RotatedMetric
from natgrad.sources.recovered import RecoveredGradients
from natgrad.sources.steps import LoggedStep, NotYet, where
from natgrad.store import Trajectory, checksum
from natgrad.store.references import StateReference
from natgrad.theory.preconditioners import rotated_eigenvalues

__all__ = ["EXTREMES", "NewState", "Progress", "Writer", "buffer_bytes", "copy_unlocated", "fill_state"]

_log = logger("natgrad.ingestion")

EXTREMES = ("exp_avg_sq_min", "exp_avg_sq_max")
"""Arrays (step, tensor) that are computed while a step is copied."""

_OPEN_STEPS, _NOTES_SHOWN = 4, 5
_LOCATED_STATES = 1024
"""States of a commit if they are not copied."""
_NUMBER = re.compile(r"-?\d[\d.e+-]*")

Progress = Callable[[int, int], None]
"""Callback that receives the number of steps done and the total number of steps."""


@dataclass(frozen=True)
class NewState:
    """A state to be written.

    Attributes
    ----------
    step : LoggedStep
    attempt : int
    repeats : int, optional
        Index of a committed state that is written as it is: the last of its run, if states of other runs follow it,
        or one that is provisional, but will not be completed.
    again : bool
        An incomplete state of this step is committed; the log may now contain what it lacks.
    """

    step: LoggedStep
    attempt: int
    repeats: int | None = None
    again: bool = False

    def is_of(self, other: NewState) -> bool:
        """Return True if both states have the same run, step and attempt."""
        return (self.step.run, self.step.number, self.attempt) == (other.step.run, other.step.number, other.attempt)

    def follows(self, other: NewState | None) -> bool:
        """Return True if the other state is of the same run and attempt."""
        return other is not None and (self.step.run, self.attempt) == (other.step.run, other.attempt)


@dataclass
class _UnknownMetric:
    """Reason why a metric of the optimizer is not known, and the affected tensors and steps."""

    why: str
    tensors: list[str] = field(default_factory=list)
    steps: list[LoggedStep] = field(default_factory=list)


def fill_state(
    reader: StepReader,
    content: StepContent,
    name: str,
    dtype: str,
    layout: Layout,
    first: int,
    last: int,
    out: NDArray[Any],
) -> None:
    """Read the elements ``first`` to ``last`` of an array of a step into ``out``.

    Elements of tensors that the step does not contain become NaN.
    """
    array, replicate = replicate_of(name)
    for index, low, high in layout.segments(first, last):
        tensor = layout.tensors[index]
        segment = out[low - first : high - first]
        if tensor.name not in content.arrays.get(array, ()):
            segment[:] = missing_word(dtype)
            continue
        logged = content.arrays[array][tensor.name].dtype
        # The replicates of a tensor are stored one after another.
        start = low - tensor.offset + (replicate or 0) * tensor.size
        if logged == dtype:
            reader.read(array, tensor.name, start, segment)
        else:
            # A model with several dtypes is stored in the smallest dtype that represents all of them exactly.
            words = np.empty(segment.size, storage_dtype(logged))
            reader.read(array, tensor.name, start, words)
            segment[:] = widened(words, logged)


def _extremes(words: NDArray[Any], dtype: str) -> tuple[float, float]:
    values = widened(words, dtype)
    return float(values.min()), float(values.max())


def _all_finite(words: NDArray[Any], dtype: str) -> bool:
    if dtype == "bfloat16":
        return not bool(((words & 0x7F80) == 0x7F80).any())
    # A sum of squares takes one pass at memory speed. Only if it is not finite, each value is checked.
    with np.errstate(all="ignore"):
        if dtype in ("float32", "float64") and np.isfinite(words @ words):
            return True
    return bool(np.isfinite(words).all())


class _OpenSteps:
    """Cache of open steps. In a wide model, each chunk column reads the same few steps."""

    def __init__(self, log: Source, stack: ExitStack) -> None:
        self._log, self._stack = log, stack
        self._open: OrderedDict[LoggedStep, tuple[AbstractContextManager[StepReader], StepReader]] = OrderedDict()
        stack.callback(self.close)

    def get(self, step: LoggedStep) -> StepReader:
        if step not in self._open:
            if len(self._open) == _OPEN_STEPS:
                _, (oldest, _) = self._open.popitem(last=False)
                oldest.__exit__(None, None, None)
            manager = self._log.open(step)
            self._open[step] = (manager, manager.__enter__())
        return self._open[step][1]

    def close(self) -> None:
        while self._open:
            _, (manager, _) = self._open.popitem()
            manager.__exit__(None, None, None)


def contiguous(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yield the contiguous ranges of True.

    Examples
    --------
    >>> list(contiguous([True, True, False, True]))
    [(0, 2), (3, 4)]
    """
    edges = np.flatnonzero(np.diff([False, *flags, False])).tolist()
    yield from zip(edges[::2], edges[1::2], strict=True)


def buffer_bytes(shape: TrajectoryShape) -> int:
    """Return the bytes of the buffers of a `Writer`: a chunk of each array. See there for replicates."""
    copies = shape.replicates if shape.chunk[0] > 1 else 1
    return math.prod(shape.chunk) * sum(
        storage_dtype(dtype).itemsize * (copies if name in REPLICATE_STATES else 1)
        for name, dtype in shape.dtypes.items()
    )


def copy_unlocated(
    log: Source, trajectory: Trajectory, relocated: Mapping[int, Relocated]
) -> dict[str, dict[tuple[int, int], int]]:
    """Copy the chunks of committed states that were in the files of the log, and are no longer plain bytes there.

    Returns
    -------
    dict
        By array, the checksum of each state and column that was copied.
    """
    chunks: dict[tuple[str, int, int], list[int]] = {}
    for state, (_, _, reference) in relocated.items():
        before = trajectory.references.state(state)
        for name, column in itertools.product(trajectory.dtypes, range(trajectory.columns)):
            is_lost = not trajectory.refers_to(reference, name, column)
            if is_lost and trajectory.refers_to(before, name, column):
                chunks.setdefault((name, state // trajectory.chunk[0], column), []).append(state)
    found: dict[str, dict[tuple[int, int], int]] = {}
    with ExitStack() as stack:
        opened = _OpenSteps(log, stack)
        for (name, index, column), states in chunks.items():
            dtype, (first, last) = trajectory.dtypes[name], trajectory.column(column)
            block = trajectory.copied_states(name, index, column)
            for state in states:
                step, content, _ = relocated[state]
                words = block[state - index * trajectory.chunk[0]]
                fill_state(opened.get(step), content, name, dtype, trajectory.layout, first, last, words)
                found.setdefault(name, {})[state, column] = checksum(words[: last - first])
            trajectory.write_chunk(name, index, column, block)
    return found


class Writer:
    """Copy steps into a trajectory, one row of chunks at a time, and commit them.

    Attributes
    ----------
    new_steps : int
        Number of committed steps that were not stored before.
    completed_steps : int
        Number of committed steps that were stored before, but lacked something that the log has now.
    """

    def __init__(
        self,
        log: ListedLog,
        trajectory: Trajectory,
        contents: dict[LoggedStep, StepContent],
        warnings: list[str],
        limits: IngestLimits,
    ) -> None:
        self._log, self._trajectory, self._contents = log, trajectory, contents
        self._warnings, self._limits = warnings, limits
        self.new_steps = self.completed_steps = 0
        # What states of the trajectory lack, by state and by run and step.
        self._earlier: dict[int, tuple[str, ...]] = {}
        self._lacked: dict[tuple[str, int], tuple[str, ...]] = {}
        self._not_finite: list[str] = []
        self._no_metric: dict[str, _UnknownMetric] = {}
        # Smallest and largest element of each tensor, for the states of one commit.
        self._extremes = np.empty((0, 2, len(trajectory.layout.tensors)))
        self._recovery: list[Mapping[str, Mapping[str, float]]] = []
        self._eigenvalues = np.empty((0, len(METRIC_EIGENVALUES), len(trajectory.layout.tensors)))
        # Groups of arrays that are read before any of them is written. With several steps per chunk, all arrays
        # form one group, so each step is opened once. With one step per chunk (a wide model), each array is a
        # group, so replicates share a buffer.
        names = list(trajectory.dtypes)
        self._together = [names] if trajectory.chunk[0] > 1 else [[name] for name in names]
        self._buffers: dict[str, NDArray[Any]] = {}
        self._locator = Locator(trajectory)
        # For the states of one commit, and of arrays that had to be copied, the number of steps and the first one.
        self._references: list[StateReference | None] = []
        self._copied: dict[str, tuple[int, LoggedStep]] = {}
        # The numbers of copied chunks and of all chunks, for each array that is partly copied.
        self._divided: dict[str, tuple[int, int]] = {}

    def write(self, new: Sequence[NewState], progress: Progress | None) -> None:
        """Copy new states, with a commit after every few chunks."""
        steps = self._trajectory.chunk[0]
        sizes = [storage_dtype(dtype).itemsize for dtype in self._trajectory.dtypes.values()]
        state_bytes = sum(sizes) * self._trajectory.layout.elements
        per_commit = max(1, self._limits.commit_bytes // max(1, steps * state_bytes)) * steps
        if self._trajectory.in_place:
            per_commit = max(per_commit, -(-_LOCATED_STATES // steps) * steps)
        lacking = self._lacking(new)
        done = 0

        def report(start: int, states: int = 0) -> None:
            if progress is not None:
                progress(start + states, len(new))

        while done < len(new):
            # The first commit completes the chunk that an earlier ingest left incomplete.
            stop = min(done + per_commit - self._trajectory.n_fixed % steps, len(new))
            is_provisional = stop == len(new) and bool(lacking[-1])
            self._commit(new[done:stop], lacking[done:stop], is_provisional, partial(report, done))
            done = stop
            report(done)
        self._summarize(len(new))

    def _summarize(self, count: int) -> None:
        """Add the warnings about all new states."""
        for name, (copied, step) in self._copied.items():
            self._warnings.append(
                f"{name} of {copied} of {count} new steps is copied, because it is not plain bytes of one dtype "
                f"in the files (first in {step.storage.name})"
            )
        for name, (copied, chunks) in self._divided.items():
            self._warnings.append(
                f"{name}: {copied} of {chunks} new chunks are copied, because they are not one range of a file: a "
                "virtual chunk cannot have several"
            )
        if self._not_finite:
            shown = "; ".join(self._not_finite[:_NOTES_SHOWN])
            more = len(self._not_finite) - _NOTES_SHOWN
            self._warnings.append(f"not finite: {shown}" + (f"; and {more} more" if more > 0 else ""))
        for note in itertools.islice(self._no_metric.values(), _NOTES_SHOWN):
            first, several = repr(note.tensors[0]), len(note.tensors) > 1
            subject = f"{len(note.tensors)} tensors, first {first}," if several else f"tensor {first}"
            step_count = f"in {len(note.steps)} steps, first" if len(note.steps) > 1 else "in"
            files = f"{step_count} {note.steps[0].storage.name}"
            self._warnings.append(f"the metric of {subject} is not known: {note.why} ({files})")
        more = len(self._no_metric) - _NOTES_SHOWN
        if more > 0:
            self._warnings.append(f"for {more} other reasons, more metrics are not known")

    def _lacking(self, new: Sequence[NewState]) -> list[tuple[str, ...]]:
        """Return what each state lacks: arrays, and numbers that the state before it has."""
        trajectory = self._trajectory
        before: NewState | None = None
        if trajectory.n_fixed:
            last = trajectory.n_fixed - 1
            step, attempt, run = (int(trajectory.scalar(name)[last]) for name in (STEP, ATTEMPT, RUN))
            before = NewState(LoggedStep(step, trajectory.storage, run=trajectory.runs[run]), attempt, last)
        stored = any(state.repeats is not None or state.again for state in new)
        self._earlier = trajectory.lacking() if stored else {}
        runs, steps = trajectory.scalar(RUN), trajectory.scalar(STEP)
        self._lacked = {
            (trajectory.runs[runs[index]], int(steps[index])): lacks for index, lacks in self._earlier.items()
        }
        found: list[tuple[str, ...]] = []
        for state, following in itertools.zip_longest(new, new[1:]):
            lacks: tuple[str, ...] = ()
            if state.repeats is not None:
                lacks = self._earlier.get(state.repeats, ())
            elif following is None or not following.follows(state):
                content = self._contents[state.step]
                arrays = [name for name in trajectory.array_dtypes if name not in content.arrays]
                numbers = [
                    name
                    for name in trajectory.scalars
                    if before is not None
                    and state.follows(before)
                    and name not in content.numbers
                    and not np.isnan(self._scalar(name, before)).all()
                ]
                # Some steps have no optimizer state.
                lacks = (*arrays, *numbers) if numbers or {*arrays} - {*OPTIMIZER_STATES} else ()
            found.append(lacks)
            before = state
        return found

    def _commit(
        self,
        new: Sequence[NewState],
        lacking: Sequence[Sequence[str]],
        is_provisional: bool,
        report: Callable[[int], None],
    ) -> None:
        trajectory = self._trajectory
        for state in new:
            self._require_unchanged(state)
        self._references = [self._reference(state) for state in new] if trajectory.in_place else [None] * len(new)
        checksums: dict[str, list[list[int]]] = {name: [[] for _ in new] for name in trajectory.dtypes}
        self._extremes = np.full((len(new), 2, len(trajectory.layout.tensors)), np.nan)
        self._eigenvalues = np.full((len(new), len(METRIC_EIGENVALUES), len(trajectory.layout.tensors)), np.nan)
        self._recovery = [{} for _ in new]
        start, steps = trajectory.n_fixed, trajectory.chunk[0]
        position = 0
        while position < len(new):
            count = min(steps - (start + position) % steps, len(new) - position)
            self._write_chunks(new, position, count, start + position, checksums)
            position += count
            if position < len(new):  # the end is reported after the commit
                report(position)
        for state in new:
            self._require_unchanged(state)
        for index, state in enumerate(new):
            self._set_rotated_metrics(state, index)
        trajectory.commit(
            [state.step.number for state in new],
            self._numbers(new),
            [self._source(state) for state in new],
            checksums,
            [state.attempt for state in new],
            [state.step.run for state in new],
            lacking,
            provisional=is_provisional,
            references=self._references,
        )
        self._count(new, lacking)

    def _numbers(self, new: Sequence[NewState]) -> dict[str, list[Any]]:
        """Return the scalars and tables of new states."""
        trajectory = self._trajectory
        return {
            **{name: [self._scalar(name, state) for state in new] for name in trajectory.scalars},
            **{name: [self._table(name, state, i) for i, state in enumerate(new)] for name in trajectory.tables},
        }

    def _count(self, new: Sequence[NewState], lacking: Sequence[Sequence[str]]) -> None:
        """Count committed states."""
        self.new_steps += sum(state.repeats is None and not state.again for state in new)
        self.completed_steps += sum(
            state.again and self._lacked[state.step.run, state.step.number] != tuple(lacks)
            for state, lacks in zip(new, lacking, strict=True)
        )

    def _reference(self, state: NewState) -> StateReference | None:
        """Return where the arrays of a state are in the files of the log, and count those that must be copied."""
        trajectory = self._trajectory
        if state.repeats is not None:
            return trajectory.references.state(state.repeats)
        content = self._contents[state.step]
        with self._log.open(state.step) as reader:
            found = self._locator.reference_of(reader, state.step, content)
        for name in trajectory.dtypes:
            if replicate_of(name)[0] not in content.arrays:
                continue
            if found is None or name not in found.arrays:
                count, first = self._copied.get(name, (0, state.step))
                self._copied[name] = count + 1, first
            elif trajectory.storage.refers:
                columns = [trajectory.refers_to(found, name, column) for column in range(trajectory.columns)]
                if not all(columns):
                    copied, chunks = self._divided.get(name, (0, 0))
                    self._divided[name] = copied + columns.count(False), chunks + len(columns)
        return found

    def _is_copied(self, position: int, name: str, column: int) -> bool:
        return not self._trajectory.refers_to(self._references[position], name, column)

    def _scalar(self, name: str, state: NewState) -> float | Sequence[float]:
        if state.repeats is not None:
            value: float | Sequence[float] = self._trajectory.scalar(name)[state.repeats].tolist()
            return value
        return scalar_of(self._contents[state.step], name, self._trajectory.replicates)

    def _table(self, name: str, state: NewState, position: int) -> NDArray[np.float64]:
        if state.repeats is not None:
            return np.asarray(self._trajectory.scalar(name)[state.repeats])
        if name in EXTREMES:
            return np.asarray(self._extremes[position, EXTREMES.index(name)])
        if name in METRIC_EIGENVALUES:
            return np.asarray(self._eigenvalues[position, METRIC_EIGENVALUES.index(name)])
        if name in RECOVERY:
            of_tensors = self._recovery[position].get(name, {})
            return np.array([of_tensors.get(tensor, math.nan) for tensor in self._trajectory.layout.names])
        optimizer = self._contents[state.step].optimizer
        values = {} if optimizer is None else optimizer.numbers.get(name, {})
        if optimizer is not None and name in ("metric_factored", "metric_rescaled"):
            every = name == "metric_factored"
            values = {tensor: 1.0 for tensor, metric in optimizer.metrics.items() if every or metric.rescaled}
        return np.array([values.get(tensor, math.nan) for tensor in self._trajectory.layout.names])

    @cached_property
    def _ingested(self) -> list[dict[str, Any]]:
        """Sources of the states that were stored before, for the states that are written again."""
        return self._trajectory.sources()

    def _source(self, state: NewState) -> Mapping[str, Any]:
        if state.repeats is not None:
            return self._ingested[state.repeats]
        return self._log.identity(state.step)

    def _require_unchanged(self, state: NewState) -> None:
        step = state.step
        if state.repeats is None and not self._log.is_unchanged(step):
            raise NotYet(
                f"step {step.number} changed while it was read",
                where=where(step),
                why="the training run is still writing this file",
                remedy="run again; to avoid this, the training run should write each step to a temporary file "
                "and rename it",
            )

    def _write_chunks(
        self,
        new: Sequence[NewState],
        position: int,
        count: int,
        start: int,
        checksums: Mapping[str, list[list[int]]],
    ) -> None:
        """Read and write one row of chunks, column by column."""
        # A row of chunks covers ``count`` states: position is the index of its first state in new, start in the
        # store.
        recovers, end = bool({*RECOVERY} & {*self._trajectory.tables}), self._trajectory.columns - 1
        with ExitStack() as stack:
            opened = _OpenSteps(self._log, stack)
            for column, names in itertools.product(range(self._trajectory.columns), self._together):
                for row in range(count):
                    for name in names:
                        # A pass computes the checksums of the arrays that it reads.
                        sums = checksums[name][position + row]
                        if self._is_copied(position + row, name, column) or name not in self._trajectory.logged:
                            self._read_state(opened, new[position + row], position + row, name, column, row, sums)
                        else:
                            sums.append(0)
                    if column == 0 and names is self._together[0]:
                        self._set_factored_metrics(opened, new[position + row], position + row)
                    if recovers and column == end and names is self._together[-1]:
                        # The gradients were checked while they were read.
                        self._set_recovery(opened, new[position + row], position + row)
                for name in names:
                    copied = [self._is_copied(position + row, name, column) for row in range(count)]
                    for first, last in contiguous(copied):
                        self._trajectory.write(name, start + first, column, self._buffer(name)[first:last])

    def _buffer(self, name: str) -> NDArray[Any]:
        key = replicate_of(name)[0] if len(self._together) > 1 else name
        if key not in self._buffers:
            dtype = storage_dtype(self._trajectory.dtypes[name])
            self._buffers[key] = np.zeros(self._trajectory.chunk, dtype)
        return self._buffers[key]

    def _read_state(
        self,
        opened: _OpenSteps,
        new: NewState,
        position: int,
        name: str,
        column: int,
        row: int,
        checksums: list[int],
    ) -> None:
        """Read the elements of a chunk column of a step into a row of the buffer."""
        trajectory, buffer = self._trajectory, self._buffer(name)
        dtype, (first, last) = trajectory.dtypes[name], trajectory.column(column)
        out = buffer[row]
        if new.repeats is None:
            content = self._contents[new.step]
            fill_state(opened.get(new.step), content, name, dtype, trajectory.layout, first, last, out)
        else:
            trajectory.read(name, new.repeats, new.repeats + 1, column, buffer[row : row + 1])
        words = out[: last - first]
        checksums.append(checksum(words))
        is_missing = new.repeats is not None and replicate_of(name)[0] in self._earlier.get(new.repeats, ())
        if not is_missing and not _all_finite(words, dtype):
            self._record_nonfinite(new.step, name, dtype, first, last, out)
        if name == "exp_avg_sq":
            self._widen(position, dtype, first, last, out)

    def _set_factored_metrics(self, opened: _OpenSteps, new: NewState, position: int) -> None:
        """Compute the eigenvalues of the metrics that are saved as factors."""
        state = self._state(new)
        # Tensors in the same block have the same metric.
        known: dict[Any, tuple[float, float]] = {}
        for tensor, metric in state.metrics.items():
            if isinstance(metric, RotatedMetric) or tensor not in self._trajectory.layout.names:
                continue
            try:
                if metric not in known:
                    ends = extremes(opened.get(new.step), tensor, metric, self._limits.largest_factor)
                    known |= {metric: ends} if metric.blocks else {}
                    self._set_eigenvalues(tensor, position, ends, follows=metric.follows)
                else:
                    self._set_eigenvalues(tensor, position, known[metric], follows=metric.follows)
            except InputError as error:
                self._record_unknown_metric(new.step, tensor, f"{metric.rule}: {error.what}")

    def _set_recovery(self, opened: _OpenSteps, new: NewState, position: int) -> None:
        """Check the recovered gradients of a state, and take the numbers in `RECOVERY`."""
        if new.repeats is None and isinstance(reader := opened.get(new.step), RecoveredGradients):
            self._recovery[position] = reader.recovery()

    def _set_rotated_metrics(self, new: NewState, position: int) -> None:
        """Compute the eigenvalues of the metrics of SOAP from the extremes of ``exp_avg_sq``."""
        names = self._trajectory.layout.names
        for tensor, metric in self._state(new).metrics.items():
            if not isinstance(metric, RotatedMetric) or tensor not in names:
                continue
            smallest, largest = map(float, self._extremes[position, :, names.index(tensor)])
            try:
                if metric.problem:
                    raise InputError(metric.problem)
                ends = rotated_eigenvalues(smallest, largest, metric.epsilon, metric.bias)
                self._set_eigenvalues(tensor, position, ends, follows=False)
            except InputError as error:
                self._record_unknown_metric(new.step, tensor, f"SOAP: {error.what}")

    def _state(self, new: NewState) -> OptimizerState:
        state = None if new.repeats is not None else self._contents[new.step].optimizer
        return state or OptimizerState()

    def _set_eigenvalues(self, tensor: str, position: int, ends: tuple[float, float], *, follows: bool) -> None:
        index, first = self._trajectory.layout.names.index(tensor), 2 * follows
        self._eigenvalues[position, first : first + 2, index] = ends

    def _record_unknown_metric(self, step: LoggedStep, tensor: str, why: str) -> None:
        # Reasons that differ only in their numbers are combined. The warning contains the numbers of the first
        # step.
        note = self._no_metric.setdefault(_NUMBER.sub("", why), _UnknownMetric(why))
        note.tensors += [tensor] if tensor not in note.tensors else []
        note.steps += [step] if step not in note.steps[-1:] else []

    def _widen(self, position: int, dtype: str, first: int, last: int, out: NDArray[Any]) -> None:
        """Update the extremes of the tensors that contain the elements ``first`` to ``last``."""
        for index, low, high in self._trajectory.layout.segments(first, last):
            smallest, largest = _extremes(out[low - first : high - first], dtype)
            extremes = self._extremes[position, :, index]
            continues = low > self._trajectory.layout.tensors[index].offset
            extremes[0] = np.minimum(extremes[0], smallest) if continues else smallest
            extremes[1] = np.maximum(extremes[1], largest) if continues else largest

    def _record_nonfinite(
        self, step: LoggedStep, name: str, dtype: str, first: int, last: int, out: NDArray[Any]
    ) -> None:
        array, _ = replicate_of(name)
        for index, low, high in self._trajectory.layout.segments(first, last):
            tensor = self._trajectory.layout.tensors[index].name
            # Tensors without optimizer state were filled with NaN.
            logged = step not in self._contents or tensor in self._contents[step].arrays.get(array, ())
            if logged and not _all_finite(out[low - first : high - first], dtype):
                self._not_finite.append(where(step, name, tensor))
