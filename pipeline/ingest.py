"""Logs to store: read a training log into a trajectory, every step exactly once.

Memory does not grow with the run or the model: tensors are read slice by slice into one chunk per array.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.blocks import MEBIBYTE, chunk_shape
from pipeline.places import each, place
from pipeline.schema import (
    ATTEMPT,
    OPTIMIZER_NUMBERS,
    OPTIMIZER_STATES,
    REPLICATE_LOSS,
    REPLICATE_STATES,
    RUN,
    SCALARS,
    STATES,
    STEP,
    USUAL_SCALARS,
    InputError,
    Layout,
    promote,
    replicate_of,
)
from pipeline.sources.alignment import misalignment
from pipeline.sources.base import (
    KeptOpen,
    LoggedStep,
    LoggedTensor,
    NotYet,
    Source,
    StepContent,
    StepReader,
    Unreadable,
    changed_lately,
    complete,
    identity,
    where,
)
from pipeline.sources.formats import open_sources
from pipeline.store import Trajectory, checksum, exists, only_writer, storage_dtype

__all__ = ["INCLUDES", "IngestSummary", "ingest"]

_log = logging.getLogger(__name__)

COMMIT_BYTES = 256 * MEBIBYTE
"""Training state that one commit makes visible, about (one row of chunks at least)."""

_OPEN_STEPS = 4
_NOTES_SHOWN = 5

INCLUDES = ("optimizer",)
"""What may be stored beside parameters, gradients and hvp."""

EXTREMES = ("exp_avg_sq_min", "exp_avg_sq_max")

_BFLOAT16_NAN = 0x7FC0

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""


@dataclass
class IngestSummary:
    """What an ingest did.

    Attributes
    ----------
    new_steps, steps : int
        Steps read now, and those of the run as it stands.
    first_step, last_step : int
        Of the run as it stands.
    attempts : int
        How often it was begun, restarts included.
    tensors, elements : int
        Size of the model.
    dtypes : dict
        Stored dtype of each array.
    replicates : int
        Replicates of a stochastic rule, 0 where none are logged.
    warnings : list of str
        What a user should know: values that are not finite, keys that were not used, missing scalars.
    """

    new_steps: int
    steps: int
    first_step: int
    last_step: int
    attempts: int
    tensors: int
    elements: int
    dtypes: dict[str, str]
    replicates: int = 0
    warnings: list[str] = field(default_factory=list)


def ingest(
    source: Path | Sequence[Path],
    store: Path,
    *,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    shift: Mapping[str, int] | None = None,
    sweep: bool = False,
    allow_gaps: bool = False,
    overwrite: bool = False,
    wait: bool = False,
    include: Sequence[str] = (),
    progress: Progress | None = None,
) -> IngestSummary:
    """Read the steps of a training log that the trajectory does not have yet.

    Parameters
    ----------
    source : Path or sequence of Path
        The log, or the logs of one run that are joined by step.
    store : Path
        The trajectory; made where there is none.
    format : str, optional
        Log format; found by content where not given.
    mapping : mapping, optional
        Quantity to the key that it stands under in the log; see `pipeline.sources.names`.
    shift : mapping, optional
        Quantity to K: what is logged of it at step s belongs to the state s + K.
    sweep : bool
        The source is a folder with the logs of many runs of one model, which become one trajectory.
    allow_gaps : bool
        Take a log whose steps are not evenly spaced; the results then carry each row's ``step_span``.
    overwrite : bool
        Start anew, dropping what the trajectory holds once the steps are described and compared.
    wait : bool
        Leave what follows a gap for a later pass, rather than refuse it.
    include : sequence of str
        What to store beside parameters, gradients and hvp, of `INCLUDES`. A trajectory that was made with it goes
        on so, whether it is said again or not.
    progress : callable, optional
        Called with steps done and steps in all.

    Raises
    ------
    InputError
        Bad input. All steps are described and compared before the first byte is written; what a later error
        interrupts is either committed whole or invisible. Of it, `NotYet` where no step is finished yet, or one
        is written while it is read.
    """
    for what in include:
        if what not in INCLUDES:
            raise InputError(
                f"{what!r} cannot be included", where="--include", remedy=f"choose of {', '.join(INCLUDES)}"
            )
    log, store = open_sources(each(source), format, mapping, shift, sweep=sweep), place(store)
    listed = log.steps()
    with only_writer(store, "trajectory"), KeptOpen(log) as log:
        trajectory = Trajectory(store) if exists(store) and not overwrite else None
        if trajectory is not None and not trajectory.rows:
            trajectory = None
        if trajectory is not None:
            trajectory.recover()
        optimizer = _with_optimizer(trajectory, include)
        warnings: list[str] = []
        listed = _finished(log, listed, trajectory, warnings)
        rows = _new_rows(log, listed, trajectory, allow_gaps, wait, warnings)
        steps = [row.step for row in rows if row.repeats is None]
        if steps:
            # Taken before a step is opened: what is described and what is written must be the same file.
            identities = {step: identity(step) for step in steps}
            contents = _describe(log, steps, warnings, optimizer)
            told = misalignment(log, steps, contents[steps[0]]) if trajectory is None else ""
            warnings += [told] if told else []
            warnings += _scalars_not_stored(trajectory, contents)
            trajectory = _matching_trajectory(store, trajectory, steps[0], contents, optimizer)
            try:
                _Writer(log, trajectory, contents, identities, warnings).write(rows, progress)
            finally:
                trajectory.abandon()
                if not trajectory.rows:
                    Trajectory.remove(store)
        elif trajectory is None:
            raise NotYet(
                "no step is finished yet",
                where=str(log.location),
                why="the training run is writing its first",
                remedy="run again later, or with --follow",
            )
        numbers = trajectory.scalar(STEP)[trajectory.current()]
        warnings += _missing_scalars(trajectory)
    # Who waits has been told the same at the pass before.
    for warning in warnings if steps or not wait else ():
        _log.warning("%s", warning)
    return IngestSummary(
        new_steps=len(steps),
        steps=len(numbers),
        first_step=int(numbers.min()),
        last_step=int(numbers.max()),
        attempts=int(trajectory.scalar(ATTEMPT).max()) + 1,
        tensors=len(trajectory.layout.tensors),
        elements=trajectory.layout.elements,
        dtypes=dict(trajectory.array_dtypes),
        replicates=trajectory.replicates,
        warnings=warnings,
    )


# Which steps -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _NewRow:
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


def _finished(
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
        sources = [source for record in trajectory.records() for source in record["sources"]]
        ingested = {frozenset(source.items()) for source in sources}
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
            warnings.append(f"{where(step)} is left for the next pass, as it is still being written: {unread.what}")
    return kept[::-1]


def _unreadable(log: Source, step: LoggedStep) -> Unreadable | None:
    try:
        with log.open(step) as reader:
            reader.content()
    except Unreadable as error:
        return error
    return None


def _new_rows(
    log: Source,
    listed: Sequence[LoggedStep],
    trajectory: Trajectory | None,
    allow_gaps: bool,
    wait: bool,
    warnings: list[str],
) -> list[_NewRow]:
    """Rows that the trajectory lacks, run by run; what is committed must still be what was ingested."""
    rows: list[_NewRow] = []
    committed = None if trajectory is None else _Committed(trajectory)
    for run, group in itertools.groupby(listed, key=lambda step: step.run):
        steps, attempt, before, last = list(group), 0, [], None
        if committed is not None and committed.has(run):
            view = committed.view(run)
            steps, attempt = _steps_to_come(log, steps, committed, view, run, warnings)
            before = [number for number in view.rows if not steps or number < steps[0].number]
            # An update leads on from the last row of its run alone.
            follows = not rows and bool(before) and view.rows[before[-1]] == committed.trajectory.rows - 1
            if steps and attempt == view.attempt and not follows:
                last = _NewRow(LoggedStep(before[-1], steps[0].path, run=run), attempt, view.rows[before[-1]])
        gap = None if allow_gaps else _gap(steps, before)
        if gap is not None and not wait:
            raise gap[1]
        if gap is not None:
            steps = steps[: gap[0]]
            last = last if steps else None
        rows += [] if last is None else [last]
        rows += [_NewRow(step, attempt) for step in steps]
    return rows


@dataclass(frozen=True)
class _View:
    """A run as it stands: its newest attempt, the row of each of its steps in order, and all rows of a step."""

    attempt: int
    rows: dict[int, int]
    every: dict[int, list[int]]


class _Committed:
    """What a trajectory holds, and what each row of it was read from."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory, self.records = trajectory, trajectory.records()
        self.sources = [source for record in self.records for source in record["sources"]]
        steps, attempts, runs = (trajectory.scalar(name).tolist() for name in (STEP, ATTEMPT, RUN))
        self._rows: dict[str, list[tuple[int, int, int]]] = {}
        names = trajectory.runs
        for row, (step, attempt, run) in enumerate(zip(steps, attempts, runs, strict=True)):
            self._rows.setdefault(names[run], []).append((row, step, attempt))

    def has(self, run: str) -> bool:
        """Whether anything of a run is there."""
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

    def record(self, row: int) -> Mapping[str, Any]:
        """Record of the commit that a row is of."""
        return next(record for record in self.records if record["start"] <= row < record["stop"])


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
        elif view.rows[step.number] in matches:
            same.append(step)
        elif difference := _difference(log, step, view.rows[step.number], committed):
            differing[step] = difference
        else:
            same.append(step)
            other_values += (
                [step] if found.get("values") != committed.sources[view.rows[step.number]].get("values") else []
            )
    if other_values:
        warnings.append(
            f"{len(other_values)} steps were ingested without scalars that the log has now, or with some that it "
            f"has no longer, {other_values[0].number} the first: they are kept as they are; start anew with "
            "--overwrite to take the log as it is now"
        )
    last = max(view.rows)
    begin = min((step.number for step in differing), default=last + 1)
    for step in new:
        if step.number < begin:
            raise InputError(
                f"step {step.number} is new, but steps up to {last} are ingested already",
                where=where(step),
                why="the file was added later, or OUT holds another run",
                remedy="choose another OUT, or start anew with --overwrite",
            )
    if not differing:
        return new, view.attempt
    first = min(differing)
    elsewhere = (
        not run and begin == min(view.rows) and str(first.path.parent.absolute()) != committed.trajectory.source
    )
    if elsewhere or not _is_rewind(list(differing), [step for step in same if step.number > begin]):
        raise InputError(
            f"step {begin} is ingested already, with {differing[first]}",
            where=where(first),
            why="OUT holds another run, the step was logged again with other values, or the run was restarted "
            "before it and has not logged a second step since",
            remedy="choose another OUT, start anew with --overwrite, or run again once a restarted run went on",
        )
    superseded = sum(number >= begin for number in view.rows)
    warnings.append(
        f"{f'run {run}' if run else 'the run'} was restarted before step {begin}: from there on it is attempt "
        f"{view.attempt + 1}; {superseded} steps of attempt {view.attempt} are kept (--attempt {view.attempt})"
    )
    return sorted([*differing, *new]), view.attempt + 1


def _is_rewind(differing: Sequence[LoggedStep], same: Sequence[LoggedStep]) -> bool:
    """Whether steps that differ were logged again by a restarted run, with the same steps after the first of them.

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


def _difference(log: Source, step: LoggedStep, row: int, committed: _Committed) -> str:
    """Say in what a step differs from a committed row, nothing where its content is the same.

    Where the files of a step are the same, a scalar that only one of both has is no difference: logs of scalars
    come later than tensors, or are left out.
    """
    trajectory = committed.trajectory
    content = next(iter(_describe(log, [step], [], _with_optimizer(trajectory)).values()))
    if content.arrays["parameter"] != _parameters(trajectory):
        return "other tensors"
    dtypes = _dtypes([content])
    if _beside(trajectory) | dtypes != trajectory.array_dtypes:
        return f"dtypes {trajectory.array_dtypes}, and now has {dtypes}"
    if content.replicates != trajectory.replicates:
        return f"{trajectory.replicates} replicates, and now has {content.replicates}"
    same_files = _files_of(identity(step)) == _files_of(committed.sources[row])
    for name in trajectory.scalars:
        before, now = trajectory.scalar(name)[row].tolist(), _number(content, name)
        missing = bool(np.isnan(before).all()) + bool(np.isnan(now).all())
        if not np.array_equal(before, now, equal_nan=True) and not (same_files and missing):
            return f"{name} {before!r}, and now has {now!r}"
    if same_files:
        return ""
    record = committed.record(row)
    with log.open(step) as reader:
        for name, dtype in trajectory.dtypes.items():
            for column in range(trajectory.columns):
                buffer = np.zeros(trajectory.chunk[1], storage_dtype(dtype))
                first, last = trajectory.column(column)
                _fill(reader, content, name, dtype, trajectory.layout, first, last, buffer)
                stored = record["checksums"][name][row - record["start"]][column]
                if checksum(buffer[: last - first]) != stored:
                    return f"another {name}"
    return ""


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
        f"{f'step {last + usual} is missing' if here - last > usual else 'steps are uneven'}: "
        f"steps are {usual} apart, but {here} follows {last}",
        where=where(steps[position - len(before)]),
        why="a file was lost or is still to come, or the run was logged at changing intervals",
        remedy="restore the file, or pass --allow-gaps to keep the gap: step_span then says how wide it is",
    )
    if here - last < usual:
        raise error
    return position - len(before), error


# What they hold ----------------------------------------------------------------------------------------------


def _dtypes(contents: Iterable[StepContent]) -> dict[str, str]:
    """Dtype that each array is stored in: the smallest that holds all of its tensors exactly."""
    logged: dict[str, set[str]] = {}
    # Equal descriptions are kept once.
    for arrays in {id(content.arrays): content.arrays for content in contents}.values():
        for name, tensors in arrays.items():
            logged.setdefault(name, set()).update(tensor.dtype for tensor in tensors.values())
    names = (*STATES, *REPLICATE_STATES, *OPTIMIZER_STATES)
    return {name: promote(sorted(logged[name])) for name in names if logged.get(name)}


def _number(content: StepContent, name: str) -> float | Sequence[float]:
    """Scalar of a step, or the losses of its replicates; NaN where it has none."""
    missing: float | Sequence[float] = [math.nan] * content.replicates if name == REPLICATE_LOSS else math.nan
    return content.numbers.get(name, missing)


def _beside(trajectory: Trajectory) -> dict[str, str]:
    """Dtypes of what the optimizer keeps, which not every step has."""
    return {name: dtype for name, dtype in trajectory.array_dtypes.items() if name in OPTIMIZER_STATES}


def _with_optimizer(trajectory: Trajectory | None, include: Sequence[str] = ()) -> bool:
    """Whether what the optimizer keeps is stored: as a trajectory was begun, so it goes on."""
    if trajectory is None:
        return "optimizer" in include
    stored = bool(trajectory.tables)
    if "optimizer" in include and not stored:
        raise InputError(
            "the trajectory was made without the state of the optimizer",
            where=str(trajectory.path),
            remedy="start anew with --overwrite, or leave --include optimizer out",
        )
    return stored


def _parameters(trajectory: Trajectory) -> dict[str, LoggedTensor]:
    return {tensor.name: LoggedTensor(tensor.shape, tensor.dtype) for tensor in trajectory.layout.tensors}


def _describe(
    log: Source, steps: Sequence[LoggedStep], warnings: list[str], optimizer: bool
) -> dict[LoggedStep, StepContent]:
    """Describe steps, all with the tensors of the first."""
    contents: dict[LoggedStep, StepContent] = {}
    unused: dict[str, LoggedStep] = {}
    notes: dict[str, LoggedStep] = {}
    first = steps[0]
    for step in steps:
        with log.open(step) as reader:
            content = complete(step, reader.content(), optimizer=optimizer)
        notes.update({note: step for note in content.notes if note not in notes})
        unused.update({key: step for key in content.unused if key not in unused})
        _require_like(step, content, first, contents.get(first, content))
        # Equal descriptions are kept once: a long run of a large model has many.
        same = contents.get(first)
        arrays = same.arrays if same is not None and same.arrays == content.arrays else content.arrays
        contents[step] = StepContent(
            arrays, content.scalars, optimizer=content.optimizer, replicate_loss=content.replicate_loss
        )
    warnings += [f"{note} (in {step.path.name})" for note, step in notes.items()]
    if unused:
        key, step = next(iter(unused.items()))
        warnings.append(f"{len(unused)} keys are not used, {key!r} (in {step.path.name}) the first of them")
    return contents


def _require_like(step: LoggedStep, content: StepContent, first: LoggedStep, model: StepContent) -> None:
    names = (*STATES, *REPLICATE_STATES)
    for name in (name for name in names if name in model.arrays or name in content.arrays):
        have, expect = content.arrays.get(name), model.arrays.get(name)
        if have is None or expect is None:
            lacking = step if have is None else first
            raise InputError(
                f"{name} is not logged at every step",
                where=where(lacking, name),
                remedy=f"log {name} at every step, or at none",
            )
        for tensor in {**expect, **have}:
            if tensor not in have or tensor not in expect:
                verb = "is gone" if tensor not in have else "is new"
                what = f"tensor {tensor!r} {verb} at step {step.number}"
            elif have[tensor].shape != expect[tensor].shape:
                what = f"shape changes from {expect[tensor].shape} to {have[tensor].shape}"
            elif have[tensor].dtype != expect[tensor].dtype:
                what = f"dtype changes from {expect[tensor].dtype} to {have[tensor].dtype}"
            else:
                continue
            raise InputError(
                what,
                where=where(step, name, tensor),
                why=f"the run was restarted with another model; the first step here is {first.number}",
                remedy="process the steps of each model as a run of its own",
            )


def _matching_trajectory(
    store: Path,
    trajectory: Trajectory | None,
    first: LoggedStep,
    contents: Mapping[LoggedStep, StepContent],
    optimizer: bool,
) -> Trajectory:
    """Return the trajectory to append to, or a new one laid out for these steps."""
    content = contents[first]
    dtypes = _dtypes(contents.values())
    layout = Layout.from_shapes({name: (t.shape, t.dtype) for name, t in content.arrays["parameter"].items()})
    if trajectory is None:
        chunk = chunk_shape(len(contents), layout.elements, content.replicates)
        logged_scalars = {name for content in contents.values() for name in content.numbers}
        scalars = [name for name in (*SCALARS, REPLICATE_LOSS) if name in logged_scalars.union(USUAL_SCALARS)]
        source, sweep = str(first.path.parent.absolute()), bool(first.run)
        tables = _tables(first, contents.values(), dtypes) if optimizer else ()
        replicates = content.replicates
        return Trajectory.create(
            store,
            layout,
            dtypes,
            chunk,
            source,
            scalars=scalars,
            sweep=sweep,
            tables=tables,
            replicates=replicates,
        )
    if trajectory.sweep != bool(first.run):
        raise InputError(
            f"the trajectory is of {'a sweep' if trajectory.sweep else 'one run'}, the log is not",
            where=str(store),
            remedy="choose another OUT, or say with --sweep that SOURCE is a folder of runs",
        )
    logged, stored = content.arrays["parameter"], _parameters(trajectory)
    for tensor in {**stored, **logged}:
        if logged.get(tensor) != stored.get(tensor):
            raise InputError(
                f"this step is of another model than the trajectory's: {_told(logged.get(tensor))} in place of "
                f"{_told(stored.get(tensor))}",
                where=where(first, "parameter", tensor),
                why="the run was restarted with another model, or OUT holds another run",
                remedy="choose another OUT, or start anew with --overwrite",
            )
    if content.replicates != trajectory.replicates:
        raise InputError(
            f"replicates change from {trajectory.replicates} to {content.replicates}",
            where=where(first),
            why="the run was restarted with another number of replicates, or OUT holds another run",
            remedy="choose another OUT, or start anew with --overwrite",
        )
    if _beside(trajectory) | dtypes != trajectory.array_dtypes:
        raise InputError(
            f"dtypes change from {trajectory.array_dtypes} to {dtypes}",
            where=where(first),
            why="the run was restarted in another precision, or OUT holds another run",
            remedy="choose another OUT, or start anew with --overwrite",
        )
    return trajectory


def _tables(first: LoggedStep, contents: Iterable[StepContent], dtypes: Mapping[str, str]) -> list[str]:
    """Numbers of the optimizer that these steps have, and those that are made of its arrays."""
    found = {name for content in contents if content.optimizer is not None for name in content.optimizer.numbers}
    if "exp_avg_sq" in dtypes:
        found |= set(EXTREMES)
    if not found:
        raise NotYet(
            "no state of an optimizer is in these steps",
            where=where(first),
            why="the trainer does not save it, or has not made its first update yet",
            remedy="run again once a step has it, or leave --include optimizer out",
        )
    return [name for name in OPTIMIZER_NUMBERS if name in found]


def _scalars_not_stored(trajectory: Trajectory | None, contents: dict[LoggedStep, StepContent]) -> Iterator[str]:
    """Tell of numbers that the log began to hold after the trajectory was made without them."""
    found = {name: step for step, content in reversed(contents.items()) for name in content.numbers}
    for name, step in found.items():
        if trajectory is not None and name not in trajectory.scalars:
            yield (
                f"{name} is logged from step {step.number} on, and not stored, as the steps before have none: "
                "start anew with --overwrite to have it"
            )


def _told(tensor: LoggedTensor | None) -> str:
    return "no tensor" if tensor is None else f"{tensor.dtype} of shape {tensor.shape}"


def _missing_scalars(trajectory: Trajectory) -> list[str]:
    remedies = {
        "loss": "results that need it are NaN with status unverifiable",
        "learning_rate": "give it with --learning-rate; without it no metric exists",
    }
    missing = []
    for name in USUAL_SCALARS:
        absent = int(np.isnan(trajectory.scalar(name)).sum())
        if absent:
            missing.append(f"{name} is missing or NaN in {absent} of {trajectory.rows} steps: {remedies[name]}")
    return missing


# Reading and writing -----------------------------------------------------------------------------------------


def _fill(
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
            part[:] = _float32(words) if logged == "bfloat16" else words


def _extremes(words: NDArray[Any], dtype: str) -> tuple[float, float]:
    values = _float32(words) if dtype == "bfloat16" else words
    return float(values.min()), float(values.max())


def _float32(bfloat16: NDArray[Any]) -> NDArray[np.float32]:
    return (bfloat16.astype(np.uint32) << np.uint32(16)).view(np.float32)


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


class _Writer:
    """Copies steps into the trajectory, one row of chunks after the other, and commits them."""

    def __init__(
        self,
        log: Source,
        trajectory: Trajectory,
        contents: dict[LoggedStep, StepContent],
        identities: Mapping[LoggedStep, Mapping[str, Any]],
        warnings: list[str],
    ) -> None:
        self._log, self._trajectory, self._contents, self._identities = log, trajectory, contents, identities
        self._warnings = warnings
        self._not_finite: list[str] = []
        # Smallest and largest element of each tensor, of the rows of one commit.
        self._extremes = np.empty((0, 2, len(trajectory.layout.tensors)))
        # What is read before any of it is written: of a chunk of many steps all arrays, so that a step is opened
        # once, and of one of a single step (a wide model) one after the other, so that replicates share a buffer.
        names = list(trajectory.dtypes)
        self._together = [names] if trajectory.chunk[0] > 1 else [[name] for name in names]
        self._buffers: dict[str, NDArray[Any]] = {}

    def write(self, new: Sequence[_NewRow], progress: Progress | None) -> None:
        rows = self._trajectory.chunk[0]
        sizes = [storage_dtype(dtype).itemsize for dtype in self._trajectory.dtypes.values()]
        row_bytes = sum(sizes) * self._trajectory.layout.elements
        per_commit = max(1, COMMIT_BYTES // max(1, rows * row_bytes)) * rows
        done = 0
        while done < len(new):
            # The first commit fills up a chunk that an earlier ingest left half full.
            count = per_commit - self._trajectory.rows % rows
            self._commit(new[done : done + count])
            done = min(done + count, len(new))
            if progress is not None:
                progress(done, len(new))
        if self._not_finite:
            shown = "; ".join(self._not_finite[:_NOTES_SHOWN])
            more = len(self._not_finite) - _NOTES_SHOWN
            self._warnings.append(f"not finite: {shown}" + (f"; and {more} more" if more > 0 else ""))

    def _commit(self, new: Sequence[_NewRow]) -> None:
        trajectory = self._trajectory
        for row in new:
            self._require_unchanged(row)
        checksums: dict[str, list[list[int]]] = {name: [[] for _ in new] for name in trajectory.dtypes}
        self._extremes = np.full((len(new), 2, len(trajectory.layout.tensors)), np.nan)
        start, rows = trajectory.rows, trajectory.chunk[0]
        position = 0
        while position < len(new):
            count = min(rows - (start + position) % rows, len(new) - position)
            self._write_chunks(new, position, count, start + position, checksums)
            position += count
        for row in new:
            self._require_unchanged(row)
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

    def _scalar(self, name: str, row: _NewRow) -> float | Sequence[float]:
        if row.repeats is not None:
            value: float | Sequence[float] = self._trajectory.scalar(name)[row.repeats].tolist()
            return value
        return _number(self._contents[row.step], name)

    def _table(self, name: str, row: _NewRow, position: int) -> NDArray[np.float64]:
        if row.repeats is not None:
            return np.asarray(self._trajectory.scalar(name)[row.repeats])
        if name in EXTREMES:
            return np.asarray(self._extremes[position, EXTREMES.index(name)])
        state = self._contents[row.step].optimizer
        values = {} if state is None else state.numbers.get(name, {})
        return np.array([values.get(tensor, math.nan) for tensor in self._trajectory.layout.names])

    def _source(self, row: _NewRow) -> Mapping[str, Any]:
        if row.repeats is not None:
            records = self._trajectory.records()
            return [source for record in records for source in record["sources"]][row.repeats]  # type: ignore[no-any-return]
        return self._identities[row.step]

    def _require_unchanged(self, row: _NewRow) -> None:
        step = row.step
        if row.repeats is None and identity(step, fresh=True) != self._identities[step]:
            raise NotYet(
                f"step {step.number} changed while it was read",
                where=where(step),
                why="the training run is still writing this file",
                remedy="write steps to another name and rename them; run again",
            )

    def _write_chunks(
        self,
        new: Sequence[_NewRow],
        position: int,
        count: int,
        start: int,
        checksums: Mapping[str, list[list[int]]],
    ) -> None:
        """Read and write one row of chunks, column by column."""
        with ExitStack() as stack:
            opened = _OpenSteps(self._log, stack)
            for column, names in itertools.product(range(self._trajectory.columns), self._together):
                for row, name in itertools.product(range(count), names):
                    sums = checksums[name][position + row]
                    self._read_row(opened, new[position + row], position + row, name, column, row, sums)
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
        new: _NewRow,
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
            _fill(opened.get(new.step), content, name, dtype, trajectory.layout, first, last, out)
        else:
            trajectory.read(name, new.repeats, new.repeats + 1, column, buffer[row : row + 1])
        words = out[: last - first]
        checksums.append(checksum(words))
        if not _all_finite(words, dtype):
            self._note_not_finite(new.step, name, dtype, first, last, out)
        if name == "exp_avg_sq":
            self._widen(position, dtype, first, last, out)

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
