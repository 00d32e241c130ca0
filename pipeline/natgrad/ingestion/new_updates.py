"""Find the states to add to a trajectory: new steps, and steps that a restarted run has logged again."""

from __future__ import annotations

import itertools
import math
import statistics
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
    stores_optimizer,
)
from natgrad.ingestion.in_place import Locator, Relocated
from natgrad.ingestion.products import has_products
from natgrad.ingestion.transfer import NewState, fill_state
from natgrad.ingestion.waiting import Gap, StepWait
from natgrad.schema.errors import InputError
from natgrad.schema.layout import storage_dtype
from natgrad.schema.names import ATTEMPT, PRODUCTS, REPLICATE_PARAMETER, RUN, STATES, STEP, replicate_of
from natgrad.sources.changes import changed_lately
from natgrad.sources.listed import ListedLog
from natgrad.sources.steps import LoggedStep, NotYet, Unreadable, where
from natgrad.store import Trajectory, checksum

__all__ = ["Extent", "committed_steps", "finished_steps", "incomplete_steps", "states_to_write"]


@dataclass(frozen=True)
class Extent:
    """Runs, steps and attempts of a trajectory, to validate options that depend on them.

    Attributes
    ----------
    states : tuple of tuple
        Run, step and attempt of each state, in the order in which the states were logged.
    """

    states: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, trajectory: Trajectory | None, new: Sequence[NewState] = ()) -> Extent:
        """Return the extent of a trajectory after new states have been written."""
        states: list[tuple[str, int, int]] = []
        if trajectory is not None:
            runs = [trajectory.runs[run] for run in trajectory.scalar(RUN)]
            columns = (trajectory.scalar(name).tolist() for name in (STEP, ATTEMPT))
            states += zip(runs, *columns, strict=True)
        return cls((*states, *((state.step.run, state.step.number, state.attempt) for state in new)))

    @property
    def attempts(self) -> int:
        """Number of attempts."""
        return 1 + max((attempt for _, _, attempt in self.states), default=0)

    def updates(self, attempt: int | None = None) -> int:
        """Return the number of updates of the longest run.

        Parameters
        ----------
        attempt : int, optional
            Ignore attempts after this one. By default, all attempts count.
        """
        runs: dict[str, dict[int, int]] = {}
        for run, step, state_attempt in self.states:
            if attempt is not None and state_attempt > attempt:
                continue
            attempts = runs.setdefault(run, {})
            # A new attempt supersedes its first step and all later steps.
            if state_attempt > max(attempts.values(), default=state_attempt):
                for later in [number for number in attempts if number >= step]:
                    del attempts[later]
            attempts[step] = state_attempt
        # No update leads from a state of one attempt to a state of the next.
        return max(
            (
                sum(attempts[a] == attempts[b] for a, b in itertools.pairwise(sorted(attempts)))
                for attempts in runs.values()
            ),
            default=0,
        )


def committed_steps(trajectory: Trajectory | None) -> set[tuple[str, int]]:
    """Return the run and number of each step that a trajectory contains."""
    if trajectory is None:
        return set()
    names = trajectory.runs
    runs, numbers = trajectory.scalar(RUN).tolist(), trajectory.scalar(STEP).tolist()
    return {(names[run], number) for run, number in zip(runs, numbers, strict=True)}


def incomplete_steps(trajectory: Trajectory | None) -> set[tuple[str, int]]:
    """Return the run and number of each step that lacks something in the trajectory."""
    if trajectory is None:
        return set()
    names, runs, numbers = trajectory.runs, trajectory.scalar(RUN), trajectory.scalar(STEP)
    return {(names[runs[state]], int(numbers[state])) for state in trajectory.lacking()}


def finished_steps(
    log: ListedLog, listed: Sequence[LoggedStep], trajectory: Trajectory | None, warnings: list[str]
) -> list[LoggedStep]:
    """Return the listed steps, except those that are still being written.

    An unreadable step is omitted, with a warning, if it is the last step of a run or replaces an ingested step, and
    has changed recently. Other unreadable steps cause an error later, when they are read. If an incomplete step of
    the trajectory is being completed, the later steps of its run are omitted, too.
    """
    identities = [log.identity(step) for step in listed]
    if not any(changed_lately(found["time"]) for found in identities):
        return list(listed)
    ingested: set[frozenset[Any]] = set()
    if trajectory is not None:
        ingested = {frozenset(source.items()) for source in trajectory.sources()}
    committed, incomplete = committed_steps(trajectory), incomplete_steps(trajectory)
    finished: list[LoggedStep] = []
    for step, found in reversed(list(zip(listed, identities, strict=True))):
        is_last = not finished or finished[-1].run != step.run
        may_be_growing = (is_last or (step.run, step.number) in committed) and changed_lately(found["time"])
        unread = None
        if may_be_growing and frozenset(found.items()) not in ingested:
            log.renew(step)
            unread = _unreadable(log, step)
        if unread is None:
            finished.append(step)
        elif len(listed) == 1 and trajectory is None:
            raise NotYet(unread.what, where=unread.where, why=unread.why, remedy=unread.remedy) from unread
        else:
            warnings.append(
                f"{where(step)} is left for the next pass, because it is still being written: {unread.what}"
            )
            if (step.run, step.number) in incomplete:
                finished = [other for other in finished if other.run != step.run]
    return finished[::-1]


def _unreadable(log: ListedLog, step: LoggedStep) -> Unreadable | None:
    try:
        with log.open(step) as reader:
            reader.content()
    except Unreadable as error:
        return error
    return None


def states_to_write(
    log: ListedLog,
    listed: Sequence[LoggedStep],
    trajectory: Trajectory | None,
    allow_gaps: bool,
    wait: StepWait | None,
    warnings: list[str],
) -> tuple[list[NewState], dict[int, dict[str, Any]], dict[int, Relocated]]:
    """Find the states to write, run by run.

    Returns
    -------
    states : list of NewState
    identities : dict
        New identity of the source, by committed state, for steps whose files were moved, copied or touched. Their
        contents were read, and are equal to the committed states.
    relocated : dict
        Where these states are in the files of the log now, if the trajectory is in place.

    Raises
    ------
    InputError
        If the log no longer matches the committed states, or there is a gap that is neither allowed nor waited for.
    """
    states: list[NewState] = []
    committed = None if trajectory is None else _Committed(trajectory)
    provisional = None if committed is None else committed.provisional()
    if provisional is not None:
        # The states of its run come first, because they replace it.
        listed = sorted(listed, key=lambda step: step.run != provisional.step.run)
    for run, group in itertools.groupby(listed, key=lambda step: step.run):
        steps, attempt, before, last = list(group), 0, [], None
        numbers = {step.number for step in steps}
        if committed is not None and committed.has(run):
            view = committed.view(run)
            steps, attempt = _uncommitted_steps(log, steps, committed, view, run, wait, warnings)
            before = [number for number in sorted(view.states) if not steps or number < steps[0].number]
            # An update must start from the preceding state. If states of other runs follow the last state of this
            # run, that state is written again.
            follows = not states and bool(before) and view.states[before[-1]] == committed.trajectory.n_fixed - 1
            if steps and attempt == view.attempt and not follows:
                last = NewState(LoggedStep(before[-1], steps[0].storage, run=run), attempt, view.states[before[-1]])
        if not allow_gaps:
            # Runs remove their oldest steps first. If the last stored step was removed, the missing steps after it
            # were also removed.
            removed = bool(before) and bool(steps) and before[-1] not in numbers
            if committed is not None and removed:
                last_source = committed.sources[view.states[before[-1]]]
                removed = log.identity(steps[0])["folder"] == last_source["folder"]
            steps = _steps_before_gap(run, steps, before, removed, wait, warnings)
            last = last if steps else None
        if committed is not None and before and steps and attempt == view.attempt:
            lacks = committed.lacking.get(view.states[before[-1]], ())
            if lacks and before[-1] not in numbers:
                name = f"step {before[-1]}{f' of run {run}' if run else ''}"
                warnings.append(
                    f"{name} was removed from the log before it contained {', '.join(lacks)}: results that need "
                    "them are NaN"
                )
        again = () if committed is None else committed.again
        states += [] if last is None else [last]
        states += [NewState(step, attempt, again=step in again) for step in steps]
    if provisional is not None and states and not states[0].is_of(provisional):
        # It is kept as it is, because the run was restarted, or its step was removed from the log.
        states.insert(0, provisional)
    if committed is None:
        return states, {}, {}
    relocated = {state: committed.relocated[state] for state in committed.confirmed if state in committed.relocated}
    return states, committed.confirmed, relocated


@dataclass(frozen=True)
class _View:
    """Committed states of a run.

    Attributes
    ----------
    attempt : int
        Current attempt.
    states : dict
        Index of the state of each step that is not superseded, by step, in order.
    all_states : dict
        Indices of all states of a step, by step.
    """

    attempt: int
    states: dict[int, int]
    all_states: dict[int, list[int]]


class _Committed:
    """Committed states of a trajectory, the source of each, and the new identities of compared sources.

    Attributes
    ----------
    trajectory : Trajectory
    sources : list of dict
    lacking : dict
        What each incomplete state lacks, see `Trajectory.lacking`.
    confirmed : dict
        New identity of the source, by state.
    relocated : dict
        New location of the arrays, by state, if the trajectory is in place.
    locator : Locator
        Finds such locations.
    unread : set of LoggedStep
        Changed steps whose former tensors were never read, so that they cannot be compared.
    again : set of LoggedStep
        Steps of incomplete states that must be read again.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory, self.sources = trajectory, trajectory.sources()
        self.lacking = trajectory.lacking()
        self.confirmed: dict[int, dict[str, Any]] = {}
        self.relocated: dict[int, Relocated] = {}
        self.locator = Locator(trajectory)
        self.unread: set[LoggedStep] = set()
        self.again: set[LoggedStep] = set()
        steps, attempts, runs = (trajectory.scalar(name).tolist() for name in (STEP, ATTEMPT, RUN))
        self._states: dict[str, list[tuple[int, int, int]]] = {}
        names = trajectory.runs
        for state, (step, attempt, run) in enumerate(zip(steps, attempts, runs, strict=True)):
            self._states.setdefault(names[run], []).append((state, step, attempt))

    def provisional(self) -> NewState | None:
        """Return the provisional state, to be written as it is."""
        trajectory, state = self.trajectory, self.trajectory.n_fixed
        if not trajectory.provisional:
            return None
        step, attempt, run = (int(trajectory.scalar(name)[state]) for name in (STEP, ATTEMPT, RUN))
        return NewState(LoggedStep(step, trajectory.storage, run=trajectory.runs[run]), attempt, state)

    def has(self, run: str) -> bool:
        """Return True if any state of a run is stored."""
        return run in self._states

    def view(self, run: str) -> _View:
        """Return the committed states of a run."""
        newest, states, all_states = 0, dict[int, int](), dict[int, list[int]]()
        for state, step, attempt in self._states[run]:
            if attempt > newest:
                newest, states = attempt, {number: older for number, older in states.items() if number < step}
            states[step] = state
            all_states.setdefault(step, []).append(state)
        return _View(newest, states, all_states)


def _uncommitted_steps(
    log: ListedLog,
    listed: Sequence[LoggedStep],
    committed: _Committed,
    view: _View,
    run: str,
    wait: StepWait | None,
    warnings: list[str],
) -> tuple[list[LoggedStep], int]:
    """Return the steps of a run that are not committed yet, and their attempt.

    A run that was restarted from an older checkpoint logs steps again. In such a *rewind*, all steps from a certain
    step to the end differ from the committed ones; they belong to a new attempt. If only steps in the middle
    differ, an InputError is raised.
    """
    differing: dict[LoggedStep, str] = {}
    new: list[LoggedStep] = []
    same: list[LoggedStep] = []
    other_values: list[LoggedStep] = []
    known = [step for step in listed if step.number in view.states]
    last = max(view.states)
    incomplete = next(
        (step for step in known if step.number == last and view.states[last] in committed.lacking), None
    )
    found = {step: log.identity(step) for step in listed}
    changed = {
        step for step in known if _files_of(found[step]) != _files_of(committed.sources[view.states[step.number]])
    }
    # All steps whose files may have changed are read, and also the last one, because a file system may hide a
    # change.
    to_read = {*changed, known[-1]} if changed else changed
    for step in listed:
        if step.number not in view.states:
            # A file of an earlier attempt may still exist if the run has not reached this step again.
            older = view.all_states.get(step.number, ())
            new += [] if any(_is_state(log, step, found[step], state, committed) for state in older) else [step]
            continue
        state = view.states[step.number]
        if found[step] == committed.sources[state] and step not in to_read:
            same.append(step)
            continue
        difference, other_scalars = _difference(log, step, state, committed, read=step in to_read)
        if committed.trajectory.recorded and differing:
            # A log of ledgers keeps no updates after those that a restarted run has replaced, and the state after
            # an update has no content that could be compared.
            difference = difference or "other updates before it"
        if difference:
            differing[step] = difference
            continue
        same.append(step)
        if step == incomplete:
            continue
        if step in committed.unread and differing:
            differing[step] = "a file that has changed since"
            same.remove(step)
            continue
        values = committed.sources[state].get("values")
        if other_scalars or found[step].get("values") != values:
            other_values.append(step)
        if step in changed and not other_scalars:
            committed.confirmed[state] = _files_of(found[step]) | ({} if values is None else {"values": values})
    if other_values:
        warnings.append(
            f"the scalars of {len(other_values)} ingested steps were added to the log or removed from it since "
            f"(the first is step {other_values[0].number}); the stored values are kept. To ingest the current log, "
            "start from scratch with --overwrite"
        )
    origin = committed.sources[view.states[last]]["folder"]
    if new and not known and found[new[0]]["folder"] != origin:
        warnings.append(
            f"step {new[0].number} and later steps, in {found[new[0]]['folder']}, continue those of {origin}: no "
            "step is in both folders, so it was not verified that they belong to the same run"
        )
    begin = min((step.number for step in differing), default=last + 1)
    late = [step for step in new if step.number < begin]
    if late and wait is None:
        raise InputError(
            f"step {late[0].number} is new, but steps up to {last} are already ingested",
            where=where(late[0]),
            why=f"the file was added later, or OUT contains a different run, which was read from {origin}",
            remedy="choose another OUT, or start from scratch with --overwrite",
        )
    if wait is not None:
        # An earlier ingest skipped these steps.
        wait.skip(run, [step.number for step in late], warnings)
        new = new[len(late) :]
    if not differing:
        if incomplete is not None and (new or found[incomplete] != committed.sources[view.states[last]]):
            committed.again.add(incomplete)
            new = [incomplete, *new]
        return new, view.attempt
    first = min(differing)
    ingested = committed.sources[view.states[begin]]
    elsewhere = begin == min(view.states) and found[first]["folder"] != ingested["folder"]
    if elsewhere or not _is_rewind(log, list(differing), [step for step in same if step.number > begin]):
        raise InputError(
            f"step {begin} is already ingested, with {differing[first]}",
            where=where(first),
            why=f"it was ingested from {ingested['folder']}/{ingested['name']}, so OUT contains a different run, "
            "the step was logged again with different values, or the training run was restarted before it and has "
            "not logged a second step since",
            remedy="choose another OUT, start from scratch with --overwrite, or, after a restart of the training "
            "run, run again once it has logged more steps",
        )
    superseded = sum(number >= begin for number in view.states)
    warnings.append(
        f"{f'run {run}' if run else 'the run'} was restarted before step {begin}: this step and later ones belong "
        f"to attempt {view.attempt + 1}; {superseded} steps of attempt {view.attempt} are kept "
        f"(--attempt {view.attempt})"
    )
    return sorted([*differing, *new]), view.attempt + 1


def _is_rewind(log: ListedLog, differing: Sequence[LoggedStep], same: Sequence[LoggedStep]) -> bool:
    """Return True if a restarted run logged the differing steps again.

    Parameters
    ----------
    log : ListedLog
    differing : sequence of LoggedStep
    same : sequence of LoggedStep
        Unchanged steps after the first differing step. They exist until the run reaches its former end again; their
        files are then older than those of the differing steps.
    """
    if not same:
        return True
    times = [log.identity(step)["time"] for step in differing]
    return (
        len(differing) > 1
        and max(differing).number < min(same).number
        and times == sorted(times)
        and max(log.identity(step)["time"] for step in same) < times[0]
    )


def _is_state(
    log: ListedLog, step: LoggedStep, found: Mapping[str, Any], state: int, committed: _Committed
) -> bool:
    """Return True if a step has the content of a committed state. It is read only if its identity differs."""
    if committed.trajectory.recorded and state in committed.lacking:  # it has no content that could be compared
        return found == committed.sources[state]
    return found == committed.sources[state] or not _difference(log, step, state, committed, read=True)[0]


def _difference(
    log: ListedLog, step: LoggedStep, state: int, committed: _Committed, *, read: bool
) -> tuple[str, bool]:
    """Compare a step with a committed state, without what the state lacks.

    A new scalar is not a difference, because scalars may be logged later than tensors, and a shifted scalar is in
    the file of a later step. A missing scalar is not a difference if the files are the same: the log that contains
    it was not passed this time.

    Parameters
    ----------
    log : Source
    step : LoggedStep
    state : int
    committed : _Committed
    read : bool
        Read the tensors, and compare their checksums with those of the state.

    Returns
    -------
    difference : str
        First difference, for messages; empty if the content is the same.
    other_scalars : bool
        True if there is such a new or missing scalar.
    """
    trajectory, lacks = committed.trajectory, committed.lacking.get(state, ())
    described = describe_steps(
        log, [step], [], stores_optimizer(trajectory), trajectory.layout.names, trajectory.has_gradient
    )
    content = described[step]
    if content.recorded != trajectory.recorded:
        contains = ("states", "inner products of updates")
        return f"{contains[bool(trajectory.recorded)]}, and now has {contains[bool(content.recorded)]}", False
    if content.arrays["parameter"] != parameters_of(trajectory):
        return "different tensors", False
    before, dtypes = (
        {name: dtype for name, dtype in each.items() if name not in lacks}
        for each in (trajectory.array_dtypes, stored_dtypes([content]))
    )
    if {**before, **dtypes} != before or before.keys() - dtypes.keys() - optimizer_dtypes(trajectory).keys():
        return f"dtypes {before}, and now has {dtypes}", False
    if REPLICATE_PARAMETER in dtypes and content.replicates != trajectory.replicates:
        return f"{trajectory.replicates} replicates, and now has {content.replicates}", False
    same_files, other_scalars = _files_of(log.identity(step)) == _files_of(committed.sources[state]), False
    for name in trajectory.scalars:
        stored, now = trajectory.scalar(name)[state].tolist(), scalar_of(content, name, trajectory.replicates)
        if np.array_equal(stored, now, equal_nan=True):
            continue
        is_new, is_missing = bool(np.isnan(stored).all()), bool(np.isnan(now).all())
        if not is_new and not (is_missing and same_files):
            return f"{name} {stored!r}, and now has {now!r}", False
        other_scalars = True
    if not read:
        return "", other_scalars
    with log.open(step) as reader:
        if trajectory.recorded and STATES[1] not in lacks:
            recorded, _ = trajectory.checksums.of(PRODUCTS, state, state + 1)
            if not has_products(reader, trajectory.layout.names, int(recorded[0, 0])):
                return "different inner products", False
        for name, dtype in trajectory.dtypes.items():
            if replicate_of(name)[0] in lacks:
                continue
            recorded, known = trajectory.checksums.of(name, state, state + 1)
            if not known.all():
                committed.unread.add(step)
                continue
            for column in range(trajectory.columns):
                buffer = np.zeros(trajectory.chunk[1], storage_dtype(dtype))
                first, last = trajectory.column(column)
                fill_state(reader, content, name, dtype, trajectory.layout, first, last, buffer)
                if checksum(buffer[: last - first]) != recorded[0, column]:
                    return f"a different {name}", False
        if trajectory.in_place:
            found = committed.locator.reference_of(reader, step, content)
            committed.relocated[state] = Relocated(step, content, found)
    return "", other_scalars


def _files_of(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of the files of a step, without the scalars from logs of many steps."""
    return {name: value for name, value in source.items() if name != "values"}


def _steps_before_gap(
    run: str,
    steps: Sequence[LoggedStep],
    committed: Sequence[int],
    removed: bool,
    wait: StepWait | None,
    warnings: list[str],
) -> list[LoggedStep]:
    """Return the steps up to the first gap that is waited for.

    Parameters
    ----------
    run : str
    steps : sequence of LoggedStep
        New steps.
    committed : sequence of int
        Committed steps before them, in order.
    removed : bool
        Whether the missing steps between the last committed step and the first new step no longer exist.
    wait : StepWait, optional
        Without it, a gap is an error.
    warnings : list of str

    Raises
    ------
    InputError
        If there is a gap that is not waited for, or the steps are not evenly spaced.
    """
    numbers = [*committed[-1:], *(step.number for step in steps)]
    if steps and steps[0].step_span:
        warnings += _unconnected_states(run, [*committed, *numbers[-len(steps) :]], steps[0].step_span)
        return list(steps)
    old = len(numbers) - len(steps)
    removed &= wait is not None
    usual = _usual_span(committed, numbers[removed:], wait is not None)
    if usual is None:
        return list(steps)
    for position, (last, here) in enumerate(itertools.pairwise(numbers), start=1 - old):
        span, is_removed = here - last, removed and position == 0
        if span == usual:
            continue
        if wait is None or (span < usual and not is_removed):
            missing = f"step {last + usual} is missing" if span > usual else "the steps are not evenly spaced"
            raise InputError(
                f"{missing}: steps are {usual} apart, but {here} follows {last}",
                where=where(steps[position]),
                why="a file was lost or has not been written yet, or the logging interval of the run changed",
                remedy="restore the file, or pass --allow-gaps to keep the gap; step_span then contains its width",
            )
        gap = Gap(run, last, here, math.gcd(usual, span))
        if not wait.passes(gap, is_removed, len(steps) - position, warnings):
            return list(steps[:position])
    return list(steps)


def _unconnected_states(run: str, numbers: Sequence[int], span: int) -> list[str]:
    """Return a warning about states that belong to no update. The last one may still be waiting for the next."""
    present = set(numbers)
    alone = [number for number in numbers[:-1] if not {number - span, number + span} & present]
    if not alone:
        return []
    return [
        f"{len(alone)} states{f' of run {run}' if run else ''} belong to no update, because the state {span} steps "
        f"before or after them is missing; the first is step {alone[0]}"
    ]


def _usual_span(committed: Sequence[int], numbers: Sequence[int], wait: bool) -> int | None:
    """Return the usual number of updates between steps; None if fewer than two spans are known.

    The spans between committed steps take precedence over those between new ones.
    """
    before, new = np.diff(committed).tolist(), np.diff(numbers).tolist()
    if len(before) + len(new) < 2:
        return None
    if len(before) > 1:
        spans, counts = np.unique(before, return_counts=True)
        return int(spans[counts.argmax()])
    found = [*before, *([statistics.median_low(new)] if new else [])]
    # An ingest that waits may have skipped a gap between the only two committed steps.
    return min(found) if wait else found[0]
