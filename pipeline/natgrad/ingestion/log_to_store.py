"""Read a training log into a trajectory, every step exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from natgrad.ingestion.description import (
    describe_steps,
    optimizer_dtypes,
    parameters_of,
    stored_dtypes,
    stores_optimizer,
    tensor_text,
)
from natgrad.ingestion.new_updates import (
    Extent,
    committed_steps,
    finished_steps,
    incomplete_steps,
    states_to_write,
)
from natgrad.ingestion.products import ProductsWriter
from natgrad.ingestion.read_options import ReadOptions
from natgrad.ingestion.transfer import EXTREMES, Progress, Writer, copy_unlocated
from natgrad.ingestion.waiting import StepWait
from natgrad.schema.configuration import Scalar
from natgrad.schema.errors import InputError
from natgrad.schema.layout import IngestLimits, Layout, TrajectoryShape, chunk_shape
from natgrad.schema.logs import logger
from natgrad.schema.names import (
    ATTEMPT,
    HYPERPARAMETERS,
    LOGGED,
    METRIC_EIGENVALUES,
    OPTIMIZER_NUMBERS,
    RECORDED,
    RECOVERY,
    REPLAYED,
    REPLICATE_LOSS,
    RUN,
    SCALARS,
    SKIPPED,
    STEP,
    TENSOR_WEIGHT_DECAY,
    USUAL_SCALARS,
)
from natgrad.schema.summary import Summary
from natgrad.schema.variables import WITHOUT_GRADIENTS
from natgrad.sources.alignment import misalignment
from natgrad.sources.base import Source, StepContent, before_restarts
from natgrad.sources.listed import ListedLog
from natgrad.sources.opening import open_sources
from natgrad.sources.optimizers.state import FactoredMetric
from natgrad.sources.replayed import REPLAY, Replays
from natgrad.sources.steps import ListingChanged, LoggedStep, NotYet, where
from natgrad.storage import Storage
from natgrad.store import Trajectory, exists
from natgrad.store.recorded import create_run, located

__all__ = ["INCLUDES", "IngestSummary", "ingest"]

T = TypeVar("T")

_log = logger("natgrad.ingestion")

_LISTINGS = 10
"""Maximum number of times that a log is listed if files are removed while they are read."""

INCLUDES = ("optimizer",)
"""Optional data that can be stored in addition to parameters, gradients and hvp."""


@dataclass(frozen=True, kw_only=True, repr=False)
class IngestSummary(Summary):
    """Summary of an ingest.

    Attributes
    ----------
    source : str
        The log or logs.
    trajectory : str
        The store, or ``steps.zarr`` of a run without states.
    new_steps, steps : int
        Number of new steps read by this ingest, and number of steps in the current attempt.
    completed_steps : int
        Number of steps that were stored before, but lacked something that this ingest read, such as a gradient.
    last_step_lacks : list of str
        What the log does not contain yet of the last step; an ingest of the longer log adds it.
    first_step, last_step : int
        First and last step of the current attempt.
    attempts : int
        Number of times that the run was started, including restarts.
    tensors, elements : int
        Size of the model.
    dtypes : dict
        Stored dtype of each array.
    replicates : int
        Number of replicates of a stochastic rule; 0 if none are logged.
    warnings : list of str
        Warnings for the user, for example about values that are not finite, unused keys and missing scalars.
    """

    source: str
    trajectory: str
    new_steps: int
    steps: int
    first_step: int
    last_step: int
    attempts: int
    tensors: int
    elements: int
    dtypes: dict[str, str]
    replicates: int = 0
    completed_steps: int = 0
    last_step_lacks: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def ingest(
    sources: Sequence[Storage],
    store: Storage,
    *,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    shift: Mapping[str, int] | None = None,
    pattern: str | None = None,
    exact_names: bool = False,
    gradient: str | None = None,
    largest_span: int | None = None,
    sweep: bool = False,
    allow_gaps: bool = False,
    in_place: bool = False,
    overwrite: bool = False,
    wait: StepWait | None = None,
    include: Sequence[str] = (),
    limits: IngestLimits = IngestLimits(),
    check: Callable[[Extent], None] | None = None,
    check_shape: Callable[[TrajectoryShape], None] | None = None,
    describing: Progress | None = None,
    progress: Progress | None = None,
) -> IngestSummary:
    """Read those steps of a training log that the trajectory does not contain yet.

    Parameters
    ----------
    sources : sequence of Storage
        The log, or several logs of one run that are joined by step.
    store : Storage
        The trajectory; created if it does not exist.
    format : str, optional
        Log format. By default it is detected from the content.
    mapping : mapping, optional
        Key in the log of each quantity; see `natgrad.sources.names`.
    shift : mapping, optional
        Shift K of each quantity: values logged at step s belong to the state s + K. ``mapping``, ``shift`` and
        ``pattern`` are fixed when the trajectory is created.
    pattern : str, optional
        Names of the steps, with ``{step}`` for the number; see `natgrad.sources.step_names.Naming`.
    exact_names : bool
        Do not match names of tensors that differ by a known rule. It is fixed as well.
    gradient : str, optional
        Where gradients come from, one of `natgrad.schema.names.GRADIENTS`: the log by default. It is fixed as well.
    largest_span : int, optional
        Maximum number of updates between two states from which a gradient is recovered.
    sweep : bool
        The source is a folder with the logs of many runs of one model, which become one trajectory.
    allow_gaps : bool
        Accept a log whose steps are not evenly spaced; the results then contain the ``step_span`` of each update.
    in_place : bool
        Read states from the files of the log, instead of copying them. An existing trajectory keeps its setting.
    overwrite : bool
        Replace the trajectory, even one from an older version, after the steps have been described and compared.
    wait : StepWait, optional
        If there is a gap, leave the steps after it to a later ingest with the same object. The object decides when
        to stop waiting. By default, a gap is an error.
    include : sequence of str
        Optional data to store, from `INCLUDES`. An existing trajectory keeps its original setting.
    limits : IngestLimits, optional
        Sizes of commits, and of the chunks of a new trajectory.
    check : callable, optional
        Called with the future extent of the trajectory, after the steps are listed and before anything is stored.
        It may raise an InputError to reject the ingest.
    check_shape : callable, optional
        Called with the future shape of the trajectory if there are new steps, after they are described and before
        anything is stored. It may also raise an InputError.
    describing : callable, optional
        Called with the number of steps whose contents are known and their total number, before any is copied.
    progress : callable, optional
        Called with the number of steps done and the total number of steps.

    Returns
    -------
    IngestSummary

    Raises
    ------
    InputError
        If the input is invalid. All steps are described and compared before the first byte is written. If an error
        occurs later, each commit is either complete or invisible.
    NotYet
        If no step is finished yet, or if a step changes while it is read.
    ListingChanged
        If files were removed while they were read, after each of several listings of the log.
    """
    options = ReadOptions.requested(sources, mapping, shift, pattern, exact_names, gradient, largest_span)
    options = options if overwrite else options.for_resuming(located(store))
    log = _with_new_listings(
        lambda: open_sources(
            sources,
            format,
            options.mapping,
            options.shift,
            sweep=sweep,
            pattern=options.pattern,
            exact_names=options.exact_names,
            recover=options.recover,
            replays=Replays(store.parent / REPLAY) if options.is_replayed else None,
        )
    )
    stored, completed = list[int](), list[int]()

    def read(log: Source, histories: Sequence[Sequence[LoggedStep]] = ()) -> IngestSummary:
        with ListedLog(log) as listed:
            return _with_new_listings(
                lambda: _ingest(
                    listed,
                    store,
                    options,
                    histories=histories,
                    allow_gaps=allow_gaps,
                    in_place=in_place,
                    overwrite=overwrite and not sum(stored),
                    wait=wait,
                    include=include,
                    limits=limits,
                    check=None if histories else check,
                    check_shape=check_shape,
                    describing=describing,
                    progress=progress,
                    stored=stored,
                    completed=completed,
                )
            )

    # The result must not depend on how often a log is ingested while its run is restarted.
    histories: list[Sequence[LoggedStep]] = []
    for earlier in before_restarts(log):
        histories.append(earlier.steps())
        with suppress(_IsStored):
            read(earlier, histories)
    summary = read(log)
    # With --follow these warnings were shown on the previous scan.
    is_new = summary.new_steps or summary.completed_steps
    for warning in summary.warnings if is_new or wait is None else ():
        _log.warning("%s", warning)
    return replace(summary, source=", ".join(map(str, sources)))


class _IsStored(Exception):
    """Signal that the states of a log before a restart are stored."""


def _with_new_listings(read: Callable[[], T]) -> T:
    """Call a function that lists and reads a log. Retry if files are removed while they are read."""
    for _ in range(_LISTINGS - 1):
        with suppress(ListingChanged):
            return read()
    return read()


def _ingest(
    log: ListedLog,
    store: Storage,
    options: ReadOptions,
    *,
    histories: Sequence[Sequence[LoggedStep]],
    allow_gaps: bool,
    in_place: bool,
    overwrite: bool,
    wait: StepWait | None,
    include: Sequence[str],
    limits: IngestLimits,
    check: Callable[[Extent], None] | None,
    check_shape: Callable[[TrajectoryShape], None] | None,
    describing: Progress | None,
    progress: Progress | None,
    stored: list[int],
    completed: list[int],
) -> IngestSummary:
    """List a log and read its new steps; see `ingest`.

    The numbers of stored and completed steps are appended to ``stored`` and ``completed``, even after an error. If
    the log is one before a restart, ``histories`` are the steps of all logs until this restart: the trajectory may
    already have the steps after it.
    """
    if wait is not None:
        wait.start()
    listed = log.steps()
    with store.lock("trajectory") as store:
        if not overwrite:
            # Another process may have created the trajectory before the lock was acquired.
            options.for_resuming(located(store))
        trajectory = Trajectory(located(store)) if exists(located(store)) and not overwrite else None
        if trajectory is not None and not trajectory.n_states:
            trajectory = None
        if trajectory is not None:
            trajectory.recover()
        if histories and trajectory is not None and not _is_before(trajectory, histories):
            raise _IsStored
        in_place = _is_in_place(store, trajectory, in_place)
        optimizer = stores_optimizer(trajectory, include)
        warnings: list[str] = []
        committed = committed_steps(trajectory) - incomplete_steps(trajectory)
        listed = log.hold(listed, lambda step: (step.run, step.number) not in committed)
        listed = finished_steps(log, listed, trajectory, warnings)
        new, identities_now, relocated = states_to_write(log, listed, trajectory, allow_gaps, wait, warnings)
        if trajectory is not None and identities_now:
            copies = copy_unlocated(log, trajectory, relocated)
            references = {state: found.reference for state, found in relocated.items()}
            trajectory.replace_sources(identities_now, references, copies)
            if copies:
                count = len({state for found in copies.values() for state, _ in found})
                warnings.append(
                    f"{count} states are copied, because their files no longer contain them as plain bytes"
                )
        steps = [state.step for state in new if state.repeats is None]
        if check is not None and (steps or trajectory is not None):
            check(Extent.of(trajectory, new))
        if steps:
            tensors, gradients = None, None
            if trajectory is not None:
                tensors, gradients = trajectory.layout.names, trajectory.has_gradient
            contents = describe_steps(log, steps, warnings, optimizer, tensors, gradients, describing)
            if describing is not None:
                describing(len(steps), len(steps))
            model = next(iter(contents))
            with_gradient = [step for step in steps if "gradient" in contents[step].arrays]
            misaligned = "" if trajectory is not None else misalignment(log, with_gradient, contents[model])
            warnings += [misaligned] if misaligned else []
            warnings += _scalars_not_stored(trajectory, contents)
            warnings += _metrics_not_stored(trajectory, contents)
            configurations = _configurations(log, steps, warnings)
            if check_shape is not None:
                check_shape(_future_shape(store, trajectory, contents, len(new), limits, in_place=in_place))
            trajectory = _matching_trajectory(
                store, trajectory, model, contents, optimizer, options, limits, in_place=in_place
            )
            kind = ProductsWriter if trajectory.recorded else Writer
            writer = kind(log, trajectory, contents, warnings, limits)
            try:
                trajectory.record_configurations(configurations)
                writer.write(new, progress)
            finally:
                stored.append(writer.new_steps)
                completed.append(writer.completed_steps)
                trajectory.abandon()
                if not trajectory.n_states:
                    Trajectory.remove(trajectory.storage)
        elif trajectory is None:
            raise NotYet(
                "no step is finished yet",
                where=str(log.location),
                why="the training run is still writing its first step",
                remedy="run again later; natgrad process and ingest wait for it with --follow",
            )
        trajectory.refresh()
        if gone := trajectory.mark_gone():
            steps_gone = trajectory.scalar(STEP)[gone]
            warnings.append(
                f"the files of {len(gone)} states of older attempts (steps {steps_gone.min()} to "
                f"{steps_gone.max()}) were overwritten or removed: the updates that were computed from them are "
                "kept, others are NaN"
            )
        numbers = trajectory.scalar(STEP)[trajectory.current()]
        attempts = int(trajectory.scalar(ATTEMPT).max()) + 1
        warnings += [] if trajectory.has_gradient else [WITHOUT_GRADIENTS]
        warnings += _missing_scalars(trajectory)
    if wait is not None:
        wait.finish(sum(stored))
    return IngestSummary(
        source=str(log.location),
        trajectory=str(trajectory.storage),
        new_steps=sum(stored),
        steps=len(numbers),
        first_step=int(numbers.min()),
        last_step=int(numbers.max()),
        attempts=attempts,
        tensors=len(trajectory.layout.tensors),
        elements=trajectory.layout.elements,
        dtypes=dict(trajectory.array_dtypes),
        replicates=trajectory.replicates,
        completed_steps=sum(completed),
        last_step_lacks=list(trajectory.provisional),
        warnings=warnings,
    )


def _configurations(
    log: ListedLog, steps: Sequence[LoggedStep], warnings: list[str]
) -> dict[str, dict[str, Scalar]]:
    """Return the configuration of each run that has new steps."""
    return {run: log.configuration(step, warnings) for run, step in {step.run: step for step in steps}.items()}


def _is_before(trajectory: Trajectory, histories: Sequence[Sequence[LoggedStep]]) -> bool:
    """Return True if the current states of a trajectory are those of a log before the last of these restarts."""
    runs, sources, incomplete = trajectory.scalar(RUN), trajectory.sources(), trajectory.lacking()
    current = np.flatnonzero(trajectory.current()).tolist()
    stored = {
        (trajectory.runs[runs[state]], sources[state].get("content"))
        for state in current
        if state not in incomplete
    }
    names = {step.run for step in histories[-1]}
    stored = {state for state in stored if state[0] in names}
    listed = [{(step.run, step.content) for step in steps} for steps in histories]
    return any(stored <= contents for contents in listed if names == {run for run, _ in contents})


def _is_in_place(store: Storage, trajectory: Trajectory | None, in_place: bool) -> bool:
    """Return whether states are read from the files of the log. An existing trajectory keeps its setting.

    Raises
    ------
    InputError
        If that is requested, but the trajectory contains copies.
    """
    if trajectory is not None and in_place and not trajectory.in_place:
        raise InputError(
            "the trajectory was created with copies of the states",
            where=str(trajectory.storage),
            why="--in-place was not set at the first ingest",
            remedy="start from scratch with --overwrite, or omit --in-place",
        )
    return in_place if trajectory is None else trajectory.in_place


def _future_shape(
    store: Storage,
    trajectory: Trajectory | None,
    contents: Mapping[LoggedStep, StepContent],
    new: int,
    limits: IngestLimits,
    *,
    in_place: bool,
) -> TrajectoryShape:
    """Return the shape that the trajectory will have once ``new`` states are written."""
    if trajectory is not None:
        return replace(trajectory.shape, states=trajectory.n_fixed + new)
    content = next(iter(contents.values()))
    layout = _layout(content)
    return TrajectoryShape(
        states=new,
        layout=layout,
        chunk=_chunk_shape(store, contents, limits, in_place=in_place),
        dtypes={} if content.recorded else stored_dtypes(contents.values()),
        replicates=content.replicates,
        partial_reads=store.local_path is not None,
        keeps_versions=store.keeps_versions,
        recorded=content.recorded,
    )


def _chunk_shape(
    store: Storage, contents: Mapping[LoggedStep, StepContent], limits: IngestLimits, *, in_place: bool
) -> tuple[int, int]:
    """Return the shape of the chunks of a new trajectory."""
    content = next(iter(contents.values()))
    steps, elements = chunk_shape(len(contents), _layout(content).elements, content.replicates, limits)
    # A chunk that refers to a file of the log has one state. The width is the same, and so are all bits.
    return (1 if in_place and store.refers else steps), elements


def _layout(content: StepContent) -> Layout:
    return Layout.from_shapes({name: (t.shape, t.dtype) for name, t in content.arrays["parameter"].items()})


def _matching_trajectory(
    store: Storage,
    trajectory: Trajectory | None,
    first: LoggedStep,
    contents: Mapping[LoggedStep, StepContent],
    optimizer: bool,
    options: ReadOptions,
    limits: IngestLimits,
    *,
    in_place: bool,
) -> Trajectory:
    """Return the trajectory to append to, or create one with a suitable layout."""
    content = contents[first]
    dtypes = stored_dtypes(contents.values())
    layout = _layout(content)
    if content.recorded and in_place:
        raise InputError(
            "a log of ledgers has no states to read in place",
            where=where(first),
            remedy="omit --in-place",
        )
    if trajectory is not None and content.recorded != trajectory.recorded:
        raise InputError(
            f"the log has {'inner products of updates' if content.recorded else 'states'}, but OUT was created "
            f"from {'states' if content.recorded else 'inner products of updates'}",
            where=where(first),
            why="OUT contains a different run, or the run was recorded with another mode",
            remedy="choose another OUT, or start from scratch with --overwrite",
        )
    if trajectory is not None and not any(
        step.run == first.run and step.number > first.number for step in contents
    ):
        # A last step may lack arrays.
        dtypes = {**trajectory.array_dtypes, **dtypes}
        replicates = content.replicates or trajectory.replicates
    else:
        replicates = content.replicates
    if trajectory is None:
        chunk = _chunk_shape(store, contents, limits, in_place=in_place)
        logged_scalars = {name for content in contents.values() for name in content.numbers}
        logged_scalars |= {*USUAL_SCALARS}
        scalars = [name for name in (*SCALARS, REPLICATE_LOSS, SKIPPED) if name in logged_scalars]
        source, sweep = str(first.storage.parent.absolute()), bool(first.run)
        described = list(contents.values())
        tables = _tables(first, described, dtypes) if optimizer else _hyperparameter_tables(described)
        tables += RECOVERY if options.recover is not None else ()
        described_run: dict[str, Any] = {
            "source": source,
            "scalars": scalars,
            "sweep": sweep,
            "tables": tables,
            "evaluation": content.evaluation,
            "gradient_source": REPLAYED if options.is_replayed else RECORDED if content.recorded else LOGGED,
            "read_options": options.to_json() | ({"step_span": first.step_span} if first.step_span else {}),
        }
        if content.recorded:
            return create_run(
                store,
                layout,
                dtypes,
                content.recorded,
                updates=len(contents),
                updates_per_chunk=None if limits.chunk is None else limits.chunk[0],
                **described_run,
            )
        created = Trajectory.create(
            store, layout, dtypes, chunk, replicates=replicates, in_place=in_place, **described_run
        )
        if located(store) != store:
            Trajectory.remove(located(store))
        return created
    if trajectory.step_span != first.step_span:
        raise InputError(
            f"the states of an update are {first.step_span} steps apart in this log, but {trajectory.step_span} in "
            "the trajectory (0: all states are connected)",
            where=str(first.storage.parent),
            why="step_span in natgrad.toml was changed, or OUT contains a different run",
            remedy="restore step_span, choose another OUT, or start from scratch with --overwrite",
        )
    if trajectory.sweep != bool(first.run):
        raise InputError(
            f"the trajectory contains {'a sweep' if trajectory.sweep else 'one run'}, but the log does not",
            where=str(store),
            remedy="choose another OUT; if SOURCE is a folder of runs, pass --sweep",
        )
    logged, stored = content.arrays["parameter"], parameters_of(trajectory)
    for tensor in {**stored, **logged}:
        if logged.get(tensor) != stored.get(tensor):
            raise InputError(
                "the model of this step differs from that of the trajectory: "
                f"{tensor_text(logged.get(tensor))} instead of {tensor_text(stored.get(tensor))}",
                where=where(first, "parameter", tensor),
                why="the run was restarted with a different model, or OUT contains a different run",
                remedy="choose another OUT, or start from scratch with --overwrite",
            )
    if replicates != trajectory.replicates:
        raise InputError(
            f"the number of replicates changes from {trajectory.replicates} to {replicates}",
            where=where(first),
            why="the run was restarted with a different number of replicates, or OUT contains a different run",
            remedy="choose another OUT, or start from scratch with --overwrite",
        )
    if optimizer_dtypes(trajectory) | dtypes != trajectory.array_dtypes:
        raise InputError(
            f"the dtypes change from {trajectory.array_dtypes} to {dtypes}",
            where=where(first),
            why="the run was restarted with a different precision, or OUT contains a different run",
            remedy="choose another OUT, or start from scratch with --overwrite",
        )
    return trajectory


def _tables(first: LoggedStep, contents: Sequence[StepContent], dtypes: Mapping[str, str]) -> list[str]:
    """Return the names of the optimizer numbers that these steps contain, or that are computed from them."""
    states = [content.optimizer for content in contents if content.optimizer is not None]
    found = {name for state in states for name in state.numbers if name not in HYPERPARAMETERS}
    found |= set(_hyperparameter_tables(contents))
    if "exp_avg_sq" in dtypes:
        found |= set(EXTREMES)
    found |= _metric_tables(contents)
    # Before the first update the state contains only options, which do not show what later states will contain.
    started = len(contents) > 1 or any(state.arrays or state.metrics for state in states)
    if not found or not started:
        raise NotYet(
            "these steps contain no optimizer state",
            where=where(first),
            why="the training program does not save it, or has not made its first update yet",
            remedy="run again once a step contains it, or omit --include optimizer",
        )
    return [name for name in OPTIMIZER_NUMBERS if name in found]


def _hyperparameter_tables(contents: Sequence[StepContent]) -> list[str]:
    """Return the names of the tables of learning rates, if they differ, and of weight decay, if it is not 0."""
    states = [content.optimizer for content in contents if content.optimizer is not None]
    found = {"tensor_learning_rate": any(state.rates for state in states)}
    found[TENSOR_WEIGHT_DECAY] = any(decay > 0 for state in states for decay in state.decays.values())
    return [name for name in HYPERPARAMETERS if found[name]]


def _metric_tables(contents: Iterable[StepContent]) -> set[str]:
    """Return the names of the tables for the metrics of the optimizer's factors."""
    found: set[str] = set()
    for content in contents:
        for metric in {} if content.optimizer is None else content.optimizer.metrics.values():
            follows = isinstance(metric, FactoredMetric) and metric.follows
            found |= set(METRIC_EIGENVALUES[2:] if follows else METRIC_EIGENVALUES[:2])
            found |= {"metric_factored", *(("metric_rescaled",) if metric.rescaled else ())}
    return found


def _metrics_not_stored(trajectory: Trajectory | None, contents: dict[LoggedStep, StepContent]) -> Iterator[str]:
    """Warn about metrics that appeared in the log after the trajectory was created without them."""
    if trajectory is None:
        return
    metrics = stores_optimizer(trajectory)
    for step, content in contents.items():
        available = (_metric_tables([content]) if metrics else set()) | set(_hyperparameter_tables([content]))
        if missing := sorted(available - set(trajectory.tables)):
            yield (
                f"{', '.join(missing)} are available since step {step.number}, but are not stored, because earlier "
                "steps do not have them; to store them, start from scratch with --overwrite"
            )
            return


def _scalars_not_stored(trajectory: Trajectory | None, contents: dict[LoggedStep, StepContent]) -> Iterator[str]:
    """Warn about numbers that appeared in the log after the trajectory was created without them."""
    found = {name: step for step, content in reversed(contents.items()) for name in content.numbers}
    for name, step in found.items():
        if trajectory is not None and name not in trajectory.scalars:
            yield (
                f"{name} has been logged since step {step.number}, but is not stored, because earlier steps do not "
                "have it; to store it, start from scratch with --overwrite"
            )


def _missing_scalars(trajectory: Trajectory) -> list[str]:
    remedies = {
        "loss": "results that need it are NaN with status unverifiable",
        "learning_rate": "pass it with --learning-rate; only the angles and condition numbers of single updates "
        "do not depend on it",
    }
    missing = []
    follows, incomplete = np.append(trajectory.spans() > 0, False), trajectory.lacking()
    for name in USUAL_SCALARS:
        absent_at = np.isnan(trajectory.scalar(name))
        if name == "learning_rate":
            absent_at &= np.isnan(trajectory.scalar("tensor_learning_rate")).any(axis=1)
            needed = absent_at & follows
        else:
            needed = absent_at.copy()
            needed[[state for state, lacks in incomplete.items() if name in lacks]] = False  # added later
        absent = int(absent_at.sum())
        if needed.any() and (name != "learning_rate" or trajectory.has_gradient):
            missing.append(f"{name} is missing or NaN in {absent} of {trajectory.n_states} steps: {remedies[name]}")
    return missing
