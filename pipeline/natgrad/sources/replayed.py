"""Read a log without gradients together with the evaluations of an objective at its states (`natgrad replay`).

The evaluations are in one folder: ``step_<N>.safetensors`` has the loss and the gradient at state N, and
``update_<N>.safetensors`` what was requested of the update from state N, such as ``hvp``. A file is written once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.logs import logger
from natgrad.schema.names import STATES, USUAL_SCALARS, WEIGHT_DECAY
from natgrad.sources.base import Ranged, Source, StepContent, StepReader
from natgrad.sources.byte_ranges import ByteRange
from natgrad.sources.changes import identity
from natgrad.sources.checkpoints.safetensors_file import SafetensorsFile
from natgrad.sources.named_step import NamedStep
from natgrad.sources.names import NATIVE
from natgrad.sources.steps import LoggedStep, NotYet, where
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
        objective, and ``repeated_evaluations`` of states whose worker died.
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
        listed = self._source.steps()
        states, updates = self._replays.numbers()
        self._original = {self._with_files(step, updates): step for step in listed if step.number in states}
        missing = [step.number for step in listed if step.number not in states]
        if not self._original:
            raise NotYet(
                "the objective has not been evaluated at any state of this log",
                where=str(self._replays.folder),
                why="gradients come from evaluations (--gradient replayed), which natgrad replay makes",
                remedy="run natgrad replay SOURCE OUT --objective MODULE:FACTORY",
            )
        if missing:
            _log.warning(
                "%d states are not evaluated yet, the first is that of step %d: natgrad replay evaluates them",
                len(missing),
                missing[0],
            )
        return list(self._original)

    def _with_files(self, step: LoggedStep, updates: set[int]) -> LoggedStep:
        files = [self._replays.state(step.number)]
        files += [self._replays.update(step.number)] if step.number in updates else []
        return replace(step, others=(*step.others, *files))

    @contextmanager
    def open(self, step: LoggedStep) -> Iterator[StepReader]:
        """Open a step and its evaluations; see `natgrad.sources.base.Source`."""
        original = self._original[step]
        with ExitStack() as stack:
            evaluations = [
                stack.enter_context(self._replays.open(step, file)) for file in step.others[len(original.others) :]
            ]
            _require_same_source(original, evaluations[0])
            yield _ReplayedStep(original, stack.enter_context(self._source.open(original)), evaluations)


class _ReplayedStep:
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
            untrained=True,
            no_gradient="the objective has no gradient for them",
        )

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        self._owner(array).read(array, tensor, start, out)

    def ranges(self, array: str, tensor: str) -> Sequence[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        owner = self._owner(array)
        return owner.ranges(array, tensor) if isinstance(owner, Ranged) else None

    def _owner(self, array: str) -> StepReader:
        if not self._owners:
            self.content()
        return self._owners.get(array, self._reader)


def source_numbers(step: LoggedStep) -> dict[str, str]:
    """Return the size and the time of the files of a step, as texts that are stored with its evaluation."""
    found = identity(step, fresh=True)
    return {_SOURCE_SIZE: str(found["size"]), _SOURCE_TIME: str(found["time"])}


def _require_same_source(step: LoggedStep, evaluation: NamedStep) -> None:
    """Refuse a step whose files were changed after its evaluation."""
    then = evaluation.keys()
    if _SOURCE_SIZE not in then:
        return
    now = source_numbers(step)
    if any(then.get(name) != float(text) for name, text in now.items()):
        raise InputError(
            "the files of this step were changed after the objective was evaluated at it",
            where=where(step),
            why="the run was restarted, or the files were written or copied again: the gradient may be that of "
            "other parameters",
            remedy="restore the files with their times, or start from scratch with natgrad replay --overwrite",
        )


def require_no_gradients(step: LoggedStep, content: StepContent) -> None:
    """Raise InputError if a step contains gradients or lacks parameters."""
    if content.arrays.get(_GRADIENT):
        raise InputError(
            "the log contains gradients, but an objective was to be evaluated at its states",
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
