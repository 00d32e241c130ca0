"""Evaluate an objective at the states of a log on workers, each state once, and keep the evaluations in OUT.

Workers are processes with one objective each. A task evaluates one state, so a worker that dies loses only that
evaluation. A file is written when its evaluation is complete, and is never replaced (`natgrad.sources.replayed`).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import Event, Thread
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from natgrad.compute.clusters import worker_number
from natgrad.compute.executors import Executor
from natgrad.compute.plan import PlanLimits
from natgrad.compute.work import Call, Work
from natgrad.kernel.updates import update_products
from natgrad.objectives.evaluation import Curvature, evaluated_update, gradients_differ, tensors_of
from natgrad.objectives.protocol import Tensors, evaluate, load_objective, split_name
from natgrad.schema.errors import InputError
from natgrad.schema.layout import LedgerChunk
from natgrad.schema.logs import logger
from natgrad.schema.names import HVP, STATES
from natgrad.sources.base import Source
from natgrad.sources.opening import open_sources
from natgrad.sources.replayed import Replays, require_no_gradients, source_numbers
from natgrad.sources.steps import LoggedStep, where
from natgrad.storage import Storage

__all__ = ["LogOptions", "evaluate_log"]

_log = logger(__name__)

_DIFFERENT = 1e-3
"""Relative difference of two evaluations at one state above which the objective is refused."""

_PROGRESS_SECONDS = 1.0
"""Time between two reports of the progress."""

_worker_of_process: dict[str, Any] = {}
"""The work of this worker process, with its objective and the steps of the log."""


@dataclass(frozen=True)
class LogOptions:
    """Options for opening the log; see `natgrad.sources.opening.open_sources`."""

    sources: tuple[Storage, ...]
    format: str | None
    mapping: Mapping[str, str]
    shift: Mapping[str, int]
    pattern: str
    exact_names: bool

    def open(self) -> Source:
        """Open the log."""
        return open_sources(
            self.sources,
            self.format,
            self.mapping,
            self.shift,
            pattern=self.pattern,
            exact_names=self.exact_names,
        )


@dataclass(frozen=True)
class _State:
    """Task: evaluate the loss and the gradient at a state.

    Attributes
    ----------
    step : int
    probe : bool
        Evaluate twice, to test whether the values are the same.
    """

    step: int
    probe: bool = False


@dataclass(frozen=True)
class _Update:
    """Task: evaluate the Hessian for the update from a state to the next."""

    step: int
    following: int


@dataclass(frozen=True)
class _Range:
    """Task: evaluate the loss and the gradient at consecutive states, and reduce each update to its products.

    Attributes
    ----------
    steps : tuple of int
        The states. Those of updates that are complete are not evaluated.
    spans : tuple of int
        For each state except the last one, the number of steps to the next one; 0 if no update leads there.
    probe : bool
        Evaluate twice at the first state.
    """

    steps: tuple[int, ...]
    spans: tuple[int, ...]
    probe: bool = False


_Task = _State | _Update | _Range


@dataclass(frozen=True)
class _Evaluated:
    """A state with the values of the objective."""

    step: LoggedStep
    tensors: dict[str, NDArray[Any]]
    loss: float
    gradients: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Evaluations(Work):
    """The evaluation of an objective at states of a log."""

    log: LogOptions
    replays: Replays
    objective: str
    folder: str
    devices: tuple[str, ...]
    curvature: Curvature
    name: str
    limits: PlanLimits = PlanLimits()
    kind = "replay"
    writes = True
    threaded = False
    task_bytes = 0
    worker_bytes = 0
    again = "run natgrad replay again"

    @property
    def out(self) -> Storage:
        return self.replays.folder.parent

    def compute(self, task: _Task) -> list[str]:
        """Evaluate a state, an update or several of them, and return problems."""
        worker = _Worker.of(self)
        if isinstance(task, _State):
            return worker.state(task)
        return worker.update(task) if isinstance(task, _Update) else worker.reduce(task)

    def finish(self, chunk: LedgerChunk, digest: str, parts: Sequence[Any]) -> Any:
        return parts[0]


class _Worker:
    """The objective of a worker process, and the log."""

    def __init__(self, work: _Evaluations) -> None:
        self._work, self._replays = work, work.replays
        _select_device(work.devices)
        self._objective, own = load_objective(work.objective, work.folder)
        self._require_same(own)
        self._source = work.log.open()
        self._steps = {step.number: step for step in self._source.steps()}
        storages = [step.storage for step in self._steps.values()]
        self._of_one_step = len(set(storages)) == len(storages)
        self._record = work.replays.folder / f"evaluations_{uuid.uuid4().hex}.log"

    @classmethod
    def of(cls, work: _Evaluations) -> _Worker:
        """Return the worker of this process."""
        kept = _worker_of_process
        if kept.get("name") != work.name:
            kept.clear()
            kept.update(worker=cls(work), name=work.name)
        worker: _Worker = kept["worker"]
        return worker

    def _require_same(self, own: Mapping[str, Any]) -> None:
        """Record the fingerprint of the first worker, and compare that of the others with it."""
        # in the form in which they are read from the file
        own = json.loads(json.dumps(own))
        if self._replays.write_document("fingerprint", own):
            return
        first = self._replays.document("fingerprint")
        differing = [name for name in {**first, **own} if first.get(name) != own.get(name)]
        if differing:
            name = differing[0]
            raise InputError(
                f"this is not the objective of the evaluations in OUT: {', '.join(differing)} differ",
                where=str(self._replays.folder),
                why=f"{name} was {first.get(name)}, and is {own.get(name)} in this process: the values would "
                "differ, and evaluations of one run are never mixed",
                remedy="restore the objective, its data and its environment; otherwise choose another OUT, or "
                "start from scratch with --overwrite",
            )

    def state(self, task: _State) -> list[str]:
        """Evaluate the loss and the gradient at a state, and store them."""
        found, problems = self._evaluated(task.step, probe=task.probe)
        arrays = {f"{STATES[1]}/{name}": np.ascontiguousarray(array) for name, array in found.gradients.items()}
        self._write(
            self._replays.state(task.step), arrays, {"loss": found.loss}, self._numbers_of_source(found.step)
        )
        return problems

    def reduce(self, task: _Range) -> list[str]:
        """Evaluate consecutive states, and store the inner products of each update. Memory holds two states."""
        complete = self._replays.numbers()[1]
        before: _Evaluated | None = None
        problems: list[str] = []
        for number, span in zip(task.steps, task.spans, strict=False):
            if not span or number in complete:
                continue
            if before is None or before.step.number != number:
                before, found = self._evaluated(number, probe=task.probe and not problems and before is None)
                problems += found
            after, found = self._evaluated(number + span)
            problems += [*found, *self._reduced(before, after)]
            before = after
        return problems

    def _reduced(self, before: _Evaluated, after: _Evaluated) -> list[str]:
        """Store the inner products of an update."""
        names = list(before.gradients)
        dtypes = [array.dtype.name for array in before.gradients.values()]
        own, problems, scalars, hvp = {"names": names, "dtypes": dtypes}, list[str](), dict[str, float](), None
        if not self._replays.write_document("tensors", own) and self._replays.document("tensors") != own:
            raise InputError(
                "the objective returns different gradients than at the states before",
                where=where(before.step),
                why=f"the tensors are {names[:4]}, of {dtypes[:4]}",
                remedy="return the gradients of the same tensors, in the same order and dtypes, at each state",
            )
        if list(after.gradients) != names:
            raise InputError(
                "the objective returns different gradients than at the state before",
                where=where(after.step),
                remedy="return the gradients of the same tensors, in the same order, at each state",
            )
        if self._work.curvature:
            self._note("update", before.step.number)
            found, scalars, problems = evaluated_update(
                self._objective,
                before.tensors,
                after.tensors,
                before.loss,
                before.gradients,
                self._work.curvature,
                f"{where(before.step)} to step {after.step.number}",
            )
            hvp = [found[name] for name in names] if found else None
        gram, ratio = update_products(
            [before.tensors[name] for name in names],
            [after.tensors[name] for name in names],
            [before.gradients[name] for name in names],
            [after.gradients[name] for name in names],
            hvp,
        )
        scalars |= {"loss": before.loss, "next_loss": after.loss, "following": after.step.number}
        texts = self._numbers_of_source(before.step)
        texts |= {f"next_{name}": text for name, text in self._numbers_of_source(after.step).items()}
        self._write(self._replays.update(before.step.number), {"gram": gram, "ratio": ratio}, scalars, texts)
        return problems

    def _evaluated(self, number: int, *, probe: bool = False) -> tuple[_Evaluated, list[str]]:
        """Evaluate the loss and the gradient at a state."""
        step = self._steps[number]
        tensors = self._tensors(step)
        self._note("step", number)
        loss, gradients = evaluate(self._objective, tensors, where(step))
        problems = self._probe(step, tensors, loss, gradients) if probe else []
        return _Evaluated(step, tensors, loss, gradients), problems

    def _numbers_of_source(self, step: LoggedStep) -> dict[str, str]:
        return source_numbers(step) if self._of_one_step else {}

    def _probe(
        self, step: LoggedStep, tensors: Tensors, loss: float, gradients: Mapping[str, NDArray[Any]]
    ) -> list[str]:
        self._note("probe", step.number)
        again, others = evaluate(self._objective, tensors, where(step))
        difference = gradients_differ(gradients, others)
        same_loss = loss == again or (math.isnan(loss) and math.isnan(again))
        off = 0.0 if same_loss else abs(again - loss) / max(abs(loss), abs(again))
        if not max(difference, off) <= _DIFFERENT and not math.isnan(loss):
            raise InputError(
                f"two evaluations at one state differ: the loss is {loss:.9g} and {again:.9g}, and the gradients "
                f"differ by {difference:.2g} of their norm",
                where=where(step),
                why="the objective is not a function of the state: batches are drawn or shuffled, or dropout is on",
                remedy="use the same batches in the same order at every call, and evaluate in eval mode",
            )
        found = {"equal_bits": same_loss and not difference, "gradient": difference, "loss": off}
        self._replays.write_document("determinism", found)
        if found["equal_bits"]:
            return []
        return [
            f"the objective is not deterministic: two evaluations at step {step.number} differ by {difference:.2g} "
            "of the gradient"
        ]

    def update(self, task: _Update) -> list[str]:
        """Evaluate the Hessian for an update."""
        steps = [self._steps[number] for number in (task.step, task.following)]
        with self._replays.open(steps[0], self._replays.state(task.step)) as reader:
            content = reader.content()
            gradients = tensors_of(reader, content, STATES[1])
        before, after = (self._tensors(step) for step in steps)
        self._note("update", task.step)
        hvp, scalars, problems = evaluated_update(
            self._objective,
            before,
            after,
            content.scalars["loss"],
            gradients,
            self._work.curvature,
            f"{where(steps[0])} to step {task.following}",
        )
        found = {f"{HVP}/{name}": array for name, array in hvp.items()}
        self._write(self._replays.update(task.step), found, scalars, {})
        return problems

    def _tensors(self, step: LoggedStep) -> dict[str, NDArray[Any]]:
        with self._source.open(step) as reader:
            content = reader.content()
            require_no_gradients(step, content)
            return tensors_of(reader, content)

    def _write(
        self, file: Storage, arrays: Mapping[str, NDArray[Any]], scalars: Mapping[str, float], texts: dict[str, str]
    ) -> None:
        numbers = {name: np.array(value) for name, value in scalars.items()}
        content = safetensors.numpy.save({**arrays, **numbers}, texts or None)
        try:
            file.put_new(content)
        except FileExistsError:
            _log.info("%s exists already: it was written by a worker that was assumed to have died", file)

    def _note(self, kind: str, step: int) -> None:
        path = self._record.local_path
        assert path is not None  # OUT is a local folder
        with path.open("a") as file:
            file.write(f"{kind} {step}\n")


def _select_device(devices: Sequence[str]) -> None:
    """Make one of the devices visible to this process, before a library counts them."""
    if not devices:
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[worker_number() % len(devices)]


def evaluate_log(
    log: LogOptions,
    replays: Replays,
    executor: Executor,
    *,
    objective: str,
    folder: str,
    curvature: Curvature,
    keep_gradients: bool = False,
    workers: int = 1,
    devices: Sequence[str] = (),
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate an objective at all states of a log that have no evaluation yet.

    Parameters
    ----------
    log : LogOptions
    replays : Replays
        Folder of the evaluations in OUT.
    executor : callable
        It runs tasks in processes (`natgrad.compute.executors`).
    objective : str
        ``package.module:factory``.
    folder : str
        Folder in which modules are found in addition to installed ones.
    curvature : Curvature
    keep_gradients : bool
        Keep the gradients. Otherwise a worker reduces them to inner products immediately.
    workers : int
        Number of workers, among which the states are divided if gradients are not kept.
    devices : sequence of str
        Devices of CUDA for the workers of this machine, in turn.
    overwrite : bool
        Remove existing evaluations.
    progress : callable, optional
        Called with the number of evaluations done and their total number.

    Returns
    -------
    dict
        ``new_evaluations``, and the content of `Replays.provenance`.

    Raises
    ------
    InputError
        If the log has gradients or contains a sweep; if the objective cannot be created, fails, is not that of
        existing evaluations or is not a function of the state, or if another process evaluates the same log.
    """
    split_name(objective)
    with replays.folder.lock(replays.folder.name):
        if overwrite:
            names = replays.folder.list()
            replays.folder.delete_entries(
                [name for name in names if name.endswith((".safetensors", ".json", ".log"))]
            )
        _require_same_request(
            replays, {"objective": objective, "keep_gradients": keep_gradients, **asdict(curvature)}
        )
        source = log.open()
        steps = list(source.steps())
        if any(step.run for step in steps):
            raise InputError(
                "the log contains several runs",
                where=str(source.location),
                remedy="replay each run with its own OUT",
            )
        with source.open(steps[0]) as reader:
            require_no_gradients(steps[0], reader.content())
        work = _Evaluations(
            log, replays, objective, folder, tuple(devices), curvature, f"replay-{uuid.uuid4().hex}"
        )
        probe = not replays.document("determinism")
        spans = [
            other.number - one.number if one.step_span in (0, other.number - one.number) else 0
            for one, other in itertools.pairwise(steps)
        ]
        numbers = [step.number for step in steps]
        if keep_gradients:
            groups = _kept(numbers, spans, *replays.numbers(), bool(curvature), probe)
        else:
            groups = [_reduced(numbers, spans, replays.numbers()[1], workers, probe)]
        before = replays.provenance()["evaluations"]
        no_digests = dict.fromkeys(range(len(steps)), "")
        with _progress(replays, groups, progress):
            for tasks in filter(None, groups):
                items = [Call(LedgerChunk(index, index + 1), (task,)) for index, task in enumerate(tasks)]
                for problems in executor(work, items, lambda: no_digests):
                    for problem in problems:
                        _log.warning("%s", problem)
        found = replays.provenance()
        return {"new_evaluations": found["evaluations"] - before, **found}


@contextmanager
def _progress(
    replays: Replays, groups: Sequence[Sequence[_Task]], progress: Callable[[int, int], None] | None
) -> Iterator[None]:
    """Report the number of new files while tasks run: a task may write many of them, and take hours."""
    if progress is None:
        yield
        return
    first = sum(map(len, replays.numbers()))
    total = sum(len(task.steps) - 1 if isinstance(task, _Range) else 1 for tasks in groups for task in tasks)
    ended, shown = Event(), -1

    def show() -> None:
        nonlocal shown
        done = sum(map(len, replays.numbers())) - first
        if done != shown:
            shown = done
            progress(done, total)

    def watch() -> None:
        while not ended.wait(_PROGRESS_SECONDS):
            show()

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        show()


def _kept(
    numbers: Sequence[int], spans: Sequence[int], states: set[int], updates: set[int], curvature: bool, probe: bool
) -> list[list[_Task]]:
    """Return a task for each state without an evaluation, and then one for each update, which needs that."""
    missing = [number for number in numbers if number not in states]
    of_updates = [
        _Update(number, number + span)
        for number, span in zip(numbers, spans, strict=False)
        if curvature and span and number not in updates
    ]
    return [[_State(number, probe and number == missing[0]) for number in missing], list(of_updates)]


def _reduced(
    numbers: Sequence[int], spans: Sequence[int], updates: set[int], workers: int, probe: bool
) -> list[_Task]:
    """Return a task for each worker, with about as many consecutive states without products for each."""
    missing = [index for index, span in enumerate(spans) if span and numbers[index] not in updates]
    found: list[_Task] = []
    for part in np.array_split(np.array(missing, np.int64), min(workers, len(missing)) or 1):
        if len(part):
            low, high = int(part[0]), int(part[-1]) + 1
            found.append(_Range(tuple(numbers[low : high + 1]), tuple(spans[low:high]), probe and not found))
    return found


def _require_same_request(replays: Replays, request: Mapping[str, Any]) -> None:
    if replays.write_document("replay", request):
        return
    first = replays.document("replay")
    differing = [name for name in request if first.get(name) != request[name]]
    if differing:
        raise InputError(
            f"the options of a replay cannot change: {differing[0]} was {first.get(differing[0])!r}, and is "
            f"{request[differing[0]]!r} now",
            where=str(replays.folder),
            why="all states of a run have the same evaluations",
            remedy="restore the options, choose another OUT, or start from scratch with --overwrite",
        )
