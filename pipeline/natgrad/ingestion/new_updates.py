"""Which rows a trajectory lacks: new steps, and those that a restarted run has logged again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from natgrad.ingestion.description import (
    describe_steps,
    optimizer_dtypes,
    parameters_of,
    scalar_of,
    stored_dtypes,
    with_optimizer,
)
from natgrad.ingestion.transfer import NewRow, fill_row
from natgrad.schema.errors import InputError
from natgrad.schema.layout import storage_dtype
from natgrad.schema.names import ATTEMPT, RUN, STEP
from natgrad.sources.base import Source
from natgrad.sources.changes import changed_lately, identity
from natgrad.sources.steps import LoggedStep, NotYet, Unreadable, where
from natgrad.store import Trajectory, checksum

__all__ = ["Extent", "finished_steps", "rows_to_write"]


@dataclass(frozen=True)
class Extent:
    """Steps of a trajectory, without its arrays: what options that depend on the steps are checked against.

    Attributes
    ----------
    rows : tuple of tuple
        Run, step and attempt of each state, in the order in which the states were logged.
    """

    rows: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, trajectory: Trajectory | None, new: Sequence[NewRow] = ()) -> Extent:
        """Return the extent of a trajectory once new rows are written."""
        rows: list[tuple[str, int, int]] = []
        if trajectory is not None:
            runs = [trajectory.runs[run] for run in trajectory.scalar(RUN)]
            columns = (trajectory.scalar(name).tolist() for name in (STEP, ATTEMPT))
            rows += zip(runs, *columns, strict=True)
        return cls((*rows, *((row.step.run, row.step.number, row.attempt) for row in new)))

    @property
    def attempts(self) -> int:
        """Number of attempts."""
        return 1 + max((attempt for _, _, attempt in self.rows), default=0)

    def updates(self, attempt: int | None = None) -> int:
        """Return the number of updates of the longest run, as it stood at an attempt (default: the newest)."""
        runs: dict[str, dict[int, int]] = {}
        for run, step, of_attempt in self.rows:
            if attempt is not None and of_attempt > attempt:
                continue
            states = runs.setdefault(run, {})
            # A new attempt supersedes the steps from its first one on.
            if of_attempt > max(states.values(), default=of_attempt):
                for later in [number for number in states if number >= step]:
                    del states[later]
            states[step] = of_attempt
        # No update leads from a state of one attempt to a state of the next.
        return max(
            (
                sum(states[a] == states[b] for a, b in itertools.pairwise(sorted(states)))
                for states in runs.values()
            ),
            default=0,
        )


def finished_steps(
    log: Source, listed: Sequence[LoggedStep], trajectory: Trajectory | None, warnings: list[str]
) -> list[LoggedStep]:
    """Leave out what is still being written: at the end of a run, or over a step that is ingested already.

    In the middle of what is new an unreadable step is an error, as it is where nobody has written to it for long.
    """
    identities = [identity(step) for step in listed]
    if not any(changed_lately(found["time"]) for found in identities):
        return list(listed)
    ingested: set[frozenset[Any]] = set()
    committed: set[tuple[str, int]] = set()
    if trajectory is not None:
        ingested = {frozenset(source.items()) for source in trajectory.sources()}
        names = [trajectory.runs[run] for run in trajectory.scalar(RUN)]
        committed = set(zip(names, trajectory.scalar(STEP).tolist(), strict=True))
    kept: list[LoggedStep] = []
    for step, found in reversed(list(zip(listed, identities, strict=True))):
        at_the_end = not kept or kept[-1].run != step.run
        may_be = (at_the_end or (step.run, step.number) in committed) and changed_lately(found["time"])
        unread = _unreadable(log, step) if may_be and frozenset(found.items()) not in ingested else None
        if unread is None:
            kept.append(step)
        elif len(listed) == 1 and trajectory is None:
            raise NotYet(unread.what, where=unread.where, why=unread.why, remedy=unread.remedy) from unread
        else:
            warnings.append(
                f"{where(step)} is left for the next pass, because it is still being written: {unread.what}"
            )
    return kept[::-1]


def _unreadable(log: Source, step: LoggedStep) -> Unreadable | None:
    try:
        with log.open(step) as reader:
            reader.content()
    except Unreadable as error:
        return error
    return None


def rows_to_write(
    log: Source,
    listed: Sequence[LoggedStep],
    trajectory: Trajectory | None,
    allow_gaps: bool,
    wait: bool,
    warnings: list[str],
) -> list[NewRow]:
    """Rows that the trajectory lacks, run by run; what is committed must still be what was ingested."""
    rows: list[NewRow] = []
    committed = None if trajectory is None else _Committed(trajectory)
    for run, group in itertools.groupby(listed, key=lambda step: step.run):
        steps, attempt, before, last = list(group), 0, [], None
        if committed is not None and committed.has(run):
            view = committed.view(run)
            steps, attempt = _steps_to_come(log, steps, committed, view, run, warnings)
            before = [number for number in view.rows if not steps or number < steps[0].number]
            # An update leads on from the last row of its run alone.
            follows = not rows and bool(before) and view.rows[before[-1]] == committed.trajectory.n_states - 1
            if steps and attempt == view.attempt and not follows:
                last = NewRow(LoggedStep(before[-1], steps[0].storage, run=run), attempt, view.rows[before[-1]])
        gap = None if allow_gaps else _gap(steps, before)
        if gap is not None and not wait:
            raise gap[1]
        if gap is not None:
            steps = steps[: gap[0]]
            last = last if steps else None
        rows += [] if last is None else [last]
        rows += [NewRow(step, attempt) for step in steps]
    return rows


@dataclass(frozen=True)
class _View:
    """A run as it stands: its newest attempt, the row of each of its steps in order, and all rows of a step."""

    attempt: int
    rows: dict[int, int]
    every: dict[int, list[int]]


class _Committed:
    """States of a trajectory, and the source of each."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory, self.sources = trajectory, trajectory.sources()
        steps, attempts, runs = (trajectory.scalar(name).tolist() for name in (STEP, ATTEMPT, RUN))
        self._rows: dict[str, list[tuple[int, int, int]]] = {}
        names = trajectory.runs
        for row, (step, attempt, run) in enumerate(zip(steps, attempts, runs, strict=True)):
            self._rows.setdefault(names[run], []).append((row, step, attempt))

    def has(self, run: str) -> bool:
        """Return whether any state of a run is stored."""
        return run in self._rows

    def view(self, run: str) -> _View:
        """Return a run as it stands."""
        newest, rows, every = 0, dict[int, int](), dict[int, list[int]]()
        for row, step, attempt in self._rows[run]:
            if attempt > newest:
                newest, rows = attempt, {number: kept for number, kept in rows.items() if number < step}
            rows[step] = row
            every.setdefault(step, []).append(row)
        return _View(newest, rows, every)


def _steps_to_come(
    log: Source, listed: Sequence[LoggedStep], committed: _Committed, view: _View, run: str, warnings: list[str]
) -> tuple[list[LoggedStep], int]:
    """Return the steps of a run that are not committed yet, and the attempt that they are of.

    A run that was restarted from an older checkpoint logs steps again. Such a *rewind* shows as steps that differ
    from a first one to the end; the new ones are another attempt. A step that differs in the middle is an error.
    """
    differing: dict[LoggedStep, str] = {}
    new, same, other_values = [], [], []
    for step in listed:
        found = identity(step)
        matches = [row for row in view.every.get(step.number, ()) if committed.sources[row] == found]
        if step.number not in view.rows:
            # A file of an attempt before this one may still lie there: the run has not come to its step again.
            new += [] if matches else [step]
            continue
        if view.rows[step.number] in matches:
            same.append(step)
            continue
        row = view.rows[step.number]
        difference, other_scalars = _difference(log, step, row, committed)
        if difference:
            differing[step] = difference
            continue
        same.append(step)
        if other_scalars or found.get("values") != committed.sources[row].get("values"):
            other_values.append(step)
    if other_values:
        warnings.append(
            f"the scalars of {len(other_values)} ingested steps were added to the log or removed from it since "
            f"(the first is step {other_values[0].number}); the stored values are kept. To ingest the current log, "
            "start from scratch with --overwrite"
        )
    last = max(view.rows)
    begin = min((step.number for step in differing), default=last + 1)
    for step in new:
        if step.number < begin:
            raise InputError(
                f"step {step.number} is new, but steps up to {last} are already ingested",
                where=where(step),
                why="the file was added later, or OUT contains another run",
                remedy="choose another OUT, or start from scratch with --overwrite",
            )
    if not differing:
        return new, view.attempt
    first = min(differing)
    elsewhere = (
        not run and begin == min(view.rows) and str(first.storage.parent.absolute()) != committed.trajectory.source
    )
    if elsewhere or not _is_rewind(list(differing), [step for step in same if step.number > begin]):
        raise InputError(
            f"step {begin} is already ingested, with {differing[first]}",
            where=where(first),
            why="OUT contains another run, the step was logged again with other values, or the run was restarted "
            "before it and has not logged a second step since",
            remedy="choose another OUT, start from scratch with --overwrite, or, if the run was restarted, "
            "run again after it has logged more steps",
        )
    superseded = sum(number >= begin for number in view.rows)
    warnings.append(
        f"{f'run {run}' if run else 'the run'} was restarted before step {begin}: steps from there on belong to "
        f"attempt {view.attempt + 1}; {superseded} steps of attempt {view.attempt} are kept "
        f"(--attempt {view.attempt})"
    )
    return sorted([*differing, *new]), view.attempt + 1


def _is_rewind(differing: Sequence[LoggedStep], same: Sequence[LoggedStep]) -> bool:
    """Return whether a restarted run logged the differing steps again, with the same steps after the first of them.

    While it has not come to the end again, those after its last are older than what it wrote since.
    """
    if not same:
        return True
    times = [identity(step)["time"] for step in differing]
    return (
        len(differing) > 1
        and max(differing).number < min(same).number
        and times == sorted(times)
        and max(identity(step)["time"] for step in same) < times[0]
    )


def _difference(log: Source, step: LoggedStep, row: int, committed: _Committed) -> tuple[str, bool]:
    """Say in what a step differs from a committed row, nothing where its content is the same.

    A scalar that was not there is no difference: logs of scalars come later than tensors, and one that is shifted
    lies in the file of a later step. Nor is one that is gone where the files are the same: its log is left out. The
    second value says that there is such a scalar.
    """
    trajectory = committed.trajectory
    content = next(iter(describe_steps(log, [step], [], with_optimizer(trajectory)).values()))
    if content.arrays["parameter"] != parameters_of(trajectory):
        return "different tensors", False
    dtypes = stored_dtypes([content])
    if optimizer_dtypes(trajectory) | dtypes != trajectory.array_dtypes:
        return f"dtypes {trajectory.array_dtypes}, and now has {dtypes}", False
    if content.replicates != trajectory.replicates:
        return f"{trajectory.replicates} replicates, and now has {content.replicates}", False
    same_files, other_scalars = _files_of(identity(step)) == _files_of(committed.sources[row]), False
    for name in trajectory.scalars:
        before, now = trajectory.scalar(name)[row].tolist(), scalar_of(content, name)
        if np.array_equal(before, now, equal_nan=True):
            continue
        came, gone = bool(np.isnan(before).all()), bool(np.isnan(now).all())
        if not came and not (gone and same_files):
            return f"{name} {before!r}, and now has {now!r}", False
        other_scalars = True
    if same_files:
        return "", other_scalars
    with log.open(step) as reader:
        for name, dtype in trajectory.dtypes.items():
            for column in range(trajectory.columns):
                buffer = np.zeros(trajectory.chunk[1], storage_dtype(dtype))
                first, last = trajectory.column(column)
                fill_row(reader, content, name, dtype, trajectory.layout, first, last, buffer)
                if checksum(buffer[: last - first]) != trajectory.recorded_checksums(name)[row, column]:
                    return f"a different {name}", False
    return "", other_scalars


def _files_of(source: Mapping[str, Any]) -> dict[str, Any]:
    """Identity of the files of a step, without the scalars that lie in logs of many steps."""
    return {name: value for name, value in source.items() if name != "values"}


def _gap(steps: Sequence[LoggedStep], committed: Sequence[int]) -> tuple[int, InputError] | None:
    """Find the first step that others are missing before: its position, and how to refuse it."""
    before = sorted(committed)[-2:]
    numbers = [*before, *(step.number for step in steps)]
    spans = np.diff(numbers)
    if len(spans) < 2 or (spans == spans[0]).all():
        return None
    usual = int(spans[0]) if len(committed) > 1 else int(np.median(spans))
    position = int(np.flatnonzero(spans != usual)[0]) + 1
    last, here = numbers[position - 1], numbers[position]
    error = InputError(
        f"{f'step {last + usual} is missing' if here - last > usual else 'the steps are not evenly spaced'}: "
        f"steps are {usual} apart, but {here} follows {last}",
        where=where(steps[position - len(before)]),
        why="a file was lost or is not written yet, or the logging interval of the run changed",
        remedy="restore the file, or pass --allow-gaps to keep the gap; step_span then contains its width",
    )
    if here - last < usual:
        raise error
    return position - len(before), error
