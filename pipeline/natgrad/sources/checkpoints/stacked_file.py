"""Read a log that is one file: every array has a leading step dimension, or there is a group for each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES, storage_dtype
from natgrad.schema.names import SCALARS
from natgrad.sources.base import Source, StepReader
from natgrad.sources.byte_ranges import ByteRange, part_of
from natgrad.sources.checkpoints.step_groups import GroupStep, StepGroups, constants, step_groups
from natgrad.sources.container import Container, read_errors
from natgrad.sources.families import ANY_NAME, members, usual_families
from natgrad.sources.named_step import NamedStep
from natgrad.sources.names import NATIVE, Names
from natgrad.sources.steps import LoggedStep, LoggedTensor
from natgrad.storage import LocalStorage, Storage

__all__ = ["KeptOpen", "StackedFile"]

_STEPS_LIMIT = 1 << 24
_STEP = ("step", "steps")


class StackedFile:
    """A run in one file: ``parameter/<tensor>`` (step, ...), ``gradient/<tensor>`` (step, ...), ``loss`` (step).

    ``step`` (step) contains the step numbers. By default, steps are counted from 0. Only the parameters must have
    the last step. If the keys have the step as one of their levels, see `natgrad.sources.checkpoints.step_groups`.

    Parameters
    ----------
    location : Path
        The file.
    open_container : callable
        Function that opens it.
    mapping : mapping, optional
        Key by quantity. Takes precedence over the mapping file in the folder of the log.
    names : Names
        Meaning of the keys of a group.
    usually_one_step : bool
        Most files of this format contain one step, so gradients do not prove that there is a step dimension.

    Notes
    -----
    Steps that are open at the same time share the open file, as long as its size and time do not change. If each
    step is opened before the previous one is closed (`KeptOpen`), the file is opened only once.
    """

    def __init__(
        self,
        location: Path,
        open_container: Callable[[LoggedStep], Container],
        mapping: Mapping[str, str] | None = None,
        names: Names = NATIVE,
        *,
        usually_one_step: bool = False,
    ) -> None:
        self.location, self._open = LocalStorage(location), open_container
        stacked = replace(NATIVE, keys={**NATIVE.keys, "step": _STEP})
        self._names, self._group_names = (
            known.of_folder(self._folder).mapped(mapping or {}) for known in (stacked, names)
        )
        self._groups: StepGroups | None = None
        self._usually_one_step = usually_one_step
        self._rows: dict[int, int] = {}
        self._origin, self._step_key = "", ""
        self._shared: _Shared | None = None

    @property
    def _folder(self) -> Storage:
        """Folder of the mapping file."""
        return self.location if self.location.local_path.is_dir() else self.location.parent

    def with_pattern(self, pattern: str) -> StackedFile:
        """Use a pattern of the names of groups (``--pattern``)."""
        self._group_names = replace(self._group_names, pattern=pattern)
        return self

    def steps(self) -> list[LoggedStep]:
        """List the steps; see `natgrad.sources.base.Source`. This opens the file to read the step numbers."""
        with self._open(LoggedStep(0, self.location)) as container:
            self._groups = step_groups(container, self._group_names)
            if self._groups is None and self._group_names.pattern:
                raise InputError(
                    f"this file has no groups whose names match the pattern {self._group_names.pattern!r}",
                    where=str(self.location),
                    remedy="specify the names of the groups that are steps, or omit --pattern",
                )
            numbers = self._numbers(container) if self._groups is None else [*self._groups.keys]
        self._rows = {number: row for row, number in enumerate(numbers)}
        if not numbers or len(self._rows) != len(numbers) or min(numbers) < 0:
            raise InputError(
                f"the steps of this file are {str(numbers)[:80]}: they are empty, negative or not unique",
                where=str(self.location),
                remedy="give each row of the leading dimension a unique step number",
            )
        return [
            LoggedStep(
                number,
                self.location,
                origin=f"row {row} of {self.location.name!r}, {self._origin}"
                if self._groups is None
                else f"{self._groups.origins[number]} in {self.location.name!r}",
                step_span=self._names.step_span,
            )
            for number, row in sorted(self._rows.items())
        ]

    def _numbers(self, container: Container) -> list[int]:
        key = self._step_key = next(filter(container.tensors.__contains__, self._names.keys["step"]), _STEP[0])
        logged = container.tensors.get(key)
        self._origin = "counted from 0" if logged is None else f"its {key!r}"
        if logged is None:
            # The leading length of the parameters is that of the run; without them, it is the most frequent one.
            lengths = [tensor.shape[0] for tensor in self._parameters(container) if tensor.shape]
            rows = max(set(lengths), key=lengths.count) if lengths else 0
            if rows > _STEPS_LIMIT:
                raise InputError(
                    f"the arrays of this file would have {rows} steps",
                    where=str(self.location),
                    why=f"they are corrupt, or their first dimension is not the step; the limit is {_STEPS_LIMIT}",
                    remedy="log every array with a leading step dimension",
                )
            self._require_steps(container, rows, key)
            return list(range(rows))
        if len(logged.shape) != 1 or np.dtype(logged.dtype).kind not in "iu" or logged.shape[0] > _STEPS_LIMIT:
            raise InputError(
                f"{key!r} has dtype {logged.dtype} and shape {logged.shape}, so it is not a list of step numbers",
                where=str(self.location),
                remedy="log it as integers, one per row of the leading dimension",
            )
        numbers = np.zeros(logged.shape[0], logged.dtype)
        container.read(key, 0, numbers)
        return [int(number) for number in numbers]

    def _require_steps(self, container: Container, rows: int, key: str) -> None:
        """Refuse a file without step numbers that may as well contain the parameters of a single state."""
        tensors, lengths = container.tensors, ((rows,), (rows - 1,))
        scalars = [tensors[name].shape for name in self._scalars if name in tensors]
        scalars += [() for name in self._scalars if name in container.numbers]
        # One loss or learning rate is that of a single state.
        has_gradients = () not in scalars and not self._usually_one_step and self._selected(container, "gradient")
        if rows and not has_gradients and not any(shape in lengths for shape in scalars):
            raise InputError(
                "the file has no step numbers",
                where=str(self.location),
                why="it has no losses or learning rates of each step, so that its arrays may be those of a single "
                "state, without a step dimension",
                remedy=f"add the step numbers as an array of integers named {key!r}, one for each state; if the "
                "file contains a single state, pass the folder with the files of all states",
            )

    def _parameters(self, container: Container) -> list[LoggedTensor]:
        """Return the arrays of parameters, or all arrays if none are named as parameters."""
        tensors = container.tensors
        return [tensors[key] for key in self._selected(container, "parameter") or tensors]

    @property
    def _scalars(self) -> set[str]:
        """Keys of scalars."""
        return {name for quantity in (*SCALARS, "step") for name in self._names.keys.get(quantity, ())}

    def _selected(self, container: Container, array: str) -> list[str]:
        """Return the keys of the tensors of an array; none if none are named like those of this array."""
        tensors = container.tensors
        for name in self._names.keys[array]:
            found = list(members(name, tensors).values()) if ANY_NAME in name else []
            found = found or [key for key in tensors if key == name or key.startswith((f"{name}/", f"{name}."))]
            if found:
                return found
        states = {
            key: LoggedTensor(logged.shape[1:], logged.dtype)
            for key, logged in tensors.items()
            if logged.shape and logged.dtype in STORAGE_DTYPES and key not in self._scalars
        }
        return list(usual_families(states).get(array, ("", {}))[1].values())

    def open(self, step: LoggedStep) -> NamedStep:
        """Open a step; see `natgrad.sources.base.Source`."""
        if not self._rows:
            self.steps()
        if self._groups is not None:
            shared = self._share(step)
            return NamedStep(_Group(step, shared, self._groups), self._group_names)
        rows, key = len(self._rows), self._step_key
        return NamedStep(_Row(step, self._share(step), self._rows[step.number], rows, key), self._names)

    def _share(self, step: LoggedStep) -> _Shared:
        """Open the file, or share it with another open step if it has not changed."""
        with read_errors(step, "the log"):
            status = self.location.local_path.stat()
        state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._shared is None or not self._shared.users or self._shared.state != state:
            self._shared = _Shared(self._open(step), state)
        return self._shared


class _Shared:
    """An open file and the number of steps that use it. The last one closes it."""

    def __init__(self, container: Container, state: tuple[int, ...]) -> None:
        self.container, self.state, self.users = container, state, 0

    def leave(self) -> None:
        """Release the file."""
        self.users -= 1
        if not self.users:
            self.container.close()


class _Row(Container):
    """One row of the leading dimension of a container."""

    def __init__(self, step: LoggedStep, shared: _Shared, row: int, rows: int, step_key: str) -> None:
        super().__init__(step)
        shared.users += 1
        self._shared, self._container, self._row = shared, shared.container, row
        container = self._container
        self.unread = container.unread
        lengths = (rows,) if row == rows - 1 else (rows, rows - 1)
        self.tensors = {
            key: LoggedTensor(logged.shape[1:], logged.dtype)
            for key, logged in container.tensors.items()
            if logged.shape and logged.shape[0] in lengths and key != step_key
        }
        self.numbers, self.remarks = constants(container)
        # Describe arrays of another length with an invalid dtype, so that using them is refused.
        self.tensors |= {
            key: LoggedTensor(logged.shape, f"{logged.dtype} of {logged.shape[:1]} steps, not {rows},")
            for key, logged in container.tensors.items()
            if logged.shape[:1] not in ((rows,), (rows - 1,)) and key not in (step_key, *self.numbers)
        }

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        # Errors must name the step that is read, not the one that opened the file.
        self._container.step = self.step
        self._container.read(key, self._row * math.prod(self.tensors[key].shape) + start, out)

    def ranges(self, key: str) -> Sequence[ByteRange] | None:
        """Return where the elements of a tensor are; see `natgrad.sources.base.Ranged`."""
        logged = self.tensors[key]
        size = math.prod(logged.shape)
        itemsize = storage_dtype(logged.dtype).itemsize
        return part_of(self._container.ranges(key), itemsize, self._row * size, size)

    def close(self) -> None:
        """Release the file; its last user closes it."""
        self._shared.leave()


class _Group(GroupStep):
    """One group of a container."""

    def __init__(self, step: LoggedStep, shared: _Shared, groups: StepGroups) -> None:
        super().__init__(step, shared.container, groups)
        shared.users += 1
        self._shared = shared

    def close(self) -> None:
        """Release the file; its last user closes it."""
        self._shared.leave()


class KeptOpen:
    """A log that keeps the last opened step open until another one is opened or its context ends.

    Consecutive steps in one file then do not reopen the file.

    Parameters
    ----------
    log : Source
    """

    def __init__(self, log: Source) -> None:
        self.location, self._log = log.location, log
        self._kept = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._kept.close()

    def steps(self) -> Sequence[LoggedStep]:
        """List the steps; see `natgrad.sources.base.Source`."""
        return self._log.steps()

    @contextmanager
    def open(self, step: LoggedStep) -> Iterator[StepReader]:
        """Open a step. It is closed once it has been left and another step has been opened."""
        users = 2

        def leave() -> None:
            nonlocal users
            users -= 1
            if not users:
                manager.__exit__(None, None, None)

        manager = self._log.open(step)
        reader = manager.__enter__()
        self._kept.close()
        self._kept.callback(leave)
        try:
            yield reader
        finally:
            leave()
