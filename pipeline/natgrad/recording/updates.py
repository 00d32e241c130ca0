"""Define an update that is being recorded, and what a kind of recording does with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from natgrad.recording.live import LastUpdate
from natgrad.recording.parameters import Selection

__all__ = ["Recording", "Update"]


@dataclass
class Update:
    """An update and the state before it. Several optimizers may make an update together.

    Attributes
    ----------
    number : int
        Number of updates before it.
    loss, closure_loss : object
        The loss from `natgrad.recording.torch.Watch.log`, and that from the closure.
    rates : dict
        Learning rate of each parameter by name, NaN if the optimizer has none.
    groups : dict
        Number of the parameter group of each parameter by name.
    started, evaluated, stepped : set of int
        Optimizers that started their step, those whose gradients are known, and those that completed their step.
    skipped : bool
        An optimizer skipped its step, because a gradient was not finite.
    content : dict
        Arrays or tensors of the kind of recording: for each kind of values, those of each parameter by name.
    """

    number: int
    loss: Any = None
    closure_loss: Any = None
    rates: dict[str, float] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    started: set[int] = field(default_factory=set)
    evaluated: set[int] = field(default_factory=set)
    stepped: set[int] = field(default_factory=set)
    skipped: bool = False
    content: dict[str, dict[str, Any]] = field(default_factory=dict)

    def values(self, kind: str) -> dict[str, Any]:
        """Return the values of a kind by parameter name, which can be added to."""
        return self.content.setdefault(kind, {})


class Recording(Protocol):
    """A kind of recording. The methods are called in this order for each update and optimizer."""

    @property
    def folder(self) -> Path:
        """Folder of the log."""
        ...

    @property
    def meaning_of_changes(self) -> str:
        """Text for a message: the update that a change of the parameters between two steps belongs to."""
        ...

    @property
    def seconds_waited(self) -> float:
        """Time for which the training waited for the disk."""
        ...

    def includes(self, number: int) -> bool:
        """Return True if something is recorded of the update with this number of updates before it."""
        ...

    def before(self, update: Update, selection: Selection, *, changed: bool) -> None:
        """Take the parameters before the step of an optimizer.

        Parameters
        ----------
        update : Update
        selection : Selection
            Its recorded parameters.
        changed : bool
            Parameters were changed between its last step and this one.
        """
        ...

    def evaluated(self, update: Update, optimizer: Any, selection: Selection) -> None:
        """Take the gradients that the optimizer will use."""
        ...

    def evaluated_again(self, update: Update, selection: Selection) -> None:
        """Keep the gradients, because the closure is about to replace them."""
        ...

    def after(self, update: Update, selection: Selection) -> None:
        """Take the parameters after the step of an optimizer."""
        ...

    def complete(self, update: Update) -> None:
        """Take the values that need the steps of all optimizers. It is called for each update, included or not."""
        ...

    def write(self, update: Update) -> None:
        """Write a complete update."""
        ...

    def last(self, update: Update, selections: Sequence[Selection]) -> LastUpdate | None:
        """Return the values of a complete update that is not written yet."""
        ...

    def finish(self, update: Update, selections: Sequence[Selection]) -> None:
        """Write what follows the last update, which is complete and written. The parameters are those after it."""
        ...

    def abort(self) -> None:
        """End the recording after an error. It is not called again, and no error is raised."""
        ...

    def close(self) -> None:
        """Write everything that waits."""
        ...
