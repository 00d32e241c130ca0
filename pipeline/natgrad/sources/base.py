"""Define the protocol of a training log: list the steps, describe the tensors, read a slice into a buffer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.names import REPLICATE_LOSS, REPLICATE_PARAMETER
from natgrad.sources.byte_ranges import ByteRange, Placement
from natgrad.sources.optimizers.state import OptimizerState
from natgrad.sources.steps import LoggedStep, LoggedTensor
from natgrad.storage import Storage

__all__ = [
    "Difference",
    "Keyed",
    "ListedBefore",
    "Ranged",
    "ReaderByArray",
    "Recorded",
    "Restarted",
    "Source",
    "StepContent",
    "StepReader",
    "Unshaped",
    "before_restarts",
]

# Contents of a log --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Two different values of a scalar of a step.

    Attributes
    ----------
    quantity, used, other : str
        Name of the scalar, and where its two values are.
    value, other_value : float
        The value that is used (NaN if none is), and the other one.
    """

    quantity: str
    used: str
    value: float
    other: str
    other_value: float

    @property
    def matters(self) -> bool:
        """Return False if both values are equal in single precision, as many logs have only single precision."""
        a, b = self.value, self.other_value
        if math.isnan(a) or math.isnan(b):
            return math.isnan(a) != math.isnan(b)
        return not math.isclose(a, b, rel_tol=2.0**-23)


@dataclass(frozen=True)
class StepContent:
    """The contents of a step, under the names that the store uses. A source may provide only some of them.

    `natgrad.sources.completion.complete` selects the part that can be processed.

    Attributes
    ----------
    arrays : mapping
        ``parameter``, ``gradient`` and ``hvp`` if logged, each a mapping of tensor name to `LoggedTensor`.
        The same holds for ``replicate_parameter`` and ``replicate_hvp``, whose tensors have an additional first
        dimension.
    scalars : mapping
        ``loss`` and ``learning_rate`` if logged.
    unused : tuple of str
        Keys that belong to none of these.
    notes : tuple of str
        Remarks for the user about these values.
    ties : mapping
        For each name of a tensor, the name of another tensor that shares its memory.
    untrained : bool
        The parameters are those of a full model. They may include buffers and frozen tensors, which have no
        gradient.
    optimizer : OptimizerState, optional
        State of the optimizer, if saved. Its arrays are read like the others.
    replicate_loss : tuple of float
        Losses of the states that the replicates lead to, if logged.
    no_gradient : str
        Why tensors have no gradient, if the reason is not that they are buffers or frozen. Notes then list the
        names of these tensors.
    differences : tuple of Difference
        Scalars for which the log also contains a different value.
    alignment : str
        Question about the states that the gradients belong to, if the format leaves it open.
    aliases : mapping
        Other names of parameters, under which another log may contain their gradients, to the names of parameters.
    absent : mapping
        Quantities whose key the user specified, but which the step does not have, and the error for each. Only the
        last step of a run may lack them.
    recorded : tuple of str
        Vectors of the inner products of the update from the step, if it has them (`Recorded`). The elements of its
        arrays cannot be read then.
    evaluation : str
        Data that loss and gradient are evaluated on, one of `natgrad.schema.names.EVALUATIONS`.
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
    differences: tuple[Difference, ...] = ()
    alignment: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, InputError] = field(default_factory=dict)
    recorded: tuple[str, ...] = ()
    evaluation: str = "unknown"

    @property
    def readable(self) -> Mapping[str, Mapping[str, LoggedTensor]]:
        """Arrays whose elements can be read."""
        return {} if self.recorded else self.arrays

    @property
    def replicates(self) -> int:
        """Number R of replicates; 0 if there are none."""
        shapes = [tensor.shape for tensor in self.arrays.get(REPLICATE_PARAMETER, {}).values()]
        return shapes[0][0] if shapes and shapes[0] else 0

    @property
    def numbers(self) -> dict[str, float | tuple[float, ...]]:
        """All numbers of the step: the scalars and the losses of the replicates."""
        return {**self.scalars, **({REPLICATE_LOSS: self.replicate_loss} if self.replicate_loss else {})}


# Access -------------------------------------------------------------------------------------------------------


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
            Names from `content`.
        start : int
            First element.
        out : one-dimensional contiguous array
            Buffer of the logged dtype, which is overwritten. bfloat16 is stored as uint16 bit patterns.
        """
        ...


@runtime_checkable
class Ranged(Protocol):
    """A step whose tensors can be read from its files without this reader."""

    def ranges(self, array: str, tensor: str) -> Sequence[ByteRange] | None:
        """Return where the elements of a tensor are, in C order; None if they are not plain bytes of their dtype.

        Parameters
        ----------
        array, tensor : str
            Names from `StepReader.content`.
        """
        ...

    def placement(self, arrays: Collection[str]) -> Placement | None:
        """Return where the ranges of some arrays begin, to compare steps; None if steps cannot be compared."""
        ...


class ReaderByArray(ABC):
    """Base of a reader that reads each array with another one."""

    @abstractmethod
    def _owner(self, array: str) -> StepReader:
        """Return the reader of an array."""

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Read elements of a tensor into a buffer; see `StepReader`."""
        self._owner(array).read(array, tensor, start, out)

    def ranges(self, array: str, tensor: str) -> Sequence[ByteRange] | None:
        """Return where the elements of a tensor are; see `Ranged`."""
        owner = self._owner(array)
        return owner.ranges(array, tensor) if isinstance(owner, Ranged) else None

    def placement(self, arrays: Collection[str]) -> Placement | None:
        """Return where the ranges of some arrays begin; see `Ranged`."""
        readers = list({id(reader): reader for reader in map(self._owner, arrays)}.values())
        owned = [[array for array in arrays if self._owner(array) is reader] for reader in readers]
        found = [
            reader.placement(own) if isinstance(reader, Ranged) else None
            for reader, own in zip(readers, owned, strict=True)
        ]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found):
            return None
        return Placement(
            (owned, [part.table for part in parts]),
            tuple(file for part in parts for file in part.files),
            tuple(start for part in parts for start in part.starts),
        )


@runtime_checkable
class Recorded(Protocol):
    """A step that has the inner products of the update from it, instead of the elements of its tensors."""

    def products(self, tensors: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the ledger of the update from this step; NaN if there is none.

        Parameters
        ----------
        tensors : sequence of str
            Names from `StepReader.content`, in the order of the result.

        Returns
        -------
        gram : float64 array, shape (tensors, vectors, vectors)
            Inner products of the vectors of `StepContent.recorded`.
        ratio : float64 array, shape (tensors,)
            Ratio c of the residual, gradient - c displacement.

        Raises
        ------
        InputError
            If the log is damaged.
        """
        ...


@runtime_checkable
class Unshaped(Protocol):
    """A step whose files contain neither the names nor the shapes of its tensors; the parameters provide both."""

    def shaped(self, parameters: Mapping[str, LoggedTensor]) -> StepContent:
        """Describe the step with the names and shapes of the parameters, and use these names in later reads.

        Raises
        ------
        InputError
            If the contents of the step do not match the parameters.
        """
        ...


@runtime_checkable
class Keyed(Protocol):
    """A step, or a log of scalars, that lists all of its keys, whether they have a known meaning or not."""

    def keys(self) -> Mapping[str, LoggedTensor | float]:
        """Return the tensors and numbers by key, with levels joined by slashes.

        Raises
        ------
        InputError
            If the files cannot be read.
        """
        ...


class Source(Protocol):
    """A training log."""

    @property
    def location(self) -> Path | Storage:
        """Location of the log, for messages."""
        ...

    def steps(self) -> Sequence[LoggedStep]:
        """List the steps, sorted by number. This lists the folder once and opens no file.

        Raises
        ------
        InputError
            If there are none, or if two files have the same step number.
        """
        ...

    def open(self, step: LoggedStep) -> AbstractContextManager[StepReader]:
        """Open a step.

        Raises
        ------
        InputError
            If the file is truncated, unreadable or not of this format.
        """
        ...


@runtime_checkable
class Restarted(Protocol):
    """A log that still has the steps that a restarted run has logged again."""

    def earlier(self) -> Sequence[Source]:
        """Return the log as it was before each restart, the oldest first."""
        ...


def before_restarts(source: Source) -> Sequence[Source]:
    """Return a log as it was before each restart of the run, as far as it still has these steps."""
    return source.earlier() if isinstance(source, Restarted) else ()


class ListedBefore:
    """A log with an earlier listing of its steps.

    Parameters
    ----------
    source : Source
    steps : sequence of LoggedStep
    """

    def __init__(self, source: Source, steps: Sequence[LoggedStep]) -> None:
        self._source, self._steps = source, steps

    @property
    def location(self) -> Path | Storage:
        """Location of the log, for messages."""
        return self._source.location

    def steps(self) -> Sequence[LoggedStep]:
        """Return the steps; see `Source.steps`."""
        return self._steps

    def open(self, step: LoggedStep) -> AbstractContextManager[StepReader]:
        """Open a step; see `Source.open`."""
        return self._source.open(step)


# Errors -------------------------------------------------------------------------------------------------------
