"""Record complete states: the parameters and gradients before each update, in the native format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from natgrad.kernel.updates import portable_products
from natgrad.recording.arrays import tensor_array
from natgrad.recording.background import BackgroundWriter
from natgrad.recording.declared import declare
from natgrad.recording.live import LastUpdate, last_update
from natgrad.recording.parameters import Selection
from natgrad.recording.recorder import Recorder
from natgrad.recording.updates import Update

__all__ = ["StateRecording"]


class StateRecording:
    """A log of states, which a thread writes.

    Parameters
    ----------
    folder : str or Path
    every : int
        The states before and after every n-th update are recorded.
    resume : bool
        Continue the log in the folder.
    limit : int
        Maximum size of the states that wait to be written, in bytes.
    evaluation : str
        One of `natgrad.schema.names.EVALUATIONS`.

    Raises
    ------
    InputError
        See `natgrad.recording.Recorder`; also if the folder contains ledgers, or a log with another interval.
    """

    meaning_of_changes = "the change counts as a part of the update before it"

    def __init__(
        self, folder: str | Path, every: int, *, resume: bool, limit: int, evaluation: str = "unknown"
    ) -> None:
        self._recorder, self._every = Recorder(folder, resume=resume, evaluation=evaluation), every
        # In pairs of states, updates lead only from one step to the next.
        span = 1 if every > 1 else None
        declare(self._recorder.folder, "step_span", span, argument=f"every={every}")
        self._writer = BackgroundWriter(self._record, limit)

    @property
    def folder(self) -> Path:
        """Folder of the log."""
        return self._recorder.folder

    @property
    def seconds_waited(self) -> float:
        """Time for which the training waited for the disk."""
        return self._writer.seconds_waited

    def includes(self, number: int) -> bool:
        """Return True for the states before and after every n-th update."""
        return number % self._every < 2

    def before(self, update: Update, selection: Selection, *, changed: bool) -> None:
        """Copy the parameters."""
        for name, parameter in selection.trained.items():
            update.values("parameter")[name] = tensor_array(parameter, f"parameter {name!r}", copy=True)

    def evaluated(self, update: Update, optimizer: Any, selection: Selection) -> None:
        """Copy the gradients."""
        scale, gradients = getattr(optimizer, "grad_scale", None), update.values("gradient")
        for name, parameter in selection.trained.items():
            if parameter.grad is None:
                # The loss does not depend on this parameter, and the optimizer does not change it.
                gradients[name] = np.zeros_like(update.values("parameter")[name])
                continue
            array = tensor_array(parameter.grad, f"gradient {name!r}", copy=True)
            if scale is not None:
                # The scale is a power of two: the quotient is exact unless it is subnormal.
                array = array.astype(np.promote_types(array.dtype, np.float32)) / np.float32(scale)
            gradients[name] = array

    def evaluated_again(self, update: Update, selection: Selection) -> None:
        """Do nothing: the gradients are copied already."""

    def after(self, update: Update, selection: Selection) -> None:
        """Do nothing: the next state contains the parameters after the step."""

    def complete(self, update: Update) -> None:
        """Do nothing."""

    def write(self, update: Update) -> None:
        """Pass a state to the writer."""
        arrays = (array for kind in update.content.values() for array in kind.values())
        self._writer.put(update, sum(array.nbytes for array in arrays))

    def last(self, update: Update, selections: Sequence[Selection]) -> LastUpdate:
        """Compute the products of the update from the recorded state and the current parameters."""
        found = [update.values(kind) for kind in ("parameter", "gradient")]
        now = {
            name: tensor_array(parameter, f"parameter {name!r}")
            for selection in selections
            for name, parameter in selection.trained.items()
        }
        arrays = [[values[name].ravel() for name in update.rates] for values in (found[0], now, found[1])]
        gram, _ = portable_products(*arrays)
        return last_update(update.number, gram, [array.size for array in arrays[0]], update.rates)

    def finish(self, update: Update, selections: Sequence[Selection]) -> None:
        """Write the state after the last update, which has no gradient."""
        after = Update(update.number + 1)
        if self.includes(after.number):
            for selection in selections:
                self.before(after, selection, changed=False)
            self.write(after)

    def abort(self) -> None:
        """Do nothing: states that wait are valid."""

    def close(self) -> None:
        """Wait until all states are written."""
        self._writer.close()
        if self._writer.error is not None:
            raise self._writer.error

    def _record(self, update: Update) -> None:
        """Write a state, in the thread of the writer."""
        loss = update.closure_loss if update.loss is None else update.loss
        rates: dict[str, float] | float | None = update.rates or None
        if len(set(update.groups.values())) == 1:
            (rate,) = set(update.rates.values())
            rates = None if np.isnan(rate) else rate
        self._recorder.record(
            update.number,
            parameter=update.values("parameter"),
            gradient=update.content.get("gradient"),
            loss=loss,
            learning_rate=rates,
        )
