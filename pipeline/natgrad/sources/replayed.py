"""Read a log without gradients together with the evaluations of an objective at its states (`natgrad replay`).

The evaluations are in one folder, in files that are written once. If gradients are kept, ``step_<N>.safetensors``
has the loss and the gradient at state N, and ``update_<N>.safetensors`` the values that were requested for the
update from state N, such as ``hvp``. Otherwise, the latter has the inner products of the update and the losses of
its states, and the former does not exist.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from natgrad.schema.configuration import Scalar
from natgrad.schema.errors import InputError
from natgrad.schema.logs import logger
from natgrad.schema.names import HESSIAN_NUMBERS, STATES, USUAL_SCALARS, WEIGHT_DECAY, ledger_vectors
from natgrad.sources.base import ReaderByArray, Source, StepContent, StepReader
from natgrad.sources.changes import identity
from natgrad.sources.checkpoints.safetensors_file import SafetensorsFile
from natgrad.sources.configured import configuration_of
from natgrad.sources.named_step import NamedStep
from natgrad.sources.names import NATIVE
from natgrad.sources.steps import LoggedStep, LoggedTensor, NotYet, where
from natgrad.storage import Storage

__all__ = ["REPLAY", "Replayed", "Replays", "require_no_gradients", "source_numbers"]

REPLAY = "replay"
"""Name of the folder of evaluations in OUT."""

_log = logger(__name__)

_PARAMETER, _GRADIENT = STATES[:2]
_STATE, _UPDATE = "step", "update"
_FILE = re.compile(rf"({_STATE}|{_UPDATE})_(\d+)\.safetensors")

_SOURCE_SIZE, _SOURCE_TIME = "source_size", "source_time"

_KEPT = (USUAL_SCALARS[1], WEIGHT_DECAY)
"""Scalars of the log that do not depend on its objective."""


@dataclass(frozen=True)
class Replays:
    """A folder with the evaluations of an objective.

    Attributes
    ----------
    folder : Storage
    """

    folder: Storage

    @property
    def keeps_gradients(self) -> bool:
        """True if the gradients are kept, and not reduced to inner products."""
        return bool(self.document("replay").get("keep_gradients", True))

    @property
    def vectors(self) -> tuple[str, ...]:
        """Vectors of the inner products; empty if gradients are kept."""
        request = self.document("replay")
        return () if self.keeps_gradients else ledger_vectors(request["hvp"] or request["taylor_point"])

    def numbers(self) -> tuple[set[int], set[int]]:
        """Return the steps of the evaluated states, and those of the evaluated updates."""
        found: dict[str, set[int]] = {_STATE: set(), _UPDATE: set()}
        for match in filter(None, map(_FILE.fullmatch, self.folder.list())):
            found[match[1]].add(int(match[2]))
        return found[_STATE], found[_UPDATE]

    def state(self, step: int) -> Storage:
        """Return the file of the evaluation of a state."""
        return self.folder / f"{_STATE}_{step}.safetensors"

    def update(self, step: int) -> Storage:
        """Return the file of the evaluation of the update from a state."""
        return self.folder / f"{_UPDATE}_{step}.safetensors"

    @contextmanager
    def open(self, step: LoggedStep, file: Storage) -> Iterator[NamedStep]:
        """Open the file of an evaluation."""
        with NamedStep(SafetensorsFile(replace(step, storage=file, others=())), NATIVE) as reader:
            yield reader

    def document(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file of the folder; empty if there is none."""
        try:
            found: dict[str, Any] = json.loads((self.folder / f"{name}.json").get())
        except FileNotFoundError:
            return {}
        return found

    def write_document(self, name: str, content: Mapping[str, Any]) -> bool:
        """Write a JSON file of the folder, unless it exists. Return True if it was written."""
        try:
            (self.folder / f"{name}.json").put_new(json.dumps(content, indent=1).encode())
        except FileExistsError:
            return False
        return True

    def provenance(self) -> dict[str, Any]:
        """Return the objective, its fingerprint, its determinism, and the number of evaluations.

        Each state is evaluated once, except for ``probe_evaluations``, which test the determinism of the
        objective, and ``repeated_evaluations`` of states whose worker died or, if gradients are not kept, which are
        at the edges of the ranges of workers.
        """
        lines = [
            line.split()
            for name in self.folder.list()
            if name.startswith("evaluations_")
            for line in (self.folder / name).get().decode().splitlines()
        ]
        states = [line[1] for line in lines if line[0] == _STATE]
        return {
            **self.document("replay"),
            "fingerprint": self.document("fingerprint"),
            "determinism": self.document("determinism"),
            "evaluations": len(states),
            "repeated_evaluations": len(states) - len(set(states)),
            "probe_evaluations": sum(line[0] == "probe" for line in lines),
        }


class Replayed:
    """A log with the gradients of an evaluated objective. Only states that were evaluated are steps.

    Parameters
    ----------
    source : Source
        A log without gradients.
    replays : Replays
    """

    def __init__(self, source: Source, replays: Replays) -> None:
        self._source, self._replays = source, replays
        self._original: dict[LoggedStep, LoggedStep] = {}

    @property
    def location(self) -> Any:
        """Location of the log, for messages."""
        return self._source.location

    def steps(self) -> list[LoggedStep]:
        """List the evaluated steps; see `natgrad.sources.base.Source`."""
        listed = list(self._source.steps())
        states, updates = self._replays.numbers()
        self._original = {}
        previous: LoggedStep | None = None
        for step in listed:
            files = [self._replays.state(step.number)] if step.number in states else []
            files += [self._replays.update(step.number)] if step.number in updates else []
            if not self._replays.keeps_gradients and previous is not None and previous.number in updates:
                # The loss of the last state is in the file of the update that leads to it.
                files.append(self._replays.update(previous.number))
            if files:
                self._original[replace(step, others=(*step.others, *files))] = step
            previous = step
        evaluated = {step.number for step in self._original}
        missing = [step.number for step in listed if step.number not in evaluated]
        if not self._original:
            raise NotYet(
                "the objective has not been evaluated at any state of this log",
                where=str(self._replays.folder),
                why="gradients are those of evaluations by natgrad replay (--gradient replayed)",
                remedy="run natgrad replay SOURCE OUT --objective MODULE:FACTORY",
            )
        if missing:
            _log.warning(
                "%d states are not evaluated yet, the first is that of step %d: natgrad replay evaluates them",
                len(missing),
                missing[0],
            )
        return list(self._original)

    @contextmanager
    def open(self, step: LoggedStep) -> Iterator[StepReader]:
        """Open a step and its evaluations; see `natgrad.sources.base.Source`."""
        original = self._original[step]
        files = step.others[len(original.others) :]
        with ExitStack() as stack:
            if self._replays.keeps_gradients:
                evaluations = [stack.enter_context(self._replays.open(step, file)) for file in files]
                _require_same_source(original, evaluations[0].keys())
                reader = stack.enter_context(self._source.open(original))
                yield _ReplayedStep(original, reader, evaluations)
                return
            found = {file == self._replays.update(step.number): _Products(file) for file in files}
            for own, products in found.items():
                _require_same_source(original, products.numbers, "" if own else "next_")
            own = True in found
            reader = stack.enter_context(self._source.open(original))
            is_last = step == next(reversed(self._original))
            yield _ReducedStep(original, reader, self._replays, found[own], own=own, is_last=is_last)

    def configuration(self, step: LoggedStep, notes: list[str]) -> dict[str, Scalar]:
        """Return the configuration of a run; see `natgrad.sources.configured.Configured`."""
        return configuration_of(self._source, self._original[step], notes)


class _ReplayedStep(ReaderByArray):
    """Reader of a step with evaluations."""

    def __init__(self, step: LoggedStep, reader: StepReader, evaluations: Sequence[NamedStep]) -> None:
        self._step, self._reader, self._evaluations = step, reader, evaluations
        self._owners: dict[str, StepReader] = {}

    def content(self) -> StepContent:
        """Describe the step; see `natgrad.sources.base.StepReader`."""
        content = self._reader.content()
        require_no_gradients(self._step, content)
        arrays = {_PARAMETER: content.arrays[_PARAMETER]}
        scalars = {name: value for name, value in content.scalars.items() if name in _KEPT}
        for evaluation in self._evaluations:
            found = evaluation.content()
            arrays |= found.arrays
            scalars |= found.scalars
            self._owners |= dict.fromkeys(found.arrays, evaluation)
        return replace(
            content,
            arrays=arrays,
            scalars=scalars,
            differences=tuple(one for one in content.differences if one.quantity in _KEPT),
            replicate_loss=(),
            alignment="",
            evaluation="fixed",
            untrained=True,
            no_gradient="the objective has no gradient for them",
        )

    def _owner(self, array: str) -> StepReader:
        if not self._owners:
            self.content()
        return self._owners.get(array, self._reader)


class _Products:
    """Content of the file of an update whose gradients were reduced to inner products."""

    def __init__(self, file: Storage) -> None:
        content = file.get()
        self.arrays = safetensors.numpy.load(content)
        texts = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        scalars = {name: float(array) for name, array in self.arrays.items() if not array.shape}
        self.numbers = {**{name: float(text) for name, text in texts.items()}, **scalars}


class _ReducedStep:
    """Reader of a step with the inner products of the update from it; see `natgrad.sources.base.Recorded`."""

    def __init__(
        self,
        step: LoggedStep,
        reader: StepReader,
        replays: Replays,
        products: _Products,
        *,
        own: bool,
        is_last: bool,
    ) -> None:
        self._step, self._reader, self._replays, self._products = step, reader, replays, products
        self._own, self._is_last = own, is_last
        self._tensors = replays.document("tensors")

    def content(self) -> StepContent:
        """Describe the step; see `natgrad.sources.base.StepReader`."""
        content = self._reader.content()
        require_no_gradients(self._step, content)
        parameters = {name: content.arrays[_PARAMETER][name] for name in self._tensors["names"]}
        arrays = {_PARAMETER: parameters}
        if not self._is_last:
            arrays[_GRADIENT] = {
                name: LoggedTensor(parameters[name].shape, dtype)
                for name, dtype in zip(parameters, self._tensors["dtypes"], strict=True)
            }
        scalars = {name: value for name, value in content.scalars.items() if name in _KEPT}
        numbers = self._products.numbers
        scalars["loss"] = numbers["loss" if self._own else "next_loss"]
        scalars |= {name: numbers[name] for name in HESSIAN_NUMBERS if self._own and name in numbers}
        return StepContent(
            arrays,
            scalars,
            optimizer=content.optimizer,
            recorded=self._replays.vectors,
            evaluation="fixed",
        )

    def products(self, tensors: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the ledger of the update from this step; see `natgrad.sources.base.Recorded`."""
        order = [self._tensors["names"].index(name) for name in tensors]
        gram, ratio = self._products.arrays["gram"][order], self._products.arrays["ratio"][order]
        return (gram, ratio) if self._own else (np.full_like(gram, np.nan), np.full_like(ratio, np.nan))

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of the parameters into a buffer; see `natgrad.sources.base.StepReader`."""
        self._reader.read(array, tensor, start, out)


def source_numbers(step: LoggedStep) -> dict[str, str]:
    """Return the size and the time of the files of a step, as texts that are stored with its evaluation."""
    found = identity(step, fresh=True)
    return {_SOURCE_SIZE: str(found["size"]), _SOURCE_TIME: str(found["time"])}


def _require_same_source(step: LoggedStep, then: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse a step whose files were changed after its evaluation."""
    if prefix + _SOURCE_SIZE not in then:
        return
    now = source_numbers(step)
    if any(then.get(prefix + name) != float(text) for name, text in now.items()):
        raise InputError(
            "the files of this step were changed after the objective was evaluated at it",
            where=where(step),
            why="the run was restarted, or the files were written or copied again: the gradient may be that of "
            "other parameters",
            remedy="restore the files with their times, or start from scratch with natgrad replay --overwrite",
        )


def require_no_gradients(step: LoggedStep, content: StepContent) -> None:
    """Raise InputError if a step has no parameters to evaluate an objective at, or contains gradients."""
    if content.recorded:
        raise InputError(
            "the log has the inner products of updates, and no states at which an objective could be evaluated",
            where=where(step),
            why="natgrad.watch or natgrad.Recorder recorded ledgers, with the gradients of the training loop",
            remedy="process the log with natgrad process, or replay checkpoints of the run",
        )
    if content.arrays.get(_GRADIENT):
        raise InputError(
            "the log contains gradients, but the evaluation of an objective was requested",
            where=where(step, _GRADIENT, next(iter(content.arrays[_GRADIENT]))),
            why="a run has either the gradients of its log or those of an objective",
            remedy="process the log with natgrad process, or pass a log without gradients",
        )
    if not content.arrays.get(_PARAMETER):
        raise InputError(
            "there are no parameters in this step",
            where=where(step, _PARAMETER),
            why=f"found {sorted(content.unused)[:6] or 'nothing else'}",
            remedy="specify their key (--map parameter=KEY)",
        )
