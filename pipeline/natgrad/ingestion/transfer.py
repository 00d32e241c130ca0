"""Copy steps into a trajectory, slice by slice, one row of chunks after the other, and commit them."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.ingestion.description import scalar_of
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits, Layout, storage_dtype, widened
from natgrad.schema.names import METRIC_EIGENVALUES, replicate_of
from natgrad.sources.base import Source, StepContent, StepReader
from natgrad.sources.changes import identity
from natgrad.sources.optimizers.logged_metric import extremes
from natgrad.sources.optimizers.state import OptimizerState, RotatedMetric
from natgrad.sources.steps import LoggedStep, NotYet, where
from natgrad.store import Trajectory, checksum
from natgrad.theory.preconditioners import rotated_eigenvalues

__all__ = ["EXTREMES", "NewRow", "Progress", "Writer", "fill_row"]

_log = logging.getLogger("natgrad.ingestion")

EXTREMES = ("exp_avg_sq_min", "exp_avg_sq_max")
"""Arrays (step, tensor) that are found while a step is copied."""

_OPEN_STEPS, _NOTES_SHOWN = 4, 5
_BFLOAT16_NAN = 0x7FC0
_NUMBER = re.compile(r"-?\d[\d.e+-]*")

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""


@dataclass(frozen=True)
class NewRow:
    """A row to be written.

    Attributes
    ----------
    step : LoggedStep
    attempt : int
    repeats : int, optional
        Committed row that is written again: the last of its run, where rows of other runs have come since.
    """

    step: LoggedStep
    attempt: int
    repeats: int | None = None


@dataclass
class _NoMetric:
    """Why a metric of the optimizer is not known, and of which tensors and steps."""

    why: str
    tensors: list[str] = field(default_factory=list)
    steps: list[LoggedStep] = field(default_factory=list)


def fill_row(
    reader: StepReader,
    content: StepContent,
    name: str,
    dtype: str,
    layout: Layout,
    first: int,
    last: int,
    out: NDArray[Any],
) -> None:
    """Read the elements ``first`` to ``last`` of a step into a row of a chunk."""
    array, replicate = replicate_of(name)
    for index, low, high in layout.segments(first, last):
        tensor = layout.tensors[index]
        part = out[low - first : high - first]
        if tensor.name not in content.arrays.get(array, ()):
            part[:] = _BFLOAT16_NAN if dtype == "bfloat16" else np.nan
            continue
        logged = content.arrays[array][tensor.name].dtype
        # Replicates of a tensor lie one after the other.
        start = low - tensor.offset + (replicate or 0) * tensor.size
        if logged == dtype:
            reader.read(array, tensor.name, start, part)
        else:
            # A mixed model is stored in the smallest dtype that holds all of it exactly.
            words = np.empty(part.size, storage_dtype(logged))
            reader.read(array, tensor.name, start, words)
            part[:] = widened(words, logged)


def _extremes(words: NDArray[Any], dtype: str) -> tuple[float, float]:
    values = widened(words, dtype)
    return float(values.min()), float(values.max())


def _all_finite(words: NDArray[Any], dtype: str) -> bool:
    if dtype == "bfloat16":
        return not bool(((words & 0x7F80) == 0x7F80).any())
    # A sum of squares is one pass at memory speed; only where it is not finite every value is looked at.
    with np.errstate(all="ignore"):
        if dtype in ("float32", "float64") and np.isfinite(words @ words):
            return True
    return bool(np.isfinite(words).all())


class _OpenSteps:
    """The steps opened last, as one chunk column after the other reads the same few of a wide model."""

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


class Writer:
    """Copies steps into the trajectory, one row of chunks after the other, and commits them."""

    def __init__(
        self,
        log: Source,
        trajectory: Trajectory,
        contents: dict[LoggedStep, StepContent],
        identities: Mapping[LoggedStep, Mapping[str, Any]],
        warnings: list[str],
        limits: IngestLimits,
    ) -> None:
        self._log, self._trajectory, self._contents, self._identities = log, trajectory, contents, identities
        self._warnings, self._limits = warnings, limits
        self._not_finite: list[str] = []
        self._no_metric: dict[str, _NoMetric] = {}
        # Smallest and largest element of each tensor, of the rows of one commit.
        self._extremes = np.empty((0, 2, len(trajectory.layout.tensors)))
        self._eigenvalues = np.empty((0, len(METRIC_EIGENVALUES), len(trajectory.layout.tensors)))
        # What is read before any of it is written: of a chunk of many steps all arrays, so that a step is opened
        # once, and of one of a single step (a wide model) one after the other, so that replicates share a buffer.
        names = list(trajectory.dtypes)
        self._together = [names] if trajectory.chunk[0] > 1 else [[name] for name in names]
        self._buffers: dict[str, NDArray[Any]] = {}

    def write(self, new: Sequence[NewRow], progress: Progress | None) -> None:
        """Read rows and write them, and commit some at a time."""
        rows = self._trajectory.chunk[0]
        sizes = [storage_dtype(dtype).itemsize for dtype in self._trajectory.dtypes.values()]
        row_bytes = sum(sizes) * self._trajectory.layout.elements
        per_commit = max(1, self._limits.commit_bytes // max(1, rows * row_bytes)) * rows
        done = 0
        while done < len(new):
            # The first commit fills up a chunk that an earlier ingest left half full.
            count = per_commit - self._trajectory.n_states % rows
            self._commit(new[done : done + count])
            done = min(done + count, len(new))
            if progress is not None:
                progress(done, len(new))
        if self._not_finite:
            shown = "; ".join(self._not_finite[:_NOTES_SHOWN])
            more = len(self._not_finite) - _NOTES_SHOWN
            self._warnings.append(f"not finite: {shown}" + (f"; and {more} more" if more > 0 else ""))
        for note in itertools.islice(self._no_metric.values(), _NOTES_SHOWN):
            first, several = repr(note.tensors[0]), len(note.tensors) > 1
            subject = f"{len(note.tensors)} tensors, first {first}," if several else f"tensor {first}"
            steps = f"in {len(note.steps)} steps, first" if len(note.steps) > 1 else "in"
            place = f"{steps} {note.steps[0].storage.name}"
            self._warnings.append(f"the metric of {subject} is not known: {note.why} ({place})")
        more = len(self._no_metric) - _NOTES_SHOWN
        if more > 0:
            self._warnings.append(f"for {more} other reasons, more metrics are not known")

    def _commit(self, new: Sequence[NewRow]) -> None:
        trajectory = self._trajectory
        for row in new:
            self._require_unchanged(row)
        checksums: dict[str, list[list[int]]] = {name: [[] for _ in new] for name in trajectory.dtypes}
        self._extremes = np.full((len(new), 2, len(trajectory.layout.tensors)), np.nan)
        self._eigenvalues = np.full((len(new), len(METRIC_EIGENVALUES), len(trajectory.layout.tensors)), np.nan)
        start, rows = trajectory.n_states, trajectory.chunk[0]
        position = 0
        while position < len(new):
            count = min(rows - (start + position) % rows, len(new) - position)
            self._write_chunks(new, position, count, start + position, checksums)
            position += count
        for row in new:
            self._require_unchanged(row)
        for index, row in enumerate(new):
            self._find_rotated(row, index)
        trajectory.commit(
            [row.step.number for row in new],
            {
                **{name: [self._scalar(name, row) for row in new] for name in trajectory.scalars},
                **{name: [self._table(name, row, i) for i, row in enumerate(new)] for name in trajectory.tables},
            },
            [self._source(row) for row in new],
            checksums,
            [row.attempt for row in new],
            [row.step.run for row in new],
        )

    def _scalar(self, name: str, row: NewRow) -> float | Sequence[float]:
        if row.repeats is not None:
            value: float | Sequence[float] = self._trajectory.scalar(name)[row.repeats].tolist()
            return value
        return scalar_of(self._contents[row.step], name)

    def _table(self, name: str, row: NewRow, position: int) -> NDArray[np.float64]:
        if row.repeats is not None:
            return np.asarray(self._trajectory.scalar(name)[row.repeats])
        if name in EXTREMES:
            return np.asarray(self._extremes[position, EXTREMES.index(name)])
        if name in METRIC_EIGENVALUES:
            return np.asarray(self._eigenvalues[position, METRIC_EIGENVALUES.index(name)])
        state = self._contents[row.step].optimizer
        values = {} if state is None else state.numbers.get(name, {})
        if state is not None and name in ("metric_factored", "metric_rescaled"):
            every = name == "metric_factored"
            values = {tensor: 1.0 for tensor, metric in state.metrics.items() if every or metric.rescaled}
        return np.array([values.get(tensor, math.nan) for tensor in self._trajectory.layout.names])

    @cached_property
    def _ingested(self) -> list[dict[str, Any]]:
        """Return the sources of the states that were stored before: some are repeated."""
        return self._trajectory.sources()

    def _source(self, row: NewRow) -> Mapping[str, Any]:
        if row.repeats is not None:
            return self._ingested[row.repeats]
        return self._identities[row.step]

    def _require_unchanged(self, row: NewRow) -> None:
        step = row.step
        if row.repeats is None and identity(step, fresh=True) != self._identities[step]:
            raise NotYet(
                f"step {step.number} changed while it was read",
                where=where(step),
                why="the training run is still writing this file",
                remedy="let the training run write each step under a temporary name and rename it; run again",
            )

    def _write_chunks(
        self,
        new: Sequence[NewRow],
        position: int,
        count: int,
        start: int,
        checksums: Mapping[str, list[list[int]]],
    ) -> None:
        """Read and write one row of chunks, column by column."""
        with ExitStack() as stack:
            opened = _OpenSteps(self._log, stack)
            for column, names in itertools.product(range(self._trajectory.columns), self._together):
                for row in range(count):
                    for name in names:
                        sums = checksums[name][position + row]
                        self._read_row(opened, new[position + row], position + row, name, column, row, sums)
                    if column == 0 and names is self._together[0]:
                        self._find_factored(opened, new[position + row], position + row)
                for name in names:
                    self._trajectory.write(name, start, column, self._buffer(name)[:count])

    def _buffer(self, name: str) -> NDArray[Any]:
        key = replicate_of(name)[0] if len(self._together) > 1 else name
        if key not in self._buffers:
            dtype = storage_dtype(self._trajectory.dtypes[name])
            self._buffers[key] = np.zeros(self._trajectory.chunk, dtype)
        return self._buffers[key]

    def _read_row(
        self,
        opened: _OpenSteps,
        new: NewRow,
        position: int,
        name: str,
        column: int,
        row: int,
        checksums: list[int],
    ) -> None:
        """Read the elements of a column of a step into a row of the buffer."""
        trajectory, buffer = self._trajectory, self._buffer(name)
        dtype, (first, last) = trajectory.dtypes[name], trajectory.column(column)
        out = buffer[row]
        if new.repeats is None:
            content = self._contents[new.step]
            fill_row(opened.get(new.step), content, name, dtype, trajectory.layout, first, last, out)
        else:
            trajectory.read(name, new.repeats, new.repeats + 1, column, buffer[row : row + 1])
        words = out[: last - first]
        checksums.append(checksum(words))
        if not _all_finite(words, dtype):
            self._note_not_finite(new.step, name, dtype, first, last, out)
        if name == "exp_avg_sq":
            self._widen(position, dtype, first, last, out)

    def _find_factored(self, opened: _OpenSteps, new: NewRow, position: int) -> None:
        """Find the eigenvalues of the metrics that are saved as factors, of one tensor after the other."""
        state = self._state(new)
        # Tensors that share a block have one metric.
        known: dict[Any, tuple[float, float]] = {}
        for tensor, metric in state.metrics.items():
            if isinstance(metric, RotatedMetric) or tensor not in self._trajectory.layout.names:
                continue
            try:
                if metric not in known:
                    ends = extremes(opened.get(new.step), tensor, metric, self._limits.largest_factor)
                    known |= {metric: ends} if metric.blocks else {}
                    self._keep(tensor, position, ends, follows=metric.follows)
                else:
                    self._keep(tensor, position, known[metric], follows=metric.follows)
            except InputError as error:
                self._note_no_metric(new.step, tensor, f"{metric.rule}: {error.what}")

    def _find_rotated(self, new: NewRow, position: int) -> None:
        """Find the eigenvalues of the metrics of SOAP, once the extremes of ``exp_avg_sq`` are known."""
        names = self._trajectory.layout.names
        for tensor, metric in self._state(new).metrics.items():
            if not isinstance(metric, RotatedMetric) or tensor not in names:
                continue
            smallest, largest = map(float, self._extremes[position, :, names.index(tensor)])
            try:
                if metric.problem:
                    raise InputError(metric.problem)
                ends = rotated_eigenvalues(smallest, largest, metric.epsilon, metric.bias)
                self._keep(tensor, position, ends, follows=False)
            except InputError as error:
                self._note_no_metric(new.step, tensor, f"SOAP: {error.what}")

    def _state(self, new: NewRow) -> OptimizerState:
        state = None if new.repeats is not None else self._contents[new.step].optimizer
        return state or OptimizerState()

    def _keep(self, tensor: str, position: int, ends: tuple[float, float], *, follows: bool) -> None:
        index, first = self._trajectory.layout.names.index(tensor), 2 * follows
        self._eigenvalues[position, first : first + 2, index] = ends

    def _note_no_metric(self, step: LoggedStep, tensor: str, why: str) -> None:
        # The numbers in a reason differ from step to step: those of the first are told.
        note = self._no_metric.setdefault(_NUMBER.sub("", why), _NoMetric(why))
        note.tensors += [tensor] if tensor not in note.tensors else []
        note.steps += [step] if step not in note.steps[-1:] else []

    def _widen(self, position: int, dtype: str, first: int, last: int, out: NDArray[Any]) -> None:
        """Take the elements ``first`` to ``last`` into the smallest and largest of their tensors."""
        for index, low, high in self._trajectory.layout.segments(first, last):
            smallest, largest = _extremes(out[low - first : high - first], dtype)
            extremes = self._extremes[position, :, index]
            begun = low > self._trajectory.layout.tensors[index].offset
            extremes[0] = np.minimum(extremes[0], smallest) if begun else smallest
            extremes[1] = np.maximum(extremes[1], largest) if begun else largest

    def _note_not_finite(
        self, step: LoggedStep, name: str, dtype: str, first: int, last: int, out: NDArray[Any]
    ) -> None:
        array, _ = replicate_of(name)
        for index, low, high in self._trajectory.layout.segments(first, last):
            tensor = self._trajectory.layout.tensors[index].name
            # What the optimizer has nothing of was filled with NaN.
            logged = step not in self._contents or tensor in self._contents[step].arrays.get(array, ())
            if logged and not _all_finite(out[low - first : high - first], dtype):
                self._not_finite.append(where(step, name, tensor))
