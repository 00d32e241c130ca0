"""The protocol of a training log: list the steps, describe the tensors, read a slice into a given buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from pipeline.schema import SCALARS, STATES, STORAGE_DTYPES, InputError

__all__ = [
    "SCALAR_KEYS",
    "LoggedStep",
    "LoggedTensor",
    "Source",
    "StepContent",
    "StepReader",
    "sort_content",
    "where",
]


SCALAR_KEYS = frozenset(SCALARS)
"""Keys of the 0-d values of a step."""


@dataclass(frozen=True, order=True)
class LoggedStep:
    """A step as listed: its number and the file that holds it.

    Attributes
    ----------
    number : int
        Number of updates done before this state.
    path : Path
        File or folder.
    """

    number: int
    path: Path


@dataclass(frozen=True)
class LoggedTensor:
    """A tensor as logged, not loaded."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StepContent:
    """What a step holds, by the names of the store.

    Attributes
    ----------
    arrays : mapping
        ``parameter``, ``gradient``, and ``hvp`` where logged, each a mapping of tensor name to `LoggedTensor`.
    scalars : mapping
        ``loss`` and ``learning_rate`` where logged.
    unused : tuple of str
        Keys that are none of these.
    """

    arrays: Mapping[str, Mapping[str, LoggedTensor]]
    scalars: Mapping[str, float] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


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


class Source(Protocol):
    """A training log."""

    location: Path

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


def where(step: LoggedStep, array: str = "", tensor: str = "") -> str:
    """Place of an error: file, step, and tensor where one is meant."""
    tensor_part = f", {array} of tensor {tensor!r}" if array and tensor else f", {array}" if array else ""
    return f"{step.path}, step {step.number}{tensor_part}"


def sort_content(step: LoggedStep, tensors: Mapping[str, LoggedTensor], scalar: Mapping[str, float]) -> StepContent:
    """Sort flat keys ``parameter/<tensor>``, ``gradient/<tensor>``, ``hvp/<tensor>``, ``loss``, ``learning_rate``.

    Parameters
    ----------
    step : LoggedStep
        For messages.
    tensors : mapping
        Every key of the file.
    scalar : mapping
        Values of those keys that are 0-d and named in `SCALARS`.

    Raises
    ------
    InputError
        Where parameters or gradients are missing, their names or shapes differ, or a dtype is not a float.
    """
    arrays: dict[str, dict[str, LoggedTensor]] = {}
    unused = []
    for key, logged in tensors.items():
        array, _, tensor = key.partition("/")
        if array in STATES and tensor:
            if logged.dtype not in STORAGE_DTYPES:
                raise InputError(
                    f"dtype {logged.dtype} is not a float that can be stored as it is",
                    where=where(step, array, tensor),
                    remedy=f"log it as one of {', '.join(STORAGE_DTYPES)}",
                )
            arrays.setdefault(array, {})[tensor] = logged
        elif key not in scalar:
            unused.append(key)
    if "parameter" not in arrays:
        raise InputError(
            "no parameters in this step",
            where=where(step),
            why=f"keys must be parameter/<tensor> and gradient/<tensor>; found {sorted(tensors)[:6]}",
            remedy="write the keys of the native format (natgrad formats)",
        )
    for array in STATES[1:]:
        if array in arrays or array == "gradient":
            _require_same_tensors(step, array, arrays["parameter"], arrays.get(array, {}))
    return StepContent(arrays, scalar, tuple(unused))


def _require_same_tensors(
    step: LoggedStep, array: str, parameters: Mapping[str, LoggedTensor], others: Mapping[str, LoggedTensor]
) -> None:
    for tensor in [*parameters, *others]:
        if tensor not in others or tensor not in parameters:
            lacking = array if tensor not in others else "parameter"
            raise InputError(
                f"tensor {tensor!r} has no {lacking}",
                where=where(step, array, tensor),
                why=f"names differ: parameters {sorted(parameters)[:6]}, {array}s {sorted(others)[:6]}",
                remedy=f"log parameter/<tensor> and {array}/<tensor> under the same names",
            )
        if parameters[tensor].shape != others[tensor].shape:
            raise InputError(
                f"{array} has shape {others[tensor].shape}, its parameter {parameters[tensor].shape}",
                where=where(step, array, tensor),
                remedy="log both in the same shape",
            )
