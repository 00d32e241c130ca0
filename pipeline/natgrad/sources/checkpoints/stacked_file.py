"""A log that is one file: every array of the run with a leading step dimension; and how it is kept open."""

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
from natgrad.sources.base import Source, StepReader
from natgrad.sources.container import Container, refused
from natgrad.sources.names import NATIVE, NamedStep
from natgrad.sources.steps import LoggedStep, LoggedTensor
from natgrad.storage import LocalStorage

__all__ = ["KeptOpen", "StackedFile"]

_STEPS_LIMIT = 1 << 24


class StackedFile:
    """A run in one file: ``parameter/<tensor>`` (step, ...), ``gradient/<tensor>`` (step, ...), ``loss`` (step).

    ``step`` (step) has the numbers of the steps, which count from 0 where it is not there.

    Parameters
    ----------
    location : Path
        The file.
    open_container : callable
        Opens it.
    mapping : mapping, optional
        Quantity to the key it stands under, before what the mapping file beside the log says.

    Notes
    -----
    Steps that are open at one time share the open file, as long as its size and time stay what they were. Where one
    step is opened before another is left (`KeptOpen`), the file is opened once for all.
    """

    def __init__(
        self,
        location: Path,
        open_container: Callable[[LoggedStep], Container],
        mapping: Mapping[str, str] | None = None,
    ) -> None:
        self.location, self._open = LocalStorage(location), open_container
        keys = {**NATIVE.keys, "step": ("step",)}
        self._names = replace(NATIVE, keys=keys).of_folder(self.location.parent).mapped(mapping or {})
        self._rows: dict[int, int] = {}
        self._shared: _Shared | None = None

    def steps(self) -> list[LoggedStep]:
        """List the steps; see `natgrad.sources.base.Source`. The file is opened for their numbers."""
        with self._open(LoggedStep(0, self.location)) as container:
            numbers = self._numbers(container)
        self._rows = {number: row for row, number in enumerate(numbers)}
        if not numbers or len(self._rows) != len(numbers) or min(numbers) < 0:
            raise InputError(
                f"the steps of this file are {str(numbers)[:80]}: none, negative, or twice the same",
                where=str(self.location),
                remedy="give each row of the leading dimension a step of its own",
            )
        return [LoggedStep(number, self.location) for number in sorted(numbers)]

    def _numbers(self, container: Container) -> list[int]:
        key = self._names.keys["step"][0]
        logged = container.tensors.get(key)
        if logged is None:
            # Every array has the same leading length in the end; the commonest is that of the run.
            lengths = [tensor.shape[0] for tensor in container.tensors.values() if tensor.shape]
            rows = max(set(lengths), key=lengths.count) if lengths else 0
            if rows > _STEPS_LIMIT:
                raise InputError(
                    f"the arrays of this file claim {rows} steps",
                    where=str(self.location),
                    why=f"they are damaged, or their first dimension is no step; the limit is {_STEPS_LIMIT}",
                    remedy="log every array with a leading step dimension",
                )
            return list(range(rows))
        if len(logged.shape) != 1 or np.dtype(logged.dtype).kind not in "iu" or logged.shape[0] > _STEPS_LIMIT:
            raise InputError(
                f"{key!r} is {logged.dtype} of shape {logged.shape}, not a list of step numbers",
                where=str(self.location),
                remedy="log it as integers, one per row of the leading dimension",
            )
        numbers = np.zeros(logged.shape[0], logged.dtype)
        container.read(key, 0, numbers)
        return [int(number) for number in numbers]

    def open(self, step: LoggedStep) -> NamedStep:
        """Open a step; see `natgrad.sources.base.Source`."""
        if not self._rows:
            self.steps()
        rows, key = len(self._rows), self._names.keys["step"][0]
        return NamedStep(_Row(step, self._share(step), self._rows[step.number], rows, key), self._names)

    def _share(self, step: LoggedStep) -> _Shared:
        """Open the file, or take it as another step that is still open has it, where it is the same by now."""
        with refused(step, "the log"):
            status = self.location.local_path.stat()
        state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._shared is None or not self._shared.users or self._shared.state != state:
            self._shared = _Shared(self._open(step), state)
        return self._shared


class _Shared:
    """An open file and how many steps use it: the last one closes it."""

    def __init__(self, container: Container, state: tuple[int, ...]) -> None:
        self.container, self.state, self.users = container, state, 0

    def leave(self) -> None:
        """Use it no longer."""
        self.users -= 1
        if not self.users:
            self.container.close()


class _Row(Container):
    """One row of the leading dimension of a container."""

    def __init__(self, step: LoggedStep, shared: _Shared, row: int, rows: int, step_key: str) -> None:
        super().__init__(step)
        shared.users += 1
        self._shared, self._whole, self._row = shared, shared.container, row
        whole = self._whole
        self.unread = whole.unread
        self.tensors = {
            key: LoggedTensor(logged.shape[1:], logged.dtype)
            for key, logged in whole.tensors.items()
            if logged.shape[:1] == (rows,) and key != step_key
        }
        # What is not of the run's length is described, so that it is refused where it is meant to be read.
        self.tensors |= {
            key: LoggedTensor(logged.shape, f"{logged.dtype} of {logged.shape[:1]} steps, not {rows},")
            for key, logged in whole.tensors.items()
            if key not in self.tensors and key != step_key
        }

    def read(self, key: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `natgrad.sources.base.StepReader`."""
        # Messages are of the step that is read, whichever opened the file.
        self._whole.step = self.step
        self._whole.read(key, self._row * math.prod(self.tensors[key].shape) + start, out)

    def close(self) -> None:
        """Leave the file, which the last of its users closes."""
        self._shared.leave()


class KeptOpen:
    """A log whose step opened last stays open until another one is, or its context ends.

    Steps that lie in one file then follow each other without the file being opened for each.

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
        """Open a step; it is closed when it is left and another one has been opened."""
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
