"""Compute the ledgers of updates from the states before and after them, and append them to a log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.kernel.updates import refresh_products
from natgrad.recording.ledger_writer import LedgerWriter
from natgrad.schema.errors import InputError
from natgrad.schema.ledger_log import LedgerHeader, RecordedTensor, packed

__all__ = ["LedgersOfStates", "StateBefore"]

Arrays = dict[str, NDArray[Any]]


@dataclass
class StateBefore:
    """A state, and the numbers of the update from it.

    Attributes
    ----------
    step : int
    parameter, gradient : dict
        Arrays by name. The gradient is None after the last update.
    loss : float
        NaN if it is not known.
    rates : float or mapping
        Learning rate of all tensors, or of each by name; NaN if it is not known.
    """

    step: int
    parameter: Arrays
    gradient: Arrays | None
    loss: float
    rates: float | Mapping[str, float]


class LedgersOfStates:
    """A log of ledgers of which the states are passed one after the other.

    The update from a state is recorded when the next state is passed. Until then, a copy of the state is kept.

    Parameters
    ----------
    folder : Path
    evaluation : str
        One of `natgrad.schema.names.EVALUATIONS`.
    """

    def __init__(self, folder: Path, evaluation: str) -> None:
        self._folder, self._evaluation = folder, evaluation
        self._writer: LedgerWriter | None = None
        self._before: StateBefore | None = None
        self._last = -1
        self._shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        self._slopes: dict[str, str] = {}

    def record(self, state: StateBefore) -> None:
        """Record the update to a state, and keep a copy of the state. A step that is not a later one is a restart.

        Raises
        ------
        InputError
            If a step is missing, or a shape or a dtype has changed.
        """
        before = self._before
        if before is not None and state.step > before.step + 1:
            raise InputError(
                f"step {before.step + 1} is missing: step {state.step} follows step {before.step}",
                where=str(self._folder),
                why="the ledger of an update needs the states before and after it",
                remedy='record each step, or record states (mode="full")',
            )
        if before is not None and state.step == before.step + 1 and before.gradient is not None:
            self._append(before, before.gradient, state)
            # The copies are those of the new state now.
            parameter = before.parameter
        else:
            parameter = {name: flat(array).copy() for name, array in state.parameter.items()}
        gradient = state.gradient and {name: flat(array).copy() for name, array in state.gradient.items()}
        self._before = StateBefore(state.step, parameter, gradient, state.loss, state.rates)
        self._shapes = {name: (array.shape, array.dtype.name) for name, array in state.parameter.items()}
        self._slopes = {name: array.dtype.name for name, array in (state.gradient or {}).items()}

    def _append(self, before: StateBefore, gradient: Arrays, after: StateBefore) -> None:
        shapes = {name: (array.shape, array.dtype.name) for name, array in after.parameter.items()}
        if shapes != self._shapes:
            differing = sorted(dict(shapes.items() ^ self._shapes.items()))
            raise InputError(
                f"the shape or dtype of {', '.join(map(repr, differing[:4]))} has changed",
                where=f"{self._folder}, step {after.step}",
                why="all steps of a run must have the same tensors",
                remedy="record the steps of each model as a separate run",
            )
        names = [*before.parameter]
        arrays = (before.parameter, {name: flat(after.parameter[name]) for name in names}, gradient)
        gram, ratio = refresh_products(*([part[name] for name in names] for part in arrays))
        several = isinstance(before.rates, Mapping)
        rates = [before.rates[name] for name in names] if isinstance(before.rates, Mapping) else [before.rates]
        tensors = tuple(
            RecordedTensor(name, *shapes[name], self._slopes[name], index if several else 0)
            for index, name in enumerate(names)
        )
        header = LedgerHeader(tensors, len(rates), self._evaluation)
        # The steps of a file increase.
        if self._writer is None or self._writer.header != header or before.step <= self._last:
            self.close()
            self._writer = LedgerWriter(self._folder, header)
        record = np.zeros((), header.record)
        record["step"], record["span"], record["loss"] = before.step, 1, before.loss
        record["rates"], record["ratio"], record["gram"] = rates, ratio, packed(gram)
        self._writer.append(record)
        self._last = before.step

    def close(self) -> None:
        """Flush the log to the disk."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


def flat(array: NDArray[Any]) -> NDArray[Any]:
    """Return a contiguous array with one dimension; the bits of bfloat16 are uint16."""
    words = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    return np.ascontiguousarray(words).reshape(-1)
