"""Average losses and gradients over batches, weighted by the number of elements that each loss is a mean of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from natgrad.schema.arguments import shown
from natgrad.schema.errors import InputError

__all__ = ["RunningMean", "counted"]


def counted(found: Any, *, alone: bool) -> tuple[Any, Any]:
    """Return the mean loss of a batch, and the number of elements that it is the mean of.

    Parameters
    ----------
    found : object
        Result of the user's loss: the losses of the elements, the mean and the number, or the mean alone.
    alone : bool
        There is no other batch, so that the number does not matter.

    Raises
    ------
    InputError
        If the result is none of these.
    """
    if isinstance(found, tuple):
        if len(found) == 2 and getattr(found[0], "shape", ()) == ():
            return found
    elif getattr(found, "shape", ()):
        count = math.prod(found.shape)
        return (found.mean() if count else None), count
    elif alone:
        return found, 1
    raise InputError(
        f"the loss of a batch is {shown(found)}",
        where="the function loss of the objective",
        why="the mean over several batches needs the number of elements of each",
        remedy="return the losses of the elements as an array, or the mean and the number of elements",
    )


class RunningMean:
    """Mean of losses and gradients, which is updated in place. The first ones are kept exactly."""

    def __init__(self) -> None:
        self._count, self._loss = 0.0, 0.0
        self._gradients: list[Any] = []

    def add(self, count: float, loss: float, gradients: Sequence[Any]) -> None:
        """Add the mean of a number of elements.

        Raises
        ------
        InputError
            If the number is negative or not finite.
        """
        if not (math.isfinite(count) and count >= 0):
            raise InputError(
                f"a batch has {count} counted elements",
                where="the function loss of the objective",
                remedy="return the mean and the number of elements that it is the mean of",
            )
        self._count += count
        share = count / self._count
        if share == 1.0:
            self._loss, self._gradients = loss, list(gradients)
            return
        self._loss += (loss - self._loss) * share
        self._gradients = [
            mean + (one - mean) * share for mean, one in zip(self._gradients, gradients, strict=True)
        ]

    def result(self) -> tuple[float, list[Any]]:
        """Return the means.

        Raises
        ------
        InputError
            If nothing was added.
        """
        if not self._count:
            raise InputError("no batch has a counted element", remedy="check the labels and masks of the batches")
        return self._loss, self._gradients
