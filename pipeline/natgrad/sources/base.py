"""The protocol of a training log: list the steps, describe the tensors, read a slice into a given buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from natgrad.schema.names import REPLICATE_LOSS, REPLICATE_PARAMETER
from natgrad.sources.optimizers.state import OptimizerState
from natgrad.sources.steps import LoggedStep, LoggedTensor
from natgrad.storage import Storage

__all__ = [
    "Source",
    "StepContent",
    "StepReader",
    "Unshaped",
]

# What a log holds --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepContent:
    """What a step holds, by the names of the store. A source may give some of it only.

    `natgrad.sources.completion.complete` says what of it can be processed.

    Attributes
    ----------
    arrays : mapping
        ``parameter``, ``gradient`` and ``hvp`` where logged, each a mapping of tensor name to `LoggedTensor`.
        So are ``replicate_parameter`` and ``replicate_hvp``; their tensors have one dimension more, the first.
    scalars : mapping
        ``loss`` and ``learning_rate`` where logged.
    unused : tuple of str
        Keys that are none of these.
    notes : tuple of str
        What a user should know about these values.
    ties : mapping
        Names of tensors that lie in the memory of another one, to the name of that one.
    untrained : bool
        The parameters are a whole model: buffers and frozen tensors, which have no gradient, are among them.
    optimizer : OptimizerState, optional
        Where it was saved; its arrays are read as the others are.
    replicate_loss : tuple of float
        Losses of the states that the replicates lead to, where logged.
    no_gradient : str
        Why tensors have no gradient, where that is not that they are buffers or frozen; then they are named.
    """

    arrays: Mapping[str, Mapping[str, LoggedTensor]]
    scalars: Mapping[str, float] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    untrained: bool = False
    optimizer: OptimizerState | None = None
    replicate_loss: tuple[float, ...] = ()
    no_gradient: str = ""

    @property
    def replicates(self) -> int:
        """Number R of replicates; 0 where there are none."""
        shapes = [tensor.shape for tensor in self.arrays.get(REPLICATE_PARAMETER, {}).values()]
        return shapes[0][0] if shapes and shapes[0] else 0

    @property
    def numbers(self) -> dict[str, float | tuple[float, ...]]:
        """All numbers of the step: the scalars, and the losses of the replicates."""
        return {**self.scalars, **({REPLICATE_LOSS: self.replicate_loss} if self.replicate_loss else {})}


# How it is read ----------------------------------------------------------------------------------------------


class StepReader(Protocol):
    """An open step."""

    def content(self) -> StepContent:
        """Describe the step without loading its tensors."""
        ...

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor, flattened in C order, into a buffer.

        Parameters
        ----------
        array, tensor : str
            As in `content`.
        start : int
            First element.
        out : one-dimensional contiguous array
            Written; of the logged dtype, bfloat16 as its bits in uint16.
        """
        ...


@runtime_checkable
class Unshaped(Protocol):
    """A step whose files have neither the names nor the shapes of its tensors: the parameters have."""

    def shaped(self, parameters: Mapping[str, LoggedTensor]) -> StepContent:
        """Describe the step by the names and shapes of parameters, by which it is read from then on.

        Raises
        ------
        InputError
            Where what it holds does not fit them.
        """
        ...


class Source(Protocol):
    """A training log."""

    @property
    def location(self) -> Path | Storage:
        """Location of the log, for messages."""
        ...

    def steps(self) -> Sequence[LoggedStep]:
        """List the steps, sorted by number; one listing of the folder, no file is opened.

        Raises
        ------
        InputError
            Where there are none, or two files claim one step.
        """
        ...

    def open(self, step: LoggedStep) -> AbstractContextManager[StepReader]:
        """Open a step.

        Raises
        ------
        InputError
            Where the file is truncated, unreadable or not of the format.
        """
        ...


# What is wrong with it ---------------------------------------------------------------------------------------
