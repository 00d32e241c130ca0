"""The protocol of a training log: list the steps, describe the tensors, read a slice into a given buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pipeline.schema import REPLICATE_LOSS, REPLICATE_PARAMETER, InputError, Unavailable

__all__ = [
    "Factor",
    "FactoredMetric",
    "LoggedStep",
    "LoggedTensor",
    "NotYet",
    "OptimizerState",
    "RotatedMetric",
    "Source",
    "StepContent",
    "StepReader",
    "Unreadable",
    "Unshaped",
    "factor_array",
    "vanished",
    "where",
    "widened",
]

# What a log holds --------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class LoggedStep:
    """A step as listed: its number and the files that hold it.

    Attributes
    ----------
    number : int
        Number of updates done before this state.
    path : Path
        File or folder.
    others : tuple of Path
        Further files or folders of the step.
    run : str
        Run of a sweep.
    values : str
        Scalars of the step from logs of many steps, whose sizes and times tell nothing of one step.
    """

    number: int
    path: Path
    others: tuple[Path, ...] = ()
    run: str = ""
    values: str = ""


@dataclass(frozen=True)
class LoggedTensor:
    """A tensor as logged, not loaded."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Factor:
    """A factor of a metric as logged, not loaded.

    Attributes
    ----------
    key : str
        Key in the file.
    shape : tuple of int
        (n, n) of a matrix, (n,) of a diagonal; () of a number.
    dtype : str
    start : int
        First element under the key, where several matrices are stacked.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int = 0


@dataclass(frozen=True)
class FactoredMetric:
    """The metric M that an optimizer uses for a tensor, as Kronecker products of factors that it saves.

    With F_i = (S_i + damping_i)^exponent, where S_i is the factor, or Q'Q of a factor Q that is a ``root``, it is
    F_0 (x) F_1 (x) .. + shift on each of its blocks: the first factor is of the first dimension of the tensor.

    Attributes
    ----------
    rule : str
        Name of the rule.
    blocks : tuple of tuple of Factor
        One product, or several where the tensor was parted; a product of no factors is 1.
    exponent, shift : float
    damping : tuple of float
        One for each factor of a product; none where there is no damping.
    balanced : bool
        Damping is divided between the two factors by their mean eigenvalues (Martens and Grosse, 2015, section
        6.3): ``damping`` is that of the product and the least.
    root : bool
    tensors : tuple of str
        Those that share the block, where there are more: weight and bias of a layer, of which the bias is the last
        column.
    follows : bool
        It is the metric of the update from this state, not of that to it.
    rescaled : bool
        The update was multiplied by a positive factor that is not saved: M is known up to it.
    problem : str
        Why the metric is not known; then nothing else is there.
    """

    rule: str
    blocks: tuple[tuple[Factor, ...], ...] = ()
    exponent: float = 1.0
    damping: tuple[float, ...] = ()
    shift: float = 0.0
    balanced: bool = False
    root: bool = False
    tensors: tuple[str, ...] = ()
    follows: bool = False
    rescaled: bool = False
    problem: str = ""


@dataclass(frozen=True)
class RotatedMetric:
    """The metric Q diag(sqrt(v) + epsilon) Q' / bias of SOAP: ``exp_avg_sq`` is v, in the basis of Q.

    Attributes
    ----------
    epsilon, bias : float
        ``bias`` is sqrt(1 - beta2^updates), or 1 where it is not corrected.
    rescaled, problem
        As of `FactoredMetric`.
    """

    epsilon: float = math.nan
    bias: float = math.nan
    rescaled: bool = False
    problem: str = ""


def factor_array(index: int) -> str:
    """Array under which a step gives the factor of a metric, counted through all blocks.

    Examples
    --------
    >>> factor_array(1)
    'metric_factor/1'
    """
    return f"metric_factor/{index}"


@dataclass(frozen=True)
class OptimizerState:
    """What the optimizer kept between steps, by tensor.

    Attributes
    ----------
    arrays : mapping
        Some of `pipeline.schema.OPTIMIZER_STATES`, each a mapping of tensor name to `LoggedTensor`.
    numbers : mapping
        Some of `pipeline.schema.OPTIMIZER_NUMBERS`, each a mapping of tensor name to value.
    metrics : mapping
        Tensor name to the metric of a rule whose metric is no diagonal of ``exp_avg_sq``; its factors are read as
        `factor_array` says.
    problem : str
        Why it is not known which tensor an entry belongs to; then nothing else is there.
    """

    arrays: Mapping[str, Mapping[str, LoggedTensor]] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    metrics: Mapping[str, FactoredMetric | RotatedMetric] = field(default_factory=dict)
    problem: str = ""

    @property
    def readable(self) -> list[str]:
        """Names of all arrays that a step gives of it."""
        products = [metric.blocks for metric in self.metrics.values() if isinstance(metric, FactoredMetric)]
        most = max((sum(map(len, blocks)) for blocks in products), default=0)
        return [*self.arrays, *map(factor_array, range(most))]


@dataclass(frozen=True)
class StepContent:
    """What a step holds, by the names of the store. A source may give some of it only.

    `pipeline.sources.completion.complete` says what of it can be processed.

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


def widened(words: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Values of elements of a dtype, as `StepReader.read` gives them: of bfloat16 in float32, which is exact."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32) if dtype == "bfloat16" else words


# What is wrong with it ---------------------------------------------------------------------------------------


class Unreadable(InputError):
    """A file that is not of its format, or not yet: truncated, still being written, damaged."""


class NotYet(Unavailable):
    """Nothing is wrong with what is there, but it is not all there yet: run again later."""


def where(step: LoggedStep, array: str = "", tensor: str = "") -> str:
    """Place of an error: file, step, and tensor where one is meant."""
    tensor_part = f", {array} of tensor {tensor!r}" if array and tensor else f", {array}" if array else ""
    return f"{step.path}, step {step.number}{tensor_part}"


def vanished(what: str, step: LoggedStep, array: str = "", tensor: str = "") -> InputError:
    """Return the refusal of a step whose files are gone since they were listed."""
    return InputError(
        what,
        where=where(step, array, tensor),
        why="the training run removed it while it was read (checkpoint rotation), or it was moved",
        remedy="run again; what was committed is kept",
    )
